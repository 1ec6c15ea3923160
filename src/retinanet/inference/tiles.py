"""Detection in tiles of huge images, and merging at tile borders (docs/tiles.md)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from retinanet.data.tiling import MIN_TILE, tile_windows
from retinanet.data.windows import Window, Windows
from retinanet.errors import ConfigError
from retinanet.inference.detections import Failure
from retinanet.inference.sources import Prepared, Source
from retinanet.postprocess import suppress
from retinanet.structures import Detections

OVERLAP = 0.2
"""Default fraction of a tile's side that adjacent tiles share."""

# A box this near to a border inside the image, as a fraction of the tile's side, may be cut there:
# eight pixels of a network input of 512, a cell of its finest level.
_NEAR = 1 / 64

# Rule 1 of merge_parts: covered fraction of a cut box, and the fraction of its score that the
# covering box needs. Objects are smaller in the whole image than in a tile and may run together
# there, so its boxes need more.
_CONTAINED = 0.7
_SCORE_IN_TILE = 0.5
_SCORE_IN_WHOLE = 0.75

# Rule 2: shared fraction of the common length of two boxes that the same border cuts.
_SAME_LENGTH = 0.7


@dataclass(frozen=True, slots=True)
class Part:
    """Detections in a part of an image.

    Attributes:
        window: the tile; None: the whole image.
        objects: boxes in pixels of the part.
    """

    window: Window | None
    objects: Detections


@dataclass(slots=True, eq=False)
class Tiled:
    """An image in detection, whole or in parts.

    Attributes:
        source: the image.
        windows: opened for reading; None: detection runs on the whole image only.
        parts: detections so far.
        failure: why detection does not continue.
    """

    source: Source
    windows: Windows | None = None
    parts: list[Part] = field(default_factory=list)
    failure: Failure | None = None


@dataclass(slots=True, eq=False)
class Piece:
    """A part of an image to read and detect in.

    Attributes:
        image: the image.
        window: the tile; None: the whole image.
        is_last: no part of this image follows.
        prepared: its pixels, once they are read.
        objects: its detections, in pixels of the part.
    """

    image: Tiled
    window: Window | None = None
    is_last: bool = True
    prepared: Prepared | None = None
    objects: Detections | None = None


def check_tiling(tile: int | str | None, overlap: float | None) -> None:
    """Check the options of tiling."""
    is_side = isinstance(tile, int) and not isinstance(tile, bool) and tile >= MIN_TILE
    if not (tile in (None, "auto", "none") or is_side):
        raise ConfigError(f"tile {tile!r} is neither auto, none nor {MIN_TILE} pixels or more")
    if overlap is not None and not 0 <= overlap < 1:
        raise ConfigError(
            f"overlap {overlap} is not in [0, 1): it is a fraction of the tile, such as 0.2"
        )


def choose_tiling(
    tile: int | str | None, overlap: float | None, image_size: int, info: Mapping[str, Any]
) -> tuple[int | None, float]:
    """Return the side of tiles in pixels (None: whole images only) and their overlap.

    Args:
        tile: a side; ``auto``: :func:`tile_side`; ``none``: no tiles; None: those that the model
            was trained on (``data.tile``, ``tile`` in the checkpoint's `info`), or no tiles.
        overlap: fraction of the side in [0, 1); None: as in training, or :data:`OVERLAP`.
        image_size: the shorter side of the network's input.
        info: the checkpoint's.
    """
    trained = info.get("tile")
    if not isinstance(trained, Mapping | None) or (trained and {"side", "overlap"} - {*trained}):
        raise ConfigError(f"the model's tile is not a side and an overlap: {trained!r}")
    trained = trained or {}
    if tile is None:
        tile = trained.get("side")
    if overlap is None:
        overlap = trained.get("overlap", OVERLAP)
    check_tiling(tile, overlap)
    side = None if tile in (None, "none") else tile_side(tile, image_size, info)
    return side, overlap


def whole_images_warning(info: Mapping[str, Any]) -> str | None:
    """Return a warning where a model that was trained on tiles runs on whole images only."""
    if not info.get("tile"):
        return None
    return (
        "warning: the model was trained on tiles (data.tile) and runs on whole images here, in "
        "which its objects are smaller and may be missed"
    )


def tile_side(tile: int | str, image_size: int, info: Mapping[str, Any]) -> int:
    """Return a tile's side in pixels.

    ``auto`` is the side of the images that the model was trained on (the median of the shorter
    sides, ``image_side`` in the checkpoint's `info`), so that tiles are magnified as these were.
    Without that entry it is the shorter side of the network's input: nothing is magnified.
    """
    if tile != "auto":
        return int(tile)
    side = info.get("image_side", image_size)
    if not isinstance(side, int | float) or isinstance(side, bool) or not 0 < side < 2**31:
        raise ConfigError(
            f"tile auto: the model's image_side is no number of pixels: {side!r}; give --tile one"
        )
    return max(MIN_TILE, int(side))


def cut_images(
    sources: Iterator[Source | Failure], side: int | None, overlap: float
) -> Iterator[Piece]:
    """Yield each image whole and then in tiles; whole only if `side` is None or it is smaller.

    After :attr:`Tiled.failure` is set, at most one more tile of the image is yielded: its last.
    """
    for source in sources:
        if isinstance(source, Failure):
            yield Piece(Tiled(Source(None, source.source), failure=source))
            continue
        if side is None:
            yield Piece(Tiled(source))
            continue
        try:
            windows = source.open_windows()
        except Exception as error:  # whatever a decoder raises: it is reported, not swallowed
            yield Piece(Tiled(source, failure=source.failure(error)))
            continue
        tiles = tile_windows(windows.size, side, overlap)
        window = next(tiles, None)
        image = Tiled(source, None if window is None else windows)
        yield Piece(image, is_last=window is None)
        while window is not None:
            following = None if image.failure is not None else next(tiles, None)
            yield Piece(image, window, is_last=following is None)
            window = following


def merge_parts(
    parts: Sequence[Part],
    size: tuple[int, int],
    *,
    nms_threshold: float,
    class_agnostic_nms: bool = False,
    max_detections: int | None = None,
) -> Detections:
    """Merge the detections in an image and its tiles, so that each object is detected once.

    1. A box that ends at a border of its tile inside the image may be a piece of an object. It is
       dropped if .7 of it lies in a larger box of the same class in a tile, with half its score or
       more, or in the whole image, with .75 of its score: that part contains the entire object.
    2. Remaining pieces on both sides of a border that share .7 of their common length along it are
       joined to a box with their mean score: without overlap, or for an object that is larger than
       the overlap and not detected in the whole image.
    3. Non-maximum suppression over all boxes.

    docs/tiles.md compares the AP with that of NMS alone and of other rules.

    Args:
        parts: of one image.
        size: height and width of the image.
        nms_threshold: IoU threshold of non-maximum suppression.
        class_agnostic_nms: boxes of different classes count as those of one.
        max_detections: maximum number of boxes, the best ones; None: all.

    Returns:
        Best first, in pixels of the image.
    """
    height, width = size
    windows = torch.tensor([part.window or (0, 0, width, height) for part in parts]).reshape(-1, 4)
    counts = [len(part.objects) for part in parts]
    part_of = torch.arange(len(parts)).repeat_interleave(torch.tensor(counts))
    shifts = windows[:, [0, 1, 0, 1]].float()[part_of]
    scores = torch.cat([part.objects.scores for part in parts])
    labels = torch.cat([part.objects.labels for part in parts])
    # Sides of a box at the border of its part, where the image continues.
    boxes = torch.cat([part.objects.boxes for part in parts]) + shifts
    inner = windows != torch.tensor([0, 0, width, height])
    margin = ((windows[:, 2:] - windows[:, :2]).amax(dim=1) * _NEAR).clamp(min=1)
    is_cut = inner[part_of] & ((boxes - windows[part_of]).abs() <= margin[part_of, None])
    merging = _Merging(
        windows=windows,
        rows=torch.split(torch.arange(len(scores)), counts),
        boxes=boxes,
        scores=scores,
        groups=torch.zeros_like(labels) if class_agnostic_nms else labels,
        is_cut=is_cut,
        is_kept=torch.ones(len(scores), dtype=torch.bool),
    )
    needed = [_SCORE_IN_WHOLE if part.window is None else _SCORE_IN_TILE for part in parts]
    merging.drop_contained(torch.tensor(needed, dtype=torch.float32)[part_of])
    for axis in (0, 1):
        merging.join(axis)
    kept = merging.is_kept.nonzero()[:, 0]
    boxes, scores, groups = (
        values[kept] for values in (merging.boxes, merging.scores, merging.groups)
    )
    best = suppress(
        boxes,
        scores,
        groups,
        torch.zeros_like(groups),
        num_images=1,
        num_classes=int(groups.max()) + 1 if len(groups) else 1,
        threshold=nms_threshold,
        max_count=max(1, len(groups)) if max_detections is None else max_detections,
    )
    return Detections(boxes[best], scores[best], labels[kept][best])


@dataclass(slots=True)
class _Merging:
    """The boxes of all parts of an image during merging.

    Attributes:
        windows: (P, 4) pixels of each part.
        rows: indices of the boxes of each part.
        boxes, scores, groups: (N, 4) pixels of the image, (N,), (N,) class.
        is_cut: (N, 4) sides at which a box may be cut.
        is_kept: (N,).
    """

    windows: Tensor
    rows: tuple[Tensor, ...]
    boxes: Tensor
    scores: Tensor
    groups: Tensor
    is_cut: Tensor
    is_kept: Tensor

    def drop_contained(self, needed: Tensor) -> None:
        """Drop cut boxes that another part contains more of.

        Args:
            needed: (N,) fraction of a cut box's score that each box needs.
        """
        areas = (self.boxes[:, 2:] - self.boxes[:, :2]).prod(dim=1)
        for part, rows in enumerate(self.rows):
            pieces = rows[self.is_cut[rows].any(dim=1)]
            others = self._adjacent(part) if len(pieces) else pieces
            if not len(others):
                continue
            low = torch.maximum(self.boxes[pieces, None, :2], self.boxes[None, others, :2])
            high = torch.minimum(self.boxes[pieces, None, 2:], self.boxes[None, others, 2:])
            inside = (high - low).clamp(min=0).prod(dim=2)
            contained = (
                (inside > _CONTAINED * areas[pieces, None])
                & (areas[others] > areas[pieces, None])
                & (self.scores[others] >= needed[others] * self.scores[pieces, None])
                & (self.groups[others] == self.groups[pieces, None])
            )
            self.is_kept[pieces] = ~contained.any(dim=1)

    def join(self, axis: int) -> None:
        """Join pieces on both sides of a border; `axis` 0: left and right of it, 1: above, below.

        A joined box replaces the second piece, and keeps the cuts at its other sides.
        """
        low, high, along = axis, axis + 2, [1 - axis, 3 - axis]
        for part in self.windows[:, low].argsort(stable=True).tolist():
            rows = self.rows[part]
            rows = rows[self.is_kept[rows] & self.is_cut[rows, high]]
            others = self._adjacent(part) if len(rows) else rows
            others = others[self.is_kept[others] & self.is_cut[others, low]]
            if not len(others):
                continue
            first, second = self.boxes[rows][:, None], self.boxes[others][None]
            least = torch.minimum(first[..., along], second[..., along])
            most = torch.maximum(first[..., along], second[..., along])
            # Intersection over union of the two lengths along the border.
            shared = (least[..., 1] - most[..., 0]) / (most[..., 1] - least[..., 0]).clamp(min=1e-6)
            gap = 2 * _NEAR * (self.windows[part, high] - self.windows[part, low])
            continues = (
                (second[..., low] <= first[..., high] + gap)
                & (second[..., low] > first[..., low])
                & (second[..., high] > first[..., high])
                & (self.groups[others] == self.groups[rows, None])
            )
            shared = torch.where(continues, shared, 0.0)
            best = shared.argmax(dim=1)
            is_mutual = shared.argmax(dim=0)[best] == torch.arange(len(rows))
            is_joined = is_mutual & (shared.amax(dim=1) > _SAME_LENGTH)
            self._unite(rows[is_joined], others[best[is_joined]], low, high)

    def _unite(self, rows: Tensor, others: Tensor, low: int, high: int) -> None:
        boxes, is_cut = self.boxes, self.is_cut
        boxes[others, :2] = torch.minimum(boxes[rows, :2], boxes[others, :2])
        boxes[others, 2:] = torch.maximum(boxes[rows, 2:], boxes[others, 2:])
        self.scores[others] = (self.scores[rows] + self.scores[others]) / 2
        cut = is_cut[rows] | is_cut[others]
        cut[:, low], cut[:, high] = is_cut[rows, low], is_cut[others, high]
        is_cut[others] = cut
        self.is_kept[rows] = False

    def _adjacent(self, part: int) -> Tensor:
        """Return the rows of the parts that overlap or touch `part`."""
        own, every = self.windows[part], self.windows
        meets = ((every[:, :2] <= own[2:]) & (every[:, 2:] >= own[:2])).all(dim=1)
        meets[part] = False
        return torch.cat([self.rows[i] for i in meets.nonzero()[:, 0].tolist()] or [own[:0]])
