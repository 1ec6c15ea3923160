"""``retinanet detect``: pictures in, boxes out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from retinanet.cli.console import note, print_json, progress, say, table

_SHOWN_FAILURES = 20


def detect(
    model: Annotated[str, typer.Argument(help="A run folder, a checkpoint, or torchvision/NAME.")],
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="Pictures, folders or globs.")
    ],
    *,
    out: Annotated[Path, typer.Option(help="Where the files go.")] = Path("found"),
    formats: Annotated[
        str,
        typer.Option("--format", help="Of json, pictures, coco, csv, yolo; commas between."),
    ] = "json,pictures",
    score_threshold: Annotated[
        float | None,
        typer.Option(help="Boxes under it are dropped.", show_default="the model's, .05"),
    ] = None,
    draw_threshold: Annotated[
        float | None, typer.Option(help="Boxes under it are not drawn.", show_default=".3")
    ] = None,
    nms_threshold: Annotated[
        float | None,
        typer.Option(
            help="Of two boxes with more IoU the weaker goes.", show_default="the model's, .5"
        ),
    ] = None,
    class_agnostic: Annotated[
        bool, typer.Option("--class-agnostic", help="One box a place, whatever the class.")
    ] = False,
    detections_per_image: Annotated[
        int | None, typer.Option(help="Boxes a picture.", show_default="the model's, 100")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(
            help="Shorter side in pixels; larger finds smaller.", show_default="the model's"
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, float32, bf16, fp16 or int8.")] = "auto",
    backend: Annotated[str, typer.Option(help="auto, torch, compile or openvino.")] = "auto",
    calibrate: Annotated[
        str | None,
        typer.Option(
            help="Pictures on which int8 is calibrated.", show_default="those to be searched"
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a summary as JSON.")] = False,
) -> None:
    """Find objects in pictures.

    A picture that cannot be read stops nothing: it is named at the end, and the exit code is 1.
    """
    from retinanet.detect import load
    from retinanet.detect.found import DRAWN_SCORE, Failure
    from retinanet.detect.outputs import open_outputs
    from retinanet.detect.sources import Source, iter_sources

    listed = list(iter_sources(sources, once=True))
    readable = [one for one in listed if isinstance(one, Source)]
    failures = [one for one in listed if isinstance(one, Failure)]
    if not readable:
        raise failures[0].error
    thresholds: dict[str, Any] = {
        "score_threshold": score_threshold,
        "nms_threshold": nms_threshold,
        "detections_per_image": detections_per_image,
        "class_agnostic_nms": class_agnostic or None,  # None: as the model's recipe says
    }
    calibration: Any = calibrate
    if precision == "int8" and calibrate is None:
        calibration = [one.picture for one in readable]
    detector = load(
        model,
        device,
        precision=precision,
        backend=backend,
        calibrate=calibration,
        image_size=image_size,
        **{name: value for name, value in thresholds.items() if value is not None},
    )
    objects: Counter[str] = Counter()
    searched = 0
    with (
        open_outputs(
            out,
            [name.strip() for name in formats.split(",") if name.strip()],
            drawn_score=DRAWN_SCORE if draw_threshold is None else draw_threshold,
        ) as write,
        progress("detecting") as show,
    ):
        if not json:
            note(detector.network.description)
        for failure in failures:
            write(failure)
        for done, one in enumerate(detector.stream(readable, batch_size=batch_size), start=1):
            write(one)
            if isinstance(one, Failure):
                failures.append(one)
            else:
                searched += 1
                objects.update(detector.classes[label] for label in one.labels.tolist())
            show(done, len(readable))

    if json:
        print_json(
            {
                "out": out,
                "network": detector.network.description,
                "pictures": searched,
                "objects": dict(objects.most_common()),
                "failures": [failure.to_dict() for failure in failures],
            }
        )
    else:
        if objects:
            table("Found", ["class", "objects"], objects.most_common())
        many = "" if searched == 1 else "s"
        say(f"{objects.total()} objects in {searched} picture{many}, in {out}")
    if failures:
        note(
            f"{len(failures)} picture{'' if len(failures) == 1 else 's'} could not be read:",
            style="red",
        )
        for failure in failures[:_SHOWN_FAILURES]:
            note(f"  {failure.reason}")
        if len(failures) > _SHOWN_FAILURES:
            note(f"  and {len(failures) - _SHOWN_FAILURES} more")
        raise typer.Exit(1)
