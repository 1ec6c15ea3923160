"""The house stands: a room imports only from the floors under it, and only what it may.

Floors from the bottom: the ground; ``model`` and ``data``, which do not know each other;
``inference``, ``evaluation``, ``training``, ``exporters``, each of which may use those before it;
``report`` and ``bench``; ``paper``, ``hub``; ``video``, ``batch``; the roof, ``serve`` and ``cli``.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import retinanet

SOURCE = Path(retinanet.__file__).parent

# How high each room lies: it may import from what lies lower. Rooms of equal height do not meet.
HEIGHT = {
    **dict.fromkeys(["errors", "structures"], 0),
    **dict.fromkeys(["config", "files", "interrupts", "boxes", "anchors", "native"], 1),
    **dict.fromkeys(["matching_triton", "triton_probe"], 1),
    "matching": 2,
    **dict.fromkeys(["losses", "postprocess"], 3),
    **dict.fromkeys(["model", "data"], 10),
    "inference": 20,
    "video": 37,
    "batch": 37,
    "evaluation": 21,
    "training": 22,
    "exporters": 23,
    "report": 30,
    "bench": 30,
    "paper": 32,
    "hub": 33,
    "serve": 38,
    "api": 39,
    "cli": 40,
    "__init__": 41,
    "__main__": 41,
}
GROUND = [room for room, height in HEIGHT.items() if height < 10]

# What a room may import from outside the standard library, where that is limited.
OUTSIDE = {
    **{room: {"torch", "torchvision.ops"} for room in GROUND},
    "config": {"pydantic"},
    "errors": set(),
    "files": set(),
    "interrupts": set(),
    "losses": {"torch", "torchvision.ops", "triton"},
    "matching_triton": {"torch", "triton"},
    "triton_probe": {"torch", "triton"},
}

# Settings are for those who run things; below, a function takes the numbers that it uses.
SETTINGS = {
    "Recipe",
    "ModelConfig",
    "AnchorConfig",
    "MatchingConfig",
    "LossConfig",
    "TrainConfig",
}


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every imported name in full (``package.module.name``) and its line, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno


def room_of(name: str) -> str | None:
    """The room of ``retinanet.room.module.name``; None for other packages."""
    parts = name.split(".")
    if parts[0] != "retinanet" or len(parts) < 2:
        return None
    return parts[1] if parts[1] in HEIGHT else "__init__"


def violations(room: str, source: str, where: str = "room.py") -> list[str]:
    """What in a file of a room breaks the rules of the house."""
    found = []
    for name, line in imports(ast.parse(source)):
        place = f"{where}:{line}: {room} imports {name}"
        if name.startswith("."):
            found.append(f"{place}: say it in full, from retinanet")
            continue
        other = room_of(name)
        if other is not None:
            # The package's own name and version may be asked for everywhere.
            if name in ("retinanet.__version__", "retinanet"):
                continue
            if other != room and HEIGHT[other] >= HEIGHT[room]:
                found.append(f"{place}: {other} is not below {room}")
            if HEIGHT[room] < HEIGHT["training"] and name.rsplit(".", 1)[-1] in SETTINGS:
                found.append(f"{place}: settings stay above")
            continue
        if name.split(".")[0] == "matplotlib" and room != "report":
            found.append(f"{place}: matplotlib is for report alone")
        if room in OUTSIDE and not is_standard(name):
            allowed = OUTSIDE[room]
            if not any(name == one or name.startswith(f"{one}.") for one in allowed):
                found.append(f"{place}: the ground floor does without")
    return found


def is_standard(name: str) -> bool:
    return name.split(".")[0] in sys.stdlib_module_names


def prints(source: str) -> list[int]:
    """Lines that call print()."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]


def files() -> list[tuple[str, Path]]:
    """Each source file with its room."""
    found = []
    for file in sorted(SOURCE.rglob("*.py")):
        first = file.relative_to(SOURCE).parts[0]
        found.append((first.removesuffix(".py"), file))
    return found


def test_every_room_has_its_floor() -> None:
    assert {room for room, _ in files()} <= set(HEIGHT)


@pytest.mark.parametrize(("room", "file"), files(), ids=lambda value: str(value)[-40:])
def test_rooms_import_from_below(room: str, file: Path) -> None:
    source = file.read_text("utf-8")
    assert violations(room, source, str(file.relative_to(SOURCE))) == []


@pytest.mark.parametrize(("room", "file"), files(), ids=lambda value: str(value)[-40:])
def test_only_the_roof_prints(room: str, file: Path) -> None:
    if room != "cli":
        assert prints(file.read_text("utf-8")) == [], file


def test_no_room_of_odds_and_ends() -> None:
    names = {file.stem for _, file in files()}
    assert not names & {"utils", "util", "common", "misc", "helpers"}


@pytest.mark.parametrize(
    ("room", "source", "why"),
    [
        ("boxes", "from retinanet.matching import match_anchors", "matching is not below boxes"),
        ("losses", "import retinanet.model.fpn", "model is not below losses"),
        ("model", "from retinanet.data.images import read_image", "data is not below model"),
        ("data", "from retinanet.model import RetinaNet", "model is not below data"),
        ("data", "from retinanet import RetinaNet", "__init__ is not below data"),
        ("inference", "import retinanet.evaluation", "evaluation is not below inference"),
        ("training", "def f():\n    from retinanet.cli import main", "cli is not below training"),
        ("report", "from retinanet.cli.app import app", "cli is not below report"),
        ("inference", "from retinanet.config import Recipe", "settings stay above"),
        ("losses", "import numpy as np", "the ground floor does without"),
        ("boxes", "from torchvision.models import resnet18", "the ground floor does without"),
        ("matching", "import torchvision", "the ground floor does without"),
        ("errors", "import torch", "the ground floor does without"),
        ("model", "import matplotlib.pyplot as plt", "matplotlib is for report alone"),
        ("losses", "from .box import box_loss", "say it in full"),
    ],
)
def test_a_breach_is_seen(room: str, source: str, why: str) -> None:
    found = violations(room, f"import math\n\n{source}\n")
    assert len(found) == 1
    assert why in found[0]


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("losses", "from retinanet.losses.box import box_loss"),
        ("losses", "from torchvision.ops import nms\nimport torch.nn.functional as F"),
        ("matching", "from retinanet.structures import Targets"),
        ("model", "import torchvision\nfrom retinanet.config import nearest"),
        (
            "training",
            "from retinanet.config import Recipe\nfrom retinanet.evaluation import Metrics",
        ),
        ("report", "import matplotlib"),
        ("cli", "from retinanet import __version__\nfrom retinanet.report import write_report"),
    ],
)
def test_what_is_allowed_is_let_through(room: str, source: str) -> None:
    assert violations(room, source) == []


def test_a_print_is_seen() -> None:
    assert prints("x = 1\nprint(x)\n") == [2]
    assert prints("def pprint(): ...\nlog.print(1)\n") == []
