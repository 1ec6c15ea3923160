"""Layers: a package imports only from lower layers, only what it may, and without cycles.

Layers from the bottom: the core modules; ``model`` and ``data``, which do not import each other;
``inference``, ``evaluation``, ``training``, ``exporters``, each of which may import those
before it; ``report`` and ``bench``; ``paper``, ``hub``; ``video``, ``batch``; ``serve``; ``cli``.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import retinanet

SOURCE = Path(retinanet.__file__).parent
parse = cache(ast.parse)

# A package may import from packages of a lower layer only, not from others of its own layer.
LAYER = {
    **dict.fromkeys(["errors", "structures", "files", "interrupts"], 0),
    **dict.fromkeys(["config", "boxes", "kernels"], 1),
    **dict.fromkeys(["anchors", "matching", "postprocess", "own"], 2),
    "losses": 3,
    **dict.fromkeys(["model", "data"], 10),
    "inference": 20,
    "evaluation": 21,
    "training": 22,
    "exporters": 23,
    **dict.fromkeys(["report", "bench"], 30),
    "paper": 32,
    "hub": 33,
    **dict.fromkeys(["video", "batch"], 37),
    "serve": 38,
    "api": 39,
    "cli": 40,
    **dict.fromkeys(["__init__", "__main__"], 41),
}
CORE = [package for package, layer in LAYER.items() if layer < 10]

# Third-party imports of a package, where they are limited.
ALLOWED = {
    **{package: {"torch", "torchvision.ops"} for package in CORE},
    "config": {"pydantic"},
    "errors": set(),
    "files": set(),
    "interrupts": set(),
    "kernels": {"torch", "triton"},
}

MAX_LINES, MAX_PARAMETERS = 80, 10
MAX_WIDE_FUNCTIONS = 1  # may only go down


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every imported name in full (``package.module.name``) and its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno


def package_of(name: str) -> str | None:
    """Return the package of ``retinanet.package.module.name``; None for third parties."""
    parts = name.split(".")
    if parts[0] != "retinanet" or len(parts) < 2:
        return None
    return parts[1] if parts[1] in LAYER else "__init__"


def violations(package: str, source: str, file: str = "module.py") -> list[str]:
    """List the imports of a file of a package that break the rules."""
    found = []
    for name, line in imports(parse(source)):
        where = f"{file}:{line}: {package} imports {name}"
        if name.startswith("."):
            found.append(f"{where}: relative import, write it in full")
            continue
        other = package_of(name)
        if other is not None:
            if name in ("retinanet.__version__", "retinanet"):
                continue
            if other != package and LAYER[other] >= LAYER[package]:
                found.append(f"{where}: {other} is not in a lower layer")
            continue
        if name.split(".")[0] == "matplotlib" and package != "report":
            found.append(f"{where}: only report may import matplotlib")
        if package in ALLOWED and name.split(".")[0] not in sys.stdlib_module_names:
            allowed = ALLOWED[package]
            if not any(name == other or name.startswith(f"{other}.") for other in allowed):
                found.append(f"{where}: not an allowed dependency")
    return found


def prints(source: str) -> list[int]:
    """List the lines that call print()."""
    return [
        node.lineno
        for node in ast.walk(parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]


def files() -> list[tuple[str, Path]]:
    """Return each source file with its package."""
    paths = sorted(SOURCE.rglob("*.py"))
    return [(path.relative_to(SOURCE).parts[0].removesuffix(".py"), path) for path in paths]


def module_of(file: Path) -> str:
    """Return the dotted name of a source file's module."""
    parts = ("retinanet", *file.relative_to(SOURCE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph() -> dict[str, set[str]]:
    """Return the modules that each module imports when it is loaded or later."""
    trees = {module_of(file): parse(file.read_text("utf-8")) for _, file in files()}
    graph: dict[str, set[str]] = {}
    for module, tree in trees.items():
        names = [name for name, _ in imports(tree)]
        targets = {name if name in trees else name.rpartition(".")[0] for name in names}
        graph[module] = {target for target in targets if target in trees and target != module}
    # A package's __init__ that re-exports its modules is no cycle.
    return {
        module: {target for target in targets if not module.startswith(f"{target}.")}
        for module, targets in graph.items()
    }


def functions() -> Iterator[tuple[str, int, int]]:
    """Yield each function with its number of lines and of parameters (without self and cls)."""
    for _, file in files():
        for node in ast.walk(parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if "triton.jit" in map(ast.unparse, node.decorator_list):
                continue  # a GPU kernel has a parameter per buffer
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len([a for a in arguments if a.arg not in ("self", "cls")])
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            yield f"{file.relative_to(SOURCE)}:{node.lineno} {node.name}", lines, count


def test_every_package_has_a_layer() -> None:
    assert {package for package, _ in files()} <= set(LAYER)


@pytest.mark.parametrize("package", sorted({package for package, _ in files()}))
def test_package_imports_only_from_lower_layers(package: str) -> None:
    found = [
        violation
        for owner, file in files()
        if owner == package
        for violation in violations(package, file.read_text("utf-8"), str(file.relative_to(SOURCE)))
    ]
    assert found == []


def test_only_the_command_line_prints() -> None:
    printing = [
        str(file.relative_to(SOURCE))
        for package, file in files()
        if package != "cli" and prints(file.read_text("utf-8"))
    ]
    assert printing == []


def test_no_module_of_odds_and_ends() -> None:
    names = {file.stem for _, file in files()}
    assert not names & {"utils", "util", "common", "misc", "helpers"}


def test_modules_import_each_other_without_cycles() -> None:
    TopologicalSorter(import_graph()).prepare()  # raises CycleError


def test_modules_import_no_private_names_of_others() -> None:
    found = [
        f"{file.relative_to(SOURCE)}:{line}: {name}"
        for _, file in files()
        for name, line in imports(parse(file.read_text("utf-8")))
        if name.startswith("retinanet.")
        and any(part.startswith("_") and not part.endswith("__") for part in name.split("."))
    ]
    assert found == []


def test_functions_are_short_and_have_few_parameters() -> None:
    long = [f"{name}: {lines} lines" for name, lines, _ in functions() if lines > MAX_LINES]
    wide = [f"{name}: {count}" for name, _, count in functions() if count > MAX_PARAMETERS]
    assert long == []
    assert len(wide) <= MAX_WIDE_FUNCTIONS, wide


@pytest.mark.parametrize(
    ("package", "source", "reason"),
    [
        ("boxes", "from retinanet.matching import match_anchors", "matching is not in a lower"),
        ("losses", "import retinanet.model.heads", "model is not in a lower layer"),
        ("model", "from retinanet.data.images import read_image", "data is not in a lower layer"),
        ("data", "from retinanet.model import RetinaNet", "model is not in a lower layer"),
        ("data", "from retinanet import RetinaNet", "__init__ is not in a lower layer"),
        ("inference", "import retinanet.evaluation", "evaluation is not in a lower layer"),
        ("training", "def f():\n    from retinanet.cli import main", "cli is not in a lower layer"),
        ("losses", "import numpy as np", "not an allowed dependency"),
        ("boxes", "from torchvision.models import resnet18", "not an allowed dependency"),
        ("errors", "import torch", "not an allowed dependency"),
        ("model", "import matplotlib.pyplot as plt", "only report may import matplotlib"),
        ("losses", "from .box import box_loss", "relative import"),
    ],
)
def test_forbidden_import_is_found(package: str, source: str, reason: str) -> None:
    found = violations(package, f"import math\n\n{source}\n")
    assert len(found) == 1
    assert reason in found[0]


def test_print_is_found() -> None:
    assert prints("x = 1\nprint(x)\n") == [2]
    assert prints("def pprint(): ...\nlog.print(1)\n") == []
