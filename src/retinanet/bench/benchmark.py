"""A benchmark, its settings and its result."""

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
