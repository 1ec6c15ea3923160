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


@dataclass(frozen=True)
class DemoOptions(DeviceOptions):
    """The demo."""

    out: Path = option("Output folder.", Path("demo"))
    seed: int = option("Random seed of the images and both trainings.", 0)


def demo(options: DemoOptions, *, json: Json = False) -> None:
    """Train with the focal loss and with cross entropy on synthetic images, and compare.

    Needs neither data nor the internet, and under four minutes on two processor cores.
    """
    start = time.monotonic()
    result = run_demo(options.out, IMAGES, (), seed=options.seed, device=options.device)
    duration = time.monotonic() - start
    if json:
        print_json(result | {"seconds": round(duration, 1)})
        return
    table(
        f"The same network and number of steps, {IMAGES['test']} test images",
        ["loss", "AP", "AP50", "AP75", "AP of small objects"],
        [
            (name, *(metrics[key] for key in ("ap", "ap50", "ap75", "ap_small")))
            for name, metrics in result["losses"].items()
        ],
    )
    say(f"images  {result['images']}")
    say(f"report    {result['report']}")
    say(f"model     {result['model']}")
    note(f"total time {seconds(duration)}")


def run_demo(
    out: Path,
    images: Mapping[str, int],
    settings: tuple[str, ...],
    *,
    seed: int,
    device: str = "auto",
) -> dict[str, Any]:
    """Make the data, train and evaluate with each of :data:`LOSSES`, and write the report.

    Args:
        out: output folder; what an earlier call finished there is reused.
        images: number of images per split.
        settings: settings over the recipe ``demo``.
        seed: random seed of the images and both trainings.
        device: device to train on.

    Returns:
        metrics by loss, and paths of the results.
    """
    from retinanet.config import load_recipe
    from retinanet.data.synthetic import synthetic_dataset
    from retinanet.evaluation.run import evaluate

    note(f"making {sum(images.values())} images in {out / 'data'}")
    splits = synthetic_dataset(out / "data", splits=images, seed=seed, **SHAPES)
    results: list[_Result] = []
    for name, changes in LOSSES.items():
        recipe = load_recipe("demo", (f"train.seed={seed}", *changes, *settings))
        folder = out / name.replace(" ", "_")
        run = run_training(recipe, out / "data", folder, device=device, title=name)
        with progress(f"evaluating {name}") as show:
            metrics = evaluate(
                run.model,
                splits["test"],
                out=folder / "evaluation" / "test",
                device=device,
                progress=show,
            )
        write_report(run)
        results.append(_Result(name, folder, run.model, metrics))
    drawn = _draw(results, splits["test"], out / "images", device)
    report = _write_comparison(results, drawn, out)
    keys = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "best_f1", "best_score")
    return {
        "losses": {
            result.name: {key: getattr(result.metrics, key) for key in keys} for result in results
        },
        "images": out / "images",
        "report": report,
        "model": results[0].model,
    }


@dataclass(frozen=True, slots=True)
class _Result:
    """Training and evaluation with one loss."""

    name: str
    folder: Path
    model: Path
    metrics: Metrics


def _draw(
    results: list[_Result], dataset: Dataset, folder: Path, device: str
) -> list[tuple[Image.Image, str]]:
    """Draw ground truth and each model's detections on some test images, and save the files.

    Returns:
        images with captions, row by row: the ground truth, then each model.
    """
    from retinanet.inference import ImageDetections, load
    from retinanet.report.html import draw_truth

    images = [image for image in dataset.images if image.annotations][:_MAX_DRAWN]
    paths = [image.path for image in images]
    detections = [list(load(result.model, device).stream(paths)) for result in results]
    folder.mkdir(parents=True, exist_ok=True)
    drawn: list[tuple[Image.Image, str]] = []
    for i, image in enumerate(images):
        truth = draw_truth(image, dataset)
        truth.save(folder / f"{image.path.stem}_labels.png")
        drawn.append((truth, f"{image.path.name}: ground truth"))
        for result, of_model in zip(results, detections, strict=True):
            of_image = of_model[i]
            if isinstance(of_image, ImageDetections):
                # The threshold with the best F1 on the test images.
                threshold = max(0.05, result.metrics.best_score)
                boxes = of_image.draw(score_threshold=threshold)
                boxes.save(folder / f"{image.path.stem}_{result.folder.name}.png")
                drawn.append((boxes, f"{result.name}, scores of at least {threshold:.2f}"))
    return drawn


def _write_comparison(
    results: list[_Result], drawn: list[tuple[Image.Image, str]], out: Path
) -> Path:
    """Write ``report.html``: the table, the images, and each evaluation."""
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
    columns = ["AP", "AP50", "AP75", "APs", "APm"]
    rows = []
    for result in results:
        summary = result.metrics.summary()
        rows.append([result.name, *(summary[name] for name in columns), result.metrics.best_f1])
    page.table(["loss", *columns, "best F1"], rows)
    page.section("Detections")
    page.images(drawn, columns=1 + len(results))
    for result in results:
        page.section(result.name.capitalize())
        address = f"{result.folder.name}/report.html"
        page.link("Training", address, address)
        add_metrics(page, result.metrics, result.folder / "evaluation" / "test" / "plots")
    return page.write(out / "report.html")
