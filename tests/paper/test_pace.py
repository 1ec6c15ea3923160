"""How many steps a budget allows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from retinanet.config import load_recipe
from retinanet.data.synthetic import synthetic_dataset
from retinanet.errors import ConfigError, RetinaNetError
from retinanet.paper import pace as pacing
from retinanet.paper.pace import Pace, measure_paces, seconds_of, steps_for, steps_within
from retinanet.paper.plan import Plan, Terms, Training, read_data
from retinanet.paper.run import Workplace
from retinanet.paper.tables import EXPERIMENTS
from retinanet.paper.work import Result


def test_the_slowest_job_counts() -> None:
    # Two jobs: 10 s beside 4 s, then the third begins after those 4: 4 + 8 = 12 s.
    paces = [Pace(1.0, 0.0), Pace(0.4, 0.0), Pace(0.6, 2.0)]
    assert seconds_of([10, 10, 10], paces, 2) == pytest.approx(12)


def test_rows_of_unlike_cost_share_a_budget() -> None:
    # One job: a step of each takes 1 + 4 s, so 100 s beyond 10 are 18 steps; 20 is the least.
    with pytest.raises(ConfigError, match="--budget 2min"):
        steps_for(100, [Pace(1.0, 5.0), Pace(4.0, 5.0)], 1)
    assert steps_for(160, [Pace(1.0, 5.0), Pace(4.0, 5.0)], 1) == 30


def test_a_budget_too_small_says_what_would_do() -> None:
    # 5 turns of 40 s and 20 steps of half a second: 250 s, in whole minutes, half of one added
    with pytest.raises(ConfigError, match=r"too small for 10 trainings.*--budget 5min"):
        steps_for(249, [Pace(0.5, 40)] * 10, 2)
    assert steps_for(250, [Pace(0.5, 40)] * 10, 2) == 20


def test_a_budget_that_cannot_do_is_said_without_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacing, "measure_paces", lambda *_: pytest.fail("measured"))
    synthetic_dataset(tmp_path / "d", splits={"train": 4, "val": 2}, image_size=64, empty=0.0)
    terms = Terms(tmp_path / "d", image_size=64, settings=("anchors.sizes=[16,32,64,128,256]",))
    place = Workplace(tmp_path / "d", tmp_path, 2, "cpu")
    with pytest.raises(ConfigError, match="a budget of 5 s is too small for 4 trainings"):
        steps_within(5, [EXPERIMENTS["table3"]], None, terms, place, read_data(terms))


def _training(name: str, *settings: str, rival: str = "") -> Training:
    return Training(name, load_recipe("quick", ["train.steps=500", *settings]), rival, 0)


def test_a_training_of_each_kind_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Training] = []

    def pretend(plan: Plan, place: Workplace) -> dict[tuple[str, int], Result]:
        for one in plan.trainings:
            tried.append(one)
            folder = one.folder(place.out)
            folder.mkdir(parents=True)
            seconds = one.recipe.data.image_size / 100 + (1 if one.rival else 0)
            lines = [f'{{"step": {step}, "seconds": {seconds}}}' for step in range(12)]
            (folder / "log.jsonl").write_text("\n".join(lines), "utf-8")
        metrics = {"images": 20, "images_per_second": 10.0}
        return {(one.name, one.seed): Result("done", 12, 1.0, metrics) for one in plan.trainings}

    monkeypatch.setattr(pacing, "run_plan", pretend)
    place = Workplace(tmp_path / "data", tmp_path, 4, "cpu")
    large = ("data.image_size=600", "data.max_size=1000")
    trainings = [
        _training("a"),
        _training("b", "loss.gamma=5"),
        _training("c", *large),
        _training("d", rival="ssd"),
        _training("e", *large),
    ]
    paces = measure_paces(trainings, place)
    assert [one.step for one in paces] == [3.84, 3.84, 6.0, 4.84, 6.0]
    assert {one.beyond for one in paces} == {pacing._STARTING + 2.0}
    # Three kinds, and a fourth so that as many jobs are at work as will be.
    assert len(tried) == 4
    assert all(one.recipe.train.steps == 12 for one in tried)
    assert len({one.name for one in tried}) == 4
    assert not (tmp_path / ".pace").exists()


def test_a_training_that_cannot_begin_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        pacing,
        "run_plan",
        lambda plan, place: {(one.name, one.seed): "no weights" for one in plan.trainings},
    )
    place = Workplace(tmp_path / "data", tmp_path, 1, "cpu")
    with pytest.raises(RetinaNetError, match="a training of 12 steps was tried first: no weights"):
        measure_paces([replace(_training("a"))], place)
