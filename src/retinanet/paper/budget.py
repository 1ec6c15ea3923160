"""The number of steps that a time budget allows on this machine."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from retinanet.data.dataset import Dataset
from retinanet.errors import ConfigError, RetinaNetError
from retinanet.files import write_atomic
from retinanet.paper.plan import MIN_STEPS, Plan, Settings, Training, make_plan
from retinanet.paper.results import Result
from retinanet.paper.run import Workers, run_plan
from retinanet.paper.tables import Experiment
from retinanet.training.run_folder import read_log

_PROBE_STEPS = 12
_START_SECONDS = 8.0  # in which a worker imports torch and reads its data, about


class Pace(NamedTuple):
    """The cost of a training: seconds per step, and seconds beyond its steps."""

    step: float
    overhead: float


def estimate_seconds(steps: int, paces: Sequence[Pace], jobs: int) -> float:
    """Estimate how long trainings with so many steps each take, `jobs` at a time.

    They run in rounds of `jobs`; a round takes as long as an average training.

    Example: five trainings, two at a time, in three rounds of 10 s.

        >>> estimate_seconds(20, [Pace(0.5, 0.0)] * 5, 2)
        30.0
    """
    rounds = math.ceil(len(paces) / jobs)
    step, overhead = (fmean(values) for values in zip(*paces, strict=True))
    return rounds * (steps * step + overhead)


def steps_for(budget: float, paces: Sequence[Pace], jobs: int) -> int:
    """Return the steps per training with which all take `budget` seconds.

    Raises:
        ConfigError: too few; the message has a sufficient budget.

    Example: 10 trainings, 2 at a time, 20 minutes: 4 minutes each, 40 s of them overhead.

        >>> steps_for(1200, [Pace(0.5, 40)] * 10, 2)
        400
    """
    needed = estimate_seconds(MIN_STEPS, paces, jobs)
    if needed > budget:
        raise ConfigError(
            f"a budget of {budget:.0f} s is too small for {len(paces)} trainings with at least "
            f"{MIN_STEPS} steps: use --budget {math.ceil(needed / 60)}min, fewer --seeds, or "
            "smaller images"
        )
    overhead = estimate_seconds(0, paces, jobs)
    # Rounded before the cut: 400 steps must not become 399 by a rounding error.
    per_step = estimate_seconds(1, paces, jobs) - overhead
    return int(round((budget - overhead) / per_step, 6)) if per_step else MIN_STEPS


def measure_paces(trainings: Sequence[Training], workers: Workers) -> list[Pace]:
    """Measure the pace of each training, with as many jobs at a time as there will be.

    A few steps are run for each backbone, image size, batch size and detector; loss and anchors
    hardly matter.

    Raises:
        RetinaNetError: a training fails.
    """
    out = workers.out / f".pace-{os.getpid()}"
    kinds = {_kind(training): training for training in trainings}
    # With fewer probes than jobs each would have more of the machine.
    count = max(len(kinds), min(workers.jobs, len(trainings)))
    keys = [list(kinds)[i % len(kinds)] for i in range(count)]
    probes = [_probe(kinds[key], f"pace-{i}") for i, key in enumerate(keys)]
    try:
        results = run_plan(Plan(tuple(probes), {}), replace(workers, out=out))
        paces = {
            key: _pace(results[probe.key], probe.folder(out))
            for key, probe in zip(keys, probes, strict=True)
        }
    finally:
        shutil.rmtree(out, ignore_errors=True)
    return [paces[_kind(training)] for training in trainings]


def _pace(result: Result, folder: Path) -> Pace:
    if result.status != "done" or result.metrics is None:
        reason = result.note or result.status
        raise RetinaNetError(f"a first training of {_PROBE_STEPS} steps failed: {reason}")
    speed = result.metrics.get("images_per_second")
    validation = result.metrics.get("images", 0) / speed if speed else 0.0
    log = read_log(folder / "log.jsonl")
    # The median, as the first steps are slow.
    step = median(line["seconds"] for line in log if "seconds" in line)
    return Pace(step, _START_SECONDS + validation)


def with_budget(
    budget: float,
    experiments: Sequence[Experiment],
    keys: Collection[str] | None,
    settings: Settings,
    workers: Workers,
    splits: Mapping[str, Dataset],
) -> Settings:
    """Return `settings` with as many steps as `budget` seconds allow on this machine.

    The number is kept in ``steps/``: the same command must find its trainings again. `keys` are the
    rows to train; None: all.

    Raises:
        ConfigError: the budget is too small.
        RetinaNetError: a training fails.
    """
    names = [experiment.name for experiment in experiments]
    settings = replace(settings, steps=MIN_STEPS)
    trainings = make_plan(experiments, settings, splits).only(keys).trainings
    request = json.dumps([names, budget, sorted(map(str, trainings))])
    digest = hashlib.sha256(request.encode()).hexdigest()[:8]
    file = workers.out / "steps" / f"{'-'.join(names[:2])}-{digest}.json"
    if not file.is_file():
        # Measuring takes a minute: reject what cannot be enough before.
        steps_for(budget, [Pace(0.0, _START_SECONDS)] * len(trainings), workers.jobs)
        steps = steps_for(budget, measure_paces(trainings, workers), workers.jobs)
        write_atomic(file, json.dumps({"steps": steps}) + "\n")
    return replace(settings, steps=json.loads(file.read_text("utf-8"))["steps"])


def _kind(training: Training) -> tuple[object, ...]:
    """Return what the cost of a step depends on."""
    recipe = training.recipe
    sizes = (recipe.data.image_size, recipe.data.max_size)
    return (training.rival, recipe.model.backbone, *sizes, recipe.train.batch_size)


def _probe(training: Training, name: str) -> Training:
    settings: dict[str, Any] = {"steps": _PROBE_STEPS, "epochs": None, "warmup_steps": 0}
    settings |= {"save_every": 10**6, "validate_every": float(_PROBE_STEPS)}
    recipe = training.recipe
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=settings)})
    return replace(training, recipe=recipe, name=name)
