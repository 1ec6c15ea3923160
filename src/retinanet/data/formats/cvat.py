"""CVAT for images 1.1: one XML file of many images, boxes as corners in pixels.

Source: https://docs.cvat.ai/docs/manual/advanced/xml_format/
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

from retinanet.data.dataset import Annotation, Dataset, LabelledImage, Problem
from retinanet.data.formats.finding import (
    ImageFinder,
    can_be_a_file,
    enclosing_box,
    files_by_split,
    from_text,
    to_flag,
    to_number,
)
from retinanet.data.splits import split_word
from retinanet.errors import DataError

LOOKED_FOR = "CVAT for images 1.1: an annotations.xml with <annotations> and <image>, and images/"

# VOC's root is <annotation>, of one letter less.
_ROOT = re.compile(rb"<annotations[\s>/]")
_SIDES = ("xtl", "ytl", "xbr", "ybr")
_OTHER_SHAPES = frozenset(
    {"polygon", "polyline", "points", "cuboid", "ellipse", "mask", "skeleton"}
)
_KEPT = ("occluded", "z_order", "source", "group_id")
_ENCLOSED = "the upright box around it is taken"


def is_cvat(path: Path) -> bool:
    """Whether `path` is an XML file of CVAT's, or a folder that holds one."""
    return bool(_files(path))


def read_cvat(path: Path, *, extras: bool = True) -> dict[str, Callable[[], Dataset]]:
    """The splits of a CVAT export; each is made when called, the files are read once.

    Splits are CVAT's subsets; where a file names none, its own name or folder may (``train.xml``).
    Classes are the labels of ``<meta>`` in their order, those of several files one after another;
    a box of any other label is a problem. Where there is no ``<meta>``: all names, sorted.

    A rotated box is a problem, and the upright box around it is taken; polygons and other shapes
    are problems and left out. A box marked ``outside`` is not in the image and left out.

    Args:
        path: the XML file, or its folder.
        extras: keep attributes, occluded, z_order, source and group.

    Raises:
        DataError: a file is no XML, or holds the tracks of "CVAT for video", which name no
            images.
    """
    parsed = [_parse(file, split, extras) for split, file in _files(path).items()]
    listed = list(dict.fromkeys(name for one in parsed for name in one.labels))
    names = listed or sorted({t.name for one in parsed for i in one.images for t in i.things})
    labels = {name: label for label, name in enumerate(names)}
    splits = dict.fromkeys(image.split for one in parsed for image in one.images)
    for one in parsed:
        if not one.images:
            splits.setdefault(one.split)

    def reader(split: str) -> Callable[[], Dataset]:
        return lambda: _dataset(split, parsed, labels, path)

    return {split: reader(split) for split in splits}


@dataclass(slots=True)
class _Thing:
    name: str
    place: int
    box: tuple[float, float, float, float]
    extra: dict[str, Any]


@dataclass(slots=True)
class _Image:
    name: str
    split: str
    id: int | str
    width: int | None
    height: int | None
    things: list[_Thing] = field(default_factory=list)


@dataclass(slots=True)
class _Parsed:
    """One file, before the labels of the others are known."""

    file: Path
    split: str
    labels: list[str] = field(default_factory=list)
    images: list[_Image] = field(default_factory=list)
    problems: list[tuple[str, Problem]] = field(default_factory=list)
    objects: int = 0


def _files(path: Path) -> dict[str, Path]:
    return files_by_split(path, ".xml", _looks_like_cvat)


def _looks_like_cvat(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return bool(_ROOT.search(stream.read(4096)))
    except OSError:
        return False


def _parse(file: Path, split: str, extras: bool) -> _Parsed:
    parsed = _Parsed(file, split)
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
                parsed.labels += _labels(element)
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
    return parsed


def _labels(meta: ET.Element) -> list[str]:
    """Names of the labels, without the parts of skeletons."""
    return [
        name
        for label in meta.iter("label")
        if label.find("parent") is None and (name := (label.findtext("name") or "").strip())
    ]


def _read_image(parsed: _Parsed, element: ET.Element, extras: bool) -> None:
    name = (element.get("name") or "").strip()
    place = len(parsed.images)
    subset = (element.get("subset") or "").strip()
    # CVAT calls the subset of those that have none "default".
    split = parsed.split if subset.lower() in ("", "default") else split_word(subset) or subset
    if not name or not can_be_a_file(name):
        reason = f"image {element.get('id', place)} has {'no name' if not name else 'no file name'}"
        parsed.problems.append(
            (split, Problem("label-unreadable", parsed.file, place, reason, "dropped"))
        )
        return
    id_ = from_text("id", (element.get("id") or "").strip())
    image = _Image(
        name,
        split,
        id_ if isinstance(id_, int) or id_ else Path(name).stem,
        _size(element.get("width")),
        _size(element.get("height")),
    )
    parsed.images.append(image)
    for child in element:
        if child.tag == "box":
            _read_box(parsed, image, child, extras)
        elif child.tag in _OTHER_SHAPES:
            place = _count(parsed)
            reason = f"{name}: {child.get('label')!r} is drawn as a {child.tag}, not as a box"
            parsed.problems.append(
                (split, Problem("shape-not-box", parsed.file, place, reason, "dropped"))
            )


def _count(parsed: _Parsed) -> int:
    """The place of the next object in the file."""
    parsed.objects += 1
    return parsed.objects - 1


def _read_box(parsed: _Parsed, image: _Image, element: ET.Element, extras: bool) -> None:
    place = _count(parsed)
    if to_flag(element.get("outside") or "0"):
        return
    name = (element.get("label") or "").strip()
    where = f"{image.name}, {name or 'no label'}"

    def problem(kind: str, reason: str, fix: str = "dropped") -> None:
        one = Problem(kind, parsed.file, place, f"{where}: {reason}", fix)
        parsed.problems.append((image.split, one))

    try:
        x1, y1, x2, y2 = (to_number(element.get(side)) for side in _SIDES)
        turned = to_number(element.get("rotation") or 0)
    except ValueError:
        text = ", ".join(f"{side} {element.get(side)!r}" for side in (*_SIDES, "rotation"))
        problem("box-not-a-number", f"{text}: not numbers")
        return
    box = (x1, y1, x2, y2)
    if not math.isfinite(turned):
        problem("box-not-a-number", f"rotation {turned} is not an angle")
        return
    if turned % 360:
        box = enclosing_box(box, turned, ((x1 + x2) / 2, (y1 + y2) / 2))
        problem("box-rotated", f"is turned by {turned:g} degrees", _ENCLOSED)
    extra: dict[str, Any] = {}
    if extras:
        # What most boxes say is left unsaid: occluded="0", z_order="0".
        texts = {key: element.get(key) for key in _KEPT}
        extra = {key: from_text(key, text) for key, text in texts.items() if text and text != "0"}
        more = {
            one.get("name", ""): from_text("attribute", (one.text or "").strip())
            for one in element.iter("attribute")
        }
        if more:
            extra["attributes"] = more
    image.things.append(_Thing(name, place, box, extra))


def _size(text: str | None) -> int | None:
    try:
        return int(float(text or "")) or None
    except (ValueError, OverflowError):
        return None


def _dataset(split: str, parsed: list[_Parsed], labels: Mapping[str, int], source: Path) -> Dataset:
    images: list[LabelledImage] = []
    problems: list[Problem] = []
    ids: set[int | str] = set()
    for one in parsed:
        problems += [problem for of, problem in one.problems if of == split]
        finder = ImageFinder(_image_folders(one.file, split))
        for image in one.images:
            if image.split != split:
                continue
            annotations = []
            for thing in image.things:
                if thing.name not in labels:
                    reason = (
                        f"{image.name}: label {thing.name!r} is not one of {len(labels)} in <meta>"
                    )
                    problems.append(
                        Problem("class-unknown", one.file, thing.place, reason, "dropped")
                    )
                    continue
                annotations.append(
                    Annotation(thing.box, labels[thing.name], thing.place, extra=thing.extra)
                )
            path = finder.find(image.name)
            # CVAT counts from 0 in each task, and a project or a folder holds several.
            again = (f"{image.id}-{number}" for number in count(2))
            id_ = next(id_ for id_ in chain((image.id,), again) if id_ not in ids)
            ids.add(id_)
            images.append(
                LabelledImage(path, id_, tuple(annotations), image.width, image.height, one.file)
            )
    return Dataset(
        images=tuple(images),
        classes=tuple(labels),
        category_ids=tuple(range(1, len(labels) + 1)),
        split=split,
        format="cvat",
        source=source,
        problems=tuple(problems),
    )


def _image_folders(file: Path, split: str) -> list[Path]:
    """Where the images of a file may lie: CVAT's own images/, with a folder a subset or not."""
    root = file.parent.parent if file.parent.name == "annotations" else file.parent
    bases = [root / "images", root]
    subs = [
        sub
        for base in bases
        if base.is_dir()
        for sub in sorted(base.iterdir())
        if sub.is_dir() and sub != root / "images"
    ]
    own = [sub for sub in subs if split and (sub.name == split or split_word(sub.name) == split)]
    return [*own, *bases, *(sub for sub in subs if sub.name == "default")]
