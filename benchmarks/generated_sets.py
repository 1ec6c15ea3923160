"""Two generated data sets of kinds that docs/accuracy.md has no public data for.

    python benchmarks/generated_sets.py boards OUT
    python benchmarks/generated_sets.py textures OUT

`boards` are photos of circuit boards with 36 tiny defects each, `textures` grey images of surfaces
with one to three faint defects. COCO JSON, splits train and val; always the same images.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Pixels = NDArray[np.uint8]
Defect = tuple[int, float, float, float, float]
"""Class, x, y, width and height in pixels."""

Colour = tuple[int, ...]
Side = tuple[tuple[int, int], tuple[int, int], int]
"""A straight part of a trace: both ends and its width."""

_BOARD_SIZES = [(1280, 960), (1024, 1024), (1280, 720)]
_BOARD_COLOURS = [[20, 70, 35], [15, 45, 80], [60, 20, 20]]
_TURNS = [(1, 0), (0, 1), (1, 1), (1, -1), (-1, 0)]


def smooth_noise(rng: np.random.Generator, width: int, height: int, cells: int) -> NDArray:
    """(height, width) values of about 0 to 1 that vary over `cells` cells of the width."""
    coarse = rng.random((cells * height // width + 2, cells + 2)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def board(rng: np.random.Generator) -> tuple[Pixels, list[Defect]]:
    """Draw a circuit board: missing holes, open traces, spurs, spurious copper."""
    width, height = _BOARD_SIZES[rng.integers(3)]
    base = np.array(_BOARD_COLOURS[rng.integers(3)]) + rng.integers(-10, 10, 3)
    ground, copper = (tuple(map(int, c)) for c in (base, base + np.array([60, 60, 30])))
    image = Image.new("RGB", (width, height), ground)
    draw = ImageDraw.Draw(image)
    traces: list[Side] = []
    for _ in range(rng.integers(60, 110)):
        points = [(rng.integers(0, width), rng.integers(0, height))]
        thickness = int(rng.integers(4, 8))
        for _ in range(rng.integers(2, 6)):
            dx, dy = _TURNS[rng.integers(5)]
            length = int(rng.integers(40, 220))
            points.append((points[-1][0] + dx * length, points[-1][1] + dy * length))
        draw.line(points, copper, thickness, joint="curve")
        traces += [(a, b, thickness) for a, b in pairwise(points)]
    pads = []
    for _ in range(rng.integers(80, 160)):
        x, y = rng.integers(20, width - 20), rng.integers(20, height - 20)
        r = int(rng.integers(6, 12))
        draw.ellipse((x - r, y - r, x + r, y + r), (200, 190, 150))
        pads.append((x, y, r))
    count = int(rng.integers(15, 60))
    missing = set(rng.choice(len(pads), min(len(pads), count // 4), replace=False).tolist())
    defects: list[Defect] = []
    for i, (x, y, r) in enumerate(pads):
        if i in missing:
            defects.append((0, x - r, y - r, 2 * r, 2 * r))
        else:
            draw.ellipse((x - r * 0.45, y - r * 0.45, x + r * 0.45, y + r * 0.45), (15, 15, 15))
    for _ in range(count):
        defects += _on_trace(rng, draw, traces, (width, height), ground, copper)
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(0.8))).astype(np.float32)
    light = 0.75 + 0.5 * smooth_noise(rng, width, height, 4)
    pixels = blurred * light[..., None] + rng.normal(0, 6, blurred.shape)
    return pixels.clip(0, 255).astype(np.uint8), defects


def _on_trace(
    rng: np.random.Generator,
    draw: ImageDraw.ImageDraw,
    traces: list[Side],
    size: tuple[int, int],
    ground: Colour,
    copper: Colour,
) -> list[Defect]:
    """Draw a defect of a trace, or near one; none at the border."""
    a, b, thickness = traces[rng.integers(len(traces))]
    share = rng.uniform(0.15, 0.85)
    x, y = a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share
    if not (15 < x < size[0] - 15 and 15 < y < size[1] - 15):
        return []
    kind = int(rng.integers(3)) + 1
    if kind == 1:  # open
        s = thickness / 2 + rng.uniform(1.5, 3)
        draw.ellipse((x - s, y - s, x + s, y + s), ground)
        half = s + 1
    elif kind == 2:  # spur
        s = rng.uniform(2.5, 4.5)
        x += rng.choice([-1, 1]) * thickness * 0.7
        y += rng.choice([-1, 1]) * thickness * 0.7
        draw.polygon([(x + rng.uniform(-s, s), y + rng.uniform(-s, s)) for _ in range(5)], copper)
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), copper)
        half = s + 1
    else:  # spurious copper
        s = rng.uniform(3, 7)
        x += rng.uniform(-20, 20)
        y += rng.uniform(-20, 20)
        draw.ellipse((x - s, y - s * 0.7, x + s, y + s * 0.7), copper)
        half = s
    return [(kind, x - half, y - half, 2 * half, 2 * half)]


def texture(rng: np.random.Generator) -> tuple[Pixels, list[Defect]]:
    """Draw a rough surface: patches, scratches, pits, crazing, smooth spots."""
    side = 300

    def noise(cells: int) -> NDArray:
        return smooth_noise(rng, side, side, cells)

    surface = 120 + 60 * (noise(int(rng.integers(3, 6))) - 0.5)
    surface += 50 * (noise(int(rng.integers(60, 120))) - 0.5)
    if rng.random() < 0.5:
        surface += 12 * np.sin(np.arange(side) / rng.uniform(1.5, 5))[None]
    surface += rng.normal(0, 10, (side, side))
    defects: list[Defect] = []
    rows, columns = np.mgrid[:side, :side]
    for _ in range(rng.integers(1, 4)):
        kind = int(rng.integers(5))
        w, h = rng.uniform(40, 150, 2)
        if kind == 1:
            is_upright = rng.random() < 0.7
            short, long = (8, 25), (80, 250)
            w, h = (rng.uniform(*ends) for ends in ((short, long) if is_upright else (long, short)))
        x, y = rng.uniform(0, max(side - w, 1)), rng.uniform(0, max(side - h, 1))
        w, h = min(w, side - x), min(h, side - y)
        u, v = (columns - x - w / 2) / (w / 2), (rows - y - h / 2) / (h / 2)
        distance = np.sqrt(u * u + v * v) + 0.5 * (noise(12) - 0.5)
        inside = np.clip((1 - distance) * 4, 0, 1)
        if kind == 0:
            surface = surface * (1 - inside * 0.8) + inside * 0.8 * (surface - 55)
        elif kind == 1:
            surface = surface + inside * 70
        elif kind == 2:
            surface = surface - 90 * inside * (noise(60) > 0.72)
        elif kind == 3:
            surface = surface + inside * 35 * np.sign(noise(25) - 0.5)
        else:
            grey = Image.fromarray(surface.clip(0, 255).astype(np.uint8))
            blurred = np.asarray(grey.filter(ImageFilter.BoxBlur(6)))
            surface = surface * (1 - inside) + inside * blurred
        defects.append((kind, x, y, w, h))
    return np.repeat(surface.clip(0, 255).astype(np.uint8)[..., None], 3, 2), defects


Draw = Callable[[np.random.Generator], tuple[Pixels, list[Defect]]]
SETS: dict[str, tuple[Draw, dict[str, int], list[str]]] = {
    "boards": (board, {"train": 120, "val": 40}, ["missing_hole", "open", "spur", "spurious"]),
    "textures": (
        texture,
        {"train": 240, "val": 80},
        ["patch", "scratch", "pits", "crazing", "smooth"],
    ),
}


def write(name: str, out: Path) -> None:
    """Write the images and labels of a set."""
    draw, sizes, classes = SETS[name]
    rng = np.random.default_rng(5)
    for split, count in sizes.items():
        (out / split).mkdir(parents=True, exist_ok=True)
        images, annotations = [], []
        for i in range(count):
            pixels, defects = draw(rng)
            file = f"{split}/{i:04}.jpg"
            Image.fromarray(pixels).save(out / file, quality=92)
            height, width = pixels.shape[:2]
            images.append({"id": i, "file_name": file, "width": width, "height": height})
            annotations += [
                {
                    "id": len(annotations) + 1 + k,
                    "image_id": i,
                    "category_id": kind,
                    "bbox": [round(float(v), 1) for v in box],
                    "area": float(box[2] * box[3]),
                    "iscrowd": 0,
                }
                for k, (kind, *box) in enumerate(defects)
            ]
        categories = [{"id": i, "name": text} for i, text in enumerate(classes)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (out / f"{split}.json").write_text(json.dumps(content), "utf-8")


def main() -> None:
    """Parse the command line and write a set."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=list(SETS))
    parser.add_argument("out", type=Path, help="a new folder")
    options = parser.parse_args()
    write(options.name, options.out)


if __name__ == "__main__":
    main()
