"""The numbers of the figures that need no training, from this package's own losses and networks.

Source: Lin et al. 2017: Figure 1 (Sec. 3.2), Figure 3 (Sec. 4), Figures 5 to 7 (Appendix A and B).
Figures 2 and 4 are measured: :mod:`retinanet.evaluation.speed_accuracy` and
:mod:`retinanet.evaluation.loss_distribution`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retinanet.losses import cross_entropy, focal_loss, focal_loss_star
from retinanet.model.heads import Head
from retinanet.model.retinanet import RetinaNet
from retinanet.paper.tables import STAR_BETAS, STAR_GAMMAS

GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)
"""Of Figure 1."""

STAR_SETTINGS = ((2.0, 1.0), (4.0, 0.0))
"""(gamma, beta) of FL* in Figures 5 and 6 and in Table 3."""

PAPER_EFFECTIVE: Mapping[tuple[float, float], bool] = dict.fromkeys(STAR_SETTINGS, True)
"""Settings (gamma, beta) of FL* whose AP the paper prints (Table 3: 33.8 and 33.9, over 33.5)."""

_POINTS = 401
_LIMIT = 6.0  # of x_t
_PROBE = 1024  # pixels, a multiple of every stride


@dataclass(frozen=True, slots=True)
class Curve:
    """A line of a figure.

    Attributes:
        label: as a legend shows it.
        x, y: its points.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class StarCurve:
    """FL* at one setting, and whether training with it works.

    Attributes:
        gamma, beta: the setting.
        x, y: x_t and loss.
        effective: whether the AP was over 33.5 in the paper, or what stands for that elsewhere;
            None: not known.
    """

    gamma: float
    beta: float
    x: tuple[float, ...]
    y: tuple[float, ...]
    effective: bool | None


def focal_curves(gammas: Sequence[float] = GAMMAS, points: int = _POINTS) -> tuple[Curve, ...]:
    """Figure 1: focal loss, without alpha, against the probability of the ground truth class.

    Args:
        gammas: a curve each; 0 is cross entropy.
        points: on each, evenly from .001 to .999.
    """
    p = torch.linspace(0.001, 0.999, points, dtype=torch.float64)
    return tuple(
        Curve(
            f"γ = {gamma:g}{' (CE)' if gamma == 0 else ''}",
            _numbers(p),
            _numbers(_of_positives(_focal(gamma), torch.logit(p))),
        )
        for gamma in gammas
    )


def variant_curves(points: int = _POINTS) -> tuple[Curve, ...]:
    """Figure 5: CE, FL and two FL* against x_t = y x."""
    x = _x_t(points)
    return tuple(
        Curve(name, _numbers(x), _numbers(_of_positives(loss, x)))
        for name, loss in _variants().items()
    )


def variant_slopes(points: int = _POINTS) -> tuple[Curve, ...]:
    """Figure 6: the derivatives of Figure 5's losses by x, for y = 1.

    They are autograd's through the sum over labels: the gradient that trains.
    """
    curves = []
    for name, loss in _variants().items():
        x = _x_t(points).requires_grad_()
        (slope,) = torch.autograd.grad(loss(x[:, None], _zeros(x), "sum"), x)
        curves.append(Curve(name, _numbers(x), _numbers(slope)))
    return tuple(curves)


def star_curves(
    effective: Mapping[tuple[float, float], bool] = PAPER_EFFECTIVE,
    *,
    gammas: Sequence[float] = STAR_GAMMAS,
    betas: Sequence[float] = STAR_BETAS,
    points: int = _POINTS,
) -> tuple[StarCurve, ...]:
    """Figure 7: FL* over a grid of gamma and beta.

    Args:
        effective: by (gamma, beta) whether training with it worked, as the paper or somebody
            measured; may be empty. A setting that is not of the grid is added to it.
        gammas, betas: the grid.
        points: on each curve, x_t from -6 to 6.
    """
    known = {(float(gamma), float(beta)): good for (gamma, beta), good in effective.items()}
    grid = [(float(gamma), float(beta)) for gamma in gammas for beta in betas]
    x = _x_t(points)
    return tuple(
        StarCurve(
            gamma,
            beta,
            _numbers(x),
            _numbers(_of_positives(_star(gamma, beta), x)),
            known.get((gamma, beta)),
        )
        for gamma, beta in sorted({*grid, *known})
    )


@dataclass(frozen=True, slots=True)
class Convolution:
    """A convolution: a kernel of `kernel` x `kernel` pixels, from and to so many channels."""

    kernel: int
    stride: int
    in_channels: int
    out_channels: int


@dataclass(frozen=True, slots=True)
class Level:
    """A feature map.

    Attributes:
        name: ``C3`` or ``P3``.
        stride: pixels of the image a cell.
        channels, height, width: its shape for the image.
        source: what it is made of: ``C3`` for P3, with ``P4`` above where it is added top-down.
        convolution: the one that makes it of `source`; None for the backbone's own maps.
        output: the one after the top-down sum; None where there is none.
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
    """A head, which all levels share.

    Attributes:
        convolutions: all of them, in order; the last one says the result.
        per_cell: anchors of a cell.
        outputs: numbers an anchor: K classes, or 4 of a box.
    """

    convolutions: tuple[Convolution, ...]
    per_cell: int
    outputs: int


@dataclass(frozen=True, slots=True)
class Architecture:
    """Figure 3 of a network that was built.

    Attributes:
        backbone: its name.
        height, width: pixels of the image, padded to multiples of 32.
        maps: the backbone's, finest first; those that the pyramid takes.
        levels: the pyramid's, finest first.
        class_subnet, box_subnet: the heads.
        anchors: of the image, all levels together.
        parameters: weights in all.
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


def read_architecture(model: RetinaNet, height: int = 800, width: int = 1024) -> Architecture:
    """Levels, channels, shapes and heads of a model, from what its modules do with an image.

    A forward on the meta device computes nothing; the model is the same afterwards.

    Args:
        model: any RetinaNet.
        height, width: of the image, pixels; padded as the network needs it.

    Raises:
        ValueError: the image has no pixels.
    """
    if height < 1 or width < 1:
        raise ValueError(f"an image has pixels: got {height} x {width}")
    height, width = (
        math.ceil(side / model.size_divisor) * model.size_divisor for side in (height, width)
    )
    probe = _trace(model, _PROBE, _PROBE)
    strides = {name: _PROBE // tensor.shape[-1] for name, tensor in probe.levels.items()}
    trace = _trace(model, height, width)
    pyramid = model.pyramid
    maps = tuple(_level(name, strides, trace) for name in trace.levels if name[0] == "C")
    # The laterals take the maps in their order; what the other two take was seen.
    made: dict[str, tuple[str, nn.Module, nn.Module | None]] = {
        f"P{one.name[1:]}": (one.name, lateral, output)
        for one, lateral, output in zip(maps, pyramid.lateral, pyramid.output, strict=True)
    }
    for convolution in (pyramid.p6, pyramid.p7):
        made[trace.outcomes[convolution]] = (trace.sources[convolution], convolution, None)
    levels = []
    for name in (one for one in trace.levels if one[0] == "P"):
        source, first, output = made[name]
        levels.append(
            _level(
                name,
                strides,
                trace,
                source=source,
                convolution=_convolution(first),
                output=None if output is None else _convolution(output),
            )
        )
    per_cell = model.anchors.per_cell
    return Architecture(
        backbone=str(model.spec["backbone"]),
        height=height,
        width=width,
        maps=maps,
        levels=tuple(levels),
        class_subnet=_subnet(model.class_head, trace, per_cell),
        box_subnet=_subnet(model.box_head, trace, per_cell),
        anchors=per_cell * sum(one.height * one.width for one in levels),
        parameters=sum(one.numel() for one in model.parameters()),
    )


class _Trace:
    """What was seen of one forward.

    Attributes:
        levels: maps and levels by name, finest first.
        sources: the level that went into P6's and P7's convolution.
        outcomes: the level that came out of it.
        ran: the convolutions of each head, in the order in which they ran on the first level.
    """

    def __init__(self) -> None:
        self.levels: dict[str, Tensor] = {}
        self.sources: dict[nn.Module, str] = {}
        self.outcomes: dict[nn.Module, str] = {}
        self.ran: dict[nn.Module, list[nn.Module]] = {}


@torch.no_grad()
def _trace(model: RetinaNet, height: int, width: int) -> _Trace:
    trace = _Trace()
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def watch(module: nn.Module, taken: tuple[Any, ...], made: Any) -> None:
        seen[module] = (taken[0], made)

    def watch_head(head: nn.Module) -> Callable[..., None]:
        trace.ran[head] = []

        def note(module: nn.Module, *_: Any) -> None:
            if module not in trace.ran[head]:
                trace.ran[head].append(module)

        return note

    pyramid = model.pyramid
    hooks = [
        one.register_forward_hook(watch)
        for one in (model.backbone, pyramid, pyramid.p6, pyramid.p7)
    ]
    for head in (model.class_head, model.box_head):
        note = watch_head(head)
        hooks += [
            one.register_forward_hook(note) for one in head.modules() if isinstance(one, nn.Conv2d)
        ]
    try:
        with _evaluating(model):
            state = {
                name: tensor.to("meta")
                for name, tensor in (*model.named_parameters(), *model.named_buffers())
            }
            image = torch.empty(1, 3, height, width, device="meta")
            torch.func.functional_call(model, state, (image,))
    finally:
        for hook in hooks:
            hook.remove()
    taken = seen[pyramid][0]
    made: Any = seen[pyramid][1]
    last = 5  # the coarsest map that goes in is C5
    first = last - len(taken) + 1
    trace.levels = {f"C{first + place}": one for place, one in enumerate(taken)}
    trace.levels |= {f"P{first + place}": one for place, one in enumerate(made)}
    for convolution in (pyramid.p6, pyramid.p7):
        came, went = seen[convolution]
        trace.outcomes[convolution] = _name_of(went, trace.levels)
        # P7 takes P6 after a ReLU, which is another tensor: then it is the level before.
        names = list(trace.levels)
        before = names[names.index(trace.outcomes[convolution]) - 1]
        trace.sources[convolution] = _name_of(came, trace.levels) or before
    return trace


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode for as long: batch norm in training wants more than a cell."""
    training = [one for one in model.modules() if one.training]
    model.eval()
    try:
        yield
    finally:
        for one in training:
            one.training = True


def _name_of(tensor: Tensor, levels: Mapping[str, Tensor]) -> str:
    return next((name for name, one in levels.items() if one is tensor), "")


def _level(name: str, strides: Mapping[str, int], trace: _Trace, **made: Any) -> Level:
    _, channels, height, width = trace.levels[name].shape
    return Level(name, strides[name], channels, height, width, **made)


def _subnet(head: Head, trace: _Trace, per_cell: int) -> Subnet:
    convolutions = tuple(_convolution(one) for one in trace.ran[head])
    return Subnet(convolutions, per_cell, convolutions[-1].out_channels // per_cell)


def _convolution(module: nn.Module) -> Convolution:
    assert isinstance(module, nn.Conv2d)
    return Convolution(
        module.kernel_size[0], module.stride[0], module.in_channels, module.out_channels
    )


_Loss = Callable[[Tensor, Tensor, Any], Tensor]
"""From logits (N, 1), labels (N,) and a reduction to the loss."""


def _variants() -> dict[str, _Loss]:
    """The losses of Figures 5 and 6 by the legend's names."""
    losses: dict[str, _Loss] = {"CE": _cross_entropy, "FL γ = 2": _focal(2.0)}
    for gamma, beta in STAR_SETTINGS:
        losses[f"FL* γ = {gamma:g}, β = {beta:g}"] = _star(gamma, beta)
    return losses


def _cross_entropy(logits: Tensor, labels: Tensor, reduction: Any) -> Tensor:
    return cross_entropy(logits, labels, reduction=reduction)


def _focal(gamma: float) -> _Loss:
    return lambda x, labels, how: focal_loss(x, labels, alpha=None, gamma=gamma, reduction=how)


def _star(gamma: float, beta: float) -> _Loss:
    return lambda x, labels, how: focal_loss_star(x, labels, gamma=gamma, beta=beta, reduction=how)


def _of_positives(loss: _Loss, logits: Tensor) -> Tensor:
    """(N,) losses of examples of y = 1 with these logits (N,)."""
    return loss(logits[:, None], _zeros(logits), "none")[:, 0]


def _zeros(logits: Tensor) -> Tensor:
    return torch.zeros(len(logits), dtype=torch.int64)


def _x_t(points: int) -> Tensor:
    return torch.linspace(-_LIMIT, _LIMIT, points, dtype=torch.float64)


def _numbers(values: Tensor) -> tuple[float, ...]:
    return tuple(values.tolist())
