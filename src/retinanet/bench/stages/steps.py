"""A step of training, the batch given."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from retinanet.anchors import feature_sizes, level_anchors
from retinanet.bench.contest import Case, Contest, Rival, Setting
from retinanet.bench.limits import count_flops, matrix_limit
from retinanet.bench.markdown import count
from retinanet.bench.samples import (
    TORCHVISION_CLASSES,
    normalised,
    on_meta,
    random_boxes,
    same_networks,
)
from retinanet.losses.detection import detection_losses
from retinanet.model.precision import autocast, choose_dtype
from retinanet.structures import pad_targets
from retinanet.training.optim import build_optimizer

_LR, _MOMENTUM, _DECAY = 1e-4, 0.9, 1e-4


def train_step(setting: Setting) -> list[Case]:
    """Forward, loss, backward and SGD beside torchvision's float32; on a GPU in our precision."""
    on_gpu = setting.device.type == "cuda"
    plans: dict[str, tuple[str, int, int]] = {
        "ResNet-50": ("resnet50", setting.pick(64, 128, 512), 2),
        "ResNet-18": ("resnet18", setting.pick(64, 128, 256), setting.pick(2, 4, 8)),
    }
    if on_gpu:
        plans = {"ResNet-50": ("resnet50", setting.pick(64, 256, 800), setting.pick(2, 4, 16))}
    precisions = ["float32"]
    # Emulated where there are no units for it, which nobody would choose.
    if choose_dtype("auto", setting.device) == torch.bfloat16:
        precisions.append("bf16")
    return [
        Case(
            f"{name} {precision}",
            f"{side} x {side}, {count(batch, 'image')}",
            partial(_contest, setting, backbone, side, batch, precision),
        )
        for name, (backbone, side, batch) in plans.items()
        for precision in precisions
    ]


def _contest(setting: Setting, backbone: str, side: int, batch: int, precision: str) -> Contest:
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
    optimizer = build_optimizer(
        model, optimizer="sgd", lr=_LR, momentum=_MOMENTUM, weight_decay=_DECAY
    )

    def ours() -> float:
        with autocast(precision, device):
            outputs = model(images)
        sizes = feature_sizes(model.anchors.strides, side, side)
        losses = detection_losses(
            outputs,
            level_anchors(model.anchors, sizes, device),
            targets,
            num_classes=model.num_classes,
            # torchvision's choices, so that the two do the same.
            box="l1",
            low_quality_matches=True,
        )
        return _step(losses.total, optimizer)

    rivals = []
    if "torchvision" in setting.vs:
        x = normalised(images, model)
        their_optimizer = torch.optim.SGD(
            [one for one in rival.parameters() if one.requires_grad],
            lr=_LR,
            momentum=_MOMENTUM,
            weight_decay=_DECAY,
        )
        their_targets = [
            {"boxes": one.to(device), "labels": of.to(device)}
            for one, of in zip(boxes, labels, strict=True)
        ]
        # People train in float32 on a CPU, and under autocast on a GPU.
        their_precision = precision if device.type == "cuda" else "float32"

        def theirs() -> float:
            with autocast(their_precision, device):
                features = list(rival.backbone(x).values())
                outputs = rival.head(features)
            listed = ImageList(x, [(side, side)] * batch)
            anchors = rival.anchor_generator(listed, features)
            outputs = {name: one.float() for name, one in outputs.items()}
            losses = rival.compute_loss(their_targets, outputs, anchors)
            return _step(sum(losses.values()), their_optimizer)

        name = "torchvision" if their_precision == "float32" else f"torchvision {precision}"
        tolerance = 1e-3 if precision == "float32" else 0.1

        def compare(got: float, expected: float) -> str:
            error = abs(got - expected) / abs(expected)
            assert error <= tolerance, f"loss {got} and {expected}"
            return f"loss {error:.0e}"

        rivals.append(Rival(name, theirs, compare))
    counted = on_meta(backbone).train()
    flops = count_flops(partial(_pass, counted, torch.empty(batch, 3, side, side, device="meta")))
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    limit = matrix_limit(flops, side // 8, side // 8, batch, dtype, device)
    return Contest(ours, rivals, limit=limit)


def _pass(network: Any, x: Tensor) -> None:
    """Forward and backward through the network alone."""
    outputs = network.head(list(network.backbone(x).values()))
    total: Tensor = sum(one.sum() for one in outputs.values())
    torch.autograd.backward(total)


def _step(loss: Any, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return float(loss.detach())
