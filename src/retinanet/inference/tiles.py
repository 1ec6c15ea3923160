"""An image searched whole and in tiles, and the two made one.

A tile goes through the network like an image of its own, at the size to which images are brought
for it: what is small in a huge image is large in a tile. What a tile's border cuts looks like an
object too; :func:`merge_parts` tells these pieces from objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch
from torch import Tensor

from retinanet.data.windows import Window, Windows
from retinanet.errors import ConfigError
from retinanet.inference.detections import Failure
from retinanet.inference.sources import Source
from retinanet.postprocess import suppress
from retinanet.structures import Detections

MIN_TILE = 32
"""Pixels of a tile's side; in less there is nothing to see."""

# A box this near to a border inside the image, in shares of the tile's side, may have been cut
# there: eight pixels of a network's input of 512, a cell of its finest level.
_NEAR = 1 / 64

# Of a cut box so much lies in another box, which is larger and about as sure: the same object, seen
# whole there. Scores differ, for each part sees other surroundings. In the whole image objects
# are smaller than in a tile and may run together: what is found there has to be surer.
_CONTAINED = 0.7
_AS_SURE_IN_A_TILE = 0.5
_AS_SURE_IN_THE_WHOLE = 0.75

# Two boxes that the same seam cuts are one object if so much of their common length is shared.
_SAME_LENGTH = 0.7

# Rows of (x1, y1, x2, y2): the sides by which a box ends at its tile's border.
_LOW, _HIGH = (0, 1), (2, 3)


@dataclass(frozen=True, slots=True)
class Part:
    """What was found in a part of an image.

    Attributes:
        window: the tile; None: the whole image.
        objects: in the pixels of the part.
    """

    window: Window | None
    objects: Detections


@dataclass(slots=True, eq=False)
class Tiled:
    """An image that is searched in parts.

    Attributes:
        source: the image.
        windows: opened for reading; None: it is no larger than a tile and read as ever.
        parts: what was found so far.
        failure: why it is not searched any further.
    """

    source: Source
    windows: Windows | None
    parts: list[Part] = field(default_factory=list)
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """One part to be read and searched.

    Attributes:
        image: what it is a part of.
        window: the tile; None: the whole.
        last: whether no part of this image follows.
    """

    image: Tiled
    window: Window | None = None
    last: bool = True


def check_tiling(tile: int | str | None, overlap: float) -> None:
    """Whether these are a tile's side and overlap.

    Raises:
        ConfigError: they are not.
    """
    whole = isinstance(tile, int) and not isinstance(tile, bool) and tile >= MIN_TILE
    if not (tile is None or tile == "auto" or whole):
        raise ConfigError(f"tile {tile!r} is neither auto nor {MIN_TILE} pixels or more")
    if not 0 <= overlap < 1:
        raise ConfigError(
            f"overlap {overlap} is not in [0, 1): it is a share of the tile, such as 0.2"
        )


def tile_side(tile: int | str, image_size: int, info: Mapping[str, Any]) -> int:
    """A tile's side in pixels.

    ``auto`` is the side of the images that the model was trained on (the median of the shorter
    sides, ``image_side`` in the checkpoint's `info`), so that tiles are magnified as these were.
    A checkpoint that does not say takes its input's shorter side: nothing is magnified.

    Raises:
        ConfigError: what the checkpoint says is no number of pixels.
    """
    if tile != "auto":
        return int(tile)
    side = info.get("image_side", image_size)
    if not isinstance(side, int | float) or isinstance(side, bool) or not 0 < side < 2**31:
        raise ConfigError(
            f"tile auto: the model says that its images had a side of {side!r}, which is no "
            "number of pixels; give --tile one"
        )
    return max(MIN_TILE, int(side))


def tile_windows(
    size: tuple[int, int], side: int, overlap: float, *, down_first: bool = False
) -> list[Window]:
    """Tiles that cover an image, all of one size, spread evenly.

    Args:
        size: height and width.
        side: of a tile, pixels; an image less high, or less wide, has tiles of its own height.
        overlap: share of the side that neighbours have in common at the least.
        down_first: list them column by column; else row by row.

    Returns:
        (x1, y1, x2, y2) pixels; none for an image that is not larger than a tile.
    """
    return list(_each_window(size, side, overlap, down_first))


def _each_window(
    size: tuple[int, int], side: int, overlap: float, down_first: bool
) -> Iterator[Window]:
    height, width = size
    if max(size) <= side:
        return
    rows, columns = (_spread(length, side, overlap) for length in (height, width))
    if down_first:
        yield from ((x1, y1, x2, y2) for x1, x2 in columns for y1, y2 in rows)
    else:
        yield from ((x1, y1, x2, y2) for y1, y2 in rows for x1, x2 in columns)


def _spread(length: int, side: int, overlap: float) -> list[tuple[int, int]]:
    if length <= side:
        return [(0, length)]
    step = max(1, int(side * (1 - overlap)))
    steps = ceil((length - side) / step)
    starts = [round(i * (length - side) / steps) for i in range(steps + 1)]
    return [(start, start + side) for start in starts]


def cut_images(
    sources: Iterator[Source | Failure], side: int | None, overlap: float
) -> Iterator[Piece | Failure]:
    """Each image whole and then in tiles; with `side` None, or a smaller image, whole alone.

    An image that cannot be opened comes as a :class:`Failure`. Of one whose
    :attr:`Tiled.failure` is set in between one more tile comes, its last.
    """
    for source in sources:
        if isinstance(source, Failure) or side is None:
            yield source if isinstance(source, Failure) else Piece(Tiled(source, None))
            continue
        try:
            windows = source.open_windows()
        except Exception as error:  # whatever a decoder raises: it is reported, not swallowed
            yield source.failure(error)
            continue
        tiles = _each_window(windows.size, side, overlap, windows.down_first)
        window = next(tiles, None)
        image = Tiled(source, None if window is None else windows)
        yield Piece(image, last=window is None)
        while window is not None:
            following = None if image.failure is not None else next(tiles, None)
            yield Piece(image, window, last=following is None)
            window = following


def merge_parts(
    parts: Sequence[Part],
    size: tuple[int, int],
    *,
    nms_threshold: float,
    class_agnostic_nms: bool = False,
    most: int | None = None,
) -> Detections:
    """What was found in an image and its tiles, each object once.

    1. A box that ends at a border of its tile inside the image may be a piece of an object. It
       goes if .7 of it lies in a larger box of the same class in a tile, with half its score or
       more, or in the whole image, with .75 of its score: there all of the object was seen.
    2. Pieces that are left on both sides of a seam, and meet there over .7 of their common length,
       become one box with the mean of their scores: without overlap, or of an object that is larger
       than the overlap and not found in the whole.
    3. Non-maximum suppression over all, the whole's boxes among those of the tiles.

    docs/tiles.md has the AP of this beside NMS alone and other rules.

    Args:
        parts: of one image, boxes in the pixels of each part.
        size: height and width of the image.
        nms_threshold: of two boxes of a class with a greater IoU the one of less score goes.
        class_agnostic_nms: boxes of different classes count as those of one.
        most: boxes that are kept, the best ones; None: all.

    Returns:
        Best first, in pixels of the image.
    """
    height, width = size
    windows = torch.tensor([one.window or (0, 0, width, height) for one in parts]).reshape(-1, 4)
    counts = torch.tensor([len(one.objects) for one in parts])
    of = torch.arange(len(parts)).repeat_interleave(counts)
    shifts = windows[:, [0, 1, 0, 1]].float()[of]
    boxes = torch.cat([one.objects.boxes for one in parts]) + shifts
    scores = torch.cat([one.objects.scores for one in parts])
    labels = torch.cat([one.objects.labels for one in parts])
    kinds = torch.zeros_like(labels) if class_agnostic_nms else labels
    cut = _cut_sides(boxes, windows, of, size)
    merging = _Merging(boxes, scores, kinds, cut, windows, of)
    sure = [_AS_SURE_IN_THE_WHOLE if one.window is None else _AS_SURE_IN_A_TILE for one in parts]
    merging.drop_contained(torch.tensor(sure, dtype=torch.float32)[of])
    for axis in (0, 1):
        merging.join(axis)
    kept = merging.kept.nonzero()[:, 0]
    boxes, scores, labels, kinds = (
        values[kept] for values in (merging.boxes, merging.scores, labels, kinds)
    )
    best = suppress(
        boxes,
        scores,
        kinds,
        torch.zeros_like(kinds),
        num_images=1,
        num_classes=int(kinds.max()) + 1 if len(kinds) else 1,
        threshold=nms_threshold,
        max_count=max(1, len(kinds)) if most is None else most,
    )
    return Detections(boxes[best], scores[best], labels[best])


def _cut_sides(boxes: Tensor, windows: Tensor, of: Tensor, size: tuple[int, int]) -> Tensor:
    """(N, 4) which sides of a box lie at its part's border, where the image goes on."""
    height, width = size
    inner = windows != torch.tensor([0, 0, width, height])
    side = (windows[:, 2:] - windows[:, :2]).amax(dim=1)
    near = (boxes - windows[of]).abs() <= (side * _NEAR).clamp(min=1)[of, None]
    return inner[of] & near


class _Merging:
    """Boxes of all parts of an image, part by part, while they become fewer."""

    def __init__(
        self,
        boxes: Tensor,
        scores: Tensor,
        kinds: Tensor,
        cut: Tensor,
        windows: Tensor,
        of: Tensor,
    ) -> None:
        self.boxes, self.scores, self.kinds, self.cut = boxes, scores, kinds, cut
        self.kept = torch.ones(len(scores), dtype=torch.bool)
        self._windows = windows
        counts = of.bincount(minlength=len(windows)).tolist()
        self._rows = torch.split(torch.arange(len(of)), counts)

    def drop_contained(self, sure: Tensor) -> None:
        """Cut boxes that another part has seen more of.

        Args:
            sure: (N,) what share of a cut box's score each box needs.
        """
        going = []
        for part, rows in enumerate(self._rows):
            pieces = rows[self.cut[rows].any(dim=1)]
            if not len(pieces):
                continue
            others = self._beside(part)
            inside = _intersections(self.boxes[pieces], self.boxes[others])
            areas, other_areas = _areas(self.boxes[pieces]), _areas(self.boxes[others])
            seen = (
                (inside > _CONTAINED * areas[:, None])
                & (other_areas > areas[:, None])
                & (self.scores[others] >= sure[others] * self.scores[pieces][:, None])
                & (self.kinds[others] == self.kinds[pieces][:, None])
            )
            going.append(pieces[seen.any(dim=1)])
        if going:
            self.kept[torch.cat(going)] = False

    def join(self, axis: int) -> None:
        """Make one of two pieces on both sides of a seam; `axis` 0: side by side, 1: over it."""
        low, high, across = _LOW[axis], _HIGH[axis], 1 - axis
        for part in self._windows[:, low].argsort(stable=True).tolist():
            rows = self._rows[part]
            rows = rows[self.kept[rows] & self.cut[rows, high]]
            if not len(rows):
                continue
            others = self._beside(part)
            others = others[self.kept[others] & self.cut[others, low]]
            if not len(others):
                continue
            one, other = self.boxes[rows][:, None], self.boxes[others][None]
            first = torch.maximum(one[..., _LOW[across]], other[..., _LOW[across]])
            last = torch.minimum(one[..., _HIGH[across]], other[..., _HIGH[across]])
            from_ = torch.minimum(one[..., _LOW[across]], other[..., _LOW[across]])
            to = torch.maximum(one[..., _HIGH[across]], other[..., _HIGH[across]])
            shared = (last - first) / (to - from_).clamp(min=1e-6)
            gap = 2 * _NEAR * (self._windows[part, high] - self._windows[part, low])
            follows = (
                (other[..., low] <= one[..., high] + gap)
                & (other[..., low] > one[..., low])
                & (other[..., high] > one[..., high])
                & (self.kinds[others] == self.kinds[rows][:, None])
            )
            shared = torch.where(follows, shared, 0.0)
            best = shared.argmax(dim=1)
            mutual = shared.argmax(dim=0)[best] == torch.arange(len(rows))
            good = mutual & (shared.amax(dim=1) > _SAME_LENGTH)
            self._unite(rows[good], others[best[good]], axis)

    def _unite(self, rows: Tensor, others: Tensor, axis: int) -> None:
        """Each of `others` becomes the two; it keeps those of its cuts that are still open."""
        low, high = _LOW[axis], _HIGH[axis]
        self.boxes[others, :2] = torch.minimum(self.boxes[rows, :2], self.boxes[others, :2])
        self.boxes[others, 2:] = torch.maximum(self.boxes[rows, 2:], self.boxes[others, 2:])
        self.scores[others] = (self.scores[rows] + self.scores[others]) / 2
        cut = self.cut[rows] | self.cut[others]
        cut[:, low], cut[:, high] = self.cut[rows, low], self.cut[others, high]
        self.cut[others] = cut
        self.kept[rows] = False

    def _beside(self, part: int) -> Tensor:
        """Rows of the parts that overlap or touch `part`."""
        own, all_ = self._windows[part], self._windows
        meets = ((all_[:, :2] <= own[2:]) & (all_[:, 2:] >= own[:2])).all(dim=1)
        meets[part] = False
        return torch.cat([self._rows[i] for i in meets.nonzero()[:, 0].tolist()] or [own[:0]])


def _intersections(boxes: Tensor, others: Tensor) -> Tensor:
    """(N, M) square pixels that each of N boxes shares with each of M others."""
    low = torch.maximum(boxes[:, None, :2], others[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return (high - low).clamp(min=0).prod(dim=2)


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
