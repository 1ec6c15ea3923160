"""Scripts in benchmarks/: goals, stored rows and curves, and the page with them."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from retinanet.bench import STAGES, Machine, Row, Setting, Timing, describe_machine
from scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def curves() -> Any:
    return load_script("curves")


@pytest.fixture
def goals() -> Any:
    return load_script("goals")


@pytest.fixture
def record() -> Any:
    return load_script("record")


@pytest.fixture
def on_gpu() -> Any:
    return load_script("on_gpu")


def points(*values: tuple[int, float, int | None]) -> list[dict[str, Any]]:
    return [{"x": x, "seconds": seconds, "memory": memory} for x, seconds, memory in values]


def test_exponents_are_relative_to_the_work(curves: Any) -> None:
    # Twice the side is four times the work: a time of 4 is proportional, 16 is its square.
    line = points((1, 0.01, None), (2, 0.04, None), (4, 0.64, None))
    assert curves.exponents(line, "seconds", 2.0) == pytest.approx([1.0, 2.0])
    assert curves.exponents(line, "seconds", 1.0) == pytest.approx([2.0, 4.0])
    assert curves.exponents(line, "memory", 1.0) == [None, None]


def test_exponents_of_zero_or_tiny_values_are_unknown(curves: Any) -> None:
    line = points((0, 0.01, 0), (1, 0.02, 0), (10, 0.04, 10**9))  # from 0 objects and 0 bytes
    assert curves.exponents(line, "seconds", 1.0)[0] is None
    assert curves.exponents(line, "memory", 1.0) == [None, None]
    # Both under a millisecond; and from under it, counted as 1 ms.
    short = points((1, 1e-5, 0), (10, 5e-4, 0), (100, 1e-1, 0))
    assert curves.exponents(short, "seconds", 1.0) == [None, pytest.approx(2.0)]


def test_summary_names_ends_and_growth(curves: Any) -> None:
    curve = curves.Curve("classes", (), (), {})
    line = points((1, 0.01, 20_000_000), (10, 0.1, 200_000_000), (100, 10.0, 2_000_000_000))
    assert curves.summary(curve, "loss", line) == (
        "loss: 10 ms and 20 MB at 1, 10 s and 2e+03 MB at 100; "
        "time grows faster than the work from 10 to 100 (2.00)"
    )


@pytest.mark.parametrize("name", ["objects", "batch", "classes", "images"])
def test_curve_lines_run(
    curves: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RETINANET_CURVES", str(tmp_path))
    curve = curves.CURVES[name]
    for make in curve.lines.values():
        make(curve.quick[0], True)()


def test_store_curve_keeps_others_of_the_same_machine(curves: Any, tmp_path: Path) -> None:
    file, machine = tmp_path / "curves.json", {"processor": "A", "threads": 1}

    def stored(name: str, machine: dict[str, Any], result: Any, quick: bool) -> Any:
        curves.store(file, machine, name, result, quick=quick)
        return json.loads(file.read_text("utf-8"))["curves"]

    assert stored("objects", machine, 1, False) == {"objects": 1}
    assert list(stored("batch", machine, 2, False)) == ["batch", "objects"]  # the page's order
    assert stored("batch", machine, 3, False) == {"batch": 3, "objects": 1}
    assert stored("batch", {**machine, "threads": 2}, 4, False) == {"batch": 4}
    assert stored("objects", {**machine, "threads": 2}, 5, True) == {"objects": 5}


def test_measure_slow_call_is_measured_once(curves: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(curves, "clock", lambda call: call() or 21.0)
    monkeypatch.setattr(curves, "return_freed_memory", lambda: None)
    line = {"line": lambda *_: lambda: calls.append("call")}
    monkeypatch.setitem(curves.CURVES, "toy", curves.Curve("x", (), (), line))
    point = curves.measure("toy", "line", 7, False, torch.get_num_threads())
    assert calls == ["call"] * 2  # the first, and the measured one
    assert (point["x"], point["seconds"], point["rounds"]) == (7, 21.0, 1)


def test_store_rows_replace_those_of_the_same_stage(record: Any, tmp_path: Path) -> None:
    machine = describe_machine(CPU)
    old = Row("matching", "old", "1", ours=Timing(1, 1, 1, 1))
    other = Row("class-loss", "other", "1", ours=Timing(2, 2, 2, 1))
    new = Row("matching", "new", "1", ours=Timing(3, 3, 3, 1))
    record.store(tmp_path, "A CPU, 4 cores", machine, [old])
    record.store(tmp_path, "A CPU, 4 cores", machine, [other])
    file = record.store(tmp_path, "A CPU, 4 cores", machine, [new])
    assert file.name == "a-cpu-4-cores.json"
    assert [row["case"] for row in json.loads(file.read_text("utf-8"))["rows"]] == ["other", "new"]
    text = record.machines_markdown(tmp_path)
    assert text.startswith("### A CPU, 4 cores\n\n" + machine.processor)
    assert "| new: 1 | 3.00 s |" in text


def test_tables_are_well_formed_and_stored_rows_are_read(record: Any) -> None:
    full = Row(
        "class-loss",
        "float32 | 2",
        "9 anchors",
        rival="torchvision",
        ours=Timing(0.0123, 0, 0, 3),
        theirs=Timing(1.5, 0, 0, 3),
        first_call=4.0,
        speedup=Timing(122.0, 9.0, 130.0, 3),
        limit="copy",
        limit_fraction=0.5,
        memory=1_500_000,
        rival_memory=1_200_000_000,
        difference="equal",
    )
    missing = Row("class-loss", "int8", "9 anchors", note="openvino is not installed")
    failed = Row("class-loss", "bf16", "9 anchors", error="they differ")
    rows = [full, missing, failed, Row("startup", "help", "", ours=Timing(5e-5, 0, 0, 1))]
    assert [record.read_row(json.loads(json.dumps(asdict(row)))) for row in rows] == rows
    machine = describe_machine(CPU)
    text = record.to_markdown(machine, rows, lambda row: f"goal of {row.case}")
    head = "; ".join(machine.lines())
    assert text.startswith(f"{head}.\n\n**class-loss** against torchvision\n\n|")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 5 + 3
    assert {line.replace("\\|", "").count("|") for line in lines} == {9}
    assert lines[2] == (
        "| float32 \\| 2: 9 anchors (equal); first call 4.00 s | 12.3 ms | 1.50 s "
        "| 122 (9.00-130) | 50% (copy) | 2 | 1,200 | goal of float32 \\| 2 |"
    )
    assert "| int8: 9 anchors; openvino is not installed | - | - |" in lines[3]
    assert "| bf16: 9 anchors; failed: they differ | - | - |" in lines[4]
    assert "50.0 us" in lines[7]


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
def test_store_rows_of_a_changed_machine_are_dropped(
    record: Any,
    tmp_path: Path,
    changes: dict[str, Any],
    same: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    old = replace(describe_machine(CPU), versions={"torch": torch.__version__})
    new = replace(old, **changes)
    record.store(tmp_path, "A", old, [Row("matching", "old", "1")], 3.0)
    file = record.store(tmp_path, "A", new, [Row("class-loss", "new", "1")])
    stored = json.loads(file.read_text("utf-8"))
    assert Machine(**stored["machine"]) == new
    assert [row["case"] for row in stored["rows"]] == (["new", "old"] if same else ["new"])
    limits = {"class-loss": None, "matching": 3.0} if same else {"class-loss": None}
    assert stored["seconds"] == limits
    assert ("dropped" in capsys.readouterr().err) is not same


def test_page_is_rendered_from_what_is_stored_in_the_repository(
    record: Any, tmp_path: Path
) -> None:
    page, text = tmp_path / "page.md", (ROOT / "docs" / "performance.md").read_text("utf-8")
    page.write_text(text, "utf-8")
    record.render(page, record.RESULTS, record.CURVES)
    assert page.read_text("utf-8") == text
    with pytest.raises(ValueError, match="no <!-- nowhere -->"):
        record.replace_between(text, "nowhere", "")


def test_check_goals_lower_and_upper_bounds(goals: Any) -> None:
    row = Row(
        "class-loss",
        "float32, 2 images",
        "",
        ours=Timing(0.2, 0.2, 0.2, 1),
        speedup=Timing(39.9, 39, 41, 3),
        limit_fraction=0.8,
        memory=100,
        rival_memory=200,
        input_bytes=100,
    )
    lower = {"speedup": 40, "limit_fraction": 0.8}
    upper = {"seconds": 0.3, "memory": 99, "memory_of_rival": 0.5, "memory_of_input": 0.9}
    assert goals.check_goals(row, lower) == {"speedup": False, "limit_fraction": True}
    assert list(goals.check_goals(row, upper).values()) == [True, False, True, False]
    unmeasured = Row("x", "y", "")
    assert goals.check_goals(unmeasured, {"speedup": 2, "memory": 1}) == {}
    described = goals.describe_goals(row, {"speedup": 40, "memory_of_input": 1.1})
    assert described == "40 x: **missed**; memory under 1.1 x the logits: met"
    assert goals.describe_goals(unmeasured, {}) == "-"


def test_goals_of_kernel_rival_and_device(goals: Any) -> None:
    def of(stage: str, case: str, rival: str = "torchvision", **changes: bool) -> dict[str, float]:
        options = {"on_gpu": False, "native": True, "bf16": True, **changes}
        found: dict[str, float] = goals.goals_of(Row(stage, case, "", rival=rival), **options)
        return found

    assert of("class-loss", "float32, 2 images")["speedup"] == 40
    assert of("class-loss", "float32, 2 images", native=False)["speedup"] == 10
    assert of("class-loss", "1 class, 2 images", native=False)["speedup"] == 1
    assert of("inference", "auto", on_gpu=True)["speedup"] == 4
    assert of("inference", "auto", "torchvision fp16", on_gpu=True)["speedup"] == 2
    assert of("inference", "auto", "torchvision fp16 compiled", on_gpu=True) == {}
    assert of("detect", "auto") == {}
    # Where auto is float32, only float32's own row has a goal.
    assert of("inference", "auto", bf16=False) == {}
    assert of("inference", "float32", bf16=False)["speedup"] == 1.6


def test_goals_are_of_existing_cases_and_in_the_docs(goals: Any) -> None:
    setting = Setting("tiny", CPU)
    existing = {(stage, case.name) for stage, of in STAGES.items() for case in of(setting)}
    elsewhere = {  # where there is bf16, or a GPU
        ("train-step", "ResNet-50 bf16"),
        ("train-step", "ResNet-18 bf16"),
        ("inference", "auto, 16 images"),
    }
    assert set(goals.CPU_GOALS) | set(goals.GPU_GOALS) <= existing | elsewhere
    text = (ROOT / "docs" / "performance.md").read_text("utf-8")
    section = text.partition("## Goals")[2].partition("## Measured")[0]
    assert all(stage in section for stage, _ in goals.CPU_GOALS)


def test_on_gpu_writes_what_record_stores(
    on_gpu: Any, record: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = tmp_path / "test_it.py"
    tests.write_text("import pytest\n\n@pytest.mark.gpu\ndef test_it(): pass\n", "utf-8")
    monkeypatch.setattr(on_gpu, "_CASE_SECONDS", 0.01)
    options = {"size": "tiny", "stages": ["postprocess"], "tests": [str(tests)]}
    result = on_gpu.measure(CPU, **options)
    assert result["checks"]["tests marked gpu"].startswith("1 passed")
    assert result["checks"]["device syncs of a training step"] == "not counted: no CUDA device"
    assert all(row["stage"] == "postprocess" and row["ours"] for row in result["rows"])
    late = on_gpu.measure(CPU, minutes=0, **options)
    assert late["rows"] == []
    assert late["checks"]["left out, as the time was over"] == "postprocess"

    file = tmp_path / "on_gpu.json"
    file.write_text(json.dumps(result), "utf-8")
    for name, value in (("RESULTS", tmp_path / "results"), ("render", lambda *_: None)):
        monkeypatch.setattr(record, name, value)
    monkeypatch.setattr(sys, "argv", ["record.py", "--from", str(file), "--name", "A GPU"])
    assert record.main() == 0
    text = record.machines_markdown(tmp_path / "results")
    assert text.startswith("### A GPU")
    assert "- tests marked gpu: 1 passed" in text
    assert text.count("| 8 images: ") == 1
