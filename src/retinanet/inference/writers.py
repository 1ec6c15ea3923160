"""Output files of detection, written image by image: memory does not grow with their number.

Each writer is a context manager that yields a function to call with each :class:`ImageDetections`.
A file of several images is written under another name and renamed when the context ends without an
error, so it is never seen incomplete.
"""

from __future__ import annotations

import csv
import json
import os
import re
import xml.etree.ElementTree as ET
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import chain, count
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from torch import Tensor

from retinanet import __version__
from retinanet.config import check_choice
from retinanet.data.drawing import PALETTE
from retinanet.files import open_atomic, write_atomic
from retinanet.inference.backends import use_cores
from retinanet.inference.detections import (
    COLUMNS,
    Failure,
    ImageDetections,
    encode_image,
)
from retinanet.inference.manifest import OutputFolder

Write = Callable[[Any], None]
"""Takes an :class:`ImageDetections`; that of JSON and of :func:`open_outputs` also a Failure."""

Claim = Callable[[Path], Path]
"""Takes the path of an output before it is written; see :meth:`OutputFolder.claim`."""

LOCAL_FILES = "/data/local-files/?d="
"""Address under which Label Studio serves a file of its own disk."""

_FILES: dict[str, tuple[str, ...]] = {
    "json": ("detections.json",),
    "images": (),
    "coco": ("coco_results.json",),
    "csv": ("detections.csv",),
    "yolo": ("classes.txt",),
    "labelstudio": ("label_studio_tasks.json", "label_studio_config.xml"),
    "cvat": ("cvat_annotations.xml", "cvat_labels.json"),
}

OUTPUT_FORMATS = tuple(_FILES)
"""Formats of :func:`open_outputs`."""

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_MAX_DRAWING = 4  # threads, each with an image at full size
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@contextmanager
def open_outputs(
    folder: str | Path,
    formats: Iterable[str] = ("json", "images"),
    *,
    drawn_score: float = 0.0,
    image_root: str = LOCAL_FILES,
) -> Iterator[Write]:
    """Write detections into `folder`, in each of `formats`.

    ===============  =======================================================================
    ``json``         ``detections.json``, see :func:`write_json`
    ``images``       ``images/NAME``, the images with boxes drawn on them
    ``coco``         ``coco_results.json``, see :func:`write_coco`
    ``csv``          ``detections.csv``, a row per object
    ``yolo``         ``labels/NAME.txt``, and ``classes.txt``
    ``labelstudio``  ``label_studio_tasks.json``, see :func:`write_label_studio`
    ``cvat``         ``cvat_annotations.xml``, see :func:`write_cvat`
    ===============  =======================================================================

    ``.retinanet-outputs`` lists these files. In a folder that is used again they replace those
    of an earlier call, whose other files are deleted when the context ends without an error; no
    other file is deleted or overwritten.

    Args:
        folder: created if missing.
        formats: from :data:`OUTPUT_FORMATS`.
        drawn_score: minimum score of a drawn box.
        image_root: as in :func:`write_label_studio`.

    Raises:
        ConfigError: an unknown format.
        DataError: an output exists already, and no earlier call wrote it.
    """
    chosen = list(dict.fromkeys(formats))
    for name in chosen:
        check_choice("output format", name, OUTPUT_FORMATS)
    output = OutputFolder(folder, "images")
    folder, claim = output.path, output.claim
    writers: dict[str, Callable[[], AbstractContextManager[Write]]] = {
        "json": partial(write_json, folder / "detections.json"),
        "images": partial(write_images, folder / "images", drawn_score, claim),
        "coco": partial(write_coco, folder / "coco_results.json"),
        "csv": partial(write_csv, folder / "detections.csv"),
        "yolo": partial(write_yolo, folder, claim),
        "labelstudio": partial(write_label_studio, folder, image_root),
        "cvat": partial(write_cvat, folder),
    }
    for name in chosen:
        for file in _FILES[name]:
            claim(folder / file)
    with ExitStack() as stack:
        opened = {name: stack.enter_context(writers[name]()) for name in chosen}

        def write(result: ImageDetections | Failure) -> None:
            for name, write_result in opened.items():
                if name == "json" or isinstance(result, ImageDetections):
                    write_result(result)

        yield write
    output.delete_stale()


@contextmanager
def _write_items(
    file: str | Path,
    items: Callable[[ImageDetections], Iterable[str]],
    start: str = "[\n",
    separator: str = ",\n",
    end: str = "\n]\n",
) -> Iterator[Write]:
    """Write the items of each image, such as those of a JSON list."""
    with open_atomic(file) as out:
        before = start

        def write(result: ImageDetections) -> None:
            nonlocal before
            for item in items(result):
                out.write(before + item)
                before = separator

        yield write
        out.write(end if before == separator else start + end.lstrip("\n"))


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


@contextmanager
def write_json(file: str | Path) -> Iterator[Write]:
    """Write ``{"images": [...], "failures": [...]}`` of ``to_dict()``; an object per line."""
    failures: list[str] = []
    with open_atomic(file) as out:
        before = '{"images": [\n'

        def write(result: ImageDetections | Failure) -> None:
            nonlocal before
            entry = result.to_dict()
            if isinstance(result, Failure):
                failures.append(_json(entry))
                return
            objects = ",\n  ".join(_json(found) for found in entry.pop("detections"))
            out.write(f'{before}{_json(entry).removesuffix("}")}, "detections": [')
            out.write(f"\n  {objects}]}}" if objects else "]}")
            before = ",\n"

        yield write
        out.write("\n" if before == ",\n" else before)
        listed = "".join(f"\n{failure}," for failure in failures).removesuffix(",")
        out.write(f'],\n"failures": [{listed}]}}\n')


def write_coco(file: str | Path) -> AbstractContextManager[Write]:
    """Write COCO results: ``image_id``, ``category_id``, ``bbox`` (x, y, w, h), ``score``.

    The id is the image's name without its suffix, a number where it is one (COCO's
    ``000000000139.jpg`` is 139); its whole name where an earlier image has that id.
    """
    taken: set[int | str] = set()

    def rows(result: ImageDetections) -> Iterator[str]:
        image_id = _image_id(result.name, taken)
        return map(_json, result.to_coco(image_id))

    return _write_items(file, rows)


@contextmanager
def write_csv(file: str | Path) -> Iterator[Write]:
    """Write a row per object: file, width, height, class, score, x1, y1, x2, y2."""
    with open_atomic(file) as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(COLUMNS)

        def write(result: ImageDetections) -> None:
            table.writerows(row.values() for row in result.to_rows())

        yield write


@contextmanager
def write_yolo(folder: Path, claim: Claim) -> Iterator[Write]:
    """Write ``labels/NAME.txt`` with a line per object, and ``classes.txt`` with the class names.

    A line is the class, centre and size as fractions of the image, and the score. ``labels`` has
    the subfolders of the images; `claim` is called with each path.
    """
    taken: set[str] = set()

    def write(result: ImageDetections) -> None:
        if not taken:
            write_atomic(folder / "classes.txt", "".join(f"{name}\n" for name in result.classes))
        lines = ""
        for box, score, label in result:
            x1, y1, x2, y2 = _fractions(result, box)
            numbers = ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, score)
            lines += " ".join([str(label), *(f"{value:.6f}" for value in numbers)]) + "\n"
        write_atomic(
            claim(folder / "labels" / _unique(result.name, ".txt", taken)), lines, sync=False
        )

    yield write


def write_label_studio(
    folder: Path, image_root: str = LOCAL_FILES
) -> AbstractContextManager[Write]:
    """Write pre-annotations for Label Studio: ``label_studio_tasks.json``, a task per image.

    ``label_studio_config.xml`` is the labelling interface with the classes, for the project's
    settings. Sources: https://labelstud.io/guide/predictions and
    https://labelstud.io/tags/rectanglelabels

    Args:
        folder: of both files.
        image_root: prefix of an image's name in its address: the part of a URL, or
            :data:`LOCAL_FILES` with or without a folder under the document root and a ``/``.
    """
    is_first = True

    def tasks(result: ImageDetections) -> Iterator[str]:
        nonlocal is_first
        if is_first:
            config = _label_studio_config(result.classes)
            write_atomic(folder / "label_studio_config.xml", config)
            is_first = False
        # A name may contain bytes that are no text; an address can.
        address = image_root + quote(result.name, safe="/", errors="surrogateescape")
        prediction: dict[str, object] = {
            "model_version": f"retinanet {__version__}",
            "result": _label_studio_regions(result),
        }
        if len(result):
            prediction["score"] = round(float(result.scores.mean()), 6)
        yield _json({"data": {"image": address}, "predictions": [prediction]})

    return _write_items(folder / "label_studio_tasks.json", tasks)


def _label_studio_regions(result: ImageDetections) -> list[dict[str, object]]:
    """Rectangles in percent of the image."""
    height, width = result.size
    regions: list[dict[str, object]] = []
    for index, (box, score, label) in enumerate(result):
        x1, y1, x2, y2 = (100 * value for value in _fractions(result, box))
        sides = {"x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1}
        regions.append(
            {
                "id": f"box{index}",
                "type": "rectanglelabels",
                "from_name": "label",
                "to_name": "image",
                "original_width": width,
                "original_height": height,
                "image_rotation": 0,
                "score": round(score, 6),
                "value": {
                    **{side: round(value, 6) for side, value in sides.items()},
                    "rotation": 0,
                    "rectanglelabels": [result.classes[label]],
                },
            }
        )
    return regions


def _label_studio_config(classes: tuple[str, ...]) -> str:
    view = ET.Element("View")
    ET.SubElement(view, "Image", name="image", value="$image", zoom="true")
    control = ET.SubElement(
        view, "RectangleLabels", name="label", toName="image", canRotate="false"
    )
    for label, name in enumerate(classes):
        ET.SubElement(control, "Label", value=_xml(name), background=_colour(label))
    return f"{_xml_text(view)}\n"


def write_cvat(folder: Path) -> AbstractContextManager[Write]:
    """Write pre-annotations for CVAT: ``cvat_annotations.xml``, "CVAT for images 1.1".

    CVAT matches images by their names in the task. ``cvat_labels.json`` has the classes for the
    "Raw" tab of a new task's labels; each has an attribute for the score.
    Source: https://docs.cvat.ai/docs/manual/advanced/xml_format/
    """
    indices = count()

    def images(result: ImageDetections) -> Iterator[str]:
        index = next(indices)
        if index == 0:
            labels = _cvat_labels(result.classes)
            text = json.dumps(labels, indent=1, ensure_ascii=False)
            write_atomic(folder / "cvat_labels.json", f"{text}\n")
            yield _xml_text(_cvat_meta(labels))
        height, width = result.size
        image = ET.Element(
            "image", id=str(index), name=_xml(result.name), width=str(width), height=str(height)
        )
        for box, score, label in result:
            sides = (f"{value:.3f}" for value in box.tolist())
            values = {
                "label": _xml(result.classes[label]),
                "source": "auto",
                "occluded": "0",
                **dict(zip(("xtl", "ytl", "xbr", "ybr"), sides, strict=True)),
                "z_order": "0",
            }
            element = ET.SubElement(image, "box", values)
            ET.SubElement(element, "attribute", name="score").text = f"{score:.6f}"
        yield _xml_text(image)

    return _write_items(
        folder / "cvat_annotations.xml",
        images,
        start='<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n',
        separator="\n",
        end="\n</annotations>\n",
    )


def _cvat_labels(classes: tuple[str, ...]) -> list[dict[str, Any]]:
    # CVAT has no field for a score; the attribute is a text as its numbers are integers.
    score = {"name": "score", "input_type": "text", "default_value": ""}
    return [
        {
            "name": _xml(name),
            "color": _colour(label),
            "type": "rectangle",
            "attributes": [{**score, "mutable": False, "values": [""]}],
        }
        for label, name in enumerate(classes)
    ]


def _cvat_meta(labels: list[dict[str, Any]]) -> ET.Element:
    meta = ET.Element("meta")
    task = ET.SubElement(meta, "task")
    ET.SubElement(task, "mode").text = "annotation"
    listed = ET.SubElement(task, "labels")
    for values in labels:
        label = ET.SubElement(listed, "label")
        for key in ("name", "color", "type"):
            ET.SubElement(label, key).text = values[key]
        (score,) = values["attributes"]
        attribute = ET.SubElement(ET.SubElement(label, "attributes"), "attribute")
        for key, value in {**score, "mutable": "False", "values": ""}.items():
            ET.SubElement(attribute, key).text = value
    return meta


@contextmanager
def write_images(folder: Path, score_threshold: float, claim: Claim) -> Iterator[Write]:
    """Write each image under its name, with its boxes of at least `score_threshold` drawn on it.

    Threads draw and encode, each on one core, while detection goes on.
    """
    taken: set[str] = set()
    pending: deque[Future[None]] = deque()

    def draw(result: ImageDetections, path: Path, suffix: str) -> None:
        encoded = encode_image(result.draw(score_threshold=score_threshold), suffix)
        write_atomic(path, encoded, sync=False)

    threads = min(_MAX_DRAWING, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, "draw", initializer=use_cores, initargs=(1,)) as pool:

        def write(result: ImageDetections) -> None:
            suffix = PurePosixPath(result.name).suffix
            if suffix.lower() not in _IMAGE_SUFFIXES:
                suffix = ".jpg"
            path = claim(folder / _unique(result.name, suffix, taken))
            pending.append(pool.submit(draw, result, path, suffix))
            while len(pending) > threads:
                pending.popleft().result()

        yield write
        for future in pending:
            future.result()


def _fractions(result: ImageDetections, box: Tensor) -> list[float]:
    """Return the corners of a box as fractions of the image."""
    height, width = result.size
    sides = (width, height, width, height)
    return [value / side for value, side in zip(box.tolist(), sides, strict=True)]


def _colour(label: int) -> str:
    """Return the colour of a class in drawn images."""
    red, green, blue = PALETTE[label % len(PALETTE)]
    return f"#{red:02x}{green:02x}{blue:02x}"


def _xml(text: str) -> str:
    """Replace the characters that XML cannot contain, not even escaped."""
    return _NOT_XML.sub("\ufffd", text)


def _xml_text(element: ET.Element) -> str:
    ET.indent(element)
    return ET.tostring(element, encoding="unicode")


def _image_id(name: str, taken: set[int | str]) -> int | str:
    stem = str(PurePosixPath(name).with_suffix(""))
    own = int(stem) if stem.isascii() and stem.isdecimal() else stem
    choices = chain((own, name), (f"{name}-{number}" for number in count(2)))
    chosen = next(choice for choice in choices if choice not in taken)
    taken.add(chosen)
    return chosen


def _unique(name: str, suffix: str, taken: set[str]) -> str:
    """Replace the suffix of `name` so that the result is not in `taken`, and add it there.

    ``1.jpg`` and ``1.png`` become ``1.txt`` and ``1.png.txt``. Case is ignored, as by the file
    systems of macOS and Windows. The path stays inside the folder that it is joined to.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    path = PurePosixPath(*(part for part in path.parts if part not in ("..", path.anchor)))
    choices = chain(
        (str(path.with_suffix(suffix)), f"{path}{suffix}"),
        (str(path.with_name(f"{path.stem}-{number}{suffix}")) for number in count(2)),
    )
    chosen = next(choice for choice in choices if choice.casefold() not in taken)
    taken.add(chosen.casefold())
    return chosen
