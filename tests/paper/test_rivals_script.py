"""benchmarks/rivals.py: the settings with which each detector is trained."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

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
        set=[], backbone_weights=None, data=Path(), minutes=1, seeds=3, detectors=["ssd"], out=out
    )
    with pytest.raises(RuntimeError, match="stopped"):
        rivals.compare(options)
    assert len(json.loads(out.read_text("utf-8"))) == 4
    assert [task["detector"] for task in tasks] == ["quick", "ssd"] * 2 + ["quick"]
    for quick, ssd in (tasks[:2], tasks[2:4]):
        assert quick["settings"] == []
        assert ["model.backbone", "model.backbone of quick"] in ssd["settings"]
