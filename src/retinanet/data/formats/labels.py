"""Shared parts of the label formats: find files and images, parse values, build data sets.

Each format has ``detect(file)``, which tests a label file by its content, and ``parse(file)``,
which returns its images, objects and faults as a :class:`LabelFile`. :func:`build` looks for the
images, unites the classes of several files and converts boxes to pixels.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, count
from pathlib import Path, PurePosixPath
from typing import Any

from retinanet.data.dataset import Annotation, Dataset, LabelledImage, Problem
from retinanet.data.image_files import IMAGE_SUFFIXES, image_size
from retinanet.data.splits import split_word
from retinanet.errors import DataError

JSON_TEXT = "segmentation"
"""The key of `extra` that is kept as JSON text: as lists, COCO's masks would fill gigabytes."""

DROPPED = "the image is dropped"
"""The fix of an image whose labels cannot be used."""

ENCLOSED = "the upright box around it is used"
"""The fix of a rotated box."""

Box = tuple[float, float, float, float]

# ---- files


class ImageFinder:
    """Finds images by name in several folders; each folder is listed once.

    Args:
        folders: in order of preference; those that do not exist are skipped.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        wanted = list(dict.fromkeys(folders))
        self._folders = [folder for folder in wanted if folder.is_dir()] or wanted[:1]
        self._names: dict[Path, frozenset[str]] = {}
        self._stems: dict[Path, dict[str, str]] = {}

    def find(self, *names: str) -> Path:
        """Return the first file of these names; if there is none, the path of the first name.

        Labels often hold paths of the machine where they were made: of each name the longest tail
        that exists in one of the folders counts, then an image of the same stem and another
        extension.
        """
        paths = [PurePosixPath(name.replace("\\", "/")) for name in names]
        for path in paths:
            if path.is_absolute() and Path(path).is_file():
                return Path(path)
            parts = path.parts[path.is_absolute() :]
            for start in range(len(parts)):
                tail = Path(*parts[start:])
                for folder in self._folders:
                    if tail.name in self._listed(folder / tail.parent):
                        return folder / tail
        for path in paths:
            for folder in self._folders:
                stems = self._by_stem(folder)
                other = stems.get(path.stem) or stems.get(path.name)
                if other is not None:
                    return folder / other
        first = paths[0]
        return self._folders[0] / (first.name if first.is_absolute() else first)

    def _listed(self, folder: Path) -> frozenset[str]:
        if folder not in self._names:
            try:
                self._names[folder] = frozenset(os.listdir(folder))
            except OSError:
                self._names[folder] = frozenset()
        return self._names[folder]

    def _by_stem(self, folder: Path) -> dict[str, str]:
        if folder not in self._stems:
            names = sorted(filter(is_image, self._listed(folder)), reverse=True)
            self._stems[folder] = {name.rpartition(".")[0]: name for name in names}
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
    return [
        *([beside] if split and split_word(beside.name) == split else []),
        *(base / name for name in names for base in bases),
        *(root / name / "images" for name in names),
        *(sub for sub in subs if split and split_word(sub.name) == split),
        *(root / name for name in ("images", "", "JPEGImages", "img")),
        beside,
        *(sub for sub in subs if not split or split_word(sub.name) is None),
    ]


def is_image(name: str | Path) -> bool:
    """Whether a file has an extension of an image format."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def can_be_a_file(name: str) -> bool:
    """Whether a file may have this path: no zero byte, no part longer than file systems allow."""
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        return False
    parts = encoded.replace(b"\\", b"/").split(b"/")
    return b"\0" not in encoded and len(encoded) < 4096 and all(len(part) < 256 for part in parts)


def images_in(folder: Path, *, deep: bool = False) -> list[Path]:
    """Return the images in a folder, sorted by path; `deep`: also in the folders below."""
    files = folder.rglob("*") if deep else folder.glob("*")
    return sorted(file for file in files if is_image(file.name) and file.is_file())


def label_files(path: Path, suffixes: Sequence[str], detect: Callable[[Path], bool]) -> list[Path]:
    """Label files of many images each: `path`, or those in it, in annotations/ or a split's folder.

    Args:
        path: a file or a folder.
        suffixes: lower-case extensions.
        detect: tests a file by its content.
    """
    files = [path]
    if path.is_dir():
        folders = [path, path / "annotations"]
        folders += sorted(sub for sub in path.iterdir() if sub.is_dir() and split_word(sub.name))
        files = [file for sub in folders if sub.is_dir() for file in sorted(sub.iterdir())]
    return [
        file
        for file in files
        if file.suffix.lower() in suffixes and file.is_file() and detect(file)
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


def listed_names(folder: Path, *names: str) -> tuple[Path, list[str]]:
    """Return the first of the files `names` in `folder` and its lines; `folder` if there is none.

    Repeated lines are kept.
    """
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    return (folder, []) if file is None else (file, read_lines(file))


def read_lines(file: Path) -> list[str]:
    """Return the lines of a text file that are not blank, stripped."""
    lines = file.read_text("utf-8-sig", errors="replace").splitlines()
    return [line.strip() for line in lines if line.strip()]


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


# ---- values


def cut(text: str, limit: int = 80) -> str:
    """Return a text in messages, cut to `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def short(value: Any) -> str:
    """Return the repr of a value in messages."""
    return cut(repr(value))


def to_int(value: Any) -> int | None:
    """Return a whole number, also as a float or as text; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return int(value) if isinstance(value, str) and value.isdecimal() else None


def to_id(value: Any) -> int | str | None:
    """Return an id: a whole number or text; None for anything else."""
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def to_number(value: Any) -> float | None:
    """Return a float, also of text; None for anything else. NaN and Inf are returned."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def to_size(value: Any) -> int | None:
    """Pixels of an image's side; None if it is not stated: some tools write 0."""
    number = to_number(value)
    return int(number) if number is not None and 1 <= number < math.inf else None


def to_box(values: Any) -> Box | None:
    """Return four numbers; None for anything else."""
    if not isinstance(values, list | tuple) or len(values) != 4:
        return None
    a, b, c, d = map(to_number, values)
    return None if a is None or b is None or c is None or d is None else (a, b, c, d)


def to_flag(value: Any) -> bool:
    """Return a flag as label files write it: 1, "1", true, "yes"."""
    if isinstance(value, str):
        return value.strip().lower() in ("1", "true", "yes")
    return bool(value)


def from_text(key: str, text: str) -> Any:
    """Parse a value of `extra` from text: a number, a JSON list or object, or text."""
    if key == JSON_TEXT or not text or text[0] not in "-0123456789[{":
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    # Only values that are written as the same text: "007" and "1.50" are names, not numbers.
    return value if isinstance(value, list | dict) or to_text(value) == text else text


def to_text(value: Any) -> str:
    """Write a value of `extra` as text that :func:`from_text` parses."""
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def json_values(extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return values of `extra` for JSON: masks as lists rather than text."""
    return {
        key: json.loads(value) if key == JSON_TEXT and isinstance(value, str) else value
        for key, value in extra.items()
    }


def enclosing_box(box: Box, degrees: float, about: tuple[float, float]) -> Box:
    """Return the upright box around `box`, rotated clockwise (as seen) about a point; pixels."""
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    corners = [(x - about[0], y - about[1]) for x in (box[0], box[2]) for y in (box[1], box[3])]
    xs = [about[0] + x * cos - y * sin for x, y in corners]
    ys = [about[1] + x * sin + y * cos for x, y in corners]
    return min(xs), min(ys), max(xs), max(ys)


def to_annotation(
    box: Box, label: int, number: int, values: Mapping[str, Any], known: Iterable[str]
) -> Annotation:
    """Return an object with the values of a label file.

    Args:
        box, label: of the object.
        number: its index in the file; its id if `values` has none.
        values: by COCO's and VOC's names: id, iscrowd, difficult, area, and others.
        known: names of values that are not kept as others.
    """
    id_ = to_id(values.get("id"))
    is_crowd = to_flag(values.get("iscrowd"))
    return Annotation(
        box,
        label,
        id=number if id_ is None else id_,
        crowd=is_crowd,
        # VOC files written here mark a crowd as difficult too, for programs without crowds.
        difficult=to_flag(values.get("difficult")) and not is_crowd,
        area=to_number(values.get("area")),
        extra={k: v for k, v in values.items() if k not in known and k not in _OBJECT_VALUES},
    )


_OBJECT_VALUES = frozenset({"id", "iscrowd", "difficult", "area"})


# ---- label files


@dataclass(slots=True)
class LabelImage:
    """An image as a label file states it.

    Attributes:
        name: its path or file name; others that it may have are in `other_names`.
        id: the source's own id, or the stem of the name.
        width, height: pixels; None if they are not stated.
        annotations: its objects; a label is an index in :attr:`LabelFile.classes`.
        rotations: clockwise degrees about (x1, y1) of boxes, by index, if the file is relative.
        split: the split that the file states for the image; None: that of the file.
        path: its file, if known; else it is looked for by name.
    """

    name: str
    id: int | str
    width: int | None = None
    height: int | None = None
    annotations: list[Annotation] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    rotations: dict[int, float] = field(default_factory=dict)
    split: str | None = None
    path: Path | None = None
    other_names: tuple[str, ...] = ()


@dataclass(slots=True)
class LabelFile:
    """A parsed label file.

    Attributes:
        file: its path; None for an image without one.
        split: of images that state no other; None: the split that it is built for.
        images: its images.
        classes: names of its classes, in the order of the labels in `images`.
        problems: the problems found while parsing, each with its split.
        is_relative: whether boxes are fractions of the image rather than pixels.
    """

    file: Path | None
    split: str | None = None
    images: list[LabelImage] = field(default_factory=list)
    classes: dict[str, int] = field(default_factory=dict)
    problems: list[tuple[str | None, Problem]] = field(default_factory=list)
    is_relative: bool = False

    def label(self, name: str) -> int:
        """Return the label of a class in this file."""
        return self.classes.setdefault(name, len(self.classes))

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
        assert self.file is not None
        problem = Problem(kind, self.file, position, reason, fix)
        self.problems.append((self.split if split is None else split, problem))


@dataclass(frozen=True, slots=True)
class ClassList:
    """The classes of a data set, those of one name merged.

    Attributes:
        names: one per label, all different.
        ids: of the first of each name, by label.
        labels: the label of each class in a label file.
        problems: one for each name that was there more than once.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]
    labels: Mapping[str, int]
    problems: tuple[Problem, ...] = ()


def merge_classes(
    classes: Iterable[tuple[int, str]], file: Path, *, by_id: bool = False
) -> ClassList:
    """Merge classes of one name: as two classes they would share their objects at random.

    Args:
        classes: id and name of each, in the order of their labels.
        file: where they are listed.
        by_id: label files state the ids, as text, rather than the names.
    """
    ids_by_name: dict[str, list[int]] = {}
    for id_, name in classes:
        ids_by_name.setdefault(name, []).append(id_)
    problems = [
        Problem(
            "class-duplicate",
            file,
            None,
            f"classes {', '.join(map(str, ids[:-1]))} and {ids[-1]} are "
            f"{'all' if len(ids) > 2 else 'both'} named {name!r}",
            f"merged into {ids[0]}; rename them to keep them apart",
        )
        for name, ids in ids_by_name.items()
        if len(ids) > 1
    ]
    labels = {
        str(key): label
        for label, (name, ids) in enumerate(ids_by_name.items())
        for key in (ids if by_id else [name])
    }
    first_ids = tuple(ids[0] for ids in ids_by_name.values())
    return ClassList(tuple(ids_by_name), first_ids, labels, tuple(problems))


def find_classes(files: Iterable[LabelFile], listed: Iterable[str], source: Path) -> ClassList:
    """Return the classes `listed` in `source`, from 1 on; if there are none, all names, sorted."""
    names = list(listed) or sorted({name for file in files for name in file.classes} - {""})
    return merge_classes(enumerate(names, start=1), source)


# ---- data sets


def build_splits(
    format: str, files: Sequence[LabelFile], classes: ClassList, source: Path
) -> dict[str, Callable[[], Dataset]]:
    """Return the splits of parsed label files; each data set is built when called."""
    splits: dict[str | None, None] = {}
    for file in files:
        splits |= dict.fromkeys(
            file.split if image.split is None else image.split for image in file.images
        )
        if not file.images:
            splits[file.split] = None
    return {
        split: partial(build, format, split, files, classes, source)
        for split in (name or "" for name in splits)
    }


def build(
    format: str,
    split: str,
    files: Iterable[LabelFile],
    classes: ClassList,
    source: Path,
    *,
    folders: Callable[[Path, str], list[Path]] = image_folders,
    problems: Iterable[Problem] = (),
    extra: Mapping[str, Any] | None = None,
) -> Dataset:
    """Build the data set of a split from its label files.

    Args:
        format, source, extra: of the :class:`Dataset`.
        split: images and problems that state another split are left out.
        files: the parsed label files.
        classes: of the whole data set.
        folders: returns the folders that may hold the images of a label file.
        problems: further problems.
    """
    listed = [*classes.problems, *problems]
    found = _find_images(files, split, folders, listed)
    sizes = _sizes([path for file, image, path in found if file.is_relative and not image.width])
    images: list[LabelledImage] = []
    ids: set[int | str] = set()
    for file, image, path in found:
        candidates = chain((image.id,), (f"{image.id}-{number}" for number in count(2)))
        id_ = next(candidate for candidate in candidates if candidate not in ids)
        ids.add(id_)
        images.append(_build_image(file, image, path, id_, classes, sizes, listed))
    return Dataset(
        images=tuple(images),
        classes=classes.names,
        category_ids=classes.ids,
        split=split,
        format=format,
        source=source,
        problems=tuple(listed),
        extra=extra or {},
    )


def _find_images(
    files: Iterable[LabelFile],
    split: str,
    folders: Callable[[Path, str], list[Path]],
    problems: list[Problem],
) -> list[tuple[LabelFile, LabelImage, Path]]:
    """Return the images of a split with their paths; those of no or one path become problems."""
    finders: dict[tuple[Path, ...], ImageFinder] = {}
    found: list[tuple[LabelFile, LabelImage, Path]] = []
    names: dict[Path, set[str]] = defaultdict(set)
    for file in files:
        problems += [problem for own, problem in file.problems if own in (None, split)]
        finder: ImageFinder | None = None
        for image in file.images:
            if (file.split if image.split is None else image.split) not in (None, split):
                continue
            if image.path is not None:
                found.append((file, image, image.path))
                continue
            assert file.file is not None
            if not image.name or not all(map(can_be_a_file, (image.name, *image.other_names))):
                reason = f"image {image.id}: {short(image.name)} is no file name"
                problems.append(Problem("label-unreadable", file.file, image.id, reason, DROPPED))
                continue
            if finder is None:
                where = tuple(folders(file.file, split))
                finder = finders.get(where) or finders.setdefault(where, ImageFinder(where))
            path = finder.find(image.name, *image.other_names)
            names[path].add(image.name.replace("\\", "/").removeprefix("./"))
            found.append((file, image, path))
    ambiguous = {path for path, used in names.items() if len(used) > 1 and path.is_file()}
    for _, image, path in found:
        if path in ambiguous:
            reason = (
                f"image {image.id} and another, of another path, both match this file; store the "
                f"images under the names in the labels"
            )
            problems.append(Problem("image-missing", path, image.id, reason, DROPPED))
    return [item for item in found if item[2] not in ambiguous]


def _build_image(
    file: LabelFile,
    image: LabelImage,
    path: Path,
    id_: int | str,
    classes: ClassList,
    sizes: Mapping[Path, tuple[int, int] | DataError],
    problems: list[Problem],
) -> LabelledImage:
    """Convert an image with its objects; those of unknown classes become problems."""
    width, height, objects = image.width, image.height, image.annotations
    if file.is_relative and not (width and height):
        size = sizes.get(path)
        if isinstance(size, tuple):
            height, width = size
        elif objects:
            objects = []
            if path.is_file():  # a missing image is reported by the check
                reason = f"its boxes are fractions of an image whose size cannot be read: {size}"
                problems.append(Problem("image-unreadable", path, None, reason, "dropped"))
    names = list(file.classes)
    labels = [classes.labels.get(name) for name in names]
    annotations = []
    for index, item in enumerate(objects):
        label = labels[item.label]
        if label is None:
            reason = (
                f"{cut(image.name)}: object {item.id}: class {short(names[item.label])} is not one "
                f"of {len(classes.labels)} known"
            )
            assert file.file is not None
            problems.append(Problem("class-unknown", file.file, item.id, reason, "dropped"))
            continue
        if file.is_relative:
            assert width is not None
            assert height is not None
            item = _to_pixels(item, width, height, image.rotations.get(index, 0.0))
        annotations.append(item if label == item.label else replace(item, label=label))
    return LabelledImage(path, id_, tuple(annotations), width, height, file.file, image.extra)


def _to_pixels(item: Annotation, width: int, height: int, rotation: float) -> Annotation:
    """Scale a box in fractions of the image, and polygons, to ten-thousandths of a pixel."""
    x1, y1, x2, y2 = item.box
    box = (x1 * width, y1 * height, x2 * width, y2 * height)
    if rotation % 360:
        box = enclosing_box(box, rotation, box[:2])
    x1, y1, x2, y2 = (round(side, 4) for side in box)
    extra = item.extra
    if JSON_TEXT in extra:
        points = [
            [round(v * (height if i % 2 else width), 4) for i, v in enumerate(polygon)]
            for polygon in json.loads(extra[JSON_TEXT])
        ]
        extra = {**extra, JSON_TEXT: json.dumps(points, separators=(",", ":"))}
    return replace(item, box=(x1, y1, x2, y2), extra=extra)


def _sizes(paths: list[Path]) -> dict[Path, tuple[int, int] | DataError]:
    """Height and width of images, read in threads; the error of those that cannot be read."""

    def read(path: Path) -> tuple[int, int] | DataError:
        try:
            return image_size(path)
        except DataError as error:
            return error

    if not paths:
        return {}
    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        return dict(zip(paths, pool.map(read, paths), strict=True))
