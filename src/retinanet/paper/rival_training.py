"""Rivals in our own training loop, and judged by our own metrics.

The loop is RetinaNet's (:func:`retinanet.training.trainer.run_task`): the same data in the
same order, the same augmentation, steps, optimiser, schedule, clipping, averaging and precision,
and the same rule for which checkpoint is the best.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from retinanet.config import Recipe, check_choice
from retinanet.data.dataset import Dataset
from retinanet.data.images import padding_colour
from retinanet.data.loading import eval_loader
from retinanet.errors import ConfigError, NonFiniteLossError
from retinanet.evaluation.coco import evaluate_detections
from retinanet.evaluation.metrics import Metrics
from retinanet.evaluation.predict import group_by_size
from retinanet.evaluation.results import Results
from retinanet.losses.detection import Losses
from retinanet.model.precision import autocast, choose_device
from retinanet.paper.rivals import (
    RIVALS,
    RivalInfo,
    RivalNetwork,
    build_rival,
    check_rival,
    load_rival,
    write_rival,
)
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

    The run folder is like any other's, but for the checkpoints in ``last/`` and ``best/``
    (``rival.safetensors``, ``rival.json``; :func:`retinanet.paper.rivals.load_rival`) and for
    ``rival`` in ``run.json``. Of the recipe the rival leaves aside what is RetinaNet's own:
    ``matching``, ``loss``, octave scales, head depth and prior. A validation has no loss.

    Args:
        name: of :data:`retinanet.paper.rivals.RIVALS`.
        recipe, data, out, device, on_event: as for a RetinaNet; a run that was stopped goes on.

    Raises:
        ConfigError: there is no such rival, a setting does not go with it, `out` holds another run,
            or there are several processes.
        DataError: the data has no image or no object to train on.
        NonFiniteLossError: the loss or its gradient is NaN or infinite.
        WeightsError: the backbone's weights cannot be used.
    """
    check_choice("rival", name, RIVALS)

    def make_task(accelerator: Accelerator, train_set: Dataset, emit: Emit) -> RivalTask:
        return RivalTask(name, recipe, train_set, accelerator)

    return run_task(make_task, recipe, data, out, device=device, on_event=on_event)


def evaluate_rival(
    network: RivalNetwork,
    dataset: Dataset,
    *,
    image_size: int,
    max_size: int,
    batch_size: int = 1,
    workers: int = 0,
    device: str | torch.device = "auto",
    precision: str = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> Metrics:
    """AP and speed of a rival, which comes back in the mode in which it was.

    Args:
        network: it is moved to `device`.
        device, precision: as in :mod:`retinanet.inference.backends`.

    The others are those of :func:`retinanet.evaluation.predict.run_inference`; the metrics have no
    loss.

    Raises:
        ConfigError: an unknown device or precision.
        ImageError: an image cannot be read.
        DataError: the network says a box or a score that is not a number.
    """
    place = choose_device(device)
    was_training = network.training
    results = Results(dataset)
    began = time.perf_counter()
    try:
        network.to(place).eval()
        if len(dataset):
            loader = eval_loader(
                dataset,
                batch_size=1,
                image_size=image_size,
                max_size=max_size,
                workers=workers,
                fill=padding_colour(network.pixel_mean),
            )
            done = 0
            loaded = (image.to(place, non_blocking=True) for image in loader)
            # Padding reaches the features: a batch has images of one padded size.
            for batch in group_by_size(loaded, batch_size):
                with autocast(precision, place):
                    found = network.detect(batch)
                for index, detections in zip(batch.indices.tolist(), found, strict=True):
                    results.add(index, detections)
                done += len(found)
                if progress is not None:
                    progress(done, len(dataset))
    finally:
        network.train(was_training)
    seconds = time.perf_counter() - began
    metrics = evaluate_detections(dataset, results)
    return replace(metrics, images_per_second=len(dataset) / seconds)


class RivalTask:
    """Train a rival: a :class:`retinanet.training.task.TrainingTask`."""

    def __init__(
        self, name: str, recipe: Recipe, train_set: Dataset, accelerator: Accelerator
    ) -> None:
        if accelerator.num_processes > 1:
            raise ConfigError(
                f"{name} trains in one process on one device, got {accelerator.num_processes} "
                "processes: start it without accelerate launch"
            )
        check_rival(name, recipe)
        self.info: Mapping[str, Any] = {"init": None, "rival": name}
        self._name = name
        self._recipe = recipe
        self._train_set = train_set
        self._device = accelerator.device

    def build_model(self) -> nn.Module:
        return build_rival(self._name, self._recipe, len(self._train_set.classes))

    def load_model(self, folder: Path) -> nn.Module:
        return load_rival(folder)[0]

    def training_step(
        self, network: nn.Module, model: nn.Module, batch: Batch, context: StepContext
    ) -> tuple[Losses, Tensor]:
        # torchvision's samplers draw from torch's generator, from which starting a loader draws
        # too: a resumed run starts one more of those.
        torch.manual_seed((self._recipe.train.seed * 1_000_003 + context.step) % 2**63)
        accumulate = self._recipe.train.accumulate
        parts = []
        for piece in micro_batches(batch, accumulate):
            with autocast(context.precision, self._device):
                losses = cast(RivalNetwork, model).losses(piece)
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
        return evaluate_rival(
            cast(RivalNetwork, model),
            dataset,
            image_size=self._recipe.data.image_size,
            max_size=self._recipe.data.max_size,
            batch_size=batch_size,
            workers=workers,
            device=self._device,
            precision=precision,
            progress=progress,
        )

    def write_checkpoint(self, folder: Path, model: nn.Module, step: int) -> None:
        data = self._recipe.data
        network = cast(RivalNetwork, model)
        info = RivalInfo(
            settings=network.settings,
            classes=self._train_set.classes,
            category_ids=self._train_set.category_ids,
            max_size=data.max_size,
            split={"seed": self._recipe.split_seed, "val_fraction": data.val_fraction},
        )
        write_rival(folder, network, info)

    def warning(self) -> None:
        """A rival has anchors of its own."""

    def advise_on_unmatched(self) -> None:
        """Faster R-CNN samples proposals: a step without a positive is no error."""

    def report_nonfinite(self, run: Path, model: nn.Module, failed: NonFiniteStep) -> NoReturn:
        saved = f"the last saved state is in {run / 'last'}"
        raise NonFiniteLossError(failed.message(self._train_set, saved, of=f" of {self._name}"))
