"""RetinaNet and Focal Loss (Lin et al. 2017, arXiv:1708.02002).

Public names are imported on first access (PEP 562), so ``import retinanet`` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retinanet.anchors import AnchorSpec as AnchorSpec
    from retinanet.anchors import anchor_spec as anchor_spec
    from retinanet.anchors import feature_sizes as feature_sizes
    from retinanet.anchors import level_anchors as level_anchors
    from retinanet.api import train as train
    from retinanet.boxes import clip_boxes as clip_boxes
    from retinanet.boxes import decode_boxes as decode_boxes
    from retinanet.boxes import encode_boxes as encode_boxes
    from retinanet.config import LossSettings as LossSettings
    from retinanet.config import ModelSpec as ModelSpec
    from retinanet.config import Recipe as Recipe
    from retinanet.config import load_recipe as load_recipe
    from retinanet.data import read_dataset as read_dataset
    from retinanet.data import read_splits as read_splits
    from retinanet.data.check import check_datasets as check_datasets
    from retinanet.data.dataset import Dataset as Dataset
    from retinanet.data.drawing import draw_boxes as draw_boxes
    from retinanet.data.synthetic import synthetic_dataset as synthetic_dataset
    from retinanet.data.transforms import Transform as Transform
    from retinanet.errors import ConfigError as ConfigError
    from retinanet.errors import DataError as DataError
    from retinanet.errors import ImageError as ImageError
    from retinanet.errors import MissingExtraError as MissingExtraError
    from retinanet.errors import NonFiniteLossError as NonFiniteLossError
    from retinanet.errors import RetinaNetError as RetinaNetError
    from retinanet.errors import WeightsError as WeightsError
    from retinanet.evaluation.coco import evaluate_detections as evaluate_detections
    from retinanet.evaluation.metrics import Metrics as Metrics
    from retinanet.evaluation.run import evaluate as evaluate
    from retinanet.exporters.run import export as export
    from retinanet.inference.detections import Failure as Failure
    from retinanet.inference.detections import ImageDetections as ImageDetections
    from retinanet.inference.detector import Detector as Detector
    from retinanet.inference.detector import load as load
    from retinanet.losses.detection import Losses as Losses
    from retinanet.losses.detection import box_loss as box_loss
    from retinanet.losses.detection import detection_losses as detection_losses
    from retinanet.losses.detection import distribution_focal_loss as distribution_focal_loss
    from retinanet.losses.focal import cross_entropy as cross_entropy
    from retinanet.losses.focal import focal_loss as focal_loss
    from retinanet.losses.focal import focal_loss_star as focal_loss_star
    from retinanet.losses.focal import hinge_loss as hinge_loss
    from retinanet.losses.focal import quality_focal_loss as quality_focal_loss
    from retinanet.losses.focal import varifocal_loss as varifocal_loss
    from retinanet.losses.modules import FocalLoss as FocalLoss
    from retinanet.losses.modules import softmax_focal_loss as softmax_focal_loss
    from retinanet.matching import anchor_labels as anchor_labels
    from retinanet.matching import match_anchors as match_anchors
    from retinanet.model.checkpoint import Checkpoint as Checkpoint
    from retinanet.model.checkpoint import load_checkpoint as load_checkpoint
    from retinanet.model.checkpoint import save_checkpoint as save_checkpoint
    from retinanet.model.retinanet import RetinaNet as RetinaNet
    from retinanet.model.retinanet import build_retinanet as build_retinanet
    from retinanet.structures import BACKGROUND as BACKGROUND
    from retinanet.structures import IGNORED as IGNORED
    from retinanet.structures import Detections as Detections
    from retinanet.structures import Outputs as Outputs
    from retinanet.structures import Targets as Targets
    from retinanet.structures import pad_targets as pad_targets

__version__ = "0.1.0"

_HOMES = {
    "retinanet.anchors": ("AnchorSpec", "anchor_spec", "feature_sizes", "level_anchors"),
    "retinanet.api": ("train",),
    "retinanet.config": ("LossSettings", "ModelSpec", "Recipe", "load_recipe"),
    "retinanet.data": ("read_dataset", "read_splits"),
    "retinanet.data.check": ("check_datasets",),
    "retinanet.data.dataset": ("Dataset",),
    "retinanet.data.synthetic": ("synthetic_dataset",),
    "retinanet.errors": (
        "ConfigError",
        "DataError",
        "ImageError",
        "MissingExtraError",
        "NonFiniteLossError",
        "RetinaNetError",
        "WeightsError",
    ),
    "retinanet.evaluation.metrics": ("Metrics",),
    "retinanet.evaluation.run": ("evaluate",),
    "retinanet.exporters.run": ("export",),
    "retinanet.inference.detections": ("Failure", "ImageDetections"),
    "retinanet.inference.detector": ("Detector", "load"),
    "retinanet.losses.detection": (
        "Losses",
        "box_loss",
        "detection_losses",
        "distribution_focal_loss",
    ),
    "retinanet.losses.focal": (
        "cross_entropy",
        "focal_loss",
        "focal_loss_star",
        "hinge_loss",
        "quality_focal_loss",
        "varifocal_loss",
    ),
    "retinanet.model.checkpoint": ("Checkpoint", "load_checkpoint", "save_checkpoint"),
    "retinanet.model.retinanet": ("RetinaNet", "build_retinanet"),
    "retinanet.structures": (
        "BACKGROUND",
        "IGNORED",
        "Detections",
        "Outputs",
        "Targets",
        "pad_targets",
    ),
    "retinanet.boxes": ("clip_boxes", "decode_boxes", "encode_boxes"),
    "retinanet.matching": ("anchor_labels", "match_anchors"),
    "retinanet.losses.modules": ("FocalLoss", "softmax_focal_loss"),
    "retinanet.data.drawing": ("draw_boxes",),
    "retinanet.data.transforms": ("Transform",),
    "retinanet.evaluation.coco": ("evaluate_detections",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(["__version__", *_HOME])


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
