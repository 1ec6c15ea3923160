"""Stages: functions that list the benchmarks of one part of the package."""

from __future__ import annotations

from collections.abc import Callable

from retinanet.bench.benchmark import Case, Setting
from retinanet.bench.stages.class_loss import class_loss
from retinanet.bench.stages.data import data
from retinanet.bench.stages.evaluation import evaluation
from retinanet.bench.stages.inference import detection, inference
from retinanet.bench.stages.matching import matching
from retinanet.bench.stages.postprocess import postprocessing
from retinanet.bench.stages.startup import startup
from retinanet.bench.stages.train_step import train_step

STAGES: dict[str, Callable[[Setting], list[Case]]] = {
    "class-loss": class_loss,
    "matching": matching,
    "postprocess": postprocessing,
    "inference": inference,
    "detect": detection,
    "train-step": train_step,
    "data": data,
    "evaluation": evaluation,
    "startup": startup,
}
"""Cases of each stage; a case is set up when it runs."""
