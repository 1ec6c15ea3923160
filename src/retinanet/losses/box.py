"""Losses of the boxes of foreground anchors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import l1_loss, smooth_l1_loss

from retinanet.boxes import decode_boxes, encode_boxes

# (deltas, anchors, boxes, beta) -> (N,), all float32 or wider.
_BoxLoss = Callable[[Tensor, Tensor, Tensor, float], Tensor]

# e^-10 of an anchor's side: far under it float32 has no width left, and CIoU divides by the height.
_LEAST_LOG_SCALE = -10.0

_EPSILON = 1e-7  # against division by 0, as in torchvision


def box_loss(
    kind: str,
    predicted_deltas: Tensor,
    anchors: Tensor,
    target_boxes: Tensor,
    *,
    beta: float = 0.11,
) -> Tensor:
    """The loss of each predicted box.

    ``smooth_l1`` (Girshick 2015, Eq. 3, with the corner at `beta`) and ``l1`` compare the four
    deltas and are summed over them. ``giou`` (Rezatofighi et al. 2019), ``diou`` and ``ciou``
    (Zheng et al. 2020) compare the boxes that the deltas lead to. They are torchvision.ops' to the
    last bits, but no value is looked at, for which a GPU would have to be waited for.

    Source: Lin et al. 2017, Sec. 4.1 (smooth L1); the paper gives no beta, Detectron's is .11.

    Args:
        kind: a name in :data:`BOX_LOSSES`.
        predicted_deltas: (N, 4) dx, dy, dw, dh, any float type; computed in float32 or wider.
        anchors: (N, 4) pixels.
        target_boxes: (N, 4) pixels, each with width and height over 0.
        beta: of smooth_l1: an error e under it costs e^2 / (2 beta), one over it |e| - beta / 2.

    Returns:
        (N,) float32 or float64.

    Raises:
        ValueError: the kind is unknown, shapes differ, or beta is not over 0.
    """
    if kind not in BOX_LOSSES:
        raise ValueError(f"box loss is one of {', '.join(BOX_LOSSES)}, got {kind!r}")
    shapes = [tuple(one.shape) for one in (predicted_deltas, anchors, target_boxes)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2 or shapes[0][1] != 4:
        raise ValueError(f"deltas, anchors and boxes are (N, 4) each, got {shapes}")
    if not beta > 0:
        raise ValueError(f"beta must be over 0 (for 0 take the kind l1), got {beta}")
    wide = torch.float64 if predicted_deltas.dtype == torch.float64 else torch.float32
    return BOX_LOSSES[kind](
        predicted_deltas.to(wide), anchors.to(wide), target_boxes.to(wide), beta
    )


def _smooth_l1(deltas: Tensor, anchors: Tensor, boxes: Tensor, beta: float) -> Tensor:
    wanted = encode_boxes(anchors, boxes)
    return smooth_l1_loss(deltas, wanted, reduction="none", beta=beta).sum(dim=1)


def _l1(deltas: Tensor, anchors: Tensor, boxes: Tensor, beta: float) -> Tensor:
    return l1_loss(deltas, encode_boxes(anchors, boxes), reduction="none").sum(dim=1)


class _Pair(NamedTuple):
    """Two lists of boxes (N, 4) compared: all (N,).

    `width` and `height` are those of the smallest box around both.
    """

    iou: Tensor
    union: Tensor
    width: Tensor
    height: Tensor


def _compare(first: Tensor, second: Tensor) -> _Pair:
    corner, far_corner = torch.maximum(first, second), torch.minimum(first, second)
    # Of (x1, y1, x2, y2) the greater of the first two and the lesser of the last two.
    sides = far_corner[:, 2:] - corner[:, :2]
    overlap = torch.where((sides > 0).all(dim=1), sides[:, 0] * sides[:, 1], 0)
    # (torch's prod would look for zeros in its backward pass.)
    own, other = (one[:, 2:] - one[:, :2] for one in (first, second))
    union = own[:, 0] * own[:, 1] + other[:, 0] * other[:, 1] - overlap
    width, height = (corner[:, 2:] - far_corner[:, :2]).unbind(dim=1)
    return _Pair(overlap / (union + _EPSILON), union, width, height)


def _giou(predicted: Tensor, boxes: Tensor) -> Tensor:
    """1 - IoU + the share of the box around both that neither fills."""
    pair = _compare(predicted, boxes)
    around = pair.width * pair.height
    return 1 - (pair.iou - (around - pair.union) / (around + _EPSILON))


def _diou(predicted: Tensor, boxes: Tensor) -> Tensor:
    """1 - IoU + the centres' distance in diagonals of the box around both, squared."""
    return _diou_and_iou(predicted, boxes)[0]


def _ciou(predicted: Tensor, boxes: Tensor) -> Tensor:
    """DIoU's, and the squared difference of the aspect ratios' angles, weighted by the IoU."""
    diou, iou = _diou_and_iou(predicted, boxes)
    angles = []
    for one in (boxes, predicted):
        width, height = (one[:, 2:] - one[:, :2]).unbind(dim=1)
        angles.append(torch.atan(width / height))
    difference = 4 / math.pi**2 * (angles[0] - angles[1]) ** 2
    weight = (difference / (1 - iou + difference + _EPSILON)).detach()
    return diou + weight * difference


def _diou_and_iou(predicted: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    pair = _compare(predicted, boxes)
    centres = [(one[:, :2] + one[:, 2:]) / 2 for one in (predicted, boxes)]
    distance = ((centres[0] - centres[1]) ** 2).sum(dim=1)
    diagonal = pair.width**2 + pair.height**2 + _EPSILON
    return 1 - pair.iou + distance / diagonal, pair.iou


def _of_boxes(loss: Callable[[Tensor, Tensor], Tensor]) -> _BoxLoss:
    def of_deltas(deltas: Tensor, anchors: Tensor, boxes: Tensor, beta: float) -> Tensor:
        bounded = torch.cat((deltas[:, :2], deltas[:, 2:].clamp(min=_LEAST_LOG_SCALE)), dim=1)
        return loss(decode_boxes(bounded, anchors), boxes)

    return of_deltas


BOX_LOSSES: dict[str, _BoxLoss] = {
    "smooth_l1": _smooth_l1,
    "l1": _l1,
    "giou": _of_boxes(_giou),
    "diou": _of_boxes(_diou),
    "ciou": _of_boxes(_ciou),
}
"""Every kind of box loss by its name."""
