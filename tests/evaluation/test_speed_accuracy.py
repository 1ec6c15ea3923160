"""Figure 2: turns that are taken, what is timed, AP at each scale, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_evaluate_run
from test_evaluate_run import tiny_checkpoint

from retinanet.data.dataset import Dataset
from retinanet.errors import ConfigError, DataError, WeightsError
from retinanet.evaluation.run import evaluate, read_eval_dataset
from retinanet.inference.detector import Detector
from retinanet.report.speed_accuracy import (
    CallTime,
    SpeedAccuracy,
    _common_split,
    _spread,
    detection_call,
    paper_scales,
    speed_accuracy,
    time_in_turns,
)

painted, val = test_evaluate_run.painted, test_evaluate_run.val  # fixtures

PLAIN: dict[str, Any] = {"device": "cpu", "precision": "float32"}


def test_calls_take_turns() -> None:
    order: list[str] = []
    now = [0.0]
    # Seconds that each call takes, call by call; the first two of each are not timed.
    lasts = {"a": iter([9, 9, 1, 2, 3, 4, 5]), "b": iter([9, 9, 10, 10, 10, 10, 20])}

    def call(name: str) -> None:
        order.append(name)
        now[0] += next(lasts[name])

    times = time_in_turns({"a": lambda: call("a"), "b": lambda: call("b")}, 5, clock=lambda: now[0])
    assert order == ["a", "a", "b", "b", *["a", "b"] * 5]
    assert times == {"a": CallTime(3, 2, 4), "b": CallTime(10, 10, 10)}
    assert time_in_turns({"x": lambda: None}, 1, warmup=0, clock=iter([3.0, 5.0]).__next__) == {
        "x": (2.0, 2.0, 2.0)
    }
    with pytest.raises(ValueError, match="rounds must be 1 or more, got 0"):
        time_in_turns({}, 0)


def test_scales_of_the_paper() -> None:
    assert paper_scales(600) == (400, 500, 600, 700, 800)
    assert paper_scales(192) == (128, 160, 192, 224, 256)
    assert paper_scales(40) == (32, 33, 40, 47, 53)


def test_images_are_spread_spread() -> None:
    assert _spread(range(3), 5) == range(3)
    assert list(_spread(range(9), 3)) == [0, 4, 8]
    assert list(_spread(range(9), 1)) == [0]


def test_points(val: Dataset) -> None:
    first, second = tiny_checkpoint(), tiny_checkpoint(("blue", "green", "red"))
    seen: list[tuple[int, int]] = []
    found = speed_accuracy(
        {"one": first, "two": second},
        val,
        scales=[96, 64],
        rounds=3,
        images=2,
        workers=0,
        machine={"name": "this"},
        progress=lambda done, of: seen.append((done, of)),
        **PLAIN,
    )
    assert [(one.model, one.scale) for one in found.points] == [
        ("one", 64), ("one", 96), ("two", 64), ("two", 96),
    ]  # fmt: skip
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert (found.images, found.timed, found.rounds, found.split) == (4, 2, 3, "val")
    assert found.machine == {"name": "this"}
    for one in found.points:
        assert one.max_size == one.scale * 96 // 64
        assert 0 < one.milliseconds_low <= one.milliseconds <= one.milliseconds_high
        assert one.network.startswith("torch on cpu, float32")
        model = first if one.model == "one" else second
        metrics = evaluate(model, val, image_size=one.scale, workers=0, **PLAIN)
        assert (one.ap, one.ap50, one.ap75) == (metrics.ap, metrics.ap50, metrics.ap75)
        assert one.ap_medium == pytest.approx(metrics.ap_medium, nan_ok=True)
    assert [one.ap_large for one in found.points] == pytest.approx([math.nan] * 4, nan_ok=True)
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["points"][0]["ap_large"] is None
    assert values["points"][3]["scale"] == 96


def test_no_loss_is_computed(val: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retinanet.evaluation.predict.detection_losses", None)
    models = {"one": tiny_checkpoint(loss={"gamma": 2.0})}
    found = speed_accuracy(models, val, scales=[64], rounds=1, images=1, workers=0, **PLAIN)
    assert len(found.points) == 1


def test_every_model_is_looked_at_before_the_first_is_measured(val: Dataset) -> None:
    seen: list[int] = []
    models = {"fits": tiny_checkpoint(), "lacks": tiny_checkpoint(("red", "green"))}
    with pytest.raises(WeightsError, match="'blue'"):
        refused(models, val, scales=[64], progress=lambda done, _: seen.append(done))
    assert seen == []


def test_default_scales_are_each_models_own(val: Dataset) -> None:
    small = replace(tiny_checkpoint(), image_size=48, max_size=72)
    one = replace(val, images=val.images[:1])
    found = speed_accuracy(
        {"a": small, "b": tiny_checkpoint()}, one, rounds=1, images=1, workers=0, **PLAIN
    )
    assert [one.scale for one in found.points if one.model == "a"] == [32, 40, 48, 56, 64]
    assert [one.scale for one in found.points if one.model == "b"] == [43, 53, 64, 75, 85]


def test_what_is_timed_is_the_search_alone(
    val: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    detector = Detector(tiny_checkpoint(), score_threshold=0.3, **PLAIN)
    call = detection_call(detector, val)
    seen: list[tuple[tuple[int, ...], float]] = []

    def search(network: Any, images: Any, *_: Any, **thresholds: Any) -> list[Any]:
        assert network is detector.network
        seen.append((tuple(images.shape), thresholds["score_threshold"]))
        return []

    monkeypatch.setattr("retinanet.report.speed_accuracy.detect_batch", search)
    monkeypatch.setattr("retinanet.report.speed_accuracy.eval_loader", None)
    call()
    # One by one, padded to multiples of 32, images of one size after each other.
    assert seen == [
        ((1, 3, 64, 64), 0.3), ((1, 3, 64, 96), 0.3), ((1, 3, 64, 96), 0.3), ((1, 3, 96, 64), 0.3),
    ]  # fmt: skip


def refused(models: dict[str, Any], data: Any, **changes: Any) -> SpeedAccuracy:
    return speed_accuracy(models, data, rounds=changes.pop("rounds", 1), **{**PLAIN, **changes})


def test_what_is_refused(val: Dataset, painted: Path, tmp_path: Path) -> None:
    model = {"one": tiny_checkpoint()}
    with pytest.raises(ConfigError, match="no model to measure"):
        refused({}, val)
    for scales, said in (
        ([16], "32 to 8192 pixels, got 16"),
        ([64, 9000], "got 9000"),
        ([64, 64], "different numbers"),
        ([], "one or more"),
    ):
        with pytest.raises(ConfigError, match=said):
            refused(model, val, scales=scales)
    with pytest.raises(ConfigError, match="rounds must be 1 or more, got 0"):
        refused(model, val, rounds=0)
    with pytest.raises(ConfigError, match="images must be 1 or more, got 0"):
        refused(model, val, images=0)
    with pytest.raises(WeightsError, match="there is no checkpoint"):
        refused({"gone": tmp_path / "gone"}, val)
    with pytest.raises(DataError, match="no split 'tset'"):
        refused(model, painted, split="tset")


def test_models_that_held_out_other_images(painted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for file in painted.glob("*.png"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "labels.json").write_text((painted / "val.json").read_text())
    models = {
        f"seed {seed}": tiny_checkpoint(split={"seed": seed, "val_fraction": 0.25})
        for seed in range(6)
    }
    with pytest.raises(DataError, match=r"seed 0 and seed \d have different validation splits"):
        refused(models, folder, scales=[64])
    same = dict.fromkeys(("a", "b"), models["seed 0"])
    assert refused(same, folder, scales=[64], workers=0).images == 1
    # A model that held out nothing is judged on what another did, whichever is first.
    published, blank = tiny_checkpoint(), tiny_checkpoint(split={})
    for seed in range(6):
        run = models[f"seed {seed}"]
        held = read_eval_dataset(folder, info=run.info)
        for order in (
            {"published": published, "run": run},
            {"run": run, "published": blank},
        ):
            assert _common_split(order, folder, None).images == held.images
    assert len(_common_split({"a": published, "b": blank}, folder, None)) == 1
