"""Run benchmarks: compare the outputs, then time all sides in interleaved rounds.

Interleaving exposes all sides to the same changes of the machine's speed. Peak memory is measured
in a process of its own, with an allocator that returns freed memory to the system.
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
from pathlib import Path
from typing import Any

import torch

from retinanet.bench.benchmark import Benchmark, Case, Row, Setting, Size, Timing
from retinanet.bench.limits import clock
from retinanet.bench.stages import STAGES
from retinanet.config import check_choice
from retinanet.errors import MissingExtraError, RetinaNetError
from retinanet.model.precision import choose_device

_ROUNDS: Mapping[Size, int] = {"tiny": 3, "small": 7, "full": 15}
_SECONDS: Mapping[Size, float] = {"tiny": 1, "small": 5, "full": 40}
_MIN_ROUNDS = 3

# Warm-up calls of each side after its first: weights are packed when an image size comes again.
# A rival whose first call takes longer than _SLOW seconds gets none.
_WARM_UP = 2
_SLOW = 2.0

_OURS, _LIMIT = "", "limit"  # keys next to the rivals' names

# glibc keeps freed blocks below a threshold that grows; a fixed one returns large blocks.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def bench(
    stages: Iterable[str] = (),
    *,
    size: Size = "small",
    alone: bool = False,
    device: str = "auto",
    threads: int | None = None,
    rounds: int | None = None,
    seconds: float | None = None,
    memory: bool = True,
) -> Iterator[Row]:
    """Run stages and yield each row as soon as it is measured.

    A case that fails, or a rival whose output differs by more than the tolerance, yields a row
    with `error` set; the other cases still run.

    Args:
        stages: names of :data:`STAGES`; empty: all.
        size: ``small`` for a quick run, ``full`` for the paper's and COCO's sizes, ``tiny`` for
            tests.
        alone: without the rivals, torchvision and pycocotools.
        device: device of networks, losses and post-processing.
        threads: torch's threads; None: unchanged.
        rounds: maximum rounds per case; None: 7, or 15 at full size.
        seconds: time limit per case, with at least three rounds; None: 5, or 40 at full size.
        memory: measure peak memory too (each side is set up again in a process of its own).

    Raises:
        ConfigError: an unknown stage or device.
    """
    names = list(dict.fromkeys(stages)) or list(STAGES)
    for name in names:
        check_choice("stage", name, STAGES)
    setting = Setting(size, choose_device(device), alone)
    limits = rounds or _ROUNDS[size], _SECONDS[size] if seconds is None else seconds

    def run_stages() -> Iterator[Row]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        try:
            for stage in names:
                for case in STAGES[stage](setting):
                    try:
                        yield from _run(stage, case, setting, *limits, memory=memory)
                    except Exception as error:  # the other cases still run
                        yield Row(stage, case.name, case.size, error=_reason(error))
        finally:
            torch.set_num_threads(before)

    return run_stages()


def _run(
    stage: str, case: Case, setting: Setting, rounds: int, seconds: float, *, memory: bool
) -> list[Row]:
    """Run a case; return a row per rival, or a row without a rival."""
    row = Row(stage, case.name, case.size)
    try:
        benchmark = case.make()
    except MissingExtraError as error:
        return [replace(row, note=_reason(error))]
    if setting.alone:
        benchmark = replace(benchmark, rivals=())
    first_calls, differences, errors = _compare(benchmark, setting.device)
    failed = [replace(row, rival=name, error=error) for name, error in errors.items()]
    if failed and not differences:
        return failed  # no rival confirms our output: it is not timed
    rivals = [rival for rival in benchmark.rivals if rival.name in differences]
    benchmark = replace(benchmark, rivals=rivals)
    times = _measure(benchmark, first_calls, setting.device, rounds, seconds)
    peaks: dict[str, int | None] = {}
    if memory and benchmark.memory:
        peaks, memory_error = _peaks(stage, case.name, benchmark, setting)
        row = replace(row, error=memory_error)
    row = replace(
        row,
        ours=_timing(times[_OURS]),
        first_call=first_calls[_OURS],
        memory=peaks.get(_OURS),
        note=benchmark.note,
        input_bytes=benchmark.input_bytes,
    )
    if limit := benchmark.limit:
        fraction = statistics.median(limit.factor * x for x in _ratios(times[_LIMIT], times[_OURS]))
        row = replace(row, limit=limit.name, limit_fraction=fraction)
    rows = [
        replace(
            row,
            rival=name,
            theirs=_timing(times[name]),
            speedup=_timing(_ratios(times[name], times[_OURS])),
            difference=difference,
            rival_memory=peaks.get(name),
        )
        for name, difference in differences.items()
    ]
    return (rows or [row]) + failed


def _ratios(times: Sequence[float], of: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(times, of, strict=True)]


def _compare(
    benchmark: Benchmark, device: torch.device
) -> tuple[dict[str, float], dict[str, str], dict[str, str]]:
    """Call each side once and compare the outputs; rivals first, as ours may overwrite its input.

    Returns:
        seconds of each side's first call; each rival's difference; errors of the other rivals.
    """
    outputs: dict[str, Any] = {}
    first_calls, differences, errors = {}, {}, {}

    def call_once(name: str, call: Callable[[], Any]) -> None:
        first_calls[name] = clock(lambda: outputs.__setitem__(name, call()), device)

    for rival in benchmark.rivals:
        try:
            call_once(rival.name, rival.call)
        except Exception as error:  # ours and the other rivals are timed all the same
            errors[rival.name] = _reason(error)
    call_once(_OURS, benchmark.ours)
    for rival in benchmark.rivals:
        if rival.name in outputs:
            try:
                differences[rival.name] = rival.compare(outputs[_OURS], outputs[rival.name])
            except AssertionError as error:
                errors[rival.name] = f"ours and {rival.name} differ: {_reason(error)}"
    return first_calls, differences, errors


def _measure(
    benchmark: Benchmark,
    first_calls: Mapping[str, float],
    device: torch.device,
    rounds: int,
    seconds: float,
) -> dict[str, list[float]]:
    """Time ours, each rival and the limit in interleaved rounds; seconds of each round."""
    for rival in benchmark.rivals:
        _warm_up(rival.call, first_calls[rival.name])
    _warm_up(benchmark.ours)
    calls = _sides(benchmark)
    if benchmark.limit is not None:
        benchmark.limit.call()
        calls[_LIMIT] = benchmark.limit.call
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for done in range(rounds):
        if done >= _MIN_ROUNDS and time.perf_counter() >= end:
            break
        for name, call in calls.items():
            if name == _OURS and benchmark.seconds is not None:
                times[name].append(benchmark.seconds(call()))
            else:
                times[name].append(clock(call, device))
    return times


def _sides(benchmark: Benchmark) -> dict[str, Callable[[], Any]]:
    return {_OURS: benchmark.ours, **{rival.name: rival.call for rival in benchmark.rivals}}


def _warm_up(call: Callable[[], Any], first_call: float = 0.0) -> None:
    for _ in range(_WARM_UP if first_call <= _SLOW else 0):
        call()


def _timing(values: Sequence[float]) -> Timing:
    if len(values) == 1:
        return Timing(values[0], values[0], values[0], 1)
    low, median, high = statistics.quantiles(values, method="inclusive")
    return Timing(median, low, high, len(values))


def _reason(error: Exception) -> str:
    """Format an exception as one line; an unexpected one with its type."""
    text = " ".join(str(error).split()) or "no message"
    expected = isinstance(error, RetinaNetError | AssertionError)
    return text if expected else f"{type(error).__name__}: {text}"


def _peaks(
    stage: str, case: str, benchmark: Benchmark, setting: Setting
) -> tuple[dict[str, int | None], str]:
    """Measure each side's peak memory; return an error too, with which the times stay."""
    peaks: dict[str, int | None] = {}
    try:
        for name, call in _sides(benchmark).items():
            if setting.device.type == "cuda":  # torch counts it, so no process is needed
                peaks[name] = peak_of(call, setting.device)
            else:
                peaks[name] = peak_memory(stage, case, name, setting)
    except RetinaNetError as error:
        return peaks, _reason(error)
    return peaks, ""


def peak_memory(stage: str, case: str, rival: str, setting: Setting) -> int | None:
    """Measure the peak memory of one call, after a warm-up, in a process of its own.

    Args:
        stage, case: names.
        rival: name; empty: ours.
        setting: as for the times.

    Returns:
        bytes above the memory before the call: on a GPU torch's count, on Linux the resident
        memory, else None.

    Raises:
        RetinaNetError: the process failed.
    """
    code = "import sys; from retinanet.bench import run; run.print_peak_memory(sys.argv[1])"
    arguments = [stage, case, rival, torch.get_num_threads(), setting.size, str(setting.device)]
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **_ALLOCATOR},
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        side = rival or "ours"
        raise RetinaNetError(f"{stage}: cannot measure the memory of {side}: {last}")
    peak: int | None = json.loads(done.stdout.split()[-1])
    return peak


def print_peak_memory(arguments: str) -> None:
    """Measure in the process that :func:`peak_memory` starts."""
    stage, case, rival, threads, size, device = json.loads(arguments)
    torch.set_num_threads(threads)
    setting = Setting(size, torch.device(device))
    benchmark = next(c for c in STAGES[stage](setting) if c.name == case).make()
    call = _sides(benchmark)[rival]
    first_call = clock(call, setting.device)
    _warm_up(call, first_call if rival else 0.0)
    gc.collect()
    sys.stdout.write(f"{json.dumps(peak_of(call, setting.device))}\n")


def peak_of(call: Callable[[], Any], device: torch.device) -> int | None:
    """Peak memory of a call in bytes, above the memory before it; None if it cannot be read."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    reset.write_text("5")  # reset the peak to the current resident memory, see proc(5)
    before = _kilobytes("VmRSS")
    call()
    return 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])
