"""Results as tables, Markdown and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from results_setup import ABOUT, OVER, collect, done, trainings

from retinanet.paper.claims import collect_results
from retinanet.paper.results import Outcome, Result, TableResult
from retinanet.paper.tables import EXPERIMENTS


def example() -> TableResult:
    outcomes = {
        **trainings(a=(0.30, 0.32), b=(0.25,)),
        "c": [Outcome(0, Result("diverged")), Outcome(1, Result("failed", note="disk | full"))],
    }
    return collect(outcomes, OVER, milliseconds={"a": 12.34})


def cells(line: str) -> list[str]:
    """Split a line of a Markdown table."""
    inner = line.strip().removeprefix("|").removesuffix("|").replace("\\|", "\0")
    return [cell.strip().replace("\0", "|") for cell in inner.split("|")]


def markdown_tables(text: str) -> list[list[list[str]]]:
    blocks = [block.splitlines() for block in text.split("\n\n")]
    return [[cells(line) for line in block] for block in blocks if block[0].startswith("|")]


def test_narrow_table_for_a_terminal() -> None:
    result = example()
    assert result.heading == "Table 1b: Gamma"
    table = result.table(wide=False)
    assert table.columns == ["", "AP", "AP50", "AP75", "ms", "seeds", "paper AP", "paper ms"]
    assert table.rows == [
        ["gamma 2", "31.0 ± 1.4", "62.0 ± 2.8", "15.5 ± 0.7", "12.3", "2", "34.0", "98"],
        ["gamma 0", "25.0", "50.0", "12.5", "-", "1", "31.1", "-"],
        ["hinge", "0.0†", "0.0†", "0.0†", "-", "1", "-", "-"],
    ]


def test_markdown() -> None:
    text = example().to_markdown()
    scores, claims, settings = markdown_tables(text)
    assert scores[0][-5:] == ["paper AP", "paper AP50", "paper AP75", "paper APl", "paper ms"]
    assert scores[1] == [":--", *["--:"] * 11]
    assert scores[2][:2] == ["gamma 2", "31.0 ± 1.4"]
    assert scores[2][-5:] == ["34.0", "52.5", "36.5", "-", "98"]
    assert len(scores) == 5
    assert claims[2] == [
        "gamma 2 over gamma 0",
        "34.0 (gamma 2) vs 31.1 (gamma 0): +2.9",
        "31.0 ± 1.4 (gamma 2) vs 25.0 (gamma 0): +6.0",
        "holds (one seed)",
    ]
    assert settings[2] == ["data.image\\_size", "600", "256"]
    assert settings[3] == ["loss.box", "smooth\\_l1", "l1|giou"]
    assert "**Not a COCO result: measured on nuclei, 1,200 steps per row." in text
    assert "- † hinge: 1 of 1 training diverged and counts as 0\n" in text
    assert "- hinge: seed 1 failed: disk \\| full\n" in text
    assert "```sh\nretinanet paper run table3 --data nuclei\n```" in text
    assert "- machine: 4 cores" in text
    assert "A note." in text


def test_only_coco_at_full_length_is_a_coco_result() -> None:
    assert "Not a COCO result" not in collect({}, about={**ABOUT, "coco": True}).to_markdown()
    text = collect({}, about={}).to_markdown()
    assert "Not a COCO result: measured on other data." in text


def test_json_of_another_version_is_rejected() -> None:
    text = example().to_json()
    assert json.loads(text)["rows"][0]["scores"]["AP"]["mean"] == pytest.approx(31.0)
    assert TableResult.from_json(text).rows[0].by_seed == pytest.approx({0: 30.0, 1: 32.0})
    with pytest.raises(ValueError, match="lines"):
        TableResult.from_json(text.replace('"rows": [', '"lines": ['))
    with pytest.raises(ValueError, match="figures"):
        TableResult.from_json(text.replace('"scores": {', '"figures": {'))


def test_about_is_converted_to_json() -> None:
    assert collect({}, about={"data": Path("x")}).about == {"data": "x"}


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_every_experiment_in_every_format(name: str) -> None:
    experiment = EXPERIMENTS[name]
    outcomes = {row.key: done(0.3, 0.31, name=row.key) for row in experiment.rows if row.trained}
    times = dict.fromkeys(outcomes, 40.0)
    result = collect_results(experiment, outcomes, ABOUT, milliseconds=times)
    assert TableResult.from_json(result.to_json()) == result
    assert result.heading in result.to_markdown()
    assert ("Not a COCO result" in result.to_markdown()) == bool(experiment.rows)
    for wide in (False, True):
        table = result.table(wide=wide)
        assert all(len(row) == len(table.columns) for row in table.rows)
    # All rows are equal: no order is found, and every "about" holds.
    assert {claim.verdict for claim in result.claims} <= {"not separated", "holds"}
