"""Box encoding: anchor deltas to and from corners (x1, y1, x2, y2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(1000 / 16)
"""Largest log of a box's side over its anchor's (Detectron, torchvision): exp() stays finite."""

_MIN_SCALE = 1 / 4000  # of a box's side over its anchor's, from distances: log() stays finite


def encode_boxes(
    anchors: Tensor, boxes: Tensor, *, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)
) -> Tensor:
    r"""Compute the deltas from each anchor to its box.

    .. math:: d = (\Delta x / w_a, \Delta y / h_a, \log(w / w_a), \log(h / h_a))

    Source: Girshick et al. 2014 (R-CNN), Appendix C, to which Lin et al. 2017, Sec. 4, refers.

    Args:
        anchors: (..., 4) pixels.
        boxes: (..., 4) pixels; shapes broadcast.
        weights: factors of the four deltas.

    Returns:
        (..., 4) deltas (dx, dy, dw, dh), float32 or wider.

    Raises:
        ValueError: the last dimension is not 4.

    Example: a box as wide as its anchor, twice as high and half its width to the right.

        >>> encode_boxes(torch.tensor([0., 0., 10., 10.]), torch.tensor([5., -5., 15., 15.]))
        tensor([0.5000, 0.0000, 0.0000, 0.6931])
    """
    _check_boxes(anchors, "anchors")
    _check_boxes(boxes, "boxes")
    anchor_x, anchor_y, anchor_width, anchor_height = _centre_form(_at_least_float32(anchors))
    box_x, box_y, box_width, box_height = _centre_form(_at_least_float32(boxes))
    return torch.stack(
        (
            weights[0] * (box_x - anchor_x) / anchor_width,
            weights[1] * (box_y - anchor_y) / anchor_height,
            weights[2] * torch.log(box_width / anchor_width),
            weights[3] * torch.log(box_height / anchor_height),
        ),
        dim=-1,
    )


def decode_boxes(
    deltas: Tensor, anchors: Tensor, *, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)
) -> Tensor:
    """Apply deltas to anchors: the inverse of :func:`encode_boxes`.

    Args:
        deltas: (..., 4) dx, dy, dw, dh, any float type; computed in float32 or wider. dw and dh
            are clamped to log(1000 / 16) (Detectron), so that exp() cannot overflow.
        anchors: (..., 4) pixels; shapes broadcast.
        weights: those of :func:`encode_boxes`.

    Returns:
        (..., 4) pixels, not clipped.

    Raises:
        ValueError: the last dimension is not 4.
    """
    _check_boxes(deltas, "deltas")
    _check_boxes(anchors, "anchors")
    deltas = _at_least_float32(deltas)
    anchor_x, anchor_y, anchor_width, anchor_height = _centre_form(anchors.to(deltas.dtype))
    dx, dy, dw, dh = deltas.unbind(-1)
    x = dx / weights[0] * anchor_width + anchor_x
    y = dy / weights[1] * anchor_height + anchor_y
    half_width = 0.5 * torch.exp((dw / weights[2]).clamp(max=MAX_LOG_SCALE)) * anchor_width
    half_height = 0.5 * torch.exp((dh / weights[3]).clamp(max=MAX_LOG_SCALE)) * anchor_height
    return torch.stack((x - half_width, y - half_height, x + half_width, y + half_height), dim=-1)


def side_distances(anchors: Tensor, boxes: Tensor) -> Tensor:
    """Compute the distances from each anchor's centre to the sides of its box.

    Args:
        anchors: (..., 4) pixels.
        boxes: (..., 4) pixels; shapes broadcast.

    Returns:
        (..., 4) left, top, right and bottom, in quarters of the anchor's width or height: 2 each
        for a box that is its anchor; below 0 where the centre lies outside. For a square anchor of
        4 strides the unit is the stride, as in Li et al. 2020 (arXiv:2006.04388), Sec. 3.3.

    Raises:
        ValueError: the last dimension is not 4.
    """
    _check_boxes(anchors, "anchors")
    _check_boxes(boxes, "boxes")
    x, y, width, height = _centre_form(_at_least_float32(anchors))
    x1, y1, x2, y2 = _at_least_float32(boxes).unbind(-1)
    sides = (x - x1) / width, (y - y1) / height, (x2 - x) / width, (y2 - y) / height
    return 4 * torch.stack(sides, dim=-1)


def distances_to_deltas(distances: Tensor) -> Tensor:
    """Convert distances of :func:`side_distances` to deltas; the anchors need not be known.

    Args:
        distances: (..., 4) left, top, right, bottom.

    Returns:
        (..., 4) dx, dy, dw, dh; width and height are at least a 4000th of the anchor's.

    Raises:
        ValueError: the last dimension is not 4.
    """
    _check_boxes(distances, "distances")
    left, top, right, bottom = distances.unbind(-1)
    width, height = ((sides / 4).clamp(min=_MIN_SCALE) for sides in (left + right, top + bottom))
    deltas = (right - left) / 8, (bottom - top) / 8, width.log(), height.log()
    return torch.stack(deltas, dim=-1)


def clip_boxes(boxes: Tensor, sizes: Tensor | tuple[int, int]) -> Tensor:
    """Clip boxes to the border of their image.

    Args:
        boxes: (..., 4) pixels.
        sizes: height and width: one pair for all boxes, or (..., 2) that broadcasts against them.

    Returns:
        (..., 4), x in [0, width] and y in [0, height].

    Raises:
        ValueError: the last dimension of `boxes` is not 4, or that of `sizes` not 2.
    """
    _check_boxes(boxes, "boxes")
    limits = torch.as_tensor(sizes, device=boxes.device).to(boxes.dtype)
    if limits.shape[-1:] != (2,):
        raise ValueError(f"sizes are (..., 2) height and width, got {tuple(limits.shape)}")
    height, width = limits.unbind(-1)
    upper = torch.stack((width, height, width, height), dim=-1)
    return torch.minimum(boxes.clamp(min=0), upper)


def box_iou(first: Tensor, second: Tensor) -> Tensor:
    """Compute the IoU of boxes.

    Args:
        first, second: (..., 4) pixels; shapes broadcast.

    Returns:
        (...) in [0, 1]; 0 where both are empty.
    """
    sides = torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(
        first[..., :2], second[..., :2]
    )
    overlap = sides.clamp(min=0).prod(dim=-1)
    areas = [(boxes[..., 2:] - boxes[..., :2]).prod(dim=-1) for boxes in (first, second)]
    return overlap / (areas[0] + areas[1] - overlap).clamp(min=1e-9)


def _centre_form(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = boxes.unbind(-1)
    width, height = x2 - x1, y2 - y1
    return x1 + 0.5 * width, y1 + 0.5 * height, width, height


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _check_boxes(values: Tensor, name: str) -> None:
    if values.shape[-1:] != (4,):
        raise ValueError(f"{name} are (..., 4), got {tuple(values.shape)}")
