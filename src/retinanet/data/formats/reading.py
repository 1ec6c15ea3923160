"""Shared parts of the label formats: find files and images, parse values, build data sets.

Each format has ``detect(file)``, which tests a label file by its content, and ``parse(file)``,
which returns its images, objects and faults as a :class:`LabelFile`. :func:`build` looks for the
images, unites the classes of several files and converts boxes to pixels.
"""

from __future__ import annotations

import gzip
import json
import math
import mmap
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import chain, count, cycle, islice
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from retinanet.data.dataset import Annotation, Dataset, LabelledImage, Problem
from retinanet.data.finder import Item, LabelSet, Match, Tree, can_be_a_file, fold, relative
from retinanet.data.image_files import image_sizes
from retinanet.errors import DataError

JSON_TEXT = "segmentation"
"""The key of `extra` that is kept as JSON text: as lists, COCO's masks would fill gigabytes."""

DROPPED = "the image is dropped"
"""The fix of an image whose labels cannot be used."""

ALL_FAULTY = "each of its objects is faulty"
"""The reason for which an image that is no background is dropped."""

ENCLOSED = "the upright box around it is used"
"""The fix of a rotated box."""

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_TOLERANCE = 1e-3  # of fractions of an image
_SAMPLE = 20  # files of a folder whose content is looked at to tell its format

Box = tuple[float, float, float, float]

# ---- files


def listed_names(tree: Tree, *names: str) -> tuple[Path, list[str]]:
    """Return the file of class names (``classes.txt``) and its lines; the tree's path without."""
    file = tree.named(*(names or ("classes.txt",)))
    return (tree.path, []) if file is None else (file, read_lines(file))


def read_text(file: Path) -> str:
    """Return the text of a file in UTF-8, UTF-16 with its mark, or Windows' cp1252."""
    content = file.read_bytes()
    if content.startswith(_UTF16_MARKS):
        return content.decode("utf-16", errors="replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def read_lines(file: Path) -> list[str]:
    """Return the lines of a text file that are not blank, stripped."""
    return [line for line in map(str.strip, read_text(file).splitlines()) if line]


def begins_with(file: Path, pattern: re.Pattern[bytes]) -> bool:
    """Whether the first 4 kB of a file match a pattern."""
    with file.open("rb") as stream:
        return bool(pattern.search(stream.read(4096)))


def is_compressed(file: Path) -> bool:
    """Whether a file is compressed by gzip, as ``labels.json.gz``."""
    return file.suffix.lower() == ".gz"


def json_has(file: Path, start: bytes, *alternatives: Sequence[bytes]) -> bool:
    """Whether a JSON file begins with `start` and holds all marks of an alternative; unparsed."""
    try:
        with (
            file.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        ):
            data: Any = gzip.decompress(mapped) if is_compressed(file) else mapped
            if data[:2] in _UTF16_MARKS:
                data = data[:].decode("utf-16").encode()
            if not data[:64].removeprefix(b"\xef\xbb\xbf").lstrip().startswith(start):
                return False
            return any(all(data.find(mark) >= 0 for mark in marks) for marks in alternatives)
    except (OSError, EOFError, ValueError, zlib.error):  # unreadable or empty
        return False


def read_json(
    file: Path, kind: type, expected: str, hook: Callable[[dict[str, Any]], Any] | None = None
) -> Any:
    """Parse a JSON file whose root is a `kind`; a DataError has line and column."""
    try:
        content = file.read_bytes()
        content = gzip.decompress(content) if is_compressed(file) else content
        root = json.loads(content, object_hook=hook)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}: not JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from None
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    if not isinstance(root, kind):
        raise DataError(f"{file}: holds a JSON {type(root).__name__}, not {expected}")
    return root


# ---- values


def address_path(name: str) -> str:
    """Return the path in an address (``https://host/a/1.jpg?key``); of a plain path itself."""
    try:
        return unquote(urlsplit(name).path).lstrip("/") if "://" in name else name
    except ValueError:  # such as an IPv6 address that is none
        return name


def cut(text: str, limit: int = 80) -> str:
    """Return a text in messages, cut to `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def short(value: Any) -> str:
    """Return the repr of a value in messages."""
    return cut(repr(value))


def to_int(value: Any) -> int | None:
    """Return a whole number, also of a float or of text; None for anything else."""
    number = to_number(value)
    return int(number) if number is not None and number.is_integer() else None


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


def to_box(values: Any, *, has_size: bool = False) -> Box | None:
    """Return corners from four numbers (`has_size`: x, y, width, height); None for others."""
    if not isinstance(values, list | tuple) or len(values) != 4:
        return None
    a, b, c, d = map(to_number, values)
    if a is None or b is None or c is None or d is None:
        return None
    return (a, b, a + c, b + d) if has_size else (a, b, c, d)


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


def box_around(points: Any) -> Box | None:
    """Return the box around points; None if they are not at least two pairs of numbers."""
    if not isinstance(points, Sequence) or len(points) < 2:
        return None
    try:
        xs, ys = zip(*((float(x), float(y)) for x, y in points), strict=True)
    except (TypeError, ValueError, OverflowError):
        return None
    return min(xs), min(ys), max(xs), max(ys)


def enclosing_box(box: Box, degrees: float, about: tuple[float, float]) -> Box:
    """Return the upright box around `box`, rotated clockwise (as seen) about a point; pixels."""
    angle = math.radians(degrees)
    cos, sin = math.cos(angle), math.sin(angle)
    corners = [(x - about[0], y - about[1]) for x in (box[0], box[2]) for y in (box[1], box[3])]
    xs = [about[0] + x * cos - y * sin for x, y in corners]
    ys = [about[1] + x * sin + y * cos for x, y in corners]
    return min(xs), min(ys), max(xs), max(ys)


def to_annotation(
    box: Box, label: int, number: int, values: Mapping[str, Any], known: Iterable[str] = ()
) -> Annotation:
    """Return an object with the values of a label file, by COCO's and VOC's names.

    `number` is its id if `values` has none; values named in `known` are not kept as others.
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
        annotations: its objects; a label is an index in :attr:`LabelFile.classes`.
        split: that the file states for the image; None: that of the file.
        path: its file, if known; else it is looked for by name.
        has_faults: an object of it was dropped: without any other it is no background.
    """

    name: str
    id: int | str
    width: int | None = None
    height: int | None = None
    annotations: list[Annotation] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    split: str | None = None
    path: Path | None = None
    other_names: tuple[str, ...] = ()
    has_faults: bool = False

    @property
    def paths(self) -> list[str]:
        """All paths, the most likely first, without hosts of addresses."""
        return [address_path(name) for name in (self.name, *self.other_names)]


@dataclass(slots=True)
class LabelFile:
    """A parsed label file.

    Attributes: file: its path; of an image without one, that of the image. split: of images that
        state no other; None: the split that it is built for. classes: its classes' labels in
        `images`; `listed` are those that it lists, without objects too. problems: found while
        parsing, each with its split. decimals: boxes are fractions of the image, rounded to these
        decimals of a pixel; None: pixels.
    """

    file: Path
    split: str | None = None
    images: list[LabelImage] = field(default_factory=list)
    classes: dict[str, int] = field(default_factory=dict)
    problems: list[tuple[str | None, Problem]] = field(default_factory=list)
    decimals: int | None = None
    listed: list[str] = field(default_factory=list)

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
        image: LabelImage | None = None,
    ) -> None:
        """Add a problem, of an image or of a split."""
        if image is not None:
            split = image.split
            image.has_faults |= fix == "dropped"
        problem = Problem(kind, self.file, position, reason, fix)
        self.problems.append((self.split if split is None else split, problem))

    def add(
        self,
        image: LabelImage,
        number: int,
        name: str,
        box: Box | None,
        stated: str,
        values: Mapping[str, Any] | None = None,
        *,
        where: str = "",
    ) -> bool:
        """Add an object to an image; without a class or four numbers it is a problem, and False.

        `number` is its id if `values` has none; `stated`, the box as written, and `where`, the
        object in words, are for the problem.
        """
        where = where or f"{cut(image.name)}: object {number}"
        if not name:
            self.report("class-unknown", number, f"{where} has no class", image=image)
        elif box is None:
            reason = f"{where} ({name}): {stated}: not four numbers"
            self.report("box-not-a-number", number, reason, image=image)
        else:
            image.annotations.append(to_annotation(box, self.label(name), number, values or {}))
            return True
        return False


@dataclass(frozen=True, slots=True)
class ClassList:
    """The classes of a data set, those of one name merged.

    `names` and `ids` (of the first of each name) go by label; `labels` has the label of each class
    in a label file.
    """

    names: tuple[str, ...]
    ids: tuple[int, ...]
    labels: Mapping[str, int]
    problems: tuple[Problem, ...] = ()


def merge_classes(
    classes: Iterable[tuple[int, str]], file: Path, *, by_id: bool = False
) -> ClassList:
    """Merge classes of one name: as two classes they would share their objects at random.

    `classes` are id and name of each, listed in `file`, in the order of their labels; by `by_id`
    label files state the ids, as text, rather than the names.
    """
    ids_by_name: dict[str, list[int]] = {}
    similar: dict[str, list[str]] = {}
    for id_, name in classes:
        if name not in ids_by_name:
            similar.setdefault(name.strip().casefold(), []).append(name)
        ids_by_name.setdefault(name, []).append(id_)
    problems: list[Problem] = []
    for name, ids in ids_by_name.items():
        if len(ids) > 1:
            every = "all" if len(ids) > 2 else "both"
            reason = (
                f"classes {', '.join(map(str, ids[:-1]))} and {ids[-1]} are {every} named {name!r}"
            )
            fix = f"merged into {ids[0]}; rename them to keep them apart"
            problems.append(Problem("class-duplicate", file, None, reason, fix))
    for key, names in similar.items():
        if len(names) > 1:
            reason = (
                f"classes {' and '.join(map(repr, names))} differ only in case or blanks; if they "
                f"are one class, give them one name"
            )
            fix = "" if len(key) == 1 else "merged into that of the most objects"
            problems.append(Problem("class-similar", file, None, reason, fix))
    labels = {
        str(key): label
        for label, (name, ids) in enumerate(ids_by_name.items())
        for key in (ids if by_id else [name])
    }
    first_ids = tuple(ids[0] for ids in ids_by_name.values())
    return ClassList(tuple(ids_by_name), first_ids, labels, tuple(problems))


def scale_normalised(parsed: LabelFile) -> bool:
    """Read the boxes of a file as fractions of the image if most of them lie within [0, 1].

    A few beyond (rounding, faults) do not make all others pixels.
    """
    boxes = [item.box for image in parsed.images for item in image.annotations]
    low, high = -_TOLERANCE, 1 + _TOLERANCE
    inside = sum(all(low <= side <= high for side in box) and any(box) for box in boxes)
    if inside <= len(boxes) / 2:
        return False
    parsed.decimals = 6
    for image in parsed.images:
        image.width = image.height = None  # those of the file itself are safer
    return True


def find_classes(files: Iterable[LabelFile], listed: Iterable[str], source: Path) -> ClassList:
    """Return the classes listed in the files, or in `source`, from 1 on; else all names, sorted."""
    files = list(files)
    names = list(dict.fromkeys(n for file in files for n in file.listed if n)) or list(listed)
    names = names or sorted({name for file in files for name in file.classes} - {""})
    return merge_classes(enumerate(names, start=1), source)


# ---- finding files

Detect = Callable[[Path], bool]
"""Whether a file is a label file of a format; may raise OSError."""

Splits = dict[str, Callable[[], Dataset]]
"""Splits by name, each read when called."""


def _passes(detect: Detect, file: Path) -> bool:
    try:
        return detect(file)
    except OSError:  # such as a broken link
        return False


def find_files(format: str, tree: Tree, suffixes: Sequence[str], detect: Detect) -> LabelSet | None:
    """Find label files of one image each; None if there are none.

    The first files of a folder decide: a broken file among good ones is a fault.
    """
    folders: dict[Path, list[Path]] = {}
    for file in tree.with_suffix(*suffixes):
        folders.setdefault(file.parent, []).append(file)
    # An image without objects has an empty file.
    filled = {
        folder: list(islice((f for f in group if f.stat().st_size), _SAMPLE))
        for folder, group in folders.items()
    }
    chosen = [f for f, group in filled.items() if any(_passes(detect, file) for file in group)]
    names = {folder.name for folder in chosen}
    chosen += [f for f, group in filled.items() if not group and f.name in names]
    files = [
        file
        for folder in chosen
        for file in folders[folder]
        if tree.has_stem(file) or _passes(detect, file)
    ]
    stems = frozenset(fold(file.stem) for file in files)
    return LabelSet(format, tree.group(files), lambda: stems) if files else None


def find_tables(
    format: str,
    tree: Tree,
    suffixes: Sequence[str],
    detect: Detect,
    parse: Callable[[Path], LabelFile],
) -> LabelSet | None:
    """Find label files of many images each, without those whose labels are all in other files."""

    @cache
    def items_of(file: Path) -> frozenset[Item]:
        return frozenset(
            (_item_name(image.name, file), tuple(sorted(item.box for item in image.annotations)))
            for image in parse(file).images
        )

    files = [file for file in tree.with_suffix(*suffixes) if _passes(detect, file)]
    if not files:
        return None
    notes: list[str] = []
    groups = tree.group(files, by_name=True)
    kept: dict[str, list[Path]] = {}
    for split in sorted(groups, key=lambda name: name == ""):
        # A file without a split may repeat those of the others.
        before = [] if split else [file for group in kept.values() for file in group]
        group = groups[split]
        if before or len(group) > 1:
            known: set[Item] = set().union(*map(items_of, before))
            whole = []
            for file in sorted(group, key=lambda file: -len(items_of(file))):
                items = items_of(file)
                if items and items <= known:
                    notes.append(f"{file}: the labels of its {len(items)} images are in others")
                else:
                    whole.append(file)
                    known |= items
            group = sorted(whole)
        if group:
            kept[split] = group

    def stems() -> frozenset[str]:
        names = (name for group in kept.values() for file in group for name, _ in items_of(file))
        return frozenset(fold(PurePosixPath(name).stem) for name in names)

    return LabelSet(format, kept, cache(stems), notes)


def _item_name(name: str, file: Path) -> str:
    """Return an image's name with a folder: that of the label, else that of its file."""
    name = fold(name.replace("\\", "/").removeprefix("./"))
    return name if "/" in name else f"{fold(file.parent.name)}/{name}"


def read_files(
    format: str,
    parse: Callable[..., LabelFile],
    tree: Tree,
    labels: LabelSet,
    names_of: Callable[[Tree], tuple[Path, list[str]]] = listed_names,
) -> Splits:
    """Parse label files that name their classes; each split's data set is built when called."""
    files = [parse(file, split=split) for split, file in labels.by_split()]
    source, names = names_of(tree)
    return build_splits(format, files, find_classes(files, dict.fromkeys(names), source), tree)


# ---- data sets


def build_splits(format: str, files: Sequence[LabelFile], classes: ClassList, tree: Tree) -> Splits:
    """Return the splits of parsed label files; each data set is built when called."""
    splits: dict[str, None] = {}
    for file in files:
        stated = [image.split for image in file.images] or [None]
        splits |= dict.fromkeys(file.split or "" if split is None else split for split in stated)
    return {split: partial(build, format, split, files, classes, tree) for split in splits}


def build(
    format: str,
    split: str,
    files: Iterable[LabelFile],
    classes: ClassList,
    tree: Tree,
    *,
    problems: Iterable[Problem] = (),
    extra: Mapping[str, Any] | None = None,
) -> Dataset:
    """Build the data set of a split from its label files; images of other splits are left out."""
    listed = [*classes.problems, *problems]
    found = _find_images(files, split, tree, listed)
    unknown = [path for file, image, path in found if file.decimals and not image.width]
    sizes = dict(zip(unknown, image_sizes(unknown), strict=True))
    images: dict[Path, LabelledImage] = {}
    ids: set[int | str] = set()
    faulty: list[Path] = []
    for file, image, path in found:
        built = _build_image(file, image, path, classes, sizes, listed, keep_extra=tree.extras)
        if image.has_faults:
            faulty.append(path)
        if path in images:  # objects of both entries, the same ones once
            first = images[path]
            known = {(item.label, item.box) for item in first.annotations}
            more = tuple(a for a in built.annotations if (a.label, a.box) not in known)
            images[path] = replace(first, annotations=first.annotations + more)
            reason = (
                f"listed as image {first.id} with {len(first.annotations)} objects and again as "
                f"image {image.id} with {len(built.annotations)}"
            )
            listed.append(Problem("image-duplicate", path, image.id, reason, "merged"))
            continue
        numbered = (f"{image.id}-{number}" for number in count(2))
        id_ = next(name for name in chain([image.id], numbered) if name not in ids)
        ids.add(id_)
        images[path] = built if id_ == image.id else replace(built, id=id_)
    for path in dict.fromkeys(faulty):  # after entries of the same image are merged
        if not images[path].annotations:
            del images[path]
            listed.append(Problem("label-unreadable", path, None, ALL_FAULTY, DROPPED))
    return Dataset(
        images=tuple(images.values()),
        classes=classes.names,
        category_ids=classes.ids,
        split=split,
        format=format,
        source=tree.path,
        problems=tuple(listed),
        extra=extra or {} if tree.extras else {},
    )


_Found = tuple[LabelFile, LabelImage, Path]


def _find_images(
    files: Iterable[LabelFile], split: str, tree: Tree, problems: list[Problem]
) -> list[_Found]:
    """Return the images of a split with their paths; those of no or one path become problems."""
    wanted: list[tuple[LabelFile, LabelImage, Match]] = []
    for file in files:
        problems += [problem for own, problem in file.problems if own in (None, split)]
        for image in file.images:
            if (file.split if image.split is None else image.split) not in (None, split):
                continue
            if image.path is not None:
                match = Match(image.path)
            elif image.name and all(map(can_be_a_file, image.paths)):
                match = tree.find_image(image.paths, file.file, split)
            else:
                reason = f"image {image.id}: {short(image.name)} is no file name"
                problems.append(Problem("label-unreadable", file.file, image.id, reason, DROPPED))
                continue
            wanted.append((file, image, match))
    # By stem only where other images are: the same stem in a folder of masks is no image.
    folders = Counter(match.path.parent for *_, match in wanted if match.path is not None)
    found: list[_Found] = []
    uses: dict[Path, list[tuple[int, LabelImage]]] = defaultdict(list)
    for file, image, match in wanted:
        if match.path is None and not match.several:
            match = tree.find_image(image.paths, file.file, split, by_stem=True)
            if match.path is not None and folders and match.path.parent not in folders:
                match = Match(None)
            if match.path is None and "%" in image.name and "://" not in image.name:
                match = tree.find_image(map(unquote, image.paths), file.file, split)
                if match.path is not None:
                    reason = f"image {image.id}: no file is named {short(image.name)}"
                    fix = f"{match.path.name} is used"
                    problems.append(Problem("image-name-encoded", file.file, image.id, reason, fix))
        if match.several:
            first, second = (relative(path, tree.root) for path in match.several[:2])
            reason = (
                f"image {image.id}: {short(image.name)} fits {len(match.several)} files, such as "
                f"{first} and {second}; write the folder into the label"
            )
            problems.append(Problem("image-ambiguous", file.file, image.id, reason, DROPPED))
        elif match.path is None:
            found.append((file, image, _expected_path(file, image, folders)))
        else:
            uses[match.path].append((match.tail, image))
            found.append((file, image, match.path))
    # Of two labels of one file that with the longer common path is right, if there is such a one.
    rejected: set[int] = set()
    for claims in uses.values():
        names = {id(i): i.name.replace("\\", "/").removeprefix("./") for _, i in claims}
        if len(set(names.values())) == 1:
            continue  # one entry, or the same one twice
        longest = max(tail for tail, _ in claims)
        best = {names[id(image)] for tail, image in claims if tail == longest}
        rejected |= {id(i) for tail, i in claims if tail < longest or len(best) > 1}
    for _, image, path in found:
        if id(image) in rejected:
            reason = (
                f"image {image.id} and another, of another path, both match this file; store the "
                f"images under the names in the labels"
            )
            problems.append(Problem("image-missing", path, image.id, reason, DROPPED))
    return [item for item in found if id(item[1]) not in rejected]


def _expected_path(file: LabelFile, image: LabelImage, folders: Counter[Path]) -> Path:
    """Return the path, or the address, at which a missing image is reported."""
    if "://" in image.name:
        return Path(re.split(r"[?#]", image.name)[0])
    name = PurePosixPath(image.name.replace("\\", "/"))
    if name.is_absolute() or len(name.parts) == 1:
        return max(folders, key=folders.__getitem__, default=file.file.parent) / name.name
    return file.file.parent / name


def _build_image(
    file: LabelFile,
    image: LabelImage,
    path: Path,
    classes: ClassList,
    sizes: Mapping[Path, tuple[int, int] | DataError],
    problems: list[Problem],
    *,
    keep_extra: bool,
) -> LabelledImage:
    """Convert an image with its objects; those of unknown classes become problems."""
    width, height, objects = image.width, image.height, image.annotations
    is_scaled = [bool(file.decimals) or _is_fraction(item.box) for item in objects]
    if (file.decimals or any(is_scaled)) and not (width and height):
        size = sizes.get(path) if file.decimals else image_sizes([path])[0]
        if isinstance(size, tuple):
            height, width = size
        elif objects and file.decimals:
            objects = []
            if path.is_file():  # a missing image is reported by the check
                reason = f"its boxes are fractions of an image whose size cannot be read: {size}"
                problems.append(Problem("image-unreadable", path, None, reason, "dropped"))
    names = list(file.classes)
    annotations = []
    for item, scaled in zip(objects, is_scaled, strict=False):
        name = names[item.label]
        label = classes.labels.get(name)
        if label is None:
            reason = (
                f"{cut(image.name)}: object {item.id}: class {short(name)} is not one of "
                f"{len(classes.labels)} known"
            )
            problems.append(Problem("class-unknown", file.file, item.id, reason, "dropped"))
            image.has_faults = True
            continue
        if scaled and width and height and (file.decimals or width * height > 1):
            if not file.decimals:
                reason = (
                    f"{cut(image.name)}: object {item.id}: box {short(item.box)} is within a pixel"
                )
                fix = "read as fractions of the image"
                problems.append(Problem("box-normalised", file.file, item.id, reason, fix))
            item = _to_pixels(item, width, height, file.decimals or 6)
        extra = item.extra if keep_extra else {}
        if (label, extra) != (item.label, item.extra):
            item = replace(item, label=label, extra=extra)
        annotations.append(item)
    label_file = None if file.file == path else file.file
    extra = image.extra if keep_extra else {}
    return LabelledImage(path, image.id, tuple(annotations), width, height, label_file, extra)


def _is_fraction(box: Box) -> bool:
    """Whether a box is within the first pixel, and not a pixel itself."""
    x1, y1, x2, y2 = box
    return (
        0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1 and not all(map(float.is_integer, map(float, box)))
    )


def _to_pixels(item: Annotation, width: int, height: int, decimals: int) -> Annotation:
    """Scale a box in fractions of the image, and polygons, to pixels."""

    def scaled(values: Iterable[float]) -> list[float]:
        sides = zip(values, cycle((width, height)))
        return [round(value * side, decimals) for value, side in sides]

    x1, y1, x2, y2 = scaled(item.box)
    extra = item.extra
    with suppress(TypeError, ValueError, KeyError):  # no polygons, but RLE, or broken
        points = list(map(scaled, json.loads(extra[JSON_TEXT])))
        extra = {**extra, JSON_TEXT: to_text(points)}
    return replace(item, box=(x1, y1, x2, y2), extra=extra)
