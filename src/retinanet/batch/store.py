"""Addresses that fsspec opens, and an output folder whose files are complete or missing."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

from retinanet.data.archives import address_of, is_remote
from retinanet.errors import DataError, MissingExtraError
from retinanet.files import write_atomic

# Object stores: a file appears when it is complete; renaming it would be a copy.
_ATOMIC = frozenset(
    {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "hf", "oci", "oss", "r2", "memory"}
)
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs"}


def open_files(address: str) -> tuple[Any, str]:
    """Return fsspec's file system of an address or a path, and the path in it.

    Listings are not cached: they grow with the collection, and other machines write there too.

    Raises:
        MissingExtraError: huggingface_hub is not installed, for an ``hf://`` address.
        DataError: an unknown kind of address, or its package is not installed.
    """
    import fsspec

    scheme = address.partition("://")[0]
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
        text = address_of(address)
        self.address = text.rstrip("/") if is_remote(text) else os.path.abspath(text)

    def open(self, name: str) -> Any:
        """Open the file `name` (relative, with slashes) for reading bytes.

        Raises:
            FileNotFoundError: it does not exist.
        """
        files, root = open_files(self.address)
        return files.open(f"{root}/{name}", "rb")

    def names(self, folder: str = "") -> set[str]:
        """Return the names in a folder; none if the folder does not exist."""
        files, root = open_files(self.address)
        path = f"{root}/{folder}".rstrip("/")
        try:
            listed = [str(entry).rstrip("/") for entry in files.ls(path, detail=False)]
        except FileNotFoundError:
            return set()
        # Some stores list the folder itself; files that are being written are hidden or .part.
        names = {
            entry.rpartition("/")[2] for entry in listed if entry.strip("/") != path.strip("/")
        }
        return {name for name in names if not name.startswith(".") and not name.endswith(".part")}

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file, complete or not at all."""
        if not is_remote(self.address):
            write_atomic(Path(self.address, name), content)
            return
        files, root = open_files(self.address)
        target = f"{root}/{name}"
        data = content.encode("utf-8") if isinstance(content, str) else content
        if self.address.partition("://")[0] in _ATOMIC:
            files.pipe_file(target, data)
        else:
            part = f"{target}.{uuid.uuid4().hex}.part"
            files.makedirs(target.rpartition("/")[0], exist_ok=True)
            files.pipe_file(part, data)
            files.mv(part, target)
