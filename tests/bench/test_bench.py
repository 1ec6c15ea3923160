"""That the sides of every contest agree, take turns, and are reported as they were measured."""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from retinanet import native
from retinanet.bench import (
    GOALS,
    GPU_GOALS,
    STAGES,
    Case,
    Contest,
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
from retinanet.bench.goals import goals_of, judge
from retinanet.bench.machine import describe_kernel
from retinanet.bench.markdown import megabytes, seconds, to_markdown
from retinanet.bench.rivals import RIVALS, choose_rivals, installed
from retinanet.bench.samples import held_bytes
from retinanet.bench.stages.networks import compare_outputs
from retinanet.errors import ConfigError, MissingExtraError, RetinaNetError
from retinanet.structures import Outputs, flatten_levels

CPU = torch.device("cpu")
TINY = Setting("tiny", CPU, ("torchvision", "pycocotools"))
# What takes long in small too is left out: each import of torch takes seconds, and quantising ten.
KEPT = {
    "startup": ["retinanet --help"],
    "inference": ["float32", "auto", "auto, four sizes in turn"],
    "train-step": ["ResNet-50 float32", "ResNet-18 bf16"],
}


def toy(
    ours: Callable[[], Any],
    theirs: Callable[[], Any] | None = None,
    compare: Callable[[Any, Any], str] = lambda *_: "",
    **options: Any,
) -> dict[str, Any]:
    rivals = [] if theirs is None else [Rival("other", theirs, compare)]
    return {"toy": lambda _: [Case("plain", "1 toy", lambda: Contest(ours, rivals, **options))]}


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("stage", STAGES)
def test_ours_and_theirs_agree(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = STAGES[stage](TINY)
    kept = [one for one in cases if one.way in KEPT.get(stage, [one.way])]
    monkeypatch.setitem(run.STAGES, stage, lambda _: kept)
    rows = list(bench([stage], size="tiny", rounds=1, memory=False, device="cpu"))
    assert [row.way for row in rows] == [case.way for case in kept]
    rival = next((name for name, one in RIVALS.items() if stage in one.stages), "")
    for row in rows:
        assert row.stage == stage
        assert json.loads(json.dumps(row.to_dict()))["way"] == row.way
        assert Row.from_dict(json.loads(json.dumps(row.to_dict()))) == row
        assert row.ours is not None
        assert row.ours.rounds == 1
        assert row.ours.median > 0
        assert row.rival == rival
        assert (row.theirs is None) == (row.speedup is None) == (row.rival == "")
        assert (row.share is None) == (row.limit == "")


@pytest.mark.parametrize("stage", STAGES)
def test_ways_have_the_same_names_at_every_size(stage: str) -> None:
    names = [
        [case.way for case in STAGES[stage](Setting(size, CPU))]  # type: ignore[arg-type]
        for size in ("tiny", "small", "full")
    ]
    assert len(set(names[0])) == len(names[0])
    assert names[0] == names[1]
    # The compiler takes half a minute for its first image: only where time was asked for.
    assert names[0] == [name for name in names[2] if name != "compile"]


def test_turns_quartiles_ratio_and_share(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    # Their first call takes 2 and ours 9; when to end; then of each round's three turns start and
    # stop.
    clock = iter([0, 2, 0, 9, 9, *turns([1, 2, 0.5], [2, 6, 1], [3, 6, 0.75])])
    monkeypatch.setattr(limits.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(
        run,
        "STAGES",
        toy(
            lambda: calls.append("ours") or 1,  # type: ignore[func-returns-value]
            lambda: calls.append("theirs") or 2,  # type: ignore[func-returns-value]
            lambda got, expected: f"{got} and {expected}",
            limit=Limit("copy", lambda: calls.append("limit"), factor=0.5),
        ),
    )
    (row,) = bench(["toy"], rounds=3, memory=False, device="cpu")
    # The rival first, as ours may write over what it is given; each is warmed; then in turns.
    warm = ["theirs", "ours", *["theirs"] * 2, *["ours"] * 2, "limit"]
    assert calls == [*warm, *["ours", "theirs", "limit"] * 3]
    # Ours took 1, 2, 3 seconds, theirs 2, 6, 6: ratios 2, 3, 2.
    assert row.ours == Timing(2, 1.5, 2.5, 3)
    assert row.theirs == Timing(6, 4, 6, 3)
    assert (row.speedup_low, row.speedup, row.speedup_high) == (2, 2, 2.5)
    # Half of .5, 1 and .75 over ours: .25, .25 and .125.
    assert (row.limit, row.share) == ("copy", 0.25)
    assert row.first == 9
    assert row.difference == "1 and 2"


def test_a_rival_that_takes_long_is_warmed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    # Ours takes as long, which may be its compiler: it is warmed all the same.
    clock = iter([0, 2.1, 0, 2.1, 0, *turns([1, 1])])
    monkeypatch.setattr(limits.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(
        run, "STAGES", toy(lambda: calls.append("ours"), lambda: calls.append("theirs"))
    )
    list(bench(["toy"], rounds=1, memory=False, device="cpu"))
    assert calls == ["theirs", *["ours"] * 3, "ours", "theirs"]


@pytest.mark.parametrize("side", ["ours", "other"])
def test_each_side_is_warm_where_memory_is_told(
    side: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[str] = []
    stages = toy(lambda: calls.append("ours"), lambda: calls.append("other"))
    monkeypatch.setattr(run, "STAGES", stages)
    monkeypatch.setattr(run, "peak_of", lambda call, device: calls.append("peak") or 7)
    asked = {"stage": "toy", "way": "plain", "rival": "" if side == "ours" else side}
    asked |= {"size": "tiny", "device": "cpu"}
    run.tell_memory(json.dumps({**asked, "vs": [], "threads": torch.get_num_threads()}))
    assert calls == [side, side, side, "peak"]
    assert capsys.readouterr().out == "7\n"


def test_what_is_held_is_asked_after_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    rivals = [Rival("told", lambda: 1, lambda *_: "", lambda: 5), Rival("not", list, str_of)]
    contest = Contest(lambda: calls.append(1), rivals, held=lambda: len(calls))
    monkeypatch.setattr(run, "STAGES", {"toy": lambda _: [Case("x", "1", lambda: contest)]})
    told, untold = bench(["toy"], rounds=3, memory=False, device="cpu")
    assert (told.held, told.rival_held) == (6, 5)
    assert (untold.held, untold.rival_held) == (6, None)
    monkeypatch.setattr(run, "STAGES", toy(lambda: 1))
    (row,) = bench(["toy"], rounds=1, memory=False, device="cpu")
    assert (row.held, row.rival_held) == (None, None)


def str_of(*_: Any) -> str:
    return ""


def turns(*rounds: Sequence[float]) -> list[float]:
    """Start and stop of turns that take so long, one after the other."""
    now, ends = 0.0, []
    for length in (one for of_round in rounds for one in of_round):
        ends += [now, now + length]
        now += length
    return ends


def test_a_row_for_each_rival_with_the_same_rounds_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    rivals = [Rival(name, lambda: 1, lambda *_: "") for name in ("one", "two")]
    case = Case("plain", "1 toy", lambda: Contest(lambda: 1, rivals))
    monkeypatch.setattr(run, "STAGES", {"toy": lambda _: [case]})
    first, second = bench(["toy"], rounds=3, memory=False, device="cpu")
    assert (first.rival, second.rival) == ("one", "two")
    assert first.ours == second.ours
    assert first.theirs != second.theirs


def test_seconds_that_a_call_tells_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "STAGES", toy(lambda: "0.25", seconds=float))
    (row,) = bench(["toy"], rounds=3, memory=False, device="cpu")
    assert row.ours == Timing(0.25, 0.25, 0.25, 3)


def test_time_is_limited_but_three_rounds_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "STAGES", toy(lambda: 1, lambda: 1))
    (row,) = bench(["toy"], rounds=100, seconds=1e-9, memory=False, device="cpu")
    assert row.ours is not None
    assert row.ours.rounds == 3


def test_threads_are_set_for_the_run_alone(
    monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    torch.set_num_threads(1)
    seen: list[int] = []
    monkeypatch.setattr(run, "STAGES", toy(lambda: seen.append(torch.get_num_threads())))
    list(bench(["toy"], rounds=1, memory=False, device="cpu", threads=2))
    assert set(seen) == {2}
    assert torch.get_num_threads() == 1


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
        Case("wrong", "1", lambda: Contest(lambda: ours.append(1) or 1, wrong)),  # type: ignore[func-returns-value]
        Case("two wrong", "1", lambda: Contest(lambda: 1, two)),
        Case("no setup", "1", crash),
        Case("ours crashes", "1", lambda: Contest(crash, [])),
        Case("right", "1", lambda: Contest(lambda: 1, [Rival("right", lambda: 1, equal)])),
    ]
    monkeypatch.setattr(run, "STAGES", {"toy": lambda _: cases})
    rows = list(bench(["toy"], rounds=3, memory=False, device="cpu"))
    differ = "ours and other differ: 1 is not 2"
    assert [(row.way, row.rival, row.error) for row in rows] == [
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
    def fail(stage: str, way: str, rival: str, setting: Setting) -> int:
        if rival:
            raise RetinaNetError("toy: measuring the memory of other failed: killed")
        return 7

    monkeypatch.setattr(run, "STAGES", toy(lambda: 1, lambda: 1))
    monkeypatch.setattr(run, "peak_memory", fail)
    (row,) = bench(["toy"], rounds=3, device="cpu")
    assert (row.memory, row.rival_memory) == (7, None)
    assert row.error == "toy: measuring the memory of other failed: killed"
    assert row.speedup is not None


def test_a_way_whose_package_is_missing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Contest:
        raise MissingExtraError("openvino", "openvino")

    monkeypatch.setattr(run, "STAGES", {"toy": lambda _: [Case("int8", "1 toy", make)]})
    (row,) = bench(["toy"], device="cpu")
    assert row.ours is None
    assert row.note.startswith("openvino is not installed")


def test_unknown_stage_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match=r"no stage 'clas-loss' .*did you mean class-loss"):
        bench(["clas-loss"])


def test_rivals_that_are_unknown_or_missing_are_said_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(
        ConfigError, match=r"no rival 'torchvison': here are torchvision.*did you mean torchvision"
    ):
        bench(vs=["torchvison"])
    monkeypatch.setitem(RIVALS, "fvcore", type(RIVALS["fvcore"])("no_such_module.x", ()))
    with pytest.raises(
        ConfigError, match=r"rival 'fvcore' is not installed: here are .*none; not installed: .*fv"
    ):
        bench(vs=["fvcore"])


def test_whom_a_name_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_rivals(["none"]) == ()
    assert choose_rivals(["torchvision", "torchvision"])[0] == "torchvision"
    assert ("pycocotools" in choose_rivals(["torchvision"])) == installed("pycocotools")
    monkeypatch.setitem(RIVALS, "pycocotools", type(RIVALS["fvcore"])("no_such_module", ()))
    assert choose_rivals(["torchvision"]) == ("torchvision",)


def test_nobody_to_compare_with() -> None:
    rows = list(bench(["matching"], size="tiny", vs=["none"], rounds=1, memory=False, device="cpu"))
    assert rows
    assert all((row.rival, row.theirs, row.speedup) == ("", None, None) for row in rows)
    # What a rival would have been needed for is not judged.
    assert all(row.met == {} for row in rows)


def test_rivals_have_real_stages_and_goals_real_ways() -> None:
    assert {stage for one in RIVALS.values() for stage in one.stages} <= set(STAGES)
    ways = {(stage, case.way) for stage, cases in STAGES.items() for case in cases(TINY)}
    fast = {("train-step", "ResNet-50 bf16"), ("train-step", "ResNet-18 bf16")}
    assert set(GOALS) <= ways | fast  # those two only where there are units for it
    assert set(GPU_GOALS) <= ways | fast | {("inference", "auto, 16 images")}


def test_a_row_is_judged_by_its_goals() -> None:
    row = Row(
        "class-loss",
        "float32, 2 images",
        "",
        ours=Timing(0.2, 0.2, 0.2, 1),
        speedup=39.9,
        share=0.8,
        memory=100,
        rival_memory=200,
        input_bytes=100,
        goals={
            "speedup": 40,
            "share": 0.8,
            "seconds": 0.3,
            "memory": 99,
            "memory_of_rival": 0.5,
            "memory_of_input": 0.9,
        },
    )
    assert judge(row) == {
        "speedup": False,
        "share": True,
        "seconds": True,
        "memory": False,
        "memory_of_rival": True,
        "memory_of_input": False,
    }
    unmeasured = Row("x", "y", "", goals={"speedup": 2, "memory": 1})
    assert judge(unmeasured) == {}


def test_goals_follow_kernel_rival_and_device() -> None:
    way = ("class-loss", "float32, 2 images")
    assert goals_of(*way)["speedup"] == 40
    assert goals_of(*way, native=False)["speedup"] == 10
    assert goals_of("class-loss", "1 class, 2 images", native=False)["speedup"] == 1
    assert goals_of("inference", "auto", on_gpu=True)["speedup"] == 4
    assert goals_of("inference", "auto", on_gpu=True, rival="torchvision fp16")["speedup"] == 2
    assert goals_of("detect", "auto") == {}
    # Where auto is float32, float32's own row is the one that is judged.
    assert goals_of("inference", "auto", bf16=False) == {}
    assert goals_of("inference", "float32", bf16=False)["speedup"] == 1.6


def test_goals_are_met_only_at_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "STAGES", toy(lambda: 1, lambda: 1))
    monkeypatch.setattr(run, "goals_of", lambda *_, **__: {"seconds": 10.0})
    for size, met in (("small", {}), ("full", {"seconds": True})):
        (row,) = bench(["toy"], size=size, memory=False, device="cpu")  # type: ignore[arg-type]
        assert row.goals == {"seconds": 10.0}
        assert row.met == met


def test_no_seconds_are_no_more_than_three_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "STAGES", toy(lambda: 1))
    (row,) = bench(["toy"], rounds=100, seconds=0, memory=False, device="cpu")
    assert row.ours is not None
    assert row.ours.rounds == 3


def test_tensors_that_are_held_are_counted_once() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(10, 10, bias=False), torch.nn.BatchNorm1d(10))
    own = 400 + 4 * 40 + 8
    assert held_bytes(model) == own
    packed = model[0].weight.detach().to_mkldnn()
    shared = {"twice": [model, model[0].weight], "view": model[0].weight.detach()[:5]}
    assert held_bytes(shared) == own
    assert held_bytes((lambda: shared, packed)) == own + 400
    assert held_bytes(lambda: None) == 0  # what it could reach in its module is not its own


def test_logits_and_deltas_are_compared_at_every_size() -> None:
    got = [
        Outputs((torch.randn(1, 27, 2, width),), (torch.randn(1, 36, 2, width),))
        for width in (3, 4)
    ]
    same = [(flatten_levels(one.logits, 3), flatten_levels(one.deltas, 4)) for one in got]
    assert compare_outputs(got, same, 3, 0.0) == "logits 0e+00, deltas 0e+00 rms"
    for name, place in (("logits", 0), ("deltas", 1)):
        off = [list(one) for one in same]
        off[1][place] = off[1][place] * 1.5
        with pytest.raises(AssertionError, match=rf"relative rms .* of the {name}"):
            compare_outputs(got, [(one[0], one[1]) for one in off], 3, 0.1)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from Linux' /proc")
def test_memory_in_a_process_of_its_own() -> None:
    setting = Setting("small", CPU, ("torchvision",))
    ours = peak_memory("class-loss", "float32, 2 images", "", setting)
    theirs = peak_memory("class-loss", "float32, 2 images", "torchvision", setting)
    logits = 15_354 * 80 * 2 * 4
    assert ours is not None
    assert theirs is not None
    # Ours needs the gradient and little else; torchvision's one-hot targets are many copies of it.
    assert 0.5 * logits < ours < 4 * logits
    assert theirs > 5 * logits


def test_memory_of_what_fails() -> None:
    with pytest.raises(RetinaNetError, match="class-loss: measuring the memory of nobody failed"):
        peak_memory("class-loss", "float32, 2 images", "nobody", TINY)


def test_images_go_when_they_are_no_longer_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (case,) = STAGES["data"](TINY)
    contest = case.make()
    contest.ours()
    assert len(list(tmp_path.iterdir())) == 1
    del contest
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_limits_reach_what_they_say() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    (copied,) = limits.copy_limit([x]).call()
    assert torch.equal(copied, x)
    assert copied.data_ptr() != x.data_ptr()
    # All six numbers: torch's sum or maximum, whichever was faster.
    assert limits.read_limit([x.t()]).call() in ([15], [5])
    # A 3x3 convolution of 256 channels over 4 x 5 takes 2 x 9 x 256 x 256 x 20 operations.
    limit = limits.matrix_limit(2.0 * 9 * 256 * 256 * 20 * 3, 4, 5, 1, torch.float32, CPU)
    assert limit.factor == 3
    limit.call()


def test_operations_are_counted() -> None:
    # (2, 3) times (3, 4): 2 x 2 x 3 x 4.
    assert limits.count_flops(lambda: torch.ones(2, 3) @ torch.ones(3, 4)) == 48


def test_the_fastest_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    # Five rounds of two turns: the first way takes 2 seconds, the second 1.
    clock = iter(turns(*[[2, 1]] * 5))
    monkeypatch.setattr(limits.time, "perf_counter", lambda: next(clock))
    slow, fast = (lambda: "slow"), (lambda: "fast")
    assert limits.fastest([slow, fast]) is fast


def test_the_machine_is_named() -> None:
    machine = describe_machine(CPU)
    assert machine.threads == torch.get_num_threads()
    assert torch.__version__.startswith(machine.versions["torch"])
    text = "\n".join(machine.lines())
    assert machine.processor in text
    assert machine.kernel in text
    assert machine.instructions in text
    json.dumps(machine.to_dict())


def test_the_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "description", lambda: "avx2, 4 threads")
    monkeypatch.setattr(native, "available", lambda: True)
    assert describe_kernel(CPU) == ("class loss and post-processing: avx2, 4 threads", True)
    monkeypatch.setattr(native, "available", lambda: False)
    assert describe_kernel(CPU)[1] is False
    assert describe_kernel(torch.device("mps")) == ("class loss and matching: pure torch", False)


def test_markdown_is_well_formed() -> None:
    full = Row(
        "class-loss",
        "float32 | 2",
        "9 anchors",
        rival="torchvision",
        ours=Timing(0.0123, 0, 0, 3),
        theirs=Timing(1.5, 0, 0, 3),
        first=4.0,
        speedup=122.0,
        speedup_low=9.0,
        speedup_high=130.0,
        limit="copy",
        share=0.5,
        memory=1_500_000,
        rival_memory=1_200_000_000,
        difference="equal",
        held=300_000_000,
        rival_held=150_000_000,
        goals={"speedup": 40, "memory_of_input": 1.1},
        met={"speedup": True, "memory_of_input": False},
    )
    missing = Row("class-loss", "int8", "9 anchors", note="openvino is not installed")
    alone = Row("startup", "help", "", ours=Timing(5e-5, 0, 0, 1), goals={"seconds": 0.3})
    text = to_markdown(["A processor", "torch 2"], [full, missing, alone])
    assert text.startswith("A processor; torch 2.\n\n**class-loss** beside torchvision\n\n|")
    tables = [part for part in text.split("\n\n") if part.startswith("|")]
    assert [len(table.splitlines()) for table in tables] == [4, 3]
    for line in (line for table in tables for line in table.splitlines()):
        assert line.replace("\\|", "").count("|") == 9
    assert (
        "| float32 \\| 2: 9 anchors (equal); 300 MB are kept between calls, 150 MB of theirs; "
        "the first call 4.00 s | 12.3 ms | 1.50 s "
        "| 122 (9.00-130) | 50% (copy) | 2 | 1,200 "
        "| 40 x: met; memory under 1.1 x the logits: **missed** |"
    ) in text
    assert "| int8: 9 anchors; openvino is not installed | - | - | - | - | - | - | - |" in text
    assert "50.0 us" in text
    assert "300 ms |" in text


def test_figures_as_a_person_reads_them() -> None:
    assert [seconds(one) for one in (12.34, 1.234, 0.1234, 0.00999, 1e-6)] == [
        "12.3 s",
        "1.23 s",
        "123 ms",
        "9.99 ms",
        "1.00 us",
    ]
    assert [megabytes(one) for one in (None, 0, 100_000, 2_500_000_000)] == [
        "-",
        "0",
        "0.1",
        "2,500",
    ]
