"""Label Studio's JSON and JSON-MIN exports: a list of tasks, rectangles in percent of the image.

Sources: https://labelstud.io/guide/task_format, https://labelstud.io/guide/export and
https://labelstud.io/tags/rectanglelabels
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from retinanet.data.dataset import Dataset, Problem
from retinanet.data.formats.labels import (
    ImageFinder,
    LabelFile,
    ReadImage,
    ReadObject,
    build_splits,
    can_be_a_file,
    cut,
    find_classes,
    is_image,
    json_has,
    label_files,
    name_splits,
    read_json,
    read_lines,
    short,
    to_number,
    to_size,
)
from retinanet.errors import DataError

LOOKED_FOR = (
    "Label Studio: a .json export (JSON or JSON-MIN) with rectangles, here or in a folder a split"
)

CONFIG_FILE = "label_studio_config.xml"
"""The labelling interface, if exported with the data: its labels are the classes."""

_IMAGE_KEYS = ("image", "img", "image", "photo", "url")
_MARKS = (
    *((b'"data"', mark) for mark in (b'"annotations"', b'"predictions"', b'"completions"')),
    (b'"rectanglelabels"',),
    (b'"annotation_id"', b'"annotator"'),
)
_BOX = ("x", "y", "width", "height")
_UPLOADED = re.compile(r"[0-9a-f]{8}-(?=.)")  # Label Studio puts it before a file's own name
_DROPPED = "the image is dropped"
_RECTANGLES = ("rectangle", "rectanglelabels", "labels")
_OTHER_REGIONS = frozenset(
    f"{shape}{labels}"
    for shape in ("polygon", "brush", "ellipse", "keypoint", "vector")
    for labels in ("", "labels")
)


def is_label_studio(path: Path) -> bool:
    """Whether `path` is an export of Label Studio, or a folder with one."""
    return bool(_files(path))


def read_label_studio(path: Path, *, extras: bool = True) -> dict[str, Callable[[], Dataset]]:
    """Read an export; the files are parsed once, a split's data set is built when called.

    Label Studio has no splits: a file's name or folder may indicate one (``train.json``). Classes
    are the labels of ``label_studio_config.xml``, or the lines of ``classes.txt``, if there is one
    (any other name is a problem), else all names, sorted.

    If several people labelled a task, one annotation counts: that marked as ground truth, else
    the first that was not cancelled. A task without any (skipped, not yet labelled, or with
    predictions only, which no person has confirmed) is a problem and left out.

    A rotated rectangle is a problem, and the upright box around it is used; polygons and other
    shapes are problems and dropped.

    Args:
        path: the JSON file, or its folder.
        extras: keep other values of regions and tasks.

    Raises:
        DataError: a file is not JSON or no list of tasks.
    """
    files = [_parse(file, split, extras) for split, file in _files(path).items()]
    folder = path if path.is_dir() else path.parent
    classes = find_classes(files, _class_names(folder), path)
    splits = build_splits("labelstudio", files, classes, path, _find)
    parsed = {file.split: file for file in files}
    return {
        split: partial(_without_shared_images, build, parsed[split])
        for split, build in splits.items()
    }


def _files(path: Path) -> dict[str, Path]:
    files = label_files(path, [".json"], lambda file: json_has(file, b"[", *_MARKS))
    return name_splits(files, path)


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
    return list(dict.fromkeys(read_lines(file))) if file.is_file() else []


def _parse(file: Path, split: str, extras: bool) -> LabelFile:
    parsed = LabelFile(file, split, is_relative=True)
    seen: set[int | str] = set()
    content = read_json(file, list, "a list of tasks")
    for number, task in enumerate(content):
        content[number] = None  # freed early: exports are large
        if not isinstance(task, dict):
            reason = f"task {number} of the list is no object: {short(task)}"
            parsed.report("label-unreadable", number, reason)
            continue
        own = _own_id(task.get("id"))
        id_ = number if own is None else own
        if own in seen:
            # JSON-MIN has an entry for each person who labelled the task.
            if isinstance(task.get("data"), dict):
                reason = f"task {id_} is there twice"
                parsed.report("image-id-duplicate", id_, reason, "the second is dropped")
            continue
        if own is not None:
            seen.add(own)
        if isinstance(task.get("data"), dict):
            _read_task(parsed, task, id_, extras)
        else:
            _read_min(parsed, task, id_, extras)
    return parsed


def _own_id(value: Any) -> int | str | None:
    return value if isinstance(value, int | str) and not isinstance(value, bool) else None


def _read_task(parsed: LabelFile, task: Mapping[str, Any], id_: int | str, extras: bool) -> None:
    """Read a task of the JSON export."""
    data = task["data"]
    address = _image_address(data)
    if address is None:
        reason = f"task {id_}: its data name no image: {short(data)}"
        parsed.report("label-unreadable", id_, reason)
        return
    stated = task.get("annotations", task.get("completions"))
    every = [item for item in stated if isinstance(item, dict)] if isinstance(stated, list) else []
    kept = [item for item in every if not (item.get("was_cancelled") or item.get("skipped"))]
    if not kept:
        if every:
            why = "was skipped"
        elif task.get("predictions"):
            why = "has predictions alone, which no person has confirmed"
        else:
            why = "is not labelled yet"
        reason = f"task {id_} ({_file_name(address)}) {why}"
        parsed.report("label-missing", id_, reason, _DROPPED)
        return
    regions = next((item for item in kept if item.get("ground_truth")), kept[0]).get("result")
    if not isinstance(regions, list):
        reason = f"task {id_} ({_file_name(address)}): its result is no list: {short(regions)}"
        parsed.report("label-unreadable", id_, reason, _DROPPED)
        return
    image = ReadImage(address, parsed.split, id_)
    if extras:
        image.extra = {key: value for key, value in data.items() if value != address}
    parsed.images.append(image)
    _read_regions(parsed, image, regions, extras)


def _read_regions(parsed: LabelFile, image: ReadImage, regions: list[Any], extras: bool) -> None:
    # <Rectangle> with <Labels> gives a result of each kind, of one id.
    labelled = {
        _key(region.get("id"))
        for region in regions
        if isinstance(region, dict) and region.get("type") == "labels"
    }
    name = _file_name(image.name)
    for number, region in enumerate(regions):
        value = region.get("value") if isinstance(region, dict) else None
        kind = str(region.get("type")) if isinstance(region, dict) else "rectangle"
        key = _key(region.get("id")) if isinstance(region, dict) else ""
        if kind in _OTHER_REGIONS:
            reason = f"{name}: region {key or number} is a {kind}, not a rectangle"
            parsed.report("shape-not-box", key or number, reason)
        elif kind not in ("rectangle", "rectanglelabels", "labels") or (
            kind == "rectangle" and key and key in labelled
        ):
            continue
        elif not isinstance(value, dict):
            reason = f"{name}: region {number} is no rectangle: {short(region)}"
            parsed.report("label-unreadable", number, reason)
        elif kind != "labels" or "x" in value:
            _read_region(parsed, image, region, value, key or number, extras)


def _read_min(parsed: LabelFile, task: Mapping[str, Any], id_: int | str, extras: bool) -> None:
    """Read a task of the JSON-MIN export: data and regions side by side, regions by control."""
    address = _image_address(task)
    if address is None:
        parsed.report("label-unreadable", id_, f"task {id_} names no image: {short(task)}")
        return
    image = ReadImage(address, parsed.split, id_)
    parsed.images.append(image)
    lists = (value for value in task.values() if isinstance(value, list))
    regions = (item for value in lists for item in value if isinstance(item, dict))
    for number, region in enumerate(regions):
        if "rectanglelabels" in region or all(side in region for side in _BOX):
            key = _key(region.get("id")) or number
            _read_region(parsed, image, region, region, key, extras)
        elif any(kind in region for kind in _OTHER_REGIONS) or "points" in region:
            reason = f"{_file_name(address)}: region {number} is not a rectangle: {short(region)}"
            parsed.report("shape-not-box", number, reason)


def _key(value: Any) -> int | str:
    """Return a region's id; empty if it has none."""
    return value if isinstance(value, int | str) and not isinstance(value, bool) else ""


def _read_region(
    parsed: LabelFile,
    image: ReadImage,
    region: Mapping[str, Any],
    value: Mapping[str, Any],
    key: int | str,
    extras: bool,
) -> None:
    where = f"{_file_name(image.name)}: region {key}"
    if image.width is None and image.height is None:
        image.width = to_size(region.get("original_width"))
        image.height = to_size(region.get("original_height"))
    names = value.get("rectanglelabels", value.get("labels"))
    names = [names] if isinstance(names, str) else names if isinstance(names, list) else []
    names = [name for name in names if isinstance(name, str) and name]
    if not names:
        parsed.report("class-unknown", key, f"{where} has no label")
        return
    try:
        x, y, width, height = (to_number(value.get(side)) / 100 for side in _BOX)
        rotation = to_number(value.get("rotation") or 0)
        image_rotation = to_number(region.get("image_rotation") or 0)
    except ValueError:
        text = ", ".join(f"{side} {short(value.get(side))}" for side in (*_BOX, "rotation"))
        parsed.report("box-not-a-number", key, f"{where}: {text}: not numbers")
        return
    if not (math.isfinite(rotation) and math.isfinite(image_rotation)):
        parsed.report("box-not-a-number", key, f"{where}: rotation {rotation} is not an angle")
        return
    if image_rotation % 360:
        reason = f"{where} was drawn on the image turned by {image_rotation:g} degrees"
        parsed.report("box-rotated", key, reason)
        return
    if rotation % 360:
        fix = "the upright box around it is used"
        parsed.report("box-rotated", key, f"{where} is turned by {rotation:g} degrees", fix)
    extra: dict[str, Any] = {}
    if extras:
        extra = {name: region[name] for name in ("score", "origin", "meta") if region.get(name)}
    box = (x, y, x + width, y + height)
    for number, name in enumerate(names, start=1):
        id_ = key if number == 1 else f"{key}-{number}"
        values = {"id": id_, "extra": extra}
        image.objects.append(ReadObject(name, box, where, id_, values, rotation))


def _image_address(data: Mapping[str, Any]) -> str | None:
    """Return the address of the image: by its key, else the first text with an image's suffix."""
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
    """Relative file names that an image's address may refer to, the likeliest first.

    Addresses are ``/data/local-files/?d=a/1.jpg``, ``/data/upload/3/0123abcd-1.jpg``,
    ``s3://bucket/a/1.jpg``, ``https://host/a/1.jpg?signature``, or a plain path.
    """
    try:
        parts = urlsplit(address)
        if "local-files" in parts.path:
            name = parse_qs(parts.query).get("d", [""])[0]
        else:
            name = unquote(parts.path) if parts.scheme or parts.netloc else address
    except ValueError:  # such as an IPv6 address that is none
        name = address
    name = name.replace("\\", "/")
    path = PurePosixPath("/".join(part for part in name.split("/") if part not in ("", ".", "..")))
    names = ["/".join(path.parts[start:]) for start in range(len(path.parts))]
    bare = _UPLOADED.sub("", path.name, count=1)
    return [*names, bare] if bare != path.name else names or ["?"]


def _file_name(address: str) -> str:
    """Return the image's file name, in messages."""
    return cut(_names(address)[0].rpartition("/")[2])


def _find(finder: ImageFinder, address: str) -> Path:
    """Return the image of an address: by as much of its path as exists, then by its file name."""
    names = _names(address)
    paths = (folder / name for name in names for folder in finder.folders)
    return next((path for path in paths if path.is_file()), None) or finder.find(names[-1])


def _without_shared_images(build: Callable[[], Dataset], parsed: LabelFile) -> Dataset:
    """Drop images of different addresses that were found to be one file.

    Two uploads of one name, or two folders with a 1.jpg each, may be.
    """
    dataset = build()
    addresses = {
        (image.path, read.name) for image, read in zip(dataset.images, parsed.images, strict=True)
    }
    counts = Counter(path for path, _ in addresses)
    problems = [
        Problem(
            "image-missing",
            image.path,
            image.id,
            f"task {image.id} and another, of another address, both match this file; store the "
            f"images under the names in the export",
            _DROPPED,
        )
        for image in dataset.images
        if counts[image.path] > 1 and image.path.is_file()
    ]
    dropped = {problem.object for problem in problems}
    kept = tuple(image for image in dataset.images if image.id not in dropped)
    return replace(dataset, images=kept, problems=(*dataset.problems, *problems))
