"""Numbers of a row as text, with units."""

from __future__ import annotations

from retinanet.bench.benchmark import Row


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
