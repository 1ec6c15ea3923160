"""NMS, temperature and score thresholds that are chosen on labelled images."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from painter import PLAIN, Painter, tiny_checkpoint
from torch import Tensor

import retinanet as rn
from retinanet.anchors import level_anchors
from retinanet.boxes import encode_boxes
from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.errors import ConfigError, DataError
from retinanet.evaluation import evaluate_detections
from retinanet.evaluation.metrics import CalibrationBin
from retinanet.evaluation.tuning import (
    NMS_GRID,
    f1_thresholds,
    fit_temperature,
    nms_name,
    store_tuning,
    tune,
)
from retinanet.model.checkpoint import Checkpoint, save_checkpoint
from retinanet.structures import Detections, Outputs


def many_objects(objects: Sequence[int], images: int = 30) -> tuple[Dataset, list[Any], Any]:
    """Random detections near the objects of a class, and others; with each one's correctness.

    Returns:
        The data, its detections, and by class (scores, correct) of all detections.
    """
    rng = np.random.default_rng(0)
    labelled, found, table = [], [], [(list[float](), list[bool]()) for _ in objects]
    for i in range(images):
        annotations, boxes, scores, labels = [], [], [], []
        for label, count in enumerate(objects):
            for row in range(i, count, images):
                # Objects are far apart, so that a detection matches its own object or none.
                box = (100.0 * (row // images), 100.0 * label, 0.0, 0.0)
                box = (*box[:2], box[0] + 40, box[1] + 40)
                annotations.append(Annotation(box, label, row))
                for shift, mean in ((4, 0.7), (35, 0.4)):
                    if rng.uniform() < 0.8:
                        score = float(np.clip(rng.normal(mean, 0.15), 0.06, 0.99))
                        boxes.append([value + shift * (j % 2) for j, value in enumerate(box)])
                        scores.append(score)
                        labels.append(label)
                        table[label][0].append(score)
                        table[label][1].append(shift == 4)
        order = np.argsort(-np.array(scores))
        labelled.append(LabelledImage(Path(f"{i}.png"), i, tuple(annotations), 500, 500))
        found.append(
            (
                i,
                Detections(
                    torch.tensor(boxes).reshape(-1, 4)[order],
                    torch.tensor(scores)[order],
                    torch.tensor(labels, dtype=torch.int64)[order],
                ),
            )
        )
    classes = tuple(f"class {label}" for label in range(len(objects)))
    ids = tuple(range(1, len(objects) + 1))
    return Dataset(tuple(labelled), classes, ids, "val", "coco", Path("data")), found, table


def test_f1_thresholds_equal_brute_force() -> None:
    objects = (200, 120, 3)
    dataset, found, table = many_objects(objects)
    metrics = evaluate_detections(dataset, found)
    thresholds = f1_thresholds(metrics, (*dataset.classes, "never seen"))
    for label in (0, 1):
        scores, correct = (np.array(column) for column in table[label])

        def f1(threshold: float, scores: Any = scores, correct: Any = correct) -> float:
            kept = scores > threshold
            return float(2 * correct[kept].sum() / (kept.sum() + objects[label]))  # noqa: B023

        best = max(map(f1, [0.0, *scores]))
        assert f1(thresholds[f"class {label}"]) > best - 0.01 > f1(0.3)
    # Too few objects, or none: the threshold of all classes together.
    overall = math.ceil(metrics.best_score * 10_000 - 1) / 10_000
    assert thresholds["class 2"] == thresholds["never seen"] == pytest.approx(overall, abs=1e-4)
    assert metrics.per_class[2].best_score != pytest.approx(metrics.best_score)


def test_f1_thresholds_without_detections_are_empty() -> None:
    dataset, _, _ = many_objects((5,))
    assert f1_thresholds(evaluate_detections(dataset, []), dataset.classes) == {}


def test_fit_temperature_equals_grid_search() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, 4000)
    correct = rng.uniform(size=4000) < 1 / (1 + np.exp(-logits / 1.8))
    scores = 1 / (1 + np.exp(-logits))
    edges = np.linspace(0, 1, 1001)
    bins = []
    for low, high in pairwise(edges):
        own = (scores >= low) & (scores < high)
        means = (scores[own].mean(), correct[own].mean()) if own.any() else (math.nan, math.nan)
        bins.append(CalibrationBin(low, high, int(own.sum()), *means))

    def loss(temperature: float) -> float:
        p = 1 / (1 + np.exp(-logits / temperature))
        return float(-(np.log(p[correct]).sum() + np.log(1 - p[~correct]).sum()))

    expected = min(np.arange(0.5, 4, 0.01), key=loss)
    assert fit_temperature(bins) == pytest.approx(expected, abs=0.03)
    assert expected == pytest.approx(1.8, abs=0.1)
    assert fit_temperature(bins[:0]) == 1.0
    wrong = [replace(b, precision=0.0) for b in bins if b.detections]
    assert fit_temperature(wrong) == 1.0


class Sloppy(Painter):
    """A painter that places several boxes on an object, each displaced, with given scores.

    Their mean is the object: fusion is right, and the best single box is not.
    """

    shifts = ((0.15, 2.0), (-0.15, 1.9))

    def forward(self, images: Tensor) -> Outputs:
        outputs = super().forward(images)
        shapes = [(level.shape[-2], level.shape[-1]) for level in outputs.logits]
        anchors = level_anchors(self.anchors, shapes)
        levels = []
        for logits, deltas, boxes in zip(outputs.logits, outputs.deltas, anchors, strict=True):
            count, classes = len(images), self.num_classes
            scores = logits.permute(0, 2, 3, 1).reshape(count, -1, classes).clone()
            offsets = deltas.permute(0, 2, 3, 1).reshape(count, -1, 4).clone()
            for image, row, label in (scores > 0).nonzero().tolist():
                width, height = (boxes[row, 2:] - boxes[row, :2]).tolist()
                dx, dy, dw, dh = offsets[image, row].tolist()
                middle = boxes[row, :2] + boxes[row, 2:]
                centre = middle / 2 + torch.tensor([dx * width, dy * height])
                sides = torch.tensor([width * math.exp(dw), height * math.exp(dh)])
                box = torch.cat([centre - sides / 2, centre + sides / 2])
                scores[image, row] = -9.0
                near = (boxes - box).abs().sum(1).argsort()[:2].tolist()
                for anchor, (shift, logit) in zip(near, self.shifts, strict=True):
                    moved = box + torch.tensor([shift, 0, shift, 0]) * sides[0]
                    offsets[image, anchor] = encode_boxes(boxes[anchor], moved)
                    scores[image, anchor, label] = logit
            levels.append((scores, offsets))
        return Outputs(
            tuple(
                part.reshape(len(images), *shape, -1).permute(0, 3, 1, 2)
                for (part, _), shape in zip(levels, shapes, strict=True)
            ),
            tuple(
                part.reshape(len(images), *shape, -1).permute(0, 3, 1, 2)
                for (_, part), shape in zip(levels, shapes, strict=True)
            ),
        )


def of(model: Any, dataset: Dataset, **info: Any) -> Checkpoint:
    return Checkpoint(model, dataset.classes, dataset.category_ids, 128, 256, info)


def test_tune_chooses_fusion_where_it_wins(val: Dataset) -> None:
    tuning = tune(of(Sloppy(), val), val, workers=0, **PLAIN)
    assert tuning.settings["nms"] == "wbf"
    name = nms_name(tuning.settings)
    assert tuning.ap[name] == max(tuning.ap.values()) > tuning.ap["hard .5"] + 0.1
    assert len(tuning.ap) == len(NMS_GRID)
    assert tuning.before.ap == pytest.approx(tuning.ap["hard .5"])
    assert tuning.after.ap == pytest.approx(tuning.ap[name])
    # The chosen settings give the same metrics in an evaluation.
    info = {"detect": dict(tuning.settings)}
    again = rn.evaluate(of(Sloppy(), val, **info), val, workers=0, **PLAIN)
    assert again.ap == pytest.approx(tuning.after.ap)
    expected = tuning.after.calibration
    assert again.calibration.expected_error == pytest.approx(expected.expected_error)
    # All detections are right, with scores of .88: colder scores are nearer to that.
    assert tuning.settings["temperature"] < 0.5
    assert expected.expected_error < 0.5 * (1 - 1 / (1 + math.exp(-2)))


def test_tune_keeps_nms_at_equal_ap(val: Dataset) -> None:
    settings = {"nms_threshold": 0.65}
    tuning = tune(of(Painter(), val, detect=settings), val, workers=0, **PLAIN)
    assert tuning.before.ap == 1
    assert (tuning.settings["nms"], tuning.settings["nms_threshold"]) == ("hard", 0.65)
    assert tuning.ap["hard .65"] == 1


class HalfBlind(Painter):
    """A painter that sees the left half of its input only."""

    def forward(self, images: Tensor) -> Outputs:
        images = images.clone()
        images[..., images.shape[-1] // 2 :] = 0
        return super().forward(images)


def test_flip_tta_in_evaluate_and_tune(val: Dataset) -> None:
    def blue(**options: Any) -> rn.Metrics:
        return rn.evaluate(of(HalfBlind(), val), val, workers=0, **PLAIN, **options)

    # Red is in the left half of every image; the blue rectangle is in a right half.
    plain, both = blue(), blue(flip_tta=True)
    assert [row.ap for row in plain.per_class][::2] == pytest.approx([1, 0])
    assert [row.ap for row in both.per_class][::2] == pytest.approx([1, 1])
    tuning = tune(of(HalfBlind(), val, detect={"flip_tta": True}), val, workers=0, **PLAIN)
    assert tuning.before.ap == pytest.approx(both.ap)


def test_tune_again_starts_from_uncalibrated_scores(val: Dataset) -> None:
    first = tune(of(Sloppy(), val), val, workers=0, **PLAIN)
    again = tune(of(Sloppy(), val, detect=dict(first.settings)), val, workers=0, **PLAIN)
    for name, value in first.settings.items():
        assert again.settings[name] == (
            pytest.approx(value) if isinstance(value, float) else value
        ), name


def test_tune_keeps_the_named_settings(val: Dataset) -> None:
    own = {"nms_threshold": 0.65, "temperature": 1.5}
    tuning = tune(of(Sloppy(), val, detect=own), val, keep=own, workers=0, **PLAIN)
    assert own.items() <= tuning.settings.items()
    assert [*tuning.ap] == ["hard .65"]
    again = rn.evaluate(of(Sloppy(), val, detect=own), val, workers=0, **PLAIN)
    expected = again.calibration.expected_error
    assert tuning.after.calibration.expected_error == pytest.approx(expected)


def test_store_tuning_is_what_a_detector_and_an_evaluation_use(
    painted: Path, tmp_path: Path
) -> None:
    folder = save_checkpoint(tmp_path / "model", tiny_checkpoint(step=7))
    tuning = tune(folder, painted, workers=0, **PLAIN)
    before = (folder / "model.safetensors").read_bytes()
    assert store_tuning(folder, tuning) == folder
    assert (folder / "model.safetensors").read_bytes() == before
    info = json.loads((folder / "model.json").read_text())["info"]
    assert info["step"] == 7
    assert info["detect"] == dict(tuning.settings)
    detector = rn.load(folder, **PLAIN)
    assert detector.thresholds["score_thresholds"] == tuning.settings["score_thresholds"]
    assert detector.eval_thresholds["score_thresholds"] == {}
    assert detector.eval_thresholds["score_threshold"] == tuning.settings["score_threshold"]


def test_tune_rejects_what_cannot_be_tuned(val: Dataset) -> None:
    tiled = of(Painter(), val, tile={"side": 64, "overlap": 0.2})
    with pytest.raises(ConfigError, match="the model was trained on tiles"):
        tune(tiled, val, workers=0, **PLAIN)
    with pytest.raises(ConfigError, match=r"chosen on whole images, .* or a tile is given"):
        tune(of(Painter(), val), val, workers=0, tile=64, **PLAIN)
    dataset, _, _ = many_objects((0,))
    with pytest.raises(DataError, match="no object to tune the detection on"):
        tune(tiny_checkpoint(dataset.classes), dataset, **PLAIN)
    detector = rn.Detector(tiny_checkpoint(), **PLAIN)
    detector.network = SimpleNamespace(description="onnx")  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="post-processing of an exported file is fixed"):
        tune(detector, val)
