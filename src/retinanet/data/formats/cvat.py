"""CVAT for images 1.1: one XML file of many images, boxes as corners in pixels.

Source: https://docs.cvat.ai/docs/manual/advanced/xml_format/
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from itertools import chain, count
from pathlib import Path
from typing import Any

from retinanet.data.dataset import Dataset
from retinanet.data.formats.labels import (
    LabelFile,
    ReadImage,
    ReadObject,
    build_splits,
    can_be_a_file,
    enclosing_box,
    find_classes,
    from_text,
    label_files,
    name_splits,
    to_flag,
    to_number,
    to_size,
)
from retinanet.data.splits import split_word
from retinanet.errors import DataError

LOOKED_FOR = "CVAT for images 1.1: an annotations.xml with <annotations> and <image>, and images/"

# VOC's root is <annotation>, without the s.
_ROOT = re.compile(rb"<annotations[\s>/]")
_SIDES = ("xtl", "ytl", "xbr", "ybr")
_OTHER_SHAPES = frozenset(
    {"polygon", "polyline", "points", "cuboid", "ellipse", "mask", "skeleton"}
)
_KEPT = ("occluded", "z_order", "source", "group_id")
_ENCLOSED = "the upright box around it is used"


def is_cvat(path: Path) -> bool:
    """Whether `path` is an XML file of CVAT, or a folder with one."""
    return bool(_files(path))


def read_cvat(path: Path, *, extras: bool = True) -> dict[str, Callable[[], Dataset]]:
    """Read a CVAT export; the files are parsed once, a split's data set is built when called.

    Splits are CVAT's subsets; the images of a file without subsets are in the split of its name or
    folder (``train.xml``). Classes are the labels of ``<meta>`` in their order; without ``<meta>``
    all names, sorted.

    A rotated box is a problem, and the upright box around it is used; polygons and other shapes are
    problems and dropped. A box marked ``outside`` is not in the image and is skipped.

    Args:
        path: the XML file, or its folder.
        extras: keep attributes, occluded, z_order, source and group.

    Raises:
        DataError: a file is no XML, or holds the tracks of "CVAT for video", which name no
            images.
    """
    files, listed = [], []
    for split, file in _files(path).items():
        parsed, labels = _parse(file, split, extras)
        files.append(parsed)
        listed += labels
    # CVAT numbers images from 0 in each task, and a project or a folder holds several tasks.
    used: dict[str, set[int | str]] = {}
    for image in (image for file in files for image in file.images):
        ids = used.setdefault(image.split, set())
        candidates = chain((image.id,), (f"{image.id}-{number}" for number in count(2)))
        image.id = next(id_ for id_ in candidates if id_ not in ids)
        ids.add(image.id)
    classes = find_classes(files, dict.fromkeys(listed), path)
    return build_splits("cvat", files, classes, path)


def _files(path: Path) -> dict[str, Path]:
    return name_splits(label_files(path, [".xml"], _looks_like_cvat), path)


def _looks_like_cvat(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return bool(_ROOT.search(stream.read(4096)))
    except OSError:
        return False


def _parse(file: Path, split: str, extras: bool) -> tuple[LabelFile, list[str]]:
    """Return the file, and the labels in its ``<meta>``."""
    parsed = LabelFile(file, split)
    labels: list[str] = []
    root: ET.Element | None = None
    try:
        for event, element in ET.iterparse(file, ("start", "end")):
            if event == "start":
                root = element if root is None else root
                continue
            if element.tag == "track":
                raise DataError(
                    f'{file}: holds tracks, so it is "CVAT for video", which names frames and no '
                    f'images; export it as "CVAT for images 1.1", with images'
                )
            if element.tag == "meta":
                labels += _labels(element)
            elif element.tag == "image":
                _read_image(parsed, element, extras)
            else:
                continue
            element.clear()  # a large export would take gigabytes
    except ET.ParseError as error:
        raise DataError(f"{file}: not XML: {error}") from None
    except (OSError, LookupError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    if root is None or root.tag != "annotations":
        raise DataError(f"{file}: its root is not <annotations>, as CVAT's is")
    return parsed, labels


def _labels(meta: ET.Element) -> list[str]:
    """Names of the labels, without the parts of skeletons."""
    return [
        name
        for label in meta.iter("label")
        if label.find("parent") is None and (name := (label.findtext("name") or "").strip())
    ]


def _read_image(parsed: LabelFile, element: ET.Element, extras: bool) -> None:
    name = (element.get("name") or "").strip()
    subset = (element.get("subset") or "").strip()
    # CVAT calls the subset of images without one "default".
    split = parsed.split if subset.lower() in ("", "default") else split_word(subset) or subset
    if not name or not can_be_a_file(name):
        number = len(parsed.images)
        reason = (
            f"image {element.get('id', number)} has {'no name' if not name else 'no file name'}"
        )
        parsed.report("label-unreadable", number, reason, split=split)
        return
    id_ = from_text("id", (element.get("id") or "").strip())
    image = ReadImage(
        name,
        split,
        id_ if isinstance(id_, int) or id_ else Path(name).stem,
        to_size(element.get("width")),
        to_size(element.get("height")),
    )
    parsed.images.append(image)
    for child in element:
        if child.tag == "box" and not to_flag(child.get("outside") or "0"):
            _read_box(parsed, image, child, extras)
        elif child.tag in _OTHER_SHAPES:
            reason = f"{name}: {child.get('label')!r} is drawn as a {child.tag}, not as a box"
            parsed.report("shape-not-box", parsed.objects, reason, split=split)
        parsed.objects += child.tag == "box" or child.tag in _OTHER_SHAPES


def _read_box(parsed: LabelFile, image: ReadImage, element: ET.Element, extras: bool) -> None:
    number = parsed.objects
    name = (element.get("label") or "").strip()
    where = f"{image.name}, {name or 'no label'}"
    try:
        x1, y1, x2, y2 = (to_number(element.get(side)) for side in _SIDES)
        rotation = to_number(element.get("rotation") or 0)
    except ValueError:
        text = ", ".join(f"{side} {element.get(side)!r}" for side in (*_SIDES, "rotation"))
        reason = f"{where}: {text}: not numbers"
        parsed.report("box-not-a-number", number, reason, split=image.split)
        return
    box = (x1, y1, x2, y2)
    if not math.isfinite(rotation):
        reason = f"{where}: rotation {rotation} is not an angle"
        parsed.report("box-not-a-number", number, reason, split=image.split)
        return
    if rotation % 360:
        box = enclosing_box(box, rotation, ((x1 + x2) / 2, (y1 + y2) / 2))
        reason = f"{where}: is turned by {rotation:g} degrees"
        parsed.report("box-rotated", number, reason, _ENCLOSED, split=image.split)
    extra: dict[str, Any] = {}
    if extras:
        # The values of most boxes are left out: occluded="0", z_order="0".
        texts = {key: element.get(key) for key in _KEPT}
        extra = {key: from_text(key, text) for key, text in texts.items() if text and text != "0"}
        attributes = {
            item.get("name", ""): from_text("attribute", (item.text or "").strip())
            for item in element.iter("attribute")
        }
        if attributes:
            extra["attributes"] = attributes
    values = {"id": number, "extra": extra}
    image.objects.append(ReadObject(name, box, image.name, number, values))
