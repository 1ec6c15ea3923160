"""A network of few convolutions, and its backbone ``tiny``, for tests of other things."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from retinanet.anchors import anchor_spec
from retinanet.model.backbone import BACKBONES
from retinanet.model.heads import FeaturePyramid
from retinanet.model.networks import Backbone
from retinanet.model.retinanet import RetinaNet


class TinyBackbone(Backbone):
    """C2 to C5 by one convolution each."""

    channels = (16, 32, 64, 256)

    def __init__(self, name: str, norm_layer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        layers = ((3, 16, 5, 4, 2), (16, 32, 3, 2, 1), (32, 64, 3, 2, 1), (64, 256, 3, 2, 1))
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, side, stride, padding, bias=False),
                norm_layer(after),
                nn.ReLU(),
            )
            for before, after, side, stride, padding in layers
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = [images]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return tuple(maps[1:])

    def stage_parameters(self) -> list[list[nn.Parameter]]:
        return [[], *(list(stage.parameters()) for stage in self.stages)]


BACKBONES["tiny"] = TinyBackbone


def tiny_network(num_classes: int = 2, *, spread: bool = False, **settings: Any) -> RetinaNet:
    """A network with random weights, in eval mode; `spread`: whose scores differ."""
    torch.manual_seed(0)
    small = {"backbone": "tiny", "norm": "group", "channels": 16, "head_depth": 1}
    model = RetinaNet(num_classes, **(small | settings)).eval()
    for head in (model.class_head, model.box_head) if spread else ():
        for parameter in head.parameters():
            if parameter.dim() > 1:
                nn.init.kaiming_normal_(parameter)
    return model


class TwoLevels(FeaturePyramid):
    """P3 and P4 only."""

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return super().forward(maps)[:2]


def two_level_network(num_classes: int = 2, **settings: Any) -> RetinaNet:
    """The network without P5 to P7: compilers take half the time for it."""
    model = tiny_network(num_classes, **settings)
    model.pyramid = TwoLevels(model.backbone.channels[-3:], model.spec.channels, "c5").eval()
    model.strides = (8, 16)
    model.anchors = anchor_spec(model.strides)
    return model


QUICK_COMPILE = {
    "cpp.vec_isa_ok": False,
    "cpp_cache_precompile_headers": False,
    "aot_inductor.compile_wrapper_opt_level": "O0",
}
"""Settings of torch's inductor: without vector instructions, which take most of the compilation."""
