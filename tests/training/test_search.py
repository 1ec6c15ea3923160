"""The search of ``retinanet tune`` with trainings whose AP is known, and with real ones."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from retinanet.config import Recipe, load_recipe
from retinanet.errors import ConfigError, MissingExtraError, NonFiniteLossError
from retinanet.training import search as module
from retinanet.training.events import Event
from retinanet.training.search import Range, SearchResult, parse_ranges, search
from retinanet.training.trainer import Run

pytest.importorskip("optuna")

RANGES = parse_ranges(["train.lr=1e-4..1e-2", "train.optimizer=adamw|sgd"])[0]


class Trainings:
    """Replaces :func:`retinanet.training.trainer.train`: AP is best at a rate of .001 with AdamW.

    Attributes:
        runs: learning rates and folders, in order.
        stop: the number of the training that Ctrl-C stops.
    """

    def __init__(self) -> None:
        self.runs: list[tuple[float, str]] = []
        self.stop = -1

    def __call__(self, recipe: Recipe, data: Any, out: Path, **options: Any) -> Run:
        number, lr = len(self.runs), recipe.train.lr
        self.runs.append((lr, out.name))
        assert not recipe.train.tune_detection
        if number == self.stop:
            return Run(out, out, {}, -1.0, 3, interrupted=True, exit_code=130)
        if lr > 0.009:
            raise NonFiniteLossError("loss is NaN")
        ap = 0.5 - 0.1 * abs(math.log10(lr) + 3) - 0.2 * (recipe.train.optimizer == "sgd")
        emit = options["on_event"]
        emit(Event("start", {"steps": 10}))
        for step in (5, 10):
            if emit(Event("validation", {"step": step, "ap": ap * step / 10})) == "stop":
                return Run(out, out, {}, ap / 2, step, interrupted=True)
        return Run(out, out, {}, ap, 10)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Trainings:
    fake = Trainings()
    monkeypatch.setattr(module, "train", fake)
    return fake


def run(out: Path, number: int, ranges: Any = RANGES, **changes: Any) -> SearchResult:
    options = {"recipe": "quick", "settings": ["train.steps=10"], "budget": 3600.0, **changes}
    return search(out.parent, out, ranges, max_trials=number, **options)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["train.lr=1e-4..1e-2"], Range("train.lr", 1e-4, 1e-2)),
        (["lr=.5..2"], Range("train.lr", 0.5, 2.0)),
        (["train.batch_size=2..8"], Range("train.batch_size", 2, 8)),
        (["loss.gamma=-1..2"], Range("loss.gamma", -1, 2)),
        (["model.backbone=resnet18|mobilenet_v2"],
         Range("model.backbone", choices=("resnet18", "mobilenet_v2"))),
        (["train.lr=0.01", "data.classes=[\"a..b\"]"], None),
    ],
)  # fmt: skip
def test_parse_ranges(texts: list[str], expected: Range | None) -> None:
    ranges, fixed = parse_ranges(texts)
    assert ranges == ([] if expected is None else [expected])
    assert fixed == ([] if expected else texts)


def test_search_finds_the_best_values_and_prunes(tmp_path: Path, trainings: Trainings) -> None:
    result = run(tmp_path / "out", 14)
    assert len(result.trials) == len(trainings.runs) == 14
    assert trainings.runs[0] == (
        load_recipe("quick").train.lr,
        "000",
    )  # the recipe's own come first
    states = {trial.state for trial in result.trials}
    assert states >= {"complete", "pruned"}
    best = result.best
    assert best is not None
    assert best.values["train.optimizer"] == "adamw"
    assert best.ap == max(trial.ap for trial in result.trials if trial.state == "complete") > 0.45
    with (result.folder / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == [trial.state for trial in result.trials]
    assert {"train.lr", "train.optimizer", "ap"} <= rows[0].keys()
    # The same call has nothing left to do; a larger number continues.
    assert len(run(tmp_path / "out", 14).trials) == 14
    assert len(run(tmp_path / "out", 15).trials) == 15
    assert run(tmp_path / "out", 99, budget=1e-9).trials[15:] == ()


def test_search_resumes_the_training_that_was_stopped(tmp_path: Path, trainings: Trainings) -> None:
    trainings.stop = 1
    first = run(tmp_path / "out", 3)
    assert (first.exit_code, len(first.trials)) == (130, 2)
    assert first.trials[1].state == "running"
    again = run(tmp_path / "out", 3)
    assert (again.exit_code, len(again.trials)) == (0, 3)
    # The same values in the same folder, which train() resumes.
    assert trainings.runs[1] == trainings.runs[2]
    assert [folder for _, folder in trainings.runs] == ["000", "001", "001", "002"]


def test_diverged_training_is_a_failed_trial(tmp_path: Path, trainings: Trainings) -> None:
    result = run(tmp_path / "out", 2, [Range("train.lr", 0.0095, 0.0099)])
    assert [trial.state for trial in result.trials] == ["failed", "failed"]
    assert result.best is None


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["train.lr=2..1"], "train.lr=2..1: the range is empty"),
        (["train.lr=a|a"], "give different values, such as train.lr=a|b"),
        (["train.lrr=1..2"], "unknown setting 'train.lrr' in train.lrr=1..2; did you mean"),
        (["train.lr=0..1"], "train.lr"),  # out of the setting's own range
        (["train.optimizer=adam|adamw"], "adam"),
        (["train.lr=0.1"], "no setting to choose: give key=low..high"),
    ],
)
def test_wrong_ranges_are_errors(
    tmp_path: Path, trainings: Trainings, texts: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message.replace("|", r"\|")):
        run(tmp_path / "out", 1, parse_ranges(texts)[0])
    assert trainings.runs == []


def test_trial_has_a_twentieth_of_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[float | None] = []

    def train(recipe: Recipe, data: Any, out: Path, **options: Any) -> Run:
        times.append(recipe.train.time)
        if recipe.train.time == 1.0:
            raise ConfigError("train.time 1 s is too short; give at least 3s")
        return Run(out, out, {}, 0.5, 10)

    monkeypatch.setattr(module, "train", train)
    with pytest.raises(ConfigError, match=r"a twentieth of --budget: .* at least 3s; or give"):
        run(tmp_path / "out", 1, settings=[], budget=20.0)
    # With another budget the same folder is used; once a trial has ended, its length stays.
    for number, budget in ((1, 80.0), (2, 200.0)):
        assert len(run(tmp_path / "out", number, settings=[], budget=budget).trials) == number
    assert times == [1.0, 4.0, 4.0]


def test_folder_of_another_search_is_an_error(tmp_path: Path, trainings: Trainings) -> None:
    run(tmp_path / "out", 1)
    with (
        FileLock(tmp_path / "out/.search.lock"),
        pytest.raises(ConfigError, match="another search"),
    ):
        run(tmp_path / "out", 1)
    with pytest.raises(ConfigError, match="has a search with other data, ranges or settings"):
        run(tmp_path / "out", 1, settings=["train.steps=20"])


def test_search_without_optuna_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r"retinanet\[tune\]"):
        run(tmp_path / "out", 1)
