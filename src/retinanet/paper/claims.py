"""Trainings to table rows, and verdicts on the paper's claims."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from retinanet.evaluation.metrics import AP_METRICS
from retinanet.paper.results import (
    ClaimResult,
    Comparison,
    Outcome,
    RowResult,
    Score,
    Side,
    TableResult,
    Verdict,
)
from retinanet.paper.tables import Claim, Experiment

_MIN_AP = 0.15  # points: a row with less has found nothing; 0.0 or 0.1 is printed
_ROUNDING = 1e-9  # points of AP: less is floating-point error
_SIGNIFICANCE = 0.05
_TIME_TOLERANCE = 0.05  # of the longer time: each row is timed once


def collect_results(
    experiment: Experiment,
    outcomes: Mapping[str, Sequence[Outcome]],
    about: Mapping[str, Any],
    *,
    milliseconds: Mapping[str, float] | None = None,
) -> TableResult:
    """Build an experiment's table from the outcomes of its trainings, by row key.

    `about` is how it was measured: ``command``, ``data``, ``steps``, ``seeds``, ``machine``;
    ``settings``: (setting, the paper's, here) of those that differ; ``coco``: True only for COCO at
    full length; other facts are listed as they are. `milliseconds` per image are by row key.
    """
    times = milliseconds or {}
    rows = {
        row.key: RowResult(
            row.key,
            row.label,
            milliseconds=times.get(row.key),
            published=row.published,
            **_row_values(outcomes.get(row.key, ())),
        )
        for row in experiment.rows
    }
    return TableResult(
        experiment.name,
        experiment.title,
        experiment.section,
        experiment.setting,
        experiment.note,
        experiment.columns,
        tuple(rows.values()),
        tuple(evaluate_claim(claim, rows) for claim in experiment.claims),
        json.loads(json.dumps(dict(about), default=str)),
    )


def _row_values(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Return scores, counts and notes of a row's trainings."""
    ended = [outcome for outcome in outcomes if outcome.result.status != "failed"]
    zeros = {outcome.seed: 0.0 for outcome in ended if outcome.result.status == "diverged"}
    done = {o.seed: o.result.metrics for o in ended if o.result.metrics is not None}
    by_column: dict[str, dict[int, float]] = {}
    for column, name in AP_METRICS.items():
        # None and NaN: there are no objects of a size.
        values = {seed: metrics[name] for seed, metrics in done.items()}
        points = {seed: 100 * ap for seed, ap in values.items() if ap is not None and ap == ap}
        # Without such objects the 0 of a diverged training has no meaning.
        if (points or not done) and points | zeros:
            by_column[column] = points | zeros
    return {
        "scores": {
            column: Score(
                statistics.fmean(values.values()),
                statistics.stdev(values.values()) if len(values) > 1 else None,
            )
            for column, values in by_column.items()
        },
        "by_seed": by_column.get("AP", {}),
        "seeds": len(ended),
        "diverged": len(zeros),
        "notes": tuple(
            ": ".join(filter(None, (f"seed {outcome.seed} failed", outcome.result.note)))
            for outcome in outcomes
            if outcome.result.status == "failed"
        ),
        "folders": tuple(outcome.folder for outcome in outcomes if outcome.folder),
    }


def evaluate_claim(claim: Claim, rows: Mapping[str, RowResult]) -> ClaimResult:
    """Decide whether a claim holds, by the best row of each side.

    The best row has the highest mean AP; for ``faster`` the lowest time. The verdict changes where
    the means are equal (``over``, ``faster``), where the first is `claim.within` points lower
    (``at_least``), or where they are that far apart (``about``). It is ``not separated`` if the
    confidence interval of the difference includes that point, or if both sides have an AP under .15
    points. For AP the interval is :func:`confidence_half_width`'s at 5%, divided by the number of
    row pairs (Bonferroni), as the best of several rows may be the best by luck; rows of one
    training count once. With one seed on a side there is no interval, and the verdict is marked.
    Times are measured once: the half-width is 5% of the longer one. The same training on both sides
    (a single backbone for both depths) measures nothing.
    """
    timed = claim.kind == "faster"
    sides = [[rows[key] for key in keys] for keys in (claim.first, claim.second)]
    paper = _published_comparison(claim, sides)
    by_row = {row.key: _score(row, timed) for side in sides for row in side}
    scores = {key: score for key, score in by_row.items() if score is not None}
    measured = [[row for row in side if row.key in scores] for side in sides]
    if not all(measured):
        return ClaimResult(claim.text, "not measured", paper=paper)
    pick = min if timed else max
    first, second = (pick(side, key=lambda row: scores[row.key].mean) for side in measured)
    if first.folders and first.folders == second.folders:
        note = "one training on both sides"
        return ClaimResult(claim.text, "not measured", ("one training",), paper=paper, note=note)
    counts = [len({row.folders or (row.key,) for row in side}) for side in measured]
    here, there = scores[first.key], scores[second.key]
    half_width: float | None = _TIME_TOLERANCE * max(here.mean, there.mean)
    if not timed:
        level = _SIGNIFICANCE / math.prod(counts)
        half_width = confidence_half_width(first.by_seed, second.by_seed, level)
    difference = here.mean - there.mean
    nothing = not timed and max(here.mean, there.mean) < _MIN_AP
    missing = [row.label for side in sides for row in side if row.key not in scores]
    marks = {"one seed": half_width is None, "rows missing": missing, "nothing found": nothing}
    notes = [f"without {', '.join(missing)}: not measured"] if missing else []
    notes += [f"nothing found: both under {_MIN_AP:g} points"] if nothing else []
    best = (Side(first.label, here, counts[0]), Side(second.label, there, counts[1]))
    return ClaimResult(
        claim.text,
        "not separated" if nothing else _verdict(claim, difference, half_width or 0.0),
        tuple(mark for mark, applies in marks.items() if applies),
        Comparison(*best, difference, half_width, unit=" ms" if timed else ""),
        paper,
        "; ".join(notes),
    )


def _score(row: RowResult, timed: bool) -> Score | None:
    """Return what a claim compares: milliseconds or AP."""
    if timed:
        return None if row.milliseconds is None else Score(row.milliseconds)
    return row.scores.get("AP")


def _verdict(claim: Claim, difference: float, half_width: float) -> Verdict:
    """Return the verdict by the distance from the point where it changes."""
    margin = {
        "over": difference,
        "at_least": difference + claim.within,
        "about": claim.within - abs(difference),
        "faster": -difference,
    }[claim.kind]
    margin = 0.0 if abs(margin) < _ROUNDING else margin
    equal = margin == 0 and claim.kind in ("over", "faster")
    if equal or abs(margin) < half_width:
        return "not separated"
    return "holds" if margin >= 0 else "does not hold"


def _published_comparison(claim: Claim, sides: Sequence[Sequence[RowResult]]) -> Comparison | None:
    """Return what the paper prints of a claim's sides."""
    if claim.printed is not None:
        first, second = (Side(label, Score(time)) for label, time in claim.printed)
        difference = first.score.mean - second.score.mean
        return Comparison(first, second, difference, unit=" ms", digits=0)
    printed = [[(row.published.ap, row.label) for row in side if row.published] for side in sides]
    if claim.kind == "faster" or not all(printed):
        return None
    first, second = (
        Side(label, Score(ap), len(side))
        for side in printed
        for ap, label in [max(side, key=lambda pair: pair[0])]
    )
    return Comparison(first, second, first.score.mean - second.score.mean)


def confidence_half_width(
    first: Mapping[int, float], second: Mapping[int, float], level: float
) -> float | None:
    """Return the half-width of the confidence interval of the difference of two rows' means.

    With the same seeds the differences seed by seed are paired, as trainings of one seed start with
    the same weights and see the images in the same order: two-sided Student's t with n - 1 degrees
    of freedom. With other seeds: Welch's t. None: a side has fewer than two seeds.
    """
    if min(len(first), len(second)) < 2:
        return None
    if first.keys() == second.keys():
        dof = len(first) - 1
        variance = statistics.variance(first[seed] - second[seed] for seed in first) / len(first)
    else:
        parts = [(statistics.variance(side.values()), len(side)) for side in (first, second)]
        variance = sum(var / n for var, n in parts)
        denominator = sum((var / n) ** 2 / (n - 1) for var, n in parts)
        # Welch-Satterthwaite, rounded down to be conservative.
        dof = max(1, int(variance**2 / denominator)) if denominator > 0 else 1
    half_width = math.sqrt(variance) * t_quantile(level, dof)
    return 0.0 if half_width < _ROUNDING else half_width


@lru_cache
def t_quantile(level: float, dof: int) -> float:
    """Return the two-sided quantile of Student's t, which abs(t) exceeds with chance `level`.

    By numerical integration: with t = sqrt(dof) tan(angle) the density is cos(angle)^(dof - 1).
    """
    angles = np.linspace(0, math.pi / 2, 100_001)
    density = np.cos(angles) ** (dof - 1)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(dof) * math.tan(float(np.interp(1 - level, mass / mass[-1], angles)))


def evaluate_loss_shares(
    hardest: Mapping[str, Mapping[float, float]],
) -> tuple[ClaimResult, ...]:
    """Evaluate the two claims of Figure 4, for one trained model.

    Source: Lin et al. 2017, Sec. 5.1: gamma has little effect on positives, and a large one on
    negatives: with gamma 2 most of their loss comes from a small part of them. The paper names no
    bound. Here both verdicts change at one half: from gamma 0 to 2 the easier 80% of the positives
    keep more than half of their share of the loss, those of the negatives less.

    Args:
        hardest: share of the loss in the hardest 20% of the anchors, 0..1, by gamma (with 0 and 2),
            of ``positives`` and of ``negatives``; NaN: there is no loss.
    """
    claims = {
        "positives": "gamma 2 hardly moves the loss of positives",
        "negatives": "gamma 2 moves the loss of negatives to few of them",
    }
    results = []
    for kind, text in claims.items():
        before, after = hardest[kind][0.0], hardest[kind][2.0]
        if math.isnan(before) or math.isnan(after):
            results.append(ClaimResult(text, "not measured", note=f"the {kind} have no loss"))
            continue
        keeps = 1 - after > (1 - before) / 2
        shares = Comparison(
            Side(f"hardest 20% of {kind}, gamma 2", Score(100 * after)),
            Side("gamma 0", Score(100 * before)),
            100 * (after - before),
            unit="%",
            digits=0,
        )
        verdict: Verdict = "holds" if keeps == (kind == "positives") else "does not hold"
        results.append(ClaimResult(text, verdict, ("one seed",), shares))
    return tuple(results)
