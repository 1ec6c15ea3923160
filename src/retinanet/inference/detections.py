"""Detections of an image, and their conversion to and from supervision.

Boxes are (x1, y1, x2, y2) pixels, float32, in supervision too (https://supervision.roboflow.com/),
so a round trip changes nothing.
"""

from __future__ import annotations

import json
import math
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from retinanet.data.drawing import draw_boxes
from retinanet.data.images import ValueRange, read_image
from retinanet.data.windows import Windows, open_windows
from retinanet.errors import DataError, import_extra
from retinanet.files import write_atomic
from retinanet.structures import Detections

DRAWN_PIXELS = 2**25
"""Maximum pixels of a drawn image (5,793 x 5,793): a larger image is drawn reduced."""

CAPTIONED = 1000
"""Maximum boxes of an image that are drawn with captions."""

COLUMNS = ("file", "width", "height", "class", "score", "x1", "y1", "x2", "y2")
"""Columns of a table of detections."""

_NOTEBOOK_PIXELS, _NOTEBOOK_ROWS = 2**19, 20


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class ImageDetections(Detections):
    """The objects detected in an image, best first, with the image.

    In a notebook the image is displayed with the boxes drawn on it.

    Attributes:
        boxes: (N, 4) float32 (x1, y1, x2, y2) pixels of the upright image as it was given.
        scores: (N,) float32 in [0, 1].
        labels: (N,) int64, indices into `classes`.
        classes: the detector's class names.
        category_ids: ids by label in the data that the detector was trained on.
        name: a relative path, unique among the images of a call, such as ``street/1.jpg``.
        size: (height, width) of the image in pixels.
        image: as given: a path, or the image itself.
        value_range: of `image`, as in :func:`retinanet.data.images.read_image`.
        pixels: (3, H, W) uint8 RGB, if :meth:`Detector.stream` was called with ``keep_pixels``.
    """

    category_ids: tuple[int, ...]
    name: str
    size: tuple[int, int]
    image: Any
    value_range: ValueRange | None = None
    pixels: Tensor | None = None

    @property
    def path(self) -> Path | None:
        """The image's path; None where it was given as pixels."""
        return Path(self.image) if isinstance(self.image, str | Path) else None

    @property
    def source(self) -> str:
        """The image's path as it was given; its name where it was given as pixels."""
        return str(self.image) if isinstance(self.image, str | Path) else self.name

    def summary(self) -> str:
        """Describe the detections in a few words: image, number, classes, range of the scores."""
        return f"{self.name}, {self.size[1]} x {self.size[0]}: {Detections.summary(self)}"

    def draw(
        self,
        image: Any = None,
        *,
        score_threshold: float = 0.0,
        max_pixels: int | None = None,
    ) -> Image.Image:
        """Draw the boxes of at least `score_threshold` with their classes and scores.

        More than :data:`CAPTIONED` boxes are drawn with thin lines and without captions.

        Args:
            image: image to draw on, as :func:`retinanet.data.images.read_image` takes it; None is
                the image that detection ran on.
            score_threshold: minimum score of a drawn box; 0: all.
            max_pixels: an image of more pixels is drawn reduced; None: DRAWN_PIXELS.

        Raises:
            DataError: the image has another size than the image that detection ran on.
            ImageError: it can no longer be read.
        """
        height, width = self.size
        max_pixels = DRAWN_PIXELS if max_pixels is None else max_pixels
        scale = min(1.0, math.sqrt(max_pixels / (height * width)))
        windows = self._open(image)
        if scale < 1:
            pixels = windows.reduced(int(height * scale) or 1, int(width * scale) or 1)
        else:
            pixels = windows.read((0, 0, width, height))
        scales = self.boxes.new_tensor((pixels.shape[-1] / width, pixels.shape[-2] / height))
        kept = self.scores >= score_threshold
        boxes = self.boxes[kept] * scales.repeat(2)
        labels, scores = self.labels[kept], self.scores[kept]
        if len(boxes) > CAPTIONED:
            # Lines of a width for the objects: that for the image would hide them.
            line = max(1, round(float((boxes[:, 2:] - boxes[:, :2]).median()) / 12))
            names = [""] * len(self.classes)
            return draw_boxes(pixels, boxes.flip(0), labels.flip(0), names=names, width=line)
        return draw_boxes(pixels, boxes, labels, scores, self.classes)

    def _open(self, image: Any = None) -> Windows:
        """Open an image for reading windows of it; None: the image that detection ran on."""
        value_range = None
        if image is None:
            image = self.image if self.pixels is None else self.pixels
            value_range = self.value_range if self.pixels is None else None
        if self.size[0] * self.size[1] <= DRAWN_PIXELS:
            image, value_range = read_image(image, value_range=value_range), None
        windows = open_windows(image, value_range=value_range)
        if windows.size != self.size:
            raise DataError(
                f"{self.name}: the image to draw on is {windows.size[1]} x {windows.size[0]}, "
                f"the detections are of {self.size[1]} x {self.size[0]} pixels"
            )
        return windows

    def crop(self, *, margin: float = 0.0) -> list[Image.Image]:
        """Cut the objects out of the image, in the order of the detections.

        Args:
            margin: pixels added at each side of a box, within the image.

        Returns:
            N RGB images of at least a pixel.

        Raises:
            DataError, ImageError: as :meth:`draw`.
        """
        windows, (height, width) = self._open(), self.size
        crops = []
        for box in self.boxes.tolist():
            x1, y1 = (math.floor(side - margin) for side in box[:2])
            x2, y2 = (math.ceil(side + margin) for side in box[2:])
            x1, y1 = min(max(0, x1), width - 1), min(max(0, y1), height - 1)
            x2, y2 = min(max(x1 + 1, x2), width), min(max(y1 + 1, y2), height)
            pixels = windows.read((x1, y1, x2, y2)).permute(1, 2, 0)
            crops.append(Image.fromarray(pixels.contiguous().numpy()))
        return crops

    def save(self, file: str | Path, *, score_threshold: float = 0.0) -> Path:
        """Write the image with the boxes drawn on it, or, to a ``.json`` file, :meth:`to_dict`.

        Args:
            file: its suffix is the format; an existing file is replaced.
            score_threshold: minimum score of a drawn box; a ``.json`` file contains all.

        Raises:
            DataError: images of that suffix cannot be written.
            ImageError: the image can no longer be read.
        """
        file = Path(file)
        if file.suffix.lower() == ".json":
            write_atomic(file, json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n")
        else:
            write_atomic(
                file, encode_image(self.draw(score_threshold=score_threshold), file.suffix)
            )
        return file

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: file, size, and each object's class, score and box."""
        return {
            "file": self.source,
            "height": self.size[0],
            "width": self.size[1],
            "detections": [
                {
                    "class": self.classes[label],
                    "category_id": self.category_ids[label],
                    "score": round(score, 6),
                    "box": [round(value, 3) for value in box.tolist()],
                }
                for box, score, label in self
            ],
        }

    def to_coco(self, image_id: int | str) -> list[dict[str, Any]]:
        """Return a row of COCO's results per object: ``bbox`` is x, y, width, height.

        Args:
            image_id: id of the image in the ground truth.
        """
        rows = []
        for box, score, label in self:
            x1, y1, x2, y2 = box.tolist()
            rows.append(
                {
                    "image_id": image_id,
                    "category_id": self.category_ids[label],
                    "bbox": [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)],
                    "score": round(score, 6),
                }
            )
        return rows

    def to_rows(self) -> list[dict[str, Any]]:
        """Return a flat row per object, by the names of :data:`COLUMNS`."""
        height, width = self.size
        rows = []
        for box, score, label in self:
            corners = [round(value, 3) for value in box.tolist()]
            values = (self.source, width, height, self.classes[label], round(score, 6), *corners)
            rows.append(dict(zip(COLUMNS, values, strict=True)))
        return rows

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame`` with a row per object and the columns :data:`COLUMNS`.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        pandas = import_extra("pandas", "pandas")
        return pandas.DataFrame(self.to_rows(), columns=list(COLUMNS))

    def _repr_html_(self) -> str:
        """Return the drawn image and a table for a notebook."""
        try:
            drawn = encode_image(self.draw(max_pixels=_NOTEBOOK_PIXELS), ".jpg")
        except (DataError, OSError) as error:  # the file may be gone: the table remains
            shown = f"<p>{escape(str(error))}</p>"
        else:
            shown = f'<img src="data:image/jpeg;base64,{b64encode(drawn).decode()}">'
        rows = "".join(
            f"<tr><td>{escape(self.classes[label])}</td><td>{score:.2f}</td>"
            f"<td>{', '.join(f'{side:.1f}' for side in box.tolist())}</td></tr>"
            for box, score, label in self[:_NOTEBOOK_ROWS]
        )
        return (
            f"<p>{escape(self.summary())}</p>{shown}<table><tr><th>class</th><th>score</th>"
            f"<th>x1, y1, x2, y2</th></tr>{rows}</table>"
        )

    def to_supervision(self) -> Any:
        """Convert to ``supervision.Detections`` (:func:`to_supervision`).

        Raises:
            MissingExtraError: supervision is not installed.
        """
        return to_supervision(self)

    def from_supervision(self, objects: Any) -> ImageDetections:
        """Return a copy with the objects of ``supervision.Detections``: filtered, merged, ...

        Args:
            objects: in pixels of this image, with classes and confidences.

        Raises:
            DataError: it has no classes or no confidences, or classes that this detector lacks.
        """
        kept = from_supervision(objects, num_classes=len(self.classes))
        return replace(self, boxes=kept.boxes, scores=kept.scores, labels=kept.labels)


def encode_image(image: Image.Image, suffix: str) -> bytes:
    """Encode an image in the format of a file suffix, such as ``.jpg``.

    Raises:
        DataError: images of that suffix cannot be written.
    """
    Image.preinit()  # the usual formats; registered_extensions() imports all, which takes longer
    suffix = suffix.lower()
    kind = Image.EXTENSION.get(suffix) or Image.registered_extensions().get(suffix)
    if kind not in Image.SAVE:
        raise DataError(f"unknown image suffix: {suffix!r}; use .jpg, .png, .webp or .tif")
    # Pillow's default for TIFF is no compression.
    options = {"compression": "tiff_adobe_deflate"} if kind == "TIFF" else {"quality": 90}
    encoded = BytesIO()
    image.save(encoded, kind, **options)
    return encoded.getvalue()


@dataclass(frozen=True, slots=True)
class Failure:
    """An image that could not be read.

    Attributes:
        source: its path as it was given, or its name where it was given as pixels.
        reason: why, on a single line.
        error: the exception.
    """

    source: str
    reason: str
    error: Exception = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, str]:
        """Return plain values for JSON."""
        return {"file": self.source, "reason": self.reason}


def to_supervision(
    objects: Detections,
    classes: Sequence[str] | None = None,
    *,
    tracks: Sequence[int] | None = None,
) -> Any:
    """Convert to ``supervision.Detections``, in the same order; the arrays are copies.

    ``xyxy`` (N, 4) float32, ``confidence`` (N,) float32, ``class_id`` (N,) int64, and with class
    names ``data["class_name"]`` (N,), which supervision's annotators show.

    Args:
        objects: of one image.
        classes: names by label; None: those of `objects`.
        tracks: (N,) numbers by track: ``tracker_id``.

    Raises:
        MissingExtraError: supervision is not installed.
        ValueError: the numbers of tracks and objects differ.
    """
    supervision = import_extra("supervision", "supervision")
    classes = objects.classes or None if classes is None else classes
    if tracks is not None and len(tracks) != len(objects):
        raise ValueError(f"{len(tracks)} tracks of {len(objects)} objects")
    labels = objects.labels.cpu().numpy().astype(np.int64)
    data: dict[str, Any] = {}
    if classes is not None:
        data["class_name"] = np.array([classes[label] for label in labels], dtype=np.str_)
    return supervision.Detections(
        xyxy=objects.boxes.cpu().numpy().astype(np.float32).reshape(-1, 4),
        confidence=objects.scores.cpu().numpy().astype(np.float32),
        class_id=labels,
        tracker_id=None if tracks is None else np.array(tracks, dtype=np.int64),
        data=data,
    )


def from_supervision(objects: Any, *, num_classes: int | None = None) -> Detections:
    """Convert ``supervision.Detections``, best first; masks, tracks and other data are dropped.

    Args:
        objects: with ``class_id`` and ``confidence``, unless it is empty.
        num_classes: K; labels must be under it. None: any.

    Raises:
        DataError: there are no classes or confidences, or a label that is not 0..K-1.
    """
    count = len(objects)
    for name in ("class_id", "confidence"):
        if count and getattr(objects, name) is None:
            raise DataError(
                f"supervision's Detections of {count} objects have no {name}; set it first"
            )
    boxes = np.asarray(objects.xyxy, dtype=np.float32).reshape(-1, 4)
    scores = np.asarray(objects.confidence if count else [], dtype=np.float32)
    labels = np.asarray(objects.class_id if count else [], dtype=np.int64)
    for label in labels.tolist():
        if label < 0 or (num_classes is not None and label >= num_classes):
            known = "any class" if num_classes is None else f"the classes 0 to {num_classes - 1}"
            raise DataError(f"supervision's class_id {label} is not one of {known}")
    order = np.argsort(-scores, kind="stable")
    return Detections(
        torch.from_numpy(boxes[order]),
        torch.from_numpy(scores[order]),
        torch.from_numpy(labels[order]),
    )
