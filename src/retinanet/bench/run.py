"""Contests held and measured.

All sides of a contest get the same input, their outputs are compared before a clock runs, and they
take turns with each other and with the machine's limit, so that a machine that slows down does so
for all. Memory is measured in a process of its own, with an allocator that gives freed memory back.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from retinanet.bench.contest import Case, Contest, Rival, Row, Setting, Size, Timing
from retinanet.bench.goals import goals_of, judge
from retinanet.bench.limits import clock
from retinanet.bench.machine import describe_kernel
from retinanet.bench.rivals import choose_rivals
from retinanet.bench.stages import STAGES
from retinanet.config import nearest
from retinanet.errors import ConfigError, MissingExtraError, RetinaNetError
from retinanet.model.precision import choose_device, choose_dtype

_ROUNDS: dict[Size, int] = {"tiny": 3, "small": 7, "full": 15}
_SECONDS: dict[Size, float] = {"tiny": 1, "small": 5, "full": 40}
_LEAST_ROUNDS = 3

# Calls of each side after its first and before any that counts: a size of image that comes again
# has the network's weights arranged for it. A rival whose first call took long gets none of them.
_WARM = 2
_LONG = 2.0


def bench(
    stages: Iterable[str] = (),
    *,
    size: Size = "small",
    vs: Iterable[str] = ("torchvision",),
    device: str = "auto",
    threads: int | None = None,
    rounds: int | None = None,
    seconds: float | None = None,
    memory: bool = True,
) -> Iterator[Row]:
    """Measure, and give each row as soon as it is there.

    Args:
        stages: names of :data:`STAGES`; none: all of them.
        size: ``small`` for a look, ``full`` for the sizes of the paper's training and of COCO,
            ``tiny`` for tests.
        vs: whom to compare with: names of :data:`retinanet.bench.rivals.RIVALS`, or ``none``.
        device: where networks, losses and post-processing run.
        threads: that torch computes with; None: as it is set.
        rounds: at the most, a contest; None: 7, or 15 at full size.
        seconds: after which a contest ends, though not before its third round; None: 5, or 40.
        memory: measure memory too (every contest is set up again for each side, in processes of
            their own).

    Raises:
        ConfigError: an unknown stage, rival or device, or a rival that is not installed.
        RetinaNetError: outputs differ by more than the stage allows.
    """
    names = list(dict.fromkeys(stages)) or list(STAGES)
    for name in names:
        if name not in STAGES:
            raise ConfigError(
                f"there is no stage {name!r} to time: {', '.join(STAGES)}{nearest(name, STAGES)}"
            )
    setting = Setting(size, choose_device(device), choose_rivals(vs))
    return _with_threads(
        threads,
        _bench(
            names,
            setting,
            _ROUNDS[size] if rounds is None else rounds,
            _SECONDS[size] if seconds is None else seconds,
            memory,
        ),
    )


def _with_threads(threads: int | None, rows: Iterator[Row]) -> Iterator[Row]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield from rows
    finally:
        torch.set_num_threads(before)


def _bench(
    names: Sequence[str], setting: Setting, rounds: int, seconds: float, memory: bool
) -> Iterator[Row]:
    for stage in names:
        for case in STAGES[stage](setting):
            for row in hold(stage, case, setting, rounds=rounds, seconds=seconds, memory=memory):
                yield _judged(row, setting)


def _judged(row: Row, setting: Setting) -> Row:
    goals = goals_of(
        row.stage,
        row.way,
        on_gpu=setting.device.type == "cuda",
        rival=row.rival,
        native=describe_kernel(setting.device)[1],
        bf16=choose_dtype("auto", setting.device) == torch.bfloat16,
    )
    row = replace(row, goals=goals)
    return replace(row, met=judge(row)) if setting.size == "full" else row


def hold(
    stage: str, case: Case, setting: Setting, *, rounds: int, seconds: float, memory: bool
) -> list[Row]:
    """One contest: a row a rival, or one row where there is none.

    Args:
        stage: its name, for the rows and for what goes wrong.
        case: of that stage.
        setting, rounds, seconds, memory: as in :func:`bench`.

    Raises:
        RetinaNetError: outputs differ by more than the stage allows.
    """
    row = Row(stage, case.way, case.size)
    try:
        contest = case.make()
    except MissingExtraError as error:
        return [replace(row, note=" ".join(str(error).split()))]
    firsts, differences = _agree(contest, stage, setting.device)
    times = _measure(contest, firsts, setting.device, rounds, seconds)
    ours = times[_OURS]
    row = replace(row, ours=_timing(ours), first=firsts[_OURS], note=contest.note)
    if contest.limit is not None:
        least = [contest.limit.factor * one for one in times[_LIMIT]]
        share = statistics.median(a / b for a, b in zip(least, ours, strict=True))
        row = replace(row, limit=contest.limit.name, share=share)
    names = [rival.name for rival in contest.rivals]
    row = replace(row, input_bytes=contest.input_bytes, held=_told(contest.held))
    rivals_held = {rival.name: _told(rival.held) for rival in contest.rivals}
    wanted = memory and contest.memory
    del contest  # its tensors, before others' processes want memory
    gc.collect()
    if wanted:
        row = replace(row, memory=peak_memory(stage, case.way, "", setting))
    rows = []
    for name in names:
        low, middle, high = _quartiles([b / a for a, b in zip(ours, times[name], strict=True)])
        rows.append(
            replace(
                row,
                rival=name,
                theirs=_timing(times[name]),
                speedup=middle,
                speedup_low=low,
                speedup_high=high,
                difference=differences[name],
                rival_held=rivals_held[name],
                rival_memory=peak_memory(stage, case.way, name, setting) if wanted else None,
            )
        )
    return rows or [row]


_OURS, _LIMIT = "", "the limit"  # keys beside the rivals' names


def _told(held: Callable[[], int] | None) -> int | None:
    return None if held is None else held()


def _agree(
    contest: Contest, stage: str, device: torch.device
) -> tuple[dict[str, float], dict[str, str]]:
    """Seconds of the first call of each side, and by rival how far its result is from ours.

    The rivals go first: ours may write over what it is given.
    """
    calls = {**{rival.name: rival.call for rival in contest.rivals}, _OURS: contest.ours}
    results: dict[str, Any] = {}
    firsts = {}
    for name, call in calls.items():
        firsts[name] = clock(partial(_keep, results, name, call), device)
    differences = {}
    for rival in contest.rivals:
        try:
            differences[rival.name] = rival.compare(results[_OURS], results[rival.name])
        except AssertionError as error:
            reason = " ".join(str(error).split())
            raise RetinaNetError(f"{stage}: ours and {rival.name} differ: {reason}") from None
    return firsts, differences


def _keep(results: dict[str, Any], name: str, call: Callable[[], Any]) -> None:
    results[name] = call()


def _warm(call: Callable[[], Any], first: float = 0.0) -> None:
    """Again after the first call, unless that took so long that nobody would wait for more."""
    for _ in range(_WARM if first <= _LONG else 0):
        call()


def _measure(
    contest: Contest,
    firsts: Mapping[str, float],
    device: torch.device,
    rounds: int,
    seconds: float,
) -> dict[str, list[float]]:
    """Seconds of each round of ours, of each rival's and of the limit, taken in turns."""
    for rival in contest.rivals:
        _warm(rival.call, firsts[rival.name])
    _warm(contest.ours)
    turns: dict[str, Callable[[], float]] = {_OURS: _turn(contest, device)}
    for rival in contest.rivals:
        turns[rival.name] = _plain_turn(rival, device)
    if contest.limit is not None:
        limit = contest.limit.call
        limit()
        turns[_LIMIT] = lambda: clock(limit, device)
    times: dict[str, list[float]] = {name: [] for name in turns}
    end = time.perf_counter() + seconds
    done = 0
    while done < rounds and (done < _LEAST_ROUNDS or time.perf_counter() < end):
        for name, turn in turns.items():
            times[name].append(turn())
        done += 1
    return times


def _turn(contest: Contest, device: torch.device) -> Callable[[], float]:
    if contest.seconds is None:
        return lambda: clock(contest.ours, device)
    told = contest.seconds
    return lambda: told(contest.ours())


def _plain_turn(rival: Rival, device: torch.device) -> Callable[[], float]:
    return lambda: clock(rival.call, device)


def _timing(seconds: list[float]) -> Timing:
    low, median, high = _quartiles(seconds)
    return Timing(median, low, high, len(seconds))


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, _, high = statistics.quantiles(values, method="inclusive")
    return low, statistics.median(values), high


def peak_memory(stage: str, way: str, rival: str, setting: Setting) -> int | None:
    """Bytes that one call needs at its peak beyond those that are held before it.

    The call is made in a fresh process, is warmed there as before a clock, and then measured: the
    first pays for what is set up once. On a GPU this is torch's count, on Linux the resident
    memory, elsewhere None.

    Args:
        stage: a name of :data:`STAGES`.
        way: of the case in it.
        rival: whose call; empty: ours.
        setting: as the case was made with.

    Raises:
        RetinaNetError: the process failed.
    """
    code = "import sys; from retinanet.bench import run; run.tell_memory(sys.argv[1])"
    asked = {
        "stage": stage,
        "way": way,
        "rival": rival,
        "size": setting.size,
        "device": str(setting.device),
        "vs": setting.vs,
        "threads": torch.get_num_threads(),
    }
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(asked)],
        capture_output=True,
        text=True,
        env={**os.environ, **ALLOCATOR},
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it died"])[-1]
        side = rival or "ours"
        raise RetinaNetError(f"{stage}: measuring the memory of {side} failed: {last}")
    told = done.stdout.split()[-1]
    return None if told == "None" else int(told)


# glibc keeps freed blocks under a threshold that grows by itself; fixed, large ones go back.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
"""Environment of a process whose memory is measured."""


def tell_memory(asked: str) -> None:
    """The other end of :func:`peak_memory`."""
    given = json.loads(asked)
    torch.set_num_threads(given["threads"])
    setting = Setting(given["size"], torch.device(given["device"]), tuple(given["vs"]))
    case = next(one for one in STAGES[given["stage"]](setting) if one.way == given["way"])
    contest = case.make()
    if given["rival"]:
        call = next(one.call for one in contest.rivals if one.name == given["rival"])
        _warm(call, clock(call, setting.device))
    else:
        call = contest.ours
        call()
        _warm(call)
    gc.collect()
    sys.stdout.write(f"{peak_of(call, setting.device)}\n")


def peak_of(call: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes at the peak of a call beyond those before it; None where that cannot be asked."""
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
