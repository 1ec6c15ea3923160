"""Losses of the boxes of foreground anchors."""

from __future__ import annotations

import math
from typing import NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import l1_loss, smooth_l1_loss

from retinanet import own
from retinanet.boxes import decode_boxes, encode_boxes
from retinanet.config import LossConfig, is_own

BOX_LOSSES: tuple[str, ...] = get_args(LossConfig.model_fields["box"].annotation)
"""Every kind of box loss."""

# e^-10 of an anchor's side: far below it float32 has no width left, and CIoU divides by the height.
_MIN_LOG_SCALE = -10.0

_EPSILON = 1e-7  # against division by 0, as in torchvision


def box_loss(
    kind: str,
    predicted_deltas: Tensor,
    anchors: Tensor,
    target_boxes: Tensor,
    *,
    beta: float = LossConfig().box_beta,
) -> Tensor:
    """Compute the loss of each predicted box.

    ``smooth_l1`` (Girshick 2015, Eq. 3, with the corner at `beta`) and ``l1`` compare the four
    deltas and are summed over them. ``giou`` (Rezatofighi et al. 2019), ``diou`` and ``ciou``
    (Zheng et al. 2020) compare the decoded boxes. They equal torchvision.ops' up to rounding, but
    need no device sync.

    Source: Lin et al. 2017, Sec. 4.1 (smooth L1); the paper gives no beta, Detectron's is .11.

    Args:
        kind: a name in :data:`BOX_LOSSES`, or ``module:NAME`` of an own one.
        predicted_deltas: (N, 4) dx, dy, dw, dh, any float type; computed in float32 or wider.
        anchors: (N, 4) pixels.
        target_boxes: (N, 4) pixels, each with width and height above 0.
        beta: of smooth_l1: an error e below it costs e^2 / (2 beta), one above it |e| - beta / 2.

    Returns:
        (N,) float32 or float64.

    Raises:
        ValueError: the kind is unknown, shapes differ, or beta is not above 0.
    """
    if kind not in BOX_LOSSES and not is_own(kind):
        raise ValueError(f"box loss is one of {', '.join(BOX_LOSSES)}, got {kind!r}")
    shapes = [tuple(values.shape) for values in (predicted_deltas, anchors, target_boxes)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2 or shapes[0][1] != 4:
        raise ValueError(f"deltas, anchors and boxes are (N, 4) each, got {shapes}")
    if not beta > 0:
        raise ValueError(f"beta must be over 0 (for 0 take the kind l1), got {beta}")
    working = torch.float64 if predicted_deltas.dtype == torch.float64 else torch.float32
    deltas, anchors = predicted_deltas.to(working), anchors.to(working)
    boxes = target_boxes.to(working)
    if kind == "l1":
        return l1_loss(deltas, encode_boxes(anchors, boxes), reduction="none").sum(dim=1)
    if kind == "smooth_l1":
        targets = encode_boxes(anchors, boxes)
        return smooth_l1_loss(deltas, targets, reduction="none", beta=beta).sum(dim=1)
    bounded = torch.cat((deltas[:, :2], deltas[:, 2:].clamp(min=_MIN_LOG_SCALE)), dim=1)
    predicted = decode_boxes(bounded, anchors)
    if is_own(kind):
        return own.box_loss(kind, predicted, boxes)
    pair = _compare(predicted, boxes)
    if kind == "giou":
        # 1 - IoU + the share of the enclosing box that neither box fills
        enclosing = pair.width * pair.height
        return 1 - (pair.iou - (enclosing - pair.union) / (enclosing + _EPSILON))
    # 1 - IoU + the squared distance of the centres relative to the enclosing box's diagonal
    centres = [(corners[:, :2] + corners[:, 2:]) / 2 for corners in (predicted, boxes)]
    distance = ((centres[0] - centres[1]) ** 2).sum(dim=1)
    diou = 1 - pair.iou + distance / (pair.width**2 + pair.height**2 + _EPSILON)
    if kind == "diou":
        return diou
    # + the squared difference of the aspect ratios' angles, weighted
    difference = 4 / math.pi**2 * (_angle(boxes) - _angle(predicted)) ** 2
    weight = (difference / (1 - pair.iou + difference + _EPSILON)).detach()
    return diou + weight * difference


def distribution_focal_loss(logits: Tensor, distances: Tensor) -> Tensor:
    r"""Distribution focal loss: cross entropy with the two bins around each distance.

    .. math:: DFL(S_i, S_{i+1}) = -((y_{i+1} - y) \log S_i + (y - y_i) \log S_{i+1})

    Source: Li et al. 2020 (arXiv:2006.04388), Sec. 3.3, Eq. 6. As in the published code distances
    are clamped to [0, n - .1].

    Args:
        logits: (..., n + 1) of a softmax over the distances 0..n, any float type; computed in
            float32 or wider.
        distances: (...) targets, in bins.

    Returns:
        (...) float32 or float64; at least the entropy of the two weights, 0 for whole distances.

    Raises:
        ValueError: shapes differ, or there are fewer than two bins.

    Example: a distance of 1.25 is 3/4 of bin 1 and 1/4 of bin 2, here of probability 1/3 each.

        >>> round(float(distribution_focal_loss(torch.zeros(1, 3), torch.tensor([1.25]))), 4)
        1.0986
    """
    if logits.shape[:-1] != distances.shape or logits.shape[-1:] < (2,):
        raise ValueError(
            f"distributions are (..., n + 1) for distances (...), n >= 1, got "
            f"{tuple(logits.shape)} and {tuple(distances.shape)}"
        )
    working = torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_p = logits.to(working).log_softmax(dim=-1)
    target = distances.detach().to(working).clamp(0, logits.shape[-1] - 1 - 0.1)
    lower = target.long()
    share = target - lower
    pair = log_p.gather(-1, torch.stack((lower, lower + 1), dim=-1))
    return -(pair[..., 0] * (1 - share) + pair[..., 1] * share)


class _Pair(NamedTuple):
    """Comparison of two lists of boxes (N, 4): all (N,); sides are the enclosing box's."""

    iou: Tensor
    union: Tensor
    width: Tensor
    height: Tensor


def _compare(first: Tensor, second: Tensor) -> _Pair:
    larger, smaller = torch.maximum(first, second), torch.minimum(first, second)
    sides = smaller[:, 2:] - larger[:, :2]
    overlap = torch.where((sides > 0).all(dim=1), sides[:, 0] * sides[:, 1], 0)
    # (torch's prod would search for zeros in its backward pass.)
    sizes = [boxes[:, 2:] - boxes[:, :2] for boxes in (first, second)]
    areas = [size[:, 0] * size[:, 1] for size in sizes]
    union = areas[0] + areas[1] - overlap
    width, height = (larger[:, 2:] - smaller[:, :2]).unbind(dim=1)
    return _Pair(overlap / (union + _EPSILON), union, width, height)


def _angle(boxes: Tensor) -> Tensor:
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(dim=1)
    return torch.atan(width / height)
