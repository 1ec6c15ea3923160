"""The exceptions of this package.

RetinaNetError                 the root
├── ConfigError                a setting is unknown, out of range or contradicts another
├── DataError                  labels or images that cannot be used
│   └── ImageError             an image that cannot be read
├── WeightsError               a checkpoint or weights file that cannot be used
├── NonFiniteLossError         a NaN or Inf loss in training
└── MissingExtraError          an optional dependency is not installed

Each message is one line: what is wrong, what was found, where, and what to do next. The functions
of the core (losses, matching, ...) raise ``ValueError`` for invalid arguments, as torch does.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


class RetinaNetError(Exception):
    """Root of the exceptions of this package."""


class ConfigError(RetinaNetError):
    """A setting is unknown, out of range, or contradicts another."""


class DataError(RetinaNetError):
    """Labels or images that cannot be used."""


class ImageError(DataError):
    """An image that cannot be read."""


class WeightsError(RetinaNetError):
    """A checkpoint or a file of weights that cannot be used."""


class NonFiniteLossError(RetinaNetError):
    """A loss or a gradient of training is NaN or Inf."""


class MissingExtraError(RetinaNetError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed; it comes with an extra: pip install 'retinanet[{extra}]'"
        )


def import_extra(name: str, extra: str) -> Any:
    """Import a module of an optional dependency.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError:
        raise MissingExtraError(name.partition(".")[0], extra) from None
