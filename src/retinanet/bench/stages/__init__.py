"""The stages: each part of this package beside the one that people would use otherwise."""

from __future__ import annotations

from collections.abc import Callable

from retinanet.bench.contest import Case, Setting
from retinanet.bench.stages.assignment import matching
from retinanet.bench.stages.classes import class_loss
from retinanet.bench.stages.finding import postprocessing
from retinanet.bench.stages.images import data
from retinanet.bench.stages.judging import evaluation
from retinanet.bench.stages.networks import detection, inference
from retinanet.bench.stages.starting import startup
from retinanet.bench.stages.steps import train_step

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
"""What is timed: each gives its cases, which are set up one at a time."""
