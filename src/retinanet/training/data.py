"""What to train on: reading the splits, checking them, and the digest that identifies them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from retinanet.anchors import AnchorSpec, anchor_spec
from retinanet.config import Recipe
from retinanet.data import anchor_recall, digest, read_splits, usable
from retinanet.data.augment import user_transform
from retinanet.data.check import copies_of, fault_summary
from retinanet.data.dataset import Dataset, LabelledImage, Problem
from retinanet.data.image_files import image_size
from retinanet.data.memory import Reader
from retinanet.data.selection import select
from retinanet.data.tiling import tile_dataset
from retinanet.errors import ConfigError, DataError
from retinanet.training.events import Emit

MIN_ANCHOR_RECALL = 0.5
"""Share of objects that some anchor must match for training to start without a warning."""

_NAMED_CLASSES = 5  # in a message
_RECALL_IMAGES = 1000  # a large set is sampled evenly


@dataclass(frozen=True, slots=True)
class TrainingData:
    """The splits of a run.

    Attributes:
        train: images, or their tiles, to train on, without faulty objects.
        train_images: the whole images of `train`.
        val: images to validate on; None: no validation.
        num_images: images per split, as read.
    """

    train: Dataset
    train_images: Dataset
    val: Dataset | None
    num_images: Mapping[str, int]

    def digest(self, sizes: Mapping[str, int]) -> str:
        """Identify labels and files; `sizes` replaces file sizes, by path (unreadable images)."""
        return digest(self.train_images, sizes) + (digest(self.val, sizes) if self.val else "")


def read_training_data(
    data: str | Path | Reader | Mapping[str, Dataset], recipe: Recipe, emit: Emit
) -> TrainingData:
    """Read and check the splits to train and validate on."""
    if isinstance(data, Mapping):
        splits = data
    else:
        splits = read_splits(
            data, seed=recipe.split_seed, val_fraction=recipe.data.val_fraction, extras=False
        )
    if "train" not in splits:
        raise DataError(f"no split named 'train'; there is {', '.join(splits) or 'none'}")
    train, left_out = images_to_train(splits["train"], recipe)
    val = splits.get("val")
    if val is not None:
        val = select(val, recipe.data.classes, recipe.data.single_class)
    faults = [fault_summary(train, left_out), fault_summary(val) if val else None]
    if not any(image.has_object for image in train.images):
        raise DataError(
            f"{train.source}: no object to train on in {len(train)} images; "
            f"{(faults[0] or 'see retinanet data check').removeprefix('warning: ')}"
        )
    if val is not None and val.classes != train.classes:
        raise DataError(
            f"{train.source}: the classes of train and val differ: "
            f"{', '.join(train.classes)} and {', '.join(val.classes)}"
        )
    validated = [image.path for image in val.images] if val else []
    shared = copies_of((image.path for image in train.images), validated)
    if shared:
        emit(
            "message",
            message=f"warning: {len(shared)} images are in both train and val, the first: "
            f"{min(shared)}; the validation AP is too high",
        )
    for message in (*faults, _empty_classes(train)):
        if message is not None:
            emit("message", message=message)
    user_transform(recipe.data, len(train.classes))  # an error in it comes first
    num_images = {name: len(split) for name, split in splits.items()}
    return TrainingData(tiles_to_train(train, recipe), train, val, num_images)


def images_to_train(dataset: Dataset, recipe: Recipe) -> tuple[Dataset, list[Problem]]:
    """Return the usable images with the objects of the chosen classes, and what is left out."""
    return usable(select(dataset, recipe.data.classes, recipe.data.single_class))


def _empty_classes(train: Dataset) -> str | None:
    """Warn of classes without an object to train on."""
    used = {a.label for image in train.images for a in image.annotations if not a.ignored}
    empty = [name for label, name in enumerate(train.classes) if label not in used]
    if not empty:
        return None
    more = ", ..." if len(empty) > _NAMED_CLASSES else ""
    return (
        f"warning: {len(empty)} of {len(train.classes)} classes have no object to train on and "
        f"will not be detected: {', '.join(empty[:_NAMED_CLASSES])}{more}"
    )


def tiles_to_train(images: Dataset, recipe: Recipe) -> Dataset:
    """Return the tiles of the images by ``data.tile``, or the images."""
    tile = recipe.data.tile
    if tile is None:
        return images
    tiles = tile_dataset(images, tile, recipe.data.tile_overlap)
    if not any(image.has_object for image in tiles.images):
        raise DataError(
            f"{images.source}: no tile of {tile} pixels has an object to train on: the objects "
            "are larger; give a larger data.tile"
        )
    return tiles


def recipe_anchors(recipe: Recipe) -> AnchorSpec:
    """Build the anchors of a recipe."""
    strides = [2**level for level in range(2 if recipe.model.p2 else 3, 8)]
    try:
        return anchor_spec(strides, **recipe.anchors.model_dump())
    except ValueError as error:
        raise ConfigError(f"anchors: {error}") from None


def recipe_recall(recipe: Recipe, dataset: Dataset, anchors: AnchorSpec | None = None) -> float:
    """Share of a (sampled) data set's objects that some anchor matches; 1 without objects.

    Assignments other than ``iou`` have no threshold: every object has an anchor.
    """
    if recipe.matching.assignment != "iou":
        return 1.0
    return anchor_recall(
        {"train": sample_with_objects(dataset)},
        anchors or recipe_anchors(recipe),
        recipe.data.image_size,
        recipe.data.max_size,
        foreground_iou=recipe.matching.foreground_iou,
    ).recall


def spread(dataset: Dataset, count: int) -> Dataset:
    """Return `count` evenly spread images of a data set, or all of a smaller one."""
    total = len(dataset)
    count = min(count, total)
    return replace(dataset, images=tuple(dataset.images[i * total // count] for i in range(count)))


def images_to_validate(val: Dataset, recipe: Recipe) -> Dataset:
    """Return ``train.val_images`` of the images, with and without objects in proportion."""
    count = recipe.train.val_images
    if count is None or count >= len(val):
        return val
    # Those with objects first: the first one is always chosen.
    images = sorted(val.images, key=lambda image: not image.has_object)
    return spread(replace(val, images=tuple(images)), count)


def sample_with_objects(dataset: Dataset) -> Dataset:
    """Return evenly spread images with objects, at most about 1000, all of known size."""
    images = tuple(image for image in dataset.images if image.has_object)
    sampled = images[:: max(1, len(images) // _RECALL_IMAGES)]
    sized = tuple(image for image in map(_with_size, sampled) if image is not None)
    return replace(dataset, images=sized)


def anchor_advice(recipe: Recipe, dataset: Dataset) -> str:
    """Name the settings with which more objects are matched, and how many."""
    candidates = {}
    spec = recipe_anchors(recipe)
    for factor in (1 / 2, 1 / 4, 2.0):
        sizes = tuple(size * factor for size in spec.sizes)
        smaller = replace(spec, sizes=sizes)
        shown = ",".join(f"{size:g}" for size in sizes)
        candidates[f"anchors.sizes=[{shown}]"] = recipe_recall(recipe, dataset, smaller)
    side, longest = 2 * recipe.data.image_size, 2 * recipe.data.max_size
    larger = recipe.data.model_copy(update={"image_size": side, "max_size": longest})
    candidates[f"data.image_size={side} data.max_size={longest}"] = recipe_recall(
        recipe.model_copy(update={"data": larger}), dataset
    )
    setting, recall = max(candidates.items(), key=lambda item: item[1])
    if recall <= recipe_recall(recipe, dataset):
        return "matching.low_quality_matches=true matches every object to its best anchor"
    return f"{setting} matches {recall:.0%}"


def anchor_warning(recipe: Recipe, dataset: Dataset) -> str | None:
    """Warning where most objects match no anchor; None: more than half of them do."""
    recall = recipe_recall(recipe, dataset)
    if recall >= MIN_ANCHOR_RECALL or recipe.matching.low_quality_matches:
        return None
    return (
        f"warning: anchor recall {recall:.0%}: only that share of the objects overlaps an anchor "
        f"with IoU {recipe.matching.foreground_iou:g} or more, and the others are not learned; "
        f"{anchor_advice(recipe, dataset)}; see retinanet data anchors"
    )


def _with_size(image: LabelledImage) -> LabelledImage | None:
    """Add the size from the file where the labels do not state it; None: unreadable."""
    if image.width and image.height:
        return image
    try:
        height, width = image_size(image.path)
    except DataError:
        return None
    return replace(image, width=width, height=height)
