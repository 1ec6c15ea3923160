"""An output folder on a disk or at an address, whose files are complete or missing."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

from retinanet.data.archives import accessing, address_of, is_remote, list_names, one_line
from retinanet.errors import DataError
from retinanet.files import write_atomic

# Object stores: a file appears when it is complete; renaming it would be a copy.
_ATOMIC = frozenset(
    {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "hf", "oci", "oss", "r2", "memory"}
)


class Store:
    """A folder on a disk or at an address; it can be sent to other machines.

    Attributes:
        address: absolute, so that it means the same in every working folder.
    """

    def __init__(self, address: str | Path) -> None:
        text = address_of(address)
        self.address = text.rstrip("/") if is_remote(text) else os.path.abspath(text)

    def open(self, name: str) -> Any:
        """Open the file `name` (relative, with slashes) for reading bytes."""
        with accessing(self.address) as (files, root):
            return files.open(f"{root}/{name}", "rb")

    def names(self, folder: str = "") -> set[str]:
        """Return the names in a folder; none if the folder does not exist."""
        # Files that are being written are hidden or .part.
        names = list_names(f"{self.address}/{folder}".rstrip("/"))
        return {name for name in names if not name.startswith(".") and not name.endswith(".part")}

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file, complete or not at all."""
        if not is_remote(self.address):
            write_atomic(Path(self.address, name), content)
            return
        data = content.encode("utf-8") if isinstance(content, str) else content
        try:
            with accessing(self.address) as (files, root):
                target = f"{root}/{name}"
                if self.address.partition("://")[0] in _ATOMIC:
                    files.pipe_file(target, data)
                else:
                    part = f"{target}.{uuid.uuid4().hex}.part"
                    files.makedirs(target.rpartition("/")[0], exist_ok=True)
                    files.pipe_file(part, data)
                    files.mv(part, target)
        except FileNotFoundError as error:  # no such bucket
            raise DataError(f"{self.address}: cannot be accessed: {one_line(error)}") from None
