"""Label texts for small folders in each format."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from retinanet.config import DataConfig
from retinanet.data import Dataset, loading
from retinanet.data.loading import BatchLoader
from retinanet.structures import Batch

MakeImage = Callable[..., Path]
"""The fixture ``image``: (path, (width, height), seed, **PIL's save options)."""


def coco_json(
    images: Sequence[dict[str, Any]],
    annotations: Sequence[dict[str, Any]] = (),
    names: Sequence[str] = ("cat", "dog"),
) -> str:
    """COCO's text; categories are numbered from 1."""
    categories = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return json.dumps(content)


def coco_image(id_: int, name: str, size: tuple[int, int] = (40, 30)) -> dict[str, Any]:
    return {"id": id_, "file_name": name, "width": size[0], "height": size[1]}


def coco_object(id_: int, image: int, box: Any, category: Any = 1, **more: Any) -> dict[str, Any]:
    return {"id": id_, "image_id": image, "category_id": category, "bbox": box, **more}


def voc_xml(
    name: str,
    objects: Sequence[tuple[str, Sequence[Any]]] = (),
    size: tuple[int, int] | None = (40, 30),
    more: str = "",
) -> str:
    """VOC's text; a box is xmin, ymin, xmax, ymax."""
    sized = (
        f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
        if size
        else ""
    )
    things = "".join(
        f"<object><name>{label}</name>{more}<bndbox><xmin>{a}</xmin><ymin>{b}</ymin>"
        f"<xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
        for label, (a, b, c, d) in objects
    )
    return f"<annotation><filename>{name}</filename>{sized}{things}</annotation>"


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def train_loader(
    dataset: Dataset, *, steps: int, start_step: int = 0, **options: Any
) -> BatchLoader:
    """The loader of training; what is no argument of it is one of ``DataConfig``."""
    arguments = inspect.signature(loading.train_loader).parameters
    own = {name: options.pop(name) for name in list(options) if name in arguments}
    numbers = range(start_step, steps)
    config = DataConfig().model_copy(update=options)  # smaller images than a recipe may have
    return loading.train_loader(dataset, config, steps=numbers, **own)


def training(dataset: Dataset, **changes: Any) -> list[Batch]:
    """Batches of training with every augmentation."""
    options: dict[str, Any] = {
        "batch_size": 4,
        "steps": 7,
        "seed": 5,
        "image_size": 32,
        "max_size": 64,
        "scale_jitter": (0.6, 1.6),
        "crop": True,
        "colour": 0.5,
        "vertical_flip": 0.5,
    }
    return list(train_loader(dataset, **(options | changes)))


def assert_same(first: Iterable[Batch], second: Iterable[Batch]) -> None:
    """Assert that two series of batches are equal in every bit."""
    for batch, other in zip(first, second, strict=True):
        for name in ("images", "sizes", "original_sizes", "indices"):
            assert torch.equal(getattr(batch, name), getattr(other, name)), name
        assert torch.equal(batch.targets.boxes, other.targets.boxes)
        assert torch.equal(batch.targets.labels, other.targets.labels)
