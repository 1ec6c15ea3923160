"""Output files of detection, written image by image: memory does not grow with their number.

Every writer is a context manager that yields a function to call with each :class:`ImageDetections`
or :class:`Failure`. A file of several images is written under another name and renamed when the
context ends without an error, so it is never seen incomplete.
"""

from __future__ import annotations

import csv
import json
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from io import BytesIO
from itertools import chain, count
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from PIL import Image

from retinanet import __version__
from retinanet.config import check_choice
from retinanet.data.drawing import PALETTE
from retinanet.errors import DataError
from retinanet.files import open_atomic, write_atomic
from retinanet.inference.detections import DRAWN_SCORE, Failure, ImageDetections
from retinanet.inference.manifest import OutputFolder

Write = Callable[[ImageDetections | Failure], None]
"""Takes the result of one image."""

Claim = Callable[[Path], Path]
"""Takes the path of an output before it is written; see :meth:`OutputFolder.claim`."""

OUTPUT_FORMATS = ("json", "images", "coco", "csv", "yolo", "labelstudio", "cvat")
"""What :func:`open_outputs` can write."""

LOCAL_FILES = "/data/local-files/?d="
"""Where Label Studio finds a file of its own disk, by its path under the document root."""

_CSV_COLUMNS = ("file", "width", "height", "class", "score", "x1", "y1", "x2", "y2")
_FILES = {
    "json": ("detections.json",),
    "coco": ("coco_results.json",),
    "csv": ("detections.csv",),
    "yolo": ("classes.txt",),
    "labelstudio": ("label_studio_tasks.json", "label_studio_config.xml"),
    "cvat": ("cvat_annotations.xml", "cvat_labels.json"),
}
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


@contextmanager
def open_outputs(
    folder: str | Path,
    formats: Iterable[str] = ("json", "images"),
    *,
    image_ids: Mapping[Path, int | str] | None = None,
    drawn_score: float = DRAWN_SCORE,
    confidences: bool = True,
    image_root: str = LOCAL_FILES,
    model_version: str = f"retinanet {__version__}",
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
        image_ids: as in :func:`write_coco`.
        drawn_score: minimum score of a drawn box.
        confidences: whether YOLO's lines end in the score.
        image_root, model_version: as in :func:`write_label_studio`.

    Raises:
        ConfigError: an unknown format.
        DataError: an output exists already, and no earlier call wrote it.
    """
    chosen = list(dict.fromkeys(formats))
    for name in chosen:
        check_choice("output format", name, OUTPUT_FORMATS)
    output = OutputFolder(folder, "images")
    folder, claim = output.path, output.claim
    openers: dict[str, Callable[[], AbstractContextManager[Write]]] = {
        "json": partial(write_json, folder / "detections.json"),
        "images": partial(
            write_images, folder / "images", score_threshold=drawn_score, claim=claim
        ),
        "coco": partial(write_coco, folder / "coco_results.json", image_ids=image_ids),
        "csv": partial(write_csv, folder / "detections.csv"),
        "yolo": partial(write_yolo, folder, confidences=confidences, claim=claim),
        "labelstudio": partial(
            write_label_studio, folder, image_root=image_root, model_version=model_version
        ),
        "cvat": partial(write_cvat, folder),
    }
    for name in chosen:
        for file in _FILES.get(name, ()):
            claim(folder / file)
    with ExitStack() as stack:
        writes = [stack.enter_context(openers[name]()) for name in chosen]

        def write(result: ImageDetections | Failure) -> None:
            for write_result in writes:
                write_result(result)

        yield write
    output.delete_stale()


@contextmanager
def write_json(file: str | Path) -> Iterator[Write]:
    """``{"images": [...], "failures": [...]}`` of what ``to_dict`` gives; a line an object."""
    failures: list[str] = []
    with open_atomic(file) as out:
        between = "\n"
        out.write('{"images": [')

        def write(result: ImageDetections | Failure) -> None:
            nonlocal between
            if isinstance(result, Failure):
                failures.append(_json(result.to_dict()))
                return
            entry = result.to_dict()
            objects = ",\n  ".join(_json(found) for found in entry.pop("detections"))
            head = _json(entry).removesuffix("}")
            out.write(f'{between}{head}, "detections": [')
            out.write(f"\n  {objects}]}}" if objects else "]}")
            between = ",\n"

        yield write
        out.write('\n],\n"failures": [')
        out.write("".join(f"\n{failure}," for failure in failures).removesuffix(","))
        out.write("\n]}\n" if failures else "]}\n")


@contextmanager
def write_coco(
    file: str | Path, *, image_ids: Mapping[Path, int | str] | None = None
) -> Iterator[Write]:
    """COCO's results: a list of ``image_id``, ``category_id``, ``bbox`` (x, y, w, h), ``score``.

    Args:
        file: where it goes.
        image_ids: the data set's image id by the absolute path of the image. None: the image's
            name without its suffix, a number where it is one (COCO's ``000000000139.jpg`` is 139);
            its whole name where an earlier image has taken that.

    Raises:
        DataError: an image has no id in `image_ids`.
    """
    taken: set[int | str] = set()
    with open_atomic(file) as out:
        between = "\n"
        out.write("[")

        def write(result: ImageDetections | Failure) -> None:
            nonlocal between
            if isinstance(result, Failure):
                return
            image_id = _image_id(result, image_ids, taken)
            for box, score, label in result:
                x1, y1, x2, y2 = box.tolist()
                entry = {
                    "image_id": image_id,
                    "category_id": result.category_ids[label],
                    "bbox": [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)],
                    "score": round(score, 6),
                }
                out.write(f"{between}{_json(entry)}")
                between = ",\n"

        yield write
        out.write("\n]\n")


@contextmanager
def write_csv(file: str | Path) -> Iterator[Write]:
    """A row an object: file, width, height, class, score, x1, y1, x2, y2."""
    with open_atomic(file) as out:
        table = csv.writer(out, lineterminator="\n")
        table.writerow(_CSV_COLUMNS)

        def write(result: ImageDetections | Failure) -> None:
            if isinstance(result, Failure):
                return
            height, width = result.size
            for box, score, label in result:
                corners = [round(value, 3) for value in box.tolist()]
                name = result.classes[label]
                table.writerow([result.source, width, height, name, round(score, 6), *corners])

        yield write


@contextmanager
def write_yolo(
    folder: str | Path, *, confidences: bool = True, claim: Claim = Path
) -> Iterator[Write]:
    """``labels/NAME.txt``: a line an object: class, and centre and size in shares of the image.

    Args:
        folder: ``labels`` is made in it, with the subfolders of the images; ``classes.txt`` names
            the classes, a line each.
        confidences: whether lines end in the score.
    """
    folder = Path(folder)
    taken: set[str] = set()

    def write(result: ImageDetections | Failure) -> None:
        if isinstance(result, Failure):
            return
        if not taken:
            write_atomic(folder / "classes.txt", "".join(f"{name}\n" for name in result.classes))
        height, width = result.size
        lines = []
        for box, score, label in result:
            x1, y1, x2, y2 = box.tolist()
            shares = (
                (x1 + x2) / 2 / width,
                (y1 + y2) / 2 / height,
                (x2 - x1) / width,
                (y2 - y1) / height,
            )
            numbers = [*shares, score] if confidences else shares
            lines.append(" ".join([str(label), *(f"{value:.6f}" for value in numbers)]))
        name = _unique(result.name, ".txt", taken)
        write_atomic(claim(folder / "labels" / name), "".join(f"{line}\n" for line in lines))

    yield write


@contextmanager
def write_label_studio(
    folder: str | Path,
    *,
    image_root: str = LOCAL_FILES,
    model_version: str = f"retinanet {__version__}",
) -> Iterator[Write]:
    """Pre-annotations for Label Studio: ``label_studio_tasks.json``, a task an image.

    Beside it ``label_studio_config.xml``, the labelling interface with the classes, for the
    project's settings. Sources: https://labelstud.io/guide/predictions and
    https://labelstud.io/tags/rectanglelabels

    Args:
        folder: where both go.
        image_root: what stands before an image's name to make its address: the part of a URL, or
            :data:`LOCAL_FILES` with or without a folder under the document root and a ``/``.
        model_version: by which Label Studio tells predictions of several models apart.
    """
    folder = Path(folder)
    with open_atomic(folder / "label_studio_tasks.json") as out:
        between = "\n"
        out.write("[")

        def write(result: ImageDetections | Failure) -> None:
            nonlocal between
            if isinstance(result, Failure):
                return
            if between == "\n":
                config = _label_studio_config(result.classes)
                write_atomic(folder / "label_studio_config.xml", config)
            # A name may hold bytes that are no text; an address can.
            address = image_root + quote(result.name, safe="/", errors="surrogateescape")
            prediction: dict[str, object] = {
                "model_version": model_version,
                "result": [
                    _label_studio_region(
                        index, box.tolist(), score, result.classes[label], result.size
                    )
                    for index, (box, score, label) in enumerate(result)
                ],
            }
            if len(result):
                prediction["score"] = round(float(result.scores.mean()), 6)
            task = {"data": {"image": address}, "predictions": [prediction]}
            out.write(f"{between}{_json(task)}")
            between = ",\n"

        yield write
        out.write("\n]\n")


def _label_studio_region(
    index: int, box: list[float], score: float, name: str, size: tuple[int, int]
) -> dict[str, object]:
    """A rectangle in percent of the image."""
    height, width = size
    x1, y1, x2, y2 = box
    shares = {
        "x": x1 / width,
        "y": y1 / height,
        "width": (x2 - x1) / width,
        "height": (y2 - y1) / height,
    }
    return {
        "id": f"box{index}",
        "type": "rectanglelabels",
        "from_name": "label",
        "to_name": "image",
        "original_width": width,
        "original_height": height,
        "image_rotation": 0,
        "score": round(score, 6),
        "value": {
            **{side: round(100 * share, 6) for side, share in shares.items()},
            "rotation": 0,
            "rectanglelabels": [name],
        },
    }


def _label_studio_config(classes: tuple[str, ...]) -> str:
    """The labelling interface of a project: an image, and upright rectangles of the classes."""
    view = ET.Element("View")
    ET.SubElement(view, "Image", name="image", value="$image", zoom="true")
    control = ET.SubElement(
        view, "RectangleLabels", name="label", toName="image", canRotate="false"
    )
    for label, name in enumerate(classes):
        ET.SubElement(control, "Label", value=_xml(name), background=_colour(label))
    ET.indent(view)
    return ET.tostring(view, encoding="unicode") + "\n"


@contextmanager
def write_cvat(folder: str | Path) -> Iterator[Write]:
    """Pre-annotations for CVAT: ``cvat_annotations.xml``, "CVAT for images 1.1".

    Images are known by their names in the task. Beside it ``cvat_labels.json``, the classes for
    the "Raw" tab of a new task's labels; each has an attribute for the score.
    Source: https://docs.cvat.ai/docs/manual/advanced/xml_format/
    """
    folder = Path(folder)
    with open_atomic(folder / "cvat_annotations.xml") as out:
        out.write('<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n<version>1.1</version>\n')
        images = count()

        def write(result: ImageDetections | Failure) -> None:
            if isinstance(result, Failure):
                return
            index = next(images)
            if index == 0:
                write_atomic(folder / "cvat_labels.json", _cvat_labels(result.classes))
                out.write(ET.tostring(_cvat_meta(result.classes), encoding="unicode") + "\n")
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
            ET.indent(image)
            out.write(ET.tostring(image, encoding="unicode") + "\n")

        yield write
        out.write("</annotations>\n")


def _cvat_meta(classes: tuple[str, ...]) -> ET.Element:
    meta = ET.Element("meta")
    task = ET.SubElement(meta, "task")
    ET.SubElement(task, "mode").text = "annotation"
    labels = ET.SubElement(task, "labels")
    for index, name in enumerate(classes):
        label = ET.SubElement(labels, "label")
        ET.SubElement(label, "name").text = _xml(name)
        ET.SubElement(label, "color").text = _colour(index)
        ET.SubElement(label, "type").text = "rectangle"
        attribute = ET.SubElement(ET.SubElement(label, "attributes"), "attribute")
        for key, value in {**_CVAT_SCORE, "mutable": "False", "values": ""}.items():
            ET.SubElement(attribute, key).text = value
    ET.indent(meta)
    return meta


# CVAT has no field for a score; as text, for its numbers are whole.
_CVAT_SCORE: dict[str, str] = {"name": "score", "input_type": "text", "default_value": ""}


def _cvat_labels(classes: tuple[str, ...]) -> str:
    score = {**_CVAT_SCORE, "mutable": False, "values": [""]}
    labels = [
        {
            "name": _xml(name),
            "color": _colour(index),
            "type": "rectangle",
            "attributes": [score],
        }
        for index, name in enumerate(classes)
    ]
    return json.dumps(labels, indent=1, ensure_ascii=False) + "\n"


def _colour(label: int) -> str:
    """Of a class, as in the images that we draw."""
    red, green, blue = PALETTE[label % len(PALETTE)]
    return f"#{red:02x}{green:02x}{blue:02x}"


_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def _xml(text: str) -> str:
    """`text` without the characters that XML cannot hold, not even escaped."""
    return _NOT_XML.sub("\ufffd", text)


@contextmanager
def write_images(
    folder: str | Path, *, score_threshold: float = DRAWN_SCORE, claim: Claim = Path
) -> Iterator[Write]:
    """Each image with its boxes of at least `score_threshold` drawn on it, by its name."""
    folder = Path(folder)
    taken: set[str] = set()

    def write(result: ImageDetections | Failure) -> None:
        if isinstance(result, Failure):
            return
        suffix = PurePosixPath(result.name).suffix
        if suffix.lower() not in _IMAGE_SUFFIXES:
            suffix = ".jpg"
        drawn = result.draw(score_threshold=score_threshold)
        kind = Image.registered_extensions()[suffix.lower()]
        encoded = BytesIO()
        if kind == "TIFF":  # which is not compressed unless it is asked for
            drawn.save(encoded, kind, compression="tiff_adobe_deflate")
        else:
            drawn.save(encoded, kind, quality=90)
        write_atomic(claim(folder / _unique(result.name, suffix, taken)), encoded.getvalue())

    yield write


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _image_id(
    found: ImageDetections, image_ids: Mapping[Path, int | str] | None, taken: set[int | str]
) -> int | str:
    if image_ids is not None:
        file = Path(os.path.abspath(found.source))
        if file not in image_ids:
            raise DataError(f"{found.source}: the data set has no id for this image")
        return image_ids[file]
    stem = str(PurePosixPath(found.name).with_suffix(""))
    own = int(stem) if stem.isascii() and stem.isdecimal() else stem
    choices = chain((own, found.name), (f"{found.name}-{number}" for number in count(2)))
    chosen = next(choice for choice in choices if choice not in taken)
    taken.add(chosen)
    return chosen


def _unique(name: str, suffix: str, taken: set[str]) -> str:
    """Replace the suffix of `name` so that the result is not in `taken`, and add it there.

    ``1.jpg`` and ``1.png`` become ``1.txt`` and ``1.png.txt``. Case is ignored, as by the file
    systems of macOS and Windows. The path stays inside the folder that it is joined to.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    parts = [part for part in path.parts if part not in ("..", path.anchor)]
    path = PurePosixPath(*parts)
    choices = chain(
        (str(path.with_suffix(suffix)), f"{path}{suffix}"),
        (str(path.with_name(f"{path.stem}-{number}{suffix}")) for number in count(2)),
    )
    chosen = next(choice for choice in choices if choice.casefold() not in taken)
    taken.add(chosen.casefold())
    return chosen
