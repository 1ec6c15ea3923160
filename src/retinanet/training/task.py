"""Training tasks: a RetinaNet, or another detector by the same rules and on the same data.

Data, order, augmentation, schedule, optimizer, EMA, and which checkpoint is kept are the trainer's,
and so the same for all tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, cast

from accelerate import Accelerator
from torch import Tensor, nn

from retinanet.config import DetectConfig, Recipe
from retinanet.data.dataset import Dataset
from retinanet.data.windows import typical_side
from retinanet.errors import ConfigError
from retinanet.evaluation.metrics import Metrics
from retinanet.evaluation.run import evaluate
from retinanet.evaluation.tuning import Tuning, f1_thresholds, store_tuning, tune
from retinanet.inference.backends import network_settings
from retinanet.losses.detection import Losses
from retinanet.model.checkpoint import (
    Checkpoint,
    load_checkpoint,
    write_checkpoint,
)
from retinanet.model.retinanet import RetinaNet, build_retinanet
from retinanet.structures import Batch
from retinanet.training.data import anchor_advice, anchor_warning
from retinanet.training.events import Emit
from retinanet.training.init import Start, build_from
from retinanet.training.nonfinite import save_step
from retinanet.training.step import PendingStep, StepContext, backward

MIN_TUNING_OBJECTS = 50
"""Objects in validation from which NMS and temperature are chosen after training."""


@dataclass(frozen=True, slots=True, eq=False)
class TaskSettings:
    """Settings of a run that its task needs."""

    recipe: Recipe
    train_set: Dataset
    accelerator: Accelerator
    precision: str  # float32, bf16 or fp16
    workers: int  # processes that load images
    emit: Emit

    @property
    def batch_size(self) -> int:
        """Images per step of this process."""
        return self.recipe.train.batch_size // int(self.accelerator.num_processes)

    def evaluation_options(self) -> dict[str, Any]:
        """Return the arguments of an evaluation on this process."""
        return {
            "batch_size": max(1, self.batch_size),
            "workers": self.workers,
            "device": self.accelerator.device,
            "precision": self.precision,
            "progress": lambda done, total: self.emit("validating", done=done, total=total),
        }


class TrainingTask:
    """A detector to train. Its constructor raises errors of the recipe for the data.

    Its models have a ``pixel_mean`` (3, 1, 1) of 0..255 RGB, with which images are padded, and a
    part named ``backbone``, whose learning rate has a factor of its own.

    Attributes:
        settings: of the run.
        info: entries for ``run.json``; ``rival`` is the name of another detector, whose runs are
            not resumed as runs of this task.
        training_step: computes losses and gradients of a batch, from the network (the model, or its
            wrapper for several processes), the model, this process's part of the batch, and the
            context; it returns the losses of the whole batch, and the new ``running``.
    """

    info: Mapping[str, Any]
    training_step: Callable[[nn.Module, nn.Module, Batch, StepContext], tuple[Losses, Tensor]]

    def __init__(self, settings: TaskSettings) -> None:
        self.settings = settings

    def build_model(self) -> nn.Module:
        """Build the model of a new run."""
        raise NotImplementedError

    def load_model(self, folder: Path) -> nn.Module:
        """Load the model of a checkpoint, from files in the run folder only."""
        raise NotImplementedError

    def validate(self, model: nn.Module, dataset: Dataset, step: int) -> Metrics:
        """Evaluate a model after `step` steps; it may be in eval mode afterwards."""
        raise NotImplementedError

    def write_checkpoint(
        self, folder: Path, model: nn.Module, step: int, metrics: Metrics | None = None
    ) -> None:
        """Write a checkpoint into an existing folder."""
        raise NotImplementedError

    def tune(self, folder: Path, dataset: Dataset) -> Tuning | None:
        """Choose post-processing for a checkpoint and store it there; None: nothing to choose."""
        return None

    def warning(self) -> str | None:
        """Return a warning about the data at the start of a new run; None: no warning."""
        return None

    def advise_on_unmatched(self) -> str | None:
        """Name the setting to change where no anchor is positive; None: that is no error."""
        return None

    def save_nonfinite(self, run: Path, model: nn.Module, failed: PendingStep) -> str:
        """Save a step with a NaN or Inf loss or gradient."""
        return f"the last saved state is in {run / 'last'}"


class RetinaNetTask(TrainingTask):
    """Train a RetinaNet."""

    def __init__(self, settings: TaskSettings, start: Start | None = None) -> None:
        super().__init__(settings)
        recipe, classes = settings.recipe, settings.train_set.classes
        alpha = recipe.loss.alpha
        if isinstance(alpha, tuple) and len(alpha) != len(classes):
            raise ConfigError(
                f"loss.alpha has {len(alpha)} numbers and the data {len(classes)} "
                f"classes: {', '.join(classes)}"
            )
        network_settings(recipe.detect.model_dump(), classes)  # checks score_thresholds
        self.info = {"init": recipe.train.init}
        self.training_step = partial(
            backward,
            accelerator=settings.accelerator,
            settings=recipe.loss_settings,
            accumulate=recipe.train.accumulate,
        )
        self._start = start
        self._image_side = recipe.data.tile or image_side(settings.train_set)

    def build_model(self) -> nn.Module:
        """Build the recipe's network, with the weights of the detector to start from."""
        classes = self.settings.train_set.classes
        if self._start is not None:
            return build_from(self._start, self.settings.recipe, classes, self.settings.emit)
        return build_retinanet(len(classes), self.settings.recipe.model_spec)

    def load_model(self, folder: Path) -> nn.Module:
        """Load the model of a checkpoint."""
        return load_checkpoint(folder).model

    def validate(self, model: nn.Module, dataset: Dataset, step: int) -> Metrics:
        """Evaluate with the recipe's sizes, loss and thresholds."""
        options = self.settings.evaluation_options()
        return evaluate(self._checkpoint(model, step), dataset, **options)

    def write_checkpoint(
        self, folder: Path, model: nn.Module, step: int, metrics: Metrics | None = None
    ) -> None:
        """Write a checkpoint, with the score thresholds of the best F1 in `metrics`."""
        checkpoint = self._checkpoint(model, step)
        if metrics is not None:
            detect = checkpoint.info["detect"]
            measured = f1_thresholds(metrics, checkpoint.classes)
            detect["score_thresholds"] = measured | detect["score_thresholds"]
        write_checkpoint(folder, checkpoint)

    def tune(self, folder: Path, dataset: Dataset) -> Tuning | None:
        """Choose NMS, temperature and score thresholds, and store them in the checkpoint.

        NMS is hard, the kind that exported files have; on fewer than :data:`MIN_TUNING_OBJECTS`
        objects only the score thresholds are chosen.

        What the recipe sets other than the paper's is kept. None: the training is on tiles, whose
        score thresholds are those of the best F1 already.
        """
        recipe = self.settings.recipe
        if recipe.data.tile is not None:
            return None
        paper, own = DetectConfig(), recipe.detect
        keep = [name for name, value in own if value != getattr(paper, name)]
        objects = sum(not a.ignored for image in dataset.images for a in image.annotations)
        if objects < MIN_TUNING_OBJECTS:
            keep += ["nms", "temperature"]
        options = self.settings.evaluation_options()
        tuning = tune(folder, dataset, keep=keep, kinds=("hard",), **options)
        thresholds = tuning.settings["score_thresholds"] | own.score_thresholds
        tuning = replace(tuning, settings={**tuning.settings, "score_thresholds": thresholds})
        store_tuning(folder, tuning)
        return tuning

    def warning(self) -> str | None:
        """Warn of a low anchor recall."""
        return anchor_warning(self.settings.recipe, self.settings.train_set)

    def advise_on_unmatched(self) -> str:
        """Name the setting to change where no anchor is positive."""
        return anchor_advice(self.settings.recipe, self.settings.train_set)

    def save_nonfinite(self, run: Path, model: nn.Module, failed: PendingStep) -> str:
        """Save weights and batch, from which the step can be repeated."""
        saved = run / "nonfinite"
        if self.settings.accelerator.is_main_process:
            checkpoint = self._checkpoint(model, failed.step)
            used = self.settings.recipe.loss_settings.at(failed.share)  # as in `backward`
            checkpoint.info["loss"] = used.model_dump(mode="json")
            save_step(saved, failed, checkpoint, self.settings.train_set, self.settings.precision)
        return (
            f"the weights before this step and the batch are in {saved} "
            "(retinanet.training.nonfinite.replay repeats it)"
        )

    def _checkpoint(self, model: nn.Module, step: int) -> Checkpoint:
        recipe, train_set = self.settings.recipe, self.settings.train_set
        data, optional = recipe.data, dict[str, Any]()
        if data.tile is not None:  # detection uses the same by default
            optional["tile"] = {"side": data.tile, "overlap": data.tile_overlap}
        if data.classes or data.single_class:  # so that an evaluation selects the same
            selected = {"classes": list(data.classes), "single_class": data.single_class}
            optional["selection"] = selected
        return Checkpoint(
            model=cast(RetinaNet, model),
            classes=train_set.classes,
            category_ids=train_set.category_ids,
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
                **optional,
            },
        )


def image_side(dataset: Dataset) -> int:
    """Median of the images' shorter sides: as the labels state them, else from the files."""
    stated = [
        min(image.width, image.height) for image in dataset.images if image.width and image.height
    ]
    return int(median(stated)) if stated else typical_side([image.path for image in dataset.images])
