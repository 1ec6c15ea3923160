"""Assign anchors to objects: by IoU (the paper), by ATSS, or task-aligned (TOOD)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from retinanet import own
from retinanet.boxes import box_iou, decode_boxes
from retinanet.config import QUALITY_LOSSES, LossSettings, is_own
from retinanet.matching import anchor_labels, match_anchors, usable_labels
from retinanet.structures import (
    BACKGROUND,
    IGNORED,
    Outputs,
    Targets,
    flatten_level,
    flatten_levels,
    is_readable,
)

_MIN_CELLS = 4  # cells that an object is compared with, even if it contains fewer centres
_ALIGNED_CELLS = 25  # nearest cells per level that are compared with an object when task-aligned


@dataclass(frozen=True, slots=True)
class Assignment:
    """The object of each anchor of a batch.

    Attributes:
        matches: (B, R) int64: index 0..M-1 of the object, BACKGROUND or IGNORED.
        scores: (B, R) float32 classification target of the foreground anchors, in [0, 1], and 0 of
            the others; None: 1 for every foreground anchor.
    """

    matches: Tensor
    scores: Tensor | None

    @property
    def weight(self) -> Tensor:
        """(B,) sum of the foreground anchors' targets."""
        if self.scores is None:
            return (self.matches >= 0).sum(dim=1)
        return self.scores.sum(dim=1)


@torch.no_grad()
def assign_anchors(
    outputs: Outputs,
    anchors: Sequence[Tensor],
    targets: Targets,
    *,
    num_classes: int,
    settings: LossSettings,
) -> Assignment:
    """Assign each anchor to an object, to the background, or to neither.

    ``iou``: Lin et al. 2017, Sec. 4 (:func:`retinanet.matching.match_anchors`).

    ``atss``: Zhang et al. 2020, Sec. 3.3. The candidates of an object are the anchors of the
    ``candidates`` cells per level whose centres are nearest to its own. Those whose IoU is at least
    the mean plus the standard deviation of all its candidates, and whose centre lies in it, are its
    foreground.

    ``task_aligned``: Feng et al. 2021 (TOOD), Sec. 3.3. The ``task_topk`` anchors of the highest
    t = score x IoU^6 of the *predicted* box, of those whose centre lies in the object (here: of the
    25 nearest cells per level, so that memory per object is fixed).

    In both an anchor of several objects goes to the highest IoU, and an object that contains fewer
    than four centres of the finest level counts the four nearest as inside, so that tiny objects
    have candidates; larger objects around them may still win these. No device sync is needed.

    The classification target is 1, or with a loss in :data:`retinanet.config.QUALITY_LOSSES` the
    IoU of the predicted box (Li et al. 2020, Sec. 3), for ``task_aligned`` t scaled so that the
    highest target of an object is its highest IoU (Feng et al. 2021, Eq. 4).

    Args:
        outputs: of the network for B images.
        anchors: L tensors (R_l, 4).
        targets: the objects of the B images.
        num_classes: K.
        settings: the assignment, its parameters, and the kind of classification loss.
    """
    all_anchors = torch.cat(list(anchors))
    soft = settings.classification in QUALITY_LOSSES
    if settings.assignment == "iou":
        matches, scores = match_by_iou(all_anchors, targets, settings), None
    elif is_own(settings.assignment):
        matches, scores = own.match(settings.assignment, all_anchors, targets, outputs), None
        # The user's function may match ignored regions and padding like objects.
        labels = anchor_labels(matches, usable_labels(targets))
        matches = torch.where(labels < 0, labels, matches)
    else:
        outputs = Outputs(*(tuple(level.detach() for level in levels) for levels in outputs))
        kinds = usable_labels(targets)
        images = range(len(kinds)) if is_readable(kinds) else [slice(None)]
        parts = []
        for image in images:
            # Where values can be read an image's padding is left out.
            part = slice(image, image + 1) if isinstance(image, int) else image
            parts.append(
                _assign(
                    Outputs(
                        tuple(level[part] for level in outputs.logits),
                        tuple(level[part] for level in outputs.deltas),
                    ),
                    anchors,
                    _objects(targets.boxes[part], kinds[part]),
                    num_classes,
                    settings,
                )
            )
        matches = torch.cat([part[0] for part in parts])
        scores = torch.cat([part[1] for part in parts])
        matches = _ignore_regions(matches, all_anchors, targets, settings)
    if not soft:
        return Assignment(matches, None)
    if settings.assignment != "task_aligned":
        scores = _predicted_iou(outputs, all_anchors, targets, matches)
    return Assignment(matches, scores)


def match_by_iou(anchors: Tensor, targets: Targets, settings: LossSettings) -> Tensor:
    """Match anchors (R, 4) by the thresholds of the settings: (B, R)."""
    return match_anchors(
        anchors,
        targets,
        foreground_iou=settings.foreground_iou,
        background_iou=settings.background_iou,
        low_quality_matches=settings.low_quality_matches,
    )


class _Objects(NamedTuple):
    """Objects of images: boxes (B, M, 4), labels (B, M), and which of them are objects (B, M)."""

    boxes: Tensor
    labels: Tensor
    usable: Tensor


def _objects(boxes: Tensor, labels: Tensor) -> _Objects:
    if is_readable(labels):
        count = int((labels >= 0).any(dim=0).nonzero().max()) + 1 if (labels >= 0).any() else 0
        boxes, labels = boxes[:, :count], labels[:, :count]
    usable = labels >= 0
    return _Objects(boxes.masked_fill(~usable[..., None], 0), labels.clamp(min=0), usable)


def _assign(
    outputs: Outputs,
    anchors: Sequence[Tensor],
    objects: _Objects,
    num_classes: int,
    settings: LossSettings,
) -> tuple[Tensor, Tensor]:
    """Return the matches (B, R) without ignored regions, and the aligned scores (B, R)."""
    images, rows = len(objects.boxes), sum(map(len, anchors))
    if objects.boxes.shape[1] == 0:
        matches = objects.labels.new_full((images, rows), BACKGROUND)
        return matches, matches.new_zeros(matches.shape, dtype=torch.float32)
    aligned = settings.assignment == "task_aligned"
    shapes = [(level.shape[-2], level.shape[-1]) for level in outputs.logits]
    index, inside = _find_candidates(
        anchors, shapes, objects, _ALIGNED_CELLS if aligned else settings.candidates
    )
    boxes = torch.cat(list(anchors))[index]
    if not aligned:
        iou = box_iou(boxes, objects.boxes[:, :, None])
        threshold = iou.mean(dim=-1, keepdim=True) + iou.std(dim=-1, keepdim=True)
        matches, _ = _resolve(index, inside & (iou >= threshold), iou, rows)
        return matches, iou.new_zeros(matches.shape)
    image = torch.arange(images, device=boxes.device)[:, None, None]
    deltas = flatten_levels(outputs.deltas, 4)[image, index]
    iou = box_iou(decode_boxes(deltas, boxes), objects.boxes[:, :, None])
    score = _own_logits(outputs.logits, index, objects.labels, num_classes).sigmoid()
    alignment = (score * iou**settings.task_beta).masked_fill(~inside, -1)
    count = min(settings.task_topk, alignment.shape[-1])
    lowest = alignment.topk(count, dim=-1).values[..., -1:]
    positive = inside & (alignment >= lowest) & (alignment > 0)
    matches, final = _resolve(index, positive, iou, rows)
    highest = [values.where(final, 0).amax(dim=-1, keepdim=True) for values in (alignment, iou)]
    target = alignment / highest[0].clamp(min=1e-30) * highest[1]
    scores = iou.new_zeros(matches.shape).scatter_reduce(
        1, index.flatten(1), target.where(final, 0).flatten(1), reduce="amax"
    )
    return matches, scores


def _find_candidates(
    anchors: Sequence[Tensor],
    shapes: Sequence[tuple[int, int]],
    objects: _Objects,
    cells: int,
) -> tuple[Tensor, Tensor]:
    """Find the anchors of the `cells` nearest cells of each level.

    Returns:
        (B, M, C) indices 0..R-1, by level and then by distance, and (B, M, C) whether the anchor's
        centre is in the object, which exists.
    """
    x1, y1, x2, y2 = objects.boxes.unbind(-1)
    indices: list[Tensor] = []
    insides: list[Tensor] = []
    first = 0
    for boxes, (rows, columns) in zip(anchors, shapes, strict=True):
        per_cell = len(boxes) // (rows * columns)
        centres = (boxes[::per_cell, :2] + boxes[::per_cell, 2:]).view(rows, columns, 2) / 2
        x, y = centres[0, :, 0], centres[:, 0, 1]
        cell = _nearest_cells(x, y, (x1 + x2) / 2, (y1 + y2) / 2, cells)
        cell_x, cell_y = x[cell % columns], y[cell // columns]
        inside = (
            (cell_x >= x1[..., None])
            & (cell_x <= x2[..., None])
            & (cell_y >= y1[..., None])
            & (cell_y <= y2[..., None])
        )
        if not indices:
            few = inside.sum(dim=-1, keepdim=True) < _MIN_CELLS
            is_near = torch.arange(inside.shape[-1], device=inside.device) < _MIN_CELLS
            inside = inside | (few & is_near)
        own = torch.arange(per_cell, device=cell.device)
        indices.append((first + cell[..., None] * per_cell + own).flatten(2))
        insides.append(inside[..., None].expand(*inside.shape, per_cell).flatten(2))
        first += len(boxes)
    inside = torch.cat(insides, dim=-1) & objects.usable[..., None]
    return torch.cat(indices, dim=-1), inside


def _nearest_cells(x: Tensor, y: Tensor, centre_x: Tensor, centre_y: Tensor, count: int) -> Tensor:
    """Return the `count` cells nearest to each centre (B, M), nearest first: (B, M, c).

    `x` (W,) and `y` (H,) are the cells' centres. Only a window around the centre is searched; it is
    as wide as needed for any position, also at the border and on levels of few rows or columns.
    """
    columns, rows = len(x), len(y)
    side = 2 * math.ceil(math.sqrt(count)) + 1
    if min(rows, columns) < side:
        side = 2 * count - 1
    width, height = min(columns, side), min(rows, side)
    column = _window(x, centre_x, width)
    row = _window(y, centre_y, height)
    distance = (
        (x[column] - centre_x[..., None])[..., None, :] ** 2
        + (y[row] - centre_y[..., None])[..., :, None] ** 2
    ).flatten(-2)
    nearest = distance.topk(min(count, width * height), dim=-1, largest=False).indices
    return row.gather(-1, nearest // width) * columns + column.gather(-1, nearest % width)


def _window(centres: Tensor, position: Tensor, length: int) -> Tensor:
    """Return the indices (..., length) of consecutive cells around each position (...)."""
    step = centres[1] - centres[0] if len(centres) > 1 else centres.new_ones(())
    start = ((position - centres[0]) / step).round().long() - length // 2
    start = start.clamp(0, len(centres) - length)
    return start[..., None] + torch.arange(length, device=centres.device)


def _own_logits(
    levels: Sequence[Tensor], index: Tensor, labels: Tensor, num_classes: int
) -> Tensor:
    """Gather the float32 logit of each object's class at each of its anchors `index` (B, M, C)."""
    image = torch.arange(len(index), device=index.device)[:, None, None]
    result = torch.zeros(index.shape, dtype=torch.float32, device=index.device)
    first = 0
    for level in levels:
        flat = flatten_level(level, num_classes)
        row = index - first
        here = (row >= 0) & (row < flat.shape[1])
        logits = flat[image, row.clamp(0, flat.shape[1] - 1), labels[..., None]]
        result = torch.where(here, logits.float(), result)
        first += flat.shape[1]
    return result


def _resolve(index: Tensor, positive: Tensor, priority: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Give each anchor to the object of the highest priority, the first of equals.

    Args:
        index: (B, M, C) anchors.
        positive: (B, M, C) bool.
        priority: (B, M, C) at least 0.
        rows: R.

    Returns:
        (B, R) index of the object or BACKGROUND, and (B, M, C) which pairs were kept.
    """
    images, objects, _ = index.shape
    flat = index.flatten(1)
    best = priority.new_full((images, rows), -1)
    best = best.scatter_reduce(1, flat, priority.where(positive, -1).flatten(1), reduce="amax")
    wins = positive & (priority == best.gather(1, flat).view_as(priority))
    number = torch.arange(objects, device=index.device)[None, :, None].expand_as(index)
    matches = index.new_full((images, rows), objects)
    matches = matches.scatter_reduce(1, flat, number.where(wins, objects).flatten(1), reduce="amin")
    final = wins & (matches.gather(1, flat).view_as(index) == number)
    return matches.where(matches < objects, BACKGROUND), final


def _ignore_regions(
    matches: Tensor, anchors: Tensor, targets: Targets, settings: LossSettings
) -> Tensor:
    """Mark background anchors within an ignored region as IGNORED."""
    regions = targets.labels == IGNORED
    if is_readable(regions) and not regions.any():
        return matches
    labels = torch.where(regions, IGNORED, BACKGROUND)
    ignored = match_anchors(
        anchors, Targets(targets.boxes, labels), foreground_iou=settings.foreground_iou
    )
    return torch.where((matches < 0) & (ignored == IGNORED), IGNORED, matches)


def _predicted_iou(outputs: Outputs, anchors: Tensor, targets: Targets, matches: Tensor) -> Tensor:
    """Return the IoU of each foreground anchor's predicted box with its object: (B, R)."""
    scores = torch.zeros(matches.shape, dtype=torch.float32, device=matches.device)
    if not targets.boxes.shape[1]:
        return scores
    deltas = flatten_levels(outputs.deltas, 4).detach()
    if is_readable(matches):
        image, row = (matches >= 0).nonzero(as_tuple=True)
        boxes = targets.boxes[image, matches[image, row]]
        scores[image, row] = box_iou(decode_boxes(deltas[image, row], anchors[row]), boxes).float()
        return scores
    objects = matches.clamp(min=0)[..., None].expand(-1, -1, 4)
    iou = box_iou(decode_boxes(deltas, anchors), targets.boxes.gather(1, objects))
    return iou.float().where(matches >= 0, 0)
