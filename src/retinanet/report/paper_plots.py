"""The paper's figures, redrawn in its axes, and its tables as images; each as PNG and SVG.

Source: Lin et al. 2017, Figures 1 to 7. What is drawn comes in as numbers: from
:mod:`retinanet.paper.figures`, from measurements (:mod:`retinanet.evaluation`), and as published.
"""

from __future__ import annotations

import math
import string
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
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
    COLOURS,
    GREEN,
    GREY,
    ORANGE,
    RED,
    SKY,
    open_figure,
    shorten,
)
from retinanet.report.loss_distribution import LossCurve, LossDistribution
from retinanet.report.speed_accuracy import SpeedAccuracy

_DARK = "#333333"
_WELL_CLASSIFIED = 0.6  # where Figure 1's brace begins
_MOST_NAMED = 6  # settings that Figure 7's legend names


class Files(NamedTuple):
    """What was written."""

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
        series: points of one series are joined; a series of one point is a detector by itself.
        milliseconds: an image.
        ap: in points, 0 to 100.
        label: beside the point, such as the scale; empty: nothing.
        low, high: quartiles of the milliseconds; None: not known.
    """

    series: str
    milliseconds: float
    ap: float
    label: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row of a table, measured here and as the paper prints it; in points of AP.

    Attributes:
        label: its name.
        measured: mean AP over seeds; None: not run.
        deviation: over seeds; None: there is but one.
        published: None: the paper has no such row.
    """

    label: str
    measured: float | None
    deviation: float | None = None
    published: float | None = None


def plot_focal_loss(curves: Sequence[Curve], file: str | Path) -> Files:
    """Figure 1: loss against the probability of the ground truth class.

    Args:
        curves: one a gamma.
        file: where to, without suffix or with one that is replaced; so in all functions here.
    """
    files, context = _open(5.4, 4.1, file)
    with context as figure:
        axis = figure.subplots()
        for curve, colour in zip(curves, _cycle(len(curves)), strict=True):
            axis.plot(curve.x, curve.y, color=colour, label=curve.label)
        axis.set(xlim=(0, 1), ylim=(0, 5), title="Focal loss")
        axis.set(xlabel="probability of ground truth class", ylabel="loss")
        axis.set_xticks(np.linspace(0, 1, 6))
        axis.axvspan(_WELL_CLASSIFIED, 1, color=GREEN, alpha=0.07, linewidth=0)
        ends = {"arrowstyle": "<->", "color": _DARK, "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
        axis.annotate("", (_WELL_CLASSIFIED, 1.3), (1, 1.3), arrowprops=ends)
        middle = (1 + _WELL_CLASSIFIED) / 2
        axis.text(middle, 1.42, "well-classified\nexamples", ha="center", color=_DARK)
        axis.text(0.2, 4.62, "CE(p) = -log(p)", color=_DARK)
        axis.text(0.2, 4.28, "FL(p) = -(1 - p)ᵞ log(p)", color=_DARK)
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
    """Figure 2: AP against milliseconds an image.

    What was measured on other data and another machine stands in a panel of its own.

    Args:
        measured: may be empty: the paper's panel alone.
        published: the paper's points; empty: the panel of what was measured alone.
        where: the data, in the panel's title.
        machine: it was measured on, under the axis.

    Raises:
        ValueError: there is no point at all.
    """
    panels = [bool(published), bool(measured)]
    if not any(panels):
        raise ValueError("there is no point to draw: give measured or published ones")
    names = max(len({one.series for one in marks}) for marks in (published, measured))
    under = _under("inference time, ms an image", machine)
    lines = under.count("\n")
    height = 4.2 + 0.18 * math.ceil(names / 2) + 0.25 * lines
    files, context = _open(5.6 * sum(panels), height, file)
    with context as figure:
        axes = list(np.atleast_1d(figure.subplots(1, sum(panels))))
        if published:
            axis = axes.pop(0)
            _speed_panel(axis, published)
            axis.set(title="The paper: COCO test-dev, Nvidia M40")
            axis.set(xlabel="inference time, ms an image", ylabel="COCO AP")
        if measured:
            axis = axes.pop(0)
            _speed_panel(axis, measured, lines)
            axis.set(title=f"Measured here{': ' if where else ''}{_end(where)}", ylabel="AP")
            axis.set(xlabel=under)
    return files


def speed_marks(result: SpeedAccuracy) -> tuple[SpeedMark, ...]:
    """The points of a measurement, in points of AP; those without AP are left out."""
    return tuple(
        SpeedMark(
            one.model,
            one.milliseconds,
            100 * one.ap,
            str(one.scale),
            one.milliseconds_low,
            one.milliseconds_high,
        )
        for one in result.points
        if math.isfinite(one.ap)
    )


def plot_architecture(network: Architecture, file: str | Path) -> Files:
    """Figure 3: backbone, pyramid with its top-down path, and the two subnets."""
    files, context = _open(13.0, 1.5 + 0.95 * len(network.levels), file)
    with context as figure:
        axis = figure.subplots()
        axis.axis("off")
        _draw_pyramid(axis, network)
        _draw_subnets(axis, network)
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
    """Figure 4: the cumulative share of the loss over positives and over negatives.

    Args:
        result: of one model.
        title: over both panels, such as the model's name.
        published: points (fraction, cumulative share) of the positives that the paper tells of: in
            words it says that the hardest 20% hold about half of the loss, (.8, .5).
    """
    files, context = _open(9.4, 4.0, file)
    with context as figure:
        panels = (
            ("positives", result.positives, result.positives_taken, result.positive_anchors),
            ("negatives", result.negatives, result.negatives_taken, result.negative_anchors),
        )
        for axis, (kind, curves, taken, every) in zip(figure.subplots(1, 2), panels, strict=True):
            _distribution_panel(axis, result.fractions, curves)
            share = "" if taken == every else f" of {every:,}"
            axis.set(xlabel=f"fraction of {kind}, easiest first")
            axis.set_title(f"{kind.capitalize()}: {taken:,} anchors{share}")
            if kind == "positives" and published:
                x, y = zip(*published, strict=True)
                axis.plot(x, y, "x", color=_DARK, markersize=8, label="the paper")
            axis.legend(loc="upper left")
        if title:
            figure.suptitle(title, fontsize=10)
    return files


def plot_loss_variants(curves: Sequence[Curve], file: str | Path) -> Files:
    """Figure 5: losses against x_t = y x."""
    files, context = _open(5.4, 4.1, file)
    with context as figure:
        axis = figure.subplots()
        _lines(axis, curves)
        axis.set(ylim=(0, 6), ylabel="loss", title="Variants of the focal loss")
    return files


def plot_loss_slopes(curves: Sequence[Curve], file: str | Path) -> Files:
    """Figure 6: the losses' derivatives by x, for y = 1."""
    files, context = _open(5.4, 4.1, file)
    with context as figure:
        axis = figure.subplots()
        _lines(axis, curves)
        low = min((min(one.y) for one in curves), default=-1.0)
        axis.set(ylim=(1.06 * low, 0.06), ylabel="gradient", title="Their derivatives by x")
    return files


def plot_star_grid(curves: Sequence[StarCurve], file: str | Path, bar: str = "") -> Files:
    """Figure 7: FL* over a grid of gamma and beta, by whether training with it works.

    Args:
        curves: one a setting.
        bar: what counts as working, for the legend: ``AP over 33.5``.
    """
    files, context = _open(5.4, 4.1, file)
    kinds: tuple[tuple[bool | None, str, str], ...] = (
        (None, "not known", "#B9BEC6"),
        (False, "not effective", ORANGE),
        (True, "effective", BLUE),
    )
    with context as figure:
        axis = figure.subplots()
        for kind, name, colour in kinds:
            chosen = [one for one in curves if one.effective is kind]
            settings = [f"γ = {one.gamma:g}, β = {one.beta:g}" for one in chosen]
            label = f"{name}{f' ({bar})' if bar and kind else ''}: {len(chosen)}"
            if kind and len(chosen) <= _MOST_NAMED:
                label = "\n".join([label, *settings])
            for place, one in enumerate(chosen):
                axis.plot(
                    one.x,
                    one.y,
                    color=colour,
                    linewidth=1.0 if kind is None else 1.6,
                    label="" if place else label,
                )
        axis.set(ylim=(0, 6), ylabel="loss", xlabel="xₜ = y x", title="FL* by γ and β")
        axis.margins(x=0)
        axis.legend(loc="upper right")
    return files


def plot_table(
    rows: Sequence[TableRow], file: str | Path, *, title: str = "", measured_on: str = ""
) -> Files:
    """A table as two panels in the same order of rows: measured here, and the paper's.

    Args:
        rows: from the top down.
        title: over both.
        measured_on: data and budget, under the left panel.
    """
    files, context = _open(9.4, 1.5 + 0.3 * max(1, len(rows)), file)
    with context as figure:
        here, paper = figure.subplots(1, 2, sharey=True)
        places = np.arange(len(rows))
        _table_panel(here, [(one.measured, one.deviation) for one in rows], BLUE, "not run")
        _table_panel(paper, [(one.published, None) for one in rows], RED, "not in the paper")
        here.set_yticks(places, [shorten(one.label, 40) for one in rows])
        here.set_ylim(len(rows) - 0.4, -0.6)
        here.set_title("Measured here")
        paper.set_title("The paper")
        here.set_xlabel(_under("AP, mean and deviation over seeds", measured_on))
        paper.set_xlabel("AP")
        if title:
            figure.suptitle(title, fontsize=11)
    return files


def _open(
    width: float, height: float, file: str | Path
) -> tuple[Files, AbstractContextManager[Figure]]:
    stem = Path(file)
    if stem.suffix in (".png", ".svg"):
        stem = stem.with_suffix("")
    files = Files(*(stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg")))
    return files, open_figure(width, height, *files)


def _end(name: str, most: int = 40) -> str:
    """A name that leaves room for the figure; of a long one the end, which tells paths apart."""
    return name if len(name) <= most else f"..{name[2 - most :]}"


def _under(label: str, text: str) -> str:
    """An axis' label with a text of any length below it."""
    return "\n".join([label, *textwrap.wrap(text, 60)])


def _cycle(count: int) -> list[str]:
    return [COLOURS[place % len(COLOURS)] for place in range(count)]


def _lines(axis: Any, curves: Sequence[Curve]) -> None:
    for place, (curve, colour) in enumerate(zip(curves, _cycle(len(curves)), strict=True)):
        # Where two lie on each other the dashes let the lower one be seen.
        style = ("-", "-", "--", "-.")[place % 4]
        axis.plot(curve.x, curve.y, style, color=colour, label=curve.label)
    axis.set_xlabel("xₜ = y x")
    axis.margins(x=0)
    axis.legend()


def _distribution_panel(axis: Any, fractions: Sequence[float], curves: Sequence[LossCurve]) -> None:
    for curve, colour in zip(curves, _cycle(len(curves)), strict=True):
        axis.plot(fractions, curve.cumulative, color=colour, label=f"γ = {curve.gamma:g}")
    axis.set(xlim=(0, 1), ylim=(0, 1.01), ylabel="cumulative share of the loss")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _speed_panel(axis: Any, marks: Sequence[SpeedMark], lines: int = 0) -> None:
    """The points, and their names below the axis, under so many further lines of its label."""
    series: dict[str, list[SpeedMark]] = {}
    for mark in sorted(marks, key=lambda one: one.milliseconds):
        series.setdefault(mark.series, []).append(mark)
    series = {name: series[name] for name in dict.fromkeys(one.series for one in marks)}
    joined = {name: ones for name, ones in series.items() if len(ones) > 1}
    alone = [ones[0] for ones in series.values() if len(ones) == 1]
    slowest = max(one.high or one.milliseconds for one in marks)
    low, high = min(one.ap for one in marks), max(one.ap for one in marks)
    room = max(5.0, high - low)
    limits = (0, 1.1 * slowest, max(0, low - 0.12 * room), high + 0.12 * room)
    axis.set(xlim=limits[:2], ylim=limits[2:])
    labels = _Labels(limits, series.values())
    for (name, ones), colour in zip(joined.items(), _cycle(len(joined)), strict=True):
        x, y = [one.milliseconds for one in ones], [one.ap for one in ones]
        axis.plot(x, y, "o-", color=colour, markersize=4, label=_end(name))
        for one in ones:
            _quartiles(axis, one, colour)
            axis.annotate(
                one.label,
                (one.milliseconds, one.ap),
                xytext=labels.place(one),
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=7,
                color=colour,
            )
    for one, letter in zip(alone, _letters(len(alone)), strict=True):
        _quartiles(axis, one, GREY)
        at = [one.milliseconds], [one.ap]
        axis.plot(*at, "o", color="white", markeredgecolor=GREY, markersize=12)
        scale = f" {one.label}" if one.label else ""
        axis.plot(
            *at,
            marker=_letter_marker(letter),
            linestyle="",
            color=_DARK,
            markersize=7,
            markeredgewidth=0,
            label=f"{_end(one.series)}{scale}: {one.ap:.1f}, {one.milliseconds:.0f} ms",
        )
    # Under the axis, where it hides no point.
    axis.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.16 - 0.05 * lines), ncols=2, fontsize=7.5
    )


class _Labels:
    """Finds a place for each point's label, away from points, lines and other labels.

    Args:
        limits: of the axis: x from and to, y from and to.
        series: points that are joined, in order.
    """

    size = (340.0, 220.0)  # of an axis, in the 72nds of an inch in which labels are shifted
    shifts = ((13, -8), (-13, 8), (13, 8), (-13, -8), (0, -10), (0, 10))

    def __init__(
        self, limits: tuple[float, float, float, float], series: Iterable[Sequence[SpeedMark]]
    ) -> None:
        self._limits = limits
        self._taken: list[tuple[float, float]] = []
        for ones in series:
            spots = [self._spot(one) for one in ones]
            self._taken += spots
            for (x, y), (to_x, to_y) in pairwise(spots):
                for part in np.linspace(0, 1, 13)[1:-1]:
                    self._taken.append((x + part * (to_x - x), y + part * (to_y - y)))

    def place(self, mark: SpeedMark) -> tuple[float, float]:
        """How far the label's middle is to be from its point."""
        x, y = self._spot(mark)
        others = [one for one in self._taken if one != (x, y)]

        def room(shift: tuple[float, float]) -> float:
            # Labels are about twice as wide as high.
            return min(
                (math.hypot((x + shift[0] - a) / 2, y + shift[1] - b) for a, b in others),
                default=0.0,
            )

        best = max(self.shifts, key=room)
        self._taken.append((x + best[0], y + best[1]))
        return best

    def _spot(self, mark: SpeedMark) -> tuple[float, float]:
        left, right, bottom, top = self._limits
        return (
            (mark.milliseconds - left) / (right - left) * self.size[0],
            (mark.ap - bottom) / (top - bottom) * self.size[1],
        )


def _letter_marker(letter: str) -> MarkerPath:
    """The letter as a marker, around its middle."""
    text = TextPath((0, 0), letter)
    corners = text.get_extents().get_points()
    return MarkerPath(text.vertices - corners.mean(axis=0), text.codes)


def _quartiles(axis: Any, mark: SpeedMark, colour: str) -> None:
    if mark.low is not None and mark.high is not None:
        axis.plot([mark.low, mark.high], [mark.ap, mark.ap], color=colour, linewidth=0.9)


def _letters(count: int) -> list[str]:
    """A, B, .. Z, A1, .."""
    alphabet = string.ascii_uppercase
    return [
        alphabet[place % 26] + (str(place // 26) if place >= 26 else "") for place in range(count)
    ]


def _table_panel(
    axis: Any, values: Sequence[tuple[float | None, float | None]], colour: str, absent: str
) -> None:
    known = [value for value, _ in values if value is not None and math.isfinite(value)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    # With the deviations in sight.
    spread = max((deviation or 0.0 for _, deviation in values), default=0.0)
    room = max(high - low + 2 * spread, 1.0)
    left, right = max(0.0, low - spread - 0.08 * room), high + spread + 0.24 * room
    axis.set_xlim(left, right)
    for place, (value, deviation) in enumerate(values):
        if value is None or not math.isfinite(value):
            axis.text(left + 0.02 * (right - left), place, absent, va="center", fontsize=8,
                      color=GREY)  # fmt: skip
            continue
        best = value == high
        if deviation is not None:
            axis.errorbar(value, place, xerr=deviation, color=colour, capsize=2.5, linewidth=1.1)
        axis.plot([value], [place], "o", color=colour if best else "white",
                  markeredgecolor=colour, markersize=5.5, clip_on=False, zorder=3)  # fmt: skip
        error = "" if deviation is None else f" ± {deviation:.1f}"
        axis.annotate(
            f"{value:.1f}{error}",
            (value + (deviation or 0.0), place),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            fontweight="bold" if best else "normal",
            color=_DARK,
        )
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.tick_params(axis="y", length=0)


_ROW = 1.5  # from a level to the next, in the drawing's own unit
_BOX = 0.95  # height of a level
_SMALL = 8.5  # of a font
_MAPS, _LEVELS, _HEADS, _DETAILS = 2.4, 9.2, 14.2, 17.6  # middles of the columns; last: left edge


def _draw_pyramid(axis: Any, network: Architecture) -> None:
    count = len(network.levels)
    rows = {one.name: _ROW * place for place, one in enumerate(network.levels)}
    # A map stands beside the level that is made of it on the same stride.
    beside = {f"C{name[1:]}": y for name, y in rows.items()}
    coarsest = network.maps[-1]
    middle = {}
    for place, one in enumerate(network.maps):
        size = 4.6 - 0.55 * place
        middle[one.name] = (_MAPS, beside[one.name], size)
        _box(axis, _MAPS, beside[one.name], size, _BOX, _text(one), ORANGE)
        if place:
            _arrow(axis, (_MAPS, beside[one.name] - _ROW + _BOX / 2),
                   (_MAPS, beside[one.name] - _BOX / 2), GREY)  # fmt: skip
    _arrow(axis, (_MAPS, -1.05), (_MAPS, -_BOX / 2), GREY)
    axis.text(_MAPS + 0.2, -0.95, f"image 3 x {network.height} x {network.width}", color=_DARK,
              fontsize=_SMALL)  # fmt: skip
    for place, one in enumerate(network.levels):
        middle[one.name] = (_LEVELS, rows[one.name], 4.4 - 0.25 * place)
        x, y, size = middle[one.name]
        _box(axis, x, y, size, _BOX, _text(one), SKY)
        _arrow(axis, (x + size / 2, y), (_HEADS - 1.15, y), GREY)
        _box(axis, _HEADS, y, 2.3, _BOX, "class + box\nsubnets", GREEN)
    for place, one in enumerate(network.levels):
        x, y, size = middle[one.name]
        from_x, from_y, from_size = middle[one.source]
        said = _kernel(one.convolution)
        if one.output is not None:
            start, end = (from_x + from_size / 2, from_y), (x - size / 2, y)
            _arrow(axis, start, end, _DARK)
            axis.text(from_x + 3.55, y + 0.12, said, ha="center", fontsize=_SMALL, color=_DARK)
            above = network.levels[place + 1] if place + 1 < count else None
            if above is not None and above.output is not None:
                _arrow(axis, (x, y + _ROW - _BOX / 2), (x, y + _BOX / 2), BLUE)
                axis.text(x + 0.15, y + _ROW / 2, "+ top-down, 2x", va="center", fontsize=_SMALL,
                          color=BLUE)  # fmt: skip
        elif one.source == coarsest.name:
            # Up out of the last map, and over to the level.
            _arrow(axis, (from_x, from_y + _BOX / 2), (x - size / 2, y), _DARK, elbow=True)
            axis.text(from_x + 3.55, y + 0.12, said, ha="center", fontsize=_SMALL, color=_DARK)
        else:
            _arrow(axis, (x, y - _ROW + _BOX / 2), (x, y - _BOX / 2), _DARK)
            axis.text(x + 0.15, y - _ROW / 2, said, va="center", fontsize=_SMALL, color=_DARK)
    after = {_kernel(one.output) for one in network.levels if one.output is not None}
    axis.text(_LEVELS, -0.95, f"then {' or '.join(sorted(after))} on each sum", ha="center",
              fontsize=_SMALL, color=_DARK)  # fmt: skip
    top = _ROW * (len(network.levels) - 1)
    for x, name in ((_LEVELS, "feature pyramid"), (_HEADS, "shared by all levels")):
        axis.text(x, top + _BOX / 2 + 0.25, name, ha="center", fontsize=9.5, color=_DARK,
                  fontweight="bold")  # fmt: skip
    axis.text(0.0, top + _BOX / 2 + 0.25, "backbone", fontsize=9.5, color=_DARK,
              fontweight="bold")  # fmt: skip


def _draw_subnets(axis: Any, network: Architecture) -> None:
    height = _ROW * (len(network.levels) - 1)
    for name, subnet, y, what in (
        ("class subnet", network.class_subnet, 0.72 * height, "classes"),
        ("box subnet", network.box_subnet, 0.22 * height, "offsets"),
    ):
        last = subnet.convolutions[-1]
        depth = len(subnet.convolutions) - 1
        first = subnet.convolutions[0].in_channels
        stations = [f"W x H\nx {first}"]
        if depth:
            stations.append(f"W x H\nx {subnet.convolutions[depth - 1].out_channels}")
        stations.append(f"W x H\nx {last.out_channels}")
        x = _DETAILS + 0.9
        axis.text(_DETAILS, y + 1.0, name, fontsize=9.5, color=_DARK, fontweight="bold")
        for place, text in enumerate(stations):
            _box(axis, x, y, 1.9, 1.2, text, GREEN)
            if place + 1 < len(stations):
                _arrow(axis, (x + 0.95, y), (x + 2.3, y), _DARK)
                one = subnet.convolutions[0 if place == 0 and depth else depth]
                times = f"{depth} times\n" if place == 0 and depth > 1 else ""
                axis.text(x + 1.62, y + 0.16, f"{times}{_kernel(one)}", ha="center", va="bottom",
                          fontsize=_SMALL, color=_DARK)  # fmt: skip
            x += 3.25
        axis.text(_DETAILS, y - 1.05, f"{last.out_channels} = {subnet.per_cell} anchors a cell "
                  f"x {subnet.outputs} {what}", fontsize=_SMALL, color=_DARK)  # fmt: skip
    # From the small boxes to what is in them.
    for y in (0.72 * height, 0.22 * height):
        axis.annotate(
            "", (_DETAILS - 0.15, y), (_HEADS + 1.25, height / 2),
            arrowprops={"arrowstyle": "-", "color": GREEN, "linestyle": ":", "linewidth": 1.2},
        )  # fmt: skip


def _text(level: Level) -> str:
    return f"{level.name}  /{level.stride}\n{level.channels} x {level.height} x {level.width}"


def _kernel(convolution: Convolution | None) -> str:
    if convolution is None:
        return ""
    stride = f", stride {convolution.stride}" if convolution.stride > 1 else ""
    return f"{convolution.kernel}x{convolution.kernel}{stride}"


def _box(
    axis: Any, x: float, y: float, width: float, height: float, text: str, colour: str
) -> None:
    axis.add_patch(
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
    axis.text(x, y, text, ha="center", va="center", fontsize=_SMALL, color=_DARK)


def _arrow(
    axis: Any,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: str,
    *,
    elbow: bool = False,
) -> None:
    style: dict[str, Any] = {
        "arrowstyle": "-|>",
        "color": colour,
        "linewidth": 1.1,
        "shrinkA": 0,
        "shrinkB": 0,
        "mutation_scale": 9,
    }
    if elbow:
        style["connectionstyle"] = "angle,angleA=90,angleB=0,rad=4"
    axis.annotate("", end, start, arrowprops=style)
