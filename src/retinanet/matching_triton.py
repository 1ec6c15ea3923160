"""Matching in Triton, for GPUs: what :func:`retinanet.matching.match_anchors` does, to the bit.

Imported only where Triton is installed and the anchors lie on a GPU (or by tests, under Triton's
interpreter). A program takes one image and a block of anchors, and goes through the objects in
their order: nothing is read back, and no memory grows with the number of objects.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

from retinanet.structures import BACKGROUND, IGNORED

# Anchors a program: 113 neighbouring cells of 9, few enough to rule most objects out together.
_BLOCK = 1024

_BACKGROUND = tl.constexpr(BACKGROUND)
_IGNORED = tl.constexpr(IGNORED)


def match(
    anchors: Tensor,
    boxes: Tensor,
    kinds: Tensor,
    foreground_iou: float,
    background_iou: float,
    low_quality_matches: bool,
) -> Tensor:
    """:func:`retinanet.matching.match_anchors` of checked arguments.

    Args:
        anchors: (R, 4) float32.
        boxes: (B, M, 4) float32.
        kinds: (B, M) int64: 0 or more for an object, IGNORED for a region; BACKGROUND is skipped.

    Returns:
        (B, R) int64.
    """
    images, most = kinds.shape
    count = len(anchors)
    matches = kinds.new_full((images, count), BACKGROUND)
    if not matches.numel() or not most:
        return matches
    anchors, boxes, kinds = anchors.contiguous(), boxes.contiguous(), kinds.contiguous()
    # The bits of a float over or at 0 rise with it, so that its maximum can be one of integers.
    highest = kinds.new_zeros((images, most), dtype=torch.int32)
    grid = (triton.cdiv(count, _BLOCK), images)
    # Fused multiply-adds would round otherwise than the reference does.
    exact = {"BLOCK": _BLOCK, "num_warps": 4, "enable_fp_fusion": False}
    with torch.cuda.device_of(anchors):  # type: ignore[no-untyped-call]
        if low_quality_matches:
            _highest_iou[grid](anchors, boxes, kinds, highest, count, most, **exact)
        _match[grid](
            anchors,
            boxes,
            kinds,
            highest,
            matches,
            count,
            most,
            foreground_iou,
            background_iou,
            LOW_QUALITY=low_quality_matches,
            **exact,
        )
    return matches


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _load_anchors(anchors, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # The last block goes on with copies of the last anchor, which bound it no wider.
    places = anchors + tl.minimum(rows, count - 1) * 4
    x1, y1 = tl.load(places), tl.load(places + 1)
    x2, y2 = tl.load(places + 2), tl.load(places + 3)
    return rows, x1, y1, x2, y2, (x2 - x1) * (y2 - y1)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _load_box(boxes, place):  # type: ignore[no-untyped-def]
    corner = boxes + place * 4
    return tl.load(corner), tl.load(corner + 1), tl.load(corner + 2), tl.load(corner + 3)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _overlap(x1, y1, x2, y2, left, top, right, bottom):  # type: ignore[no-untyped-def]
    width = tl.maximum(tl.minimum(x2, right) - tl.maximum(x1, left), 0.0)
    height = tl.maximum(tl.minimum(y2, bottom) - tl.maximum(y1, top), 0.0)
    return width * height


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _highest_iou(anchors, boxes, kinds, highest, count, most, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """For each object the bits of its best IoU with any anchor."""
    _, x1, y1, x2, y2, area = _load_anchors(anchors, count, BLOCK)
    low_x, low_y, high_x, high_y = tl.min(x1), tl.min(y1), tl.max(x2), tl.max(y2)
    first = tl.program_id(1) * most
    for place in range(most):
        kind = tl.load(kinds + first + place)
        left, top, right, bottom = _load_box(boxes, first + place)
        near = (left < high_x) & (top < high_y) & (right > low_x) & (bottom > low_y)
        if (kind >= 0) & near:
            overlap = _overlap(x1, y1, x2, y2, left, top, right, bottom)
            union = area + (right - left) * (bottom - top) - overlap
            best = tl.max(tl.div_rn(overlap, union))
            tl.atomic_max(highest + first + place, best.to(tl.int32, bitcast=True))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _match(  # type: ignore[no-untyped-def]
    anchors,
    boxes,
    kinds,
    highest,
    matches,
    count,
    most,
    foreground_iou,
    background_iou,
    LOW_QUALITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows, x1, y1, x2, y2, area = _load_anchors(anchors, count, BLOCK)
    low_x, low_y, high_x, high_y = tl.min(x1), tl.min(y1), tl.max(x2), tl.max(y2)
    first = tl.program_id(1) * most
    best = tl.zeros([BLOCK], tl.float32)
    chosen_place = tl.zeros([BLOCK], tl.int32)
    chosen = tl.zeros([BLOCK], tl.int32)
    inside = tl.zeros([BLOCK], tl.int32)
    for place in range(most):
        kind = tl.load(kinds + first + place)
        left, top, right, bottom = _load_box(boxes, first + place)
        near = (left < high_x) & (top < high_y) & (right > low_x) & (bottom > low_y)
        if (kind != _BACKGROUND) & near:
            overlap = _overlap(x1, y1, x2, y2, left, top, right, bottom)
            if kind >= 0:
                union = area + (right - left) * (bottom - top) - overlap
                iou = tl.div_rn(overlap, union)
                better = iou > best
                best = tl.where(better, iou, best)
                chosen_place = tl.where(better, place, chosen_place)
                if LOW_QUALITY:
                    most_of_all = tl.load(highest + first + place).to(tl.float32, bitcast=True)
                    chosen = chosen | ((iou == most_of_all) & (iou > 0)).to(tl.int32)
            else:
                covered = tl.div_rn(overlap, area)
                inside = inside | (covered >= foreground_iou).to(tl.int32)
    match = tl.where(best < foreground_iou, _IGNORED, chosen_place)
    match = tl.where(best < background_iou, _BACKGROUND, match)
    if LOW_QUALITY:
        match = tl.where(chosen > 0, chosen_place, match)
    match = tl.where((inside > 0) & (match < 0), _IGNORED, match)
    start = tl.program_id(1).to(tl.int64) * count
    tl.store(matches + start + rows, match.to(tl.int64), mask=rows < count)
