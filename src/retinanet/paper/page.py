"""The page of an output folder: the paper's claims and verdicts, then every table."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from retinanet.paper.results import CLAIM_COLUMNS, PartKind, Table, TableResult, Verdict, markdown
from retinanet.report.html import Page

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
    """Write ``report.html`` of an output folder, to which its links are relative.

    `plots` are by name of the table or figure; PNG files are shown, all are linked.
    """
    out = Path(out)
    page = Page("Focal Loss for Dense Object Detection, measured", _subtitle(results))
    page.section("Overview")
    verdicts = Counter[str](claim.verdict for result in results for claim in result.claims)
    if verdicts:
        names = {"holds": "hold", "does not hold": "do not hold"}
        count = verdicts.total()
        total = {f"claim{'' if count == 1 else 's'} of the paper": count}
        counts = {names.get(v, v): verdicts[v] for v in get_args(Verdict) if verdicts[v]}
        page.facts(total | counts)
    _add_parts(page, _overview(results))
    if verdicts:
        page.text(_LEGEND)
    for result in results:
        page.section(result.number)
        page.heading(result.title)
        files = (plots or {}).get(result.name, ())
        if shown := [(file, "") for file in files if file.suffix == ".png"]:
            page.images(shown)
        if files:
            page.links({"Files": {file.name: _address(file, out) for file in files}})
        _add_parts(page, result.parts())
        folders = {row.label: _run_links(row.folders, out) for row in result.rows if row.folders}
        if folders:
            page.links(folders, folded="Run folders")
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
    table = Table(("", *CLAIM_COLUMNS), rows, left=5)
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


def _subtitle(results: Sequence[TableResult]) -> str:
    """Name the paper, and the data and machines of the results."""
    values = [result.about.get(name) for name in ("data", "machine") for result in results]
    parts = dict.fromkeys(str(value) for value in values if value)
    return " · ".join(["Lin et al. 2017, arXiv:1708.02002", *parts])


def _run_links(folders: Sequence[str], out: Path) -> dict[str, str]:
    """Return the address of each run folder's report, or of the folder, by its name."""
    reports = [out / folder / "report.html" for folder in folders]
    return {
        report.parent.name: _address(report if report.is_file() else report.parent, out)
        for report in reports
    }


def _address(path: Path, out: Path) -> str:
    """Return a path relative to the page, with slashes."""
    return Path(os.path.relpath(path, out)).as_posix()
