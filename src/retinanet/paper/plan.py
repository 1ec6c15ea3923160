"""Plan the trainings behind the rows of an experiment.

Rows with the same settings, in one table or in several, share a training; its folder is named by a
digest of the settings, so that it is found again and not repeated.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from retinanet.anchors import feature_sizes
from retinanet.config import Recipe, load_recipe, setting_names
from retinanet.data import digest, read_splits, usable
from retinanet.data.dataset import Dataset
from retinanet.data.loading import DIVISOR
from retinanet.errors import ConfigError, DataError
from retinanet.model.retinanet import build_retinanet
from retinanet.paper.rivals import build_rival
from retinanet.paper.tables import EXPERIMENTS, Depth, Experiment, Row
from retinanet.training.data import recipe_anchors

BACKBONES: Mapping[Depth, str] = {"50": "resnet50", "101": "resnet101", "x101": "resnext101_32x8d"}
"""The paper's backbones by depth."""

MIN_STEPS = 20
"""A training with fewer steps is meaningless."""

_PAPER_SIZE = 600  # Sec. 5: shorter side of the image in most rows
_MIN_SIZE = 32  # pixels

_ROW_SETTINGS = {
    setting.partition("=")[0]
    for experiment in EXPERIMENTS.values()
    for row in experiment.rows
    for setting in row.settings
}
_FIXED = {
    "model.backbone": "set by --backbone",
    "model.backbone_weights": "set by --backbone-weights",
    "train.seed": "set by --seeds",
    "train.steps": "set by --steps or --budget",
    "train.epochs": "set by --steps or --budget, the same for every row",
    "train.time": "set by --budget, the same for every row",
    "train.validate_every": "fixed: rows are validated once, after their last step",
    "train.early_stop": "fixed: every row runs all its steps",
    **dict.fromkeys(_ROW_SETTINGS, "set by the rows, which differ in it"),
}

# Settings that do not change the weights, and the seed: not part of a training's name.
_NOT_IN_NAME = ("data.workers", "train.trackers", "train.save_every", "train.seed")


@dataclass(frozen=True, slots=True)
class Settings:
    """How rows are trained, the same for all rows of a command: options of ``paper run``.

    Attributes:
        overrides: ``key=value``, applied after the recipe and before the rows' own.
        backbones: replace ResNet-50, ResNet-101 and ResNeXt-101, in this order; the last one also
            replaces the rest; none: the paper's. `backbone_weights` likewise.
        image_size: replaces the paper's 600 px; None: the recipe's. Not with `full`.
        steps: per row; None: the recipe's.
    """

    data: Path
    full: bool = False
    recipe: str = "paper_quick"
    overrides: tuple[str, ...] = ()
    backbones: tuple[str, ...] = ()
    backbone_weights: tuple[str, ...] = ()
    image_size: int | None = None
    steps: int | None = None
    seeds: int = 1

    def load_recipe(self, experiment: Experiment | None = None, more: Sequence[str] = ()) -> Recipe:
        """Load the recipe of an experiment with the overrides, and `more` of them."""
        full = experiment.recipe if experiment else "paper_1x"
        # Rows differ in nothing but what they are about: no settings chosen from the data.
        overrides = [*self.overrides, *more, "auto=false"]
        recipe = load_recipe(full if self.full else self.recipe, overrides)
        if recipe.train.init is not None:
            raise ConfigError(
                f"train.init is {recipe.train.init!r}: the paper's experiments start from ImageNet "
                "weights; give train.init=none or another --recipe"
            )
        return recipe


@dataclass(frozen=True, slots=True)
class Training:
    """A training of one or several rows with the same settings.

    `name` is that of its folder in ``runs/``; `rival` that of another detector, or empty.
    """

    name: str
    recipe: Recipe
    rival: str
    seed: int

    @property
    def key(self) -> tuple[str, int]:
        """(name, seed)."""
        return self.name, self.seed

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"

    def folder(self, out: Path) -> Path:
        """Return its run folder."""
        return out / "runs" / self.name / f"seed-{self.seed}"


@dataclass(frozen=True, slots=True)
class Plan:
    """All trainings of a command.

    Attributes:
        trainings: each once, in the order of the rows; the first seed of all before the second.
        rows: trainings of a row, one per seed, by (experiment, row key).
    """

    trainings: tuple[Training, ...]
    rows: Mapping[tuple[str, str], tuple[Training, ...]]

    def only(self, keys: Collection[str] | None) -> Plan:
        """Return the part for rows with these keys; none: all of it."""
        if not keys:
            return self
        rows = {row: trainings for row, trainings in self.rows.items() if row[1] in keys}
        wanted = {training.key for trainings in rows.values() for training in trainings}
        trainings = tuple(training for training in self.trainings if training.key in wanted)
        return Plan(trainings, rows)


def read_data(settings: Settings) -> dict[str, Dataset]:
    """Read ``train`` and ``val``, the same images for every row and seed.

    Raises:
        DataError: a split is missing or has no objects.
    """
    # The base recipe, without a row's seed: the validation split must not change with the seed.
    recipe = settings.load_recipe()
    splits = read_splits(
        settings.data, extras=False, seed=recipe.split_seed, val_fraction=recipe.data.val_fraction
    )
    for name, purpose in (("train", "train on"), ("val", "validate on")):
        if name not in splits:
            raise DataError(
                f"{settings.data}: no split named {name!r} to {purpose}: found "
                f"{', '.join(splits) or 'none'}"
            )
        images = usable(splits[name])[0].images
        if not any(image.has_object for image in images):
            few = "" if images else "; a single image cannot be split"
            raise DataError(f"{settings.data}: no object to {purpose} in {len(images)} images{few}")
    return {name: splits[name] for name in ("train", "val")}


def check_networks(plan: Plan, classes: Sequence[str]) -> None:
    """Build each kind of network once, before the workers do, so that an error shows at once."""
    kinds = {
        (training.rival, training.recipe.model.model_dump_json()): training
        for training in plan.trainings
    }
    for training in kinds.values():
        if training.rival:
            build_rival(training.rival, training.recipe, classes)
        else:
            build_retinanet(len(classes), training.recipe.model_spec)


def make_plan(
    experiments: Iterable[Experiment], settings: Settings, splits: Mapping[str, Dataset]
) -> Plan:
    """Plan the trainings of some experiments.

    Raises:
        ConfigError: a setting is unknown or out of range.
    """
    data_digest = digest(usable(splits["train"])[0]) + digest(usable(splits["val"])[0])
    rows: dict[tuple[str, str], tuple[Training, ...]] = {}
    for experiment in experiments:
        for row in filter(lambda row: row.trained, experiment.rows):
            recipes = [resolve(experiment, row, settings, seed) for seed in range(settings.seeds)]
            rows[experiment.name, row.key] = tuple(
                Training(training_name(recipe, row.rival, data_digest), recipe, row.rival, seed)
                for seed, recipe in enumerate(recipes)
            )
    by_seed = [trainings[seed] for seed in range(settings.seeds) for trainings in rows.values()]
    trainings = {training.key: training for training in by_seed}
    return Plan(tuple(trainings.values()), rows)


def resolve(experiment: Experiment, row: Row, settings: Settings, seed: int = 0) -> Recipe:
    """Return all settings of a row's training.

    Without ``full``, the paper's 600 px become `settings.image_size`, other scales in proportion,
    and the warm-up takes at most a quarter of the steps. Every row is validated once, after its
    last step, so that no row's weights are selected on the validation images.

    Raises:
        ConfigError: a setting is unknown, out of range, or set by the rows or an option; or images
            are too small for a row.
    """
    overridden = {override.partition("=")[0].strip() for override in settings.overrides}
    for key in sorted(overridden & _FIXED.keys()):
        raise ConfigError(f"{key} is {_FIXED[key]}")
    base = settings.load_recipe(experiment)
    backbone = _for_depth(settings.backbones, row.depth) or BACKBONES[row.depth]
    changes = [f'model.backbone="{backbone}"']
    if weights := _for_depth(settings.backbone_weights, row.depth):
        changes.append(f"model.backbone_weights={json.dumps(weights)}")
    side = row.scale
    if not settings.full:
        reference = _reference_scale(experiment)
        usual = settings.image_size or base.data.image_size
        side = round(usual * row.scale / reference)
        if side < _MIN_SIZE:
            raise ConfigError(
                f"images of {usual} px instead of the paper's {reference} px are too small: row "
                f"{row.key} of {experiment.name} would have {side} px, less than {_MIN_SIZE}; use "
                "a larger --image-size"
            )
    if not settings.full or side != base.data.image_size:
        factor = side / base.data.image_size
        multi_scale = [round(factor * scale) for scale in base.data.multi_scale]
        changes += [f"data.image_size={side}", f"data.multi_scale={multi_scale}"]
        changes.append(f"data.max_size={math.ceil(factor * base.data.max_size)}")
    if settings.steps is not None:
        changes.append(f"train.steps={settings.steps}")
        if not settings.full and "train.warmup_steps" not in overridden:
            warmup = min(base.train.warmup_steps, settings.steps // 4)
            changes.append(f"train.warmup_steps={warmup}")
    steps = settings.load_recipe(experiment, changes).train.steps
    changes += [f"train.seed={seed}", f"data.split_seed={base.split_seed}"]
    changes += [f"train.validate_every={steps}", "train.early_stop=0"]
    recipe = settings.load_recipe(experiment, [*changes, *row.settings])
    _check_mining(recipe, f"row {row.key} of {experiment.name}")
    return recipe


def _check_mining(recipe: Recipe, row: str) -> None:
    """Check that an image has as many anchors as are mined."""
    padded = math.ceil(recipe.data.image_size / DIVISOR) * DIVISOR
    spec = recipe_anchors(recipe)
    cells = feature_sizes(spec.strides, padded, padded)
    anchors = spec.per_cell * sum(height * width for height, width in cells)
    if recipe.loss.mining != "none" and anchors < recipe.loss.mining_size:
        raise ConfigError(
            f"{row}: an image of {recipe.data.image_size} px has {anchors} anchors, fewer than the "
            f"{recipe.loss.mining_size} of a minibatch; use a larger --image-size"
        )


def differences(recipe: Recipe) -> list[tuple[str, Any, Any]]:
    """Return (setting, the paper's, here) of each setting that differs from the paper's."""
    values = ((name, Recipe().value(name), recipe.value(name)) for name in setting_names())
    return [(name, paper, here) for name, paper, here in values if here != paper]


def common_differences(plan: Plan) -> list[tuple[str, Any, Any]]:
    """Return the differences from the paper that all rows share.

    Settings without effect on the result, and those that rows are about, are left out.
    """
    left_out = {*_ROW_SETTINGS, *_NOT_IN_NAME, "data.split_seed", "train.validate_every"}
    left_out |= {"train.min_steps", "train.max_steps"}
    by_training = [
        {name: (paper, here) for name, paper, here in differences(training.recipe)}
        for training in plan.trainings
    ]
    return [
        # Without the folder, which differs per machine.
        (name, paper, Path(here).name if name == "model.backbone_weights" else here)
        for name, (paper, here) in by_training[0].items()
        if name not in left_out and all(values.get(name) == (paper, here) for values in by_training)
    ]


def size_changes(plan: Plan, settings: Settings) -> list[str]:
    """Describe what replaces the paper's steps, sizes and backbones."""
    paper, here = Recipe().train, plan.trainings[0].recipe.train
    scales = sorted({_reference_scale(EXPERIMENTS[name]) for name, _ in plan.rows})
    replaced = " and ".join(f"{scale} px" for scale in scales)
    usual = settings.image_size or settings.load_recipe().data.image_size
    changes = [
        f"{here.steps:,} steps of {here.batch_size} for {paper.steps:,} steps of "
        f"{paper.batch_size} images",
        f"{usual} px for {replaced}, other scales in proportion",
    ]
    used = {EXPERIMENTS[name].row(key).depth for name, key in plan.rows}
    for depth, backbone in BACKBONES.items():
        replacement = _for_depth(settings.backbones, depth)
        if depth in used and replacement not in ("", backbone):
            changes.append(f"{replacement} for {backbone}")
    return changes


def _for_depth(values: Sequence[str], depth: Depth) -> str:
    """Return the first, second or third value for the three backbones, or the last; or nothing."""
    return values[min(list(BACKBONES).index(depth), len(values) - 1)] if values else ""


def _reference_scale(experiment: Experiment) -> int:
    """Return the scale that the recipe's image size replaces: 600 px, or 800 px for Table 2."""
    scales = [row.scale for row in experiment.rows if row.trained]
    return _PAPER_SIZE if _PAPER_SIZE in scales or not scales else max(scales)


def training_name(recipe: Recipe, rival: str, data_digest: str) -> str:
    """Name a training's folder: the loss and sizes, and a digest of all that changes the result."""
    # Only settings that differ from the paper's: a setting added later changes no name.
    values = {name: here for name, _, here in differences(recipe) if name not in _NOT_IN_NAME}
    # By content, not by path.
    values["model.backbone_weights"] = _weights_digest(recipe.model.backbone_weights)
    content = json.dumps([values, rival, data_digest], sort_keys=True).encode()
    return f"{rival or _loss_name(recipe)}-{hashlib.sha256(content).hexdigest()[:8]}"


@lru_cache
def _weights_digest(weights: str) -> str:
    """Return the digest of a file with weights; other names as they are."""
    if not Path(weights).is_file():
        return weights
    with Path(weights).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _loss_name(recipe: Recipe) -> str:
    loss, anchors = recipe.loss, recipe.anchors
    parts: list[str] = [loss.classification]
    parts += [f"gamma{loss.gamma:g}"] if loss.classification.startswith("focal") else []
    parts += [f"beta{loss.beta:g}"] if loss.classification == "focal_star" else []
    parts += [f"alpha{loss.alpha:g}"] if isinstance(loss.alpha, float) else []
    if loss.mining != "none":
        parts += [loss.mining, str(loss.mining_size), f"nms{loss.mining_nms:g}"]
    parts += [f"{len(anchors.scales)}x{len(anchors.aspect_ratios)}"]
    parts += [recipe.model.backbone.replace("/", "-"), f"{recipe.data.image_size}px"]
    return "-".join(parts)
