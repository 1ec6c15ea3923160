"""A tiny labelled folder for the tests of training, and a finished run on it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from tiny import tiny_recipe

from retinanet.data.synthetic import synthetic_dataset
from retinanet.training import loop, trainer
from retinanet.training.events import Event
from retinanet.training.optim import build_optimizer


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-data")
    synthetic_dataset(folder, splits={"train": 12, "val": 4}, image_size=64, seed=3)
    return folder


@pytest.fixture(scope="session")
def finished(
    tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[trainer.Run, list[Event]]:
    """A run of four steps with two validations, and its events; not to be changed."""
    events: list[Event] = []
    recipe = tiny_recipe("train.steps=4", "train.validate_every=2")
    out = tmp_path_factory.mktemp("finished") / "run"
    return trainer.train(recipe, tiny_data, out, device="cpu", on_event=events.append), events


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop one step ahead of what it reads, with torch's fused kernels, which run on a CPU."""
    monkeypatch.setattr(loop, "steps_ahead", lambda device: 1)
    monkeypatch.setattr(loop, "build_optimizer", partial(build_optimizer, fused=True))
