"""Blocks of ResNet, ResNeXt and MobileNetV2, with torchvision's names of weights.

The networks equal torchvision's, weights and random initialization included. They are defined here
because ``import torchvision`` imports torch's compiler, which takes longer than ``import torch``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

NormLayer = Callable[[int], nn.Module]


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
