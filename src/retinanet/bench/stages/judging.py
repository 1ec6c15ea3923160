"""COCO's twelve numbers."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from retinanet.bench.contest import Case, Contest, Rival, Setting
from retinanet.bench.samples import random_boxes
from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.evaluation.coco import evaluate_detections

_OBJECTS = 7


def evaluation(setting: Setting) -> list[Case]:
    """The twelve numbers, alone and with the analysis of errors, beside pycocotools."""
    images, detections = setting.pick(20, 300, 5000), setting.pick(20, 50, 100)
    size = f"{images:,} images, {images * detections:,} boxes"
    return [
        Case(way, size, partial(_contest, setting, images, detections, analysis))
        for way, analysis in (("the twelve numbers", False), ("with error analysis", True))
    ]


def _contest(setting: Setting, images: int, detections: int, analysis: bool) -> Contest:
    dataset, results = detected(images, detections, setting.pick(5, 20, 80))

    def ours() -> list[float]:
        return list(evaluate_detections(dataset, results, analysis=analysis).summary().values())

    rivals = []
    if "pycocotools" in setting.vs:
        rivals.append(Rival("pycocotools", _pycocotools(dataset, results), _compare))
    return Contest(ours, rivals)


def _compare(got: list[float], expected: list[float]) -> str:
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-9)
    return "the twelve numbers equal"


def detected(images: int, detections: int, classes: int) -> tuple[Dataset, list[dict[str, Any]]]:
    """A data set and what a detector of sorts found in it, COCO's way."""
    generator = torch.Generator().manual_seed(0)
    truth, results = [], []
    for image in range(images):
        boxes = random_boxes(_OBJECTS, 480, 640, generator).tolist()
        labels = torch.randint(0, classes, (_OBJECTS,), generator=generator).tolist()
        objects = tuple(
            Annotation((x1, y1, x2, y2), label)
            for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True)
        )
        truth.append(LabelledImage(Path(f"{image}.jpg"), image, objects, 640, 480))
        shifts = (5 * torch.randn(detections, generator=generator)).tolist()
        scores = torch.rand(detections, generator=generator).tolist()
        for place in range(detections):
            x1, y1, x2, y2 = boxes[place % _OBJECTS]
            # One in five of what is found is an object, moved a little.
            shift = shifts[place] * (1 if place % 5 == 0 else 30)
            results.append(
                {
                    "image_id": image,
                    "category_id": labels[place % _OBJECTS],
                    "bbox": [x1 + shift, y1 + shift, x2 - x1, y2 - y1],
                    "score": scores[place],
                }
            )
    names = tuple(str(k) for k in range(classes))
    dataset = Dataset(tuple(truth), names, tuple(range(classes)), "val", "coco", Path("bench"))
    return dataset, results


def _pycocotools(dataset: Dataset, results: list[dict[str, Any]]) -> Callable[[], list[float]]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations = [
        {
            "id": 1 + i,
            "image_id": image.id,
            "category_id": one.label,
            "bbox": [one.box[0], one.box[1], one.box[2] - one.box[0], one.box[3] - one.box[1]],
            "area": (one.box[2] - one.box[0]) * (one.box[3] - one.box[1]),
            "iscrowd": 0,
        }
        for i, (image, one) in enumerate(
            (image, one) for image in dataset.images for one in image.annotations
        )
    ]

    def evaluate() -> list[float]:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
            truth = COCO()
            truth.dataset = {
                "images": [{"id": i, "height": 480, "width": 640} for i in range(len(dataset))],
                "categories": [{"id": k} for k in dataset.category_ids],
                "annotations": annotations,
            }
            truth.createIndex()
            judged = COCOeval(truth, truth.loadRes([dict(one) for one in results]), "bbox")
            judged.evaluate()
            judged.accumulate()
            judged.summarize()
        return [float(value) for value in judged.stats]

    return evaluate
