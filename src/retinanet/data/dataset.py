"""Labelled data sets in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retinanet.errors import DataError


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
    """

    path: Path
    id: int | str
    annotations: tuple[Annotation, ...] = ()
    width: int | None = None
    height: int | None = None
    label_file: Path | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


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
        """Build a data set in memory; see :func:`retinanet.data.memory.from_arrays`."""
        from retinanet.data.memory import from_arrays

        return from_arrays(images, boxes, labels, classes, split=split)

    def __len__(self) -> int:
        return len(self.images)
