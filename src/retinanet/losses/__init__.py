"""Losses: of the classes (Lin et al. 2017, Sec. 3), of the boxes, and of a detector's outputs."""

from retinanet.losses.box import BOX_LOSSES, box_loss
from retinanet.losses.classification import (
    cross_entropy,
    focal_loss,
    focal_loss_star,
    hinge_loss,
)
from retinanet.losses.detection import (
    CLASSIFICATION_LOSSES,
    MININGS,
    RUNNING_START,
    Losses,
    detection_losses,
    update_running,
)
from retinanet.losses.mining import hard_examples

__all__ = [
    "BOX_LOSSES",
    "CLASSIFICATION_LOSSES",
    "MININGS",
    "RUNNING_START",
    "Losses",
    "box_loss",
    "cross_entropy",
    "detection_losses",
    "focal_loss",
    "focal_loss_star",
    "hard_examples",
    "hinge_loss",
    "update_running",
]
