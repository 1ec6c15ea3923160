"""Trainings with a time limit: the plan by hand, an injected clock, and a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from PIL import Image

from retinanet.cli.train import TrainingOptions
from retinanet.config import load_recipe, parse_seconds
from retinanet.data import read_splits
from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.data.synthetic import synthetic_dataset
from retinanet.errors import ConfigError
from retinanet.training import loop, trainer
from retinanet.training.events import Event
from retinanet.training.time_limit import (
    Pace,
    Pacer,
    Plan,
    is_due,
    num_validations,
    plan_steps,
    plan_training,
    replan,
    seconds_afterwards,
    seconds_to_train,
)
from retinanet.training.trainer import train
from training.tiny import Stop, messages, stop_at, tiny_recipe


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("20min", 1200), ("1.5h", 5400), (" 2 H ", 7200)]
)
def test_parse_seconds(text: str, seconds: float) -> None:
    assert parse_seconds(text) == seconds
    assert load_recipe("quick", [f"train.time={text}"]).train.time == seconds


@pytest.mark.parametrize("text", ["20", "min", "0s", "-5min", "20 minutes", ""])
def test_parse_seconds_rejects_other_text(text: str) -> None:
    with pytest.raises(ValueError, match="is not a duration over 0, such as 90s, 20min or 2h"):
        parse_seconds(text)


def test_time_of_a_recipe_is_checked() -> None:
    assert load_recipe("quick", ["train.time=90"]).train.time == 90
    with pytest.raises(ConfigError, match=r"train\.time: .*'soon' is not a duration"):
        load_recipe("quick", ["train.time=soon"])
    with pytest.raises(ConfigError, match=r"train\.steps and train\.time each set the length"):
        load_recipe("quick", ["train.time=90s", "train.steps=7"])


def test_plan_gives_validations_a_tenth_of_the_time() -> None:
    # 600 s: validations of 25 s fit twice into 60 s, and 550 s are 275 steps of 2 s.
    assert plan_steps(600, Pace(2.0, 25.0))[:3] == (275, 2, 600.0)
    assert plan_steps(600, Pace(2.0, 25.0)).period == 138
    # One longer than a tenth is done once, after the last step; eight are the most.
    assert plan_steps(600, Pace(2.0, 100.0))[:3] == (250, 1, 600.0)
    assert plan_steps(600, Pace(2.0, 1.0))[:3] == (296, 8, 600.0)
    assert plan_steps(600, Pace(2.0, 0.0))[:3] == (300, 8, 600.0)


def plan(seconds: float, pace: Pace, *settings: str, **options: Any) -> tuple[dict[str, Any], Plan]:
    settings = ("train.tune_detection=false", *settings)
    loaded = load_recipe("quick", [f"train.time={seconds}", *settings])
    options = {"num_images": 1000, "max_side": 640} | options
    return plan_training(loaded, pace, 0.0, **options)


def test_plan_keeps_a_sufficient_training() -> None:
    # 1000 s, less 3% and 6 s for the report: 964 s. Five validations of 19 s: 869 s are 434 steps.
    assert seconds_to_train(1000) == 964
    changes, planned = plan(1000, Pace(2.0, 19.0), on_gpu=True)
    assert planned[:2] == (434, 5)
    assert changes == {
        "train.steps": 434,
        "train.epochs": None,
        "train.validate_every": 87.0,
        "train.warmup_steps": 43,
    }


def test_plan_with_few_steps_halves_the_batch_and_then_the_images() -> None:
    # 4 s a step of 8 images: 241 steps, of 4 images twice as many.
    changes, planned = plan(1000, Pace(4.0, 0.0))
    assert (changes["train.batch_size"], planned.steps) == (4, 482)
    assert "data.image_size" not in changes
    # 8 s: 241 steps of 4 images. 384 / 1.25 is nearest to 320 px: (384 / 320)^2 = 1.44 times 241.
    # 320 / 1.25 is 256 px: 2.25 times 241 is 542.
    changes, planned = plan(1000, Pace(8.0, 0.0))
    assert (changes["train.batch_size"], changes["data.image_size"]) == (4, 256)
    assert planned.steps == 542


def test_plan_on_a_cpu_halves_the_batch_of_under_1500_steps() -> None:
    # .65 s a step: 1483 steps of 8 images; .64 s: 1506.
    changes, planned = plan(1000, Pace(0.65, 0.0))
    assert (changes["train.batch_size"], planned.steps) == (4, 2966)
    assert "data.image_size" not in changes
    assert "train.batch_size" not in plan(1000, Pace(0.64, 0.0))[0]
    assert "train.batch_size" not in plan(1000, Pace(0.65, 0.0), on_gpu=True)[0]
    assert "train.batch_size" not in plan(1000, Pace(0.65, 0.0), "train.batch_size=8")[0]
    # Of 8 processes each has an image.
    assert "train.batch_size" not in plan(1000, Pace(0.65, 0.0), batch_multiple=8)[0]


def test_plan_keeps_what_is_stated() -> None:
    stated = ("train.batch_size=8", "data.image_size=384", "data.max_size=640")
    changes, planned = plan(1000, Pace(8.0, 0.0), *stated, "train.validate_every=50")
    assert changes.keys() == {"train.steps", "train.epochs", "train.warmup_steps"}
    assert planned.steps == 120
    changes, _ = plan(1000, Pace(8.0, 0.0), "auto=false")
    assert not {"train.batch_size", "data.image_size"} & changes.keys()


def test_plan_with_few_images_seen_leaves_p2_out_and_then_reduces_the_images() -> None:
    # 2 s a step of 8 images with P2: 3856 images in 482 steps. Without it a step takes 1 s, and at
    # 320 and 256 px (320 / 384)^2 and (256 / 384)^2 of it.
    recipe = load_recipe("quick", ["train.time=1000"]).choose({"model.p2": True})

    def planned(images: int, **options: Any) -> tuple[dict[str, Any], int]:
        given = {"num_images": 20000, "max_side": 640, "min_side": 256, "on_gpu": True} | options
        changes, plan = plan_training(recipe, Pace(2.0, 0.0), 0.0, enough_images=images, **given)
        return {
            k: v for k, v in changes.items() if k in ("model.p2", "data.image_size")
        }, plan.steps

    assert planned(3856) == ({}, 482)
    assert planned(7000) == ({"model.p2": False}, 964)
    assert planned(11000) == ({"model.p2": False, "data.image_size": 320}, 1388)
    smallest = {"model.p2": False, "data.image_size": 256}
    assert planned(15000) == (smallest, 2168)
    assert planned(10**6) == (smallest, 2168)  # for smaller images objects would be too small
    assert planned(10**6, min_side=416) == ({}, 482)
    assert planned(10**6, min_side=0)[0] == {"model.p2": False, "data.image_size": 64}
    stated = ("model.p2=true", "data.image_size=384", "data.max_size=640")
    changes, kept = plan(
        1000, Pace(2.0, 0.0), *stated, enough_images=10**6, min_side=256, on_gpu=True
    )
    assert kept.steps == 482
    assert not {"model.p2", "data.image_size"} & changes.keys()


def test_plan_with_many_epochs_takes_larger_images() -> None:
    # 20 images, .1 s a step: 9640 steps of 8 are 3856 epochs. 480, 608 px; 640 are the limit.
    changes, planned = plan(1000, Pace(0.1, 0.0), num_images=20)
    assert changes["data.image_size"] == 608
    assert planned.steps == int(9640 / (608 / 384) ** 2)


def test_plan_validates_on_fewer_images_where_all_take_over_a_tenth_of_the_time() -> None:
    # 964 s: of 40 images in 193 s, 20 take 96 s; 867 s are 433 steps.
    changes, planned = plan(1000, Pace(2.0, 193.0), num_val=40, on_gpu=True)
    assert planned[:2] == (433, 1)
    assert changes["train.val_images"] == 20
    # No fewer than 4 images.
    assert plan(1000, Pace(2.0, 1930.0), num_val=40)[0]["train.val_images"] == 4
    for stated in ([], ["train.val_images=40"]):
        changes, planned = plan(1000, Pace(2.0, 193.0), *stated, num_val=40 if stated else 4)
        assert "train.val_images" not in changes
        assert planned.seconds >= 193
    assert "train.val_images" not in plan(1000, Pace(2.0, 96.0), num_val=40)[0]


def test_time_is_left_for_tuning_and_for_the_detections_of_the_report() -> None:
    # A validation of 40 images takes 100 s: 15 s for the 6 images of the report.
    recipe = load_recipe("quick", [])
    assert seconds_afterwards(recipe, 100.0, 40, 6) == 215.0  # tuning: two validations
    recipe = load_recipe("quick", ["data.tile=192"])  # with tiles nothing is tuned
    assert seconds_afterwards(recipe, 100.0, 40, 6) == 15.0
    assert seconds_afterwards(recipe, 100.0, 4, 6) == 150.0  # of more images than are validated on
    assert seconds_afterwards(recipe, 0.0, 0, 0) == 0.0
    # 964 s: 95 s for a validation of 20 images, which it has again for tuning twice, and 29 s.
    tuned = ("train.tune_detection=true", "train.batch_size=8", "data.image_size=384")
    changes, planned = plan(1000, Pace(2.0, 193.0), *tuned, num_val=40, num_split=6)
    assert changes["train.val_images"] == 20
    assert planned.after == pytest.approx(2 * 96.4 + 6 * 193 / 40)
    assert planned.steps == int((964 - 3 * 96.4 - 28.95) / 2)


def test_plan_rejects_a_limit_that_is_too_short() -> None:
    with pytest.raises(
        ConfigError, match=r"train\.time 30 s is too short: 20 steps of 2 s .*least"
    ):
        plan(30, Pace(2.0, 5.0), "auto=false")


def test_validations_are_due_each_period_and_at_the_end() -> None:
    due = [step for step in range(1, 456) if is_due(step, 455, 90)]
    assert due == [90, 180, 270, 360, 455]  # not 450
    for step in (0, 89, 90, 400, 449, 450, 454, 455):
        assert num_validations(step, 455, 90) == sum(later > step for later in due)
    assert num_validations(3, 3, 90) == 0


@pytest.mark.parametrize("seconds", [-5.0, 0.0, 3.0, 100.0, 500.0, 5000.0])
@pytest.mark.parametrize("pace", [Pace(2.0, 0.0), Pace(2.0, 20.0), Pace(0.3, 70.0)])
def test_replan_uses_the_time_that_is_left(seconds: float, pace: Pace) -> None:
    steps = replan(225, seconds, pace, 90)
    needed = (steps - 225) * pace.step + num_validations(225, steps, 90) * pace.validation
    assert steps >= 225
    assert needed <= max(0, seconds)
    more = num_validations(225, steps + 1, 90) * pace.validation
    assert (steps + 1 - 225) * pace.step + more > seconds


def test_pacer_ends_in_time_when_the_machine_becomes_slower() -> None:
    now = 0.0
    pacer = Pacer(deadline=1000.0, period=90, validation=20.0, clock=lambda: now)
    step, steps = 0, plan_steps(1000.0, Pace(2.0, 20.0)).steps
    assert steps == 450
    while step < steps:
        now += 2.0 if step < 200 else 5.0
        step += 1
        if pacer.is_replan_due(step, steps):
            steps = pacer.replan(step)
        if pacer.is_validation_due(step, steps):
            now += 20.0
            pacer.add_validation(20.0)
    # 200 steps take 400 s and two validations 40 s: 560 s are left for 5 s a step.
    assert 295 <= steps <= 308
    assert 950 <= now <= 1010


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("timed")
    synthetic_dataset(folder, splits={"train": 8, "val": 2}, seed=0, image_size=64)
    return folder


def test_timed_run_is_planned_by_the_measured_pace_and_resumes(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 1000 s, of which 3% and 6 s are left for errors and the report, and a start of some seconds. A
    # validation takes 50 s and a step 40 s.
    measured = []
    measure = trainer.measure_pace

    def measure_pace(*arguments: Any) -> Pace:
        measured.append(measure(*arguments))
        return Pace(40.0, 50.0)

    monkeypatch.setattr(trainer, "measure_pace", measure_pace)
    monkeypatch.setattr(Pacer, "replan", lambda self, step: 12)
    recipe = tiny_recipe(
        "train.time=1000s", "train.save_every=5", "train.max_steps=2", "train.min_steps=1"
    )
    events: list[Event] = []

    def stop(event: Event) -> None:
        events.append(event)
        stop_at(6)(event)

    with pytest.raises(Stop):
        train(recipe, data, tmp_path / "run", device="cpu", on_event=stop)
    assert 0 < measured[0].step < 40
    assert measured[0].validation > 0
    assert messages(events)[0].startswith("plan for 1000 s: ")
    stored = load_recipe(tmp_path / "run" / "config.toml")
    assert stored.train.time == 1000
    assert stored.train.epochs is None
    assert 20 <= stored.train.steps <= 22  # 914 s, less the start
    assert stored.train.validate_every == stored.train.steps

    def fail(*arguments: object) -> Pace:
        raise AssertionError("a resumed run is not planned again")

    monkeypatch.setattr(trainer, "measure_pace", fail)
    events.clear()
    run = train(recipe, data, tmp_path / "run", device="cpu", on_event=events.append)
    assert events[0].kind == "resume"
    assert run.step == 12
    assert load_recipe(tmp_path / "run" / "config.toml") == stored
    with pytest.raises(ConfigError, match=r"train\.time = 1000\.0, and now it is 70\.0"):
        train(tiny_recipe("train.time=70s"), data, tmp_path / "run", device="cpu")


def test_training_validates_on_evenly_spread_images(data: Path, tmp_path: Path) -> None:
    splits = read_splits(data)
    val = tuple(replace(image, annotations=()) for image in splits["train"].images[:4])
    val += splits["train"].images[4:5]
    splits["val"] = replace(splits["val"], images=val)
    events: list[Event] = []
    recipe = tiny_recipe("train.steps=2", "train.val_images=2", "train.validate_every=2")
    assert train(recipe, splits, tmp_path / "run", device="cpu", on_event=events.append).metrics
    assert {e.data["total"] for e in events if e.kind == "validating"} == {2}
    (validation,) = (e.data for e in events if e.kind == "validation")
    assert validation["images"] == 2
    assert validation["ap"] is not None  # the first of the two has objects
    # All images belong to the run: with others it is not the same data.
    splits["val"] = replace(splits["val"], images=val[:4])
    with pytest.raises(ConfigError, match="other data"):
        train(recipe, splits, tmp_path / "run", device="cpu")


def test_plan_with_slow_validation_is_stored_with_fewer_images(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = read_splits(data)
    splits["val"] = replace(splits["val"], images=splits["train"].images * 2)
    monkeypatch.setattr(trainer, "measure_pace", lambda *_: Pace(40.0, 150.0))
    events: list[Event] = []

    def stop(event: Event) -> None:
        events.append(event)
        stop_at(1)(event)

    with pytest.raises(Stop):
        train(tiny_recipe("train.time=1000s"), splits, tmp_path / "run", on_event=stop)
    # 958 s, less the start: 95 s are 10.1 of 16 images.
    stored = load_recipe(tmp_path / "run" / "config.toml").train
    assert stored.val_images in (10, 11)
    plan = next(text for text in messages(events) if text.startswith("plan for 1000 s: "))
    assert plan.endswith(f"once on {stored.val_images} of 16 images (train.val_images)")


@pytest.mark.parametrize(
    ("num_val", "settings", "pace"),
    [
        (2, [], Pace(1.0, 60.0)),  # too few to leave any out
        (20, ["train.val_images=5"], Pace(1.0, 60.0)),
        (20, ["train.val_images=none"], Pace(1.0, 200.0)),
        (20, [], Pace(1.0, 600.0)),
        (20, [], Pace(6.0, 600.0)),  # a smaller image size
        (0, [], Pace(1.0, 0.0)),
    ],
)
def test_deadline_and_validation_of_the_training_are_those_of_the_plan(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    num_val: int,
    settings: list[str],
    pace: Pace,
) -> None:
    splits = squares(tmp_path, *(80.0, 100.0) * 10)
    images = splits["train"].images[:num_val]
    splits["val"] = replace(splits["train"], images=images, split="val")
    plans: list[Plan] = []
    plan_training = trainer.plan_training

    def planned(*arguments: Any, **options: Any) -> tuple[dict[str, Any], Plan]:
        changes, plan = plan_training(*arguments, **options)
        plans.append(plan)
        return changes, plan

    class Started(Exception):
        pass

    def pacer(deadline: float, period: int, validation: float) -> Pacer:
        raise Started(deadline, validation)

    monkeypatch.setattr(trainer, "measure_pace", lambda *_: pace)
    monkeypatch.setattr(trainer, "plan_training", planned)
    monkeypatch.setattr(loop, "Pacer", pacer)
    small = ["model.backbone=tiny", "model.backbone_weights=none", "model.norm=group"]
    recipe = load_recipe("quick", ["train.time=1000s", "data.workers=0", *small, *settings])
    with pytest.raises(Started) as error:
        train(recipe, splits, tmp_path / "run", device="cpu", started=(started := monotonic()))
    deadline, validation = error.value.args
    assert validation == pytest.approx(plans[0].validation)
    # The number of images is rounded up.
    seconds = seconds_to_train(1000) - plans[0].after
    assert deadline - started == pytest.approx(seconds, abs=12)
    assert plans[0].steps >= 20


def squares(folder: Path, *sides: float) -> dict[str, Dataset]:
    """A training split of one image of 640 x 480 px per square."""
    file = folder / "image.png"
    Image.new("RGB", (640, 480)).save(file)
    images = tuple(
        LabelledImage(file, i, (Annotation((9.0, 9.0, 9.0 + side, 9.0 + side), 0),), 640, 480)
        for i, side in enumerate(sides)
    )
    return {"train": Dataset(images, ("square",), (1,), "train", "synthetic", file)}


def events_until_choices(splits: dict[str, Dataset], folder: Path) -> list[Event]:
    events = []

    def stop(event: Event) -> None:
        events.append(event)
        if event.kind == "choices":
            raise Stop(event)

    recipe = load_recipe("quick", ["train.time=1000s"])
    with pytest.raises(Stop):
        train(recipe, splits, folder / "run", device="cpu", on_event=stop)
    return events


def test_plan_with_smaller_images_does_not_add_p2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A sixth of the objects are 25 of 480 px: 23 px at 448, enough without P2, but not at 224.
    splits = squares(tmp_path, *(25.0, 80.0, 80.0, 80.0, 80.0, 80.0) * 2)
    monkeypatch.setattr(trainer, "measure_pace", lambda *_: Pace(40.0, 0.0))
    events = events_until_choices(splits, tmp_path)
    chosen = {c["setting"]: c["value"] for c in events[-1].data["choices"]}
    assert chosen["data.image_size"] < 448
    assert "model.p2" not in chosen
    assert not [text for text in messages(events) if "P2" in text]


def test_plan_without_time_for_p2_reports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = squares(tmp_path, *(20.0, 20.0, 80.0, 80.0, 80.0, 80.0) * 10)
    monkeypatch.setattr(trainer, "measure_pace", lambda *_: Pace(40.0, 0.0))
    events = events_until_choices(splits, tmp_path)
    plan = next(text for text in messages(events) if text.startswith("plan for 1000 s: "))
    assert " px without P2 in " in plan
    assert "model.p2" not in {c["setting"] for c in events[-1].data["choices"]}


def test_limit_that_cannot_suffice_is_rejected_after_a_step(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    step = loop.Trainer.step
    monkeypatch.setattr(
        loop.Trainer, "step", lambda self, batch: (steps.append(1), step(self, batch))
    )
    with pytest.raises(ConfigError, match=r"train.time 0.1 s is too short: 20 steps of .*at least"):
        train(tiny_recipe("train.time=0.1s"), data, tmp_path / "run", device="cpu")
    assert len(steps) == 1
    with pytest.raises(ConfigError, match="--time 5 has no unit: give 5min, or 5s"):
        TrainingOptions(time="5").keywords()


def test_chosen_settings_are_written_and_a_resumed_run_keeps_them(
    data: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe("auto=true", "train.steps=4", "train.save_every=2")
    events: list[Event] = []

    def stop(event: Event) -> None:
        events.append(event)
        stop_at(3)(event)

    with pytest.raises(Stop):
        train(recipe, data, tmp_path / "run", device="cpu", on_event=stop)
    choices = {c["setting"]: c for c in events[0].data["choices"]}
    assert events[0].kind == "choices"
    assert choices["model.p2"]["value"] is True
    stored = load_recipe(tmp_path / "run" / "config.toml")
    assert (stored.auto, stored.model.p2) == (False, True)
    # Another choice of this version must not stop the resumption.
    text = (tmp_path / "run" / "config.toml").read_text()
    changed = text.replace("detections_per_image = 100", "detections_per_image = 123")
    (tmp_path / "run" / "config.toml").write_text(changed)
    events.clear()
    run = train(recipe, data, tmp_path / "run", device="cpu", on_event=events.append)
    assert [event.kind for event in events if event.kind in ("choices", "resume")] == ["resume"]
    assert run.step == 4
    assert load_recipe(tmp_path / "run" / "config.toml").detect.detections_per_image == 123
