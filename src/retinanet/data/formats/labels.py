"""Shared parts of the label formats: find files, parse values, build data sets."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from retinanet.data.dataset import Annotation, Dataset, LabelledImage, Problem
from retinanet.data.splits import split_word
from retinanet.errors import DataError

JSON_TEXT = "segmentation"
"""The key of `extra` that is kept as JSON text: as lists, COCO's masks would fill gigabytes."""

Box = tuple[float, float, float, float]

# ---- files


class ImageFinder:
    """Finds images by name in several folders; each folder is listed once.

    Args:
        folders: in order of preference; those that do not exist are skipped.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        wanted = list(dict.fromkeys(folders))
        self.folders = [folder for folder in wanted if folder.is_dir()] or wanted[:1]
        self._names: dict[Path, frozenset[str]] = {}
        self._stems: dict[Path, dict[str, str]] = {}

    def find(self, name: str) -> Path:
        """Return the file of that name; if there is none, the path at which it was expected.

        Tried in each folder in turn: the name as it stands, then its last part (labels often hold
        a path of the machine they were made on), then an image of the same stem and another
        extension.
        """
        relative = PurePosixPath(name.replace("\\", "/"))
        if relative.is_absolute() and Path(relative).is_file():
            return Path(relative)
        if not relative.name:
            return self.folders[0] / "?"
        if not relative.is_absolute() and len(relative.parts) > 1:
            for folder in self.folders:
                if relative.name in self._listed(folder / relative.parent):
                    return folder / relative
        for folder in self.folders:
            if relative.name in self._listed(folder):
                return folder / relative.name
        for folder in self.folders:
            stems = self._by_stem(folder)
            other = stems.get(relative.stem) or stems.get(relative.name)
            if other is not None:
                return folder / other
        return self.folders[0] / (relative.name if relative.is_absolute() else relative)

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


def image_folders(file: Path, split: str) -> list[Path]:
    """Folders that may hold the images of a label file, the most likely first.

    The folders of other splits are left out: their images may have the same names.
    """
    beside = file.parent
    root = beside.parent if beside.name in ("annotations", "labels") else beside
    names = [
        name
        for name in dict.fromkeys((file.stem.removeprefix("instances_"), split))
        if name not in ("", "..") and Path(name).name == name and can_be_a_file(name)
    ]
    bases = (root, root / "images")
    subs = [
        sub
        for base in bases
        if base.is_dir()
        for sub in sorted(base.iterdir())
        if sub.is_dir() and sub not in bases
    ]
    same = [sub for sub in subs if split and split_word(sub.name) == split]
    neutral = [sub for sub in subs if not split or split_word(sub.name) is None]
    return [
        *([beside] if split and split_word(beside.name) == split else []),
        *(base / name for name in names for base in bases),
        *(root / name / "images" for name in names),
        *same,
        *(root / name for name in ("images", "", "JPEGImages", "img")),
        beside,
        *neutral,
    ]


def is_image(name: str | Path) -> bool:
    """Whether a file has an extension of an image format."""
    from retinanet.data.images import IMAGE_SUFFIXES

    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def can_be_a_file(name: str) -> bool:
    """Whether a file may have this path: no zero byte, no part longer than file systems allow."""
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return False
    parts = encoded.replace(b"\\", b"/").split(b"/")
    return b"\0" not in encoded and len(encoded) < 4096 and all(len(part) < 256 for part in parts)


def images_in(folder: Path, *, deep: bool = False) -> list[Path]:
    """Return the images in a folder, sorted by path; `deep`: also in the folders below."""
    files = folder.rglob("*") if deep else folder.glob("*")
    return sorted(file for file in files if is_image(file.name) and file.is_file())


def label_files(
    path: Path, suffixes: Sequence[str], is_format: Callable[[Path], bool]
) -> list[Path]:
    """Label files of many images each: `path`, or those in it, in annotations/ or a split's folder.

    Args:
        path: a file or a folder.
        suffixes: lower-case extensions.
        is_format: tests a file by its content.
    """
    files = [path]
    if path.is_dir():
        folders = [path, path / "annotations"]
        folders += sorted(sub for sub in path.iterdir() if sub.is_dir() and split_word(sub.name))
        files = [file for sub in folders if sub.is_dir() for file in sorted(sub.iterdir())]
    return [
        file
        for file in files
        if file.suffix.lower() in suffixes and file.is_file() and is_format(file)
    ]


def split_of(file: Path, path: Path) -> str | None:
    """Return the split that a label file's name, or its own folder in `path`, indicates."""
    word = split_word(file.stem)
    in_own_folder = path.is_dir() and file.parent not in (path, path / "annotations")
    return word or (split_word(file.parent.name) if in_own_folder else None)


def name_splits(files: Sequence[Path], path: Path, prefix: str = "") -> dict[str, Path]:
    """Label files by split: one file per split; the split of a single unnamed file is ``""``."""
    splits: dict[str, Path] = {}
    for file in files:
        word = split_of(file, path)
        alone = word or "" if len(files) == 1 else file.stem.removeprefix(prefix)
        splits[word if word and word not in splits else alone] = file
    return splits


# ---- values


def cut(text: str, limit: int = 80) -> str:
    """Return a text in messages, cut to `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def short(value: Any) -> str:
    """Return the repr of a value in messages."""
    return cut(repr(value))


def json_has(file: Path, start: bytes, *alternatives: Sequence[bytes]) -> bool:
    """Whether a JSON file begins with `start` and holds all marks of an alternative; unparsed."""
    try:
        with (
            file.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            if not data[:64].removeprefix(b"\xef\xbb\xbf").lstrip().startswith(start):
                return False
            return any(all(data.find(mark) >= 0 for mark in marks) for marks in alternatives)
    except (OSError, ValueError):  # unreadable or empty
        return False


def read_json(
    file: Path, kind: type, expected: str, hook: Callable[[dict[str, Any]], Any] | None = None
) -> Any:
    """Parse a JSON file whose root is a `kind`.

    Raises:
        DataError: it is not JSON (with line and column), or its root is of another type.
    """
    try:
        content = json.loads(file.read_bytes(), object_hook=hook)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}: not JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    if not isinstance(content, kind):
        raise DataError(f"{file}: holds a JSON {type(content).__name__}, not {expected}")
    return content


def read_lines(file: Path) -> list[str]:
    """Return the lines of a text file that are not blank, stripped."""
    lines = file.read_text("utf-8-sig", errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


def to_int(value: Any) -> int | None:
    """Return a whole number, also as a float or as text; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return int(value) if isinstance(value, str) and value.isdecimal() else None


def to_size(value: Any) -> int | None:
    """Pixels of an image's side; None if it is not stated: some tools write 0."""
    try:
        number = to_number(value)
        return int(number) if number >= 1 else None
    except (ValueError, OverflowError):
        return None


def to_area(text: str | None) -> float | None:
    """Return an area, or None."""
    try:
        return to_number((text or "").strip())
    except ValueError:
        return None


def from_text(key: str, text: str) -> Any:
    """Parse a value of `extra` from text: a number, a JSON list or object, or text."""
    if key == JSON_TEXT or not text or text[0] not in "-0123456789[{":
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    # Only values that are written as the same text: "007" and "1.50" are names, not numbers.
    return value if isinstance(value, list | dict) or to_text(value) == text else text


def to_text(value: Any) -> str:
    """Write a value of `extra` as text that :func:`from_text` parses."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def to_number(value: Any) -> float:
    """Return a coordinate as a float.

    Raises:
        ValueError: it is not a number. NaN and Inf are returned: the check reports them.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is not a number")
    try:
        return float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{value!r} is not a number") from None


def to_flag(value: Any) -> bool:
    """Return a flag as label files write it: 1, "1", true, "yes"."""
    if isinstance(value, str):
        return value.strip().lower() in ("1", "true", "yes")
    return bool(value)


def enclosing_box(box: Box, degrees: float, about: tuple[float, float]) -> Box:
    """Return the upright box around `box`, rotated clockwise (as seen) about a point; pixels."""
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    corners = [(x - about[0], y - about[1]) for x in (box[0], box[2]) for y in (box[1], box[3])]
    xs = [about[0] + x * cos - y * sin for x, y in corners]
    ys = [about[1] + x * sin + y * cos for x, y in corners]
    return min(xs), min(ys), max(xs), max(ys)


# ---- data sets


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


@dataclass(slots=True)
class ReadObject:
    """An object as a label file states it, before the classes of all files are known.

    Attributes:
        name: its class.
        box: pixels, or fractions of the image where :attr:`LabelFile.is_relative`.
        where: file, line or region, for messages.
        position: its id or position in the file, for :attr:`Problem.object`.
        values: other values of :class:`~retinanet.data.dataset.Annotation`.
        rotation: degrees clockwise about (x1, y1); the enclosing upright box is used.
    """

    name: str
    box: Box
    where: str
    position: int | str
    values: dict[str, Any] = field(default_factory=dict)
    rotation: float = 0.0


@dataclass(slots=True)
class ReadImage:
    """An image as a label file states it; attributes as of ``LabelledImage``."""

    name: str
    split: str
    id: int | str
    width: int | None = None
    height: int | None = None
    objects: list[ReadObject] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class LabelFile:
    """A parsed label file.

    Attributes:
        split: of images that state no other.
        images: its images.
        problems: the problems found while parsing, each with its split.
        objects: number of objects parsed.
        is_relative: whether boxes are fractions of the image rather than pixels.
    """

    file: Path
    split: str
    images: list[ReadImage] = field(default_factory=list)
    problems: list[tuple[str, Problem]] = field(default_factory=list)
    objects: int = 0
    is_relative: bool = False

    def report(
        self,
        kind: str,
        position: int | str | None,
        reason: str,
        fix: str = "dropped",
        *,
        split: str | None = None,
    ) -> None:
        """Add a problem."""
        problem = Problem(kind, self.file, position, reason, fix)
        self.problems.append((self.split if split is None else split, problem))


def find_classes(files: Iterable[LabelFile], listed: Iterable[str], source: Path) -> ClassList:
    """Return the classes `listed` in `source`, from 1 on; if there are none, all names, sorted."""
    found = {item.name for file in files for image in file.images for item in image.objects}
    names = list(listed) or sorted(found - {""})
    return merge_classes(enumerate(names, start=1), source)


def build_splits(
    format: str,
    files: Sequence[LabelFile],
    classes: ClassList,
    source: Path,
    find: Callable[[ImageFinder, str], Path] = ImageFinder.find,
) -> dict[str, Callable[[], Dataset]]:
    """Return the splits of parsed label files; each data set is built when called.

    Args:
        find: finds an image by the name that a label file gives it.
    """
    splits = dict.fromkeys(image.split for file in files for image in file.images)
    splits |= dict.fromkeys(file.split for file in files if not file.images)
    return {split: partial(_build, format, split, files, classes, source, find) for split in splits}


def _build(
    format: str,
    split: str,
    files: Sequence[LabelFile],
    classes: ClassList,
    source: Path,
    find: Callable[[ImageFinder, str], Path],
) -> Dataset:
    images: list[LabelledImage] = []
    problems = list(classes.problems)
    for file in files:
        problems += [problem for of_split, problem in file.problems if of_split == split]
        finder = ImageFinder(image_folders(file.file, split))
        images += [
            build_image(image, find(finder, image.name), file, classes.names, problems)
            for image in file.images
            if image.split == split
        ]
    return Dataset(
        images=tuple(images),
        classes=classes.names,
        category_ids=classes.ids,
        split=split,
        format=format,
        source=source,
        problems=tuple(problems),
    )


def build_image(
    image: ReadImage,
    path: Path,
    file: LabelFile,
    classes: Sequence[str],
    problems: list[Problem],
) -> LabelledImage:
    """Convert an image at `path` with its objects; those of unknown classes become problems."""
    width, height, objects = image.width, image.height, image.objects
    scale_x, scale_y = 1.0, 1.0
    if file.is_relative and objects:
        if not width or not height:
            height, width = read_size(path, problems)
        if not width or not height:
            objects = []
        scale_x, scale_y = float(width or 1), float(height or 1)
    labels = {name: label for label, name in enumerate(classes)}
    annotations = []
    for item in objects:
        if item.name not in labels:
            reason = f"{item.where}: class {short(item.name)} is not one of {len(labels)} known"
            problems.append(Problem("class-unknown", file.file, item.position, reason, "dropped"))
            continue
        box = item.box
        if file.is_relative:
            x1, y1, x2, y2 = box
            box = (x1 * scale_x, y1 * scale_y, x2 * scale_x, y2 * scale_y)
            if item.rotation % 360:
                box = enclosing_box(box, item.rotation, box[:2])
            x1, y1, x2, y2 = (round(side, 6) for side in box)  # 12 pixels, not 12.000000000000002
            box = (x1, y1, x2, y2)
        annotations.append(Annotation(box, labels[item.name], **item.values))
    return LabelledImage(path, image.id, tuple(annotations), width, height, file.file, image.extra)


def read_size(path: Path, problems: list[Problem]) -> tuple[int, int] | tuple[None, None]:
    """Height and width of an image whose boxes are fractions; a problem if it is unreadable."""
    from retinanet.data.images import image_size

    try:
        return image_size(path)
    except (DataError, OSError) as error:
        if path.is_file():  # a missing image is reported by the check
            reason = f"its boxes are fractions of an image whose size cannot be read: {error}"
            problems.append(Problem("image-unreadable", path, None, reason, "dropped"))
        return None, None
