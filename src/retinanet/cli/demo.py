"""``retinanet demo``: the main job, with two losses, on images that it makes itself."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retinanet.cli.console import note, print_json, progress, say, seconds, table
from retinanet.cli.training import run_training, write_report

if TYPE_CHECKING:
    from PIL import Image

    from retinanet.data import Dataset
    from retinanet.evaluation import Metrics

IMAGES = {"train": 320, "val": 40, "test": 120}
"""How many images are made, by split."""

SHAPES: Mapping[str, Any] = {
    "image_size": 128,
    "objects": (2, 6),
    "object_size": (14.0, 40.0),
    "clutter": 0.3,
}
"""What they look like: easy enough that two minutes of training are."""

LOSSES: Mapping[str, tuple[str, ...]] = {
    "focal loss": (),
    "cross entropy": ("loss.classification=cross_entropy", "loss.alpha=none"),
}
"""What is compared, as settings over the recipe ``demo``; everything else is the same."""

_DRAWN = 12  # images


def demo(
    *,
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Of the images and of both trainings.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train with the focal loss and with cross entropy on made-up images, and compare.

    Needs neither data nor the internet, and under four minutes on two processor cores.
    """
    began = time.monotonic()
    result = run_demo(out, IMAGES, (), seed=seed, device=device)
    took = time.monotonic() - began
    if json:
        print_json(result | {"seconds": round(took, 1)})
        return
    table(
        f"The same network on the same budget, {IMAGES['test']} held-out images",
        ["loss", "AP", "AP50", "AP75", "AP of small objects"],
        [
            (name, *(one[key] for key in ("ap", "ap50", "ap75", "ap_small")))
            for name, one in result["losses"].items()
        ],
    )
    say(f"images  {result['images']}")
    say(f"report    {result['report']}")
    say(f"model     {result['model']}")
    note(f"all of it took {seconds(took)}")


def run_demo(
    out: Path,
    images: Mapping[str, int],
    settings: tuple[str, ...],
    *,
    seed: int,
    device: str = "auto",
) -> dict[str, Any]:
    """Make the data, train and judge with each of :data:`LOSSES`, and write all that shows it.

    Args:
        out: the folder; what an earlier call finished there is not done again.
        images: how many to make, by split.
        settings: laid over the recipe ``demo``.
        seed: of the images and of both trainings.
        device: where to train.

    Returns:
        figures by loss, and where things lie.
    """
    from retinanet.config import load_recipe
    from retinanet.data.synthetic import synthetic_dataset
    from retinanet.evaluation.run import evaluate

    note(f"making {sum(images.values())} images in {out / 'data'}")
    splits = synthetic_dataset(out / "data", splits=images, seed=seed, **SHAPES)
    judged: list[_Judged] = []
    for name, changes in LOSSES.items():
        recipe = load_recipe("demo", (f"train.seed={seed}", *changes, *settings))
        folder = out / name.replace(" ", "_")
        run = run_training(recipe, out / "data", folder, device=device, title=name)
        with progress(f"judging {name}") as show:
            metrics = evaluate(
                run.model,
                splits["test"],
                out=folder / "evaluation" / "test",
                device=device,
                progress=show,
            )
        write_report(run)
        judged.append(_Judged(name, folder, run.model, metrics))
    drawn = _draw(judged, splits["test"], out / "images", device)
    report = _write_comparison(judged, drawn, out)
    return {
        "losses": {one.name: _figures(one.metrics) for one in judged},
        "images": out / "images",
        "report": report,
        "model": judged[0].model,
    }


@dataclass(frozen=True, slots=True)
class _Judged:
    """One loss and what came of it."""

    name: str
    folder: Path
    model: Path
    metrics: Metrics


def _figures(metrics: Metrics) -> dict[str, float]:
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "best_f1", "best_score")
    return {name: getattr(metrics, name) for name in names}


def _draw(
    judged: list[_Judged], dataset: Dataset, folder: Path, device: str
) -> list[tuple[Image.Image, str]]:
    """The labels of some held-out images and what each model found in them, side by side.

    Returns:
        the images with their captions, a row of the labels and each model after another.
    """
    import torch

    from retinanet.data.drawing import draw_boxes
    from retinanet.data.images import read_image
    from retinanet.inference import ImageDetections, load

    images = [one for one in dataset.images if one.annotations][:_DRAWN]
    paths = [one.path for one in images]
    found = [list(load(one.model, device).stream(paths)) for one in judged]
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[Image.Image, str]] = []
    for place, image in enumerate(images):
        truth = draw_boxes(
            read_image(image.path),
            torch.tensor([one.box for one in image.annotations], dtype=torch.float32),
            torch.tensor([one.label for one in image.annotations]),
            names=dataset.classes,
        )
        rows.append((truth, f"{image.path.name}: labels"))
        for one, imgs in zip(judged, found, strict=True):
            of_image = imgs[place]
            if isinstance(of_image, ImageDetections):
                # The score from which this model is at its best, as its own evaluation found it.
                threshold = max(0.05, one.metrics.best_score)
                drawn = of_image.draw(score_threshold=threshold)
                drawn.save(folder / f"{image.path.stem}_{one.folder.name}.png")
                rows.append((drawn, f"{one.name}, scores over {threshold:.2f}"))
        truth.save(folder / f"{image.path.stem}_labels.png")
    return rows


def _write_comparison(
    judged: list[_Judged], drawn: list[tuple[Image.Image, str]], out: Path
) -> Path:
    """``report.html``: the table, the images, and each evaluation in full."""
    from retinanet.report.html import Page, add_metrics

    page = Page(
        "Focal loss and cross entropy",
        "The same network, images, order and number of steps; only the loss differs.",
    )
    page.section("Result")
    page.text(
        f"AP on {judged[0].metrics.images} images that neither training nor the choice of the "
        "checkpoint has seen. In each image about a thousand anchors see background for one that "
        "sees an object: the imbalance that the focal loss is made for."
    )
    columns = ["AP", "AP50", "AP75", "APs", "APm"]
    page.table(
        ["loss", *columns, "best F1"],
        [
            [
                one.name,
                *(one.metrics.summary()[name] for name in columns),
                one.metrics.best_f1,
            ]
            for one in judged
        ],
    )
    page.section("Detections")
    page.images(drawn, columns=1 + len(judged))
    for one in judged:
        page.section(one.name.capitalize())
        page.text(f"Its training: {one.folder.name}/report.html")
        add_metrics(page, one.metrics, one.folder / "evaluation" / "test" / "plots")
    return page.write(out / "report.html")
