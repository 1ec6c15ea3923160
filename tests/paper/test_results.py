"""Outcomes to tables and verdicts, by hand-made numbers."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest

from retinanet.paper.experiments import Claim, Experiment, Published, Row
from retinanet.paper.results import (
    ClaimResult,
    Figure,
    Outcome,
    RowResult,
    TableResult,
    gather,
    judge,
)
from retinanet.paper.tables import EXPERIMENTS

ABOUT = {
    "command": "retinanet paper run table3 --data nuclei",
    "data": "nuclei",
    "steps": 1200,
    "seeds": 3,
    "machine": "4 cores",
    "settings": [("data.image_size", 600, 256), ("loss.box", "smooth_l1", "l1|giou")],
    "coco": False,
}


def metrics(ap: float, ap_large: float | None = 0.5) -> dict[str, Any]:
    """Shares, as an evaluation gives them; the others in proportion."""
    return {
        "ap": ap,
        "ap50": 2 * ap,
        "ap75": ap / 2,
        "ap_small": ap,
        "ap_medium": ap,
        "ap_large": ap_large,
        "images": 10,
    }


def done(*aps: float) -> list[Outcome]:
    return [
        Outcome(seed, "done", metrics(ap), f"runs/x/seed-{seed}") for seed, ap in enumerate(aps)
    ]


def table(*claims: Claim) -> Experiment:
    rows = (
        Row("a", "gamma 2", published=Published(34.0, 52.5, 36.5, milliseconds=98)),
        Row("b", "gamma 0", published=Published(31.1)),
        Row("c", "hinge"),
    )
    columns = ("AP", "AP50", "AP75", "APl", "ms")
    return Experiment("table1b", "Gamma", "Sec. 5", "COCO", columns, rows, claims, note="A note.")


OVER = Claim("gamma 2 over gamma 0", "over", ("a",), ("b",))


def verdict(
    first: Sequence[float],
    second: Sequence[float],
    kind: Literal["over", "about"] = "over",
    within: float = 0.0,
) -> ClaimResult:
    claim = Claim("it", kind, ("a",), ("b",), within)
    outcomes = {"a": done(*first), "b": done(*second)}
    (found,) = gather(table(claim), outcomes, ABOUT).claims
    return found


# --- figures -------------------------------------------------------------------------------------


def test_mean_and_deviation_in_points() -> None:
    row = gather(table(), {"a": done(0.30, 0.32, 0.37)}, ABOUT).lines[0]
    # Mean 33; deviations -3, -1, 4: squares 9 + 1 + 16 = 26, over n - 1 = 2: 13.
    assert row.figures["AP"].mean == pytest.approx(33.0)
    assert row.figures["AP"].deviation == pytest.approx(math.sqrt(13))
    assert row.figures["AP50"].mean == pytest.approx(66.0)
    assert row.figures["AP75"].deviation == pytest.approx(math.sqrt(13) / 2)
    assert row.figures["APl"] == Figure(50.0, 0.0)
    assert (row.seeds, row.diverged, row.notes) == (3, 0, ())
    assert row.measured("AP") == "33.0 ± 3.6"
    assert row.folders == ("runs/x/seed-0", "runs/x/seed-1", "runs/x/seed-2")


def test_one_seed_has_no_deviation() -> None:
    row = gather(table(), {"a": done(0.304)}, ABOUT).lines[0]
    assert row.figures["AP"].mean == pytest.approx(30.4)
    assert row.figures["AP"].deviation is None
    assert row.measured("AP") == "30.4"


def test_a_diverged_training_counts_as_0() -> None:
    outcomes = [*done(0.30, 0.30), Outcome(2, "diverged", None, "runs/x/seed-2")]
    result = gather(table(), {"a": outcomes}, ABOUT)
    row = result.lines[0]
    # (30 + 30 + 0) / 3 = 20; squares 100 + 100 + 400 over 2: 300.
    assert row.figures["AP"].mean == pytest.approx(20.0)
    assert row.figures["AP"].deviation == pytest.approx(math.sqrt(300))
    assert (row.seeds, row.diverged) == (3, 1)
    assert row.measured("AP") == "20.0 ± 17.3†"
    assert result.footnotes == ["† gamma 2: 1 of 3 trainings diverged and counts as 0"]


def test_all_diverged_is_0() -> None:
    result = gather(table(), {"c": [Outcome(0, "diverged"), Outcome(1, "diverged")]}, ABOUT)
    assert result.lines[2].measured("APl") == "0.0 ± 0.0†"
    assert result.footnotes == ["† hinge: 2 of 2 trainings diverged and count as 0"]


def test_a_size_without_objects_is_no_0() -> None:
    outcomes = [
        Outcome(0, "done", metrics(0.3, None)),
        Outcome(1, "done", metrics(0.3, math.nan)),
        Outcome(2, "diverged"),
    ]
    row = gather(table(), {"a": outcomes}, ABOUT).lines[0]
    assert "APl" not in row.figures
    assert row.measured("APl") == "-"
    assert row.figures["AP"].mean == pytest.approx(20.0)


def test_failed_and_missing_trainings_are_named_and_not_counted() -> None:
    outcomes = [
        *done(0.3),
        Outcome(1, "failed", None, "runs/x/seed-1", "no memory left"),
        Outcome(2, "missing", None, "runs/x/seed-2"),
    ]
    result = gather(table(), {"a": outcomes}, ABOUT)
    row = result.lines[0]
    assert (row.seeds, row.figures["AP"].deviation) == (1, None)
    assert row.folders == ("runs/x/seed-0", "runs/x/seed-1")
    assert result.footnotes == [
        "gamma 2: seed 1 failed: no memory left",
        "gamma 2: seed 2 is missing",
    ]


def test_an_unknown_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"table1b has no row 'd': a, b, c"):
        gather(table(), {"d": done(0.1)}, ABOUT)
    with pytest.raises(ValueError, match=r"table1b has no row 'e': a, b, c"):
        gather(table(), {}, ABOUT, milliseconds={"e": 3.0})


@pytest.mark.parametrize("numbers", [None, {"ap": 0.3}])
def test_a_done_training_without_figures_is_refused(numbers: Mapping[str, Any] | None) -> None:
    outcome = Outcome(4, "done", numbers, "runs/y")
    with pytest.raises(ValueError, match=r"gamma 2, seed 4: done, but .* \(runs/y\): evaluate"):
        gather(table(), {"a": [outcome]}, ABOUT)


# --- verdicts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # Deviations: {30, 32} gives sqrt(2), twice that together: hypot(sqrt 2, sqrt 2) = 2.
        ((0.300, 0.320), (0.279, 0.299), "holds"),  # 31.0 - 28.9 = 2.1 > 2
        ((0.300, 0.320), (0.281, 0.301), "not separated"),  # 31.0 - 29.1 = 1.9 < 2
        ((0.281, 0.301), (0.300, 0.320), "not separated"),
        ((0.279, 0.299), (0.300, 0.320), "does not hold"),
        ((0.300, 0.300), (0.299, 0.299), "holds"),  # no deviation at all
        ((0.299, 0.299), (0.300, 0.300), "does not hold"),
        ((0.300, 0.300), (0.300, 0.300), "not separated"),  # equal: no order
    ],
)
def test_over(first: Sequence[float], second: Sequence[float], expected: str) -> None:
    found = verdict(first, second)
    assert (found.verdict, found.said, found.one_seed) == (expected, expected, False)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0.310,), (0.305,), "holds"),
        ((0.305,), (0.310,), "does not hold"),
        ((0.310,), (0.310,), "not separated"),
        ((0.310,), (0.300, 0.309), "holds"),  # one side alone has a deviation
    ],
)
def test_over_with_one_seed(first: Sequence[float], second: Sequence[float], expected: str) -> None:
    found = verdict(first, second)
    assert (found.verdict, found.said) == (expected, f"{expected} (one seed)")


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # Within 3 points; deviation of the difference 2.
        ((0.300, 0.320), (0.300, 0.320), "holds"),  # 0 apart: 3 > 2 from turning
        ((0.300, 0.320), (0.291, 0.311), "holds"),  # .9 apart: 2.1 from turning
        ((0.300, 0.320), (0.289, 0.309), "not separated"),  # 1.1 apart: 1.9 from turning
        ((0.289, 0.309), (0.300, 0.320), "not separated"),
        ((0.300, 0.320), (0.251, 0.271), "not separated"),  # 4.9 apart: 1.9 beyond
        ((0.300, 0.320), (0.249, 0.269), "does not hold"),  # 5.1 apart: 2.1 beyond
        ((0.249, 0.269), (0.300, 0.320), "does not hold"),
    ],
)
def test_about(first: Sequence[float], second: Sequence[float], expected: str) -> None:
    assert verdict(first, second, "about", 3.0).verdict == expected


def test_about_includes_its_border() -> None:
    assert verdict((0.35,), (0.34,), "about", 1.0).said == "holds (one seed)"
    # 100 * .28 - 100 * .27 is 1.0000000000000036 in floating point.
    assert verdict((0.28,), (0.27,), "about", 1.0).said == "holds (one seed)"
    assert verdict((0.3501,), (0.34,), "about", 1.0).said == "does not hold (one seed)"


@pytest.mark.parametrize("kind", ["over", "about"])
def test_rows_that_found_nothing_have_no_order(kind: Literal["over", "about"]) -> None:
    # 0.0 is printed of both.
    assert verdict((0.0004,), (0.0001,), kind, 1.0).verdict == "not separated"
    assert verdict((0.0006,), (0.0001,), kind, 1.0).verdict == "holds"


def test_not_measured() -> None:
    (found,) = gather(table(OVER), {"a": done(0.3)}, ABOUT).claims
    assert (found.verdict, found.said) == ("not measured", "not measured")
    assert found.cells() == (OVER.text, "34.0 (gamma 2) against 31.1 (gamma 0): +2.9", "-")
    (found,) = gather(table(OVER), {"a": done(0.3), "b": [Outcome(0, "failed")]}, ABOUT).claims
    assert found.verdict == "not measured"


def test_words() -> None:
    outcomes = {"a": done(0.30, 0.32), "b": done(0.25, 0.27)}
    (found,) = gather(table(OVER), outcomes, ABOUT).claims
    assert found.cells() == (
        "gamma 2 over gamma 0",
        "34.0 (gamma 2) against 31.1 (gamma 0): +2.9",
        "31.0 ± 1.4 (gamma 2) against 26.0 ± 1.4 (gamma 0): +5.0 ± 2.0",
    )
    assert found.brief_cells() == (
        "gamma 2 over gamma 0",
        "34.0 vs 31.1: +2.9",
        "31.0 ± 1.4 vs 26.0 ± 1.4: +5.0 ± 2.0",
    )


def test_a_difference_that_rounds_to_0_has_no_minus() -> None:
    assert verdict((0.3,), (0.3003,)).brief_cells()[2] == "30.0 vs 30.0: +0.0"
    assert verdict((0.3, 0.3), (0.301, 0.302)).brief_cells()[2].endswith(": -0.1 ± 0.1")


def test_the_best_row_of_a_side_counts() -> None:
    claim = Claim("FL over the rest", "over", ("a",), ("b", "c"))
    outcomes = {"a": done(0.30), "b": done(0.20), "c": done(0.31)}
    (found,) = gather(table(claim), outcomes, ABOUT).claims
    assert found.verdict == "does not hold"
    assert found.cells()[2] == "30.0 (gamma 2) against 31.0 (hinge): -1.0"
    assert found.note == ""


def test_rows_of_a_claim_that_are_missing_are_named() -> None:
    claim = Claim("FL over the rest", "over", ("a",), ("b", "c"))
    (found,) = gather(table(claim), {"a": done(0.3), "b": done(0.2)}, ABOUT).claims
    assert found.said == "holds (one seed, rows missing)"
    assert found.cells()[2].endswith(": +10.0; without hinge: not measured")


def test_a_side_without_published_figures() -> None:
    rows = {
        "a": RowResult("a", "A", figures={"AP": Figure(3.0)}, published=Published(1.0)),
        "b": RowResult("b", "B", figures={"AP": Figure(2.0)}),
    }
    assert judge(OVER, rows).cells()[1:] == ("-", "3.0 (A) against 2.0 (B): +1.0")


# --- forms ---------------------------------------------------------------------------------------


def example() -> TableResult:
    outcomes = {
        "a": done(0.30, 0.32),
        "b": done(0.25),
        "c": [Outcome(0, "diverged"), Outcome(1, "failed", note="disk | full")],
    }
    return gather(table(OVER), outcomes, ABOUT, milliseconds={"a": 12.34})


def cells(line: str) -> list[str]:
    """The cells of a line of a Markdown table."""
    inner = line.strip().removeprefix("|").removesuffix("|").replace("\\|", "\0")
    return [cell.strip().replace("\0", "|") for cell in inner.split("|")]


def markdown_tables(text: str) -> list[list[list[str]]]:
    blocks = [block.splitlines() for block in text.split("\n\n")]
    return [[cells(line) for line in block] for block in blocks if block[0].startswith("|")]


def test_rows_for_a_terminal() -> None:
    result = example()
    assert result.heading == "Table 1b: Gamma"
    assert result.columns == (
        *("", "AP", "AP50", "AP75", "APl", "ms", "seeds"),
        *("paper AP", "paper ms"),
    )
    assert result.rows == [
        [
            *("gamma 2", "31.0 ± 1.4", "62.0 ± 2.8", "15.5 ± 0.7", "50.0 ± 0.0"),
            *("12.3", "2", "34.0", "98"),
        ],
        ["gamma 0", "25.0", "50.0", "12.5", "50.0", "-", "1", "31.1", "-"],
        ["hinge", "0.0†", "0.0†", "0.0†", "0.0†", "-", "1", "-", "-"],
    ]


def test_markdown() -> None:
    text = example().to_markdown()
    figures, claims, settings = markdown_tables(text)
    assert figures[0][-5:] == ["paper AP", "paper AP50", "paper AP75", "paper APl", "paper ms"]
    assert figures[1] == [":--", *["--:"] * 11]
    assert figures[2][:2] == ["gamma 2", "31.0 ± 1.4"]
    assert figures[2][-5:] == ["34.0", "52.5", "36.5", "-", "98"]
    assert len(figures) == 5
    assert all(len(row) == 12 for row in figures)
    assert claims[2] == [
        "gamma 2 over gamma 0",
        "34.0 (gamma 2) against 31.1 (gamma 0): +2.9",
        "31.0 ± 1.4 (gamma 2) against 25.0 (gamma 0): +6.0",
        "holds (one seed)",
    ]
    assert settings[2] == ["data.image\\_size", "600", "256"]
    assert settings[3] == ["loss.box", "smooth\\_l1", "l1|giou"]
    assert "**Not a COCO result: measured on nuclei, 1,200 steps a row." in text
    assert "- † hinge: 1 of 1 training diverged and counts as 0\n" in text
    assert "- hinge: seed 1 failed: disk \\| full\n" in text
    assert "```sh\nretinanet paper run table3 --data nuclei\n```" in text
    assert "- machine: 4 cores" in text
    assert "A note." in text


def test_markdown_says_which_rows_a_claim_lacks() -> None:
    claim = Claim("FL over the rest", "over", ("a",), ("b", "c"))
    text = gather(table(claim), {"a": done(0.3), "b": done(0.2)}, ABOUT).to_markdown()
    assert markdown_tables(text)[1][2][2].endswith("; without hinge: not measured")


def test_coco_at_full_length_is_a_coco_result() -> None:
    result = gather(table(), {}, {**ABOUT, "coco": True})
    assert "Not a COCO result" not in result.to_markdown()
    assert "Not a COCO result: measured on other data." in gather(table(), {}, {}).to_markdown()


def test_csv() -> None:
    lines = list(csv.DictReader(io.StringIO(example().to_csv())))
    assert [line["key"] for line in lines] == ["a", "b", "c"]
    first, second, third = lines
    assert float(first["AP"]) == pytest.approx(31.0)
    assert float(first["AP_deviation"]) == pytest.approx(math.sqrt(2), abs=1e-3)
    assert (first["ms"], first["seeds"], first["paper_ms"]) == ("12.340", "2", "98")
    assert (first["paper_AP"], first["paper_AP50"], first["paper_APs"]) == ("34", "52.5", "")
    assert (second["AP"], second["AP_deviation"], second["ms"]) == ("25.000", "", "")
    assert (third["AP"], third["diverged"], third["paper_AP"]) == ("0.000", "1", "")
    assert {(line["data"], line["coco"]) for line in lines} == {("nuclei", "no")}
    assert {line["experiment"] for line in lines} == {"table1b"}


def test_json_comes_back_equal() -> None:
    result = example()
    assert TableResult.from_json(result.to_json()) == result
    assert json.loads(result.to_json())["lines"][0]["figures"]["AP"]["mean"] == pytest.approx(31.0)


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_every_experiment_in_every_form(name: str) -> None:
    experiment = EXPERIMENTS[name]
    outcomes = {row.key: done(0.3, 0.31) for row in experiment.rows if row.trained}
    result = gather(experiment, outcomes, ABOUT)
    assert TableResult.from_json(result.to_json()) == result
    assert len(list(csv.DictReader(io.StringIO(result.to_csv())))) == len(experiment.rows)
    assert result.heading in result.to_markdown()
    assert ("Not a COCO result" in result.to_markdown()) == bool(experiment.rows)
    assert all(len(row) == len(result.columns) for row in result.rows)
    assert all(len(row) == len(result.wide_columns) for row in result.wide_rows)
    # Every row of this table comes out alike, so that no order is found and every "about" holds.
    assert {claim.verdict for claim in result.claims} <= {"not separated", "holds"}


def test_things_that_json_does_not_know_are_kept_as_text(tmp_path: Any) -> None:
    result = gather(table(), {}, {"data": tmp_path})
    assert result.about == {"data": str(tmp_path)}
