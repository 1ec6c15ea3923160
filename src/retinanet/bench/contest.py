"""What is measured, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds a call.

    Attributes:
        median: of all rounds.
        low, high: the quartiles.
        rounds: how many were measured.
    """

    median: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True, slots=True)
class Row:
    """One contest.

    Attributes:
        stage: a name of :data:`retinanet.bench.STAGES`.
        size: what was worked on.
        way: how ours did it (``float32``, ``bf16``, ...).
        rival: what ours was compared with; empty: it is not installed.
        ours, theirs: how long each took.
        speedup: theirs / ours, the median over rounds.
        speedup_low, speedup_high: its quartiles.
        memory, rival_memory: bytes at the peak beyond those before the call; None: not measured.
        difference: how far the two outputs are apart.
    """

    stage: str
    size: str
    way: str
    rival: str
    ours: Timing
    theirs: Timing | None
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None
    memory: int | None
    rival_memory: int | None
    difference: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Contest:
    """Two ways to one result.

    Attributes:
        size, way, rival: as in :class:`Row`.
        ours, theirs: a call of each; `theirs` is None where the rival is not installed.
        compare: takes both results, says how far apart they are, and raises
            :class:`RetinaNetError` where that is too far.
    """

    size: str
    way: str
    rival: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any] | None
    compare: Callable[[Any, Any], str]
