"""``retinanet evaluate``: COCO metrics of a model or a results file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retinanet.cli.console import figure, note, print_json, progress, say, table
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


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|RESULTS",
        help="A run folder, a checkpoint, an exported file, torchvision/NAME, hf://OWNER/NAME, "
        "or a COCO results file.",
    ),
]
Data = Annotated[
    Path, typer.Argument(help="A labelled folder or file, in any format that data check reads.")
]
Split = Annotated[
    str | None,
    typer.Option(
        help="Split of the data: train, val, test, all, or another one.",
        show_default="val, or that of a label file",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Folder for metrics.json, results.json and plots.",
        show_default="the run folder's evaluation/SPLIT",
    ),
]
MaxDetections = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Detections per class and image that count; the model gives as many.",
        show_default="COCO's 100, or the most objects in an image",
    ),
]
ImageSize = Annotated[
    int | None, typer.Option(help="Shorter side in pixels.", show_default="the model's")
]
Calibrate = Annotated[
    str | None, typer.Option(help="Calibration images for int8; not those evaluated.")
]
Tile = Annotated[
    str | None,
    typer.Option(help="Detect also in tiles of this many pixels, or auto: for huge images."),
]
Overlap = Annotated[
    float, typer.Option(help="Overlap of adjacent tiles, share of the side in [0, 1).")
]


def evaluate(
    model: Model,
    data: Data,
    *,
    split: Split = None,
    out: Out = None,
    max_detections: MaxDetections = None,
    image_size: ImageSize = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 4,
    device: Device = "auto",
    precision: Precision = "auto",
    backend: Backend = "auto",
    calibrate: Calibrate = None,
    tile: Tile = None,
    overlap: Overlap = 0.2,
    json: Annotated[bool, typer.Option("--json", help="Print the metrics as JSON.")] = False,
) -> None:
    """Evaluate a model or a COCO results file on labelled images."""
    from retinanet.evaluation.run import evaluate as evaluate_model_or_results

    folder = out or _default_folder(Path(model), split or "val")
    with progress("evaluating") as show:
        metrics = evaluate_model_or_results(
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
    if metrics.unreadable:
        note(f"warning: {len(metrics.unreadable)} unreadable images were left out:")
        for message in metrics.unreadable.values():
            note(f"  {message}")
    if json:
        print_json(metrics.to_dict())
        return
    show_metrics(metrics)
    if folder is not None:
        say(f"wrote metrics.json, results.json and plots/ to {folder}")


def show_metrics(metrics: Metrics) -> None:
    """Print the twelve numbers, the classes, the kinds of error, and what a limit cut."""
    table(
        f"{metrics.images} images, {metrics.objects} objects",
        ["", "metric", "value"],
        [
            (
                name,
                _MEANING.get(name, f"recall with {name[2:]} detections per class and image"),
                value,
            )
            for name, value in metrics.summary().items()
        ],
        left=2,
    )
    classes = [row for row in metrics.per_class if row.objects]
    table(
        "By class",
        ["class", "objects", "AP", "AP50", "AP75", "AR"],
        [
            (row.name, row.objects, row.ap, row.ap50, row.ap75, row.ar)
            for row in classes[:_SHOWN_CLASSES]
        ],
    )
    if len(classes) > _SHOWN_CLASSES:
        say(f"{len(classes) - _SHOWN_CLASSES} more classes are in metrics.json")
    counts = metrics.errors.counts
    table(
        "Errors and the AP50 gained by fixing them",
        ["kind", "count", "AP50"],
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
    """Return the run folder's evaluation/SPLIT; None for other models and for results."""
    for folder in (model, model.parent, model.parent.parent):
        if (folder / "config.toml").is_file() and model.exists():
            return folder / "evaluation" / split
    return None
