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
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

out = Console(highlight=False)
"""Console of results: standard output."""

err = Console(stderr=True, highlight=False)
"""Console of progress, notes and errors: standard error, so that results can be piped."""

STOPPED, TERMINATED = 130, 143
"""Exit codes after Ctrl-C and SIGTERM (128 + the signal), as shells report them."""

_MIN_WIDTH = 18  # characters of a table's first column
_MAX_FAILURES = 20  # printed


def say(text: str = "", *, style: str | None = None) -> None:
    """Print a line of the result, never wrapped, so that a path can be copied."""
    out.print(text, style=style, markup=False, soft_wrap=True)


def note(text: str, *, style: str | None = None) -> None:
    """Print a line on standard error."""
    err.print(text, style=style, markup=False, soft_wrap=True)


def note_failures(reasons: Sequence[str], what: str, *, total: int | None = None) -> None:
    """Print the number of failures and the first reasons on standard error."""
    total = len(reasons) if total is None else total
    note(f"{count(total, what)} could not be read:", style="red")
    shown = reasons[:_MAX_FAILURES]
    for reason in shown:
        note(f"  {reason}")
    if total > len(shown):
        note(f"  and {total - len(shown)} more")


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
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    left: int = 1,
    console: Console = out,
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
    console.print(drawn)


def figure(value: object) -> str:
    """Format a cell: floats with three decimals, None and NaN as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if math.isfinite(value) else "-"
    return str(value)


def count(number: int, noun: str) -> str:
    """Format a number of things: 1 image, 2 images, 3 classes."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{'' if number == 1 else plural}"


class _Speed(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f}/s")


@contextmanager
def progress(description: str) -> Iterator[Callable[[int, int | None], None]]:
    """Show a progress bar on standard error; call the yielded function with (done, total)."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        _Speed(),
        TimeElapsedColumn(),
        TextColumn("remaining"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(description, total=None)

        def update(done: int, total: int | None) -> None:
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
