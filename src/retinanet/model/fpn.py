"""The feature pyramid: C3..C5 to P3..P7.

Source: Lin et al. 2017, Sec. 4 and its footnote 2 (P6 from C5 by a 3x3 stride-2 convolution, P7 by
ReLU and another on P6); the pyramid itself is Lin et al. 2017 (arXiv:1612.03144).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
