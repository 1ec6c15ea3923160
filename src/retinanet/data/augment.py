"""Mixing of training images (mosaic, copy-paste, mixup), and the user's own transform."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retinanet.config import DataConfig
from retinanet.data.image_files import network_size
from retinanet.data.images import filled_row, resize_pixels
from retinanet.data.memory import import_function
from retinanet.data.transforms import (
    Labelled,
    Transform,
    boxes_as_read,
    clip_boxes,
    hide_boxes,
    random_crop,
    scale_boxes,
    view_boxes,
)
from retinanet.errors import ConfigError, DataError
from retinanet.structures import IGNORED

MAX_PASTED = 5
"""Objects that are pasted into an image at most."""

_CENTRE = (0.2, 0.8)  # fractions of the canvas; Darknet's min_offset
_MAX_MESSAGE = 200  # characters


@dataclass(frozen=True, slots=True)
class ReadImage:
    """An image as read, perhaps reduced; `boxes` are in pixels of the whole, of `size`."""

    image: Tensor
    boxes: Tensor
    labels: Tensor
    size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Mix:
    """Choice of how a training image is mixed with others; the default is not at all.

    `centre` is (y, x) where the four parts of a mosaic meet, as fractions; None: no mosaic.
    `factors` are the minimum sizes of the images in its parts, relative to their size without a
    mosaic.
    """

    centre: tuple[float, float] | None = None
    factors: tuple[float, ...] = ()
    copy_paste: bool = False
    mixup: bool = False

    def reading_sizes(self, transform: Transform, shorter: int) -> list[tuple[int, int]]:
        """Maximum shorter and longer side of each image that is mixed, the image itself first."""
        whole = transform.reading_size(shorter)
        parts = [
            (math.ceil(shorter * factor), math.ceil(transform.max_size * factor))
            for factor in self.factors
        ]
        return (parts or [whole]) + [whole] * (self.copy_paste + self.mixup)


def draw_mix(config: DataConfig, draw: random.Random) -> Mix:
    """Draw whether and how an image is mixed; without a setting for it nothing is drawn."""
    centre, factors = None, ()
    if config.mosaic and draw.random() < config.mosaic:
        y, x = draw.uniform(*_CENTRE), draw.uniform(*_CENTRE)
        # From the size at which an image of the canvas' shape just fills its part to that without
        # a mosaic: neither gaps, nor objects of half the size only.
        areas = product((y, 1 - y), (x, 1 - x))
        centre, factors = (y, x), tuple(max(area) ** draw.random() for area in areas)
    return Mix(
        centre,
        factors,
        copy_paste=bool(config.copy_paste) and draw.random() < config.copy_paste,
        mixup=bool(config.mixup) and draw.random() < config.mixup,
    )


def mix_images(
    mix: Mix, images: Iterator[ReadImage], transform: Transform, shorter: int, draw: random.Random
) -> Labelled:
    """Transform an image, mixed with `images`, as many as :meth:`Mix.reading_sizes`.

    All boxes are kept, with the full loss; those of which less than MIN_VISIBLE stays visible
    become IGNORED. Colour, erasing and the user's function come after mixing.
    """

    def resized() -> Labelled:
        read = next(images)
        return transform.resize(
            read.image, read.boxes, read.labels, shorter=shorter, draw=draw, size=read.size
        )

    labelled = resized() if mix.centre is None else _mosaic(mix, images, transform, shorter, draw)
    if mix.copy_paste:
        labelled = _paste(labelled, resized(), draw)
    labelled = transform.move(labelled, draw)
    if mix.mixup:
        labelled = _blend(labelled, transform.move(resized(), draw))
    return transform.finish(labelled, draw)


def _mosaic(
    mix: Mix, images: Iterator[ReadImage], transform: Transform, shorter: int, draw: random.Random
) -> Labelled:
    """Combine four images around a centre (Bochkovskiy et al. 2020), each cropped to its part.

    The canvas has the size of the first image without jitter.
    """
    assert mix.centre is not None
    first = next(images)
    height, width = (
        max(2, side) for side in network_size(*first.size, shorter, transform.max_size)
    )
    middle_y, middle_x = (
        min(max(1, round(share * side)), side - 1)
        for share, side in zip(mix.centre, (height, width), strict=True)
    )
    image = torch.empty(height, width, 3, dtype=torch.uint8).permute(2, 0, 1)
    image[:] = filled_row(transform.fill, width)
    all_boxes, all_labels = [], []
    parts = product(((0, middle_y), (middle_y, height)), ((0, middle_x), (middle_x, width)))
    for i, ((top, bottom), (left, right)) in enumerate(parts):
        read = next(images) if i else first
        usual = network_size(*read.size, shorter, transform.max_size)
        pixels, boxes, labels = _crop_to(
            read, (bottom - top, right - left), usual, mix.factors[i], draw
        )
        image[:, top : top + pixels.shape[-2], left : left + pixels.shape[-1]] = pixels
        all_boxes.append(boxes + boxes.new_tensor([left, top, left, top]))
        all_labels.append(labels)
    return image, torch.cat(all_boxes), torch.cat(all_labels)


def _crop_to(
    read: ReadImage,
    area: tuple[int, int],
    usual: tuple[int, int],
    factor: float,
    draw: random.Random,
) -> Labelled:
    """Crop an image at random, and resize it to the (height, width) of an area.

    It is shown at `factor` times its `usual` size or, where that would not fill the area, larger.
    """
    image, boxes, labels = boxes_as_read(read.image, read.boxes, read.labels, read.size)
    needed = max(side / whole for side, whole in zip(area, usual, strict=True))
    factor = min(1.0, max(factor, needed))
    scaled = [whole * factor for whole in usual]
    shown = [min(a, max(1, round(b))) for a, b in zip(area, scaled, strict=True)]
    window = (
        max(1, round(image.shape[-2] * min(1.0, shown[0] / scaled[0]))),
        max(1, round(image.shape[-1] * min(1.0, shown[1] / scaled[1]))),
    )
    image, boxes, labels = random_crop(image, boxes, labels, window, draw)
    # In the layout that is resized fastest; a window of an image is in none.
    image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    boxes = scale_boxes(boxes, shown[0] / image.shape[-2], shown[1] / image.shape[-1])
    image = resize_pixels(image, shown[0], shown[1])
    return image, *clip_boxes(boxes, labels, image)


def _paste(labelled: Labelled, source: Labelled, draw: random.Random) -> Labelled:
    """Paste the boxes' crops of 1 to MAX_PASTED objects of another image at random positions.

    Source: Ghiasi et al. 2021, who paste the masks of objects; of boxes the background around the
    object is pasted too. Other objects within a crop are pasted and labelled with it.
    """
    image, boxes, labels = labelled
    source_image, source_boxes, source_labels = source
    height, width = image.shape[-2:]
    windows = [
        (math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2))
        for x1, y1, x2, y2 in source_boxes[source_labels != IGNORED].tolist()
    ]
    fitting = [w for w in windows if w[2] - w[0] <= width and w[3] - w[1] <= height]
    if not fitting:
        return labelled
    image = image.clone()
    shown = np.zeros((height, width), np.int16)
    all_boxes, all_labels, layers = [boxes], [labels], [0] * len(labels)
    chosen = draw.sample(fitting, draw.randint(1, min(MAX_PASTED, len(fitting))))
    for layer, (x1, y1, x2, y2) in enumerate(chosen, start=1):
        top, left = draw.randint(0, height - (y2 - y1)), draw.randint(0, width - (x2 - x1))
        rows, columns = slice(top, top + y2 - y1), slice(left, left + x2 - x1)
        image[:, rows, columns] = source_image[:, y1:y2, x1:x2]
        shown[rows, columns] = layer
        new_boxes, new_labels = view_boxes(source_boxes, source_labels, (x1, y1, x2, y2))
        all_boxes.append(new_boxes + new_boxes.new_tensor([left, top, left, top]))
        all_labels.append(new_labels)
        layers += [layer] * len(new_labels)
    return image, *hide_boxes(torch.cat(all_boxes), torch.cat(all_labels), layers, shown)


def _blend(labelled: Labelled, other: Labelled) -> Labelled:
    """Average two images where they overlap, aligned at the top left.

    Source: Zhang et al. 2018; as in YOLOX (Ge et al. 2021) half of each, and the boxes of both.
    """
    image, boxes, labels = labelled
    other_image, other_boxes, other_labels = other
    height, width = (min(image.shape[i], other_image.shape[i]) for i in (1, 2))
    overlap = (slice(None), slice(height), slice(width))
    image = image.clone()
    image[overlap] = ((image[overlap].short() + other_image[overlap].short()) // 2).byte()
    other_boxes, other_labels = view_boxes(other_boxes, other_labels, (0, 0, width, height))
    return image, torch.cat([boxes, other_boxes]), torch.cat([labels, other_labels])


@dataclass(frozen=True, slots=True)
class UserTransform:
    """The function of ``data.transform``, ``module:function``; its results are checked."""

    name: str
    function: Callable[..., Any]
    num_classes: int

    def __call__(
        self, image: Tensor, boxes: Tensor, labels: Tensor, generator: random.Random
    ) -> Labelled:
        """Call the function; a DataError names what fails, or what it returns wrongly."""
        try:
            result = self.function(image, boxes, labels, generator)
        except Exception as error:
            message = " ".join(str(error).split())[:_MAX_MESSAGE]
            raise DataError(
                f"data.transform={self.name} failed: {type(error).__name__}: {message}; "
                "correct the function"
            ) from error
        fault = self._fault(result)
        if fault:
            raise DataError(
                f"data.transform={self.name} returned {fault}; it must return (image, boxes, "
                f"labels): (3, H, W) uint8, (N, 4) floats, and (N,) classes 0..K-1 or IGNORED"
            )
        image, boxes, labels = result
        return image, *clip_boxes(boxes.float(), labels.long(), image)

    def _fault(self, result: Any) -> str:
        """Describe what is wrong with a result; empty: nothing."""
        if not isinstance(result, tuple) or len(result) != 3:
            return f"{type(result).__name__}, not a tuple of three"
        if not all(isinstance(value, Tensor) for value in result):
            return f"({', '.join(type(value).__name__ for value in result)}), not tensors"
        image, boxes, labels = result
        if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3 or not image.numel():
            return f"an image of shape {tuple(image.shape)} and type {image.dtype}"
        if boxes.ndim != 2 or boxes.shape[1] != 4 or tuple(labels.shape) != (len(boxes),):
            return f"boxes of shape {tuple(boxes.shape)} and labels of {tuple(labels.shape)}"
        sides = boxes[:, 2:] - boxes[:, :2]
        valid = (sides > 0).all(dim=1) & boxes.isfinite().all(dim=1)
        if not valid.all():
            first = boxes[~valid][0].tolist()
            return f"the box {[round(x, 2) for x in first]}, not x1 < x2 and y1 < y2 in pixels"
        if len(boxes) and boxes.max() <= 1 and min(image.shape[1:]) > 1:
            return "boxes that are fractions of the image, not pixels"
        wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= self.num_classes))]
        return f"label {wrong[0].item()} of {self.num_classes} classes" if len(wrong) else ""


def user_transform(config: DataConfig, num_classes: int) -> UserTransform | None:
    """Import the function of ``data.transform``; None: there is none."""
    if not config.transform:
        return None
    try:
        function = import_function(config.transform, "transform")
    except DataError as error:
        raise ConfigError(f"data.transform={error}") from None
    if not callable(function):
        raise ConfigError(
            f"data.transform={config.transform} is not a function at the top level of a module; "
            "give MODULE:FUNCTION"
        )
    if isinstance(function, nn.Module):
        function = partial(_call_v2, function)
    return UserTransform(config.transform, function, num_classes)


def _call_v2(
    transform: nn.Module, image: Tensor, boxes: Tensor, labels: Tensor, generator: random.Random
) -> Labelled:
    """Call a transform of torchvision.transforms.v2, which draws from torch's generator."""
    from torchvision import tv_tensors
    from torchvision.transforms.v2 import ConvertBoundingBoxFormat

    size = (image.shape[1], image.shape[2])
    objects = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.getrandbits(63))
        image, target = transform(tv_tensors.Image(image), {"boxes": objects, "labels": labels})
    found = ConvertBoundingBoxFormat("XYXY")(target["boxes"]).as_subclass(Tensor)
    kept = (found[:, 2:] > found[:, :2]).all(dim=1)  # those outside are clamped to no size
    return image.as_subclass(Tensor), found[kept], target["labels"][kept]
