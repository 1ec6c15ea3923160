"""The paper's figures with its axes, and its tables as images; each as PNG and SVG.

Source: Lin et al. 2017, Figures 1 to 7. The data comes from :mod:`retinanet.paper.figures`, from
measurements (:mod:`retinanet.evaluation`), and from the paper.
"""

from __future__ import annotations

import math
import string
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.path import Path as MarkerPath
from matplotlib.textpath import TextPath
from matplotlib.ticker import MaxNLocator, PercentFormatter

from retinanet.report.figure import (
    BLUE,
    DARK,
    GREEN,
    GREY,
    ORANGE,
    RED,
    SKY,
    cycle_colours,
    open_figure,
    shorten,
    shorten_start,
)
from retinanet.report.loss_distribution import LossCurve, LossDistribution
from retinanet.report.speed_accuracy import SpeedAccuracy

_WELL_CLASSIFIED = 0.6  # start of Figure 1's brace
_MAX_NAMED = 6  # settings named in Figure 7's legend


class Files(NamedTuple):
    """Written files."""

    png: Path
    svg: Path


@dataclass(frozen=True, slots=True)
class Curve:
    """A curve of a figure: label of the legend, and points."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class StarCurve:
    """FL* with one setting.

    Attributes:
        gamma, beta: the setting.
        x, y: x_t and loss.
        effective: True if AP was over 33.5 in the paper, or the equivalent here; None: unknown.
    """

    gamma: float
    beta: float
    x: tuple[float, ...]
    y: tuple[float, ...]
    effective: bool | None


@dataclass(frozen=True, slots=True)
class Convolution:
    """A convolution with a kernel of `kernel` x `kernel` pixels."""

    kernel: int
    stride: int
    in_channels: int
    out_channels: int


@dataclass(frozen=True, slots=True)
class Level:
    """A feature map.

    Attributes:
        name: ``C3`` or ``P3``.
        stride: pixels of the image per cell.
        channels, height, width: shape for the image.
        source: name of its input: ``C3`` for P3, besides the top-down one; empty for C levels.
        convolution: applied to `source`; None for C levels.
        output: applied after the top-down sum; None without one.
    """

    name: str
    stride: int
    channels: int
    height: int
    width: int
    source: str = ""
    convolution: Convolution | None = None
    output: Convolution | None = None


@dataclass(frozen=True, slots=True)
class Subnet:
    """A head, shared by all levels.

    Attributes:
        convolutions: in order.
        per_cell: anchors per cell.
        outputs: values per anchor: K classes, or 4 of a box.
    """

    convolutions: tuple[Convolution, ...]
    per_cell: int
    outputs: int


@dataclass(frozen=True, slots=True)
class Architecture:
    """A network as Figure 3 shows it.

    Attributes:
        backbone: name.
        height, width: of the image, padded to multiples of 32.
        maps: of the backbone that the pyramid takes, finest first.
        levels: of the pyramid, finest first.
        class_subnet, box_subnet: the heads.
        anchors: in the image, all levels together.
        parameters: of the network.
    """

    backbone: str
    height: int
    width: int
    maps: tuple[Level, ...]
    levels: tuple[Level, ...]
    class_subnet: Subnet
    box_subnet: Subnet
    anchors: int
    parameters: int


@dataclass(frozen=True, slots=True)
class SpeedMark:
    """A point of Figure 2.

    Attributes:
        series: points of a series are joined; a series of one point is a detector by itself.
        milliseconds: per image.
        ap: in points, 0 to 100.
        label: text next to the point, such as the scale.
        low, high: quartiles of the milliseconds; None: unknown.
    """

    series: str
    milliseconds: float
    ap: float
    label: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row of a table, as measured and as published; in points of AP.

    Attributes:
        label: its name.
        measured: mean AP over seeds; None: not run.
        deviation: standard deviation over seeds; None: one seed.
        published: the paper's AP; None: the paper has no such row.
    """

    label: str
    measured: float | None
    deviation: float | None = None
    published: float | None = None


def plot_focal_loss(curves: Sequence[Curve], file: str | Path) -> Files:
    """Figure 1: loss against the probability of the ground truth class.

    Args:
        curves: one per gamma.
        file: path of both files; its suffix .png or .svg is replaced, as in all functions here.
    """
    with _open(5.4, 4.1, file) as (figure, files):
        axis = figure.subplots()
        for curve, colour in zip(curves, cycle_colours(len(curves)), strict=True):
            axis.plot(curve.x, curve.y, color=colour, label=curve.label)
        axis.set(xlim=(0, 1), ylim=(0, 5), title="Focal loss")
        axis.set(xlabel="probability of ground truth class", ylabel="loss")
        axis.set_xticks(np.linspace(0, 1, 6))
        axis.axvspan(_WELL_CLASSIFIED, 1, color=GREEN, alpha=0.07, linewidth=0)
        ends = {"arrowstyle": "<->", "color": DARK, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
        axis.annotate("", (_WELL_CLASSIFIED, 1.3), (1, 1.3), arrowprops=ends)
        middle = (1 + _WELL_CLASSIFIED) / 2
        axis.text(middle, 1.42, "well-classified\nexamples", ha="center", color=DARK)
        axis.text(0.2, 4.62, "CE(p) = -log(p)", color=DARK)
        axis.text(0.2, 4.28, "FL(p) = -(1 - p)ᵞ log(p)", color=DARK)
        axis.legend(loc="upper right")
    return files


def plot_speed_accuracy(
    measured: Sequence[SpeedMark],
    file: str | Path,
    *,
    published: Sequence[SpeedMark] = (),
    where: str = "",
    machine: str = "",
) -> Files:
    """Figure 2: AP against milliseconds per image.

    Points measured on other data and another machine have a panel of their own.

    Args:
        measured: may be empty if `published` is given.
        published: the paper's points; may be empty.
        where: data of the measurement, for the panel's title.
        machine: machine of the measurement, for the axis' label.

    Raises:
        ValueError: there is no point.
    """
    panels = bool(published) + bool(measured)
    if not panels:
        raise ValueError("there is no point to draw: give measured or published ones")
    series = max(len({mark.series for mark in marks}) for marks in (published, measured))
    label = _wrapped("inference time, ms per image", machine)
    lines = label.count("\n")
    height = 4.2 + 0.18 * math.ceil(series / 2) + 0.25 * lines
    with _open(5.6 * panels, height, file) as (figure, files):
        axes = list(np.atleast_1d(figure.subplots(1, panels)))
        if published:
            axis = axes.pop(0)
            _plot_speed(axis, published)
            axis.set(title="The paper: COCO test-dev, Nvidia M40")
            axis.set(xlabel="inference time, ms per image", ylabel="COCO AP")
        if measured:
            axis = axes.pop(0)
            _plot_speed(axis, measured, lines)
            axis.set(title=f"Measured here{': ' if where else ''}{shorten_start(where)}")
            axis.set(xlabel=label, ylabel="AP")
    return files


def speed_marks(result: SpeedAccuracy) -> tuple[SpeedMark, ...]:
    """Points of a measurement, in points of AP; those without AP are left out."""
    return tuple(
        SpeedMark(
            point.model,
            point.milliseconds,
            100 * point.ap,
            str(point.scale),
            point.milliseconds_low,
            point.milliseconds_high,
        )
        for point in result.points
        if math.isfinite(point.ap)
    )


def plot_architecture(network: Architecture, file: str | Path) -> Files:
    """Figure 3: backbone, pyramid with its top-down path, and the two subnets."""
    with _open(13.0, 1.5 + 0.95 * len(network.levels), file) as (figure, files):
        axis = figure.subplots()
        axis.axis("off")
        drawing = _Drawing(axis)
        _draw_maps(drawing, network)
        _draw_levels(drawing, network)
        _draw_subnets(drawing, network)
        axis.set(xlim=(-0.2, 26.2), ylim=(-1.25, _ROW * (len(network.levels) - 1) + 1.1))
        axis.set_title(
            f"{network.backbone}, an image of {network.height} x {network.width} pixels: "
            f"{network.anchors:,} anchors, {network.parameters / 1e6:.1f} million weights"
        )
    return files


def plot_loss_distribution(
    result: LossDistribution,
    file: str | Path,
    *,
    title: str = "",
    published: Sequence[tuple[float, float]] = (),
) -> Files:
    """Figure 4: cumulative share of the loss over positives and over negatives.

    Args:
        result: of one model.
        file: path of both files.
        title: above both panels, such as the model's name.
        published: the paper's points (fraction, cumulative share) of the positives; its text says
            that the hardest 20% account for about half of the loss, (.8, .5).
    """
    panels = (
        ("positives", result.positives, result.positives_taken, result.positive_anchors),
        ("negatives", result.negatives, result.negatives_taken, result.negative_anchors),
    )
    with _open(9.4, 4.0, file) as (figure, files):
        for axis, (kind, curves, taken, total) in zip(figure.subplots(1, 2), panels, strict=True):
            _plot_distribution(axis, result.fractions, curves)
            share = "" if taken == total else f" of {total:,}"
            axis.set(xlabel=f"fraction of {kind}, easiest first")
            axis.set_title(f"{kind.capitalize()}: {taken:,} anchors{share}")
            if kind == "positives" and published:
                x, y = zip(*published, strict=True)
                axis.plot(x, y, "x", color=DARK, markersize=8, label="the paper")
            axis.legend(loc="upper left")
        if title:
            figure.suptitle(title, fontsize=10)
    return files


def plot_loss_variants(curves: Sequence[Curve], file: str | Path) -> Files:
    """Figure 5: losses against x_t = y x."""
    with _open(5.4, 4.1, file) as (figure, files):
        axis = figure.subplots()
        _plot_lines(axis, curves)
        axis.set(ylim=(0, 6), ylabel="loss", title="Variants of the focal loss")
    return files


def plot_loss_slopes(curves: Sequence[Curve], file: str | Path) -> Files:
    """Figure 6: derivatives of the losses with respect to x, for y = 1."""
    with _open(5.4, 4.1, file) as (figure, files):
        axis = figure.subplots()
        _plot_lines(axis, curves)
        low = min((min(curve.y) for curve in curves), default=-1.0)
        axis.set(ylim=(1.06 * low, 0.06), ylabel="gradient", title="Derivatives of the losses")
    return files


def plot_star_grid(curves: Sequence[StarCurve], file: str | Path, bar: str = "") -> Files:
    """Figure 7: FL* over a grid of gamma and beta, by whether training with it is effective.

    Args:
        curves: one per setting.
        file: path of both files.
        bar: criterion of effective, for the legend: ``AP over 33.5``.
    """
    kinds: tuple[tuple[bool | None, str, str], ...] = (
        (None, "unknown", "#B9BEC6"),
        (False, "not effective", ORANGE),
        (True, "effective", BLUE),
    )
    with _open(5.4, 4.1, file) as (figure, files):
        axis = figure.subplots()
        for kind, name, colour in kinds:
            chosen = [curve for curve in curves if curve.effective is kind]
            label = f"{name}{f' ({bar})' if bar and kind else ''}: {len(chosen)}"
            if kind and len(chosen) <= _MAX_NAMED:
                names = (f"γ = {curve.gamma:g}, β = {curve.beta:g}" for curve in chosen)
                label = "\n".join([label, *names])
            width = 1.0 if kind is None else 1.6
            for i, curve in enumerate(chosen):
                axis.plot(curve.x, curve.y, color=colour, linewidth=width, label="" if i else label)
        axis.set(ylim=(0, 6), ylabel="loss", xlabel="xₜ = y x", title="FL* by γ and β")
        axis.margins(x=0)
        axis.legend(loc="upper right")
    return files


def plot_table(
    rows: Sequence[TableRow], file: str | Path, *, title: str = "", measured_on: str = ""
) -> Files:
    """Plot a table as two panels with the same rows: as measured and as published.

    Args:
        rows: from the top down.
        file: path of both files.
        title: above both panels.
        measured_on: data and number of steps, below the left panel.
    """
    with _open(9.4, 1.5 + 0.3 * max(1, len(rows)), file) as (figure, files):
        here, paper = figure.subplots(1, 2, sharey=True)
        _plot_rows(here, [(row.measured, row.deviation) for row in rows], BLUE, "not run")
        _plot_rows(paper, [(row.published, None) for row in rows], RED, "not in the paper")
        here.set_yticks(np.arange(len(rows)), [shorten(row.label, 40) for row in rows])
        here.set_ylim(len(rows) - 0.4, -0.6)
        here.set(title="Measured here", xlabel=_wrapped("AP, mean ± std over seeds", measured_on))
        paper.set(title="The paper", xlabel="AP")
        if title:
            figure.suptitle(title, fontsize=11)
    return files


@contextmanager
def _open(width: float, height: float, file: str | Path) -> Iterator[tuple[Figure, Files]]:
    stem = Path(file)
    if stem.suffix in (".png", ".svg"):
        stem = stem.with_suffix("")
    files = Files(*(stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")))
    with open_figure(width, height, *files) as figure:
        yield figure, files


def _wrapped(label: str, text: str) -> str:
    """Axis label with a wrapped text below it."""
    return "\n".join([label, *textwrap.wrap(text, 60)])


def _plot_lines(axis: Any, curves: Sequence[Curve]) -> None:
    for i, (curve, colour) in enumerate(zip(curves, cycle_colours(len(curves)), strict=True)):
        # Dashes show a curve below another.
        style = ("-", "-", "--", "-.")[i % 4]
        axis.plot(curve.x, curve.y, style, color=colour, label=curve.label)
    axis.set_xlabel("xₜ = y x")
    axis.margins(x=0)
    axis.legend()


def _plot_distribution(axis: Any, fractions: Sequence[float], curves: Sequence[LossCurve]) -> None:
    for curve, colour in zip(curves, cycle_colours(len(curves)), strict=True):
        axis.plot(fractions, curve.cumulative, color=colour, label=f"γ = {curve.gamma:g}")
    axis.set(xlim=(0, 1), ylim=(0, 1.01), ylabel="cumulative share of the loss")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _plot_speed(axis: Any, marks: Sequence[SpeedMark], lines: int = 0) -> None:
    """Plot points, with the legend below an axis label of so many further lines."""
    series: dict[str, list[SpeedMark]] = {mark.series: [] for mark in marks}
    for mark in sorted(marks, key=lambda mark: mark.milliseconds):
        series[mark.series].append(mark)
    joined = {name: points for name, points in series.items() if len(points) > 1}
    single = [points[0] for points in series.values() if len(points) == 1]
    slowest = max(mark.high or mark.milliseconds for mark in marks)
    low, high = min(mark.ap for mark in marks), max(mark.ap for mark in marks)
    margin = 0.12 * max(5.0, high - low)
    limits = (0, 1.1 * slowest, max(0, low - margin), high + margin)
    axis.set(xlim=limits[:2], ylim=limits[2:])
    shifts = place_labels(list(series.values()), limits)
    for (name, points), colour in zip(joined.items(), cycle_colours(len(joined)), strict=True):
        x, y = [mark.milliseconds for mark in points], [mark.ap for mark in points]
        axis.plot(x, y, "o-", color=colour, markersize=4, label=shorten_start(name))
        for mark in points:
            _plot_quartiles(axis, mark, colour)
            at = (mark.milliseconds, mark.ap)
            style = {"ha": "center", "va": "center", "fontsize": 7, "color": colour}
            axis.annotate(mark.label, at, shifts[mark], textcoords="offset points", **style)
    for mark, letter in zip(single, letters(len(single)), strict=True):
        _plot_quartiles(axis, mark, GREY)
        x, y = [mark.milliseconds], [mark.ap]
        axis.plot(x, y, "o", color="white", markeredgecolor=GREY, markersize=12)
        scale = f" {mark.label}" if mark.label else ""
        label = f"{shorten_start(mark.series)}{scale}: {mark.ap:.1f}, {mark.milliseconds:.0f} ms"
        style = {"marker": _letter_marker(letter), "linestyle": "", "markeredgewidth": 0}
        axis.plot(x, y, color=DARK, markersize=7, label=label, **style)
    # Below the axis, where it covers no point.
    below = (0.5, -0.16 - 0.05 * lines)
    axis.legend(loc="upper center", bbox_to_anchor=below, ncols=2, fontsize=7.5)


def place_labels(
    series: Sequence[Sequence[SpeedMark]], limits: tuple[float, float, float, float]
) -> Mapping[SpeedMark, tuple[float, float]]:
    """Offset of each label from its point, away from points, lines and other labels.

    Args:
        series: joined points, in order.
        limits: of the axis: x from and to, y from and to.

    Returns:
        (x, y) in typographic points, 1/72 inch.
    """
    left, right, bottom, top = limits
    width, height = 340.0, 220.0  # of an axis

    def position(mark: SpeedMark) -> tuple[float, float]:
        x = (mark.milliseconds - left) / (right - left) * width
        return x, (mark.ap - bottom) / (top - bottom) * height

    occupied: list[tuple[float, float]] = []
    for points in series:
        positions = [position(mark) for mark in points]
        occupied += positions
        for start, end in pairwise(positions):
            occupied += [tuple(xy) for xy in np.linspace(start, end, 13)[1:-1].tolist()]
    offsets: dict[SpeedMark, tuple[float, float]] = {}
    for mark in (mark for points in series if len(points) > 1 for mark in points):
        x, y = position(mark)
        others = [other for other in occupied if other != (x, y)]

        def distance(offset: tuple[float, float], x: float = x, y: float = y,
                     others: list[tuple[float, float]] = others) -> float:  # fmt: skip
            # Labels are about twice as wide as high.
            return min(
                (math.hypot((x + offset[0] - a) / 2, y + offset[1] - b) for a, b in others),
                default=0.0,
            )

        offsets[mark] = max(_OFFSETS, key=distance)
        occupied.append((x + offsets[mark][0], y + offsets[mark][1]))
    return offsets


_OFFSETS = ((13.0, -8.0), (-13.0, 8.0), (13.0, 8.0), (-13.0, -8.0), (0.0, -10.0), (0.0, 10.0))


def _plot_quartiles(axis: Any, mark: SpeedMark, colour: str) -> None:
    if mark.low is not None and mark.high is not None:
        axis.plot([mark.low, mark.high], [mark.ap, mark.ap], color=colour, linewidth=0.9)


def _letter_marker(letter: str) -> MarkerPath:
    """Make a marker of the letter; "$A$" needs math, which is off."""
    text = TextPath((0, 0), letter)
    corners = text.get_extents().get_points()
    return MarkerPath(text.vertices - corners.mean(axis=0), text.codes)


def letters(count: int) -> list[str]:
    """Return A, B, .. Z, A1, .."""
    alphabet = string.ascii_uppercase
    return [alphabet[i % 26] + (str(i // 26) if i >= 26 else "") for i in range(count)]


def _plot_rows(
    axis: Any, values: Sequence[tuple[float | None, float | None]], colour: str, missing: str
) -> None:
    """Plot (value, deviation) per row, from the top down."""
    known = [value for value, _ in values if value is not None and math.isfinite(value)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    deviation = max((d or 0.0 for _, d in values), default=0.0)
    margin = max(high - low + 2 * deviation, 1.0)
    left, right = max(0.0, low - deviation - 0.08 * margin), high + deviation + 0.24 * margin
    axis.set_xlim(left, right)
    for i, (value, spread) in enumerate(values):
        if value is None or not math.isfinite(value):
            x = left + 0.02 * (right - left)
            axis.text(x, i, missing, va="center", fontsize=8, color=GREY)
            continue
        error = ""
        if spread is not None:
            axis.errorbar(value, i, xerr=spread, color=colour, capsize=2.5, linewidth=1.1)
            error = f" ± {spread:.1f}"
        fill = colour if value == high else "white"
        axis.plot([value], [i], "o", color=fill, markeredgecolor=colour, markersize=5.5,
                  clip_on=False, zorder=3)  # fmt: skip
        style = {"va": "center", "fontsize": 8, "color": DARK}
        weight = "bold" if value == high else "normal"
        axis.annotate(f"{value:.1f}{error}", (value + (spread or 0.0), i), (7, 0),
                      textcoords="offset points", fontweight=weight, **style)  # fmt: skip
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.tick_params(axis="y", length=0)


_ROW = 1.5  # distance between levels, in units of the drawing
_HEIGHT = 0.95  # of a level's box
_MAPS, _LEVELS, _HEADS, _DETAILS = 2.4, 9.2, 14.2, 17.6  # column centres; last: left edge


class _Drawing:
    """Boxes, arrows and texts of Figure 3."""

    def __init__(self, axis: Any) -> None:
        self._axis = axis

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        self._axis.text(x, y, text, **{"fontsize": 8.5, "color": DARK, **style})

    def title(self, x: float, y: float, text: str, **style: Any) -> None:
        self.text(x, y, text, fontsize=9.5, fontweight="bold", **style)

    def box(self, x: float, y: float, size: tuple[float, float], text: str, colour: str) -> None:
        width, height = size
        self._axis.add_patch(
            FancyBboxPatch(
                (x - width / 2, y - height / 2),
                width,
                height,
                boxstyle="round,pad=0,rounding_size=0.12",
                facecolor=f"{colour}30",
                edgecolor=colour,
                linewidth=1.1,
            )
        )
        self.text(x, y, text, ha="center", va="center")

    def arrow(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        colour: str = DARK,
        **style: Any,
    ) -> None:
        style = {"arrowstyle": "-|>", "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0,
                 "mutation_scale": 9, "color": colour, **style}  # fmt: skip
        self._axis.annotate("", end, start, arrowprops=style)


def _map_width(index: int) -> float:
    return 4.6 - 0.55 * index


def _level_width(index: int) -> float:
    return 4.4 - 0.25 * index


def _draw_maps(drawing: _Drawing, network: Architecture) -> None:
    """Draw the backbone's maps, each next to the level of the same stride."""
    rows = {level.name[1:]: _ROW * i for i, level in enumerate(network.levels)}
    drawing.arrow((_MAPS, -1.05), (_MAPS, -_HEIGHT / 2), GREY)
    drawing.text(_MAPS + 0.2, -0.95, f"image 3 x {network.height} x {network.width}")
    for i, level in enumerate(network.maps):
        y = rows[level.name[1:]]
        drawing.box(_MAPS, y, (_map_width(i), _HEIGHT), _shape(level), ORANGE)
        if i:
            drawing.arrow((_MAPS, y - _ROW + _HEIGHT / 2), (_MAPS, y - _HEIGHT / 2), GREY)
    drawing.title(0.0, max(rows.values()) + _HEIGHT / 2 + 0.25, "backbone")


def _draw_levels(drawing: _Drawing, network: Architecture) -> None:
    """Draw the pyramid's levels, their sources, and the heads."""
    rows = {level.name: _ROW * i for i, level in enumerate(network.levels)}
    rights = {f"C{level.name[1:]}": _MAPS + _map_width(i) / 2
              for i, level in enumerate(network.maps)}  # fmt: skip
    label_x = _MAPS + 3.55
    for i, level in enumerate(network.levels):
        y, width = rows[level.name], _level_width(i)
        drawing.box(_LEVELS, y, (width, _HEIGHT), _shape(level), SKY)
        drawing.arrow((_LEVELS + width / 2, y), (_HEADS - 1.15, y), GREY)
        drawing.box(_HEADS, y, (2.3, _HEIGHT), "class + box\nsubnets", GREEN)
        left, kernel = _LEVELS - width / 2, _kernel(level.convolution)
        if level.output is not None:  # lateral connection, and the level above added to it
            drawing.arrow((rights[level.source], y), (left, y))
            drawing.text(label_x, y + 0.12, kernel, ha="center")
            above = network.levels[i + 1] if i + 1 < len(network.levels) else None
            if above is not None and above.output is not None:
                drawing.arrow((_LEVELS, y + _ROW - _HEIGHT / 2), (_LEVELS, y + _HEIGHT / 2), BLUE)
                drawing.text(
                    _LEVELS + 0.15, y + _ROW / 2, "+ top-down, 2x", va="center", color=BLUE
                )
        elif level.source == network.maps[-1].name:  # up from the last map, then right
            top = rows[f"P{level.source[1:]}"] + _HEIGHT / 2
            drawing.arrow((_MAPS, top), (left, y), connectionstyle="angle,angleA=90,angleB=0,rad=4")
            drawing.text(label_x, y + 0.12, kernel, ha="center")
        else:  # from the level below
            drawing.arrow((_LEVELS, y - _ROW + _HEIGHT / 2), (_LEVELS, y - _HEIGHT / 2))
            drawing.text(_LEVELS + 0.15, y - _ROW / 2, kernel, va="center")
    outputs = {_kernel(level.output) for level in network.levels if level.output is not None}
    drawing.text(_LEVELS, -0.95, f"then {' or '.join(sorted(outputs))} on each sum", ha="center")
    top = max(rows.values()) + _HEIGHT / 2 + 0.25
    drawing.title(_LEVELS, top, "feature pyramid", ha="center")
    drawing.title(_HEADS, top, "shared by all levels", ha="center")


def _draw_subnets(drawing: _Drawing, network: Architecture) -> None:
    """Draw the layers of both heads."""
    height = _ROW * (len(network.levels) - 1)
    for name, subnet, y, outputs in (
        ("class subnet", network.class_subnet, 0.72 * height, "classes"),
        ("box subnet", network.box_subnet, 0.22 * height, "offsets"),
    ):
        *hidden, last = subnet.convolutions
        channels = [subnet.convolutions[0].in_channels]
        steps = []
        if hidden:
            channels.append(hidden[-1].out_channels)
            times = f"{len(hidden)} times\n" if len(hidden) > 1 else ""
            steps.append(f"{times}{_kernel(hidden[0])}")
        channels.append(last.out_channels)
        steps.append(_kernel(last))
        drawing.title(_DETAILS, y + 1.0, name)
        for i, count in enumerate(channels):
            x = _DETAILS + 0.9 + 3.25 * i
            drawing.box(x, y, (1.9, 1.2), f"W x H\nx {count}", GREEN)
            if i < len(steps):
                drawing.arrow((x + 0.95, y), (x + 2.3, y))
                drawing.text(x + 1.62, y + 0.16, steps[i], ha="center", va="bottom")
        anchors = f"{subnet.per_cell} anchors per cell x {subnet.outputs} {outputs}"
        drawing.text(_DETAILS, y - 1.05, f"{last.out_channels} = {anchors}")
        # From the heads' boxes to their layers.
        drawing.arrow((_HEADS + 1.25, height / 2), (_DETAILS - 0.15, y), GREEN, arrowstyle="-",
                      linestyle=":", linewidth=1.2)  # fmt: skip


def _shape(level: Level) -> str:
    return f"{level.name}  /{level.stride}\n{level.channels} x {level.height} x {level.width}"


def _kernel(convolution: Convolution | None) -> str:
    if convolution is None:
        return ""
    stride = f", stride {convolution.stride}" if convolution.stride > 1 else ""
    return f"{convolution.kernel}x{convolution.kernel}{stride}"
