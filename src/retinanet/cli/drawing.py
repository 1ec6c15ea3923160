"""Labelled images as ``data show`` draws them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from retinanet.anchors import AnchorSpec, feature_sizes, level_anchors
from retinanet.config import Recipe
from retinanet.data import Annotation, Dataset, LabelledImage
from retinanet.data.drawing import PALETTE, draw_boxes
from retinanet.data.images import pad_batch, read_image, resize_to
from retinanet.errors import DataError
from retinanet.matching import match_anchors
from retinanet.structures import IGNORED, pad_targets

_WHITE = (255, 255, 255)
_RED = (255, 0, 0)


@dataclass(slots=True)
class Drawn:
    """What was drawn.

    Attributes:
        images, objects: how many.
        anchors: that answer for an object; `unmatched`: objects without any.
        failures: why images could not be drawn.
    """

    images: int
    objects: int
    anchors: int
    unmatched: int
    failures: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def draw_labels(
    dataset: Dataset,
    folder: Path,
    *,
    count: int,
    seed: int,
    spec: AnchorSpec | None,
    recipe: Recipe,
    progress: Callable[[int, int], None],
) -> Drawn:
    """Draw `count` images (0: all), with `spec` at the network's size and with its anchors."""
    images = list(dataset.images)
    if 0 < count < len(images):
        places = sorted(random.Random(seed).sample(range(len(images)), count))
        images = [images[place] for place in places]
    folder.mkdir(parents=True, exist_ok=True)
    drawn = Drawn(0, 0, 0, 0, [])
    for done, image in enumerate(images, start=1):
        try:
            img = (
                _draw(image, dataset.classes)
                if spec is None
                else _draw_matched(image, dataset.classes, spec, recipe, drawn)
            )
        except DataError as error:
            drawn.failures.append(str(error))
        else:
            img.save(folder / f"{done:04d}_{image.path.stem}.png")
            drawn.images += 1
            drawn.objects += len(image.annotations)
        progress(done, len(images))
    return drawn


def _draw(image: LabelledImage, classes: Sequence[str]) -> Image.Image:
    boxes, labels = _objects(image.annotations)
    return draw_boxes(read_image(image.path), boxes, labels, names=classes)


def _draw_matched(
    image: LabelledImage,
    classes: Sequence[str],
    spec: AnchorSpec,
    recipe: Recipe,
    drawn: Drawn,
) -> Image.Image:
    boxes, labels = _objects(image.annotations)
    pixels, (down, across) = resize_to(
        read_image(image.path), recipe.data.image_size, recipe.data.max_size
    )
    boxes = boxes * torch.tensor([across, down, across, down], dtype=torch.float32)
    padded, _ = pad_batch([pixels])
    anchors = torch.cat(
        level_anchors(spec, feature_sizes(spec.strides, padded.shape[-2], padded.shape[-1]))
    )
    matching = recipe.matching
    matches = match_anchors(
        anchors,
        pad_targets([boxes], [labels]),
        foreground_iou=matching.foreground_iou,
        background_iou=matching.background_iou,
        low_quality_matches=matching.low_quality_matches,
    )[0]
    matched = matches >= 0
    answered = torch.zeros(len(labels), dtype=torch.bool)
    answered[matches[matched]] = True
    missing = ~answered & (labels != IGNORED)
    drawn.anchors += int(matched.sum())
    drawn.unmatched += int(missing.sum())

    below = draw_boxes(pixels, anchors[matched], colours=(_WHITE,), width=1)
    factor = below.width // pixels.shape[-1]  # small images are enlarged by a whole factor
    count = len(classes)
    names = [*classes, *(f"{name}: no anchor" for name in classes)]
    colours = [PALETTE[i % len(PALETTE)] for i in range(count)] + [_RED] * count
    shown = torch.where(missing, labels + count, labels)
    return draw_boxes(below, boxes * factor, shown, names=names, colours=colours, enlarge_to=0)


def _objects(annotations: Sequence[Annotation]) -> tuple[Tensor, Tensor]:
    """(M, 4) boxes and (M,) labels, IGNORED for crowds and difficult objects."""
    boxes = torch.tensor([one.box for one in annotations], dtype=torch.float32).reshape(-1, 4)
    labels = [IGNORED if one.ignored else one.label for one in annotations]
    return boxes, torch.tensor(labels, dtype=torch.int64)
