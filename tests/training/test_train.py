"""Training end to end on a tiny synthetic set."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_recipe

from retinanet.data import read_dataset, read_splits
from retinanet.data.dataset import Dataset
from retinanet.data.synthetic import synthetic_dataset
from retinanet.errors import (
    ConfigError,
    DataError,
    MissingExtraError,
    NonFiniteLossError,
    WeightsError,
)
from retinanet.evaluation.metrics import Metrics
from retinanet.evaluation.run import evaluate
from retinanet.model.checkpoint import load_checkpoint
from retinanet.training import task
from retinanet.training.data import read_training_data
from retinanet.training.events import Event
from retinanet.training.nonfinite import replay
from retinanet.training.run_folder import read_progress
from retinanet.training.trainer import train


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "last" / "model.safetensors")


def _log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def _timeless(line: dict) -> dict:
    timed = {"seconds", "images_per_second", "waiting", "memory_mb", "seconds_left"}
    return {key: value for key, value in line.items() if key not in timed}


def test_a_run_leaves_what_the_run_folder_promises(tiny_data: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    recipe = tiny_recipe("train.steps=4", "train.validate_every=2")
    run = train(recipe, tiny_data, tmp_path / "run", device="cpu", on_event=events.append)

    names = {path.name for path in run.folder.iterdir() if path.name[0] != "."}
    assert names == {"config.toml", "run.json", "log.jsonl", "metrics.json", "last", "best"}
    lines = _log(run.folder)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "validation" in line] == [2, 4]
    assert all(line["loss"] == pytest.approx(line["loss_classification"] + line["loss_box"])
               for line in lines if "loss" in line)  # fmt: skip
    info = json.loads((run.folder / "run.json").read_text())
    assert info["seed"] == 0
    assert info["images"] == {"train": 12, "val": 4}
    assert len(info["data_digest"]) >= 32
    assert load_checkpoint(run.folder / "best").info["image_side"] == 64
    kinds = [event.kind for event in events]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    assert run.step == 4
    assert run.model == run.folder / "best"
    assert 0 <= run.best_ap <= 1


def test_learning_rate_follows_the_linear_rule(tiny_data: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    recipe = tiny_recipe(
        "train.steps=1", "train.optimizer=sgd", "train.lr=0.01", "train.reference_batch=16"
    )
    train(recipe, tiny_data, tmp_path / "run", device="cpu", on_event=events.append)
    assert events[0].data["lr"] == 0.01 * 4 / 16
    assert _log(tmp_path / "run")[0]["lr"] == 0.0025


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("train.ema=0.9", "loss.normalizer=running", "train.optimizer=sgd"),
    ],
)  # fmt: skip
def test_ctrl_c_and_again_equals_uninterrupted(
    tiny_data: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    _interrupted_equals_uninterrupted(tiny_data, tmp_path, settings, ends_at=4)


def _interrupted_equals_uninterrupted(
    tiny_data: Path, tmp_path: Path, settings: tuple[str, ...], *, ends_at: int
) -> None:
    """Ctrl-C when step 4 is told of, and again; `ends_at`: how many steps are done by then."""
    recipe = tiny_recipe("train.steps=6", "train.validate_every=3", *settings)
    whole = train(recipe, tiny_data, tmp_path / "whole", device="cpu")

    def interrupt(event: Event) -> None:
        if event.kind == "step" and event.data["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    first = train(recipe, tiny_data, tmp_path / "parts", device="cpu", on_event=interrupt)
    assert first.interrupted
    assert first.step == ends_at
    events: list[Event] = []
    second = train(recipe, tiny_data, tmp_path / "parts", device="cpu", on_event=events.append)
    assert events[0].kind == "resume"
    assert events[0].data["step"] == ends_at
    assert second.step == 6
    expected, found = _weights(whole.folder), _weights(second.folder)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    assert [_timeless(one) for one in _log(whole.folder)] == [
        _timeless(one) for one in _log(second.folder)
    ]


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_fused_kernels_go_on_after_ctrl_c_as_if_uninterrupted(
    tiny_data: Path, tmp_path: Path, kind: str
) -> None:
    """They go through weights and moments as they lie in memory, so both must lie alike."""
    settings = ("train.ema=0.9", f"train.optimizer={kind}")
    _interrupted_equals_uninterrupted(tiny_data, tmp_path, settings, ends_at=5)


def test_a_finished_run_is_not_trained_again(tiny_data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("train.steps=1")
    train(recipe, tiny_data, tmp_path / "run", device="cpu")
    events: list[Event] = []
    run = train(recipe, tiny_data, tmp_path / "run", device="cpu", on_event=events.append)
    assert [event.kind for event in events] == ["message"]
    assert "is finished: 1 steps" in events[0].data["message"]
    assert run.step == 1


def test_other_settings_or_data_are_refused(tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(tiny_recipe("train.steps=1"), tiny_data, out, device="cpu")
    with pytest.raises(ConfigError, match=r"train\.lr = 0\.0005, and now it is 0\.1"):
        train(tiny_recipe("train.steps=1", "train.lr=0.1"), tiny_data, out, device="cpu")
    splits = read_splits(tiny_data)
    fewer = dict(splits, train=_first(splits["train"], 5))
    with pytest.raises(ConfigError, match="other data"):
        train(tiny_recipe("train.steps=1"), fewer, out, device="cpu")


def test_a_folder_with_other_things_is_left_alone(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"contains no run to resume: found 'thesis\.tex'"):
        train(tiny_recipe("train.steps=1"), tiny_data, tmp_path, device="cpu")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_damaged_state_says_what_to_do(tiny_data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("train.steps=2", "train.save_every=1", "train.validate_every=2")
    run = train(recipe, tiny_data, tmp_path / "run", device="cpu")
    progress_file = run.folder / "last" / "training.json"
    progress_file.write_text("{")
    with pytest.raises(WeightsError, match="delete the run folder"):
        train(recipe, tiny_data, run.folder, device="cpu")


def test_early_stop(tiny_data: Path, tmp_path: Path) -> None:
    # A learning rate of nearly 0 learns nothing: AP stays, so the second validation is no better.
    recipe = tiny_recipe(
        "train.steps=9", "train.lr=1e-12", "train.validate_every=1", "train.early_stop=2"
    )
    events: list[Event] = []
    run = train(recipe, tiny_data, tmp_path / "run", device="cpu", on_event=events.append)
    assert run.step == 3  # best at 1, then two in a row that are no better
    progress = read_progress(run.folder / "last")
    assert progress is not None
    assert progress.stopped_early
    assert progress.finished
    last = [event.data["message"] for event in events if event.kind == "message"][-1]
    assert last == (
        "stopped early at step 3: AP has not exceeded 0.000 (step 1) in 2 validations "
        "(train.early_stop=2)"
    )
    again: list[Event] = []
    train(recipe, tiny_data, tmp_path / "run", device="cpu", on_event=again.append)
    assert "is finished: 3 steps (stopped early)" in again[0].data["message"]


@pytest.mark.parametrize(
    ("losses", "best"),
    [
        ((3.0, 2.0, 2.5), 2),
        ((None, None, None), 1),
        ((None, 2.0, None), 2),
        ((0.0, 1.0, 1.0), 1),
    ],
)
def test_of_equal_aps_the_lowest_loss_is_the_best_and_without_losses_the_first(
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    losses: tuple[float | None, ...],
    best: int,
) -> None:
    to_come = iter(losses)

    def judged(*arguments: Any, **options: Any) -> Metrics:
        metrics = evaluate(*arguments, **options)
        return dataclasses.replace(metrics, ap=0.25, loss=next(to_come))

    monkeypatch.setattr(task, "evaluate", judged)
    recipe = tiny_recipe("train.steps=3", "train.validate_every=1")
    run = train(recipe, tiny_data, tmp_path / "run", device="cpu")
    progress = read_progress(run.folder / "last")
    assert progress is not None
    assert progress.best_step == best
    assert load_checkpoint(run.folder / "best").info["step"] == best


@pytest.mark.parametrize(
    "loss",
    [
        ("loss.normalizer=image",),
        ("loss.normalizer=batch",),
        ("loss.normalizer=running",),
        ("loss.mining=ohem", "loss.classification=cross_entropy", "loss.normalizer=batch"),
        ("loss.mining=ohem_1_3", "loss.classification=cross_entropy"),
        ("loss.classification=hinge", "loss.alpha=none"),
    ],
)
def test_accumulating_micro_batches_is_the_whole_batch(
    tiny_data: Path, tmp_path: Path, loss: tuple[str, ...]
) -> None:
    settings = (
        "train.steps=2", "train.optimizer=sgd", "train.lr=0.1", "train.batch_size=4",
        *loss,
    )  # fmt: skip
    one = train(tiny_recipe(*settings), tiny_data, tmp_path / "one", device="cpu")
    two = train(
        tiny_recipe(*settings, "train.accumulate=2"), tiny_data, tmp_path / "two", device="cpu"
    )
    before, after = (
        [line["loss"] for line in _log(run.folder) if "loss" in line] for run in (one, two)
    )
    assert after == pytest.approx(before, rel=1e-4)
    expected, found = _weights(one.folder), _weights(two.folder)
    for name, value in expected.items():
        # Sums in another order: 3e-5 was measured. A wrong normalizer changes the losses above.
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


def test_a_nonfinite_loss_stops_and_can_be_repeated(tiny_data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        "train.steps=50", "train.optimizer=sgd", "train.lr=1e18", "train.clip_norm=0",
        "train.save_every=1",
    )  # fmt: skip
    with pytest.raises(NonFiniteLossError) as caught:
        train(recipe, tiny_data, tmp_path / "run", device="cpu")
    message = str(caught.value)
    story = json.loads((tmp_path / "run" / "nonfinite" / "story.json").read_text())
    assert f"step {story['step']}" in message
    assert "learning rate" in message
    assert "gradient norm" in message
    assert len(story["images"]) == 4
    for image in story["images"]:
        assert str(image["id"]) in message
        assert Path(image["file"]).is_file()
    losses, norm = replay(tmp_path / "run" / "nonfinite")
    assert not (torch.isfinite(losses.total) and norm < float("inf"))
    # The last saved state is from before: finite, and of the step before the bad one.
    progress = read_progress(tmp_path / "run" / "last")
    assert progress is not None
    assert progress.step == story["step"]
    assert all(torch.isfinite(one).all() for one in _weights(tmp_path / "run").values())


@pytest.mark.parametrize("dies_at", ["start", "step", "validation"])
def test_killed_before_the_first_save_it_starts_again(
    tiny_data: Path, tmp_path: Path, dies_at: str
) -> None:
    recipe = tiny_recipe("train.steps=2", "train.validate_every=1", "train.save_every=100")

    def die(event: Event) -> None:
        if event.kind == dies_at:
            raise SystemError("killed")

    with pytest.raises(SystemError):
        train(recipe, tiny_data, tmp_path / "run", device="cpu", on_event=die)
    (tmp_path / "run" / ".last.draft").mkdir(exist_ok=True)
    run = train(recipe, tiny_data, tmp_path / "run", device="cpu")
    assert run.step == 2
    steps = [line["step"] for line in _log(run.folder) if "loss_box" in line]
    assert steps == [1, 2]


def test_tensorboard_is_written_into_the_run(tiny_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    recipe = tiny_recipe("train.steps=1", "train.trackers=['tensorboard']")
    run = train(recipe, tiny_data, tmp_path / "run", device="cpu")
    assert list((run.folder / "tensorboard").rglob("events.out*"))


def test_start_from_another_network_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    first = train(tiny_recipe("train.steps=1"), tiny_data, tmp_path / "first", device="cpu")
    recipe = tiny_recipe("train.steps=1", "model.backbone=resnet18")
    with pytest.raises(ConfigError, match="give --backbone mobilenet_v2"):
        train(recipe, tiny_data, tmp_path / "second", device="cpu", init=first.model)


def test_frozen_norm_may_start_from_another_run(tiny_data: Path, tmp_path: Path) -> None:
    first = train(tiny_recipe("train.steps=1"), tiny_data, tmp_path / "first", device="cpu")
    # Its backbone comes from the run: no ImageNet weights are asked for.
    recipe = tiny_recipe("train.steps=1", "model.backbone_weights=default")
    run = train(recipe, tiny_data, tmp_path / "second", device="cpu", init=first.model)
    assert run.step == 1


def test_images_in_both_splits_are_told(tiny_data: Path, tmp_path: Path) -> None:
    splits = read_splits(tiny_data)
    events: list[Event] = []
    leaky = {"train": splits["train"], "val": splits["train"]}
    train(tiny_recipe("train.steps=1"), leaky, tmp_path / "r", device="cpu", on_event=events.append)
    assert any("12 images are in both train and val" in str(one.data) for one in events)


def test_splits_of_other_classes_and_alphas_are_refused(tiny_data: Path, tmp_path: Path) -> None:
    import dataclasses

    splits = read_splits(tiny_data)
    other = dataclasses.replace(splits["val"], classes=("square", "circle", "triangle"))
    with pytest.raises(DataError, match="classes of train and val differ"):
        train(tiny_recipe(), {"train": splits["train"], "val": other}, tmp_path / "r", device="cpu")
    recipe = tiny_recipe("loss.alpha=[0.2, 0.3]")
    with pytest.raises(ConfigError, match=r"alpha has 2 numbers and the data 3 classes"):
        train(recipe, splits, tmp_path / "r", device="cpu")
    assert not (tmp_path / "r").exists()


def test_replay_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="contains no step to repeat"):
        replay(tmp_path)


def test_start_from_another_checkpoint(tiny_data: Path, tmp_path: Path) -> None:
    first = train(tiny_recipe("train.steps=2"), tiny_data, tmp_path / "first", device="cpu")
    events: list[Event] = []
    recipe = tiny_recipe("train.steps=1", "train.lr=1e-12", "train.seed=5")
    second = train(
        recipe, tiny_data, tmp_path / "second", device="cpu", init=first.folder / "last",
        on_event=events.append,
    )  # fmt: skip
    assert any("tensors loaded" in event.data.get("message", "") for event in events)
    for name, value in _weights(first.folder).items():
        torch.testing.assert_close(_weights(second.folder)[name], value, rtol=1e-5, atol=1e-6)


def test_errors_before_anything_is_written(tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    splits = read_splits(tiny_data)
    bare = tuple(type(i)(path=i.path, id=i.id) for i in splits["train"].images)
    with pytest.raises(DataError, match="no object to train on in 12 images"):
        train(tiny_recipe(), {"train": _with(splits["train"], bare)}, out, device="cpu")
    with pytest.raises(DataError, match="no split named 'train'; there is val"):
        train(tiny_recipe(), {"val": splits["val"]}, out, device="cpu")
    with pytest.raises(ConfigError, match="device 'tpu' is not"):
        train(tiny_recipe(), splits, out, device="tpu")
    assert not out.exists()


def test_cuda_without_cuda(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch finds 0 cuda devices here; use cpu"):
        train(tiny_recipe(), tiny_data, tmp_path / "run", device="cuda")


def test_a_missing_tracker_names_its_extra(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.utils.is_wandb_available", lambda: False)
    with pytest.raises(MissingExtraError, match=r"wandb is not installed.*retinanet\[wandb\]"):
        train(tiny_recipe("train.trackers=['wandb']"), tiny_data, tmp_path / "run", device="cpu")


def _with(dataset: Dataset, images: tuple) -> Dataset:  # type: ignore[type-arg]
    return dataclasses.replace(dataset, images=images)


def _first(dataset: Dataset, count: int) -> Dataset:
    return _with(dataset, dataset.images[:count])


def test_train_split_seed_chooses_the_validation_split(tmp_path: Path) -> None:
    synthetic_dataset(tmp_path / "data", splits={"train": 8}, image_size=64, empty=0.0)
    val: dict[tuple[int, str], set[str]] = {}
    for seed, split_seed in ((0, "none"), (1, "none"), (0, "5"), (1, "5")):
        recipe = tiny_recipe(f"train.seed={seed}", f"data.split_seed={split_seed}",
                             "data.val_fraction=0.5", "train.steps=1")  # fmt: skip
        chosen = {"seed": seed if split_seed == "none" else 5, "val_fraction": 0.5}
        data = read_training_data(tmp_path / "data", recipe, lambda kind, /, **data: None)
        assert data.val is not None
        val[seed, split_seed] = {image.path.name for image in data.val.images}
        same = read_dataset(tmp_path / "data", "val", **chosen)
        assert {image.path.name for image in same.images} == val[seed, split_seed]
    train(recipe, tmp_path / "data", tmp_path / "run", device="cpu")
    assert load_checkpoint(tmp_path / "run").info["split"] == chosen
    assert val[0, "5"] == val[1, "5"]
    assert val[0, "none"] != val[1, "none"]


def test_the_side_of_the_images_is_known_whether_labels_state_it_or_not(tmp_path: Path) -> None:
    splits = synthetic_dataset(tmp_path / "coco", splits={"train": 3}, image_size=96)
    images = [dataclasses.replace(one, width=None, height=None) for one in splits["train"].images]
    unstated = _with(splits["train"], tuple(images))
    assert task.image_side(splits["train"]) == 96
    assert task.image_side(unstated) == 96
