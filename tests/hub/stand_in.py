"""A stand-in for the Hugging Face hub: the part of its HTTP interface that huggingface_hub uses.

Repositories, commits and files live in memory. Written against huggingface_hub's own client:
``/api/repos/create``, ``/api/validate-yaml``, ``preupload``, LFS's batch and upload, ``commit`` as
lines of JSON, ``/api/models/...`` (info and tree), and ``resolve``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Commits by id, in order; each is all files by path."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)
    large: set[str] = field(default_factory=set)

    def add(self, files: dict[str, bytes], message: str = "") -> str:
        """A commit on ``main`` of what was there and `files`."""
        whole = {**self.commits.get(self.refs.get("main", ""), {}), **files}
        text = f"{len(self.commits)}{message}{sorted(whole)}".encode()
        commit = hashlib.sha1(text).hexdigest()
        self.commits[commit] = whole
        self.messages.append(message)
        self.refs["main"] = commit
        return commit


@dataclass
class Hub:
    """What the server knows, and what it was asked.

    Attributes:
        url: its address.
        tokens: user names by token.
        repositories: by ``owner/name``.
        blobs: content of large files by SHA-256.
        requests: method and path of every call.
        broken: answers every call with 500.
    """

    url: str = ""
    tokens: dict[str, str] = field(default_factory=dict)
    repositories: dict[str, Repository] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    broken: bool = False


@contextmanager
def stand_in() -> Iterator[Hub]:
    """A hub on a free port of this machine, for the time of the context."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self._chunks() if self.headers.get("Transfer-Encoding") else self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        if self.hub.broken:
            return self._json({"error": "the hub is down"}, 500)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "repos"]:
            return self._create(json.loads(body))
        if parts[:2] == ["api", "validate-yaml"]:
            return self._json({"warnings": [], "errors": []})
        if parts[0] == "upload":
            self.hub.blobs[parts[1]] = body
            return self._send(200)
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            return self._of_repository("/".join(parts[2:4]), parts[4:], body)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(path.strip("/").split(".git/")[0], json.loads(body))
        if len(parts) >= 5 and parts[2] == "resolve":
            return self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return self._json({"error": "no such place"}, 404)

    def _chunks(self) -> bytes:
        whole = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            whole += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return whole

    @property
    def user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return self.hub.tokens.get(token)

    def _create(self, asked: dict[str, Any]) -> None:
        if self.user is None:
            return self._json({"error": "Invalid username or password."}, 401)
        if asked["organization"] != self.user:
            return self._json({"error": "You don't have the rights to create a model there"}, 403)
        name = f"{asked['organization']}/{asked['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repositories:
            return self._json({"error": "You already created this model repo", "url": url}, 409)
        private = asked.get("private") or asked.get("visibility") == "private"
        repository = Repository(private=bool(private))
        repository.add({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.hub.repositories[name] = repository
        return self._json({"url": url})

    def _seen(self, name: str) -> Repository | None:
        """The repository, where the caller may see it; else the answer that hides it is sent."""
        repository = self.hub.repositories.get(name)
        hidden = repository is not None and repository.private and self.user is None
        if repository is None or hidden:
            code = {"X-Error-Code": "RepoNotFound"}
            self._json({"error": "Repository not found"}, 404 if self.user else 401, code)
            return None
        if repository.gated and self.user is None:
            self._json({"error": "Access is restricted"}, 401, {"X-Error-Code": "GatedRepo"})
            return None
        return repository

    def _commit_of(self, repository: Repository, revision: str) -> str | None:
        commit = repository.refs.get(revision, revision)
        if commit in repository.commits:
            return commit
        self._json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        return None

    def _of_repository(self, name: str, rest: list[str], body: bytes) -> None:
        repository = self._seen(name)
        if repository is None:
            return None
        what = rest[0] if rest else "revision"
        commit = self._commit_of(repository, rest[1] if len(rest) > 1 else "main")
        if commit is None:
            return None
        files = repository.commits[commit]
        if what == "revision":
            siblings = [{"rfilename": path} for path in files]
            info = {"id": name, "sha": commit, "private": repository.private, "tags": []}
            return self._json({**info, "downloads": 0, "likes": 0, "siblings": siblings})
        if what == "tree":
            return self._json(
                [self._entry(repository, path, files[path]) for path in sorted(files)]
            )
        if what == "preupload":
            if self.user is None:
                return self._json({"error": "Invalid username or password."}, 401)
            asked = json.loads(body)["files"]
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for one in asked
            ]
            return self._json({"files": modes})
        if what == "commit":
            return self._commit(name, repository, body)
        return self._json({"error": "no such place"}, 404)

    def _entry(self, repository: Repository, path: str, content: bytes) -> dict[str, Any]:
        entry = {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content)}
        if path in repository.large:
            sha = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 134}
        return entry

    def _batch(self, name: str, asked: dict[str, Any]) -> None:
        if self._seen(name) is None:
            return None
        objects = [
            {
                "oid": one["oid"],
                "size": one["size"],
                "actions": {"upload": {"href": f"{self.hub.url}/upload/{one['oid']}"}},
            }
            for one in asked["objects"]
        ]
        return self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repository: Repository, body: bytes) -> None:
        if self.user != name.split("/")[0]:
            return self._json({"error": "Forbidden: you lack the rights to write"}, 403)
        files: dict[str, bytes] = {}
        message = ""
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
                repository.large.add(value["path"])
        commit = repository.add(files, message)
        url = f"{self.hub.url}/{name}/commit/{commit}"
        return self._json({"success": True, "commitOid": commit, "commitUrl": url})

    def _file(self, name: str, revision: str, path: str) -> None:
        repository = self._seen(name)
        if repository is None:
            return None
        commit = self._commit_of(repository, revision)
        if commit is None:
            return None
        content = repository.commits[commit].get(path)
        if content is None:
            return self._json({"error": "no file"}, 404, {"X-Error-Code": "EntryNotFound"})
        digest = (
            hashlib.sha256(content).hexdigest() if path in repository.large else _blob_id(content)
        )
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        return self._send(200, content, headers)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if status >= 400 and isinstance(value, dict):
            headers = {**(headers or {}), "X-Error-Message": value["error"]}
        content = json.dumps(value).encode()
        self._send(status, content, {"Content-Type": "application/json", **(headers or {})})

    def _send(
        self, status: int, content: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _blob_id(content: bytes) -> str:
    """git's id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


if __name__ == "__main__":  # to try the commands by hand
    import time

    with stand_in() as hub:
        hub.tokens["hf_secret_of_me"] = "me"
        print(f"HF_ENDPOINT={hub.url}", flush=True)
        while True:
            time.sleep(1)
