"""Figures 2 and 4 of the paper (Lin et al. 2017) for measured models, as PNG and SVG."""

from __future__ import annotations

import math
import string
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.ticker import PercentFormatter

from retinanet.report.figure import DARK, GREY, Files, cycle_colours, open_axes, shorten_start
from retinanet.report.loss_distribution import LossDistribution
from retinanet.report.speed_accuracy import SpeedAccuracy


def plot_loss_distribution(
    result: LossDistribution,
    stem: str | Path,
    *,
    title: str = "",
    published: tuple[float, float] | None = None,
) -> Files:
    """Figure 4: cumulative share of the loss over positives and over negatives.

    `published` is the paper's (fraction, cumulative share) of the positives.
    """
    panels = (
        ("positives", result.positives, result.positives_taken, result.positive_anchors),
        ("negatives", result.negatives, result.negatives_taken, result.negative_anchors),
    )
    with open_axes(9.4, 4.0, stem, 2) as (files, axes):
        for axis, (kind, curves, taken, total) in zip(axes, panels, strict=True):
            for curve, colour in zip(curves, cycle_colours(len(curves)), strict=True):
                label = f"γ = {curve.gamma:g}"
                axis.plot(result.fractions, curve.cumulative, color=colour, label=label)
            share = "" if taken == total else f" of {total:,}"
            axis.set(xlim=(0, 1), ylim=(0, 1.01), xlabel=f"fraction of {kind}, easiest first")
            axis.set(ylabel="cumulative share of the loss")
            axis.set_title(f"{kind.capitalize()}: {taken:,} anchors{share}")
            for side in (axis.xaxis, axis.yaxis):
                side.set_major_formatter(PercentFormatter(1.0, decimals=0))
            if kind == "positives" and published:
                axis.plot(*published, "x", color=DARK, markersize=8, label="the paper")
            axis.legend(loc="upper left")
        if title:
            axes[0].figure.suptitle(title, fontsize=10)
    return files


@dataclass(frozen=True, slots=True)
class SpeedMark:
    """A point of Figure 2: AP in points, 0 to 100, and milliseconds with quartiles if known.

    Points of a series are joined; a series of one point is a detector by itself.
    """

    series: str
    milliseconds: float
    ap: float
    label: str = ""
    low: float | None = None
    high: float | None = None


def speed_marks(result: SpeedAccuracy) -> tuple[SpeedMark, ...]:
    """Points of a measurement, in points of AP; those without AP are left out."""
    return tuple(
        SpeedMark(
            point.model,
            point.milliseconds,
            100 * point.metrics["AP"],
            str(point.scale),
            point.milliseconds_low,
            point.milliseconds_high,
        )
        for point in result.points
        if math.isfinite(point.metrics["AP"])
    )


def plot_speed_accuracy(
    measured: Sequence[SpeedMark],
    stem: str | Path,
    *,
    published: Sequence[SpeedMark] = (),
    data: str = "",
    machine: str = "",
) -> Files:
    """Figure 2: AP against milliseconds per image, measured and published in panels of their own.

    Raises:
        ValueError: there is no point.
    """
    title = f"Measured here{': ' if data else ''}{shorten_start(data)}"
    panels = [
        ("The paper: COCO test-dev, Nvidia M40", "COCO AP", "", published),
        (title, "AP", machine, measured),
    ]
    panels = [panel for panel in panels if panel[-1]]
    if not panels:
        raise ValueError("there is no point to draw: give measured or published ones")
    series = max(len({mark.series for mark in marks}) for marks in (published, measured))
    lines = textwrap.wrap(machine, 60)
    size = 5.6 * len(panels), 4.2 + 0.18 * math.ceil(series / 2) + 0.25 * len(lines)
    with open_axes(*size, stem, len(panels), squeeze=False) as (files, axes):
        for axis, (name, ylabel, below, marks) in zip(axes[0], panels, strict=True):
            _plot_speed(axis, marks, len(lines) if below else 0)
            xlabel = "\n".join(["inference time, ms per image", *(lines if below else ())])
            axis.set(title=name, xlabel=xlabel, ylabel=ylabel)
    return files


def _plot_speed(axis: Any, marks: Sequence[SpeedMark], lines: int) -> None:
    """Plot points, with the legend below an axis label of so many further lines."""
    series: dict[str, list[SpeedMark]] = {mark.series: [] for mark in marks}
    for mark in sorted(marks, key=lambda mark: mark.milliseconds):
        series[mark.series].append(mark)
    joined = [points for points in series.values() if len(points) > 1]
    single = [points[0] for points in series.values() if len(points) == 1]
    slowest = max(mark.high or mark.milliseconds for mark in marks)
    low, high = min(mark.ap for mark in marks), max(mark.ap for mark in marks)
    margin = 0.12 * max(5.0, high - low)
    axis.set(xlim=(0, 1.1 * slowest), ylim=(max(0, low - margin), high + margin))
    for i, (points, colour) in enumerate(zip(joined, cycle_colours(len(joined)), strict=True)):
        x, y = [mark.milliseconds for mark in points], [mark.ap for mark in points]
        axis.plot(x, y, "o-", color=colour, markersize=4, label=shorten_start(points[0].series))
        for mark in points:
            # Labels of series that are near each other are on other sides of their lines.
            side = {"xytext": (12, -8) if i % 2 else (-12, 8), "textcoords": "offset points"}
            style = {"ha": "center", "va": "center", "fontsize": 7, "color": colour}
            axis.annotate(mark.label, (mark.milliseconds, mark.ap), **side, **style)
            _plot_quartiles(axis, mark, colour)
    for i, mark in enumerate(single):
        letter = string.ascii_uppercase[i % 26] + str(i // 26 or "")  # A, B, .. Z, A1, ..
        _plot_quartiles(axis, mark, GREY)
        point = (mark.milliseconds, mark.ap)
        axis.plot(*point, "o", color="white", markeredgecolor=GREY, markersize=13)
        axis.annotate(letter, point, ha="center", va="center", fontsize=7.5, color=DARK)
        scale = f" {mark.label}" if mark.label else ""
        label = f"{shorten_start(mark.series)}{scale}: {mark.ap:.1f}, {mark.milliseconds:.0f} ms"
        axis.plot([], [], " ", label=f"{letter}  {label}")
    # Below the axis, where it covers no point.
    below = (0.5, -0.16 - 0.05 * lines)
    axis.legend(loc="upper center", bbox_to_anchor=below, ncols=2, fontsize=7.5)


def _plot_quartiles(axis: Any, mark: SpeedMark, colour: str) -> None:
    if mark.low is not None and mark.high is not None:
        axis.plot([mark.low, mark.high], [mark.ap, mark.ap], color=colour, linewidth=0.9)
