"""NaN or Inf losses: save the last good weights and the batch that reproduces the step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class NonFiniteStep:
    """A step with a NaN or Inf loss or gradient.

    Attributes:
        step: from 0.
        batch: its images, on the host.
        running: () the running normalizer before it.
        numbers: values of the log, and ``lr`` and ``precision``.
        write: whether this process may write into the run folder.
    """

    step: int
    batch: Batch
    running: Tensor
    numbers: Mapping[str, Any]
    write: bool = True

    def message(self, dataset: Dataset, next_step: str, of: str = "") -> str:
        """Compose the error; `of` names the detector, `next_step` says what to look at."""
        numbers = self.numbers
        names = ", ".join(str(dataset.images[int(i)].id) for i in self.batch.indices)
        return (
            f"step {self.step}: the loss{of} is {numbers['loss']} (class "
            f"{numbers['loss_classification']}, box {numbers['loss_box']}), gradient norm "
            f"{numbers['grad_norm']}, learning rate {numbers['lr']:g}, images {names}; "
            f"{next_step}; try a lower train.lr, train.warmup_steps or train.clip_norm"
        )


def report_nonfinite(
    run: Path, failed: NonFiniteStep, checkpoint: Checkpoint, dataset: Dataset
) -> NoReturn:
    """Save weights and batch in ``run/nonfinite/``, and stop.

    The optimizer has skipped the step and each later one
    (:class:`retinanet.training.step.NonFiniteGuard`), so the weights are the last good ones. The
    running statistics of norms that train (``model.norm=trained``) have no such guard: they contain
    the bad batch, and on a GPU the one after it. Each process names its own images.

    Raises:
        NonFiniteLossError: always; names the images, the learning rate and the gradient's norm.
    """
    images = [dataset.images[int(i)] for i in failed.batch.indices]
    batch = failed.batch

    def fill(draft: Path) -> None:
        (draft / "model").mkdir()
        write_checkpoint(draft / "model", checkpoint)
        tensors = {
            "images": batch.images.contiguous(),
            "boxes": batch.targets.boxes,
            "labels": batch.targets.labels,
            "running": failed.running,
        }
        save_file(
            {name: tensor.detach().cpu() for name, tensor in tensors.items()},
            draft / "batch.safetensors",
        )
        story = {
            "step": failed.step,
            "images": [{"id": image.id, "file": str(image.path)} for image in images],
            # JSON has no NaN
            **{k: repr(v) if v != v else v for k, v in failed.numbers.items()},
        }
        (draft / "story.json").write_text(json.dumps(story, indent=1, default=str) + "\n", "utf-8")

    saved = run / "nonfinite"
    if failed.write:
        replace_folder(saved, fill)
    raise NonFiniteLossError(
        failed.message(
            dataset,
            f"the weights before this step and the batch are in {saved} "
            "(retinanet.training.nonfinite.replay repeats it)",
        )
    )


def replay(folder: str | Path) -> tuple[Losses, float]:
    """Repeat the step that a ``nonfinite/`` folder contains.

    Returns:
        The losses and the norm of their gradient.

    Raises:
        WeightsError: the folder contains no such step.
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
