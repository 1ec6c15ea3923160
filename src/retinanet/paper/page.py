"""The page of an ``--out`` folder: the paper's claims and what was found, then every table."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Self
from urllib.parse import quote

from retinanet.paper.results import (
    CLAIM_COLUMNS,
    SETTING_COLUMNS,
    ClaimResult,
    TableResult,
    Verdict,
    about_facts,
    markdown_table,
)
from retinanet.report.html import Page

GLANCE_COLUMNS = ("", "the paper says", "paper", "here", "verdict")
"""Headings of all claims at a glance."""

_SHORT = 30  # letters of a cell that is not broken: the paper's figures and their difference

# Dark enough for text on white (contrast over 4.5).
_COLOURS: Mapping[Verdict, str] = {
    "holds": "#1a7f37",
    "does not hold": "#b42318",
    "not separated": "#7a5d00",
    "not measured": "#59636e",
}


def write_page(
    out: str | Path,
    results: Sequence[TableResult],
    plots: Mapping[str, Sequence[Path]] | None = None,
) -> Path:
    """Write ``report.html`` of a folder.

    Args:
        out: the folder that the trainings lie in; links to run folders and to plots start here.
        results: in the order of the page; figures without training have no rows.
        plots: by the name of a table or figure; PNG and JPEG are shown, others linked.

    Returns:
        the file.

    Raises:
        DataError: a plot cannot be read.
        ValueError: a plot belongs to none of the results.
    """
    out, plots = Path(out), dict(plots or {})
    strange = plots.keys() - {one.name for one in results}
    if strange:
        raise ValueError(f"plots of {', '.join(sorted(strange))}, of which there is no result")
    page = _Page("Focal Loss for Dense Object Detection, measured", _subtitle(results))
    page.section("At a glance")
    for line in dict.fromkeys(one.not_coco for one in results if one.not_coco):
        page.text(line)
    claims = [claim for one in results for claim in one.claims]
    if claims:
        page.facts(_counts(claims))
        page.claims(
            GLANCE_COLUMNS, [([_short(one), *c.brief_cells()], c) for one, c in _all(results)]
        )
        page.text(_HOW_TO_READ)
    else:
        page.text("No claim was tested.")
    for one in results:
        page.section(_short(one))
        page.heading(one.title)
        _add_result(page, one, out, plots.get(one.name, ()))
    return page.write(out / "report.html")


def index_markdown(results: Sequence[TableResult]) -> str:
    """All claims at a glance, in Markdown; one table of the paper after the other."""
    parts = [f"**{line}**" for line in dict.fromkeys(one.not_coco for one in results) if line]
    rows = [[_short(one), *claim.brief_cells(), claim.said] for one, claim in _all(results)]
    parts.append(markdown_table(GLANCE_COLUMNS, rows, text=5) if rows else "No claim was tested.")
    return "\n\n".join(parts) + "\n"


_HOW_TO_READ = (
    "Points of AP: mean and standard deviation over seeds. Of each side the row with the highest "
    "mean counts. The ± of a difference is how far chance may move it: it stays within 95 times in "
    "100, judged from the differences seed by seed (Student's t; Welch's where the rows have other "
    "seeds) and wider for the best of several rows, which may be the best by luck. "
    "Not separated: within that ± the verdict would turn. "
    "One seed: how far chance moves the figures is not known, the means alone decide. "
    "Nothing found: both sides are under 0.15 points, too little for an order. "
    "One training: both sides came to the same settings. "
    "Times are measured once, and 5% of the longer one is put down to chance."
)


class _Page(Page):
    """A page that also has verdicts in colour and links."""

    def claims(
        self, columns: Sequence[str], rows: Iterable[tuple[Sequence[str], ClaimResult]]
    ) -> Self:
        """A table of texts that ends in the verdict of each row's claim."""
        head = "".join(f'<th class="text">{escape(name)}</th>' for name in columns)
        body = ""
        for cells, claim in rows:
            # A sign beside the colour, for those who do not tell red from green.
            sign = {"holds": "✓ ", "does not hold": "✗ "}.get(claim.verdict, "")
            style = f"font-weight: 600; color: {_COLOURS[claim.verdict]}"
            said = f'<td class="text" style="{style}">{_verdict(sign, claim)}</td>'
            body += f"<tr>{''.join(map(_cell, cells))}{said}</tr>"
        return self.add(
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )

    def figures(self, one: TableResult) -> Self:
        """The figures of a table: measured, and the paper's beside them."""
        groups = "".join(
            f'<th colspan="{len(one.shown)}" style="text-align: center">{name}</th>{gap}'
            for name, gap in (("measured here", "<th></th>"), ("in the paper", ""))
        )
        names = "".join(f"<th>{escape(name)}</th>" for name in (*one.shown, "seeds", *one.shown))
        body = ""
        for label, *cells in one.wide_rows:
            first = f'<td class="text" style="white-space: nowrap">{escape(label)}</td>'
            body += f"<tr>{first}{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        return self.add(
            f'<div class="scroll"><table><thead><tr><th></th>{groups}</tr>'
            f"<tr><th></th>{names}</tr></thead><tbody>{body}</tbody></table></div>"
        )

    def links(self, title: str, links: Iterable[tuple[str, str]]) -> Self:
        """(address, text) in a paragraph behind a title."""
        return self.add(f"<p>{escape(title)}: {_anchors(links)}</p>")

    def folded_links(
        self, title: str, rows: Iterable[tuple[str, Iterable[tuple[str, str]]]]
    ) -> Self:
        """Links of several things, a line each, under a title that unfolds."""
        body = "".join(
            f'<tr><td class="text">{escape(name)}</td><td class="text">{_anchors(links)}</td></tr>'
            for name, links in rows
        )
        return self.add(
            f'<details><summary>{escape(title)}</summary><div class="scroll"><table><tbody>{body}'
            "</tbody></table></div></details>"
        )


def _verdict(sign: str, claim: ClaimResult) -> str:
    """A verdict with its marks, broken between these alone."""
    verdict, _, marks = claim.said.partition(" (")
    parts = [sign + verdict, *(f"({marks}".split(", ") if marks else ())]
    lines = [*(f"{one}," for one in parts[1:-1]), parts[-1]] if marks else []
    return " ".join(map(_unbroken, (parts[0], *lines)))


def _cell(content: str) -> str:
    """A cell of text; a short one stays on one line, and a figure with its ± and unit."""
    if len(content) <= _SHORT:
        return f'<td class="text">{_unbroken(content)}</td>'
    parts = re.split(r"([^ (]+ ± [^ ]+(?: ms:?)?|\(best of \d+\):?)", content)
    texts = [_unbroken(one) if place % 2 else escape(one) for place, one in enumerate(parts)]
    return f'<td class="text">{"".join(texts)}</td>'


def _unbroken(text: str) -> str:
    return f'<span style="white-space: nowrap">{escape(text)}</span>'


def _anchors(links: Iterable[tuple[str, str]]) -> str:
    return ", ".join(
        f'<a href="{escape(quote(address))}">{escape(text)}</a>' for address, text in links
    )


def _add_result(page: _Page, one: TableResult, out: Path, plots: Sequence[Path]) -> None:
    page.text(f"{one.section}." + (f" In the paper: {one.setting}." if one.setting else ""))
    if one.not_coco:
        page.text(one.not_coco)
    shown = [plot for plot in plots if plot.suffix.lower() in (".png", ".jpg", ".jpeg")]
    if shown:
        page.images([(plot, "") for plot in shown])
    if plots:
        page.links("Files", [(_address(plot, out), plot.name) for plot in plots])
    if one.lines:
        page.figures(one)
    for line in one.footnotes:
        page.text(line)
    if one.claims:
        page.heading("What the paper concludes")
        page.claims(CLAIM_COLUMNS, [(claim.cells(), claim) for claim in one.claims])
    if one.note:
        page.text(one.note)
    _add_about(page, one, out)


def _add_about(page: _Page, one: TableResult, out: Path) -> None:
    settings = one.about.get("settings") or ()
    folders = [(row.label, row.folders) for row in one.lines if row.folders]
    if not (one.about.get("command") or about_facts(one.about) or settings or folders):
        return
    page.heading("How it was measured")
    if one.about.get("command"):
        page.code(str(one.about["command"]))
    facts = about_facts(one.about)
    if facts:
        page.table(["", ""], facts, left=2)
    if settings:
        cells = [[str(cell) for cell in row] for row in settings]
        plural = "" if len(cells) == 1 else "s"
        title = f"{len(cells)} setting{plural} other than the paper's"
        page.table(SETTING_COLUMNS, cells, left=3, folded=title)
    if folders:
        rows = [
            (label, [(_address(_landing(out / one), out), Path(one).name) for one in own])
            for label, own in folders
        ]
        page.folded_links("Run folders", rows)


def _all(results: Sequence[TableResult]) -> list[tuple[TableResult, ClaimResult]]:
    return [(one, claim) for one in results for claim in one.claims]


def _short(one: TableResult) -> str:
    """``Table 1b``."""
    return one.heading.partition(":")[0]


def _counts(claims: Sequence[ClaimResult]) -> dict[str, object]:
    """How many claims got each verdict, of those that occur."""
    counted = Counter(claim.verdict for claim in claims)
    names = {"holds": "hold", "does not hold": "do not hold"}
    facts: dict[str, object] = {f"claim{'' if len(claims) == 1 else 's'} of the paper": len(claims)}
    for verdict in _COLOURS:
        if counted[verdict]:
            facts[names.get(verdict, verdict)] = counted[verdict]
    return facts


def _subtitle(results: Sequence[TableResult]) -> str:
    """The paper, and the data and machines of the results."""
    parts = ["Lin et al. 2017, arXiv:1708.02002"]
    for name in ("data", "machine"):
        parts += dict.fromkeys(str(one.about[name]) for one in results if one.about.get(name))
    return " · ".join(parts)


def _landing(folder: Path) -> Path:
    """What to open of a run folder: its report, if it has one."""
    report = folder / "report.html"
    return report if report.is_file() else folder


def _address(path: Path, out: Path) -> str:
    """A path from the page on, with slashes everywhere."""
    return Path(os.path.relpath(path, out)).as_posix()
