"""What a detector says of one image."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from retinanet.data.drawing import draw_boxes
from retinanet.data.images import ValueRange, read_image
from retinanet.data.windows import open_windows
from retinanet.errors import DataError

DRAWN_SCORE = 0.3
"""Score from which a box is drawn: AP wants every box over .05, a person's eye does not."""

DRAWN_PIXELS = 2**25
"""Pixels of a drawn image at the most (5,793 x 5,793): a larger one is drawn reduced."""

CAPTIONED = 1000
"""Boxes of an image at the most that get a caption each: more would find no place."""


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """The objects found in one image, best first.

    Attributes:
        boxes: (N, 4) float32 (x1, y1, x2, y2) pixels of the upright image as it was given.
        scores: (N,) float32 in [0, 1].
        labels: (N,) int64, the place in `classes`.
        classes: the detector's class names.
        category_ids: the ids by label of the data that it was trained on.
        name: a relative path that tells it from the other images of the same call, such as
            ``street/1.jpg``.
        size: (height, width) of the image in pixels.
        image: what was given: a path, or the image itself.
        value_range: of `image`, as in :func:`retinanet.data.images.read_image`.
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

    def __len__(self) -> int:
        return len(self.scores)

    def __iter__(self) -> Iterator[tuple[Tensor, float, int]]:
        """Box (4,), score and label of each object."""
        return zip(self.boxes, self.scores.tolist(), self.labels.tolist(), strict=True)

    @property
    def source(self) -> str:
        """The image's path as it was given; its name where it came as pixels."""
        return str(self.image) if isinstance(self.image, str | Path) else self.name

    def draw(self, image: Any = None, *, score_threshold: float = DRAWN_SCORE) -> Image.Image:
        """The image with the boxes of at least `score_threshold`, their classes and scores on it.

        One of more than :data:`DRAWN_PIXELS` is made smaller first, as it is read: the boxes in
        this object stay those of the whole. Over :data:`CAPTIONED` boxes have thin lines and no
        captions.

        Args:
            image: what to draw on, in any form that :func:`retinanet.data.images.read_image` takes;
                None is the image that was searched.

        Raises:
            DataError: the image is another size than the one that was searched.
            ImageError: it can no longer be read.
        """
        img, value_range = (self.image, self.value_range) if image is None else (image, None)
        height, width = self.size
        scale = min(1.0, math.sqrt(DRAWN_PIXELS / (height * width)))
        if scale < 1:
            windows = open_windows(img, value_range=value_range)
            pixels, size = None, windows.size
        else:
            pixels = read_image(img, value_range=value_range)
            size = (pixels.shape[-2], pixels.shape[-1])
        if size != self.size:
            raise DataError(
                f"{self.name}: the image to draw on is {size[1]} x {size[0]}, "
                f"the one that was searched {width} x {height} pixels"
            )
        if pixels is None:
            pixels = windows.reduced(int(height * scale) or 1, int(width * scale) or 1)
        shrunk = self.boxes.new_tensor((pixels.shape[-1] / width, pixels.shape[-2] / height))
        kept = self.scores >= score_threshold
        boxes = self.boxes[kept] * shrunk.repeat(2)
        labels, scores = self.labels[kept], self.scores[kept]
        if len(boxes) > CAPTIONED:
            # Lines for the objects, where those for the image would hide them.
            line = max(1, round(float((boxes[:, 2:] - boxes[:, :2]).median()) / 12))
            names = [""] * len(self.classes)
            return draw_boxes(pixels, boxes.flip(0), labels.flip(0), names=names, width=line)
        return draw_boxes(pixels, boxes, labels, scores, self.classes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: file, size, and each object's class, score and box."""
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
        """Convert to ``supervision.Detections`` (:mod:`retinanet.inference.supervision`).

        Raises:
            MissingExtraError: supervision is not installed.
        """
        from retinanet.inference.supervision import to_supervision

        return to_supervision(self)

    def from_supervision(self, objects: Any) -> Found:
        """The same image with what became of its objects in supervision: filtered, merged, ...

        Args:
            objects: ``supervision.Detections`` in pixels of this image, with classes and
                confidences.

        Raises:
            DataError: it has no classes or no confidences, or classes that this detector lacks.
        """
        from retinanet.inference.supervision import from_supervision

        kept = from_supervision(objects, num_classes=len(self.classes))
        return replace(self, boxes=kept.boxes, scores=kept.scores, labels=kept.labels)


@dataclass(frozen=True, slots=True)
class Failure:
    """An image that could not be searched.

    Attributes:
        source: its path as it was given, or its name where it came as pixels.
        reason: one line.
        error: what was raised.
    """

    source: str
    reason: str
    error: Exception = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, str]:
        """Plain values for JSON."""
        return {"file": self.source, "reason": self.reason}
