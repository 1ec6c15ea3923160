"""benchmarks/rivals.py: the settings with which each detector is trained."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from scripts import load_script


def test_quick_is_trained_first_and_its_backbone_is_that_of_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rivals: Any = load_script("rivals")
    tasks = []

    def run_apart(task: dict[str, Any]) -> dict[str, Any]:
        tasks.append(task)
        if len(tasks) > 4:
            raise RuntimeError("stopped")
        shared = [[key, f"{key} of quick"] for key in rivals.SHARED]
        return {"ap": 0.5, "ap50": 0.5, "steps": 1, "wall_seconds": 1.0, "shared": shared}

    monkeypatch.setattr(rivals, "run_apart", run_apart)
    out = tmp_path / "rows.json"
    options = Namespace(
        set=[],
        backbone_weights=None,
        data=Path(),
        minutes=1,
        out=out,
        seeds=[0, 1, 2],
        detectors=["ssd"],
    )
    with pytest.raises(RuntimeError, match="stopped"):
        rivals.compare(options)
    assert len(json.loads(out.read_text("utf-8"))) == 4
    assert [task["detector"] for task in tasks] == ["quick", "ssd"] * 2 + ["quick"]
    for quick, ssd in (tasks[:2], tasks[2:4]):
        assert quick["settings"] == []
        assert ["model.backbone", "model.backbone of quick"] in ssd["settings"]


def test_stored_rows_are_shown_and_drawn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rivals: Any = load_script("rivals")
    rows = [
        {
            "detector": detector,
            "seed": seed,
            "steps": 9,
            "ap": ap,
            "ap50": 2 * ap,
            "wall_seconds": 300.0,
            "cpu_seconds": 290.0,
            "curve": [[60.0, ap / 2], [300.0, ap]],
        }
        for seed in (0, 1)
        for detector, ap in (("quick", 0.4 + seed / 50), ("ssd", 0.1))
    ]
    stored, plot = tmp_path / "rows.json", tmp_path / "curves.png"
    stored.write_text(json.dumps(rows), "utf-8")
    monkeypatch.setattr("sys.argv", ["rivals.py", "--rows", str(stored), "--plot", str(plot)])
    rivals.main()
    assert "| quick | 9 | 41.0 ± 1.4 | 82.0 ± 2.8 | 300 | 290 |" in capsys.readouterr().out
    with Image.open(plot) as drawn:
        assert drawn.size == (770, 495)
