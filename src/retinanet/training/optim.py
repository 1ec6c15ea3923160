"""Optimizer, learning-rate schedule, number of steps, and EMA weights (Sec. 4.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from retinanet.config import TrainConfig


def resolve_steps(images: int, settings: TrainConfig) -> int:
    """Compute the number of steps: ``steps``, or ``epochs`` over `images` within the limits.

    Example:
        >>> resolve_steps(205, TrainConfig(epochs=24, min_steps=400, max_steps=4000, batch_size=8))
        615
    """
    if settings.epochs is None:
        return settings.steps
    steps = math.ceil(settings.epochs * images / settings.batch_size)
    return min(max(steps, settings.min_steps), settings.max_steps)


def scaled_lr(lr: float, batch_size: int, reference_batch: int) -> float:
    """Scale the learning rate with the batch size (linear rule, Goyal et al. 2017, Sec. 2.1).

    Example: the paper's .01 at 16 images becomes .0025 at 4.
        >>> scaled_lr(0.01, 4, 16)
        0.0025
    """
    return lr * batch_size / reference_batch


def lr_factor(
    step: int,
    steps: int,
    *,
    schedule: Literal["steps", "cosine"],
    milestones: Sequence[float],
    warmup_steps: int,
) -> float:
    """Factor of the learning rate in step `step` (from 0) of `steps`.

    Args:
        schedule: ``steps`` divides by 10 at each milestone (Sec. 4.1); ``cosine`` falls from 1
            to 0.
        milestones: shares of `steps`; the paper's 60k and 80k of 90k are 2/3 and 8/9.
        warmup_steps: linear warm-up over this many steps (Goyal et al. 2017, Sec. 2.2); 0: none.

    Example:
        >>> paper = dict(schedule="steps", milestones=(2 / 3, 8 / 9), warmup_steps=0)
        >>> [lr_factor(s, 90_000, **paper) for s in (0, 59_999, 60_000, 79_999, 80_000)]
        [1.0, 1.0, 0.1, 0.1, 0.01]
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    if schedule == "cosine":
        return warmup * 0.5 * (1 + math.cos(math.pi * step / steps))
    passed = sum(step >= round(share * steps) for share in milestones)
    return warmup * float(f"1e-{passed}")


def build_optimizer(
    model: nn.Module,
    *,
    optimizer: Literal["sgd", "adamw"],
    lr: float,
    momentum: float,
    weight_decay: float,
    backbone_lr_factor: float = 1.0,
    fused: bool | None = None,
) -> torch.optim.Optimizer:
    """Build SGD with momentum (Sec. 4.1) or AdamW over the parameters that train.

    Weights decay; biases and the scales of norms do not (Detectron's choice; the paper is silent).
    Each group has ``lr_share``, its part of the learning rate, for :func:`set_lr`.

    Args:
        fused: update all weights in one kernel, which can skip a step on the device
            (:func:`optimizer_step`); None: on a GPU. On a CPU torch's default loop is used: foreach
            takes two to three times as long there.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (name.startswith("backbone."), parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    settings: list[dict[str, Any]] = [
        {
            "params": parameters,
            "lr_share": backbone_lr_factor if in_backbone else 1.0,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (in_backbone, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
    if fused is None:
        fused = all(parameter.is_cuda for group in groups.values() for parameter in group)
    if optimizer == "adamw":
        return torch.optim.AdamW(settings, lr=lr, fused=fused or None)
    sgd = torch.optim.SGD(settings, lr=lr, momentum=momentum, fused=fused or None)
    if fused and momentum:
        # The fused kernel leaves its first buffers unset where it skips the first step.
        for group in sgd.param_groups:
            for parameter in group["params"]:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set each group's learning rate to its share of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_share"]


def optimizer_step(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Update the weights, unless `skip` (() float32) is 1."""
    if optimizer.defaults.get("fused"):
        # Fused kernels read the flag on the device; GradScaler uses the same attribute.
        optimizer.found_inf = skip  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif not skip:
        optimizer.step()


def update_ema(ema: AveragedModel, model: nn.Module, decay: float, skip: Tensor) -> None:
    """Update the EMA weights in place, unless the step was skipped; no device sync.

    Args:
        ema: of `model`; updates are counted on the host. Skipped steps are therefore counted on a
            GPU and not on a CPU: under fp16's loss scale the ramp at the beginning is a few steps
            shorter there.
        decay: share of the old value that is kept, after a ramp at the beginning.
        skip: () float32, 1 where the step did not move the model.
    """
    on_cpu = skip.device.type == "cpu"
    if on_cpu and skip:
        return
    updates = int(ema.n_averaged)
    # The ramp keeps a short run's average from being its first step's weights.
    weight = 1 - min(decay, (1 + updates) / (10 + updates)) if updates else 1.0
    pairs = zip(
        [*ema.module.parameters(), *ema.module.buffers()],
        [*model.parameters(), *model.buffers()],
        strict=True,
    )
    for average, value in pairs:
        lerp_unless(average, value, weight, None if on_cpu else skip)
    ema.n_averaged += 1


@torch.no_grad()
def lerp_unless(average: Tensor, value: Tensor, weight: float, skip: Tensor | None) -> None:
    """Interpolate `average` towards `value` in place, without a device sync.

    Args:
        average: any shape; integers are copied from `value`.
        value: of the same shape and type.
        weight: in (0, 1]; 1 copies `value`.
        skip: () float32, 1 where nothing may change, even where `value` is NaN; None: never skip.
    """
    if skip is not None:
        # Not a weight of 0, which would let a NaN in.
        value = torch.where(skip > 0, average, value)
    if average.is_floating_point() and weight < 1:
        average.lerp_(value, weight)
    else:
        average.copy_(value)
