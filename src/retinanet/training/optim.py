"""The optimiser, the learning rate of each step, and how many steps there are (Sec. 4.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def resolve_steps(
    images: int,
    *,
    steps: int,
    epochs: float | None,
    min_steps: int,
    max_steps: int,
    batch_size: int,
) -> int:
    """`steps` itself, or as many as `epochs` passes over `images` images need, within the limits.

    Example:
        >>> resolve_steps(205, steps=90_000, epochs=24, min_steps=400, max_steps=4000, batch_size=8)
        615
    """
    if epochs is None:
        return steps
    return min(max(math.ceil(epochs * images / batch_size), min_steps), max_steps)


def scaled_lr(lr: float, batch_size: int, reference_batch: int) -> float:
    """The linear scaling rule (Goyal et al. 2017, Sec. 2.1): k times the batch, k times the rate.

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
    """What the learning rate is multiplied with in step `step` (from 0) of `steps`.

    Args:
        schedule: ``steps`` divides by 10 at each milestone (Sec. 4.1); ``cosine`` falls from 1
            to 0.
        milestones: shares of `steps`; the paper's 60k and 80k of 90k are 2/3 and 8/9.
        warmup_steps: linear rise over so many steps (Goyal et al. 2017, Sec. 2.2); 0: none.

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
    """SGD with momentum (Sec. 4.1) or AdamW over the parameters that train.

    Weights decay; biases and the scales of norms do not (Detectron's choice; the paper is silent).
    Each group carries ``lr_share``, its part of the learning rate, for :func:`set_lr`.

    Args:
        fused: one kernel moves all weights, or none if it is told so on the device
            (:func:`retinanet.training.guard.step_unless`); None: on a GPU. On a CPU torch's own
            choice, a loop, stays: foreach takes two to three times as long there.
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
        fused = all(one.is_cuda for group in groups.values() for one in group)
    if optimizer == "adamw":
        return torch.optim.AdamW(settings, lr=lr, fused=fused or None)
    sgd = torch.optim.SGD(settings, lr=lr, momentum=momentum, fused=fused or None)
    if fused and momentum:
        # The fused kernel leaves its first buffers unset if it is told to skip the first step.
        for group in sgd.param_groups:
            for parameter in group["params"]:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def update_average(
    averaged: AveragedModel, model: nn.Module, decay: float, refused: Tensor
) -> None:
    """Move the averaged weights towards the model's, unless the step was refused.

    Args:
        averaged: of `model`; it counts on the host, so that nothing waits for the device. Refused
            steps are therefore counted on a GPU and not on a CPU: under fp16's loss scale the ramp
            at the beginning is a few steps shorter there.
        decay: the share that is kept once the average has run for a while.
        refused: () float32, 1 if the step did not move the model.
    """
    if refused.device.type == "cpu" and refused:
        return
    seen = int(averaged.n_averaged)
    # The ramp keeps a short run's average from being its first step's weights.
    share = 1 - min(decay, (1 + seen) / (10 + seen)) if seen else 1.0
    pairs = zip(
        [*averaged.module.parameters(), *averaged.module.buffers()],
        [*model.parameters(), *model.buffers()],
        strict=True,
    )
    for kept, new in pairs:
        move_towards(kept, new, share, None if refused.device.type == "cpu" else refused)
    averaged.n_averaged += 1


@torch.no_grad()
def move_towards(kept: Tensor, new: Tensor, share: float, refused: Tensor | None) -> None:
    """Move `kept` by `share` of the way to `new`, in place, without a look at any value.

    Args:
        kept: any shape; integers are taken from `new` as they are.
        new: of the same shape and type.
        share: in (0, 1]; 1 takes `new` itself.
        refused: () float32, 1 if nothing may change, not even where `new` is NaN; None: let.
    """
    if refused is not None:
        # Not a share of 0, which would let a NaN in.
        new = torch.where(refused > 0, kept, new)
    if kept.is_floating_point() and share < 1:
        kept.lerp_(new, share)
    else:
        kept.copy_(new)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give each group its share of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_share"]
