"""What needs processes of its own: kill -9 and resume, and two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from retinanet.data.formats import read_splits
from retinanet.data.synthetic import synthetic_dataset

_SCRIPT = Path(__file__).with_name("train_in_process.py")


def _environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(_SCRIPT.parent), os.environ.get("PYTHONPATH", "")])
    return dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=path, **more)


def _command(data: Path, out: Path, *settings: str) -> list[str]:
    return [sys.executable, str(_SCRIPT), str(data), str(out), *settings]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "last" / "model.safetensors")


@pytest.mark.slow
def test_killed_again_and_again_it_ends_at_the_same_weights(
    tiny_data: Path, tmp_path: Path
) -> None:
    settings = ("train.steps=12", "train.save_every=2", "train.validate_every=4", "train.ema=0.9")
    subprocess.run(
        _command(tiny_data, tmp_path / "whole", *settings), env=_environment(), check=True
    )

    killed = 0
    log = tmp_path / "parts" / "log.jsonl"
    command = _command(tiny_data, tmp_path / "parts", *settings)
    # Kill after the log grew by a few lines: once between two saves, once right after one.
    for lines_before_the_kill in (3, 7, 10):
        process = subprocess.Popen(command, env=_environment())
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if log.exists() and len(log.read_text().splitlines()) >= lines_before_the_kill:
                process.kill()
                killed += 1
                break
            time.sleep(0.002)
        process.wait(timeout=60)
    assert killed >= 2
    subprocess.run(command, env=_environment(), check=True)

    expected, found = _weights(tmp_path / "whole"), _weights(tmp_path / "parts")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    steps = [
        json.loads(line)["step"] for line in log.read_text().splitlines() if "loss_box" in line
    ]
    assert steps == list(range(1, 13))


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss",
    [
        ("loss.normalizer=image",),
        ("loss.normalizer=batch",),
        ("loss.normalizer=running",),
        ("loss.mining=ohem_1_3", "loss.classification=cross_entropy", "loss.normalizer=batch"),
    ],
)
def test_two_ranks_one_without_objects_equal_one_process(
    tmp_path: Path, loss: tuple[str, ...]
) -> None:
    data = tmp_path / "data"
    synthetic_dataset(data, splits={"train": 4, "val": 2}, image_size=64, seed=1)
    settings = (
        "train.batch_size=4",
        "train.optimizer=sgd",
        "train.lr=0.05",
        "train.clip_norm=0",
        "data.horizontal_flip=0",
        *loss,
    )
    # A batch is the whole set; the first step's order says which two images fall to rank 1.
    order = _first_batch(data)
    labels = json.loads((data / "train.json").read_text())
    bare = {labels["images"][i]["id"] for i in order[2:]}
    labels["annotations"] = [a for a in labels["annotations"] if a["image_id"] not in bare]
    (data / "train.json").write_text(json.dumps(labels))

    subprocess.run(
        _command(data, tmp_path / "one", *settings, "train.steps=1"),
        env=_environment(),
        check=True,
        timeout=200,
    )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two = _command(data, tmp_path / "two", *settings, "train.steps=1")
    subprocess.run(
        [two[0], *launch, *two[1:]],
        env=_environment(ACCELERATE_USE_CPU="true"),
        check=True,
        timeout=200,
    )

    expected, found = _weights(tmp_path / "one"), _weights(tmp_path / "two")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=name)
    line_one, line_two = (
        json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])
        for name in ("one", "two")
    )
    assert line_two["loss"] == pytest.approx(line_one["loss"], rel=1e-4)
    assert line_two["positives"] == line_one["positives"]


def _first_batch(data: Path) -> list[int]:
    from retinanet.config import DataConfig
    from retinanet.data.loading import train_loader

    config = DataConfig(image_size=64, max_size=64)
    train = read_splits(data)["train"]
    loader = train_loader(train, config, batch_size=4, steps=range(1), seed=0)
    return next(iter(loader)).indices.tolist()


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
        env=_environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "steps 1\n"
    assert "put its code under if __name__" in done.stderr
