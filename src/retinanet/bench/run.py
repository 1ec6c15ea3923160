"""How long each part takes beside the one that people would use otherwise, on this machine.

The two sides of a contest get the same input, their outputs are compared before a clock runs, and
they take turns, so that a machine that slows down does so for both. Memory is measured in a process
of its own, with an allocator that gives freed memory back.
"""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from retinanet.bench.contest import Contest, Row, Timing
from retinanet.bench.stages import STAGES
from retinanet.config import nearest
from retinanet.detect.inference import choose_device
from retinanet.errors import ConfigError, RetinaNetError


def bench(
    stages: Iterable[str] = (),
    *,
    full: bool = False,
    device: str = "auto",
    rounds: int | None = None,
    seconds: float | None = None,
    memory: bool = True,
) -> Iterator[Row]:
    """Measure, and give each contest's result as soon as it is there.

    Args:
        stages: names of :data:`STAGES`; none: all of them.
        full: the sizes of the paper's training and of COCO (minutes) instead of small ones.
        device: where networks, losses and post-processing run.
        rounds: at the most, a contest; None: 7, or 15 where `full`.
        seconds: after which a contest ends, though not before its third round; None: 10, or 60.
        memory: measure memory too (every contest is set up twice more, in processes of their own).

    Raises:
        ConfigError: an unknown stage or device.
        RetinaNetError: outputs differ by more than rounding.
    """
    names = list(dict.fromkeys(stages)) or list(STAGES)
    for name in names:
        if name not in STAGES:
            raise ConfigError(
                f"there is no stage {name!r} to time: {', '.join(STAGES)}{nearest(name, STAGES)}"
            )
    where = choose_device(device)
    return _bench(
        names, full, where, rounds or (15 if full else 7), seconds or (60 if full else 10), memory
    )


def _bench(
    names: list[str], full: bool, device: torch.device, rounds: int, seconds: float, memory: bool
) -> Iterator[Row]:
    for stage in names:
        for place, contest in enumerate(STAGES[stage](full, device)):
            ours, theirs, difference = _measure(contest, stage, device, rounds, seconds)
            ratios = [b / a for a, b in zip(ours, theirs, strict=False)]
            low, middle, high = _quartiles(ratios) if ratios else (None, None, None)
            peaks = [
                peak_memory(stage, place, side, full=full, device=device)
                if memory and (side == "ours" or theirs)
                else None
                for side in ("ours", "theirs")
            ]
            yield Row(
                stage=stage,
                size=contest.size,
                way=contest.way,
                rival=contest.rival if theirs else "",
                ours=_timing(ours),
                theirs=_timing(theirs) if theirs else None,
                speedup=middle,
                speedup_low=low,
                speedup_high=high,
                memory=peaks[0],
                rival_memory=peaks[1],
                difference=difference,
            )


def _measure(
    contest: Contest, stage: str, device: torch.device, rounds: int, seconds: float
) -> tuple[list[float], list[float], str]:
    """Seconds of each round of ours and of theirs, taken in turns, after the results agreed."""
    expected = contest.theirs() if contest.theirs is not None else None
    got = contest.ours()
    try:
        difference = "" if expected is None else contest.compare(got, expected)
    except AssertionError as error:
        reason = " ".join(str(error).split())
        raise RetinaNetError(f"{stage}: ours and {contest.rival} differ: {reason}") from None
    del expected, got
    ours: list[float] = []
    theirs: list[float] = []
    end = time.perf_counter() + seconds
    while len(ours) < rounds and (len(ours) < 3 or time.perf_counter() < end):
        ours.append(_clock(contest.ours, device))
        if contest.theirs is not None:
            theirs.append(_clock(contest.theirs, device))
    return ours, theirs, difference


def _clock(call: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device.type).synchronize()


def _timing(seconds: list[float]) -> Timing:
    low, median, high = _quartiles(seconds)
    return Timing(median, low, high, len(seconds))


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, _, high = statistics.quantiles(values, method="inclusive")
    return low, statistics.median(values), high


def peak_memory(
    stage: str, place: int, side: str, *, full: bool, device: torch.device
) -> int | None:
    """Bytes that one call needs at its peak beyond those that are held before it.

    The call is made twice in a fresh process and the second is measured: the first pays for what is
    set up once. On a GPU this is torch's count, on Linux the resident memory, elsewhere None.

    Args:
        stage: a name of :data:`STAGES`.
        place: of the contest in its stage.
        side: ``ours`` or ``theirs``.
        full, device: as in :func:`bench`.
    """
    code = "import sys; from retinanet.bench import run; run.tell_memory(*sys.argv[1:])"
    arguments = [stage, str(place), side, str(int(full)), str(device), str(torch.get_num_threads())]
    # glibc keeps freed blocks under a threshold that grows by itself; fixed, large ones go back.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it died"])[-1]
        raise RetinaNetError(f"{stage}: measuring the memory of {side} failed: {last}")
    told = done.stdout.split()[-1]
    return None if told == "None" else int(told)


def tell_memory(stage: str, place: str, side: str, full: str, device: str, threads: str) -> None:
    """The other end of :func:`peak_memory`."""
    torch.set_num_threads(int(threads))
    where = torch.device(device)
    contest = STAGES[stage](full == "1", where)[int(place)]
    call = getattr(contest, side)
    call()
    gc.collect()
    sys.stdout.write(f"{_peak_of(call, where)}\n")


def _peak_of(call: Callable[[], Any], device: torch.device) -> int | None:
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    reset.write_text("5")  # the peak starts again from what is held now (proc(5))
    before = _kilobytes(status, "VmRSS")
    call()
    return 1024 * (_kilobytes(status, "VmHWM") - before)


def _kilobytes(status: Path, field: str) -> int:
    line = next(one for one in status.read_text().splitlines() if one.startswith(field))
    return int(line.split()[1])
