"""``retinanet detect --engine ray``: Parquet and JSON-lines shards of a collection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from retinanet.cli.console import count, note, note_failures, print_json, progress, say, table


def detect_collections(
    model: str, sources: list[str], out: Path, options: dict[str, Any], *, json: bool
) -> bool:
    """Detect in a collection and print the summary; returns whether all images could be read.

    Args:
        model, sources, out, options: as for :func:`retinanet.batch.collection.detect_collection`.
        json: print the summary as JSON.
    """
    from retinanet.batch.collection import detect_collection

    if not json:
        note("listing the sources, then starting Ray, which takes a while")
    with progress("detecting (shards)") as update:
        try:
            summary = detect_collection(
                model, sources, out, on_progress=update, on_note=note, **options
            )
        except KeyboardInterrupt:
            note("completed shards are kept: rerun the command to resume")
            raise
    if json:
        print_json({"out": summary.out, **summary.to_dict(), "failures": summary.failures})
    else:
        if summary.objects:
            table("Detections", ["class", "objects"], summary.objects.items())
        boxes = sum(summary.objects.values())
        say(f"{boxes} objects in {count(summary.images, 'image')}, in {summary.out}")
        if summary.done_before:
            note(f"{summary.done_before} of {summary.shards} shards existed already: skipped")
    if summary.errors:
        reasons = [failure["reason"] for failure in summary.failures]
        note_failures(reasons, "file", total=summary.errors)
        note(f"  errors.jsonl and errors.parquet in {summary.out} list all")
    return not summary.errors
