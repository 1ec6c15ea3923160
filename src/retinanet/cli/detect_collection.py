"""``retinanet detect --engine ray``: Parquet and JSON-lines shards of a collection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from retinanet.cli.console import note, print_json, progress, say, table


def detect_collections(
    model: str, sources: list[str], out: Path | str, *, json: bool, **options: Any
) -> None:
    """Detect in a collection and print the summary.

    Args:
        model, sources, out: as for :func:`retinanet.batch.collection.detect_collection`.
        json: print the summary as JSON.
        options: of the same function.

    Raises:
        typer.Exit: with code 1, if images could not be read.
    """
    from retinanet.batch.collection import detect_collection

    if not json:
        note("listing the sources, then starting Ray, which takes a while")
    with progress("detecting (shards)") as show:
        try:
            summary = detect_collection(
                model, sources, out, on_progress=show, on_note=note, **options
            )
        except KeyboardInterrupt:
            note("completed shards are kept: rerun the command to resume")
            raise
    if json:
        print_json({"out": summary.out, **summary.to_dict(), "failures": summary.failures})
    else:
        if summary.objects:
            table("Detections", ["class", "objects"], summary.objects.items())
        plural = "" if summary.images == 1 else "s"
        objects = sum(summary.objects.values())
        say(f"{objects} objects in {summary.images} image{plural}, in {summary.out}")
        if summary.done_before:
            note(f"{summary.done_before} of {summary.shards} shards existed already: skipped")
    if summary.errors:
        plural = "" if summary.errors == 1 else "s"
        note(f"{summary.errors} file{plural} could not be read:", style="red")
        for failure in summary.failures:
            note(f"  {failure['reason']}")
        if summary.errors > len(summary.failures):
            rest = summary.errors - len(summary.failures)
            note(f"  and {rest} more, in errors.jsonl and errors.parquet there")
        raise typer.Exit(1)
