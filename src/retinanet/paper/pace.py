"""How long trainings take on this machine, and how many steps a budget allows."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from retinanet.data.dataset import Dataset
from retinanet.errors import ConfigError, RetinaNetError
from retinanet.paper.experiments import Experiment
from retinanet.paper.plan import FEWEST_STEPS, Plan, Terms, Training, plan
from retinanet.paper.run import Workplace, run_plan
from retinanet.paper.share import write_once
from retinanet.paper.work import Result
from retinanet.report.plots import read_log

_PROBE_STEPS = 12
_MOST_STEPS = 10**8
_STARTING = 8.0  # seconds that a worker takes to import torch and to read its data, about


class Pace(NamedTuple):
    """What a training costs: seconds a step, and seconds beyond its steps."""

    step: float
    beyond: float


def measure_paces(trainings: Sequence[Training], place: Workplace) -> list[Pace]:
    """The pace of each training, side by side as they will be.

    A few steps are made of one for each backbone, image size and detector; the loss and the
    anchors of a row hardly count beside those.

    Raises:
        RetinaNetError: a training cannot begin.
    """
    folder = place.out / ".pace" / f"{socket.gethostname()}-{os.getpid()}"
    kinds: dict[tuple[object, ...], Training] = {}
    for one in trainings:
        kinds.setdefault(_kind(one), _shortened(one, f"pace-{len(kinds)}"))
    probes = list(kinds.values())
    # With fewer probes than jobs the machine would be faster than it will be.
    jobs = min(place.jobs, len(trainings))
    more = [replace(probes[i % len(probes)], name=f"more-{i}") for i in range(jobs - len(probes))]
    try:
        done = run_plan(Plan((*probes, *more), {}), replace(place, out=folder))
        found: dict[tuple[object, ...], Pace] = {}
        for kind, probe in kinds.items():
            result = done[probe.name, probe.seed]
            if isinstance(result, str):
                raise RetinaNetError(
                    f"a training of {_PROBE_STEPS} steps was tried first: {result}"
                )
            found[kind] = _pace(probe.folder(folder), result)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another call measures too
            folder.parent.rmdir()
    return [found[_kind(one)] for one in trainings]


def seconds_of(steps: Sequence[int], paces: Sequence[Pace], jobs: int) -> float:
    """How long trainings of so many steps take, each begun when a job is free.

    Example: three of 10 s, two at a time.

        >>> seconds_of([20, 20, 20], [Pace(0.5, 0.0)] * 3, 2)
        20.0
    """
    free = [0.0] * jobs
    for count, pace in zip(steps, paces, strict=True):
        job = free.index(min(free))
        free[job] += count * pace.step + pace.beyond
    return max(free)


def steps_for(budget: float, paces: Sequence[Pace], jobs: int) -> int:
    """How many steps each training may have, so that all together take `budget` seconds.

    Raises:
        ConfigError: too few to say anything; the budget that would do is named.

    Example: 10 trainings, 2 at a time, 20 minutes: 4 minutes each, of which 40 s are not training.

        >>> steps_for(1200, [Pace(0.5, 40)] * 10, 2)
        400
    """

    def taken(steps: int) -> float:
        return seconds_of([steps] * len(paces), paces, jobs)

    if taken(FEWEST_STEPS) > budget:
        raise ConfigError(
            f"a budget of {budget:.0f} s is too small for {len(paces)} trainings: under "
            f"{FEWEST_STEPS} steps nothing can be seen; give at least "
            f"--budget {taken(FEWEST_STEPS) / 60 + 0.5:.0f}min, or fewer --seeds, or smaller "
            "images"
        )
    low, high = FEWEST_STEPS, FEWEST_STEPS * 2
    while taken(high) <= budget and high < _MOST_STEPS:
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if taken(middle) <= budget else (low, middle)
    return low


def steps_within(
    budget: float,
    experiments: Sequence[Experiment],
    keys: Collection[str] | None,
    terms: Terms,
    place: Workplace,
    splits: Mapping[str, Dataset],
) -> Terms:
    """`terms` with as many steps as `budget` seconds allow on this machine.

    The first answer for a request is kept in ``steps/`` and holds for all calls that share the
    folder: a call that goes on must find its rows again, and two machines must train the same.

    Args:
        keys: of the rows that are to be trained; None: all.

    Raises:
        ConfigError: the budget is too small.
        RetinaNetError: a training cannot begin.
    """
    names = [one.name for one in experiments]
    # Any number of steps will do to find out how many trainings there are.
    planned = plan(experiments, replace(terms, steps=FEWEST_STEPS), splits)
    planned = planned.only(keys) if keys else planned
    asked = [names, budget, sorted(f"{one.name}/{one.seed}" for one in planned.trainings)]
    request = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
    file = place.out / "steps" / f"{'-'.join(names[:2])}-{request}.json"
    if not planned.trainings:
        return replace(terms, steps=FEWEST_STEPS)
    if not file.is_file():
        # Measuring takes a minute; what cannot be enough is said before.
        least = Pace(0.0, _STARTING)
        steps_for(budget, [least] * len(planned.trainings), place.jobs)
        paces = measure_paces(planned.trainings, place)
        answer: dict[str, Any] = {"names": names, "budget": budget, "trainings": len(paces)}
        answer |= {"jobs": place.jobs, "seconds_a_step": sorted({one.step for one in paces})}
        answer["steps"] = steps_for(budget, paces, place.jobs)
        write_once(file, json.dumps(answer, indent=1) + "\n")
    return replace(terms, steps=json.loads(file.read_text("utf-8"))["steps"])


def _kind(training: Training) -> tuple[object, ...]:
    """What the cost of a step depends on."""
    recipe = training.recipe
    sizes = (recipe.data.image_size, recipe.data.max_size)
    return (training.rival, recipe.model.backbone, *sizes, recipe.train.batch_size)


def _shortened(training: Training, name: str) -> Training:
    settings: dict[str, Any] = {"steps": _PROBE_STEPS, "epochs": None, "warmup_steps": 0}
    settings |= {"save_every": 10**6, "validate_every": float(_PROBE_STEPS)}
    recipe = training.recipe
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=settings)})
    return replace(training, recipe=recipe, name=name)


def _pace(folder: Path, result: Result) -> Pace:
    lines = read_log(folder / "log.jsonl")
    steps = sorted(line["seconds"] for line in lines if "seconds" in line)
    images = result.metrics.get("images", 0) if result.metrics else 0
    speed = result.metrics.get("images_per_second") if result.metrics else None
    # The median: the first steps set things up.
    return Pace(steps[len(steps) // 2], _STARTING + (images / speed if speed else 0.0))
