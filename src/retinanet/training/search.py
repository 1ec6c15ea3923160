"""Choose settings of training by short trainings, with Optuna (``retinanet tune``)."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from retinanet.config import Recipe, load_recipe, nearest, setting_names, setting_of
from retinanet.errors import ConfigError, NonFiniteLossError, import_extra
from retinanet.files import csv_text, write_atomic
from retinanet.training.events import Event, EventCallback
from retinanet.training.run_folder import folder_lock
from retinanet.training.trainer import train

TRIALS = 20
"""Trials in a budget, if no other length is given."""

_LENGTHS = ("train.time", "train.epochs", "train.steps")
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")
_LOG_RATIO = 10  # a wider range is searched in logarithms


@dataclass(frozen=True, slots=True)
class Range:
    """Values of a setting to choose from.

    Attributes:
        setting: such as ``train.lr``.
        low, high: of numbers, both included; whole numbers if both are.
        choices: texts, as on the command line; empty: numbers.
    """

    setting: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple[str, ...] = ()

    def suggest(self, trial: Any) -> str:
        """Return the value of an Optuna trial as text."""
        if self.choices:
            return str(trial.suggest_categorical(self.setting, self.choices))
        is_log = self.low > 0 and self.high / self.low >= _LOG_RATIO
        if isinstance(self.low, int) and isinstance(self.high, int):
            return str(trial.suggest_int(self.setting, self.low, self.high, log=is_log))
        return f"{trial.suggest_float(self.setting, self.low, self.high, log=is_log):.6g}"

    def ends(self) -> tuple[str, ...]:
        """Return the values to check: all choices, or both ends."""
        return self.choices or (str(self.low), str(self.high))


def parse_ranges(texts: Sequence[str]) -> tuple[list[Range], list[str]]:
    """Split ``key=low..high`` and ``key=a|b`` from other settings, ``key=value``.

    Raises:
        ConfigError: a setting is unknown, or a range is empty.
    """
    ranges, fixed = [], []
    for text in texts:
        key, _, value = text.partition("=")
        found = _RANGE.fullmatch(value)
        if not found and "|" not in value:
            fixed.append(text)
            continue
        name = key if "." in key else setting_of(key)
        if name not in setting_names():
            raise ConfigError(f"unknown setting {key!r} in {text}{nearest(key, setting_names())}")
        if found:
            low, high = (float(n) if set(n) & set(".eE") else int(n) for n in found.groups())
            if low >= high:
                raise ConfigError(f"{text}: the range is empty: give the lower value first")
            ranges.append(Range(name, low, high))
            continue
        choices = tuple(part.strip() for part in value.split("|"))
        if not all(choices) or len(set(choices)) < len(choices):
            raise ConfigError(f"{text}: give different values, such as {key}=a|b")
        ranges.append(Range(name, choices=choices))
    return ranges, fixed


@dataclass(frozen=True, slots=True)
class Trial:
    """A short training.

    Attributes:
        number: from 0.
        state: ``complete``, ``pruned``, ``failed`` or ``running``.
        ap: best AP on the validation split; NaN: none.
        seconds: that it took.
        values: by setting.
    """

    number: int
    state: str
    ap: float
    seconds: float
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class SearchResult:
    """All trials of a search.

    Attributes:
        folder: of the search; ``trials/NUMBER`` are the run folders.
        trials: in their order.
        exit_code: 0, or that of the training that Ctrl-C or SIGTERM stopped; the same call resumes
            it.
    """

    folder: Path
    trials: tuple[Trial, ...]
    exit_code: int = 0

    @property
    def best(self) -> Trial | None:
        """The complete trial of the highest AP."""
        complete = [t for t in self.trials if t.state == "complete" and not math.isnan(t.ap)]
        return max(complete, key=lambda trial: trial.ap, default=None)


def search(
    data: str | Path,
    out: str | Path,
    ranges: Sequence[Range],
    *,
    recipe: str,
    settings: Sequence[str],
    budget: float,
    max_trials: int | None = None,
    device: str = "auto",
    on_event: EventCallback | None = None,
    on_trial: Callable[[Trial], object] | None = None,
) -> SearchResult:
    """Train with values from `ranges` and keep the best on the validation split.

    Optuna suggests the values (tree-structured Parzen estimator), first those of the recipe, and
    stops trials whose AP is under the median of the others at the same share of their training. Its
    journal is in `out`: the same call resumes the search and the training that was stopped.

    Args:
        data: labelled folder or file.
        out: folder of the search.
        ranges: of :func:`parse_ranges`.
        recipe, settings: of every trial. Without a length of the training among them, a trial
            takes a twentieth of the first `budget`.
        budget: seconds for all trials, of earlier calls too.
        max_trials: maximum number of trials; None: as many as the budget allows.
        device: as in :func:`retinanet.train`.
        on_event: callback for the progress events of each training.
        on_trial: callback for each finished trial.

    Raises:
        ConfigError: a range is missing or has invalid values, or `out` has another search or is in
            use.
        MissingExtraError: Optuna is not installed.
        RetinaNetError: as :func:`retinanet.train`, in the first trial.
    """
    study = _Study(Path(out), ranges, recipe, settings, budget, device, on_event)
    exit_code = 0
    with folder_lock(study.out, "search"):
        study.check(data)
        while study.has_budget(budget, max_trials) and not exit_code:
            ended = study.run_trial(data)
            if isinstance(ended, int):
                exit_code = ended
            elif on_trial is not None:
                on_trial(ended)
        trials = study.trials()
        rows = [
            {
                "trial": t.number,
                "state": t.state,
                "ap": "" if math.isnan(t.ap) else t.ap,
                "seconds": round(t.seconds, 1),
                **{own.setting: t.values.get(own.setting) for own in ranges},
            }
            for t in trials
        ]
        write_atomic(study.out / "trials.csv", csv_text(rows, ["trial"]))
    return SearchResult(study.out, trials, exit_code)


class _Study:
    """Optuna's study and the folder of its trainings."""

    def __init__(
        self,
        out: Path,
        ranges: Sequence[Range],
        recipe: str,
        settings: Sequence[str],
        budget: float,
        device: str,
        on_event: EventCallback | None,
    ) -> None:
        optuna = import_extra("optuna", "tune")
        if not ranges:
            raise ConfigError(
                "no setting to choose: give key=low..high or key=a|b, such as train.lr=1e-4..1e-2"
            )
        self.out, self._ranges = out, ranges
        self._recipe, self._settings = recipe, list(settings)
        self._device, self._on_event, self._optuna = device, on_event, optuna
        self._load([])  # errors of the settings come before the folder
        out.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._study = optuna.create_study(
            storage=optuna.storages.JournalStorage(
                optuna.storages.journal.JournalFileBackend(str(out / "journal.log"))
            ),
            study_name="retinanet",
            direction="maximize",
            load_if_exists=True,
            pruner=optuna.pruners.MedianPruner(n_startup_trials=4),
        )
        seed = len(self._study.trials)  # a resumed search must not repeat its random values
        self._study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=5)
        self._request = [recipe, list(settings), list(map(str, ranges))]
        keys = [text.partition("=")[0] for text in settings] + [own.setting for own in ranges]
        self._is_timed = not any(key in _LENGTHS for key in keys)
        if self._is_timed:
            # The first trials decide: later ones must be comparable, whatever the budget.
            known = self._study.user_attrs.get("trial_seconds")
            ended = any(trial.state.is_finished() for trial in self._study.trials)
            seconds = known if ended and known else budget / TRIALS
            self._study.set_user_attr("trial_seconds", seconds)
            self._settings.append(f"train.time={seconds}")
            if "train.val_images" not in keys:  # AP of all trials is of the same images
                self._settings.append("train.val_images=none")

    def _load(self, values: Sequence[str]) -> Recipe:
        # Post-processing is chosen once, for the model that is kept.
        return load_recipe(self._recipe, [*self._settings, "train.tune_detection=false", *values])

    def check(self, data: str | Path) -> None:
        """Check all values, and that the folder is of the same search; enqueue the recipe's."""
        for own in self._ranges:
            for value in own.ends():
                self._load([f"{own.setting}={value}"])
        request = json.dumps([str(Path(data).resolve()), *self._request])
        known = self._study.user_attrs.get("request")
        if known not in (None, request):
            raise ConfigError(
                f"{self.out} has a search with other data, ranges or settings: choose another --out"
            )
        if known is None:
            self._study.set_user_attr("request", request)
            recipe = self._load([])
            values = {own.setting: recipe.value(own.setting) for own in self._ranges}
            if all(_contains(own, values[own.setting]) for own in self._ranges):
                self._study.enqueue_trial({
                    own.setting: str(values[own.setting]) if own.choices else values[own.setting]
                    for own in self._ranges
                })  # fmt: skip

    def has_budget(self, budget: float, max_trials: int | None) -> bool:
        """Return whether another trial may start."""
        ended = [t for t in self.trials() if t.state != "running"]
        if max_trials is not None and len(ended) >= max_trials:
            return False
        needed = self._study.user_attrs.get("trial_seconds", 0.0)
        spent = sum(t.seconds for t in ended)
        return bool(spent + needed <= budget * 1.001)  # a trial may take a little longer

    def run_trial(self, data: str | Path) -> Trial | int:
        """Run a trial, or resume one that was stopped; the exit code if it is stopped."""
        running = (self._optuna.trial.TrialState.RUNNING,)
        stopped = self._study.get_trials(deepcopy=False, states=running)
        if stopped:
            trial = self._optuna.trial.Trial(self._study, stopped[0]._trial_id)
        else:
            trial = self._study.ask()
        number: int = trial.number
        folder = self.out / "trials" / f"{number:03}"
        values = [f"{own.setting}={own.suggest(trial)}" for own in self._ranges]
        states, began = self._optuna.trial.TrialState, monotonic()
        reported = {*self._study.get_trials(deepcopy=False)[number].intermediate_values}
        is_pruned, steps = False, 1

        def on_event(event: Event) -> object:
            nonlocal is_pruned, steps
            answer = None if self._on_event is None else self._on_event(event)
            if event.kind in ("start", "resume"):
                steps = event.data["steps"]
            elif event.kind == "validation" and event.data["step"] < steps:
                ap, share = event.data.get("ap"), round(100 * event.data["step"] / steps)
                # A resumed training repeats the steps since its state was saved.
                if ap is not None and not math.isnan(ap) and share not in reported:
                    reported.add(share)
                    trial.report(ap, share)
                    is_pruned = bool(trial.should_prune())
            return "stop" if is_pruned else answer

        try:
            run = train(self._load(values), data, folder, device=self._device, on_event=on_event)
        except ConfigError as error:
            if not self._is_timed:
                raise
            raise ConfigError(
                f"a trial has a twentieth of --budget: {error}; or give train.steps=N for all"
            ) from None
        except NonFiniteLossError as error:  # a result too: these values diverge
            trial.set_user_attr("note", str(error))
            state, ap = states.FAIL, None
        else:
            if run.interrupted and not is_pruned:
                return int(run.exit_code or 130)
            ap = run.best_ap if run.best_ap >= 0 and not is_pruned else None
            state = states.PRUNED if is_pruned else states.FAIL if ap is None else states.COMPLETE
        finally:
            earlier = trial.user_attrs.get("seconds", 0.0)
            trial.set_user_attr("seconds", earlier + monotonic() - began)
        self._study.tell(trial, ap, state=state)
        return self.trials()[number]

    def trials(self) -> tuple[Trial, ...]:
        """Return all trials that have begun."""
        names = {"FAIL": "failed", "COMPLETE": "complete", "PRUNED": "pruned"}
        rows = []
        for t in self._study.get_trials(deepcopy=False):
            if t.state.name == "WAITING":
                continue
            best = max(t.intermediate_values.values(), default=math.nan)
            ap = best if t.value is None else t.value
            seconds = t.user_attrs.get("seconds", 0.0)
            rows.append(Trial(t.number, names.get(t.state.name, "running"), ap, seconds, t.params))
        return tuple(rows)


def _contains(own: Range, value: Any) -> bool:
    if own.choices:
        return str(value) in own.choices
    return isinstance(value, int | float) and own.low <= value <= own.high
