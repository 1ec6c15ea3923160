"""That the two sides of every contest agree, take turns, and are reported as they were measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from retinanet.bench import STAGES, Contest, bench, peak_memory, run
from retinanet.errors import ConfigError, RetinaNetError

CPU = torch.device("cpu")


def contest(
    ours: Callable[[], Any], theirs: Callable[[], Any] | None, compare: Callable[[Any, Any], str]
) -> dict[str, Any]:
    return {
        "toy": lambda full, device: [Contest("1 toy", "float32", "other", ours, theirs, compare)]
    }


@pytest.mark.parametrize("stage", STAGES)
def test_ours_and_theirs_agree(stage: str) -> None:
    rows = list(bench([stage], rounds=1, memory=False, device="cpu"))
    assert rows
    for row in rows:
        assert row.stage == stage
        assert row.ours.rounds == 1
        assert row.ours.median > 0
        assert (row.theirs is None) == (row.speedup is None) == (row.rival == "")
        assert json.loads(json.dumps(row.to_dict()))["ours"]["rounds"] == 1


def test_turns_quartiles_and_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock = iter([0.0, 0, 1, 1, 3, 3, 5, 5, 11, 11, 14, 14, 20])  # the end; then start, stop, ...
    monkeypatch.setattr(run.time, "perf_counter", lambda: next(clock, 1e9))
    monkeypatch.setattr(
        run,
        "STAGES",
        contest(
            lambda: calls.append("ours") or 1,  # type: ignore[func-returns-value]
            lambda: calls.append("theirs") or 1,  # type: ignore[func-returns-value]
            lambda got, expected: f"{got} and {expected}",
        ),
    )
    (row,) = bench(["toy"], rounds=3, memory=False, device="cpu")
    # Once each to compare, then in turns.
    assert calls == ["theirs", "ours"] + ["ours", "theirs"] * 3
    # Ours took 1, 2, 3 seconds, theirs 2, 6, 6: ratios 2, 3, 2.
    assert row.ours == run.Timing(2, 1.5, 2.5, 3)
    assert row.theirs == run.Timing(6, 4, 6, 3)
    assert (row.speedup_low, row.speedup, row.speedup_high) == (2, 2, 2.5)
    assert row.difference == "1 and 1"


def test_time_is_limited_but_three_rounds_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "STAGES", contest(lambda: 1, lambda: 1, lambda *_: ""))
    (row,) = bench(["toy"], rounds=100, seconds=1e-9, memory=False, device="cpu")
    assert row.ours.rounds == 3


def test_outputs_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def compare(got: int, expected: int) -> str:
        assert got == expected, f"{got}\nis not {expected}"
        return ""

    monkeypatch.setattr(run, "STAGES", contest(lambda: 1, lambda: 2, compare))
    with pytest.raises(RetinaNetError, match="toy: ours and other differ: 1 is not 2") as caught:
        next(bench(["toy"], memory=False, device="cpu"))
    assert "\n" not in str(caught.value)


def test_without_the_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    (row,) = bench(["evaluation"], rounds=1, memory=False, device="cpu")
    assert (row.rival, row.theirs, row.speedup, row.rival_memory) == ("", None, None, None)


def test_unknown_stage_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match=r"no stage 'clas-loss' .*did you mean class-loss"):
        bench(["clas-loss"])


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from Linux' /proc")
def test_memory_in_a_process_of_its_own() -> None:
    ours = peak_memory("class-loss", 0, "ours", full=False, device=CPU)
    theirs = peak_memory("class-loss", 0, "theirs", full=False, device=CPU)
    logits = 15_354 * 80 * 2 * 4
    assert ours is not None
    assert theirs is not None
    # Ours needs the gradient and little else; torchvision's one-hot targets are many copies of it.
    assert 0.5 * logits < ours < 4 * logits
    assert theirs > 5 * logits


def test_memory_of_what_fails() -> None:
    with pytest.raises(RetinaNetError, match="class-loss: measuring the memory of nobody failed"):
        peak_memory("class-loss", 0, "nobody", full=False, device=CPU)
