"""Losses of the boxes of foreground anchors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import l1_loss, smooth_l1_loss
from torchvision.ops import (
    complete_box_iou_loss,
    distance_box_iou_loss,
    generalized_box_iou_loss,
)

from retinanet.boxes import decode_boxes, encode_boxes

# (deltas, anchors, boxes, beta) -> (N,), all float32 or wider.
_BoxLoss = Callable[[Tensor, Tensor, Tensor, float], Tensor]

# e^-10 of an anchor's side: far under it float32 has no width left, and CIoU divides by the height.
_LEAST_LOG_SCALE = -10.0


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
    (Zheng et al. 2020) compare the boxes that the deltas lead to, as torchvision.ops has them.

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


def _of_boxes(loss: Callable[[Tensor, Tensor], Tensor]) -> _BoxLoss:
    def of_deltas(deltas: Tensor, anchors: Tensor, boxes: Tensor, beta: float) -> Tensor:
        bounded = torch.cat((deltas[:, :2], deltas[:, 2:].clamp(min=_LEAST_LOG_SCALE)), dim=1)
        return loss(decode_boxes(bounded, anchors), boxes)

    return of_deltas


BOX_LOSSES: dict[str, _BoxLoss] = {
    "smooth_l1": _smooth_l1,
    "l1": _l1,
    "giou": _of_boxes(generalized_box_iou_loss),
    "diou": _of_boxes(distance_box_iou_loss),
    "ciou": _of_boxes(complete_box_iou_loss),
}
"""Every kind of box loss by its name."""
