"""A RetinaNet for the loop: how it is built, trained, judged and kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NoReturn, cast

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
from retinanet.training.nonfinite import report_nonfinite
from retinanet.training.step import backward


class RetinaNetSubject:
    """A RetinaNet, as :class:`retinanet.training.subject.Subject`.

    Args:
        recipe: all settings.
        train_set: what is trained on.
        accelerator: the devices.
        init: a checkpoint to start from; None: the recipe's network.
        tell: tells events.

    Raises:
        ConfigError: ``loss.alpha`` does not go with the classes.
    """

    def __init__(
        self,
        recipe: Recipe,
        train_set: Dataset,
        accelerator: Accelerator,
        init: str | Path | None,
        tell: Callable[..., None],
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
        self._tell = tell
        self._image_side = image_side(train_set)
        self._of_loss = recipe.loss_settings

    def build(self) -> nn.Module:
        if self._init is None:
            return _build(self._recipe, len(self._train_set.classes))
        return _build_from(self._init, self._recipe, self._train_set.classes, self._tell)

    def restore(self, folder: Path) -> nn.Module:
        return load_checkpoint(folder).model

    def backward(
        self,
        network: nn.Module,
        model: nn.Module,
        batch: Batch,
        *,
        step: int,
        precision: str,
        scaler: torch.amp.GradScaler,
        running: Tensor,
    ) -> tuple[Losses, Tensor]:
        return backward(
            self._accelerator,
            network,
            cast(RetinaNet, model),
            batch,
            settings=self._of_loss,
            accumulate=self._recipe.train.accumulate,
            precision=precision,
            scaler=scaler,
            running=running,
        )

    def evaluate(
        self,
        model: nn.Module,
        dataset: Dataset,
        *,
        batch_size: int,
        workers: int,
        precision: str,
        progress: Callable[[int, int], None],
    ) -> Metrics:
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

    def write(self, folder: Path, model: nn.Module, step: int) -> None:
        write_checkpoint(folder, self._checkpoint(model, step))

    def report_nonfinite(
        self,
        run: Path,
        model: nn.Module,
        *,
        step: int,
        batch: Batch,
        running: Tensor,
        numbers: Mapping[str, Any],
        write: bool,
    ) -> NoReturn:
        report_nonfinite(
            run,
            step=step,
            batch=batch,
            checkpoint=self._checkpoint(model, step),
            model=model,
            dataset=self._train_set,
            running=running,
            numbers=numbers,
            write=write,
        )

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
                # A split that was made is made again with these: nothing trained on is judged.
                "split": {"seed": recipe.split_seed, "val_fraction": recipe.data.val_fraction},
                # What a tile is as large as, where it is to choose its size itself.
                "image_side": self._image_side,
            },
        )


def image_side(dataset: Dataset) -> int:
    """The median of the images' shorter sides: as the labels state them, else as they are."""
    stated = [min(one.width, one.height) for one in dataset.images if one.width and one.height]
    return int(median(stated)) if stated else typical_side([one.path for one in dataset.images])


def _build(recipe: Recipe, num_classes: int) -> RetinaNet:
    return build_retinanet(
        num_classes=num_classes, **recipe.model.model_dump(), **recipe.anchors.model_dump()
    )


def _build_from(
    init: str | Path, recipe: Recipe, classes: tuple[str, ...], tell: Callable[..., None]
) -> RetinaNet:
    """The recipe's network with what fits of another checkpoint; nothing is fetched."""
    source = load_checkpoint(init)
    given, wanted = source.model.spec, recipe.model.model_dump()
    if given["backbone"] != wanted["backbone"]:
        raise ConfigError(
            f"--init {init} has the backbone {given['backbone']} and the recipe "
            f"{wanted['backbone']}; give --backbone {given['backbone']}"
        )
    del wanted["backbone_weights"]
    for name in ("pixel_mean", "pixel_std", "stride_padding"):
        wanted[name] = given[name] if wanted[name] is None else wanted[name]
    model = RetinaNet(
        num_classes=len(classes),
        norm_eps=given["norm_eps"],
        **wanted,
        **recipe.anchors.model_dump(),
    )
    transferred = transfer_weights(model, classes, source)
    skipped = "; ".join(f"{name}: {why}" for name, why in transferred.skipped)
    left_out = f", left out {skipped}" if skipped else ""
    tell("message", message=f"from {init}: {len(transferred.loaded)} tensors loaded{left_out}")
    return model
