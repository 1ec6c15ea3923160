"""Whole networks: inference, detection from an image file, and training steps."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from retinanet.anchors import feature_sizes, level_anchors
from retinanet.bench.benchmark import Benchmark, Case, Limit, Rival, Setting, count
from retinanet.bench.limits import count_flops, matrix_limit
from retinanet.bench.samples import (
    NETWORKS,
    TORCHVISION_CLASSES,
    jpeg,
    normalised,
    on_meta,
    random_boxes,
    rms_error,
    same_networks,
    torchvision_outputs,
)
from retinanet.config import LossSettings, TrainConfig
from retinanet.inference.backends import build_network
from retinanet.inference.detections import ImageDetections
from retinanet.inference.detector import Detector
from retinanet.losses.detection import detection_losses
from retinanet.model.checkpoint import Checkpoint
from retinanet.model.precision import DTYPES, autocast, choose_dtype
from retinanet.structures import Outputs, flatten_levels, pad_targets
from retinanet.training.optim import build_optimizer

# Relative rms of logits and of deltas. bf16 keeps 8 bits, fp16 11; int8 has 256 steps per channel.
_TOLERANCE = {"float32": 1e-4, "bf16": 0.1, "fp16": 0.02, "int8": 0.1}

_SGD: dict[str, Any] = {"lr": 1e-4, "momentum": 0.9, "weight_decay": 1e-4}


def inference(setting: Setting) -> list[Case]:
    """Run the forward pass against torchvision's in float32; on a GPU also in fp16.

    On a CPU also that of the small networks for it.
    """
    backbone, height, width = _network_size(setting)
    # Packed weights are kept for a few image sizes: one size, as in the other cases, is the best
    # case; a folder of images has several.
    other_width = setting.pick(160, 384, 1216)
    several = [(height, width), (width, height), (height, height), (height, other_width)]
    cases: dict[str, dict[str, Any]] = {
        "float32": {"precision": "float32"},
        "auto": {},
        "auto, four sizes in turn": {"sides": several},
    }
    if setting.device.type == "cuda":
        cases["auto, 16 images"] = {"batch": 16}
    else:
        cases["int8"] = {"precision": "int8", "backend": "openvino"}
    if setting.size == "full":  # compiling takes half a minute
        cases["compile"] = {"backend": "compile"}
    small = [setting.pick((64, 96), (192, 256), (384, 512))]
    if setting.device.type == "cpu":
        for name in ("mobilenet_v2", "timm/tf_efficientnet_lite2"):
            short = NETWORKS[name].title
            cases |= {
                short: {"backbone": name, "sides": small},
                f"{short} OpenVINO": {
                    "backbone": name, "sides": small, "precision": "float32", "backend": "openvino"
                },
                f"{short} int8": {
                    "backbone": name, "sides": small, "precision": "int8", "backend": "openvino"
                },
            }  # fmt: skip
    default = {
        "backbone": backbone, "precision": "auto", "backend": "auto", "batch": 1,
        "sides": several[:1],
    }  # fmt: skip
    result = []
    for name, changes in cases.items():
        options: dict[str, Any] = {**default, **changes}
        sizes = ", ".join(f"{h} x {w}" for h, w in options["sides"])
        size = f"{NETWORKS[options['backbone']].title}, {sizes}"
        result.append(Case(name, size, partial(_inference, setting, **options)))
    return result


def _network_size(setting: Setting) -> tuple[str, int, int]:
    """Backbone, and height and width of an image."""
    size: tuple[str, int, int] = setting.pick(
        ("resnet18", 96, 128), ("resnet50", 256, 320), ("resnet50", 800, 1088)
    )
    return size


def _inference(
    setting: Setting,
    *,
    backbone: str,
    precision: str,
    backend: str,
    batch: int,
    sides: Sequence[tuple[int, int]],
) -> Benchmark:
    device = setting.device
    rng = np.random.default_rng(0)
    batches = [
        torch.stack([_decode(jpeg(h, w, rng)) for _ in range(batch)])
        .contiguous(memory_format=torch.channels_last)
        .to(device)
        for h, w in sides
    ]
    rival, model = same_networks(backbone, device)
    rival.eval()
    inputs = [normalised(images, model) for images in batches]
    calibration = None
    if precision == "int8":
        count = setting.pick(1, 4, 8)
        calibration = [_decode(jpeg(*sides[0], rng))[None] for _ in range(count)]
    network = build_network(
        model.eval(), device, precision=precision, backend=backend, calibration=calibration
    )

    @torch.inference_mode()
    def theirs(fp16: bool, run: Any = torchvision_outputs) -> list[tuple[Tensor, Tensor]]:
        with torch.autocast("cuda", dtype=torch.float16, enabled=fp16):
            return [run(rival, x) for x in inputs]

    tolerance = _TOLERANCE[network.precision]
    compare = partial(compare_outputs, classes=model.num_classes, tolerance=tolerance)
    rivals = [Rival("torchvision", partial(theirs, False), compare)]
    if device.type == "cuda" and network.precision != "float32":
        rivals.append(Rival("torchvision fp16", partial(theirs, True), compare))
        if setting.size == "full" and len(sides) == 1:
            compiled = partial(theirs, True, torch.compile(torchvision_outputs, dynamic=False))
            rivals.append(Rival("torchvision fp16 compiled", compiled, compare))
    dtype = DTYPES.get(network.precision)
    return Benchmark(
        lambda: [network(images) for images in batches],
        rivals,
        limit=None if dtype is None else _inference_limit(backbone, batches, dtype),
        note=network.description,
    )


def _inference_limit(backbone: str, batches: Sequence[Tensor], dtype: torch.dtype) -> Limit:
    network = on_meta(backbone).eval()
    with torch.no_grad():
        flops = sum(
            count_flops(partial(torchvision_outputs, network, torch.empty(x.shape, device="meta")))
            for x in batches
        )
    batch, _, height, width = batches[0].shape
    return matrix_limit(flops, -(-height // 8), -(-width // 8), batch, dtype, batches[0].device)


def compare_outputs(
    output: Sequence[Outputs],
    expected: Sequence[tuple[Tensor, Tensor]],
    classes: int,
    tolerance: float,
) -> str:
    """Largest relative rms of logits and of deltas over the batches.

    Raises:
        AssertionError: it exceeds `tolerance`.
    """
    worst = {"logits": 0.0, "deltas": 0.0}
    for ours, theirs in zip(output, expected, strict=True):
        flat = flatten_levels(ours.logits, classes), flatten_levels(ours.deltas, 4)
        for name, a, b in zip(worst, flat, theirs, strict=True):
            worst[name] = max(worst[name], rms_error(a, b))
    for name, error in worst.items():
        assert error <= tolerance, f"relative rms {error:.1e} of the {name}"
    return ", ".join(f"{name} {error:.0e}" for name, error in worst.items()) + " rms"


def detection(setting: Setting) -> list[Case]:
    """Detect from a JPEG in memory, against Pillow and torchvision's whole model."""
    backbone, height, width = _network_size(setting)
    size = f"{NETWORKS[backbone].title}, JPEG {width // 2} x {height // 2} to {height} px"
    return [
        Case(precision, size, partial(_detection, setting, precision))
        for precision in ("float32", "auto")
    ]


def _detection(setting: Setting, precision: str) -> Benchmark:
    backbone, height, width = _network_size(setting)
    # Half the network's input, so that resized sides are whole: torchvision rounds down.
    file = jpeg(height // 2, width // 2, np.random.default_rng(0))
    # Scores vary enough for some to exceed the threshold.
    rival, model = same_networks(backbone, setting.device, contrast=0.08)
    rival.eval()
    rival.detections_per_img = 100
    rival.transform.min_size, rival.transform.max_size = (height,), width
    rival.transform.image_mean = (model.pixel_mean.flatten() / 255).tolist()
    rival.transform.image_std = (model.pixel_std.flatten() / 255).tolist()
    checkpoint = Checkpoint(
        model=model,
        classes=tuple(str(k) for k in range(TORCHVISION_CLASSES)),
        category_ids=tuple(range(TORCHVISION_CLASSES)),
        image_size=height,
        max_size=width,
        info={},
    )
    detector = Detector(
        checkpoint,
        device=setting.device,
        precision=precision,
        score_threshold=rival.score_thresh,  # as torchvision's
    )

    @torch.inference_mode()
    def theirs() -> dict[str, Tensor]:
        image = (_decode(file).float() / 255).to(setting.device)
        detections: dict[str, Tensor] = rival([image])[0]
        return detections

    compare = partial(_compare_detections, 0.95 if precision == "float32" else 0.9)
    rivals = [Rival("torchvision", theirs, compare)]
    return Benchmark(partial(detector.detect, file), rivals)


def _compare_detections(
    min_fraction: float, output: ImageDetections, expected: dict[str, Tensor]
) -> str:
    # Rounding of pixels changes the order of close scores, so only the better half is compared.
    half = len(expected["scores"]) // 2
    boxes, labels = (expected[name][:half].cpu() for name in ("boxes", "labels"))
    same = (box_iou(boxes, output.boxes) > 0.9) & (labels[:, None] == output.labels)
    assert half, "torchvision detected nothing to compare"
    fraction = float(same.any(dim=1).float().mean())
    assert fraction >= min_fraction, f"{fraction:.0%} detected by both"
    return f"{fraction:.0%} of the better half detected by both"


def _decode(file: bytes) -> Tensor:
    """(3, H, W) uint8, decoded by Pillow."""
    image = np.array(Image.open(io.BytesIO(file)).convert("RGB"))
    return torch.from_numpy(image).permute(2, 0, 1)


def train_step(setting: Setting) -> list[Case]:
    """Run forward, loss, backward and SGD against torchvision's float32 step.

    On a GPU torchvision's step has the same precision.
    """
    cases: dict[str, tuple[str, int, int]] = {
        "ResNet-50": ("resnet50", setting.pick(64, 128, 512), 2),
        "ResNet-18": ("resnet18", setting.pick(64, 128, 256), setting.pick(2, 4, 8)),
        "MobileNetV2": ("mobilenet_v2", setting.pick(64, 128, 384), setting.pick(2, 4, 8)),
    }
    if setting.device.type == "cuda":
        cases = {"ResNet-50": ("resnet50", setting.pick(64, 256, 800), setting.pick(2, 4, 16))}
    precisions = ["float32"]
    if choose_dtype("auto", setting.device) == torch.bfloat16:  # else it is emulated
        precisions.append("bf16")
    return [
        Case(
            f"{name} {precision}",
            f"{side} x {side}, {count(batch, 'image')}",
            partial(_train_step, setting, backbone, side, batch, precision),
        )
        for name, (backbone, side, batch) in cases.items()
        for precision in precisions
    ]


def _train_step(
    setting: Setting, backbone: str, side: int, batch: int, precision: str
) -> Benchmark:
    device = setting.device
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last).to(device)
    objects = setting.pick(3, 5, 10)
    boxes = [random_boxes(objects, side, side, generator) for _ in range(batch)]
    labels = [torch.randint(0, TORCHVISION_CLASSES, (objects,), generator=generator) for _ in boxes]
    targets = pad_targets(boxes, labels).to(device)
    rival, model = same_networks(backbone, device, contrast=0.01)
    rival.train()
    model.train()
    optimizer = build_optimizer(model, TrainConfig(**_SGD))
    anchors = level_anchors(model.anchors, feature_sizes(model.anchors.strides, side, side), device)
    # torchvision's defaults, for equal work
    settings = LossSettings(box="l1", low_quality_matches=True)

    def ours() -> float:
        with autocast(precision, device):
            outputs = model(images)
        losses = detection_losses(
            outputs, anchors, targets, num_classes=model.num_classes, settings=settings
        )
        return _optimize(losses.total, optimizer)

    # Without autocast on a CPU, with it on a GPU.
    their_precision = precision if device.type == "cuda" else "float32"
    their_optimizer = torch.optim.SGD([p for p in rival.parameters() if p.requires_grad], **_SGD)
    their_targets = [
        {"boxes": b.to(device), "labels": k.to(device)} for b, k in zip(boxes, labels, strict=True)
    ]
    x = normalised(images, model)

    def theirs() -> float:
        with autocast(their_precision, device):
            features = list(rival.backbone(x).values())
            outputs = rival.head(features)
        outputs = {name: output.float() for name, output in outputs.items()}
        their_anchors = rival.anchor_generator(ImageList(x, [(side, side)] * batch), features)
        losses = rival.compute_loss(their_targets, outputs, their_anchors)
        return _optimize(sum(losses.values()), their_optimizer)

    name = "torchvision" if their_precision == "float32" else f"torchvision {precision}"
    compare = partial(_compare_losses, 1e-3 if precision == "float32" else 0.1)
    counted, empty = on_meta(backbone).train(), torch.empty(batch, 3, side, side, device="meta")

    def forward_backward() -> None:
        outputs = torchvision_outputs(counted, empty)
        torch.autograd.backward([output.sum() for output in outputs])

    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    return Benchmark(
        ours,
        [Rival(name, theirs, compare)],
        limit=matrix_limit(
            count_flops(forward_backward), side // 8, side // 8, batch, dtype, device
        ),
    )


def _compare_losses(tolerance: float, output: float, expected: float) -> str:
    error = abs(output - expected) / abs(expected)
    assert error <= tolerance, f"loss {output} and {expected}"
    return f"loss {error:.0e}"


def _optimize(loss: Any, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return float(loss.detach())
