"""Record of the files that detection wrote into a folder: they are replaced, and never inputs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from retinanet.errors import DataError
from retinanet.files import write_atomic

MANIFEST = ".retinanet-outputs"
"""Name of the record: a header line, then a JSON object per file, written before the file is."""

_HEADER = json.dumps({"format": "retinanet detect", "version": 1})


class OutputFolder:
    """An output folder of detection, and the files in it that detection wrote.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: str | Path, kind: str) -> None:
        """Open the folder; nothing is created in it before :meth:`claim`.

        Args:
            path: created if missing.
            kind: "images" or "video".
        """
        self.path = Path(path)
        self._kind = kind
        self._files = read_manifest(self.path)
        self._stale = {name for name, listed in self._files.items() if listed == kind}

    def claim(self, file: Path) -> Path:
        """Record that `file`, below the folder, is an output, and return it."""
        name = file.relative_to(self.path).as_posix()
        self._stale.discard(name)
        if name not in self._files:
            if os.path.lexists(file):
                raise DataError(
                    f"output file exists and was not written by retinanet detect: {file}; "
                    "choose another --out"
                )
            self._files[name] = self._kind
            self.path.mkdir(parents=True, exist_ok=True)
            manifest = self.path / MANIFEST
            start = "" if manifest.is_file() else _HEADER
            with manifest.open("a", encoding="utf-8") as lines:
                # The line break comes first: a killed process may have left half a line.
                lines.write(f"{start}\n{_line(name, self._kind)}")
        return file

    def delete_stale(self) -> None:
        """Delete the files of this kind that earlier detections wrote and this one did not."""
        if not self._stale:
            return
        for name in self._stale:
            file = self.path / name
            try:
                file.unlink(missing_ok=True)
            except OSError as error:
                raise DataError(
                    f"cannot delete an output of an earlier detection: {file}: {error.strerror}; "
                    "choose another --out"
                ) from None
            del self._files[name]
            for folder in file.parents[: len(Path(name).parts) - 1]:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
        self._stale.clear()
        rest = [_line(name, kind) for name, kind in self._files.items()]
        write_atomic(self.path / MANIFEST, "\n".join((_HEADER, *rest)))


def _line(name: str, kind: str) -> str:
    return json.dumps({"file": name, "kind": kind})


def read_manifest(folder: Path) -> dict[str, str]:
    """Return the kind of each file that detection wrote into `folder`, by its relative path."""
    file = folder / MANIFEST
    if not file.is_file():
        return {}
    header, *lines = file.read_text("utf-8").splitlines() or [""]
    if header != _HEADER:
        raise DataError(f"not a manifest of retinanet detect: {file}; choose another --out")
    files = {}
    for line in lines:
        try:
            entry = json.loads(line)
            name, kind = entry["file"], entry["kind"]
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a process that was killed
        if not (os.path.isabs(name) or ".." in Path(name).parts):
            files[name] = kind
    return files


class OutputFilter:
    """Recognises files that an earlier detection wrote; each folder's manifest is read once."""

    def __init__(self) -> None:
        self._outputs: dict[Path, frozenset[str]] = {}

    def is_output(self, file: str | Path) -> bool:
        """Return whether a manifest in a folder above `file` lists it."""
        path = Path(os.path.abspath(file))
        return any(
            path.relative_to(folder).as_posix() in outputs
            for folder in path.parents
            if (outputs := self._read(folder))
        )

    def inputs(self, files: Iterable[Path]) -> list[Path]:
        """Return the files that are not outputs."""
        return [file for file in files if not self.is_output(file)]

    def check(self, file: str | Path) -> None:
        """Check that a file that was named explicitly is no output."""
        if self.is_output(file):
            raise DataError(
                f"{file}: is an output of an earlier detection; copy it out of that folder to "
                "use it as an input"
            )

    def _read(self, folder: Path) -> frozenset[str]:
        if folder not in self._outputs:
            try:
                self._outputs[folder] = frozenset(read_manifest(folder))
            except (DataError, OSError, UnicodeDecodeError):
                self._outputs[folder] = frozenset()  # another program's file
        return self._outputs[folder]
