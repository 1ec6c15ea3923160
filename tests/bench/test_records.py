"""The programs under benchmarks/: curves of cost, and the page that figures are written into."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from retinanet.bench import GOALS, Machine, Row, Timing, describe_machine

ROOT = Path(__file__).resolve().parents[2]


def program(name: str) -> Iterator[ModuleType]:
    spec = util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def curves() -> Iterator[Any]:
    yield from program("curves")


@pytest.fixture(scope="module")
def record() -> Iterator[Any]:
    yield from program("record")


def points(*figures: tuple[int, float, int | None]) -> list[dict[str, Any]]:
    return [{"x": x, "seconds": seconds, "memory": memory} for x, seconds, memory in figures]


def test_exponents_are_of_the_work(curves: Any) -> None:
    # Twice the side, four times the work: the time of 4 is in step, of 16 its square.
    line = points((1, 0.01, None), (2, 0.04, None), (4, 0.64, None))
    assert curves.exponents(line, "seconds", 2.0) == pytest.approx([1.0, 2.0])
    assert curves.exponents(line, "seconds", 1.0) == pytest.approx([2.0, 4.0])
    assert curves.exponents(line, "memory", 1.0) == [None, None]


def test_what_cannot_be_told_has_no_exponent(curves: Any) -> None:
    # From nothing; from 0 objects; both under a millisecond; and from under it, counted as one.
    line = points((0, 0.01, 0), (1, 0.02, 0), (10, 0.04, 10**9))
    assert curves.exponents(line, "seconds", 1.0)[0] is None
    assert curves.exponents(line, "memory", 1.0) == [None, None]
    short = points((1, 1e-5, 0), (10, 5e-4, 0), (100, 1e-1, 0))
    assert curves.exponents(short, "seconds", 1.0) == [None, pytest.approx(2.0)]


def test_what_a_line_says(curves: Any) -> None:
    curve = curves.Curve("classes", (), (), {})
    line = points((1, 0.01, 20_000_000), (10, 0.1, 200_000_000), (100, 10.0, 2_000_000_000))
    assert curves.sentences(curve, "loss", line) == [
        "loss: 10 ms and 20 MB at 1, 10 s and 2e+03 MB at 100",
        "time grows faster than the work from 10 to 100 (2.00)",
    ]


def test_curves_write_their_files(tmp_path: Path) -> None:
    chosen = ("--only", "objects", "--only", "images", "--threads", "1")
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "curves.py", "--quick", "--out", tmp_path, *chosen],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "curves.json").read_text("utf-8"))
    assert list(told["curves"]) == ["objects", "images"]
    for name, curve in told["curves"].items():
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        for line in curve["lines"].values():
            assert all(one["seconds"] > 0 for one in line["points"])
            if sys.platform == "linux":
                assert all(one["memory"] is not None for one in line["points"])
            assert line["says"][0] in done.stdout
    assert told["curves"]["objects"]["lines"].keys() == {
        "matching, 800 x 1088 px, 2 images",
        "both losses, 80 classes, the same",
    }


def test_curves_of_one_machine_are_kept_together(curves: Any, tmp_path: Path) -> None:
    file, here = tmp_path / "curves.json", describe_machine(torch.device("cpu"))

    def kept(name: str, machine: Machine, result: dict[str, Any], quick: bool) -> Any:
        curves.keep(file, machine, name, result, quick=quick)
        return json.loads(file.read_text("utf-8"))

    assert kept("objects", here, {"a": 1}, False)["curves"] == {"objects": {"a": 1}}
    told = kept("batch", here, {"b": 1}, False)
    assert list(told["curves"]) == ["batch", "objects"]  # as they stand on the page
    assert kept("batch", here, {"b": 2}, False)["curves"] == {
        "batch": {"b": 2},
        "objects": {"a": 1},
    }
    # Figures in small, or of another machine, don't stand beside them.
    assert kept("batch", here, {"b": 3}, True)["curves"] == {"batch": {"b": 3}}
    other = replace(here, threads=here.threads + 1)
    told = kept("objects", other, {"a": 2}, True)
    assert (told["machine"], told["curves"]) == (other.to_dict(), {"objects": {"a": 2}})


@pytest.mark.parametrize("first", [False, True])
def test_slow_points_are_measured_once(
    curves: Any, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def call() -> None:
        calls.append("call")

    lead = (lambda: calls.append("first")) if first else None
    work = curves.Work(call, first=lead)
    monkeypatch.setattr(curves, "clock", lambda one: one() or (21.0 if one is call else 0.1))
    monkeypatch.setattr(curves, "give_back_memory", lambda: None)
    monkeypatch.setitem(curves.CURVES, "toy", curves.Curve("x", (), (), {"line": lambda *_: work}))
    point = curves.measure("toy", "line", 7, False, torch.get_num_threads())
    assert calls == (["first"] * 3 + ["call"] if first else ["call"] * 2)
    assert (point["x"], point["seconds"], point["rounds"]) == (7, 21.0, 1)


@pytest.mark.parametrize("name", ["image-side", "batch", "classes"])
def test_the_other_curves_run(curves: Any, name: str) -> None:
    curve = curves.CURVES[name]
    for make in curve.lines.values():
        make(curve.quick[0], True).call()


def test_rows_of_a_stage_take_the_place_of_older_ones(record: Any, tmp_path: Path) -> None:
    machine = describe_machine(torch.device("cpu"))
    old = Row("matching", "old", "1", ours=Timing(1, 1, 1, 1), goals={"speedup": 3})
    other = Row("class-loss", "kept", "1", ours=Timing(2, 2, 2, 1))
    new = Row("matching", "new", "1", ours=Timing(3, 3, 3, 1))
    record.keep(tmp_path, "A CPU, 4 cores", machine, [old])
    record.keep(tmp_path, "A CPU, 4 cores", machine, [other])
    file = record.keep(tmp_path, "A CPU, 4 cores", machine, [new])
    assert file.name == "a-cpu-4-cores.json"
    assert [row["way"] for row in json.loads(file.read_text("utf-8"))["rows"]] == ["kept", "new"]
    text = record.machines(tmp_path)
    assert text.startswith("### A CPU, 4 cores\n\n" + machine.processor)
    assert "| new: 1 | 3.00 s |" in text


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({}, True),
        ({"memory": 1}, True),
        ({"versions": {"torch": torch.__version__, "more": "1"}}, True),
        ({"versions": {"torch": "0"}}, False),
        ({"threads": 99}, False),
        ({"kernel": "pure torch"}, False),
        ({"gpu": "another"}, False),
    ],
)
def test_rows_of_a_machine_that_has_changed_are_dropped(
    record: Any,
    tmp_path: Path,
    changes: dict[str, Any],
    same: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    old = describe_machine(torch.device("cpu"))
    old = replace(old, versions={"torch": torch.__version__})
    new = replace(old, **changes)
    record.keep(tmp_path, "A", old, [Row("matching", "old", "1")], 3.0)
    file = record.keep(tmp_path, "A", new, [Row("class-loss", "new", "1")])
    told = json.loads(file.read_text("utf-8"))
    assert Machine(**told["machine"]) == new
    assert [row["way"] for row in told["rows"]] == (["new", "old"] if same else ["new"])
    times = {"class-loss": None, "matching": 3.0} if same else {"class-loss": None}
    assert told["seconds"] == times
    assert ("dropped" in capsys.readouterr().err) is not same


def test_what_is_kept_in_the_repository_can_be_read(record: Any) -> None:
    for file in (ROOT / "benchmarks" / "results").glob("*.json"):
        kept = json.loads(file.read_text("utf-8"))
        assert Machine(**kept["machine"]).same_as(Machine(**kept["machine"]))
        assert [Row.from_dict(one) for one in kept["rows"]]
    assert record.curves(ROOT / "docs" / "images" / "curves")


def test_the_page_is_written_between_its_marks(record: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs" / "performance.md").read_text("utf-8"), "utf-8")
    machine = describe_machine(torch.device("cpu"))
    row = Row("matching", "new", "1", ours=Timing(3, 3, 3, 1))
    record.keep(tmp_path / "results", "A machine", machine, [row])
    told = {
        "machine": machine.to_dict(),
        "curves": {"batch": {"axis": "images", "lines": {"loss": {"says": ["loss: 1", "so"]}}}},
    }
    (tmp_path / "curves.json").write_text(json.dumps(told), "utf-8")
    for _ in range(2):  # the second time over the first
        record.render(page, tmp_path / "results", tmp_path)
        text = page.read_text("utf-8")
        assert text.count("### A machine") == 1
        assert text.count("![Time and memory against images](images/curves/batch.png)") == 1
        assert "- loss: 1; so." in text
    with pytest.raises(ValueError, match="no <!-- nowhere -->"):
        record.between(text, "nowhere", "")


def test_the_page_names_every_stage_with_a_goal() -> None:
    text = (ROOT / "docs" / "performance.md").read_text("utf-8")
    goals = text.partition("## Goals")[2].partition("## Measured")[0]
    assert all(stage in goals for stage, _ in GOALS)
