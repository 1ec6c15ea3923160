"""Number of steps, learning rate and optimizer (Sec. 4.1)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

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


def short_warmup(settings: TrainConfig, steps: int) -> int:
    """Return the warm-up of a short training, at most a tenth of its steps."""
    return min(settings.warmup_steps, steps // 10)


def scaled_lr(settings: TrainConfig) -> float:
    """Scale the learning rate with the batch size (linear rule, Goyal et al. 2017, Sec. 2.1).

    Example: the paper's .01 at 16 images becomes .0025 at 4.
        >>> scaled_lr(TrainConfig(lr=0.01, batch_size=4, reference_batch=16))
        0.0025
    """
    return settings.lr * settings.batch_size / settings.reference_batch


def build_optimizer(
    model: nn.Module, settings: TrainConfig, *, fused: bool | None = None
) -> torch.optim.Optimizer:
    """Build SGD with momentum (Sec. 4.1) or AdamW over the parameters that train.

    Weights decay; biases and the scales of norms do not (Detectron's choice; the paper is silent).
    Each group has ``lr_share``, its part of the learning rate, for
    :func:`retinanet.training.step.set_lr`.

    Args:
        model: parts named ``backbone`` learn at ``backbone_lr_factor`` of the rate.
        settings: optimizer, learning rate, momentum and weight decay.
        fused: update all weights in one kernel, which can skip a step on the device
            (:func:`retinanet.training.step.optimizer_step`); None: on a GPU. On a CPU torch's
            default loop is used: foreach takes two to three times as long there.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (name.startswith("backbone."), parameter.ndim > 1)
            groups.setdefault(key, []).append(parameter)
    options: list[dict[str, Any]] = [
        {
            "params": parameters,
            "lr_share": settings.backbone_lr_factor if in_backbone else 1.0,
            "weight_decay": settings.weight_decay if decays else 0.0,
        }
        for (in_backbone, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
    lr = scaled_lr(settings)
    if fused is None:
        fused = all(parameter.is_cuda for group in groups.values() for parameter in group)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(options, lr=lr, fused=fused or None)
    sgd = torch.optim.SGD(options, lr=lr, momentum=settings.momentum, fused=fused or None)
    if fused and settings.momentum:
        # The fused kernel leaves its first buffers unset where it skips the first step.
        for group in sgd.param_groups:
            for parameter in group["params"]:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd
