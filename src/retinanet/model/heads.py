"""The feature pyramid, C3..C5 to P3..P7, and the class and box subnets shared by its levels.

Source: Lin et al. 2017, Sec. 4 (shape) and its footnote 2 (P6 from C5 by a 3x3 stride-2
convolution, P7 by ReLU and another on P6), and Sec. 4.1 (initialization of the subnets: Gaussian
with standard deviation .01, bias 0 except for the prior); the pyramid itself is Lin et al. 2017
(arXiv:1612.03144).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retinanet.boxes import distances_to_deltas
from retinanet.config import ModelSpec, is_own
from retinanet.errors import ConfigError
from retinanet.model.norms import group_norm
from retinanet.own import build_module


class FeaturePyramid(nn.Module):
    """Lateral connections, a top-down sum, and two coarser levels.

    Args:
        in_channels: of the input maps, finest first.
        channels: of every level.
        p6_from: "c5" (the paper) or "p5".
        p7_relu: apply ReLU to P6 before P7 (the paper).
    """

    def __init__(
        self, in_channels: Sequence[int], channels: int, p6_from: str, *, p7_relu: bool = True
    ) -> None:
        super().__init__()
        self.p6_from, self.p7_relu = p6_from, p7_relu
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, 1) for width in in_channels)
        self.output = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels
        )
        coarsest = in_channels[-1] if p6_from == "c5" else channels
        self.p6 = nn.Conv2d(coarsest, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # Detectron's Xavier fill, the pyramid authors' own: uniform, variance 1 / fan in.
                nn.init.kaiming_uniform_(module.weight, a=1)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Map feature maps, each half as large as the map before, to levels, finest first."""
        inner = self.lateral[-1](maps[-1])
        levels = [self.output[-1](inner)]
        for i in range(len(maps) - 2, -1, -1):
            side = self.lateral[i](maps[i])
            inner = side + F.interpolate(inner, size=side.shape[-2:], mode="nearest")
            levels.insert(0, self.output[i](inner))
        p6 = _halve(self.p6, maps[-1] if self.p6_from == "c5" else levels[-1])
        return (*levels, p6, _halve(self.p7, F.relu(p6) if self.p7_relu else p6))


def _halve(convolution: nn.Conv2d, level: Tensor) -> Tensor:
    """Apply a stride-2 convolution, on a CPU in its weights' precision even under autocast.

    For a map of a single cell, torch 2.15's bfloat16 weight gradient on a CPU is uninitialized
    memory. These maps are tiny.
    """
    if level.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        result: Tensor = convolution(level)
        return result
    with torch.autocast("cpu", enabled=False):
        exact: Tensor = convolution(level.to(convolution.weight.dtype))
    return exact.to(level.dtype)


class Head(nn.Module):
    """`depth` 3x3 convolutions with ReLU, then one 3x3 convolution to `outputs` channels.

    Args:
        channels: of the pyramid, and of all but the last convolution.
        depth: convolutions before the last; the paper has 4.
        outputs: A * K for the class head, A * 4 for the box head (with n bins A * 4 * (n + 1)).
        norm: "none" (the paper) or "group": group norm before each ReLU.
    """

    def __init__(self, channels: int, depth: int, outputs: int, norm: str = "none") -> None:
        super().__init__()
        self.tower = nn.Sequential()
        for _ in range(depth):
            conv = nn.Conv2d(channels, channels, 3, padding=1, bias=norm == "none")
            middle = [] if norm == "none" else [group_norm(channels)]
            self.tower.append(nn.Sequential(conv, *middle, nn.ReLU(inplace=True)))
        self.last = nn.Conv2d(channels, outputs, 3, padding=1)
        if self.last.weight.is_meta:  # torch would import its compiler for random numbers
            return
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, level: Tensor) -> Tensor:
        """Map (B, channels, H, W) to (B, outputs, H, W)."""
        result: Tensor = self.last(self.tower(level))
        return result


def build_head(spec: ModelSpec, outputs: int) -> nn.Module:
    """Build a head: the paper's, or the user's by ``Net(channels, outputs)``."""
    if is_own(spec.head):
        return build_module("head", spec.head, channels=spec.channels, outputs=outputs)
    return Head(spec.channels, spec.head_depth, outputs, spec.head_norm)


def distributions_to_deltas(level: Tensor, bins: int) -> Tensor:
    """Convert the distributions of the sides' distances to deltas, by their expectation.

    Source: Li et al. 2020 (arXiv:2006.04388), Sec. 3.3, Eq. 5.

    Args:
        level: (B, A * 4 * (bins + 1), H, W) logits over the distances 0..bins of each side, in the
            unit of :func:`retinanet.boxes.side_distances`.
        bins: n.

    Returns:
        (B, A * 4, H, W) of the type of `level`; computed in float32 or wider.
    """
    working = torch.float64 if level.dtype == torch.float64 else torch.float32
    values = torch.arange(bins + 1, dtype=working, device=level.device).view(-1, 1, 1)
    # Side by side: after a reshape to all sides OpenVINO knows no shapes, and int8 needs them.
    sides = [
        (logits.to(working).softmax(dim=1) * values).sum(dim=1, keepdim=True)
        for logits in torch.split(level, bins + 1, dim=1)
    ]
    deltas: list[Tensor] = []
    for first in range(0, len(sides), 4):
        deltas += distances_to_deltas(torch.stack(sides[first : first + 4], dim=-1)).unbind(dim=-1)
    return torch.cat(deltas, dim=1).to(level.dtype)


def start_at_anchors(head: Head, bins: int) -> None:
    """Set the last bias so that each box is at first nearly its anchor, as with deltas of 0.

    Bins of equal probability would begin with boxes of 4 times an anchor's side (n = 16), by whose
    IoU the task-aligned assignment would choose. The probability of each bin is a constant times
    that of the one before, such that the mean is 2 (:func:`retinanet.boxes.side_distances`).
    A head of one's own starts as it was built.
    """
    values = torch.arange(bins + 1, dtype=torch.float64, device="cpu")  # also of a meta model
    low, high = -10.0, 10.0  # logarithm of the constant; the mean grows with it
    for _ in range(50):
        middle = (low + high) / 2
        below = float((values * middle).softmax(dim=0) @ values) < 2
        low, high = (middle, high) if below else (low, middle)
    bias = low * values.repeat(head.last.out_channels // (bins + 1))
    with torch.no_grad():
        cast(Tensor, head.last.bias).copy_(bias)


def last_convolution(head: nn.Module, outputs: int) -> str:
    """Return the name of the convolution that computes a head's outputs."""
    names = [
        name
        for name, module in head.named_modules()
        if isinstance(module, nn.Conv2d) and module.out_channels == outputs
    ]
    if not names or head.get_submodule(names[-1]).bias is None:
        raise ConfigError(
            f"the head {type(head).__name__} needs a last convolution of {outputs} channels with a "
            "bias, which is set to the prior (Sec. 4.1)"
        )
    return str(names[-1])


def prior_bias(prior: float) -> float:
    """Return the bias whose sigmoid is `prior` (Sec. 3.3): -log((1 - prior) / prior).

    >>> round(prior_bias(0.01), 4)
    -4.5951
    """
    if not 0 < prior < 1:
        raise ValueError(f"prior lies between 0 and 1, got {prior}")
    return -math.log((1 - prior) / prior)
