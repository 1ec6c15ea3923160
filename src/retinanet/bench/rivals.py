"""Whom this package is compared with: packages that are installed; none is part of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec

from retinanet.config import nearest
from retinanet.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Package:
    """A package with something to compare with.

    Attributes:
        module: what is imported.
        stages: where it has something.
    """

    module: str
    stages: tuple[str, ...]


RIVALS = {
    "torchvision": Package(
        "torchvision",
        ("class-loss", "matching", "postprocess", "inference", "detect", "train-step", "data"),
    ),
    "pycocotools": Package("pycocotools", ("evaluation",)),
    "fvcore": Package("fvcore", ("class-loss",)),
    "apex": Package("apex.contrib.focal_loss", ("class-loss",)),
}
"""Rivals by the name that ``--vs`` takes."""

NONE = "none"


def choose_rivals(names: Iterable[str]) -> tuple[str, ...]:
    """The rivals of those names, each once; ``torchvision`` brings pycocotools where it is there.

    Raises:
        ConfigError: a name is unknown, or its package is not installed.
    """
    chosen: list[str] = []
    for name in names:
        if name == NONE:
            continue
        if name not in RIVALS:
            raise ConfigError(
                f"there is no rival {name!r}: {_listed()}{nearest(name, [*RIVALS, NONE])}"
            )
        if not installed(name):
            raise ConfigError(f"rival {name!r} is not installed: {_listed()}")
        chosen.append(name)
    if "torchvision" in chosen and installed("pycocotools"):
        chosen.append("pycocotools")
    return tuple(dict.fromkeys(chosen))


def installed(name: str) -> bool:
    """Whether the rival of that name can be imported."""
    try:
        return find_spec(RIVALS[name].module) is not None
    except ModuleNotFoundError:  # of a parent
        return False


def _listed() -> str:
    here = [name for name in RIVALS if installed(name)]
    missing = [name for name in RIVALS if name not in here]
    text = f"here are {', '.join([*here, NONE])}"
    return text + (f"; not installed: {', '.join(missing)}" if missing else "")
