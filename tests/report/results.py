"""Results of evaluations and logs of trainings, made up for plots and reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.evaluation.coco import evaluate_detections
from retinanet.evaluation.metrics import Metrics
from retinanet.structures import Detections


def evaluated(classes: tuple[str, ...], images: int = 6) -> tuple[Dataset, Metrics]:
    """A data set, and the metrics of detections that are mostly right."""
    rng = np.random.default_rng(0)
    labelled, found = [], []
    for i in range(images):
        corners = rng.uniform(0, 300, (6, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(10, 150, (6, 2))], axis=1)
        labels = rng.integers(0, len(classes), 6)
        pairs = zip(boxes.tolist(), labels.tolist(), strict=True)
        objects = tuple(Annotation(tuple(box), label) for box, label in pairs)
        labelled.append(LabelledImage(Path(f"{i}.png"), i + 1, objects, 450, 450))
        wrong = rng.random(6) < 0.3
        predicted = np.where(wrong, rng.integers(0, len(classes), 6), labels)
        moved = torch.tensor(boxes + rng.normal(0, 4, boxes.shape), dtype=torch.float32)
        scores = torch.tensor(rng.uniform(0.1, 1, 6), dtype=torch.float32)
        found.append((i, Detections(moved, scores, torch.tensor(predicted, dtype=torch.int64))))
    ids = tuple(range(len(classes)))
    dataset = Dataset(tuple(labelled), classes, ids, "val", "coco", Path("labels.json"))
    return dataset, evaluate_detections(dataset, found)


def log_lines(steps: int = 60) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    constant = {"positives": 20.0, "lr": 0.01, "images_per_second": 12.0, "waiting": 0.02,
                "memory_mb": 900.0, "seconds": 0.5}  # fmt: skip
    for step in range(1, steps + 1):
        losses = {
            "loss": 2.0 / step + 0.1,
            "loss_classification": 1.5 / step,
            "loss_box": 0.5 / step + 0.1,
        }
        lines.append({"step": step, **losses, **constant})
        if step % 20 == 0:
            found = {"ap": step / 200, "ap50": step / 100, "loss": 2.2 / step + 0.1}
            lines.append({"step": step, "validation": found})
    return lines
