"""``retinanet demo``: train with two losses on synthetic images and compare them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retinanet.cli.console import note, print_json, progress, say, seconds, table
from retinanet.cli.settings import DeviceOptions, Json, option
from retinanet.cli.training import run_training, write_report

if TYPE_CHECKING:
    from PIL import Image

    from retinanet.data import Dataset
    from retinanet.evaluation import Metrics

IMAGES = {"train": 320, "val": 40, "test": 120}
"""Number of synthetic images per split."""

SHAPES: Mapping[str, Any] = {
    "image_size": 128,
    "objects": (2, 6),
    "object_size": (14.0, 40.0),
    "clutter": 0.3,
}
"""Their appearance: easy enough for two minutes of training."""

LOSSES: Mapping[str, tuple[str, ...]] = {
    "focal loss": (),
    "cross entropy": ("loss.classification=cross_entropy", "loss.alpha=none"),
}
"""Settings over the recipe ``demo`` by loss; all others are the same."""

_MAX_DRAWN = 12  # images
_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm")


@dataclass(frozen=True)
class DemoOptions(DeviceOptions):
    """The demo."""

    out: Path = option("Output folder.", Path("demo"))
    seed: int = option("Random seed of the images and both trainings.", 0)


def demo(options: DemoOptions, *, json: Json = False) -> None:
    """Train with the focal loss and with cross entropy on synthetic images, and compare.

    Needs neither data nor the internet, and under five minutes on two processor cores.
    """
    start = time.monotonic()
    out = options.out
    results = run_demo(out, IMAGES, (), seed=options.seed, device=options.device)
    duration = time.monotonic() - start
    if json:
        keys = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "best_f1", "best_score")
        losses = {r.loss: {key: getattr(r.metrics, key) for key in keys} for r in results}
        paths = {"images": out / "images", "report": out / "report.html", "model": results[0].model}
        print_json({"losses": losses, **paths, "seconds": round(duration, 1)})
        return
    table(
        f"The same network and number of steps, {IMAGES['test']} test images",
        ["loss", *_COLUMNS],
        [(r.loss, *(r.metrics.summary()[name] for name in _COLUMNS)) for r in results],
    )
    say(f"images    {out / 'images'}")
    say(f"report    {out / 'report.html'}")
    say(f"model     {results[0].model}")
    note(f"total time {seconds(duration)}")


@dataclass(frozen=True)
class LossResult:
    """Training and evaluation with a loss."""

    loss: str
    folder: Path
    model: Path
    metrics: Metrics


def run_demo(
    out: Path,
    images: Mapping[str, int],
    settings: tuple[str, ...],
    *,
    seed: int,
    device: str = "auto",
) -> list[LossResult]:
    """Make the data, train and evaluate with each of :data:`LOSSES`, and write the report.

    Args:
        out: output folder; what an earlier call finished there is reused.
        images: number of images per split.
        settings: settings over the recipe ``demo``.
        seed: random seed of the images and both trainings.
        device: device to train on.
    """
    from retinanet.config import load_recipe
    from retinanet.data.synthetic import synthetic_dataset
    from retinanet.evaluation.run import evaluate

    note(f"making {sum(images.values())} images in {out / 'data'}")
    splits = synthetic_dataset(out / "data", splits=images, seed=seed, **SHAPES)
    results = []
    for name, changes in LOSSES.items():
        recipe = load_recipe("demo", (f"train.seed={seed}", *changes, *settings))
        folder = out / name.replace(" ", "_")
        run = run_training(recipe, out / "data", folder, device=device, title=name)
        test = folder / "evaluation" / "test"
        with progress(f"evaluating {name}") as update:
            metrics = evaluate(run.model, splits["test"], out=test, device=device, progress=update)
        write_report(run)
        results.append(LossResult(name, folder, run.model, metrics))
    drawn = _draw(results, splits["test"], out / "images", device)
    _write_comparison(results, drawn, out / "report.html")
    return results


def _draw(
    results: list[LossResult], dataset: Dataset, folder: Path, device: str
) -> list[tuple[Image.Image, str]]:
    """Draw ground truth and each model's detections on some test images, and save the files.

    Returns:
        images with captions, row by row: the ground truth, then each model.
    """
    from retinanet.inference import load
    from retinanet.report.html import draw_truth

    images = [image for image in dataset.images if image.annotations][:_MAX_DRAWN]
    paths = [image.path for image in images]
    # With the threshold of the best F1 on the test images.
    thresholds = [max(0.05, result.metrics.best_score) for result in results]
    detections: list[Any] = [
        load(result.model, device, score_threshold=threshold).detect(paths)
        for result, threshold in zip(results, thresholds, strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    drawn: list[tuple[Image.Image, str]] = []
    for i, image in enumerate(images):
        drawings = {"labels": (draw_truth(image, dataset), f"{image.path.name}: ground truth")}
        for result, threshold, of_model in zip(results, thresholds, detections, strict=True):
            caption = f"{result.loss}, scores of at least {threshold:.2f}"
            drawing = of_model[i].draw(score_threshold=threshold)
            drawings[result.folder.name] = (drawing, caption)
        for name, (drawing, _) in drawings.items():
            drawing.save(folder / f"{image.path.stem}_{name}.png")
        drawn += drawings.values()
    return drawn


def _write_comparison(
    results: list[LossResult], drawn: list[tuple[Image.Image, str]], file: Path
) -> None:
    """Write the page: the table, the images, and each evaluation."""
    from retinanet.report.html import Page, add_metrics

    page = Page(
        "Focal loss and cross entropy",
        "The same network, images, order and number of steps; only the loss differs.",
    )
    page.section("Result")
    page.text(
        f"AP on {results[0].metrics.images} test images that were used neither for training nor "
        "for choosing the checkpoint. Each image has about a thousand background anchors per "
        "foreground anchor, the imbalance that the focal loss addresses."
    )
    rows = [
        [r.loss, *(r.metrics.summary()[name] for name in _COLUMNS), r.metrics.best_f1]
        for r in results
    ]
    page.table(["loss", *_COLUMNS, "best F1"], rows)
    page.section("Detections")
    page.images(drawn, columns=1 + len(results))
    for result in results:
        page.section(result.loss.capitalize())
        address = f"{result.folder.name}/report.html"
        page.links({"Training": {address: address}})
        add_metrics(page, result.metrics, result.folder / "evaluation" / "test" / "plots")
    page.write(file)
