"""``retinanet bench``: how fast the parts are on this machine, beside what others use."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import typer

from retinanet.cli.console import note, out, print_json, say

if TYPE_CHECKING:
    from retinanet.bench import Row


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
    full: Annotated[
        bool, typer.Option("--full", help="The paper's and COCO's sizes: an hour, not minutes.")
    ] = False,
    vs: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Whom to compare with, of what is installed: torchvision (and pycocotools), "
            "fvcore, apex, none. May be given again.",
            show_default="torchvision",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="That torch computes with.", show_default="torch's")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="At the most, a contest.", show_default="7 or 15")
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            min=0, help="Of rounds, a contest; three are made always.", show_default="5 or 40"
        ),
    ] = None,
    memory: Annotated[bool, typer.Option(help="Measure memory too.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print machine and rows as JSON.")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print machine and rows as Markdown.")
    ] = False,
) -> None:
    """Time the parts on this machine, beside what others use for the same.

    All sides get the same input, their outputs are compared first, and they take turns. The limit
    is what the machine allows at most: a copy, or its fastest convolution, timed in the same turns.
    """
    import torch

    from retinanet.bench import bench as measure
    from retinanet.bench import describe_machine
    from retinanet.bench.markdown import to_markdown
    from retinanet.model.precision import choose_device

    if json and markdown:
        raise typer.BadParameter("--json and --markdown are two forms of one output: give one")
    measured = measure(
        stages or (),
        size="full" if full else "small",
        vs=vs or ("torchvision",),
        device=device,
        threads=threads,
        rounds=rounds,
        seconds=seconds,
        memory=memory,
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    machine = describe_machine(choose_device(device))
    torch.set_num_threads(before)
    if not (json or markdown):
        for line in machine.lines():
            say(line)
    rows: list[Row] = []
    for stage, of_stage in groupby(measured, key=lambda row: row.stage):
        own = []
        for row in of_stage:
            own.append(row)
            note(_line(row))
        rows += own
        if not (json or markdown):
            _print(stage, own)
    if json:
        print_json({"machine": machine.to_dict(), "rows": [row.to_dict() for row in rows]})
    elif markdown:
        say(to_markdown(machine.lines(), rows).rstrip())


def _line(row: Row) -> str:
    """A row as it comes, with what the table leaves out."""
    from retinanet.bench.markdown import held, ratio, seconds

    line = f"{row.stage}, {row.way}, {row.size}: "
    if row.ours is None:
        return line + row.note
    line += seconds(row.ours.median)
    if row.theirs is not None:
        line += f"; {row.rival} {seconds(row.theirs.median)}, {ratio(row)} times as long"
        line += f" ({row.difference})"
    for more in (row.note, held(row)):
        if more:
            line += f"; {more}"
    if row.first is not None and row.first > 1 + 5 * row.ours.median:
        line += f"; the first call took {seconds(row.first)}"
    return line


def _print(stage: str, rows: list[Row]) -> None:
    """A stage's table: of 80 columns, 25 are left for what was worked on."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from retinanet.bench.markdown import megabytes, ratio, seconds, share

    rivals = list(dict.fromkeys(row.rival for row in rows if row.rival))
    table = Table(
        title=stage + (f" beside {', '.join(rivals)}" if rivals else ""),
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
        what = row.way + (f" / {row.rival}" if len(rivals) > 1 and row.rival else "")
        # The size is said where it changes.
        beneath = ([row.size] if row.size != size else []) + ([] if row.ours else [row.note])
        size = row.size
        table.add_row(
            "\n".join([what, *(f"[dim]{escape(line)}[/dim]" for line in beneath)]),
            seconds(row.ours.median) if row.ours else "-",
            seconds(row.theirs.median) if row.theirs else "-",
            ratio(row),
            share(row),
            megabytes(row.memory),
            megabytes(row.rival_memory),
        )
    out.print(table)
