"""Data of the figures that need no training, from this package's losses and networks.

Source: Lin et al. 2017: Figure 1 (Sec. 3.2), Figure 3 (Sec. 4), Figures 5 to 7 (Appendix A and B).
Figures 2 and 4 are measured: :mod:`retinanet.report.speed_accuracy` and
:mod:`retinanet.report.loss_distribution`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from retinanet.losses import cross_entropy, focal_loss, focal_loss_star
from retinanet.model.retinanet import RetinaNet
from retinanet.paper.tables import STAR_BETAS, STAR_GAMMAS
from retinanet.report.paper_plots import (
    Architecture,
    Convolution,
    Curve,
    Level,
    StarCurve,
    Subnet,
)

GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)
"""Gammas of Figure 1."""

STAR_SETTINGS = ((2.0, 1.0), (4.0, 0.0))
"""(gamma, beta) of FL* in Figures 5 and 6 and in Table 3."""

PAPER_EFFECTIVE: Mapping[tuple[float, float], bool] = dict.fromkeys(STAR_SETTINGS, True)
"""(gamma, beta) of FL* with an AP over 33.5 in the paper (Table 3: 33.8 and 33.9)."""

_POINTS = 401

_LOSSES: Mapping[str, Callable[..., Tensor]] = {
    "CE": cross_entropy,
    "FL γ = 2": partial(focal_loss, alpha=None, gamma=2.0),
    **{
        f"FL* γ = {gamma:g}, β = {beta:g}": partial(focal_loss_star, gamma=gamma, beta=beta)
        for gamma, beta in STAR_SETTINGS
    },
}
"""Losses of Figures 5 and 6 by their labels."""


def focal_curves(points: int = _POINTS) -> tuple[Curve, ...]:
    """Compute Figure 1: focal loss without alpha over p_t, evenly from .001 to .999."""
    p = torch.linspace(0.001, 0.999, points, dtype=torch.float64)
    return tuple(
        Curve(
            f"γ = {gamma:g}{' (CE)' if gamma == 0 else ''}",
            tuple(p.tolist()),
            _losses(partial(focal_loss, alpha=None, gamma=gamma), torch.logit(p)),
        )
        for gamma in GAMMAS
    )


def variant_curves(points: int = _POINTS) -> tuple[Curve, ...]:
    """Compute Figure 5: CE, FL and two FL* over x_t = y x."""
    x = _x_t(points)
    return tuple(
        Curve(label, tuple(x.tolist()), _losses(loss, x)) for label, loss in _LOSSES.items()
    )


def variant_slopes(points: int = _POINTS) -> tuple[Curve, ...]:
    """Compute Figure 6: derivatives of Figure 5's losses by x for y = 1, by autograd."""
    curves = []
    for label, loss in _LOSSES.items():
        x = _x_t(points).requires_grad_()
        (slope,) = torch.autograd.grad(loss(x[:, None], _positives(x), reduction="sum"), x)
        curves.append(Curve(label, tuple(x.tolist()), tuple(slope.tolist())))
    return tuple(curves)


def star_curves(
    effective: Mapping[tuple[float, float], bool] = PAPER_EFFECTIVE, points: int = _POINTS
) -> tuple[StarCurve, ...]:
    """Compute Figure 7: FL* over a grid of gamma and beta, x_t from -6 to 6.

    Args:
        effective: by (gamma, beta); settings outside the grid are added to it.
        points: per curve.
    """
    x = _x_t(points)
    grid = {(gamma, beta) for gamma in STAR_GAMMAS for beta in STAR_BETAS} | effective.keys()
    return tuple(
        StarCurve(
            gamma,
            beta,
            tuple(x.tolist()),
            _losses(partial(focal_loss_star, gamma=gamma, beta=beta), x),
            effective.get((gamma, beta)),
        )
        for gamma, beta in sorted(grid)
    )


def _x_t(points: int) -> Tensor:
    return torch.linspace(-6, 6, points, dtype=torch.float64)


def _losses(loss: Callable[..., Tensor], logits: Tensor) -> tuple[float, ...]:
    """Return the losses of examples with y = 1 and logits (N,)."""
    values = loss(logits[:, None], _positives(logits), reduction="none")
    return tuple(values[:, 0].tolist())


def _positives(logits: Tensor) -> Tensor:
    return torch.zeros(len(logits), dtype=torch.int64)


def read_architecture(model: RetinaNet, height: int = 800, width: int = 1024) -> Architecture:
    """Read Figure 3 from a model's modules: levels, channels, convolutions and heads.

    Args:
        model: any RetinaNet.
        height, width: of the image in pixels; padded to multiples of 32.
    """
    divisor, pyramid = model.size_divisor, model.pyramid
    height, width = (math.ceil(side / divisor) * divisor for side in (height, width))

    def level(name: str, channels: int, *made: str | nn.Module) -> Level:
        stride = 2 ** int(name[1:])
        shape = (channels, math.ceil(height / stride), math.ceil(width / stride))
        convolutions = [_convolution(m) if isinstance(m, nn.Conv2d) else m for m in made]
        return Level(name, stride, *shape, *convolutions)  # type: ignore[arg-type]

    maps, levels = [], []
    first = 2 if model.p2 else 3
    pairs = zip(pyramid.lateral, pyramid.output, strict=True)
    for number, (lateral, output) in enumerate(pairs, first):
        assert isinstance(lateral, nn.Conv2d)
        assert isinstance(output, nn.Conv2d)
        maps.append(level(f"C{number}", lateral.in_channels))
        levels.append(level(f"P{number}", output.out_channels, f"C{number}", lateral, output))
    p6_from = pyramid.p6_from.upper()
    levels.append(level("P6", pyramid.p6.out_channels, p6_from, pyramid.p6))
    levels.append(level("P7", pyramid.p7.out_channels, "P6", pyramid.p7))
    per_cell = model.anchors.per_cell
    return Architecture(
        backbone=str(model.spec.backbone),
        height=height,
        width=width,
        maps=tuple(maps),
        levels=tuple(levels),
        class_subnet=_subnet(model.class_head, per_cell),
        box_subnet=_subnet(model.box_head, per_cell),
        anchors=per_cell * sum(made.height * made.width for made in levels),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
    )


def _subnet(head: nn.Module, per_cell: int) -> Subnet:
    convolutions = [_convolution(m) for m in head.modules() if isinstance(m, nn.Conv2d)]
    return Subnet(tuple(convolutions), per_cell, convolutions[-1].out_channels // per_cell)


def _convolution(module: nn.Conv2d) -> Convolution:
    kernel, stride = module.kernel_size[0], module.stride[0]
    return Convolution(kernel, stride, module.in_channels, module.out_channels)
