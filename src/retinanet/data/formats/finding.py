"""Finding what a label names: the picture in one of several folders, the values beside the box."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

JSON_TEXT = "segmentation"
"""The key of `extra` that is kept as JSON text: as lists, COCO's masks would fill gigabytes."""


class PictureFinder:
    """Finds pictures in the folders where they may lie; each folder is listed once.

    Args:
        folders: in order of preference; those that do not exist are passed over.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        wanted = list(dict.fromkeys(folders))
        self._folders = [folder for folder in wanted if folder.is_dir()] or wanted[:1]
        self._names: dict[Path, frozenset[str]] = {}
        self._stems: dict[Path, dict[str, str]] = {}

    def find(self, name: str) -> Path:
        """The file that `name` means; where there is none, the place where it should have been.

        Tried in each folder in turn: the name as it stands, then its last part (labels often hold
        a path of the machine they were made on), then a picture of the same stem and another
        extension.
        """
        relative = PurePosixPath(name.replace("\\", "/"))
        if relative.is_absolute() and Path(relative).is_file():
            return Path(relative)
        if not relative.name:
            return self._folders[0] / "?"
        if not relative.is_absolute() and len(relative.parts) > 1:
            for folder in self._folders:
                if relative.name in self._listed(folder / relative.parent):
                    return folder / relative
        for folder in self._folders:
            if relative.name in self._listed(folder):
                return folder / relative.name
        for folder in self._folders:
            other = self._by_stem(folder).get(relative.stem) or self._by_stem(folder).get(
                relative.name
            )
            if other is not None:
                return folder / other
        return self._folders[0] / (relative.name if relative.is_absolute() else relative)

    def _listed(self, folder: Path) -> frozenset[str]:
        if folder not in self._names:
            try:
                with os.scandir(folder) as entries:
                    self._names[folder] = frozenset(entry.name for entry in entries)
            except OSError:
                self._names[folder] = frozenset()
        return self._names[folder]

    def _by_stem(self, folder: Path) -> dict[str, str]:
        if folder not in self._stems:
            self._stems[folder] = {
                name.rpartition(".")[0]: name
                for name in sorted(self._listed(folder), reverse=True)
                if is_picture(name)
            }
        return self._stems[folder]


def is_picture(name: str | Path) -> bool:
    """Whether a file's extension is one of a picture that we read."""
    from retinanet.data.images import IMAGE_SUFFIXES

    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def pictures_in(folder: Path, *, deep: bool = False) -> list[Path]:
    """The pictures in a folder, sorted by path; `deep`: and in the folders below."""
    found = folder.rglob("*") if deep else folder.glob("*")
    return sorted(file for file in found if is_picture(file.name) and file.is_file())


def from_text(key: str, text: str) -> Any:
    """A value of `extra` from text: a number or a JSON list or object where it reads as one."""
    if key == JSON_TEXT or not text or text[0] not in "-0123456789[{":
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    # Only what comes back as the same text: "007" and "1.50" are names, not numbers.
    return value if isinstance(value, list | dict) or to_text(value) == text else text


def to_text(value: Any) -> str:
    """A value of `extra` as text that :func:`from_text` reads back."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def to_number(value: Any) -> float:
    """A coordinate as a float.

    Raises:
        ValueError: it is no number; NaN and infinity are let through, for the check to report.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is not a number")
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{value!r} is not a number") from None


def to_flag(value: Any) -> bool:
    """A yes or no as label files write it: 1, "1", true, "yes"."""
    if isinstance(value, str):
        return value.strip().lower() in ("1", "true", "yes")
    return bool(value)
