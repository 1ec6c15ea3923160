"""Random augmentation of images with their boxes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from retinanet.boxes import box_iou
from retinanet.data.image_files import network_size
from retinanet.data.images import resize_to
from retinanet.structures import IGNORED

Labelled = tuple[Tensor, Tensor, Tensor]
"""(3, H, W) uint8 image, (N, 4) float32 boxes in its pixels, and (N,) int64 labels."""

MIN_SIDE = 0.1
"""Pixels of the network's input; boxes narrower or lower than this are dropped."""

MIN_VISIBLE = 0.25
"""Fraction of an object's area that must stay visible; with less the object becomes IGNORED."""

MIN_CROP_SIDE = 0.3
"""Smallest side of an IoU crop, as a fraction of the image's (torchvision's RandomIoUCrop; SSD has
.1 of the area)."""

_CROP_IOUS = (None, 0.0, 0.1, 0.3, 0.5, 0.7, 0.9)  # Liu et al. 2016, Sec. 2.2; None: no crop
_CROP_TRIALS = 50

_ERASED_AREA = (0.02, 0.4)  # Zhong et al. 2020, Algorithm 1: s_l and s_h
_ERASED_RATIO = (0.3, 1 / 0.3)  # r_1 and r_2
_ERASE_TRIALS = 100

_BAND = 64  # rows that are mapped at a time

_YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
"""NTSC's luma and chroma of RGB (SMPTE 170M): grey has no chroma."""


@dataclass(frozen=True, slots=True)
class Transform:
    """Resizes an image to the network's input and, for training, augments it at random.

    In this order: IoU crop, scale jitter with the resize, crop, 90-degree rotations, affine map,
    flips, colour, erasing, the user's function. The defaults only resize. It has no random state:
    the same generator gives the same image on every machine and in every process.

    An object of which less than MIN_VISIBLE of the area stays visible becomes IGNORED, since a
    small part is neither a good example nor background; one of which nothing stays is dropped.

    Attributes:
        max_size: pixels that the longer side may have (times the jitter's factor).
        horizontal_flip, vertical_flip: probability of each.
        scale_jitter: minimum and maximum factor of the size, drawn log-uniformly.
        crop: True: an image enlarged by the jitter is cropped at random to the size without
            jitter. "iou": a random part of the image is resized in place of the whole, with an IoU
            of 0 to .9 with some object (SSD, Liu et al. 2016, Sec. 2.2).
        rotations90: multiples of 90 degrees, of which one is drawn.
        rotation, shear: degrees at most, of each axis; the image keeps its size. The new box of an
            object encloses the ellipse inscribed in the old one, not its corners, which gives
            boxes that are too large (Kalra et al. 2021).
        translate: fraction of the size at most, of each axis.
        colour: strength in [0, 1]; at 1 brightness, contrast and saturation change by factors in
            0.5..1.5 and the hue is rotated by up to a tenth of the circle.
        erase: probability that a random rectangle is replaced by noise (Zhong et al. 2020).
        function: applied last to image, boxes, labels and the generator.
        fill: RGB of pixels that no image covers.
    """

    max_size: int
    horizontal_flip: float = 0.0
    vertical_flip: float = 0.0
    scale_jitter: tuple[float, float] = (1.0, 1.0)
    crop: bool | Literal["iou"] = False
    rotations90: tuple[int, ...] = (0,)
    rotation: float = 0.0
    shear: float = 0.0
    translate: float = 0.0
    colour: float = 0.0
    erase: float = 0.0
    function: Callable[[Tensor, Tensor, Tensor, random.Random], Labelled] | None = None
    fill: tuple[float, ...] = (0.0, 0.0, 0.0)

    def __call__(
        self,
        image: Tensor,
        boxes: Tensor,
        labels: Tensor,
        *,
        shorter: int,
        generator: random.Random | None = None,
        size: tuple[int, int] | None = None,
    ) -> Labelled:
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
        resized = self.resize(image, boxes, labels, shorter=shorter, draw=draw, size=size)
        return self.finish(self.move(resized, draw), draw)

    def resize(
        self,
        image: Tensor,
        boxes: Tensor,
        labels: Tensor,
        *,
        shorter: int,
        draw: random.Random,
        size: tuple[int, int] | None = None,
    ) -> Labelled:
        """Do the first part of the transform: IoU crop, scale jitter, resize, crop."""
        if self.crop == "iou":
            image, boxes, labels = _iou_crop(*boxes_as_read(image, boxes, labels, size), draw)
            size = None
        height, width = size or image.shape[-2:]
        low, high = self.scale_jitter
        factor = math.exp(draw.uniform(math.log(low), math.log(high)))
        image, (scale_y, scale_x) = resize_to(
            image,
            max(1, round(shorter * factor)),
            max(1, round(self.max_size * factor)),
            (height, width),
        )
        boxes, labels = clip_boxes(scale_boxes(boxes, scale_y, scale_x), labels, image)
        if self.crop is True:
            crop_size = network_size(height, width, shorter, self.max_size)
            return random_crop(image, boxes, labels, crop_size, draw)
        return image, boxes, labels

    def move(self, labelled: Labelled, draw: random.Random) -> Labelled:
        """Do the second part of the transform: 90-degree rotations, affine map, flips."""
        image, boxes, labels = labelled
        if self.rotations90 != (0,):
            image, boxes = _rotate90(image, boxes, draw.choice(self.rotations90))
        if self.rotation or self.shear or self.translate:
            image, boxes, labels = self._map_affine(image, boxes, labels, draw)
        height, width = image.shape[-2:]
        if draw.random() < self.horizontal_flip:
            image = image.flip(2)
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
        if draw.random() < self.vertical_flip:
            image = image.flip(1)
            boxes[:, [1, 3]] = height - boxes[:, [3, 1]]
        return image, boxes, labels

    def finish(self, labelled: Labelled, draw: random.Random) -> Labelled:
        """Do the last part of the transform: colour, erasing, the user's function."""
        image, boxes, labels = labelled
        if self.colour:
            image = _change_colour(image, self.colour, draw)
        if self.erase and draw.random() < self.erase:
            image, boxes, labels = _erase(image, boxes, labels, draw)
        if self.function is not None:
            image, boxes, labels = self.function(image, boxes, labels, draw)
        return image, boxes, labels

    def reading_size(self, shorter: int) -> tuple[int, int]:
        """Maximum shorter and longer side of the jittered image: read it no smaller."""
        factor = max(1.0, self.scale_jitter[1]) / (MIN_CROP_SIDE if self.crop == "iou" else 1)
        return math.ceil(shorter * factor), math.ceil(self.max_size * factor)

    def _map_affine(
        self, image: Tensor, boxes: Tensor, labels: Tensor, draw: random.Random
    ) -> Labelled:
        """Rotate, shear and translate about the centre."""
        height, width = image.shape[-2:]
        angle = math.radians(draw.uniform(-self.rotation, self.rotation))
        shear_x, shear_y = (
            math.tan(math.radians(draw.uniform(-self.shear, self.shear))) for _ in range(2)
        )
        shift = [side * draw.uniform(-self.translate, self.translate) for side in (width, height)]
        cos, sin = math.cos(angle), math.sin(angle)
        matrix = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64) @ torch.tensor(
            [[1, shear_x], [shear_y, 1]], dtype=torch.float64
        )
        centre = torch.tensor([width, height], dtype=torch.float64) / 2
        moved = centre + torch.tensor(shift, dtype=torch.float64)
        image = _sample(image, matrix, centre, moved, self.fill)
        centres = (boxes[:, :2] + boxes[:, 2:]).double() / 2
        centres = (centres - centre) @ matrix.T + moved
        halves = (boxes[:, 2:] - boxes[:, :2]).double() / 2
        halves = (halves.square() @ matrix.square().T).sqrt()  # of the mapped ellipse
        boxes = torch.cat([centres - halves, centres + halves], dim=1).float()
        return image, *view_boxes(boxes, labels, (0, 0, width, height))


def _sample(
    image: Tensor, matrix: Tensor, centre: Tensor, moved: Tensor, fill: Sequence[float]
) -> Tensor:
    """Map an image by x -> matrix @ (x - centre) + moved, bilinear."""
    height, width = image.shape[-2:]
    (a, b), (c, d) = torch.linalg.inv(matrix).tolist()
    x = torch.arange(width) + (0.5 - moved[0].item())
    y = torch.arange(height)[:, None] + (0.5 - moved[1].item())
    colour = torch.tensor([round(value) for value in fill])[:, None, None]
    # What is outside counts as 0: the difference from the fill.
    difference = (image - colour.float())[None]
    mapped = torch.empty(height, width, 3, dtype=torch.uint8).permute(2, 0, 1)
    for top in range(0, height, _BAND):  # what is in the cache is computed faster
        rows = y[top : top + _BAND]
        # grid_sample has -1 and 1 at the edges of the image.
        grid = torch.stack(
            [
                (a * x + b * rows + centre[0].item()) * (2 / width) - 1,
                (c * x + d * rows + centre[1].item()) * (2 / height) - 1,
            ],
            dim=-1,
        )
        band = grid_sample(difference, grid[None], align_corners=False)[0]
        mapped[:, top : top + _BAND] = band.add_(colour).round_()
    return mapped


def scale_boxes(boxes: Tensor, scale_y: float, scale_x: float) -> Tensor:
    """Multiply the coordinates of (N, 4) boxes; float32."""
    scale = torch.tensor([scale_x, scale_y, scale_x, scale_y], dtype=torch.float64)
    return (boxes.double() * scale).float().reshape(-1, 4)


def clip_boxes(boxes: Tensor, labels: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Clip boxes to the image, and drop those of which nothing is left."""
    return _drop_empty(_clamp(boxes, *image.shape[-2:]), labels)


def view_boxes(
    boxes: Tensor, labels: Tensor, window: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor]:
    """Return boxes as they appear in a window (x1, y1, x2, y2) of the image, and their labels.

    They are clipped to it; IGNORED where less than MIN_VISIBLE of the area is inside, dropped
    outside.
    """
    left, top, right, bottom = window
    whole = _areas(boxes)
    boxes = _clamp(boxes - boxes.new_tensor([left, top, left, top]), bottom - top, right - left)
    labels = torch.where(_areas(boxes) / whole < MIN_VISIBLE, IGNORED, labels)
    return _drop_empty(boxes, labels)


def hide_boxes(
    boxes: Tensor, labels: Tensor, layers: Sequence[int], shown: npt.NDArray[np.int16]
) -> tuple[Tensor, Tensor]:
    """Shrink and drop boxes of objects that are covered by what was put over them.

    An object of layer `layers[i]` is visible where `shown` (H, W), the layer of each pixel, is that
    or lower. Boxes enclose the visible part; IGNORED where it is less than MIN_VISIBLE of the area.
    """
    new_boxes, new_labels = boxes.tolist(), labels.tolist()
    keep = []
    for i, (x1, y1, x2, y2) in enumerate(new_boxes):
        left, top = math.floor(x1), math.floor(y1)
        visible = shown[top : math.ceil(y2), left : math.ceil(x2)] <= layers[i]
        if not visible.all():
            rows, columns = (np.flatnonzero(visible.any(axis=axis)) for axis in (1, 0))
            if not len(rows):
                continue
            if visible.mean() < MIN_VISIBLE:
                new_labels[i] = IGNORED
            new_boxes[i] = [
                max(x1, left + int(columns[0])),
                max(y1, top + int(rows[0])),
                min(x2, left + int(columns[-1]) + 1),
                min(y2, top + int(rows[-1]) + 1),
            ]
        keep.append(i)
    return _drop_empty(
        boxes.new_tensor([new_boxes[i] for i in keep]).reshape(-1, 4),
        labels.new_tensor([new_labels[i] for i in keep]),
    )


def boxes_as_read(
    image: Tensor, boxes: Tensor, labels: Tensor, size: tuple[int, int] | None
) -> Labelled:
    """Return an image with boxes in its own pixels, clipped; `size` is that of the whole image."""
    height, width = size or image.shape[-2:]
    boxes = scale_boxes(boxes, image.shape[-2] / height, image.shape[-1] / width)
    return image, *clip_boxes(boxes, labels, image)


def random_crop(
    image: Tensor, boxes: Tensor, labels: Tensor, size: tuple[int, int], draw: random.Random
) -> Labelled:
    """Crop an image at random to (height, width) at most."""
    height, width = image.shape[-2:]
    new_height, new_width = min(height, size[0]), min(width, size[1])
    # Drawn even if there is nothing to crop, so that later draws are the same.
    top = int(draw.random() * (height - new_height + 1))
    left = int(draw.random() * (width - new_width + 1))
    if (new_height, new_width) == (height, width):
        return image, boxes, labels
    return _cut(image, boxes, labels, (left, top, left + new_width, top + new_height))


def _cut(
    image: Tensor, boxes: Tensor, labels: Tensor, window: tuple[int, int, int, int]
) -> Labelled:
    left, top, right, bottom = window
    return image[:, top:bottom, left:right], *view_boxes(boxes, labels, window)


def _drop_empty(boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    sides = boxes[:, 2:] - boxes[:, :2]
    keep = (sides >= MIN_SIDE).all(dim=1)  # False for NaN too
    return boxes[keep], labels[keep]


def _clamp(boxes: Tensor, height: int, width: int) -> Tensor:
    return torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _iou_crop(image: Tensor, boxes: Tensor, labels: Tensor, draw: random.Random) -> Labelled:
    """Crop an image to a random window with a minimum IoU with some object.

    Source: Liu et al. 2016 (SSD), Sec. 2.2. The objects that count as seen are those of
    MIN_VISIBLE, not those with their centre in the window; any window suits an image without
    objects.
    """
    height, width = image.shape[-2:]
    min_iou = draw.choice(_CROP_IOUS)
    if min_iou is None:
        return image, boxes, labels
    windows = []
    for _ in range(_CROP_TRIALS):
        rows, columns = (
            max(1, round(draw.uniform(MIN_CROP_SIDE, 1) * side)) for side in (height, width)
        )
        top, left = draw.randint(0, height - rows), draw.randint(0, width - columns)
        if 0.5 <= rows / columns <= 2:
            windows.append((left, top, left + columns, top + rows))
    is_object = labels != IGNORED
    objects, classes = boxes[is_object], labels[is_object]
    if not len(objects):
        return _cut(image, boxes, labels, windows[0]) if windows else (image, boxes, labels)
    overlaps = box_iou(objects.new_tensor(windows).reshape(-1, 1, 4), objects).amax(dim=1)
    for window, overlap in zip(windows, overlaps.tolist(), strict=True):
        if overlap >= min_iou and (view_boxes(objects, classes, window)[1] != IGNORED).any():
            return _cut(image, boxes, labels, window)
    return image, boxes, labels


def _rotate90(image: Tensor, boxes: Tensor, turns: int) -> tuple[Tensor, Tensor]:
    """Rotate counterclockwise by a multiple of 90 degrees."""
    height, width = image.shape[-2:]
    for _ in range(turns):
        x1, y1, x2, y2 = boxes.unbind(dim=1)
        boxes = torch.stack([y1, width - x2, y2, width - x1], dim=1)
        height, width = width, height
    return image.rot90(turns, (1, 2)), boxes


def _erase(image: Tensor, boxes: Tensor, labels: Tensor, draw: random.Random) -> Labelled:
    """Replace a random rectangle by noise.

    Source: Zhong et al. 2020, Algorithm 1, on the whole image (image-aware).
    """
    height, width = image.shape[-2:]
    for _ in range(_ERASE_TRIALS):
        area = draw.uniform(*_ERASED_AREA) * height * width
        ratio = draw.uniform(*_ERASED_RATIO)
        rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < rows <= height and 0 < columns <= width:
            break
    else:
        return image, boxes, labels
    top, left = draw.randint(0, height - rows), draw.randint(0, width - columns)
    noise = np.frombuffer(bytearray(draw.randbytes(rows * columns * 3)), np.uint8)
    image = image.clone()
    image[:, top : top + rows, left : left + columns] = torch.from_numpy(
        noise.reshape(rows, columns, 3)
    ).permute(2, 0, 1)
    shown = np.zeros((height, width), np.int16)
    shown[top : top + rows, left : left + columns] = 1
    return image, *hide_boxes(boxes, labels, [0] * len(labels), shown)


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
