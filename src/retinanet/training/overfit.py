"""Overfit a few images: a smoke test of labels, settings and code before a long training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from retinanet.config import DataConfig, Recipe
from retinanet.data.dataset import Dataset
from retinanet.data.memory import Reader
from retinanet.model.precision import choose_device
from retinanet.training.data import anchor_advice, read_training_data, recipe_recall
from retinanet.training.events import EventCallback, ignore
from retinanet.training.init import follow_checkpoint
from retinanet.training.optim import short_warmup
from retinanet.training.run_folder import read_log
from retinanet.training.settings_from_data import choose_settings, resolved, values
from retinanet.training.trainer import train

TARGET_AP50 = 0.9
"""AP50 on the images themselves from which they count as learned."""

MAX_LOSS_RATIO = 0.5
"""Share of its first value to which the loss must fall."""

_STEPS = 400
_VALIDATE_EVERY = 25
_AUGMENTATION = (
    *("multi_scale", "vertical_flip", "scale_jitter", "crop", "rotate90", "rotation", "shear"),
    *("translate", "colour", "erase", "mosaic", "mixup", "copy_paste", "transform", "any_corner"),
    *("order", "balance"),
)  # off by default


@dataclass(frozen=True, slots=True)
class OverfitResult:
    """Whether a few images were learned."""

    images: int
    step: int
    ap50: float
    first_loss: float  # mean of five steps
    last_loss: float
    hint: str  # what to look at; empty where the images were learned
    exit_code: int  # 0 learned, 1 not learned, 130 and 143 stopped by a signal

    @property
    def learned(self) -> bool:
        """Whether AP50 and loss reached their targets."""
        return not self.hint


def overfit(
    recipe: Recipe,
    data: str | Path | Reader | Mapping[str, Dataset],
    out: str | Path,
    *,
    num_images: int = 8,
    steps: int | None = None,
    device: str = "auto",
    init: str | Path | None = None,
    on_event: EventCallback | None = None,
) -> OverfitResult:
    """Train on a few images with objects, without augmentation, until they are learned."""
    if init is not None:
        recipe = recipe.override({"train.init": str(init)})
    start = follow_checkpoint(recipe, Path(out))
    recipe = recipe if start is None else start.recipe
    read = read_training_data(data, recipe, ignore)
    full = read.train_images  # which the training cuts into tiles
    on_gpu = choose_device(device).type != "cpu"
    recipe = resolved(recipe.choose(values(choose_settings(recipe, read.train, on_gpu=on_gpu))))
    images = [image for image in full.images if image.has_object]
    count = min(num_images, len(images))
    chosen = replace(full, images=tuple(images[i * len(images) // count] for i in range(count)))
    own = overfit_recipe(recipe, count, steps or _STEPS)
    run = train(own, {"train": chosen, "val": chosen}, out, device=device, on_event=on_event)
    losses = [line["loss"] for line in read_log(run.folder / "log.jsonl") if "loss" in line]
    first, last = fmean(losses[:5]), fmean(losses[-5:])
    ap50 = run.metrics.get("ap50") or 0.0
    hint = ""
    if ap50 < TARGET_AP50 or last > MAX_LOSS_RATIO * first:
        hint = "run retinanet data check, try another train.lr or more --steps"
        recall = recipe_recall(recipe, chosen)
        if recall < TARGET_AP50:
            hint = f"anchor recall is {recall:.0%}: {anchor_advice(recipe, chosen)}"
    exit_code = run.exit_code or int(bool(hint))
    return OverfitResult(count, run.step, ap50, first, last, hint, exit_code)


def overfit_recipe(recipe: Recipe, num_images: int, steps: int) -> Recipe:
    """Remove augmentation and schedule from a recipe, for a few images."""
    data = {name: getattr(DataConfig(), name) for name in _AUGMENTATION}
    data["horizontal_flip"] = 0.0
    batch_size = min(recipe.train.batch_size, num_images)
    training = {
        "steps": steps,
        "epochs": None,
        "time": None,
        "batch_size": batch_size,
        "accumulate": 1,
        "reference_batch": batch_size,
        "schedule": "steps",
        "milestones": (),
        "warmup_steps": short_warmup(recipe.train, steps),
        "ema": 0.0,
        "validate_every": min(_VALIDATE_EVERY, steps),
        "val_images": None,
        "early_stop": 0,
        "tune_detection": False,
        "target_ap50": TARGET_AP50,
    }
    return recipe.override(
        {f"data.{key}": value for key, value in data.items()}
        | {f"train.{key}": value for key, value in training.items()}
    )
