"""The paper's figures that need no training, and its tables as plots.

Source: Lin et al. 2017: Figure 1 (Sec. 3.2), Figure 3 (Sec. 4), Figures 5 to 7 (Appendix A and B).
Their data comes from this package's losses and networks. Figures 2 and 4 are measured:
:mod:`retinanet.report.paper_plots`. Each plot is written as ``STEM.png`` and ``STEM.svg``.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from retinanet.losses import cross_entropy, focal_loss, focal_loss_star
from retinanet.model.retinanet import RetinaNet
from retinanet.paper.results import TableResult
from retinanet.paper.tables import STAR_BETAS, STAR_GAMMAS
from retinanet.report.figure import (
    BLUE,
    DARK,
    GREEN,
    GREY,
    ORANGE,
    RED,
    SKY,
    Files,
    draw_arrow,
    draw_box,
    draw_text,
    open_axes,
    shorten,
)

GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)
"""Gammas of Figure 1."""

STAR_SETTINGS = ((2.0, 1.0), (4.0, 0.0))
"""(gamma, beta) of FL* in Figures 5 and 6 and in Table 3, with an AP over 33.5 there."""

Curves = Mapping[str, tuple[Tensor, Tensor]]
"""x and y of each curve by its label, (N,) each."""

_POINTS = 401
_WELL_CLASSIFIED = 0.6  # start of Figure 1's brace
_MAX_NAMED = 6  # settings named in Figure 7's legend

_LOSSES: Mapping[str, Callable[..., Tensor]] = {
    "CE": cross_entropy,
    "FL γ = 2": partial(focal_loss, alpha=None, gamma=2.0),
    **{
        f"FL* γ = {gamma:g}, β = {beta:g}": partial(focal_loss_star, gamma=gamma, beta=beta)
        for gamma, beta in STAR_SETTINGS
    },
}
"""Losses of Figures 5 and 6 by their labels."""


def focal_curves(points: int = _POINTS) -> Curves:
    """Compute Figure 1: focal loss without alpha over p_t, evenly from .001 to .999."""
    p = torch.linspace(0.001, 0.999, points, dtype=torch.float64)
    return {
        f"γ = {gamma:g}{' (CE)' if gamma == 0 else ''}": (
            p,
            _losses(partial(focal_loss, alpha=None, gamma=gamma), torch.logit(p)),
        )
        for gamma in GAMMAS
    }


def variant_curves(points: int = _POINTS) -> Curves:
    """Compute Figure 5: CE, FL and two FL* over x_t = y x."""
    x = _x_t(points)
    return {label: (x, _losses(loss, x)) for label, loss in _LOSSES.items()}


def variant_slopes(points: int = _POINTS) -> Curves:
    """Compute Figure 6: derivatives of Figure 5's losses by x for y = 1, by autograd."""
    x = _x_t(points).requires_grad_()
    slopes = {
        label: torch.autograd.grad(_losses(loss, x).sum(), x)[0] for label, loss in _LOSSES.items()
    }
    return {label: (x.detach(), slope) for label, slope in slopes.items()}


def star_curves(
    settings: Sequence[tuple[float, float]], points: int = _POINTS
) -> dict[tuple[float, float], tuple[Tensor, Tensor]]:
    """Compute FL* over x_t for each (gamma, beta)."""
    x = _x_t(points)
    return {
        (gamma, beta): (x, _losses(partial(focal_loss_star, gamma=gamma, beta=beta), x))
        for gamma, beta in settings
    }


def _x_t(points: int) -> Tensor:
    return torch.linspace(-6, 6, points, dtype=torch.float64)


def _losses(loss: Callable[..., Tensor], logits: Tensor) -> Tensor:
    """Return the losses of examples with y = 1 and logits (N,)."""
    positives = torch.zeros(len(logits), dtype=torch.int64)
    return loss(logits[:, None], positives, reduction="none")[:, 0]


def plot_focal_loss(stem: str | Path) -> Files:
    """Figure 1: loss against the probability of the ground-truth class, a curve per gamma."""
    with open_axes(5.4, 4.1, stem) as (files, axis):
        for label, (x, y) in focal_curves().items():
            axis.plot(x, y, label=label)
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


def plot_loss_variants(stem: str | Path) -> Files:
    """Figure 5: losses against x_t = y x."""
    return _plot_over_x_t(
        variant_curves(), stem, ylim=(0, 6), ylabel="loss", title="Variants of the focal loss"
    )


def plot_loss_slopes(stem: str | Path) -> Files:
    """Figure 6: derivatives of the losses with respect to x, for y = 1."""
    curves = variant_slopes()
    low = min(float(y.min()) for _, y in curves.values())
    ylim, title = (1.06 * low, 0.06), "Derivatives of the losses"
    return _plot_over_x_t(curves, stem, ylim=ylim, ylabel="gradient", title=title)


def _plot_over_x_t(curves: Curves, stem: str | Path, **settings: Any) -> Files:
    with open_axes(5.4, 4.1, stem) as (files, axis):
        for i, (label, (x, y)) in enumerate(curves.items()):
            # Dashes show a curve below another.
            axis.plot(x, y, ("-", "-", "--", "-.")[i % 4], label=label)
        axis.set(xlabel="xₜ = y x", **settings)
        axis.margins(x=0)
        axis.legend()
    return files


def plot_star_grid(
    stem: str | Path,
    effective: Mapping[tuple[float, float], bool] | None = None,
    criterion: str = "AP over 33.5, COCO",
) -> Files:
    """Figure 7: FL* over a grid of gamma and beta, by whether training with it is effective.

    Args:
        stem: path of both files without suffix.
        effective: by (gamma, beta); None: the paper's.
        criterion: of effective, for the legend.
    """
    if effective is None:
        effective = dict.fromkeys(STAR_SETTINGS, True)
    grid = [(gamma, beta) for gamma in STAR_GAMMAS for beta in STAR_BETAS]
    kinds: tuple[tuple[bool | None, str, str], ...] = (
        (None, "unknown", "#B9BEC6"),
        (False, "not effective", ORANGE),
        (True, "effective", BLUE),
    )
    with open_axes(5.4, 4.1, stem) as (files, axis):
        for kind, name, colour in kinds:
            chosen = [setting for setting in grid if effective.get(setting) is kind]
            label = f"{name}{f' ({criterion})' if kind else ''}: {len(chosen)}"
            if kind and len(chosen) <= _MAX_NAMED:
                label = "\n".join([label, *(f"γ = {g:g}, β = {b:g}" for g, b in chosen)])
            style = {"color": colour, "linewidth": 1.0 if kind is None else 1.6}
            for i, (x, y) in enumerate(star_curves(chosen).values()):
                axis.plot(x, y, label="" if i else label, **style)
        axis.set(ylim=(0, 6), ylabel="loss", xlabel="xₜ = y x", title="FL* by γ and β")
        axis.margins(x=0)
        axis.legend(loc="upper right")
    return files


# --- tables ---------------------------------------------------------------------------------------


def plot_table(result: TableResult, stem: str | Path) -> Files:
    """Plot a table as two panels with the same rows: AP as measured and as published."""
    scores = [row.scores.get("AP") for row in result.rows]
    measured = [(None, None) if score is None else (score.mean, score.std) for score in scores]
    published = [(None if row.published is None else row.published.ap, None) for row in result.rows]
    data = textwrap.wrap(str(result.about.get("data", "")), 60)
    size = 9.4, 1.5 + 0.3 * max(1, len(result.rows))
    with open_axes(*size, stem, 2, sharey=True) as (files, (here, paper)):
        _plot_rows(here, measured, BLUE, "not run")
        _plot_rows(paper, published, RED, "not in the paper")
        labels = [shorten(row.label, 40) for row in result.rows]
        here.set_yticks(np.arange(len(labels)), labels)
        here.set_ylim(len(labels) - 0.4, -0.6)
        here.set(title="Measured here", xlabel="\n".join(["AP, mean ± std over seeds", *data]))
        paper.set(title="The paper", xlabel="AP")
        here.figure.suptitle(result.heading, fontsize=11)
    return files


def _plot_rows(
    axis: Any, values: Sequence[tuple[float | None, float | None]], colour: str, missing: str
) -> None:
    """Plot (value, deviation) per row, from the top down."""
    known = [value for value, _ in values if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    deviation = max((d or 0.0 for _, d in values), default=0.0)
    margin = max(high - low + 2 * deviation, 1.0)
    left, right = max(0.0, low - deviation - 0.08 * margin), high + deviation + 0.24 * margin
    axis.set_xlim(left, right)
    for i, (value, spread) in enumerate(values):
        if value is None:
            x = left + 0.02 * (right - left)
            axis.text(x, i, missing, va="center", fontsize=8, color=GREY)
            continue
        if spread is not None:
            axis.errorbar(value, i, xerr=spread, color=colour, capsize=2.5, linewidth=1.1)
        best = value == high
        marker = {"color": colour if best else "white", "markeredgecolor": colour}
        axis.plot([value], [i], "o", markersize=5.5, clip_on=False, zorder=3, **marker)
        style = {"va": "center", "fontsize": 8, "color": DARK, "textcoords": "offset points"}
        style["fontweight"] = "bold" if best else "normal"
        text = f"{value:.1f}" + ("" if spread is None else f" ± {spread:.1f}")
        axis.annotate(text, (value + (spread or 0.0), i), (7, 0), **style)
    axis.locator_params(axis="x", nbins=6)
    axis.tick_params(axis="y", length=0)


# --- Figure 3 -------------------------------------------------------------------------------------

_ROW = 1.5  # distance between levels, in units of the drawing
_HEIGHT = 0.95  # of a level's box
_MAPS, _LEVELS, _HEADS, _DETAILS = 2.4, 9.2, 14.2, 17.6  # column centres; last: left edge


class Level(NamedTuple):
    """A feature map of Figure 3.

    Attributes:
        name: ``C3`` or ``P3``.
        channels, height, width: its shape.
        source: name of its input: ``C3`` for P3, besides the top-down path; empty for C levels.
        kernel: of the convolution of `source`, such as ``3x3, stride 2``.
        output: of the convolution after the top-down sum; empty without it.
    """

    name: str
    channels: int
    height: int
    width: int
    source: str = ""
    kernel: str = ""
    output: str = ""


def read_levels(model: RetinaNet, height: int, width: int) -> tuple[list[Level], list[Level]]:
    """Read the backbone's maps and the pyramid's levels from a model's modules, finest first."""
    pyramid = model.pyramid

    def level(name: str, convolution: nn.Module, *, source: str = "", output: str = "") -> Level:
        assert isinstance(convolution, nn.Conv2d)
        stride = 2 ** int(name[1:])
        channels = convolution.out_channels if source else convolution.in_channels
        shape = (channels, math.ceil(height / stride), math.ceil(width / stride))
        return Level(name, *shape, source, _kernel(convolution) if source else "", output)

    maps, levels = [], []
    pairs = zip(pyramid.lateral, pyramid.output, strict=True)
    for number, (lateral, output) in enumerate(pairs, 2 if model.p2 else 3):
        maps.append(level(f"C{number}", lateral))
        source = f"C{number}"
        levels.append(level(f"P{number}", lateral, source=source, output=_kernel(output)))
    levels.append(level("P6", pyramid.p6, source=pyramid.p6_from.upper()))
    levels.append(level("P7", pyramid.p7, source="P6"))
    return maps, levels


def _kernel(convolution: Any) -> str:
    size, stride = convolution.kernel_size[0], convolution.stride[0]
    return f"{size}x{size}" + (f", stride {stride}" if stride > 1 else "")


def plot_architecture(
    model: RetinaNet, stem: str | Path, height: int = 800, width: int = 1024
) -> Files:
    """Figure 3: backbone, pyramid with its top-down path, and the two subnets.

    Args:
        model: any RetinaNet.
        stem: path of both files without suffix.
        height, width: of the image in pixels, multiples of 32.
    """
    maps, levels = read_levels(model, height, width)
    anchors = model.anchors.per_cell * sum(level.height * level.width for level in levels)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    with open_axes(13.0, 1.5 + 0.95 * len(levels), stem) as (files, axis):
        axis.axis("off")
        _draw_maps(axis, maps, levels, f"image 3 x {height} x {width}")
        _draw_levels(axis, maps, levels)
        y = _ROW * (len(levels) - 1)
        _draw_subnet(axis, "class", model.class_head, model.anchors.per_cell, 0.72 * y, y / 2)
        _draw_subnet(axis, "box", model.box_head, model.anchors.per_cell, 0.22 * y, y / 2)
        axis.set(xlim=(-0.2, 26.2), ylim=(-1.25, y + 1.1))
        axis.set_title(
            f"{model.spec.backbone}, an image of {height} x {width} pixels: "
            f"{anchors:,} anchors, {parameters / 1e6:.1f} million weights"
        )
    return files


def _title(axis: Any, x: float, y: float, text: str, **style: Any) -> None:
    draw_text(axis, x, y, text, fontsize=9.5, fontweight="bold", **style)


def _map_width(index: int) -> float:
    return 4.6 - 0.55 * index


def _shape(level: Level) -> str:
    stride = 2 ** int(level.name[1:])
    return f"{level.name}  /{stride}\n{level.channels} x {level.height} x {level.width}"


def _draw_maps(axis: Any, maps: Sequence[Level], levels: Sequence[Level], image: str) -> None:
    """Draw the backbone's maps, each next to the level of the same stride."""
    draw_arrow(axis, (_MAPS, -1.05), (_MAPS, -_HEIGHT / 2), color=GREY)
    draw_text(axis, _MAPS + 0.2, -0.95, image)
    for i, level in enumerate(maps):
        y = _ROW * i
        draw_box(axis, _MAPS, y, (_map_width(i), _HEIGHT), _shape(level), ORANGE)
        if i:
            draw_arrow(axis, (_MAPS, y - _ROW + _HEIGHT / 2), (_MAPS, y - _HEIGHT / 2), color=GREY)
    _title(axis, 0.0, _ROW * (len(levels) - 1) + _HEIGHT / 2 + 0.25, "backbone")


def _draw_levels(axis: Any, maps: Sequence[Level], levels: Sequence[Level]) -> None:
    """Draw the pyramid's levels, their sources, and the heads."""
    label_x = _MAPS + 3.55
    for i, level in enumerate(levels):
        y, width = _ROW * i, 4.4 - 0.25 * i
        left = _LEVELS - width / 2
        draw_box(axis, _LEVELS, y, (width, _HEIGHT), _shape(level), SKY)
        draw_arrow(axis, (_LEVELS + width / 2, y), (_HEADS - 1.15, y), color=GREY)
        draw_box(axis, _HEADS, y, (2.3, _HEIGHT), "class + box\nsubnets", GREEN)
        if level.output:  # lateral connection, and the level above added to it
            draw_arrow(axis, (_MAPS + _map_width(i) / 2, y), (left, y))
            draw_text(axis, label_x, y + 0.12, level.kernel, ha="center")
            if levels[i + 1].output:
                above = (_LEVELS, y + _ROW - _HEIGHT / 2)
                draw_arrow(axis, above, (_LEVELS, y + _HEIGHT / 2), color=BLUE)
                middle = (_LEVELS + 0.15, y + _ROW / 2)
                draw_text(axis, *middle, "+ top-down, 2x", va="center", color=BLUE)
        elif level.source == maps[-1].name:  # up from the last map, then right
            top = (_MAPS, _ROW * (len(maps) - 1) + _HEIGHT / 2)
            draw_arrow(axis, top, (left, y), connectionstyle="angle,angleA=90,angleB=0,rad=4")
            draw_text(axis, label_x, y + 0.12, level.kernel, ha="center")
        else:  # from the level below
            draw_arrow(axis, (_LEVELS, y - _ROW + _HEIGHT / 2), (_LEVELS, y - _HEIGHT / 2))
            draw_text(axis, _LEVELS + 0.15, y - _ROW / 2, level.kernel, va="center")
    draw_text(axis, _LEVELS, -0.95, f"then {levels[0].output} on each sum", ha="center")
    top_y = _ROW * (len(levels) - 1) + _HEIGHT / 2 + 0.25
    _title(axis, _LEVELS, top_y, "feature pyramid", ha="center")
    _title(axis, _HEADS, top_y, "shared by all levels", ha="center")


def _draw_subnet(
    axis: Any, name: str, head: nn.Module, per_cell: int, y: float, heads_y: float
) -> None:
    """Draw the layers of a head."""
    *hidden, last = [module for module in head.modules() if isinstance(module, nn.Conv2d)]
    channels, steps = [(hidden or [last])[0].in_channels], []
    if hidden:
        channels.append(hidden[-1].out_channels)
        times = f"{len(hidden)} times\n" if len(hidden) > 1 else ""
        steps.append(times + _kernel(hidden[0]))
    channels.append(last.out_channels)
    steps.append(_kernel(last))
    _title(axis, _DETAILS, y + 1.0, f"{name} subnet")
    for i, count in enumerate(channels):
        x = _DETAILS + 0.9 + 3.25 * i
        draw_box(axis, x, y, (1.9, 1.2), f"W x H\nx {count}", GREEN)
        if i < len(steps):
            draw_arrow(axis, (x + 0.95, y), (x + 2.3, y))
            draw_text(axis, x + 1.62, y + 0.16, steps[i], ha="center", va="bottom")
    outputs = f"{last.out_channels // per_cell} {'classes' if name == 'class' else 'offsets'}"
    anchors = f"{per_cell} anchors per cell x {outputs}"
    draw_text(axis, _DETAILS, y - 1.05, f"{last.out_channels} = {anchors}")
    # From the heads' boxes to their layers.
    start, end = (_HEADS + 1.25, heads_y), (_DETAILS - 0.15, y)
    draw_arrow(axis, start, end, color=GREEN, arrowstyle="-", linestyle=":", linewidth=1.2)
