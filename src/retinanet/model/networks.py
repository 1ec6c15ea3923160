"""ResNet, ResNeXt and MobileNetV2 without their classifiers, with torchvision's names of weights.

The networks equal torchvision's, weights and random initialization included. They are defined here
because ``import torchvision`` imports torch's compiler, which takes longer than ``import torch``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Self

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

NormLayer = Callable[[int], nn.Module]
Maps = tuple[Tensor | None, Tensor, Tensor, Tensor]


class Backbone(nn.Module):
    """A network that returns feature maps.

    Attributes:
        channels: of C2, C3, C4, C5; 0 for a C2 that the network does not have.
    """

    channels: tuple[int, int, int, int]

    def stage_modules(self) -> list[list[nn.Module]]:
        """Return the modules, in order, of the stem and of the stages of C2, C3, C4 and C5."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Maps:
        """Map normalized images (B, 3, H, W) to C2..C5: (B, channels[i], H / s, W / s)."""
        maps, x = [], images
        for stage in self.stage_modules():
            for module in stage:
                x = module(x)
            maps.append(x)
        return maps[1], maps[2], maps[3], maps[4]

    def stage_parameters(self) -> list[list[nn.Parameter]]:
        """Return the parameters of the stem and of the stages of C2, C3, C4 and C5."""
        return [
            [parameter for module in stage for parameter in module.parameters()]
            for stage in self.stage_modules()
        ]

    def train(self, mode: bool = True) -> Self:
        """Set the mode, except that batch norm with frozen weights keeps its statistics too."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm) and (
                module.weight is None or not module.weight.requires_grad
            ):
                module.eval()
        return self


class ResidualBlock(nn.Module):
    """Convolutions with normalization, the input added to their result (He et al. 2016, Figure 5).

    Args:
        in_channels: of the input.
        width: channels of the output, in units of `expansion`.
        stride: of the block.
        downsample: maps the input to the shape of the output; None: the shapes are equal.
        norm_layer: returns the normalization of a number of channels.
    """

    expansion = 1
    conv1: nn.Conv2d
    conv2: nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        width: int,
        stride: int,
        downsample: nn.Module | None,
        norm_layer: NormLayer,
    ) -> None:
        super().__init__()
        convolutions = self.convolutions(in_channels, width, stride)
        self.depth = len(convolutions)
        for i, conv in enumerate(convolutions, 1):
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", norm_layer(conv.out_channels))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def convolutions(self, in_channels: int, width: int, stride: int) -> list[nn.Conv2d]:
        """Return the convolutions in order."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, expansion * width, H / stride, W / stride)."""
        out = x
        for i in range(1, self.depth + 1):
            out = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(out))
            if i < self.depth:
                out = self.relu(out)
        out += x if self.downsample is None else self.downsample(x)
        result: Tensor = self.relu(out)
        return result


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions (Figure 5, left)."""

    def convolutions(self, in_channels: int, width: int, stride: int) -> list[nn.Conv2d]:
        """Return the convolutions in order."""
        return [
            nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
        ]


class Bottleneck(ResidualBlock):
    """Convolutions of 1x1, 3x3 and 1x1 (Figure 5, right).

    The 3x3 convolution has the stride, as in torchvision; in the paper the first 1x1 has it.
    """

    expansion = 4
    groups = 1
    group_width = 64  # channels per group of the 3x3 convolution, at a `width` of 64

    def convolutions(self, in_channels: int, width: int, stride: int) -> list[nn.Conv2d]:
        """Return the convolutions in order."""
        inner, groups = width * self.group_width // 64 * self.groups, self.groups
        return [
            nn.Conv2d(in_channels, inner, 1, bias=False),
            nn.Conv2d(inner, inner, 3, stride, padding=1, groups=groups, bias=False),
            nn.Conv2d(inner, width * self.expansion, 1, bias=False),
        ]


class ResNeXt32x8d(Bottleneck):
    """Bottleneck whose 3x3 convolution has 32 groups (Xie et al. 2017, Figure 3c)."""

    groups = 32
    group_width = 8


def residual_stage(
    block: type[ResidualBlock],
    depth: int,
    in_channels: int,
    width: int,
    stride: int,
    norm_layer: NormLayer,
) -> nn.Sequential:
    """Build `depth` residual blocks, the first with the stride."""
    out_channels = width * block.expansion
    downsample = None
    if stride != 1 or in_channels != out_channels:
        downsample = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm_layer(out_channels)
        )
    return nn.Sequential(
        block(in_channels, width, stride, downsample, norm_layer),
        *(block(out_channels, width, 1, None, norm_layer) for _ in range(depth - 1)),
    )


class InvertedResidual(nn.Module):
    """Inverted residual block (Sandler et al. 2018, Table 1).

    Args:
        in_channels, out_channels: of the feature maps.
        stride: of the depthwise convolution.
        expansion: channels of the depthwise convolution per input channel.
        norm_layer: returns the normalization of a number of channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        expansion: int,
        norm_layer: NormLayer,
    ) -> None:
        super().__init__()
        inner = in_channels * expansion
        expand = [] if expansion == 1 else [conv_relu6(in_channels, inner, 1, norm_layer)]
        self.conv = nn.Sequential(
            *expand,
            conv_relu6(inner, inner, 3, norm_layer, stride=stride, groups=inner),
            nn.Conv2d(inner, out_channels, 1, bias=False),
            norm_layer(out_channels),
        )
        self.is_residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride)."""
        out: Tensor = self.conv(x)
        return x + out if self.is_residual else out


def conv_relu6(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    norm_layer: NormLayer,
    *,
    stride: int = 1,
    groups: int = 1,
) -> nn.Sequential:
    """Build a convolution with normalization and ReLU6 (Sandler et al. 2018, Sec. 3.4)."""
    return nn.Sequential(
        nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=False,
        ),
        norm_layer(out_channels),
        nn.ReLU6(inplace=True),
    )


def init_weights(*networks: nn.Module) -> None:
    """Draw the weights as torchvision: convolutions as He et al. 2015, Sec. 2.2, by outputs.

    On the device "meta" there is nothing to draw, and torch would import its compiler for it.
    """
    for network in networks:
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear) and not module.weight.is_meta:
                nn.init.normal_(module.weight, std=0.01)


class ResNet(Backbone):
    """ResNet or ResNeXt without its classifier (He et al. 2016, Table 1)."""

    blocks: Mapping[str, tuple[type[ResidualBlock], tuple[int, int, int, int], int]] = {
        "resnet10_half": (BasicBlock, (1, 1, 1, 1), 32),  # not torchvision's: no ImageNet weights
        "resnet18": (BasicBlock, (2, 2, 2, 2), 64),
        "resnet34": (BasicBlock, (3, 4, 6, 3), 64),
        "resnet50": (Bottleneck, (3, 4, 6, 3), 64),
        "resnet101": (Bottleneck, (3, 4, 23, 3), 64),
        "resnet152": (Bottleneck, (3, 8, 36, 3), 64),
        "resnext101_32x8d": (ResNeXt32x8d, (3, 4, 23, 3), 64),
    }
    """Type of the blocks, their number in the stages of C2 to C5, and channels of the stem."""

    def __init__(self, name: str, norm_layer: NormLayer) -> None:
        super().__init__()
        block, depths, width = self.blocks[name]
        self.conv1 = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn1 = norm_layer(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        widths = tuple(width * factor for factor in (1, 2, 4, 8))
        two, three, four, five = (block.expansion * width for width in widths)
        self.channels = (two, three, four, five)
        stage = partial(residual_stage, block, norm_layer=norm_layer)
        self.layer1 = stage(depths[0], width, widths[0], 1)
        self.layer2 = stage(depths[1], two, widths[1], 2)
        self.layer3 = stage(depths[2], three, widths[2], 2)
        self.layer4 = stage(depths[3], four, widths[3], 2)
        nn.Linear(five, 1)  # torchvision's classifier: the same random numbers follow
        init_weights(self)

    def stage_modules(self) -> list[list[nn.Module]]:
        """Return the modules of each stage."""
        stem = [self.conv1, self.bn1, self.relu, self.maxpool]
        return [stem, [self.layer1], [self.layer2], [self.layer3], [self.layer4]]


class MobileNetV2(Backbone):
    """MobileNetV2 without its classifier (Sandler et al. 2018, Table 2).

    C5 is its last, 1280-channel map.
    """

    blocks = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    """Expansion, output channels, number and first stride of consecutive blocks."""

    ends = (2, 4, 7, 14, 19)  # of the stem, C2, C3, C4, C5 in `features`

    def __init__(self, name: str, norm_layer: NormLayer) -> None:
        super().__init__()
        channels = 32
        features: list[nn.Module] = [conv_relu6(3, channels, 3, norm_layer, stride=2)]
        for expansion, out_channels, count, first_stride in self.blocks:
            for i in range(count):
                stride = first_stride if i == 0 else 1
                features.append(
                    InvertedResidual(channels, out_channels, stride, expansion, norm_layer)
                )
                channels = out_channels
        features.append(conv_relu6(channels, 1280, 1, norm_layer))
        self.features = nn.Sequential(*features)
        self.channels = (24, 32, 96, 1280)
        init_weights(self, nn.Linear(1280, 1))  # with torchvision's classifier, as in ResNet

    def stage_modules(self) -> list[list[nn.Module]]:
        """Return the modules of each stage."""
        return [list(self.features)[start:end] for start, end in pairwise((0, *self.ends))]
