"""``retinanet data suspects``: labels to review, and images to label next."""

from __future__ import annotations

import json as json_text
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from retinanet.cli.console import note_failures, plain, print_json, progress, say, table
from retinanet.cli.settings import DetectorOptions, Json, Model, TileOptions, option

_SHOWN = 20  # images


@dataclass(frozen=True)
class SuspectOptions:
    """The search."""

    out: Path = option("Output folder.", Path("suspects"))
    split: str = option("Split of the data: all, train, val, test or another one.", "all")
    limit: int = option("Suspects on the page and in the tasks of labelling tools.", 100, min=1)
    next: int | None = option(
        "Rank this many unlabelled images for labelling instead, the least certain first.", min=1
    )
    image_root: str | None = option(
        "Label Studio: prefix of an image's name in its address.", shown="/data/local-files/?d="
    )
    batch_size: int = option("Images per batch.", 4, min=1)


def suspects(
    model: Model,
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="Labelled data; with --next images to label.")
    ],
    *,
    options: SuspectOptions,
    detector: DetectorOptions,
    tiles: TileOptions,
    json: Json = False,
) -> None:
    """Find labels that are probably wrong or missing; with --next images to label next.

    Writes a page of crops, a table (CSV and JSON), and tasks for Label Studio and CVAT.
    """
    from retinanet.evaluation.suspects import KINDS

    settings = {**tiles.given(), "batch_size": options.batch_size}
    if options.next is None:
        result = _find(model, data, options, {**vars(detector), **settings})
    else:
        result = _rank(model, data, options, vars(detector), settings)
    if json:
        print_json({"out": options.out, **result})
        return
    rows: list[Any]
    if options.next is None:
        rows = [(kind, KINDS[kind], number) for kind, number in result["counts"].items()]
        table("Suspects", ["kind", "meaning", "suspects"], rows, left=2)
    else:
        rows = [(row["image"], row["uncertainty"]) for row in result["images"][:_SHOWN]]
        table("Images to label next", ["image", "uncertainty"], rows)
    say(f"wrote a page, tables and tasks for Label Studio and CVAT to {options.out}")


def _find(
    model: str, data: str, options: SuspectOptions, settings: dict[str, Any]
) -> dict[str, Any]:
    from retinanet.evaluation.suspects import KINDS, find_suspects
    from retinanet.report.suspects import write_suspects

    with progress("detecting") as update:
        found = find_suspects(model, data, split=options.split, progress=update, **settings)
    rows = found.to_rows()
    first = replace(found, suspects=found.suspects[: options.limit])
    _write(options, "suspects", rows, first.to_detections())
    write_suspects(found, options.out / "suspects.html", limit=options.limit)
    counts = {kind: sum(row["kind"] == kind for row in rows) for kind in KINDS}
    if found.unreadable:
        note_failures(list(found.unreadable.values()), "image")
    return {"counts": counts, "suspects": rows}


def _rank(
    model: str,
    data: str,
    options: SuspectOptions,
    detector: Mapping[str, Any],
    settings: dict[str, Any],
) -> dict[str, Any]:
    from retinanet.evaluation.suspects import rank_images
    from retinanet.inference import load
    from retinanet.report.suspects import write_next

    assert options.next is not None
    with progress("detecting") as update:
        ranked, failures = rank_images(
            load(model, **detector), data, options.next, progress=update, **settings
        )
    rows = [
        {"rank": i, "image": c.found.source, "uncertainty": round(c.uncertainty, 4)}
        for i, c in enumerate(ranked, start=1)
    ]
    _write(options, "next", rows, (c.found for c in ranked))
    write_next(ranked, options.out / "next.html")
    if failures:
        note_failures([failure.reason for failure in failures], "image")
    return {"images": rows}


def _write(
    options: SuspectOptions, name: str, rows: Sequence[Mapping[str, Any]], tasks: Any
) -> None:
    """Write the table as CSV and JSON, and the tasks."""
    from retinanet.files import csv_text, write_atomic
    from retinanet.inference.writers import LOCAL_FILES, open_outputs

    root = LOCAL_FILES if options.image_root is None else options.image_root
    with open_outputs(options.out, ("labelstudio", "cvat"), image_root=root) as write:
        for image in tasks:
            write(image)
    write_atomic(options.out / f"{name}.csv", csv_text(rows, ["rank"]))
    write_atomic(options.out / f"{name}.json", json_text.dumps(plain(rows), indent=1) + "\n")
