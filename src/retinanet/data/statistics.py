"""Statistics of a labelled data set, and the recall of anchors on its objects."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from retinanet.anchors import AnchorSpec, feature_sizes, level_anchors
from retinanet.data.boxes import CLIPPED, check_box
from retinanet.data.dataset import Annotation, Dataset, LabelledImage

SMALL, MEDIUM = 32**2, 96**2
"""COCO's limits of small, medium and large objects, in square pixels of the image."""

SIZE_NAMES = ("small", "medium", "large")

Sizes = Mapping[Path, tuple[int, int]]
"""Height and width of the image files."""


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts and distributions of a split, without ignored objects and unusable boxes.

    Attributes:
        images: number of images.
        background_images: number of images without objects.
        objects: number of objects.
        ignored: number of crowds and difficult objects.
        classes: number of objects by class name.
        images_of_class: number of images with the class, by name.
        sizes: objects by ``small``, ``medium`` (32 x 32 pixels on) and ``large`` (96 x 96 on), as
            COCO counts them.
        side: percentiles of the square root of the boxes' areas in pixels.
        aspect_ratio: percentiles of height / width of the boxes.
        boxes_per_image: min, median, max and mean.
        image_sizes: images by "width x height", the ten most frequent.
        image_height, image_width: min, median and max, pixels.
        origin: how the split was made.
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
    by_class = Counter(dict.fromkeys(range(len(dataset.classes)), 0))
    images_of_class = Counter(by_class)
    counts: list[int] = []
    boxes: list[tuple[float, float, float, float]] = []
    areas: list[float] = []
    for objects in _objects(dataset, sizes):
        labels = [annotation.label for annotation in objects]
        by_class.update(labels)
        images_of_class.update(set(labels))
        counts.append(len(objects))
        boxes += [annotation.box for annotation in objects]
        areas += [_area(annotation) for annotation in objects]
    by_size = Counter(map(size_name, areas))
    all_sizes = [_size(image, sizes) for image in dataset.images]
    known = [(height, width) for height, width in all_sizes if height and width]
    frequent = Counter(f"{width} x {height}" for height, width in known).most_common(10)
    sides = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    widths, heights = sides[:, 2] - sides[:, 0], sides[:, 3] - sides[:, 1]
    return Statistics(
        images=len(dataset),
        background_images=sum(not image.annotations for image in dataset.images),
        objects=len(boxes),
        ignored=sum(a.ignored for image in dataset.images for a in image.annotations),
        classes={name: by_class[label] for label, name in enumerate(dataset.classes)},
        images_of_class={n: images_of_class[label] for label, n in enumerate(dataset.classes)},
        sizes={name: by_size[name] for name in SIZE_NAMES},
        side=_percentiles(np.sqrt(widths * heights)),
        aspect_ratio=_percentiles(heights / widths),
        boxes_per_image=_range(counts, mean=True),
        image_sizes=dict(frequent),
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
    """Recall of the network's anchors on the objects of a data set.

    Attributes:
        image_size, max_size: pixels of the shorter side, and of the longer at most.
        foreground_iou: IoU from which an anchor is matched to an object.
        objects: number of objects, without ignored ones and those with unusable boxes.
        matched: objects with an anchor of that IoU.
        mean_iou: mean IoU of the objects with their best anchors.
        by_class, by_size: (matched, objects) by class name, and by ``small``, ``medium`` and
            ``large`` (in pixels of the image on disk).
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
    divisor: int = 32,
) -> AnchorRecall:
    """Compute the fraction of objects that an anchor overlaps by `foreground_iou` or more.

    Exact and fast: an IoU falls with the distance of the centres along either axis, so of all
    anchors of one shape only that of the nearest cell is needed. COCO takes seconds.

    Args:
        splits: data sets, whose objects are pooled.
        spec: the anchors.
        image_size: pixels of the shorter side at the network's input.
        max_size: pixels that the longer side may have.
        foreground_iou: IoU from which an anchor is matched to an object.
        divisor: images are padded to multiples of it.

    Raises:
        DataError: an image whose size is not in the labels cannot be read.
    """
    best: list[npt.NDArray[np.float64]] = []
    labels: list[str] = []
    sizes: list[str] = []
    boxes: list[tuple[float, float, float, float]] = []
    inputs: list[tuple[int, int]] = []
    for dataset in splits.values():
        for image, objects in zip(dataset.images, _objects(dataset, {}), strict=True):
            if not objects:
                continue
            scaled, size = _scale_boxes(image, objects, image_size, max_size)
            boxes += scaled
            inputs += [size] * len(objects)
            labels += [dataset.classes[annotation.label] for annotation in objects]
            sizes += [size_name(_area(annotation)) for annotation in objects]
            if len(boxes) >= 65536:
                best.append(_best_iou(spec, boxes, inputs, divisor))
                boxes, inputs = [], []
    best.append(_best_iou(spec, boxes, inputs, divisor))
    iou = np.concatenate(best)
    hit = iou >= foreground_iou

    def grouped(names: Iterable[str], keys: list[str]) -> dict[str, tuple[int, int]]:
        every, matched = Counter(keys), Counter(k for k, yes in zip(keys, hit, strict=True) if yes)
        return {name: (matched[name], every[name]) for name in names}

    classes = dict.fromkeys(name for dataset in splits.values() for name in dataset.classes)
    return AnchorRecall(
        image_size=image_size,
        max_size=max_size,
        foreground_iou=foreground_iou,
        objects=len(iou),
        matched=int(hit.sum()),
        mean_iou=float(iou.mean()) if len(iou) else 0.0,
        by_class=grouped(classes, labels),
        by_size=grouped(SIZE_NAMES, sizes),
    )


def _scale_boxes(
    image: LabelledImage, objects: Sequence[Annotation], image_size: int, max_size: int
) -> tuple[list[tuple[float, float, float, float]], tuple[int, int]]:
    """Scale boxes to the network's input; also return its (height, width)."""
    from retinanet.data.image_files import image_size as size_on_disk
    from retinanet.data.image_files import network_size

    height, width = image.height, image.width
    if not height or not width:
        height, width = size_on_disk(image.path)
    new_height, new_width = network_size(height, width, image_size, max_size)
    scale_y, scale_x = new_height / height, new_width / width
    boxes = [
        (x1 * scale_x, y1 * scale_y, x2 * scale_x, y2 * scale_y)
        for x1, y1, x2, y2 in (annotation.box for annotation in objects)
    ]
    return boxes, (new_height, new_width)


def _best_iou(
    spec: AnchorSpec,
    boxes: Sequence[tuple[float, float, float, float]],
    inputs: Sequence[tuple[int, int]],
    divisor: int,
) -> npt.NDArray[np.float64]:
    """(M,) the best IoU of each of M boxes with the anchors of its input (height, width)."""
    sides = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    best = np.zeros(len(sides))
    # Feature sizes by input size: few differ.
    different = {size: index for index, size in enumerate(dict.fromkeys(inputs))}
    which = np.asarray([different[size] for size in inputs], dtype=np.int64)
    padded = [tuple(math.ceil(side / divisor) * divisor for side in size) for size in different]
    cells = [feature_sizes(spec.strides, height, width) for height, width in padded]
    cell_anchors = level_anchors(spec, [(1, 1)] * len(spec.strides), device="cpu")
    for level, shapes in enumerate(cell_anchors):
        nearest = [np.zeros(0), np.zeros(0)]
        for axis in (0, 1):  # rows and y, then columns and x
            count = np.asarray([of_input[level][axis] for of_input in cells])
            step = np.asarray([_step(spec, of_input, level, axis) for of_input in cells])
            centre = (sides[:, 1 - axis] + sides[:, 3 - axis]) / 2
            cell = np.clip(np.rint(centre / step[which]), 0, count[which] - 1)
            nearest[axis] = cell * step[which]
        for x1, y1, x2, y2 in shapes.double().numpy():
            wide = np.minimum(sides[:, 2], nearest[1] + x2) - np.maximum(
                sides[:, 0], nearest[1] + x1
            )
            high = np.minimum(sides[:, 3], nearest[0] + y2) - np.maximum(
                sides[:, 1], nearest[0] + y1
            )
            overlap = np.maximum(wide, 0) * np.maximum(high, 0)
            own = (sides[:, 2] - sides[:, 0]) * (sides[:, 3] - sides[:, 1])
            np.maximum(best, overlap / (own + (x2 - x1) * (y2 - y1) - overlap), out=best)
    return best


def _step(spec: AnchorSpec, cells: Sequence[tuple[int, int]], level: int, axis: int) -> int:
    """Pixels between cells, as in :func:`retinanet.anchors.level_anchors`."""
    if spec.rounding == "torchvision":
        return cells[0][axis] * spec.strides[0] // cells[level][axis]
    return spec.strides[level]
