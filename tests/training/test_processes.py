"""Training that needs processes of its own: kill and resume, and two processes; and shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny import (
    assert_same_weights,
    read_log,
    steps_of,
    tiny_recipe,
    weights,
)

from retinanet.config import DataConfig
from retinanet.data import convert, read_splits
from retinanet.data.loading import train_loader
from retinanet.data.synthetic import synthetic_dataset
from retinanet.training.trainer import train

SCRIPT = Path(__file__).with_name("train_in_process.py")
IMPORTS = [str(SCRIPT.parent), str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")]
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(IMPORTS))
BY_SHARDS = ("data.order=shards", "data.shard_window=2", "train.save_every=2")
LOSSES = (
    ("loss.normalizer=image",),
    ("loss.normalizer=running",),
    (
        "matching.assignment=task_aligned",
        "matching.task_warmup=0",
        "loss.normalizer=batch",
        "loss.classification=quality_focal",
        "loss.box=giou",
        "model.box_bins=8",
    ),
    ("loss.mining=ohem_1_3", "loss.classification=cross_entropy", "loss.normalizer=batch"),
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the other processes: sums in another order are not equal bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shards(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "of-tiny"
    convert(tiny_data, folder, "webdataset", shard_size="2")
    return folder


def run_script(
    *arguments: object, processes: int = 1, kill_at: int | None = None, log: Path | None = None
) -> None:
    """Run the script, or kill it once `log` has `kill_at` lines."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    prefix = [sys.executable, *(launch if processes > 1 else [])]
    process = subprocess.Popen(
        [*prefix, str(SCRIPT), *map(str, arguments)],
        env={**ENVIRONMENT, "ACCELERATE_USE_CPU": "true"},
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while log is not None and process.poll() is None and time.monotonic() < deadline:
        if log.exists() and len(log.read_text().splitlines()) >= (kill_at or 0):
            os.killpg(process.pid, 9)
            break
        time.sleep(0.002)
    assert (process.wait(timeout=200) != 0) == (log is not None)


@pytest.mark.slow
def test_train_killed_twice_ends_at_the_same_weights(tiny_data: Path, tmp_path: Path) -> None:
    settings = ("train.steps=10", "train.save_every=2", "train.validate_every=4", "train.ema=0.9")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(tiny_recipe(*settings), tiny_data, whole, device="cpu")
    for lines in (3, 7):  # between two saves, and right after a save
        run_script(tiny_data, parts, *settings, kill_at=lines, log=parts / "log.jsonl")
    train(tiny_recipe(*settings), tiny_data, parts, device="cpu")
    assert_same_weights(whole, parts)
    assert steps_of(parts) == list(range(1, 11))


def test_train_from_shards_equals_from_the_folder(
    tiny_data: Path, shards: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe("train.steps=4", "data.any_corner=true", "data.scale_jitter=[0.7, 1.4]")
    for name, data in (("folder", tiny_data), ("shards", shards)):
        train(recipe, data, tmp_path / name, device="cpu")
    assert read_log(tmp_path / "folder") == read_log(tmp_path / "shards")
    assert_same_weights(tmp_path / "folder", tmp_path / "shards")


@pytest.mark.slow
def test_two_processes_killed_on_shards_and_resumed_and_without_objects_in_rank_1(
    shards: Path, tmp_path: Path
) -> None:
    # A batch is the whole set; the first step's order says which two images fall to rank 1.
    data = tmp_path / "data"
    synthetic_dataset(data, splits={"train": 4, "val": 2}, image_size=64, seed=1)
    config = DataConfig(image_size=64, max_size=64)
    loader = train_loader(read_splits(data)["train"], config, batch_size=4, steps=range(1), seed=0)
    order = next(iter(loader)).indices.tolist()
    labels = json.loads((data / "train.json").read_text())
    bare = {labels["images"][i]["id"] for i in order[2:]}
    labels["annotations"] = [a for a in labels["annotations"] if a["image_id"] not in bare]
    (data / "train.json").write_text(json.dumps(labels))
    settings = ("train.steps=1", "train.optimizer=sgd", "train.lr=0.05", "train.clip_norm=0",
                "data.horizontal_flip=0")  # fmt: skip
    by_shards = (*BY_SHARDS, "train.steps=6", "data.workers=1")
    parts = tmp_path / "parts"
    log = parts / "log.jsonl"
    run_script(shards, parts, *by_shards, processes=2, kill_at=4, log=log)
    trainings: list[object] = [shards, parts, *by_shards, "--"]
    trainings += [shards, tmp_path / "whole", *by_shards]
    for i, loss in enumerate(LOSSES):
        trainings += ["--", data, tmp_path / f"two{i}", *settings, *loss]
    run_script(*trainings, processes=2)

    assert_same_weights(tmp_path / "whole", parts)
    info = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert (info["processes"], info["format"]) == (2, "webdataset")
    for i, loss in enumerate(LOSSES):
        one, two = tmp_path / f"one{i}", tmp_path / f"two{i}"
        train(tiny_recipe(*settings, *loss), data, one, device="cpu")
        found = weights(two / "last")
        for name, value in weights(one / "last").items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
        expected, line = read_log(one)[0], read_log(two)[0]
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert line["positives"] == expected["positives"]


def test_script_without_main_guard_trains_under_spawn(tiny_data: Path, tmp_path: Path) -> None:
    """As the example of docs/api.md on macOS, Windows and Python 3.14."""
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing\n"
        "multiprocessing.set_start_method('spawn')\n"
        "import retinanet as rn\n"
        "from tiny import TINY\n"
        "recipe = rn.load_recipe('quick', [*TINY, 'train.steps=1', 'data.workers=1'])\n"
        f"run = rn.train({str(tiny_data)!r}, recipe=recipe, out='run', device='cpu')\n"
        "print('steps', run.step)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env=ENVIRONMENT,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "steps 1\n"
    assert "put its code under if __name__" in done.stderr
