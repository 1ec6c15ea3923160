"""COCO metrics."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retinanet.bench.benchmark import Benchmark, Case, Rival, Setting
from retinanet.bench.samples import random_boxes
from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.evaluation.coco import evaluate_detections

_OBJECTS = 7


def evaluation(setting: Setting) -> list[Case]:
    """COCO's twelve metrics, with and without error analysis, against pycocotools."""
    images, detections = setting.pick(20, 300, 5000), setting.pick(20, 50, 100)
    size = f"{images:,} images, {images * detections:,} boxes"
    return [
        Case(name, size, partial(_benchmark, setting, images, detections, analysis))
        for name, analysis in (("the twelve metrics", False), ("with error analysis", True))
    ]


def _benchmark(setting: Setting, images: int, detections: int, analysis: bool) -> Benchmark:
    dataset, results = random_results(images, detections, setting.pick(5, 20, 80))

    def ours() -> list[float]:
        return list(evaluate_detections(dataset, results, analysis=analysis).summary().values())

    rivals = []
    if "pycocotools" in setting.vs:
        rivals.append(Rival("pycocotools", _pycocotools(dataset, results), _compare))
    return Benchmark(ours, rivals)


def _compare(output: list[float], expected: list[float]) -> str:
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-9)
    return "all twelve equal"


def random_results(
    images: int, detections: int, classes: int
) -> tuple[Dataset, list[dict[str, Any]]]:
    """Make a random data set and COCO results of which one in five is near an object."""
    generator = torch.Generator().manual_seed(0)
    truth, results = [], []
    for image in range(images):
        boxes = random_boxes(_OBJECTS, 480, 640, generator).tolist()
        labels = torch.randint(0, classes, (_OBJECTS,), generator=generator).tolist()
        objects = tuple(
            Annotation(tuple(box), label) for box, label in zip(boxes, labels, strict=True)
        )
        truth.append(LabelledImage(Path(f"{image}.jpg"), image, objects, 640, 480))
        shifts = (5 * torch.randn(detections, generator=generator)).tolist()
        scores = torch.rand(detections, generator=generator).tolist()
        for i in range(detections):
            x1, y1, x2, y2 = boxes[i % _OBJECTS]
            shift = shifts[i] * (1 if i % 5 == 0 else 30)
            result = {"image_id": image, "category_id": labels[i % _OBJECTS], "score": scores[i]}
            results.append({**result, "bbox": [x1 + shift, y1 + shift, x2 - x1, y2 - y1]})
    names = tuple(str(k) for k in range(classes))
    dataset = Dataset(tuple(truth), names, tuple(range(classes)), "val", "coco", Path("bench"))
    return dataset, results


def _pycocotools(dataset: Dataset, results: list[dict[str, Any]]) -> Callable[[], list[float]]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations: list[dict[str, Any]] = []
    for image in dataset.images:
        for annotation in image.annotations:
            x1, y1, x2, y2 = annotation.box
            annotations.append(
                {
                    "id": 1 + len(annotations),
                    "image_id": image.id,
                    "category_id": annotation.label,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )

    def evaluate() -> list[float]:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            truth = COCO()
            truth.dataset = {
                "images": [{"id": i, "height": 480, "width": 640} for i in range(len(dataset))],
                "categories": [{"id": k} for k in dataset.category_ids],
                "annotations": annotations,
            }
            truth.createIndex()
            detections = truth.loadRes([dict(result) for result in results])
            evaluator = COCOeval(truth, detections, "bbox")
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
        return [float(value) for value in evaluator.stats]

    return evaluate
