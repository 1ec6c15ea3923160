"""Draw boxes on images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from retinanet.data.images import read_image
from retinanet.structures import BACKGROUND, IGNORED

Colour = tuple[int, int, int]
ImageLike = Tensor | Image.Image | npt.NDArray[Any]

PALETTE: tuple[Colour, ...] = (
    (213, 94, 0),  # vermilion
    (0, 158, 115),  # bluish green
    (86, 180, 233),  # sky blue
    (240, 228, 66),  # yellow
    (204, 121, 167),  # reddish purple
    (0, 114, 178),  # blue
    (230, 159, 0),  # orange
    (150, 230, 80),
    (140, 80, 220),
    (0, 220, 220),
    (160, 60, 60),
    (255, 255, 255),
)
"""Colours by class, repeated from the thirteenth on; the first seven are Okabe and Ito's, which
people with any kind of colour vision can distinguish (https://jfly.uni-koeln.de/color/)."""

_GREY: Colour = (160, 160, 160)  # of ignored regions


def draw_boxes(
    image: ImageLike,
    boxes: Tensor | npt.ArrayLike,
    labels: Tensor | npt.ArrayLike | None = None,
    scores: Tensor | npt.ArrayLike | None = None,
    names: Sequence[str] | None = None,
    *,
    colours: Sequence[Colour] = PALETTE,
    width: int | None = None,
    enlarge_to: int = 480,
) -> Image.Image:
    """Draw boxes on an image, coloured by class, with captions.

    Lines and letters grow with the image, and a small image is first enlarged by a whole factor, so
    that captions are readable. A caption that would hide another one or over a quarter of an object
    is left out, those of low scores first; the colour of its box still shows the class.

    Args:
        image: (3, H, W) uint8 tensor, PIL image or (H, W, 3) array.
        boxes: (N, 4) pixels.
        labels: (N,) class 0..K-1; IGNORED is drawn grey and dashed, BACKGROUND (padding) not at
            all. None: one class.
        scores: (N,) shown with two decimals; the highest are drawn on top.
        names: class names; None: their numbers, or none if `labels` is None.
        colours: by class, repeated.
        width: of the lines in pixels of the result; None: by the size of the image.
        enlarge_to: images whose longer side is shorter are enlarged; 0: never.

    Returns:
        A new RGB image.

    Raises:
        ValueError: boxes, labels and scores differ in number.
        ImageError: the image has an unsupported layout.
    """
    corners = _array(boxes, np.float64).reshape(-1, 4)
    count = len(corners)
    classes = np.zeros(count, np.int64) if labels is None else _array(labels, np.int64).reshape(-1)
    points = None if scores is None else _array(scores, np.float64).reshape(-1)
    if len(classes) != count or (points is not None and len(points) != count):
        raise ValueError(
            f"{count} boxes, {len(classes)} labels and "
            f"{'no' if points is None else len(points)} scores differ in number"
        )
    img = Image.fromarray(read_image(image).permute(1, 2, 0).contiguous().numpy())
    factor = max(1, math.ceil(enlarge_to / max(img.size)))
    if factor > 1:
        img = img.resize((img.width * factor, img.height * factor), Image.Resampling.BICUBIC)
    corners = corners * factor
    line = width or max(2, round(max(img.size) / 256))
    font = ImageFont.load_default(size=max(12, round(max(img.size) / 48)))

    kept = [i for i in range(count) if classes[i] != BACKGROUND and np.isfinite(corners[i]).all()]
    best_last = sorted(kept, key=lambda i: 0.0 if points is None else points[i])
    canvas = ImageDraw.Draw(img)
    shown = {
        i: _GREY if classes[i] == IGNORED else colours[classes[i] % len(colours)] for i in best_last
    }
    for i, colour in shown.items():
        _draw_box(canvas, corners[i], colour, line, dashed=classes[i] == IGNORED)
    taken: list[tuple[int, int, int, int]] = []
    objects = corners[[i for i in kept if classes[i] != IGNORED]]
    if names is None and labels is not None:
        names = ()  # numbers
    for i, colour in reversed(shown.items()):
        label = int(classes[i])
        words = [] if points is None else [f"{points[i]:.2f}"]
        if label == IGNORED:
            words.insert(0, "ignored")
        elif names is not None:
            words.insert(0, names[label] if label < len(names) else str(label))
        if any(words):
            text = " ".join(words)
            _draw_caption(canvas, corners[i], text, colour, font, line, taken, objects)
    return img


def _array(values: Tensor | npt.ArrayLike, dtype: type[Any]) -> npt.NDArray[Any]:
    if isinstance(values, Tensor):
        values = values.detach().cpu().tolist()
    return np.asarray(values, dtype=dtype)


def _draw_box(
    canvas: ImageDraw.ImageDraw, box: npt.NDArray[Any], colour: Colour, line: int, *, dashed: bool
) -> None:
    # Pixel i spans i to i + 1: the last pixel inside the box is the one before its end.
    x1, y1 = round(box[0]), round(box[1])
    x2, y2 = max(x1, round(box[2]) - 1), max(y1, round(box[3]) - 1)
    if not dashed:
        # A thin dark outline keeps any colour visible.
        canvas.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=(0, 0, 0), width=1)
        canvas.rectangle((x1, y1, x2, y2), outline=colour, width=line)
        return
    dash = 4 * line
    for x in range(x1, x2 + 1, 2 * dash):
        for y in (y1, y2 - line + 1):
            canvas.rectangle((x, y, min(x + dash, x2), y + line - 1), fill=colour)
    for y in range(y1, y2 + 1, 2 * dash):
        for x in (x1, x2 - line + 1):
            canvas.rectangle((x, y, x + line - 1, min(y + dash, y2)), fill=colour)


def _draw_caption(
    canvas: ImageDraw.ImageDraw,
    box: npt.NDArray[Any],
    text: str,
    colour: Colour,
    font: Any,
    line: int,
    taken: list[tuple[int, int, int, int]],
    objects: npt.NDArray[Any],
) -> None:
    """Write a caption above the box, else below, else inside it, at the first free position."""
    image_width, image_height = canvas.im.size
    pad = max(2, line)
    width = math.ceil(font.getlength(text)) + 2 * pad
    ascent, descent = font.getmetrics()
    height = ascent + descent + pad
    x1, y1, x2, y2 = (round(value) for value in box)
    for left, top in (
        (x1, y1 - height),
        (x2 - width, y1 - height),
        (x1, y2),
        (x2 - width, y2),
        (x1 + line, y1 + line),
        (x1 + line, y2 - height - line),
    ):
        left = min(max(0, left), image_width - width)
        area = (left, top, left + width, top + height)
        if (
            left >= 0
            and 0 <= top <= image_height - height
            and _hidden(area, np.asarray(taken).reshape(-1, 4)) == 0
            and _hidden(area, objects) <= 0.25
        ):
            taken.append(area)
            canvas.rectangle((area[0], area[1], area[2] - 1, area[3] - 1), fill=colour)
            is_light = np.dot((0.299, 0.587, 0.114), colour) > 140
            ink = (0, 0, 0) if is_light else (255, 255, 255)
            canvas.text((left + pad, top + pad // 2), text, fill=ink, font=font)
            return


def _hidden(area: tuple[int, int, int, int], objects: npt.NDArray[Any]) -> float:
    """Return the largest fraction of an object, or a caption, that a caption would cover."""
    if not len(objects):
        return 0.0
    wide = np.minimum(objects[:, 2], area[2]) - np.maximum(objects[:, 0], area[0])
    high = np.minimum(objects[:, 3], area[3]) - np.maximum(objects[:, 1], area[1])
    areas = (objects[:, 2] - objects[:, 0]) * (objects[:, 3] - objects[:, 1])
    covered = np.clip(wide, 0, None) * np.clip(high, 0, None)
    return float((covered / np.clip(areas, 1e-9, None)).max())
