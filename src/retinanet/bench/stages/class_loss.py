"""Class loss of all anchors, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.retinanet import RetinaNetClassificationHead

from retinanet.bench.benchmark import Benchmark, Case, Rival, Setting
from retinanet.bench.limits import copy_limit
from retinanet.bench.samples import map_sizes, num_anchors, rms_error, total_bytes
from retinanet.config import LossConfig
from retinanet.losses import classification_loss
from retinanet.structures import BACKGROUND, IGNORED, flatten_level, flatten_levels

_ALPHA, _GAMMA = 0.25, 2.0

_CASES: dict[str, dict[str, Any]] = {
    "float32, 2 images": {},
    "float32, 8 images": {"batch": 8},
    "heads' layout, 2 images": {"heads_layout": True},
    "overwriting, 2 images": {"overwrite": True},
    "bf16, 2 images": {"dtype": torch.bfloat16},
    "1 class, 2 images": {"classes": 1},
    "2,000 objects, 2 images": {"objects": 2000},
}


def class_loss(setting: Setting) -> list[Case]:
    """Class loss against torchvision's head, which makes one-hot targets."""
    sides = setting.pick((64, 96), (256, 320), (800, 1216))
    cases = []
    for name, changes in _CASES.items():
        options = {"batch": 2, "classes": setting.pick(5, 80, 80), "objects": 20, **changes}
        size = f"{num_anchors(*sides):,} anchors x {options['classes']}"
        cases.append(Case(name, size, partial(_benchmark, setting, sides, **options)))
    return cases


def class_loss_input(
    height: int, width: int, batch: int, classes: int, objects: int, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Random logits like those of a partly trained network, with about 8 anchors per object.

    Returns:
        (B, A * K, H_l, W_l) logits of each level in channels_last memory, as the head returns them;
        (B, R) labels: the class, BACKGROUND or IGNORED.
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


def _benchmark(
    setting: Setting,
    sides: tuple[int, int],
    *,
    batch: int,
    classes: int,
    objects: int,
    dtype: torch.dtype = torch.float32,
    heads_layout: bool = False,
    overwrite: bool = False,
) -> Benchmark:
    head_levels, labels = class_loss_input(*sides, batch, classes, objects, setting.device)
    # The heads' levels, or one (B, R, K) tensor.
    levels = head_levels if heads_layout else [flatten_levels(head_levels, classes)]
    levels = [level.to(dtype).requires_grad_() for level in levels]
    # Mean over images of the loss over each image's foreground anchors (Sec. 4.1).
    foreground = (labels >= 0).sum(dim=1).clamp(min=1)

    def ours() -> tuple[Tensor, list[Tensor]]:
        flat = [flatten_level(x, classes) for x in levels] if heads_layout else levels
        weights = (foreground * batch).float().reciprocal()
        # When overwriting, later rounds read the gradient of the first: the same work.
        settings = LossConfig(alpha=_ALPHA, gamma=_GAMMA)
        loss = classification_loss(flat, labels, weights, settings, overwrite_logits=overwrite)
        return _backward(loss, levels)

    # Rivals compute in float32; bfloat16 keeps 8 bits of a gradient.
    compare = partial(_compare, 1e-4 if dtype == torch.float32 else 1e-2)
    float_levels = [level.detach().float().requires_grad_() for level in levels]

    def theirs(loss: Callable[[Tensor, Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
        logits = flatten_levels(float_levels, classes) if heads_layout else float_levels[0]
        return _backward(loss(logits, labels), float_levels)

    losses = {"torchvision": _torchvision_loss, "fvcore": _fvcore_loss}
    if setting.device.type == "cuda":
        losses["apex"] = _apex_loss
    rivals = [
        Rival(name, partial(theirs, loss), compare)
        for name, loss in losses.items()
        if name in setting.vs
    ]
    return Benchmark(ours, rivals, limit=copy_limit(levels), input_bytes=total_bytes(levels))


def _backward(loss: Tensor, inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    return loss.detach(), list(torch.autograd.grad(loss, inputs))


def _compare(
    tolerance: float, output: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]
) -> str:
    torch.testing.assert_close(output[0].float(), expected[0].float(), rtol=1e-4, atol=0)
    error = max(rms_error(a, b) for a, b in zip(output[1], expected[1], strict=True))
    assert error <= tolerance, f"relative rms {error:.1e} of the gradient"
    return f"gradient {error:.0e} rms"


def _torchvision_loss(logits: Tensor, labels: Tensor) -> Tensor:
    # One ground-truth box per class: the index of an anchor's box is its label, and background and
    # ignored anchors have the same codes as ours.
    targets = [{"labels": torch.arange(logits.shape[-1], device=logits.device)}] * len(labels)
    head = RetinaNetClassificationHead(1, 1, 1)
    loss: Tensor = head.compute_loss(targets, {"cls_logits": logits}, list(labels))
    return loss


def _fvcore_loss(logits: Tensor, labels: Tensor) -> Tensor:
    loss_of = import_module("fvcore.nn").sigmoid_focal_loss_jit
    total = torch.zeros((), device=logits.device)
    for image, classes in zip(logits, labels, strict=True):
        counted = classes >= BACKGROUND
        one_hot = torch.zeros_like(image).scatter_(1, classes.clamp(min=0)[:, None], 1.0)
        one_hot = one_hot * (classes >= 0)[:, None]
        options = {"alpha": _ALPHA, "gamma": _GAMMA, "reduction": "sum"}
        loss = loss_of(image[counted], one_hot[counted], **options)
        total = total + loss / (classes >= 0).sum().clamp(min=1)
    return total / len(logits)


def _apex_loss(logits: Tensor, labels: Tensor) -> Tensor:
    # Its labels are coded as ours; its normaliser is one number, so image by image.
    loss_of = import_module("apex.contrib.focal_loss").focal_loss
    total = torch.zeros((), device=logits.device)
    for image, classes in zip(logits, labels, strict=True):
        foreground = (classes >= 0).sum().clamp(min=1).float()
        total = total + loss_of(image, classes, foreground, image.shape[-1], _ALPHA, _GAMMA, 0.0)
    return total / len(logits)
