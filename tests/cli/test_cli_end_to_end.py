"""From labels to boxes with commands alone, in every format."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from retinanet.anchors import feature_sizes, level_anchors
from retinanet.cli.demo import SHAPES, run_demo
from retinanet.config import load_recipe
from retinanet.data import read_splits
from retinanet.data.synthetic import synthetic_dataset
from retinanet.errors import RetinaNetError
from retinanet.matching import match_anchors
from retinanet.paper.plan import Plan
from retinanet.paper.results import Result
from retinanet.paper.run import Workers
from retinanet.structures import Targets
from retinanet.training.data import recipe_anchors

from .conftest import TINY, Cli


def test_check_train_evaluate_detect(cli: Cli, tiny_sets: dict[str, Path], tmp_path: Path) -> None:
    data, run = tiny_sets["yolo"], tmp_path / "run"  # tests/data has the others
    assert cli("data", "check", data).code == 0

    ended = cli("train", data, "train.lr=0.001", *TINY, "--steps=2", f"--out={run}")
    assert ended.code == 0, ended.err
    assert f"model    {run / 'best'}" in ended.out
    assert "training on 4 images, 3 classes: 2 steps of 2 images" in ended.err
    for name in ("config.toml", "run.json", "log.jsonl", "metrics.json", "best", "last"):
        assert (run / name).exists()
    assert (run / "report.html").is_file()
    recipe = load_recipe(run / "config.toml")
    assert (recipe.train.lr, recipe.train.steps, recipe.train.epochs) == (0.001, 2, None)

    ended = cli("evaluate", run, data, "--split=test", "--json")
    assert ended.code == 0, ended.err
    assert ended.json["images"] == 2
    folder = run / "evaluation" / "test"
    assert json.loads((folder / "metrics.json").read_text()) == ended.json
    assert (folder / "results.json").is_file()
    assert list((folder / "plots").glob("*.png"))

    test = read_splits(data)["test"]
    out = tmp_path / "found"
    ended = cli("detect", run, *(image.path for image in test.images), f"--out={out}",
                "--format=json,images,coco,csv,yolo", "--score-threshold=0.001",
                "--detections-per-image=7", "--draw-threshold=0.3", "--json")  # fmt: skip
    assert ended.code == 0, ended.err
    assert ended.json["failures"] == []
    found = json.loads((out / "detections.json").read_text())["images"]
    objects = sum(len(image["detections"]) for image in found)
    assert sum(ended.json["objects"].values()) == objects
    assert 0 < objects <= 14  # two images, seven boxes each
    assert len(json.loads((out / "coco_results.json").read_text())) == objects
    rows = csv.reader((out / "detections.csv").read_text("utf-8").splitlines())
    assert len(list(rows)) == 1 + objects
    assert len(list((out / "images").iterdir())) == 2
    assert len(list((out / "labels").iterdir())) == 2


def test_results_file_has_the_metrics_of_the_model(
    cli: Cli, tiny_sets: dict[str, Path], tiny_run: Path, tmp_path: Path
) -> None:
    data = tiny_sets["coco"]
    model = cli("evaluate", tiny_run / "best", data, f"--out={tmp_path}", "--json")
    assert model.code == 0, model.err
    text = cli("evaluate", tmp_path / "results.json", data / "val.json").out
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARl"):
        assert f" {name} " in text
    for word in ("circle", "localisation", "missed", "best F1"):
        assert word in text
    results = cli("evaluate", tmp_path / "results.json", data / "val.json", "--json")
    assert results.code == 0, results.err
    for name in ("ap", "ap50", "ar100", "ar_small", "per_class"):
        assert results.json[name] == model.json[name]


def test_classes_of_evaluate_and_detect(
    cli: Cli, tiny_sets: dict[str, Path], tiny_run: Path, tmp_path: Path
) -> None:
    data = tiny_sets["coco"]
    ended = cli("evaluate", tiny_run, data, "--classes=circle, square",
                f"--out={tmp_path}", "--json")  # fmt: skip
    assert ended.code == 0, ended.err
    assert {row["name"] for row in ended.json["per_class"]} == {"circle", "square"}
    images = read_splits(data)["test"].images
    ended = cli("detect", tiny_run, images[0].path, f"--out={tmp_path}", "--classes=square",
                "--score-threshold=0.001", "--json")  # fmt: skip
    assert ended.code == 0, ended.err
    assert set(ended.json["objects"]) == {"square"}


def test_evaluate_tune_writes_the_settings_into_the_checkpoint(
    cli: Cli, tiny_sets: dict[str, Path], tiny_run: Path, tmp_path: Path
) -> None:
    data, run = tiny_sets["coco"], tmp_path / "run"
    shutil.copytree(tiny_run, run)
    text = run / "best" / "model.json"
    stored = json.loads(text.read_text())
    stored["info"]["detect"] |= {"nms_threshold": 0.65, "score_thresholds": {"circle": 0.9}}
    text.write_text(json.dumps(stored))
    ended = cli("evaluate", run, data, "--tune", f"--out={tmp_path / 'out'}")
    assert ended.code == 0, ended.err
    assert "NMS hard .65: AP" in ended.err
    assert "NMS wbf .6: AP" in ended.err
    assert f"in {run / 'best'}: NMS " in ended.err
    detect = json.loads(text.read_text())["info"]["detect"]
    assert detect["score_thresholds"] != {"circle": 0.9}
    for wrong in ("--nms=soft", "--classes=circle", "--max-detections=5"):
        ended = cli("evaluate", run, data, "--tune", wrong)
        assert ended.code == 2
        assert "--tune is for a run or checkpoint folder with its own settings" in ended.err
    assert "or a tile is given" in cli("evaluate", run, data, "--tune", "--tile=64").err


def test_evaluate_with_other_nms(
    cli: Cli, tiny_sets: dict[str, Path], tiny_run: Path, tmp_path: Path
) -> None:
    model = tmp_path / "best"
    shutil.copytree(tiny_run / "best", model)
    stored = json.loads((model / "model.json").read_text())
    stored["info"]["detect"]["score_threshold"] = 0.001  # the scores of two steps are low
    (model / "model.json").write_text(json.dumps(stored))

    def results(*options: str) -> str:
        out = tmp_path / "_".join(options)
        ended = cli("evaluate", model, tiny_sets["coco"], f"--out={out}", *options)
        assert ended.code == 0, ended.err
        return (out / "results.json").read_text()

    assert results("--nms=hard") != results("--nms=wbf", "--flip-tta")


def test_train_again_is_finished(cli: Cli, tiny_sets: dict[str, Path], tiny_run: Path) -> None:
    weights = (tiny_run / "last" / "model.safetensors").read_bytes()
    ended = cli("train", *TINY, "--steps=2", f"--out={tiny_run}", "--json")  # its own data
    assert ended.code == 0, ended.err
    assert "is finished: 2 steps" in ended.err
    assert (tiny_run / "last" / "model.safetensors").read_bytes() == weights
    assert ended.json["folder"] == str(tiny_run)
    assert set(ended.json["metrics"]) >= {"ap", "ap50", "loss"}
    ended = cli("train", tiny_sets["coco"], *TINY, "--steps=3", f"--out={tiny_run}")
    assert ended.code == 2
    assert "train.steps = 2" in ended.err


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"data": "gone"}, "was trained on gone, which does not exist; give DATA"),
        ({"data": "memory", "format": "memory"}, "on data in memory, which no command can read"),
    ],
)
def test_train_without_the_data_of_the_run_is_an_error(
    info: dict[str, str], message: str, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text(json.dumps(info))
    ended = cli("train", f"--out={tmp_path}")
    assert (ended.code, message in ended.err) == (2, True)


def test_train_from_another_network_with_a_class_map_into_the_default_folder(
    cli: Cli,
    tiny_sets: dict[str, Path],
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.toml").write_text("circle = 'square'\n")
    start = (f"--init={tiny_run}", "--class-map=names.toml")
    other = ("train", tiny_sets["coco"], *TINY, "model.channels=8", "--steps=1", *start)
    ended = cli(*other)
    assert ended.code == 1
    assert "does not fit the network" in ended.err
    assert "give --init-partial" in ended.err
    ended = cli(*other, "--init-partial")
    assert ended.code == 0, ended.err
    assert f"from {tiny_run}: " in ended.err
    assert "tensors loaded (lost: " in ended.err
    assert (tmp_path / "runs" / "coco" / "best" / "model.safetensors").is_file()


def test_train_overfit_prints_a_verdict_with_exit_code_1(
    cli: Cli, tiny_sets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = cli("train", tiny_sets["coco"], *TINY, "--overfit=2", "--steps=2", "train.lr=1e-9")
    assert ended.code == 1, ended.err
    assert ended.out.startswith("overfit  2 images, 2 steps: AP50 0.000, loss ")
    assert "verdict  not learned; " in ended.out
    assert list(tmp_path.iterdir()) == []


def test_options_become_settings(cli: Cli, tmp_path: Path) -> None:
    options = ["--backbone=resnet34", "--backbone-weights=none", "--epochs=3", "--batch-size=4"]
    options += ["--image-size=192", "--precision=bf16", "--seed=7", '--classes=cat,"a, b"']
    ended = cli("train", "--show-recipe", *options)
    assert ended.out.startswith("# auto = true has no effect in a file that states all settings")
    file = tmp_path / "mine.toml"
    file.write_text(ended.out)
    recipe = load_recipe(file)
    quick = load_recipe("quick")
    assert recipe.model.backbone == "resnet34"
    assert recipe.model.backbone_weights == "none"
    assert (recipe.train.epochs, recipe.train.min_steps) == (3.0, 1)
    assert recipe.train.max_steps > quick.train.max_steps
    assert (recipe.train.batch_size, recipe.train.precision, recipe.train.seed) == (4, "bf16", 7)
    assert recipe.data.classes == ("cat", "a, b")
    # The longer side keeps its ratio to the shorter one.
    ratio = quick.data.max_size / quick.data.image_size
    assert (recipe.data.image_size, recipe.data.max_size) == (192, round(192 * ratio))


def test_show_recipe_with_data_prints_what_is_chosen(
    cli: Cli, tiny_sets: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(cli("train", tiny_sets["coco"], "--show-recipe").out)
    recipe = load_recipe(file)
    assert (recipe.auto, recipe.data.image_size, recipe.model.p2) == (False, 96, False)
    stated = cli("train", tiny_sets["coco"], "--show-recipe", "--image-size=64").out
    assert "\nimage_size = 64\n" in stated
    assert "\np2 = true\n" in stated


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send")
def test_train_stopped_by_a_signal_saves_and_resumes(
    cli: Cli, tiny_sets: dict[str, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    log = run / "log.jsonl"
    arguments = ("train", tiny_sets["coco"], *TINY, "--steps=12", f"--out={run}",
                 "train.validate_every=12")  # fmt: skip

    def send() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if log.is_file() and log.read_text().count("\n") >= 2:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.005)

    sender = threading.Thread(target=send)
    sender.start()
    ended = cli(*arguments)
    sender.join()
    assert ended.code == 143, ended.err
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert 2 <= steps[-1] < 12
    assert steps == list(range(1, steps[-1] + 1))
    stopped, again = ended.err.splitlines()[-2:]
    assert stopped == f"stopped by SIGTERM after step {steps[-1]}; the state is saved in {run}"
    assert again.startswith("stopped; to resume: retinanet train ")
    assert f"--out={run}" in again

    ended = cli(*arguments)
    assert ended.code == 0, ended.err
    assert f"resuming from step {steps[-1]}" in ended.err
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))


SMALL = ("train.steps=2", "train.batch_size=2", "data.image_size=64", "data.max_size=64")


@pytest.mark.slow
def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = {"train": 4, "val": 2}
    results = run_demo(tmp_path, images, SMALL, seed=0, device="cpu")
    assert [result.loss for result in results] == ["focal loss", "cross entropy"]
    assert all(0 <= result.metrics.ap <= 1 for result in results)
    assert all((result.model / "model.safetensors").is_file() for result in results)
    drawn = {file.name for file in (tmp_path / "images").iterdir()}
    assert {f"000000_{name}.png" for name in ("labels", "focal_loss", "cross_entropy")} <= drawn
    page = (tmp_path / "report.html").read_text("utf-8")
    reports = [result.folder / "report.html" for result in results]
    assert all(file.is_file() for file in reports)
    assert all(file.relative_to(tmp_path).as_posix() in page for file in reports)

    capsys.readouterr()
    again = run_demo(tmp_path, images, SMALL, seed=0, device="cpu")
    assert [result.row for result in again] == [result.row for result in results]
    assert capsys.readouterr().err.count(", finished before") == 2


def test_demo_has_the_imbalance_of_the_paper(tmp_path: Path) -> None:
    dataset = synthetic_dataset(tmp_path, splits={"train": 16}, **SHAPES)["train"]
    spec, size = recipe_anchors(load_recipe("demo")), SHAPES["image_size"]
    anchors = torch.cat(level_anchors(spec, feature_sizes(spec.strides, size, size)))
    foreground = 0
    for image in dataset.images:
        boxes = torch.tensor([item.box for item in image.annotations]).reshape(-1, 4)
        targets = Targets(boxes[None], torch.zeros(1, len(boxes), dtype=torch.int64))
        foreground += int((match_anchors(anchors, targets) >= 0).sum())
    assert len(anchors) >= 20_000
    assert foreground > 0
    assert len(dataset) * len(anchors) > 1000 * foreground


def test_demo_ends_where_a_training_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other training is ended by ``run_plan``: tests/paper/test_run.py."""

    def fail(plan: Plan, workers: Workers, on_end: Callable[..., None], *_: object) -> None:
        assert workers.jobs == 2
        on_end(plan.trainings[1], Result("failed", 0, None, "no memory"), False)

    monkeypatch.setattr("retinanet.paper.run.run_plan", fail)
    monkeypatch.setattr("retinanet.data.cpus.usable_cpus", lambda: 2)
    with pytest.raises(RetinaNetError, match="training with cross entropy failed: no memory"):
        run_demo(tmp_path, {"train": 4, "val": 2}, SMALL, seed=0, device="cpu")
