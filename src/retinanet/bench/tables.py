"""Rows as text: numbers with units, and tables in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

from retinanet.bench.benchmark import Row

_COLUMNS = ("", "ours", "theirs", "times faster", "of the limit", "MB", "theirs, MB")


def to_markdown(
    machine: Sequence[str], rows: Iterable[Row], goals: Callable[[Row], str] | None = None
) -> str:
    """Format the machine as a paragraph, then a table per stage.

    Args:
        machine: :meth:`retinanet.bench.machine.Machine.lines`.
        rows: stage by stage.
        goals: text of a last column; None: no such column.
    """
    columns = [*_COLUMNS, *(["goal"] if goals else [])]
    rule = ["---", *["---:"] * (len(_COLUMNS) - 1), *(["---"] if goals else [])]
    parts = ["; ".join(machine) + "."]
    for stage, group in groupby(rows, key=lambda row: row.stage):
        of_stage = list(group)
        rivals = list(dict.fromkeys(row.rival for row in of_stage if row.rival))
        title = f"**{stage}**" + (f" against {', '.join(rivals)}" if rivals else "")
        cells = [
            [*_cells(row, len(rivals) > 1), *([goals(row)] if goals else [])] for row in of_stage
        ]
        table = "\n".join(
            f"| {' | '.join(_escape(cell) for cell in line)} |" for line in (columns, rule, *cells)
        )
        parts.append(f"{title}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def seconds(value: float | None) -> str:
    """Format a time with three digits: 1.23 s, 45.6 ms, 7.89 us; None: a dash."""
    if value is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{_three_digits(value / size)} {unit}"
    return f"{_three_digits(value / 1e-6)} us"


def megabytes(value: int | None) -> str:
    """Format bytes as MB; None: a dash."""
    if value is None:
        return "-"
    return f"{value / 1e6:,.0f}" if value >= 1e6 or value == 0 else f"{value / 1e6:.1f}"


def count(number: int, noun: str) -> str:
    """Format a count: 1 image, 2 images."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def figures(row: Row) -> list[str]:
    """Format ours, theirs, the speedup with its quartiles, the limit, and the memory of both."""
    speedup = "-"
    if row.speedup is not None:
        low, high = _three_digits(row.speedup.low), _three_digits(row.speedup.high)
        speedup = f"{_three_digits(row.speedup.median)} ({low}-{high})"
    return [
        *(seconds(timing.median if timing else None) for timing in (row.ours, row.theirs)),
        speedup,
        "-" if row.limit_fraction is None else f"{row.limit_fraction:.0%}",
        megabytes(row.memory),
        megabytes(row.rival_memory),
    ]


def remarks(row: Row) -> list[str]:
    """List the implementation, a slow first call, and the error."""
    texts = [row.note]
    if row.first_call is not None and row.ours and row.first_call > 1 + 5 * row.ours.median:
        texts.append(f"first call {seconds(row.first_call)}")
    texts.append(f"failed: {row.error}" if row.error else "")
    return [text for text in texts if text]


def _three_digits(value: float) -> str:
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _cells(row: Row, name_rival: bool) -> list[str]:
    description = f"{row.case}: {row.size}"
    if name_rival and row.rival:
        description += f" / {row.rival}"
    if row.difference:
        description += f" ({row.difference})"
    ours, theirs, speedup, limit, *memory = figures(row)
    limit += f" ({row.limit})" if row.limit else ""
    return ["; ".join([description, *remarks(row)]), ours, theirs, speedup, limit, *memory]


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
