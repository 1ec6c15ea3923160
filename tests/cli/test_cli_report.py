"""``retinanet report``: the files, the tables, and JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from retinanet.cli.report import name_models
from retinanet.inference import openvino_backend
from retinanet.model.retinanet import RetinaNet
from retinanet.structures import Outputs

from .conftest import Cli

PLAIN = ("--device=cpu", "--precision=float32")


def test_loss_distribution(
    cli: Cli, tiny_run: Path, tiny_sets: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "cells"
    shutil.copytree(tiny_run, run)
    ended = cli("report", "loss-distribution", run, tiny_sets["coco"], *PLAIN)
    assert ended.code == 0, ended.err
    assert ended.err == ""
    assert "positives: " in ended.out
    assert "negatives: " in ended.out
    assert f"to {run / 'reports'}" in ended.out
    names = {f"loss-distribution-val.{kind}" for kind in ("png", "svg", "json")}
    assert {file.name for file in (run / "reports").iterdir()} == names
    values = json.loads((run / "reports" / "loss-distribution-val.json").read_text())
    assert values["model"] == str(run)
    assert [curve["gamma"] for curve in values["negatives"]] == [0, 0.5, 1, 2]
    assert values["images"] == 2


def test_loss_distribution_options(
    cli: Cli, tiny_run: Path, tiny_sets: dict[str, Path], tmp_path: Path
) -> None:
    ended = cli("report", "loss-distribution", tiny_run / "last", tiny_sets["yolo"], *PLAIN,
                "--split=test", "--gamma", "0", "--gamma=3.5", f"--out={tmp_path / 'o'}",
                "--image-size=96", "--json")  # fmt: skip
    assert ended.code == 0, ended.err
    assert [curve["gamma"] for curve in ended.json["positives"]] == [0, 3.5]
    written = json.loads((tmp_path / "o" / "loss-distribution-test.json").read_text())
    assert written == ended.json
    assert (ended.json["split"], ended.json["images"]) == ("test", 2)
    # An image of 96 x 96: 12^2 + 6^2 + 3^2 + 2^2 + 1 cells of one anchor.
    anchors = sum(ended.json[f"{kind}_anchors"] for kind in ("positive", "negative", "ignored"))
    assert anchors == 2 * (144 + 36 + 9 + 4 + 1)


def test_speed_accuracy(
    cli: Cli, tiny_run: Path, tiny_sets: dict[str, Path], tmp_path: Path
) -> None:
    run, other = tmp_path / "a" / "cells", tmp_path / "dogs"
    shutil.copytree(tiny_run, run)
    shutil.copytree(tiny_run, other)
    arguments = ("--data", tiny_sets["coco"], "--scale=64", "--scale", "96", "--rounds=2",
                 "--images=1", *PLAIN)  # fmt: skip
    ended = cli("report", "speed-accuracy", run, *arguments)
    assert ended.code == 0, ended.err
    assert ended.err == ""
    assert "ms (quartiles)" in ended.out
    assert "cells" in ended.out
    assert "torch on cpu, float32" in ended.out
    names = {f"speed-accuracy-val.{kind}" for kind in ("png", "svg", "json")}
    assert {file.name for file in (run / "reports").iterdir()} == names
    both = cli("report", "speed-accuracy", run, other, *arguments, "--json",
               f"--out={tmp_path / 'o'}")  # fmt: skip
    assert both.code == 0, both.err
    assert both.json["models"] == {"cells": str(run), "dogs": str(other)}
    points = [(point["model"], point["scale"]) for point in both.json["points"]]
    assert points == [(name, scale) for name in ("cells", "dogs") for scale in (64, 96)]
    assert both.json["machine"]["threads"] >= 1
    assert (both.json["timed"], both.json["rounds"]) == (1, 2)
    assert (tmp_path / "o" / "speed-accuracy-val.svg").is_file()


class TorchAsOpenVINO:
    """In place of a converted network, whose outputs are compared in tests/inference."""

    deviation = None
    precisions: ClassVar[list[str]] = []

    def __init__(self, model: RetinaNet, precision: str, calibration: None) -> None:
        self.model = model
        self.precisions.append(precision)

    def __call__(self, images: Tensor) -> Outputs:
        with torch.inference_mode():
            outputs: Outputs = self.model(images)
        return outputs


def test_loss_distribution_openvino_gives_the_same_losses(
    cli: Cli,
    tiny_run: Path,
    tiny_sets: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(openvino_backend, "openvino_network", TorchAsOpenVINO)
    means = []
    for backend in ("torch", "openvino"):
        ended = cli("report", "loss-distribution", tiny_run, tiny_sets["coco"], *PLAIN,
                    f"--backend={backend}", f"--out={tmp_path / 'o'}", "--json")  # fmt: skip
        assert ended.code == 0, ended.err
        curves = ended.json["positives"] + ended.json["negatives"]
        means.append([curve["mean"] for curve in curves])
    assert TorchAsOpenVINO.precisions == ["float32"]
    assert means[1] == pytest.approx(means[0], rel=1e-3)


def test_name_models_uses_unique_names_of_run_folders(tmp_path: Path) -> None:
    runs = [tmp_path / "a" / "cells", tmp_path / "b" / "cells", tmp_path / "b" / "dogs"]
    for run in runs:
        (run / "best").mkdir(parents=True)
        (run / "config.toml").write_text("")
    a, b, dogs = map(str, runs)
    assert name_models([a]) == {"cells": a}
    assert name_models([f"{a}/best", dogs]) == {"cells": f"{a}/best", "dogs": dogs}
    assert name_models([a, b, dogs]) == {a: a, b: b, "dogs": dogs}
    assert name_models([a, "torchvision/x"]) == {"cells": a, "torchvision/x": "torchvision/x"}
    assert list(name_models([a, f"{a}/best"]).values()) == [a, f"{a}/best"]


def test_report_without_objects_draws_no_figure(
    cli: Cli, tiny_run: Path, tiny_sets: dict[str, Path], tmp_path: Path
) -> None:
    data = tmp_path / "empty"
    shutil.copytree(tiny_sets["coco"], data)
    for file in data.rglob("*.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "annotations": []}))
    ended = cli("report", "speed-accuracy", tiny_run, f"--data={data}", "--scale=64", *PLAIN,
                "--rounds=1", "--images=1", f"--out={tmp_path / 'o'}")  # fmt: skip
    assert ended.code == 0, ended.err
    assert "no figure is drawn" in ended.out
    assert [file.name for file in (tmp_path / "o").iterdir()] == ["speed-accuracy-val.json"]
    ended = cli("report", "loss-distribution", tiny_run, data, *PLAIN)
    assert ended.code == 1
    assert "no anchor matches an object" in ended.err
