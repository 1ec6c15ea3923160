"""Time of COCO's metrics beside pycocotools, in turns, in one thread.

``python benchmarks/evaluation.py --images 5000 --rounds 1`` prints the CPU seconds and their ratio.
The data are random: COCO's 80 classes, 7 objects and 100 detections per image.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from pathlib import Path
from statistics import median
from time import process_time

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS"), "1")

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.evaluation.coco import evaluate_detections
from retinanet.evaluation.results import Results, ground_truth
from retinanet.structures import Detections

CLASSES, OBJECTS, DETECTIONS, SIDE = 80, 7, 100, 640


def random_data(images: int) -> tuple[Dataset, Results]:
    """Objects, and detections of which a third lie near an object."""
    random = np.random.default_rng(0)
    labelled, found = [], []
    for index in range(images):
        low = random.uniform(0, SIDE * 0.8, (OBJECTS, 2))
        boxes = np.concatenate([low, low + random.uniform(8, SIDE * 0.2, (OBJECTS, 2))], axis=1)
        classes = random.integers(0, CLASSES, OBJECTS)
        objects = tuple(
            Annotation(tuple(map(float, box)), int(label), number)
            for number, (box, label) in enumerate(zip(boxes, classes, strict=True))
        )
        labelled.append(LabelledImage(Path(f"{index}.jpg"), index + 1, objects, SIDE, SIDE))
        near = random.integers(0, OBJECTS, DETECTIONS)
        moved = boxes[near] + random.normal(0, 8, (DETECTIONS, 4)) * (near[:, None] < OBJECTS // 3)
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        own = np.where(random.random(DETECTIONS) < 0.5, classes[near], near * 11 % CLASSES)
        scores = random.random(DETECTIONS)
        found.append((moved.astype(np.float32), scores.astype(np.float32), own))
    names = tuple(f"class {k}" for k in range(CLASSES))
    dataset = Dataset(
        tuple(labelled), names, tuple(range(1, CLASSES + 1)), "val", "coco", Path("random")
    )
    results = Results(dataset)
    for index, (boxes, scores, labels) in enumerate(found):
        results.add(index, Detections(*map(torch.from_numpy, (boxes, scores, labels))))
    return dataset, results


def pycocotools_ap(truth: COCO, rows: np.ndarray) -> float:
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return float(evaluator.stats[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dataset, results = random_data(options.images)
    table = results.table()
    truth = COCO()
    with contextlib.redirect_stdout(io.StringIO()):
        truth.dataset = ground_truth(dataset)
        truth.createIndex()
    seconds: dict[str, list[float]] = {"pycocotools": [], "with analysis": [], "metrics alone": []}
    for _ in range(options.rounds):
        began = process_time()
        theirs = pycocotools_ap(truth, table)
        seconds["pycocotools"].append(process_time() - began)
        for name, analysis in (("with analysis", True), ("metrics alone", False)):
            began = process_time()
            ours = evaluate_detections(dataset, results, analysis=analysis).ap
            seconds[name].append(process_time() - began)
            assert abs(ours - theirs) < 1e-9, (ours, theirs)
    print(f"{options.images} images, {len(table)} detections, AP {theirs:.4f}")
    for name, values in seconds.items():
        ratio = median(a / b for a, b in zip(seconds["pycocotools"], values, strict=True))
        print(f"{name:15} {median(values):8.3f} s  {ratio:6.1f} times as fast as pycocotools")


if __name__ == "__main__":
    main()
