"""The page of an output folder: the paper's claims and verdicts, then every table."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from jinja2 import Environment, PackageLoader

from retinanet.paper.results import ClaimResult, PartKind, Table, TableResult, Verdict, markdown
from retinanet.report.html import Page

_TEMPLATES = Environment(
    loader=PackageLoader("retinanet.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
_BLOCKS: Any = _TEMPLATES.get_template("paper_blocks.html").module

_LEGEND = (
    "Points of AP: mean and standard deviation over seeds. The row with the highest mean of each "
    "side is compared. The ± of a difference is the half-width of its 95% confidence interval: "
    "Student's t of the differences seed by seed (Welch's if the rows have other seeds), wider for "
    "the best of several rows, which may be the best by luck (Bonferroni). "
    "Not separated: the verdict changes within that interval. "
    "One seed: the interval is unknown, and the means alone decide. "
    "Nothing found: both sides are under 0.15 points, too little to compare. "
    "One training: both sides have the same settings. "
    "Times are measured once, with 5% of the longer one as ±."
)


def write_page(
    out: str | Path,
    results: Sequence[TableResult],
    plots: Mapping[str, Sequence[Path]] | None = None,
) -> Path:
    """Write ``report.html`` of an output folder.

    Args:
        out: the folder; links to run folders and plots are relative to it.
        results: in the order of the page.
        plots: by name of the table or figure; PNG and JPEG are shown, others linked.

    Returns:
        The file.

    Raises:
        DataError: a plot cannot be read.
    """
    out = Path(out)
    page = Page("Focal Loss for Dense Object Detection, measured", _subtitle(results))
    page.section("Overview")
    claims = [claim for result in results for claim in result.claims]
    if claims:
        page.facts(_counts(claims))
    _add_parts(page, _overview(results))
    if claims:
        page.text(_LEGEND)
    for result in results:
        page.section(result.number)
        page.heading(result.title)
        files = (plots or {}).get(result.name, ())
        shown = [file for file in files if file.suffix.lower() in (".png", ".jpg", ".jpeg")]
        if shown:
            page.images([(file, "") for file in shown])
        if files:
            page.add(_BLOCKS.links("Files", [(_address(file, out), file.name) for file in files]))
        _add_parts(page, result.parts())
        folders = [(row.label, _run_links(row.folders, out)) for row in result.rows if row.folders]
        if folders:
            page.add(_BLOCKS.folded_links("Run folders", folders))
    return page.write(out / "report.html")


def claims_markdown(results: Sequence[TableResult]) -> str:
    """Format the overview of all claims in Markdown."""
    return markdown(_overview(results))


def _overview(results: Sequence[TableResult]) -> list[tuple[PartKind, Any]]:
    lines = dict.fromkeys(result.not_coco for result in results if result.not_coco)
    rows = [
        [result.number, *claim.cells(labels=False), claim.marked_verdict]
        for result in results
        for claim in result.claims
    ]
    table = Table(("", "the paper says", "paper", "here", "verdict"), rows, left=5)
    last: tuple[PartKind, Any] = ("table", table) if rows else ("text", "No claim was tested.")
    return [*(("strong", line) for line in lines), last]


def _add_parts(page: Page, parts: Iterable[tuple[PartKind, Any]]) -> None:
    for kind, part in parts:
        if kind == "table":
            page.table(part.columns, part.rows, left=part.left, folded=part.title)
        elif kind == "code":
            page.code(part)
        else:
            for line in part if kind == "list" else [part]:
                page.text(line)


def _counts(claims: Sequence[ClaimResult]) -> dict[str, object]:
    """Count the claims with each verdict."""
    names = {"holds": "hold", "does not hold": "do not hold"}
    counts = Counter[str](claim.verdict for claim in claims)
    verdicts = {names.get(verdict, verdict): counts[verdict] for verdict in get_args(Verdict)}
    total = {f"claim{'' if len(claims) == 1 else 's'} of the paper": len(claims)}
    return total | {verdict: count for verdict, count in verdicts.items() if count}


def _subtitle(results: Sequence[TableResult]) -> str:
    """Name the paper, and the data and machines of the results."""
    parts = ["Lin et al. 2017, arXiv:1708.02002"]
    for name in ("data", "machine"):
        values = [result.about.get(name) for result in results]
        parts += dict.fromkeys(str(value) for value in values if value)
    return " · ".join(parts)


def _run_links(folders: Sequence[str], out: Path) -> list[tuple[str, str]]:
    """Return address and name of each run folder's report, or of the folder."""
    reports = [out / folder / "report.html" for folder in folders]
    return [
        (_address(report if report.is_file() else report.parent, out), report.parent.name)
        for report in reports
    ]


def _address(path: Path, out: Path) -> str:
    """Return a path relative to the page, with slashes."""
    return Path(os.path.relpath(path, out)).as_posix()
