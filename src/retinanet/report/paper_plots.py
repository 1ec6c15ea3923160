"""The paper's figures with its axes, and its tables as images; each as PNG and SVG.

Source: Lin et al. 2017, Figures 1 to 7. The data comes from :mod:`retinanet.paper.figures`, from
measurements (:mod:`retinanet.report`), and from the paper. The path `file` of each function is that
of both files: a suffix .png or .svg is replaced.
"""

from __future__ import annotations

import math
import string
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.patches import FancyBboxPatch
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
from retinanet.report.loss_distribution import LossDistribution
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
    """FL* with one setting: x_t and loss.

    Attributes:
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

    def __str__(self) -> str:
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        return f"{self.kernel}x{self.kernel}{stride}"


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
    """A head, shared by all levels: `outputs` values (K classes, or 4) per anchor."""

    convolutions: tuple[Convolution, ...]
    per_cell: int
    outputs: int


@dataclass(frozen=True, slots=True)
class Architecture:
    """A network as Figure 3 shows it.

    Attributes:
        height, width: of the image, padded to multiples of 32.
        maps, levels: of the backbone that the pyramid takes, and of the pyramid; finest first.
        anchors: number in the image, all levels together.
        parameters: number of weights.
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
    """A row of a table in points of AP: mean and standard deviation over seeds, and the paper's AP.

    None: not run, a single seed, not in the paper.
    """

    label: str
    measured: float | None
    deviation: float | None = None
    published: float | None = None


@contextmanager
def _axes(
    width: float, height: float, file: str | Path, columns: int = 1, **options: Any
) -> Iterator[tuple[Files, Any]]:
    """Open a figure of one row of axes, and write it to both files at the end."""
    stem = Path(file)
    if stem.suffix in (".png", ".svg"):
        stem = stem.with_suffix("")
    files = Files(*(stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")))
    with open_figure(width, height, *files) as figure:
        yield files, figure.subplots(1, columns, **options)


def plot_focal_loss(curves: Sequence[Curve], file: str | Path) -> Files:
    """Figure 1: loss against the probability of the ground truth class, a curve per gamma."""
    with _axes(5.4, 4.1, file) as (files, axis):
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


def plot_loss_variants(curves: Sequence[Curve], file: str | Path) -> Files:
    """Figure 5: losses against x_t = y x."""
    return _plot_variants(curves, file, (0, 6), "loss", "Variants of the focal loss")


def plot_loss_slopes(curves: Sequence[Curve], file: str | Path) -> Files:
    """Figure 6: derivatives of the losses with respect to x, for y = 1."""
    low = min((min(curve.y) for curve in curves), default=-1.0)
    return _plot_variants(curves, file, (1.06 * low, 0.06), "gradient", "Derivatives of the losses")


def _plot_variants(
    curves: Sequence[Curve], file: str | Path, ylim: tuple[float, float], ylabel: str, title: str
) -> Files:
    with _axes(5.4, 4.1, file) as (files, axis):
        for i, (curve, colour) in enumerate(zip(curves, cycle_colours(len(curves)), strict=True)):
            # Dashes show a curve below another.
            style = ("-", "-", "--", "-.")[i % 4]
            axis.plot(curve.x, curve.y, style, color=colour, label=curve.label)
        axis.set(xlabel="xₜ = y x", ylim=ylim, ylabel=ylabel, title=title)
        axis.margins(x=0)
        axis.legend()
    return files


def plot_star_grid(curves: Sequence[StarCurve], file: str | Path, bar: str = "") -> Files:
    """Figure 7: FL* over a grid of gamma and beta, by whether training with it is effective.

    `bar` is the criterion of effective, for the legend: ``AP over 33.5``.
    """
    kinds: tuple[tuple[bool | None, str, str], ...] = (
        (None, "unknown", "#B9BEC6"),
        (False, "not effective", ORANGE),
        (True, "effective", BLUE),
    )
    with _axes(5.4, 4.1, file) as (files, axis):
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


def plot_loss_distribution(
    result: LossDistribution,
    file: str | Path,
    *,
    title: str = "",
    published: Sequence[tuple[float, float]] = (),
) -> Files:
    """Figure 4: cumulative share of the loss over positives and over negatives.

    Args:
        result: of a model.
        file: path of both files.
        title: above both panels, such as the model's name.
        published: the paper's points (fraction, cumulative share) of the positives: the hardest 20%
            account for about half of the loss, (.8, .5).
    """
    panels = (
        ("positives", result.positives, result.positives_taken, result.positive_anchors),
        ("negatives", result.negatives, result.negatives_taken, result.negative_anchors),
    )
    with _axes(9.4, 4.0, file, 2) as (files, axes):
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
                x, y = zip(*published, strict=True)
                axis.plot(x, y, "x", color=DARK, markersize=8, label="the paper")
            axis.legend(loc="upper left")
        if title:
            axes[0].figure.suptitle(title, fontsize=10)
    return files


# --- Figure 2 -------------------------------------------------------------------------------------


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
        file: path of both files.
        published: the paper's points; may be empty.
        where: data of the measurement, for the panel's title.
        machine: machine of the measurement, for the axis' label.

    Raises:
        ValueError: there is no point.
    """
    title = f"Measured here{': ' if where else ''}{shorten_start(where)}"
    panels = [
        ("The paper: COCO test-dev, Nvidia M40", "COCO AP", "", published),
        (title, "AP", machine, measured),
    ]
    panels = [panel for panel in panels if panel[-1]]
    if not panels:
        raise ValueError("there is no point to draw: give measured or published ones")
    series = max(len({mark.series for mark in marks}) for marks in (published, measured))
    lines = len(textwrap.wrap(machine, 60))
    height = 4.2 + 0.18 * math.ceil(series / 2) + 0.25 * lines
    size = 5.6 * len(panels), height
    with _axes(*size, file, len(panels), squeeze=False) as (files, axes):
        for axis, (name, ylabel, below, marks) in zip(axes[0], panels, strict=True):
            _plot_speed(axis, marks, lines if below else 0)
            xlabel = _wrapped("inference time, ms per image", below)
            axis.set(title=name, xlabel=xlabel, ylabel=ylabel)
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
    for mark, letter in zip(single, letters(len(single)), strict=True):
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


def letters(count: int) -> list[str]:
    """Return A, B, .. Z, A1, .."""
    alphabet = string.ascii_uppercase
    return [alphabet[i % 26] + (str(i // 26) if i >= 26 else "") for i in range(count)]


def _wrapped(label: str, text: str) -> str:
    """Axis label with a wrapped text below it."""
    return "\n".join([label, *textwrap.wrap(text, 60)])


# --- tables ---------------------------------------------------------------------------------------


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
    size = 9.4, 1.5 + 0.3 * max(1, len(rows))
    with _axes(*size, file, 2, sharey=True) as (files, (here, paper)):
        _plot_rows(here, [(row.measured, row.deviation) for row in rows], BLUE, "not run")
        _plot_rows(paper, [(row.published, None) for row in rows], RED, "not in the paper")
        here.set_yticks(np.arange(len(rows)), [shorten(row.label, 40) for row in rows])
        here.set_ylim(len(rows) - 0.4, -0.6)
        here.set(title="Measured here", xlabel=_wrapped("AP, mean ± std over seeds", measured_on))
        paper.set(title="The paper", xlabel="AP")
        if title:
            here.figure.suptitle(title, fontsize=11)
    return files


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
        best = value == high
        marker = {"color": colour if best else "white", "markeredgecolor": colour}
        axis.plot([value], [i], "o", markersize=5.5, clip_on=False, zorder=3, **marker)
        style = {"va": "center", "fontsize": 8, "color": DARK, "textcoords": "offset points"}
        style["fontweight"] = "bold" if best else "normal"
        end = (value + (spread or 0.0), i)
        axis.annotate(f"{value:.1f}{error}", end, (7, 0), **style)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.tick_params(axis="y", length=0)


# --- Figure 3 -------------------------------------------------------------------------------------

_ROW = 1.5  # distance between levels, in units of the drawing
_HEIGHT = 0.95  # of a level's box
_MAPS, _LEVELS, _HEADS, _DETAILS = 2.4, 9.2, 14.2, 17.6  # column centres; last: left edge


def plot_architecture(network: Architecture, file: str | Path) -> Files:
    """Figure 3: backbone, pyramid with its top-down path, and the two subnets."""
    with _axes(13.0, 1.5 + 0.95 * len(network.levels), file) as (files, axis):
        axis.axis("off")
        _draw_maps(axis, network)
        _draw_levels(axis, network)
        _draw_subnets(axis, network)
        axis.set(xlim=(-0.2, 26.2), ylim=(-1.25, _ROW * (len(network.levels) - 1) + 1.1))
        axis.set_title(
            f"{network.backbone}, an image of {network.height} x {network.width} pixels: "
            f"{network.anchors:,} anchors, {network.parameters / 1e6:.1f} million weights"
        )
    return files


def _text(axis: Any, x: float, y: float, text: str, **style: Any) -> None:
    axis.text(x, y, text, **{"fontsize": 8.5, "color": DARK, **style})


def _title(axis: Any, x: float, y: float, text: str, **style: Any) -> None:
    _text(axis, x, y, text, fontsize=9.5, fontweight="bold", **style)


def _box(axis: Any, x: float, y: float, size: tuple[float, float], text: str, colour: str) -> None:
    corner = (x - size[0] / 2, y - size[1] / 2)
    style: dict[str, Any] = {"boxstyle": "round,pad=0,rounding_size=0.12", "linewidth": 1.1}
    axis.add_patch(
        FancyBboxPatch(corner, *size, facecolor=f"{colour}30", edgecolor=colour, **style)
    )
    _text(axis, x, y, text, ha="center", va="center")


def _arrow(
    axis: Any,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: str = DARK,
    **style: Any,
) -> None:
    plain = {"arrowstyle": "-|>", "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
    axis.annotate(
        "", end, start, arrowprops={**plain, "mutation_scale": 9, "color": colour, **style}
    )


def _map_width(index: int) -> float:
    return 4.6 - 0.55 * index


def _shape(level: Level) -> str:
    return f"{level.name}  /{level.stride}\n{level.channels} x {level.height} x {level.width}"


def _draw_maps(axis: Any, network: Architecture) -> None:
    """Draw the backbone's maps, each next to the level of the same stride."""
    rows = {level.name[1:]: _ROW * i for i, level in enumerate(network.levels)}
    _arrow(axis, (_MAPS, -1.05), (_MAPS, -_HEIGHT / 2), GREY)
    _text(axis, _MAPS + 0.2, -0.95, f"image 3 x {network.height} x {network.width}")
    for i, level in enumerate(network.maps):
        y = rows[level.name[1:]]
        _box(axis, _MAPS, y, (_map_width(i), _HEIGHT), _shape(level), ORANGE)
        if i:
            _arrow(axis, (_MAPS, y - _ROW + _HEIGHT / 2), (_MAPS, y - _HEIGHT / 2), GREY)
    _title(axis, 0.0, max(rows.values()) + _HEIGHT / 2 + 0.25, "backbone")


def _draw_levels(axis: Any, network: Architecture) -> None:
    """Draw the pyramid's levels, their sources, and the heads."""
    levels, maps = network.levels, network.maps
    rows = {level.name: _ROW * i for i, level in enumerate(levels)}
    rights = {level.name: _MAPS + _map_width(i) / 2 for i, level in enumerate(maps)}
    label_x = _MAPS + 3.55
    for i, level in enumerate(levels):
        y, width, kernel = rows[level.name], 4.4 - 0.25 * i, str(level.convolution)
        left = _LEVELS - width / 2
        _box(axis, _LEVELS, y, (width, _HEIGHT), _shape(level), SKY)
        _arrow(axis, (_LEVELS + width / 2, y), (_HEADS - 1.15, y), GREY)
        _box(axis, _HEADS, y, (2.3, _HEIGHT), "class + box\nsubnets", GREEN)
        if level.output is not None:  # lateral connection, and the level above added to it
            _arrow(axis, (rights[level.source], y), (left, y))
            _text(axis, label_x, y + 0.12, kernel, ha="center")
            if i + 1 < len(levels) and levels[i + 1].output is not None:
                above = (_LEVELS, y + _ROW - _HEIGHT / 2)
                _arrow(axis, above, (_LEVELS, y + _HEIGHT / 2), BLUE)
                middle = (_LEVELS + 0.15, y + _ROW / 2)
                _text(axis, *middle, "+ top-down, 2x", va="center", color=BLUE)
        elif level.source == maps[-1].name:  # up from the last map, then right
            top = (_MAPS, rows[f"P{level.source[1:]}"] + _HEIGHT / 2)
            _arrow(axis, top, (left, y), connectionstyle="angle,angleA=90,angleB=0,rad=4")
            _text(axis, label_x, y + 0.12, kernel, ha="center")
        else:  # from the level below
            _arrow(axis, (_LEVELS, y - _ROW + _HEIGHT / 2), (_LEVELS, y - _HEIGHT / 2))
            _text(axis, _LEVELS + 0.15, y - _ROW / 2, kernel, va="center")
    outputs = {str(level.output) for level in levels if level.output is not None}
    _text(axis, _LEVELS, -0.95, f"then {' or '.join(sorted(outputs))} on each sum", ha="center")
    top_y = max(rows.values()) + _HEIGHT / 2 + 0.25
    _title(axis, _LEVELS, top_y, "feature pyramid", ha="center")
    _title(axis, _HEADS, top_y, "shared by all levels", ha="center")


def _draw_subnets(axis: Any, network: Architecture) -> None:
    """Draw the layers of both heads."""
    height = _ROW * (len(network.levels) - 1)
    for name, subnet, y, outputs in (
        ("class subnet", network.class_subnet, 0.72 * height, "classes"),
        ("box subnet", network.box_subnet, 0.22 * height, "offsets"),
    ):
        *hidden, last = subnet.convolutions
        channels, steps = [subnet.convolutions[0].in_channels], []
        if hidden:
            channels.append(hidden[-1].out_channels)
            times = f"{len(hidden)} times\n" if len(hidden) > 1 else ""
            steps.append(f"{times}{hidden[0]}")
        channels.append(last.out_channels)
        steps.append(str(last))
        _title(axis, _DETAILS, y + 1.0, name)
        for i, count in enumerate(channels):
            x = _DETAILS + 0.9 + 3.25 * i
            _box(axis, x, y, (1.9, 1.2), f"W x H\nx {count}", GREEN)
            if i < len(steps):
                _arrow(axis, (x + 0.95, y), (x + 2.3, y))
                _text(axis, x + 1.62, y + 0.16, steps[i], ha="center", va="bottom")
        anchors = f"{subnet.per_cell} anchors per cell x {subnet.outputs} {outputs}"
        _text(axis, _DETAILS, y - 1.05, f"{last.out_channels} = {anchors}")
        # From the heads' boxes to their layers.
        start, end = (_HEADS + 1.25, height / 2), (_DETAILS - 0.15, y)
        _arrow(axis, start, end, GREEN, arrowstyle="-", linestyle=":", linewidth=1.2)
