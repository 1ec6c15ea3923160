"""Reports as one HTML file: styles and images inside, nothing is fetched from anywhere."""

from __future__ import annotations

import base64
import io
import json
import math
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image

from retinanet.data import read_splits, usable
from retinanet.data.dataset import Dataset, LabelledImage
from retinanet.data.drawing import draw_boxes
from retinanet.data.images import read_image
from retinanet.errors import DataError, RetinaNetError
from retinanet.evaluation.metrics import Metrics
from retinanet.files import write_atomic
from retinanet.inference.detections import DRAWN_SCORE, ImageDetections
from retinanet.inference.detector import Detector, load
from retinanet.report.plots import (
    plot_evaluation,
    plot_object_sizes,
    plot_running,
    plot_training,
    read_log,
)

ImageLike = Path | str | bytes | Image.Image
"""An image to embed: a file, the bytes of one, or a PIL image."""

_PLOT_DOTS = 115  # pixels of the page for an inch of a plot

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: #1f2328; line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
header h1 { font-size: 28px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
header p { color: #59636e; margin: 6px 0 0; overflow-wrap: anywhere; }
nav { margin: 14px 0 0; font-size: 14px; }
nav a { color: #0072b2; text-decoration: none; margin-right: 16px; white-space: nowrap; }
nav a:hover { text-decoration: underline; }
section { background: #fff; border: 1px solid #dfe3e8; border-radius: 8px;
  padding: 18px 22px 22px; margin-top: 20px; }
h2 { font-size: 19px; margin: 0 0 10px; }
h3 { font-size: 15px; margin: 22px 0 8px; }
p { margin: 8px 0; max-width: 76ch; overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(148px, 1fr)); gap: 10px;
  margin: 12px 0; }
.facts div { background: #f6f7f9; border-radius: 6px; padding: 10px 12px; min-width: 0; }
.facts b { display: block; font-size: 20px; font-weight: 600; line-height: 1.3;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.facts span { color: #59636e; font-size: 13px; }
.scroll { overflow-x: auto; margin: 10px 0; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #59636e; padding-bottom: 4px; }
th, td { padding: 4px 14px 4px 0; text-align: right; border-bottom: 1px solid #eceff2;
  white-space: nowrap; }
th { color: #59636e; font-weight: 600; border-bottom-color: #cfd5db; }
th.text, td.text { text-align: left; white-space: normal; overflow-wrap: anywhere; }
tbody tr:hover { background: #f6f9fc; }
tr.strong td { font-weight: 600; }
.images { display: grid; gap: 16px; margin: 12px 0; align-items: start; }
figure { margin: 0; min-width: 0; }
figure img { display: block; max-width: 100%; height: auto; border-radius: 4px; }
figcaption { color: #59636e; font-size: 13px; margin-top: 4px; overflow-wrap: anywhere; }
details { margin: 10px 0; }
summary { cursor: pointer; color: #0072b2; }
pre { background: #f6f7f9; border-radius: 6px; padding: 12px 14px; overflow-x: auto;
  font: 13px/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
@media (max-width: 720px) { .images { grid-template-columns: 1fr !important; } }
@media print { body { background: #fff; } section { break-inside: avoid; border: 0; } }
"""


class Page:
    """One HTML page, built from top to bottom.

    Example:
        >>> page = Page("Two losses").section("Result").table(["loss", "AP"], [["focal", 0.5]])
        >>> "<td>0.500</td>" in page.html()
        True
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self._title = title
        self._subtitle = subtitle
        self._sections: list[tuple[str, list[str]]] = []

    def section(self, title: str) -> Self:
        """What follows goes under this heading."""
        self._sections.append((title, []))
        return self

    def heading(self, title: str) -> Self:
        """A smaller heading within the section."""
        return self._add(f"<h3>{escape(title)}</h3>")

    def text(self, paragraph: str) -> Self:
        """A paragraph of plain text."""
        return self._add(f"<p>{escape(paragraph)}</p>")

    def facts(self, facts: Mapping[str, object]) -> Self:
        """A few values in large letters, by what they are."""
        cards = "".join(
            f"<div><b>{escape(_cell(value))}</b><span>{escape(name)}</span></div>"
            for name, value in facts.items()
        )
        return self._add(f'<div class="facts">{cards}</div>')

    def table(
        self,
        columns: Sequence[str],
        rows: Iterable[Sequence[object]],
        *,
        caption: str = "",
        left: int = 1,
        strong: Sequence[int] = (),
        folded: str = "",
    ) -> Self:
        """A table; floats get three decimals, None and NaN a dash.

        Args:
            columns: headings.
            rows: as many cells each.
            caption: a line above.
            left: so many first columns are text, the others figures.
            strong: places of rows to stress.
            folded: a title under which the table is folded away.
        """

        def cells(values: Sequence[object], tag: str) -> str:
            kinds = [' class="text"' if i < left else "" for i in range(len(values))]
            return "".join(
                f"<{tag}{kind}>{escape(_cell(value))}</{tag}>"
                for kind, value in zip(kinds, values, strict=True)
            )

        body = "".join(
            f"{'<tr class=strong>' if i in strong else '<tr>'}{cells(row, 'td')}</tr>"
            for i, row in enumerate(rows)
        )
        head = f"<caption>{escape(caption)}</caption>" if caption else ""
        head += f"<thead><tr>{cells(columns, 'th')}</tr></thead>"
        table = f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'
        return self._add(_fold(table, folded))

    def images(
        self, images: Iterable[tuple[ImageLike, str]], *, columns: int = 1, folded: str = ""
    ) -> Self:
        """Images with captions, side by side in so many columns.

        Raises:
            DataError: an image cannot be read.
        """
        figures = "".join(
            f'<figure><img {_embed(image)} alt="{escape(caption or "image")}">'
            + (f"<figcaption>{escape(caption)}</figcaption>" if caption else "")
            + "</figure>"
            for image, caption in images
        )
        style = f"grid-template-columns: repeat({columns}, minmax(0, 1fr))"
        return self._add(_fold(f'<div class="images" style="{style}">{figures}</div>', folded))

    def code(self, text: str, *, folded: str = "") -> Self:
        """A text as it is, in letters of one width."""
        return self._add(_fold(f"<pre>{escape(text)}</pre>", folded))

    def html(self) -> str:
        """The whole page."""
        links = "\n".join(
            f'<a href="#s{i}">{escape(title)}</a>' for i, (title, _) in enumerate(self._sections)
        )
        sections = "\n".join(
            "\n".join([f'<section id="s{i}">', f"<h2>{escape(title)}</h2>", *parts, "</section>"])
            for i, (title, parts) in enumerate(self._sections)
        )
        subtitle = f"<p>{escape(self._subtitle)}</p>" if self._subtitle else ""
        navigation = f"<nav>{links}</nav>" if len(self._sections) > 1 else ""
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self._title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
            f"<main>\n<header><h1>{escape(self._title)}</h1>{subtitle}{navigation}</header>\n"
            f"{sections}\n</main>\n</body>\n</html>\n"
        )

    def write(self, file: str | Path) -> Path:
        """Write the page, whole or not at all."""
        return write_atomic(file, self.html())

    def _add(self, part: str) -> Self:
        if not self._sections:
            raise ValueError("a page's content goes into sections: call section() first")
        self._sections[-1][1].append(part)
        return self


def write_report(
    folder: str | Path,
    *,
    data: Mapping[str, Dataset] | None = None,
    samples: int = 6,
    device: str = "auto",
) -> Path:
    """Write ``report.html`` and ``plots/`` of a run folder, from what is in it.

    What a run does not have (it was not validated, its data has moved) is said and left out.

    Args:
        folder: a run folder, of a finished or an unfinished run.
        data: its splits; None: read again from where they were.
        samples: validation images to search and draw.
        device: where to search them.

    Returns:
        the file ``report.html``.

    Raises:
        DataError: the folder is not a run folder.
    """
    run = _read_run(Path(folder))
    splits, trouble = (data, "") if data is not None else _read_data(run)
    page = Page(f"Run {run.folder.resolve().name}", _subtitle(run))
    _add_summary(page, run)
    _add_training(page, run)
    if run.metrics is not None:
        best = _best_validation(run)
        page.section("Validation")
        when = f" after step {best['step']:,}, the best of the run" if best else ""
        page.text(f"Figures of the validation images{when}.")
        add_metrics(page, run.metrics, run.folder / "plots" / "validation")
    for name, metrics in run.evaluations.items():
        page.section(f"Evaluation: {name}")
        add_metrics(page, metrics, run.folder / "evaluation" / name / "plots")
    page.section("Detections")
    if splits is None:
        page.text(trouble)
    else:
        _add_samples(page, run, splits, samples, device)
        page.section("Data")
        _add_data(page, run, splits)
    page.section("Settings")
    _add_settings(page, run)
    return page.write(run.folder / "report.html")


def add_metrics(page: Page, metrics: Metrics, plots: str | Path) -> None:
    """The figures and images of an evaluation; the images are drawn into the folder `plots`."""
    if math.isnan(metrics.ap):
        page.text(f"There is no object to find in {metrics.images} images.")
        return
    summary = metrics.summary()
    page.facts(
        {
            **{name: summary[name] for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")},
            "images": metrics.images,
            "objects": metrics.objects,
            f"best mean F1, at score {metrics.best_score:.2f}": metrics.best_f1,
            **({"loss": metrics.loss} if metrics.loss is not None else {}),
            **(
                {"images a second": round(metrics.images_per_second, 1)}
                if metrics.images_per_second is not None
                else {}
            ),
        }
    )
    drawn = plot_evaluation(metrics, plots)
    page.images([(drawn["precision_recall"], "")])
    page.images([(drawn["sizes"], ""), (drawn["calibration"], "")], columns=2)
    page.images([(drawn["errors"], "")])
    page.images([(drawn["classes"], "")])
    page.images([(drawn["confusion"], "")], columns=1)
    columns = ["", *(name for name in summary if name.startswith("AR"))]
    page.table(columns, [["recall", *(summary[name] for name in columns[1:])]])
    classes = [one for one in metrics.per_class if one.objects or one.detections]
    page.table(
        ["class", "objects", "AP", "AP50", "AP75", "APs", "APm", "APl", "AR", "F1", "at score"],
        [
            [
                *(one.name, one.objects, one.ap, one.ap50, one.ap75),
                *(one.ap_small, one.ap_medium, one.ap_large, one.ar, one.best_f1, one.best_score),
            ]
            for one in classes
        ],
        folded=f"Figures of {len(classes)} classes" if len(classes) > 12 else "",
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """What lies in a run folder."""

    folder: Path
    config: str
    info: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    metrics: Metrics | None
    evaluations: Mapping[str, Metrics]


def _read_run(folder: Path) -> _Run:
    config = folder / "config.toml"
    if not config.is_file():
        raise DataError(f"{folder} is not a run folder: it has no config.toml")
    info_file, log_file = folder / "run.json", folder / "log.jsonl"
    evaluations = {
        file.parent.name: metrics
        for file in sorted(folder.glob("evaluation/*/metrics.json"))
        if (metrics := _read_metrics(file)) is not None
    }
    info = _read_json(info_file) if info_file.is_file() else {}
    return _Run(
        folder,
        config.read_text("utf-8"),
        info if isinstance(info, dict) else {},
        read_log(log_file) if log_file.is_file() else [],
        _read_metrics(folder / "metrics.json"),
        evaluations,
    )


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is not JSON: {error}") from None


def _read_metrics(file: Path) -> Metrics | None:
    if not file.is_file():
        return None
    try:
        return Metrics.from_dict(_read_json(file))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{file} is not what an evaluation writes ({type(error).__name__}: {error}); "
            "evaluate again"
        ) from None


def _read_data(run: _Run) -> tuple[Mapping[str, Dataset] | None, str]:
    """The splits of a run, or None and why not."""
    source = run.info.get("data")
    if not source:
        return None, "The run does not say where its data is, so no image is drawn."
    settings = _settings(run)
    of_data, of_training = settings.get("data", {}), settings.get("train", {})
    try:
        return (
            read_splits(
                source,
                seed=of_data.get("split_seed", of_training.get("seed", 0)),
                val_fraction=of_data.get("val_fraction", 0.2),
                extras=False,
            ),
            "",
        )
    except RetinaNetError as error:
        return None, f"The data cannot be read any more, so no image is drawn: {error}"


def _settings(run: _Run) -> dict[str, Any]:
    return tomllib.loads(run.config)


def _validations(run: _Run) -> list[dict[str, Any]]:
    return [
        {**line["validation"], "step": line["step"]} for line in run.log if "validation" in line
    ]


def _best_validation(run: _Run) -> dict[str, Any] | None:
    return max(_validations(run), key=lambda one: one["ap"] or 0.0, default=None)


def _subtitle(run: _Run) -> str:
    recipe = _settings(run).get("name", "")
    parts = [f"recipe {recipe}" if recipe else "", str(run.info.get("data", ""))]
    device = run.info.get("device_name") or run.info.get("device", "")
    versions = run.info.get("versions", {})
    known = [f"{name} {versions[name]}" for name in ("retinanet", "torch") if name in versions]
    return " · ".join(part for part in (*parts, str(device), *known) if part)


def _add_summary(page: Page, run: _Run) -> None:
    page.section("Summary")
    facts: dict[str, object] = {}
    judged = [
        one for one in _validations(run) if one.get("ap") is not None and not math.isnan(one["ap"])
    ]
    if judged:
        best = max(judged, key=lambda one: one["ap"])
        facts |= {f"AP, best, at step {best['step']:,}": best["ap"], "AP50 there": best.get("ap50")}
    for name, metrics in run.evaluations.items():
        facts[f"AP on {name}"] = metrics.ap
    steps = [line for line in run.log if "validation" not in line]
    if steps:
        done, of = steps[-1]["step"], run.info.get("steps")
        facts["steps"] = f"{done:,}" + (f" of {of:,}" if of and of != done else "")
        facts["loss at the end"] = _mean_of_last(steps, "loss")
        seconds = sum(line.get("seconds") or 0.0 for line in steps)
        if seconds:
            facts["of training, without validation"] = _duration(seconds)
        facts["images a second"] = round(steps[-1].get("images_per_second") or math.nan, 1)
    for name, count in run.info.get("images", {}).items():
        facts[f"images in {name}"] = f"{count:,}"
    if facts:
        page.facts(facts)
    else:
        page.text("Nothing was trained yet.")


def _add_training(page: Page, run: _Run) -> None:
    page.section("Training")
    if not run.log:
        page.text("The log is empty.")
        return
    plots = run.folder / "plots"
    page.images([(plot_training(run.log, plots / "training.png"), "")])
    running = plot_running(run.log, plots / "running.png")
    page.images([(running, "")], folded="Speed, waiting, memory, foreground anchors")
    validations = _validations(run)
    if validations:
        best = max(range(len(validations)), key=lambda i: _or_low(validations[i].get("ap")))
        page.table(
            ["step", "AP", "AP50", "loss"],
            [[one["step"], one.get("ap"), one.get("ap50"), one.get("loss")] for one in validations],
            left=0,
            strong=[best],
            folded=f"{len(validations)} validations",
        )


def _add_samples(
    page: Page, run: _Run, splits: Mapping[str, Dataset], samples: int, device: str
) -> None:
    split = next((name for name in ("val", "test", "train") if name in splits), None)
    if split is None or samples < 1:
        page.text("There is no image to show.")
        return
    dataset, _ = usable(splits[split])
    chosen = _spread([one for one in dataset.images if one.annotations], samples)
    if not chosen:
        page.text(f"There is no image with an object in {split}.")
        return
    try:
        detector = load(run.folder, device)
    except RetinaNetError as error:
        page.text(f"There is no model to search images with: {error}")
        return
    threshold = DRAWN_SCORE
    if run.metrics is not None and not math.isnan(run.metrics.best_score):
        threshold = max(0.05, run.metrics.best_score)
    page.text(
        f"Images of {split}, chosen by their place in it and not by how they came out: on the "
        "left what the labels say, on the right what was found with a score of "
        f"{threshold:.2f} or more."
    )
    page.images(_sample_pairs(detector, dataset, chosen, threshold), columns=2)


def _sample_pairs(
    detector: Detector, dataset: Dataset, chosen: Sequence[LabelledImage], threshold: float
) -> list[tuple[ImageLike, str]]:
    pairs: list[tuple[ImageLike, str]] = []
    for image, found in zip(
        chosen, detector.stream([one.path for one in chosen], batch_size=1), strict=True
    ):
        if not isinstance(found, ImageDetections):
            continue  # `data check` names images that cannot be read
        objects = [one for one in image.annotations if not one.ignored]
        truth = draw_boxes(
            read_image(image.path),
            torch.tensor([one.box for one in objects], dtype=torch.float32).reshape(-1, 4),
            torch.tensor([one.label for one in objects], dtype=torch.int64),
            names=dataset.classes,
        )
        count = int((found.scores >= threshold).sum())
        said = f"{image.path.name}: {len(objects)} object{'' if len(objects) == 1 else 's'}"
        pairs.append((truth, said))
        pairs.append((found.draw(score_threshold=threshold), f"{count} found"))
    return pairs


def _add_data(page: Page, run: _Run, splits: Mapping[str, Dataset]) -> None:
    rows: list[list[object]] = []
    for name, dataset in splits.items():
        objects = [one for image in dataset.images for one in image.annotations]
        ignored = sum(one.ignored for one in objects)
        empty = sum(not image.annotations for image in dataset.images)
        rows.append(
            [name, len(dataset), len(objects) - ignored, ignored, empty, dataset.split_origin]
        )
    page.table(
        ["split", "images", "objects", "crowd or difficult", "images without any", "made by"],
        rows,
    )
    page.images([(plot_object_sizes(splits, run.folder / "plots" / "object_sizes.png"), "")])
    classes = next(iter(splits.values())).classes
    counts = {
        name: Counter(a.label for i in one.images for a in i.annotations if not a.ignored)
        for name, one in splits.items()
    }
    rows = [
        [name, *(counts[split][label] for split in splits)] for label, name in enumerate(classes)
    ]
    folded = f"Objects of {len(classes)} classes" if len(classes) > 12 else ""
    page.table(["class", *splits], rows, folded=folded)


def _add_settings(page: Page, run: _Run) -> None:
    page.code(run.config, folded="config.toml")
    flat: list[list[object]] = []
    for name, value in run.info.items():
        if isinstance(value, Mapping):
            flat += [[f"{name}.{key}", str(one)] for key, one in value.items()]
        else:
            flat.append([name, str(value)])
    if flat:
        page.table(["run.json", ""], flat, left=2)


def _spread(images: Sequence[LabelledImage], count: int) -> list[LabelledImage]:
    """So many of the images, at even distances."""
    if len(images) <= count:
        return list(images)
    return [images[(2 * i + 1) * len(images) // (2 * count)] for i in range(count)]


def _mean_of_last(steps: Sequence[Mapping[str, Any]], name: str) -> float:
    last = [line[name] for line in steps[-max(1, len(steps) // 50) :] if line.get(name) is not None]
    return sum(last) / len(last) if last else math.nan


def _or_low(value: float | None) -> float:
    return -1.0 if value is None or math.isnan(value) else value


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3f}" if math.isfinite(value) else "–"
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def _fold(content: str, title: str) -> str:
    if not title:
        return content
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def _embed(image: ImageLike) -> str:
    """The attributes of an img: PNG and JPEG as they are, anything else made a JPEG."""
    try:
        if isinstance(image, Path | str):
            image = Path(image).read_bytes()
        if isinstance(image, bytes):
            opened = Image.open(io.BytesIO(image))
            if opened.format in ("PNG", "JPEG"):
                return _attributes(image, opened)
            image = opened
        out = io.BytesIO()
        image.convert("RGB").save(out, "JPEG", quality=88)
    except OSError as error:
        raise DataError(f"an image of the report cannot be read: {error}") from None
    return _attributes(out.getvalue(), Image.open(out))


def _attributes(content: bytes, image: Image.Image) -> str:
    address = f"data:image/{image.format.lower()};base64," if image.format else ""
    address += base64.b64encode(content).decode("ascii")
    width, dots = image.width, image.info.get("dpi", (0, 0))[0]
    if image.format == "PNG" and dots:
        width = round(width * _PLOT_DOTS / dots)  # letters of all plots come out equally large
    return f'src="{address}" width="{width}"'
