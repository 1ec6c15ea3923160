"""Figure 2: calls in turns, what is timed, AP at each scale, and errors."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from painter import PLAIN, tiny_checkpoint, without_splits

from retinanet.data.dataset import Dataset
from retinanet.errors import ConfigError, DataError, ImageError, WeightsError
from retinanet.evaluation.run import evaluate, read_eval_dataset
from retinanet.inference.detector import Detector
from retinanet.report.speed_accuracy import (
    CallTime,
    SpeedAccuracy,
    detection_call,
    paper_scales,
    speed_accuracy,
    time_in_turns,
)


def measure(models: dict[str, Any], data: Any, **changes: Any) -> SpeedAccuracy:
    options: dict[str, Any] = {"rounds": 1, "images": 1, "workers": 0, **PLAIN, **changes}
    return speed_accuracy(models, data, **options)


def test_time_in_turns() -> None:
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
    once = time_in_turns({"x": lambda: None}, 1, warmup=0, clock=iter([3.0, 5.0]).__next__)
    assert once == {"x": (2.0, 2.0, 2.0)}


def test_paper_scales() -> None:
    assert paper_scales(600) == (400, 500, 600, 700, 800)
    assert paper_scales(192) == (128, 160, 192, 224, 256)
    assert paper_scales(40) == (32, 33, 40, 47, 53)


def test_speed_accuracy_points(val: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tiny_checkpoint(loss={"gamma": 2.0})
    second = tiny_checkpoint(("blue", "green", "red"))
    expected = {
        (name, scale): evaluate(model, val, image_size=scale, workers=0, **PLAIN)
        for name, model in (("first", first), ("second", second))
        for scale in (64, 96)
    }
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr("retinanet.evaluation.predict.detection_losses", None)  # not computed
    found = measure(
        {"first": first, "second": second},
        val,
        scales=[96, 64],
        rounds=3,
        images=2,
        machine={"name": "this"},
        progress=lambda done, of: seen.append((done, of)),
    )
    assert [(point.model, point.scale) for point in found.points] == list(expected)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert (found.images, found.timed, found.rounds, found.split) == (4, 2, 3, "val")
    assert found.machine == {"name": "this"}
    for point in found.points:
        assert point.max_size == point.scale * 96 // 64
        assert 0 < point.milliseconds_low <= point.milliseconds <= point.milliseconds_high
        assert point.network.startswith("torch on cpu, float32")
        metrics = expected[point.model, point.scale]
        aps = [point.metrics[column] for column in ("AP", "AP50", "AP75")]
        assert aps == [metrics.ap, metrics.ap50, metrics.ap75]
        assert math.isnan(point.metrics["APl"])
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["points"][0]["metrics"]["APl"] is None
    assert values["points"][3]["scale"] == 96


def test_speed_accuracy_default_scales_are_each_models_own(val: Dataset) -> None:
    small = replace(tiny_checkpoint(), image_size=48, max_size=72)
    found = measure({"a": small, "b": tiny_checkpoint()}, replace(val, images=val.images[:1]))
    scales = [(point.model, point.scale) for point in found.points]
    assert scales[:5] == [("a", scale) for scale in (32, 40, 48, 56, 64)]
    assert scales[5:] == [("b", scale) for scale in (43, 53, 64, 75, 85)]


def test_detection_call_times_network_and_postprocessing_alone(
    val: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = Detector(tiny_checkpoint(), score_threshold=0.3, **PLAIN)
    call = detection_call(detector, val)
    seen: list[tuple[tuple[int, ...], float]] = []

    def detect(network: Any, images: Any, *_: Any, **thresholds: Any) -> list[Any]:
        assert network is detector.network
        seen.append((tuple(images.shape), thresholds["score_threshold"]))
        return []

    monkeypatch.setattr("retinanet.report.speed_accuracy.detect_batch", detect)
    monkeypatch.setattr("retinanet.report.speed_accuracy.eval_loader", None)
    call()
    # One by one, padded to multiples of 32, images of one size after each other.
    assert seen == [
        ((1, 3, 64, 64), 0.3), ((1, 3, 64, 96), 0.3), ((1, 3, 64, 96), 0.3), ((1, 3, 96, 64), 0.3),
    ]  # fmt: skip


def test_speed_accuracy_invalid_input_is_an_error(
    val: Dataset, painted: Path, tmp_path: Path
) -> None:
    model = {"model": tiny_checkpoint()}
    for models, options, message in (
        ({}, {}, "no model to measure"),
        (model, {"scales": [16]}, r"32 to 8192 pixels, got \[16\]"),
        (model, {"scales": [64, 9000]}, r"got \[64, 9000\]"),
        (model, {"scales": [64, 64]}, "different numbers"),
        (model, {"scales": []}, "one or more"),
        (model, {"rounds": 0}, "must be 1 or more, got 0 and"),
        (model, {"images": 0}, "must be 1 or more, got . and 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            measure(models, val, **options)
    with pytest.raises(WeightsError, match="there is no checkpoint"):
        measure({"gone": tmp_path / "gone"}, val)
    with pytest.raises(DataError, match="no split 'tset'"):
        measure(model, painted, split="tset")
    seen: list[int] = []  # before the first measurement
    models = {"fits": tiny_checkpoint(), "lacks": tiny_checkpoint(("red", "green"))}
    with pytest.raises(WeightsError, match="'blue'"):
        measure(models, val, scales=[64], progress=lambda done, _: seen.append(done))
    assert seen == []
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    spoilt = replace(val, images=(*val.images, replace(val.images[0], path=broken, id=9)))
    with pytest.raises(ImageError, match=r"broken\.png"):
        measure(model, spoilt, scales=[64])


def test_speed_accuracy_models_of_different_splits(painted: Path, tmp_path: Path) -> None:
    folder = without_splits(painted, tmp_path / "data")
    models = {
        f"seed {seed}": tiny_checkpoint(split={"seed": seed, "val_fraction": 0.25})
        for seed in range(6)
    }
    with pytest.raises(DataError, match=r"seed 0 and seed \d have different validation splits"):
        measure(models, folder, scales=[64])
    # A published model, without a record of its split, is evaluated on that of the other.
    published = tiny_checkpoint()
    for run in list(models.values())[:3]:
        expected = read_eval_dataset(folder, info=run.info)
        for order in ({"p": published, "run": run}, {"run": run, "p": published}):
            found = measure(order, folder, scales=[64])
            metrics = evaluate(run, expected, workers=0, **PLAIN)
            ap = next(point.metrics["AP"] for point in found.points if point.model == "run")
            assert (found.images, ap) == (1, pytest.approx(metrics.ap, nan_ok=True))
