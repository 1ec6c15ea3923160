"""Training steps on a batch in memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torchvision.models.detection.image_list import ImageList

from retinanet.anchors import feature_sizes, level_anchors
from retinanet.bench.benchmark import Benchmark, Case, Rival, Setting
from retinanet.bench.limits import count_flops, matrix_limit
from retinanet.bench.samples import (
    TORCHVISION_CLASSES,
    normalised,
    on_meta,
    random_boxes,
    same_networks,
    torchvision_outputs,
)
from retinanet.bench.tables import count
from retinanet.config import LossSettings, TrainConfig
from retinanet.losses.detection import detection_losses
from retinanet.model.precision import autocast, choose_dtype
from retinanet.structures import pad_targets
from retinanet.training.optim import build_optimizer

_LR, _MOMENTUM, _WEIGHT_DECAY = 1e-4, 0.9, 1e-4


def train_step(setting: Setting) -> list[Case]:
    """Run forward, loss, backward and SGD against torchvision's float32 step.

    On a GPU torchvision's step has the same precision.
    """
    cases: dict[str, tuple[str, int, int]] = {
        "ResNet-50": ("resnet50", setting.pick(64, 128, 512), 2),
        "ResNet-18": ("resnet18", setting.pick(64, 128, 256), setting.pick(2, 4, 8)),
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
            partial(_benchmark, setting, backbone, side, batch, precision),
        )
        for name, (backbone, side, batch) in cases.items()
        for precision in precisions
    ]


def _benchmark(setting: Setting, backbone: str, side: int, batch: int, precision: str) -> Benchmark:
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
    options: dict[str, Any] = {"lr": _LR, "momentum": _MOMENTUM, "weight_decay": _WEIGHT_DECAY}
    optimizer = build_optimizer(model, TrainConfig(**options))
    sizes = feature_sizes(model.anchors.strides, side, side)

    def ours() -> float:
        with autocast(precision, device):
            outputs = model(images)
        losses = detection_losses(
            outputs,
            level_anchors(model.anchors, sizes, device),
            targets,
            num_classes=model.num_classes,
            # torchvision's defaults, for equal work
            settings=LossSettings(box="l1", low_quality_matches=True),
        )
        return _optimize(losses.total, optimizer)

    rivals = []
    if "torchvision" in setting.vs:
        their_targets = [
            {"boxes": b.to(device), "labels": k.to(device)}
            for b, k in zip(boxes, labels, strict=True)
        ]
        # Without autocast on a CPU, with it on a GPU.
        their_precision = precision if device.type == "cuda" else "float32"
        x = normalised(images, model)
        parameters = [p for p in rival.parameters() if p.requires_grad]
        their_optimizer = torch.optim.SGD(parameters, **options)
        theirs = partial(_their_step, rival, x, their_targets, their_optimizer, their_precision)
        name = "torchvision" if their_precision == "float32" else f"torchvision {precision}"
        compare = partial(_compare, 1e-3 if precision == "float32" else 0.1)
        rivals.append(Rival(name, theirs, compare))
    counted = on_meta(backbone).train()
    empty = torch.empty(batch, 3, side, side, device="meta")
    flops = count_flops(partial(_forward_backward, counted, empty))
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    limit = matrix_limit(flops, side // 8, side // 8, batch, dtype, device)
    return Benchmark(ours, rivals, limit=limit)


def _their_step(
    network: Any,
    x: torch.Tensor,
    targets: list[dict[str, torch.Tensor]],
    optimizer: torch.optim.Optimizer,
    precision: str,
) -> float:
    with autocast(precision, x.device):
        features = list(network.backbone(x).values())
        outputs = network.head(features)
    anchors = network.anchor_generator(ImageList(x, [tuple(x.shape[2:])] * len(x)), features)
    outputs = {name: output.float() for name, output in outputs.items()}
    losses = network.compute_loss(targets, outputs, anchors)
    return _optimize(sum(losses.values()), optimizer)


def _compare(tolerance: float, output: float, expected: float) -> str:
    error = abs(output - expected) / abs(expected)
    assert error <= tolerance, f"loss {output} and {expected}"
    return f"loss {error:.0e}"


def _forward_backward(network: Any, x: torch.Tensor) -> None:
    torch.autograd.backward([output.sum() for output in torchvision_outputs(network, x)])


def _optimize(loss: Any, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return float(loss.detach())
