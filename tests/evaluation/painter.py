"""Coloured rectangles, a detector that detects them exactly, and a tiny network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from retinanet.anchors import default_anchor_spec, feature_sizes, level_anchors
from retinanet.boxes import encode_boxes
from retinanet.data.dataset import Dataset
from retinanet.evaluation.metrics import Metrics
from retinanet.evaluation.run import evaluate
from retinanet.model.checkpoint import Checkpoint
from retinanet.structures import Outputs
from tiny_backbone import tiny_network

COLOURS = {"red": 0, "green": 1, "blue": 2}
SIZES = ((64, 96), (96, 64), (64, 96), (80, 80))  # (height, width)
PLAIN: dict[str, Any] = {"device": "cpu", "precision": "float32"}


def write_painted(folder: Path) -> Path:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, (height, width) in enumerate(SIZES):
        pixels = np.zeros((height, width, 3), np.uint8)
        boxes = {"red": [4 + i, 6, 24, 20], "green": [30, 36, 28, 24]}
        if i == 2:
            boxes["blue"] = [60, 5, 30, 22]
        for name, (x, y, w, h) in boxes.items():
            pixels[y : y + h, x : x + w, COLOURS[name]] = 255
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 100 + i,
                    "category_id": 10 * (COLOURS[name] + 1),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
        Image.fromarray(pixels).save(folder / f"{i}.png")
        images.append({"id": 100 + i, "file_name": f"{i}.png", "width": width, "height": height})
    categories = [{"id": 10 * (k + 1), "name": name} for name, k in COLOURS.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "val.json").write_text(json.dumps(content))
    return folder


def without_splits(painted: Path, folder: Path) -> Path:
    """The images in a folder whose label file names no split."""
    folder.mkdir()
    for file in painted.glob("*.png"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "labels.json").write_text((painted / "val.json").read_text())
    return folder


class Painter(nn.Module):
    """A detector of coloured rectangles on black: class k has the colour `channels[k]`."""

    def __init__(self, channels: Sequence[int] = (0, 1, 2)) -> None:
        super().__init__()
        self.channels = tuple(channels)
        self.num_classes = len(channels)
        self.anchors = default_anchor_spec()
        self.register_buffer("pixel_mean", torch.zeros(3))

    def forward(self, images: Tensor) -> Outputs:
        _, _, height, width = images.shape
        shapes = feature_sizes(self.anchors.strides, height, width)
        levels = level_anchors(self.anchors, shapes)
        anchors = torch.cat(levels)
        logits = torch.full((len(images), len(anchors), self.num_classes), -9.0)
        deltas = torch.zeros(len(images), len(anchors), 4)
        for i, image in enumerate(images.float()):
            for label, channel in enumerate(self.channels):
                rows, columns = torch.nonzero(image[channel] > 127, as_tuple=True)
                if not len(rows):
                    continue
                box = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                best = int((anchors - box).abs().sum(1).argmin())
                logits[i, best, label] = 4.0 + label
                deltas[i, best] = encode_boxes(anchors[best], box.float())
        cut = [len(level) for level in levels]

        def to_levels(flat: Tensor) -> tuple[Tensor, ...]:
            return tuple(
                part.reshape(len(images), h, w, -1).permute(0, 3, 1, 2)
                for part, (h, w) in zip(flat.split(cut, dim=1), shapes, strict=True)
            )

        return Outputs(to_levels(logits), to_levels(deltas))


def eval_painter(
    model: nn.Module,
    dataset: Dataset,
    info: dict[str, Any] | None = None,
    sizes: tuple[int, int] = (128, 256),
    **options: Any,
) -> Metrics:
    """Evaluate a module that is no RetinaNet; `info` is that of its checkpoint."""
    classes, ids = dataset.classes, dataset.category_ids
    checkpoint = Checkpoint(model, classes, ids, *sizes, info or {})  # type: ignore[arg-type]
    return evaluate(checkpoint, dataset, **{"batch_size": 3, "workers": 0, **PLAIN, **options})


def tiny_checkpoint(classes: tuple[str, ...] = ("red", "green", "blue"), **info: Any) -> Checkpoint:
    return Checkpoint(
        tiny_network(len(classes)), classes, tuple(range(len(classes))), 64, 96, dict(info)
    )
