"""Label Studio's JSON and JSON-MIN exports: a list of tasks, rectangles in percent of the image.

Sources: https://labelstud.io/guide/task_format, https://labelstud.io/guide/export and
https://labelstud.io/tags/rectanglelabels
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from retinanet.data.dataset import Annotation
from retinanet.data.finder import Tree, is_image
from retinanet.data.formats import reading
from retinanet.data.formats.reading import LabelFile, LabelImage
from retinanet.errors import DataError

CONFIG_FILE = "label_studio_config.xml"
"""The labelling interface, if exported with the data: its labels are the classes."""

_IMAGE_KEYS = ("image", "img", "picture", "photo", "url")
_MARKS = (
    *((b'"data"', mark) for mark in (b'"annotations"', b'"predictions"', b'"completions"')),
    (b'"rectanglelabels"',),
    (b'"annotation_id"', b'"annotator"'),
)
_BOX = ("x", "y", "width", "height")
_UPLOADED = re.compile(r"[0-9a-f]{8}-(?=.)")  # Label Studio puts it before a file's own name
_RECTANGLES = ("rectangle", "rectanglelabels", "labels")
_OTHER_SHAPES = frozenset(
    f"{shape}{labels}"
    for shape in ("polygon", "brush", "ellipse", "keypoint", "vector")
    for labels in ("", "labels")
)


def detect(file: Path) -> bool:
    """Whether a file is an export of Label Studio."""
    return reading.json_has(file, b"[", *_MARKS)


def class_names(tree: Tree) -> tuple[Path, list[str]]:
    """Return the file that lists the labels, and these; the path and none if there is none."""
    config = tree.named(CONFIG_FILE)
    if config is None:
        return reading.listed_names(tree)
    try:
        root = ET.parse(config).getroot()
    except (ET.ParseError, OSError, LookupError, ValueError) as error:
        raise DataError(f"{config}: not XML: {error}") from None
    # With <Label> as a child of each: <RectangleLabels>, or <Labels> beside a <Rectangle>.
    controls = [element for element in root.iter() if element.tag in ("RectangleLabels", "Labels")]
    names = [label.get("value", "") for control in controls for label in control.iter("Label")]
    return config, [name for name in names if name]


def parse(file: Path, *, split: str | None = None) -> LabelFile:
    """Parse an export.

    If several people labelled a task, one annotation counts: that marked as ground truth, else
    the first that was not cancelled. A task without any (skipped, not yet labelled, or with
    predictions only) is a problem and left out. Of a rotated rectangle the upright box around it is
    used, and reported; polygons and other shapes are reported and dropped.
    """
    parsed = LabelFile(file, split, decimals=6)
    seen: set[int | str] = set()
    content = reading.read_json(file, list, "a list of tasks")
    for number, task in enumerate(content):
        content[number] = None  # freed early: exports are large
        if not isinstance(task, dict):
            reason = f"task {number} of the list is no object: {reading.short(task)}"
            parsed.report("label-unreadable", number, reason)
            continue
        own = reading.to_id(task.get("id"))
        id_ = number if own is None else own
        is_min = not isinstance(task.get("data"), dict)
        data = task if is_min else task["data"]
        address = _image_address(data)
        if own in seen:
            # JSON-MIN has an entry for each person who labelled the task.
            if not is_min:
                reason = f"task {id_} is there twice"
                parsed.report("image-id-duplicate", id_, reason, "the second is dropped")
        elif address is None:
            reason = f"task {id_} names no image: {reading.short(data)}"
            parsed.report("label-unreadable", id_, reason)
        else:
            path = _image_path(address)
            bare = _UPLOADED.sub("", path.rpartition("/")[2], count=1)
            name = address if "://" in address else path
            image = LabelImage(name, id_, other_names=(path, bare))
            if is_min:
                parsed.images.append(image)
                _parse_min(parsed, image, task)
            else:
                image.extra = {k: v for k, v in data.items() if v != address}
                _parse_task(parsed, image, task)
        if own is not None:
            seen.add(own)
    return parsed


def _parse_task(parsed: LabelFile, image: LabelImage, task: Mapping[str, Any]) -> None:
    """Parse a task of the JSON export."""
    name = _file_name(image)
    where = f"task {image.id} ({name})"
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
        parsed.report("label-missing", image.id, f"{where} {why}", reading.DROPPED)
        return
    regions = next((item for item in kept if item.get("ground_truth")), kept[0]).get("result")
    if not isinstance(regions, list):
        reason = f"{where}: its result is no list: {reading.short(regions)}"
        parsed.report("label-unreadable", image.id, reason, reading.DROPPED)
        return
    parsed.images.append(image)
    valid = [region if isinstance(region, dict) else {"type": "rectangle"} for region in regions]
    # <Rectangle> with <Labels> gives a result of each kind, of one id.
    labelled = {
        reading.to_id(region.get("id")) for region in valid if region.get("type") == "labels"
    }
    for number, region in enumerate(valid):
        value, kind = region.get("value"), str(region.get("type"))
        key = reading.to_id(region.get("id")) or number
        if kind in _OTHER_SHAPES:
            reason = f"{name}: region {key} is a {kind}, not a rectangle"
            parsed.report("shape-not-box", key, reason, image=image)
        elif kind not in _RECTANGLES or (kind == "rectangle" and key in labelled):
            continue
        elif not isinstance(value, dict):
            reason = f"{name}: region {number} is no rectangle: {reading.short(regions[number])}"
            parsed.report("label-unreadable", number, reason, image=image)
        elif kind != "labels" or "x" in value:
            _parse_region(parsed, image, region, value, key)


def _parse_min(parsed: LabelFile, image: LabelImage, task: Mapping[str, Any]) -> None:
    """Parse a task of the JSON-MIN export: data and regions side by side, regions by control."""
    lists = (value for value in task.values() if isinstance(value, list))
    regions = (item for value in lists for item in value if isinstance(item, dict))
    for number, region in enumerate(regions):
        if "rectanglelabels" in region or all(side in region for side in _BOX):
            key = reading.to_id(region.get("id")) or number
            _parse_region(parsed, image, region, region, key)
        elif any(kind in region for kind in _OTHER_SHAPES) or "points" in region:
            reason = (
                f"{_file_name(image)}: region {number} is not a rectangle: {reading.short(region)}"
            )
            parsed.report("shape-not-box", number, reason, image=image)


def _parse_region(
    parsed: LabelFile,
    image: LabelImage,
    region: Mapping[str, Any],
    value: Mapping[str, Any],
    key: int | str,
) -> None:
    where = f"{_file_name(image)}: region {key}"
    if image.width is None and image.height is None:
        image.width = reading.to_size(region.get("original_width"))
        image.height = reading.to_size(region.get("original_height"))
    names = value.get("rectanglelabels", value.get("labels"))
    names = [names] if isinstance(names, str) else names if isinstance(names, list) else []
    names = [name for name in names if isinstance(name, str) and name]
    if not names:
        parsed.report("class-unknown", key, f"{where} has no label", image=image)
        return
    box = reading.to_box([value.get(side) for side in _BOX], has_size=True)
    rotation = reading.to_number(value.get("rotation") or 0)
    image_rotation = reading.to_number(region.get("image_rotation") or 0)
    if (
        box is None
        or rotation is None
        or image_rotation is None
        or not math.isfinite(rotation + image_rotation)
    ):
        text = ", ".join(f"{side} {reading.short(value.get(side))}" for side in (*_BOX, "rotation"))
        parsed.report("box-not-a-number", key, f"{where}: {text}: not numbers", image=image)
        return
    width, height = image.width or 0, image.height or 0
    if image_rotation % 360 or (rotation % 360 and not (width and height)):
        angle = f"{image_rotation or rotation:g} degrees"
        what = "was drawn on the image rotated" if image_rotation else "has no image size, rotated"
        parsed.report("box-rotated", key, f"{where} {what} by {angle}", image=image)
        return
    x1, y1, x2, y2 = (side / 100 for side in box)
    if rotation % 360:
        parsed.report(
            "box-rotated", key, f"{where} is rotated by {rotation:g} degrees", reading.ENCLOSED
        )
        pixels = (x1 * width, y1 * height, x2 * width, y2 * height)
        x1, y1, x2, y2 = reading.enclosing_box(pixels, rotation, pixels[:2])
        x1, y1, x2, y2 = x1 / width, y1 / height, x2 / width, y2 / height
    extra = {name: region[name] for name in ("score", "origin", "meta") if region.get(name)}
    for number, name in enumerate(names, start=1):
        id_ = key if number == 1 else f"{key}-{number}"
        label = parsed.label(name)
        image.annotations.append(Annotation((x1, y1, x2, y2), label, id_, extra=extra))


def _image_address(data: Mapping[str, Any]) -> str | None:
    """Return the address of the image: by its key, else the first text with an image's suffix."""
    # An image may also be written out within the JSON, as data:image/png;base64,...
    texts = {k: v for k, v in data.items() if isinstance(v, str) and not v.startswith("data:")}
    addresses = [texts[key] for key in _IMAGE_KEYS if texts.get(key)]
    addresses += [text for text in texts.values() if is_image(_image_path(text))]
    return addresses[0] if addresses else None


def _image_path(address: str) -> str:
    """Return the path in an image's address, also in ``/data/local-files/?d=a/1.jpg``."""
    path, _, query = address.partition("?")
    name = (
        parse_qs(query).get("d", [""])[0]
        if "local-files" in path
        else reading.address_path(address)
    )
    return "/".join(part for part in re.split(r"[\\/]", name) if part not in ("", ".", ".."))


def _file_name(image: LabelImage) -> str:
    """Return the image's file name, in messages."""
    return reading.cut(reading.address_path(image.name).rpartition("/")[2])
