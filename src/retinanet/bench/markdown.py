"""The rows of a run as Markdown, with the goals beside the figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

from retinanet.bench.contest import Row, Timing

_COLUMNS = ("", "ours", "theirs", "times faster", "of the limit", "MB", "theirs, MB", "goal")


def to_markdown(machine: Sequence[str], rows: Iterable[Row]) -> str:
    """The machine in a paragraph, then a table a stage.

    Args:
        machine: as :meth:`retinanet.bench.machine.Machine.lines` gives it.
        rows: stage by stage.
    """
    parts = ["; ".join(machine) + "."]
    for stage, of_stage in groupby(rows, key=lambda row: row.stage):
        own = list(of_stage)
        rivals = list(dict.fromkeys(row.rival for row in own if row.rival))
        beside = f" beside {', '.join(rivals)}" if rivals else ""
        parts.append(f"**{stage}**{beside}\n\n" + _table([_cells(row, rivals) for row in own]))
    return "\n\n".join(parts) + "\n"


def seconds(value: float) -> str:
    """A time with three figures: 1.23 s, 45.6 ms, 7.89 us."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{_three(value / size)} {unit}"
    return f"{_three(value / 1e-6)} us"


def megabytes(value: int | None) -> str:
    """Bytes as MB; a dash where they were not measured."""
    if value is None:
        return "-"
    return f"{value / 1e6:,.0f}" if value >= 1e6 or value == 0 else f"{value / 1e6:.1f}"


def count(number: int, thing: str) -> str:
    """1 image, 2 images."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def held(row: Row) -> str:
    """What is kept from call to call, which the peak of a call leaves out; empty: not told."""
    if row.held is None:
        return ""
    text = f"{megabytes(row.held)} MB are kept between calls"
    return text + ("" if row.rival_held is None else f", {megabytes(row.rival_held)} MB of theirs")


def ratio(row: Row) -> str:
    """How many times faster, with the quartiles over rounds."""
    if row.speedup is None or row.speedup_low is None or row.speedup_high is None:
        return "-"
    return f"{_three(row.speedup)} ({_three(row.speedup_low)}-{_three(row.speedup_high)})"


def share(row: Row) -> str:
    """Of the machine's limit."""
    return "-" if row.share is None else f"{row.share:.0%}"


def _three(value: float) -> str:
    if value >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _cells(row: Row, rivals: Sequence[str]) -> list[str]:
    what = f"{row.way}: {row.size}"
    if len(rivals) > 1 and row.rival:
        what += f" / {row.rival}"
    if row.difference:
        what += f" ({row.difference})"
    for more in (row.note, held(row), f"**failed**: {row.error}" if row.error else ""):
        if more:
            what += f"; {more}"
    if row.first is not None and row.ours is not None and row.first > 1 + 5 * row.ours.median:
        what += f"; the first call {seconds(row.first)}"
    limit = share(row) + (f" ({row.limit})" if row.limit else "")
    return [
        what,
        _timing(row.ours),
        _timing(row.theirs),
        ratio(row),
        limit,
        megabytes(row.memory),
        megabytes(row.rival_memory),
        _goals(row),
    ]


def _timing(timing: Timing | None) -> str:
    return "-" if timing is None else seconds(timing.median)


_GOALS: dict[str, Callable[[float], str]] = {
    "speedup": lambda goal: f"{goal:g} x",
    "share": lambda goal: f"{goal:.0%} of the limit",
    "seconds": seconds,
    "memory": lambda goal: f"under {goal / 1e6:,.0f} MB",
    "memory_of_rival": lambda goal: f"memory under {goal:g} of theirs",
    "memory_of_input": lambda goal: f"memory under {goal:g} x the logits",
}


def _goals(row: Row) -> str:
    said = []
    for name, goal in row.goals.items():
        met = {True: ": met", False: ": **missed**", None: ""}[row.met.get(name)]
        said.append(_GOALS[name](goal) + met)
    return "; ".join(said) or "-"


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = [_COLUMNS, ("---", *("---:",) * (len(_COLUMNS) - 2), "---"), *rows]
    return "\n".join(f"| {' | '.join(_escape(cell) for cell in line)} |" for line in lines)


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
