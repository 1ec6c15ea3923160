"""The page's files, as the package carries them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from importlib import resources

_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    """One of them: its content, media type, and a tag that changes with the content."""

    content: bytes = field(repr=False)
    kind: str
    tag: str


def page_files() -> dict[str, PageFile]:
    """All of them by name. What has another name than these is never looked for on a disk."""
    found = {}
    folder = resources.files("retinanet.serve") / "page"
    for file in folder.iterdir() if folder.is_dir() else ():
        kind = _KINDS.get("." + file.name.rpartition(".")[2])
        if kind is not None and file.is_file():
            content = file.read_bytes()
            tag = f'"{hashlib.blake2b(content, digest_size=16).hexdigest()}"'
            found[file.name] = PageFile(content, kind, tag)
    return found
