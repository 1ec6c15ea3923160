"""Which trainings an experiment's rows are, in small or as the paper made them.

Rows that come to the same settings, in one table or in several, are one training: its folder is
named by what it is, so that it is found again and never made twice.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from retinanet.anchors import feature_sizes
from retinanet.config import Recipe, load_recipe
from retinanet.data import (
    AnchorRecall,
    anchor_recall,
    check_datasets,
    digest,
    read_splits,
    usable,
)
from retinanet.data.dataset import Dataset
from retinanet.data.loading import DIVISOR
from retinanet.errors import ConfigError, DataError
from retinanet.model.retinanet import build_retinanet
from retinanet.paper.experiments import Depth, Experiment, Row
from retinanet.paper.rivals import build_rival
from retinanet.paper.tables import EXPERIMENTS
from retinanet.training.step import recipe_anchors

BACKBONES: Mapping[Depth, str] = {"50": "resnet50", "101": "resnet101", "x101": "resnext101_32x8d"}
"""The paper's backbones, by the depth that a row names."""

FEWEST_STEPS = 20
"""Under so many steps a row says nothing, not even badly."""

_PAPER_SIZE = 600  # Sec. 5: the shorter side that nearly every row of the paper has
_SMALLEST = 32  # pixels that a recipe takes

_OPTIONS = {
    "model.backbone": "said by --backbone",
    "model.backbone_weights": "said by --backbone-weights",
    "train.seed": "said by --seeds",
    "train.steps": "said by --steps or --budget",
    "train.epochs": "said by --steps or --budget, the same for every row",
    "train.validate_every": "not free: rows are judged once, at their end",
    "train.early_stop": "not free: every row gets all its steps",
}

# What two trainings of one name may differ in: it changes no weights, or is the seed.
_NOT_OF_THE_RESULT = ("data.workers", "train.trackers", "train.save_every", "train.seed")


@dataclass(frozen=True, slots=True)
class Terms:
    """How rows are trained, the same for every row of a call.

    Attributes:
        data: a labelled folder or file.
        full: the paper's own setting: its recipes, unshortened.
        recipe: in small, the recipe that rows are laid over.
        settings: ``key=value`` over the recipe and under the rows'.
        backbones: for ResNet-50's rows, ResNet-101's and ResNeXt-101's; fewer: the last serves the
            rest too; none: the paper's.
        backbone_weights: likewise; none: the recipe's.
        image_size: in small, what the paper's 600 px become; None: the recipe's.
        steps: of every row; None: those of the recipe.
        seeds: how many trainings a row gets, with seeds 0, 1, ...
    """

    data: Path
    full: bool = False
    recipe: str = "quick"
    settings: tuple[str, ...] = ()
    backbones: tuple[str, ...] = ()
    backbone_weights: tuple[str, ...] = ()
    image_size: int | None = None
    steps: int | None = None
    seeds: int = 1


@dataclass(frozen=True, slots=True)
class Training:
    """One training: of a row, or of several rows that are the same.

    Attributes:
        name: of its folder, under ``runs/``.
        recipe: all settings.
        rival: another detector's name; empty: RetinaNet.
        seed: of weights and order.
    """

    name: str
    recipe: Recipe
    rival: str
    seed: int

    def folder(self, out: Path) -> Path:
        """Its run folder."""
        return out / "runs" / self.name / f"seed-{self.seed}"


@dataclass(frozen=True, slots=True)
class Plan:
    """All trainings of a call.

    Attributes:
        trainings: each once, in the order of the rows, the first seed of all before the second.
        rows: the trainings of a row, a seed each, by (experiment, row key).
        refused: why a row cannot be trained on this data, by (experiment, row key).
    """

    trainings: tuple[Training, ...]
    rows: Mapping[tuple[str, str], tuple[Training, ...]]
    refused: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def only(self, keys: Collection[str]) -> Plan:
        """The part that rows of some keys need."""
        rows = {place: ones for place, ones in self.rows.items() if place[1] in keys}
        wanted = {(one.name, one.seed) for ones in rows.values() for one in ones}
        trainings = tuple(one for one in self.trainings if (one.name, one.seed) in wanted)
        refused = {place: why for place, why in self.refused.items() if place[1] in keys}
        return Plan(trainings, rows, refused)


def read_data(terms: Terms) -> dict[str, Dataset]:
    """The splits that every row trains on and is judged on: the same images for every seed.

    Raises:
        DataError: there is nothing to train on or nothing to judge by.
    """
    # Without a seed of a row: what is held back must not change from seed to seed.
    recipe = load_recipe(_recipe_name(terms, None), terms.settings)
    made = {"seed": recipe.split_seed, "val_fraction": recipe.data.val_fraction}
    splits = read_splits(terms.data, extras=False, **made)  # type: ignore[arg-type]
    for name, purpose in (("train", "train on"), ("val", "judge by")):
        if name not in splits:
            raise DataError(
                f"{terms.data}: no split named {name!r} to {purpose}; there is "
                f"{', '.join(splits) or 'none'}"
            )
        clean, _ = usable(splits[name])
        if not any(not one.ignored for image in clean.images for one in image.annotations):
            few = "; a single image cannot be split" if not len(clean) else ""
            raise DataError(f"{terms.data}: no object to {purpose} in {len(clean)} images{few}")
    return {name: splits[name] for name in ("train", "val")}


def check_images(
    splits: Mapping[str, Dataset],
    names: Collection[str],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Open every image of some splits: one that is broken would end each row, one by one.

    Raises:
        DataError: names the first that cannot be read.
    """
    found = check_datasets({name: usable(splits[name])[0] for name in names}, progress=progress)
    broken = [(path, one.failure) for path, one in found.image_info.items() if one.failure]
    if broken:
        path, (_, why) = broken[0]
        raise DataError(
            f"{len(broken)} of {len(found.image_info)} images cannot be read, the first: {path}: "
            f"{why}; see retinanet data check"
        )


def check_networks(planned: Plan, num_classes: int) -> None:
    """Build each kind of network once, with its weights, before every worker does.

    Raises:
        ConfigError, WeightsError, MissingExtraError: as :func:`build_retinanet`.
    """
    seen = set()
    for one in planned.trainings:
        model, anchors = one.recipe.model, one.recipe.anchors
        kind = (one.rival, model.model_dump_json())
        if kind in seen:
            continue
        seen.add(kind)
        if one.rival:
            build_rival(one.rival, one.recipe, num_classes)
        else:
            build_retinanet(num_classes=num_classes, **model.model_dump(), **anchors.model_dump())


def plan(experiments: Iterable[Experiment], terms: Terms, splits: Mapping[str, Dataset]) -> Plan:
    """The trainings of some experiments.

    Raises:
        ConfigError: a setting is unknown or out of range.
    """
    of_data = digest(usable(splits["train"])[0]) + digest(usable(splits["val"])[0])
    rows: dict[tuple[str, str], tuple[Training, ...]] = {}
    refused: dict[tuple[str, str], str] = {}
    recalls: dict[object, AnchorRecall] = {}
    for experiment in experiments:
        for row in experiment.rows:
            if not row.trained:
                continue
            place = (experiment.name, row.key)
            recipes = [resolve(experiment, row, terms, seed) for seed in range(terms.seeds)]
            why = _too_small(row, recipes[0], splits["train"], recalls)
            if why:
                refused[place] = why
                continue
            rows[place] = tuple(
                Training(_name(one, row.rival, of_data), one, row.rival, seed)
                for seed, one in enumerate(recipes)
            )
    by_seed = [
        one
        for seed in range(terms.seeds)
        for of_row in rows.values()
        for one in of_row[seed : seed + 1]
    ]
    once = {(one.name, one.seed): one for one in by_seed}
    return Plan(tuple(once.values()), rows, refused)


def resolve(experiment: Experiment, row: Row, terms: Terms, seed: int = 0) -> Recipe:
    """All settings of a row's training.

    In small the paper's 600 px are `terms.image_size`, other scales in proportion, and the warm-up
    is a quarter of the steps at most. Every row is validated once, at its end, so that no row's
    weights are chosen by the images that it is judged on.
    """
    named = {one.partition("=")[0].strip() for one in terms.settings}
    _check_settings(named)
    settings: list[str] = []
    base = load_recipe(_recipe_name(terms, experiment), terms.settings)
    settings.append(
        f'model.backbone="{_of_depth(terms.backbones, row.depth) or BACKBONES[row.depth]}"'
    )
    weights = _of_depth(terms.backbone_weights, row.depth)
    if weights:
        settings.append(f"model.backbone_weights={json.dumps(weights)}")
    if terms.full:
        if row.scale != base.data.image_size:
            settings += _sized(base, row.scale)
    else:
        usual = terms.image_size or base.data.image_size
        side = round(usual * row.scale / _reference_scale(experiment))
        if side < _SMALLEST:
            raise ConfigError(
                f"images of {usual} px in the place of the paper's "
                f"{_reference_scale(experiment)} px: row {row.key} of {experiment.name} would have "
                f"{side} px, and {_SMALLEST} is the least; give a larger --image-size"
            )
        settings += _sized(base, side)
        if terms.steps is not None:
            warmup = min(base.train.warmup_steps, terms.steps // 4)
            settings += (
                [f"train.warmup_steps={warmup}"] if "train.warmup_steps" not in named else []
            )
    if terms.steps is not None:
        settings.append(f"train.steps={terms.steps}")
    steps = load_recipe(_recipe_name(terms, experiment), [*terms.settings, *settings]).train.steps
    settings += [f"train.seed={seed}", f"data.split_seed={base.split_seed}"]
    settings += [f"train.validate_every={steps}", "train.early_stop=0"]
    return load_recipe(_recipe_name(terms, experiment), [*terms.settings, *settings, *row.settings])


def differences(recipe: Recipe) -> list[tuple[str, Any, Any]]:
    """(setting, the paper's, here) of each setting that is not the paper's."""
    paper, here = Recipe().model_dump(mode="json"), recipe.model_dump(mode="json")
    return [
        (f"{section}.{key}", paper[section][key], value)
        for section, values in here.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if value != paper[section][key]
    ]


def common_differences(planned: Plan) -> list[tuple[str, Any, Any]]:
    """(setting, the paper's, here) of those that are not the paper's in any row, and alike in all.

    Left out is what has no effect, and what rows are about.
    """
    left_out = {*_of_rows(), *_NOT_OF_THE_RESULT, "data.split_seed", "train.validate_every"}
    common: dict[str, tuple[Any, Any]] | None = None
    for one in planned.trainings:
        own = {name: (paper, here) for name, paper, here in differences(one.recipe)}
        common = own if common is None else {k: v for k, v in common.items() if own.get(k) == v}
        if one.recipe.train.epochs is None:
            left_out |= {"train.min_steps", "train.max_steps"}
    # Files lie elsewhere on each machine.
    return [
        (name, paper, Path(here).name if name == "model.backbone_weights" else here)
        for name, (paper, here) in (common or {}).items()
        if name not in left_out
    ]


def size_changes(planned: Plan, terms: Terms) -> list[str]:
    """What became of the paper's steps, sizes and backbones, in words."""
    recipes = [one.recipe for one in planned.trainings]
    if not recipes:
        return []
    paper = Recipe()
    steps = sorted({one.train.steps for one in recipes if one.train.epochs is None})
    batch = recipes[0].train.batch_size
    length = (
        f"{' and '.join(f'{one:,}' for one in steps)} steps" if steps else "the recipe's epochs"
    )
    said = [
        f"{length} of {batch} for {paper.train.steps:,} steps of {paper.train.batch_size} images"
    ]
    usual = terms.image_size or load_recipe(terms.recipe, terms.settings).data.image_size
    references = {
        _reference_scale(EXPERIMENTS[name]): name for name, _ in planned.rows if name in EXPERIMENTS
    }
    of = [f"{scale} px" + (f" ({name})" if scale != _PAPER_SIZE else "")
          for scale, name in sorted(references.items())]  # fmt: skip
    said.append(f"{usual} px for {' and '.join(of)}, other scales in proportion")
    used = {EXPERIMENTS[of].row(key).depth for of, key in planned.rows if of in EXPERIMENTS}
    for depth, name in BACKBONES.items():
        here = _of_depth(terms.backbones, depth)
        if depth in used and here and here != name:
            said.append(f"{here} for {name}")
    return said


def _recipe_name(terms: Terms, experiment: Experiment | None) -> str:
    if terms.full:
        return experiment.recipe if experiment else "paper_1x"
    return terms.recipe


def _of_depth(given: Sequence[str], depth: Depth) -> str:
    """The first, second or third of what was given for the three backbones, or the last."""
    return given[min(list(BACKBONES).index(depth), len(given) - 1)] if given else ""


def _reference_scale(experiment: Experiment) -> int:
    """The scale of the experiment that the recipe's image size stands for.

    Table 2 has 800 px alone: in small there is no reason to make its images larger.
    """
    scales = [row.scale for row in experiment.rows if row.trained]
    return _PAPER_SIZE if _PAPER_SIZE in scales or not scales else max(scales)


def _sized(base: Recipe, side: int) -> list[str]:
    """Shorter side, longest side and the sides to draw from, in the proportion of the recipe."""
    factor = side / base.data.image_size
    longest = math.ceil(factor * base.data.max_size)
    drawn = [round(factor * one) for one in base.data.multi_scale]
    return [f"data.image_size={side}", f"data.max_size={longest}", f"data.multi_scale={drawn}"]


def _check_settings(named: Collection[str]) -> None:
    """Refuse settings that a row or an option would override without a word."""
    own = dict.fromkeys(_of_rows(), "what rows are about; it cannot be the same for all")
    for key in sorted(named):
        why = (_OPTIONS | own).get(key)
        if why is not None:
            raise ConfigError(f"{key} is {why}")


def _of_rows() -> set[str]:
    """The settings that some row of some table names."""
    return {
        one.partition("=")[0]
        for experiment in EXPERIMENTS.values()
        for row in experiment.rows
        for one in row.settings
    }


def _name(recipe: Recipe, rival: str, of_data: str) -> str:
    """A folder's name: what a person wants to know, and a digest of all that counts."""
    # Of the settings those that are not the paper's: a new one in a later version changes no name.
    values = {name: here for name, _, here in differences(recipe) if name not in _NOT_OF_THE_RESULT}
    # Machines that share a folder may keep the weights in different places.
    values["model.backbone_weights"] = _weights_digest(recipe.model.backbone_weights)
    total = hashlib.sha256(json.dumps([values, rival, of_data], sort_keys=True).encode())
    return f"{rival or _loss_name(recipe)}-{total.hexdigest()[:8]}"


@lru_cache
def _weights_digest(weights: str) -> str:
    """A file of weights by what is in it; other names as they are."""
    if not Path(weights).is_file():
        return weights
    with Path(weights).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _loss_name(recipe: Recipe) -> str:
    loss, anchors = recipe.loss, recipe.anchors
    parts: list[str] = [loss.classification]
    if loss.classification.startswith("focal"):
        parts.append(f"gamma{loss.gamma:g}")
    if loss.classification == "focal_star":
        parts.append(f"beta{loss.beta:g}")
    if isinstance(loss.alpha, float):
        parts.append(f"alpha{loss.alpha:g}")
    if loss.mining != "none":
        parts += [loss.mining, str(loss.mining_size), f"nms{loss.mining_nms:g}"]
    parts.append(f"{len(anchors.scales)}x{len(anchors.aspect_ratios)}")
    return "-".join(
        [*parts, recipe.model.backbone.replace("/", "-"), f"{recipe.data.image_size}px"]
    )


def _too_small(
    row: Row, recipe: Recipe, train: Dataset, recalls: dict[object, AnchorRecall]
) -> str:
    """Why a data set cannot train a row; empty: it can.

    Args:
        recalls: computed before, which takes seconds on a large data set; added to.
    """
    if row.rival:
        return ""
    side, longest = recipe.data.image_size, recipe.data.max_size
    spec = recipe_anchors(recipe)
    iou = recipe.matching.foreground_iou
    asked = (spec, side, longest, iou)
    if asked not in recalls:
        recalls[asked] = anchor_recall({"train": train}, spec, side, longest, foreground_iou=iou)
    found = recalls[asked]
    if not found.matched and not recipe.matching.low_quality_matches:
        return (
            f"none of {found.objects} objects overlaps an anchor by "
            f"{recipe.matching.foreground_iou:g} at {side} px: set anchors.sizes to fit them "
            "(retinanet data anchors)"
        )
    if recipe.loss.mining != "none":
        padded = math.ceil(side / DIVISOR) * DIVISOR
        cells = feature_sizes(spec.strides, padded, padded)
        anchors = spec.per_cell * sum(height * width for height, width in cells)
        if anchors < recipe.loss.mining_size:
            return (
                f"an image of {side} px has {anchors} anchors, fewer than the "
                f"{recipe.loss.mining_size} of a minibatch: use larger images"
            )
    return ""
