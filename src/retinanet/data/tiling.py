"""Tiles of images, and data sets of them to train on (docs/tiles.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import ceil

import numpy as np

from retinanet.data.dataset import Dataset, LabelledImage
from retinanet.data.image_files import image_size as size_on_disk
from retinanet.data.image_files import network_size
from retinanet.data.statistics import Statistics
from retinanet.data.transforms import MIN_VISIBLE
from retinanet.data.windows import Window
from retinanet.errors import ImageError

MIN_TILE = 32
"""Minimum side of a tile in pixels."""

# Of recommend_tile: pixels at the network's input, fraction of a tile, and factor of the scale.
_SMALLEST_ANCHOR, _OVERLAP, _MIN_GAIN = 32, 0.2, 1.5


def tile_windows(size: tuple[int, int], side: int, overlap: float) -> Iterator[Window]:
    """Yield tiles (x1, y1, x2, y2) that cover an image (height, width), row by row.

    They are spread evenly; adjacent ones share at least `overlap` of their side. An image less
    high, or less wide, than a tile has tiles of its own height; none if both.
    """
    if max(size) <= side:
        return
    rows, columns = (_spread(length, side, overlap) for length in size)
    yield from ((x1, y1, x2, y2) for y1, y2 in rows for x1, x2 in columns)


def _spread(length: int, side: int, overlap: float) -> list[tuple[int, int]]:
    if length <= side:
        return [(0, length)]
    step = max(1, int(side * (1 - overlap)))
    steps = ceil((length - side) / step)
    starts = [round(i * (length - side) / steps) for i in range(steps + 1)]
    return [(start, start + side) for start in starts]


def tile_dataset(dataset: Dataset, side: int, overlap: float) -> Dataset:
    """Replace each image by its tiles; an image that is not larger than a tile stays whole.

    The tiles are those of detection (:func:`tile_windows`). An object that a border cuts is clipped
    if at least :data:`~retinanet.data.transforms.MIN_VISIBLE` of its area is in the tile, and an
    ignored region with less. The description names the objects that are so in all tiles. The header
    is read of images whose size the labels do not state; one without a readable header stays whole.
    """
    tiles: list[LabelledImage] = []
    num_lost = num_cut = 0
    for image in dataset.images:
        try:
            size = image.height or 0, image.width or 0
            size = size if all(size) else size_on_disk(image.path)
        except ImageError:  # reported when it is loaded
            size = (0, 0)
        windows = list(tile_windows(size, side, overlap))
        if not windows:
            tiles.append(image)
            continue
        of_image, lost = _cut(image, windows, size)
        tiles += of_image
        num_lost += lost
        num_cut += 1
    with_objects = sum(tile.has_object for tile in tiles)
    description = [
        f"{dataset.split}: {len(tiles)} tiles of {side} pixels and smaller images, "
        f"{with_objects} with objects; {num_cut} of {len(dataset)} images are cut"
    ]
    if num_lost:
        description.append(
            f"warning: {num_lost} objects of {dataset.split} are so large that no tile shows "
            f"{MIN_VISIBLE:.0%} of them: they are not trained on; give a larger data.tile"
        )
    return replace(dataset, images=tuple(tiles), description=(*dataset.description, *description))


def recommend_tile(statistics: Statistics, image_size: int, max_size: int) -> int | None:
    """Return a side of tiles for objects that are small against their images, in pixels.

    It gives the median object 32 pixels at the network's input, the side of the smallest anchor,
    but magnifies at most twofold and is at least five times the side of 95% of the objects, so
    that they fit into an overlap of .2; a multiple of 32.

    Returns:
        None where the median object has 16 pixels or more at the network's input in the median
        image, or where such a tile would enlarge it by less than half.
    """
    if not statistics.side or not statistics.image_height:
        return None
    height, width = (
        round(sides["median"]) for sides in (statistics.image_height, statistics.image_width)
    )
    scale = network_size(height, width, image_size, max_size)[0] / height
    median, large = statistics.side["50"], statistics.side["95"]
    if median * scale >= _SMALLEST_ANCHOR / 2:
        return None
    side = max(image_size * median / _SMALLEST_ANCHOR, image_size / 2, large / _OVERLAP)
    side = max(MIN_TILE, 32 * ceil(side / 32))
    return side if image_size / side >= _MIN_GAIN * scale else None


def _cut(
    image: LabelledImage, windows: Sequence[Window], size: tuple[int, int]
) -> tuple[list[LabelledImage], int]:
    """Return an image's tiles, and the number of objects that count in none of them."""
    height, width = size
    objects = image.annotations
    boxes = np.array([a.box for a in objects], np.float64).reshape(-1, 4)
    boxes = boxes.clip(0, [width, height, width, height])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    counts = np.array([a.ignored for a in objects], bool)
    tiles = []
    for window in windows:
        x, y = window[:2]
        low = np.maximum(boxes[:, :2], window[:2])
        high = np.minimum(boxes[:, 2:], window[2:])
        inside = (high - low).clip(min=0).prod(axis=1)
        is_ignored = inside < MIN_VISIBLE * areas
        counts |= ~is_ignored
        clipped = np.concatenate([low, high], axis=1) - [x, y, x, y]
        parts = []
        for i in np.flatnonzero(inside > 0):
            x1, y1, x2, y2 = clipped[i].tolist()
            is_difficult = objects[i].difficult or bool(is_ignored[i])
            part = replace(objects[i], box=(x1, y1, x2, y2), area=None, difficult=is_difficult)
            parts.append(part)
        tile = replace(image, annotations=tuple(parts), window=window)
        tiles.append(replace(tile, width=window[2] - x, height=window[3] - y))
    return tiles, int((~counts).sum())
