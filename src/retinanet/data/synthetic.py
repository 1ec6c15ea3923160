"""Synthetic images for the demo and the tests: few small shapes in much clutter.

Circles, squares and triangles among lines, bars, rings, crosses and ellipses of the same colours on
a cloudy, noisy background: neither colour nor brightness alone identifies an object. About one in a
thousand anchors is matched to one, the imbalance that the paper is about. Pixels are computed with
additions, products and square roots, which are the same on every platform.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.data.formats.coco import write_split

CLASSES = ("circle", "square", "triangle")

_Array = npt.NDArray[np.float64]
_Colour = tuple[float, float, float]
_Points = Sequence[tuple[float, float]]
_Box = tuple[float, float, float, float]
_Inside = Callable[[_Array, _Array], _Array]
"""Signed distance in pixels of points (x, y) to a figure's outline; negative outside."""

# Three of each class: warm, cool, violet to cream; and a dark one of distractors.
_COLOURS: tuple[_Colour, ...] = (
    *((214, 64, 58), (236, 150, 48), (232, 208, 66)),
    *((86, 168, 82), (62, 172, 178), (64, 104, 196)),
    *((142, 86, 178), (226, 128, 168), (236, 232, 222)),
    (44, 42, 48),
)


def synthetic_dataset(
    folder: str | Path,
    *,
    splits: Mapping[str, int] | None = None,
    image_size: int = 160,
    objects: tuple[int, int] = (1, 5),
    object_size: tuple[float, float] = (10.0, 32.0),
    clutter: float = 0.5,
    empty: float = 0.1,
    seed: int = 0,
) -> dict[str, Dataset]:
    """Write a data set of shapes in clutter as PNG and COCO JSON.

    Image i of a split depends on the seed, the split's name and i alone: a larger data set contains
    the smaller one.

    Args:
        folder: of ``SPLIT.json`` and ``SPLIT/000000.png`` ...; such files are overwritten.
        splits: number of images by split; None: 200 in ``train`` and 50 in ``val``.
        image_size: pixels of both sides, 32 or more.
        objects: minimum and maximum number per image; fewer if they do not fit without overlap.
        object_size: minimum and maximum diameter or side, pixels.
        clutter: 0 for plain shapes on a plain background, 1 for the most clutter.
        empty: fraction of the images without objects, in [0, 1].
        seed: random seed.

    Returns:
        The data sets by split, with the classes circle, square and triangle (category ids 1 to 3).

    Raises:
        ValueError: a number is out of range.
    """
    if image_size < 32:
        raise ValueError(f"image_size {image_size} is under 32")
    if not 0 <= objects[0] <= objects[1]:
        raise ValueError(f"objects {objects} is not 0 <= min <= max")
    if not 4 <= object_size[0] <= object_size[1] <= image_size / 2:
        limit = f"half of image_size ({image_size / 2:g})"
        raise ValueError(f"object_size {object_size} is not 4 <= min <= max <= {limit}")
    if not (0 <= clutter <= 1 and 0 <= empty <= 1):
        raise ValueError(f"clutter {clutter} and empty {empty} are not in [0, 1]")
    folder = Path(folder)
    extra = {"info": {"description": "Shapes in clutter, made by retinanet", "seed": seed}}
    size = (image_size, image_size)
    datasets = {}
    for split, count in ({"train": 200, "val": 50} if splits is None else splits).items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        labels = folder / f"{split}.json"
        images, next_id = [], 1
        for number in range(count):
            draw = random.Random(f"{seed} {split} {number}")
            wanted = 0 if draw.random() < empty else draw.randint(*objects)
            pixels, shapes = _image(draw, image_size, wanted, object_size, clutter)
            file = folder / split / f"{number:06}.png"
            Image.fromarray(pixels).save(file, compress_level=1)  # noise hardly shrinks
            annotations = tuple(
                Annotation(shape.box, shape.label, id=id_, area=shape.area)
                for id_, shape in enumerate(shapes, start=next_id)
            )
            next_id += len(shapes)
            images.append(LabelledImage(file, number + 1, annotations, *size, labels))
        dataset = Dataset(tuple(images), CLASSES, (1, 2, 3), split, "coco", folder, extra=extra)
        datasets[split] = dataset
        with labels.open("w", encoding="utf-8") as stream:
            write_split(stream, dataset, {image.path: image.path.name for image in images})
    return datasets


class _Shape(NamedTuple):
    label: int
    inside: _Inside
    box: _Box
    area: float


def _image(
    draw: random.Random, size: int, wanted: int, object_size: tuple[float, float], clutter: float
) -> tuple[npt.NDArray[np.uint8], list[_Shape]]:
    """(size, size, 3) RGB, and its objects, at least three pixels apart."""
    shapes: list[_Shape] = []
    for _ in range(60 * wanted):
        if len(shapes) == wanted:
            break
        shape = _shape(draw, size, object_size)
        x1, y1, x2, y2 = shape.box
        others = (other.box for other in shapes)
        if all(x2 + 3 <= a or c + 3 <= x1 or y2 + 3 <= b or d + 3 <= y1 for a, b, c, d in others):
            shapes.append(shape)
    canvas = _background(draw, size, clutter)
    # The same number of distractors per area for all image sizes.
    for _ in range(round(clutter * draw.uniform(0.6, 1.4) * 26 * (size / 160) ** 2)):
        _distract(draw, canvas, object_size)
    for shape in shapes:
        _paint_shape(draw, canvas, shape)
    for _ in range(round(clutter * draw.uniform(0, 4))):  # a few hairs over everything
        _hair(draw, canvas)
    noise = _noise(draw, canvas.shape) * (3 + 22 * clutter * draw.random())
    return np.floor(np.clip(canvas + noise, 0, 255) + 0.5).astype(np.uint8), shapes


def _shape(draw: random.Random, size: int, object_size: tuple[float, float]) -> _Shape:
    """Draw a shape inside the image."""
    label = draw.randrange(len(CLASSES))
    # Log-uniform: as many from 10 to 14 pixels as from 20 to 28.
    side = object_size[0] * (object_size[1] / object_size[0]) ** draw.random()
    corners: _Points = ()
    half_width = half_height = radius = side / 2
    area = math.pi * radius**2
    if label:
        number = 4 if label == 1 else 3
        radius = side / (2 * math.sin(math.pi / number))
        turn = math.radians(draw.uniform(-20, 20)) + (math.pi / 4 if label == 1 else -math.pi / 2)
        angles = [turn + 2 * math.pi * i / number for i in range(number)]
        xs = [radius * math.cos(angle) for angle in angles]
        ys = [radius * math.sin(angle) for angle in angles]
        # Corners about the middle of the box, not of the circle through them.
        middle_x, middle_y = (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2
        corners = [(x - middle_x, y - middle_y) for x, y in zip(xs, ys, strict=True)]
        half_width, half_height = (max(xs) - min(xs)) / 2, (max(ys) - min(ys)) / 2
        area = side**2 if label == 1 else side**2 * math.sqrt(3) / 4
    x = draw.uniform(half_width + 1, size - half_width - 1)
    y = draw.uniform(half_height + 1, size - half_height - 1)
    sides = x - half_width, y - half_height, x + half_width, y + half_height
    x1, y1, x2, y2 = (round(side, 2) for side in sides)
    if label:
        inside = _polygon([(x + dx, y + dy) for dx, dy in corners])
    else:
        inside = _disc((x1 + x2) / 2, (y1 + y2) / 2, radius, radius, 0.0)
    return _Shape(label, inside, (x1, y1, x2, y2), round(area, 2))


def _paint_shape(draw: random.Random, canvas: _Array, shape: _Shape) -> None:
    x1, y1, x2, y2 = map(int, shape.box)
    around = canvas[max(0, y1 - 4) : y2 + 5, max(0, x1 - 4) : x2 + 5].mean(axis=(0, 1))
    own = _COLOURS[3 * shape.label : 3 * shape.label + 3]
    colours = [_vary(draw, colour) for colour in draw.sample(own, k=len(own))]
    # The first that contrasts with the background, so that the object is visible.
    colour = next((c for c in colours if np.abs(np.array(c) - around).sum() > 130), colours[0])
    opacity = draw.uniform(0.9, 1.0)
    _paint(canvas, shape.box, shape.inside, colour, opacity, rim=draw.random() < 0.7)


def _distract(draw: random.Random, canvas: _Array, object_size: tuple[float, float]) -> None:
    """Paint a distractor, which is none of the shapes."""
    size = canvas.shape[0]
    colour = _vary(draw, draw.choice(_COLOURS))
    opacity, rim = draw.uniform(0.3, 0.9), draw.random() < 0.3
    x, y, turn = draw.uniform(0, size), draw.uniform(0, size), draw.uniform(0, math.pi)
    length = draw.uniform(object_size[0] * 0.6, object_size[1] * 1.3)
    kind = draw.choice(("hair", "hair", "bar", "ellipse", "ring", "cross", "corner"))
    if kind == "hair":
        _hair(draw, canvas)
        return
    extent = length
    if kind == "bar":
        inside = _bar(x, y, length, length * draw.uniform(0.12, 0.4), turn)
    elif kind == "ellipse":
        inside = _disc(x, y, length / 2, length / 2 * draw.uniform(0.25, 0.55), turn)
    elif kind == "ring":
        thick = max(1.2, length * draw.uniform(0.06, 0.14))
        disc = _disc(x, y, length / 2, length / 2, 0.0)

        def inside(xs: _Array, ys: _Array) -> _Array:
            return thick / 2 - np.abs(disc(xs, ys) - thick)
    else:
        thick = length * draw.uniform(0.14, 0.28)
        first = _bar(x, y, length, thick, turn)
        if kind == "corner":  # the second arm starts at the end of the first
            x += (length - thick) / 2 * (math.cos(turn) - math.sin(turn))
            y += (length - thick) / 2 * (math.sin(turn) + math.cos(turn))
        second = _bar(x, y, length, thick, turn + math.pi / 2)
        extent = 2 * length

        def inside(xs: _Array, ys: _Array) -> _Array:
            return np.maximum(first(xs, ys), second(xs, ys))

    _paint(canvas, _around(x, y, extent), inside, colour, opacity, rim)


def _hair(draw: random.Random, canvas: _Array) -> None:
    """Paint a long thin line."""
    size = canvas.shape[0]
    x, y, turn = draw.uniform(0, size), draw.uniform(0, size), draw.uniform(0, math.pi)
    length = size * draw.uniform(0.15, 0.8)
    hair = _bar(x, y, length, draw.uniform(0.6, 2.0), turn)
    colour = _vary(draw, draw.choice(_COLOURS))
    _paint(canvas, _around(x, y, length), hair, colour, draw.uniform(0.4, 0.9))


def _background(draw: random.Random, size: int, clutter: float) -> _Array:
    """Muted clouds: a coarse grid of random colours, interpolated, and a finer one over it."""
    base = np.array([draw.uniform(70, 190) for _ in range(3)])
    canvas: _Array = np.zeros((size, size, 3)) + base.mean() + 0.35 * (base - base.mean())
    for cells, strength in ((3, 110.0), (9, 60.0)):
        shape = (cells + 3, cells + 3)
        grid = _noise(draw, (*shape, 1)) + 0.35 * _noise(draw, (*shape, 3))
        # Cubic B-spline: the first of four grid points, and their weights.
        position = (np.arange(size) + 0.5) * (cells / size)
        low = np.minimum(position.astype(np.int64), cells - 1)
        t = position - low
        weights = (
            (1 - t) * (1 - t) * (1 - t) / 6,
            (3 * t * t * t - 6 * t * t + 4) / 6,
            (3 * t * t + 3 * t + 1 - 3 * t * t * t) / 6,
            t * t * t / 6,
        )
        rows, clouds = np.zeros((size, cells + 3, 3)), np.zeros((size, size, 3))
        for i, weight in enumerate(weights):
            rows += weight[:, None, None] * grid[low + i]
        for i, weight in enumerate(weights):
            clouds += weight[:, None] * rows[:, low + i]
        canvas += strength * (0.3 + clutter) * clouds
    return canvas


def _noise(draw: random.Random, shape: tuple[int, ...]) -> _Array:
    """Values about 0 in [-1, 1], those near 0 more often."""
    count = math.prod(shape)
    data = np.frombuffer(draw.randbytes(2 * count), dtype=np.uint8).astype(np.float64)
    values: _Array = (data[:count] + data[count:]) / 255 - 1
    return values.reshape(shape)


def _vary(draw: random.Random, colour: _Colour) -> _Colour:
    light = draw.uniform(0.8, 1.15)
    red, green, blue = (min(255.0, light * value + draw.uniform(-14, 14)) for value in colour)
    return red, green, blue


def _around(x: float, y: float, length: float) -> _Box:
    half = 0.75 * length + 2
    return x - half, y - half, x + half, y + half


def _bar(x: float, y: float, length: float, thick: float, turn: float) -> _Inside:
    a, b = math.cos(turn) * length / 2, math.sin(turn) * length / 2
    c, d = -math.sin(turn) * thick / 2, math.cos(turn) * thick / 2
    signs = ((-1, -1), (1, -1), (1, 1), (-1, 1))
    return _polygon([(x + i * a + j * c, y + i * b + j * d) for i, j in signs])


def _polygon(corners: _Points) -> _Inside:
    """Return a convex polygon, its corners clockwise on the screen."""

    def depth(xs: _Array, ys: _Array) -> _Array:
        depths = []
        for (x1, y1), (x2, y2) in zip(corners, (*corners[1:], corners[0]), strict=True):
            dx, dy = x2 - x1, y2 - y1
            depths.append((dx * (ys - y1) - dy * (xs - x1)) / math.sqrt(dx * dx + dy * dy))
        return np.asarray(np.minimum.reduce(depths))

    return depth


def _disc(x: float, y: float, a: float, b: float, turn: float) -> _Inside:
    """Return an ellipse of half axes a and b, turned; a circle where they are equal."""
    cos, sin = math.cos(turn), math.sin(turn)

    def depth(xs: _Array, ys: _Array) -> _Array:
        along = ((xs - x) * cos + (ys - y) * sin) / a
        across = ((ys - y) * cos - (xs - x) * sin) / b
        return np.asarray((1 - np.sqrt(along * along + across * across)) * min(a, b))

    return depth


def _paint(
    canvas: _Array,
    window: _Box,
    inside: _Inside,
    colour: _Colour,
    opacity: float,
    rim: bool = False,
) -> None:
    """Paint a figure on the part of the canvas in `window`, with soft edges."""
    size = canvas.shape[0]
    left, top = max(0, int(window[0]) - 1), max(0, int(window[1]) - 1)
    right, bottom = min(size, int(window[2]) + 2), min(size, int(window[3]) + 2)
    if left >= right or top >= bottom:
        return
    xs = np.arange(left, right)[None, :] + 0.5  # pixel i spans i to i + 1
    ys = np.arange(top, bottom)[:, None] + 0.5
    depth = inside(xs, ys)[:, :, None]
    paint = np.array(colour) * np.ones_like(depth)
    if rim:
        paint *= 0.7 + 0.3 * np.clip(depth - 0.7, 0, 1)
    part = canvas[top:bottom, left:right]
    part += opacity * np.clip(depth + 0.5, 0, 1) * (paint - part)
