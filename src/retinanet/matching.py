"""Match anchors to ground-truth boxes (Lin et al. 2017, Sec. 4, "Anchors")."""

from __future__ import annotations

import torch
from torch import Tensor

from retinanet.config import MatchingConfig
from retinanet.structures import BACKGROUND, IGNORED, Targets, is_readable

_DEFAULTS = MatchingConfig()

_RUN = 8192  # consecutive anchors that are compared with the same objects, on a CPU
_CPU_TILE = 64  # objects compared at a time with a run of anchors: 2 MB per intermediate
_DEVICE_PAIRS = 2**23  # pairs compared at a time on other devices: 32 MB per intermediate


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
        ValueError: shapes do not fit, or not 0 < background_iou <= foreground_iou <= 1.

    Differs: torchvision, for an object that no anchor overlaps, counts all anchors as its best.
    """
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
    sides = boxes[..., 2:] - boxes[..., :2]
    usable = (sides > 0).all(dim=-1) & boxes.isfinite().all(dim=-1)
    kinds = torch.where(usable, labels, BACKGROUND)
    match = match_on_cpu if is_readable(boxes) else match_on_device
    # Columns that are contiguous in memory, since all comparisons are by column.
    anchors = anchors.to(boxes.dtype).T.contiguous().T
    return match(anchors, boxes, kinds, foreground_iou, background_iou, low_quality_matches)


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
    anchors: Tensor,
    boxes: Tensor,
    kinds: Tensor,
    foreground_iou: float,
    background_iou: float,
    low_quality_matches: bool,
) -> Tensor:
    """Match image by image, comparing each run of anchors only with the objects near it.

    Args, Returns: as :func:`match_anchors`, with checked boxes (B, M, 4) and their `kinds` (B, M):
    labels, where BACKGROUND also marks boxes that cannot be matched.
    """
    matches = kinds.new_full((len(boxes), len(anchors)), BACKGROUND)
    areas = _area(anchors)
    runs = [slice(start, start + _RUN) for start in range(0, len(anchors), _RUN)]
    if not runs:
        return matches
    # (runs, 1, 4) and (runs, 1): bounds of the anchors of a run
    low, high = (torch.stack([end(anchors[run], 0) for run in runs])[:, None] for end in _ENDS)
    min_area, max_area = (
        torch.stack([end(areas[run], 0) for run in runs])[:, None] for end in _ENDS
    )
    for match, kind, box in zip(matches, kinds, boxes, strict=True):
        near = ((box[:, :2] < high[..., 2:]) & (box[:, 2:] > low[..., :2])).all(dim=2)
        objects, regions = near & (kind >= 0), near & (kind == IGNORED)
        highest = None
        if low_quality_matches:
            highest = boxes.new_zeros(len(box))
            for run, row in zip(runs, objects, strict=True):
                for index in _tiles(row.nonzero()[:, 0]):
                    iou = _iou(anchors[run], box[index])
                    highest[index] = torch.maximum(highest[index], iou.amax(dim=1))
        else:
            # IoU is at most the smaller area divided by the larger; 1% of slack for rounding.
            area, min_iou = _area(box), 0.99 * background_iou
            objects &= (area >= min_iou * min_area) & (min_iou * area <= max_area)
        for i in (objects | regions).any(dim=1).nonzero()[:, 0].tolist():
            match[runs[i]] = _match_run(
                anchors[runs[i]],
                box,
                objects[i].nonzero()[:, 0],
                regions[i].nonzero()[:, 0],
                (foreground_iou, background_iou),
                highest,
            )
    return matches


def _match_run(
    anchors: Tensor,
    boxes: Tensor,
    objects: Tensor,
    regions: Tensor,
    thresholds: tuple[float, float],
    highest: Tensor | None,
) -> Tensor:
    """Match a run of anchors (r, 4) to some boxes of an image, given by index; (r,) as matches.

    `highest` (M,) is each object's highest IoU with any anchor, for low-quality matches.
    """
    foreground_iou, background_iou = thresholds
    best = boxes.new_zeros(len(anchors))
    place = objects.new_zeros(len(anchors))
    chosen = torch.zeros_like(best, dtype=torch.bool)
    for index in _tiles(objects):
        iou = _iou(anchors, boxes[index])
        maximum = iou.amax(dim=0)
        # A later tile must be better, not only as good: the first of equals is matched.
        better = maximum > best
        if highest is None:
            better &= maximum >= background_iou
        else:
            chosen |= ((iou == highest[index, None]) & (iou > 0)).any(dim=0)
        rows = better.nonzero()[:, 0]
        place[rows] = index[iou[:, rows].argmax(dim=0)]
        best = torch.maximum(best, maximum)
    matches = _threshold(best, place, chosen, thresholds)
    inside = torch.zeros_like(chosen)
    for index in _tiles(regions):
        inside |= (_covered(anchors, boxes[index]) >= foreground_iou).any(dim=0)
    return matches.masked_fill_(inside & (matches < 0), IGNORED)


def _tiles(index: Tensor) -> tuple[Tensor, ...]:
    return torch.split(index, _CPU_TILE) if len(index) else ()


def match_on_device(
    anchors: Tensor,
    boxes: Tensor,
    kinds: Tensor,
    foreground_iou: float,
    background_iou: float,
    low_quality_matches: bool,
) -> Tensor:
    """Match without reading any value: no device sync, and usable inside ``torch.func.vmap``.

    Args, Returns: as :func:`match_on_cpu`.
    """
    images, objects = kinds.shape
    # Rows that match nothing must not turn a maximum into NaN.
    boxes = boxes.masked_fill((kinds == BACKGROUND)[..., None], 0)
    length = max(1, min(len(anchors), _DEVICE_PAIRS // max(1, images)))
    tile = max(1, _DEVICE_PAIRS // max(1, images * length))
    tiles = [slice(first, first + tile) for first in range(0, objects, tile)]

    def iou_of_objects(run: Tensor, columns: slice) -> Tensor:
        return _iou(run, boxes[:, columns]).masked_fill(kinds[:, columns, None] < 0, 0)

    highest = [boxes.new_zeros(())] * len(tiles)
    if low_quality_matches:
        for run in torch.split(anchors, length):
            for i, columns in enumerate(tiles):
                maximum = iou_of_objects(run, columns).amax(dim=2, keepdim=True)
                highest[i] = torch.maximum(highest[i], maximum)
    matches = [kinds.new_full((images, 0), BACKGROUND)]
    for run in torch.split(anchors, length):
        best = boxes.new_zeros(images, len(run))
        place = torch.zeros_like(best, dtype=torch.int64)
        chosen = torch.zeros_like(best, dtype=torch.bool)
        inside = torch.zeros_like(best, dtype=torch.bool)
        for columns, top in zip(tiles, highest, strict=True):
            iou = iou_of_objects(run, columns)
            covered = _covered(run, boxes[:, columns])
            covered = covered.masked_fill(kinds[:, columns, None] != IGNORED, 0)
            tile_best, tile_place = iou.max(dim=1)
            place = torch.where(tile_best > best, tile_place + columns.start, place)
            best = torch.maximum(best, tile_best)
            inside = inside | (covered >= foreground_iou).any(dim=1)
            if low_quality_matches:
                chosen = chosen | ((iou == top) & (iou > 0)).any(dim=1)
        match = _threshold(best, place, chosen, (foreground_iou, background_iou))
        matches.append(torch.where(inside & (match < 0), IGNORED, match))
    return torch.cat(matches, dim=1)


def _threshold(
    best: Tensor, place: Tensor, chosen: Tensor, thresholds: tuple[float, float]
) -> Tensor:
    """Turn the best IoU and its index, (...) each, into matches; `chosen` anchors always match."""
    matches = torch.where(best < thresholds[0], IGNORED, place)
    matches = torch.where(best < thresholds[1], BACKGROUND, matches)
    return torch.where(chosen, place, matches)


def _iou(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Compute the IoU of anchors (r, 4) and boxes (..., m, 4): (..., m, r)."""
    overlap = _overlap(anchors, boxes)
    return overlap.div_((_area(anchors) + _area(boxes)[..., None]).sub_(overlap))


def _covered(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Compute the share of each anchor's area that each box covers: (..., m, r)."""
    return _overlap(anchors, boxes).div_(_area(anchors))


def _overlap(anchors: Tensor, boxes: Tensor) -> Tensor:
    x1, y1, x2, y2 = anchors.unbind(-1)
    left, top, right, bottom = boxes[..., None].unbind(-2)
    width = torch.minimum(x2, right).sub_(torch.maximum(x1, left)).clamp_min_(0)
    height = torch.minimum(y2, bottom).sub_(torch.maximum(y1, top)).clamp_min_(0)
    return width.mul_(height)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


_ENDS = (torch.amin, torch.amax)
