"""``retinanet tune``."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from .conftest import TINY, Cli

pytest.importorskip("optuna")

FIXED = [text for text in TINY if not text.startswith("--")]
FIXED += ["model.backbone=tiny", "model.backbone_weights=none", "train.batch_size=2"]
FIXED += ["data.image_size=64", "data.max_size=64", "train.steps=2"]


def test_tune_trains_and_its_command_trains(
    cli: Cli, tiny_sets: dict[str, Path], tmp_path: Path
) -> None:
    data, out = tiny_sets["coco"], tmp_path / "search"
    ended = cli("tune", data, "train.lr=1e-4..1e-3", *FIXED, "--budget=1h", "--trials=2",
                "--out", out)  # fmt: skip
    assert ended.code == 0, ended.err
    assert "trial 1: complete, AP" in ended.err
    assert (out / "trials" / "001" / "config.toml").is_file()
    line = next(line for line in ended.out.splitlines() if line.startswith("next"))
    words = shlex.split(line.removeprefix("next"))
    assert words[:3] == ["retinanet", "train", str(data)]
    assert any(word.startswith("train.lr=0.0") for word in words)
    assert cli(*words[1:], "--show-recipe").code == 0
    again = cli("tune", data, "train.lr=1e-4..1e-3", *FIXED, "--budget=1h", "--trials=2",
                "--out", out, "--json")  # fmt: skip
    assert [trial["state"] for trial in again.json["trials"]] == ["complete"] * 2
    ended = cli("tune", data, "train.lr=1e-4..1e-3", "--budget=never", "--out", out)
    assert (ended.code, "--budget 'never' is not a duration" in ended.err) == (2, True)
