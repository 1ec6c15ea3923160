"""``retinanet evaluate``: COCO's numbers of a model or of a results file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retinanet.cli.console import figure, print_json, progress, say, table
from retinanet.cli.settings import Backend, Device, Precision, tile_of

if TYPE_CHECKING:
    from retinanet.evaluation import Metrics

_SHOWN_CLASSES = 30

_MEANING = {
    "AP": "mean over IoU .50:.95 and classes",
    "AP50": "at IoU .50",
    "AP75": "at IoU .75",
    "APs": "objects under 32² square pixels",
    "APm": "from 32² to 96²",
    "APl": "over 96²",
    "ARs": "recall, small objects",
    "ARm": "recall, medium objects",
    "ARl": "recall, large objects",
}


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|RESULTS",
            help="A run folder, a checkpoint, an exported file, torchvision/NAME, hf://OWNER/NAME, "
            "or a COCO results file.",
        ),
    ],
    data: Annotated[
        Path, typer.Argument(help="A labelled folder or file, in any format that data check reads.")
    ],
    *,
    split: Annotated[
        str | None,
        typer.Option(
            help="train, val, test, all, or another that the data has.",
            show_default="val, or what a label file holds",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where metrics.json, results.json and plots go.",
            show_default="the run folder's evaluation/SPLIT",
        ),
    ] = None,
    max_detections: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Detections per class and image that count; the model gives as many.",
            show_default="COCO's 100, or the most objects in an image",
        ),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Shorter side in pixels.", show_default="the model's")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 4,
    device: Device = "auto",
    precision: Precision = "auto",
    backend: Backend = "auto",
    calibrate: Annotated[
        str | None, typer.Option(help="Images on which int8 is calibrated; not those judged.")
    ] = None,
    tile: Annotated[
        str | None,
        typer.Option(help="Search also in tiles of so many pixels, or auto: for huge images."),
    ] = None,
    overlap: Annotated[
        float, typer.Option(help="Share of a tile that its neighbour has too.")
    ] = 0.2,
    json: Annotated[bool, typer.Option("--json", help="Print metrics.json's content.")] = False,
) -> None:
    """Judge a model, or anybody's COCO results file, on labelled images."""
    from retinanet.evaluation.run import evaluate as judge

    folder = out or _default_folder(Path(model), split or "val")
    with progress("evaluating") as show:
        metrics = judge(
            model,
            data,
            split=split,
            out=folder,
            max_detections=max_detections,
            image_size=image_size,
            batch_size=batch_size,
            device=device,
            precision=precision,
            backend=backend,
            calibrate=calibrate,
            tile=tile_of(tile),
            overlap=overlap,
            progress=show,
        )
    if folder is not None:
        from retinanet.report.plots import plot_evaluation

        plot_evaluation(metrics, folder / "plots")
    if json:
        print_json(metrics.to_dict())
        return
    show_metrics(metrics)
    if folder is not None:
        say(f"metrics.json, results.json and plots/ are in {folder}")


def show_metrics(metrics: Metrics) -> None:
    """Print the twelve numbers, the classes, the kinds of error, and what a limit cut."""
    table(
        f"{metrics.images} images, {metrics.objects} objects",
        ["", "what", "value"],
        [
            (name, _MEANING.get(name, f"recall with {name[2:]} boxes a class and image"), value)
            for name, value in metrics.summary().items()
        ],
        left=2,
    )
    held = [one for one in metrics.per_class if one.objects]
    table(
        "By class",
        ["class", "objects", "AP", "AP50", "AP75", "AR"],
        [
            (one.name, one.objects, one.ap, one.ap50, one.ap75, one.ar)
            for one in held[:_SHOWN_CLASSES]
        ],
    )
    if len(held) > _SHOWN_CLASSES:
        say(f"and {len(held) - _SHOWN_CLASSES} more classes in metrics.json")
    counts = metrics.errors.counts
    table(
        "Errors: what AP50 would gain without them",
        ["kind", "how many", "AP50"],
        [
            (kind.replace("_", " "), counts.get(kind), gain)
            for kind, gain in metrics.errors.delta_ap.items()
        ],
    )
    say(
        f"best F1 {figure(metrics.best_f1)} at IoU .50 with a score threshold of "
        f"{figure(metrics.best_score)}; "
        f"calibration error {figure(metrics.calibration.expected_error)}"
    )
    if metrics.objects_over_limit:
        say(
            f"{metrics.objects_over_limit} of {metrics.objects} objects cannot be matched: their "
            f"images have more objects than the model or the metrics take; raise --max-detections"
        )
    if metrics.detections_over_limit:
        say(
            f"{metrics.detections_over_limit} of {metrics.detections} detections are not counted: "
            f"beyond {metrics.max_detections} of their class and image"
        )
    if metrics.loss is not None:
        say(
            f"loss {figure(metrics.loss)} (class {figure(metrics.loss_classification)}, "
            f"box {figure(metrics.loss_box)}), {metrics.images_per_second or 0:.1f} images/s"
        )


def _default_folder(model: Path, split: str) -> Path | None:
    """In the run folder that the model is of; None for a model or results from elsewhere."""
    for folder in (model, model.parent, model.parent.parent):
        if (folder / "config.toml").is_file() and model.exists():
            return folder / "evaluation" / split
    return None
