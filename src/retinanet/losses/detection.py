"""Classification and box losses of a detector, from its outputs and the ground truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor
from torch.nn.functional import l1_loss, smooth_l1_loss

from retinanet import own
from retinanet.boxes import decode_boxes, encode_boxes, side_distances
from retinanet.config import LossConfig, LossSettings, is_own
from retinanet.losses.assignment import Assignment, assign_anchors
from retinanet.losses.focal import make_formula, weighted_sum
from retinanet.losses.ohem import NEGATIVES_PER_POSITIVE, hard_examples
from retinanet.matching import anchor_labels
from retinanet.structures import (
    IGNORED,
    Outputs,
    Targets,
    flatten_level,
    flatten_levels,
    is_readable,
)

RUNNING_START = 100.0
"""Initial moving average of the number of foreground anchors (detectron2)."""

BOX_LOSSES: tuple[str, ...] = get_args(LossConfig.model_fields["box"].annotation)
"""Every kind of box loss."""

# e^-10 of an anchor's side: far below it float32 has no width left, and CIoU divides by the height.
_MIN_LOG_SCALE = -10.0

_EPSILON = 1e-7  # against division by 0, as in torchvision


@dataclass(frozen=True, slots=True)
class Losses:
    """The losses of a batch.

    Attributes:
        classification: ().
        box: (), already times its weight; with distributions their loss, times its own, is added.
        foreground: (B,) int64 number of foreground anchors per image.
        normalizer: () divisor of the batch's sums (with mining the box loss's); for ``image`` the
            mean over the images. With ``running`` this is the state to pass to the next step.
    """

    classification: Tensor
    box: Tensor
    foreground: Tensor
    normalizer: Tensor

    @property
    def total(self) -> Tensor:
        """() the sum of the two, which training minimises (Sec. 4.1)."""
        return self.classification + self.box


def detection_losses(
    outputs: Outputs,
    anchors: Sequence[Tensor],
    targets: Targets,
    *,
    num_classes: int,
    settings: LossSettings | None = None,
    running: Tensor | None = None,
    world_foreground: Callable[[Tensor], Tensor] | None = None,
    overwrite_logits: bool = False,
) -> Losses:
    """Compute the classification and box loss of a batch.

    Both depend on every output, with or without objects, so that each parameter has a gradient.
    Distributions of the boxes' sides add theirs to the box loss (Li et al. 2020, Sec. 3.3).

    Source: Lin et al. 2017, Sec. 4.1: the sum over all anchors of an image, divided by the number
    of anchors assigned to an object. Mining: Sec. 5.1, "Online Hard Example Mining"; each image's
    classification loss is then the mean over the anchors kept, and the batch's the mean over the
    images, whatever the normalizer. (The paper does not say what it divides by; Shrivastava et al.
    2016 take the mean over the minibatch.) Mining needs device syncs.

    Args:
        outputs: of the network for B images.
        anchors: L tensors (R_l, 4), as :func:`retinanet.anchors.level_anchors` returns them.
        targets: the objects of the B images.
        num_classes: K.
        settings: the losses, their parameters and the matching; None: the paper's. ``normalizer``
            is the divisor of the sums, with n the number of foreground anchors: ``image``:
            each image's sum by max(1, its n), then the mean over the images (the paper,
            torchvision); ``batch``: by max(1, n of the batch); ``running``: by the moving average
            of the batch's n (detectron2), this batch's included.
        running: () the moving average so far, needed for ``running``: RUNNING_START at first, then
            the last step's ``Losses.normalizer``. No state is kept between calls.
        world_foreground: for ``batch`` and ``running`` in several processes: maps the process's
            n () to max(1, n of all processes) / number of processes. With gradients averaged over
            processes the step then equals that of one process with the whole batch.
        overwrite_logits: allow the gradient of the classification loss to be written over
            ``outputs.logits``, which saves as much memory as they take in the heads' channels_last
            layout. Only where nothing reads them afterwards and backward runs once.

    Returns:
        the losses, float32 (float64 for float64 outputs).

    Raises:
        ValueError: shapes do not fit each other, or ``running`` lacks its state.
    """
    settings = LossSettings() if settings is None else settings
    _check_levels(outputs, anchors, len(targets.boxes), num_classes)
    all_anchors = torch.cat(list(anchors))
    assignment = assign_anchors(
        outputs, anchors, targets, num_classes=num_classes, settings=settings
    )
    matches = assignment.matches
    labels = anchor_labels(matches, targets.labels)
    divisors, normalizer = _divisors(
        assignment.weight, settings.normalizer, running, world_foreground
    )
    working = torch.float64 if outputs.logits[0].dtype == torch.float64 else torch.float32
    weights = divisors.to(working).reciprocal()
    logits = [flatten_level(level, num_classes) for level in outputs.logits]
    class_weights = weights
    if settings.mining != "none":
        labels = hard_examples(
            logits,
            labels,
            decode_boxes(flatten_levels(outputs.deltas, 4).detach(), all_anchors),
            size=settings.mining_size,
            nms_threshold=settings.mining_nms,
            negatives_per_positive=NEGATIVES_PER_POSITIVE[settings.mining],
        )
        kept = (labels != IGNORED).sum(dim=1).clamp(min=1)
        class_weights = (kept * len(kept)).to(working).reciprocal()
    scores = assignment.scores
    class_loss = classification_loss(
        logits, labels, class_weights, settings, scores=scores, overwrite_logits=overwrite_logits
    )
    box = _box_losses(outputs, all_anchors, targets, assignment, settings) * settings.box_weight
    box = box + _distribution_losses(outputs, anchors, targets, assignment, settings)
    return Losses(class_loss, (box * weights).sum(), (matches >= 0).sum(dim=1), normalizer)


def classification_loss(
    logits: Sequence[Tensor],
    labels: Tensor,
    weights: Tensor,
    settings: LossConfig,
    *,
    scores: Tensor | None = None,
    overwrite_logits: bool = False,
) -> Tensor:
    """Sum a classification loss over all anchors of all levels.

    Level by level: in channels_last memory no logit is copied.

    Args:
        logits: L tensors (B, R_l, K).
        labels: (B, R) class 0..K-1, BACKGROUND or IGNORED.
        weights: (B,) factors of the images.
        settings: the kind of loss and its parameters.
        scores: (B, R) target of each foreground anchor's class; None: 1.
        overwrite_logits: as in :func:`detection_losses`.

    Returns:
        () float32 or float64.

    Raises:
        ValueError: shapes do not fit.
    """
    rows = [level.shape[1] for level in logits]
    if labels.dim() != 2 or weights.shape != labels.shape[:1] or sum(rows) != labels.shape[1]:
        raise ValueError(
            "the classification loss takes logits (B, R_l, K) per level, labels (B, R) and weights "
            f"(B,), got {[tuple(level.shape) for level in logits]}, {tuple(labels.shape)} and "
            f"{tuple(weights.shape)}"
        )
    kind = settings.classification
    if is_own(kind):
        return own.classification_loss(kind, torch.cat(list(logits), dim=1), labels, weights)
    if kind == "cross_entropy":
        formula = make_formula("focal", gamma=0.0)
    else:
        formula = make_formula(
            kind, gamma=settings.gamma, beta=settings.beta, margin=settings.margin
        )
    total = weights.new_zeros(())
    split_scores = [None] * len(rows) if scores is None else torch.split(scores, rows, dim=1)
    for level, level_labels, level_scores in zip(
        logits, torch.split(labels, rows, dim=1), split_scores, strict=True
    ):
        total = total + weighted_sum(
            level.flatten(0, 1),
            level_labels.flatten(),
            weights[:, None].expand_as(level_labels).flatten(),
            formula,
            settings.alpha,
            scores=None if level_scores is None else level_scores.flatten(),
            overwrite_logits=overwrite_logits,
        )
    return total


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
    return _overlap_loss(kind, predicted, boxes)


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


def _divisors(
    foreground: Tensor,
    normalizer: str,
    running: Tensor | None,
    world_foreground: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Return what each image's sums are divided by (B,), and ``Losses.normalizer`` ().

    `foreground` (B,) is the number of foreground anchors, or the sum of their targets.
    """
    if normalizer == "image":
        count = foreground.clamp(min=1).float()
        return count * len(count), count.mean()
    total = foreground.sum()
    # The minimum of 1 is the whole batch's: a process's share of it may be less.
    total = total.float().clamp(min=1) if world_foreground is None else world_foreground(total)
    total = total.float()
    if normalizer == "running":
        if running is None:
            raise ValueError(
                "normalizer 'running' needs its state: pass running, "
                f"at first torch.tensor({RUNNING_START})"
            )
        running = running.to(total.device)
        # detectron2, DenseDetector._ema_update: momentum .9, and at least 1 per batch.
        total = 0.9 * running + 0.1 * total.to(running.dtype)
    return total.expand(len(foreground)), total


def _box_losses(
    outputs: Outputs,
    anchors: Tensor,
    targets: Targets,
    assignment: Assignment,
    settings: LossConfig,
) -> Tensor:
    """Sum the box losses of each image's foreground anchors, (B,); 0 still has a gradient.

    Each is weighted by the anchor's classification target.
    """
    deltas, matches, scores = (
        flatten_levels(outputs.deltas, 4),
        assignment.matches,
        assignment.scores,
    )
    kind, beta, foreground = settings.box, settings.box_beta, matches >= 0
    if is_readable(matches):
        image, row = foreground.nonzero(as_tuple=True)
        boxes = targets.boxes[image, matches[image, row]]
        losses = box_loss(kind, deltas[image, row], anchors[row], boxes, beta=beta)
        losses = losses if scores is None else losses * scores[image, row]
        return losses.new_zeros(len(matches)).index_add(0, image, losses)
    # Selecting the foreground would need a device sync. Instead an anchor without an object gets
    # itself as its box, and deltas of 0 without a gradient.
    losses = box_loss(
        kind,
        deltas.where(foreground[..., None], 0).flatten(0, 1),
        anchors.expand(len(matches), -1, -1).flatten(0, 1),
        _boxes_or_anchors(anchors, targets, matches).flatten(0, 1),
        beta=beta,
    )
    losses = losses.view(matches.shape).where(foreground, 0)
    return (losses if scores is None else losses * scores).sum(dim=1)


def _distribution_losses(
    outputs: Outputs,
    anchors: Sequence[Tensor],
    targets: Targets,
    assignment: Assignment,
    settings: LossConfig,
) -> Tensor:
    """Sum the distribution focal losses of each image's foreground anchors, (B,), weighted.

    Each is the mean over the four sides (Li et al. 2020, published code) and weighted by the
    anchor's classification target, as the box loss.
    """
    matches, scores = assignment.matches, assignment.scores
    rows = [len(boxes) for boxes in anchors]
    total = matches.new_zeros(len(matches), dtype=torch.float32)
    if not outputs.distributions or not settings.distribution_weight:
        return total
    # Level by level: in channels_last memory no logit is copied but those selected.
    for level, deltas, boxes, objects, weights in zip(
        outputs.distributions,
        outputs.deltas,
        anchors,
        torch.split(matches, rows, dim=1),
        torch.split(matches >= 0 if scores is None else scores, rows, dim=1),
        strict=True,
    ):
        bins = level.shape[1] // deltas.shape[1]
        logits = flatten_level(level, 4 * bins).view(len(level), -1, 4, bins)
        foreground = objects >= 0
        if is_readable(matches):
            image, row = foreground.nonzero(as_tuple=True)
            distances = side_distances(boxes[row], targets.boxes[image, objects[image, row]])
            losses = distribution_focal_loss(logits[image, row], distances).mean(dim=-1)
            sums = losses.new_zeros(len(objects)).index_add(0, image, losses * weights[image, row])
        else:
            distances = side_distances(boxes, _boxes_or_anchors(boxes, targets, objects))
            logits = logits.where(foreground[..., None, None], 0)
            losses = distribution_focal_loss(logits, distances).mean(dim=-1)
            sums = (losses * weights).where(foreground, 0).sum(dim=1)
        total = total + sums
    return total * settings.distribution_weight


def _boxes_or_anchors(anchors: Tensor, targets: Targets, matches: Tensor) -> Tensor:
    """Return the box (B, R, 4) of each anchor's object, and itself without one; no device sync."""
    if not targets.boxes.shape[1]:
        return anchors.expand(len(matches), -1, -1)
    objects = matches.clamp(min=0)[..., None].expand(-1, -1, 4)
    return targets.boxes.gather(1, objects).where((matches >= 0)[..., None], anchors)


def _check_levels(
    outputs: Outputs, anchors: Sequence[Tensor], images: int, num_classes: int
) -> None:
    has_distributions = bool(outputs.distributions)
    distributions = outputs.distributions or outputs.deltas
    counts = {len(outputs.logits), len(outputs.deltas), len(distributions), len(anchors)}
    if len(counts) > 1 or not anchors:
        raise ValueError(
            f"logits, deltas and anchors have {len(outputs.logits)}, {len(outputs.deltas)} and "
            f"{len(anchors)} levels" + f", distributions {len(distributions)}" * has_distributions
        )
    for level, (logits, deltas, distribution, boxes) in enumerate(
        zip(outputs.logits, outputs.deltas, distributions, anchors, strict=True)
    ):
        batch, _, rows, columns = logits.shape
        per_cell = deltas.shape[1] // 4
        expected = (batch, per_cell * num_classes, rows, columns)
        if (
            tuple(logits.shape) != expected
            or tuple(deltas.shape) != (batch, per_cell * 4, rows, columns)
            or distribution.shape[1] % (per_cell * 4)
            or distribution[:, : per_cell * 4].shape != deltas.shape
            or len(boxes) != rows * columns * per_cell
            or batch != images
        ):
            raise ValueError(
                f"level {level}: logits {tuple(logits.shape)}, deltas {tuple(deltas.shape)}"
                + f", distributions {tuple(distribution.shape)}" * has_distributions
                + f" and {len(boxes)} anchors do not fit {images} images and {num_classes} classes"
            )


def _overlap_loss(kind: str, predicted: Tensor, boxes: Tensor) -> Tensor:
    """Compute ``giou``, ``diou`` or ``ciou`` of boxes (N, 4): (N,)."""
    larger, smaller = torch.maximum(predicted, boxes), torch.minimum(predicted, boxes)
    sides = smaller[:, 2:] - larger[:, :2]
    overlap = torch.where((sides > 0).all(dim=1), sides[:, 0] * sides[:, 1], 0)
    # (torch's prod would search for zeros in its backward pass.)
    sizes = [corners[:, 2:] - corners[:, :2] for corners in (predicted, boxes)]
    areas = [size[:, 0] * size[:, 1] for size in sizes]
    union = areas[0] + areas[1] - overlap
    iou = overlap / (union + _EPSILON)
    width, height = (larger[:, 2:] - smaller[:, :2]).unbind(dim=1)  # of the enclosing box
    if kind == "giou":
        # 1 - IoU + the share of the enclosing box that neither box fills
        enclosing = width * height
        return 1 - (iou - (enclosing - union) / (enclosing + _EPSILON))
    # 1 - IoU + the squared distance of the centres relative to the enclosing box's diagonal
    centres = [(corners[:, :2] + corners[:, 2:]) / 2 for corners in (predicted, boxes)]
    distance = ((centres[0] - centres[1]) ** 2).sum(dim=1)
    diou = 1 - iou + distance / (width**2 + height**2 + _EPSILON)
    if kind == "diou":
        return diou
    # + the squared difference of the aspect ratios' angles, weighted
    angles = [torch.atan(size[:, 0] / size[:, 1]) for size in sizes]
    difference = 4 / math.pi**2 * (angles[1] - angles[0]) ** 2
    weight = (difference / (1 - iou + difference + _EPSILON)).detach()
    return diou + weight * difference
