"""Every exception that this package raises on purpose.

RetinaNetError                 the root: catch this one to catch them all
├── ConfigError                a setting is unknown, out of range or contradicts another
├── DataError                  labels or images that cannot be used
│   └── ImageError             one image that cannot be read
├── WeightsError               a checkpoint or weights file that cannot be used
├── NonFiniteLossError         training met a NaN or an infinity
└── MissingExtraError          an optional dependency is not installed

Each message is one line that says what is wrong, what was found, where, and what to do next.
Functions on the ground floor (losses, matching, ...) raise ``ValueError`` for arguments that make
no sense, as torch does.
"""

from __future__ import annotations


class RetinaNetError(Exception):
    """Root of the exceptions of this package."""


class ConfigError(RetinaNetError):
    """A setting is unknown, out of range, or contradicts another."""


class DataError(RetinaNetError):
    """Labels or images that cannot be used."""


class ImageError(DataError):
    """One image that cannot be read."""


class WeightsError(RetinaNetError):
    """A checkpoint or a file of weights that cannot be used."""


class NonFiniteLossError(RetinaNetError):
    """Training met a loss or a gradient that is NaN or infinite."""


class MissingExtraError(RetinaNetError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(
            f"{package} is not installed; it comes with an extra: pip install 'retinanet[{extra}]'"
        )
