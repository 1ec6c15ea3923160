"""Stages: functions that list the benchmarks of one part of the package."""

from __future__ import annotations

from collections.abc import Callable

from retinanet.bench.benchmark import Case, Setting
from retinanet.bench.stages.heads import class_loss, matching, postprocessing
from retinanet.bench.stages.host import data, evaluation, startup
from retinanet.bench.stages.networks import detection, inference, train_step

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
