"""A benchmark, its settings and its result, also as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

Size = Literal["tiny", "small", "full"]
"""Input sizes: for tests, for a quick run, and the paper's and COCO's."""


@dataclass(frozen=True, slots=True)
class Setting:
    """Settings of a stage: input size, device, and whether to run ours alone, without rivals."""

    size: Size
    device: torch.device
    alone: bool = False

    def pick(self, tiny: Any, small: Any, full: Any) -> Any:
        """Return the value for the size."""
        return {"tiny": tiny, "small": small, "full": full}[self.size]


@dataclass(frozen=True, slots=True)
class Rival:
    """Another implementation of the same computation.

    `compare` takes our output and the rival's and returns their difference as text; it raises
    AssertionError if that exceeds the tolerance.
    """

    name: str
    call: Callable[[], Any]
    compare: Callable[[Any, Any], str]


@dataclass(frozen=True, slots=True)
class Limit:
    """Lower bound of the time on this machine: `factor` times that of `call`, a plain operation."""

    name: str
    call: Callable[[], Any]
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A computation with everything it is compared to.

    Attributes:
        ours: runs ours once.
        rivals: other implementations; may be empty.
        limit: lower bound of the time on this machine; None: none is known.
        input_bytes: bytes of the logits, to which the peak memory is compared; None: not compared.
        seconds: reads the time from our output; None: the time of the call.
        note: implementation that ran.
        memory: whether to measure peak memory.
    """

    ours: Callable[[], Any]
    rivals: Sequence[Rival] = ()
    limit: Limit | None = None
    input_bytes: int | None = None
    seconds: Callable[[Any], float] | None = None
    note: str = ""
    memory: bool = True


@dataclass(frozen=True, slots=True)
class Case:
    """A benchmark that is set up when it runs.

    Its name is unique within the stage and the same at every size; `size` describes the input.
    `make` raises MissingExtraError if an extra is not installed.
    """

    name: str
    size: str
    make: Callable[[], Benchmark]


@dataclass(frozen=True, slots=True)
class Timing:
    """Median and quartiles over the rounds: of the seconds per call, or of their ratio."""

    median: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True, slots=True)
class Row:
    """Result of a benchmark against one rival; None: not measured.

    Attributes:
        stage: a name of :data:`retinanet.bench.STAGES`.
        case, size: of the case.
        rival: name of the rival; empty: none.
        ours, theirs: times; `ours` is None if it did not run, see `note` or `error`.
        first_call: seconds of our first call, which compiles and allocates.
        speedup: theirs / ours.
        limit: name of the machine's limit; empty: none.
        limit_fraction: the limit's time / ours, median over rounds; 1 is the limit.
        memory, rival_memory: peak memory of a call in bytes, above the memory before it.
        input_bytes: bytes of the logits.
        difference: difference of the two outputs.
        note: implementation that ran, or why the case was skipped.
        error: why the row failed; empty: it did not. A rival whose output differs is not timed.
    """

    stage: str
    case: str
    size: str
    rival: str = ""
    ours: Timing | None = None
    theirs: Timing | None = None
    speedup: Timing | None = None
    difference: str = ""
    first_call: float | None = None
    limit: str = ""
    limit_fraction: float | None = None
    memory: int | None = None
    rival_memory: int | None = None
    input_bytes: int | None = None
    note: str = ""
    error: str = ""


# --- text -----------------------------------------------------------------------------------------


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
