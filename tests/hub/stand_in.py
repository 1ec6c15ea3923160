"""A stand-in for the Hugging Face hub: the requests of huggingface_hub's client, in memory."""

from __future__ import annotations

import base64
import hashlib
import importlib
import json
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

httpx: Any = None
with suppress(ImportError):
    from huggingface_hub.utils import get_session

    # The HTTP library of huggingface_hub: httpx, or httpx2 in later versions.
    httpx = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    _OPTIONS = {"event_hooks": get_session().event_hooks, "follow_redirects": True}

URL = "http://hub.test"
TOKEN = "hf_aSecretToken"

HOME = "/home/maria.secret/projects"
HOST = "maria-workstation-17"
"""Names in the records of a run that a push must leave out."""


def default_client() -> Any:
    """Build the client that huggingface_hub uses by default."""
    return httpx.Client(timeout=None, **_OPTIONS)


@dataclass
class Repository:
    """Files by path of each commit, by id; `refs` are branches and tags."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def add(self, files: dict[str, bytes], message: str = "") -> str:
        """Commit `files` to ``main``."""
        files = {**self.commits.get(self.refs.get("main", ""), {}), **files}
        commit = hashlib.sha1(f"{len(self.commits)}{message}{sorted(files)}".encode()).hexdigest()
        self.commits[commit] = files
        self.messages.append(message)
        self.refs["main"] = commit
        return commit


class Rejected(Exception):
    """An error response of the hub."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        headers = {"X-Error-Message": message, "X-Error-Code": code}
        self.response = httpx.Response(status, json={"error": message}, headers=headers)


@dataclass
class Hub:
    """Responses to the requests of one client.

    Attributes:
        tokens: user names by token.
        repositories: by ``owner/name``.
        requests: method and path of every request.
        broken: respond to every request with 500.
    """

    tokens: dict[str, str] = field(default_factory=dict)
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    broken: bool = False

    def client(self) -> Any:
        return httpx.Client(transport=httpx.MockTransport(self.respond), **_OPTIONS)

    def respond(self, request: Any) -> Any:
        path = unquote(request.url.path)
        self.requests.append((request.method, path))
        if str(request.url).startswith("http://127.0.0.1:9"):
            raise httpx.ConnectError("connection refused")
        user = self.tokens.get(request.headers.get("Authorization", "").removeprefix("Bearer "))
        try:
            if self.broken:
                raise Rejected(500, "the hub is down")
            return self._respond(path.strip("/").split("/"), user, request.read())
        except Rejected as error:
            return error.response

    def _respond(self, parts: list[str], user: str | None, body: bytes) -> Any:
        match parts:
            case ["api", "repos", "create"]:
                return self._create(json.loads(body), user)
            case ["api", "validate-yaml"]:
                return httpx.Response(200, json={"warnings": [], "errors": []})
            case ["api", "models", owner, name, *rest]:
                repository, commit = self._find(f"{owner}/{name}", user, *rest[1:2])
                if rest[:1] in (["preupload"], ["commit"]):
                    return self._write(rest[0], f"{owner}/{name}", user, body)
                contents = repository.commits[commit]
                if rest[:1] == ["tree"]:
                    return httpx.Response(200, json=[_entry(*item) for item in contents.items()])
                files = [{"rfilename": path} for path in contents]
                info = {"id": f"{owner}/{name}", "sha": commit, "private": repository.private}
                info |= {"tags": [], "downloads": 0, "likes": 0, "siblings": files}
                return httpx.Response(200, json=info)
            case [owner, name, "resolve", revision, path]:
                repository, commit = self._find(f"{owner}/{name}", user, revision)
                content = repository.commits[commit][path]
                headers = {"X-Repo-Commit": commit, "ETag": f'"{_entry(path, content)["oid"]}"'}
                return httpx.Response(200, content=content, headers=headers)
        raise AssertionError(f"unexpected request: {parts}")

    def _create(self, options: dict[str, Any], user: str | None) -> Any:
        name = f"{options['organization']}/{options['name']}"
        if user is None:
            raise Rejected(401, "Invalid username or password.")
        if options["organization"] != user:
            raise Rejected(403, "You don't have the rights to create a model there")
        url = f"{URL}/{name}"
        if name in self.repositories:
            return httpx.Response(409, json={"error": "You already created it", "url": url})
        private = options.get("private") or options.get("visibility") == "private"
        self.repositories[name] = Repository(private=bool(private))
        self.repositories[name].add({".gitattributes": b""}, "initial commit")
        return httpx.Response(200, json={"url": url})

    def _find(self, name: str, user: str | None, revision: str = "main") -> tuple[Repository, str]:
        repository = self.repositories.get(name)
        if repository is None or (repository.private and user is None):
            raise Rejected(404 if user else 401, "Repository not found", "RepoNotFound")
        if repository.gated and user is None:
            raise Rejected(401, "Access is restricted", "GatedRepo")
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            raise Rejected(404, "Invalid rev id", "RevisionNotFound")
        return repository, commit

    def _write(self, action: str, name: str, user: str | None, body: bytes) -> Any:
        if user != name.split("/")[0]:
            raise Rejected(403, "Forbidden: you lack the rights to write")
        if action == "preupload":
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return httpx.Response(200, json={"files": modes})
        lines = [json.loads(line) for line in body.splitlines()]
        [message] = [line["value"]["summary"] for line in lines if line["key"] == "header"]
        values = [line["value"] for line in lines if line["key"] == "file"]
        files = {value["path"]: base64.b64decode(value["content"]) for value in values}
        commit = self.repositories[name].add(files, message)
        url = f"{URL}/{name}/commit/{commit}"
        return httpx.Response(200, json={"success": True, "commitOid": commit, "commitUrl": url})


def _entry(path: str, content: bytes) -> dict[str, Any]:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    return {"type": "file", "path": path, "size": len(content), "oid": blob}
