"""Synthetic inputs, and networks with equal weights on both sides."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import mobilenetv2, resnet
from torchvision.models.detection import retinanet as torchvision_retinanet
from torchvision.models.detection.backbone_utils import BackboneWithFPN, _resnet_fpn_extractor
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from retinanet.anchors import default_anchor_spec, feature_sizes, level_anchors
from retinanet.model.foreign_weights import our_name
from retinanet.model.retinanet import RetinaNet, to_channels_last
from retinanet.structures import BACKGROUND, IGNORED, Outputs

TORCHVISION_CLASSES = 91


class BenchNetwork(NamedTuple):
    """A network that is measured.

    Attributes:
        title: of its rows.
        channels: of pyramid and heads; a small one has 64, as `quick` chooses on a CPU.
        contrast: standard deviation of the class head's last weights. The features of a random
            small network are small: float32 would round away their differences beside the prior's
            bias of -4.6.
        prefix: of the backbone's weights in ours; torchvision has none.
    """

    title: str
    channels: int = 256
    contrast: float = 0.3
    prefix: str = ""


NETWORKS = {
    "resnet18": BenchNetwork("ResNet-18"),
    "resnet50": BenchNetwork("ResNet-50"),
    "mobilenet_v2": BenchNetwork("MobileNetV2", 64, 10.0, "features."),
    "timm/tf_efficientnet_lite2": BenchNetwork("EfficientNet-Lite2", 64, 10.0, "net."),
}
"""By backbone."""


def random_boxes(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """(count, 4) boxes in the image; sides log-uniform from 10 pixels to half the image's."""
    limits = torch.tensor([width, height], dtype=torch.float32)
    sides = 10 * (limits / 2 / 10) ** torch.rand(count, 2, generator=generator)
    corner = torch.rand(count, 2, generator=generator) * (limits - sides)
    return torch.cat([corner, corner + sides], dim=1)


def jpeg(height: int, width: int, generator: np.random.Generator) -> bytes:
    """Encode smooth random colours with a little noise as a JPEG of quality 90."""
    small = generator.integers(0, 256, (max(2, height // 16), max(2, width // 16), 3))
    image = Image.fromarray(small.astype(np.uint8))
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noise = generator.integers(-4, 5, pixels.shape)
    encoded = io.BytesIO()
    image = Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))
    image.save(encoded, "JPEG", quality=90)
    return encoded.getvalue()


def map_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Feature map sizes of P3 to P7."""
    return list(feature_sizes(default_anchor_spec().strides, height, width))


def num_anchors(height: int, width: int) -> int:
    """Anchors per image, nine per cell."""
    return sum(9 * h * w for h, w in map_sizes(height, width))


def anchors_for(height: int, width: int, device: torch.device) -> tuple[Tensor, ...]:
    """Make the paper's anchors of each level."""
    return tuple(level_anchors(default_anchor_spec(), map_sizes(height, width), device))


def class_loss_input(
    height: int, width: int, batch: int, classes: int, objects: int, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Random logits like those of a partly trained network, with about 8 anchors per object.

    Returns each level's (B, A * K, H_l, W_l) logits in channels_last memory and (B, R) labels.
    """
    generator = torch.Generator().manual_seed(0)
    levels = [
        torch.randn(batch, 9 * classes, h, w, generator=generator)
        .mul_(1.2)
        .sub_(5)
        .to(device)
        .contiguous(memory_format=torch.channels_last)
        for h, w in map_sizes(height, width)
    ]
    anchors = num_anchors(height, width)
    labels = torch.randint(0, classes, (batch, anchors), generator=generator)
    kind = torch.rand(batch, anchors, generator=generator)
    foreground = min(0.2, 8 * objects / anchors)
    labels[kind > foreground] = IGNORED
    labels[kind > 2 * foreground] = BACKGROUND
    return levels, labels.to(device)


def outputs_like(
    height: int,
    width: int,
    batch: int,
    classes: int,
    device: torch.device,
    *,
    background: float = -8.0,
    objects: int = 10,
) -> Outputs:
    """Random outputs like a trained network's: a few dozen high scores around each of `objects`.

    `background` is the mean logit elsewhere, with a standard deviation of 1.
    """
    generator = torch.Generator().manual_seed(0)
    logits, deltas = [], []
    for h, w in map_sizes(height, width):
        level = torch.randn(batch, h, w, 9, classes, generator=generator).add_(background)
        for image in range(batch):
            for _ in range(objects // 2):
                y, x = (int(torch.randint(0, side, (), generator=generator)) for side in (h, w))
                label = int(torch.randint(0, classes, (), generator=generator))
                cells = level[image, y : y + 3, x : x + 3, :, label]
                cells.copy_(torch.randn(cells.shape, generator=generator).mul_(1.5))
        offsets = torch.randn(batch, h, w, 36, generator=generator) * 0.1
        logits.append(level.reshape(batch, h, w, 9 * classes).to(device).permute(0, 3, 1, 2))
        deltas.append(offsets.to(device).permute(0, 3, 1, 2))
    return Outputs(tuple(logits), tuple(deltas))


def same_networks(
    backbone: str, device: torch.device, *, contrast: float | None = None
) -> tuple[Any, RetinaNet]:
    """Build torchvision's RetinaNet and ours with the same random weights.

    `backbone` is one of :data:`NETWORKS`. Scores of different anchors vary with `contrast`, which
    replaces the network's.

    Raises:
        MissingExtraError: the backbone is timm's, which is not installed.
    """
    torch.manual_seed(0)
    network = NETWORKS[backbone]
    channels, contrast = network.channels, network.contrast if contrast is None else contrast
    model = RetinaNet(
        backbone=backbone,
        num_classes=TORCHVISION_CLASSES,
        channels=channels,
        rounding="torchvision",
        p6_from="p5",
        norm_eps=1e-5,
    )
    rival = torchvision_network(_torchvision_pyramid(backbone, model, channels))
    for layer in rival.head.modules():
        if isinstance(layer, nn.Conv2d) and layer.out_channels == channels:
            # With their initial weights the heads' outputs hardly depend on the image.
            nn.init.kaiming_normal_(layer.weight)
    nn.init.normal_(rival.head.classification_head.cls_logits.weight, std=contrast)
    body = f"backbone.body.{network.prefix}"
    weights = {
        our_name(key.replace("backbone.body.", body)): value
        for key, value in rival.state_dict().items()
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not missing, missing
    assert all(name.endswith("num_batches_tracked") for name in unexpected), unexpected
    return rival.to(device), to_channels_last(model.to(device))


def _torchvision_pyramid(backbone: str, model: RetinaNet, channels: int) -> Any:
    """Build backbone and pyramid as a user of torchvision does."""
    levels = LastLevelP6P7(channels, channels)
    if backbone.startswith("resnet"):
        body = getattr(resnet, backbone)(weights=None, norm_layer=FrozenBatchNorm2d)
        last_norm = "bn3.weight" if backbone == "resnet50" else "bn2.weight"
        for name, buffer in body.named_buffers():
            if name.endswith(last_norm):
                buffer.fill_(0.2)  # as after training; at 1 each residual block doubles its input
        return _resnet_fpn_extractor(body, 3, returned_layers=[2, 3, 4], extra_blocks=levels)
    widths = list(model.backbone.channels[1:])
    if backbone == "mobilenet_v2":
        features = mobilenetv2.mobilenet_v2(norm_layer=FrozenBatchNorm2d).features
        for parameter in features[:4].parameters():  # the stem and C2, as in ours
            parameter.requires_grad_(False)
        maps = {"6": "0", "13": "1", "18": "2"}
        return BackboneWithFPN(features, maps, widths, channels, levels)
    return _TimmPyramid(backbone, widths, channels, levels)


class _TimmPyramid(nn.Module):
    """A timm network with torchvision's pyramid, for inference."""

    def __init__(
        self, backbone: str, widths: list[int], channels: int, levels: LastLevelP6P7
    ) -> None:
        super().__init__()
        import timm  # the model has raised if it is not installed

        self.body = timm.create_model(backbone.removeprefix("timm/"), features_only=True)
        self.fpn = FeaturePyramidNetwork(widths, channels, levels)
        self.out_channels = channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map images to P3 to P7."""
        maps: dict[str, Tensor] = self.fpn(
            {str(level): x for level, x in enumerate(self.body(x)[-3:])}
        )
        return maps


def torchvision_network(
    backbone: nn.Module, classes: int = TORCHVISION_CLASSES, **options: Any
) -> Any:
    """Build torchvision's RetinaNet on `backbone`; without ``out_channels`` it has 256 of them."""
    if not hasattr(backbone, "out_channels"):
        backbone.out_channels = 256  # type: ignore[assignment]
    return torchvision_retinanet.RetinaNet(backbone, classes, **options)


def torchvision_outputs(network: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, R, K) and deltas (B, R, 4) of torchvision's network."""
    outputs = network.head(list(network.backbone(x).values()))
    return outputs["cls_logits"], outputs["bbox_regression"]


def on_meta(backbone: str) -> Any:
    """Build torchvision's RetinaNet on the meta device, for counting operations."""
    with torch.device("meta"):
        return same_networks(backbone, torch.device("meta"))[0]


def normalised(images: Tensor, model: RetinaNet) -> Tensor:
    """Convert (B, 3, H, W) uint8 to the input of torchvision's network."""
    values: Tensor = (images.float() - model.pixel_mean) / model.pixel_std
    return values.contiguous()


def rms_error(output: Tensor, expected: Tensor) -> float:
    """RMS of the difference relative to the standard deviation of `expected`."""
    expected = expected.float()
    return float((output.float() - expected).norm() / (expected - expected.mean()).norm())


def total_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the tensors' elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
