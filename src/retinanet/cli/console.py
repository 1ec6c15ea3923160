"""Printing of the commands: tables, progress bars, JSON."""

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
"""Console of results: standard output."""

err = Console(stderr=True, highlight=False)
"""Console of progress, notes and errors: standard error, so that results can be piped."""


_MIN_WIDTH = 18  # characters of a table's first column

STOPPED = 130
"""Exit code after Ctrl-C (128 + SIGINT), as shells report it."""

TERMINATED = 143
"""Exit code after SIGTERM (128 + SIGTERM)."""


def say(text: str = "", *, style: str | None = None) -> None:
    """Print a line of the result, never wrapped, so that a path can be copied."""
    out.print(text, style=style, markup=False, soft_wrap=True)


def note(text: str, *, style: str | None = None) -> None:
    """Print a line on standard error."""
    err.print(text, style=style, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print `value` as JSON on standard output; NaN and Inf become null."""
    sys.stdout.write(json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """Convert to JSON types: paths to text, tuples to lists, NaN and Inf to None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    return str(value)


def table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, left: int = 1
) -> None:
    """Print a table; the first `left` columns are text, the others numbers."""
    cells = [[figure(cell) for cell in row] for row in rows]
    widest = max((len(row[0]) for row in cells), default=0) if left == 1 else 0
    drawn = Table(title=title, title_justify="left", title_style="bold", header_style="bold")
    for i, column in enumerate(columns):
        if i < left:
            # Numbers would take all of 80 columns: names stay readable.
            drawn.add_column(column, overflow="fold", min_width=min(_MIN_WIDTH, widest) or None)
        else:
            drawn.add_column(column, justify="right", no_wrap=True)
    for row in cells:
        drawn.add_row(*row)
    out.print(drawn)


def figure(value: object) -> str:
    """Format a cell: floats with three decimals, None and NaN as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if math.isfinite(value) else "-"
    return str(value)


@contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on standard error; call the yielded function with (done, total)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("remaining"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(description, total=total)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield update


def seconds(value: float) -> str:
    """Format a duration: 42 s, 3:05 min, 2:10 h."""
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
