"""Training of rivals with RetinaNet's trainer, and their evaluation with the same metrics.

The trainer is :func:`retinanet.training.trainer.run_task`: the same data in the same order, the
same augmentation, steps, optimizer, schedule, clipping, EMA and precision, and the same rule for
the best checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from retinanet.config import Recipe
from retinanet.data.dataset import Dataset
from retinanet.data.images import padding_colour
from retinanet.errors import ConfigError
from retinanet.evaluation.metrics import Metrics
from retinanet.evaluation.predict import run_batches
from retinanet.losses.detection import Losses
from retinanet.model.precision import choose_device
from retinanet.paper.rivals import RivalNetwork, build_rival, check_rival, load_rival, write_rival
from retinanet.structures import Batch
from retinanet.training.events import EventCallback
from retinanet.training.step import StepContext, merge_losses, micro_batches
from retinanet.training.task import TaskSettings, TrainingTask
from retinanet.training.trainer import Run, run_task


def train_rival(
    name: str,
    recipe: Recipe,
    data: str | Path | Mapping[str, Dataset],
    out: str | Path,
    *,
    device: str = "auto",
    on_event: EventCallback | None = None,
) -> Run:
    """Train a rival with a recipe, as :func:`retinanet.training.trainer.train` trains RetinaNet.

    The run folder is the same, except for the checkpoints (``rival.safetensors``, ``rival.json``;
    :func:`retinanet.paper.rivals.load_rival`) and for ``rival`` in ``run.json``. Settings of
    RetinaNet alone are not used: ``matching``, ``loss``, octave scales, head depth and prior.
    Validation has no loss.

    Raises:
        ConfigError: there is no such rival, a setting is not supported, or there are several
            processes; and the errors of RetinaNet's training.
    """
    return run_task(
        lambda settings: RivalTask(settings, name),
        recipe,
        data,
        out,
        device=device,
        on_event=on_event,
    )


def evaluate_rival(
    network: RivalNetwork,
    dataset: Dataset,
    *,
    device: str | torch.device = "auto",
    precision: str = "float32",
    batch_size: int = 1,
    **options: Any,
) -> Metrics:
    """Compute AP and speed of a rival on `device`; it is in the same mode afterwards.

    `options` are those of :func:`retinanet.evaluation.predict.run_batches`.
    """
    device = choose_device(device)
    was_training = network.training
    try:
        network.to(device).eval()
        predictions = run_batches(
            lambda batch: network.detect(batch, precision),
            dataset,
            device=device,
            batch_size=batch_size,
            image_size=network.settings.image_size,
            max_size=network.settings.max_size,
            fill=padding_colour(network.pixel_mean),
            **options,
        )
    finally:
        network.train(was_training)
    return predictions.evaluate()


class RivalTask(TrainingTask):
    """Train a rival."""

    def __init__(self, settings: TaskSettings, name: str) -> None:
        super().__init__(settings)
        if settings.accelerator.num_processes > 1:
            raise ConfigError(
                f"{name} trains in one process: found {settings.accelerator.num_processes}; start "
                "it without accelerate launch"
            )
        check_rival(name, settings.recipe)
        self.info = {"init": None, "rival": name}
        self._name = name

    def build_model(self) -> nn.Module:
        """Build the network of a new run."""
        settings = self.settings
        return build_rival(self._name, settings.recipe, settings.train_set.classes)

    def load_model(self, folder: Path) -> nn.Module:
        """Load the network of a checkpoint."""
        return load_rival(folder)

    def training_step(
        self, network: nn.Module, model: nn.Module, batch: Batch, context: StepContext
    ) -> tuple[Losses, Tensor]:
        """Compute losses and gradients of a batch."""
        train = self.settings.recipe.train
        # torchvision's samplers use torch's generator, and so does the start of a loader, of which
        # a resumed run has another.
        torch.manual_seed((train.seed * 1_000_003 + context.step) % 2**63)
        parts = []
        for piece in micro_batches(batch, train.accumulate):
            losses = cast(RivalNetwork, model).losses(piece, context.precision)
            torch.autograd.backward(context.scaler.scale(losses.total / train.accumulate))
            parts.append(losses)
        return merge_losses(parts), context.running

    def validate(self, model: nn.Module, dataset: Dataset, step: int) -> Metrics:
        """Evaluate the network."""
        options = self.settings.evaluation_options()
        return evaluate_rival(cast(RivalNetwork, model), dataset, **options)

    def write_checkpoint(
        self, folder: Path, model: nn.Module, step: int, metrics: Metrics | None = None
    ) -> None:
        """Write a checkpoint into a folder."""
        write_rival(folder, cast(RivalNetwork, model))
