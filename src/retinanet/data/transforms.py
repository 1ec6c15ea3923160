"""Random augmentation of images with their boxes."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from retinanet.data.image_files import network_size
from retinanet.data.images import resize_to
from retinanet.structures import IGNORED

MIN_SIDE = 0.1
"""Pixels of the network's input; boxes narrower or lower than this are dropped."""

MIN_VISIBLE = 0.25
"""Fraction of an object's area that must be in a crop; with less the object becomes IGNORED."""


_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
"""NTSC's luma and chroma of RGB (SMPTE 170M): grey has no chroma."""


@dataclass(frozen=True, slots=True)
class Transform:
    """Resizes an image to the network's input and, for training, augments it at random.

    In this order: scale jitter with the resize, crop, flips, colour. The defaults only resize. It
    has no random state: the same generator gives the same image on every machine and in every
    process.

    Attributes:
        max_size: pixels that the longer side may have (times the jitter's factor).
        horizontal_flip, vertical_flip: probability of each.
        scale_jitter: minimum and maximum factor of the size, drawn log-uniformly.
        crop: whether an image enlarged by the jitter is cropped at random to the size without
            jitter. The box of an object is clipped if at least MIN_VISIBLE of its area is in the
            crop; with less the object becomes IGNORED, since a small part is neither a good example
            nor background; an object outside is dropped.
        colour: strength in [0, 1]; at 1 brightness, contrast and saturation change by factors in
            0.5..1.5 and the hue is rotated by up to a tenth of the circle.
    """

    max_size: int
    horizontal_flip: float = 0.0
    vertical_flip: float = 0.0
    scale_jitter: tuple[float, float] = (1.0, 1.0)
    crop: bool = False
    colour: float = 0.0

    def __call__(
        self,
        image: Tensor,
        boxes: Tensor,
        labels: Tensor,
        *,
        shorter: int,
        generator: random.Random | None = None,
        size: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Transform an image with its objects.

        Args:
            image: (3, H, W) uint8.
            boxes: (M, 4) pixels of the whole image, to which they are clipped.
            labels: (M,) class 0..K-1, or IGNORED.
            shorter: pixels of the shorter side wanted, before jitter.
            generator: of random numbers; None: a new one.
            size: (height, width) of the whole image, if it was read at a reduced one (see
                :meth:`reading_size`).

        Returns:
            (3, h, w) uint8, (N, 4) float32 boxes in it and their (N,) labels, N <= M: objects
            outside, without width or height, or with a side under MIN_SIDE are dropped.
        """
        draw = generator or random.Random()
        height, width = size or image.shape[-2:]
        low, high = self.scale_jitter
        factor = math.exp(draw.uniform(math.log(low), math.log(high)))
        image, (scale_y, scale_x) = resize_to(
            image,
            max(1, round(shorter * factor)),
            max(1, round(self.max_size * factor)),
            (height, width),
        )
        scale = torch.tensor([scale_x, scale_y, scale_x, scale_y], dtype=torch.float64)
        boxes = (boxes.double() * scale).float().reshape(-1, 4)
        boxes, labels = _clip(boxes, labels, image)
        if self.crop:
            crop_size = network_size(height, width, shorter, self.max_size)
            image, boxes, labels = _crop(image, boxes, labels, crop_size, draw)
        new_height, new_width = image.shape[-2:]
        if draw.random() < self.horizontal_flip:
            image = image.flip(2)
            boxes[:, [0, 2]] = new_width - boxes[:, [2, 0]]
        if draw.random() < self.vertical_flip:
            image = image.flip(1)
            boxes[:, [1, 3]] = new_height - boxes[:, [3, 1]]
        if self.colour:
            image = _change_colour(image, self.colour, draw)
        return image, boxes, labels

    def reading_size(self, shorter: int) -> tuple[int, int]:
        """Maximum shorter and longer side of the jittered image: read it no smaller."""
        factor = max(1.0, self.scale_jitter[1])
        return math.ceil(shorter * factor), math.ceil(self.max_size * factor)


def _clip(boxes: Tensor, labels: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Clip boxes to the image, and drop those of which nothing is left."""
    clipped = _clamp(boxes, image)
    sides = clipped[:, 2:] - clipped[:, :2]
    keep = (sides >= MIN_SIDE).all(dim=1)  # False for NaN too
    return clipped[keep], labels[keep]


def _clamp(boxes: Tensor, image: Tensor) -> Tensor:
    height, width = image.shape[-2:]
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))


def _crop(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    size: tuple[int, int],
    draw: random.Random,
) -> tuple[Tensor, Tensor, Tensor]:
    height, width = image.shape[-2:]
    new_height, new_width = min(height, size[0]), min(width, size[1])
    # Drawn even if there is nothing to crop, so that later draws are the same.
    top = int(draw.random() * (height - new_height + 1))
    left = int(draw.random() * (width - new_width + 1))
    if (new_height, new_width) == (height, width):
        return image, boxes, labels
    whole = _areas(boxes)
    image = image[:, top : top + new_height, left : left + new_width]
    boxes = _clamp(boxes - boxes.new_tensor([left, top, left, top]), image)
    visible = _areas(boxes) / whole
    labels = torch.where(visible < MIN_VISIBLE, IGNORED, labels)
    boxes, labels = _clip(boxes, labels, image)
    return image, boxes, labels


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _change_colour(image: Tensor, strength: float, draw: random.Random) -> Tensor:
    """Change hue, saturation, contrast and brightness by one linear map of RGB.

    Unlike this, transforms.v2 rotates the hue in HSV and clamps after each of four passes; one
    rotation of the chroma plane, clamped once, takes a tenth of the time.
    """
    brightness, contrast, saturation = (1 + 0.5 * strength * draw.uniform(-1, 1) for _ in range(3))
    turn = 2 * math.pi * 0.1 * strength * draw.uniform(-1, 1)
    cos, sin = saturation * math.cos(turn), saturation * math.sin(turn)
    luma_chroma = torch.tensor(_YIQ, dtype=torch.float64)
    change = torch.tensor([[1, 0, 0], [0, cos, sin], [0, -sin, cos]], dtype=torch.float64)
    matrix = torch.linalg.solve(luma_chroma, change @ luma_chroma) * (brightness * contrast)
    values = image.contiguous().flatten(1).float()  # planes: a fast product
    mean_luma = luma_chroma[0] @ values.mean(dim=1).double()
    offset = torch.full((3, 1), float(brightness * (1 - contrast) * mean_luma), dtype=torch.float32)
    changed = torch.addmm(offset, matrix.float(), values)
    return changed.clamp_(0, 255).round_().to(torch.uint8).reshape(image.shape)
