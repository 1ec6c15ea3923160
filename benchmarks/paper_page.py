"""Write what ``retinanet paper run`` has measured into docs/paper.md, and keep the figures.

    python benchmarks/paper_page.py OUT...

Each OUT is an ``--out`` folder. Its results are kept under ``benchmarks/results/paper/NAME/``, its
tables become ``docs/paper-NAME.md`` and its images ``docs/images/paper/NAME/``, and the claims at
a glance of all data sets take their place in docs/paper.md, between its two markers. Without OUT
the pages are written again from what is kept.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from retinanet.files import write_atomic
from retinanet.paper.outputs import read_results
from retinanet.paper.results import TableResult, markdown_table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "paper"
PAGE = ROOT / "docs" / "paper.md"
IMAGES = ROOT / "docs" / "images" / "paper"
BEGIN, END = "<!-- claims -->", "<!-- /claims -->"


def keep(out: Path) -> None:
    """Copy the results and the images of an ``--out`` folder."""
    name = out.resolve().name
    results = read_results(out)
    if not results:
        sys.exit(f"{out} has no result of `retinanet paper run`; give its --out folder")
    for one in results:
        write_atomic(RESULTS / name / f"{one.name}.json", one.to_json())
        image = out / "plots" / f"{one.name}.png"
        if image.is_file():
            (IMAGES / name).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(image, IMAGES / name / image.name)


def page_of(name: str, results: Sequence[TableResult]) -> str:
    """All tables of a data set."""
    parts = [f"# The paper's tables on {name}", "What they say: [The paper](paper.md)."]
    for one in results:
        parts.append(one.to_markdown().rstrip())
        if (IMAGES / name / f"{one.name}.png").is_file():
            parts.append(f"![{one.heading}](images/paper/{name}/{one.name}.png)")
    return "\n\n".join(parts) + "\n"


def claims_of(every: Mapping[str, Sequence[TableResult]]) -> str:
    """Each claim once, with what was found of it on each data set."""
    rows: dict[tuple[str, str], list[str]] = {}
    for place, results in enumerate(every.values()):
        for one in results:
            for claim in one.claims:
                of = one.heading.partition(":")[0]
                text, paper, here = claim.brief_cells()
                row = rows.setdefault((of, text), [of, text, paper, *["-"] * len(every)])
                row[3 + place] = f"{claim.said}: {here}" if here != "-" else claim.said
    order = sorted(rows.values(), key=lambda row: row[0])
    return markdown_table(["", "the paper says", "paper", *every], order, text=3 + len(every))


def main(outs: Sequence[str]) -> None:
    before, after = _around(PAGE)  # read first: nothing is written where the claims have no place
    for out in outs:
        keep(Path(out))
    folders = sorted(RESULTS.iterdir()) if RESULTS.is_dir() else []
    every = {one.name: found for one in folders if one.is_dir() and (found := read_results(one))}
    if not every:
        sys.exit(f"{RESULTS} keeps no results yet; give the --out folder of `retinanet paper run`")
    for name, results in every.items():
        write_atomic(PAGE.with_name(f"paper-{name}.md"), page_of(name, results))
    write_atomic(PAGE, f"{before}{BEGIN}\n\n{claims_of(every)}\n{END}{after}")


def _around(page: Path) -> tuple[str, str]:
    """What stands before and after the claims of a page."""
    text = page.read_text("utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or text.count(BEGIN) + text.count(END) != 2:
        sys.exit(f"{page} needs one {BEGIN} and one {END} behind it: the claims go between them")
    return before, after


if __name__ == "__main__":
    main(sys.argv[1:])
