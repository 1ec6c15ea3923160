"""Outcomes to tables and verdicts, by hand-made numbers."""

from __future__ import annotations

import csv
import io
import json
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from retinanet.paper.claims import (
    Outcome,
    collect_results,
    evaluate_claim,
    evaluate_loss_shares,
    t_quantile,
)
from retinanet.paper.experiments import Claim, Experiment, Kind, Published, Row
from retinanet.paper.results import ClaimResult, RowResult, Score, TableResult
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


def done(*aps: float, name: str = "x") -> list[Outcome]:
    return [
        Outcome(seed, "done", metrics(ap), f"runs/{name}/seed-{seed}")
        for seed, ap in enumerate(aps)
    ]


def trainings(**aps: Sequence[float]) -> dict[str, list[Outcome]]:
    """By row, so many trainings each, in run folders of its own."""
    return {key: done(*of_row, name=key) for key, of_row in aps.items()}


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
    first: Sequence[float], second: Sequence[float], kind: Kind = "over", within: float = 0.0
) -> ClaimResult:
    claim = Claim("it", kind, ("a",), ("b",), within)
    (found,) = collect_results(table(claim), trainings(a=first, b=second), ABOUT).claims
    return found


# --- figures -------------------------------------------------------------------------------------


def test_mean_and_deviation_in_points() -> None:
    row = collect_results(table(), {"a": done(0.30, 0.32, 0.37)}, ABOUT).rows[0]
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


def test_one_seed_has_no_deviation() -> None:
    row = collect_results(table(), {"a": done(0.304)}, ABOUT).rows[0]
    assert row.scores["AP"].mean == pytest.approx(30.4)
    assert row.scores["AP"].std is None
    assert row.measured("AP") == "30.4"


def test_a_diverged_training_counts_as_0() -> None:
    outcomes = [*done(0.30, 0.30), Outcome(2, "diverged", None, "runs/x/seed-2")]
    result = collect_results(table(), {"a": outcomes}, ABOUT)
    row = result.rows[0]
    # (30 + 30 + 0) / 3 = 20; squares 100 + 100 + 400 over 2: 300.
    assert row.scores["AP"].mean == pytest.approx(20.0)
    assert row.scores["AP"].std == pytest.approx(math.sqrt(300))
    assert (row.seeds, row.diverged) == (3, 1)
    assert row.measured("AP") == "20.0 ± 17.3†"
    assert row.by_seed == pytest.approx({0: 30.0, 1: 30.0, 2: 0.0})
    assert result.footnotes == ["† gamma 2: 1 of 3 trainings diverged and counts as 0"]


def test_all_diverged_is_0() -> None:
    result = collect_results(
        table(), {"c": [Outcome(0, "diverged"), Outcome(1, "diverged")]}, ABOUT
    )
    assert result.rows[2].measured("APl") == "0.0 ± 0.0†"
    assert result.footnotes == ["† hinge: 2 of 2 trainings diverged and count as 0"]


def test_a_size_without_objects_is_no_0() -> None:
    outcomes = [
        Outcome(0, "done", metrics(0.3, None)),
        Outcome(1, "done", metrics(0.3, math.nan)),
        Outcome(2, "diverged"),
    ]
    row = collect_results(table(), {"a": outcomes}, ABOUT).rows[0]
    assert "APl" not in row.scores
    assert row.measured("APl") == "-"
    assert row.scores["AP"].mean == pytest.approx(20.0)


def test_failed_and_missing_trainings_are_named_and_not_counted() -> None:
    outcomes = [
        *done(0.3),
        Outcome(1, "failed", None, "runs/x/seed-1", "no memory left"),
    ]
    result = collect_results(table(), {"a": outcomes}, ABOUT)
    row = result.rows[0]
    assert (row.seeds, row.scores["AP"].std) == (1, None)
    assert row.folders == ("runs/x/seed-0", "runs/x/seed-1")
    assert result.footnotes == ["gamma 2: seed 1 failed: no memory left"]


def test_an_unknown_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"table1b has no row 'd': a, b, c"):
        collect_results(table(), {"d": done(0.1)}, ABOUT)
    with pytest.raises(ValueError, match=r"table1b has no row 'e': a, b, c"):
        collect_results(table(), {}, ABOUT, milliseconds={"e": 3.0})


@pytest.mark.parametrize("numbers", [None, {"ap": 0.3}])
def test_a_done_training_without_figures_is_refused(numbers: Mapping[str, Any] | None) -> None:
    outcome = Outcome(4, "done", numbers, "runs/y")
    with pytest.raises(ValueError, match=r"gamma 2, seed 4: done, but .* \(runs/y\): evaluate"):
        collect_results(table(), {"a": [outcome]}, ABOUT)


# --- verdicts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beyond", "degrees", "expected"),
    [
        # From printed tables of Student's t.
        *((0.05, 1, 12.706), (0.05, 2, 4.303), (0.05, 3, 3.182), (0.05, 4, 2.776)),
        *((0.05, 5, 2.571), (0.05, 10, 2.228), (0.05, 30, 2.042), (0.05, 1000, 1.962)),
        *((0.1, 6, 1.943), (0.01, 1, 63.657), (0.01, 2, 9.925), (0.01, 7, 3.499)),
        *((0.001, 3, 12.924), (0.001, 8, 5.041)),
    ],
)
def test_t_quantile(beyond: float, degrees: int, expected: float) -> None:
    assert t_quantile(beyond, degrees) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        # Differences 2, 3, 4: mean 3; deviation 1, over sqrt(3) .577, times t(2) 4.303: 2.484.
        ((0.32, 0.33, 0.34), (0.30, 0.30, 0.30), "holds"),
        ((0.30, 0.30, 0.30), (0.32, 0.33, 0.34), "does not hold"),
        ((0.31, 0.32, 0.33), (0.30, 0.30, 0.30), "not separated"),  # mean 2 < 2.484
        ((0.30, 0.30, 0.30), (0.31, 0.32, 0.33), "not separated"),
        # On either side of 2.484.
        ((0.3149, 0.3249, 0.3349), (0.30, 0.30, 0.30), "holds"),
        ((0.3148, 0.3248, 0.3348), (0.30, 0.30, 0.30), "not separated"),
        # Seeds move both rows alike by 10 points; the differences are 1, 1 and .9 all the same.
        ((0.20, 0.30, 0.40), (0.19, 0.29, 0.391), "holds"),
        # Two seeds: differences 2 and 3: .5 times t(1) 12.706: 6.353.
        ((0.32, 0.33), (0.30, 0.30), "not separated"),
        ((0.3635, 0.3735), (0.305, 0.305), "not separated"),  # 5.85 and 6.85: 6.35
        ((0.3636, 0.3736), (0.305, 0.305), "holds"),  # 5.86 and 6.86: 6.36
        ((0.30, 0.30), (0.299, 0.299), "holds"),  # no deviation at all
        ((0.299, 0.299), (0.30, 0.30), "does not hold"),
        ((0.30, 0.30), (0.30, 0.30), "not separated"),  # equal: no order
    ],
)
def test_over(first: Sequence[float], second: Sequence[float], expected: str) -> None:
    found = verdict(first, second)
    assert (found.verdict, found.marked_verdict) == (expected, expected)


def test_rows_with_other_seeds_are_compared_by_welchs_t() -> None:
    # Variances 5/3 and 1, over 4 and 3: .4167 + .3333 = .75; squares over n - 1: .0579 + .0556;
    # .5625 / .1134 = 4.96 degrees, so 4: t 2.776, times sqrt(.75): 2.404.
    found = verdict((0.30, 0.31, 0.32, 0.33), (0.20, 0.21, 0.22))
    assert found.here is not None
    assert found.here.difference == pytest.approx(10.5)
    assert found.here.half_width == pytest.approx(2.404, abs=1e-3)
    assert found.verdict == "holds"
    assert verdict((0.30, 0.31, 0.32, 0.33), (0.281, 0.291, 0.301)).verdict == "not separated"
    assert verdict((0.30, 0.31, 0.32, 0.33), (0.280, 0.290, 0.300)).verdict == "holds"  # 2.5
    # As many seeds, but not the same ones: 1/3 + 1/3 with 4 degrees: 2.776 * .8165 = 2.267.
    others = [Outcome(seed + 5, "done", metrics(ap)) for seed, ap in enumerate((0.3, 0.31, 0.32))]
    measured = trainings(a=(0.33, 0.34, 0.35)) | {"b": others}
    (found,) = collect_results(table(OVER), measured, ABOUT).claims
    assert found.here is not None
    assert found.here.half_width == pytest.approx(2.267, abs=1e-3)
    # Without any deviation there is nothing to take the degrees from.
    assert verdict((0.3, 0.3, 0.3), (0.2, 0.2)).marked_verdict == "holds"


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
    assert (found.verdict, found.marked_verdict) == (expected, f"{expected} (one seed)")


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        # Within 3 points; three seeds whose difference moves by 1 either way: chance 2.484.
        (0.0, "holds"),
        (0.5, "holds"),  # 2.5 from turning
        (0.6, "not separated"),  # 2.4 from turning
        (-0.6, "not separated"),
        (5.4, "not separated"),  # 2.4 beyond
        (5.5, "does not hold"),  # 2.5 beyond
        (-5.5, "does not hold"),
    ],
)
def test_about(difference: float, expected: str) -> None:
    first = [0.3 + (difference + one) / 100 for one in (-1, 0, 1)]
    assert verdict(first, (0.3, 0.3, 0.3), "about", 3.0).verdict == expected


@pytest.mark.parametrize(
    ("difference", "expected"),
    [
        (9.0, "holds"),  # however much better
        (-0.5, "holds"),  # no more than 3 lower, 2.5 from turning
        (-0.6, "not separated"),
        (-5.4, "not separated"),
        (-5.5, "does not hold"),
    ],
)
def test_at_least(difference: float, expected: str) -> None:
    first = [0.3 + (difference + one) / 100 for one in (-1, 0, 1)]
    assert verdict(first, (0.3, 0.3, 0.3), "at_least", 3.0).verdict == expected


def test_borders_are_within() -> None:
    assert verdict((0.35,), (0.34,), "about", 1.0).marked_verdict == "holds (one seed)"
    # 100 * .28 - 100 * .27 is 1.0000000000000036 in floating point.
    assert verdict((0.28,), (0.27,), "about", 1.0).marked_verdict == "holds (one seed)"
    assert verdict((0.3501,), (0.34,), "about", 1.0).marked_verdict == "does not hold (one seed)"
    assert verdict((0.27,), (0.28,), "at_least", 1.0).marked_verdict == "holds (one seed)"
    assert verdict((0.2699,), (0.28,), "at_least", 1.0).marked_verdict == "does not hold (one seed)"


@pytest.mark.parametrize("kind", ["over", "at_least", "about"])
def test_rows_that_found_nothing_have_no_order(kind: Kind) -> None:
    found = verdict((0.0004,), (0.0006,), kind, 1.0)  # 0.0 and 0.1 are printed
    assert found.marked_verdict == "not separated (one seed, nothing found)"
    assert found.cells()[2].endswith("; nothing found: both under 0.15 points")
    assert verdict((0.00149,), (0.0001,), kind, 1.0).verdict == "not separated"
    assert verdict((0.0016,), (0.0001,), kind, 1.0).verdict == "holds"


def test_not_measured() -> None:
    (found,) = collect_results(table(OVER), {"a": done(0.3)}, ABOUT).claims
    assert (found.verdict, found.marked_verdict) == ("not measured", "not measured")
    assert found.cells() == (OVER.text, "34.0 (gamma 2) vs 31.1 (gamma 0): +2.9", "-")
    (found,) = collect_results(
        table(OVER), {"a": done(0.3), "b": [Outcome(0, "failed")]}, ABOUT
    ).claims
    assert found.verdict == "not measured"


@pytest.mark.parametrize("kind", ["over", "at_least", "about", "faster"])
def test_one_training_on_both_sides_measures_nothing(kind: Kind) -> None:
    claim = Claim("it", kind, ("a",), ("b", "c"), 1.0)
    measured = {"a": done(0.3, 0.31), "b": done(0.3, 0.31)}
    times = {"a": 20.0, "b": 20.0}
    (found,) = collect_results(table(claim), measured, ABOUT, milliseconds=times).claims
    assert found.marked_verdict == "not measured (one training)"
    assert found.cells()[2] == "one training on both sides"
    assert found.cells(labels=False)[2] == "-"


def test_words() -> None:
    outcomes = trainings(a=(0.30, 0.32), b=(0.25, 0.265))
    (found,) = collect_results(table(OVER), outcomes, ABOUT).claims
    # Differences 5 and 5.5: deviation .354, over sqrt(2) .25, times 12.706: 3.18.
    assert found.cells() == (
        "gamma 2 over gamma 0",
        "34.0 (gamma 2) vs 31.1 (gamma 0): +2.9",
        "31.0 ± 1.4 (gamma 2) vs 25.8 ± 1.1 (gamma 0): +5.2 ± 3.2",
    )
    assert found.cells(labels=False) == (
        "gamma 2 over gamma 0",
        "34.0 vs 31.1: +2.9",
        "31.0 ± 1.4 vs 25.8 ± 1.1: +5.2 ± 3.2",
    )


def test_a_difference_that_rounds_to_0_has_no_minus() -> None:
    assert verdict((0.3,), (0.3003,)).cells(labels=False)[2] == "30.0 vs 30.0: +0.0"
    assert verdict((0.3, 0.3), (0.301, 0.302)).cells(labels=False)[2].endswith(": -0.1 ± 0.6")


def test_the_best_row_of_a_side_counts() -> None:
    claim = Claim("FL over the rest", "over", ("a",), ("b", "c"))
    outcomes = trainings(a=(0.30,), b=(0.20,), c=(0.31,))
    (found,) = collect_results(table(claim), outcomes, ABOUT).claims
    assert found.verdict == "does not hold"
    assert found.cells()[2] == "30.0 (gamma 2) vs 31.0 (hinge, best of 2): -1.0"
    assert found.cells(labels=False)[2] == "30.0 vs 31.0 (best of 2): -1.0"
    assert found.note == ""


def test_the_best_of_several_rows_has_to_be_further_off() -> None:
    # Differences 2, 3, 4 hold beside one row: 3 > 2.484. For the best of two, 5% / 2 of t(2) is
    # 6.205: times .577 it is 3.583.
    claim = Claim("it", "over", ("a",), ("b", "c"))
    alone = trainings(a=(0.32, 0.33, 0.34), b=(0.30, 0.30, 0.30))
    (found,) = collect_results(table(claim), alone, ABOUT).claims
    assert found.marked_verdict == "holds (rows missing)"
    both = alone | trainings(c=(0.29, 0.29, 0.29))
    (found,) = collect_results(table(claim), both, ABOUT).claims
    assert found.marked_verdict == "not separated"
    assert found.here is not None
    assert found.here.half_width == pytest.approx(3.583, abs=1e-3)
    # Two rows that are one training are one choice.
    (found,) = collect_results(table(claim), alone | {"c": alone["b"]}, ABOUT).claims
    assert found.marked_verdict == "holds"
    assert found.here is not None
    assert (found.here.first.num_rows, found.here.second.num_rows) == (1, 1)


@pytest.mark.parametrize(("seeds", "rows"), [(2, 1), (3, 1), (3, 6), (5, 3)])
def test_equal_rows_are_seldom_separated(seeds: int, rows: int) -> None:
    drawn = random.Random(seeds * 10 + rows)
    claim = Claim("it", "over", ("a",), tuple(f"b{i}" for i in range(rows)))
    separated, tries = 0, 600
    for _ in range(tries):
        start = [drawn.gauss(20, 3) for _ in range(seeds)]  # what a seed does to every row
        lines = {}
        for key in (*claim.first, *claim.second):
            aps = {seed: ap + drawn.gauss(0, 1) for seed, ap in enumerate(start)}
            mean = sum(aps.values()) / seeds
            lines[key] = RowResult(key, key, scores={"AP": Score(mean, 1.0)}, by_seed=aps)
        separated += evaluate_claim(claim, lines).verdict != "not separated"
    # 5%, and three times its own deviation of .9%.
    assert separated / tries < 0.077


def test_rows_of_a_claim_that_are_missing_are_named() -> None:
    claim = Claim("FL over the rest", "over", ("a",), ("b", "c"))
    (found,) = collect_results(table(claim), trainings(a=(0.3,), b=(0.2,)), ABOUT).claims
    assert found.marked_verdict == "holds (one seed, rows missing)"
    assert found.cells()[2].endswith(": +10.0; without hinge: not measured")


def test_a_side_without_published_figures() -> None:
    rows = {
        "a": RowResult("a", "A", scores={"AP": Score(3.0)}, published=Published(1.0)),
        "b": RowResult("b", "B", scores={"AP": Score(2.0)}),
    }
    assert evaluate_claim(OVER, rows).cells()[1:] == ("-", "3.0 (A) vs 2.0 (B): +1.0")


FASTER = Claim(
    "a faster than b", "faster", ("a",), ("b",), printed=(("A-101", 122.0), ("B-101", 172.0))
)


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
    times = {"a": first, "b": second}
    # Neither AP nor the number of seeds has a say.
    (found,) = collect_results(table(FASTER), trainings(a=(0.1,)), ABOUT, milliseconds=times).claims
    assert found.marked_verdict == expected


def test_words_of_times() -> None:
    times = {"a": 90.04, "b": 100.0}
    (found,) = collect_results(table(FASTER), {}, ABOUT, milliseconds=times).claims
    assert found.cells()[1:] == (
        "122 ms (A-101) vs 172 ms (B-101): -50 ms",
        "90.0 ms (gamma 2) vs 100.0 ms (gamma 0): -10.0 ± 5.0 ms",
    )
    assert found.cells(labels=False)[2] == "90.0 ms vs 100.0 ms: -10.0 ± 5.0 ms"


def test_the_fastest_row_of_a_side_counts() -> None:
    claim = Claim("it", "faster", ("a",), ("b", "c"))
    times = {"a": 90.0, "b": 100.0, "c": 80.0}
    (found,) = collect_results(table(claim), {}, ABOUT, milliseconds=times).claims
    assert found.verdict == "does not hold"
    assert found.cells()[1:] == (
        "-",
        "90.0 ms (gamma 2) vs 80.0 ms (hinge, best of 2): +10.0 ± 4.5 ms",
    )


def test_times_that_are_missing_are_not_measured() -> None:
    outcomes = trainings(a=(0.3,), b=(0.2,))
    (found,) = collect_results(table(FASTER), outcomes, ABOUT, milliseconds={"a": 3.0}).claims
    assert found.marked_verdict == "not measured"


# --- figure 4 ------------------------------------------------------------------------------------


def shares(positives: tuple[float, float], negatives: tuple[float, float]) -> list[ClaimResult]:
    """Verdicts on shares of the hardest 20% with gamma 0 and 2."""
    hardest = {
        "positives": {0.0: positives[0], 1.0: 0.5, 2.0: positives[1]},
        "negatives": {0.0: negatives[0], 1.0: 0.5, 2.0: negatives[1]},
    }
    return list(evaluate_loss_shares(hardest))


def test_figure_4_holds() -> None:
    positives, negatives = shares((0.42, 0.65), (0.56, 0.996))
    assert positives.marked_verdict == negatives.marked_verdict == "holds (one seed)"
    assert positives.cells()[1:] == (
        "-",
        "65% (hardest 20% of positives, gamma 2) vs 42% (gamma 0): +23%",
    )
    assert negatives.cells(labels=False)[2] == "100% vs 56%: +44%"


def test_figure_4_turns_where_the_easier_part_keeps_half() -> None:
    # The easier 80% hold 60% with gamma 0; half of that is 30%, so that the hardest hold 70%.
    below, above = (0.40, 0.69), (0.40, 0.71)
    assert [one.verdict for one in shares(below, below)] == ["holds", "does not hold"]
    assert [one.verdict for one in shares(above, above)] == ["does not hold", "holds"]
    # Negatives of which the hardest hold nearly all with gamma 0 already can still concentrate.
    assert shares(below, (0.95, 0.999))[1].verdict == "holds"


def test_figure_4_of_a_model_without_loss() -> None:
    positives, negatives = shares((math.nan, math.nan), (0.5, math.nan))
    assert (positives.marked_verdict, positives.cells()[2]) == (
        "not measured",
        "the positives have no loss",
    )
    assert (negatives.marked_verdict, negatives.cells()[2]) == (
        "not measured",
        "the negatives have no loss",
    )


def test_figure_4_needs_gamma_0_and_2() -> None:
    good = {0.0: 0.4, 2.0: 0.5}
    with pytest.raises(ValueError, match=r"gamma 0 and 2: found negatives with gamma 0, 1$"):
        evaluate_loss_shares({"positives": good, "negatives": {0.0: 0.4, 1.0: 0.5}})
    with pytest.raises(ValueError, match="found positives with gamma none"):
        evaluate_loss_shares({"negatives": good})


def test_claims_of_figure_4_come_back_from_json() -> None:
    result = TableResult("fig4", "t", "s", claims=tuple(shares((0.4, 0.5), (0.4, 0.9))))
    assert TableResult.from_json(result.to_json()) == result


# --- forms ---------------------------------------------------------------------------------------


def example() -> TableResult:
    outcomes = {
        **trainings(a=(0.30, 0.32), b=(0.25,)),
        "c": [Outcome(0, "diverged"), Outcome(1, "failed", note="disk | full")],
    }
    return collect_results(table(OVER), outcomes, ABOUT, milliseconds={"a": 12.34})


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
    columns, rows = result.table(wide=False)
    assert columns == ["", "AP", "AP50", "AP75", "ms", "seeds", "paper AP", "paper ms"]
    assert rows == [
        [
            *("gamma 2", "31.0 ± 1.4", "62.0 ± 2.8", "15.5 ± 0.7"),
            *("12.3", "2", "34.0", "98"),
        ],
        ["gamma 0", "25.0", "50.0", "12.5", "-", "1", "31.1", "-"],
        ["hinge", "0.0†", "0.0†", "0.0†", "-", "1", "-", "-"],
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


def test_markdown_says_which_rows_a_claim_lacks() -> None:
    claim = Claim("FL over the rest", "over", ("a",), ("b", "c"))
    text = collect_results(table(claim), trainings(a=(0.3,), b=(0.2,)), ABOUT).to_markdown()
    assert markdown_tables(text)[1][2][2].endswith("; without hinge: not measured")


def test_coco_at_full_length_is_a_coco_result() -> None:
    result = collect_results(table(), {}, {**ABOUT, "coco": True})
    assert "Not a COCO result" not in result.to_markdown()
    assert (
        "Not a COCO result: measured on other data."
        in collect_results(table(), {}, {}).to_markdown()
    )


def test_csv() -> None:
    lines = list(csv.DictReader(io.StringIO(example().to_csv())))
    assert [line["key"] for line in lines] == ["a", "b", "c"]
    first, second, third = lines
    assert float(first["AP"]) == pytest.approx(31.0)
    assert float(first["AP_std"]) == pytest.approx(math.sqrt(2), abs=1e-3)
    assert (first["ms"], first["seeds"], first["paper_ms"]) == ("12.340", "2", "98")
    assert (first["paper_AP"], first["paper_AP50"], first["paper_APs"]) == ("34", "52.5", "")
    assert (second["AP"], second["AP_std"], second["ms"]) == ("25.000", "", "")
    assert (third["AP"], third["diverged"], third["paper_AP"]) == ("0.000", "1", "")
    assert {(line["data"], line["coco"]) for line in lines} == {("nuclei", "no")}
    assert {line["experiment"] for line in lines} == {"table1b"}


def test_json_comes_back_equal() -> None:
    result = example()
    assert TableResult.from_json(result.to_json()) == result
    assert json.loads(result.to_json())["rows"][0]["scores"]["AP"]["mean"] == pytest.approx(31.0)
    assert TableResult.from_json(result.to_json()).rows[0].by_seed == {0: 30.0, 1: 32.0}


def test_json_of_another_version_is_rejected() -> None:
    text = example().to_json()
    with pytest.raises(ValueError, match="lines"):
        TableResult.from_json(text.replace('"rows": [', '"lines": ['))
    with pytest.raises(ValueError, match="figures"):
        TableResult.from_json(text.replace('"scores": {', '"figures": {'))


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_every_experiment_in_every_form(name: str) -> None:
    experiment = EXPERIMENTS[name]
    outcomes = {row.key: done(0.3, 0.31, name=row.key) for row in experiment.rows if row.trained}
    times = dict.fromkeys(outcomes, 40.0)
    result = collect_results(experiment, outcomes, ABOUT, milliseconds=times)
    assert TableResult.from_json(result.to_json()) == result
    assert len(list(csv.DictReader(io.StringIO(result.to_csv())))) == len(experiment.rows)
    assert result.heading in result.to_markdown()
    assert ("Not a COCO result" in result.to_markdown()) == bool(experiment.rows)
    for wide in (False, True):
        columns, rows = result.table(wide=wide)
        assert all(len(row) == len(columns) for row in rows)
    # Every row of this table comes out alike, so that no order is found and every "about" holds.
    assert {claim.verdict for claim in result.claims} <= {"not separated", "holds"}


def test_things_that_json_does_not_know_are_kept_as_text(tmp_path: Any) -> None:
    result = collect_results(table(), {}, {"data": tmp_path})
    assert result.about == {"data": str(tmp_path)}
