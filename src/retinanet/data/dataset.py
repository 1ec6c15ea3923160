"""Labelled data sets in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from retinanet.errors import DataError

_MAX_CATEGORY_ID = 2**53  # float64, the type of COCO's results in memory, holds these exactly


@dataclass(frozen=True, slots=True)
class Annotation:
    """One object of an image as its label file states it, faults included.

    Attributes:
        box: (x1, y1, x2, y2) pixels of the image; may be empty, inverted, outside or NaN until
            the data is checked.
        label: class 0..K-1, the index in :attr:`Dataset.classes`.
        id: the source's own id, or the object's index in its file.
        crowd: COCO's iscrowd: a region of many objects; ignored in training and evaluation.
        difficult: VOC's difficult: likewise ignored.
        area: COCO's area (of the mask) in square pixels; None: the box's own.
        extra: other values of the source (truncated, pose, segmentation, ...).
    """

    box: tuple[float, float, float, float]
    label: int
    id: int | str = 0
    crowd: bool = False
    difficult: bool = False
    area: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ignored(self) -> bool:
        """Whether the object is excluded from training and evaluation."""
        return self.crowd or self.difficult


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One image and its objects.

    Attributes:
        path: the image's file; inside a tar ``shard.tar/KEY.jpg``, which
            :mod:`retinanet.data.archives` reads.
        id: the source's own id (COCO's image id, else the file's stem).
        annotations: its objects; none for a background image.
        width, height: pixels as the labels state them; None if they do not.
        label_file: the file with the labels (None: there is none, a background image).
        window: (x1, y1, x2, y2) pixels of the upright image, if this is a tile of it:
            `annotations`, `width` and `height` are then the tile's. None: the whole image.
    """

    path: Path
    id: int | str
    annotations: tuple[Annotation, ...] = ()
    width: int | None = None
    height: int | None = None
    label_file: Path | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    window: tuple[int, int, int, int] | None = None

    @property
    def has_object(self) -> bool:
        """Whether it has an object that is not ignored."""
        return any(not annotation.ignored for annotation in self.annotations)


@dataclass(frozen=True, slots=True)
class Problem:
    """A fault of a data set.

    Attributes:
        kind: a short constant name, such as ``box-empty`` or ``image-missing``.
        file: the label file or the image where it is.
        object: the object's id or index in that file; None for the whole file.
        reason: one line: what is wrong, with the values found.
        fix: what ``data check --fix`` does about it; empty if it must be fixed by hand.
    """

    kind: str
    file: Path
    object: int | str | None
    reason: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Dataset:
    """One split of a labelled data set.

    Attributes:
        images: the images, in the source's order.
        classes: names by label, all different.
        category_ids: the source's own ids by label (COCO's 1..90; 0..K-1 or 1..K elsewhere).
        split: the split's name, such as ``train``.
        format: one of :data:`retinanet.data.formats.FORMATS`, or ``synthetic``.
        source: the folder or file that was read.
        problems: faults of labels that could not be read into an annotation.
        split_origin: how the split was made (such as ``seed 0, 20% for validation``).
        extra: other values of the whole data set (COCO's info, licences, supercategories).
        description: what was found at `source`, and what was left out, a line each.
    """

    images: tuple[LabelledImage, ...]
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    split: str
    format: str
    source: Path
    problems: tuple[Problem, ...] = ()
    split_origin: str = "the format's own"
    extra: Mapping[str, Any] = field(default_factory=dict)
    description: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        repeated = [name for name, count in Counter(self.classes).items() if count > 1]
        if repeated:
            raise DataError(
                f"{self.source}: several classes are named {repeated[0]!r}; give each class a name "
                f"of its own, or give their objects one label"
            )
        large = [number for number in self.category_ids if abs(number) > _MAX_CATEGORY_ID]
        if large:
            raise DataError(
                f"{self.source}: category id {large[0]} is over 2^53, which results cannot hold "
                "exactly; number the categories from 1 on"
            )

    @classmethod
    def from_arrays(
        cls,
        images: Iterable[Any],
        boxes: Iterable[Any],
        labels: Iterable[Any],
        classes: Sequence[str],
        *,
        split: str = "train",
    ) -> Dataset:
        """Build a data set from images, boxes and labels in memory.

        Images in memory are written as PNG files into a temporary folder of this process, so that
        workers, resuming and reports treat them as any others.

        Args:
            images: paths, PIL images, arrays (H, W) or (H, W, 3) in RGB, or tensors (3, H, W).
            boxes: per image (M, 4) x1, y1, x2, y2 in pixels.
            labels: per image (M,) indices in `classes`.
            classes: names of the classes, all different.
            split: name of the split.

        Raises:
            DataError: the numbers of images, boxes and labels differ, a label is out of range, or
                all boxes are fractions of their images.
            ImageError: an image cannot be read.
        """
        from retinanet.data.images import as_file

        classes = tuple(map(str, classes))
        found: list[LabelledImage] = []
        try:
            rows = list(zip(images, boxes, labels, strict=True))
        except ValueError:
            raise DataError("images, boxes and labels differ in number: give one of each") from None
        for index, (image, image_boxes, image_labels) in enumerate(rows):
            corners = _numbers(image_boxes, index, "boxes")
            numbers = _numbers(image_labels, index, "labels").reshape(-1)
            if corners.size != 4 * len(numbers) or (corners.size and corners.shape[-1] != 4):
                raise DataError(
                    f"image {index}: boxes of shape {corners.shape} and {len(numbers)} labels; "
                    "expected (M, 4) and (M,)"
                )
            if any(not 0 <= n < len(classes) or n != int(n) for n in numbers.tolist()):
                raise DataError(
                    f"image {index}: labels {numbers.tolist()[:5]} are not all whole numbers from "
                    f"0 to {len(classes) - 1}; there are {len(classes)} classes"
                )
            pairs = zip(corners.reshape(-1, 4).tolist(), numbers.tolist(), strict=True)
            annotations = tuple(
                Annotation((x1, y1, x2, y2), int(label), number)
                for number, ((x1, y1, x2, y2), label) in enumerate(pairs)
            )
            file = as_file(image, f"{split or 'image'}-{index}")
            found.append(LabelledImage(file, index, annotations))
        sides = [side for image in found for item in image.annotations for side in item.box]
        if sides and 0 < max(sides) <= 1:
            raise DataError(
                f"boxes are in pixels: found none over {max(sides):.3g}; multiply fractions by the "
                "images' widths and heights"
            )
        return cls(
            tuple(found), classes, tuple(range(len(classes))), split, "memory", Path("memory")
        )

    def __len__(self) -> int:
        return len(self.images)


def _numbers(values: Any, index: int, what: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"image {index}: {what} are not numbers: {str(values)[:80]}") from None
