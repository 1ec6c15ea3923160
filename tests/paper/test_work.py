"""Trainings of a plan in this process, and in processes that are stopped or killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from filelock import FileLock

from retinanet import load
from retinanet.cli import main
from retinanet.config import load_recipe
from retinanet.data.synthetic import synthetic_dataset
from retinanet.errors import ConfigError
from retinanet.paper.plan import Training
from retinanet.paper.work import (
    EXIT_LOCKED,
    EXIT_STOPPED,
    Task,
    is_locked,
    read_result,
    start_worker,
    work,
)

SMALL = (
    "model.channels=16",
    "model.head_depth=1",
    "model.norm=trained",
    "anchors.sizes=[16,32,64,128,256]",
    "data.workers=0",
    "train.batch_size=4",
    "train.precision=float32",
)
NETWORK = ("model.backbone=resnet18", "data.image_size=64", "data.max_size=64")
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
    return Training("row", load_recipe("quick", [*SMALL, *NETWORK, *own, *overrides]), "", 0)


def task_of(one: Training, out: Path, data: Path, processes: int = 1) -> Task:
    return Task.of(one, out, data, device="cpu", threads=1, processes=processes)


def work_here(task: Task) -> int:
    """Do what a worker does, in this process."""
    threads = torch.get_num_threads()
    source, end = os.pipe()  # stays open: nobody asks to stop
    try:
        os.write(end, json.dumps({name: getattr(task, name) for name in Task.__slots__}).encode())
        os.write(end, b"\n")
        return work(source)
    finally:
        torch.set_num_threads(threads)


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def wait_until(condition: Callable[[], object], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def steps(folder: Path) -> list[int]:
    log = folder / "log.jsonl"
    lines = (
        [json.loads(line) for line in log.read_text("utf-8").splitlines()] if log.exists() else []
    )
    return [line["step"] for line in lines if "loss" in line]


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
    one = training("train.steps=2", "train.validate_every=2")
    folder, task = one.folder(tmp_path), task_of(one, tmp_path, shapes)
    assert work_here(task) == 0
    result = read_result(folder)
    assert result is not None
    assert (result.status, result.steps) == ("done", 2)
    assert [file.name for file in (folder / "last").iterdir()] == ["training.json"]
    load(folder)
    assert main(["evaluate", str(folder), str(shapes), "--device=cpu"]) == 0
    log = (folder / "log.jsonl").read_bytes()
    written = (folder / "result.json").stat().st_mtime_ns
    assert work_here(task) == 0
    assert (folder / "result.json").stat().st_mtime_ns == written
    # Without its result the training is found to be finished.
    (folder / "result.json").unlink()
    assert work_here(task) == 0
    assert read_result(folder) == result
    assert (folder / "log.jsonl").read_bytes() == log


def test_image_missing_from_val_is_skipped(shapes: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    next((data / "val").glob("*.png")).unlink()
    one = training("train.steps=1", "train.validate_every=1")
    assert work_here(task_of(one, tmp_path / "out", data)) == 0
    result = read_result(one.folder(tmp_path / "out"))
    assert result is not None
    assert result.metrics is not None
    assert result.metrics["images"] == 3


def test_locked_training_is_left_alone(shapes: Path, tmp_path: Path) -> None:
    one = training(ENDLESS)
    folder = one.folder(tmp_path)
    folder.parent.mkdir(parents=True)
    assert not is_locked(folder)
    with FileLock(folder.parent / ".seed-0.lock"):
        assert is_locked(folder)
        assert work_here(task_of(one, tmp_path, shapes)) == EXIT_LOCKED
    assert not is_locked(folder)
    assert not folder.exists()


@pytest.mark.parametrize("line", [b"what\n", b'{"folder": "x"}\n', b""])
def test_invalid_task_is_an_error(line: bytes) -> None:
    source, end = os.pipe()
    os.write(end, line)
    os.close(end)
    with pytest.raises(ConfigError, match="invalid task on standard input"):
        work(source)


def test_worker_saves_its_state_when_its_pipe_is_closed(shapes: Path, tmp_path: Path) -> None:
    one = training(ENDLESS)
    folder = one.folder(tmp_path)
    with (tmp_path / "output").open("wb") as output:
        worker = start_worker(task_of(one, tmp_path, shapes), environment(), output)
    assert worker.stdin is not None
    try:
        wait_until(lambda: len(steps(folder)) > 2)
        assert is_locked(folder)
        worker.stdin.close()
        assert worker.wait(240) == EXIT_STOPPED, (tmp_path / "output").read_text()
    finally:
        worker.kill()
    assert steps(folder) == [*range(1, saved_step(folder) + 1)]
    assert not is_locked(folder)


@pytest.mark.slow
def test_several_processes_train_together_and_end_together(shapes: Path, tmp_path: Path) -> None:
    one = training(ENDLESS, "train.save_every=3")
    folder = one.folder(tmp_path)
    with (tmp_path / "output").open("wb") as output:
        worker = start_worker(task_of(one, tmp_path, shapes, 2), environment(), output)
    assert worker.stdin is not None
    try:
        wait_until(lambda: len(steps(folder)) > 4)
        assert json.loads((folder / "run.json").read_text("utf-8"))["processes"] == 2
        children = psutil.Process(worker.pid).children()
        ranks = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
        assert len(ranks) == 2
        ranks[1].kill()
        assert worker.wait(240) == 128 + signal.SIGKILL
    finally:
        worker.kill()
        worker.stdin.close()
    wait_until(lambda: not any(child.is_running() for child in children), 60)
    assert saved_step(folder) >= 3
    assert not is_locked(folder)


@pytest.mark.slow
def test_worker_stops_when_its_command_is_killed(shapes: Path, tmp_path: Path) -> None:
    arguments = [f"--data={shapes}", f"--out={tmp_path}", "--jobs=1", "--device=cpu"]
    arguments += ["--row=gamma=2", "--steps=100000", "--backbone=resnet18"]
    arguments += ["--backbone-weights=none", "--image-size=64", *SMALL]
    command = subprocess.Popen(
        [sys.executable, "-m", "retinanet", "paper", "run", "table1b", *arguments],
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env=environment(),
    )

    def folders() -> list[Path]:
        return list((tmp_path / "runs").glob("*/seed-0"))

    try:
        wait_until(lambda: any(len(steps(one)) > 2 for one in folders()))
        (worker,) = psutil.Process(command.pid).children()
        command.kill()
        command.communicate(timeout=240)
    finally:
        command.kill()
        command.wait()
    (folder,) = folders()
    wait_until(lambda: not worker.is_running())
    assert not is_locked(folder)
    assert steps(folder) == [*range(1, saved_step(folder) + 1)]
