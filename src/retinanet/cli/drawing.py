"""Drawings of labelled images for ``data show``."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from retinanet.anchors import feature_sizes, level_anchors
from retinanet.config import Recipe
from retinanet.data import Annotation, Dataset, LabelledImage
from retinanet.data.balance import epoch_size
from retinanet.data.drawing import PALETTE, draw_boxes
from retinanet.data.images import pad_batch, padding_colour, read_image, resize_to
from retinanet.data.loading import train_loader
from retinanet.errors import DataError
from retinanet.matching import match_anchors
from retinanet.model.backbone import IMAGENET_MEAN
from retinanet.structures import BACKGROUND, IGNORED, pad_targets
from retinanet.training.data import images_to_train, recipe_anchors, tiles_to_train

_WHITE = (255, 255, 255)
_RED = (255, 0, 0)


@dataclass
class DrawnLabels:
    """Numbers of images and objects drawn, anchors matched to these, and objects without any.

    `failures` are the errors of the images that could not be drawn.
    """

    images: int = 0
    objects: int = 0
    anchors: int = 0
    unmatched: int = 0
    failures: list[str] = field(default_factory=list)


def draw_labels(
    dataset: Dataset,
    folder: Path,
    *,
    count: int,
    seed: int,
    recipe: Recipe | None,
    progress: Callable[[int, int], None],
) -> DrawnLabels:
    """Draw `count` images (0: all); given a recipe, at the network's size with matched anchors."""
    images = list(dataset.images)
    if 0 < count < len(images):
        images = [images[i] for i in sorted(random.Random(seed).sample(range(len(images)), count))]
    folder.mkdir(parents=True, exist_ok=True)
    drawn = DrawnLabels()
    for number, image in enumerate(images, start=1):
        try:
            if recipe is None:
                boxes, labels = _objects(image.annotations)
                drawing = draw_boxes(read_image(image.path), boxes, labels, names=dataset.classes)
            else:
                drawing = _draw_matched(image, dataset.classes, recipe, drawn)
        except DataError as error:
            drawn.failures.append(str(error))
        else:
            drawing.save(folder / f"{number:04d}_{image.path.stem}.png")
            drawn.images += 1
            drawn.objects += len(image.annotations)
        progress(number, len(images))
    return drawn


def draw_augmented(
    dataset: Dataset,
    folder: Path,
    *,
    count: int,
    seed: int,
    recipe: Recipe,
    progress: Callable[[int, int], None],
) -> DrawnLabels:
    """Draw the first `count` images (0: an epoch) that training with a seed and a recipe loads.

    Raises:
        DataError, ConfigError: as :func:`retinanet.data.loading.train_loader`.
    """
    settings = recipe.data.model_copy(update={"close_augmentation": 0.0})
    chosen = tiles_to_train(images_to_train(dataset, recipe)[0], recipe)
    count = count or epoch_size(chosen, settings)
    batch_size = recipe.train.batch_size // recipe.train.accumulate
    folder.mkdir(parents=True, exist_ok=True)
    drawn = DrawnLabels()
    loader = train_loader(
        chosen,
        settings,
        batch_size=batch_size,
        steps=range(-(-count // batch_size)),
        seed=seed,
        fill=padding_colour(torch.tensor(recipe.model.pixel_mean or IMAGENET_MEAN)),
        on_unreadable=lambda _, message: drawn.failures.append(message),
    )
    for batch in loader:
        boxes, labels = batch.targets.boxes, batch.targets.labels
        for i in range(min(len(batch.images), count - drawn.images)):
            drawn.images += 1
            drawn.objects += int((labels[i] != BACKGROUND).sum())
            drawing = draw_boxes(batch.images[i], boxes[i], labels[i], names=chosen.classes)
            stem = chosen.images[int(batch.indices[i])].path.stem
            drawing.save(folder / f"{drawn.images:04d}_{stem}.png")
            progress(drawn.images, count)
    return drawn


def _draw_matched(
    image: LabelledImage, classes: Sequence[str], recipe: Recipe, drawn: DrawnLabels
) -> Image.Image:
    spec = recipe_anchors(recipe)
    boxes, labels = _objects(image.annotations)
    pixels, (scale_y, scale_x) = resize_to(
        read_image(image.path), recipe.data.image_size, recipe.data.max_size
    )
    boxes = boxes * torch.tensor([scale_x, scale_y, scale_x, scale_y], dtype=torch.float32)
    padded, _ = pad_batch([pixels])
    sizes = feature_sizes(spec.strides, padded.shape[-2], padded.shape[-1])
    anchors = torch.cat(level_anchors(spec, sizes))
    matches = match_anchors(
        anchors,
        pad_targets([boxes], [labels]),
        foreground_iou=recipe.matching.foreground_iou,
        background_iou=recipe.matching.background_iou,
        low_quality_matches=recipe.matching.low_quality_matches,
    )[0]
    is_foreground = matches >= 0
    is_matched = torch.zeros(len(labels), dtype=torch.bool)
    is_matched[matches[is_foreground]] = True
    is_missed = ~is_matched & (labels != IGNORED)
    drawn.anchors += int(is_foreground.sum())
    drawn.unmatched += int(is_missed.sum())

    background = draw_boxes(pixels, anchors[is_foreground], colours=(_WHITE,), width=1)
    factor = background.width // pixels.shape[-1]  # small images are enlarged by a whole factor
    count = len(classes)
    names = [*classes, *(f"{name}: no anchor" for name in classes)]
    colours = [PALETTE[i % len(PALETTE)] for i in range(count)] + [_RED] * count
    shown = torch.where(is_missed, labels + count, labels)
    return draw_boxes(background, boxes * factor, shown, names=names, colours=colours, enlarge_to=0)


def _objects(annotations: Sequence[Annotation]) -> tuple[Tensor, Tensor]:
    """(M, 4) boxes and (M,) labels, IGNORED for crowds and difficult objects."""
    boxes = torch.tensor([a.box for a in annotations], dtype=torch.float32).reshape(-1, 4)
    labels = [IGNORED if a.ignored else a.label for a in annotations]
    return boxes, torch.tensor(labels, dtype=torch.int64)
