"""Reports as one HTML file: styles and images inside, nothing is fetched from anywhere."""

from __future__ import annotations

import base64
import io
import json
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from retinanet.data import read_splits, usable
from retinanet.data.dataset import Dataset, LabelledImage
from retinanet.data.drawing import draw_boxes
from retinanet.data.images import read_image
from retinanet.data.selection import select
from retinanet.data.statistics import count_objects
from retinanet.errors import DataError, RetinaNetError
from retinanet.evaluation.metrics import AP_METRICS, Metrics
from retinanet.files import write_atomic
from retinanet.inference.detections import ImageDetections
from retinanet.inference.detector import load
from retinanet.report.figure import format_count
from retinanet.report.plots import (
    plot_evaluation,
    plot_object_sizes,
    plot_running,
    plot_training,
    split_log,
)
from retinanet.training.run_folder import read_log
from retinanet.training.time_limit import REPORT_IMAGES

ImageLike = Path | Image.Image
"""An image to embed: a file or a PIL image."""

_PLOT_DPI = 115  # pixels of the page per inch of a plot
_MAX_CLASSES = 12  # longer tables of classes are folded


def _cell(value: object) -> str:
    """Format a value: floats with three decimals, None and NaN as a dash."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


_TEMPLATES = Environment(
    loader=PackageLoader("retinanet.report"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
_TEMPLATES.filters["cell"] = _cell
_BLOCKS: Any = _TEMPLATES.get_template("blocks.html").module


class Page:
    """An HTML page, built from top to bottom.

    Example:
        >>> page = Page("Two losses").section("Result").table(["loss", "AP"], [["focal", 0.5]])
        >>> "<td>0.500</td>" in page.html()
        True
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self._title = title
        self._subtitle = subtitle
        self._sections: list[dict[str, Any]] = []

    def section(self, title: str) -> Self:
        """Start a section."""
        self._sections.append({"title": title, "parts": []})
        return self

    def heading(self, title: str) -> Self:
        """Add a smaller heading to the section."""
        return self.add(_BLOCKS.heading(title))

    def text(self, paragraph: str) -> Self:
        """Add a paragraph of plain text."""
        return self.add(_BLOCKS.text(paragraph))

    def links(self, links: Mapping[str, Mapping[str, str]], *, folded: str = "") -> Self:
        """Add a line of links per title: addresses by their labels."""
        return self.add(_BLOCKS.links(links, folded))

    def facts(self, facts: Mapping[str, object]) -> Self:
        """Add a few values in large type, by name."""
        return self.add(_BLOCKS.facts(facts))

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[object]],
        *,
        left: int = 1,
        strong: Sequence[int] = (),
        folded: str = "",
    ) -> Self:
        """Add a table; floats get three decimals, None and NaN a dash.

        Args:
            columns: headings.
            rows: a cell per column each.
            left: number of first columns that are text; the others are numbers.
            strong: indices of rows to emphasise.
            folded: title under which the table is folded; empty: not folded.
        """
        return self.add(_BLOCKS.table(columns, list(rows), left, strong, folded))

    def images(
        self, images: Iterable[tuple[ImageLike, str]], *, columns: int = 1, folded: str = ""
    ) -> Self:
        """Add images with captions in a grid.

        Raises:
            DataError: an image cannot be read.
        """
        embedded = [{**_embed(image), "caption": caption} for image, caption in images]
        return self.add(_BLOCKS.images(embedded, columns, folded))

    def code(self, text: str, *, folded: str = "") -> Self:
        """Add preformatted text."""
        return self.add(_BLOCKS.code(text, folded))

    def add(self, markup: str) -> Self:
        """Add HTML to the section.

        Raises:
            ValueError: the page has no section yet.
        """
        if not self._sections:
            raise ValueError("a page's content belongs to sections: call section() first")
        self._sections[-1]["parts"].append(markup)
        return self

    def html(self) -> str:
        """Render the page."""
        template = _TEMPLATES.get_template("page.html")
        values = {"title": self._title, "subtitle": self._subtitle, "sections": self._sections}
        return template.render(values) + "\n"

    def write(self, file: str | Path) -> Path:
        """Write the page atomically."""
        return write_atomic(file, self.html())


def _embed(image: ImageLike) -> dict[str, Any]:
    """Source and width of an img: PNG and JPEG files unchanged, anything else as a JPEG."""
    try:
        content = image.read_bytes() if isinstance(image, Path) else b""
        opened = Image.open(io.BytesIO(content)) if isinstance(image, Path) else image
        if not content or opened.format not in ("PNG", "JPEG"):
            encoded = io.BytesIO()
            opened.convert("RGB").save(encoded, "JPEG", quality=88)
            content, opened = encoded.getvalue(), Image.open(encoded)
    except OSError as error:
        raise DataError(f"an image of the report cannot be read: {error}") from None
    width, dpi = opened.width, opened.info.get("dpi", (0, 0))[0]
    if opened.format == "PNG" and dpi:
        width = round(width * _PLOT_DPI / dpi)  # equal font sizes in all plots
    kind = str(opened.format).lower()
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
    return {"source": source, "width": width}


def write_report(
    folder: str | Path,
    *,
    data: Mapping[str, Dataset] | None = None,
    samples: int = REPORT_IMAGES,
    device: str = "auto",
) -> Path:
    """Write ``report.html`` and ``plots/`` of a finished or unfinished run.

    Parts that the run lacks (it was not validated, its data has moved) are left out with a note.

    Args:
        folder: run folder.
        data: its splits; None: read again from its data folder.
        samples: validation images to detect objects in, on `device`, and draw.
        device: device for that.

    Raises:
        DataError: the folder is not a run folder.
    """
    run = _Run(Path(folder))
    splits, missing = (data, "") if data is not None else _read_data(run)
    page = Page(f"Run {run.folder.resolve().name}", _subtitle(run))
    _add_summary(page.section("Summary"), run)
    _add_training(page.section("Training"), run)
    if run.metrics is not None:
        page.section("Validation")
        when = f" after step {run.best['step']:,}, the best of the run" if run.best else ""
        page.text(f"Metrics on the validation images{when}.")
        add_metrics(page, run.metrics, run.folder / "plots" / "validation")
    for name, metrics in run.evaluations.items():
        page.section(f"Evaluation: {name}")
        add_metrics(page, metrics, run.folder / "evaluation" / name / "plots")
    page.section("Detections")
    if splits is None:
        page.text(missing)
    else:
        _add_samples(page, run, splits, samples, device)
        _add_data(page.section("Data"), run, splits)
    _add_settings(page.section("Settings"), run)
    return page.write(run.folder / "report.html")


def add_metrics(page: Page, metrics: Metrics, plots: str | Path) -> None:
    """Add the metrics and plots of an evaluation; the plots are written into the folder `plots`."""
    if math.isnan(metrics.ap):
        page.text(f"The {metrics.images} images have no ground-truth box.")
        return
    summary = metrics.summary()
    at_score = "" if math.isnan(metrics.best_score) else f", at score {metrics.best_score:.2f}"
    facts: dict[str, object] = {
        **{name: summary[name] for name in AP_METRICS},
        "images": metrics.images,
        "objects": metrics.objects,
        "best mean F1" + at_score: metrics.best_f1,
    }
    if metrics.loss is not None:
        facts["loss"] = metrics.loss
    if metrics.images_per_second is not None:
        facts["images per second"] = f"{metrics.images_per_second:.1f}"
    if metrics.unreadable:
        facts["unreadable images"] = len(metrics.unreadable)
    page.facts(facts)
    files = plot_evaluation(metrics, plots)
    page.images([(files[name], "") for name in ("precision_recall", "errors", "classes")])
    small = len(metrics.confusion.classes) <= _MAX_CLASSES
    pair = [(files["calibration"], ""), (files["confusion"], "")]
    page.images(pair, columns=2 if small else 1)
    recalls = {name: value for name, value in summary.items() if name.startswith("AR")}
    page.table(["", *recalls], [["recall", *recalls.values()]])
    columns = {
        "class": "name",
        "objects": "objects",
        **AP_METRICS,
        "AR": "ar",
        "F1": "best_f1",
        "at score": "best_score",
    }
    classes = [c for c in metrics.per_class if c.objects or c.detections]
    folded = f"Metrics of {len(classes)} classes" if len(classes) > _MAX_CLASSES else ""
    rows = [[getattr(c, field) for field in columns.values()] for c in classes]
    page.table([*columns], rows, folded=folded)


class _Run:
    """Content of a run folder.

    Attributes:
        best: the validation with the highest AP; None: there is none with an AP.
    """

    def __init__(self, folder: Path) -> None:
        config = folder / "config.toml"
        if not config.is_file():
            raise DataError(
                f"not a run folder: {folder} has no config.toml; give a training's --out"
            )
        info_file, log_file = folder / "run.json", folder / "log.jsonl"
        self.folder = folder
        self.config = config.read_text("utf-8")
        self.settings = tomllib.loads(self.config)
        self.info: dict[str, Any] = _read_json(info_file) if info_file.is_file() else {}
        self.log = read_log(log_file) if log_file.is_file() else []
        self.steps, self.validations = split_log(self.log)
        known = [v for v in self.validations if v.get("ap") is not None]
        self.best = max(known, key=lambda v: v["ap"], default=None)
        validated = folder / "metrics.json"
        self.metrics = _read_metrics(validated) if validated.is_file() else None
        files = sorted(folder.glob("evaluation/*/metrics.json"))
        self.evaluations = {file.parent.name: _read_metrics(file) for file in files}


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is not JSON: {error}") from None


def _read_metrics(file: Path) -> Metrics:
    values = _read_json(file)
    try:
        return Metrics.from_dict(values)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{file} has no evaluation metrics ({reason}); evaluate again") from None


def _read_data(run: _Run) -> tuple[Mapping[str, Dataset] | None, str]:
    """Read the splits of a run; None and the reason if that fails."""
    source = run.info.get("data")
    if not source:
        return None, "run.json does not name the data folder, so no image is drawn."
    data, training = run.settings.get("data", {}), run.settings.get("train", {})
    seed = data.get("split_seed", training.get("seed", 0))
    try:
        fraction = data.get("val_fraction", 0.2)
        splits = read_splits(source, seed=seed, val_fraction=fraction, extras=False)
        selection = data.get("classes", ()), data.get("single_class", False)
        return {name: select(split, *selection) for name, split in splits.items()}, ""
    except RetinaNetError as error:
        return None, f"The data can no longer be read, so no image is drawn: {error}"


def _subtitle(run: _Run) -> str:
    recipe = run.settings.get("name", "")
    versions = run.info.get("versions", {})
    parts = [
        f"recipe {recipe}" if recipe else "",
        run.info.get("data", ""),
        run.info.get("device_name") or run.info.get("device", ""),
        *(f"{name} {versions[name]}" for name in ("retinanet", "torch") if name in versions),
    ]
    return " · ".join(str(part) for part in parts if part)


def _add_summary(page: Page, run: _Run) -> None:
    facts: dict[str, object] = {}
    if run.best is not None:
        facts[f"best validation AP, at step {run.best['step']:,}"] = run.best["ap"]
        facts["AP50 at that step"] = run.best.get("ap50")
    for name, metrics in run.evaluations.items():
        facts[f"AP on {name}"] = metrics.ap
    if run.steps:
        last = run.steps[-1]
        done, total = last["step"], run.info.get("steps")
        facts["steps"] = f"{done:,}" + (f" of {total:,}" if total and total != done else "")
        losses = [line["loss"] for line in run.steps if line.get("loss") is not None]
        losses = losses[-max(1, len(run.steps) // 50) :]
        facts["final loss"] = sum(losses) / len(losses) if losses else None
        seconds = sum(line.get("seconds") or 0.0 for line in run.steps)
        if seconds:
            facts["training time without validation"] = _duration(seconds)
        speed = last.get("images_per_second")
        facts["images per second"] = f"{speed:.1f}" if speed else None
    for name, count in run.info.get("images", {}).items():
        facts[f"images in {name}"] = count
    if facts:
        page.facts(facts)
    else:
        page.text("No training step was logged yet.")


def _add_training(page: Page, run: _Run) -> None:
    if not run.log:
        page.text("The log is empty.")
        return
    plots = run.folder / "plots"
    page.images([(plot_training(run.log, plots / "training.png"), "")])
    running = plot_running(run.log, plots / "running.png")
    page.images([(running, "")], folded="Speed, data loading, memory, foreground anchors")
    if run.validations:
        page.table(
            ["step", "AP", "AP50", "loss"],
            [[v["step"], v.get("ap"), v.get("ap50"), v.get("loss")] for v in run.validations],
            left=0,
            strong=[i for i, v in enumerate(run.validations) if v is run.best],
            folded=format_count(len(run.validations), "validation"),
        )


def _add_samples(
    page: Page, run: _Run, splits: Mapping[str, Dataset], samples: int, device: str
) -> None:
    split = next((name for name in ("val", "test", "train") if name in splits), None)
    if split is None or samples < 1:
        page.text("There is no image to show.")
        return
    dataset, _ = usable(splits[split])
    labelled = [image for image in dataset.images if image.annotations]
    if not labelled:
        page.text(f"No image of {split} has a ground-truth box.")
        return
    try:
        detector = load(run.folder, device)
    except RetinaNetError as error:
        page.text(f"There is no model to detect objects with: {error}")
        return
    page.text(
        f"Images of {split} at even distances in the data set. Left: ground truth. Right: "
        "detections, with the score threshold of the best F1 in validation per class."
    )
    count = min(samples, len(labelled))
    chosen = [labelled[(2 * i + 1) * len(labelled) // (2 * count)] for i in range(count)]
    results = detector.stream([image.path for image in chosen], batch_size=1)
    pairs: list[tuple[ImageLike, str]] = []
    for image, found in zip(chosen, results, strict=True):
        if isinstance(found, ImageDetections):  # `data check` names unreadable images
            objects = sum(not a.ignored for a in image.annotations)
            caption = f"{image.path.name}: {format_count(objects, 'object')}"
            pairs.append((draw_truth(image, dataset), caption))
            drawn = found.draw(score_threshold=0.0)
            pairs.append((drawn, format_count(len(found), "detection")))
    page.images(pairs, columns=2)


def draw_truth(image: LabelledImage, dataset: Dataset) -> Image.Image:
    """Draw the ground-truth boxes of an image."""
    objects = [a for a in image.annotations if not a.ignored]
    boxes = torch.tensor([a.box for a in objects], dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor([a.label for a in objects], dtype=torch.int64)
    return draw_boxes(read_image(image.path), boxes, labels, names=dataset.classes)


def _add_data(page: Page, run: _Run, splits: Mapping[str, Dataset]) -> None:
    counts = {name: count_objects(dataset, {}) for name, dataset in splits.items()}
    page.table(
        ["split", "images", "objects", "crowd or difficult", "images without object", "from"],
        [
            (name, n.images, n.objects, n.ignored, n.background_images, n.origin)
            for name, n in counts.items()
        ],
    )
    page.images([(plot_object_sizes(splits, run.folder / "plots" / "object_sizes.png"), "")])
    classes = next(iter(splits.values())).classes
    rows = [[name, *(n.classes[name] for n in counts.values())] for name in classes]
    folded = f"Objects of {len(classes)} classes" if len(classes) > _MAX_CLASSES else ""
    page.table(["class", *splits], rows, folded=folded)


def _add_settings(page: Page, run: _Run) -> None:
    page.code(run.config, folded="config.toml")
    rows: list[tuple[str, str]] = []
    for name, value in run.info.items():
        if isinstance(value, Mapping):
            rows += [(f"{name}.{key}", str(item)) for key, item in value.items()]
        else:
            rows.append((name, str(value)))
    if rows:
        page.table(["run.json", ""], rows, left=2)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
