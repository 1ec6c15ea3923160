"""Trainings to scores and verdicts, with numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from results_setup import OVER, collect, done, metrics, trainings

from retinanet.paper.claims import (
    evaluate_claim,
    evaluate_loss_shares,
    t_quantile,
)
from retinanet.paper.results import ClaimResult, Outcome, Result, RowResult, Score
from retinanet.paper.tables import Claim, Kind, Published


def verdict(
    first: Sequence[float], second: Sequence[float], kind: Kind = "over", within: float = 0.0
) -> ClaimResult:
    claim = Claim("it", kind, ("a",), ("b",), within)
    (result,) = collect(trainings(a=first, b=second), claim).claims
    return result


# --- scores ---------------------------------------------------------------------------------------


def test_scores_are_mean_and_std_in_points() -> None:
    row = collect({"a": done(0.30, 0.32, 0.37)}).rows[0]
    # Mean 33; deviations -3, -1, 4: squares 9 + 1 + 16 = 26, over n - 1 = 2: 13.
    assert row.scores["AP"].mean == pytest.approx(33.0)
    assert row.scores["AP"].std == pytest.approx(math.sqrt(13))
    assert row.scores["AP50"].mean == pytest.approx(66.0)
    assert row.scores["AP75"].std == pytest.approx(math.sqrt(13) / 2)
    assert row.scores["APl"] == Score(50.0, 0.0)
    assert row.by_seed == pytest.approx({0: 30.0, 1: 32.0, 2: 37.0})
    assert (row.seeds, row.diverged, row.notes) == (3, 0, ())
    assert row.measured("AP") == "33.0 ± 3.6"
    assert row.folders == ("runs/x/seed-0", "runs/x/seed-1", "runs/x/seed-2")
    row = collect({"a": done(0.304)}).rows[0]
    assert row.scores["AP"].std is None
    assert row.measured("AP") == "30.4"


def test_diverged_training_counts_as_0() -> None:
    result = collect({"a": [*done(0.30, 0.30), Outcome(2, Result("diverged"), "runs/x/seed-2")]})
    row = result.rows[0]
    # (30 + 30 + 0) / 3 = 20; squares 100 + 100 + 400 over 2: 300.
    assert row.scores["AP"].mean == pytest.approx(20.0)
    assert row.scores["AP"].std == pytest.approx(math.sqrt(300))
    assert (row.seeds, row.diverged) == (3, 1)
    assert row.measured("AP") == "20.0 ± 17.3†"
    assert row.by_seed == pytest.approx({0: 30.0, 1: 30.0, 2: 0.0})
    assert result.footnotes == ["† gamma 2: 1 of 3 trainings diverged and counts as 0"]
    result = collect({"c": [Outcome(0, Result("diverged")), Outcome(1, Result("diverged"))]})
    assert result.rows[2].measured("APl") == "0.0 ± 0.0†"
    assert result.footnotes == ["† hinge: 2 of 2 trainings diverged and count as 0"]


def test_size_without_objects_has_no_score() -> None:
    outcomes = [
        Outcome(0, Result("done", metrics=metrics(0.3, None))),
        Outcome(1, Result("done", metrics=metrics(0.3, math.nan))),
        Outcome(2, Result("diverged")),
    ]
    row = collect({"a": outcomes}).rows[0]
    assert "APl" not in row.scores
    assert row.measured("APl") == "-"
    assert row.scores["AP"].mean == pytest.approx(20.0)


def test_failed_training_is_noted_and_not_counted() -> None:
    failed = Outcome(1, Result("failed", note="no memory left"), "runs/x/seed-1")
    result = collect({"a": [*done(0.3), failed]})
    assert (result.rows[0].seeds, result.rows[0].scores["AP"].std) == (1, None)
    assert result.rows[0].folders == ("runs/x/seed-0", "runs/x/seed-1")
    assert result.footnotes == ["gamma 2: seed 1 failed: no memory left"]


# --- verdicts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "dof", "expected"),
    [
        # From printed tables of Student's t.
        *((0.05, 1, 12.706), (0.05, 2, 4.303), (0.05, 3, 3.182), (0.05, 4, 2.776)),
        *((0.05, 5, 2.571), (0.05, 10, 2.228), (0.05, 30, 2.042), (0.05, 1000, 1.962)),
        *((0.1, 6, 1.943), (0.01, 1, 63.657), (0.01, 2, 9.925), (0.01, 7, 3.499)),
        *((0.001, 3, 12.924), (0.001, 8, 5.041)),
    ],
)
def test_t_quantile_equals_printed_tables(level: float, dof: int, expected: float) -> None:
    assert t_quantile(level, dof) == pytest.approx(expected, abs=6e-4)


FLAT = (0.30, 0.30, 0.30)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # Differences 2, 3, 4: mean 3; deviation 1, over sqrt(3) .577, times t(2) 4.303: 2.484.
        ((0.32, 0.33, 0.34), FLAT, "holds"),
        (FLAT, (0.32, 0.33, 0.34), "does not hold"),
        ((0.31, 0.32, 0.33), FLAT, "not separated"),  # mean 2 < 2.484
        (FLAT, (0.31, 0.32, 0.33), "not separated"),
        # On either side of 2.484.
        ((0.3149, 0.3249, 0.3349), FLAT, "holds"),
        ((0.3148, 0.3248, 0.3348), FLAT, "not separated"),
        # Seeds move both rows alike by 10 points; the differences are 1, 1 and .9 all the same.
        ((0.20, 0.30, 0.40), (0.19, 0.29, 0.391), "holds"),
        # Two seeds: differences 2 and 3: .5 times t(1) 12.706: 6.353.
        ((0.32, 0.33), (0.30, 0.30), "not separated"),
        ((0.3635, 0.3735), (0.305, 0.305), "not separated"),  # 5.85 and 6.85: 6.35
        ((0.3636, 0.3736), (0.305, 0.305), "holds"),  # 5.86 and 6.86: 6.36
        ((0.30, 0.30), (0.299, 0.299), "holds"),  # no deviation at all
        ((0.299, 0.299), (0.30, 0.30), "does not hold"),
        ((0.30, 0.30), (0.30, 0.30), "not separated"),  # equal: no order
        ((0.310,), (0.305,), "holds (one seed)"),
        ((0.305,), (0.310,), "does not hold (one seed)"),
        ((0.310,), (0.310,), "not separated (one seed)"),
        ((0.310,), (0.300, 0.309), "holds (one seed)"),  # one side alone has a deviation
    ],
)
def test_over(first: Sequence[float], second: Sequence[float], expected: str) -> None:
    assert verdict(first, second).marked_verdict == expected


def test_other_seeds_are_compared_by_welchs_t() -> None:
    # Variances 5/3 and 1, over 4 and 3: .4167 + .3333 = .75; squares over n - 1: .0579 + .0556;
    # .5625 / .1134 = 4.96 degrees, so 4: t 2.776, times sqrt(.75): 2.404.
    four = (0.30, 0.31, 0.32, 0.33)
    result = verdict(four, (0.20, 0.21, 0.22))
    assert result.here is not None
    assert result.here.difference == pytest.approx(10.5)
    assert result.here.half_width == pytest.approx(2.404, abs=1e-3)
    assert result.verdict == "holds"
    assert verdict(four, (0.281, 0.291, 0.301)).verdict == "not separated"
    assert verdict(four, (0.280, 0.290, 0.300)).verdict == "holds"  # 2.5
    # As many seeds, but other ones: 1/3 + 1/3 with 4 degrees: 2.776 * .8165 = 2.267.
    others = [
        Outcome(seed + 5, Result("done", metrics=metrics(ap)))
        for seed, ap in enumerate((0.3, 0.31, 0.32))
    ]
    (result,) = collect(trainings(a=(0.33, 0.34, 0.35)) | {"b": others}, OVER).claims
    assert result.here is not None
    assert result.here.half_width == pytest.approx(2.267, abs=1e-3)
    # Without any deviation there are no degrees of freedom.
    assert verdict((0.3, 0.3, 0.3), (0.2, 0.2)).marked_verdict == "holds"


@pytest.mark.parametrize(
    ("kind", "difference", "expected"),
    [
        # Within 3 points; three seeds whose difference varies by 1 either way: half-width 2.484.
        ("about", 0.0, "holds"),
        ("about", 0.5, "holds"),  # 2.5 from the bound
        ("about", 0.6, "not separated"),  # 2.4 from it
        ("about", -0.6, "not separated"),
        ("about", 5.4, "not separated"),  # 2.4 beyond
        ("about", 5.5, "does not hold"),  # 2.5 beyond
        ("about", -5.5, "does not hold"),
        ("at_least", 9.0, "holds"),  # however much better
        ("at_least", -0.5, "holds"),  # 2.5 from the bound
        ("at_least", -0.6, "not separated"),
        ("at_least", -5.4, "not separated"),
        ("at_least", -5.5, "does not hold"),
    ],
)
def test_about_and_at_least(kind: Kind, difference: float, expected: str) -> None:
    first = [0.3 + (difference + noise) / 100 for noise in (-1, 0, 1)]
    assert verdict(first, FLAT, kind, 3.0).verdict == expected


@pytest.mark.parametrize(
    ("kind", "first", "second", "expected"),
    [
        ("about", 0.35, 0.34, "holds"),
        ("about", 0.28, 0.27, "holds"),  # 1.0000000000000036 in floating point
        ("about", 0.3501, 0.34, "does not hold"),
        ("at_least", 0.27, 0.28, "holds"),
        ("at_least", 0.2699, 0.28, "does not hold"),
    ],
)
def test_bounds_are_inclusive(kind: Kind, first: float, second: float, expected: str) -> None:
    assert verdict((first,), (second,), kind, 1.0).marked_verdict == f"{expected} (one seed)"


@pytest.mark.parametrize("kind", ["over", "at_least", "about"])
def test_rows_with_an_ap_of_about_0_are_not_separated(kind: Kind) -> None:
    result = verdict((0.0004,), (0.0006,), kind, 1.0)  # 0.0 and 0.1 are printed
    assert result.marked_verdict == "not separated (one seed, nothing found)"
    assert result.cells()[2].endswith("; nothing found: both under 0.15 points")
    assert verdict((0.00149,), (0.0001,), kind, 1.0).verdict == "not separated"
    assert verdict((0.0016,), (0.0001,), kind, 1.0).verdict == "holds"


def test_side_without_results_is_not_measured() -> None:
    for outcomes in ({"a": done(0.3)}, {"a": done(0.3), "b": [Outcome(0, Result("failed"))]}):
        (result,) = collect(outcomes, OVER).claims
        assert result.marked_verdict == "not measured"
        assert result.cells() == (OVER.text, "34.0 (gamma 2) vs 31.1 (gamma 0): +2.9", "-")


@pytest.mark.parametrize("kind", ["over", "at_least", "about", "faster"])
def test_one_training_on_both_sides_measures_nothing(kind: Kind) -> None:
    claim = Claim("it", kind, ("a",), ("b", "c"), 1.0)
    measured = {"a": done(0.3, 0.31), "b": done(0.3, 0.31)}
    (result,) = collect(measured, claim, milliseconds={"a": 20.0, "b": 20.0}).claims
    assert result.marked_verdict == "not measured (one training)"
    assert result.cells()[2] == "one training on both sides"
    assert result.cells(labels=False)[2] == "-"


def test_cells_of_a_claim() -> None:
    (result,) = collect(trainings(a=(0.30, 0.32), b=(0.25, 0.265)), OVER).claims
    # Differences 5 and 5.5: deviation .354, over sqrt(2) .25, times 12.706: 3.18.
    assert result.cells() == (
        "gamma 2 over gamma 0",
        "34.0 (gamma 2) vs 31.1 (gamma 0): +2.9",
        "31.0 ± 1.4 (gamma 2) vs 25.8 ± 1.1 (gamma 0): +5.2 ± 3.2",
    )
    assert result.cells(labels=False)[1:] == (
        "34.0 vs 31.1: +2.9",
        "31.0 ± 1.4 vs 25.8 ± 1.1: +5.2 ± 3.2",
    )
    # A difference that is rounded to 0 has no minus.
    assert verdict((0.3,), (0.3003,)).cells(labels=False)[2] == "30.0 vs 30.0: +0.0"
    # Rows without published values.
    rows = {
        "a": RowResult("a", "A", scores={"AP": Score(3.0)}, published=Published(1.0)),
        "b": RowResult("b", "B", scores={"AP": Score(2.0)}),
    }
    assert evaluate_claim(OVER, rows).cells()[1:] == ("-", "3.0 (A) vs 2.0 (B): +1.0")


def test_best_row_of_a_side_counts_with_a_wider_interval() -> None:
    claim = Claim("FL over the rest", "over", ("a",), ("b", "c"))
    (result,) = collect(trainings(a=(0.30,), b=(0.20,), c=(0.31,)), claim).claims
    assert result.verdict == "does not hold"
    assert result.cells()[2] == "30.0 (gamma 2) vs 31.0 (hinge, best of 2): -1.0"
    assert result.cells(labels=False)[2] == "30.0 vs 31.0 (best of 2): -1.0"
    # Differences 2, 3, 4 hold beside one row: 3 > 2.484. For the best of two, 5% / 2 of t(2) is
    # 6.205: times .577 it is 3.583.
    alone = trainings(a=(0.32, 0.33, 0.34), b=FLAT)
    (result,) = collect(alone, claim).claims
    assert result.marked_verdict == "holds (rows missing)"
    assert result.cells()[2].endswith("; without hinge: not measured")
    (result,) = collect(alone | trainings(c=(0.29, 0.29, 0.29)), claim).claims
    assert result.marked_verdict == "not separated"
    assert result.here is not None
    assert result.here.half_width == pytest.approx(3.583, abs=1e-3)
    # Two rows that are one training are one choice.
    (result,) = collect(alone | {"c": alone["b"]}, claim).claims
    assert result.marked_verdict == "holds"
    assert result.here is not None
    assert (result.here.first.num_rows, result.here.second.num_rows) == (1, 1)


PRINTED = (("A-101", 122.0), ("B-101", 172.0))
FASTER = Claim("a faster than b", "faster", ("a",), ("b",), printed=PRINTED)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (94.0, 100.0, "holds"),  # 5% of the longer time are 5
        (96.0, 100.0, "not separated"),
        (100.0, 96.0, "not separated"),
        (100.0, 94.0, "does not hold"),
    ],
)
def test_faster(first: float, second: float, expected: str) -> None:
    # Neither AP nor the number of seeds matters.
    times = {"a": first, "b": second}
    (result,) = collect(trainings(a=(0.1,)), FASTER, milliseconds=times).claims
    assert result.marked_verdict == expected


def test_cells_of_times() -> None:
    (result,) = collect({}, FASTER, milliseconds={"a": 90.04, "b": 100.0}).claims
    assert result.cells()[1:] == (
        "122 ms (A-101) vs 172 ms (B-101): -50 ms",
        "90.0 ms (gamma 2) vs 100.0 ms (gamma 0): -10.0 ± 5.0 ms",
    )
    claim = Claim("it", "faster", ("a",), ("b", "c"))
    (result,) = collect({}, claim, milliseconds={"a": 90.0, "b": 100.0, "c": 80.0}).claims
    assert result.verdict == "does not hold"
    fastest = "90.0 ms (gamma 2) vs 80.0 ms (hinge, best of 2): +10.0 ± 4.5 ms"
    assert result.cells()[1:] == ("-", fastest)
    aps = trainings(a=(0.3,), b=(0.2,))
    (result,) = collect(aps, FASTER, milliseconds={"a": 3.0}).claims
    assert result.marked_verdict == "not measured"


# --- figure 4 -------------------------------------------------------------------------------------


def shares(positives: tuple[float, float], negatives: tuple[float, float]) -> list[ClaimResult]:
    """Evaluate shares of the hardest 20% with gamma 0 and 2."""
    pairs = {"positives": positives, "negatives": negatives}
    hardest = {kind: {0.0: first, 1.0: 0.5, 2.0: last} for kind, (first, last) in pairs.items()}
    return list(evaluate_loss_shares(hardest))


def test_loss_shares_of_the_paper_hold() -> None:
    positives, negatives = shares((0.42, 0.65), (0.56, 0.996))
    assert positives.marked_verdict == negatives.marked_verdict == "holds (one seed)"
    assert positives.cells()[1:] == (
        "-",
        "65% (hardest 20% of positives, gamma 2) vs 42% (gamma 0): +23%",
    )
    assert negatives.cells(labels=False)[2] == "100% vs 56%: +44%"


def test_loss_shares_change_where_the_easier_part_keeps_half() -> None:
    # The easier 80% hold 60% with gamma 0; half of that is 30%, so that the hardest hold 70%.
    below, above = (0.40, 0.69), (0.40, 0.71)
    assert [claim.verdict for claim in shares(below, below)] == ["holds", "does not hold"]
    assert [claim.verdict for claim in shares(above, above)] == ["does not hold", "holds"]
    # Negatives of which the hardest hold nearly all with gamma 0 already can still concentrate.
    assert shares(below, (0.95, 0.999))[1].verdict == "holds"


def test_loss_shares_without_a_loss_are_not_measured() -> None:
    results = shares((math.nan, math.nan), (0.5, math.nan))
    assert [claim.marked_verdict for claim in results] == ["not measured"] * 2
    assert results[0].cells()[2] == "the positives have no loss"
