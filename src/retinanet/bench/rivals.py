"""Packages to compare with; none is a dependency for it."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from retinanet.config import nearest
from retinanet.errors import ConfigError

RIVALS = {
    "torchvision": "torchvision",
    "pycocotools": "pycocotools",
    "fvcore": "fvcore",
    "apex": "apex.contrib.focal_loss",
}
"""Module to import, by the name that ``--vs`` takes."""

NONE = "none"


def choose_rivals(names: Iterable[str]) -> tuple[str, ...]:
    """Check the names and drop repeated ones; ``torchvision`` adds pycocotools if installed.

    Raises:
        ConfigError: a name is unknown, or its package is not installed.
    """
    chosen: list[str] = []
    for name in names:
        if name != NONE and name not in RIVALS:
            raise ConfigError(
                f"unknown rival {name!r}; {_available()}{nearest(name, [*RIVALS, NONE])}"
            )
        if name != NONE and not is_installed(name):
            raise ConfigError(f"rival {name!r} is not installed; {_available()}")
        chosen.append(name)
    if "torchvision" in chosen and is_installed("pycocotools"):
        chosen.append("pycocotools")
    return tuple(name for name in dict.fromkeys(chosen) if name != NONE)


def is_installed(name: str) -> bool:
    """Whether the rival's module can be imported."""
    try:
        return find_spec(RIVALS[name]) is not None
    except ModuleNotFoundError:  # its parent package
        return False


def _available() -> str:
    installed = [name for name in RIVALS if is_installed(name)]
    missing = [name for name in RIVALS if name not in installed]
    text = f"available: {', '.join([*installed, NONE])}"
    return text + (f"; not installed: {', '.join(missing)}" if missing else "")
