"""Training of rivals with RetinaNet's trainer, and their evaluation with the same metrics.

The trainer is :func:`retinanet.training.trainer.run_task`: the same data in the same order, the
same augmentation, steps, optimizer, schedule, clipping, EMA and precision, and the same rule for
the best checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from retinanet.config import Recipe
from retinanet.data.dataset import Dataset
from retinanet.data.images import padding_colour
from retinanet.data.loading import eval_loader
from retinanet.errors import ConfigError, NonFiniteLossError
from retinanet.evaluation.coco import evaluate_detections
from retinanet.evaluation.metrics import Metrics
from retinanet.evaluation.predict import group_by_size
from retinanet.evaluation.results import Results
from retinanet.losses.detection import Losses
from retinanet.model.precision import choose_device
from retinanet.paper.rivals import RivalNetwork, build_rival, check_rival, load_rival, write_rival
from retinanet.structures import Batch
from retinanet.training.events import Emit, EventCallback
from retinanet.training.nonfinite import NonFiniteStep
from retinanet.training.step import merge_losses, micro_batches
from retinanet.training.task import StepContext
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

    Args:
        name: of :data:`retinanet.paper.rivals.RIVALS`.
        recipe, data, out, device, on_event: as for RetinaNet.

    Raises:
        ConfigError: as for RetinaNet, or there is no such rival, a setting is not supported, or
            there are several processes.
        DataError, NonFiniteLossError, WeightsError: as for RetinaNet.
    """

    def make_task(accelerator: Accelerator, train_set: Dataset, emit: Emit) -> RivalTask:
        return RivalTask(name, recipe, train_set, accelerator)

    return run_task(make_task, recipe, data, out, device=device, on_event=on_event)


def eval_batches(
    network: RivalNetwork,
    dataset: Dataset,
    device: torch.device,
    *,
    batch_size: int = 1,
    workers: int = 0,
) -> Iterator[Batch]:
    """Load batches with images of one padded size, as padding changes the features."""
    if not len(dataset):
        return iter(())
    loader = eval_loader(
        dataset,
        batch_size=1,
        image_size=network.settings.image_size,
        max_size=network.settings.max_size,
        workers=workers,
        fill=padding_colour(network.pixel_mean),
    )
    return group_by_size((image.to(device, non_blocking=True) for image in loader), batch_size)


def evaluate_rival(
    network: RivalNetwork,
    dataset: Dataset,
    *,
    batch_size: int = 1,
    workers: int = 0,
    device: str | torch.device = "auto",
    precision: str = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> Metrics:
    """Compute AP and speed of a rival; it is in the same mode afterwards.

    Args:
        network: is moved to `device`.
        dataset: labelled images.
        batch_size: images per batch; it does not change the results.
        workers: processes that load images.
        device: for the network.
        precision: ``float32``, ``bf16`` or ``fp16``.
        progress: callback with the number of images done and of all.

    Raises:
        ConfigError: an unknown device or precision.
        ImageError: an image cannot be read.
        DataError: the network predicts NaN or Inf.
    """
    device = choose_device(device)
    was_training = network.training
    results = Results(dataset)
    start, done = time.perf_counter(), 0
    try:
        network.to(device).eval()
        for batch in eval_batches(network, dataset, device, batch_size=batch_size, workers=workers):
            found = network.detect(batch, precision)
            for index, detections in zip(batch.indices.tolist(), found, strict=True):
                results.add(index, detections)
            done += len(found)
            if progress is not None:
                progress(done, len(dataset))
    finally:
        network.train(was_training)
    seconds = time.perf_counter() - start
    metrics = evaluate_detections(dataset, results)
    return replace(metrics, images_per_second=len(dataset) / seconds)


class RivalTask:
    """Train a rival: a :class:`retinanet.training.task.TrainingTask`."""

    def __init__(
        self, name: str, recipe: Recipe, train_set: Dataset, accelerator: Accelerator
    ) -> None:
        if accelerator.num_processes > 1:
            raise ConfigError(
                f"{name} trains in one process: found {accelerator.num_processes}; start it "
                "without accelerate launch"
            )
        check_rival(name, recipe)
        self.info: Mapping[str, Any] = {"init": None, "rival": name}
        self._name = name
        self._recipe = recipe
        self._train_set = train_set
        self._device = accelerator.device

    def build_model(self) -> nn.Module:
        """Build the network of a new run."""
        return build_rival(self._name, self._recipe, self._train_set.classes)

    def load_model(self, folder: Path) -> nn.Module:
        """Load the network of a checkpoint."""
        return load_rival(folder)

    def training_step(
        self, network: nn.Module, model: nn.Module, batch: Batch, context: StepContext
    ) -> tuple[Losses, Tensor]:
        """Compute losses and gradients of a batch."""
        # torchvision's samplers use torch's generator, and so does the start of a loader, of which
        # a resumed run has another.
        torch.manual_seed((self._recipe.train.seed * 1_000_003 + context.step) % 2**63)
        accumulate = self._recipe.train.accumulate
        parts = []
        for piece in micro_batches(batch, accumulate):
            losses = cast(RivalNetwork, model).losses(piece, context.precision)
            torch.autograd.backward(context.scaler.scale(losses.total / accumulate))
            parts.append(losses)
        return merge_losses(parts), context.running

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
        """Evaluate the network."""
        return evaluate_rival(
            cast(RivalNetwork, model),
            dataset,
            batch_size=batch_size,
            workers=workers,
            device=self._device,
            precision=precision,
            progress=progress,
        )

    def write_checkpoint(self, folder: Path, model: nn.Module, step: int) -> None:
        """Write a checkpoint into a folder."""
        write_rival(folder, cast(RivalNetwork, model))

    def warning(self) -> None:
        """Return no warning: a rival has its own anchors."""

    def advise_on_unmatched(self) -> None:
        """Accept steps without a positive: objects alone are counted."""

    def report_nonfinite(self, run: Path, model: nn.Module, failed: NonFiniteStep) -> NoReturn:
        """Raise the error of a NaN or Inf loss."""
        saved = f"the last saved state is in {run / 'last'}"
        raise NonFiniteLossError(failed.message(self._train_set, saved, of=f" of {self._name}"))
