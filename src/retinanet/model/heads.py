"""The class and box subnets, shared by all levels of the pyramid.

Source: Lin et al. 2017, Sec. 4 (shape) and Sec. 4.1 (initialization: Gaussian with standard
deviation .01, bias 0 except for the prior).
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from retinanet.config import ModelSpec, is_own
from retinanet.errors import ConfigError
from retinanet.model.norms import group_norm
from retinanet.own import build_module


class Head(nn.Module):
    """`depth` 3x3 convolutions with ReLU, then one 3x3 convolution to `outputs` channels.

    Args:
        channels: of the pyramid, and of all but the last convolution.
        depth: convolutions before the last; the paper has 4.
        outputs: A * K for the class head, A * 4 for the box head.
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
