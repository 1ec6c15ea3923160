"""Run the benchmarks at full size, store the rows, and write them into docs/performance.md.

    python benchmarks/record.py [STAGE...] [--threads N] [--device D] [--name NAME]
    python benchmarks/record.py --from FILE [--name NAME]
    python benchmarks/record.py --curves [--threads N]
    python benchmarks/record.py --render

The first runs the stages (none: all) and stores their rows in ``benchmarks/results/``, next to
those of other stages and machines; the second stores the rows of ``benchmarks/on_gpu.py``; the
third draws the curves; the last only writes the page.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))  # also when a test loads this file
from goals import describe_goals, goals_of

from retinanet.bench import STAGES, Machine, Row, Timing, bench, describe_machine
from retinanet.bench.benchmark import figures, remarks
from retinanet.files import write_atomic
from retinanet.model.precision import choose_device

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "performance.md"
CURVES = ROOT / "docs" / "images" / "curves"


_COLUMNS = ("", "ours", "theirs", "times faster", "of the limit", "MB", "theirs, MB", "goal")


def read_row(values: Mapping[str, Any]) -> Row:
    """Read a stored row."""
    names = ("ours", "theirs", "speedup")
    return Row(**{**values, **{name: values[name] and Timing(**values[name]) for name in names}})


def to_markdown(machine: Machine, rows: Sequence[Row], goals: Callable[[Row], str]) -> str:
    """Format the machine as a paragraph, then a table per stage, with the goals in a column."""
    parts = ["; ".join(machine.lines()) + "."]
    for stage, group in groupby(rows, key=lambda row: row.stage):
        of_stage = list(group)
        rivals = list(dict.fromkeys(row.rival for row in of_stage if row.rival))
        title = f"**{stage}**" + (f" against {', '.join(rivals)}" if rivals else "")
        rule = ["---", *["---:"] * (len(_COLUMNS) - 2), "---"]
        cells = [[*_cells(row, len(rivals) > 1), goals(row)] for row in of_stage]
        lines = [" | ".join(map(_escape, line)) for line in (_COLUMNS, rule, *cells)]
        parts.append("\n".join([f"{title}\n", *(f"| {line} |" for line in lines)]))
    return "\n\n".join(parts) + "\n"


def _cells(row: Row, name_rival: bool) -> list[str]:
    description = f"{row.case}: {row.size}"
    if name_rival and row.rival:
        description += f" / {row.rival}"
    if row.difference:
        description += f" ({row.difference})"
    ours, theirs, speedup, limit, *memory = figures(row)
    limit += f" ({row.limit})" if row.limit else ""
    return ["; ".join([description, *remarks(row)]), ours, theirs, speedup, limit, *memory]


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def store(
    folder: Path,
    name: str,
    machine: Machine,
    rows: Sequence[Row],
    seconds: float | None = None,
    checks: Mapping[str, str] | None = None,
) -> Path:
    """Write the rows into the machine's file, replacing those of the same stages.

    Rows of a machine that has changed since are dropped: the page describes it once.

    Args:
        folder: folder of the machines' files.
        name: name of the machine.
        machine: machine of `rows`.
        rows: rows of whole stages.
        seconds: time limit per case; None: the default.
        checks: further results, shown under the tables; None: as stored.

    Returns:
        the file.
    """
    file = folder / f"{slug(name)}.json"
    others: list[dict[str, Any]] = []
    limits: dict[str, float | None] = {}
    old_checks: dict[str, str] = {}
    if file.is_file():
        stored = json.loads(file.read_text("utf-8"))
        if same_machine(Machine(**stored["machine"]), machine):
            others, limits = stored["rows"], stored.get("seconds", {})
            old_checks = stored.get("checks", {})
        else:
            print(f"{file.name}: the machine has changed; its rows are dropped", file=sys.stderr)
    stages = {row.stage for row in rows}
    limits = {**limits, **dict.fromkeys(stages, seconds)}
    merged = [row for row in others if row["stage"] not in stages]
    merged += [asdict(row) for row in rows]
    merged.sort(key=lambda row: list(STAGES).index(row["stage"]))
    content = {
        "name": name,
        "machine": asdict(machine),
        "seconds": {stage: limits[stage] for stage in STAGES if stage in limits},
        "rows": merged,
    }
    if checks or old_checks:
        content["checks"] = dict(checks or old_checks)
    return write_atomic(file, json.dumps(content, indent=1) + "\n")


def same_machine(a: Machine, b: Machine) -> bool:
    """Whether rows of both are comparable; RAM and packages that only one has do not count."""
    shared = a.versions.keys() & b.versions.keys()
    same = all(a.versions[name] == b.versions[name] for name in shared)
    return same and replace(a, memory=None, versions={}) == replace(b, memory=None, versions={})


def slug(name: str) -> str:
    """File name of a machine."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def machines_markdown(folder: Path) -> str:
    """Format a section per machine, with the goals in the last column."""
    sections = []
    for file in sorted(folder.glob("*.json")):
        stored = json.loads(file.read_text("utf-8"))
        machine = Machine(**stored["machine"])
        rows = [read_row(row) for row in stored["rows"]]
        on_gpu, bf16 = bool(machine.gpu), bool(machine.gpu) or "BF16" in machine.instructions

        def goals(row: Row, machine: Machine = machine, on_gpu: bool = on_gpu,
                  bf16: bool = bf16) -> str:  # fmt: skip
            options = {"on_gpu": on_gpu, "native": machine.native, "bf16": bf16}
            return describe_goals(row, goals_of(row, **options))

        text = to_markdown(machine, rows, goals)
        checks = [f"- {check}: {found}." for check, found in stored.get("checks", {}).items()]
        text += "\n" + "\n".join(checks) + "\n" if checks else ""
        sections.append(f"### {stored['name']}\n\n{text}")
    return "\n".join(sections) or "No machine has been recorded yet.\n"


def curves_markdown(folder: Path) -> str:
    """Format each curve's image and the summary of its lines."""
    file = folder / "curves.json"
    if not file.is_file():
        return "No curve has been recorded yet.\n"
    stored = json.loads(file.read_text("utf-8"))
    parts = ["Measured on: " + "; ".join(Machine(**stored["machine"]).lines()) + "."]
    for name, curve in stored["curves"].items():
        parts.append(f"![Time and memory against {curve['axis']}](images/curves/{name}.png)")
        parts.append("\n".join(f"- {line['summary']}." for line in curve["lines"].values()))
    return "\n\n".join(parts) + "\n"


def replace_between(page: str, name: str, text: str) -> str:
    """Replace the text between the two markers of a page.

    Raises:
        ValueError: the page lacks the markers.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if page.count(start) != 1 or page.count(end) != 1:
        raise ValueError(f"the page has no {start} ... {end}")
    head, rest = page.split(start)
    return f"{head}{start}\n\n{text}\n{end}{rest.split(end)[1]}"


def render(page: Path, results: Path, images: Path) -> None:
    """Write the stored rows and curves into the page."""
    text = replace_between(page.read_text("utf-8"), "machines", machines_markdown(results))
    page.write_text(replace_between(text, "curves", curves_markdown(images)), "utf-8")


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=None, help="time limit per row")
    parser.add_argument("--name", help="machine name; default: its processor's or GPU's")
    parser.add_argument("--from", dest="file", type=Path, help="store the rows of on_gpu.py")
    parser.add_argument("--curves", action="store_true", help="draw the curves instead")
    parser.add_argument("--render", action="store_true", help="only write the page")
    arguments = parser.parse_args()
    failed = 0
    if arguments.file:
        stored = json.loads(arguments.file.read_text("utf-8"))
        machine = Machine(**stored["machine"])
        rows = [read_row(row) for row in stored["rows"]]
        name = arguments.name or machine.name
        store(RESULTS, name, machine, rows, stored["seconds"], stored["checks"])
    elif arguments.curves:
        # A process of its own: torch must not have computed anything before it forks.
        script = Path(__file__).with_name("curves.py")
        command = [sys.executable, script, "--out", CURVES, "--threads", arguments.threads]
        subprocess.run([str(part) for part in command], check=True)
    elif not arguments.render:
        torch.set_num_threads(arguments.threads)
        machine = describe_machine(choose_device(arguments.device))
        name = arguments.name or machine.name
        options = {name: getattr(arguments, name) for name in ("device", "threads", "seconds")}
        for stage in arguments.stages or STAGES:  # stored stage by stage
            rows = []
            for row in bench([stage], size="full", **options):
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
            failed += sum(bool(row.error) for row in rows)
            file = store(RESULTS, name, machine, rows, arguments.seconds)
            print(f"stored in {file}", file=sys.stderr)
            render(PAGE, RESULTS, CURVES)
    render(PAGE, RESULTS, CURVES)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
