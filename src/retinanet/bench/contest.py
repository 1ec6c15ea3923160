"""What is measured, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

Size = Literal["tiny", "small", "full"]
"""Sizes of a stage: for tests, for a look, and those of the paper's training and of COCO."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How stages are to be set up.

    Attributes:
        size: how large.
        device: where networks, losses and post-processing run.
        vs: whom to compare with, names of :data:`retinanet.bench.rivals.RIVALS`.
    """

    size: Size
    device: torch.device
    vs: tuple[str, ...] = ("torchvision",)

    def pick(self, tiny: Any, small: Any, full: Any) -> Any:
        """The value that goes with the size."""
        return {"tiny": tiny, "small": small, "full": full}[self.size]


@dataclass(frozen=True, slots=True)
class Rival:
    """Another way to the same result.

    Attributes:
        name: whose it is, and how it is run where that is not plain.
        call: does it once.
        compare: takes our result and this one's, says how far apart they are, and raises
            AssertionError where that is too far.
        held: bytes that it keeps from call to call; None: not told.
    """

    name: str
    call: Callable[[], Any]
    compare: Callable[[Any, Any], str]
    held: Callable[[], int] | None = None


@dataclass(frozen=True, slots=True)
class Limit:
    """The least time that the machine itself needs: `factor` times that of `call`.

    Attributes:
        name: such as ``copy`` or ``matrix peak``.
        call: a plain operation that does nothing but reach that limit.
        factor: how many such operations the work amounts to.
    """

    name: str
    call: Callable[[], Any]
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Contest:
    """One piece of work, and all ways to do it that are compared.

    Attributes:
        ours: does it once.
        rivals: others' ways; none: ours alone is timed.
        limit: what the machine allows; None: there is no such plain figure.
        input_bytes: of the logits, that memory is compared with; None: it is not.
        seconds: takes a result and gives its seconds, where the clock around the call would count
            too much; None: that clock counts.
        note: what is worth knowing of how ours is done here.
        memory: whether memory means anything here.
        held: bytes that ours keeps from call to call; None: not told.
    """

    ours: Callable[[], Any]
    rivals: Sequence[Rival] = ()
    limit: Limit | None = None
    input_bytes: int | None = None
    seconds: Callable[[Any], float] | None = None
    note: str = ""
    memory: bool = True
    held: Callable[[], int] | None = None


@dataclass(frozen=True, slots=True)
class Case:
    """A contest that is set up when its turn comes.

    Attributes:
        way: its name within the stage: the same at every size.
        size: what is worked on.
        make: sets it up; MissingExtraError where ours needs a package that is not installed.
    """

    way: str
    size: str
    make: Callable[[], Contest]


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
    """What came of one contest with one rival.

    Attributes:
        stage: a name of :data:`retinanet.bench.STAGES`.
        way: which contest of the stage.
        size: what was worked on.
        rival: whom ours was compared with; empty: nobody.
        ours: how long ours took; None: it cannot run here, and `note` says why.
        theirs: how long the rival took.
        first: seconds of our first call, which sets things up (compiles, allocates).
        speedup: theirs / ours, the median over rounds.
        speedup_low, speedup_high: its quartiles.
        limit: what the machine's limit was taken to be; empty: none.
        share: the least possible time over ours: 1 is all that the machine can do.
        memory, rival_memory: bytes at the peak beyond those before the call; None: not measured.
        held, rival_held: bytes kept from call to call, which those leave out; None: not told.
        input_bytes: of the logits, where memory is judged by them.
        difference: how far the two outputs are apart.
        note: how ours was done, or why it was not.
        error: why the row failed; empty: it did not. A rival whose output differs is not timed.
        goals: figure by figure what it should reach (:mod:`retinanet.bench.goals`).
        met: figure by figure whether it does; only at full size.
    """

    stage: str
    way: str
    size: str
    rival: str = ""
    ours: Timing | None = None
    theirs: Timing | None = None
    first: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    limit: str = ""
    share: float | None = None
    memory: int | None = None
    rival_memory: int | None = None
    held: int | None = None
    rival_held: int | None = None
    input_bytes: int | None = None
    difference: str = ""
    note: str = ""
    error: str = ""
    goals: Mapping[str, float] = field(default_factory=dict)
    met: Mapping[str, bool] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """The row of :meth:`to_dict`."""
        given = dict(values)
        for name in ("ours", "theirs"):
            if given[name] is not None:
                given[name] = Timing(**given[name])
        return cls(**given)
