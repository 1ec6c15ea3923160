"""Losses: classification (Lin et al. 2017, Sec. 3), boxes, and both for a detector's outputs."""

from retinanet.losses.assignment import Assignment, assign_anchors
from retinanet.losses.detection import (
    BOX_LOSSES,
    RUNNING_START,
    Losses,
    box_loss,
    classification_loss,
    detection_losses,
    distribution_focal_loss,
)
from retinanet.losses.focal import (
    cross_entropy,
    focal_loss,
    focal_loss_star,
    hinge_loss,
    quality_focal_loss,
    varifocal_loss,
)
from retinanet.losses.modules import FocalLoss, softmax_focal_loss
from retinanet.losses.ohem import hard_examples

__all__ = [
    "BOX_LOSSES",
    "RUNNING_START",
    "Assignment",
    "FocalLoss",
    "Losses",
    "assign_anchors",
    "box_loss",
    "classification_loss",
    "cross_entropy",
    "detection_losses",
    "distribution_focal_loss",
    "focal_loss",
    "focal_loss_star",
    "hard_examples",
    "hinge_loss",
    "quality_focal_loss",
    "softmax_focal_loss",
    "varifocal_loss",
]
