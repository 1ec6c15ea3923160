"""Trainings of a plan in this process, and in processes that are stopped or killed."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from retinanet import load
from retinanet.cli import main
from retinanet.config import load_recipe
from retinanet.data.synthetic import synthetic_dataset
from retinanet.paper.plan import Training
from retinanet.paper.run import Workers
from retinanet.paper.work import read_result, work

SMALL = (
    "model.channels=16",
    "model.head_depth=1",
    "model.norm=trained",
    "anchors.sizes=[16,32,64,128,256]",
    "data.workers=0",
    "train.batch_size=4",
    "train.precision=float32",
)
NETWORK = ("model.backbone=tiny", "data.image_size=64", "data.max_size=64")
ENDLESS = "train.steps=100000"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    splits = {"train": 8, "val": 4}
    synthetic_dataset(
        folder, splits=splits, image_size=64, objects=(1, 2), object_size=(16, 24), empty=0.0
    )
    return folder


def training(*overrides: str) -> Training:
    own = ("model.backbone_weights=none", "train.warmup_steps=0")
    return Training("row", load_recipe("paper_quick", [*SMALL, *NETWORK, *own, *overrides]), "", 0)


def work_here(training: Training, out: Path, data: Path) -> int:
    """Do what a worker does, in this process."""
    threads = torch.get_num_threads()
    command, _ = Workers(data, out, 1, "cpu").command(training, 0)
    try:
        return work(**json.loads(command[-1]))
    finally:
        torch.set_num_threads(threads)


def start_worker(training: Training, out: Path, data: Path) -> subprocess.Popen[bytes]:
    command, environment = Workers(data, out, 1, "cpu").command(training, 0)
    environment |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)


def wait_until(condition: Callable[[], object], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def steps(folder: Path) -> list[int]:
    log = folder / "log.jsonl"
    text = log.read_text("utf-8") if log.exists() else ""
    return [line["step"] for line in map(json.loads, text.splitlines()) if "loss" in line]


def saved_step(folder: Path) -> int:
    """Return the step of the saved state, also while a worker replaces it."""
    for _ in range(100):
        try:
            text = (folder / "last" / "training.json").read_text("utf-8")
            return int(json.loads(text)["progress"]["step"])
        except FileNotFoundError:  # between two renames
            time.sleep(0.02)
    raise FileNotFoundError(folder)


def test_finished_training_keeps_its_checkpoint_and_is_not_repeated(
    shapes: Path, tmp_path: Path
) -> None:
    row = training("train.steps=2", "train.validate_every=2")
    folder = row.folder(tmp_path)
    assert work_here(row, tmp_path, shapes) == 0
    result = read_result(folder)
    assert result is not None
    assert (result.status, result.steps) == ("done", 2)
    assert not list((folder / "last").glob("*.safetensors"))
    load(folder)
    assert main(["evaluate", str(folder), str(shapes), "--device=cpu"]) == 0
    log = (folder / "log.jsonl").read_bytes()
    # Without its result the training is known to be finished.
    (folder / "result.json").unlink()
    assert work_here(row, tmp_path, shapes) == 0
    assert read_result(folder) == result
    assert (folder / "log.jsonl").read_bytes() == log


def test_diverged_training_is_a_result(shapes: Path, tmp_path: Path) -> None:
    row = training("train.steps=9", "train.optimizer=sgd", "train.lr=1e20", "train.clip_norm=0")
    assert work_here(row, tmp_path, shapes) == 0
    result = read_result(row.folder(tmp_path))
    assert result is not None
    assert (result.status, result.metrics) == ("diverged", None)
    assert "loss" in result.note


def test_worker_saves_its_state_when_its_input_is_closed(shapes: Path, tmp_path: Path) -> None:
    row = training(ENDLESS, "model.backbone=mobilenet_v2")
    folder = row.folder(tmp_path)
    worker = start_worker(row, tmp_path, shapes)
    assert worker.stdin is not None
    try:
        wait_until(lambda: len(steps(folder)) > 2)
        worker.stdin.close()
        assert worker.wait(240) == 130
    finally:
        worker.kill()
    assert steps(folder) == [*range(1, saved_step(folder) + 1)]
