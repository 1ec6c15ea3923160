"""Training end to end on a tiny synthetic set."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    Stop,
    assert_same_weights,
    messages,
    read_log,
    steps_of,
    stop_at,
    tiny_recipe,
    weights,
)

from retinanet.data import read_dataset, read_splits
from retinanet.data.balance import balance
from retinanet.data.dataset import Dataset
from retinanet.data.synthetic import synthetic_dataset
from retinanet.errors import ConfigError, DataError, NonFiniteLossError, WeightsError
from retinanet.evaluation.metrics import Metrics
from retinanet.evaluation.run import evaluate
from retinanet.evaluation.tuning import f1_thresholds, tune
from retinanet.model.checkpoint import load_checkpoint
from retinanet.report.html import write_report
from retinanet.training import task
from retinanet.training.data import read_training_data
from retinanet.training.events import Event, ignore
from retinanet.training.nonfinite import replay
from retinanet.training.overfit import overfit
from retinanet.training.run_folder import read_progress
from retinanet.training.trainer import Run, train

Finished = tuple[Run, list[Event]]


def with_images(dataset: Dataset, images: Any) -> Dataset:
    return dataclasses.replace(dataset, images=tuple(images))


def test_train_run_folder_and_events(finished: Finished) -> None:
    run, events = finished
    names = {path.name for path in run.folder.iterdir() if path.name[0] != "."}
    assert names == {"config.toml", "run.json", "log.jsonl", "metrics.json", "last", "best"}
    lines = read_log(run.folder)
    assert steps_of(run.folder) == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "validation" in line] == [2, 4]
    assert all(line["loss"] == pytest.approx(line["loss_classification"] + line["loss_box"])
               for line in lines if "loss" in line)  # fmt: skip
    info = json.loads((run.folder / "run.json").read_text())
    assert info["seed"] == 0
    assert info["images"] == {"train": 12, "val": 4}
    assert len(info["data_digest"]) >= 32
    assert load_checkpoint(run.folder / "best").info["image_side"] == 64
    assert [event.kind for event in events if event.kind != "validating"] == [
        "start", "message", "step", "step", "validation", "step", "step", "validation", "end",
    ]  # fmt: skip
    assert events[0].data["lr"] == lines[0]["lr"] == 0.0005 * 4 / 8  # the linear rule
    assert (run.step, run.model) == (4, run.folder / "best")
    assert 0 <= run.best_ap <= 1


def test_train_tunes_detection_of_the_best_checkpoint(tiny_data: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    own = ("detect.nms_threshold=0.6", "detect.score_thresholds={circle=0.7}")  # kept
    steps = ("train.steps=2", "train.validate_every=2")
    recipe = tiny_recipe(*steps, "train.tune_detection=true", *own)
    run = train(recipe, tiny_data, tmp_path / "run", device="cpu", on_event=events.append)
    detect = load_checkpoint(run.model).info["detect"]
    keep = ["nms_threshold", "score_thresholds"]
    expected = tune(run.model, tiny_data, keep=keep, device="cpu", workers=0)
    thresholds = {**expected.settings["score_thresholds"], "circle": 0.7}
    assert detect == {**detect, **expected.settings, "score_thresholds": thresholds}
    assert messages(events)[-1].startswith("post-processing from val: NMS hard .6 ")
    metrics = Metrics.from_dict(json.loads((run.folder / "metrics.json").read_text()))
    assert metrics.loss is not None
    again = evaluate(run.model, tiny_data, device="cpu", workers=0)
    assert run.best_ap == metrics.ap == pytest.approx(again.ap)
    assert metrics.calibration == again.calibration


def test_train_stores_score_thresholds_of_each_best_checkpoint(
    tiny_data: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe("train.steps=1", "detect.score_thresholds={circle=0.7}")
    run = train(recipe, tiny_data, tmp_path / "run", device="cpu")
    checkpoint = load_checkpoint(run.model)
    metrics = Metrics.from_dict(json.loads((run.folder / "metrics.json").read_text()))
    stored = checkpoint.info["detect"]["score_thresholds"]
    assert stored == {**f1_thresholds(metrics, checkpoint.classes), "circle": 0.7}


SGD_EMA = ("train.ema=0.9", "loss.normalizer=running", "train.optimizer=sgd")


@pytest.mark.parametrize(
    ("settings", "ahead"),
    [(SGD_EMA, False), (SGD_EMA, True), (("train.ema=0.9",), True)],
    ids=["sgd", "sgd, fused", "adamw, fused"],
)
def test_train_interrupted_and_resumed_equals_uninterrupted(
    tiny_data: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    settings: tuple[str, ...],
    ahead: bool,
) -> None:
    """Fused kernels traverse weights and moments in memory order, so their strides must agree."""
    if ahead:
        request.getfixturevalue("as_on_a_gpu")
        # The weights of depthwise convolutions have ambiguous strides.
        settings = (*settings, "model.backbone=mobilenet_v2")
    recipe = tiny_recipe("train.steps=6", "train.validate_every=3", *settings)
    whole = train(recipe, tiny_data, tmp_path / "whole", device="cpu")

    def interrupt(event: Event) -> None:
        if event.kind == "step" and event.data["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    first = train(recipe, tiny_data, tmp_path / "parts", device="cpu", on_event=interrupt)
    assert first.interrupted
    assert first.step == 4 + ahead  # the event of a step comes one step later there
    events: list[Event] = []
    second = train(recipe, tiny_data, tmp_path / "parts", device="cpu", on_event=events.append)
    assert (events[0].kind, events[0].data["step"]) == ("resume", first.step)
    assert second.step == 6
    assert_same_weights(whole.folder, second.folder)
    assert read_log(whole.folder) == read_log(second.folder)


def test_train_other_settings_or_data_are_an_error(tiny_data: Path, finished: Finished) -> None:
    out = finished[0].folder
    settings = ("train.steps=4", "train.validate_every=2")
    with pytest.raises(ConfigError, match=r"train\.lr = 0\.0005, and now it is 0\.1"):
        train(tiny_recipe(*settings, "train.lr=0.1"), tiny_data, out, device="cpu")
    splits = read_splits(tiny_data)
    fewer = dict(splits, train=with_images(splits["train"], splits["train"].images[:5]))
    with pytest.raises(ConfigError, match="other data"):
        train(tiny_recipe(*settings), fewer, out, device="cpu")


def test_train_into_a_folder_that_is_no_whole_run_is_an_error(
    tiny_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"contains no run to resume: found 'thesis\.tex'"):
        train(tiny_recipe("train.steps=1"), tiny_data, tmp_path, device="cpu")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(ConfigError, match=r"thesis\.tex is a file; give a folder as --out"):
        train(tiny_recipe("train.steps=1"), tiny_data, tmp_path / "thesis.tex", device="cpu")
    # Before the data are read.
    missing, chapter = tmp_path / "no data", tmp_path / "thesis.tex" / "chapter"
    with pytest.raises(ConfigError, match=r"chapter cannot be written: .*Not a directory"):
        train(tiny_recipe("train.steps=1"), missing, chapter, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "training.json").write_text("{")
    with pytest.raises(WeightsError, match="delete the run folder"):
        train(tiny_recipe("train.steps=2"), tiny_data, tmp_path, device="cpu")


def test_train_early_stop(tiny_data: Path, tmp_path: Path) -> None:
    # A learning rate of nearly 0 learns nothing: AP stays, so the second validation is no better.
    recipe = tiny_recipe(
        "train.steps=9", "train.lr=1e-12", "train.validate_every=1", "train.early_stop=2"
    )
    events: list[Event] = []
    run = train(recipe, tiny_data, tmp_path / "run", device="cpu", on_event=events.append)
    assert run.step == 3  # best at 1, then two in a row that are no better
    progress = read_progress(run.folder / "last")
    assert progress is not None
    assert (progress.stopped_early, progress.finished) == (True, True)
    assert messages(events)[-1] == (
        "stopped early at step 3: AP has not exceeded 0.000 (step 1) in 2 validations "
        "(train.early_stop=2)"
    )
    again: list[Event] = []
    train(recipe, tiny_data, tmp_path / "run", device="cpu", on_event=again.append)
    assert "is finished: 3 steps (stopped early)" in messages(again)[0]


@pytest.mark.parametrize(
    ("losses", "best"),
    [((3.0, 2.0, 2.5), 2), ((None, None, 2.0), 3), ((0.0, None, 1.0), 1)],
)
def test_train_of_equal_aps_the_lowest_loss_is_the_best_and_without_losses_the_first(
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    losses: tuple[float | None, ...],
    best: int,
) -> None:
    values = iter(losses)
    metrics = evaluate([], read_dataset(tiny_data, "val"))

    def fake(*arguments: Any, **options: Any) -> Metrics:
        return dataclasses.replace(metrics, ap=0.25, loss=next(values))

    monkeypatch.setattr(task, "evaluate", fake)
    recipe = tiny_recipe("train.steps=3", "train.validate_every=1")
    run = train(recipe, tiny_data, tmp_path / "run", device="cpu")
    progress = read_progress(run.folder / "last")
    assert progress is not None
    assert progress.best_step == best
    assert load_checkpoint(run.folder / "best").info["step"] == best


@pytest.mark.parametrize(
    "loss",
    [
        ("loss.normalizer=batch",),
        ("loss.normalizer=running",),
        ("loss.mining=ohem", "loss.classification=cross_entropy", "loss.normalizer=batch"),
        ("loss.classification=hinge", "loss.alpha=none"),
    ],
)
def test_train_accumulated_micro_batches_equal_the_whole_batch(
    tiny_data: Path, tmp_path: Path, loss: tuple[str, ...]
) -> None:
    settings = ("train.steps=2", "train.optimizer=sgd", "train.lr=0.1", *loss)
    splits = {"train": read_splits(tiny_data)["train"]}
    recipes = (tiny_recipe(*settings, f"train.accumulate={n}") for n in (1, 2))
    events: list[Event] = []
    whole, halves = (
        train(
            recipe,
            splits,
            tmp_path / str(recipe.train.accumulate),
            device="cpu",
            on_event=events.append,
        )
        for recipe in recipes
    )
    assert sum("warning: there is no validation split" in m for m in messages(events)) == 2
    before, after = (
        [line["loss"] for line in read_log(run.folder) if "loss" in line] for run in (whole, halves)
    )
    assert after == pytest.approx(before, rel=1e-4)
    found = weights(halves.model)
    for name, value in weights(whole.model).items():
        # Sums in another order: 3e-5 was measured. A wrong normalizer changes the losses above.
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


def test_train_nonfinite_loss_stops_and_can_be_replayed(tiny_data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        "train.steps=50", "train.optimizer=sgd", "train.lr=1e18", "train.clip_norm=0",
        "train.save_every=1", "train.validate_every=50",
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
    saved = weights(tmp_path / "run" / "last").values()
    assert all(torch.isfinite(value).all() for value in saved)


def test_train_nonfinite_loss_is_saved_with_the_assignment_of_its_step(
    tiny_data: Path, tmp_path: Path
) -> None:
    settings = ("matching.assignment=task_aligned", "loss.classification=quality_focal")
    recipe = tiny_recipe(*settings, "train.steps=9", "train.lr=1e30", "train.warmup_steps=0")
    with pytest.raises(NonFiniteLossError):
        train(recipe, tiny_data, tmp_path / "run", device="cpu")
    saved = tmp_path / "run" / "nonfinite"
    assert json.loads((saved / "story.json").read_text())["step"] < 3  # of 9: ATSS
    assert load_checkpoint(saved / "model").info["loss"]["assignment"] == "atss"


def test_replay_without_a_step_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="contains no step to repeat"):
        replay(tmp_path)


@pytest.mark.parametrize("dies_at", ["start", "validation"])
def test_train_killed_before_the_first_save_starts_again(
    tiny_data: Path, tmp_path: Path, dies_at: str
) -> None:
    recipe = tiny_recipe("train.steps=2", "train.validate_every=1", "train.save_every=100")

    def die(event: Event) -> None:
        if event.kind == dies_at:
            raise SystemError("killed")

    with pytest.raises(SystemError):
        train(recipe, tiny_data, tmp_path / "run", device="cpu", on_event=die)
    (tmp_path / "run" / ".last.draft").mkdir(exist_ok=True)
    assert train(recipe, tiny_data, tmp_path / "run", device="cpu").step == 2
    assert steps_of(tmp_path / "run") == [1, 2]


def test_train_logs_to_tensorboard(tiny_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    recipe = tiny_recipe("train.steps=1", "train.trackers=['tensorboard']")
    run = train(recipe, tiny_data, tmp_path / "run", device="cpu")
    assert list((run.folder / "tensorboard").rglob("events.out*"))


def test_train_images_in_both_splits_give_a_warning(tiny_data: Path, tmp_path: Path) -> None:
    split = read_splits(tiny_data)["train"]
    warnings: list[str] = []
    read_training_data(
        {"train": split, "val": split},
        tiny_recipe(),
        lambda kind, /, **data: warnings.append(data["message"]),
    )
    assert "12 images are in both train and val" in warnings[0]
    copies = []
    for image in split.images[:3]:
        copies.append(dataclasses.replace(image, path=tmp_path / f"copy of {image.path.name}"))
        copies[-1].path.write_bytes(image.path.read_bytes())
    copies[0].path.write_bytes(copies[0].path.read_bytes()[:-1] + b"x")  # of the same size
    warnings.clear()
    read_training_data(
        {"train": split, "val": with_images(split, copies)},
        tiny_recipe(),
        lambda kind, /, **data: warnings.append(data["message"]),
    )
    assert f"2 images are in both train and val, the first: {split.images[1].path}" in warnings[0]


def test_classes_without_an_object_to_train_on_are_named(tiny_data: Path) -> None:
    splits = {
        name: dataclasses.replace(
            split, classes=(*split.classes, "cow"), category_ids=(*split.category_ids, 99)
        )
        for name, split in read_splits(tiny_data).items()
    }
    warnings: list[str] = []
    read_training_data(
        splits, tiny_recipe(), lambda kind, /, **data: warnings.append(data["message"])
    )
    text = "warning: 1 of 4 classes have no object to train on and will not be detected: cow"
    assert warnings == [text]


def test_train_errors_before_anything_is_written(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    splits = read_splits(tiny_data)
    bare = with_images(
        splits["train"], (type(i)(path=i.path, id=i.id) for i in splits["train"].images)
    )
    renamed = dataclasses.replace(splits["val"], classes=("square", "circle", "triangle"))
    for data, error in (
        ({"train": bare}, "no object to train on in 12 images"),
        ({"val": splits["val"]}, "no split named 'train'; there is val"),
        ({"train": splits["train"], "val": renamed}, "classes of train and val differ"),
    ):
        with pytest.raises(DataError, match=error):
            train(tiny_recipe(), data, out, device="cpu")
    with pytest.raises(ConfigError, match=r"alpha has 2 numbers and the data 3 classes"):
        train(tiny_recipe("loss.alpha=[0.2, 0.3]"), splits, out, device="cpu")
    with pytest.raises(ConfigError, match="device 'tpu' is not"):
        train(tiny_recipe(), splits, out, device="tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch finds 0 cuda devices here; use cpu"):
        train(tiny_recipe(), splits, out, device="cuda:7")
    monkeypatch.setattr("accelerate.utils.is_wandb_available", lambda: False)
    with pytest.raises(ConfigError, match="tracker wandb is not installed: pip install wandb"):
        train(tiny_recipe("train.trackers=['wandb']"), splits, out, device="cpu")
    assert not out.exists()


def test_train_split_seed_chooses_the_validation_split(tmp_path: Path) -> None:
    synthetic_dataset(tmp_path / "data", splits={"train": 8}, image_size=64, empty=0.0)
    val: dict[tuple[int, str], set[str]] = {}
    for seed, split_seed in ((0, "none"), (1, "none"), (0, "5"), (1, "5")):
        recipe = tiny_recipe(f"train.seed={seed}", f"data.split_seed={split_seed}",
                             "data.val_fraction=0.5", "train.steps=1")  # fmt: skip
        chosen = {"seed": seed if split_seed == "none" else 5, "val_fraction": 0.5}
        data = read_training_data(tmp_path / "data", recipe, ignore)
        assert data.val is not None
        val[seed, split_seed] = {image.path.name for image in data.val.images}
        same = read_dataset(tmp_path / "data", "val", **chosen)
        assert {image.path.name for image in same.images} == val[seed, split_seed]
    train(recipe, tmp_path / "data", tmp_path / "run", device="cpu")
    assert load_checkpoint(tmp_path / "run").info["split"] == chosen
    assert val[0, "5"] == val[1, "5"]
    assert val[0, "none"] != val[1, "none"]


def test_image_side_is_known_whether_labels_state_it_or_not(tmp_path: Path) -> None:
    split = synthetic_dataset(tmp_path / "coco", splits={"train": 3}, image_size=96)["train"]
    unstated = with_images(
        split, (dataclasses.replace(image, width=None, height=None) for image in split.images)
    )
    assert task.image_side(split) == task.image_side(unstated) == 96


def test_train_on_selected_classes_and_evaluate_the_run(tiny_data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("train.steps=1", "data.classes=[circle,square]")
    events: list[Event] = []
    run = train(recipe, tiny_data, tmp_path / "run", device="cpu", on_event=events.append)
    checkpoint = load_checkpoint(run.folder)
    assert set(checkpoint.classes) == {"circle", "square"}
    splits = read_splits(tiny_data)
    names = [splits["val"].classes[a.label] for i in splits["val"].images for a in i.annotations]
    metrics = evaluate(run.folder, tiny_data, device="cpu", precision="float32")
    assert metrics.objects == names.count("circle") + names.count("square")
    assert metrics.ap == run.metrics["ap"]
    assert metrics.loss == pytest.approx(run.metrics["loss"], rel=1e-5)
    (start,) = (event for event in events if event.kind == "start")
    assert any("train: 2 of 3 classes are selected" in line for line in start.data["data"])
    with pytest.raises(ConfigError, match=r"unknown class 'cirle'.*did you mean circle\?"):
        train(tiny_recipe("data.classes=cirle"), tiny_data, tmp_path / "no", device="cpu")


def test_train_single_class(tiny_data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("train.steps=1", "data.single_class=true")
    run = train(recipe, tiny_data, tmp_path / "run", device="cpu")
    assert load_checkpoint(run.folder).classes == ("object",)
    splits = read_splits(tiny_data)
    objects = sum(len(image.annotations) for image in splits["val"].images)
    assert evaluate(run.folder, tiny_data, device="cpu").objects == objects
    assert write_report(run.folder).is_file()
    tiles = ("data.tile=32", "data.tile_overlap=0.3")  # of which there are nine per image
    chosen = tiny_recipe("data.single_class=true", "data.classes=circle", *tiles)
    assert overfit(chosen, tiny_data, tmp_path / "few", num_images=2, steps=1).images == 2


def test_train_balanced_resumed_equals_uninterrupted(tiny_data: Path, tmp_path: Path) -> None:
    settings = ["data.balance=repeat_factor", "data.balance_threshold=1.0", "train.save_every=2"]
    settings += ["train.epochs=1.2", "train.min_steps=1", "train.validate_every=100"]
    recipe = tiny_recipe(*settings)
    events: list[Event] = []
    whole = train(recipe, tiny_data, tmp_path / "whole", device="cpu", on_event=events.append)
    factors = balance(read_splits(tiny_data)["train"], recipe.data)
    assert factors is not None
    assert factors.epoch_size > 12
    assert factors.describe() in messages(events)
    assert whole.step == math.ceil(1.2 * factors.epoch_size / 4)
    with pytest.raises(Stop):
        train(recipe, tiny_data, tmp_path / "parts", device="cpu", on_event=stop_at(3))
    parts = train(recipe, tiny_data, tmp_path / "parts", device="cpu")
    assert_same_weights(whole.folder, parts.folder)
