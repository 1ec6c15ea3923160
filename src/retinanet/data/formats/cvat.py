"""CVAT for images 1.1: one XML file of many images, boxes as corners in pixels.

Source: https://docs.cvat.ai/docs/manual/advanced/xml_format/
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from retinanet.data.formats import reading
from retinanet.data.formats.reading import LabelFile, LabelImage
from retinanet.data.splits import split_word
from retinanet.errors import DataError

# VOC's root is <annotation>, without the s.
_ROOT = re.compile(rb"<annotations[\s>/]")
_SIDES = ("xtl", "ytl", "xbr", "ybr")
_OTHER_SHAPES = frozenset(
    {"polygon", "polyline", "points", "cuboid", "ellipse", "mask", "skeleton"}
)
_KEPT = ("occluded", "z_order", "source", "group_id")


def detect(file: Path) -> bool:
    """Whether an XML file is CVAT's."""
    return reading.begins_with(file, _ROOT)


def parse(file: Path, *, split: str | None = None) -> LabelFile:
    """Parse an export; splits are CVAT's subsets, classes the labels of ``<meta>``.

    A rotated box is a problem, and the upright box around it is used; polygons and other shapes are
    problems and dropped. A box marked ``outside`` is not in the image and is skipped.

    Raises:
        DataError: it is no XML, or holds the tracks of "CVAT for video", which name no images.
    """
    parsed = LabelFile(file, split)
    numbers = count()
    try:
        for _, element in ET.iterparse(file):
            if element.tag == "track":
                raise DataError(
                    f'{file}: holds tracks, so it is "CVAT for video", which names frames and no '
                    f'images; export it as "CVAT for images 1.1", with images'
                )
            if element.tag == "meta":
                # Without the parts of skeletons.
                labels = [x for x in element.iter("label") if x.find("parent") is None]
                parsed.listed = [(label.findtext("name") or "").strip() for label in labels]
            elif element.tag == "image":
                _parse_image(parsed, element, numbers)
            else:
                continue
            element.clear()  # a large export would take gigabytes
    except ET.ParseError as error:
        raise DataError(f"{file}: not XML: {error}") from None
    except (OSError, LookupError, ValueError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    return parsed


def _parse_image(parsed: LabelFile, element: ET.Element, numbers: Iterator[int]) -> None:
    """Parse an image; `numbers` are those of its objects in the file."""
    name = (element.get("name") or "").strip()
    subset = (element.get("subset") or "").strip()
    # CVAT calls the subset of images without one "default".
    split = None if subset.lower() in ("", "default") else split_word(subset) or subset
    id_ = reading.from_text("id", (element.get("id") or "").strip())
    image = LabelImage(
        name,
        id_ if isinstance(id_, int) or id_ else Path(name).stem,
        reading.to_size(element.get("width")),
        reading.to_size(element.get("height")),
        split=split,
    )
    parsed.images.append(image)
    for child in element:
        if child.tag in _OTHER_SHAPES:
            reason = f"{name}: {child.get('label')!r} is drawn as a {child.tag}, not as a box"
            parsed.report("shape-not-box", next(numbers), reason, image=image)
        elif child.tag == "box":
            number = next(numbers)
            if not reading.to_flag(child.get("outside")):
                _parse_box(parsed, image, child, number)


def _parse_box(parsed: LabelFile, image: LabelImage, element: ET.Element, number: int) -> None:
    box = reading.to_box([element.get(side) for side in _SIDES])
    rotation = reading.to_number(element.get("rotation") or 0)
    if box is None or rotation is None or not math.isfinite(rotation):
        box = None
    elif rotation % 360:
        box = reading.enclosing_box(box, rotation, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))
        reason = f"{image.name}: object {number} is rotated by {rotation:g} degrees"
        parsed.report("box-rotated", number, reason, reading.ENCLOSED, image=image)
    # The values of most boxes are left out: occluded="0", z_order="0".
    texts = {key: element.get(key) for key in _KEPT}
    values = {
        key: reading.from_text(key, text) for key, text in texts.items() if text and text != "0"
    }
    attributes = {
        item.get("name", ""): reading.from_text("attribute", (item.text or "").strip())
        for item in element.iter("attribute")
    }
    if attributes:
        values["attributes"] = attributes
    stated = ", ".join(f"{side} {element.get(side)!r}" for side in (*_SIDES, "rotation"))
    parsed.add(image, number, (element.get("label") or "").strip(), box, stated, values)
