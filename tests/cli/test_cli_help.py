"""Help, version, and what the command line must not import for them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from retinanet import __version__
from retinanet.cli.app import app
from retinanet.config import recipe_names

from .conftest import Cli


def list_commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield path
    for name, child in getattr(command, "commands", {}).items():
        yield from list_commands(child, (*path, name))


COMMANDS = list(list_commands(typer.main.get_command(app)))
GROUPS = [(), ("data",), ("report",), ("paper",)]


def test_commands_are_found() -> None:
    assert {(), ("detect",), ("data", "check"), ("report", "speed-accuracy")} < set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(words) or "root")
def test_every_command_has_help(cli: Cli, command: tuple[str, ...]) -> None:
    ended = cli(*command, "--help")
    assert ended.code == 0
    assert ended.err == ""
    assert " ".join(("Usage: retinanet", *command)) in ended.out


def test_help_imports_nothing_heavy() -> None:
    # Time would depend on the machine; these modules take most of it.
    code = (
        "import sys; from retinanet.cli import main\n"
        f"for command in {COMMANDS!r}: assert main([*command, '--help']) == 0\n"
        "heavy = {'torch', 'torchvision', 'numpy', 'matplotlib', 'PIL', 'accelerate', 'fastapi',\n"
        "         'ray', 'av', 'onnx', 'openvino', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("command", GROUPS)
def test_group_without_command_prints_help(cli: Cli, command: tuple[str, ...]) -> None:
    ended = cli(*command)
    assert ended.code == 0
    assert "Commands" in ended.out


def test_help_of_train_names_all_recipes_and_no_invalid_limit(cli: Cli) -> None:
    text = " ".join(cli("train", "--help").out.replace("│", " ").split())
    assert ", ".join(recipe_names()) in text
    assert "x>=0" not in text


def test_version(cli: Cli) -> None:
    ended = cli("--version")
    assert (ended.code, ended.out) == (0, f"retinanet {__version__}\n")


def test_python_m_runs_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "retinanet", "trian"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(("given", "used"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_without_spinning(
    cli: Cli, given: str | None, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    assert cli("--version").code == 0
    assert os.environ["OMP_WAIT_POLICY"] == used
