"""Detections of an image, and their conversion to and from supervision.

Boxes are (x1, y1, x2, y2) pixels, float32, in supervision too (https://supervision.roboflow.com/),
so a round trip changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from retinanet.data.drawing import draw_boxes
from retinanet.data.images import ValueRange, read_image
from retinanet.data.windows import open_windows
from retinanet.errors import DataError, MissingExtraError
from retinanet.structures import Detections

DRAWN_SCORE = 0.3
"""Default minimum score of a drawn box; evaluation uses .05."""

DRAWN_PIXELS = 2**25
"""Maximum pixels of a drawn image (5,793 x 5,793): a larger image is drawn reduced."""

CAPTIONED = 1000
"""Maximum boxes of an image that are drawn with captions."""


@dataclass(frozen=True, slots=True, eq=False)
class ImageDetections:
    """The objects detected in an image, best first.

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

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    classes: tuple[str, ...] = field(repr=False)
    category_ids: tuple[int, ...] = field(repr=False)
    name: str
    size: tuple[int, int]
    image: Any = field(repr=False)
    value_range: ValueRange | None = field(default=None, repr=False)
    pixels: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[tuple[Tensor, float, int]]:
        """Box (4,), score and label of each object."""
        return zip(self.boxes, self.scores.tolist(), self.labels.tolist(), strict=True)

    @property
    def source(self) -> str:
        """The image's path as it was given; its name where it was given as pixels."""
        return str(self.image) if isinstance(self.image, str | Path) else self.name

    def draw(self, image: Any = None, *, score_threshold: float = DRAWN_SCORE) -> Image.Image:
        """Draw the boxes of at least `score_threshold` with their classes and scores.

        An image of more than :data:`DRAWN_PIXELS` is drawn reduced. More than :data:`CAPTIONED`
        boxes are drawn with thin lines and without captions.

        Args:
            image: image to draw on, as :func:`retinanet.data.images.read_image` takes it; None is
                the image that detection ran on.

        Raises:
            DataError: the image has another size than the image that detection ran on.
            ImageError: it can no longer be read.
        """
        value_range = None
        if image is None:
            image = self.image if self.pixels is None else self.pixels
            value_range = self.value_range if self.pixels is None else None
        height, width = self.size
        scale = min(1.0, math.sqrt(DRAWN_PIXELS / (height * width)))
        if scale < 1:
            windows = open_windows(image, value_range=value_range)
            pixels, size = None, windows.size
        else:
            pixels = read_image(image, value_range=value_range)
            size = (pixels.shape[-2], pixels.shape[-1])
        if size != self.size:
            raise DataError(
                f"{self.name}: the image to draw on is {size[1]} x {size[0]}, "
                f"the detections are of {width} x {height} pixels"
            )
        if pixels is None:
            pixels = windows.reduced(int(height * scale) or 1, int(width * scale) or 1)
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
    objects: ImageDetections | Detections,
    classes: Sequence[str] | None = None,
    *,
    tracks: Sequence[int] | None = None,
) -> Any:
    """Convert to ``supervision.Detections``, in the same order; the arrays are copies.

    ``xyxy`` (N, 4) float32, ``confidence`` (N,) float32, ``class_id`` (N,) int64, and with class
    names ``data["class_name"]`` (N,), which supervision's annotators show.

    Args:
        objects: of one image.
        classes: names by label; None: those of an :class:`ImageDetections`.
        tracks: (N,) numbers by track: ``tracker_id``.

    Raises:
        MissingExtraError: supervision is not installed.
        ValueError: the numbers of tracks and objects differ.
    """
    try:
        import supervision
    except ImportError:
        raise MissingExtraError("supervision", "supervision") from None
    if classes is None and isinstance(objects, ImageDetections):
        classes = objects.classes
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
    return Detections(*(torch.from_numpy(values[order]) for values in (boxes, scores, labels)))
