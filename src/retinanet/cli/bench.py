"""``retinanet bench``: how fast the parts are on this machine, beside what others use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from retinanet.cli.console import note, print_json, table

if TYPE_CHECKING:
    from retinanet.bench import Row


def bench(
    stages: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="STAGE",
            help="class-loss, matching, postprocess, network, train-step, data, evaluation.",
            show_default="all",
        ),
    ] = None,
    *,
    full: Annotated[
        bool, typer.Option("--full", help="The paper's and COCO's sizes: minutes, not seconds.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    rounds: Annotated[
        int | None, typer.Option(min=1, help="At the most, a contest.", show_default="7 or 15")
    ] = None,
    memory: Annotated[bool, typer.Option(help="Measure memory too.")] = True,
    json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Time the parts on this machine, beside torchvision and pycocotools.

    Both sides get the same input, their outputs are compared first, and they take turns.
    """
    from retinanet.bench import bench as measure

    rows: list[Row] = []
    for row in measure(stages or (), full=full, device=device, rounds=rounds, memory=memory):
        rows.append(row)
        note(f"{row.stage}, {row.way}: {_time(row.ours.median)}{_beside(row)}")
    if json:
        print_json([row.to_dict() for row in rows])
        return
    table(
        "Median times; a speedup over 1 is in our favour",
        ["stage, size, rival", "ours", "theirs", "speedup", "MB", "theirs"],
        [
            (
                f"{row.stage}, {row.way}: {row.size}" + (f"; {row.rival}" if row.rival else ""),
                _time(row.ours.median),
                _time(row.theirs.median) if row.theirs else "-",
                _speedup(row),
                _bytes(row.memory),
                _bytes(row.rival_memory),
            )
            for row in rows
        ],
    )


def _beside(row: Row) -> str:
    if row.theirs is None:
        return ""
    return f", {row.rival} {_time(row.theirs.median)} ({row.difference})"


def _speedup(row: Row) -> str:
    if row.speedup is None:
        return "-"
    return f"{row.speedup:.1f} ({row.speedup_low:.1f}-{row.speedup_high:.1f})"


def _time(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"


def _bytes(value: Any) -> str:
    return "-" if value is None else f"{value / 1e6:.0f}"
