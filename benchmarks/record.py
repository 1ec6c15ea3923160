"""Measure at full size on this machine, keep the figures, and write them into docs/performance.md.

    python benchmarks/record.py [STAGE...] [--threads N] [--device D] [--name NAME]
    python benchmarks/record.py --curves [--threads N]
    python benchmarks/record.py --render

The first times the stages (none: all) and keeps their rows under ``benchmarks/results/``, beside
those of other stages and machines; the second draws the curves; the third only writes the page.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from retinanet.bench import STAGES, Machine, Row, bench, describe_machine
from retinanet.bench.markdown import to_markdown
from retinanet.files import write_atomic
from retinanet.model.precision import choose_device

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
CURVES = ROOT / "docs" / "images" / "curves"


def keep(
    folder: Path,
    name: str,
    machine: Machine,
    rows: Sequence[Row],
    seconds: float | None = None,
) -> Path:
    """Put the rows into the machine's file, in the place of those of the same stages.

    Rows of a machine that has changed since (:meth:`Machine.same_as`) go: the page has one
    description for all of them.

    Args:
        folder: of the machines' files.
        name: of the machine.
        machine: where `rows` were measured.
        rows: of whole stages.
        seconds: after which each of their contests ended; None: the bench's own.

    Returns:
        the file.
    """
    file = folder / f"{slug(name)}.json"
    before: list[dict[str, Any]] = []
    times: dict[str, float | None] = {}
    if file.is_file():
        kept = json.loads(file.read_text("utf-8"))
        if Machine(**kept["machine"]).same_as(machine):
            before, times = kept["rows"], kept.get("seconds", {})
        else:
            print(f"{file.name} was of another machine: its rows are dropped", file=sys.stderr)
    again = {row.stage for row in rows}
    times = {**times, **dict.fromkeys(again, seconds)}
    every = [one for one in before if one["stage"] not in again]
    every += [row.to_dict() for row in rows]
    every.sort(key=lambda one: list(STAGES).index(one["stage"]))
    told = {
        "name": name,
        "machine": machine.to_dict(),
        "seconds": {stage: times[stage] for stage in STAGES if stage in times},
        "rows": every,
    }
    return write_atomic(file, json.dumps(told, indent=1) + "\n")


def slug(name: str) -> str:
    """A file's name for a machine's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def machines(folder: Path) -> str:
    """A section a machine, as Markdown."""
    sections = []
    for file in sorted(folder.glob("*.json")):
        kept = json.loads(file.read_text("utf-8"))
        rows = [Row.from_dict(one) for one in kept["rows"]]
        text = to_markdown(Machine(**kept["machine"]).lines(), rows)
        sections.append(f"### {kept['name']}\n\n{text}")
    return "\n".join(sections) or "No machine has been recorded yet.\n"


def curves(folder: Path) -> str:
    """Each curve's image and what its lines say, as Markdown."""
    file = folder / "curves.json"
    if not file.is_file():
        return "No curve has been recorded yet.\n"
    kept = json.loads(file.read_text("utf-8"))
    parts = ["Measured on: " + "; ".join(Machine(**kept["machine"]).lines()) + "."]
    for name, curve in kept["curves"].items():
        parts.append(f"![Time and memory against {curve['axis']}](images/curves/{name}.png)")
        parts.append("\n".join(f"- {'; '.join(one['says'])}." for one in curve["lines"].values()))
    return "\n\n".join(parts) + "\n"


def between(page: str, name: str, text: str) -> str:
    """The page with `text` in the place of what stands between two marks.

    Raises:
        ValueError: the marks are not there.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if page.count(start) != 1 or page.count(end) != 1:
        raise ValueError(f"the page has no {start} ... {end}")
    head, rest = page.split(start)
    return f"{head}{start}\n\n{text}\n{end}{rest.split(end)[1]}"


def render(page: Path, results: Path, images: Path) -> None:
    """Write what is kept into the page."""
    text = between(page.read_text("utf-8"), "machines", machines(results))
    page.write_text(between(text, "curves", curves(images)), "utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=None, help="after which a row ends")
    parser.add_argument("--name", help="of the machine; else its processor's or GPU's")
    parser.add_argument("--curves", action="store_true", help="draw the curves instead")
    parser.add_argument("--render", action="store_true", help="only write the page")
    given = parser.parse_args(arguments)
    if given.curves:
        # A program of its own: here nothing may be computed before its processes are forked.
        script = Path(__file__).with_name("curves.py")
        command: list[Any] = [sys.executable, script, "--out", CURVES, "--threads", given.threads]
        subprocess.run([str(one) for one in command], check=True)
    elif not given.render:
        torch.set_num_threads(given.threads)
        machine = describe_machine(choose_device(given.device))
        name = given.name or machine.name
        # Stage by stage, so that what is done is kept if a later one fails.
        for stage in given.stages or STAGES:
            rows = []
            options = {"device": given.device, "threads": given.threads, "seconds": given.seconds}
            for row in bench([stage], size="full", **options):
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
            file = keep(RESULTS, name, machine, rows, given.seconds)
            print(f"kept in {file}", file=sys.stderr)
            render(PAGE, RESULTS, CURVES)
    render(PAGE, RESULTS, CURVES)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
