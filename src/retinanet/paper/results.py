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
_NOTHING = 0.05  # points of AP that are printed as 0.0
_EXACT = 1e-9  # points of AP under which a difference is floating-point dust
_DIVERGED = "†"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one training.

    Attributes:
        seed: that it was started with.
        status: ``done``; ``diverged``: the loss was no number any more, which counts as AP 0;
            ``failed``: it ended for another reason; ``missing``: it has not been run.
        metrics: of a done training, as :meth:`retinanet.evaluate.metrics.Metrics.to_dict` gives
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
    """Two rows of a claim and how far apart they are."""

    first_label: str
    first: Figure
    second_label: str
    second: Figure
    difference: Figure

    @property
    def brief(self) -> str:
        """``34.0 vs 31.1: +2.9``."""
        return f"{self.first} vs {self.second}: {self._apart}"

    @property
    def words(self) -> str:
        """``34.0 (FL, gamma 2) against 31.1 (CE): +2.9``."""
        return (
            f"{self.first} ({self.first_label}) against {self.second} ({self.second_label}): "
            f"{self._apart}"
        )

    @property
    def _apart(self) -> str:
        rounded = round(self.difference.mean, 1) + 0.0  # no -0.0
        return f"{rounded:+.1f}{self.difference.spread}"


@dataclass(frozen=True, slots=True)
class RowResult:
    """A row of a table: measured and published.

    Attributes:
        key, label: the row's.
        trained: False where the published figures stand alone.
        figures: in points, by ``AP`` ... ``APl``; what was not measured is left out.
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
        verdict: ``not separated``: the means lie closer to where the verdict turns than the
            deviation of their difference, sqrt(s1^2 + s2^2).
        one_seed: a side has one seed, so that the deviation is not known.
        here, paper: both sides, measured and published; None: a side has no figure.
        note: rows that the claim names and that were not measured.
    """

    text: str
    verdict: Verdict
    one_seed: bool = False
    here: Comparison | None = None
    paper: Comparison | None = None
    note: str = ""

    @property
    def said(self) -> str:
        """The verdict, with the marks of a single seed and of rows that were not measured."""
        marks = ["one seed"] * self.one_seed + ["rows missing"] * bool(self.note)
        return f"{self.verdict} ({', '.join(marks)})" if marks else self.verdict

    def cells(self) -> tuple[str, str, str]:
        """The claim, the paper's figures and ours with the names of the rows."""
        here = self.here.words if self.here else "-"
        note = f"; {self.note}" if self.note else ""
        return self.text, self.paper.words if self.paper else "-", here + note

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
        """Headings for a terminal: the paper's AP and time alone beside the measured figures."""
        return self._columns(self._narrow)

    @property
    def rows(self) -> list[list[str]]:
        """As many cells each."""
        return self._rows(self._narrow)

    @property
    def wide_columns(self) -> tuple[str, ...]:
        """Headings with all of the paper's figures."""
        return self._columns(self.shown)

    @property
    def wide_rows(self) -> list[list[str]]:
        """As many cells each."""
        return self._rows(self.shown)

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

    def _columns(self, printed: Sequence[str]) -> tuple[str, ...]:
        if not self.lines:
            return ()
        return ("", *self.shown, "seeds", *(f"paper {column}" for column in printed))

    def _rows(self, printed: Sequence[str]) -> list[list[str]]:
        return [
            [
                row.label,
                *(row.measured(column) for column in self.shown),
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
    ``about`` where they lie `claim.within` points apart; closer to that than the deviation of their
    difference, sqrt(s1^2 + s2^2), is not separated.
    """
    sides = [[rows[key] for key in keys] for keys in (claim.first, claim.second)]
    paper = _published([[row for row in side if row.published] for side in sides])
    measured = [[row for row in side if "AP" in row.figures] for side in sides]
    absent = [row.label for side in sides for row in side if "AP" not in row.figures]
    if not all(measured):
        return ClaimResult(claim.text, "not measured", paper=paper)
    best = [max(side, key=lambda row: row.figures["AP"].mean) for side in measured]
    first, second = (row.figures["AP"] for row in best)
    difference = first.mean - second.mean
    margin = difference if claim.kind == "over" else claim.within - abs(difference)
    margin = 0.0 if abs(margin) < _EXACT else margin
    deviation = None
    if first.deviation is not None and second.deviation is not None:
        deviation = math.hypot(first.deviation, second.deviation)
    verdict: Verdict = "holds" if margin >= 0 else "does not hold"
    # Equal means give no order, whatever the seeds; rows that found nothing are about nothing.
    nothing = max(first.mean, second.mean) < _NOTHING
    same = claim.kind == "over" and margin == 0
    if abs(margin) < (deviation or 0.0) or same or nothing:
        verdict = "not separated"
    return ClaimResult(
        claim.text,
        verdict,
        one_seed=deviation is None,
        here=Comparison(best[0].label, first, best[1].label, second, Figure(difference, deviation)),
        paper=paper,
        note=f"without {', '.join(absent)}: not measured" if absent else "",
    )


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
    for column, name in _METRIC.items():
        done = [_points(label, one, name) for one in counting if one.status == "done"]
        known = [value for value in done if value is not None]
        if done and not known:
            continue  # the data has no object of that size, and a diverged run's 0 says nothing
        values = [*known, *[0.0] * diverged]
        if values:
            deviation = statistics.stdev(values) if len(values) > 1 else None
            figures[column] = Figure(statistics.fmean(values), deviation)
    return {
        "figures": figures,
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


def _published(sides: Sequence[Sequence[RowResult]]) -> Comparison | None:
    if not all(sides):
        return None
    first, second = (max(side, key=_published_ap) for side in sides)
    aps = _published_ap(first), _published_ap(second)
    return Comparison(
        first.label, Figure(aps[0]), second.label, Figure(aps[1]), Figure(aps[0] - aps[1])
    )


def _published_ap(row: RowResult) -> float:
    return -math.inf if row.published is None else row.published.ap


def _read_comparison(values: dict[str, Any] | None) -> Comparison | None:
    if values is None:
        return None
    first, second, difference = (
        Figure(**values.pop(name)) for name in ("first", "second", "difference")
    )
    return Comparison(**values, first=first, second=second, difference=difference)


def _read_claim(values: dict[str, Any]) -> ClaimResult:
    here, paper = (_read_comparison(values.pop(name)) for name in ("here", "paper"))
    return ClaimResult(**values, here=here, paper=paper)


def _read_row(values: dict[str, Any]) -> RowResult:
    published = values.pop("published")
    figures = {name: Figure(**one) for name, one in values.pop("figures").items()}
    notes, folders = tuple(values.pop("notes")), tuple(values.pop("folders"))
    return RowResult(
        **values,
        figures=figures,
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
