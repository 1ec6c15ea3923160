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
from itertools import pairwise
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
    cells = sum(level.height * level.width for level in levels)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    top = len(levels) - 0.4
    with open_axes(9.4, 1.9 + 0.75 * len(levels), stem) as (files, axis):
        axis.axis("off")
        boxes = {"image": _draw_box(axis, 0, -1, f"image 3 x {height} x {width}", GREY)}
        below = "image"
        for i, level in enumerate(maps):
            boxes[level.name] = _draw_box(axis, 0, i, _describe(level), ORANGE)
            _draw_arrow(axis, boxes[below], boxes[level.name])
            below = level.name
        for i, level in enumerate(levels):
            boxes[level.name] = _draw_box(axis, 2, i, _describe(level), SKY)
            _draw_arrow(axis, boxes[level.source], boxes[level.name], level.kernel)
            subnets = _draw_box(axis, 3.5, i, "class + box subnets", GREEN)
            _draw_arrow(axis, boxes[level.name], subnets)
        for low, high in pairwise(level.name for level in levels if level.output):
            _draw_arrow(axis, boxes[high], boxes[low], "+ top-down, 2x", BLUE)
        for x, title in ((0, "backbone"), (2, "feature pyramid"), (3.5, "shared by all levels")):
            axis.text(x, top, title, ha="center", fontweight="bold")
        text = f"then {levels[0].output} on each sum"
        axis.text(2, -0.75, text, ha="center", fontsize=8, color=DARK)
        per_cell = model.anchors.per_cell
        for i, (name, head) in enumerate((("class", model.class_head), ("box", model.box_head))):
            axis.text(0.8, -1.2 - 0.35 * i, _describe_head(name, head, per_cell), color=DARK)
        axis.set(xlim=(-0.7, 4.1), ylim=(-1.7, top + 0.3))
        axis.set_title(
            f"{model.spec.backbone}, an image of {height} x {width} pixels: "
            f"{per_cell * cells:,} anchors, {parameters / 1e6:.1f} million weights"
        )
    return files


def _describe(level: Level) -> str:
    stride = 2 ** int(level.name[1:])
    return f"{level.name}  /{stride}\n{level.channels} x {level.height} x {level.width}"


def _describe_head(name: str, head: nn.Module, per_cell: int) -> str:
    *hidden, last = [module for module in head.modules() if isinstance(module, nn.Conv2d)]
    layers = [f"{len(hidden)} x {_kernel(hidden[0])}, {hidden[-1].out_channels}"] if hidden else []
    outputs = f"{last.out_channels // per_cell} {'classes' if name == 'class' else 'offsets'}"
    layers.append(f"{_kernel(last)}, {last.out_channels} = {per_cell} anchors per cell x {outputs}")
    return f"{name} subnet: {'; '.join(layers)}"


def _draw_box(axis: Any, x: float, y: float, text: str, colour: str) -> Any:
    style = {"boxstyle": "round,pad=0.4", "facecolor": f"{colour}30", "edgecolor": colour}
    where = {"ha": "center", "va": "center"}
    return axis.text(x, y, text, fontsize=8.5, color=DARK, bbox=style, **where)


def _draw_arrow(axis: Any, start: Any, end: Any, label: str = "", colour: str = GREY) -> None:
    """Draw an arrow from the edge of a box to that of another."""
    ends = {"patchA": start.get_bbox_patch(), "patchB": end.get_bbox_patch()}
    style = {"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0}
    (x1, y1), (x2, y2) = start.get_position(), end.get_position()
    axis.annotate("", (x2, y2), (x1, y1), arrowprops={**style, **ends})
    if label:
        beside = {"ha": "left"} if x1 == x2 else {"ha": "center", "va": "bottom"}
        middle = ((x1 + x2) / 2 + 0.05 * (x1 == x2), (y1 + y2) / 2 + 0.08 * (y1 != y2 and x1 != x2))
        axis.text(*middle, label, fontsize=8, color=DARK if colour == GREY else colour, **beside)
