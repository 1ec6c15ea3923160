"""The page of an output folder: the paper's claims and verdicts, then every table."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from retinanet.paper.results import (
    CLAIM_COLUMNS,
    SETTING_COLUMNS,
    ClaimResult,
    TableResult,
    markdown_table,
)
from retinanet.report.html import Page

OVERVIEW_COLUMNS = ("", "the paper says", "paper", "here", "verdict")
"""Columns of the overview of all claims."""

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
    out, plots = Path(out), plots or {}
    page = Page("Focal Loss for Dense Object Detection, measured", _subtitle(results))
    page.section("Overview")
    for line in _not_coco(results):
        page.text(line)
    claims = [(result, claim) for result in results for claim in result.claims]
    if claims:
        page.facts(_counts([claim for _, claim in claims]))
        rows = [[result.number, *_cells(claim, labels=False)] for result, claim in claims]
        page.table(OVERVIEW_COLUMNS, rows, left=len(OVERVIEW_COLUMNS))
        page.text(_LEGEND)
    else:
        page.text("No claim was tested.")
    for result in results:
        page.section(result.number)
        page.heading(result.title)
        _add_result(page, result, out, plots.get(result.name, ()))
    return page.write(out / "report.html")


def claims_markdown(results: Sequence[TableResult]) -> str:
    """Format the overview of all claims in Markdown."""
    rows = [
        [result.number, *claim.cells(labels=False), claim.marked_verdict]
        for result in results
        for claim in result.claims
    ]
    table = markdown_table(OVERVIEW_COLUMNS, rows, text=5) if rows else "No claim was tested."
    return "\n\n".join([*(f"**{line}**" for line in _not_coco(results)), table]) + "\n"


def _not_coco(results: Sequence[TableResult]) -> list[str]:
    return list(dict.fromkeys(result.not_coco for result in results if result.not_coco))


def _cells(claim: ClaimResult, *, labels: bool = True) -> list[str]:
    sign = {"holds": "✓ ", "does not hold": "✗ "}.get(claim.verdict, "")
    return [*claim.cells(labels=labels), sign + claim.marked_verdict]


def _add_result(page: Page, result: TableResult, out: Path, plots: Sequence[Path]) -> None:
    setting = f" In the paper: {result.setting}." if result.setting else ""
    page.text(f"{result.section}.{setting}")
    if result.not_coco:
        page.text(result.not_coco)
    shown = [plot for plot in plots if plot.suffix.lower() in (".png", ".jpg", ".jpeg")]
    if shown:
        page.images([(plot, "") for plot in shown])
    if plots:
        page.add(_BLOCKS.links("Files", [(_address(plot, out), plot.name) for plot in plots]))
    if result.rows:
        page.table(*result.table(wide=True))
    for line in result.footnotes:
        page.text(line)
    if result.claims:
        page.heading("The paper's conclusions")
        page.table(CLAIM_COLUMNS, map(_cells, result.claims), left=len(CLAIM_COLUMNS))
    if result.note:
        page.text(result.note)
    if result.rows:
        page.heading("How it was measured")
        _add_about(page, result, out)


def _add_about(page: Page, result: TableResult, out: Path) -> None:
    if result.about.get("command"):
        page.code(str(result.about["command"]))
    if result.facts:
        page.table(["", ""], result.facts, left=2)
    settings = result.settings
    if settings:
        plural = "" if len(settings) == 1 else "s"
        title = f"{len(settings)} setting{plural} other than the paper's"
        page.table(SETTING_COLUMNS, settings, left=3, folded=title)
    folders = [(row.label, row.folders) for row in result.rows if row.folders]
    if folders:
        rows = [
            (label, [(_address(_run_page(out / path), out), Path(path).name) for path in paths])
            for label, paths in folders
        ]
        page.add(_BLOCKS.folded_links("Run folders", rows))


def _counts(claims: Sequence[ClaimResult]) -> dict[str, object]:
    """Count the claims with each verdict."""
    names = {"holds": "hold", "does not hold": "do not hold"}
    counts = Counter(names.get(claim.verdict, claim.verdict) for claim in claims)
    return {f"claim{'' if len(claims) == 1 else 's'} of the paper": len(claims), **counts}


def _subtitle(results: Sequence[TableResult]) -> str:
    """Name the paper, and the data and machines of the results."""
    parts = ["Lin et al. 2017, arXiv:1708.02002"]
    for name in ("data", "machine"):
        values = [result.about.get(name) for result in results]
        parts += dict.fromkeys(str(value) for value in values if value)
    return " · ".join(parts)


def _run_page(folder: Path) -> Path:
    """Return the report of a run folder, or the folder."""
    report = folder / "report.html"
    return report if report.is_file() else folder


def _address(path: Path, out: Path) -> str:
    """Return a path relative to the page, with slashes."""
    return Path(os.path.relpath(path, out)).as_posix()
