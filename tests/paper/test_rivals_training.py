"""Rivals in the training loop and under our metrics."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rivals_setup import batch_of, rival_recipe, tiny_rival
from safetensors.torch import load_file

from retinanet.data import read_splits
from retinanet.data.dataset import Dataset
from retinanet.data.synthetic import synthetic_dataset
from retinanet.errors import ConfigError, DataError, NonFiniteLossError
from retinanet.evaluation.metrics import Metrics
from retinanet.paper import rival_training
from retinanet.paper.rival_training import evaluate_rival, train_rival
from retinanet.paper.rivals import RIVALS, load_rival
from retinanet.training.events import Event, ignore
from retinanet.training.step import StepContext, backward, micro_batches
from retinanet.training.task import TaskSettings
from retinanet.training.trainer import train


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dataset]:
    folder = tmp_path_factory.mktemp("rivals-data")
    synthetic_dataset(folder, splits={"train": 10, "val": 4}, image_size=64, seed=3)
    return dict(read_splits(folder))


def _first(dataset: Dataset, count: int, *, bare: bool = False) -> Dataset:
    images = dataset.images[:count]
    if bare:
        images = tuple(dataclasses.replace(image, annotations=()) for image in images)
    return dataclasses.replace(dataset, images=images)


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def _timeless(line: dict[str, Any]) -> dict[str, Any]:
    timed = {"seconds", "images_per_second", "waiting", "memory_mb", "seconds_left"}
    return {key: value for key, value in line.items() if key not in timed}


@pytest.mark.parametrize("name", RIVALS)
def test_run_folder_is_like_retinanets(
    name: str, splits: dict[str, Dataset], tmp_path: Path
) -> None:
    events: list[Event] = []
    recipe = rival_recipe(
        "train.steps=2", "train.validate_every=1", "train.ema=0.9", "train.batch_size=2"
    )
    run = train_rival(name, recipe, splits, tmp_path / "run", device="cpu", on_event=events.append)
    names = {path.name for path in run.folder.iterdir() if path.name[0] != "."}
    assert names == {"config.toml", "run.json", "log.jsonl", "metrics.json", "last", "best"}
    lines = _log(run.folder)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert [line["step"] for line in lines if "validation" in line] == [1, 2]
    assert json.loads((run.folder / "run.json").read_text())["rival"] == name
    metrics = Metrics.from_dict(json.loads((run.folder / "metrics.json").read_text()))
    assert metrics.ap == run.best_ap
    assert metrics.loss is None
    assert metrics.images_per_second > 0
    assert [event.kind for event in events][:1] == ["start"]
    network = load_rival(run.folder)
    assert network.settings.classes == splits["train"].classes
    again = evaluate_rival(network, splits["val"], batch_size=4, device="cpu")
    assert again.ap == metrics.ap
    assert not network.training
    evaluate_rival(network.train(), splits["val"], device="cpu")
    assert network.training


def test_resumed_run_equals_an_uninterrupted_one(
    splits: dict[str, Dataset], tmp_path: Path
) -> None:
    """Faster R-CNN's samplers use torch's generator, and so does the loader of a validation."""
    name = "faster_rcnn"
    recipe = rival_recipe(
        "train.steps=4", "train.validate_every=3", "train.save_every=2", "train.batch_size=1"
    )
    whole = train_rival(name, recipe, splits, tmp_path / "whole", device="cpu")

    def kill(event: Event) -> None:
        if event.kind == "step" and event.data["step"] == 4:
            raise SystemError("killed")

    with pytest.raises(SystemError):
        train_rival(name, recipe, splits, tmp_path / "parts", device="cpu", on_event=kill)
    events: list[Event] = []
    second = train_rival(
        name, recipe, splits, tmp_path / "parts", device="cpu", on_event=events.append
    )
    assert (events[0].kind, events[0].data["step"]) == ("resume", 2)
    expected = load_file(whole.folder / "last" / "rival.safetensors")
    found = load_file(second.folder / "last" / "rival.safetensors")
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(value, found[key]), key
    first, resumed = ([_timeless(line) for line in _log(run.folder)] for run in (whole, second))
    assert first == resumed


def test_steps_have_the_same_images_as_retinanets(
    splits: dict[str, Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[torch.Tensor]] = {"rival": [], "ours": []}

    def spy(*arguments: Any, **options: Any) -> Any:
        seen["ours"].append(arguments[2].images)
        return backward(*arguments, **options)

    monkeypatch.setattr("retinanet.training.task.backward", spy)
    own = rival_training.RivalTask.training_step

    def rivals_spy(self: Any, network: Any, model: Any, batch: Any, context: Any) -> Any:
        seen["rival"].append(batch.images)
        return own(self, network, model, batch, context)

    monkeypatch.setattr(rival_training.RivalTask, "training_step", rivals_spy)
    recipe = rival_recipe(
        "train.steps=3", "train.validate_every=3", "data.scale_jitter=[0.7, 1.4]", "data.colour=0.5"
    )
    run = train_rival("ssd", recipe, splits, tmp_path / "rival", device="cpu")
    ours = train(recipe, splits, tmp_path / "ours", device="cpu")
    assert len(seen["rival"]) == len(seen["ours"]) == 3
    for theirs, images in zip(seen["rival"], seen["ours"], strict=True):
        assert torch.equal(theirs, images)
    rates = [[line["lr"] for line in _log(x.folder) if "lr" in line] for x in (run, ours)]
    assert rates[0] == rates[1]


def test_micro_batches_are_averaged(splits: dict[str, Dataset]) -> None:
    device: Any = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    recipe = rival_recipe("train.accumulate=2")
    settings = TaskSettings(recipe, splits["train"], device, "float32", 0, ignore)
    task = rival_training.RivalTask(settings, "ssd")
    network, batch = tiny_rival("ssd").train(), batch_of()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    context = StepContext(0, "float32", scaler, running=torch.tensor(100.0))
    losses, running = task.training_step(network, network, batch, context)
    found = [p.grad for p in network.parameters()]
    network.zero_grad(set_to_none=True)
    halves = [network.losses(part) for part in micro_batches(batch, 2)]
    ((halves[0].total + halves[1].total) / 2).backward()
    torch.testing.assert_close(found, [p.grad for p in network.parameters()])
    torch.testing.assert_close(losses.total, (halves[0].total + halves[1].total).detach() / 2)
    assert len(losses.foreground) == 2
    assert running == 100


@pytest.mark.slow
def test_single_image_is_learned(splits: dict[str, Dataset], tmp_path: Path) -> None:
    single = dataclasses.replace(
        splits["train"],
        images=tuple(i for i in splits["train"].images if len(i.annotations) == 2)[:1],
    )
    recipe = rival_recipe(
        "train.steps=60", "train.batch_size=1", "train.reference_batch=1", "train.lr=0.002",
        "data.horizontal_flip=0", "train.validate_every=60", "train.deterministic=false",
    )  # fmt: skip
    run = train_rival("ssd", recipe, dict.fromkeys(("train", "val"), single), tmp_path / "run")
    lines = [line for line in _log(run.folder) if "loss" in line]
    assert lines[-1]["loss"] < 0.3 * lines[0]["loss"]
    assert run.metrics["ap50"] > 0.9


def test_nonfinite_loss_names_the_step(splits: dict[str, Dataset], tmp_path: Path) -> None:
    recipe = rival_recipe(
        "train.steps=50", "train.optimizer=sgd", "train.lr=1e18", "train.clip_norm=0",
        "train.save_every=1", "train.validate_every=50",
    )  # fmt: skip
    with pytest.raises(NonFiniteLossError, match=r"step \d+: the loss of ssd is .* images"):
        train_rival("ssd", recipe, splits, tmp_path / "run", device="cpu")
    weights = load_file(tmp_path / "run" / "last" / "rival.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_run_folder_of_another_detector_is_an_error(
    splits: dict[str, Dataset], tmp_path: Path
) -> None:
    recipe = rival_recipe("train.steps=1")
    train_rival("ssd", recipe, splits, tmp_path / "ssd", device="cpu")
    with pytest.raises(ConfigError, match="contains a run of ssd, and now it is faster_rcnn"):
        train_rival("faster_rcnn", recipe, splits, tmp_path / "ssd", device="cpu")
    train(recipe, splits, tmp_path / "ours", device="cpu")
    with pytest.raises(ConfigError, match="contains a run of RetinaNet, and now it is ssd"):
        train_rival("ssd", recipe, splits, tmp_path / "ours", device="cpu")
    with pytest.raises(ConfigError, match="contains a run of ssd, and now it is RetinaNet"):
        train(recipe, splits, tmp_path / "ssd", device="cpu")


def test_invalid_input_is_an_error_before_anything_is_written(
    splits: dict[str, Dataset], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"rival 'sdd' is not one of .*; did you mean ssd\?"):
        train_rival("sdd", rival_recipe(), splits, out, device="cpu")
    bare = {"train": _first(splits["train"], 5, bare=True)}
    with pytest.raises(DataError, match="no object to train on in 5 images"):
        train_rival("ssd", rival_recipe(), bare, out, device="cpu")
    unknown = rival_recipe("model.backbone=resnet19")
    with pytest.raises(ConfigError, match="there is no backbone 'resnet19'"):
        train_rival("ssd", unknown, splits, out, device="cpu")
    assert not out.exists()
    several: Any = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    settings = TaskSettings(rival_recipe(), splits["train"], several, "float32", 0, ignore)
    with pytest.raises(ConfigError, match="ssd trains in one process: found 2"):
        rival_training.RivalTask(settings, "ssd")
