"""Which anchor answers for which object (Lin et al. 2017, Sec. 4, "Anchors")."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from retinanet.structures import BACKGROUND, IGNORED, Targets


@torch.no_grad()
def match_anchors(
    anchors: Tensor,
    targets: Targets,
    *,
    foreground_iou: float = 0.5,
    background_iou: float = 0.4,
    low_quality_matches: bool = False,
) -> Tensor:
    """For each anchor the object it answers for, if any.

    An anchor takes the object that it overlaps most (the first, where several overlap it equally):
    from an IoU of `foreground_iou` on as its object; under `background_iou` it is background;
    in between it is ignored. An anchor that is not foreground and lies within an ignored region is
    ignored: within means that `foreground_iou` of the anchor's area is covered, as COCO's
    evaluation treats detections and crowds.

    Source: Lin et al. 2017, Sec. 4, "Anchors". Low-quality matches: Ren et al. 2015 (Faster R-CNN),
    Sec. 3.1.2; the RetinaNet paper does not mention them.

    The anchors-by-objects matrix of IoU is never whole: the memory needed does not grow with the
    number of objects.

    Args:
        anchors: (R, 4) pixels.
        targets: objects of B images; a row with label IGNORED is an ignored region, one with
            BACKGROUND is padding, and one whose box is empty or not finite matches nothing.
        low_quality_matches: let the best anchors of each object take what they overlap most even
            if that is under `foreground_iou`, unless nothing overlaps the object at all.

    Returns:
        (B, R) int64: 0..M-1 the place of the object in `targets`, or BACKGROUND, or IGNORED.

    Raises:
        ValueError: shapes do not fit, or not 0 < background_iou <= foreground_iou <= 1.

    Differs: torchvision, for an object that no anchor touches, counts all anchors as its best.
    """
    boxes, labels = targets.boxes, targets.labels
    _check_anchors(anchors)
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
    anchors = anchors.to(boxes.dtype)
    matches = torch.full(
        (len(boxes), len(anchors)), BACKGROUND, dtype=torch.int64, device=anchors.device
    )
    usable = _has_area(boxes)
    # One copy to the host for the whole batch; from here on nothing waits for the device.
    kinds = torch.where(usable, labels, BACKGROUND).cpu()
    for image, kind in enumerate(kinds):
        objects = (kind >= 0).nonzero().flatten().to(anchors.device)
        if len(objects):
            found = boxes[image, objects]
            place, best = _best_objects(anchors, found, background_iou, low_quality_matches)
            match = objects[place]
            match = torch.where(best < foreground_iou, IGNORED, match)
            match = torch.where(best < background_iou, BACKGROUND, match)
            if low_quality_matches:
                match = torch.where(_is_best_of_any(anchors, found), objects[place], match)
            matches[image] = match
        regions = (kind == IGNORED).nonzero().flatten().to(anchors.device)
        if len(regions):
            inside = _lies_within(anchors, boxes[image, regions], foreground_iou)
            matches[image].masked_fill_(inside & (matches[image] < 0), IGNORED)
    return matches


def anchor_labels(matches: Tensor, labels: Tensor) -> Tensor:
    """The class that each anchor has to learn.

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


@torch.no_grad()
def anchor_coverage(anchors: Tensor, boxes: Tensor) -> Tensor:
    """How well the anchors can reach each object: its best IoU with any of them.

    Args:
        anchors: (R, 4) pixels.
        boxes: (M, 4) pixels of the same image.

    Returns:
        (M,) in [0, 1], float32 or wider; memory as for :func:`match_anchors`.

    Raises:
        ValueError: a shape does not fit.
    """
    _check_anchors(anchors)
    if boxes.dim() != 2 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes are (M, 4), got {tuple(boxes.shape)}")
    boxes = boxes if boxes.dtype == torch.float64 else boxes.float()
    best = torch.zeros(len(boxes), dtype=boxes.dtype, device=boxes.device)
    usable = _has_area(boxes).nonzero().flatten()
    if len(usable):
        best[usable] = _best_anchors(anchors.to(boxes.dtype), boxes[usable])
    return best


def _best_objects(
    anchors: Tensor, boxes: Tensor, least_iou: float, also_under: bool
) -> tuple[Tensor, Tensor]:
    """For each anchor the place (R,) of the box that it overlaps most, and their IoU (R,).

    Where that IoU is under `least_iou`, it may be reported as 0, unless `also_under`.
    """
    place = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
    best = torch.zeros(len(anchors), dtype=anchors.dtype, device=anchors.device)
    for rows, columns, iou in _iou_tiles(anchors, boxes, 0.0 if also_under else least_iou):
        tile_best, tile_place = iou.max(dim=0)
        # Tiles come in the order of the boxes: a later one must be better, not only as good.
        better = tile_best > best[rows]
        best[rows] = torch.where(better, tile_best, best[rows])
        place[rows] = torch.where(better, columns[tile_place], place[rows])
    return place, best


def _best_anchors(anchors: Tensor, boxes: Tensor) -> Tensor:
    """(M,) the best IoU of each box with any anchor."""
    best = torch.zeros(len(boxes), dtype=boxes.dtype, device=boxes.device)
    for _, columns, iou in _iou_tiles(anchors, boxes, 0.0):
        best[columns] = torch.maximum(best[columns], iou.amax(dim=1))
    return best


def _is_best_of_any(anchors: Tensor, boxes: Tensor) -> Tensor:
    """(R,) whether no other anchor overlaps some box more than this one."""
    highest = _best_anchors(anchors, boxes)
    result = torch.zeros(len(anchors), dtype=torch.bool, device=anchors.device)
    for rows, columns, iou in _iou_tiles(anchors, boxes, 0.0):
        result[rows] |= ((iou == highest[columns, None]) & (iou > 0)).any(dim=0)
    return result


def _lies_within(anchors: Tensor, regions: Tensor, share: float) -> Tensor:
    """(R,) whether one of the regions covers at least `share` of the anchor's area."""
    result = torch.zeros(len(anchors), dtype=torch.bool, device=anchors.device)
    for rows, _, covered in _iou_tiles(anchors, regions, 0.0, over_anchor=True):
        result[rows] |= (covered >= share).any(dim=0)
    return result


def _iou_tiles(
    anchors: Tensor, boxes: Tensor, least_iou: float, *, over_anchor: bool = False
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The IoU of all boxes with all anchors in tiles that stay in the processor's cache.

    On a CPU, pairs that cannot reach `least_iou` are left out: neighbouring anchors are of like
    size and place, so most boxes are ruled out for a whole run of anchors by place and area.

    Yields:
        a slice of the anchors (r), the places of some boxes (m,) in rising order, and (m, r) their
        IoU (or, with `over_anchor`, the share of the anchor's area that the box covers).
    """
    prunes = _prunes(anchors)
    run = 4096 if prunes else max(len(anchors), 1)
    tile = 64 if prunes else max(1, 2**22 // run)
    areas = _area(boxes)
    everything = torch.arange(len(boxes), device=boxes.device)
    for start in range(0, len(anchors), run):
        rows = slice(start, min(start + run, len(anchors)))
        x1, y1, x2, y2 = anchors[rows].T.contiguous()
        anchor_area = (x2 - x1) * (y2 - y1)
        columns = everything
        if prunes:
            near = (boxes[:, 0] < x2.max()) & (boxes[:, 1] < y2.max())
            near &= (boxes[:, 2] > x1.min()) & (boxes[:, 3] > y1.min())
            if not over_anchor:
                # IoU is at most the smaller area over the larger; 1% of slack for rounding.
                near &= areas >= 0.99 * least_iou * anchor_area.min()
                near &= 0.99 * least_iou * areas <= anchor_area.max()
            columns = near.nonzero().flatten()
        for first in range(0, len(columns), tile):
            chunk = columns[first : first + tile]
            left, top, right, bottom = boxes[chunk].T[:, :, None]
            overlap = (torch.minimum(x2, right).sub_(torch.maximum(x1, left))).clamp_(min=0)
            height = (torch.minimum(y2, bottom).sub_(torch.maximum(y1, top))).clamp_(min=0)
            overlap.mul_(height)
            if over_anchor:
                yield rows, chunk, overlap.div_(anchor_area)
            else:
                union = torch.add(anchor_area, areas[chunk, None], out=height).sub_(overlap)
                yield rows, chunk, overlap.div_(union)


def _prunes(anchors: Tensor) -> bool:
    """Whether to look which pairs can meet at all: a GPU would have to wait for the answer."""
    return anchors.device.type == "cpu"


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _has_area(boxes: Tensor) -> Tensor:
    sides = boxes[..., 2:] - boxes[..., :2]
    return (sides > 0).all(dim=-1) & boxes.isfinite().all(dim=-1)


def _check_anchors(anchors: Tensor) -> None:
    if anchors.dim() != 2 or anchors.shape[-1] != 4:
        raise ValueError(f"anchors are (R, 4), got {tuple(anchors.shape)}")
