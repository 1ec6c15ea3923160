"""``retinanet tune``: choose settings of training by short trainings."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from retinanet.cli.console import note, print_json, say, seconds, table
from retinanet.cli.settings import (
    RECIPE_HELP,
    DeviceOptions,
    Json,
    LabelledData,
    option,
    parse_duration,
)


@dataclass(frozen=True, kw_only=True)
class TuneOptions(DeviceOptions):
    """The search."""

    budget: str = option("Time for all trials, such as 2h.", ..., metavar="DURATION")
    recipe: str = option(RECIPE_HELP, "quick")
    out: Path | None = option(
        "Folder of the search; an unfinished search in it is resumed.", shown="runs/tune-DATA"
    )
    trials: int | None = option(
        "Maximum number of trials.", shown="as many as the budget allows", min=1
    )


def tune(
    data: LabelledData,
    settings: Annotated[
        list[str],
        typer.Argument(
            metavar="KEY=RANGE",
            help="Settings to choose: train.lr=1e-4..1e-2, train.optimizer=adamw|sgd; KEY=VALUE "
            "is for all trials.",
        ),
    ],
    *,
    options: TuneOptions,
    json: Json = False,
) -> None:
    """Choose settings of training by short trainings, with Optuna.

    The trials are compared by AP on the validation split; poor ones are stopped early. A trial
    takes a twentieth of the budget, or the train.time, train.steps or train.epochs that is given.
    Ctrl-C stops after the current step; the same command resumes the search.
    """
    from retinanet.training.search import Trial, parse_ranges, search

    ranges, fixed = parse_ranges(settings)

    def show(trial: Trial) -> None:
        values = ", ".join(f"{key}={_text(value)}" for key, value in trial.values.items())
        ap = "-" if trial.ap != trial.ap else f"{trial.ap:.3f}"
        note(f"trial {trial.number}: {trial.state}, AP {ap}, {seconds(trial.seconds)}: {values}")

    folder = options.out or Path("runs") / f"tune-{data.resolve().stem}"
    result = search(
        data,
        folder,
        ranges,
        recipe=options.recipe,
        settings=fixed,
        budget=parse_duration("--budget", options.budget),
        max_trials=options.trials,
        device=options.device,
        on_trial=show,
    )
    best = result.best
    command = ""
    if best is not None:
        words = ["retinanet", "train", str(data), "--recipe", options.recipe]
        words += [text for text in fixed if not text.startswith("train.time=")]
        words += [f"{key}={_text(value)}" for key, value in best.values.items()]
        command = shlex.join(words)
    if json:
        values = {"out": folder, "command": command, "best": best and best.number}
        print_json({**values, "trials": [asdict(trial) for trial in result.trials]})
    else:
        names = [own.setting for own in ranges]
        ranked = sorted(result.trials, key=lambda t: (t is not best, t.state != "complete", -t.ap))
        rows = []
        for trial in ranked:
            chosen = [_text(trial.values.get(name, "-")) for name in names]
            rows.append([str(trial.number), trial.state, *chosen, trial.ap, seconds(trial.seconds)])
        table("Trials, the best first", ["trial", "state", *names, "AP", "time"], rows, left=2)
        if best is not None:
            say(f"run      {folder / 'trials' / f'{best.number:03}'}: config.toml, best/")
            say(f"next     {command}")
    if result.exit_code:
        raise typer.Exit(result.exit_code)


def _text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
