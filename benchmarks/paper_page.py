"""Write the results of ``retinanet paper run`` into docs/paper.md and keep them.

    python benchmarks/paper_page.py OUT...

Each OUT is an ``--out`` folder. Its results are copied to ``benchmarks/results/paper/NAME/``, its
tables are written to ``docs/paper-NAME.md`` and its plots to ``docs/images/paper/NAME/``. The
claims of all data sets are written between the two markers of docs/paper.md. Without OUT the
pages are written again from the kept results.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from retinanet.files import write_atomic
from retinanet.paper.outputs import read_results
from retinanet.paper.results import Table, TableResult

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "paper"
PAGE = ROOT / "docs" / "paper.md"
IMAGES = ROOT / "docs" / "images" / "paper"
BEGIN, END = "<!-- claims -->", "<!-- /claims -->"


def keep(out: Path) -> None:
    """Copy the results and plots of an output folder."""
    name = out.resolve().name
    results = read_results(out)
    if not results:
        sys.exit(f"no results of `retinanet paper run` in {out}; give its --out folder")
    for result in results:
        write_atomic(RESULTS / name / f"{result.name}.json", result.to_json())
        image = out / "plots" / f"{result.name}.png"
        if image.is_file():
            (IMAGES / name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image, IMAGES / name / image.name)


def tables_page(name: str, results: Sequence[TableResult]) -> str:
    """Format all tables of a data set."""
    parts = [f"# The paper's tables on {name}", "Summary: [The paper](paper.md)."]
    for result in results:
        parts.append(result.to_markdown().rstrip())
        if (IMAGES / name / f"{result.name}.png").is_file():
            parts.append(f"![{result.heading}](images/paper/{name}/{result.name}.png)")
    return "\n\n".join(parts) + "\n"


def claims_table(results_by_data: Mapping[str, Sequence[TableResult]]) -> str:
    """Format each claim once, with its result on each data set."""
    rows: dict[tuple[str, str], list[str]] = {}
    count = len(results_by_data)
    for column, results in enumerate(results_by_data.values(), 3):
        for result in results:
            for claim in result.claims:
                text, paper, here = claim.cells(labels=False)
                new = [result.number, text, paper, *["-"] * count]
                row = rows.setdefault((result.number, text), new)
                row[column] = claim.marked_verdict + (f": {here}" if here != "-" else "")
    ordered = sorted(rows.values(), key=lambda row: row[0])
    columns = ["", "claim", "paper", *results_by_data]
    return Table(columns, ordered, left=3 + count).to_markdown()


def main(outs: Sequence[str]) -> None:
    """Keep the results of some output folders, and write the pages."""
    before, after = _around_claims(PAGE)  # first, so that nothing is written without the markers
    for out in outs:
        keep(Path(out))
    folders = sorted(RESULTS.iterdir()) if RESULTS.is_dir() else []
    results_by_data = {
        folder.name: results
        for folder in folders
        if folder.is_dir() and (results := read_results(folder))
    }
    if not results_by_data:
        sys.exit(f"no results in {RESULTS}; give the --out folder of `retinanet paper run`")
    for name, results in results_by_data.items():
        write_atomic(PAGE.with_name(f"paper-{name}.md"), tables_page(name, results))
    write_atomic(PAGE, f"{before}{BEGIN}\n\n{claims_table(results_by_data)}\n{END}{after}")


def _around_claims(page: Path) -> tuple[str, str]:
    """Return the text before and after the claims of a page."""
    text = page.read_text("utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or text.count(BEGIN) + text.count(END) != 2:
        sys.exit(f"{page} must contain {BEGIN} once, and {END} once after it: claims go between")
    return before, after


if __name__ == "__main__":
    main(sys.argv[1:])
