"""Made-up work: boxes, outputs, networks with the same weights on both sides."""

from __future__ import annotations

import gc
import io
from collections.abc import Sequence
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.models.detection import retinanet as torchvision_retinanet
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from retinanet.anchors import default_anchor_spec, feature_sizes, level_anchors
from retinanet.model.retinanet import RetinaNet, to_channels_last
from retinanet.model.torchvision_weights import our_name
from retinanet.structures import BACKGROUND, IGNORED, Outputs

TORCHVISION_CLASSES = 91


def random_boxes(count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """(count, 4) boxes within the image; sides from 10 pixels to half of it, log-uniform."""
    limits = torch.tensor([width, height], dtype=torch.float32)
    sides = 10 * (limits / 2 / 10) ** torch.rand(count, 2, generator=generator)
    corner = torch.rand(count, 2, generator=generator) * (limits - sides)
    return torch.cat([corner, corner + sides], dim=1)


def jpeg(height: int, width: int, generator: np.random.Generator) -> bytes:
    """A JPEG file of soft blots of colour, with a little grain, of quality 90."""
    small = generator.integers(0, 256, (max(2, height // 16), max(2, width // 16), 3))
    image = Image.fromarray(small.astype(np.uint8))
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = generator.integers(-4, 5, pixels.shape)
    encoded = io.BytesIO()
    Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8)).save(
        encoded, "JPEG", quality=90
    )
    return encoded.getvalue()


@dataclass(frozen=True, slots=True)
class ClassWork:
    """What the class loss is computed of.

    Attributes:
        levels: (B, A * K, H_l, W_l) logits in the heads' own layout, channels_last memory.
        matches: (B, R) place of the object, BACKGROUND or IGNORED.
        objects: (B, M) labels of the objects.
    """

    levels: list[Tensor]
    matches: Tensor
    objects: Tensor

    @property
    def labels(self) -> Tensor:
        """(B, R) class, BACKGROUND or IGNORED."""
        own = self.objects.gather(1, self.matches.clamp(min=0))
        return torch.where(self.matches >= 0, own, self.matches)


def class_work(
    height: int, width: int, batch: int, classes: int, objects: int, device: torch.device
) -> ClassWork:
    """Logits as of a network that has learned something, and some 8 anchors an object."""
    generator = torch.Generator().manual_seed(0)
    sizes = feature_sizes(default_anchor_spec().strides, height, width)
    levels = [
        torch.randn(batch, 9 * classes, h, w, generator=generator)
        .mul_(1.2)
        .sub_(5)
        .to(device)
        .contiguous(memory_format=torch.channels_last)
        for h, w in sizes
    ]
    rows = sum(9 * h * w for h, w in sizes)
    matches = torch.randint(0, objects, (batch, rows), generator=generator)
    kind = torch.rand(batch, rows, generator=generator)
    foreground = min(0.2, 8 * objects / rows)
    matches[kind > foreground] = IGNORED
    matches[kind > 2 * foreground] = BACKGROUND
    labels = torch.randint(0, classes, (batch, objects), generator=generator)
    return ClassWork(levels, matches.to(device), labels.to(device))


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
    """Outputs as of a trained network: around each object a few dozen anchors with high scores.

    Args:
        height, width, batch, classes, device: of the outputs.
        background: mean logit where there is no object; its deviation is 1.
        objects: an image.
    """
    generator = torch.Generator().manual_seed(0)
    logits, deltas = [], []
    for h, w in feature_sizes(default_anchor_spec().strides, height, width):
        level = torch.randn(batch, h, w, 9, classes, generator=generator).add_(background)
        for image in range(batch):
            for _ in range(objects // 2):
                y, x = (int(torch.randint(0, side, (), generator=generator)) for side in (h, w))
                label = int(torch.randint(0, classes, (), generator=generator))
                spot = level[image, y : y + 3, x : x + 3, :, label]
                spot.copy_(torch.randn(spot.shape, generator=generator).mul_(1.5))
        moved = torch.randn(batch, h, w, 36, generator=generator) * 0.1
        logits.append(level.reshape(batch, h, w, 9 * classes).to(device).permute(0, 3, 1, 2))
        deltas.append(moved.to(device).permute(0, 3, 1, 2))
    return Outputs(tuple(logits), tuple(deltas))


def anchors_for(height: int, width: int, device: torch.device) -> tuple[Tensor, ...]:
    """The paper's anchors of each level."""
    spec = default_anchor_spec()
    return tuple(level_anchors(spec, feature_sizes(spec.strides, height, width), device))


def same_networks(
    backbone: str, device: torch.device, *, contrast: float = 0.3
) -> tuple[Any, RetinaNet]:
    """torchvision's RetinaNet and ours, with the same random weights.

    Args:
        backbone: resnet18 or resnet50.
        device: of both.
        contrast: deviation of the weights of the class head's last layer; the higher, the more the
            scores differ from anchor to anchor.
    """
    torch.manual_seed(0)
    body = getattr(resnet, backbone)(weights=None, norm_layer=FrozenBatchNorm2d)
    last_norm = "bn3.weight" if backbone == "resnet50" else "bn2.weight"
    for name, buffer in body.named_buffers():
        if name.endswith(last_norm):
            buffer.fill_(0.2)  # as after training: else the residual blocks double their input
    extractor = _resnet_fpn_extractor(
        body, 3, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256)
    )
    rival = torchvision_network(extractor, TORCHVISION_CLASSES)
    for layer in rival.head.modules():
        if isinstance(layer, nn.Conv2d) and layer.out_channels == 256:
            # At their start the heads say nearly the same of any image: nothing to compare.
            nn.init.kaiming_normal_(layer.weight)
    nn.init.normal_(rival.head.classification_head.cls_logits.weight, std=contrast)
    model = RetinaNet(
        backbone=backbone,
        num_classes=TORCHVISION_CLASSES,
        rounding="torchvision",
        p6_from="p5",
        norm_eps=1e-5,
    )
    own = {our_name(key): value for key, value in rival.state_dict().items()}
    missing, unexpected = model.load_state_dict(own, strict=False)
    assert not missing, missing
    assert all(name.endswith("num_batches_tracked") for name in unexpected), unexpected
    return rival.to(device), to_channels_last(model.to(device))


def torchvision_network(backbone: nn.Module, classes: int, **options: Any) -> Any:
    """torchvision's RetinaNet over `backbone`, which gives 256 channels a level."""
    backbone.out_channels = 256  # type: ignore[assignment]
    return torchvision_retinanet.RetinaNet(backbone, classes, **options)


def on_meta(backbone: str) -> Any:
    """torchvision's RetinaNet without weights, to count operations with."""
    with torch.device("meta"):
        return same_networks(backbone, torch.device("meta"))[0]


def normalised(images: Tensor, model: RetinaNet) -> Tensor:
    """(B, 3, H, W) uint8 as torchvision's network takes them."""
    values: Tensor = (images.float() - model.pixel_mean) / model.pixel_std
    return values.contiguous()


def rms_error(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, relative to the deviation of what was expected."""
    expected = expected.float()
    return float((got.float() - expected).norm() / (expected - expected.mean()).norm())


def held_bytes(root: Any) -> int:
    """What the tensors take that can be reached from `root`: each piece of memory once.

    Followed are attributes, containers and what functions close over. Tensors in oneDNN's own
    layouts count without their padding; what lies outside torch is not seen.
    """
    seen: set[int] = set()
    pieces: dict[Any, int] = {}
    waiting = [root]
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, ModuleType | type):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            try:
                storage = one.untyped_storage()
                pieces[storage.data_ptr()] = storage.nbytes()
            except (NotImplementedError, RuntimeError):  # oneDNN's: it has none that can be seen
                pieces[one] = total_bytes([one])
        elif isinstance(one, FunctionType):  # whose globals are the whole module
            waiting += [one.__closure__, one.__defaults__]
        else:
            waiting += gc.get_referents(one)
    return sum(pieces.values())


def total_bytes(tensors: Sequence[Tensor]) -> int:
    """What the tensors' elements take."""
    return sum(one.numel() * one.element_size() for one in tensors)
