"""Settings chosen from the labels and the device, where the recipe has ``auto`` (``quick``).

A setting that the user states is never replaced (:meth:`retinanet.config.Recipe.states`). No image
is decoded: labels and image sizes decide.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from retinanet.config import Recipe
from retinanet.data.balance import epoch_size
from retinanet.data.dataset import Dataset
from retinanet.data.statistics import count_objects
from retinanet.data.tiling import recommend_tile
from retinanet.model.backbone import backbone_of, has_c2
from retinanet.training.data import (
    recipe_recall,
    sample_with_objects,
    tiles_to_train,
)
from retinanet.training.optim import resolve_steps

TARGET_RECALL = 0.98
"""Share of the objects that some anchor must match; the rest is mostly faulty labels."""

MIN_CELLS = 2.7
"""Side of an object, in cells of the finest level, from which an anchor always matches it.

An object d pixels large and the nearest anchor of its size are at most half a stride s apart along
either axis. Their IoU is at least .5 where (d - s / 2)^2 >= 2 / 3 d^2, that is d >= 2.7 s:
22 pixels on P3, 11 on P2.
"""

MAX_UPSCALING = 1.5
"""Limit of an image's enlargement: interpolated pixels cost time and add no detail."""

P2_COST = 2.0
"""Time of a step with P2 in that of a step without: P2 has four times the cells of P3."""

MANY_CLASSES = 8
"""Classes from which the heads have group norm (Wu and He 2018).

18 classes are learned in fewer steps with it; 1 and 3 gained nothing (docs/accuracy.md).
"""

LARGE_OBJECT = 128
"""Pixels of the median object from which larger images are not worth their time on a CPU.

It is the anchor of P5, the coarsest level with pretrained weights: those of P6 and P7
are random.
"""

ENOUGH_OBJECTS, ENOUGH_EPOCHS = 2000, 12
"""Objects of the median class, or else epochs, that a training should see.

12 epochs are the paper's schedule (Sec. 4.1: 90k steps of 16 images of COCO).
"""

FEW_STEPS, SMALL_BATCH = 1500, 4
"""Steps from which a CPU training keeps its batch; with fewer it is halved, if half has 4 images.

As many images in twice the steps gave more AP on all sets tried (docs/accuracy.md).
"""

TINY_OBJECT = 8
"""Pixels of the median object at the largest image size, under which tiles are trained on."""

_CPU_SIDES = (384, 448, 512, 576, 640)
_GPU_SIDES = (640, 800)  # torchvision and Detectron2 train with 800
_MIN_LIMIT = 128  # pixels to which large objects may reduce the images
_MAX_COST = 3.2  # of a step, in that of the smallest side without P2
_ASPECT = 5 / 3  # longer side at most, in shorter sides (Sec. 5: 1000 / 600)
_SMALL = 10  # percentile of the objects' sides that the finest level must match

_FINEST_SIZES = (4.0, 3.0, 2.0)  # anchors of the finest level in strides; the first is Sec. 4's
_COARSEST_SIZE = 4.0  # of the coarsest level (Sec. 4); the levels between are in even steps
_RATIO_STEP = 2.0  # between two aspect ratios (Sec. 4)
_MIN_GAIN = 0.002  # in recall, for which anchors differ from the recipe's
_EXTREME_RATIO = 4.0  # height / width of an object, or its inverse, in that of the nearest anchor
_MANY_EXTREME = 0.25  # share of them; one anchor per cell does for COCO (Zhang et al. 2020)

_SPARE_DETECTIONS = 1.5  # detections per object of the densest image
_VALIDATION_SHARE = 0.1  # of the time, at most
VALIDATION_COST = 1 / 3  # of an image, in that of a training image: no backward pass
_SKEW = 10  # images of the most frequent class per image of the rarest
_MAX_REPEATS = 4  # of an image with a rare class, on average

MAX_FLIP_DISTANCE = 0.06
"""Limit of the distance between the distributions of the objects' heights and of mirrored ones."""

MAX_FLIP_RATIO = 0.1
"""Limit of the mean logarithm of height / width: wide and tall objects in equal number."""

MAX_TURN_DISTANCE = 0.1
"""Limit of the distance between the distributions of aspect ratios and of their inverses."""

MIN_FLIP_OBJECTS, MIN_FLIP_OBJECTS_PER_IMAGE = 500, 5
"""Objects from which the distributions count."""

_DIRECTIONS = frozenset(
    ("up", "down", "upper", "lower", "top", "bottom", "upright", "upside", "left", "right")
)

LENGTH_SETTINGS = ("train.steps", "train.epochs")
"""Settings that ``train.time`` replaces even if they are stated."""

CHOSEN_SETTINGS = (
    *LENGTH_SETTINGS,
    *("model.backbone", "model.channels", "model.head_depth", "model.head_norm"),
    *("data.image_size", "data.max_size", "model.p2", "anchors.sizes", "anchors.aspect_ratios"),
    *("matching.low_quality_matches", "detect.detections_per_image", "data.vertical_flip"),
    "data.rotate90",
    *("data.balance", "data.balance_threshold", "data.tile"),
    *("train.validate_every", "train.val_images"),
    *("train.batch_size", "train.min_steps", "train.warmup_steps"),
)
"""Settings that are chosen from the data, and for ``train.time``."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A setting chosen from the data.

    Attributes:
        setting: as ``section.key``.
        value: its value.
        reason: the property of the data that decided.
    """

    setting: str
    value: Any
    reason: str


def choose_settings(
    recipe: Recipe,
    train: Dataset,
    *,
    num_val: int = 0,
    on_gpu: bool = False,
    image_size: int | None = None,
    p2: bool | None = None,
    processes: int = 1,
) -> list[Choice]:
    """Choose settings from the data; none unless the recipe has ``auto``.

    Args:
        recipe: all settings; what it states is kept, and what it has already is not listed.
        train: the whole images to train on, without faulty objects.
        num_val: images of the validation split.
        on_gpu: whether to train on a GPU.
        image_size: the only image size to consider; None: those for the device.
        p2: whether to have P2; None: as the objects need it.
        processes: that share a batch.
    """
    if not recipe.auto or not any(image.has_object for image in train.images):
        return []
    context = _Context(num_val, on_gpu, image_size, p2, processes)
    choices: list[Choice] = []
    if not recipe.states("data.tile"):
        choices += _tile(recipe, _Labels.of(train, train), context)
    data = _Labels.of(tiles_to_train(train, recipe.choose(values(choices))), train)
    choosers: tuple[_Chooser, ...] = (
        *(_network, _size, _anchors),
        *(_detections, _flip, _balance, _batch, _validations),
    )
    for choose in choosers:
        current = recipe.choose(values(choices))
        choices += [
            choice
            for choice in choose(current, data, context)
            if not recipe.states(choice.setting) and current.value(choice.setting) != choice.value
        ]
    return choices


def values(choices: Iterable[Choice]) -> dict[str, Any]:
    """Return the values by setting."""
    return {choice.setting: choice.value for choice in choices}


def with_choices_of(recipe: Recipe, stored: Recipe) -> Recipe:
    """Return the recipe with what was chosen for the run to resume, where it states nothing."""
    if not recipe.auto and recipe.train.time is None:
        return recipe
    limited = recipe.train.time is not None
    kept = [
        name
        for name in CHOSEN_SETTINGS
        if not recipe.states(name) or (limited and name in LENGTH_SETTINGS)
    ]
    return resolved(recipe.choose({name: stored.value(name) for name in kept}))


def resolved(recipe: Recipe) -> Recipe:
    """Return the recipe with nothing more to choose."""
    return recipe.model_copy(update={"auto": False})


class Need(NamedTuple):
    """What a training on these images or tiles needs.

    Attributes:
        images: to train on in all, for :data:`ENOUGH_OBJECTS` or :data:`ENOUGH_EPOCHS`.
        min_side: image size from which half of the objects are large enough without P2.
        max_side: image size from which larger images are not worth their time.
    """

    images: int
    min_side: int
    max_side: int


def needs(train: Dataset, num_images: int, *, on_gpu: bool = False) -> Need:
    """Compute what a training on these images or tiles needs, `num_images` of them per epoch."""
    data = _Labels.of(train, train)
    counts = Counter(a.label for i in data.sample.images for a in i.annotations if not a.ignored)
    per_image = float(np.median(list(counts.values()))) / len(data.sample)
    per_epoch = per_image * sum(image.has_object for image in train.images)
    images = min(ENOUGH_OBJECTS / per_epoch, ENOUGH_EPOCHS) * num_images
    max_side = _max_side(data, on_gpu)
    middle = data.network_side(max_side, round(_ASPECT * max_side), 50) / max_side
    min_side = math.ceil(8 * MIN_CELLS / middle / 32) * 32
    return Need(round(images), max(_MIN_LIMIT, min_side), max_side)


class _Context(NamedTuple):
    """Arguments of :func:`choose_settings`."""

    num_val: int
    on_gpu: bool
    image_size: int | None
    p2: bool | None
    processes: int


@dataclass(frozen=True, slots=True, eq=False)
class _Labels:
    """The objects of a data set (N), of a large one a sample.

    Attributes:
        train: the images, or their tiles, to train on.
        sample: the images of the sample.
        side: (N,) square root of the area, pixels of the image on disk.
        ratio: (N,) logarithm of height / width.
        y: (N,) centre, share of the image's height.
        image: (N, 2) shorter and longer side of the object's image, pixels.
        counts: objects per whole image.
    """

    train: Dataset
    sample: Dataset
    side: NDArray[np.float64]
    ratio: NDArray[np.float64]
    y: NDArray[np.float64]
    image: NDArray[np.float64]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, train: Dataset, whole: Dataset) -> _Labels:
        sample = sample_with_objects(train)
        rows = np.asarray(
            [
                (*annotation.box, image.height, image.width)
                for image in sample.images
                for annotation in image.annotations
                if not annotation.ignored
            ],
            dtype=np.float64,
        ).reshape(-1, 6)
        x1, y1, x2, y2, height, _width = rows.T
        counts = [sum(not a.ignored for a in image.annotations) for image in whole.images]
        return cls(
            train=train,
            sample=sample,
            side=np.sqrt((x2 - x1) * (y2 - y1)),
            ratio=np.log((y2 - y1) / (x2 - x1)),
            y=(y1 + y2) / 2 / height,
            image=np.sort(rows[:, 4:], axis=1),
            counts=np.asarray(counts, dtype=np.int64),
        )

    @property
    def shorter(self) -> float:
        """Median of the shorter sides of the objects' images, pixels."""
        return float(np.median(self.image[:, 0]))

    def network_side(self, image_size: int, max_size: int, percentile: float) -> float:
        """Percentile of the objects' sides at the network's input, pixels."""
        scale = np.minimum(image_size / self.image[:, 0], max_size / self.image[:, 1])
        return float(np.percentile(self.side * scale, percentile))

    def cells(self, image_size: int, max_size: int, stride: int) -> float:
        """Side of small objects in cells of the finest level."""
        return self.network_side(image_size, max_size, _SMALL) / stride


_Chooser = Callable[[Recipe, _Labels, _Context], Iterable[Choice]]


def _network(recipe: Recipe, data: _Labels, context: _Context) -> Iterator[Choice]:
    """Choose backbone and heads; a small network where there is no GPU."""
    classes = len(data.train.classes)
    if classes >= MANY_CLASSES and recipe.model.head == "conv":
        yield Choice("model.head_norm", "group", f"{classes} classes are learned in fewer steps")
    weights = recipe.model.backbone_weights
    if not recipe.states("model.backbone"):
        if name := backbone_of(weights):
            yield Choice("model.backbone", name, "model.backbone_weights are weights of it")
        elif not context.on_gpu and weights in ("default", "none"):
            reason = "no GPU: under a tenth of ResNet-50's work"
            yield Choice("model.backbone", "mobilenet_v2", reason)
    if context.on_gpu:
        return
    yield Choice("model.channels", 64, "no GPU: heads that take no longer than the backbone")
    yield Choice("model.head_depth", 2, "likewise")


def _max_side(data: _Labels, on_gpu: bool) -> int:
    side = MAX_UPSCALING * data.shorter
    if not on_gpu:
        reference = _CPU_SIDES[0]
        middle = data.network_side(reference, round(_ASPECT * reference), 50) / reference
        sides = (*range(_MIN_LIMIT, reference, 32), *_CPU_SIDES)
        sufficient = (s for s in sides if data.cells(s, round(_ASPECT * s), 8) >= MIN_CELLS)
        side = min(side, max(LARGE_OBJECT / middle, next(sufficient, math.inf)))
    return max(1, math.floor(side / 32)) * 32


def _tile(recipe: Recipe, data: _Labels, context: _Context) -> Iterator[Choice]:
    """Train on tiles where objects are tiny even in the largest images."""
    largest = _GPU_SIDES[-1] if context.on_gpu else _CPU_SIDES[-1]
    side = data.network_side(largest, round(_ASPECT * largest), 50)
    if side >= TINY_OBJECT or recipe.data.tile is not None or recipe.data.order == "shards":
        return
    sizes = recipe.data.image_size, recipe.data.max_size
    tile = recommend_tile(count_objects(data.sample, {}), *sizes)
    if tile is not None:
        yield Choice("data.tile", tile, f"median object {side:.0f} px even at {largest} px")


def _size(recipe: Recipe, data: _Labels, context: _Context) -> Iterator[Choice]:
    """Choose the cheapest image size, and P2 or not, at which small objects are large enough."""
    sides: tuple[int, ...] = _GPU_SIDES if context.on_gpu else _CPU_SIDES
    if context.image_size is not None:
        sides = (context.image_size,)
    limit = _max_side(data, context.on_gpu)
    given = any(map(recipe.states, ("data.image_size", "data.max_size"))) or recipe.data.multi_scale
    # A tile is chosen for the recipe's size.
    kept = given or (recipe.data.tile is not None and not recipe.states("data.tile"))
    sizes = [(side, round(_ASPECT * side)) for side in sides if side <= limit]
    if kept:
        sizes = [(recipe.data.image_size, recipe.data.max_size)]
    elif not sizes:
        sizes = [(limit, round(_ASPECT * limit))]
    # Sizes that the user states are for this number of levels.
    fixed = any(map(recipe.states, ("model.p2", "anchors.sizes")))
    fixed = fixed or not has_c2(recipe.model.backbone)
    with_p2 = (recipe.model.p2,) if fixed else (False, True)
    if context.p2 is not None:
        with_p2 = (context.p2,)
    candidates = []
    for p2 in with_p2:
        for image_size, max_size in sizes:
            cost = (image_size / sizes[0][0]) ** 2 * (P2_COST if p2 else 1)
            cells = data.cells(image_size, max_size, 4 if p2 else 8)
            if cost <= _MAX_COST:
                candidates.append((cost, cells, image_size, max_size, p2))
    enough = [candidate for candidate in candidates if candidate[1] >= MIN_CELLS]
    best = min(enough) if enough else max(candidates, key=lambda candidate: candidate[1])
    _cost, _cells, image_size, max_size, p2 = best
    small, middle = (data.network_side(image_size, max_size, p) for p in (_SMALL, 50))
    yield Choice(
        "data.image_size",
        image_size,
        f"images are {data.shorter:.0f} px, median object {middle:.0f} px at this size",
    )
    yield Choice("data.max_size", max_size, "5/3 of data.image_size")
    yield Choice("model.p2", p2, f"{_SMALL}% of the objects are under {small:.0f} px there")
    if p2 and not recipe.model.p2 and recipe.anchors.sizes is not None:
        sizes_with_p2 = (recipe.anchors.sizes[0] / 2, *recipe.anchors.sizes)
        yield Choice("anchors.sizes", sizes_with_p2, "a size for P2")


def _anchors(recipe: Recipe, data: _Labels, _: _Context) -> Iterator[Choice]:
    """Choose the anchors nearest to the recipe's that match nearly all objects."""
    ratios = recipe.anchors.aspect_ratios
    if recipe.matching.assignment != "iou":
        extreme = np.mean(_distance(data.ratio, ratios) > math.log(_EXTREME_RATIO))
        if extreme > _MANY_EXTREME:
            reason = f"{extreme:.0%} of the objects are over {_EXTREME_RATIO:g}:1"
            yield Choice("anchors.aspect_ratios", _spread(data.ratio), reason)
        return
    if recipe.states("anchors.scales"):  # fitted by the user
        return
    strides = [2**level for level in range(2 if recipe.model.p2 else 3, 8)]
    shapes = [ratios] if recipe.states("anchors.aspect_ratios") else [ratios, _spread(data.ratio)]
    best, before = 0.0, recipe_recall(recipe, data.sample)
    chosen: dict[str, Any] = {}
    for shape in shapes:
        for finest in _FINEST_SIZES:
            factors = np.geomspace(finest, _COARSEST_SIZE, len(strides)).tolist()
            sizes = [round(f * stride) for f, stride in zip(factors, strides, strict=True)]
            changes: dict[str, Any] = {"anchors.aspect_ratios": shape}
            if not recipe.states("anchors.sizes"):
                changes["anchors.sizes"] = tuple(map(float, sizes))
            if best < TARGET_RECALL:
                recall = recipe_recall(recipe.choose(changes), data.sample)
                if recall > best + _MIN_GAIN:
                    best, chosen = recall, changes
    reason = f"an anchor of IoU {recipe.matching.foreground_iou:g} for {best:.1%} of the objects"
    if best > before + _MIN_GAIN:
        for setting, value in chosen.items():
            yield Choice(setting, value, f"{reason}, before {before:.1%}")
    if best < TARGET_RECALL:
        reason += "; the others are matched to their best anchor"
        yield Choice("matching.low_quality_matches", True, reason)


def _distance(ratios: NDArray[np.float64], anchors: Iterable[float]) -> NDArray[np.float64]:
    """(N,) distance of the logarithm of each ratio from that of the nearest anchor."""
    nearest: NDArray[np.float64] = np.abs(ratios[:, None] - np.log(tuple(anchors))).min(axis=1)
    return nearest


def _spread(ratios: NDArray[np.float64]) -> tuple[float, ...]:
    """Aspect ratios in even steps of two or less, over 96% of the objects; at most five."""
    low, high = np.percentile(ratios, (2, 98))
    count = min(5, max(1, math.ceil((high - low) / math.log(_RATIO_STEP))))
    half = (high - low) / count / 2
    return tuple(float(f"{math.exp(x):.2g}") for x in np.linspace(low + half, high - half, count))


def _detections(recipe: Recipe, data: _Labels, _: _Context) -> Iterator[Choice]:
    """Raise the limit of detections over the objects of the densest image."""
    densest = int(data.counts.max())
    wanted = math.ceil(_SPARE_DETECTIONS * densest)
    if wanted > recipe.detect.detections_per_image:
        yield Choice("detect.detections_per_image", wanted, f"up to {densest} objects per image")


def _flip(recipe: Recipe, data: _Labels, _: _Context) -> Iterator[Choice]:
    """Flip images vertically where the labels are as if their orientation had no meaning.

    Then objects occur at a height y as often as at 1 - y, are as often wide as tall, and are many
    per image. Photographs fail: people are tall, and the ground is below.
    """
    height = _ks_distance(data.y, 1 - data.y)
    shape = abs(float(data.ratio.mean()))
    per_image = float(np.median(data.counts))
    if (
        len(data.side) >= MIN_FLIP_OBJECTS
        and per_image >= MIN_FLIP_OBJECTS_PER_IMAGE
        and height <= MAX_FLIP_DISTANCE
        and shape <= MAX_FLIP_RATIO
        and not any(map(_has_orientation, data.train.classes))
    ):
        reason = (
            f"no orientation: heights differ by {height:.2f} from mirrored ones, mean aspect ratio "
            f"{math.exp(data.ratio.mean()):.2f}, {per_image:.0f} objects per image"
        )
        yield Choice("data.vertical_flip", 0.5, reason)
        turned = _ks_distance(data.ratio, -data.ratio)
        if turned <= MAX_TURN_DISTANCE:
            reason = f"aspect ratios differ by {turned:.2f} from those of turned images"
            yield Choice("data.rotate90", True, reason)


def _ks_distance(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Largest difference of two empirical distribution functions (Kolmogorov and Smirnov)."""
    points = np.concatenate((first, second))
    shares = [
        np.searchsorted(np.sort(values), points, side="right") / len(values)
        for values in (first, second)
    ]
    return float(np.abs(shares[0] - shares[1]).max())


def _has_orientation(name: str) -> bool:
    """Whether a class is a character, or is named by a direction."""
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    return len(name) == 1 or bool(words & _DIRECTIONS)


def _balance(recipe: Recipe, data: _Labels, _: _Context) -> Iterator[Choice]:
    """Repeat the images of rare classes where the numbers of images differ very much."""
    if recipe.data.order == "shards" or recipe.data.balance != "none":
        return
    counts = Counter(
        label
        for image in data.train.images
        for label in {a.label for a in image.annotations if not a.ignored}
    )
    rarest, most = min(counts.values()), max(counts.values())
    # Up to the median class, but no image more than a few times.
    wanted = min(float(np.median(list(counts.values()))), _MAX_REPEATS**2 * rarest)
    if most < _SKEW * rarest or wanted <= rarest:
        return
    names = data.train.classes
    frequent, rare = (names[f(counts, key=counts.__getitem__)] for f in (max, min))
    reason = f"{frequent} is in {most} images, {rare} in {rarest}"
    yield Choice("data.balance", "repeat_factor", reason)
    threshold = float(f"{wanted / len(data.train):.3g}")
    reason = f"repeats images of classes in under {wanted:.0f} images"
    yield Choice("data.balance_threshold", threshold, reason)


def _batch(recipe: Recipe, data: _Labels, context: _Context) -> Iterator[Choice]:
    """Halve the batch of a CPU training with few steps, which then has twice as many."""
    train = recipe.train
    timed = train.time is not None or train.epochs is None
    multiple = context.processes * max(1, train.accumulate)
    if context.on_gpu or timed or not can_halve(train.batch_size, multiple):
        return
    num_images = epoch_size(data.train, recipe.data)
    steps = resolve_steps(num_images, train)
    changes = {"train.batch_size": train.batch_size // 2}
    if steps == train.min_steps:
        changes["train.min_steps"] = 2 * steps
    least = changes.get("train.min_steps", train.min_steps)
    if steps >= FEW_STEPS or least > train.max_steps or any(map(recipe.states, changes)):
        return
    if resolve_steps(num_images, recipe.choose(changes).train) >= 2 * steps - 1:  # rounded up
        reason = f"no GPU: twice the {steps} steps, of half the images each, learn more"
        for setting, value in changes.items():
            yield Choice(setting, value, reason)


def can_halve(batch: int, batch_multiple: int) -> bool:
    """Whether half a batch is no smaller than :data:`SMALL_BATCH`, and a multiple."""
    return batch >= 2 * SMALL_BATCH and batch % (2 * batch_multiple) == 0


def _validations(recipe: Recipe, data: _Labels, context: _Context) -> Iterator[Choice]:
    """Validate less often where the validation split is large for the training."""
    train, num_val = recipe.train, context.num_val
    num_val = num_val if train.val_images is None else min(num_val, train.val_images)
    if not num_val or train.validate_every >= 1 or train.time is not None:
        return
    steps = resolve_steps(epoch_size(data.train, recipe.data), train)
    per_image = len(data.train) / len(data.counts)  # tiles, on which is validated too
    cost = num_val * per_image * VALIDATION_COST / (steps * train.batch_size)
    affordable = max(1, math.floor(_VALIDATION_SHARE / cost))
    if affordable < round(1 / train.validate_every):
        period = 1 / affordable if affordable > 1 else steps
        reason = f"{num_val} images to validate on, {steps} steps of {train.batch_size} to train"
        yield Choice("train.validate_every", round(period, 4), reason)
