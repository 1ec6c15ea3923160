"""RetinaNet: backbone, pyramid and two heads.

Source: Lin et al. 2017, Sec. 4, Figure 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from retinanet.anchors import ASPECT_RATIOS, OCTAVE_SCALES, AnchorSpec, Rounding, anchor_spec
from retinanet.errors import ConfigError
from retinanet.model.backbone import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    build_backbone,
    find_weights,
    load_backbone,
)
from retinanet.model.fpn import FeaturePyramid
from retinanet.model.heads import Head, prior_bias
from retinanet.structures import Outputs


@contextmanager
def _default_float32() -> Iterator[None]:
    """Let modules be created in float32 whatever torch's default type is; also a decorator."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class RetinaNet(nn.Module):
    """A one-stage detector: the same outputs in training and in evaluation.

    The arguments are those of :func:`build_retinanet` with nothing left open; weights are random.

    Attributes:
        num_classes: K.
        anchors: the anchors that its outputs refer to.
        strides: pixels of the input a cell, a level: 8, 16, 32, 64, 128 (4 before them with P2).
        pixel_mean, pixel_std: (3, 1, 1) of 0..255 RGB, subtracted and divided by inside.
        spec: plain keyword arguments that build the same network again.
        size_divisor: height and width of the images are multiples of it.
    """

    size_divisor = 32
    pixel_mean: Tensor
    pixel_std: Tensor

    @_default_float32()
    def __init__(
        self,
        *,
        backbone: str,
        num_classes: int,
        norm: str = "frozen",
        frozen_stages: int = 2,
        norm_eps: float = 1e-5,
        p2: bool = False,
        p6_from: str = "c5",
        channels: int = 256,
        head_depth: int = 4,
        head_norm: str = "none",
        prior: float = 0.01,
        sizes: Sequence[float] | None = None,
        scales: Sequence[float] = OCTAVE_SCALES,
        aspect_ratios: Sequence[float] = ASPECT_RATIOS,
        rounding: Rounding = "none",
        pixel_mean: Sequence[float] = IMAGENET_MEAN,
        pixel_std: Sequence[float] = IMAGENET_STD,
        stride_padding: str = "symmetric",
    ) -> None:
        super().__init__()
        _check(num_classes=num_classes, channels=channels, head_depth=head_depth)
        if p6_from not in ("c5", "p5"):
            raise ConfigError(f"p6_from {p6_from!r} is neither c5 nor p5")
        if head_norm not in ("none", "group"):
            raise ConfigError(f"head_norm {head_norm!r} is neither none nor group")
        if len(pixel_mean) != 3 or len(pixel_std) != 3 or min(pixel_std) <= 0:
            raise ConfigError(
                "pixel_mean and pixel_std are three numbers each, pixel_std over 0; "
                f"got {tuple(pixel_mean)} and {tuple(pixel_std)}"
            )
        self.num_classes = num_classes
        self.p2 = p2
        self.strides: tuple[int, ...] = (4,) * p2 + (8, 16, 32, 64, 128)
        try:
            self.anchors: AnchorSpec = anchor_spec(
                self.strides,
                sizes=sizes,
                scales=scales,
                aspect_ratios=aspect_ratios,
                rounding=rounding,
            )
            bias = prior_bias(prior)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self.spec: dict[str, Any] = {
            "backbone": backbone,
            "num_classes": num_classes,
            "norm": norm,
            "frozen_stages": frozen_stages,
            "norm_eps": norm_eps,
            "p2": p2,
            "p6_from": p6_from,
            "channels": channels,
            "head_depth": head_depth,
            "head_norm": head_norm,
            "prior": prior,
            "sizes": self.anchors.sizes,
            "scales": self.anchors.scales,
            "aspect_ratios": self.anchors.aspect_ratios,
            "rounding": rounding,
            "pixel_mean": tuple(float(value) for value in pixel_mean),
            "pixel_std": tuple(float(value) for value in pixel_std),
            "stride_padding": stride_padding,
        }
        self.backbone = build_backbone(
            backbone,
            norm=norm,
            frozen_stages=frozen_stages,
            norm_eps=norm_eps,
            stride_padding=stride_padding,
        )
        widths = self.backbone.channels[0 if p2 else 1 :]
        if 0 in widths:
            raise ConfigError(f"backbone {backbone!r} has no feature map at stride 4: set p2=false")
        per_cell = self.anchors.per_cell
        self.pyramid = FeaturePyramid(widths, channels, p6_from)
        self.class_head = Head(channels, head_depth, per_cell * num_classes, head_norm)
        self.box_head = Head(channels, head_depth, per_cell * 4, head_norm)
        assert self.class_head.last.bias is not None
        nn.init.constant_(self.class_head.last.bias, bias)
        self.set_pixel_statistics()

    def set_pixel_statistics(self, device: torch.device | str = "cpu") -> None:
        """Make pixel_mean and pixel_std on `device` from the spec, where they alone are kept."""
        for name in ("pixel_mean", "pixel_std"):
            values = torch.tensor(self.spec[name], dtype=torch.float32, device=device)
            self.register_buffer(name, values.view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Outputs:
        """Raw class logits and box deltas of every anchor.

        Args:
            images: (B, 3, H, W) RGB, uint8 or any float type with values 0..255; H and W multiples
                of 32, padded at the right and the bottom.

        Returns:
            The outputs, a level each: (B, A * K, H_l, W_l) and (B, A * 4, H_l, W_l).

        Raises:
            ValueError: the images have another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images are (B, 3, H, W), got {tuple(images.shape)}")
        if images.shape[2] % self.size_divisor or images.shape[3] % self.size_divisor:
            raise ValueError(
                f"height and width of images are multiples of {self.size_divisor}, got "
                f"{images.shape[2]} x {images.shape[3]}; pad at the right and the bottom"
            )
        # In float32 whatever the weights are: bfloat16 keeps 8 bits, and the difference has more.
        pixels = (images.float() - self.pixel_mean.float()) / self.pixel_std.float()
        maps = self.backbone(pixels.to(self.class_head.last.weight.dtype))
        levels = self.pyramid(maps if self.p2 else maps[1:])
        return Outputs(
            tuple(self.class_head(level) for level in levels),
            tuple(self.box_head(level) for level in levels),
        )


def build_retinanet(
    *,
    backbone: str = "resnet50",
    num_classes: int,
    backbone_weights: str | Path = "default",
    norm: str = "frozen",
    frozen_stages: int = 2,
    p2: bool = False,
    p6_from: str = "c5",
    channels: int = 256,
    head_depth: int = 4,
    head_norm: str = "none",
    prior: float = 0.01,
    sizes: Sequence[float] | None = None,
    scales: Sequence[float] = OCTAVE_SCALES,
    aspect_ratios: Sequence[float] = ASPECT_RATIOS,
    rounding: Rounding = "none",
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
    stride_padding: str | None = None,
) -> RetinaNet:
    """A RetinaNet that is ready to be trained, with a pretrained backbone or from nothing.

    Source: Lin et al. 2017, Sec. 4 and 4.1; the defaults are the paper's.

    Args:
        backbone: resnet18, 34, 50, 101, 152, resnext101_32x8d, mobilenet_v2, or timm/NAME.
        num_classes: K, without a background class.
        backbone_weights: "default" (ImageNet, fetched once), "none", or a file
            (:func:`retinanet.model.backbone.find_weights`).
        norm: of the backbone: "frozen" batch norm, "trained" batch norm, or "group" norm, which is
            for training from nothing.
        frozen_stages: how many of the stem, C2, .., C5 keep the weights that were loaded. With
            backbone_weights "none" there is nothing to keep and it counts as 0.
        p2: a level at stride 4 below P3, for small objects; not in the paper.
        p6_from: "c5", or "p5" as some implementations do.
        channels: of the pyramid and the heads.
        head_depth: convolutions in each head before the last.
        head_norm: "none" or "group".
        prior: score that every anchor starts with (Sec. 3.3).
        sizes: square root of the anchors' area in pixels, a level; None: 4 times the stride.
        scales: factors of the size, the octave scales.
        aspect_ratios: height / width.
        rounding: "none", or "torchvision" for its weights.
        pixel_mean: of 0..255 RGB; None: what the weights say, else ImageNet's.
        pixel_std: likewise.
        stride_padding: "symmetric" or "same"; None: what the weights say, else "symmetric".

    Raises:
        ConfigError: a setting is out of range or contradicts another.
        WeightsError: the weights cannot be had or do not fit; what to do is in the message.
        MissingExtraError: timm is not installed.
    """
    start = str(backbone_weights)
    if norm == "group" and start == "default":
        raise ConfigError(
            'norm "group" starts from nothing, but backbone_weights is "default" (ImageNet, with '
            "batch norm): set backbone_weights to none, or norm to frozen or trained"
        )
    if norm == "frozen" and start == "none":
        # Untrained statistics normalise nothing: activations grow from block to block.
        raise ConfigError(
            'norm "frozen" keeps the statistics of pretrained weights, but backbone_weights is '
            '"none": set norm to group (model.norm=group), or to trained with large batches'
        )
    found = find_weights(backbone, backbone_weights)
    if found and found.keep_frozen and norm != "frozen":
        raise ConfigError(
            f'backbone weights {found.source} have their batch norm folded away: norm is "frozen" '
            f"with them, got {norm!r}"
        )
    stated_mean, stated_std = (found.pixel_mean, found.pixel_std) if found else (None, None)
    stated_padding = found.stride_padding if found else None
    model = RetinaNet(
        backbone=backbone,
        num_classes=num_classes,
        norm=norm,
        frozen_stages=frozen_stages if found else 0,
        p2=p2,
        p6_from=p6_from,
        channels=channels,
        head_depth=head_depth,
        head_norm=head_norm,
        prior=prior,
        sizes=sizes,
        scales=scales,
        aspect_ratios=aspect_ratios,
        rounding=rounding,
        pixel_mean=pixel_mean or stated_mean or IMAGENET_MEAN,
        pixel_std=pixel_std or stated_std or IMAGENET_STD,
        stride_padding=stride_padding or stated_padding or "symmetric",
    )
    if found:
        load_backbone(model.backbone, found)
    return to_channels_last(model)


def to_channels_last(model: RetinaNet) -> RetinaNet:
    """The model with its weights in channels_last memory, in which convolutions are fastest."""
    return model.to(memory_format=torch.channels_last)


def _check(**counts: int) -> None:
    for name, value in counts.items():
        lowest = 0 if name == "head_depth" else 1
        if value < lowest:
            raise ConfigError(f"{name} is at least {lowest}, got {value}")
