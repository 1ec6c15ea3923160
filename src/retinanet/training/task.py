"""Training tasks: a RetinaNet, or another detector by the same rules and on the same data.

Data, order, augmentation, schedule, optimizer, EMA, and which checkpoint is kept are the trainer's,
and so the same for all tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NoReturn, Protocol, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from retinanet.config import Recipe
from retinanet.data.dataset import Dataset
from retinanet.data.windows import typical_side
from retinanet.errors import ConfigError
from retinanet.evaluation.metrics import Metrics
from retinanet.evaluation.run import evaluate_model
from retinanet.losses.detection import Losses
from retinanet.model.checkpoint import (
    Checkpoint,
    load_checkpoint,
    transfer_weights,
    write_checkpoint,
)
from retinanet.model.retinanet import RetinaNet, build_retinanet
from retinanet.structures import Batch
from retinanet.training.data import anchor_advice, anchor_warning
from retinanet.training.events import Emit
from retinanet.training.nonfinite import NonFiniteStep, report_nonfinite
from retinanet.training.step import backward


@dataclass(frozen=True, slots=True)
class StepContext:
    """What a training step depends on besides the batch.

    Attributes:
        step: from 0; everything drawn at random depends on it and on the seed alone.
        precision: ``float32``, ``bf16`` or ``fp16``.
        scaler: scales the loss under fp16.
        running: () a number carried from step to step (the normalizer ``running``).
    """

    step: int
    precision: str
    scaler: torch.amp.GradScaler
    running: Tensor


class TrainingTask(Protocol):
    """A detector to train.

    Its models have a ``pixel_mean`` (3, 1, 1) of 0..255 RGB, with which images are padded, and a
    part named ``backbone``, whose learning rate has a factor of its own.

    Attributes:
        info: entries for ``run.json``; ``rival`` is the name of another detector, whose runs are
            not resumed as runs of this one.
    """

    info: Mapping[str, Any]

    def build_model(self) -> nn.Module:
        """Build the model of a new run."""

    def load_model(self, folder: Path) -> nn.Module:
        """Load the model of a checkpoint, from files in the run folder only."""

    def training_step(
        self, network: nn.Module, model: nn.Module, batch: Batch, context: StepContext
    ) -> tuple[Losses, Tensor]:
        """Compute losses and gradients of a batch.

        Args:
            network: `model`, or its wrapper for several processes.
            model: the model itself.
            batch: this process's part.
            context: step, precision, loss scale and ``running``.

        Returns:
            The losses of the whole batch, and the new ``running``.
        """

    def validate(
        self,
        model: nn.Module,
        dataset: Dataset,
        *,
        batch_size: int,
        workers: int,
        precision: str,
        progress: Callable[[int, int], None],
    ) -> Metrics:
        """Evaluate a model on a data set."""

    def write_checkpoint(self, folder: Path, model: nn.Module, step: int) -> None:
        """Write a checkpoint into an existing folder."""

    def warning(self) -> str | None:
        """Warning about the data at the start of a new run."""

    def advise_on_unmatched(self) -> str | None:
        """Name the setting to change where no anchor is positive; None: that is no error."""

    def report_nonfinite(self, run: Path, model: nn.Module, failed: NonFiniteStep) -> NoReturn:
        """Raise a NonFiniteLossError that names the step.

        Args:
            run: the run folder.
            model: with the weights before the step.
            failed: the step.
        """


TaskFactory = Callable[[Accelerator, Dataset, Emit], TrainingTask]
"""Make the task from the devices, the data to train on, and the function that emits events.

It raises errors of the recipe for this data before anything is written.
"""


class RetinaNetTask:
    """Train a RetinaNet.

    Args:
        recipe: all settings.
        train_set: the images to train on.
        accelerator: the devices.
        init: a checkpoint to start from; None: the recipe's network.
        emit: emits events.

    Raises:
        ConfigError: ``loss.alpha`` does not fit the classes.
    """

    def __init__(
        self,
        recipe: Recipe,
        train_set: Dataset,
        accelerator: Accelerator,
        init: str | Path | None,
        emit: Emit,
    ) -> None:
        alpha = recipe.loss.alpha
        if isinstance(alpha, tuple) and len(alpha) != len(train_set.classes):
            raise ConfigError(
                f"loss.alpha has {len(alpha)} numbers and the data {len(train_set.classes)} "
                f"classes: {', '.join(train_set.classes)}"
            )
        self.info: Mapping[str, Any] = {"init": None if init is None else str(init)}
        self._recipe = recipe
        self._train_set = train_set
        self._accelerator = accelerator
        self._init = init
        self._emit = emit
        self._image_side = image_side(train_set)
        self._loss = recipe.loss_settings

    def build_model(self) -> nn.Module:
        """Build the recipe's network, with the weights of ``init`` that fit."""
        recipe, classes = self._recipe, self._train_set.classes
        if self._init is not None:
            return _build_from(self._init, recipe, classes, self._emit)
        return build_retinanet(len(classes), recipe.model_spec)

    def load_model(self, folder: Path) -> nn.Module:
        """Load the model of a checkpoint."""
        return load_checkpoint(folder).model

    def training_step(
        self, network: nn.Module, model: nn.Module, batch: Batch, context: StepContext
    ) -> tuple[Losses, Tensor]:
        """Compute losses and gradients: :func:`retinanet.training.step.backward`."""
        return backward(
            self._accelerator,
            network,
            cast(RetinaNet, model),
            batch,
            settings=self._loss,
            accumulate=self._recipe.train.accumulate,
            precision=context.precision,
            scaler=context.scaler,
            running=context.running,
        )

    def validate(
        self,
        model: nn.Module,
        dataset: Dataset,
        *,
        batch_size: int,
        workers: int,
        precision: str,
        progress: Callable[[int, int], None],
    ) -> Metrics:
        """Evaluate with the recipe's sizes, loss and thresholds."""
        return evaluate_model(
            cast(RetinaNet, model),
            dataset,
            image_size=self._recipe.data.image_size,
            max_size=self._recipe.data.max_size,
            batch_size=batch_size,
            workers=workers,
            device=self._accelerator.device,
            precision=precision,
            loss=self._recipe.loss_settings.model_dump(mode="json"),
            progress=progress,
            **self._recipe.detect.model_dump(),
        )

    def write_checkpoint(self, folder: Path, model: nn.Module, step: int) -> None:
        """Write a checkpoint into an existing folder."""
        write_checkpoint(folder, self._checkpoint(model, step))

    def warning(self) -> str | None:
        """Warn of a low anchor recall."""
        return anchor_warning(self._recipe, self._train_set)

    def advise_on_unmatched(self) -> str:
        """Name the setting to change where no anchor is positive."""
        return anchor_advice(self._recipe, self._train_set)

    def report_nonfinite(self, run: Path, model: nn.Module, failed: NonFiniteStep) -> NoReturn:
        """Save weights and batch, and raise a NonFiniteLossError."""
        report_nonfinite(run, failed, self._checkpoint(model, failed.step), self._train_set)

    def _checkpoint(self, model: nn.Module, step: int) -> Checkpoint:
        recipe = self._recipe
        return Checkpoint(
            model=cast(RetinaNet, model),
            classes=self._train_set.classes,
            category_ids=self._train_set.category_ids,
            image_size=recipe.data.image_size,
            max_size=recipe.data.max_size,
            info={
                "detect": recipe.detect.model_dump(mode="json"),
                "loss": recipe.loss_settings.model_dump(mode="json"),
                "recipe": recipe.name,
                "step": step,
                # A split that was made is made again with these: no training image is evaluated.
                "split": {"seed": recipe.split_seed, "val_fraction": recipe.data.val_fraction},
                # The tile size where it is chosen automatically.
                "image_side": self._image_side,
            },
        )


def image_side(dataset: Dataset) -> int:
    """Median of the images' shorter sides: as the labels state them, else from the files."""
    stated = [
        min(image.width, image.height) for image in dataset.images if image.width and image.height
    ]
    return int(median(stated)) if stated else typical_side([image.path for image in dataset.images])


def _build_from(
    init: str | Path, recipe: Recipe, classes: tuple[str, ...], emit: Emit
) -> RetinaNet:
    """Build the recipe's network with the weights of another checkpoint that fit."""
    source = load_checkpoint(init)
    given, wanted = source.model.spec, recipe.model_spec
    if given.backbone != wanted.backbone:
        raise ConfigError(
            f"--init {init} has the backbone {given.backbone} and the recipe "
            f"{wanted.backbone}; give --backbone {given.backbone}"
        )
    model = RetinaNet(
        len(classes),
        wanted,
        norm_eps=given.norm_eps,
        pixel_mean=wanted.pixel_mean or given.pixel_mean,
        pixel_std=wanted.pixel_std or given.pixel_std,
        stride_padding=wanted.stride_padding or given.stride_padding,
    )
    transferred = transfer_weights(model, classes, source)
    skipped = "; ".join(f"{name}: {reason}" for name, reason in transferred.skipped)
    left_out = f", left out {skipped}" if skipped else ""
    emit("message", message=f"from {init}: {len(transferred.loaded)} tensors loaded{left_out}")
    return model
