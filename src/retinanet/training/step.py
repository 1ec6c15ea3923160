"""From a batch to the gradient of its loss. On a GPU nothing in here waits for the device.

(Mining, ``loss.mining``, alone does: it must see which anchors are hard.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from retinanet.anchors import AnchorSpec, anchor_spec, feature_sizes, level_anchors
from retinanet.config import LossSettings, Recipe
from retinanet.errors import ConfigError
from retinanet.losses.detection import Losses, detection_losses
from retinanet.matching import match_anchors
from retinanet.model.precision import autocast
from retinanet.model.retinanet import RetinaNet
from retinanet.structures import Batch, Targets
from retinanet.training.processes import sync_if


def recipe_anchors(recipe: Recipe) -> AnchorSpec:
    """The anchors that a recipe asks for.

    Raises:
        ConfigError: there are not as many sizes as levels.
    """
    strides = [2**level for level in range(2 if recipe.model.p2 else 3, 8)]
    try:
        return anchor_spec(strides, **recipe.anchors.model_dump())
    except ValueError as error:
        raise ConfigError(f"anchors: {error}") from None


def backward(
    accelerator: Accelerator,
    network: nn.Module,
    model: RetinaNet,
    batch: Batch,
    *,
    settings: LossSettings,
    accumulate: int,
    precision: str,
    scaler: torch.amp.GradScaler,
    running: Tensor,
) -> tuple[Losses, Tensor]:
    """Loss and gradient of a batch, in micro-batches; gradients meet over processes in the last.

    However many processes and micro-batches share a batch, the gradient is that of the whole.

    Args:
        network: `model`, or what holds it where there are several processes.
        batch: this process' part.
        settings: of the losses and the matching.
        accumulate: how many micro-batches.
        running: () of the normalizer ``running``: the moving average over whole batches.

    Returns:
        The losses of the whole batch, and `running` after it.
    """
    device = batch.images.device
    height, width = batch.images.shape[-2:]
    sizes = feature_sizes(model.anchors.strides, height, width)
    anchors = level_anchors(model.anchors, sizes, device)
    # What a micro-batch divides by is its part of the whole batch's count, on which it stands.
    parts = accelerator.num_processes * accumulate
    share_of_all = _share_of_all(accelerator, anchors, batch.targets, settings, accumulate)
    losses: list[Losses] = []
    pieces = list(micro_batches(batch, accumulate))
    for piece in pieces:
        with sync_if(accelerator, network, piece is pieces[-1]):
            with autocast(precision, device):
                outputs = network(piece.images)
            losses.append(
                detection_losses(
                    outputs,
                    anchors,
                    piece.targets,
                    num_classes=model.num_classes,
                    running=running / parts,
                    world_foreground=share_of_all,
                    overwrite_logits=True,
                    settings=settings,
                )
            )
            torch.autograd.backward(scaler.scale(losses[-1].total / accumulate))
    if settings.normalizer == "running":
        running = losses[-1].normalizer * parts
    total = whole_losses(losses)
    if accelerator.num_processes > 1:
        total = Losses(
            accelerator.reduce(total.classification, reduction="mean"),
            accelerator.reduce(total.box, reduction="mean"),
            accelerator.gather(total.foreground),
            total.normalizer,
        )
    return total, running


def whole_losses(parts: Sequence[Losses]) -> Losses:
    """The losses of a batch, without gradient, from those of its micro-batches in order."""
    return Losses(
        classification=torch.stack([one.classification.detach() for one in parts]).mean(),
        box=torch.stack([one.box.detach() for one in parts]).mean(),
        foreground=torch.cat([one.foreground for one in parts]),
        normalizer=parts[-1].normalizer,
    )


def clip(model: nn.Module, clip_norm: float) -> Tensor:
    """The norm of the gradient before clipping; `clip_norm` 0 only measures."""
    parameters = [one for one in model.parameters() if one.grad is not None]
    norm = nn.utils.get_total_norm([one.grad for one in parameters if one.grad is not None])
    if clip_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return norm


def _share_of_all(
    accelerator: Accelerator,
    anchors: list[Tensor],
    targets: Targets,
    settings: LossSettings,
    accumulate: int,
) -> Callable[[Tensor], Tensor]:
    """From a micro-batch's count of foreground anchors to its part of the whole batch's."""
    whole: Tensor | None = None
    if accumulate > 1 and settings.normalizer != "image":
        # The first micro-batch must know what the others hold, so they are matched beforehand too.
        matches = match_anchors(
            torch.cat(anchors),
            targets,
            foreground_iou=settings.foreground_iou,
            background_iou=settings.background_iou,
            low_quality_matches=settings.low_quality_matches,
        )
        whole = (matches >= 0).sum()

    def share(count: Tensor) -> Tensor:
        own = count if whole is None else whole
        total = accelerator.reduce(own.float(), reduction="sum")
        part: Tensor = total.clamp(min=1) / (accelerator.num_processes * accumulate)
        return part

    return share


def micro_batches(batch: Batch, count: int) -> Iterator[Batch]:
    """The `count` equal parts of a batch, in order."""
    size = len(batch.images) // count
    for i in range(0, len(batch.images), size):
        part = slice(i, i + size)
        yield Batch(
            batch.images[part],
            Targets(batch.targets.boxes[part], batch.targets.labels[part]),
            batch.sizes[part],
            batch.original_sizes[part],
            batch.indices[part],
        )
