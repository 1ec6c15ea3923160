"""``retinanet demo``: train with two losses on synthetic images and compare them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retinanet.cli.console import note, print_json, progress, say, seconds, table
from retinanet.cli.settings import DeviceOptions, Json, option
from retinanet.cli.training import describe_metrics, write_report
from retinanet.errors import RetinaNetError

if TYPE_CHECKING:
    from PIL import Image

    from retinanet.data import Dataset
    from retinanet.evaluation import Metrics
    from retinanet.paper.plan import Training
    from retinanet.paper.results import Result

IMAGES = {"train": 320, "val": 160}
"""Number of synthetic images per split."""

SHAPES: Mapping[str, Any] = {
    "image_size": 192,
    "objects": (1, 3),
    "object_size": (8.0, 24.0),
    "clutter": 0.6,
}
"""Their appearance: few small objects in much clutter, the imbalance of the paper."""

LOSSES: Mapping[str, tuple[str, ...]] = {
    "focal loss": (),
    "cross entropy": ("loss.classification=cross_entropy", "loss.alpha=0.75"),  # Table 1a: the best
}
"""Settings over the recipe ``demo`` by loss; all others are the same."""

_MAX_DRAWN = 12  # images
_COLUMNS = ("loss", "AP", "AP50", "AP75", "best F1")


@dataclass(frozen=True)
class DemoOptions(DeviceOptions):
    """The demo."""

    out: Path = option("Output folder.", Path("demo"))
    seed: int = option("Random seed of the images and both trainings.", 0)


def demo(options: DemoOptions, *, json: Json = False) -> None:
    """Train with the focal loss and with cross entropy on synthetic images, and compare.

    Needs neither data nor the internet, and under three minutes on two processor cores.
    """
    start = time.monotonic()
    out = options.out
    results = run_demo(out, IMAGES, (), seed=options.seed, device=options.device)
    duration = time.monotonic() - start
    if json:
        keys = ("ap", "ap50", "ap75", "best_f1", "best_score")
        losses = {r.loss: {key: getattr(r.metrics, key) for key in keys} for r in results}
        paths = {"images": out / "images", "report": out / "report.html", "model": results[0].model}
        print_json({"losses": losses, **paths, "seconds": round(duration, 1)})
        return
    table(
        f"The same network and number of steps, {IMAGES['val']} validation images",
        _COLUMNS,
        [result.row for result in results],
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
    metrics: Metrics

    @property
    def model(self) -> Path:
        """The checkpoint."""
        return self.folder / "best"

    @property
    def row(self) -> list[object]:
        """Its row of the table."""
        metrics = self.metrics
        return [self.loss, metrics.ap, metrics.ap50, metrics.ap75, metrics.best_f1]


def run_demo(
    out: Path,
    images: Mapping[str, int],
    settings: tuple[str, ...],
    *,
    seed: int,
    device: str = "auto",
) -> list[LossResult]:
    """Make the data, train and evaluate with each of :data:`LOSSES`, and write the report.

    The trainings run in a process each, at the same time where there are several processors.

    Args:
        out: output folder; what an earlier call finished there is reused.
        images: number of images per split.
        settings: over the recipe ``demo``.
        seed: of the images and both trainings.
        device: to train on.

    Raises:
        RetinaNetError: a training failed; the other has saved its state.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once both have saved their state.
    """
    from retinanet.config import load_recipe
    from retinanet.data import digest
    from retinanet.data.cpus import usable_cpus
    from retinanet.data.synthetic import synthetic_dataset
    from retinanet.evaluation import Metrics
    from retinanet.paper.plan import Plan, Training, training_name
    from retinanet.paper.run import Workers, run_plan

    note(f"making {sum(images.values())} images in {out / 'data'}")
    splits = synthetic_dataset(out / "data", splits=images, seed=seed, **SHAPES)
    data_digest = digest(splits["train"]) + digest(splits["val"])
    trainings = {}
    for loss, changes in LOSSES.items():
        recipe = load_recipe("demo", (f"train.seed={seed}", *changes, *settings))
        trainings[loss] = Training(training_name(recipe, "", data_digest), recipe, "", seed)
    jobs = min(len(trainings), usable_cpus())
    workers = Workers.default(out / "data", out, jobs=jobs, device=device)
    losses = {training.key: loss for loss, training in trainings.items()}

    def note_end(training: Training, result: Result, was_finished: bool) -> None:
        if result.metrics is None:
            why = result.note or f"its loss became NaN or Inf after {result.steps} steps"
            raise RetinaNetError(f"training with {losses[training.key]} failed: {why}")
        before = ", finished before" if was_finished else ""
        note(f"{losses[training.key]}: {describe_metrics(result.metrics)}{before}")

    steps = recipe.train.steps
    note(f"training with {' and '.join(LOSSES)}: {steps} steps each, {jobs} at a time")
    plan = Plan(tuple(trainings.values()), {})
    with progress("steps of both") as show:
        ended = run_plan(plan, workers, note_end, show)
    results = [
        LossResult(loss, training.folder(out), Metrics.from_dict(ended[training.key].metrics or {}))
        for loss, training in trainings.items()
    ]
    for result in results:
        write_report(result.folder)
    drawn = _draw(results, splits["val"], out / "images", device)
    _write_comparison(results, drawn, out / "report.html")
    return results


def _draw(
    results: list[LossResult], dataset: Dataset, folder: Path, device: str
) -> list[tuple[Image.Image, str]]:
    """Draw ground truth, then each model's detections, on some images, and save the files.

    Returns the drawings with captions, row by row.
    """
    from retinanet.inference import load
    from retinanet.report.html import draw_truth

    images = [image for image in dataset.images if image.annotations][:_MAX_DRAWN]
    paths = [image.path for image in images]
    # With the threshold of the best F1 on all images.
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
            drawings[result.loss.replace(" ", "_")] = (drawing, caption)
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
        f"On {results[0].metrics.images} validation images, after the last step. Cross entropy has "
        "the initial scores of Sec. 3.3 and the alpha that is best for it in Table 1a."
    )
    page.table(_COLUMNS, [result.row for result in results])
    addresses = {r.loss: (r.folder / "report.html").relative_to(file.parent) for r in results}
    page.links({"Training": {loss: path.as_posix() for loss, path in addresses.items()}})
    page.section("Detections")
    page.images(drawn, columns=1 + len(results))
    for result in results:
        page.section(result.loss.capitalize())
        add_metrics(page, result.metrics, result.folder / "plots" / "validation")
    page.write(file)
