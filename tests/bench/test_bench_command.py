"""``retinanet bench``: tables, JSON and errors."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from retinanet.bench import STAGES, Benchmark, Case, Limit, Rival, Row, Timing, run
from retinanet.cli import bench as command
from retinanet.cli import main
from retinanet.errors import MissingExtraError


def missing() -> Benchmark:
    raise MissingExtraError("openvino", "openvino")


@pytest.fixture(autouse=True)
def stages(monkeypatch: pytest.MonkeyPatch) -> None:
    rival = Rival("torchvision", lambda: 1, lambda *_: "equal")
    benchmark = Benchmark(lambda: 1, [rival], limit=Limit("copy", lambda: 1), note="in float32")
    cases = [
        Case("2,000 objects, 8 images", "245,520 anchors x 80", lambda: benchmark),
        Case("int8", "245,520 anchors x 80", missing),
    ]
    monkeypatch.setattr(run, "STAGES", {"toy": lambda _: cases})


@pytest.mark.parametrize("width", [80, 120])
def test_print_table_fits_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(command, "out", Console(file=screen, width=width, highlight=False))
    timing = Timing(0.9876, 0.9, 1.0, 7)
    row = Row(
        "class-loss",
        "2,000 objects, 8 images",
        "245,520 anchors x 80",
        rival="torchvision",
        ours=timing,
        theirs=timing,
        speedup=Timing(99.9, 98.7, 123.4, 7),
        limit="copy",
        limit_fraction=1.02,
        memory=1_234_000_000,
        rival_memory=12_345_000_000,
    )
    command.print_table("class-loss", [row, row])
    lines = screen.getvalue().splitlines()
    assert max(len(line) for line in lines) <= width
    text = "\n".join(lines)
    assert "class-loss against torchvision" in text
    for figure in ("988 ms", "99.9 (98.7-123)", "102%", "1,234", "12,345"):
        assert text.count(figure) >= 2  # a row each, whole


def test_bench_command_tables_and_notes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--no-memory", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert "toy against torchvision" in printed.out
    assert "openvino is not installed" in " ".join(printed.out.split())
    assert "times as long (equal); in float32" in printed.err
    assert "toy, int8, 245,520 anchors x 80: openvino is not installed" in printed.err


def test_bench_command_json_has_machine_and_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--no-memory", "--json", "--threads", "1", "--device", "cpu"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["machine"]["threads"] == 1
    rows = printed["rows"]
    assert rows[1]["case"] == "int8"
    assert (rows[0]["rival"], rows[0]["limit"]) == ("torchvision", "copy")
    assert main(["bench", "--no-memory", "--json", "--alone", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["rival"] == ""


@pytest.mark.parametrize("form", [(), ("--json",)])
@pytest.mark.parametrize(
    ("error", "code"), [(RuntimeError("no int8"), 1), (KeyboardInterrupt, 130)]
)
def test_bench_command_prints_what_was_measured_before_an_error(
    form: tuple[str, ...],
    error: BaseException,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail() -> Benchmark:
        raise error

    cases = [Case("float32", "1 x 1", lambda: Benchmark(lambda: 1)), Case("int8", "1 x 1", fail)]
    monkeypatch.setattr(run, "STAGES", {"toy": lambda _: cases})
    assert main(["bench", "--no-memory", "--device", "cpu", *form]) == code
    printed = capsys.readouterr()
    if form or code == 1:  # a table is printed at the end of its stage
        assert "float32" in printed.out
    if code == 1:
        assert "no int8" in " ".join(printed.out.split())
        assert "toy, int8, 1 x 1: failed: RuntimeError: no int8" in printed.err
        assert "error: 1 of 2 rows failed: toy, int8" in printed.err


def test_bench_command_help_lists_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    printed = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert all(name in printed for name in STAGES)
