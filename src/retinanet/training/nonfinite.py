"""NaN or Inf losses: save the last good weights and the batch that reproduces the step."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from retinanet.config import LossSettings
from retinanet.data.dataset import Dataset
from retinanet.errors import WeightsError
from retinanet.files import replace_folder
from retinanet.losses.detection import Losses, detection_losses
from retinanet.model.checkpoint import Checkpoint, load_checkpoint, write_checkpoint
from retinanet.model.precision import autocast
from retinanet.model.retinanet import output_anchors
from retinanet.structures import Targets
from retinanet.training.step import PendingStep


def describe_step(failed: PendingStep, dataset: Dataset, saved: str, of: str = "") -> str:
    """Compose the error message of a step with a NaN or Inf loss or gradient."""
    numbers, _ = failed.read()
    names = ", ".join(str(dataset.images[int(i)].id) for i in failed.batch.indices)
    return (
        f"step {failed.step}: the loss{of} is {numbers['loss']} (class "
        f"{numbers['loss_classification']}, box {numbers['loss_box']}), gradient norm "
        f"{numbers['grad_norm']}, learning rate {failed.lr:g}, images {names}; "
        f"{saved}; try a lower train.lr, train.warmup_steps or train.clip_norm"
    )


def save_step(
    folder: Path, failed: PendingStep, checkpoint: Checkpoint, dataset: Dataset, precision: str
) -> None:
    """Save the weights before a step and its batch.

    The optimizer has skipped the step and each later step
    (:class:`retinanet.training.step.NonFiniteGuard`), so the weights are the last good ones. The
    running statistics of norms that train (``model.norm=trained``) have no such guard: they contain
    the bad batch, and on a GPU the next one.
    """
    images = [dataset.images[int(i)] for i in failed.batch.indices]
    tensors = {
        "images": failed.batch.images.contiguous(),
        "boxes": failed.batch.targets.boxes,
        "labels": failed.batch.targets.labels,
        "running": failed.running,
    }
    numbers = {"lr": failed.lr, "precision": precision, **failed.read()[0]}
    story = {
        "step": failed.step,
        "images": [{"id": image.id, "file": str(image.path)} for image in images],
        # JSON has no NaN
        **{k: repr(v) if v != v else v for k, v in numbers.items()},
    }

    def fill(draft: Path) -> None:
        (draft / "model").mkdir()
        write_checkpoint(draft / "model", checkpoint)
        on_cpu = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        save_file(on_cpu, draft / "batch.safetensors")
        (draft / "story.json").write_text(json.dumps(story, indent=1, default=str) + "\n", "utf-8")

    replace_folder(folder, fill)


def replay(folder: str | Path) -> tuple[Losses, float]:
    """Repeat the step that a ``nonfinite/`` folder contains.

    Returns:
        The losses and the norm of their gradient.
    """
    folder = Path(folder)
    try:
        tensors = load_file(folder / "batch.safetensors")
        story = json.loads((folder / "story.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{folder} contains no step to repeat: {error}") from None
    checkpoint = load_checkpoint(folder / "model")
    model = checkpoint.model.train()
    images = tensors["images"].contiguous(memory_format=torch.channels_last)
    model.to(memory_format=torch.channels_last)
    # A CPU has no fp16 units to repeat an fp16 step with.
    precision = story["precision"] if story["precision"] != "fp16" else "float32"
    with autocast(precision, torch.device("cpu")):
        outputs = model(images)
    losses = detection_losses(
        outputs,
        output_anchors(model, outputs),
        Targets(tensors["boxes"], tensors["labels"]),
        num_classes=model.num_classes,
        running=tensors["running"],
        settings=LossSettings(**checkpoint.info["loss"]),
    )
    torch.autograd.backward(losses.total)
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    return losses, float(norm)
