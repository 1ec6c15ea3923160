"""Label Studio's JSON and JSON-MIN exports: a list of tasks, rectangles in percent of the image.

Sources: https://labelstud.io/guide/task_format, https://labelstud.io/guide/export and
https://labelstud.io/tags/rectanglelabels
"""

from __future__ import annotations

import json
import math
import mmap
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from retinanet.data.dataset import Annotation, Dataset, LabelledImage, Problem
from retinanet.data.formats.finding import (
    ImageFinder,
    can_be_a_file,
    enclosing_box,
    files_by_split,
    is_image,
    to_number,
)
from retinanet.data.splits import split_word
from retinanet.errors import DataError, ImageError

LOOKED_FOR = (
    "Label Studio: a .json export (JSON or JSON-MIN) with rectangles, here or in a folder a split"
)

CONFIG_FILE = "label_studio_config.xml"
"""The labelling interface, where it lies beside the export: its labels are the classes."""

_IMAGE_KEYS = ("image", "img", "image", "photo", "url")
_MARKS = (b'"annotations"', b'"predictions"', b'"completions"')
_BOX = ("x", "y", "width", "height")
_UPLOADED = re.compile(r"[0-9a-f]{8}-(?=.)")  # Label Studio puts it before a file's own name
_DROPPED = "the image is dropped"
_OTHER_REGIONS = frozenset(
    f"{shape}{labels}"
    for shape in ("polygon", "brush", "ellipse", "keypoint", "vector")
    for labels in ("", "labels")
)


def is_label_studio(path: Path) -> bool:
    """Whether `path` is an export of Label Studio's, or a folder that holds one."""
    return bool(_files(path))


def read_label_studio(path: Path, *, extras: bool = True) -> dict[str, Callable[[], Dataset]]:
    """The splits of an export; each is made when called, the files are read once.

    Label Studio knows no splits: a file's name or folder may (``train.json``). Classes are the
    labels of ``label_studio_config.xml``, or the lines of ``classes.txt``, where there is one (then
    any other name is a problem), else all names, sorted.

    Where several people labelled a task, one annotation counts: that marked as ground truth, else
    the first that was not cancelled. A task without any (skipped, not yet labelled, or with
    predictions alone, which no person has looked at) is a problem and left out.

    A rotated rectangle is a problem, and the upright box around it is taken; polygons and other
    shapes are problems and left out.

    Args:
        path: the JSON file, or its folder.
        extras: keep what else a region and a task say.

    Raises:
        DataError: a file is not JSON or no list of tasks.
    """
    folder = path if path.is_dir() else path.parent
    listed = _class_names(folder)
    parsed = {split: _parse(file, extras) for split, file in _files(path).items()}
    names = listed or sorted(
        {t.name for one in parsed.values() for i in one.tasks for t in i.things}
    )
    labels = {name: label for label, name in enumerate(names)}

    def reader(split: str) -> Callable[[], Dataset]:
        return lambda: _dataset(split, parsed[split], labels, path)

    return {split: reader(split) for split in parsed}


@dataclass(slots=True)
class _Thing:
    """A rectangle: `shares` x, y, width, height and `turned` (degrees) as the file states them."""

    name: str
    id: int | str
    shares: tuple[float, float, float, float]
    turned: float
    extra: dict[str, Any]


@dataclass(slots=True)
class _Task:
    image: str
    id: int | str
    width: int | None = None
    height: int | None = None
    things: list[_Thing] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Parsed:
    """One file, before the names of classes are known."""

    file: Path
    tasks: list[_Task] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def problem(
        self, kind: str, place: int | str | None, reason: str, fix: str = "dropped"
    ) -> None:
        self.problems.append(Problem(kind, self.file, place, reason, fix))


def _files(path: Path) -> dict[str, Path]:
    return files_by_split(path, ".json", _looks_like_tasks)


def _looks_like_tasks(file: Path) -> bool:
    try:
        with (
            file.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            head = data[:64].removeprefix(b"\xef\xbb\xbf").lstrip()
            if not head.startswith(b"["):
                return False
            whole = data.find(b'"data"') >= 0 and any(data.find(mark) >= 0 for mark in _MARKS)
            return (
                whole
                or data.find(b'"rectanglelabels"') >= 0
                or (data.find(b'"annotation_id"') >= 0 and data.find(b'"annotator"') >= 0)
            )
    except (OSError, ValueError):  # unreadable or empty
        return False


def _class_names(folder: Path) -> list[str]:
    config = folder / CONFIG_FILE
    if config.is_file():
        try:
            root = ET.parse(config).getroot()
        except (ET.ParseError, OSError, LookupError, ValueError) as error:
            raise DataError(f"{config}: not XML: {error}") from None
        # With <Label> as a child of each: <RectangleLabels>, or <Labels> beside a <Rectangle>.
        controls = [one for one in root.iter() if one.tag in ("RectangleLabels", "Labels")]
        names = [one.get("value", "") for control in controls for one in control.iter("Label")]
        return list(dict.fromkeys(name for name in names if name))
    file = folder / "classes.txt"
    if file.is_file():
        lines = file.read_text("utf-8-sig", errors="replace").splitlines()
        return list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    return []


def _parse(file: Path, extras: bool) -> _Parsed:
    try:
        content = json.loads(file.read_bytes())
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}: not JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    if not isinstance(content, list):
        raise DataError(f"{file}: holds a JSON {type(content).__name__}, not a list of tasks")
    parsed = _Parsed(file)
    seen: set[int | str] = set()
    for place, task in enumerate(content):
        content[place] = None  # freed as we go
        if not isinstance(task, dict):
            parsed.problem(
                "label-unreadable", place, f"task {place} of the list is no object: {_short(task)}"
            )
            continue
        own = _own_id(task.get("id"))
        id_ = place if own is None else own
        if own is not None:
            if own in seen:
                # JSON-MIN has an entry for each person who labelled the task.
                if isinstance(task.get("data"), dict):
                    reason = f"task {id_} is there twice"
                    parsed.problem("image-id-duplicate", id_, reason, "the second is dropped")
                continue
            seen.add(own)
        if isinstance(task.get("data"), dict):
            _read_task(parsed, task, id_, extras)
        else:
            _read_min(parsed, task, id_, extras)
    return parsed


def _own_id(value: Any) -> int | str | None:
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def _read_task(parsed: _Parsed, task: Mapping[str, Any], id_: int | str, extras: bool) -> None:
    """A task of the JSON export."""
    data = task["data"]
    image = _image_of(data)
    if image is None:
        reason = f"task {id_}: its data name no image: {_short(data)}"
        parsed.problem("label-unreadable", id_, reason)
        return
    given = task.get("annotations", task.get("completions"))
    every = [one for one in given if isinstance(one, dict)] if isinstance(given, list) else []
    kept = [one for one in every if not (one.get("was_cancelled") or one.get("skipped"))]
    if not kept:
        if every:
            why = "was skipped"
        elif task.get("predictions"):
            why = "has predictions alone, which no person has confirmed"
        else:
            why = "is not labelled yet"
        reason = f"task {id_} ({_last(image)}) {why}"
        parsed.problem("label-missing", id_, reason, _DROPPED)
        return
    chosen = next((one for one in kept if one.get("ground_truth")), kept[0])
    listed = chosen.get("result")
    if not isinstance(listed, list):
        reason = f"task {id_} ({_last(image)}): its result is no list: {_short(listed)}"
        parsed.problem("label-unreadable", id_, reason, _DROPPED)
        return
    one = _Task(image, id_)
    if extras:
        known = {key for key, value in data.items() if value == image}
        one.extra = {key: value for key, value in data.items() if key not in known}
    parsed.tasks.append(one)
    regions = [region for region in listed if isinstance(region, dict)]
    for place, region in enumerate(listed):
        if not isinstance(region, dict):
            _bad_region(parsed, one, place, region)
    # <Rectangle> with <Labels> gives a result of each kind, of one id.
    labelled = {_key(region.get("id")) for region in regions if region.get("type") == "labels"}
    for place, region in enumerate(regions):
        kind = str(region.get("type"))
        key = _key(region.get("id"))
        if kind in _OTHER_REGIONS:
            reason = f"{_last(image)}: region {key or place} is a {kind}, not a rectangle"
            parsed.problem("shape-not-box", key or place, reason)
        elif kind == "rectangle" and key in labelled:
            continue
        elif kind in ("rectangle", "rectanglelabels", "labels"):
            value = region.get("value")
            if not isinstance(value, dict):
                _bad_region(parsed, one, place, region)
            elif kind != "labels" or "x" in value:
                _read_region(parsed, one, region, value, key or place, extras)


def _read_min(parsed: _Parsed, task: Mapping[str, Any], id_: int | str, extras: bool) -> None:
    """A task of the JSON-MIN export: data and regions side by side, regions by control."""
    image = _image_of(task)
    if image is None:
        reason = f"task {id_} names no image: {_short(task)}"
        parsed.problem("label-unreadable", id_, reason)
        return
    one = _Task(image, id_)
    parsed.tasks.append(one)
    place = 0
    for value in task.values():
        if not isinstance(value, list):
            continue
        for region in value:
            if not isinstance(region, dict):
                continue
            if "rectanglelabels" in region or all(side in region for side in _BOX):
                key = _key(region.get("id"))
                _read_region(parsed, one, region, region, key or place, extras)
            elif any(kind in region for kind in _OTHER_REGIONS) or "points" in region:
                reason = f"{_last(image)}: region {place} is not a rectangle: {_short(region)}"
                parsed.problem("shape-not-box", place, reason)
            place += 1


def _key(value: Any) -> int | str:
    """A region's id; empty: it has none."""
    return value if isinstance(value, int | str) and not isinstance(value, bool) else ""


def _bad_region(parsed: _Parsed, task: _Task, place: int, region: Any) -> None:
    reason = f"{_last(task.image)}: region {place} is no rectangle: {_short(region)}"
    parsed.problem("label-unreadable", place, reason)


def _read_region(
    parsed: _Parsed,
    task: _Task,
    region: Mapping[str, Any],
    value: Mapping[str, Any],
    key: int | str,
    extras: bool,
) -> None:
    where = f"{_last(task.image)}: region {key}"
    if task.width is None and task.height is None:
        task.width = _whole(region.get("original_width"))
        task.height = _whole(region.get("original_height"))
    names = value.get("rectanglelabels", value.get("labels"))
    names = [names] if isinstance(names, str) else names
    names = (
        [one for one in names if isinstance(one, str) and one] if isinstance(names, list) else []
    )
    if not names:
        parsed.problem("class-unknown", key, f"{where} has no label")
        return
    try:
        x, y, width, height = (to_number(value.get(side)) for side in _BOX)
        turned = to_number(value.get("rotation") or 0)
        viewed = to_number(region.get("image_rotation") or 0)
    except ValueError:
        text = ", ".join(f"{side} {_short(value.get(side))}" for side in (*_BOX, "rotation"))
        parsed.problem("box-not-a-number", key, f"{where}: {text}: not numbers")
        return
    if not (math.isfinite(turned) and math.isfinite(viewed)):
        parsed.problem("box-not-a-number", key, f"{where}: rotation {turned} is not an angle")
        return
    if viewed % 360:
        reason = f"{where} was drawn on the image turned by {viewed:g} degrees"
        parsed.problem("box-rotated", key, reason)
        return
    if turned % 360:
        fix = "the upright box around it is taken"
        parsed.problem("box-rotated", key, f"{where} is turned by {turned:g} degrees", fix)
    extra: dict[str, Any] = {}
    if extras:
        extra = {name: region[name] for name in ("score", "origin", "meta") if region.get(name)}
    for number, name in enumerate(names, start=1):
        id_ = key if number == 1 else f"{key}-{number}"
        task.things.append(_Thing(name, id_, (x, y, width, height), turned, extra))


def _whole(value: Any) -> int | None:
    try:
        number = to_number(value)
        return int(number) if number >= 1 else None
    except (ValueError, OverflowError):
        return None


def _image_of(data: Mapping[str, Any]) -> str | None:
    """The address of the image: by its key, else the one text that ends as an image's name."""
    texts = {
        key: value
        for key, value in data.items()
        # An image may also be written out within the JSON, as data:image/png;base64,...
        if isinstance(value, str) and not value.startswith("data:") and can_be_a_file(value)
    }
    for key in _IMAGE_KEYS:
        if texts.get(key):
            return texts[key]
    addresses = [value for value in texts.values() if is_image(_names(value)[0])]
    return addresses[0] if addresses else None


def _names(address: str) -> list[str]:
    """Relative names that an image's address may mean on this disk, the likeliest first.

    Addresses are ``/data/local-files/?d=a/1.jpg``, ``/data/upload/3/0123abcd-1.jpg``,
    ``s3://bucket/a/1.jpg``, ``https://host/a/1.jpg?signature``, or a plain path.
    """
    try:
        parts = urlsplit(address)
        if "local-files" in parts.path:
            given = parse_qs(parts.query).get("d", [""])[0]
        else:
            given = unquote(parts.path) if parts.scheme or parts.netloc else address
    except ValueError:  # such as an IPv6 address that is none
        given = address
    given = given.replace("\\", "/")
    path = PurePosixPath("/".join(part for part in given.split("/") if part not in ("", ".", "..")))
    names = ["/".join(path.parts[start:]) for start in range(len(path.parts))]
    bare = _UPLOADED.sub("", path.name, count=1)
    return [*names, bare] if bare != path.name else names or ["?"]


def _last(address: str) -> str:
    """The image's name, for a message."""
    return _short(_names(address)[0].rpartition("/")[2], text=True)


def _short(value: Any, *, text: bool = False) -> str:
    shown = value if text else repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _dataset(split: str, parsed: _Parsed, labels: Mapping[str, int], source: Path) -> Dataset:
    finder = _Finder(_image_folders(parsed.file, split))
    problems = list(parsed.problems)
    images = [_image(task, parsed, finder, labels, problems) for task in parsed.tasks]
    # Two uploads of one name, or two folders with a 1.jpg each, may come to one file here.
    meant: dict[Path, set[str]] = {}
    for task, image in zip(parsed.tasks, images, strict=True):
        meant.setdefault(image.path, set()).add(task.image)
    kept = []
    for image in images:
        if len(meant[image.path]) == 1 or not image.path.is_file():
            kept.append(image)
            continue
        reason = (
            f"task {image.id} and another, of another address, come to this file; lay the images "
            f"down by the names that the export gives them"
        )
        problems.append(Problem("image-missing", image.path, image.id, reason, _DROPPED))
    return Dataset(
        images=tuple(kept),
        classes=tuple(labels),
        category_ids=tuple(range(1, len(labels) + 1)),
        split=split,
        format="labelstudio",
        source=source,
        problems=tuple(problems),
    )


def _image(
    task: _Task,
    parsed: _Parsed,
    finder: _Finder,
    labels: Mapping[str, int],
    problems: list[Problem],
) -> LabelledImage:
    path = finder.find(_names(task.image))
    width, height = task.width, task.height
    things = task.things
    if things and (width is None or height is None):
        from retinanet.data.images import image_size

        try:
            height, width = image_size(path)
        except (ImageError, OSError) as error:
            if path.is_file():
                reason = f"its boxes are percents of an image whose size cannot be read: {error}"
                problems.append(Problem("image-unreadable", path, None, reason, "dropped"))
            things = []
    annotations = []
    for thing in things:
        assert width is not None
        assert height is not None
        if thing.name not in labels:
            reason = (
                f"{_last(task.image)}: region {thing.id}: label {_short(thing.name)} is not one "
                f"of {len(labels)} known"
            )
            problems.append(Problem("class-unknown", parsed.file, thing.id, reason, "dropped"))
            continue
        x, y, across, down = (share / 100 for share in thing.shares)
        left, top = x * width, y * height
        box = (left, top, (x + across) * width, (y + down) * height)
        if thing.turned % 360:
            box = enclosing_box(box, thing.turned, (left, top))  # turned about its first corner
        x1, y1, x2, y2 = (round(side, 6) for side in box)  # 12 pixels, not 12.000000000000002
        box = (x1, y1, x2, y2)
        annotations.append(Annotation(box, labels[thing.name], thing.id, extra=thing.extra))
    return LabelledImage(path, task.id, tuple(annotations), width, height, parsed.file, task.extra)


class _Finder:
    """Finds the image of an address: by as much of its path as there is, then by its name."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self._folders = [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
        self._finder = ImageFinder(self._folders)

    def find(self, names: list[str]) -> Path:
        """The file; where there is none, the place where it should have been."""
        for path in self._places(names):
            if path.is_file():
                return path
        # Last, an image of that stem and another extension.
        last = names[-1]
        return self._finder.find(last)

    def _places(self, names: list[str]) -> Iterator[Path]:
        return (folder / name for name in names for folder in self._folders)


def _image_folders(file: Path, split: str) -> list[Path]:
    root = file.parent
    if root.name == "annotations":
        root = root.parent
    subs = [sub for sub in sorted(root.iterdir()) if sub.is_dir()]
    own = [sub for sub in subs if split and split_word(sub.name) == split]
    images = root / "images"
    inside = [images / split] if split else []
    return [*own, *inside, images, root, root / "img", *subs]
