"""``retinanet paper``: the paper's tables and figures, at full size or in small."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Sequence
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from retinanet.cli.console import err, note, print_json, progress, say, table
from retinanet.cli.settings import Settings

if TYPE_CHECKING:
    from retinanet.paper.experiments import Experiment
    from retinanet.paper.plan import Plan, Terms
    from retinanet.paper.results import TableResult
    from retinanet.paper.run import Happening, Workplace


_LINE_EVERY = 30.0  # seconds between two lines of progress where there is no screen to redraw


def list_experiments(
    *,
    rows: Annotated[
        bool, typer.Option("--rows", help="List the rows that are trained, with their settings.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False,
) -> None:
    """List the tables and figures that can be run, with what each needs."""
    from retinanet.paper.tables import EXPERIMENTS

    if rows:
        trained = [
            {"name": one.name, "row": row.key, "label": row.label, "settings": list(row.settings)}
            for one in EXPERIMENTS.values()
            for row in one.rows
            if row.trained
        ]
        if json:
            print_json(trained)
            return
        cells = [[*[*one.values()][:3], " ".join(one["settings"])] for one in trained]
        table("Rows that are trained", ["name", "row", "what", "settings"], cells, left=4)
        return
    every = [
        {
            "name": one.name,
            "title": one.title,
            "section": one.section,
            "trained_rows": sum(row.trained for row in one.rows),
            "claims": len(one.claims),
        }
        for one in EXPERIMENTS.values()
    ]
    if json:
        print_json(every)
        return
    table(
        "The paper's tables and figures: retinanet paper run NAME",
        ["name", "what", "where", "trainings", "claims"],
        [[*one.values()] for one in every],
        left=3,
    )


def run(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="table1a to table3, fig1 to fig7, or all."),
    ],
    settings: Settings = None,
    *,
    data: Annotated[
        Path | None,
        typer.Option(help="A labelled folder or file; at full size COCO's.", show_default=False),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="What all trainings together may take on this machine: 90s, 20min, 2h.",
            show_default="20min",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Exactly so many steps, every row.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="The paper's own setting: recipes, sizes, 90,000 steps.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Begin --full without asking.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each row.")] = 1,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Trainings side by side.", show_default="one a GPU, or for two cores"
        ),
    ] = None,
    row: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            help="Train this row alone (paper list --rows); may be given again.",
            show_default="all",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where everything goes; what is finished there is not done again.",
            show_default="paper/DATA",
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="In small, the recipe that rows are laid over.")
    ] = "quick",
    backbone: Annotated[
        list[str] | None,
        typer.Option(
            help="In place of resnet50; again: of resnet101; again: of resnext101_32x8d. "
            "The last serves the rest.",
            show_default=False,
        ),
    ] = None,
    backbone_weights: Annotated[
        list[str] | None,
        typer.Option(help="A file, default, or none; one for each backbone.", show_default=False),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            min=32, help="In small, what the paper's 600 px become.", show_default="the recipe's"
        ),
    ] = None,
    results: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="Another detector's COCO results on the val split, as a row of table2.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Run one of the paper's tables or figures, or all.

    Every row gets the same images, steps, order and start. A call that was stopped goes on where
    it was when it is given again; calls on several machines may share one --out.
    """
    from retinanet.model.precision import choose_device
    from retinanet.paper.outputs import Trained, finish, read_foreign
    from retinanet.paper.pace import steps_within
    from retinanet.paper.plan import Terms, check_images, check_networks, plan, read_data
    from retinanet.paper.run import find_workplace, run_plan

    experiments = _experiments(name)
    _check_rows(name, experiments, row or ())
    given = _results(results or [], [one.name for one in experiments])
    trains = [one.name for one in experiments if any(row.trained for row in one.rows)]
    _check_lengths(full, budget, steps, recipe, image_size)
    if trains and data is None:
        raise typer.BadParameter(
            f"{', '.join(trains)}: rows are trained, so name the data: --data DIR, in small with "
            "--budget or --steps, or COCO's with --full"
        )
    folder = out or Path("paper") / (data.resolve().stem if data else "figures")
    trained = None
    if trains:
        assert data is not None
        terms = Terms(
            data=data,
            full=full,
            recipe=recipe,
            settings=tuple(settings or ()),
            backbones=tuple(backbone or ()),
            backbone_weights=tuple(backbone_weights or ()),
            image_size=image_size,
            steps=steps,
            seeds=seeds,
        )
        splits = read_data(terms)
        foreign = read_foreign(given, splits)  # now, and not after hours of training
        choose_device(device)
        with progress("opening images") as show:
            check_images(splits, ["val"] if full else ["train", "val"], show)
        place = find_workplace(data, folder, jobs=jobs, device=device, full=full)
        if not full and steps is None:
            seconds = _seconds(budget or "20min")
            note(f"measuring how fast this machine trains, for {_length(seconds)} in all")
            terms = steps_within(seconds, experiments, row, terms, place, splits)
        every = plan(experiments, terms, splits)
        planned = every.only(row) if row else every
        check_networks(planned, len(splits["train"].classes))
        place = place.fitted(planned.trainings)
        _announce(planned, terms, place)
        if full:
            _agree(planned, place, yes)
        with _Board(planned) as board:
            done = run_plan(planned, place, board.show)
        done = place.finished(every.trainings) | done  # rows that an earlier call has trained stay
        trained = Trained(every, done, terms, splits, place, foreign, _command())
    with progress("tables and figures") as show:
        made = finish(experiments, folder, trained, progress=show)
    if json:
        results_of = [loads(one.to_json()) for one in made.tables]
        print_json({"folder": folder, "results": results_of})
    else:
        for one in made.tables:
            _print(one)
        for file in made.figures:
            say(f"figure   {file}")
        say(f"report   {made.report}")
    if trained is not None and trained.failures:
        for training, why in trained.failures.items():
            note(f"failed: {training}: {why}", style="red")
        note("the same command tries again what failed, and nothing else")
    if trained is not None and (trained.failures or trained.planned.refused):
        raise typer.Exit(1)


def work() -> None:
    """Do one training of a plan, told on standard input: what ``run`` starts for each."""
    from retinanet.cli.training import describe_start
    from retinanet.paper.work import work as do
    from retinanet.training.events import Event

    def show(event: Event) -> None:
        if event.kind in ("start", "resume"):
            note(describe_start(event.kind, event.data))
        elif event.kind == "message":
            note(str(event.data["message"]))

    code = do(sys.stdin.fileno(), show)
    if code:
        raise typer.Exit(code)


def _experiments(name: str) -> list[Experiment]:
    from retinanet.config import check_choice
    from retinanet.paper.tables import EXPERIMENTS

    check_choice("the table or figure", name, [*EXPERIMENTS, "all"])
    return list(EXPERIMENTS.values()) if name == "all" else [EXPERIMENTS[name]]


def _check_rows(name: str, experiments: Sequence[Experiment], keys: Sequence[str]) -> None:
    from retinanet.config import check_choice

    known = [row.key for one in experiments for row in one.rows if row.trained]
    if keys and not known:
        raise typer.BadParameter(f"--row: {name} has no row to train")
    for key in keys:
        check_choice(f"row of {name}", key, known)


def _check_lengths(
    full: bool, budget: str | None, steps: int | None, recipe: str, image_size: int | None
) -> None:
    if sum((full, budget is not None, steps is not None)) > 1:
        raise typer.BadParameter(
            "--full, --budget and --steps each say how long to train: give one of them"
        )
    if full and (recipe != "quick" or image_size is not None):
        raise typer.BadParameter(
            "--full has the paper's recipes and sizes: leave out --recipe and --image-size"
        )


def _seconds(text: str) -> float:
    """A length of time: 90s, 20min, 1.5h."""
    units = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]+)\s*", text.lower())
    if found is None or found.group(2) not in units or float(found.group(1)) == 0:
        raise typer.BadParameter(f"--budget {text!r} is not a length of time: 90s, 20min or 2h")
    return float(found.group(1)) * units[found.group(2)]


def _results(given: Sequence[str], names: Sequence[str]) -> dict[str, Path]:
    """Other detectors' results files by their names."""
    if given and "table2" not in names:
        raise typer.BadParameter("--results is for table2, where other detectors stand")
    found = {}
    for one in given:
        name, equals, file = one.partition("=")
        if not (name and equals and file):
            raise typer.BadParameter(f"--results {one!r}: write NAME=FILE")
        if not Path(file).is_file():
            raise typer.BadParameter(f"--results {name}: there is no file {file}")
        if name in found:
            raise typer.BadParameter(f"--results {name}: that name is given twice")
        found[name] = Path(file)
    return found


def _command() -> str:
    return shlex.join(["retinanet", *sys.argv[1:]])


def _announce(planned: Plan, terms: Terms, place: Workplace) -> None:
    """What is about to be trained, and in what it is not the paper's setting."""
    from retinanet.paper.plan import common_differences, size_changes

    for (of, key), why in planned.refused.items():
        note(f"{of}, row {key} is left out: {why}", style="yellow")
    if not planned.trainings:
        return
    finished = sum(place.is_finished(one) for one in planned.trainings)
    again = f", {finished} of them finished before" if finished else ""
    note(
        f"{len(planned.trainings)} trainings{again}, {place.jobs} at a time with "
        f"{place.threads} threads each"
    )
    if terms.full:
        return
    note("in small, the same for every row; none of this is a COCO result:")
    for what in size_changes(planned, terms):
        note(f"  {what}")
    changed = [f"{name}={here}" for name, _, here in common_differences(planned)]
    note(f"  settings that are not the paper's: {', '.join(changed)}")


def _agree(planned: Plan, place: Workplace, yes: bool) -> None:
    """Say what the whole will cost, and ask."""
    from retinanet.paper.pace import measure_paces, seconds_of

    left = [one for one in planned.trainings if not place.is_finished(one)]
    if not left:
        return
    lengths = [one.recipe.train.steps for one in left]
    note("measuring how fast this machine trains")
    paces = measure_paces(left, place)
    hours = seconds_of(lengths, paces, place.jobs) / 3600
    batch = left[0].recipe.train.batch_size
    note(
        f"{len(left)} trainings, {sum(lengths):,} steps of {batch} images. In the paper each "
        f"took 10 to 35 h on 8 GPUs; here {min(one.step for one in paces):.2g} to "
        f"{max(one.step for one in paces):.2g} s a step were measured: about {hours:,.0f} h in all "
        f"({hours / 24:,.1f} days)"
    )
    if yes:
        return
    if not sys.stdin.isatty():
        raise typer.BadParameter("nobody is here to agree to that: give --yes to begin")
    typer.confirm("begin?", abort=True, err=True)


def _length(value: float) -> str:
    from retinanet.cli.console import seconds

    return seconds(value)


class _Board:
    """A bar over the steps of all trainings, and a line for each that ends."""

    def __init__(self, planned: Plan) -> None:
        self._count = len(planned.trainings)
        self._ended: set[tuple[str, int]] = set()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
        self._task = self._bar.add_task("steps of all", total=None)
        self._first: tuple[float, int] | None = None
        self._last = (0.0, 0)

    def __enter__(self) -> _Board:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, event: Happening) -> None:
        if event.kind == "step":
            self._bar.update(self._task, completed=event.steps, total=event.of)
            self._say_steps(event)
            return
        if event.kind == "begun" or event.training is None:
            return
        name = f"{event.training.name}, seed {event.training.seed}"
        if event.kind == "waiting":
            note(f"waiting for {name}: {event.note} is at work on it")
            return
        self._ended.add((event.training.name, event.training.seed))
        what = f"[{len(self._ended)}/{self._count}] {name}: "
        if event.kind == "failed":
            note(what + f"failed: {event.note}", style="red")
        elif event.result is not None and event.result.metrics is None:
            note(what + f"diverged after {event.result.steps} steps", style="yellow")
        elif event.result is not None and event.result.metrics is not None:
            ap = event.result.metrics.get("ap")
            before = ", finished before" if event.kind == "elsewhere" else ""
            note(what + f"AP {100 * (ap or 0.0):.1f}{before}")

    def _say_steps(self, event: Happening) -> None:
        """A line now and then, where there is no screen on which the bar moves."""
        now = time.monotonic()
        if self._first is None:
            self._first = self._last = (now, event.steps)
        if err.is_terminal or now - self._last[0] < _LINE_EVERY:
            return
        self._last = (now, event.steps)
        (began, before), line = self._first, f"{event.steps:,} of {event.of:,} steps of all"
        if event.steps > before:
            left = (event.of - event.steps) * (now - began) / (event.steps - before)
            line += f", {_length(left)} left"
        note(line)


def _print(result: TableResult) -> None:
    """A table and what was found of its claims."""
    if not result.lines:
        return
    table(result.heading, result.columns, result.rows)
    for line in filter(None, (result.not_coco, *result.footnotes)):
        say(line)
    if result.claims:
        claims = [[*one.brief_cells(), one.said] for one in result.claims]
        table("", ["the paper says", "paper", "here", "verdict"], claims, left=4)
