"""Where a collection's files lie: a folder on a disk, or under any address that fsspec knows."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from retinanet.errors import DataError, MissingExtraError

# On these a file is there when it is whole, and not before; moving one would be a copy.
_WHOLE_AT_ONCE = frozenset(
    {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "hf", "oci", "oss", "r2", "memory"}
)

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/+")

DRAFTS = ".drafts"
"""The folder of what is being written, in each store."""


def is_address(given: str) -> bool:
    """Whether `given` is an address such as ``s3://bucket/folder`` rather than a path."""
    return "://" in given and _SCHEME.match(given) is not None


def whole_address(given: str | Path) -> str:
    """`given`, with the second slash that a :class:`~pathlib.Path` has taken from an address."""
    text = os.fspath(given)
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/(?=[^/])", text)
    return f"{found[1]}://{text[found.end() :]}" if found else text


def open_files(address: str) -> tuple[Any, str]:
    """The file system of an address or a path, and how that names it.

    What the file system has listed before is not kept: listings grow with the collection, and other
    machines write into the same folder.

    Raises:
        MissingExtraError: fsspec is not installed, or huggingface_hub for an ``hf://`` address.
        DataError: no such kind of address, or what opens it is not installed.
    """
    try:
        import fsspec
    except ImportError:
        raise MissingExtraError("fsspec", "ray") from None
    scheme = address.partition("://")[0] if is_address(address) else "file"
    try:
        files, path = fsspec.core.url_to_fs(address, use_listings_cache=False)
    except ImportError as error:
        if scheme == "hf":
            raise MissingExtraError("huggingface_hub", "hub") from None
        package = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs"}
        wanted = package.get(scheme)
        how = f"pip install {wanted}" if wanted else " ".join(str(error).split())
        raise DataError(
            f"{address}: what opens {scheme}:// addresses is not installed: {how} "
            "(on each machine of the cluster)"
        ) from None
    except ValueError as error:
        raise DataError(f"{address}: {' '.join(str(error).split())}") from None
    return files, str(path)


class Store:
    """A folder whose files are whole or absent, on a disk or at an address.

    It may be sent to other machines; there it opens the same folder.

    Attributes:
        address: absolute, so that it means the same from every working folder.
    """

    def __init__(self, address: str | Path) -> None:
        text = whole_address(address)
        self.address = text.rstrip("/") if is_address(text) else os.path.abspath(text)
        self._open: tuple[Any, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"address": self.address, "_open": None}

    @property
    def files(self) -> Any:
        """The file system."""
        return self._opened()[0]

    @property
    def local(self) -> bool:
        """Whether it is a folder on a disk."""
        return not is_address(self.address)

    def path(self, name: str = "") -> str:
        """How the file system names the file `name`, which is relative with slashes."""
        root = self._opened()[1].rstrip("/")
        return f"{root}/{name}" if name else root

    def read(self, name: str, start: int | None = None, end: int | None = None) -> bytes:
        """A file's bytes, or those from `start` to before `end`.

        Raises:
            FileNotFoundError: there is no such file.
        """
        data: bytes = self.files.cat_file(self.path(name), start=start, end=end)
        return data

    def exists(self, name: str) -> bool:
        return bool(self.files.exists(self.path(name)))

    def names(self, folder: str = "") -> set[str]:
        """Names of what lies in a folder; none if there is no such folder."""
        place = self.path(folder)
        try:
            found = [str(one).rstrip("/") for one in self.files.ls(place, detail=False)]
        except FileNotFoundError:
            return set()
        # A store may list the mark of the folder itself.
        return {one.rpartition("/")[2] for one in found if one.lstrip("/") != place.lstrip("/")}

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file, whole or not at all."""
        with self.draft(name) as file:
            file.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)

    @contextmanager
    def draft(self, name: str) -> Iterator[Path]:
        """A path on this machine's disk; what is written there becomes `name` at a good end.

        On a disk it is synced and renamed into its place; an object store takes it in one piece,
        which is there whole or not at all; elsewhere it is sent under another name and moved.
        """
        beside = f"{name.replace('/', '-')}.{uuid.uuid4().hex}"  # two machines may share a name
        if self.local:
            place = Path(self.path(name))
            draft = Path(self.path(DRAFTS), beside)
            for folder in (draft.parent, place.parent):
                folder.mkdir(parents=True, exist_ok=True)
            try:
                yield draft
                with draft.open("r+b") as file:
                    os.fsync(file.fileno())
                draft.replace(place)
            finally:
                draft.unlink(missing_ok=True)
            return
        with tempfile.TemporaryDirectory(prefix="retinanet-") as here:
            draft = Path(here, "draft")
            yield draft
            scheme = self.address.partition("://")[0]
            whole_at_once = scheme in _WHOLE_AT_ONCE
            target = self.path(name if whole_at_once else f"{DRAFTS}/{beside}")
            if not whole_at_once:
                for path in (target, self.path(name)):
                    self.files.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.files.put_file(str(draft), target)
            if not whole_at_once:
                self.files.mv(target, self.path(name))

    def remove_drafts(self) -> None:
        """Remove what killed writers have left; call it when nobody writes any more."""
        if self.local:
            shutil.rmtree(self.path(DRAFTS), ignore_errors=True)
        elif self.exists(DRAFTS):
            self.files.rm(self.path(DRAFTS), recursive=True)

    def _opened(self) -> tuple[Any, str]:
        if self._open is None:
            self._open = open_files(self.address)
        return self._open
