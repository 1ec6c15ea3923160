"""Images of a training and of an evaluation, as PNG files; any figure can be an SVG too.

Colours are those of Okabe and Ito, which people who see colours differently tell apart.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from retinanet.data.dataset import Dataset
from retinanet.errors import DataError
from retinanet.evaluation.metrics import Metrics

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#8A8F98"
COLOURS = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, "#4B3F72", "#7A7A00")

SMALL, LARGE = 32.0, 96.0
"""COCO's limits of small and large objects: square roots of area, pixels."""

_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#999999",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=COLOURS),
    "grid.color": "#E6E8EB",
    "grid.linewidth": 0.8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "figure.facecolor": "white",
    "savefig.dpi": 160,
    "svg.hashsalt": "retinanet",  # ids in an SVG are random without it
    "text.parse_math": False,  # a class may be called "US$ 5"
}
_POINTS = 1500  # more would not be told apart
_MOST_CLASSES = 40  # in a bar chart
_MOST_CONFUSED = 20  # in a confusion matrix
_Array = NDArray[np.float64]


def plot_evaluation(metrics: Metrics, folder: str | Path) -> dict[str, Path]:
    """All images of an evaluation, into `folder`.

    Returns:
        the files by what they show: ``precision_recall``, ``classes``, ``sizes``, ``errors``,
        ``confusion``, ``calibration``. Empty where there was no object to find.
    """
    if math.isnan(metrics.ap):
        return {}
    plots: dict[str, Callable[[Metrics, Path], Path]] = {
        "precision_recall": plot_precision_recall,
        "classes": plot_classes,
        "sizes": plot_sizes,
        "errors": plot_errors,
        "confusion": plot_confusion,
        "calibration": plot_calibration,
    }
    return {name: plot(metrics, Path(folder) / f"{name}.png") for name, plot in plots.items()}


def read_log(file: str | Path) -> list[dict[str, Any]]:
    """The lines of a ``log.jsonl``; one that a kill cut short is passed over.

    Raises:
        DataError: there is no such file.
    """
    try:
        text = Path(file).read_text("utf-8")
    except OSError as error:
        raise DataError(f"log {file} cannot be read: {error.strerror}") from None
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict) and "step" in line]


def plot_training(log: str | Path | Sequence[Mapping[str, Any]], file: str | Path) -> Path:
    """Losses, AP on the validation images, and learning rate, by step.

    Args:
        log: a ``log.jsonl`` or its lines.
        file: the PNG to write.

    Raises:
        DataError: the log cannot be read.
    """
    steps, validations = _parts(log)
    with open_figure(9.0, 5.6, file) as figure:
        axes = figure.subplots(2, 2)
        loss, parts, precision, rate = axes.flat
        _line(loss, steps, "loss", BLUE, "training")
        tested = [one for one in validations if one.get("loss") is not None]
        if tested:
            x, y = [one["step"] for one in tested], [one["loss"] for one in tested]
            loss.plot(x, y, "o-", color=RED, markersize=3, label="validation")
        loss.set_title("Loss")
        _line(parts, steps, "loss_classification", BLUE, "classification")
        _line(parts, steps, "loss_box", ORANGE, "box")
        parts.set_title("Parts of the training loss")
        for axis in (loss, parts):
            _log_where_wide(axis)
            _legend(axis)
        _validation(precision, validations)
        rate.set_title("Learning rate")
        _line(rate, steps, "lr", GREEN, "", smooth=False)
        rate.set_ylim(bottom=0)
        for axis in axes.flat:
            _steps_below(axis, steps, validations)
    return Path(file)


def plot_running(log: str | Path | Sequence[Mapping[str, Any]], file: str | Path) -> Path:
    """Speed, waiting for data, memory, and anchors that answer for an object, by step.

    Arguments and errors as :func:`plot_training`.
    """
    steps, validations = _parts(log)
    panels = {
        "images_per_second": ("Images a second", GREEN),
        "waiting": ("Share of time waiting for data", ORANGE),
        "memory_mb": ("Memory, MB", BLUE),
        "positives": ("Foreground anchors an image", PURPLE),
    }
    with open_figure(9.0, 4.6, file) as figure:
        for axis, (name, (title, colour)) in zip(
            figure.subplots(2, 2).flat, panels.items(), strict=True
        ):
            _line(axis, steps, name, colour, "")
            axis.set_title(title)
            axis.set_ylim(bottom=0)
            if name == "waiting":
                axis.set_ylim(0, max(0.1, axis.get_ylim()[1]))
                axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            _steps_below(axis, steps, validations)
    return Path(file)


def plot_precision_recall(metrics: Metrics, file: str | Path) -> Path:
    """Precision by recall: mean over classes at three IoUs, and each class at IoU .50."""
    recall = metrics.curves.recall
    shown = [
        (one.name, one.ap50, curve)
        for one, curve in zip(metrics.per_class, metrics.curves.per_class, strict=True)
        if curve
    ]
    with open_figure(9.0, 3.8, file) as figure:
        mean, classes = figure.subplots(1, 2, sharey=True)
        values = {"0.50": metrics.ap50, "0.75": metrics.ap75, "0.50:0.95": metrics.ap}
        for (iou, curve), colour in zip(
            metrics.curves.precision.items(), (BLUE, GREEN, ORANGE), strict=False
        ):
            mean.plot(recall, curve, color=colour, label=f"IoU {iou}: AP {values[iou]:.3f}")
        mean.set_title("Mean over classes")
        mean.set_ylabel("precision")
        few = len(shown) <= len(COLOURS)
        for i, (name, ap50, curve) in enumerate(shown):
            if few:
                label = f"{_short(name)}: {ap50:.3f}"
                classes.plot(recall, curve, color=COLOURS[i], label=label)
            else:
                classes.plot(recall, curve, color=BLUE, alpha=0.25, linewidth=0.9)
        title = "Each class at IoU 0.50" + ("" if few else f" ({len(shown)} classes)")
        classes.set_title(title)
        for axis in (mean, classes):
            axis.set(xlabel="recall", xlim=(0, 1), ylim=(0, 1.02))
            _legend(axis, loc="lower left")
    return Path(file)


def plot_classes(metrics: Metrics, file: str | Path) -> Path:
    """AP and AP50 of each class that has objects, best first; of many the best and the worst."""
    found = [one for one in metrics.per_class if one.objects]
    found.sort(key=lambda one: (-one.ap, one.name))
    title = "AP by class"
    if len(found) > _MOST_CLASSES:
        title += f": the best and the worst {_MOST_CLASSES // 2} of {len(found)}"
        found = found[: _MOST_CLASSES // 2] + found[-(_MOST_CLASSES // 2) :]
    with open_figure(9.0, 1.3 + 0.24 * max(2, len(found)), file) as figure:
        axis = figure.subplots()
        y = np.arange(len(found))
        axis.barh(y, [one.ap50 for one in found], 0.72, color="#C9DFEE", label="AP50")
        axis.barh(y, [one.ap for one in found], 0.72, color=BLUE, label="AP")
        for place, one in enumerate(found):
            text = f"{one.ap:.3f}  ({_count(one.objects, 'object')})"
            right = max(one.ap50, one.ap)
            axis.text(right + 0.008, place, text, va="center", fontsize=7.5, color="#444444")
        axis.set_yticks(y, [_short(one.name) for one in found])
        axis.set(xlim=(0, 1.16), ylim=(len(found) - 0.4, -0.6), xlabel="AP")
        axis.set_xticks(np.linspace(0, 1, 6))
        axis.grid(axis="y", visible=False)
        axis.set_title(title)
        _legend(axis, loc="lower right")
    return Path(file)


def plot_sizes(metrics: Metrics, file: str | Path) -> Path:
    """AP and recall of small, medium and large objects."""
    names = ("small\nunder 32²", "medium\nto 96²", "large\nover 96²")
    precision = (metrics.ap_small, metrics.ap_medium, metrics.ap_large)
    recall = (metrics.ar_small, metrics.ar_medium, metrics.ar_large)
    with open_figure(5.2, 3.4, file) as figure:
        axis = figure.subplots()
        x = np.arange(3)
        for shift, values, colour, name in (
            (-0.19, precision, BLUE, "AP"),
            (0.19, recall, SKY, f"recall with {metrics.max_detections} boxes"),
        ):
            heights = np.nan_to_num(np.array(values))
            axis.bar(x + shift, heights, 0.36, color=colour, label=name)
            for place, value in enumerate(values):
                text = "none" if math.isnan(value) else f"{value:.3f}"
                axis.text(
                    place + shift,
                    heights[place] + 0.015,
                    text,
                    ha="center",
                    fontsize=8,
                    color="#444444",
                )
        axis.set_xticks(x, names)
        axis.set(ylim=(0, 1.12), ylabel="mean over IoU 0.50:0.95", title="By size of object")
        axis.set_yticks(np.linspace(0, 1, 6))
        axis.grid(axis="x", visible=False)
        figure.legend(loc="outside lower center", ncols=2)
    return Path(file)


def plot_errors(metrics: Metrics, file: str | Path) -> Path:
    """Kinds of error: AP50 that mending one would gain (TIDE), and how many there are."""
    kinds = {
        "classification": "wrong class",
        "localisation": "box too far off",
        "both": "both",
        "duplicate": "found twice",
        "background": "nothing there",
        "missed": "missed",
    }
    gains = [metrics.errors.delta_ap[kind] for kind in kinds]
    counts = [metrics.errors.counts[kind] for kind in kinds]
    with open_figure(9.0, 3.0, file) as figure:
        gain, count = figure.subplots(1, 2, sharey=True)
        y = np.arange(len(kinds))
        gain.barh(y, gains, 0.7, color=COLOURS[: len(kinds)])
        count.barh(y, counts, 0.7, color=COLOURS[: len(kinds)])
        for axis, values, form in ((gain, gains, "{:.3f}"), (count, counts, "{:,}")):
            most = max(*values, 1e-9)
            for place, value in enumerate(values):
                text = form.format(value)
                axis.text(value + 0.02 * most, place, text, va="center", fontsize=8)
            axis.set_xlim(0, 1.18 * most)
            axis.grid(axis="y", visible=False)
            axis.xaxis.set_major_locator(MaxNLocator(5))
        gain.set_yticks(y, list(kinds.values()))
        gain.invert_yaxis()
        gain.set_title(f"AP50 to gain (now {metrics.errors.ap50:.3f})")
        count.set_title("Number of errors, boxes of any score")
    return Path(file)


def plot_confusion(metrics: Metrics, file: str | Path) -> Path:
    """What objects were taken for, as shares of a row; of many classes the most confused."""
    matrix = np.array(metrics.confusion.matrix, dtype=np.int64)
    count = len(metrics.confusion.classes)
    names = [*(_short(name) for name in metrics.confusion.classes), "background"]
    title = f"Boxes over {metrics.confusion.score_threshold:.2f}, matched at IoU 0.50"
    if count > _MOST_CONFUSED:
        taken = matrix[:count, :count].copy()
        np.fill_diagonal(taken, 0)
        trouble = taken.sum(axis=0) + taken.sum(axis=1)
        order = np.lexsort((np.arange(count), -matrix[:count].sum(axis=1), -trouble))
        kept = [*sorted(order[:_MOST_CONFUSED].tolist()), count]
        # Rows must add up over all classes, so shares are taken before the cut.
        title += f"\nthe {_MOST_CONFUSED} of {count} classes most often confused"
    else:
        kept = list(range(count + 1))
    sums = matrix.sum(axis=1, keepdims=True)
    shares = (matrix / np.maximum(sums, 1))[np.ix_(kept, kept)]
    shown = matrix[np.ix_(kept, kept)]
    labels = [names[place] for place in kept]
    side = 2.2 + 0.36 * len(labels)
    with open_figure(max(4.6, side + 0.8), max(4.0, side), file) as figure:
        axis = figure.subplots()
        image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        numbers = 6 if len(labels) > 12 else 8
        for row, column in zip(*np.nonzero(shown), strict=True):
            colour = "white" if shares[row, column] > 0.55 else "#333333"
            text = _compact(int(shown[row, column]))
            axis.text(column, row, text, ha="center", va="center", fontsize=numbers, color=colour)
        axis.set_xticks(range(len(labels)), labels, rotation=45, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(labels)), labels)
        axis.axhline(len(labels) - 1.5, color="#999999", linewidth=0.8)
        axis.axvline(len(labels) - 1.5, color="#999999", linewidth=0.8)
        axis.set(xlabel="found as (background: missed)", ylabel="truth")
        axis.set_title(title)
        axis.grid(visible=False)
        bar = figure.colorbar(image, ax=axis, shrink=0.7, format=PercentFormatter(1.0, decimals=0))
        bar.set_label("share of the row")
        bar.outline.set_visible(False)
    return Path(file)


def plot_calibration(metrics: Metrics, file: str | Path) -> Path:
    """Share of boxes that are right by score, and how many boxes there are."""
    bins = [one for one in metrics.calibration.bins if one.detections]
    with open_figure(5.2, 4.4, file) as figure:
        share, count = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        share.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1, label="as good as it says")
        centres = [(one.lower + one.upper) / 2 for one in bins]
        widths = [0.9 * (one.upper - one.lower) for one in bins]
        share.bar(centres, [one.precision for one in bins], widths, color="#C9DFEE")
        share.plot(
            [one.score for one in bins],
            [one.precision for one in bins],
            "o-",
            color=BLUE,
            markersize=4,
            label="right at IoU 0.50",
        )
        share.set(ylim=(0, 1.02), ylabel="share that is right")
        share.set_title(f"Calibration: mean error {metrics.calibration.expected_error:.3f}")
        figure.legend(loc="outside lower center", ncols=2)
        count.bar(centres, [one.detections for one in bins], widths, color=GREY)
        most = max((one.detections for one in bins), default=1)
        fewest = min((one.detections for one in bins), default=1)
        if most > 100 * fewest:
            count.set_yscale("log")
        count.set(xlabel="score", ylabel="boxes", xlim=(0, 1))
    return Path(file)


def plot_object_sizes(splits: Mapping[str, Dataset], file: str | Path) -> Path:
    """How large the objects of each split are, and how many are in an image."""
    with open_figure(9.0, 3.2, file) as figure:
        sizes, crowding = figure.subplots(1, 2)
        sides = {name: _sides(dataset) for name, dataset in splits.items()}
        every = np.concatenate([*sides.values(), np.empty(0)])
        low, high = (every.min(), every.max()) if every.size else (1.0, 100.0)
        edges = np.geomspace(max(low, 1) * 0.95, max(high, 2) * 1.05, 41)
        counts = {
            name: [sum(not a.ignored for a in image.annotations) for image in dataset.images]
            for name, dataset in splits.items()
        }
        most = max((max(one, default=0) for one in counts.values()), default=0)
        width = math.ceil((most + 1) / 40)
        steps = np.arange(-0.5, most + width, width)
        for (name, values), colour in zip(sides.items(), COLOURS * len(sides), strict=False):
            label = f"{name} ({_count(len(values), 'object')})"
            if values.size:
                weights = np.full(len(values), 1 / len(values))
                sizes.hist(
                    values, edges, weights=weights, histtype="step", color=colour, label=label
                )
            if counts[name]:
                weights = np.full(len(counts[name]), 1 / len(counts[name]))
                label = f"{name} ({_count(len(counts[name]), 'image')})"
                crowding.hist(
                    counts[name],
                    steps,
                    weights=weights,
                    histtype="step",
                    color=colour,
                    label=label,
                )
        for limit in (SMALL, LARGE):
            sizes.axvline(limit, color=GREY, linestyle=":", linewidth=1)
        sizes.set(xscale="log", xlabel="square root of area, pixels", title="Size of objects")
        ticks = [2**power for power in range(1, 13)]
        sizes.set_xticks([one for one in ticks if edges[0] <= one <= edges[-1]], minor=False)
        sizes.set_xticks([], minor=True)
        sizes.xaxis.set_major_formatter("{x:.0f}")
        crowding.set(xlabel="objects", title="Objects in an image")
        crowding.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axis in (sizes, crowding):
            axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
            _legend(axis)
    return Path(file)


@contextmanager
def open_figure(width: float, height: float, *files: str | Path) -> Iterator[Figure]:
    """A figure of so many inches in our style, written to `files` at the end.

    Their names say as what: PNG or SVG. The same figure always gives the same bytes.
    """
    places = [Path(one) for one in files]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
    style: Any = {**mpl.rcParamsDefault, "backend": "agg", **_STYLE}
    with mpl.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        with warnings.catch_warnings():
            # Names in a script that the font lacks come out as boxes, which need not be said.
            warnings.filterwarnings("ignore", message=r"Glyph \d+")
            for place in places:
                # What else would be written: the version of matplotlib, and the date.
                unsaid = "Date" if place.suffix == ".svg" else "Software"
                figure.savefig(place, metadata={unsaid: None})


def _parts(
    log: str | Path | Sequence[Mapping[str, Any]],
) -> tuple[list[Mapping[str, Any]], list[dict[str, Any]]]:
    """Lines of steps, and of validations with their step among the values."""
    lines = read_log(log) if isinstance(log, str | Path) else log
    steps = [line for line in lines if "validation" not in line]
    validations = [
        {**line["validation"], "step": line["step"]} for line in lines if "validation" in line
    ]
    return steps, validations


def _line(
    axis: Any,
    steps: Sequence[Mapping[str, Any]],
    name: str,
    colour: str,
    label: str,
    *,
    smooth: bool = True,
) -> None:
    """A value by step: a mean over 2% of the steps, with the values themselves pale behind."""
    points = [(one["step"], one[name]) for one in steps if one.get(name) is not None]
    if not points:
        return
    x, y = _thin(np.array(points, dtype=np.float64))
    if not smooth or len(x) < 20:
        axis.plot(x, y, color=colour, label=label)
        return
    axis.plot(x, y, color=colour, alpha=0.22, linewidth=0.7)
    axis.plot(x, _moving_mean(y, max(3, len(y) // 50)), color=colour, label=label)


def _thin(points: _Array) -> tuple[_Array, _Array]:
    """(N, 2) points to at most _POINTS, each the mean of its neighbours."""
    if len(points) <= _POINTS:
        return points[:, 0], points[:, 1]
    parts = np.array_split(points, _POINTS)
    return np.array([one[:, 0].mean() for one in parts]), np.array(
        [one[:, 1].mean() for one in parts]
    )


def _moving_mean(values: _Array, width: int) -> _Array:
    """Centred mean over `width` values, over fewer at the ends; what is not finite is left out."""
    finite = np.isfinite(values)
    ones = np.ones(width)
    count = np.convolve(finite.astype(np.float64), ones, "same")
    total = np.convolve(np.where(finite, values, 0.0), ones, "same")
    mean: _Array = np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)
    return mean


def _validation(axis: Any, validations: Sequence[Mapping[str, Any]]) -> None:
    axis.set_title("AP on the validation images")
    judged = [one for one in validations if one.get("ap") is not None]
    if not judged:
        axis.text(0.5, 0.5, "not validated", ha="center", color=GREY, transform=axis.transAxes)
        axis.set_yticks([])
        return
    x = [one["step"] for one in judged]
    for name, colour, label in (("ap50", SKY, "AP50"), ("ap", BLUE, "AP")):
        axis.plot(
            x, [one.get(name, math.nan) for one in judged], "o-", color=colour, markersize=3,
            label=label,
        )  # fmt: skip
    best = max(judged, key=lambda one: -1.0 if math.isnan(one["ap"]) else one["ap"])
    axis.annotate(
        f"{best['ap']:.3f}",
        (best["step"], best["ap"]),
        xytext=(0, 6),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=BLUE,
    )
    top = max((one.get("ap50") or 0.0 for one in judged), default=0.0)
    axis.set_ylim(0, min(1.02, max(0.1, 1.2 * top)))
    _legend(axis, loc="lower right")


def _log_where_wide(axis: Any) -> None:
    """A logarithmic axis where the values fall by more than twenty times."""
    values = np.concatenate([line.get_ydata() for line in axis.get_lines()] or [np.empty(0)])
    values = values[np.isfinite(values) & (values > 0)]
    if values.size and np.quantile(values, 0.999) > 20 * np.quantile(values, 0.05):
        axis.set_yscale("log")
    elif values.size:
        axis.set_ylim(0, 1.1 * float(np.quantile(values, 0.995)))


def _steps_below(
    axis: Any, steps: Sequence[Mapping[str, Any]], validations: Sequence[Mapping[str, Any]]
) -> None:
    last = max((one["step"] for one in (*steps, *validations)), default=1)
    axis.set_xlim(0, max(1, last))
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.xaxis.set_major_formatter(lambda value, _: _compact(round(value)))
    axis.set_xlabel("step")


def _sides(dataset: Dataset) -> _Array:
    """Square roots of the boxes' areas, of objects that count and are boxes."""
    boxes = np.array(
        [one.box for image in dataset.images for one in image.annotations if not one.ignored],
        dtype=np.float64,
    ).reshape(-1, 4)
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    good = np.isfinite(boxes).all(axis=1) & (width > 0) & (height > 0)
    return np.sqrt(width[good] * height[good])


def _legend(axis: Any, **options: Any) -> None:
    handles, labels = axis.get_legend_handles_labels()
    if any(labels):
        axis.legend(handles, labels, **options)


def _short(name: str, most: int = 22) -> str:
    return name if len(name) <= most else f"{name[: most - 2]}.."


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _compact(number: int) -> str:
    """A count in at most four characters or so: 950, 12k, 3.4M."""
    for limit, unit in ((1_000_000, "M"), (10_000, "k")):
        if abs(number) >= limit:
            divisor = 1_000_000 if unit == "M" else 1_000
            return f"{number / divisor:.3g}{unit}"
    return str(number)
