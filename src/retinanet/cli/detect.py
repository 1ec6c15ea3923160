"""``retinanet detect``: images, videos or collections in, boxes out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from retinanet.cli.console import note, print_json, progress, say, table
from retinanet.cli.settings import (
    Backend,
    ClassAgnostic,
    DetectionsPerImage,
    Device,
    NmsThreshold,
    Precision,
    ScoreThreshold,
    thresholds_of,
    tile_of,
)

_SHOWN_FAILURES = 20

_FORMATS = "json,images"

# What each kind of search has no use for; the message says for what it is.
_OTHERS = {
    "images": {"--every": "videos", "--track": "videos", "--workers": "--engine ray"},
    "video": {
        "--format": "images",
        "--image-root": "images",
        "--tile": "images",
        "--overlap": "images",
        "--workers": "--engine ray",
    },
    "ray": {
        "--format": "images without --engine ray",
        "--image-root": "images without --engine ray",
        "--draw-threshold": "what is drawn, without --engine ray",
        "--calibrate": "images and videos without --engine ray",
        "--every": "videos",
        "--track": "videos",
    },
}


def detect(
    model: Annotated[
        str,
        typer.Argument(
            help="A run folder, a checkpoint, an exported file, torchvision/NAME or hf://OWNER/NAME."
        ),
    ],
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Images, folders, globs; videos or a camera's number; with --engine ray also "
            "list files, WebDataset shards and s3://, gs://, hf:// addresses.",
        ),
    ],
    *,
    out: Annotated[Path, typer.Option(help="Where the files go.")] = Path("found"),
    formats: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="Of json, images, coco, csv, yolo, labelstudio, cvat; commas between.",
            show_default="json,images",
        ),
    ] = None,
    image_root: Annotated[
        str | None,
        typer.Option(
            help="Label Studio: what stands before an image's name in its address.",
            show_default="/data/local-files/?d=",
        ),
    ] = None,
    score_threshold: ScoreThreshold = None,
    draw_threshold: Annotated[
        float | None, typer.Option(help="Boxes under it are not drawn.", show_default=".3")
    ] = None,
    nms_threshold: NmsThreshold = None,
    class_agnostic: ClassAgnostic = False,
    detections_per_image: DetectionsPerImage = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            help="Shorter side in pixels; larger finds smaller.", show_default="the model's"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 1,
    device: Device = "auto",
    precision: Precision = "auto",
    backend: Backend = "auto",
    calibrate: Annotated[
        str | None,
        typer.Option(
            help="Images on which int8 is calibrated.", show_default="those to be searched"
        ),
    ] = None,
    tile: Annotated[
        str | None,
        typer.Option(help="Search also in tiles of so many pixels, or auto: for huge images."),
    ] = None,
    overlap: Annotated[
        float | None,
        typer.Option(help="Share of a tile that its neighbour has too.", show_default=".2"),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(min=1, help="Video: search each so-many-th frame.", show_default="1"),
    ] = None,
    track: Annotated[
        bool, typer.Option("--track", help="Video: give each object a number that it keeps.")
    ] = False,
    engine: Annotated[
        str, typer.Option(help="local, or ray: a collection, on a cluster too.")
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Ray: detectors at once.", show_default="one a GPU or 4 cores"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")] = False,
) -> None:
    """Find objects in images, in videos, or in collections of any size.

    An image that cannot be read stops nothing: it is named at the end, and the exit code is 1.
    """
    from retinanet.config import check_choice
    from retinanet.inference import load
    from retinanet.inference.detections import DRAWN_SCORE, Failure
    from retinanet.inference.sources import Source, is_video, iter_sources
    from retinanet.inference.writers import LOCAL_FILES, open_outputs

    check_choice("--engine", engine, ("local", "ray"))
    kind = "ray" if engine == "ray" else "video" if any(map(is_video, sources)) else "images"
    _refuse_others(
        kind,
        {
            "--format": formats,
            "--image-root": image_root,
            "--draw-threshold": draw_threshold,
            "--calibrate": calibrate,
            "--tile": tile,
            "--overlap": overlap,
            "--every": every,
            "--track": track or None,
            "--workers": workers,
        },
    )
    drawn_score = DRAWN_SCORE if draw_threshold is None else draw_threshold
    tiles: dict[str, Any] = {
        "tile": tile_of(tile),
        "overlap": 0.2 if overlap is None else overlap,
    }
    settings: dict[str, Any] = {
        "precision": precision,
        "backend": backend,
        "image_size": image_size,
        **thresholds_of(
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            class_agnostic=class_agnostic,
            detections_per_image=detections_per_image,
        ),
    }
    if kind == "ray":
        from retinanet.cli.detect_collection import detect_collections

        detect_collections(
            model,
            sources,
            out,
            device=device,
            workers=workers,
            batch_size=batch_size,
            json=json,
            **tiles,
            **settings,
        )
        return
    if kind == "video":
        from retinanet.cli.detect_video import detect_videos

        detect_videos(
            model,
            sources,
            out,
            every=1 if every is None else every,
            track=track,
            batch_size=batch_size,
            draw_threshold=drawn_score,
            calibrate=calibrate,
            device=device,
            json=json,
            **settings,
        )
        return
    listed = list(iter_sources(sources, once=True))
    readable = [one for one in listed if isinstance(one, Source)]
    failures = [one for one in listed if isinstance(one, Failure)]
    if not readable:
        raise failures[0].error
    calibration: Any = calibrate
    if precision == "int8" and calibrate is None:
        calibration = [one.image for one in readable]
    detector = load(model, device, calibrate=calibration, **settings)
    chosen = [name.strip() for name in (formats or _FORMATS).split(",") if name.strip()]
    objects: Counter[str] = Counter()
    drawn: Counter[str] = Counter()
    searched = 0
    with (
        open_outputs(
            out,
            chosen,
            drawn_score=drawn_score,
            image_root=LOCAL_FILES if image_root is None else image_root,
        ) as write,
        progress("detecting") as show,
    ):
        if not json:
            note(detector.network.description)
        for failure in failures:
            write(failure)
        streamed = detector.stream(
            readable, batch_size=batch_size, keep_pixels="images" in chosen, **tiles
        )
        for done, one in enumerate(streamed, start=1):
            write(one)
            if isinstance(one, Failure):
                failures.append(one)
            else:
                searched += 1
                objects.update(detector.classes[label] for label in one.labels.tolist())
                drawn.update(
                    detector.classes[label] for _, score, label in one if score >= drawn_score
                )
            show(done, len(readable))

    if json:
        print_json(
            {
                "out": out,
                "network": detector.network.description,
                "images": searched,
                "objects": dict(objects.most_common()),
                "drawn": dict(drawn.most_common()),
                "failures": [failure.to_dict() for failure in failures],
            }
        )
    else:
        if objects:
            least = detector.thresholds["score_threshold"]
            table(
                "Found",
                ["class", f"score over {least:g}", f"of {drawn_score:g} and more"],
                [(name, count, drawn[name]) for name, count in objects.most_common()],
            )
        many = "" if searched == 1 else "s"
        say(
            f"{objects.total()} boxes in {searched} image{many}, {drawn.total()} of them with a "
            f"score of {drawn_score:g} and more, in {out}"
        )
    if failures:
        note(
            f"{len(failures)} image{'' if len(failures) == 1 else 's'} could not be read:",
            style="red",
        )
        for failure in failures[:_SHOWN_FAILURES]:
            note(f"  {failure.reason}")
        if len(failures) > _SHOWN_FAILURES:
            note(f"  and {len(failures) - _SHOWN_FAILURES} more")
        raise typer.Exit(1)


def _refuse_others(kind: str, given: Mapping[str, object]) -> None:
    """Raise a ConfigError for an option that would be ignored."""
    from retinanet.errors import ConfigError

    for option, purpose in _OTHERS[kind].items():
        if given[option] is not None:
            raise ConfigError(f"{option} is for {purpose}: leave it out")
    if given["--overlap"] is not None and given["--tile"] is None:
        raise ConfigError("--overlap is for tiles: give --tile too, or leave it out")
