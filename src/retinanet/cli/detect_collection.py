"""``retinanet detect --engine ray``: a collection in, Parquet and JSON-lines shards out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from retinanet.cli.console import note, print_json, progress, say, table


def detect_collection(
    model: str,
    sources: list[str],
    out: Path | str,
    *,
    device: str,
    workers: int | None,
    batch_size: int,
    tile: int | str | None,
    overlap: float,
    json: bool,
    precision: str,
    backend: str,
    image_size: int | None,
    **thresholds: Any,
) -> None:
    """Search a collection and say what was found.

    Raises:
        typer.Exit: with code 1, if images could not be read.
    """
    from retinanet.batch.collection import search_collection

    if not json:
        note("looking through the sources, then starting Ray, which takes a while")
    with progress("detecting (shards)") as show:
        try:
            summary = search_collection(
                model,
                sources,
                out,
                device=device,
                workers=workers,
                batch_size=batch_size,
                tile=tile,
                overlap=overlap,
                precision=precision,
                backend=backend,
                image_size=image_size,
                on_progress=show,
                on_note=note,
                **thresholds,
            )
        except KeyboardInterrupt:
            note("what is done is kept: the same command goes on")
            raise
    if json:
        print_json({"out": summary.out, **summary.to_dict(), "failures": summary.failures})
    else:
        if summary.objects:
            table("Found", ["class", "objects"], summary.objects.items())
        many = "" if summary.images == 1 else "s"
        objects = sum(summary.objects.values())
        say(f"{objects} objects in {summary.images} image{many}, in {summary.out}")
        if summary.done_before:
            note(f"{summary.done_before} of {summary.shards} shards were there already")
    if summary.errors:
        many = "" if summary.errors == 1 else "s"
        note(f"{summary.errors} file{many} could not be read:", style="red")
        for failure in summary.failures:
            note(f"  {failure['reason']}")
        if summary.errors > len(summary.failures):
            rest = summary.errors - len(summary.failures)
            note(f"  and {rest} more, in errors.jsonl and errors.parquet there")
        raise typer.Exit(1)
