"""Training from WebDataset shards: as from the folder, killed and resumed, and by two processes."""

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
from tiny import TINY, tiny_recipe

from retinanet.data import convert
from retinanet.training.events import Event
from retinanet.training.trainer import train

_SCRIPT = Path(__file__).with_name("train_in_process.py")
_BY_SHARDS = ("data.order=shards", "data.shard_window=2", "train.save_every=2", "train.steps=10")


@pytest.fixture(scope="module")
def shards(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "of-tiny"
    convert(tiny_data, folder, "webdataset", shard_size="2")
    return folder


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "last" / "model.safetensors")


def _assert_same_weights(first: Path, second: Path) -> None:
    expected, found = _weights(first), _weights(second)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_trained_from_shards_as_from_the_folder(
    tiny_data: Path, shards: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe("train.steps=4", "data.any_corner=true", "data.scale_jitter=[0.7, 1.4]")
    for name, data in (("folder", tiny_data), ("shards", shards)):
        train(recipe, data, tmp_path / name, device="cpu")
    losses, validations = (
        [
            [line[key] for line in map(json.loads, log.read_text().splitlines()) if key in line]
            for log in (tmp_path / name / "log.jsonl" for name in ("folder", "shards"))
        ]
        for key in ("loss", "validation")
    )
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]
    assert validations[0] == validations[1]
    _assert_same_weights(tmp_path / "folder", tmp_path / "shards")


def test_another_number_of_processes_is_told(shards: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(*_BY_SHARDS, "train.steps=4")
    events: list[Event] = []

    class Stop(Exception):
        pass

    def stop(event: Event) -> None:
        if event.kind == "step" and event.data["step"] == 3:
            raise Stop

    with pytest.raises(Stop):
        train(recipe, shards, tmp_path / "run", device="cpu", on_event=stop)
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(info | {"processes": 2}))
    train(recipe, shards, tmp_path / "run", device="cpu", on_event=events.append)
    told = [event.data["message"] for event in events if event.kind == "message"]
    assert any("started with 2 processes and resumes with 1" in message for message in told)


def _train_by(command: list[str], folder: Path, *, kill_after: int | None = None) -> None:
    """Run a training, or kill it once its log has some lines."""
    path = os.pathsep.join([str(_SCRIPT.parent), os.environ.get("PYTHONPATH", "")])
    environment = dict(os.environ, OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", PYTHONPATH=path)
    if kill_after is None:
        subprocess.run(command, env=environment, check=True, timeout=200)
        return
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    log = folder / "log.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and len(log.read_text().splitlines()) >= kill_after:
            os.killpg(process.pid, 9)
            break
        time.sleep(0.002)
    assert process.wait(timeout=60) != 0


@pytest.mark.slow
def test_killed_and_resumed_on_the_command_line(shards: Path, tmp_path: Path) -> None:
    def command(folder: Path) -> list[str]:
        return [
            sys.executable, "-m", "retinanet", "train", str(shards), *TINY, *_BY_SHARDS,
            "--out", str(folder), "--device", "cpu",
        ]  # fmt: skip

    _train_by(command(tmp_path / "whole"), tmp_path / "whole")
    _train_by(command(tmp_path / "parts"), tmp_path / "parts", kill_after=5)
    _train_by(command(tmp_path / "parts"), tmp_path / "parts")
    _assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    lines = map(json.loads, (tmp_path / "parts" / "log.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines if "loss_box" in line] == list(range(1, 11))


@pytest.mark.slow
def test_two_processes_killed_and_resumed(shards: Path, tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

    def command(folder: Path) -> list[str]:
        settings = (*_BY_SHARDS, "data.workers=1")
        return [sys.executable, *launch, str(_SCRIPT), str(shards), str(folder), *settings]

    _train_by(command(tmp_path / "whole"), tmp_path / "whole")
    _train_by(command(tmp_path / "parts"), tmp_path / "parts", kill_after=5)
    _train_by(command(tmp_path / "parts"), tmp_path / "parts")
    _assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    info = json.loads((tmp_path / "whole" / "run.json").read_text())
    assert (info["processes"], info["format"]) == (2, "webdataset")
