"""Benchmarks: compared outputs, interleaved rounds, reported results."""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from retinanet.bench import (
    STAGES,
    Benchmark,
    Case,
    Limit,
    Rival,
    Row,
    Setting,
    Timing,
    bench,
    describe_machine,
    limits,
    peak_memory,
    run,
)
from retinanet.bench.benchmark import megabytes, seconds
from retinanet.bench.machine import describe_kernel
from retinanet.bench.stages.networks import compare_outputs
from retinanet.errors import ConfigError, MissingExtraError, RetinaNetError
from retinanet.kernels import native
from retinanet.structures import Outputs, flatten_levels

CPU = torch.device("cpu")
TINY = Setting("tiny", CPU)
# Cases that run here, of stages with slow ones: networks are large, and each process imports torch.
FAST_CASES = {
    "class-loss": ["heads' layout, 2 images", "overwriting, 2 images", "bf16, 2 images"],
    "matching": ["100 objects, 8 images"],
    "postprocess": ["8 images", "no candidates"],
    "startup": ["retinanet --help"],
    "inference": ["auto", "MobileNetV2", "EfficientNet-Lite2"],
    "detect": ["float32"],
    "train-step": ["ResNet-18 float32", "MobileNetV2 float32"],
}
WITHOUT_RIVAL = {"startup"}


def toy(
    ours: Callable[[], Any],
    theirs: Callable[[], Any] | None = None,
    compare: Callable[[Any, Any], str] = lambda *_: "",
    **options: Any,
) -> dict[str, Any]:
    rivals = [] if theirs is None else [Rival("other", theirs, compare)]
    return {"toy": lambda _: [Case("plain", "1 toy", lambda: Benchmark(ours, rivals, **options))]}


def rows_of(monkeypatch: pytest.MonkeyPatch, stages: Any, **options: Any) -> list[Row]:
    """Run made-up stages without measuring memory."""
    monkeypatch.setattr(run, "STAGES", stages)
    return list(bench(list(stages), device="cpu", **{"memory": False, "rounds": 3, **options}))


@pytest.mark.parametrize("stage", STAGES)
def test_stage_tiny_input_outputs_of_ours_and_rival_agree(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = STAGES[stage](TINY)
    kept = [case for case in cases if case.name in FAST_CASES.get(stage, [case.name])]
    monkeypatch.setitem(run.STAGES, stage, lambda _: kept)
    rows = list(bench([stage], size="tiny", rounds=1, memory=False, device="cpu"))
    assert [row.case for row in rows] == [case.name for case in kept]
    for row in rows:
        assert row.error == ""
        assert row.stage == stage
        assert row.ours is not None
        assert row.ours.rounds == 1
        assert row.ours.median > 0
        assert (row.rival == "") == (stage in WITHOUT_RIVAL)
        assert (row.theirs is None) == (row.speedup is None) == (row.rival == "")
        assert (row.limit_fraction is None) == (row.limit == "")


@pytest.mark.parametrize("stage", STAGES)
def test_stage_case_names_are_the_same_at_every_size(stage: str) -> None:
    names = [
        [case.name for case in STAGES[stage](Setting(size, CPU))]  # type: ignore[arg-type]
        for size in ("tiny", "small", "full")
    ]
    assert len(set(names[0])) == len(names[0])
    assert names[0] == names[1]
    # Compiling takes half a minute.
    assert names[0] == [name for name in names[2] if name != "compile"]


def test_bench_interleaved_rounds_quartiles_speedup_and_limit_fraction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    # Their first call takes 2 and ours 9; the time limit; then start and stop of each call.
    clock = iter([0, 2, 0, 9, 9, *turns([1, 2, 0.5], [2, 6, 1], [3, 6, 0.75])])
    monkeypatch.setattr(limits.time, "perf_counter", lambda: next(clock))
    stages = toy(
        lambda: calls.append("ours") or 1,  # type: ignore[func-returns-value]
        lambda: calls.append("theirs") or 2,  # type: ignore[func-returns-value]
        lambda got, expected: f"{got} and {expected}",
        limit=Limit("copy", lambda: calls.append("limit"), factor=0.5),
    )
    (row,) = rows_of(monkeypatch, stages)
    # The rival first, as ours may overwrite its input; warm-up; interleaved rounds.
    warm = ["theirs", "ours", *["theirs"] * 2, *["ours"] * 2, "limit"]
    assert calls == [*warm, *["ours", "theirs", "limit"] * 3]
    # Ours took 1, 2, 3 seconds, theirs 2, 6, 6: ratios 2, 3, 2.
    assert row.ours == Timing(2, 1.5, 2.5, 3)
    assert row.theirs == Timing(6, 4, 6, 3)
    assert row.speedup == Timing(2, 2, 2.5, 3)
    # Half of .5, 1 and .75 over ours: .25, .25 and .125.
    assert (row.limit, row.limit_fraction) == ("copy", 0.25)
    assert row.first_call == 9
    assert row.difference == "1 and 2"


@pytest.mark.parametrize("side", ["ours", "other"])
def test_print_peak_memory_each_side_is_warmed_up(
    side: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []
    stages = toy(lambda: calls.append("ours"), lambda: calls.append("other"))
    monkeypatch.setattr(run, "STAGES", stages)
    monkeypatch.setattr(run, "peak_of", lambda call, device: calls.append("peak") or 7)
    rival = "" if side == "ours" else side
    threads = torch.get_num_threads()
    run.print_peak_memory(json.dumps(["toy", "plain", rival, threads, "tiny", "cpu"]))
    assert calls == [side, side, side, "peak"]
    assert capsys.readouterr().out == "7\n"


def turns(*rounds: Sequence[float]) -> list[float]:
    """Start and stop of calls of these lengths, one after the other."""
    now, ends = 0.0, []
    for length in (length for of_round in rounds for length in of_round):
        ends += [now, now + length]
        now += length
    return ends


def test_bench_seconds_are_read_from_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = rows_of(monkeypatch, toy(lambda: "0.25", seconds=float))
    assert row.ours == Timing(0.25, 0.25, 0.25, 3)


def test_bench_time_limit_still_runs_three_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = rows_of(monkeypatch, toy(lambda: 1, lambda: 1), rounds=100, seconds=0)
    assert row.ours is not None
    assert row.ours.rounds == 3


def test_bench_threads_are_restored_after_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    seen: list[int] = []
    stages = toy(lambda: seen.append(torch.get_num_threads()))
    rows_of(monkeypatch, stages, threads=before + 1, rounds=1)
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


def equal(got: int, expected: int) -> str:
    if got != expected:
        raise AssertionError(f"{got}\nis not {expected}")
    return "equal"


def crash() -> Any:
    raise RuntimeError("out\nof memory")


def test_bench_outputs_differ_row_fails_and_the_rest_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ours: list[int] = []
    wrong = [Rival("other", lambda: 2, equal)]
    two = [Rival("other", lambda: 2, equal), Rival("crashing", crash, equal),
           Rival("right", lambda: 1, equal)]  # fmt: skip
    cases = [
        Case("wrong", "1", lambda: Benchmark(lambda: ours.append(1) or 1, wrong)),  # type: ignore[func-returns-value]
        Case("two wrong", "1", lambda: Benchmark(lambda: 1, two)),
        Case("no setup", "1", crash),
        Case("ours crashes", "1", lambda: Benchmark(crash, [])),
        Case("right", "1", lambda: Benchmark(lambda: 1, [Rival("right", lambda: 1, equal)])),
    ]
    rows = rows_of(monkeypatch, {"toy": lambda _: cases})
    differ = "ours and other differ: 1 is not 2"
    assert [(row.case, row.rival, row.error) for row in rows] == [
        ("wrong", "other", differ),
        ("two wrong", "right", ""),
        ("two wrong", "crashing", "RuntimeError: out of memory"),
        ("two wrong", "other", differ),
        ("no setup", "", "RuntimeError: out of memory"),
        ("ours crashes", "", "RuntimeError: out of memory"),
        ("right", "right", ""),
    ]
    assert ours == [1]  # an output that nothing confirms is not timed
    assert [row.ours is None for row in rows] == [bool(row.error) for row in rows]


def test_bench_memory_process_fails_times_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(stage: str, case: str, rival: str, setting: Setting) -> int:
        if rival:
            raise RetinaNetError("toy: measuring the memory of other failed: killed")
        return 7

    monkeypatch.setattr(run, "peak_memory", fail)
    (row,) = rows_of(monkeypatch, toy(lambda: 1, lambda: 1), memory=True)
    assert (row.memory, row.rival_memory) == (7, None)
    assert row.error == "toy: measuring the memory of other failed: killed"
    assert row.speedup is not None


def test_bench_missing_extra_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Benchmark:
        raise MissingExtraError("openvino", "openvino")

    (row,) = rows_of(monkeypatch, {"toy": lambda _: [Case("int8", "1 toy", make)]})
    assert (row.ours, row.error) == (None, "")
    assert row.note.startswith("openvino is not installed")


def test_bench_unknown_stage_is_rejected_before_running() -> None:
    with pytest.raises(ConfigError, match=r"stage 'clas-loss' .* did you mean class-loss"):
        bench(["clas-loss"])


def test_compare_outputs_checks_logits_and_deltas_of_every_batch() -> None:
    got = [
        Outputs((torch.randn(1, 27, 2, width),), (torch.randn(1, 36, 2, width),))
        for width in (3, 4)
    ]
    same = [(flatten_levels(x.logits, 3), flatten_levels(x.deltas, 4)) for x in got]
    assert compare_outputs(got, same, 3, 0.0) == "logits 0e+00, deltas 0e+00 rms"
    for name, index in (("logits", 0), ("deltas", 1)):
        changed = [list(x) for x in same]
        changed[1][index] = changed[1][index] * 1.5
        with pytest.raises(AssertionError, match=rf"relative rms .* of the {name}"):
            compare_outputs(got, [(a, b) for a, b in changed], 3, 0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_peak_memory_of_the_class_loss_is_its_gradient() -> None:
    setting = Setting("small", CPU)
    peak = peak_memory("class-loss", "heads' layout, 2 images", "", setting)
    logits = 15_354 * 80 * 2 * 4
    assert peak is not None
    assert 0.5 * logits < peak < 4 * logits  # in-process it would be 0: the memory is there already


def test_data_stage_deletes_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (case,) = STAGES["data"](TINY)
    benchmark = case.make()
    benchmark.ours()
    assert len(list(tmp_path.iterdir())) == 1
    del benchmark
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_limits_values_by_hand() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    (copied,) = limits.copy_limit([x]).call()
    assert torch.equal(copied, x)
    assert copied.data_ptr() != x.data_ptr()
    # torch's sum or maximum, whichever was faster.
    assert limits.read_limit([x.t()]).call() in ([15], [5])
    # A 3x3 convolution of 256 channels over 4 x 5 takes 2 x 9 x 256 x 256 x 20 operations.
    limit = limits.matrix_limit(2.0 * 9 * 256 * 256 * 20 * 3, 4, 5, 1, torch.float32, CPU)
    assert limit.factor == 3
    limit.call()
    # (2, 3) times (3, 4): 2 x 2 x 3 x 4.
    assert limits.count_flops(lambda: torch.ones(2, 3) @ torch.ones(3, 4)) == 48


def test_fastest_returns_the_smallest_median(monkeypatch: pytest.MonkeyPatch) -> None:
    # Five rounds: the first call takes 2 seconds, the second 1.
    clock = iter(turns(*[[2, 1]] * 5))
    monkeypatch.setattr(limits.time, "perf_counter", lambda: next(clock))
    slow, fast = (lambda: "slow"), (lambda: "fast")
    assert limits.fastest([slow, fast]) is fast


def test_describe_machine_lines() -> None:
    machine = describe_machine(CPU)
    assert machine.threads == torch.get_num_threads()
    assert torch.__version__.startswith(machine.versions["torch"])
    text = "\n".join(machine.lines())
    assert all(part in text for part in (machine.processor, machine.kernel, machine.instructions))
    json.dumps(asdict(machine))


def test_describe_kernel_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "description", lambda: "avx2, 4 threads")
    monkeypatch.setattr(native, "available", lambda: True)
    assert describe_kernel(CPU) == ("class loss and post-processing: avx2, 4 threads", True)
    monkeypatch.setattr(native, "available", lambda: False)
    assert describe_kernel(CPU)[1] is False
    assert describe_kernel(torch.device("mps")) == ("class loss and matching: pure torch", False)


def test_seconds_and_megabytes_three_digits() -> None:
    times = [seconds(x) for x in (12.34, 1.234, 0.1234, 0.00999, 1e-6)]
    assert times == ["12.3 s", "1.23 s", "123 ms", "9.99 ms", "1.00 us"]
    memory = [megabytes(x) for x in (None, 0, 100_000, 2_500_000_000)]
    assert memory == ["-", "0", "0.1", "2,500"]
