"""Workers and whole calls as real processes: who stops, who takes over, what is left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

from retinanet import load
from retinanet.cli import main
from retinanet.config import load_recipe
from retinanet.data.synthetic import synthetic_dataset
from retinanet.files import write_atomic
from retinanet.model.checkpoint import load_checkpoint
from retinanet.paper.plan import Training
from retinanet.paper.share import find_holder, held
from retinanet.paper.work import (
    STOPPED,
    TAKEN,
    _as_begun,
    describe_task,
    read_result,
    start_worker,
    work,
)

_SMALL = (
    "model.backbone=resnet18",
    "model.backbone_weights=none",
    "model.channels=16",
    "model.head_depth=1",
    "model.norm=trained",
    "anchors.sizes=[16,32,64,128,256]",
    "data.image_size=64",
    "data.max_size=64",
    "data.workers=0",
    "train.batch_size=4",
    "train.warmup_steps=0",
    "train.precision=float32",
)
_ENDLESS = "train.steps=100000"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    splits = {"train": 8, "val": 4}
    synthetic_dataset(
        folder, splits=splits, image_size=64, objects=(1, 2), object_size=(16, 24), empty=0.0
    )
    return folder


def _training(*settings: str) -> Training:
    return Training("row", load_recipe("quick", [*_SMALL, *settings]), "", 0)


def _start(
    training: Training, out: Path, data: Path, processes: int = 1
) -> subprocess.Popen[bytes]:
    task = describe_task(
        training, out, data, device="cpu", threads=1, workers=0, processes=processes
    )
    out.mkdir(exist_ok=True)
    with (out / "said").open("ab") as said:
        return start_worker(task, _environment(), said)


def _work_here(training: Training, out: Path, data: Path) -> int:
    """What a worker does, in this process."""
    task = describe_task(training, out, data, device="cpu", threads=1, workers=0)
    threads = torch.get_num_threads()
    source, end = os.pipe()  # which stays open: there is nobody to stop
    os.write(end, task.encode())
    try:
        return work(source)
    finally:
        torch.set_num_threads(threads)


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def _end(worker: subprocess.Popen[bytes], *, stop: bool = False) -> int:
    """The exit code of a worker, which is asked to stop or not."""
    assert worker.stdin is not None
    if stop:
        worker.stdin.close()
    try:
        code = worker.wait(120)
    finally:
        worker.kill()
        worker.stdin.close()
    return code


def _until(what: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def _steps(folder: Path) -> list[int]:
    log = folder / "log.jsonl"
    lines = [json.loads(one) for one in log.read_text("utf-8").splitlines()] if log.exists() else []
    return [one["step"] for one in lines if "loss" in one]


def _kept(folder: Path) -> int:
    """The step of the state that is kept, also while a worker puts a new one into its place."""
    file = folder / "last" / "training.json"
    for _ in range(100):
        try:
            return int(json.loads(file.read_text("utf-8"))["progress"]["step"])
        except FileNotFoundError:  # between two renames
            time.sleep(0.02)
    raise FileNotFoundError(file)


def _ranks(worker: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return psutil.Process(worker.pid).children()


@pytest.mark.slow
def test_a_finished_row_keeps_what_it_is_used_from(shapes: Path, tmp_path: Path) -> None:
    training = _training("train.steps=3")
    folder = training.folder(tmp_path)
    assert _end(_start(training, tmp_path, shapes)) == 0, (tmp_path / "said").read_text()
    result = read_result(folder)
    assert result is not None
    assert (result.status, result.steps) == ("done", 3)
    assert [one.name for one in (folder / "last").iterdir()] == ["training.json"]
    load(folder)
    load_checkpoint(folder)
    assert main(["evaluate", str(folder), str(shapes), "--device=cpu"]) == 0
    # Asked again it does nothing; without its result it finds it again.
    log = (folder / "log.jsonl").read_bytes()
    written = (folder / "result.json").stat().st_mtime_ns
    assert _work_here(training, tmp_path, shapes) == 0
    assert (folder / "result.json").stat().st_mtime_ns == written
    (folder / "result.json").unlink()
    assert _work_here(training, tmp_path, shapes) == 0
    assert read_result(folder) == result
    assert (folder / "log.jsonl").read_bytes() == log


@pytest.mark.slow
def test_one_is_at_work_and_stops_with_its_state(shapes: Path, tmp_path: Path) -> None:
    training = _training(_ENDLESS)
    folder = training.folder(tmp_path)
    first = _start(training, tmp_path, shapes)
    try:
        _until(lambda: len(_steps(folder)) > 2)
        assert _end(_start(training, tmp_path, shapes)) == TAKEN
        assert len(_ranks(first)) == 0
    finally:
        assert _end(first, stop=True) == STOPPED
    steps = _steps(folder)
    assert steps == [*range(1, _kept(folder) + 1)]
    assert not held(folder)


@pytest.mark.slow
def test_who_has_lost_the_place_writes_nothing_more(shapes: Path, tmp_path: Path) -> None:
    training = _training(_ENDLESS)
    folder = training.folder(tmp_path)
    task = describe_task(training, tmp_path, shapes, device="cpu", threads=1, workers=0)
    script = (
        "import sys; from retinanet.paper import share, work\n"
        "share._TOUCH_EVERY = 0.1\n"
        "sys.exit(work.work(0))"
    )
    with (tmp_path / "said").open("ab") as said:
        worker = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stderr=said, env=_environment()
        )
    assert worker.stdin is not None
    worker.stdin.write(task.encode())
    worker.stdin.flush()
    _until(lambda: len(_steps(folder)) > 2)
    holds = [*folder.parent.glob(".seed-0.held.*")]
    assert [one.suffix for one in holds] == [".0"]
    other = json.dumps({"machine": "elsewhere", "host": "elsewhere", "pid": 1, "started": 1})
    write_atomic(holds[0].with_suffix(".1"), other)
    assert _end(worker) == TAKEN
    assert _kept(folder) == 0  # not even the state of the moment
    assert str(find_holder(folder)) == "process 1 on elsewhere"


@pytest.mark.slow
def test_several_processes_under_one_that_holds_the_place(shapes: Path, tmp_path: Path) -> None:
    training = _training("train.steps=3")
    folder = training.folder(tmp_path)
    assert _end(_start(training, tmp_path, shapes, 2)) == 0, (tmp_path / "said").read_text()
    assert json.loads((folder / "run.json").read_text("utf-8"))["processes"] == 2
    assert _steps(folder) == [1, 2, 3]
    assert [one.name for one in (folder / "last").iterdir()] == ["training.json"]


@pytest.mark.slow
def test_a_killed_one_of_several_is_seen_as_killed(shapes: Path, tmp_path: Path) -> None:
    training = _training(_ENDLESS, "train.save_every=5")
    folder = training.folder(tmp_path)
    worker = _start(training, tmp_path, shapes, 2)
    _until(lambda: len(_steps(folder)) > 6)
    assert _end(_start(training, tmp_path, shapes, 2)) == TAKEN
    ranks = _ranks(worker)
    assert len(ranks) == 2
    ranks[1].kill()
    assert _end(worker) == 128 + signal.SIGKILL
    assert not any(one.is_running() for one in ranks)
    before = _kept(folder)
    assert before >= 5

    # Nor do they outlive the one that holds their place.
    again = _start(training, tmp_path, shapes, 2)
    _until(lambda: _kept(folder) > before)
    ranks = _ranks(again)
    again.kill()
    _end(again)
    _until(lambda: not any(one.is_running() for one in ranks))
    assert not held(folder)


def test_no_task(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "retinanet", "paper", "work"],
        input="what\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "no task on standard input" in done.stderr


def _call(out: Path, data: Path, *more: str) -> subprocess.Popen[str]:
    arguments = [f"--data={data}", f"--out={out}", "--jobs=1", "--device=cpu", *more]
    # The rows' own: what is beside them is refused as a setting.
    settings = [one for one in _SMALL if one.startswith(("model.c", "model.h", "model.n", "anch"))]
    settings += ["data.workers=0", "train.batch_size=4", "train.precision=float32"]
    arguments += ["--backbone=resnet18", "--backbone-weights=none", "--image-size=64", *settings]
    return subprocess.Popen(
        [sys.executable, "-m", "retinanet", "paper", "run", "table1b", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        text=True,
        env=_environment(),
    )


@pytest.mark.slow
def test_two_calls_at_once_train_each_row_once(shapes: Path, tmp_path: Path) -> None:
    rows = ("--row=gamma=0", "--row=gamma=2", "--steps=20")
    calls = [_call(tmp_path, shapes, *rows) for _ in range(2)]
    said = [call.communicate(timeout=300)[1] for call in calls]
    assert [call.returncode for call in calls] == [0, 0], said
    folders = sorted((tmp_path / "runs").glob("*/seed-0"))
    assert len(folders) == 2
    for folder in folders:
        assert _steps(folder) == [*range(1, 21)]
        words = folder.with_name("seed-0.log").read_text("utf-8")
        assert words.count("training on 8 images") == 1
        assert "resuming from" not in words
        for words in said:
            assert f"{folder.parent.name}, seed 0: AP " in words
    assert "".join(said).count("finished before") == 2  # each was the other's


@pytest.fixture
def hangups_count() -> Iterator[None]:
    """What is started here ends with its terminal, though nohup may have started this."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.slow
@pytest.mark.usefixtures("hangups_count")
def test_workers_stop_with_their_call_however_it_ends(shapes: Path, tmp_path: Path) -> None:
    for number in (signal.SIGKILL, signal.SIGHUP):  # the second goes on from the first's state
        call = _call(tmp_path, shapes, "--row=gamma=2", "--steps=100000")
        try:
            _until(lambda: any(held(one) for one in _folders(tmp_path)))
            (folder,) = _folders(tmp_path)
            holder = find_holder(folder)
            assert holder is not None
            worker = psutil.Process(holder.pid)
            _until(partial(_is_further, folder, len(_steps(folder)) + 2))
            call.send_signal(number)
            call.communicate(timeout=120)
        finally:
            call.kill()
            call.wait()
        assert call.returncode == (-9 if number == signal.SIGKILL else STOPPED)
        _until(partial(_has_ended, worker), 60)
        assert not held(folder)
        assert _steps(folder) == [*range(1, _kept(folder) + 1)]
        assert _kept(folder) > 2


def _folders(out: Path) -> list[Path]:
    return [one / "seed-0" for one in (out / "runs").glob("*")]


def _is_further(folder: Path, step: int) -> bool:
    return len(_steps(folder)) > step


def _has_ended(process: psutil.Process) -> bool:
    return not process.is_running()


def test_a_run_goes_on_wherever_its_weights_lie(shapes: Path, tmp_path: Path) -> None:
    training = _training("train.steps=2", "train.validate_every=2")
    folder = training.folder(tmp_path)
    moved = load_recipe("quick", [*_SMALL, "model.backbone_weights=/elsewhere/w.safetensors"])
    assert _as_begun(moved, folder) == moved  # nothing is begun
    assert _work_here(training, tmp_path, shapes) == 0
    assert _as_begun(moved, folder).model.backbone_weights == "none"


def test_a_image_that_is_missing_from_val_is_not_judged(shapes: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    next((data / "val").glob("*.png")).unlink()
    training = _training("train.steps=2", "train.validate_every=2")
    assert _work_here(training, tmp_path / "out", data) == 0
    result = read_result(training.folder(tmp_path / "out"))
    assert result is not None
    assert result.metrics is not None
    assert result.metrics["images"] == 3
