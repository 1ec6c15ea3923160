"""Every code block of README and docs: Python runs as printed, commands parse, JSON is JSON."""

from __future__ import annotations

import inspect
import json
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer

import retinanet as rn
from retinanet.cli.app import app
from retinanet.config import build_recipe, keyword_settings, load_recipe, setting_names
from retinanet.data.synthetic import synthetic_dataset
from retinanet.training.trainer import train

_ROOT = Path(__file__).resolve().parents[1]
_PAGES = {
    path.relative_to(_ROOT).as_posix(): re.findall(
        r"^```(\w*)\n(.*?)^```", path.read_text("utf-8"), re.M | re.S
    )
    for path in (
        _ROOT / "README.md",
        _ROOT / "CONTRIBUTING.md",
        *sorted((_ROOT / "docs").rglob("*.md")),
    )
}
_TINY = (
    "auto=false",
    "model.backbone=tiny",
    "model.backbone_weights=none",
    "model.norm=group",
    "model.channels=16",
    "model.head_depth=1",
    "data.image_size=64",
    "data.max_size=64",
    "data.workers=0",
    "train.steps=2",
    "train.batch_size=2",
)
_ELSEWHERE = ("docs/export.md",)  # its Python runs in tests/exporters, where files are exported


def pages_with(*languages: str) -> list[Any]:
    """List the pages with blocks in a language, and these blocks."""
    found = {
        page: [b for kind, b in blocks if kind in languages] for page, blocks in _PAGES.items()
    }
    return [pytest.param(page, blocks, id=page) for page, blocks in found.items() if blocks]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the examples read: cells/, runs/cells, street.jpg."""
    folder = tmp_path_factory.mktemp("desk")
    splits = synthetic_dataset(folder / "cells", splits={"train": 4, "val": 2}, image_size=64)
    train(load_recipe("quick", _TINY), splits, folder / "runs" / "cells", device="cpu")
    shutil.copy(splits["val"].images[0].path, folder / "street.jpg")
    return folder


@pytest.fixture
def replaced(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in seconds and without downloads; send requests to the service in this process."""
    monkeypatch.chdir(desk)
    signature = inspect.signature(rn.train)

    def quick_train(*arguments: Any, **named: Any) -> Any:
        bound = signature.bind(*arguments, **named)
        keyword_settings("quick", bound.arguments.get("keywords", {}))
        return train(load_recipe("quick", _TINY), desk / "cells", desk / "again", device="cpu")

    monkeypatch.setattr(rn, "train", quick_train)


def prepare(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start the service that a block calls; skip without a package that it needs."""
    for package in ("fastapi", "httpx", "pandas", "supervision"):
        if re.search(rf"^import {package}\b", code, re.M) or f"to_{package}" in code:
            pytest.importorskip(package)
    if "httpx.post(" in code:
        import httpx
        from fastapi.testclient import TestClient

        from retinanet.serve import build_app

        client = TestClient(build_app({"cells": rn.load("runs/cells", device="cpu")}))

        def post(url: str, *, timeout: float, **named: Any) -> Any:
            assert timeout > 0
            with client:
                return client.post(url.removeprefix("http://127.0.0.1:8000"), **named)

        monkeypatch.setattr(httpx, "post", post)


@pytest.mark.usefixtures("replaced")
@pytest.mark.parametrize(
    ("page", "blocks"), [case for case in pages_with("python") if case.id not in _ELSEWHERE]
)
def test_python_runs(page: str, blocks: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # In a module, by whose name a class of an example can be found again.
    module = ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)
    vars(module).update(logits=torch.zeros(5, 3), labels=torch.tensor([0, 1, 2, -1, -2]))
    for i, block in enumerate(blocks):
        prepare(block, monkeypatch)
        exec(compile(block, f"{page}, block {i + 1}", "exec"), vars(module))


def commands(block: str) -> Iterator[list[str]]:
    """Yield the words of each command of a shell block."""
    for line in block.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word == "&&":
                if words:
                    yield words
                words = []
            elif word == ">":
                break
            else:
                words.append(word)


def parse(words: list[str]) -> dict[str, Any]:
    """Parse arguments of ``retinanet`` as the command line does, without running the command."""
    command: Any = typer.main.get_command(app)
    seen: dict[str, Any] = {}

    def replace_callbacks(command: Any) -> None:
        for child in getattr(command, "commands", {}).values():
            replace_callbacks(child)
        if not hasattr(command, "commands"):
            command.callback = lambda **values: seen.update(values)

    replace_callbacks(command)
    command.main(words, prog_name="retinanet", standalone_mode=False)
    return seen


def test_parse_rejects_an_option_that_does_not_exist() -> None:
    assert parse(["detect", "runs/cells", "x.jpg", "--out", "found"])["out"] == Path("found")
    with pytest.raises(Exception, match="No such option"):
        parse(["detect", "runs/cells", "x.jpg", "--outt", "found"])


@pytest.mark.parametrize(("page", "blocks"), pages_with("", "sh"))
def test_commands_parse(page: str, blocks: list[str]) -> None:
    extras = tomllib.loads((_ROOT / "pyproject.toml").read_text("utf-8"))["project"][
        "optional-dependencies"
    ]
    for words in (words for block in blocks for words in commands(block)):
        if words[0] in ("retinanet", "accelerate", "torchrun", "docker") and "build" not in words:
            start = next(i for i, word in enumerate(words) if word.split(":")[0] == "retinanet")
            settings = parse(words[start + 1 :]).get("settings") or ()
            assert {setting.partition("=")[0] for setting in settings} <= set(setting_names())
        elif words[0] == "python" and words[1].startswith("benchmarks/"):
            assert (_ROOT / words[1]).is_file(), words
        elif words[:2] == ["pip", "install"]:
            for extra in re.findall(r"\[([\w,]+)\]", " ".join(words)):
                assert set(extra.split(",")) <= set(extras), words


@pytest.mark.parametrize(("page", "blocks"), pages_with("json"))
def test_json_is_json(page: str, blocks: list[str]) -> None:
    for block in blocks:
        assert json.loads(block)


@pytest.mark.parametrize(("page", "blocks"), pages_with("toml"))
def test_recipes_have_known_settings_only(page: str, blocks: list[str]) -> None:
    for block in blocks:
        build_recipe(tomllib.loads(block), page)


def test_no_block_is_of_another_language() -> None:
    # nginx's configuration is the only block that no test reads.
    assert {kind for blocks in _PAGES.values() for kind, _ in blocks} <= {
        "",
        "json",
        "nginx",
        "python",
        "sh",
        "toml",
    }
