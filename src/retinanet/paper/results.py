"""Results of a table or figure, beside the paper's, as Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, NamedTuple, Self

from pydantic import ConfigDict, TypeAdapter

from retinanet.evaluation.metrics import AP_METRICS
from retinanet.paper.tables import Published

Verdict = Literal["holds", "does not hold", "not separated", "not measured"]

PartKind = Literal["text", "strong", "list", "table", "code"]
"""Kinds of a document's parts: a paragraph (``text``, ``strong``), lines, a table, a command."""

CLAIM_COLUMNS = ("claim", "paper", "here", "verdict")
_PUBLISHED = dict(
    zip((*AP_METRICS, "ms"), (field.name for field in fields(Published)), strict=True)
)
_DIVERGED = "†"
_STRICT = ConfigDict(extra="forbid")  # rejects the JSON of another version


@dataclass(frozen=True, slots=True)
class Result:
    """How a training ended.

    Attributes:
        status: ``diverged``: NaN or Inf loss, which counts as AP 0; ``failed``: any other error.
        steps: that were run.
        metrics: of a done training: :meth:`retinanet.evaluation.metrics.Metrics.to_dict` (0..1).
        note: the error of another training.
    """

    status: Literal["done", "diverged", "failed"]
    steps: int = 0
    metrics: Mapping[str, Any] | None = None
    note: str = ""


class Outcome(NamedTuple):
    """A training of a row: its seed, its result, and its run folder relative to the page."""

    seed: int
    result: Result
    folder: str = ""


@dataclass(frozen=True, slots=True)
class Score:
    """Mean over seeds and sample standard deviation (n - 1); None with one seed."""

    mean: float
    std: float | None = None

    def format(self, digits: int = 1, unit: str = "") -> str:
        """Format as ``34.0 ± 0.3``, with `digits` decimals of the mean, and a unit."""
        spread = "" if self.std is None else f" ± {self.std:.1f}"
        return f"{self.mean:.{digits}f}{spread}{unit}"


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a claim: its best row, of `num_rows`."""

    label: str
    score: Score
    num_rows: int = 1


@dataclass(frozen=True, slots=True)
class Comparison:
    """The best row of each side of a claim, and their difference: first minus second.

    `half_width` is that of the difference's 95% confidence interval
    (:func:`retinanet.paper.claims.evaluate_claim`; None: unknown); an empty `unit`: points of AP.
    """

    first: Side
    second: Side
    difference: float
    half_width: float | None = None
    unit: str = ""
    digits: int = 1

    def format(self, *, labels: bool) -> str:
        """Format as ``34.0 (FL) vs 31.1 (CE, best of 3): +2.9``, with or without labels."""
        sides = []
        for side in (self.first, self.second):
            remarks = [side.label] if labels else []
            remarks += [f"best of {side.num_rows}"] if side.num_rows > 1 else []
            remark = f" ({', '.join(remarks)})" if remarks else ""
            sides.append(side.score.format(self.digits, self.unit) + remark)
        difference = round(self.difference, self.digits) + 0.0  # no -0.0
        interval = "" if self.half_width is None else f" ± {self.half_width:.{self.digits}f}"
        return f"{' vs '.join(sides)}: {difference:+.{self.digits}f}{interval}{self.unit}"


@dataclass(frozen=True, slots=True)
class RowResult:
    """A row of a table: measured and published values.

    Attributes:
        scores: points of AP by column (``AP`` ... ``APl``); columns without a value are left out.
        by_seed: AP in points per seed; 0 for a diverged training.
        milliseconds: per image; None: not measured.
        seeds: number of trainings behind the scores, diverged ones included.
        diverged: number of them that count as 0.
        notes: failed trainings.
        folders: run folders.
    """

    __pydantic_config__ = _STRICT

    key: str
    label: str
    scores: Mapping[str, Score] = field(default_factory=dict)
    by_seed: Mapping[int, float] = field(default_factory=dict)
    milliseconds: float | None = None
    seeds: int = 0
    diverged: int = 0
    notes: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    published: Published | None = None

    def measured(self, column: str) -> str:
        """Format a measured value; ``-`` if there is none."""
        if column == "ms":
            return "-" if self.milliseconds is None else f"{self.milliseconds:.1f}"
        score = self.scores.get(column)
        return "-" if score is None else score.format() + _DIVERGED * bool(self.diverged)

    def in_paper(self, column: str) -> str:
        """Format a published value as the paper prints it; ``-`` if there is none."""
        value = None if self.published is None else getattr(self.published, _PUBLISHED[column])
        return "-" if value is None else f"{value:.{0 if column == 'ms' else 1}f}"


@dataclass(frozen=True, slots=True)
class ClaimResult:
    """The verdict on a claim.

    Attributes:
        verdict: ``not separated``: the confidence interval of the difference includes the point
            where the verdict changes.
        marks: reservations: ``one seed``: a side has one seed, so the interval is unknown;
            ``rows missing``: rows of the claim were not measured; ``nothing found``: both sides
            have an AP of about 0; ``one training``: both sides are the same training.
        here, paper: the sides, measured and published; None: a side has no value.
        note: explains the marks.
    """

    text: str
    verdict: Verdict
    marks: tuple[str, ...] = ()
    here: Comparison | None = None
    paper: Comparison | None = None
    note: str = ""

    @property
    def marked_verdict(self) -> str:
        """The verdict with its marks."""
        return f"{self.verdict} ({', '.join(self.marks)})" if self.marks else self.verdict

    def cells(self, *, labels: bool = True) -> tuple[str, str, str]:
        """Return the claim, the paper's numbers and ours; rows' labels and notes are optional."""
        paper = self.paper.format(labels=labels) if self.paper else "-"
        parts = [self.here.format(labels=labels)] if self.here else []
        parts += [self.note] if labels and self.note else []
        return self.text, paper, "; ".join(parts) or "-"


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text, the first `left` columns aligned to the left, folded if it has a title."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    title: str = ""

    def to_markdown(self) -> str:
        """Format in Markdown."""
        rule = [":--" if i < self.left else "--:" for i in range(len(self.columns))]
        escaped = [[_escape(cell) for cell in line] for line in (self.columns, *self.rows)]
        lines = [escaped[0], rule, *escaped[1:]]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@dataclass(frozen=True, slots=True)
class TableResult:
    """A table or figure of the paper, measured.

    `shown` are columns; `about` is how it was measured
    (:func:`retinanet.paper.claims.collect_results`); the rest is the experiment's.
    """

    __pydantic_config__ = _STRICT

    name: str
    title: str
    section: str
    setting: str = ""
    note: str = ""
    shown: tuple[str, ...] = ()
    rows: tuple[RowResult, ...] = ()
    claims: tuple[ClaimResult, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def number(self) -> str:
        """``Table 1b``."""
        kind = "Table" if self.name.startswith("table") else "Figure"
        return f"{kind} {self.name.removeprefix('table').removeprefix('fig')}"

    @property
    def heading(self) -> str:
        """``Table 1b: Focal loss over gamma, ...``."""
        return f"{self.number}: {self.title}"

    def table(self, *, wide: bool) -> Table:
        """Return measured values beside the paper's.

        If not `wide`, for a terminal of 80 columns: no AP by size, only AP and time of the paper.
        """
        short = ("AP", "AP50", "AP75", "ms")
        shown = [column for column in self.shown if wide or column in short]
        printed = [column for column in self.shown if wide or column in ("AP", "ms")]
        rows = [
            [
                row.label,
                *map(row.measured, shown),
                str(row.seeds or "-"),
                *map(row.in_paper, printed),
            ]
            for row in self.rows
        ]
        return Table(["", *shown, "seeds", *(f"paper {column}" for column in printed)], rows)

    @property
    def not_coco(self) -> str:
        """A line that these are not COCO results; empty for COCO with --full."""
        if self.about.get("coco") is True or not self.rows:
            return ""
        steps = self.about.get("steps")
        length = f", {steps:,} steps per row" if isinstance(steps, int) else ""
        return (
            f"Not a COCO result: measured on {self.about.get('data') or 'other data'}{length}. "
            "Compare the order of the rows with the paper's, not the values."
        )

    @property
    def footnotes(self) -> list[str]:
        """Diverged and failed trainings, a line each."""
        lines = []
        for row in self.rows:
            if row.diverged:
                count = "counts" if row.diverged == 1 else "count"
                trainings = f"{row.seeds} training{'' if row.seeds == 1 else 's'}"
                lines.append(
                    f"{_DIVERGED} {row.label}: {row.diverged} of {trainings} diverged and {count} "
                    "as 0"
                )
            lines += [f"{row.label}: {note}" for note in row.notes]
        return lines

    def parts(self) -> list[tuple[PartKind, Any]]:
        """Return text, tables and command, in order: the content of all documents."""
        setting = f" In the paper: {self.setting}." if self.setting else ""
        claims = [[*claim.cells(), claim.marked_verdict] for claim in self.claims]
        facts = [
            f"{name}: {value:,}" if isinstance(value, int) else f"{name}: {value}"
            for name, value in self.about.items()
            if name not in ("command", "settings", "coco") and value not in (None, "")
        ]
        settings = [[str(cell) for cell in row] for row in self.about.get("settings") or ()]
        title = f"{len(settings)} setting{'' if len(settings) == 1 else 's'} other than the paper's"
        parts: list[tuple[PartKind, Any]] = [
            ("text", f"{self.section}.{setting}"),
            ("strong", self.not_coco),
            ("table", self.rows and self.table(wide=True)),
            ("list", self.footnotes),
            ("table", claims and Table(CLAIM_COLUMNS, claims, left=4)),
            ("text", self.note),
            ("list", facts),
            ("code", self.about.get("command")),
            ("table", settings and Table(("setting", "paper", "here"), settings, 3, title)),
        ]
        return [(kind, part) for kind, part in parts if part]

    def to_markdown(self) -> str:
        """Format the table, its claims and how it was measured."""
        return markdown([("text", f"## {self.heading}"), *self.parts()])

    def to_json(self) -> str:
        """Format everything; :meth:`from_json` reads it."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the text of :meth:`to_json`; ValueError: it is something else."""
        return TypeAdapter(cls).validate_json(text)


def markdown(parts: Iterable[tuple[PartKind, Any]]) -> str:
    """Format parts of a document in Markdown."""
    formats: dict[PartKind, Callable[[Any], str]] = {
        "text": str,
        "strong": "**{}**".format,
        "list": lambda lines: "\n".join(f"- {_escape(line)}" for line in lines),
        "table": Table.to_markdown,
        "code": "```sh\n{}\n```".format,
    }
    return "\n\n".join(formats[kind](part) for kind, part in parts) + "\n"


def _escape(text: str) -> str:
    """Escape what Markdown would format."""
    for special in "\\|*_<`":
        text = text.replace(special, f"\\{special}")
    return text.replace("\n", " ")
