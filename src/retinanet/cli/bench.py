"""``retinanet bench``: time each stage on this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from retinanet.cli.console import note, out, print_json, say
from retinanet.cli.settings import DeviceOptions, Json, option

if TYPE_CHECKING:
    from retinanet.bench import Row


@dataclass(frozen=True)
class BenchOptions(DeviceOptions):
    """The measurement."""

    full: bool = option("The paper's and COCO's sizes; takes an hour.", False)
    alone: bool = option("This package alone, without torchvision and pycocotools.", False)
    threads: int | None = option("Number of threads.", shown="torch's", min=1)
    seconds: float | None = option(
        "Time limit per row in seconds; at least three rounds run.", shown="5 or 40", min=0
    )


def bench(
    stages: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="STAGE",
            help="class-loss, matching, postprocess, inference, detect, train-step, data, "
            "evaluation, startup.",
            show_default="all",
        ),
    ] = None,
    *,
    options: BenchOptions,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too.")] = True,
    json: Json = False,
) -> None:
    """Benchmark each stage on this machine against torchvision.

    All sides get the same input and run in interleaved rounds after their outputs are compared. The
    limit is a lower bound on this machine: a copy, or its fastest convolution.
    """
    import torch

    from retinanet.bench import bench as run
    from retinanet.bench import describe_machine
    from retinanet.model.precision import choose_device

    settings = {**vars(options), "memory": memory}
    is_full = settings.pop("full")
    results = run(stages or (), size="full" if is_full else "small", **settings)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or before)
    machine = describe_machine(choose_device(options.device))
    torch.set_num_threads(before)
    rows: list[Row] = []
    try:
        for line in () if json else machine.lines():
            say(line)
        for stage, group in groupby(results, key=lambda row: row.stage):
            start = len(rows)
            for row in group:
                rows.append(row)
                _note_row(row)
            if not json:
                print_table(stage, rows[start:])
    finally:  # also after Ctrl-C
        if json:
            print_json({"machine": asdict(machine), "rows": [asdict(row) for row in rows]})
    failed = [f"{row.stage}, {row.case}" for row in rows if row.error]
    if failed:
        note(f"error: {len(failed)} of {len(rows)} rows failed: {'; '.join(failed)}")
        raise typer.Exit(1)


def _note_row(row: Row) -> None:
    """Print a row on standard error."""
    from retinanet.bench.benchmark import figures, remarks

    ours, theirs, speedup, *_ = figures(row)
    texts = [ours] if row.ours else []
    if row.theirs:
        texts.append(f"{row.rival} {theirs}, {speedup} times as long ({row.difference})")
    note(f"{row.stage}, {row.case}, {row.size}: {'; '.join(texts + remarks(row))}")


def print_table(stage: str, rows: list[Row]) -> None:
    """Print the table of a stage; of 80 columns it leaves 25 for the case."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from retinanet.bench.benchmark import figures

    rivals = list(dict.fromkeys(row.rival for row in rows if row.rival))
    table = Table(
        title=stage + (f" against {', '.join(rivals)}" if rivals else ""),
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("", overflow="fold", min_width=16)
    for name in ("ours", "theirs", "times faster", "limit", "MB", "theirs"):
        table.add_column(name, justify="right", no_wrap=True)
    size = ""
    for row in rows:
        case = row.case + (f" / {row.rival}" if len(rivals) > 1 and row.rival else "")
        details = [row.size] if row.size != size else []  # only where it changes
        size = row.size
        if row.error:
            details.append(f"failed: {row.error}")
        elif row.ours is None:
            details.append(row.note)
        lines = [escape(case), *(f"[dim]{escape(line)}[/dim]" for line in details)]
        table.add_row("\n".join(lines), *figures(row))
    out.print(table)
