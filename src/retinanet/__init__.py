"""RetinaNet and Focal Loss (Lin et al. 2017, arXiv:1708.02002).

Everything here is found when it is first asked for (PEP 562): ``import retinanet`` does not import
torch, so the command line can answer at once.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from retinanet.anchors import AnchorSpec as AnchorSpec
    from retinanet.api import train as train
    from retinanet.config import Recipe as Recipe
    from retinanet.config import load_recipe as load_recipe
    from retinanet.data import read_dataset as read_dataset
    from retinanet.data import read_splits as read_splits
    from retinanet.data.check import check_datasets as check_datasets
    from retinanet.data.dataset import Dataset as Dataset
    from retinanet.data.synthetic import synthetic_dataset as synthetic_dataset
    from retinanet.detect.detector import Detector as Detector
    from retinanet.detect.detector import load as load
    from retinanet.detect.found import Failure as Failure
    from retinanet.detect.found import Found as Found
    from retinanet.errors import ConfigError as ConfigError
    from retinanet.errors import DataError as DataError
    from retinanet.errors import ImageError as ImageError
    from retinanet.errors import MissingExtraError as MissingExtraError
    from retinanet.errors import NonFiniteLossError as NonFiniteLossError
    from retinanet.errors import RetinaNetError as RetinaNetError
    from retinanet.errors import WeightsError as WeightsError
    from retinanet.evaluate.metrics import Metrics as Metrics
    from retinanet.evaluate.run import evaluate as evaluate
    from retinanet.export.run import export as export
    from retinanet.losses.box import box_loss as box_loss
    from retinanet.losses.classification import cross_entropy as cross_entropy
    from retinanet.losses.classification import focal_loss as focal_loss
    from retinanet.losses.classification import focal_loss_star as focal_loss_star
    from retinanet.losses.classification import hinge_loss as hinge_loss
    from retinanet.losses.detection import detection_losses as detection_losses
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

__version__ = "0.1.0"

_HOMES = {
    "retinanet.anchors": ("AnchorSpec",),
    "retinanet.config": ("Recipe", "load_recipe"),
    "retinanet.data": ("read_dataset", "read_splits"),
    "retinanet.data.check": ("check_datasets",),
    "retinanet.data.dataset": ("Dataset",),
    "retinanet.data.synthetic": ("synthetic_dataset",),
    "retinanet.detect.detector": ("Detector", "load"),
    "retinanet.detect.found": ("Failure", "Found"),
    "retinanet.errors": (
        "ConfigError",
        "DataError",
        "ImageError",
        "MissingExtraError",
        "NonFiniteLossError",
        "RetinaNetError",
        "WeightsError",
    ),
    "retinanet.evaluate.metrics": ("Metrics",),
    "retinanet.losses.box": ("box_loss",),
    "retinanet.losses.classification": (
        "cross_entropy",
        "focal_loss",
        "focal_loss_star",
        "hinge_loss",
    ),
    "retinanet.losses.detection": ("detection_losses",),
    "retinanet.model.checkpoint": ("Checkpoint", "load_checkpoint", "save_checkpoint"),
    "retinanet.model.retinanet": ("RetinaNet", "build_retinanet"),
    "retinanet.structures": ("BACKGROUND", "IGNORED", "Detections", "Outputs", "Targets"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

# rn.train(...), rn.evaluate(...) and rn.export(...) share their names with rooms of the package.
_CALLED_ROOMS = {
    "evaluate": "retinanet.evaluate.run",
    "export": "retinanet.export.run",
    "train": "retinanet.api",
}

__all__ = sorted(["__version__", *_HOME, *_CALLED_ROOMS])


class _CalledRoom(ModuleType):
    """A room that can also be called: the call goes to the function of its name.

    Importing anything from ``retinanet.train`` makes Python bind the room to ``retinanet.train``,
    over whatever was there. So the room itself answers the call, and both uses work in any order.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__wrapped__(*args, **kwargs)

    @property
    def __wrapped__(self) -> Any:
        """The function: ``inspect.signature`` and ``help`` follow this name to it."""
        name = self.__name__.rpartition(".")[2]
        return getattr(import_module(_CALLED_ROOMS[name]), name)


class _Package(ModuleType):
    """This module: it sees a room being bound to its name, as the import of the room ends with."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CALLED_ROOMS and isinstance(value, ModuleType):
            value.__class__ = _CalledRoom
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _CALLED_ROOMS:
        return import_module(f"{__name__}.{name}")
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
