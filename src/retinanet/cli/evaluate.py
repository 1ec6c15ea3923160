"""``retinanet evaluate``: COCO metrics of a model or a results file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retinanet.cli.console import figure, note, print_json, progress, say, table
from retinanet.cli.settings import (
    ClassOptions,
    DetectorOptions,
    Json,
    LabelledData,
    SplitOptions,
    SuppressionOptions,
    TileOptions,
    option,
    run_folder,
)

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


@dataclass(frozen=True)
class EvaluationOptions(SplitOptions):
    """The evaluation."""

    out: Path | None = option(
        "Folder for metrics.json, results.json and plots.",
        shown="the run folder's evaluation/SPLIT",
    )
    max_detections: int | None = option(
        "Detections per class and image that count; the model gives as many.",
        shown="COCO's 100, or the most objects in an image",
        min=1,
    )
    batch_size: int = option("Images per batch.", 4, min=1)
    tune: bool = option(
        "Before: choose NMS, temperature and score thresholds on the data, for the model's "
        "checkpoint; give the validation split.",
        False,
    )


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|RESULTS",
            help="A run folder, a checkpoint, an exported file, coco, torchvision/NAME, "
            "hf://OWNER/NAME, or a COCO results file.",
        ),
    ],
    data: LabelledData,
    *,
    evaluation: EvaluationOptions,
    detector: DetectorOptions,
    selection: ClassOptions,
    suppression: SuppressionOptions,
    tiles: TileOptions,
    json: Json = False,
) -> None:
    """Evaluate a model or a COCO results file on labelled images."""
    from retinanet.evaluation.run import evaluate as evaluate_model_or_results

    folder = evaluation.out
    if folder is None and (run := run_folder(model)) is not None:
        folder = run / "evaluation" / (evaluation.split or "val")
    options = {**vars(evaluation), "out": folder, **vars(detector)}
    if options.pop("tune"):
        given = {**selection.given(), **suppression.given()}
        _tune(model, data, evaluation, detector, tiles, given)
    options |= {**selection.given(), **suppression.given(), **tiles.given()}
    with progress("evaluating") as update:
        metrics = evaluate_model_or_results(model, data, progress=update, **options)
    if folder is not None:
        from retinanet.report.plots import plot_evaluation

        plot_evaluation(metrics, folder / "plots")
    for line in metrics.notes:
        note(line)
    if json:
        print_json(metrics.to_dict())
    else:
        _show_metrics(metrics)
        if folder is not None:
            say(f"wrote metrics.json, results.json and plots/ to {folder}")
    if metrics.unreadable:
        note(f"warning: {len(metrics.unreadable)} unreadable images were left out:")
        for message in metrics.unreadable.values():
            note(f"  {message}")


def _tune(
    model: str,
    data: Path,
    evaluation: EvaluationOptions,
    detector: DetectorOptions,
    tiles: TileOptions,
    other: dict[str, Any],
) -> None:
    """Choose post-processing settings and write them into the checkpoint."""
    from retinanet.errors import ConfigError
    from retinanet.evaluation.tuning import store_tuning, tune

    if other or evaluation.max_detections or not Path(model).exists() or model.endswith(".json"):
        raise ConfigError(
            "--tune is for a run or checkpoint folder with its own settings, not for a name, a "
            "results file, --classes, --max-detections or options of NMS: leave them out"
        )
    options = {**vars(detector), "split": evaluation.split, "batch_size": evaluation.batch_size}
    options |= tiles.given()
    with progress("tuning") as update:
        tuning = tune(model, data, progress=update, **options)
    folder = store_tuning(model, tuning)
    for name, ap in tuning.ap.items():
        note(f"NMS {name}: AP {ap:.4f}")
    note(f"in {folder}: {tuning.describe()}")


def _show_metrics(metrics: Metrics) -> None:
    """Print the twelve numbers, the classes, the kinds of error, and what a limit cut."""
    recall = "recall with {} detections per class and image"
    table(
        f"{metrics.images} images, {metrics.objects} objects",
        ["", "metric", "value"],
        [
            (name, _MEANING.get(name, recall.format(name[2:])), value)
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
    errors = metrics.errors
    table(
        "Errors and the AP50 gained by fixing them",
        ["kind", "count", "AP50"],
        [
            (kind.replace("_", " "), errors.counts.get(kind), gain)
            for kind, gain in errors.delta_ap.items()
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
