"""Match anchors to ground-truth boxes (Lin et al. 2017, Sec. 4, "Anchors")."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from retinanet.config import MatchingConfig
from retinanet.structures import BACKGROUND, IGNORED, Targets, is_readable

_DEFAULTS = MatchingConfig()

# On a CPU runs of consecutive anchors are compared with the objects near them. Many objects need
# short runs, which have fewer of them near; few objects need long runs, which are fewer calls.
_MIN_RUN, _MAX_RUN = 1024, 2**14
_CPU_PAIRS = 2**18  # objects of an image times anchors of a run
_CPU_TILE = 64  # objects compared at a time with a run
FEW_PAIRS = 2**16  # pairs of all images that are compared at once
DEVICE_PAIRS = 2**23  # pairs compared at a time on other devices: 32 MB per intermediate


@torch.no_grad()
def match_anchors(
    anchors: Tensor,
    targets: Targets,
    *,
    foreground_iou: float = _DEFAULTS.foreground_iou,
    background_iou: float = _DEFAULTS.background_iou,
    low_quality_matches: bool = _DEFAULTS.low_quality_matches,
) -> Tensor:
    """Match each anchor to a ground-truth box.

    An anchor is matched to the object of the highest IoU (the first of equals) if that is at least
    `foreground_iou`; below `background_iou` it is background; in between it is ignored. An anchor
    that is not foreground and lies within an ignored region is ignored: within means that at least
    `foreground_iou` of the anchor's area is covered, as COCO's evaluation treats crowds.

    Source: Lin et al. 2017, Sec. 4, "Anchors". Low-quality matches: Ren et al. 2015 (Faster R-CNN),
    Sec. 3.1.2; the RetinaNet paper does not mention them.

    The IoU matrix of anchors and objects is never allocated as a whole: memory does not grow with
    the number of objects.

    Args:
        anchors: (R, 4) pixels.
        targets: objects of B images; a row with label IGNORED is an ignored region, one with
            BACKGROUND is padding, and one whose box is empty or not finite matches nothing.
        foreground_iou, background_iou: thresholds, see above.
        low_quality_matches: also match the best anchors of each object to the object that they
            overlap most, even below `foreground_iou`, unless their IoU is 0.

    Returns:
        (B, R) int64: index 0..M-1 of the object in `targets`, BACKGROUND, or IGNORED.

    Raises:
        ValueError: types or shapes do not fit, or not 0 < background_iou <= foreground_iou <= 1.

    Differs: torchvision, for an object that no anchor overlaps, counts all anchors as its best.
    """
    if not isinstance(targets, Targets):
        raise ValueError(
            f"targets are Targets, got {type(targets).__name__}: "
            "give retinanet.pad_targets([boxes, ..], [labels, ..]), a tensor per image each"
        )
    boxes, labels = targets.boxes, targets.labels
    if anchors.dim() != 2 or anchors.shape[-1] != 4:
        raise ValueError(f"anchors are (R, 4), got {tuple(anchors.shape)}")
    if boxes.dim() != 3 or boxes.shape[-1] != 4 or labels.shape != boxes.shape[:2]:
        raise ValueError(
            "targets are boxes (B, M, 4) and labels (B, M), "
            f"got {tuple(boxes.shape)} and {tuple(labels.shape)}"
        )
    if not 0 < background_iou <= foreground_iou <= 1:
        raise ValueError(
            "matching needs 0 < background_iou <= foreground_iou <= 1, "
            f"got {background_iou} and {foreground_iou}"
        )
    kinds = usable_labels(targets)
    # A loop over images and runs does not pay for few pairs.
    prunes = is_readable(boxes) and kinds.numel() * len(anchors) > FEW_PAIRS
    match = match_on_cpu if prunes else match_on_device
    return match(
        anchors.to(boxes.dtype), boxes, kinds, (foreground_iou, background_iou, low_quality_matches)
    )


def usable_labels(targets: Targets) -> Tensor:
    """Return the labels (B, M), BACKGROUND for boxes that nothing can match."""
    sides = targets.boxes[..., 2:] - targets.boxes[..., :2]
    usable = (sides > 0).all(dim=-1) & targets.boxes.isfinite().all(dim=-1)
    return torch.where(usable, targets.labels, BACKGROUND)


def anchor_labels(matches: Tensor, labels: Tensor) -> Tensor:
    """Return the classification target of each anchor.

    Args:
        matches: (B, R) from :func:`match_anchors`.
        labels: (B, M) the objects' labels.

    Returns:
        (B, R) int64 class 0..K-1, BACKGROUND or IGNORED.

    Raises:
        ValueError: the two are not of the same batch.
    """
    if matches.dim() != 2 or labels.dim() != 2 or len(matches) != len(labels):
        raise ValueError(
            "matches are (B, R) and labels (B, M), "
            f"got {tuple(matches.shape)} and {tuple(labels.shape)}"
        )
    if labels.shape[1] == 0:
        return matches.clone()
    return torch.where(matches >= 0, labels.gather(1, matches.clamp(min=0)), matches)


def match_on_cpu(
    anchors: Tensor, boxes: Tensor, kinds: Tensor, rules: tuple[float, float, bool]
) -> Tensor:
    """Match image by image, comparing each run of anchors only with the objects near it.

    Args, Returns: as :func:`match_anchors`, with checked boxes (B, M, 4) and their `kinds` (B, M):
    labels, where BACKGROUND also marks boxes that cannot be matched. `rules` are its thresholds
    and whether it adds low-quality matches.
    """
    foreground_iou, background_iou, low_quality_matches = rules
    matches = kinds.new_full((len(boxes), len(anchors)), BACKGROUND)
    if not matches.numel() or not kinds.shape[1]:
        return matches
    runs, columns = _Runs(anchors, kinds.shape[1]), _columns(boxes)
    near, similar = runs.near(columns, background_iou)
    objects, regions = near & (kinds >= 0)[:, None], near & (kinds == IGNORED)[:, None]
    similar &= objects
    for image, match in enumerate(matches):
        own = columns[:, image]
        highest = boxes.new_zeros(near.shape[1:])
        before, best = -1, highest
        for i, index, iou in runs.compare(own, similar[image]):
            maximum = iou.amax(dim=0)
            better = maximum >= background_iou
            if i == before:
                # A later tile must be better, not only as good: the first of equals is matched.
                better &= maximum > best
                maximum = torch.maximum(maximum, best)
            before, best = i, maximum
            rows = better.nonzero()[:, 0]
            if len(rows):
                matched = index[iou[:, rows].argmax(dim=0)]
                match[runs.slices[i]][rows] = matched.where(best[rows] >= foreground_iou, IGNORED)
            if low_quality_matches:
                highest[i, index] = iou.amax(dim=1)
        if low_quality_matches:
            _match_low_quality(runs, match, own, objects[image], highest, background_iou)
        for i, _, covered in runs.compare(own, regions[image], _covered):
            inside = (covered >= foreground_iou).any(dim=0)
            match[runs.slices[i]].masked_fill_(inside & (match[runs.slices[i]] < 0), IGNORED)
    return matches


def _match_low_quality(
    runs: _Runs, match: Tensor, boxes: Tensor, near: Tensor, highest: Tensor, min_iou: float
) -> None:
    """Match the best anchors of each object to the object that they overlap most.

    Args:
        match: (R,) of one image, changed in place.
        boxes: (5, M) columns.
        near: (runs, M) objects near each run.
        highest: (runs, M) highest IoU of each object with the run, where that is `min_iou` or more.
    """
    # Objects without a similar anchor have not been compared with all anchors near them.
    rest = near & (highest.amax(dim=0) < min_iou)
    for i, index, iou in runs.compare(boxes, rest):
        highest[i, index] = iou.amax(dim=1)
    top = highest.amax(dim=0)
    chosen = torch.zeros_like(match, dtype=torch.bool)
    for i, index, iou in runs.compare(boxes, (highest == top) & (top > 0)):
        chosen[runs.slices[i]] |= (iou == top[index, None]).any(dim=0)
    rows, index = chosen.nonzero()[:, 0], near.any(dim=0).nonzero()[:, 0]
    for part in torch.split(rows, max(1, _CPU_PAIRS // len(index))) if len(rows) else ():
        match[part] = index[_iou(runs.values[:, part], boxes[:, index]).argmax(dim=0)]


class _Runs:
    """Consecutive anchors, which are similar in position and size, and the bounds of each run.

    Attributes:
        values: (5, R) columns of the anchors.
        slices: of the anchors, by run.
    """

    def __init__(self, anchors: Tensor, num_objects: int) -> None:
        self.values = _columns(anchors)
        length = min(_MAX_RUN, max(_MIN_RUN, _CPU_PAIRS // num_objects))
        self.slices = [slice(start, start + length) for start in range(0, len(anchors), length)]
        parts = [self.values[:, part] for part in self.slices]
        self.low = torch.stack([part.amin(dim=1) for part in parts], dim=1)[..., None]
        self.high = torch.stack([part.amax(dim=1) for part in parts], dim=1)[..., None]

    def near(self, boxes: Tensor, min_iou: float) -> tuple[Tensor, Tensor]:
        """Find the boxes that may overlap a run's anchors, and those that may by `min_iou`.

        IoU is at most the smaller area divided by the larger; 1% of slack for rounding.

        Args:
            boxes: (5, B, M) columns.

        Returns:
            (B, runs, M) bool each.
        """
        x1, y1, x2, y2, area = boxes[:, :, None]
        low, high, slack = self.low, self.high, 0.99 * min_iou
        near = (x1 < high[2]) & (y1 < high[3]) & (x2 > low[0]) & (y2 > low[1])
        return near, near & (area >= slack * low[4]) & (slack * area <= high[4])

    def compare(
        self,
        boxes: Tensor,
        pairs: Tensor,
        measure: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Compare each run with the boxes (5, M) that are True in `pairs` (runs, M), in tiles.

        Yields:
            the run, indices (m,) of boxes in rising order, and their IoU (m, r).
        """
        if not pairs.any():
            return
        measure = measure or _iou
        counts = pairs.sum(dim=1).tolist()
        for i, own in enumerate(torch.split(pairs.nonzero()[:, 1], counts)):
            for index in torch.split(own, _CPU_TILE) if counts[i] else ():
                yield i, index, measure(self.values[:, self.slices[i]], boxes[:, index])


def match_on_device(
    anchors: Tensor, boxes: Tensor, kinds: Tensor, rules: tuple[float, float, bool]
) -> Tensor:
    """Match without reading any value: no device sync, and usable inside ``torch.func.vmap``.

    Args, Returns: as :func:`match_on_cpu`.
    """
    foreground_iou, background_iou, low_quality_matches = rules
    images, objects = kinds.shape
    # Rows that match nothing must not turn a maximum into NaN.
    columns = _columns(boxes.masked_fill((kinds == BACKGROUND)[..., None], 0))
    length = max(1, min(len(anchors), DEVICE_PAIRS // max(1, images)))
    tile = max(1, DEVICE_PAIRS // max(1, images * length))
    tiles = [slice(first, first + tile) for first in range(0, objects, tile)]
    runs = torch.split(_columns(anchors), length, dim=1)

    def iou_of_objects(run: Tensor, part: slice) -> Tensor:
        return _iou(run, columns[..., part]).masked_fill(kinds[:, part, None] < 0, 0)

    highest = [boxes.new_zeros(())] * len(tiles)
    if low_quality_matches:
        for run in runs:
            for i, part in enumerate(tiles):
                maximum = iou_of_objects(run, part).amax(dim=2, keepdim=True)
                highest[i] = torch.maximum(highest[i], maximum)
    matches = [kinds.new_full((images, 0), BACKGROUND)]
    for run in runs:
        best = boxes.new_zeros(images, run.shape[1])
        index = torch.zeros_like(best, dtype=torch.int64)
        chosen = torch.zeros_like(best, dtype=torch.bool)
        inside = torch.zeros_like(best, dtype=torch.bool)
        for part, top in zip(tiles, highest, strict=True):
            iou = iou_of_objects(run, part)
            covered = _covered(run, columns[..., part])
            covered = covered.masked_fill(kinds[:, part, None] != IGNORED, 0)
            tile_best, tile_index = iou.max(dim=1)
            index = torch.where(tile_best > best, tile_index + part.start, index)
            best = torch.maximum(best, tile_best)
            inside = inside | (covered >= foreground_iou).any(dim=1)
            if low_quality_matches:
                chosen = chosen | ((iou == top) & (iou > 0)).any(dim=1)
        match = torch.where(best < foreground_iou, IGNORED, index)
        match = torch.where(best < background_iou, BACKGROUND, match)
        match = torch.where(chosen, index, match)
        matches.append(torch.where(inside & (match < 0), IGNORED, match))
    return torch.cat(matches, dim=1)


def _columns(boxes: Tensor) -> Tensor:
    """Return the corners and areas of boxes (..., 4) as contiguous columns (5, ...)."""
    return torch.cat((boxes.movedim(-1, 0), _area(boxes)[None]))


def _iou(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Compute the IoU of anchors (5, r) and boxes (5, ..., m), both columns: (..., m, r)."""
    overlap = _overlap(anchors, boxes)
    return overlap.div_((anchors[4] + boxes[4, ..., None]).sub_(overlap))


def _covered(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Compute the share of each anchor's area that each box covers: (..., m, r)."""
    return _overlap(anchors, boxes).div_(anchors[4])


def _overlap(anchors: Tensor, boxes: Tensor) -> Tensor:
    x1, y1, x2, y2, _ = anchors.unbind()
    left, top, right, bottom, _ = boxes[..., None].unbind()
    width = torch.minimum(x2, right).sub_(torch.maximum(x1, left)).clamp_min_(0)
    height = torch.minimum(y2, bottom).sub_(torch.maximum(y1, top)).clamp_min_(0)
    return width.mul_(height)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
