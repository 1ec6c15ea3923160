"""The number of steps that a budget allows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from retinanet.config import load_recipe
from retinanet.errors import ConfigError, RetinaNetError
from retinanet.paper import budget
from retinanet.paper.budget import Pace, estimate_seconds, measure_paces, steps_for
from retinanet.paper.plan import Plan, Training
from retinanet.paper.results import Result
from retinanet.paper.run import Results, Workers


def test_estimate_counts_rounds_of_average_trainings() -> None:
    # 10 steps take 10, 4 and 6 s, and one training has 2 s more: 22 / 3 s on average, two rounds.
    paces = [Pace(1.0, 0.0), Pace(0.4, 0.0), Pace(0.6, 2.0)]
    assert estimate_seconds(10, paces, 2) == pytest.approx(2 * 22 / 3)
    assert estimate_seconds(10, paces, 1) == pytest.approx(22)


def test_steps_for_is_the_inverse_of_the_estimate() -> None:
    # One job: a step of each takes 1 + 4 s; 160 s less 10 are 30 steps.
    paces = [Pace(1.0, 5.0), Pace(4.0, 5.0)]
    assert steps_for(160, paces, 1) == 30
    assert steps_for(159.9, paces, 1) == 29
    assert estimate_seconds(30, paces, 1) == 160


def test_budget_too_small_names_a_sufficient_budget() -> None:
    # 5 rounds of 40 s and 20 steps of half a second: 250 s, rounded up to minutes.
    with pytest.raises(ConfigError, match=r"too small for 10 trainings.*--budget 5min"):
        steps_for(249, [Pace(0.5, 40)] * 10, 2)
    assert steps_for(250, [Pace(0.5, 40)] * 10, 2) == 20


def training(name: str, *overrides: str, rival: str = "") -> Training:
    return Training(name, load_recipe("paper_quick", ["train.steps=500", *overrides]), rival, 0)


def test_a_probe_of_each_kind_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probes: list[Training] = []

    def pretend(plan: Plan, workers: Workers) -> Results:
        for probe in plan.trainings:
            probes.append(probe)
            folder = probe.folder(workers.out)
            folder.mkdir(parents=True)
            seconds = probe.recipe.data.image_size / 100 + (1 if probe.rival else 0)
            lines = [json.dumps({"step": step, "seconds": seconds}) for step in range(12)]
            (folder / "log.jsonl").write_text("\n".join(lines), "utf-8")
        result = Result("done", 12, {"images": 20, "images_per_second": 10.0})
        return {probe.key: result for probe in plan.trainings}

    monkeypatch.setattr(budget, "run_plan", pretend)
    workers = Workers(tmp_path / "data", tmp_path, 4, "cpu")
    large = ("data.image_size=600", "data.max_size=1000")
    trainings = [
        training("a"),
        training("b", "loss.gamma=5"),
        training("c", *large),
        training("d", rival="ssd"),
        training("e", *large),
    ]
    paces = measure_paces(trainings, workers)
    assert [pace.step for pace in paces] == [3.84, 3.84, 6.0, 4.84, 6.0]
    assert len({pace.overhead for pace in paces}) == 1
    assert paces[0].overhead > 2.0  # 20 images at 10 per second, and the start
    # Three kinds, and a fourth so that as many jobs run as there will be.
    assert len({probe.name for probe in probes}) == len(probes) == 4
    assert all(probe.recipe.train.steps == 12 for probe in probes)
    assert [*tmp_path.glob(".pace*")] == []


def test_probe_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(plan: Plan, workers: Workers) -> Results:
        return {probe.key: Result("failed", note="no weights") for probe in plan.trainings}

    monkeypatch.setattr(budget, "run_plan", fail)
    workers = Workers(tmp_path / "data", tmp_path, 1, "cpu")
    with pytest.raises(RetinaNetError, match="a first training of 12 steps failed: no weights"):
        measure_paces([training("a")], workers)
