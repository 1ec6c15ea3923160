"""Help, version, and what the command line must not load for them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from retinanet import __version__

from .conftest import Cli

COMMANDS = (
    (),
    ("demo",),
    ("train",),
    ("evaluate",),
    ("detect",),
    ("export",),
    ("serve",),
    ("push",),
    ("bench",),
    ("data",),
    ("data", "check"),
    ("data", "convert"),
    ("data", "show"),
    ("data", "anchors"),
    ("paper",),
    ("paper", "list"),
    ("paper", "run"),
    ("report",),
    ("report", "loss-distribution"),
    ("report", "speed-accuracy"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda one: " ".join(one) or "root")
def test_every_command_has_help(cli: Cli, command: tuple[str, ...]) -> None:
    ended = cli(*command, "--help")
    assert ended.code == 0
    assert ended.err == ""
    assert " ".join(("Usage: retinanet", *command)) in ended.out


def test_help_loads_nothing_heavy() -> None:
    # Time would depend on the machine; what takes the time are these modules.
    code = (
        "import sys; from retinanet.cli import main\n"
        f"for command in {COMMANDS!r}: assert main([*command, '--help']) == 0\n"
        "heavy = {'torch', 'torchvision', 'numpy', 'matplotlib', 'PIL', 'accelerate', 'fastapi',\n"
        "         'ray', 'av', 'onnx', 'openvino', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.parametrize("command", [(), ("data",), ("paper",), ("report",)])
def test_no_command_is_a_request_for_help(cli: Cli, command: tuple[str, ...]) -> None:
    ended = cli(*command)
    assert ended.code == 0
    assert "Commands" in ended.out


def test_version(cli: Cli) -> None:
    ended = cli("--version")
    assert (ended.code, ended.out) == (0, f"retinanet {__version__}\n")


def test_python_m_is_the_same_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "retinanet", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"retinanet {__version__}\n"


def test_python_m_hands_the_exit_code_on() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "retinanet", "trian"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
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
