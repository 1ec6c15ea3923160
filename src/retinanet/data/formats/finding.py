"""Finding what a label names: the image in one of several folders, the values beside the box."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from retinanet.data.dataset import Problem
from retinanet.data.splits import split_word

JSON_TEXT = "segmentation"
"""The key of `extra` that is kept as JSON text: as lists, COCO's masks would fill gigabytes."""


class ImageFinder:
    """Finds images in the folders where they may lie; each folder is listed once.

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
        a path of the machine they were made on), then an image of the same stem and another
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
                if is_image(name)
            }
        return self._stems[folder]


def is_image(name: str | Path) -> bool:
    """Whether a file's extension is one of an image that we read."""
    from retinanet.data.images import IMAGE_SUFFIXES

    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def can_be_a_file(name: str) -> bool:
    """Whether a file may have this path at all: no zero byte, no part longer than disks allow."""
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return False
    parts = encoded.replace(b"\\", b"/").split(b"/")
    return b"\0" not in encoded and len(encoded) < 4096 and all(len(part) < 256 for part in parts)


def images_in(folder: Path, *, deep: bool = False) -> list[Path]:
    """The images in a folder, sorted by path; `deep`: and in the folders below."""
    found = folder.rglob("*") if deep else folder.glob("*")
    return sorted(file for file in found if is_image(file.name) and file.is_file())


def files_by_split(path: Path, suffix: str, is_one: Callable[[Path], bool]) -> dict[str, Path]:
    """Label files of many images each, by split; one that names no split is the split ``""``.

    Args:
        path: such a file, or a folder that holds some: directly, in annotations/, or in a folder a
            split.
        suffix: lower-case extension with its dot.
        is_one: looks into a file.
    """
    if path.is_file():
        folders, listed = [], [path]
    elif path.is_dir():
        folders = [path, path / "annotations"]
        listed = [file for folder in folders if folder.is_dir() for file in _sorted(folder)]
        subs = [sub for sub in _sorted(path) if sub.is_dir() and split_word(sub.name)]
        listed += [file for sub in subs for file in _sorted(sub)]
    else:
        return {}
    found = [one for one in listed if one.suffix.lower() == suffix and one.is_file()]
    found = [one for one in found if is_one(one)]
    splits: dict[str, Path] = {}
    for file in found:
        in_own_folder = path.is_dir() and file.parent not in folders
        word = split_word(file.stem) or (split_word(file.parent.name) if in_own_folder else None)
        alone = word or "" if len(found) == 1 else file.stem
        splits[word if word and word not in splits else alone] = file
    return splits


def _sorted(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


@dataclass(frozen=True, slots=True)
class ClassList:
    """The classes of a data set, those of one name merged.

    Attributes:
        names: one per label, all different.
        ids: of the first of each name, by label.
        labels: the label of each id, also of those merged into another.
        problems: one for each name that was there more than once.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]
    labels: Mapping[int, int]
    problems: tuple[Problem, ...] = ()


def merge_classes(classes: Iterable[tuple[int, str]], file: Path) -> ClassList:
    """Merge classes of one name: as two classes they would share their objects at random.

    Args:
        classes: id and name of each, in the order of their labels.
        file: where they are listed.
    """
    ids_by_name: dict[str, list[int]] = {}
    for id_, name in classes:
        ids_by_name.setdefault(name, []).append(id_)
    problems = [
        Problem(
            "class-duplicate",
            file,
            None,
            f"classes {', '.join(map(str, ids[:-1]))} and {ids[-1]} are all named {name!r}"
            if len(ids) > 2
            else f"classes {ids[0]} and {ids[1]} are both named {name!r}",
            f"merged into {ids[0]}; rename them to keep them apart",
        )
        for name, ids in ids_by_name.items()
        if len(ids) > 1
    ]
    return ClassList(
        tuple(ids_by_name),
        tuple(ids[0] for ids in ids_by_name.values()),
        {id_: label for label, ids in enumerate(ids_by_name.values()) for id_ in ids},
        tuple(problems),
    )


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


def enclosing_box(
    box: tuple[float, float, float, float], degrees: float, about: tuple[float, float]
) -> tuple[float, float, float, float]:
    """The upright box around `box` turned clockwise, as seen, about a point; pixels."""
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    corners = [(x - about[0], y - about[1]) for x in (box[0], box[2]) for y in (box[1], box[3])]
    xs = [about[0] + x * cos - y * sin for x, y in corners]
    ys = [about[1] + x * sin + y * cos for x, y in corners]
    return min(xs), min(ys), max(xs), max(ys)
