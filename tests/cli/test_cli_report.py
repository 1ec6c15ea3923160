"""``retinanet report``: the files, the tables, JSON, and errors in one line."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from retinanet.cli.report import name_models
from retinanet.errors import ConfigError

from .conftest import Cli

PLAIN = ("--device=cpu", "--precision=float32")


@pytest.mark.parametrize("command", [(), ("loss-distribution",), ("speed-accuracy",)])
def test_help(cli: Cli, command: tuple[str, ...]) -> None:
    ended = cli("report", *command, "--help")
    assert (ended.code, ended.err) == (0, "")
    assert " ".join(("Usage: retinanet report", *command)) in ended.out


def test_report_without_command_prints_help(cli: Cli) -> None:
    ended = cli("report")
    assert ended.code == 0
    assert "loss-distribution" in ended.out
    assert "speed-accuracy" in ended.out


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from retinanet.cli import main\n"
        "for name in ('loss-distribution', 'speed-accuracy'):\n"
        "    assert main(['report', name, '--help']) == 0\n"
        "heavy = {'torch', 'torchvision', 'numpy', 'matplotlib', 'PIL', 'accelerate'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


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
    assert [c["gamma"] for c in values["negatives"]] == [0, 0.5, 1, 2]
    assert values["images"] == 2


def test_loss_distribution_options(
    cli: Cli, tiny_run: Path, tiny_sets: dict[str, Path], tmp_path: Path
) -> None:
    ended = cli("report", "loss-distribution", tiny_run / "last", tiny_sets["yolo"], *PLAIN,
                "--split=test", "--gamma", "0", "--gamma=3.5", f"--out={tmp_path / 'o'}",
                "--image-size=96", "--json")  # fmt: skip
    assert ended.code == 0, ended.err
    assert [c["gamma"] for c in ended.json["positives"]] == [0, 3.5]
    written = json.loads((tmp_path / "o" / "loss-distribution-test.json").read_text())
    assert written == ended.json
    assert (ended.json["split"], ended.json["images"]) == ("test", 2)
    # An image of 96 x 96: 12^2 + 6^2 + 3^2 + 2^2 + 1 cells of 9 anchors.
    anchors = sum(ended.json[f"{kind}_anchors"] for kind in ("positive", "negative", "ignored"))
    assert anchors == 2 * 9 * (144 + 36 + 9 + 4 + 1)


def test_speed_accuracy(
    cli: Cli, tiny_run: Path, tiny_sets: dict[str, Path], tmp_path: Path
) -> None:
    run, other = tmp_path / "a" / "cells", tmp_path / "b" / "cells"
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
    # Two runs of one name have the folder over them named too.
    assert both.json["models"] == {"a/cells": str(run), "b/cells": str(other)}
    points = [(p["model"], p["scale"]) for p in both.json["points"]]
    assert points == [(x, scale) for x in ("a/cells", "b/cells") for scale in (64, 96)]
    assert both.json["machine"]["threads"] >= 1
    assert (both.json["timed"], both.json["rounds"]) == (1, 2)
    assert (tmp_path / "o" / "speed-accuracy-val.svg").is_file()


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("openvino"), reason="openvino is not installed")
def test_loss_distribution_openvino_gives_the_same_losses(
    cli: Cli, tiny_run: Path, tiny_sets: dict[str, Path], tmp_path: Path
) -> None:
    means = []
    for backend in ("torch", "openvino"):
        ended = cli("report", "loss-distribution", tiny_run, tiny_sets["coco"], *PLAIN,
                    f"--backend={backend}", f"--out={tmp_path / 'o'}", "--json")  # fmt: skip
        assert ended.code == 0, ended.err
        means.append([c["mean"] for c in ended.json["positives"] + ended.json["negatives"]])
    assert means[1] == pytest.approx(means[0], rel=1e-3)


@pytest.mark.slow  # imports openvino
def test_speed_accuracy_int8_without_calibration_is_an_error(
    cli: Cli, tiny_run: Path, tiny_sets: dict[str, Path]
) -> None:
    ended = cli("report", "speed-accuracy", tiny_run, f"--data={tiny_sets['coco']}",
                "--precision=int8", "--device=cpu", "--scale=64", "--rounds=1")  # fmt: skip
    assert ended.code == 2
    assert "--calibrate FOLDER" in ended.err


def test_name_models_adds_parents_until_unique(tmp_path: Path) -> None:
    runs = [tmp_path / "a" / "cells", tmp_path / "b" / "cells", tmp_path / "b" / "dogs"]
    for run in runs:
        (run / "best").mkdir(parents=True)
        (run / "config.toml").write_text("")
    a, b, dogs = map(str, runs)
    assert name_models([a]) == {"cells": a}
    assert name_models([f"{a}/best", dogs]) == {"cells": f"{a}/best", "dogs": dogs}
    assert name_models([a, b, dogs]) == {"a/cells": a, "b/cells": b, "b/dogs": dogs}
    assert name_models([a, "torchvision/x"]) == {"cells": a, "torchvision/x": "torchvision/x"}
    assert list(name_models([a, f"{a}/best"]).values()) == [a, f"{a}/best"]
    with pytest.raises(ConfigError, match="given twice: name each run once"):
        name_models([a, b, a])


def test_report_data_without_objects_draws_no_figure(
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


ERRORS = {
    "no data": (["loss-distribution", "{run}"], 2, "DATA"),
    "no data option": (["speed-accuracy", "{run}"], 2, "--data"),
    "no run": (["speed-accuracy", "--data", "{data}"], 2, "RUN"),
    "a gamma": (["loss-distribution", "{run}", "{data}", "--gamma=-1"], 2, "got -1.0"),
    "two gammas": (
        ["loss-distribution", "{run}", "{data}", "--gamma=1", "--gamma=1"], 2, "different"
    ),
    "a size": (["loss-distribution", "{run}", "{data}", "--image-size=8"], 2, "image_size"),
    "a scale": (["speed-accuracy", "{run}", "--data={data}", "--scale=16"], 2, "got 16"),
    "a run twice": (["speed-accuracy", "{run}", "{run}", "--data={data}"], 2, "given twice"),
    "rounds": (["speed-accuracy", "{run}", "--data={data}", "--rounds=0"], 2, "--rounds"),
    "a device": (["speed-accuracy", "{run}", "--data={data}", "--device=gpu"], 2, "gpu"),
    "a precision": (["loss-distribution", "{run}", "{data}", "--precision=f32"], 2, "float32"),
    "a split": (["loss-distribution", "{run}", "{data}", "--split=tset"], 1, "did you mean test?"),
    "another split": (["speed-accuracy", "{run}", "--data={data}", "--split=tset"], 1, "test?"),
    "data that is not there": (["loss-distribution", "{run}", "{run}/no"], 1, "no such file"),
    "no such run": (["speed-accuracy", "{run}/no", "--data={data}"], 1, "there is no checkpoint"),
    "a command": (["loss-distribtuion"], 2, "loss-distribution"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_error_is_one_line(cli: Cli, tiny_run: Path, tiny_sets: dict[str, Path], name: str) -> None:
    arguments, code, said = ERRORS[name]
    filled = (x.format(run=tiny_run, data=tiny_sets["coco"]) for x in arguments)
    ended = cli("report", *filled)
    assert ended.code == code
    assert ended.out == ""
    lines = ended.err.splitlines()
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("error: ")
    assert said.lower() in lines[0].lower()
