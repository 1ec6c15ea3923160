"""What the commands print with: tables, progress bars, JSON, and the shape of an error."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

out = Console(highlight=False)
"""Answers: standard output."""

err = Console(stderr=True, highlight=False)
"""Progress, notes and errors: standard error, so that an answer can be piped."""


_LEAST = 18  # letters of a table's first column, where it has as many

STOPPED = 130
"""Exit code after Ctrl-C (128 + SIGINT), as shells report it."""

TERMINATED = 143
"""Exit code after SIGTERM (128 + SIGTERM)."""


def say(text: str = "", *, style: str | None = None) -> None:
    """One line of the answer, never wrapped: a path stays whole when it is copied."""
    out.print(text, style=style, markup=False, soft_wrap=True)


def note(text: str, *, style: str | None = None) -> None:
    """One line beside the answer, on standard error."""
    err.print(text, style=style, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """`value` as JSON on standard output; what is not a number becomes null, as JSON has no NaN."""
    sys.stdout.write(json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """`value` with paths as text, tuples as lists and no NaN or infinity."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Iterable):
        return [plain(one) for one in value]
    return str(value)


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1
) -> None:
    """A table on standard output: the first `left` columns are text, the others figures."""
    cells = [[figure(cell) for cell in row] for row in rows]
    widest = max((len(row[0]) for row in cells), default=0) if left == 1 else 0
    drawn = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for i, column in enumerate(columns):
        if i < left:
            # Of 80 columns figures would take all: a name keeps what a person can read.
            drawn.add_column(column, overflow="fold", min_width=min(_LEAST, widest) or None)
        else:
            drawn.add_column(column, justify="right", no_wrap=True)
    for row in cells:
        drawn.add_row(*row)
    out.print(drawn)


def figure(value: object) -> str:
    """A cell: floats with three decimals, what does not exist as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if math.isfinite(value) else "-"
    return str(value)


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error; call what it gives with (done, of how many)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=total)

        def update(done: int, of: int) -> None:
            bar.update(task, completed=done, total=of)

        yield update


def seconds(value: float) -> str:
    """Seconds as a person says them: 42 s, 3:05 min, 2:10 h."""
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
