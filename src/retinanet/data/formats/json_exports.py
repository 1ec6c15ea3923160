"""JSON of annotation tools that is only read: LabelMe, VGG Image Annotator (VIA) and Create ML.

Sources: https://github.com/wkentaro/labelme (JSON per image, shapes as points),
https://www.robots.ox.ac.uk/~vgg/software/via/ (JSON of a project or of annotations),
https://developer.apple.com/documentation/createml (list of images, boxes by their centre).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from retinanet.data.formats import reading
from retinanet.data.formats.reading import LabelFile, LabelImage

_CLASS_ATTRIBUTES = ("class", "label", "name", "type", "category", "object")
_SIDES = ("x", "y", "width", "height")


def is_labelme(file: Path) -> bool:
    """Whether a file is LabelMe's."""
    return reading.json_has(file, b"{", (b'"shapes"', b'"imagePath"'))


def is_via(file: Path) -> bool:
    """Whether a file is a VIA project, or its annotations as JSON or CSV."""
    if file.suffix.lower() == ".csv":
        with file.open(encoding="utf-8-sig", errors="replace") as stream:
            return "region_shape_attributes" in stream.readline()
    return reading.json_has(
        file, b"{", (b'"regions"', b'"shape_attributes"'), (b'"_via_img_metadata"',)
    )


def is_createml(file: Path) -> bool:
    """Whether a file is Create ML's."""
    return reading.json_has(file, b"[", (b'"annotations"', b'"coordinates"'))


def parse_labelme(file: Path, *, split: str | None = None) -> LabelFile:
    """Parse a LabelMe file: rectangles, circles, and the boxes around polygons."""
    content = reading.read_json(file, dict, "LabelMe's object")
    parsed = LabelFile(file, split)
    image = LabelImage(
        str(content.get("imagePath") or f"{file.stem}.jpg"),
        file.stem,
        reading.to_size(content.get("imageWidth")),
        reading.to_size(content.get("imageHeight")),
    )
    parsed.images.append(image)
    for number, shape in enumerate(_objects(content.get("shapes"))):
        points: Any = shape.get("points")
        kind = shape.get("shape_type") or "polygon"
        box = reading.box_around(points)
        if kind == "circle" and box is not None:  # the centre and a point on the circle
            (x, y), (to_x, to_y) = (map(float, point) for point in points[:2])
            radius = ((to_x - x) ** 2 + (to_y - y) ** 2) ** 0.5
            box = (x - radius, y - radius, x + radius, y + radius)
        elif kind not in ("rectangle", "polygon"):
            reason = f"shape {number} is a {reading.short(kind)}"
            parsed.report("shape-not-box", number, reason, image=image)
            continue
        parsed.add(image, number, str(shape.get("label") or ""), box, reading.short(points))
    return parsed


def parse_via(file: Path, *, split: str | None = None) -> LabelFile:
    """Parse a VIA file: rectangles, circles, ellipses, and the boxes around polygons.

    The class is the attribute named so (class, label, name, type, ...), else the first one.
    """
    if file.suffix.lower() == ".csv":
        content = _via_rows(file)
    else:
        content = reading.read_json(file, dict, "VIA's object")
        content = _dict(content.get("_via_img_metadata", content))
    parsed = LabelFile(file, split)
    for key, item in content.items():
        if not isinstance(item, dict) or "regions" not in item:
            continue
        name = str(item.get("filename") or key)
        image = LabelImage(name, name)
        parsed.images.append(image)
        regions = item["regions"]
        regions = list(regions.values()) if isinstance(regions, dict) else regions
        for number, region in enumerate(_objects(regions)):
            shape = _dict(region.get("shape_attributes"))
            box = _via_box(shape)
            if box is None and shape.get("name") in ("point", "polyline"):
                reason = f"{name}: region {number} is a {shape['name']}"
                parsed.report("shape-not-box", number, reason, image=image)
                continue
            class_name = _via_class(_dict(region.get("region_attributes")))
            parsed.add(image, number, class_name, box, reading.short(shape))
    return parsed


def _via_rows(file: Path) -> dict[str, Any]:
    """Return VIA's CSV in the form of its JSON: the attributes of a region are JSON in a cell."""
    images: dict[str, Any] = {}
    with file.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
        for row in csv.DictReader(stream):
            name = row.get("filename") or ""
            regions = images.setdefault(name, {"filename": name, "regions": []})["regions"]
            try:
                shape = json.loads(row.get("region_shape_attributes") or "{}")
                attributes = json.loads(row.get("region_attributes") or "{}")
            except ValueError:
                shape, attributes = {"name": "a cell that is not JSON"}, {"class": "?"}
            if shape:
                regions.append({"shape_attributes": shape, "region_attributes": attributes})
    return images


def _via_box(shape: Mapping[str, Any]) -> reading.Box | None:
    """Return the box around a shape of VIA; None if it has none."""
    if "all_points_x" in shape:
        xs, ys = shape["all_points_x"], shape.get("all_points_y")
        is_valid = isinstance(xs, list) and isinstance(ys, list)
        points: Any = list(zip(xs, ys or (), strict=False)) if is_valid else None
        return None if shape.get("name") == "polyline" else reading.box_around(points)
    if "cx" in shape:
        radius = shape.get("r")
        sides = (shape["cx"], shape.get("cy"), shape.get("rx", radius), shape.get("ry", radius))
        x, y, rx, ry = map(reading.to_number, sides)
        if x is None or y is None or rx is None or ry is None:
            return None
        return x - rx, y - ry, x + rx, y + ry
    return reading.to_box([shape.get(side) for side in _SIDES], has_size=True)


def _via_class(attributes: Mapping[str, Any]) -> str:
    """Return the class among the attributes of a region: of a choice, the one that is chosen."""
    names = {str(key).lower(): value for key, value in attributes.items()}
    value = next((names[key] for key in _CLASS_ATTRIBUTES if names.get(key)), None)
    if value is None:
        value = next(iter(attributes.values()), "")
    if isinstance(value, dict):  # checkboxes
        value = next((str(key) for key, chosen in value.items() if chosen), "")
    return str(value)


def parse_createml(file: Path, *, split: str | None = None) -> LabelFile:
    """Parse a Create ML file: boxes by their centre, in pixels."""
    parsed = LabelFile(file, split)
    for item in _objects(reading.read_json(file, list, "Create ML's list")):
        name = str(item.get("image") or item.get("imagefilename") or "")
        image = LabelImage(name, name)
        parsed.images.append(image)
        for number, annotation in enumerate(_objects(item.get("annotations"))):
            sides = _dict(annotation.get("coordinates"))
            box = reading.to_box([sides.get(side) for side in _SIDES])
            if box is not None:
                x, y, width, height = box
                box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            parsed.add(image, number, str(annotation.get("label") or ""), box, reading.short(sides))
    return parsed


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Yield the objects of a list; anything else is empty."""
    return (
        (item for item in value if isinstance(item, dict)) if isinstance(value, list) else iter(())
    )
