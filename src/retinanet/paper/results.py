"""From finished trainings to a table beside the paper's, and whether the paper's orders hold."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from retinanet.paper.experiments import Claim, Experiment, Published

Status = Literal["done", "diverged", "failed", "missing"]
Verdict = Literal["holds", "does not hold", "not separated", "not measured"]

# By the short names of COCO's numbers: a training's metrics and what the paper prints.
_METRIC = {
    "AP": "ap",
    "AP50": "ap50",
    "AP75": "ap75",
    "APs": "ap_small",
    "APm": "ap_medium",
    "APl": "ap_large",
}
_PUBLISHED = {
    "AP": "ap",
    "AP50": "ap50",
    "AP75": "ap75",
    "APs": "small",
    "APm": "medium",
    "APl": "large",
    "ms": "milliseconds",
}
_NOTHING = 0.15  # points of AP under which a row has found nothing: 0.0 or 0.1 is printed
_EXACT = 1e-9  # points of AP under which a difference is floating-point dust
_BEYOND = 0.05  # how often chance alone may move a difference further than is allowed for
_SAME_TIME = 0.05  # of the longer time: rows are timed once, so that less is not told apart
_DIVERGED = "†"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one training.

    Attributes:
        seed: that it was started with.
        status: ``done``; ``diverged``: the loss was no number any more, which counts as AP 0;
            ``failed``: it ended for another reason; ``missing``: it has not been run.
        metrics: of a done training, as :meth:`retinanet.evaluation.metrics.Metrics.to_dict` gives
            them (shares of 1).
        folder: its run folder; a relative one is under the page's.
        note: why it failed.
    """

    seed: int
    status: Status
    metrics: Mapping[str, Any] | None = None
    folder: str | Path = ""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Figure:
    """Mean over seeds, and their standard deviation (n - 1); None: of one seed there is none."""

    mean: float
    deviation: float | None = None

    @property
    def spread(self) -> str:
        """`` ± 0.3``, or nothing."""
        return "" if self.deviation is None else f" ± {self.deviation:.1f}"

    def __str__(self) -> str:
        return f"{self.mean:.1f}{self.spread}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two rows of a claim and how far apart they are.

    Attributes:
        first_label, second_label: the rows'.
        first, second: their figures.
        difference: of the means, the first's less the second's.
        chance: how far chance may move the difference, to either side (see :func:`judge`); None:
            not known.
        first_of, second_of: how many rows each was the best of.
        unit, digits: of the figures; no unit: points of AP.
    """

    first_label: str
    first: Figure
    second_label: str
    second: Figure
    difference: float
    chance: float | None = None
    first_of: int = 1
    second_of: int = 1
    unit: str = ""
    digits: int = 1

    @property
    def brief(self) -> str:
        """``34.0 vs 31.1 (best of 3): +2.9``."""
        sides = [
            f"{self._text(one)} (best of {of})" if of > 1 else self._text(one)
            for one, of in ((self.first, self.first_of), (self.second, self.second_of))
        ]
        return f"{' vs '.join(sides)}: {self._apart}"

    @property
    def words(self) -> str:
        """``34.0 (FL, gamma 2) against 31.1 (CE, the best of 3 rows): +2.9``."""
        sides = [
            f"{self._text(one)} ({label}{f', the best of {of} rows' if of > 1 else ''})"
            for one, label, of in (
                (self.first, self.first_label, self.first_of),
                (self.second, self.second_label, self.second_of),
            )
        ]
        return f"{' against '.join(sides)}: {self._apart}"

    def _text(self, one: Figure) -> str:
        return f"{one.mean:.{self.digits}f}{one.spread}{self.unit}"

    @property
    def _apart(self) -> str:
        rounded = round(self.difference, self.digits) + 0.0  # no -0.0
        chance = "" if self.chance is None else f" ± {self.chance:.{self.digits}f}"
        return f"{rounded:+.{self.digits}f}{chance}{self.unit}"


@dataclass(frozen=True, slots=True)
class RowResult:
    """A row of a table: measured and published.

    Attributes:
        key, label: the row's.
        trained: False where the published figures stand alone.
        figures: in points, by ``AP`` ... ``APl``; what was not measured is left out.
        by_seed: AP in points of each training behind the figures, 0 of a diverged one.
        milliseconds: an image; None: not measured.
        seeds: trainings behind the figures, diverged ones among them.
        diverged: how many of them count as 0.
        notes: what became of the trainings that are not behind the figures.
        folders: of the trainings that were run.
        published: what the paper prints.
    """

    key: str
    label: str
    trained: bool = True
    figures: Mapping[str, Figure] = field(default_factory=dict)
    by_seed: Mapping[int, float] = field(default_factory=dict)
    milliseconds: float | None = None
    seeds: int = 0
    diverged: int = 0
    notes: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    published: Published | None = None

    def measured(self, column: str) -> str:
        """A measured figure as the table shows it; ``-`` where there is none."""
        if column == "ms":
            return "-" if self.milliseconds is None else f"{self.milliseconds:.1f}"
        if column not in self.figures:
            return "-"
        return f"{self.figures[column]}{_DIVERGED if self.diverged else ''}"

    def in_paper(self, column: str) -> str:
        """A published figure as the paper prints it; ``-`` where there is none."""
        value = None if self.published is None else getattr(self.published, _PUBLISHED[column])
        if value is None:
            return "-"
        return f"{value:.0f}" if column == "ms" else f"{value:.1f}"


@dataclass(frozen=True, slots=True)
class ClaimResult:
    """What was found of a claim.

    Attributes:
        text: the claim.
        verdict: ``not separated``: chance may move the difference across the point where the
            verdict turns (see :func:`judge`).
        marks: what the verdict is to be read with: ``one seed``: a side has one, so that chance is
            not known; ``rows missing``: the claim names rows that were not measured;
            ``nothing found``, ``one training``: as `note` says.
        here, paper: both sides, measured and published; None: a side has no figure.
        note: the marks in words.
    """

    text: str
    verdict: Verdict
    marks: tuple[str, ...] = ()
    here: Comparison | None = None
    paper: Comparison | None = None
    note: str = ""

    @property
    def said(self) -> str:
        """The verdict and its marks."""
        return f"{self.verdict} ({', '.join(self.marks)})" if self.marks else self.verdict

    def cells(self) -> tuple[str, str, str]:
        """The claim, the paper's figures and ours with the names of the rows."""
        here = "; ".join(part for part in (self.here and self.here.words, self.note) if part)
        return self.text, self.paper.words if self.paper else "-", here or "-"

    def brief_cells(self) -> tuple[str, str, str]:
        """The same without the names."""
        paper, here = (one.brief if one else "-" for one in (self.paper, self.here))
        return self.text, paper, here


@dataclass(frozen=True, slots=True)
class TableResult:
    """A table or figure of the paper, measured.

    Attributes:
        name, title, section, setting, note: the experiment's.
        shown: its columns, of ``AP AP50 AP75 APs APm APl ms``.
        lines: its rows.
        claims: its claims.
        about: how it was measured; see :func:`gather`.
    """

    name: str
    title: str
    section: str
    setting: str = ""
    note: str = ""
    shown: tuple[str, ...] = ()
    lines: tuple[RowResult, ...] = ()
    claims: tuple[ClaimResult, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def heading(self) -> str:
        """``Table 1b: Focal loss over gamma, ...``."""
        kind = "Table" if self.name.startswith("table") else "Figure"
        number = self.name.removeprefix("table").removeprefix("fig")
        return f"{kind} {number}: {self.title}"

    @property
    def columns(self) -> tuple[str, ...]:
        """Headings for a terminal of 80 columns: no sizes, and of the paper AP and time alone."""
        return self._columns(self._short, self._narrow)

    @property
    def rows(self) -> list[list[str]]:
        """As many cells each."""
        return self._rows(self._short, self._narrow)

    @property
    def wide_columns(self) -> tuple[str, ...]:
        """Headings with all of the paper's figures."""
        return self._columns(self.shown, self.shown)

    @property
    def wide_rows(self) -> list[list[str]]:
        """As many cells each."""
        return self._rows(self.shown, self.shown)

    @property
    def not_coco(self) -> str:
        """The line that says what this is not; empty for COCO at full length."""
        if self.about.get("coco") is True or not self.lines:
            return ""
        data, steps = self.about.get("data"), self.about.get("steps")
        what = f"measured on {data}" if data else "measured on other data"
        length = f", {steps:,} steps a row" if isinstance(steps, int) else ""
        return (
            f"Not a COCO result: {what}{length}. The paper's figures stand beside for their order, "
            "not to be compared by size."
        )

    @property
    def footnotes(self) -> list[str]:
        """Diverged, failed and missing trainings, a line each."""
        lines = []
        for row in self.lines:
            if row.diverged:
                count = "counts" if row.diverged == 1 else "count"
                of = f"{row.diverged} of {row.seeds} training{'' if row.seeds == 1 else 's'}"
                lines.append(f"{_DIVERGED} {row.label}: {of} diverged and {count} as 0")
            lines += [f"{row.label}: {note}" for note in row.notes]
        return lines

    def to_markdown(self) -> str:
        """The table, its claims and how it was measured."""
        setting = f" In the paper: {self.setting}." if self.setting else ""
        parts = [f"## {self.heading}", f"{self.section}.{setting}"]
        if self.not_coco:
            parts.append(f"**{self.not_coco}**")
        if self.lines:
            parts.append(markdown_table(self.wide_columns, self.wide_rows))
        if self.footnotes:
            parts.append("\n".join(f"- {_escape(line)}" for line in self.footnotes))
        if self.claims:
            rows = [[*one.cells(), one.said] for one in self.claims]
            parts.append(markdown_table(CLAIM_COLUMNS, rows, text=4))
        if self.note:
            parts.append(self.note)
        parts += self._about_markdown()
        return "\n\n".join(parts) + "\n"

    def to_csv(self) -> str:
        """A line a row, points with three decimals; ``data`` and ``coco`` say what was measured."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        measured = [name for column in _METRIC for name in (column, f"{column}_deviation")]
        printed = [f"paper_{column}" for column in _PUBLISHED]
        counts = ("ms", "seeds", "diverged")
        names = ("experiment", "key", "label", *measured, *counts, *printed, "data", "coco")
        writer.writerow(names)
        for row in self.lines:
            cells: list[object] = []
            for column in _METRIC:
                figure = row.figures.get(column)
                cells += ["", ""] if figure is None else map(_three, asdict(figure).values())
            cells += [_three(row.milliseconds), row.seeds, row.diverged]
            cells += [
                "" if row.published is None else _plain(getattr(row.published, name))
                for name in _PUBLISHED.values()
            ]
            cells += [self.about.get("data", ""), "yes" if not self.not_coco else "no"]
            writer.writerow([self.name, row.key, row.label, *cells])
        return out.getvalue()

    def to_json(self) -> str:
        """Everything; :meth:`from_json` reads it back."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The result that :meth:`to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError: the text is something else.
        """
        values = json.loads(text)
        lines, claims = values.pop("lines"), values.pop("claims")
        return cls(
            **{**values, "shown": tuple(values["shown"])},
            lines=tuple(_read_row(one) for one in lines),
            claims=tuple(_read_claim(one) for one in claims),
        )

    @property
    def _narrow(self) -> tuple[str, ...]:
        return tuple(column for column in self.shown if column in ("AP", "ms"))

    @property
    def _short(self) -> tuple[str, ...]:
        return tuple(column for column in self.shown if column in ("AP", "AP50", "AP75", "ms"))

    def _columns(self, shown: Sequence[str], printed: Sequence[str]) -> tuple[str, ...]:
        if not self.lines:
            return ()
        return ("", *shown, "seeds", *(f"paper {column}" for column in printed))

    def _rows(self, shown: Sequence[str], printed: Sequence[str]) -> list[list[str]]:
        return [
            [
                row.label,
                *(row.measured(column) for column in shown),
                str(row.seeds) if row.seeds else "-",
                *(row.in_paper(column) for column in printed),
            ]
            for row in self.lines
        ]

    def _about_markdown(self) -> list[str]:
        parts = []
        facts = [f"{name}: {value}" for name, value in about_facts(self.about)]
        if facts:
            parts.append("\n".join(f"- {_escape(fact)}" for fact in facts))
        if self.about.get("command"):
            parts.append(f"```sh\n{self.about['command']}\n```")
        settings = self.about.get("settings") or ()
        if settings:
            rows = [[str(cell) for cell in row] for row in settings]
            parts.append(markdown_table(SETTING_COLUMNS, rows, text=3))
        return parts


CLAIM_COLUMNS = ("the paper says", "its figures", "measured here", "verdict")
"""Headings of the claims of one table."""

SETTING_COLUMNS = ("setting", "paper", "here")
"""Headings of the settings that differ."""


def gather(
    experiment: Experiment,
    outcomes: Mapping[str, Sequence[Outcome]],
    about: Mapping[str, Any],
    *,
    milliseconds: Mapping[str, float] | None = None,
) -> TableResult:
    """The table of an experiment from what came of its trainings.

    Args:
        experiment: whose rows and claims.
        outcomes: by row key, a training each; rows may be left out.
        about: how it was measured, JSON's own types (others are kept as their text):
            ``command``, ``data``, ``steps``, ``seeds``, ``machine``; ``settings``: (setting, the
            paper's, here) of those that differ; ``coco``: True for COCO at full length alone.
            Further facts are shown as they are.
        milliseconds: an image, by row key, where it was measured.

    Raises:
        ValueError: an outcome's row is not in the experiment, or a done training has no metrics.
    """
    known = {row.key for row in experiment.rows}
    for key in (*outcomes, *(milliseconds or {})):
        if key not in known:
            raise ValueError(f"{experiment.name} has no row {key!r}: {', '.join(sorted(known))}")
    lines = tuple(
        RowResult(
            row.key,
            row.label,
            row.trained,
            milliseconds=(milliseconds or {}).get(row.key),
            published=row.published,
            **_counted(row.label, outcomes.get(row.key, ())),
        )
        for row in experiment.rows
    )
    by_key = {line.key: line for line in lines}
    return TableResult(
        experiment.name,
        experiment.title,
        experiment.section,
        experiment.setting,
        experiment.note,
        experiment.columns,
        lines,
        tuple(judge(claim, by_key) for claim in experiment.claims),
        json.loads(json.dumps(dict(about), default=str)),
    )


def judge(claim: Claim, rows: Mapping[str, RowResult]) -> ClaimResult:
    """Whether a claim holds, from the rows that it names.

    Of each side the row with the highest mean AP counts. ``over`` turns where the means are equal,
    ``at_least`` where the first is `claim.within` points lower, ``about`` where they lie that far
    apart. The verdict is ``not separated`` if chance may move the difference of the means across
    that point:

    - Rows with the same seeds are compared seed by seed, as trainings of one seed start alike and
      see the images in the same order: chance is Student's t (two-sided, 95%, n - 1 degrees of
      freedom) times the standard error of the mean of the n differences. Rows with other seeds:
      Welch's t.
    - The best of k rows may be the best by luck. Where the sides have k1 and k2 rows, chance is
      taken at 5% / (k1 k2) in the place of 5% (Bonferroni).
    - With one seed on a side chance is not known: the means alone decide, and the verdict is
      marked.
    - Rows that found nothing, both under .15 points, are not separated.

    ``faster`` compares the times of the fastest row of each side, which were measured once: chance
    is 5% of the longer one. One training on both sides (one backbone in the place of two) measures
    nothing.
    """
    timed = claim.kind == "faster"
    sides = [[rows[key] for key in keys] for keys in (claim.first, claim.second)]
    paper = _published(claim, sides)
    measured = [
        [(row, figure) for row in side if (figure := _judged(row, timed)) is not None]
        for side in sides
    ]
    absent = [row.label for side in sides for row in side if _judged(row, timed) is None]
    if not all(measured):
        return ClaimResult(claim.text, "not measured", paper=paper)
    best = [max(side, key=lambda one: -one[1].mean if timed else one[1].mean) for side in measured]
    (one, first), (other, second) = best
    if one.folders and one.folders == other.folders:
        note = "one training on both sides"
        return ClaimResult(claim.text, "not measured", ("one training",), paper=paper, note=note)
    # Rows that came to the same settings are one training, and one choice.
    of = [len({row.folders or (row.key,) for row, _ in side}) for side in measured]
    difference = first.mean - second.mean
    if timed:
        chance: float | None = _SAME_TIME * max(first.mean, second.mean)
    else:
        chance = _chance(one.by_seed, other.by_seed, _BEYOND / (of[0] * of[1]))
    margin = {
        "over": difference,
        "at_least": difference + claim.within,
        "about": claim.within - abs(difference),
        "faster": -difference,
    }[claim.kind]
    margin = 0.0 if abs(margin) < _EXACT else margin
    nothing = not timed and max(first.mean, second.mean) < _NOTHING
    # Equal means give no order, whatever the seeds.
    same = claim.kind in ("over", "faster") and margin == 0
    verdict: Verdict = "holds" if margin >= 0 else "does not hold"
    if abs(margin) < (chance or 0.0) or same or nothing:
        verdict = "not separated"
    marks = {
        "one seed": chance is None,
        "rows missing": bool(absent),
        "nothing found": nothing,
    }
    notes = [f"without {', '.join(absent)}: not measured"] if absent else []
    notes += [f"nothing found: both under {_NOTHING:g} points"] if nothing else []
    return ClaimResult(
        claim.text,
        verdict,
        tuple(mark for mark, is_so in marks.items() if is_so),
        Comparison(
            *(one.label, first, other.label, second, difference, chance),
            first_of=of[0],
            second_of=of[1],
            unit=" ms" if timed else "",
        ),
        paper,
        "; ".join(notes),
    )


def judge_distribution(
    hardest: Mapping[str, Mapping[float, float]],
) -> tuple[ClaimResult, ClaimResult]:
    """The two claims of Figure 4, from one trained model.

    Source: Lin et al. 2017, Sec. 5.1: the effect of gamma on positives is minor; on negatives it is
    very different: with gamma 2 nearly all of their loss comes from a small part of them.

    The paper names no bound. Here both turn at one half: from gamma 0 to 2 the easier 80% of the
    positives keep more than half of their share of the loss, those of the negatives less.

    Args:
        hardest: of ``positives`` and of ``negatives``, by gamma, the share of the loss in the
            hardest 20% of the anchors, in [0, 1]; NaN: there is no loss.

    Returns:
        positives, negatives; marked with ``one seed``, as they are of one model.

    Raises:
        ValueError: a kind, or gamma 0 or 2, is not there.
    """
    return (
        _judge_shares("gamma 2 hardly moves the loss of positives", "positives", hardest),
        _judge_shares("gamma 2 moves the loss of negatives to few of them", "negatives", hardest),
    )


def _judge_shares(
    text: str, kind: str, hardest: Mapping[str, Mapping[float, float]]
) -> ClaimResult:
    shares = hardest.get(kind, {})
    if not {0.0, 2.0} <= shares.keys():
        raise ValueError(
            f"the claims of Figure 4 are about gamma 0 and 2, got {kind} of gamma "
            f"{', '.join(f'{gamma:g}' for gamma in shares) or 'none'}"
        )
    before, after = shares[0.0], shares[2.0]
    if math.isnan(before) or math.isnan(after):
        return ClaimResult(text, "not measured", note=f"the {kind} have no loss")
    keeps = 1 - after > (1 - before) / 2
    return ClaimResult(
        text,
        "holds" if keeps == (kind == "positives") else "does not hold",
        ("one seed",),
        Comparison(
            f"the hardest 20% of {kind}, gamma 2",
            Figure(100 * after),
            "gamma 0",
            Figure(100 * before),
            100 * (after - before),
            unit="%",
            digits=0,
        ),
    )


def t_quantile(beyond: float, degrees: int) -> float:
    """What the size of Student's t exceeds with a chance of `beyond`, to both sides together.

    Source: the sums of Abramowitz and Stegun 1964, 26.7.3 and 26.7.4, solved by bisection.

    Args:
        beyond: in (0, 1); .05 for a 95% interval.
        degrees: of freedom, from 1 on.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        low, high = (angle, high) if _t_within(angle, degrees) < 1 - beyond else (low, angle)
    return math.sqrt(degrees) * math.tan(low)


def _t_within(angle: float, degrees: int) -> float:
    """The chance of a size of t up to sqrt(degrees) tan(angle)."""
    odd = degrees % 2
    term, total = math.cos(angle) ** odd, 0.0
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def _chance(ours: Mapping[int, float], theirs: Mapping[int, float], beyond: float) -> float | None:
    """How far chance moves the difference of two rows' means, once in 1 / `beyond` times further.

    Args:
        ours, theirs: AP by seed.
    """
    if min(len(ours), len(theirs)) < 2:
        return None
    if ours.keys() == theirs.keys():
        degrees = len(ours) - 1
        variance = statistics.variance(ours[seed] - theirs[seed] for seed in ours) / len(ours)
    else:
        parts = [statistics.variance(one.values()) / len(one) for one in (ours, theirs)]
        variance = sum(parts)
        below = sum(
            part**2 / (len(one) - 1) for part, one in zip(parts, (ours, theirs), strict=True)
        )
        # Welch-Satterthwaite, rounded down: a little too careful.
        degrees = max(1, int(variance**2 / below)) if below > 0 else 1
    chance = math.sqrt(variance) * t_quantile(beyond, degrees)
    return 0.0 if chance < _EXACT else chance


def _judged(row: RowResult, timed: bool) -> Figure | None:
    """What a claim compares of a row: its time in milliseconds, or its AP."""
    if timed:
        return None if row.milliseconds is None else Figure(row.milliseconds)
    return row.figures.get("AP")


def about_facts(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What `about` says but for the command and the settings, to be listed."""
    left_out = ("command", "settings", "coco")
    return [
        (name, f"{value:,}" if isinstance(value, int) else str(value))
        for name, value in about.items()
        if name not in left_out and value not in (None, "")
    ]


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, text: int = 1) -> str:
    """A table in Markdown; so many first columns are text, the others figures."""
    rule = [":--" if i < text else "--:" for i in range(len(columns))]
    lines = [
        [_escape(cell) for cell in columns],
        rule,
        *([_escape(cell) for cell in row] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _counted(label: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Figures, numbers and notes of a row's trainings."""
    counting = [one for one in outcomes if one.status in ("done", "diverged")]
    diverged = sum(one.status == "diverged" for one in counting)
    figures = {}
    by_seed: dict[int, float] = {}
    for column, name in _METRIC.items():
        done = {one.seed: _points(label, one, name) for one in counting if one.status == "done"}
        known = {seed: value for seed, value in done.items() if value is not None}
        if done and not known:
            continue  # the data has no object of that size, and a diverged run's 0 says nothing
        values = known | {one.seed: 0.0 for one in counting if one.status == "diverged"}
        if values:
            deviation = statistics.stdev(values.values()) if len(values) > 1 else None
            figures[column] = Figure(statistics.fmean(values.values()), deviation)
        if column == "AP":
            by_seed = values
    return {
        "figures": figures,
        "by_seed": by_seed,
        "seeds": len(counting),
        "diverged": diverged,
        "notes": tuple(
            f"seed {one.seed} {'is missing' if one.status == 'missing' else one.status}"
            + (f": {one.note}" if one.note else "")
            for one in outcomes
            if one.status in ("failed", "missing")
        ),
        "folders": tuple(
            str(one.folder) for one in outcomes if one.folder and one.status != "missing"
        ),
    }


def _points(label: str, outcome: Outcome, name: str) -> float | None:
    """A number of COCO's of a done training, in points; None: the data cannot give it."""
    if outcome.metrics is None or name not in outcome.metrics:
        raise ValueError(
            f"{label}, seed {outcome.seed}: done, but its metrics have no {name!r} "
            f"({outcome.folder or 'no folder'}): evaluate it again"
        )
    value = outcome.metrics[name]
    return None if value is None or math.isnan(value) else 100 * float(value)


def _published(claim: Claim, sides: Sequence[Sequence[RowResult]]) -> Comparison | None:
    """What the paper prints of a claim's sides."""
    if claim.printed is not None:
        (label, time), (other, other_time) = claim.printed
        return Comparison(
            *(label, Figure(time), other, Figure(other_time), time - other_time),
            unit=" ms",
            digits=0,
        )
    if claim.kind == "faster":
        return None
    printed = [[row for row in side if row.published] for side in sides]
    if not all(printed):
        return None
    first, second = (max(side, key=_published_ap) for side in printed)
    aps = _published_ap(first), _published_ap(second)
    return Comparison(
        *(first.label, Figure(aps[0]), second.label, Figure(aps[1]), aps[0] - aps[1]),
        first_of=len(printed[0]),
        second_of=len(printed[1]),
    )


def _published_ap(row: RowResult) -> float:
    return -math.inf if row.published is None else row.published.ap


def _read_comparison(values: dict[str, Any] | None) -> Comparison | None:
    if values is None:
        return None
    first, second = (Figure(**values.pop(name)) for name in ("first", "second"))
    return Comparison(**values, first=first, second=second)


def _read_claim(values: dict[str, Any]) -> ClaimResult:
    here, paper = (_read_comparison(values.pop(name)) for name in ("here", "paper"))
    marks = tuple(values.pop("marks"))
    return ClaimResult(**values, marks=marks, here=here, paper=paper)


def _read_row(values: dict[str, Any]) -> RowResult:
    published = values.pop("published")
    figures = {name: Figure(**one) for name, one in values.pop("figures").items()}
    by_seed = {int(seed): ap for seed, ap in values.pop("by_seed").items()}
    notes, folders = tuple(values.pop("notes")), tuple(values.pop("folders"))
    return RowResult(
        **values,
        figures=figures,
        by_seed=by_seed,
        notes=notes,
        folders=folders,
        published=None if published is None else Published(**published),
    )


def _escape(text: str) -> str:
    """Text that Markdown shows as it is."""
    for special in "\\|*_<`":
        text = text.replace(special, f"\\{special}")
    return text.replace("\n", " ")


def _three(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
