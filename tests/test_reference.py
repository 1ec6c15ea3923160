"""The reference pages of docs/: every public name is on one, and every directive resolves."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

import retinanet as rn
from retinanet.config import setting_names
from scripts import load_script

_ROOT = Path(__file__).resolve().parents[1]
_DOCS = _ROOT / "docs"
_DIRECTIVES = [
    name
    for page in sorted((_DOCS / "reference").glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.M)
]


def resolve(name: str) -> Any:
    """Import the longest module of a dotted name, then its attributes."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            value: Any = import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            value = getattr(value, part)
        return value
    raise AssertionError(name)


def test_every_public_name_is_in_the_reference_once() -> None:
    counts = Counter(_DIRECTIVES)
    assert {name: count for name, count in counts.items() if count > 1} == {}
    missing = {f"retinanet.{name}" for name in rn.__all__} - set(counts) - {"retinanet.__version__"}
    assert missing == set(), "add a line '::: NAME' to a page of docs/reference/"


@pytest.mark.parametrize(
    "package", ["data", "evaluation", "exporters", "inference", "losses", "model", "serve"]
)
def test_every_name_of_a_package_is_in_the_reference(package: str) -> None:
    module = import_module(f"retinanet.{package}")
    documented = [resolve(name) for name in _DIRECTIVES]
    missing = [
        name
        for name in module.__all__
        if not any(getattr(module, name) is value for value in documented)
    ]
    assert missing == [], "add a line '::: retinanet.PACKAGE.NAME' to a page of docs/reference/"


def test_directives_resolve_to_documented_objects() -> None:
    for name in _DIRECTIVES:
        value = resolve(name)
        # Constants have no docstring of their own.
        assert isinstance(value, int | float | tuple) or value.__doc__, name


def test_every_page_is_in_the_navigation() -> None:
    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        parts = entry.values() if isinstance(entry, dict) else entry
        return [page for part in parts for page in pages(part)]

    nav = yaml.safe_load((_ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]
    on_disk = {path.relative_to(_DOCS).as_posix() for path in _DOCS.rglob("*.md")}
    assert set(pages(nav)) == on_disk


def test_docs_build_without_a_warning(tmp_path: Path) -> None:
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package, reason="needs the extra docs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)],
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    losses = (tmp_path / "reference" / "losses" / "index.html").read_text("utf-8")
    assert 'id="retinanet.focal_loss"' in losses
    assert "_DEFAULTS" not in losses
    assert ":func:" not in losses


@pytest.fixture(scope="module")
def settings_page() -> Any:
    return load_script("settings_page")


def test_settings_page_has_every_setting_with_default_values_and_meaning(
    settings_page: Any,
) -> None:
    rows = {}
    for line in settings_page.page().splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            rows[cells[0].strip("`")] = cells[1:]
    assert tuple(rows) == setting_names()
    without = [name for name, cells in rows.items() if not cells[2]]
    assert without == [], "state the meaning as a comment on the line in config.py"
    # By hand, from config.py and the recipes' files.
    assert rows["data.max_size"] == [
        "`1000`",
        "integer ≥ 32",
        "the longer side at most (Detectron)",
        "`max_size_train`, `longest_side`",
        "demo `192`, paper_quick `640`, paper_table2 `1333`, quick `640`",
    ]
    assert rows["train.epochs"][:2] == ["`none`", "number > 0, or `none`"]
    assert rows["model.p6_from"][:2] == ["`c5`", "`c5`, `p5`"]
    assert rows["train.milestones"][:2] == ["`[0.6667, 0.8889]`", "list of numbers"]
    assert rows["data.scale_jitter"][1] == "list of 2 numbers"
    assert rows["detect.score_thresholds"][:2] == ["`{}`", "table of numbers ≥ 0, < 1 by name"]


def test_settings_page_is_up_to_date(settings_page: Any) -> None:
    stored = settings_page.PAGE.read_text("utf-8")
    assert stored == settings_page.page(), "run: python benchmarks/settings_page.py"
