"""The notebooks of docs/notebooks run from top to bottom, and are kept without outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

_FOLDER = Path(__file__).resolve().parents[1] / "docs" / "notebooks"
_NOTEBOOKS = {
    path.stem: json.loads(path.read_text("utf-8")) for path in sorted(_FOLDER.glob("*.ipynb"))
}


def run(name: str) -> dict[str, Any]:
    """Execute the code cells in order, in one namespace."""
    names: dict[str, Any] = {"__name__": "__main__"}
    for i, cell in enumerate(_NOTEBOOKS[name]["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{name}.ipynb, cell {i}", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")


def test_notebooks_are_those_of_the_navigation() -> None:
    assert list(_NOTEBOOKS) == ["focal_loss", "own_loop", "train"]


@pytest.mark.parametrize("name", _NOTEBOOKS)
def test_notebook_has_no_outputs(name: str) -> None:
    for cell in _NOTEBOOKS[name]["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


def test_training_notebook(capsys: pytest.CaptureFixture[str]) -> None:
    names = run("train")
    assert names["run"].step == 4
    assert (names["run"].model / "model.safetensors").is_file()
    assert 0 <= names["metrics"].ap <= 1
    assert "no problems" in capsys.readouterr().out


def test_own_loop_notebook() -> None:
    names = run("own_loop")
    assert names["totals"][-1] < names["totals"][0]
    again = names["rn"].load("shapes-model", device="cpu", precision="float32")
    assert torch.equal(again.model.class_head.last.bias, names["model"].class_head.last.bias)


def test_focal_loss_notebook() -> None:
    names = run("focal_loss")
    # By hand: 100,000 negatives cost -log(.99) each, or .75 (.01)^2 of it under FL; 10 positives
    # cost -log(.5), or .25 (.5)^2 of it.
    assert names["shares"]["cross entropy"] == pytest.approx(1005.03 / (1005.03 + 6.931), abs=1e-4)
    assert names["shares"]["focal loss"] == pytest.approx(0.07538 / (0.07538 + 0.4332), abs=1e-3)
    assert names["history"][-1] < names["history"][0] / 2
