"""COCO's numbers: published, of pycocotools on random data, and computed by hand."""

from __future__ import annotations

import contextlib
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.evaluation.coco import evaluate_detections
from retinanet.evaluation.metrics import Metrics
from retinanet.evaluation.results import Results, ground_truth
from retinanet.evaluation.run import evaluate
from retinanet.structures import Detections

TWELVE = (
    *("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"),
    *("ar1", "ar10", "ar", "ar_small", "ar_medium", "ar_large"),
)


def make_dataset(images: list[list[Annotation]], **changes: Any) -> Dataset:
    dataset = Dataset(
        images=tuple(
            LabelledImage(Path(f"{i}.png"), 11 + i, tuple(annotations), width=640, height=480)
            for i, annotations in enumerate(images)
        ),
        classes=("cat", "dog", "bird", "unicorn"),
        category_ids=(17, 3, 0, 90),
        split="val",
        format="coco",
        source=Path("labels.json"),
    )
    return replace(dataset, **changes)


def make_detections(rows: list[tuple[list[float], float, int]]) -> Detections:
    boxes = torch.tensor([box for box, _, _ in rows], dtype=torch.float32).reshape(-1, 4)
    scores = torch.tensor([score for _, score, _ in rows], dtype=torch.float32)
    return Detections(
        boxes, scores, torch.tensor([label for _, _, label in rows], dtype=torch.long)
    )


def random_boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    size = np.exp(rng.uniform(math.log(8), math.log(250), (count, 2)))
    corner = rng.uniform(0, 1, (count, 2)) * (np.array([640, 480]) - size).clip(0)
    return np.concatenate([corner, corner + size], axis=1).round(2)


def random_case(
    seed: int, *, images: int = 30, most: int = 12
) -> tuple[Dataset, list[tuple[int, Detections]]]:
    """Objects and boxes on and beside them, with all that COCO treats apart."""
    rng = np.random.default_rng(seed)
    truth: list[list[Annotation]] = []
    found: list[tuple[int, Detections]] = []
    for i in range(images):
        # Class 3 has no object; every fifth image has none; every seventh no detection.
        count = 0 if i % 5 == 0 else int(rng.integers(1, most))
        boxes = random_boxes(rng, count)
        annotations = [
            Annotation(
                tuple(box.tolist()),
                int(rng.integers(0, 3)),
                crowd=bool(rng.random() < 0.1),
                difficult=bool(rng.random() < 0.1),
                # COCO's area is the mask's: smaller than the box.
                area=float(np.prod(box[2:] - box[:2]) * rng.uniform(0.4, 1)),
            )
            for box in boxes
        ]
        truth.append(annotations)
        if i % 7 == 3:
            continue
        moved = boxes + rng.normal(0, 3, boxes.shape)
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        both = np.concatenate([moved, moved[: count // 2] + 1, random_boxes(rng, 4)])
        labels = [a.label for a in annotations]
        labels = [*labels, *labels[: count // 2], *rng.integers(0, 4, 4).tolist()]
        labels = [int(rng.integers(0, 4)) if rng.random() < 0.2 else label for label in labels]
        # Two digits make many scores equal, within images and between them.
        scores = rng.uniform(0.05, 1, len(labels)).round(2)
        scores[count:] /= 2
        rows = [(box.tolist(), float(s), k) for box, s, k in zip(both, scores, labels, strict=True)]
        found.append((i, make_detections(rows)))
    return make_dataset(truth), found


def results_of(dataset: Dataset, found: list[tuple[int, Detections]]) -> Results:
    results = Results(dataset)
    for index, detections in found:
        results.add(index, detections)
    return results


def pycocotools_evaluator(
    truth: dict[str, Any], results: list[dict[str, Any]], max_detections: int = 100
) -> COCOeval:
    """COCO's own code, run."""
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = json.loads(json.dumps({"info": {}, **truth}))
        gt.createIndex()
        evaluator = COCOeval(gt, gt.loadRes(json.loads(json.dumps(results))), "bbox")
        evaluator.params.maxDets = [1, min(10, max_detections), max_detections]
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


def mean_or_nan(values: np.ndarray) -> float:
    return float(values[values > -1].mean()) if (values > -1).any() else math.nan


def pycocotools_numbers(
    truth: dict[str, Any], results: list[dict[str, Any]], max_detections: int = 100
) -> list[float]:
    """The twelve numbers by COCO's own code; NaN where it says -1."""
    evaluator = pycocotools_evaluator(truth, results, max_detections)
    numbers = evaluator.stats.tolist()
    # Its summary always looks for AP at the limit 100; here at the limit that was set.
    numbers[0] = mean_or_nan(evaluator.eval["precision"][..., 0, 2])
    return [math.nan if value == -1 else value for value in numbers]


def assert_same(metrics: Metrics, expected: list[float]) -> None:
    got = [getattr(metrics, name) for name in TWELVE]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9, equal_nan=True)


@pytest.mark.data
def test_evaluate_published_results_give_the_published_numbers(real_data: Path) -> None:
    folder = real_data / "coco_eval"
    labels = folder / "instances_val2014_100.json"
    results = folder / "instances_val2014_fakebbox100_results.json"
    metrics = evaluate(results, labels)
    # https://github.com/cocodataset/cocoapi, results printed beside pycocoEvalDemo.
    published = [0.505, 0.697, 0.573, 0.586, 0.519, 0.501, 0.387, 0.594, 0.595, 0.640, 0.566, 0.564]
    assert [round(value, 3) for value in metrics.summary().values()] == published
    truth, rows = (json.loads(file.read_text()) for file in (labels, results))
    assert_same(metrics, pycocotools_numbers(truth, rows))


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_pycocotools_on_random_data(seed: int) -> None:
    dataset, found = random_case(seed)
    metrics = evaluate_detections(dataset, found)
    rows = list(results_of(dataset, found).rows())
    assert_same(metrics, pycocotools_numbers(ground_truth(dataset), rows))
    assert metrics.ignored > 0
    assert 0.1 < metrics.ap < 0.9


def test_each_class_equals_pycocotools() -> None:
    dataset, found = random_case(7)
    metrics = evaluate_detections(dataset, found)
    rows = list(results_of(dataset, found).rows())
    evaluator = pycocotools_evaluator(ground_truth(dataset), rows)
    precision, recall = evaluator.eval["precision"][..., 2], evaluator.eval["recall"][..., 2]
    for metric, curve in zip(metrics.per_class, metrics.curves.per_class, strict=True):
        index = evaluator.params.catIds.index(metric.category_id)
        own = precision[:, :, index]
        np.testing.assert_allclose(
            [getattr(metric, name) for name in (*TWELVE[:6], "ar")],
            [
                mean_or_nan(own[..., 0]),
                mean_or_nan(own[0, :, 0]),
                mean_or_nan(own[5, :, 0]),
                *(mean_or_nan(own[..., area]) for area in (1, 2, 3)),
                mean_or_nan(recall[:, index, 0]),
            ],
            rtol=0,
            atol=1e-9,
        )
        np.testing.assert_allclose(curve, own[0, :, 0] if curve else [], atol=1e-4)
        assert bool(curve) == (metric.objects > 0)


@pytest.mark.parametrize("limit", [1, 5, 30, 100, 500])
def test_limit_of_detections_equals_pycocotools(limit: int) -> None:
    dataset, found = random_case(0, images=4, most=150)
    results = results_of(dataset, found)
    expected = pycocotools_numbers(ground_truth(dataset), list(results.rows()), limit)
    metrics = evaluate_detections(dataset, results, max_detections=limit)
    if limit < 10:
        expected[7] = math.nan
    assert_same(metrics, expected)
    assert metrics.max_detections == limit
    assert math.isnan(metrics.ar100) == (limit < 100)


def test_dense_data_needs_a_higher_limit() -> None:
    with pytest.raises(ValueError, match="max_detections 0 is under 1"):
        evaluate_detections(make_dataset([[]]), [], max_detections=0)
    # 300 objects of one class in one image, all found exactly: with 100 detections recall is 1/3.
    corners = [(20.0 * (i % 25), 20.0 * (i // 25)) for i in range(300)]
    objects = [Annotation((x, y, x + 16, y + 16), 0) for x, y in corners]
    dataset = make_dataset([objects])
    rows = [(list(a.box), 0.9, 0) for a in objects]
    found = [(0, make_detections(rows))]
    cut = evaluate_detections(dataset, found, max_detections=100)
    assert cut.ar == pytest.approx(1 / 3)
    assert (cut.objects_over_limit, cut.detections_over_limit) == (200, 200)
    assert evaluate_detections(dataset, found).max_detections == 300  # as many as objects
    all_counted = evaluate_detections(dataset, found, max_detections=500)
    assert all_counted.ar == 1
    assert all_counted.ap == pytest.approx(1)
    assert all_counted.ar100 == pytest.approx(1 / 3)
    assert "AR500" in all_counted.summary()


def test_hand_computed_precision_recall() -> None:
    # Two cats. By score: right (.9), wrong (.8), right (.7); so precision 1, 1/2, 2/3 at recall
    # .5, .5, 1. Interpolated: 1 to recall .50 (51 of the 101 recalls), 2/3 over it (50).
    dataset = make_dataset(
        [[Annotation((10, 10, 50, 50), 0), Annotation((100, 100, 150, 150), 0)], []]
    )
    rows = [([10.0, 10, 50, 50], 0.9, 0), ([300.0, 300, 350, 350], 0.8, 0),
            ([100.0, 100, 150, 150], 0.7, 0)]  # fmt: skip
    metrics = evaluate_detections(dataset, [(0, make_detections(rows))])
    by_hand = (51 * 1 + 50 * 2 / 3) / 101
    assert metrics.ap50 == pytest.approx(by_hand)
    assert metrics.ap == pytest.approx(by_hand)  # both boxes are exact, at every IoU
    assert metrics.ar1 == 0.5
    assert metrics.ar10 == 1
    assert math.isnan(metrics.ap_small)  # 40 x 40 and 50 x 50 are medium
    assert metrics.ap_medium == pytest.approx(by_hand)
    cat = metrics.per_class[0]
    assert (cat.name, cat.category_id, cat.objects, cat.detections) == ("cat", 17, 2, 3)
    assert cat.ap50 == pytest.approx(by_hand)
    # F1: 2/3 at recall .5 (precision 1), .8 at recall 1 (precision 2/3): the best, down to .7.
    assert cat.best_f1 == pytest.approx(0.8)
    assert cat.best_score == pytest.approx(0.7)
    assert metrics.best_f1 == pytest.approx(0.8)
    assert metrics.best_score == pytest.approx(0.69)  # .7 in float32 is a little under .7
    assert math.isnan(metrics.per_class[1].ap)  # no dog in the data
    assert metrics.curves.per_class[0][0] == 1.0
    assert metrics.curves.precision["0.50"][50] == 1.0
    assert metrics.curves.precision["0.50"][51] == pytest.approx(2 / 3, abs=1e-4)


def test_kinds_of_error_and_confusion() -> None:
    truth = [
        Annotation((0, 0, 100, 100), 0),  # found as a dog: classification
        Annotation((200, 0, 300, 100), 0),  # found at IoU 1/3: localisation
        Annotation((0, 200, 100, 300), 0),  # found twice: one duplicate
        Annotation((200, 200, 300, 300), 1),  # missed
    ]
    rows = [
        ([0.0, 0, 100, 100], 0.9, 1),
        ([250.0, 0, 350, 100], 0.9, 0),
        ([0.0, 200, 100, 300], 0.9, 0),
        ([0.0, 200, 100, 299], 0.8, 0),
        ([400.0, 400, 450, 450], 0.7, 0),  # background
    ]
    metrics = evaluate_detections(make_dataset([truth]), [(0, make_detections(rows))])
    assert metrics.errors.counts == {
        "classification": 1,
        "localisation": 1,
        "both": 0,
        "duplicate": 1,
        "background": 1,
        "missed": 1,
    }
    assert metrics.errors.delta_ap["classification"] > 0
    assert metrics.errors.ap50 == pytest.approx(metrics.ap50)
    matrix = np.array(metrics.confusion.matrix)
    assert metrics.confusion.classes == ("cat", "dog", "bird", "unicorn")
    assert matrix[0, 1] == 1  # a cat taken for a dog
    assert matrix[0, 0] == 1
    assert matrix[0, 4] == 1  # the cat that was found badly
    assert matrix[1, 4] == 1  # the missed dog
    assert metrics.confusion.score_threshold == pytest.approx(metrics.best_score)


def test_calibration_of_boxes_that_are_half_right() -> None:
    # Ten boxes with score .75, five of them right: precision .5, error .25 in the bin [.7, .8).
    truth = [Annotation((50.0 * i, 0, 50.0 * i + 40, 40), 0) for i in range(5)]
    rows = [([50.0 * i, 0, 50.0 * i + 40, 40], 0.75, 0) for i in range(10)]
    metrics = evaluate_detections(make_dataset([truth]), [(0, make_detections(rows))])
    assert metrics.calibration.expected_error == pytest.approx(0.25)
    full = [b for b in metrics.calibration.bins if b.detections]
    assert len(full) == 1
    assert (full[0].lower, full[0].detections) == (pytest.approx(0.7), 10)
    assert (full[0].score, full[0].precision) == (pytest.approx(0.75), pytest.approx(0.5))


def test_crowd_and_difficult_neither_help_nor_hurt() -> None:
    plain = [Annotation((10, 10, 50, 50), 0)]
    rows = [([10.0, 10, 50, 50], 0.5, 0), ([100.0, 100, 150, 150], 0.9, 0)]
    found = [(0, make_detections(rows))]
    alone = evaluate_detections(make_dataset([plain]), found)
    assert alone.ap == pytest.approx(0.5)  # the box on nothing comes first
    for mark in ({"crowd": True}, {"difficult": True}):
        region = Annotation((90, 90, 200, 200), 0, **mark)
        metrics = evaluate_detections(make_dataset([[*plain, region]]), found)
        assert metrics.ap == pytest.approx(1.0)
        assert (metrics.objects, metrics.ignored) == (1, 1)


@pytest.mark.parametrize(
    ("objects", "rows"),
    [
        ([[Annotation((0, 0, 9, 9), 0)], []], []),
        ([[], []], [([0.0, 0, 9, 9], 0.5, 0)]),
        ([[], []], []),
        ([], []),
    ],
    ids=["no detection", "no object", "neither", "no image"],
)
def test_evaluate_detections_of_nothing(objects: list[list[Annotation]], rows: list[Any]) -> None:
    metrics = evaluate_detections(
        make_dataset(objects), [(0, make_detections(rows))] if rows else []
    )
    if objects and objects[0]:
        assert metrics.ap == 0
        assert metrics.ar == 0
        assert metrics.best_f1 == 0
    else:
        assert math.isnan(metrics.ap)
        assert math.isnan(metrics.best_f1)
    written = json.dumps(metrics.to_dict(), allow_nan=False)
    assert Metrics.from_dict(json.loads(written)).to_dict() == metrics.to_dict()


def test_boxes_that_are_no_boxes_are_left_out_and_counted() -> None:
    good = Annotation((10, 10, 50, 50), 0)
    bad = [
        Annotation((math.nan, 0, 5, 5), 0),
        Annotation((50, 50, 10, 60), 0),
        Annotation((0, 0, math.inf, 5), 0),
    ]
    found = [(0, make_detections([([10.0, 10, 50, 50], 0.5, 0)]))]
    metrics = evaluate_detections(make_dataset([[good, *bad]]), found)
    assert (metrics.objects, metrics.left_out, metrics.ap) == (1, 3, pytest.approx(1))
    # A box without width is a box to COCO: it counts, and is missed.
    flat = Annotation((70, 70, 70, 90), 0)
    metrics = evaluate_detections(make_dataset([[good, flat]]), found)
    assert (metrics.objects, metrics.left_out) == (2, 0)
    assert metrics.ap == pytest.approx(51 / 101)


def test_metrics_from_dict_of_to_dict_is_equal_and_nothing_is_printed(
    capfd: pytest.CaptureFixture[str],
) -> None:
    dataset, found = random_case(1)
    metrics = replace(evaluate_detections(dataset, found), loss=0.5, unreadable={"a.png": "broken"})
    again = Metrics.from_dict(json.loads(json.dumps(metrics.to_dict(), allow_nan=False)))
    assert again.to_dict() == metrics.to_dict()
    assert (again.ap, again.loss, again.unreadable) == (metrics.ap, 0.5, {"a.png": "broken"})
    assert again.curves == metrics.curves
    assert math.isnan(again.per_class[3].ap)
    with pytest.raises(ValueError, match="Field required"):
        Metrics.from_dict({"ap": 1})
    assert capfd.readouterr() == ("", "")


def test_without_analysis_the_numbers_are_the_same() -> None:
    dataset, found = random_case(3)
    whole = evaluate_detections(dataset, found)
    plain = evaluate_detections(dataset, found, analysis=False)
    assert plain.errors.delta_ap == {}
    assert plain.confusion.matrix == ()
    assert plain.calibration.bins == ()
    kept = replace(
        plain, errors=whole.errors, confusion=whole.confusion, calibration=whole.calibration
    )
    assert kept.to_dict() == whole.to_dict()
    assert Metrics.from_dict(plain.to_dict()).to_dict() == plain.to_dict()


def test_metrics_print_as_a_table() -> None:
    dataset, found = random_case(0)
    metrics = evaluate_detections(dataset, found)
    lines = str(metrics).splitlines()
    assert repr(metrics) == str(metrics)
    assert lines[0].startswith(f"AP {metrics.ap:.3f}  AP50 {metrics.ap50:.3f}  AP75 ")
    assert lines[1].startswith(f"AR1 {metrics.ar1:.3f}  AR10 ")
    assert lines[2].startswith(f"30 images, {metrics.objects} objects, ")
    assert len(lines) == 4 + len(dataset.classes)
    row = metrics.per_class[0]
    assert lines[4].split() == [row.name, str(row.objects), f"{row.ap:.3f}", f"{row.ap50:.3f}"]
    assert lines[-1].split()[1:] == ["0", "-", "-"]  # a class without objects
    many = replace(metrics, per_class=(row,) * 25)
    assert str(many).splitlines()[-1] == "and 5 more classes, in per_class"
