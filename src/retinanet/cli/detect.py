"""``retinanet detect``: images, videos or collections in, boxes out."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from retinanet.cli.console import count, note, note_failures, print_json, progress, say, table
from retinanet.cli.settings import (
    ClassOptions,
    DetectorOptions,
    Json,
    Model,
    ThresholdOptions,
    TileOptions,
    option,
)


@dataclass(frozen=True)
class FileOptions:
    """The files that are written."""

    out: Path = option("Output folder.", Path("found"))
    format: str | None = option(
        "Any of json, images, coco, csv, yolo, labelstudio, cvat, separated by commas.",
        shown="json,images",
    )
    image_root: str | None = option(
        "Label Studio: prefix of an image's name in its address.", shown="/data/local-files/?d="
    )
    draw_threshold: float | None = option(
        "Minimum score of a drawn box; with --track of one that begins a track.",
        shown="all are drawn; with --track .3",
    )


@dataclass(frozen=True)
class KindOptions:
    """What only videos or collections have."""

    batch_size: int = option("Images per batch.", 1, min=1)
    allow_urls: bool = option(
        "Images: fetch http:// and https:// addresses, up to 64 MiB and 30 s each.", False
    )
    every: int | None = option("Video: process every N-th frame.", shown="1", min=1)
    track: bool = option("Video: track objects across frames (ByteTrack).", False)
    engine: str = option("local; or ray, for collections and clusters.", "local")
    workers: int | None = option(
        "Ray: detectors in parallel.", shown="one per GPU or 4 cores", min=1
    )


_KINDS = {"images": "images", "video": "videos", "ray": "--engine ray"}
_ONLY_FOR = {
    "format": ("images",),
    "image_root": ("images",),
    "draw_threshold": ("images", "video"),
    "calibrate": ("images", "video"),
    "allow_urls": ("images",),
    "every": ("video",),
    "track": ("video",),
    "workers": ("ray",),
}


def detect(
    model: Model,
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Images, folders, globs; with --allow-urls addresses of images; videos, rtsp:// "
            "streams or a camera's number; with --engine ray also list files, WebDataset shards "
            "and s3://, gs://, hf:// addresses.",
        ),
    ],
    *,
    files: FileOptions,
    selection: ClassOptions,
    thresholds: ThresholdOptions,
    detector: DetectorOptions,
    tiles: TileOptions,
    other: KindOptions,
    json: Json = False,
) -> None:
    """Detect objects in images, in videos, or in collections of any size.

    Images that cannot be read are skipped and listed at the end; the exit code is then 1.
    """
    from retinanet.config import check_choice
    from retinanet.inference.sources import is_url, is_video

    check_choice("--engine", other.engine, ("local", "ray"))
    is_ray = other.engine == "ray"
    kind = "ray" if is_ray else "video" if any(map(is_video, sources)) else "images"
    given = {**vars(files), **vars(detector), **vars(tiles), **vars(other)}
    given |= {name: given[name] or None for name in ("track", "allow_urls")}
    _check_options(kind, [name for name, value in given.items() if value is not None])
    options = {**vars(detector), **selection.given(), **thresholds.given()}
    settings: dict[str, Any] = {"batch_size": other.batch_size}
    if kind == "ray":
        del options["calibrate"]
        options |= {**settings, **tiles.given(), "workers": other.workers}
        is_complete = _detect_collection(model, sources, files.out, options, json)
    elif kind == "video":
        from retinanet.cli.detect_video import detect_videos

        settings |= {"every": other.every or 1, "track": other.track}
        settings |= {"draw_threshold": files.draw_threshold, **tiles.given()}
        is_complete = detect_videos(model, sources, files.out, options, settings, json=json)
    else:
        settings |= tiles.given()
        listed: Sequence[Any] = sources
        if other.allow_urls:
            from retinanet.inference.urls import UrlSource

            listed = [UrlSource.of(item) if is_url(item) else item for item in sources]
        is_complete = _detect_images(model, listed, files, options, settings, json)
    if not is_complete:
        raise typer.Exit(1)


def _check_options(kind: str, given: Sequence[str]) -> None:
    """Raise a ConfigError for an option that would be ignored."""
    from retinanet.errors import ConfigError

    for name in given:
        kinds = _ONLY_FOR.get(name, (kind,))
        if kind not in kinds:
            suitable = " and ".join(_KINDS[kind] for kind in kinds)
            raise ConfigError(
                f"--{name.replace('_', '-')} is for {suitable}, not for {_KINDS[kind]}: "
                "leave it out"
            )


def _detect_images(
    model: str,
    sources: Sequence[Any],
    files: FileOptions,
    options: dict[str, Any],
    settings: dict[str, Any],
    json: bool,
) -> bool:
    """Detect in images, write the files, print the summary; returns whether all could be read."""
    from retinanet.inference import load
    from retinanet.inference.backends import network_settings
    from retinanet.inference.detections import Failure
    from retinanet.inference.sources import Source, iter_sources
    from retinanet.inference.writers import LOCAL_FILES, open_outputs

    listed = list(iter_sources(sources, once=True))
    readable = [source for source in listed if isinstance(source, Source)]
    failures = [source for source in listed if isinstance(source, Failure)]
    if not readable:
        raise failures[0].error
    if options["precision"] == "int8" and options["calibrate"] is None:
        options["calibrate"] = readable
    detector = load(model, **options)
    objects: Counter[str] = Counter()
    formats = [name for n in (files.format or "json,images").split(",") if (name := n.strip())]
    root = LOCAL_FILES if files.image_root is None else files.image_root
    drawn = files.draw_threshold or 0.0
    with (
        open_outputs(files.out, formats, drawn_score=drawn, image_root=root) as write,
        progress("detecting") as update,
    ):
        if not json:
            note(detector.network.description)
        for failure in failures:
            write(failure)
        stream = detector.stream(readable, keep_pixels="images" in formats, **settings)
        for done, result in enumerate(stream, start=1):
            write(result)
            if isinstance(result, Failure):
                failures.append(result)
            else:
                objects.update(detector.classes[label] for label in result.labels.tolist())
            update(done, len(readable))
    images = len(listed) - len(failures)
    if json:
        print_json(
            {
                "out": files.out,
                "network": detector.network.description,
                "images": images,
                "objects": dict(objects.most_common()),
                "failures": [failure.to_dict() for failure in failures],
            }
        )
    else:
        if objects:
            thresholds = network_settings(detector.thresholds, detector.classes)
            by_label = thresholds.get("class_thresholds")
            low = dict(zip(detector.classes, by_label or (), strict=False))
            rows = [
                (name, low.get(name, thresholds["score_threshold"]), number)
                for name, number in objects.most_common()
            ]
            table("Detections", ["class", "score over", "boxes"], rows)
        say(f"{objects.total()} boxes in {count(images, 'image')}, in {files.out}")
    if failures:
        note_failures([failure.reason for failure in failures], "image")
    return not failures


def _detect_collection(
    model: str, sources: list[str], out: Path, options: dict[str, Any], json: bool
) -> bool:
    """Detect on a Ray cluster and print the summary; returns whether all images could be read."""
    from retinanet.batch.collection import detect_collection

    if not json:
        note("listing the sources, then starting Ray, which takes a while")
    # Ray prints messages of its processes on standard output, which is for the result.
    with progress("detecting (shards)") as update, redirect_stdout(sys.stderr):
        try:
            summary = detect_collection(model, sources, out, on_progress=update, **options)
        except KeyboardInterrupt:
            note("completed shards are kept: rerun the command to resume")
            raise
    if json:
        print_json({"out": summary.out, **summary.to_dict(), "failures": summary.failures})
    else:
        if summary.objects:
            table("Detections", ["class", "objects"], summary.objects.items())
        objects = sum(summary.objects.values())
        say(f"{objects} objects in {count(summary.images, 'image')}, in {summary.out}")
        if summary.done_before:
            note(f"{summary.done_before} of {summary.shards} shards existed already: skipped")
    if summary.errors:
        reasons = [failure["reason"] for failure in summary.failures]
        note_failures(reasons, "file", total=summary.errors)
        note(f"  errors.jsonl in {summary.out} lists all")
    return not summary.errors
