"""Plots of a training and of an evaluation, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from retinanet.data.dataset import Dataset
from retinanet.evaluation.metrics import Metrics
from retinanet.report.figure import (
    BLUE,
    COLOURS,
    DARK,
    GREEN,
    GREY,
    ORANGE,
    PALE_BLUE,
    PURPLE,
    RED,
    SKY,
    add_legend,
    cycle_colours,
    format_compact,
    format_count,
    open_figure,
    shorten,
)

SMALL, LARGE = 32.0, 96.0
"""COCO's limits of small and large objects: square roots of area, pixels."""

_MAX_CLASSES = 40  # in a bar chart
_MAX_CONFUSED = 20  # in a confusion matrix
_PERCENT = PercentFormatter(1.0, decimals=0)
_Array = NDArray[np.float64]
_Lines = Sequence[Mapping[str, Any]]

_ERROR_KINDS = {
    "classification": "wrong class",
    "localisation": "poor box",
    "both": "both",
    "duplicate": "duplicate",
    "background": "background",
    "missed": "missed",
}


def split_log(lines: _Lines) -> tuple[_Lines, list[dict[str, Any]]]:
    """Split a log into the lines of steps, and the validations with their step."""
    steps = [line for line in lines if "validation" not in line]
    validated = [line for line in lines if "validation" in line]
    return steps, [{**line["validation"], "step": line["step"]} for line in validated]


def plot_training(log: _Lines, file: str | Path) -> Path:
    """Plot losses, validation AP and learning rate against the step.

    Args:
        log: the lines of ``log.jsonl``.
        file: the PNG to write.
    """
    steps, validations = split_log(log)
    with open_figure(9.0, 5.6, file) as figure:
        axes = figure.subplots(2, 2)
        loss, parts, precision, rate = axes.flat
        _plot_steps(loss, steps, "loss", BLUE, "training")
        tested = [v for v in validations if v.get("loss") is not None]
        if tested:
            x, y = [v["step"] for v in tested], [v["loss"] for v in tested]
            loss.plot(x, y, "o-", color=RED, markersize=3, label="validation")
        loss.set_title("Loss")
        _plot_steps(parts, steps, "loss_classification", BLUE, "classification")
        _plot_steps(parts, steps, "loss_box", ORANGE, "box")
        parts.set_title("Parts of the training loss")
        for axis in (loss, parts):
            _scale_losses(axis)
            add_legend(axis)
        _plot_validations(precision, validations)
        rate.set_title("Learning rate")
        _plot_steps(rate, steps, "lr", GREEN, smooth=False)
        rate.set_ylim(bottom=0)
        for axis in axes.flat:
            _label_steps(axis, log)
    return Path(file)


def plot_running(log: _Lines, file: str | Path) -> Path:
    """Plot speed, data loading, memory and foreground anchors against the step.

    Arguments as for :func:`plot_training`.
    """
    steps, _ = split_log(log)
    panels = {
        "images_per_second": ("Images per second", GREEN),
        "waiting": ("Share of time waiting for data", ORANGE),
        "memory_mb": ("Memory, MB", BLUE),
        "positives": ("Foreground anchors per image", PURPLE),
    }
    with open_figure(9.0, 4.6, file) as figure:
        axes = figure.subplots(2, 2).flat
        for axis, (name, (title, colour)) in zip(axes, panels.items(), strict=True):
            _plot_steps(axis, steps, name, colour)
            axis.set_title(title)
            axis.set_ylim(bottom=0)
            if name == "waiting":
                axis.set_ylim(0, max(0.1, axis.get_ylim()[1]))
                axis.yaxis.set_major_formatter(_PERCENT)
            _label_steps(axis, log)
    return Path(file)


def plot_evaluation(metrics: Metrics, folder: str | Path) -> dict[str, Path]:
    """Write all plots of an evaluation into `folder`.

    Returns:
        files by name: ``precision_recall``, ``classes``, ``errors``, ``confusion``,
        ``calibration``. Empty if there is no ground-truth box.
    """
    if math.isnan(metrics.ap):
        return {}
    plots = {
        "precision_recall": plot_precision_recall,
        "classes": plot_classes,
        "errors": plot_errors,
        "confusion": plot_confusion,
        "calibration": plot_calibration,
    }
    return {name: plot(metrics, Path(folder) / f"{name}.png") for name, plot in plots.items()}


def plot_precision_recall(metrics: Metrics, file: str | Path) -> Path:
    """Plot precision against recall: the mean over classes at three IoUs, and each class at .50."""
    recall = metrics.curves.recall
    pairs = zip(metrics.per_class, metrics.curves.per_class, strict=True)
    shown = [(c, curve) for c, curve in pairs if curve]
    few = len(shown) <= len(COLOURS)
    with open_figure(9.0, 3.8, file) as figure:
        mean, classes = figure.subplots(1, 2, sharey=True)
        values = {"0.50": metrics.ap50, "0.75": metrics.ap75, "0.50:0.95": metrics.ap}
        curves = metrics.curves.precision.items()
        for (iou, curve), colour in zip(curves, (BLUE, GREEN, ORANGE), strict=False):
            mean.plot(recall, curve, color=colour, label=f"IoU {iou}: AP {values[iou]:.3f}")
        mean.set(title="Mean over classes", ylabel="precision")
        for i, (c, curve) in enumerate(shown):
            style: dict[str, Any] = {"color": BLUE, "alpha": 0.25, "linewidth": 0.9}
            if few:
                style = {"color": COLOURS[i], "label": f"{shorten(c.name)}: {c.ap50:.3f}"}
            classes.plot(recall, curve, **style)
        classes.set_title(f"Each class at IoU 0.50{'' if few else f' ({len(shown)} classes)'}")
        for axis in (mean, classes):
            axis.set(xlabel="recall", xlim=(0, 1), ylim=(0, 1.02))
            # Curves of good models leave the lower left free, those of bad ones the upper right.
            add_legend(axis, loc="lower left" if metrics.ap50 > 0.3 else "upper right")
    return Path(file)


def plot_classes(metrics: Metrics, file: str | Path) -> Path:
    """Plot AP and AP50 of each class with objects, best first; of many the best and the worst."""
    classes = [c for c in metrics.per_class if c.objects]
    classes.sort(key=lambda c: (-c.ap, c.name))
    title = "AP by class"
    if len(classes) > _MAX_CLASSES:
        half = _MAX_CLASSES // 2
        title += f": the best and the worst {half} of {len(classes)}"
        classes = classes[:half] + classes[-half:]
    with open_figure(9.0, 1.3 + 0.24 * max(2, len(classes)), file) as figure:
        axis = figure.subplots()
        y = np.arange(len(classes))
        axis.barh(y, [c.ap50 for c in classes], 0.72, color=PALE_BLUE, label="AP50")
        axis.barh(y, [c.ap for c in classes], 0.72, color=BLUE, label="AP")
        for i, c in enumerate(classes):
            text = f"{c.ap:.3f}  ({format_count(c.objects, 'object')})"
            axis.text(max(c.ap50, c.ap) + 0.008, i, text, va="center", fontsize=7.5, color=DARK)
        axis.set_yticks(y, [shorten(c.name) for c in classes])
        axis.set(xlim=(0, 1.16), ylim=(len(classes) - 0.4, -0.6), xlabel="AP", title=title)
        axis.set_xticks(np.linspace(0, 1, 6))
        axis.grid(axis="y", visible=False)
        add_legend(axis, loc="lower right")
    return Path(file)


def plot_errors(metrics: Metrics, file: str | Path) -> Path:
    """Plot the kinds of error (TIDE): AP50 gained without each, and their number."""
    errors = metrics.errors
    gains = [errors.delta_ap[kind] for kind in _ERROR_KINDS]
    counts = [errors.counts[kind] for kind in _ERROR_KINDS]
    with open_figure(9.0, 3.0, file) as figure:
        gain, count = figure.subplots(1, 2, sharey=True)
        y = np.arange(len(_ERROR_KINDS))
        panels = ((gain, gains, "{:.3f}", 0.01), (count, counts, "{:,}", 1))
        for axis, values, form, floor in panels:
            bars = axis.barh(y, values, 0.7, color=COLOURS[: len(values)])
            axis.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=8)
            axis.set_xlim(0, 1.18 * max(*values, floor))
            axis.grid(axis="y", visible=False)
            axis.xaxis.set_major_locator(MaxNLocator(5, prune="upper"))
        gain.set_yticks(y, list(_ERROR_KINDS.values()))
        gain.invert_yaxis()
        gain.set_title(f"AP50 gained without them (now {errors.ap50:.3f})")
        count.set_title("Number of errors, detections of any score")
    return Path(file)


def plot_confusion(metrics: Metrics, file: str | Path) -> Path:
    """Plot the confusion matrix as fractions of a row; of many classes the most confused."""
    matrix = np.array(metrics.confusion.matrix, dtype=np.int64)
    count = len(metrics.confusion.classes)
    names = [*(shorten(name) for name in metrics.confusion.classes), "background"]
    title = f"Detections over {metrics.confusion.score_threshold:.2f}, matched at IoU 0.50"
    kept = list(range(count + 1))
    if count > _MAX_CONFUSED:
        confused = matrix[:count, :count].copy()
        np.fill_diagonal(confused, 0)
        confusions = confused.sum(axis=0) + confused.sum(axis=1)
        order = np.lexsort((np.arange(count), -matrix[:count].sum(axis=1), -confusions))
        kept = [*sorted(order[:_MAX_CONFUSED].tolist()), count]
        title += f"\nthe {_MAX_CONFUSED} of {count} classes most often confused"
    # Rows add up over all classes: fractions are computed before the cut.
    fractions = (matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1))[np.ix_(kept, kept)]
    counts = matrix[np.ix_(kept, kept)]
    labels = [names[i] for i in kept]
    side = 2.2 + 0.36 * len(labels)
    with open_figure(max(4.6, side + 0.8), max(4.0, side), file) as figure:
        axis = figure.subplots()
        image = axis.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
        size = 6 if len(labels) > 12 else 8
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if fractions[row, column] > 0.55 else DARK
            text = format_compact(int(counts[row, column]))
            axis.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
        axis.set_xticks(range(len(labels)), labels, rotation=45, ha="right", rotation_mode="anchor")
        axis.set_yticks(range(len(labels)), labels)
        axis.axhline(len(labels) - 1.5, color="#999999", linewidth=0.8)
        axis.axvline(len(labels) - 1.5, color="#999999", linewidth=0.8)
        axis.set(xlabel="detected as (background: missed)", ylabel="ground truth", title=title)
        axis.grid(visible=False)
        bar = figure.colorbar(image, ax=axis, shrink=0.7, format=_PERCENT)
        bar.set_label("fraction of the row")
        bar.outline.set_visible(False)
    return Path(file)


def plot_calibration(metrics: Metrics, file: str | Path) -> Path:
    """Plot precision against score, and the number of detections."""
    bins = [b for b in metrics.calibration.bins if b.detections]
    counts = [b.detections for b in bins]
    precision = [b.precision for b in bins]
    with open_figure(5.2, 4.4, file) as figure:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1, label="perfectly calibrated")
        centres = [(b.lower + b.upper) / 2 for b in bins]
        widths = [0.9 * (b.upper - b.lower) for b in bins]
        upper.bar(centres, precision, widths, color=PALE_BLUE)
        scores = [b.score for b in bins]
        upper.plot(scores, precision, "o-", color=BLUE, markersize=4, label="correct at IoU 0.50")
        upper.set(ylim=(0, 1.02), ylabel="fraction correct")
        upper.set_title(f"Calibration: mean error {metrics.calibration.expected_error:.3f}")
        figure.legend(loc="outside lower center", ncols=2)
        lower.bar(centres, counts, widths, color=GREY)
        if max(counts, default=1) > 100 * min(counts, default=1):
            lower.set_yscale("log")
        lower.set(xlabel="score", ylabel="detections", xlim=(0, 1))
    return Path(file)


def plot_object_sizes(splits: Mapping[str, Dataset], file: str | Path) -> Path:
    """Plot the sizes of each split's objects, and the number of objects per image."""
    sides = {name: _sides(dataset) for name, dataset in splits.items()}
    counts = {
        name: [sum(not a.ignored for a in image.annotations) for image in dataset.images]
        for name, dataset in splits.items()
    }
    all_sides = np.concatenate([*sides.values(), np.empty(0)])
    low, high = (all_sides.min(), all_sides.max()) if all_sides.size else (1.0, 100.0)
    edges = np.geomspace(max(low, 1) * 0.95, max(high, 2) * 1.05, 41)
    largest = max((max(count, default=0) for count in counts.values()), default=0)
    width = math.ceil((largest + 1) / 40)
    with open_figure(9.0, 3.2, file) as figure:
        sizes, crowding = figure.subplots(1, 2)
        panels: tuple[tuple[Any, Mapping[str, Any], Any, str], ...] = (
            (sizes, sides, edges, "object"),
            (crowding, counts, np.arange(-0.5, largest + width, width), "image"),
        )
        for axis, by_split, bins, noun in panels:
            colours = cycle_colours(len(by_split))
            for (name, values), colour in zip(by_split.items(), colours, strict=True):
                if len(values):
                    weights = np.full(len(values), 1 / len(values))
                    label = f"{name} ({format_count(len(values), noun)})"
                    style = {"histtype": "step", "color": colour, "label": label}
                    axis.hist(values, bins, weights=weights, **style)
            axis.yaxis.set_major_formatter(_PERCENT)
            add_legend(axis)
        for limit in (SMALL, LARGE):
            sizes.axvline(limit, color=GREY, linestyle=":", linewidth=1)
        sizes.set(xscale="log", xlabel="square root of area, pixels", title="Object sizes")
        powers = [2**power for power in range(1, 13)]
        sizes.set_xticks([x for x in powers if edges[0] <= x <= edges[-1]], minor=False)
        sizes.set_xticks([], minor=True)
        sizes.xaxis.set_major_formatter("{x:.0f}")
        crowding.set(xlabel="objects", title="Objects per image")
        crowding.xaxis.set_major_locator(MaxNLocator(integer=True))
    return Path(file)


def _plot_steps(
    axis: Any, steps: _Lines, name: str, colour: str, label: str = "", *, smooth: bool = True
) -> None:
    """Plot a value by step: its mean over 2% of the steps, over the pale values themselves."""
    values = [(line["step"], line.get(name)) for line in steps]
    points = [(x, y) for x, y in values if y is not None and math.isfinite(y)]
    if not points:
        return
    x, y = np.array(points, dtype=np.float64).T
    if smooth and len(x) >= 20:
        axis.plot(x, y, color=colour, alpha=0.22, linewidth=0.7)
        y = moving_mean(y, max(3, len(y) // 50))
    axis.plot(x, y, color=colour, label=label)


def moving_mean(values: _Array, width: int) -> _Array:
    """Centred mean of `width` values; of fewer at the ends."""
    total, count = (np.convolve(x, np.ones(width), "same") for x in (values, np.ones(len(values))))
    mean: _Array = total / count
    return mean


def _plot_validations(axis: Any, validations: _Lines) -> None:
    axis.set_title("Validation AP")
    known = [v for v in validations if v.get("ap") is not None]
    if not known:
        axis.text(0.5, 0.5, "not validated", ha="center", color=GREY, transform=axis.transAxes)
        axis.set_yticks([])
        return
    best = max(v["ap"] for v in known)
    for name, colour, label in (("ap50", SKY, "AP50"), ("ap", BLUE, f"AP, best {best:.3f}")):
        y = [v.get(name, math.nan) for v in known]
        axis.plot([v["step"] for v in known], y, "o-", color=colour, markersize=3, label=label)
    top = max((v.get("ap50") or 0.0 for v in known), default=0.0)
    axis.set_ylim(0, min(1.02, max(0.1, 1.2 * top)))
    add_legend(axis, loc="lower right" if top > 0.1 else "upper left")


def _scale_losses(axis: Any) -> None:
    """Use a logarithmic axis if the values span more than a factor of twenty."""
    values = np.concatenate([line.get_ydata() for line in axis.get_lines()] or [np.empty(0)])
    values = values[np.isfinite(values) & (values > 0)]
    if values.size and np.quantile(values, 0.999) > 20 * np.quantile(values, 0.05):
        axis.set_yscale("log")
    elif values.size:
        axis.set_ylim(0, 1.1 * float(np.quantile(values, 0.995)))


def _label_steps(axis: Any, log: _Lines) -> None:
    # The markers of the last step are not cut off.
    axis.set_xlim(0, 1.015 * max([1, *(line["step"] for line in log)]))
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.xaxis.set_major_formatter(lambda value, _: format_compact(round(value)))
    axis.set_xlabel("step")


def _sides(dataset: Dataset) -> _Array:
    """Square roots of the areas of valid boxes that are not ignored."""
    boxes = np.array(
        [a.box for image in dataset.images for a in image.annotations if not a.ignored],
        dtype=np.float64,
    ).reshape(-1, 4)
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    valid = np.isfinite(boxes).all(axis=1) & (width > 0) & (height > 0)
    return np.sqrt(width[valid] * height[valid])
