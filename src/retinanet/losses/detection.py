"""The two losses of a detector, from what the network says and the objects that are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from retinanet.boxes import decode_boxes
from retinanet.losses.box import box_loss
from retinanet.losses.classification import Alpha, Kind, weighted_label_loss
from retinanet.losses.mining import NEGATIVES_PER_POSITIVE, hard_examples
from retinanet.matching import anchor_labels, match_anchors
from retinanet.structures import (
    IGNORED,
    Outputs,
    Targets,
    flatten_level,
    flatten_levels,
    is_readable,
)

RUNNING_START = 100.0
"""Where detectron2 starts the running count of foreground anchors."""


class ClassificationLoss(Protocol):
    """From the levels' logits (B, R_l, K), the labels (B, R), the images' weights (B,) and the
    loss's numbers to the loss ().

    With `overwrite_logits` it may write over the logits, but need not.
    """

    def __call__(
        self,
        logits: Sequence[Tensor],
        labels: Tensor,
        weights: Tensor,
        alpha: Alpha,
        gamma: float,
        beta: float,
        *,
        margin: float = 0.5,
        overwrite_logits: bool = False,
    ) -> Tensor: ...


_NORMALIZERS = ("image", "batch", "running")
MININGS = ("none", *NEGATIVES_PER_POSITIVE)
"""Every choice of the anchors that the classification loss is of, by its name."""


@dataclass(frozen=True, slots=True)
class Losses:
    """The losses of a batch.

    Attributes:
        classification: ().
        box: (), already times its weight.
        foreground: (B,) int64 anchors of each image that answer for an object.
        normalizer: () what the sums of the batch were divided by; for ``image`` the mean over the
            images. With ``running`` this is the state to pass to the next step. (With mining it
            is the box loss's alone.)
    """

    classification: Tensor
    box: Tensor
    foreground: Tensor
    normalizer: Tensor

    @property
    def total(self) -> Tensor:
        """() what training minimises (Sec. 4.1: the sum of the two)."""
        return self.classification + self.box


def detection_losses(
    outputs: Outputs,
    anchors: Sequence[Tensor],
    targets: Targets,
    *,
    num_classes: int,
    classification: str = "focal",
    alpha: Alpha = 0.25,
    gamma: float = 2.0,
    beta: float = 0.0,
    margin: float = 0.5,
    mining: str = "none",
    mining_size: int = 128,
    mining_nms: float = 0.7,
    box: str = "smooth_l1",
    box_beta: float = 0.11,
    box_weight: float = 1.0,
    normalizer: str = "image",
    foreground_iou: float = 0.5,
    background_iou: float = 0.4,
    low_quality_matches: bool = False,
    running: Tensor | None = None,
    world_foreground: Callable[[Tensor], Tensor] | None = None,
    overwrite_logits: bool = False,
) -> Losses:
    """Classification and box loss of a batch; both depend on every output, objects or none.

    Source: Lin et al. 2017, Sec. 4.1: the sum over all anchors of an image, divided by the number
    of anchors assigned to an object. Mining: Sec. 5.1, "Online Hard Example Mining".

    Args:
        outputs: of the network for B images.
        anchors: L tensors (R_l, 4), as :func:`retinanet.anchors.level_anchors` gives them.
        targets: the objects of the B images.
        num_classes: K.
        classification: a name in :data:`CLASSIFICATION_LOSSES`.
        alpha, gamma, beta, margin: of that loss; `gamma` is of focal and focal_star, `beta` of
            focal_star, `margin` of hinge.
        mining: a name in :data:`MININGS`: which anchors the classification loss is of. ``none``:
            all; ``ohem``: the hardest of each image, as :func:`retinanet.losses.mining
            .hard_examples` has it; ``ohem_1_3``: with three negatives to a positive. Each image's
            loss is then the mean over the anchors kept, and the batch's the mean over images,
            whatever the normalizer. (The paper does not say what it divides by; Shrivastava et al.
            2016 take the loss of the minibatch, which is its mean.) A GPU is waited for.
        mining_size: anchors kept, an image.
        mining_nms: the IoU over which the easier of two predicted boxes goes.
        box: a name in :data:`retinanet.losses.BOX_LOSSES`.
        box_beta: of smooth_l1.
        box_weight: factor of the box loss.
        normalizer: what the sums are divided by (with mining that of the boxes alone), with n the
            number of foreground anchors:
            ``image``: each image's sum by max(1, its n), then the mean over images (the paper,
            torchvision). ``batch``: by max(1, n of the batch). ``running``: by the moving average
            of the batch's n (detectron2), this batch's included.
        foreground_iou, background_iou, low_quality_matches: as
            :func:`retinanet.matching.match_anchors`.
        running: () the moving average so far, needed for ``running``: RUNNING_START at first, then
            the last step's ``Losses.normalizer``. Nothing is kept in here between calls.
        world_foreground: for ``batch`` and ``running`` in several processes: maps the process's
            n () to max(1, n of all processes) / number of processes. With gradients averaged over
            processes the step is then that of one process with the whole batch.
        overwrite_logits: the gradient of the class loss may be written over ``outputs.logits``,
            which saves as much memory as they take; in the heads' channels_last layout all of it.
            Only where nobody reads them afterwards and the losses go backward once.

    Returns:
        the losses, float32 (float64 for float64 outputs).

    Raises:
        ValueError: shapes do not fit each other, a name is unknown, a number is out of range, or
            ``running`` lacks its state.
    """
    _check_levels(outputs, anchors, len(targets.boxes), num_classes)
    for name, value, known in (
        ("classification loss", classification, CLASSIFICATION_LOSSES),
        ("mining", mining, MININGS),
        ("normalizer", normalizer, _NORMALIZERS),
    ):
        if value not in known:
            raise ValueError(f"{name} is one of {', '.join(known)}, got {value!r}")
    every_anchor = torch.cat(list(anchors))
    matches = match_anchors(
        every_anchor,
        targets,
        foreground_iou=foreground_iou,
        background_iou=background_iou,
        low_quality_matches=low_quality_matches,
    )
    labels = anchor_labels(matches, targets.labels)
    foreground = (matches >= 0).sum(dim=1)
    divisors, shown = _divisors(foreground, normalizer, running, world_foreground)
    wide = torch.float64 if outputs.logits[0].dtype == torch.float64 else torch.float32
    weights = divisors.to(wide).reciprocal()
    logits = [flatten_level(level, num_classes) for level in outputs.logits]
    class_weights = weights
    if mining != "none":
        labels = hard_examples(
            logits,
            labels,
            decode_boxes(flatten_levels(outputs.deltas, 4).detach(), every_anchor),
            size=mining_size,
            nms_threshold=mining_nms,
            negatives_per_positive=NEGATIVES_PER_POSITIVE[mining],
        )
        kept = (labels != IGNORED).sum(dim=1).clamp(min=1)
        class_weights = (kept * len(kept)).to(wide).reciprocal()
    class_loss = CLASSIFICATION_LOSSES[classification](
        logits,
        labels,
        class_weights,
        alpha,
        gamma,
        beta,
        margin=margin,
        overwrite_logits=overwrite_logits,
    )
    boxes_loss = _box_losses(outputs, every_anchor, targets, matches, weights, box, box_beta)
    return Losses(class_loss, boxes_loss * box_weight, foreground, shown)


def update_running(running: Tensor, foreground_total: Tensor) -> Tensor:
    """The moving average of a batch's foreground anchors after one more batch.

    Source: detectron2, ``DenseDetector._ema_update``: momentum .9 and at least 1 a batch.

    Args:
        running: () the average so far, RUNNING_START at first.
        foreground_total: () this batch's number.

    Returns:
        () a new tensor.
    """
    return _moved(running, foreground_total.to(running.dtype).clamp(min=1))


def _moved(running: Tensor, count: Tensor) -> Tensor:
    return 0.9 * running + 0.1 * count


def _divisors(
    foreground: Tensor,
    normalizer: str,
    running: Tensor | None,
    world_foreground: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """What each image's sums are divided by (B,), and ``Losses.normalizer`` ()."""
    if normalizer == "image":
        own = foreground.clamp(min=1).float()
        return own * len(own), own.mean()
    count = foreground.sum()
    # The floor of 1 is the whole batch's: a share of it may well be less.
    count = count.float().clamp(min=1) if world_foreground is None else world_foreground(count)
    count = count.float()
    if normalizer == "batch":
        used = count
    elif running is None:
        raise ValueError(
            "normalizer 'running' needs its state: pass running, "
            f"at first torch.tensor({RUNNING_START})"
        )
    else:
        running = running.to(count.device)
        used = _moved(running, count.to(running.dtype))
    return used.expand(len(foreground)), used


def _of_labels(kind: Kind, **fixed: float) -> ClassificationLoss:
    """A loss that sums over all anchors of all levels, with `fixed` in the place of its numbers.

    It goes level by level: in channels_last memory no logit is copied.
    """

    def loss(
        logits: Sequence[Tensor],
        labels: Tensor,
        weights: Tensor,
        alpha: Alpha,
        gamma: float,
        beta: float,
        *,
        margin: float = 0.5,
        overwrite_logits: bool = False,
    ) -> Tensor:
        total = weights.new_zeros(())
        rows = [level.shape[1] for level in logits]
        for level, level_labels in zip(logits, torch.split(labels, rows, dim=1), strict=True):
            total = total + weighted_label_loss(
                level.flatten(0, 1),
                level_labels.flatten(),
                weights[:, None].expand_as(level_labels).flatten(),
                kind=kind,
                gamma=fixed.get("gamma", gamma),
                beta=fixed.get("beta", beta),
                margin=margin,
                alpha=alpha,
                overwrite_logits=overwrite_logits,
            )
        return total

    return loss


CLASSIFICATION_LOSSES: dict[str, ClassificationLoss] = {
    "focal": _of_labels("focal", beta=0.0),
    "cross_entropy": _of_labels("focal", gamma=0.0, beta=0.0),
    "focal_star": _of_labels("focal_star"),
    "hinge": _of_labels("hinge"),
}
"""Every classification loss of a detector by its name."""


def _box_losses(
    outputs: Outputs,
    anchors: Tensor,
    targets: Targets,
    matches: Tensor,
    weights: Tensor,
    kind: str,
    beta: float,
) -> Tensor:
    """The weighted box losses of the foreground anchors; an empty sum still has a gradient."""
    deltas = flatten_levels(outputs.deltas, 4)
    # Selecting the foreground anchors reads values: a GPU would have to be waited for.
    way = _of_foreground if is_readable(matches) else _of_all_anchors
    return way(deltas, anchors, targets, matches, weights, kind, beta)


def _of_foreground(
    deltas: Tensor,
    anchors: Tensor,
    targets: Targets,
    matches: Tensor,
    weights: Tensor,
    kind: str,
    beta: float,
) -> Tensor:
    image, row = (matches >= 0).nonzero(as_tuple=True)
    boxes = targets.boxes[image, matches[image, row]]
    losses = box_loss(kind, deltas[image, row], anchors[row], boxes, beta=beta)
    return (losses * weights[image]).sum()


def _of_all_anchors(
    deltas: Tensor,
    anchors: Tensor,
    targets: Targets,
    matches: Tensor,
    weights: Tensor,
    kind: str,
    beta: float,
) -> Tensor:
    """:func:`_of_foreground` without a look at any value.

    An anchor without an object is put on its own place, which costs nothing and has no gradient
    whatever the network says of it.
    """
    found = matches >= 0
    places = anchors.expand(len(matches), -1, -1)
    boxes = places
    if targets.boxes.shape[1]:
        objects = matches.clamp(min=0)[..., None].expand(-1, -1, 4)
        boxes = targets.boxes.gather(1, objects).where(found[..., None], places)
    deltas = deltas.where(found[..., None], 0)
    losses = box_loss(
        kind, deltas.flatten(0, 1), places.flatten(0, 1), boxes.flatten(0, 1), beta=beta
    )
    losses = losses.view(matches.shape).where(found, 0)
    return (losses.sum(dim=1) * weights).sum()


def _check_levels(
    outputs: Outputs, anchors: Sequence[Tensor], images: int, num_classes: int
) -> None:
    counts = {len(outputs.logits), len(outputs.deltas), len(anchors)}
    if len(counts) > 1 or not anchors:
        raise ValueError(
            f"logits, deltas and anchors have {len(outputs.logits)}, {len(outputs.deltas)} and "
            f"{len(anchors)} levels"
        )
    for level, (logits, deltas, boxes) in enumerate(
        zip(outputs.logits, outputs.deltas, anchors, strict=True)
    ):
        batch, _, rows, columns = logits.shape
        per_cell = deltas.shape[1] // 4
        expected = (batch, per_cell * num_classes, rows, columns)
        if (
            tuple(logits.shape) != expected
            or tuple(deltas.shape) != (batch, per_cell * 4, rows, columns)
            or len(boxes) != rows * columns * per_cell
            or batch != images
        ):
            raise ValueError(
                f"level {level}: logits {tuple(logits.shape)}, deltas {tuple(deltas.shape)} and "
                f"{len(boxes)} anchors do not fit {images} images and "
                f"{num_classes} classes"
            )
