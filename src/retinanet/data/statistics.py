"""Statistics of a labelled data set, and the recall of anchors on its objects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from retinanet.data.boxes import CLIPPED, check_box
from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.data.image_files import image_size as size_on_disk
from retinanet.data.image_files import network_size

if TYPE_CHECKING:
    from retinanet.anchors import AnchorSpec  # torch

SMALL, MEDIUM = 32**2, 96**2
"""COCO's limits of small, medium and large objects, in square pixels of the image."""

SIZE_NAMES = ("small", "medium", "large")

Sizes = Mapping[Path, tuple[int, int]]
"""Height and width of the image files."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts and distributions of a split, without ignored objects and unusable boxes.

    Attributes: images, background_images, objects, ignored: numbers; background has no objects,
        ignored are crowds and difficult objects. classes, images_of_class: numbers of objects, and
        of images with them, by class name. sizes: objects by ``small``, ``medium`` (32 x 32 pixels
        on) and ``large`` (96 x 96 on). side, aspect_ratio: percentiles of sqrt(area) in pixels, and
        of height / width, of the boxes. boxes_per_image: min, median, max and mean. image_sizes:
        images by "width x height", the ten most frequent. image_height, image_width: min, median
        and max, pixels. origin: how the split was made.
    """

    images: int
    background_images: int
    objects: int
    ignored: int
    classes: Mapping[str, int]
    images_of_class: Mapping[str, int]
    sizes: Mapping[str, int]
    side: Mapping[str, float]
    aspect_ratio: Mapping[str, float]
    boxes_per_image: Mapping[str, float]
    image_sizes: Mapping[str, int]
    image_height: Mapping[str, float]
    image_width: Mapping[str, float]
    origin: str


def count_objects(dataset: Dataset, sizes: Sizes) -> Statistics:
    """Compute the statistics of a split; an image missing in `sizes` has the size in its labels."""
    names = dataset.classes
    objects = list(_objects(dataset, sizes))
    labels = Counter(names[a.label] for of_image in objects for a in of_image)
    images_of_class = Counter(name for o in objects for name in {names[a.label] for a in o})
    by_size = Counter(size_name(_area(a)) for of_image in objects for a in of_image)
    boxes = np.asarray([a.box for o in objects for a in o], dtype=np.float64).reshape(-1, 4)
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    all_sizes = [_size(image, sizes) for image in dataset.images]
    known = [(height, width) for height, width in all_sizes if height and width]
    return Statistics(
        images=len(dataset),
        background_images=sum(not image.annotations for image in dataset.images),
        objects=len(boxes),
        ignored=sum(a.ignored for image in dataset.images for a in image.annotations),
        classes={name: labels[name] for name in names},
        images_of_class={name: images_of_class[name] for name in names},
        sizes={name: by_size[name] for name in SIZE_NAMES},
        side=_percentiles(np.sqrt(widths * heights)),
        aspect_ratio=_percentiles(heights / widths),
        boxes_per_image=_range(list(map(len, objects)), mean=True),
        image_sizes=dict(Counter(f"{width} x {height}" for height, width in known).most_common(10)),
        image_height=_range([height for height, _ in known]),
        image_width=_range([width for _, width in known]),
        origin=dataset.split_origin,
    )


def _objects(dataset: Dataset, sizes: Sizes) -> Iterator[list[Annotation]]:
    """Return the objects of each image that are not ignored and have a usable box."""
    for image in dataset.images:
        height, width = _size(image, sizes)
        faults = ((a, check_box(a.box, width, height)) for a in image.annotations if not a.ignored)
        yield [a for a, fault in faults if fault is None or fault[2] == CLIPPED]


def _size(image: LabelledImage, sizes: Sizes) -> tuple[int | None, int | None]:
    return sizes.get(image.path, (image.height, image.width))


def size_name(area: float) -> str:
    """COCO's size of an area in square pixels: ``small``, ``medium`` or ``large``."""
    return "small" if area < SMALL else "medium" if area < MEDIUM else "large"


def _area(annotation: Annotation) -> float:
    x1, y1, x2, y2 = annotation.box
    return (x2 - x1) * (y2 - y1) if annotation.area is None else annotation.area


def _percentiles(values: npt.NDArray[np.float64]) -> dict[str, float]:
    wanted = (0, 5, 25, 50, 75, 95, 100)
    if not len(values):
        return {}
    found = np.percentile(values, wanted)
    return {str(p): round(float(value), 3) for p, value in zip(wanted, found, strict=True)}


def _range(values: Sequence[int], *, mean: bool = False) -> dict[str, float]:
    if not values:
        return {}
    found = {"min": min(values), "median": float(np.median(values)), "max": max(values)}
    return found | ({"mean": round(sum(values) / len(values), 3)} if mean else {})


@dataclass(frozen=True, slots=True)
class AnchorRecall:
    """Recall of the network's anchors on the usable objects of a data set.

    Attributes:
        image_size, max_size: pixels of the shorter side, and of the longer at most.
        foreground_iou: IoU from which an anchor is matched to an object.
        objects, matched: number of objects, and of those with an anchor of that IoU.
        mean_iou: mean IoU of the objects with their best anchors.
        by_class, by_size: (matched, objects) by class name, and by size in pixels of the file.
    """

    image_size: int
    max_size: int
    foreground_iou: float
    objects: int
    matched: int
    mean_iou: float
    by_class: Mapping[str, tuple[int, int]]
    by_size: Mapping[str, tuple[int, int]]

    @property
    def recall(self) -> float:
        """Fraction of the objects that are matched; 1 where there is none."""
        return self.matched / self.objects if self.objects else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {**asdict(self), "recall": self.recall}


def anchor_recall(
    splits: Mapping[str, Dataset],
    spec: AnchorSpec,
    image_size: int,
    max_size: int,
    *,
    foreground_iou: float = 0.5,
) -> AnchorRecall:
    """Compute the fraction of objects that an anchor overlaps by `foreground_iou` or more.

    Exact and fast: an IoU falls with the distance of the centres along either axis, so of all
    anchors of one shape only that of the nearest cell is needed. COCO takes seconds.

    The objects of all splits are pooled. `image_size` and `max_size` are pixels of the shorter
    side, and of the longer at most.

    Raises:
        DataError: an image whose size is not in the labels cannot be read.
    """
    classes: list[str] = []
    sizes: list[str] = []
    # Boxes at the network's input by its padded size: few differ.
    boxes: dict[tuple[int, int], list[tuple[float, ...]]] = {}
    order: dict[tuple[int, int], list[int]] = {}
    for dataset in splits.values():
        for image, objects in zip(dataset.images, _objects(dataset, {}), strict=True):
            if not objects:
                continue
            height, width = image.height, image.width
            if not height or not width:
                height, width = size_on_disk(image.path)
            new_height, new_width = network_size(height, width, image_size, max_size)
            y, x = new_height / height, new_width / width
            size = -(-new_height // 32) * 32, -(-new_width // 32) * 32  # padded
            order.setdefault(size, []).extend(range(len(classes), len(classes) + len(objects)))
            boxes.setdefault(size, []).extend(
                (x1 * x, y1 * y, x2 * x, y2 * y) for x1, y1, x2, y2 in (a.box for a in objects)
            )
            classes += [dataset.classes[annotation.label] for annotation in objects]
            sizes += [size_name(_area(annotation)) for annotation in objects]
    iou = np.zeros(len(classes))
    for size, scaled in boxes.items():
        iou[order[size]] = _best_iou(spec, np.asarray(scaled), size)
    hit = iou >= foreground_iou

    def grouped(names: Iterable[str], keys: list[str]) -> dict[str, tuple[int, int]]:
        every, matched = Counter(keys), Counter(k for k, yes in zip(keys, hit, strict=True) if yes)
        return {name: (matched[name], every[name]) for name in names}

    every_class = dict.fromkeys(name for dataset in splits.values() for name in dataset.classes)
    return AnchorRecall(
        image_size=image_size,
        max_size=max_size,
        foreground_iou=foreground_iou,
        objects=len(iou),
        matched=int(hit.sum()),
        mean_iou=float(iou.mean()) if len(iou) else 0.0,
        by_class=grouped(every_class, classes),
        by_size=grouped(SIZE_NAMES, sizes),
    )


def _best_iou(
    spec: AnchorSpec, boxes: npt.NDArray[np.float64], size: tuple[int, int]
) -> npt.NDArray[np.float64]:
    """(M,) the best IoU of each of (M, 4) boxes with the anchors of an input (height, width)."""
    from retinanet.anchors import feature_sizes, level_anchors

    best = np.zeros(len(boxes))
    cells = feature_sizes(spec.strides, *size)
    cell_anchors = level_anchors(spec, [(1, 1)] * len(spec.strides), device="cpu")
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for level, shapes in enumerate(cell_anchors):
        nearest = []
        for axis in (1, 0):  # columns and x, then rows and y
            # As in retinanet.anchors.level_anchors.
            step, count = spec.strides[level], cells[level][axis]
            if spec.rounding == "torchvision":
                step = cells[0][axis] * spec.strides[0] // count
            centre = (boxes[:, 1 - axis] + boxes[:, 3 - axis]) / 2
            nearest.append(step * np.clip(np.rint(centre / step), 0, count - 1))
        x, y = nearest
        for x1, y1, x2, y2 in shapes.double().numpy():
            wide = np.minimum(boxes[:, 2], x + x2) - np.maximum(boxes[:, 0], x + x1)
            high = np.minimum(boxes[:, 3], y + y2) - np.maximum(boxes[:, 1], y + y1)
            overlap = np.maximum(wide, 0) * np.maximum(high, 0)
            union = area + (x2 - x1) * (y2 - y1) - overlap
            np.maximum(best, overlap / union, out=best)
    return best
