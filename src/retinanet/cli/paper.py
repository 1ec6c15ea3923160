"""``retinanet paper``: the paper's tables and figures, at full length or small."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retinanet.cli.console import note, print_json, progress, say, table
from retinanet.cli.console import seconds as format_seconds
from retinanet.cli.settings import DeviceOptions, Json, option, parse_duration
from retinanet.cli.settings import Settings as Overrides

if TYPE_CHECKING:
    from retinanet.paper.outputs import Outputs, Trainings
    from retinanet.paper.plan import Plan, Settings, Training
    from retinanet.paper.results import Result
    from retinanet.paper.run import Workers
    from retinanet.paper.tables import Experiment
    from retinanet.training.events import Event as TrainingEvent


def list_experiments(
    *,
    rows: Annotated[
        bool, typer.Option("--rows", help="List the rows that are trained, with their settings.")
    ] = False,
    json: Json = False,
) -> None:
    """List the tables and figures that can be run."""
    from retinanet.paper.tables import EXPERIMENTS

    listed: list[dict[str, Any]]
    if rows:
        title, left = "Rows that are trained", 4
        listed = [
            {"name": name, "row": row.key, "label": row.label, "settings": list(row.settings)}
            for name, experiment in EXPERIMENTS.items()
            for row in experiment.rows
            if row.trained
        ]
    else:
        title, left = "The paper's tables and figures: retinanet paper run NAME", 3
        listed = [
            {
                "name": name,
                "title": experiment.title,
                "section": experiment.section,
                "trained_rows": sum(row.trained for row in experiment.rows),
                "claims": len(experiment.claims),
            }
            for name, experiment in EXPERIMENTS.items()
        ]
    if json:
        print_json(listed)
        return
    cells = [
        [" ".join(value) if isinstance(value, list) else value for value in line.values()]
        for line in listed
    ]
    table(title, [name.replace("_", " ") for name in listed[0]], cells, left=left)


@dataclass(frozen=True)
class RunOptions(DeviceOptions):
    """The trainings and the output."""

    data: Path | None = option("Labelled folder or file; COCO's with --full.", shown=False)
    budget: str | None = option(
        "Time for all trainings together on this machine: 90s, 20min, 2h.",
        shown="20min",
        metavar="TIME",
    )
    steps: int | None = option("Steps of each training.", min=1)
    full: bool = option("The paper's setting: recipes, sizes, 90,000 steps.", False)
    yes: bool = option("Start --full without confirmation.", False)
    seeds: int = option("Trainings per row.", 1, min=1)
    jobs: int | None = option("Trainings at a time.", shown="1 per GPU or 2 cores", min=1)
    row: list[str] | None = option(
        "Train only this row (paper list --rows). Repeatable.", shown="all", metavar="KEY"
    )
    out: Path | None = option(
        "Output folder; finished trainings in it are kept.", shown="paper/DATA"
    )
    recipe: str = option("Base recipe of the rows, without --full.", "paper_quick")
    backbone: list[str] | None = option(
        "Replaces resnet50; second: resnet101; third: resnext101_32x8d. The last one replaces the "
        "rest too.",
        shown=False,
    )
    backbone_weights: list[str] | None = option(
        "File, default, or none; one per --backbone.", shown=False
    )
    image_size: int | None = option(
        "Replaces the paper's 600 px, without --full.", shown="the recipe's", min=32
    )


def run(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="table1a to table3, fig1 to fig7, or all.")
    ],
    overrides: Overrides = None,
    *,
    options: RunOptions,
    json: Json = False,
) -> None:
    """Run one of the paper's tables or figures, or all.

    All rows have the same images, steps, order and initial weights. Rerun the command to resume.
    """
    from retinanet.config import check_choice
    from retinanet.paper.outputs import write_outputs
    from retinanet.paper.plan import Settings
    from retinanet.paper.tables import EXPERIMENTS

    check_choice("the table or figure", name, [*EXPERIMENTS, "all"])
    experiments = list(EXPERIMENTS.values()) if name == "all" else [EXPERIMENTS[name]]
    _check_options(name, experiments, options)
    trained = [e.name for e in experiments if any(row.trained for row in e.rows)]
    data = options.data
    if trained and data is None:
        raise typer.BadParameter(
            f"{', '.join(trained)}: rows are trained, so name the data: --data DIR with --budget "
            "or --steps, or COCO's with --full"
        )
    folder = options.out or Path("paper") / (data.resolve().stem if data else "figures")
    trainings = None
    if trained and data is not None:
        settings = Settings(
            data=data,
            full=options.full,
            recipe=options.recipe,
            overrides=tuple(overrides or ()),
            backbones=tuple(options.backbone or ()),
            backbone_weights=tuple(options.backbone_weights or ()),
            image_size=options.image_size,
            steps=options.steps,
            seeds=options.seeds,
        )
        trainings = _train(experiments, settings, folder, options)
    with progress("tables and figures") as show:
        outputs = write_outputs(experiments, folder, trainings, progress=show)
    _print(outputs, folder, json)
    if trainings is not None and trainings.failures:
        for training, why in trainings.failures.items():
            note(f"failed: {training}: {why}", style="red")
        note("rerun the command to try the failed trainings again")
        raise typer.Exit(1)


def work(task: Annotated[str, typer.Argument(help="Settings as JSON, from run.")]) -> None:
    """Run one training of a plan; started by ``run``, which stops it by closing its input."""
    from retinanet.cli.training import describe_start
    from retinanet.paper.work import stop_when_input_closes
    from retinanet.paper.work import work as do

    stop_when_input_closes()

    def show(event: TrainingEvent) -> None:
        if event.kind in ("start", "resume"):
            note(describe_start(event.kind, event.data))
        elif event.kind == "message":
            note(str(event.data["message"]))

    code = do(**loads(task), on_event=show)
    if code:
        raise typer.Exit(code)


def _train(
    experiments: Sequence[Experiment], settings: Settings, out: Path, options: RunOptions
) -> Trainings:
    """Check everything, then run the trainings of some experiments."""
    from retinanet.model.precision import choose_device
    from retinanet.paper.budget import with_budget
    from retinanet.paper.outputs import Trainings
    from retinanet.paper.plan import check_networks, make_plan, read_data
    from retinanet.paper.run import Workers, run_plan

    rows, device = options.row, options.device
    has_budget = not options.full and options.steps is None
    budget = parse_duration("--budget", options.budget or "20min") if has_budget else 0
    splits = read_data(settings)
    choose_device(device)
    workers = Workers.default(settings.data, out, jobs=options.jobs, device=device)
    if has_budget:
        note(f"measuring the speed of this machine, for a budget of {format_seconds(budget)}")
        settings = with_budget(budget, experiments, rows, settings, workers, splits)
    whole = make_plan(experiments, settings, splits)
    plan = whole.only(rows)
    check_networks(plan, splits["train"].classes)
    workers = workers.limited_to(plan.trainings)
    _announce(plan, settings, workers)
    if settings.full:
        _confirm(plan, workers, options.yes)
    total = len(plan.trainings)
    ended = count(1)

    def note_end(training: Training, result: Result, was_finished: bool) -> None:
        line = f"[{next(ended)}/{total}] {training}: "
        if result.status == "failed":
            note(f"{line}failed: {result.note}", style="red")
        elif result.metrics is None:
            note(f"{line}diverged after {result.steps} steps", style="yellow")
        else:
            before = ", finished before" if was_finished else ""
            note(f"{line}AP {100 * (result.metrics.get('ap') or 0.0):.1f}{before}")

    with progress("steps of all") as show:
        trained = run_plan(plan, workers, note_end, show)
    # Rows that an earlier command trained are in the table too.
    results = workers.finished(whole.trainings) | trained
    command = shlex.join(["retinanet", *sys.argv[1:]])
    return Trainings(whole, results, settings, splits, workers, command)


def _check_options(name: str, experiments: Sequence[Experiment], options: RunOptions) -> None:
    from retinanet.config import check_choice

    known = [row.key for experiment in experiments for row in experiment.rows if row.trained]
    if options.row and not known:
        raise typer.BadParameter(f"--row: {name} has no row to train")
    for key in options.row or ():
        check_choice(f"row of {name}", key, known)
    lengths = (options.full, options.budget is not None, options.steps is not None)
    if sum(lengths) > 1:
        raise typer.BadParameter("--full, --budget and --steps exclude each other: use one of them")
    if options.full and (options.recipe != "paper_quick" or options.image_size is not None):
        raise typer.BadParameter(
            "--full uses the paper's recipes and sizes: leave out --recipe and --image-size"
        )


def _announce(plan: Plan, settings: Settings, workers: Workers) -> None:
    """Print what will be trained, and how it differs from the paper's setting."""
    from retinanet.paper.plan import common_differences, size_changes

    finished = len(workers.finished(plan.trainings))
    before = f", {finished} of them finished before" if finished else ""
    note(
        f"{len(plan.trainings)} trainings{before}, {workers.jobs} at a time with "
        f"{workers.threads} threads each"
    )
    if settings.full:
        return
    note("smaller than the paper, the same for every row; these are not COCO results:")
    for change in size_changes(plan, settings):
        note(f"  {change}")
    changed = [f"{name}={here}" for name, _, here in common_differences(plan)]
    note(f"  settings that differ from the paper's: {', '.join(changed)}")


def _confirm(plan: Plan, workers: Workers, yes: bool) -> None:
    """Print how long the trainings will take, and wait for confirmation."""
    from retinanet.paper.budget import estimate_seconds, measure_paces

    left = [training for training in plan.trainings if not workers.is_finished(training)]
    if not left:
        return
    note("measuring the speed of this machine")
    paces = measure_paces(left, workers)
    trains = [training.recipe.train for training in left]
    steps = sum(train.steps for train in trains)
    hours = estimate_seconds(round(steps / len(left)), paces, workers.jobs) / 3600
    fast, slow = min(pace.step for pace in paces), max(pace.step for pace in paces)
    note(
        f"{len(left)} trainings, {steps:,} steps of {trains[0].batch_size} images. In the paper "
        f"each took 10 to 35 h on 8 GPUs; measured here: {fast:.2g} to {slow:.2g} s per step, "
        f"about {hours:,.0f} h in all ({hours / 24:,.1f} days)"
    )
    if yes:
        return
    if not sys.stdin.isatty():
        raise typer.BadParameter("not interactive: pass --yes to confirm")
    typer.confirm("start?", abort=True, err=True)


def _print(outputs: Outputs, folder: Path, json: bool) -> None:
    """Print the tables, claims and files of a command."""
    from retinanet.paper.results import CLAIM_COLUMNS

    if json:
        results = [loads(result.to_json()) for result in outputs.tables]
        print_json({"folder": folder, "results": results})
        return
    for result in outputs.tables:
        if result.rows:
            narrow = result.table(wide=False)
            table(result.heading, narrow.columns, narrow.rows)
        for line in filter(None, (result.not_coco, *result.footnotes)):
            say(line)
        if result.claims:
            claims = [[*claim.cells(labels=False), claim.marked_verdict] for claim in result.claims]
            table("", CLAIM_COLUMNS, claims, left=4)
    for file in outputs.figures:
        say(f"figure   {file}")
    say(f"report   {outputs.report}")
