"""When a loss is NaN or infinite: say where, keep the last good weights and what reproduces it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from retinanet.anchors import feature_sizes, level_anchors
from retinanet.config import LossSettings
from retinanet.data.dataset import Dataset
from retinanet.errors import NonFiniteLossError, WeightsError
from retinanet.files import replace_folder
from retinanet.losses.detection import Losses, detection_losses
from retinanet.model.checkpoint import Checkpoint, load_checkpoint, write_checkpoint
from retinanet.model.precision import autocast
from retinanet.structures import Batch, Targets


def report_nonfinite(
    run: Path,
    *,
    step: int,
    batch: Batch,
    checkpoint: Checkpoint,
    model: nn.Module,
    dataset: Dataset,
    running: Tensor,
    numbers: Mapping[str, Any],
    write: bool = True,
) -> NoReturn:
    """Keep weights and batch in ``run/nonfinite/`` and stop.

    The optimiser has skipped the step and each after it (:class:`retinanet.training.guard.Guard`),
    so the weights kept are the last good ones. The running statistics of norms that train
    (``model.norm=trained``) have no such guard: they have seen the bad batch, and on a GPU the one
    after it. Of several processes one writes (`write`); each names its own images.

    Raises:
        NonFiniteLossError: always; names the images, the learning rate and the gradient's norm.
    """
    images = [dataset.images[int(i)] for i in batch.indices]

    def fill(draft: Path) -> None:
        raw = Checkpoint(
            model=model,  # type: ignore[arg-type]
            classes=checkpoint.classes,
            category_ids=checkpoint.category_ids,
            image_size=checkpoint.image_size,
            max_size=checkpoint.max_size,
            info=checkpoint.info,
        )
        (draft / "model").mkdir()
        write_checkpoint(draft / "model", raw)
        tensors = {
            "images": batch.images.contiguous(),
            "boxes": batch.targets.boxes,
            "labels": batch.targets.labels,
            "running": running,
        }
        save_file(
            {name: one.detach().cpu() for name, one in tensors.items()}, draft / "batch.safetensors"
        )
        story = {
            "step": step,
            "images": [{"id": one.id, "file": str(one.path)} for one in images],
            **{name: repr(one) if one != one else one for name, one in numbers.items()},
        }
        (draft / "story.json").write_text(json.dumps(story, indent=1, default=str) + "\n", "utf-8")

    kept = run / "nonfinite"
    if write:
        replace_folder(kept, fill)
    names = ", ".join(str(one.id) for one in images)
    raise NonFiniteLossError(
        f"step {step}: the loss is {numbers['loss']} (class {numbers['loss_classification']}, box "
        f"{numbers['loss_box']}), gradient norm {numbers['grad_norm']}, learning rate "
        f"{numbers['lr']:g}, images {names}; the weights before this step and the batch are in "
        f"{kept} (retinanet.training.nonfinite.replay repeats it); try a lower train.lr, "
        "train.warmup_steps or train.clip_norm"
    )


def replay(folder: str | Path) -> tuple[Losses, float]:
    """Repeat the step that a ``nonfinite/`` folder holds.

    Returns:
        The losses and the norm of their gradient.

    Raises:
        WeightsError: the folder holds no such step.
    """
    folder = Path(folder)
    try:
        tensors = load_file(folder / "batch.safetensors")
        story = json.loads((folder / "story.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder} holds no step to repeat: {error}") from None
    checkpoint = load_checkpoint(folder / "model")
    model = checkpoint.model.train()
    images = tensors["images"].contiguous(memory_format=torch.channels_last)
    model.to(memory_format=torch.channels_last)
    # A CPU has no fp16 units to repeat an fp16 step with.
    precision = story["precision"] if story["precision"] != "fp16" else "float32"
    with autocast(precision, torch.device("cpu")):
        outputs = model(images)
    anchors = level_anchors(
        model.anchors, feature_sizes(model.anchors.strides, *images.shape[-2:]), images.device
    )
    losses = detection_losses(
        outputs,
        anchors,
        Targets(tensors["boxes"], tensors["labels"]),
        num_classes=model.num_classes,
        running=tensors["running"],
        settings=LossSettings(**checkpoint.info["loss"]),
    )
    torch.autograd.backward(losses.total)
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return losses, float(norm)
