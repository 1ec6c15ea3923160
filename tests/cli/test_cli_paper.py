"""``retinanet paper``: the paper's tables and figures from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from retinanet.data.synthetic import synthetic_dataset
from retinanet.paper import budget
from retinanet.paper import plan as planning
from retinanet.paper import run as running
from retinanet.paper.budget import Pace
from retinanet.paper.plan import Plan
from retinanet.paper.results import Result
from retinanet.paper.run import OnEnd, Results, Workers
from retinanet.paper.tables import EXPERIMENTS
from retinanet.paper.work import read_result, work

from .conftest import Cli

SMALL = (
    "--backbone=tiny",
    "--backbone-weights=none",
    "--image-size=64",
    "--device=cpu",
    "model.channels=16",
    "model.head_depth=1",
    "model.norm=trained",
    "anchors.sizes=[16,32,64,128,256]",
    "data.workers=0",
    "train.batch_size=4",
    "train.precision=float32",
)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shapes"
    synthetic_dataset(
        folder,
        splits={"train": 8, "val": 4},
        image_size=64,
        objects=(1, 2),
        object_size=(16, 24),
        empty=0.0,
    )
    return folder


def test_list_has_every_table_and_figure(cli: Cli) -> None:
    ended = cli("paper", "list")
    assert ended.code == 0
    for name in EXPERIMENTS:
        assert name in ended.out
    rows = cli("paper", "list", "--json").json
    by_name = {row["name"]: row for row in rows}
    assert by_name["table1a"]["trained_rows"] == 7
    assert by_name["fig1"]["trained_rows"] == 0


def test_list_of_rows(cli: Cli) -> None:
    rows = cli("paper", "list", "--rows", "--json").json
    of_1b = [row["row"] for row in rows if row["name"] == "table1b"]
    assert of_1b == [row.key for row in EXPERIMENTS["table1b"].rows]
    assert "loss.gamma=5" in cli("paper", "list", "--rows").out


def test_row_option_trains_only_these_rows(
    cli: Cli, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[str] = []
    monkeypatch.setattr(
        running, "run_plan", lambda plan, *_: planned.extend(key for _, key in plan.rows) or {}
    )
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    before = Result("done", 20, dict.fromkeys(names, 0.123))
    monkeypatch.setattr(
        Workers,
        "finished",
        lambda workers, trainings: {t.key: before for t in trainings if "gamma5" in t.name},
    )
    common = (f"--data={shapes}", f"--out={tmp_path}", "--steps=20", *SMALL)
    ended = cli("paper", "run", "table1b", "--row=gamma=2", "--row=gamma=0", *common)
    assert ended.code == 0, ended.err
    assert planned == ["gamma=0", "gamma=2"]
    # The table has all rows, with the paper's values and results of an earlier command.
    text = (tmp_path / "table1b.md").read_text("utf-8")
    assert "33.7" in text
    assert "12.3" in text


@pytest.mark.parametrize("name", ["fig1", "fig3", "fig5", "fig6"])
def test_figures_that_need_no_training(cli: Cli, tmp_path: Path, name: str) -> None:
    ended = cli("paper", "run", name, f"--out={tmp_path}")
    assert ended.code == 0, ended.err
    for kind in ("png", "svg"):
        file = tmp_path / "plots" / f"{name}.{kind}"
        assert file.stat().st_size > 2000
        assert str(file) in ended.out
    assert EXPERIMENTS[name].title in (tmp_path / "report.html").read_text("utf-8")


def train_here(plan: Plan, workers: Workers, on_end: OnEnd, _: object) -> Results:
    """Run the trainings of a plan in this process."""
    results: Results = {}
    for training in plan.trainings:
        folder = training.folder(workers.out)
        was_finished = read_result(folder) is not None
        command, _ = workers.command(training, 0)
        if not was_finished:
            assert work(**json.loads(command[-1])) == 0
        result = read_result(folder)
        assert result is not None
        results[training.key] = result
        on_end(training, result, was_finished)
    return results


def test_run_writes_tables_figures_and_page(
    cli: Cli, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "run_plan", train_here)
    common = (f"--data={shapes}", f"--out={tmp_path}", "--steps=2", *SMALL)
    ended = cli("paper", "run", "fig4", *common)
    assert ended.code == 0, ended.err
    assert "these are not COCO results" in ended.err
    assert "64 px for 600 px" in ended.err
    (run,) = (tmp_path / "runs").glob("focal-gamma2-alpha0.25-3x3-tiny-64px-*/seed-0")
    for file in ("config.toml", "run.json", "log.jsonl", "metrics.json", "result.json"):
        assert (run / file).is_file()
    found = json.loads((tmp_path / "fig4-distribution.json").read_text("utf-8"))
    assert found["negatives_taken"] > 1000
    assert (tmp_path / "plots" / "fig4.svg").is_file()
    before = (run / "result.json").stat().st_mtime_ns

    rows = ("--row=R101", "--row=faster_rcnn")
    ended = cli("paper", "run", "table2", *common, *rows, "--json")
    assert ended.code == 0, ended.err
    assert ended.err.count("AP ") == 2
    assert "finished before" in ended.err  # with a single backbone the row is fig4's
    (result,) = ended.json["results"]
    by_key = {row["key"]: row for row in result["rows"]}
    assert by_key["faster_rcnn"]["milliseconds"] > 0
    text = (tmp_path / "table2.md").read_text("utf-8")
    assert "Not a COCO result" in text
    assert "retinanet" in text
    page = (tmp_path / "report.html").read_text("utf-8")
    for name in ("fig4", "table2"):
        assert EXPERIMENTS[name].title in page
    assert (run / "result.json").stat().st_mtime_ns == before


def test_failed_trainings_are_listed_with_exit_code_1(
    cli: Cli, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_worker(plan: Plan, *_: object) -> Results:
        return {
            training.key: Result("failed", note="No space left on device")
            for training in plan.trainings
        }

    monkeypatch.setattr(running, "run_plan", no_worker)
    common = (f"--data={shapes}", f"--out={tmp_path}", "--steps=20", *SMALL)
    ended = cli("paper", "run", "table3", *common)
    assert ended.code == 1
    assert ended.err.count("No space left on device") == 4
    assert "rerun the command to try the failed trainings again" in ended.err
    assert (tmp_path / "table3.md").is_file()


def test_budget_is_converted_to_steps_once(
    cli: Cli, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paces = iter([[Pace(0.5, 10.0)] * 4])  # for a second time it would fail
    monkeypatch.setattr(budget, "measure_paces", lambda *_: next(paces))
    monkeypatch.setattr(running, "run_plan", lambda plan, *_: {})
    common = (f"--data={shapes}", f"--out={tmp_path}", "--budget=2min", "--jobs=2", *SMALL)
    for _ in range(2):
        ended = cli("paper", "run", "table3", *common)
        assert ended.code == 0, ended.err
        # 4 trainings, 2 at a time: a minute each, of which 10 s are not steps of half a second.
        assert "100 steps of 4 for 90,000 steps of 16 images" in ended.err
    (kept,) = (tmp_path / "steps").glob("table3-*.json")
    assert json.loads(kept.read_text("utf-8"))["steps"] == 100


def test_full_prints_its_cost_and_asks(
    cli: Cli, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "measure_paces", lambda left, _: [Pace(2.0, 60.0)] * len(left))
    monkeypatch.setattr(planning, "check_networks", lambda *_: None)  # its weights are fetched
    started: list[str] = []
    monkeypatch.setattr(running, "run_plan", lambda plan, *_: started.append("run") or {})
    common = ("table3", "--full", f"--data={shapes}", f"--out={tmp_path}", "--jobs=1")
    ended = cli("paper", "run", *common)
    # 4 x 90,000 steps of 2 s, and 4 minutes: 200 h.
    assert "4 trainings, 360,000 steps of 16 images" in ended.err
    assert "about 200 h in all (8.3 days)" in ended.err
    assert ended.code == 2
    assert "pass --yes to confirm" in ended.err
    assert started == []
    assert cli("paper", "run", *common, "--yes").code == 0
    assert started == ["run"]
