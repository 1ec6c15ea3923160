"""A backbone of three convolutions, for tests in which the backbone does not matter."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor, nn

from retinanet.model.backbone import BACKBONES, Backbone


class TinyBackbone(Backbone):
    """C3, C4 and C5 by one convolution each; no C2."""

    channels = (0, 32, 64, 256)

    def __init__(self, name: str, norm_layer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        layers = ((3, 32, 9, 8, 4), (32, 64, 3, 2, 1), (64, 256, 3, 2, 1))
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, side, stride, padding, bias=False),
                norm_layer(after),
                nn.ReLU(),
            )
            for before, after, side, stride, padding in layers
        )

    def forward(self, images: Tensor) -> tuple[None, Tensor, Tensor, Tensor]:
        c3 = self.stages[0](images)
        c4 = self.stages[1](c3)
        return None, c3, c4, self.stages[2](c4)

    def stage_parameters(self) -> list[list[nn.Parameter]]:
        return [[], [], *(list(stage.parameters()) for stage in self.stages)]


@pytest.fixture(scope="session")
def tiny_backbone() -> str:
    """Register the backbone until the tests end, and return its name."""
    BACKBONES["tiny"] = TinyBackbone
    return "tiny"
