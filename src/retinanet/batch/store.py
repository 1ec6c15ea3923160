"""Addresses that fsspec opens, and an output folder whose files are complete or missing."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any

from retinanet.errors import DataError, MissingExtraError

# Object stores: a file appears when it is complete; renaming it would be a copy.
_ATOMIC = frozenset(
    {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "hf", "oci", "oss", "r2", "memory"}
)

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/+")
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs"}


def is_address(name: str) -> bool:
    """Return whether `name` is an address such as ``s3://bucket/folder``, not a path."""
    return "://" in name and _SCHEME.match(name) is not None


def whole_address(name: str | Path) -> str:
    """Restore the second slash that a :class:`~pathlib.Path` removes from an address."""
    text = os.fspath(name)
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/(?=[^/])", text)
    return f"{match[1]}://{text[match.end() :]}" if match else text


def open_files(address: str) -> tuple[Any, str]:
    """Return the file system of an address or a path, and the path in it.

    Listings are not cached: they grow with the collection, and other machines write there too.

    Raises:
        MissingExtraError: fsspec is not installed, or huggingface_hub for an ``hf://`` address.
        DataError: an unknown kind of address, or its package is not installed.
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
        package = _PACKAGES.get(scheme)
        how = f"pip install {package}" if package else " ".join(str(error).split())
        raise DataError(
            f"{address}: the package for {scheme}:// addresses is not installed: {how} "
            "(on each machine of the cluster)"
        ) from None
    except ValueError as error:
        raise DataError(f"{address}: {' '.join(str(error).split())}") from None
    return files, str(path)


class Store:
    """A folder on a disk or at an address; it can be sent to other machines.

    Attributes:
        address: absolute, so that it means the same in every working folder.
    """

    def __init__(self, address: str | Path) -> None:
        text = whole_address(address)
        self.address = text.rstrip("/") if is_address(text) else os.path.abspath(text)
        self._opened: tuple[Any, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"address": self.address, "_opened": None}

    @property
    def files(self) -> Any:
        """The file system."""
        return self._open()[0]

    def path(self, name: str = "") -> str:
        """Return the path of the file `name` (relative, with slashes) in the file system."""
        root = self._open()[1].rstrip("/")
        return f"{root}/{name}" if name else root

    def read(self, name: str) -> bytes:
        """Read a file.

        Raises:
            FileNotFoundError: it does not exist.
        """
        data: bytes = self.files.cat_file(self.path(name))
        return data

    def names(self, folder: str = "") -> set[str]:
        """Return the names in a folder; none if the folder does not exist."""
        path = self.path(folder)
        try:
            found = [str(entry).rstrip("/") for entry in self.files.ls(path, detail=False)]
        except FileNotFoundError:
            return set()
        # Some stores list the folder itself.
        names = {entry.rpartition("/")[2] for entry in found if entry.strip("/") != path.strip("/")}
        return {name for name in names if not name.endswith(".part")}

    def write(self, name: str, text: str) -> None:
        """Write a text file, complete or not at all."""
        with tempfile.TemporaryDirectory(prefix="retinanet-") as folder:
            file = Path(folder, "file")
            file.write_text(text, encoding="utf-8", newline="\n")
            self.put(file, name)

    def put(self, file: Path, name: str) -> None:
        """Copy a local file to `name`, complete or not at all."""
        target = self.path(name)
        part = f"{target}.{uuid.uuid4().hex}.part"
        if not is_address(self.address):
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(file, part)
                with open(part, "r+b") as written:
                    os.fsync(written.fileno())
                os.replace(part, target)
            finally:
                Path(part).unlink(missing_ok=True)
        elif self.address.partition("://")[0] in _ATOMIC:
            self.files.put_file(str(file), target)
        else:
            self.files.makedirs(target.rpartition("/")[0], exist_ok=True)
            self.files.put_file(str(file), part)
            self.files.mv(part, target)

    def _open(self) -> tuple[Any, str]:
        if self._opened is None:
            self._opened = open_files(self.address)
        return self._opened
