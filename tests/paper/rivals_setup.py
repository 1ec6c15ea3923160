"""Tiny rivals and batches, for the tests of rivals."""

from __future__ import annotations

import torch

from retinanet.config import Recipe, load_recipe
from retinanet.paper.rivals import RivalNetwork, build_rival
from retinanet.structures import Batch, pad_targets

SETTINGS = (
    "model.backbone=tiny",
    "model.backbone_weights=none",
    "model.norm=group",
    "model.frozen_stages=0",
    "model.channels=16",
    "anchors.sizes=[8, 16, 32, 64, 128]",
    "data.image_size=64",
    "data.max_size=64",
    "data.workers=0",
    "data.scale_jitter=[1.0, 1.0]",
    "train.batch_size=4",
    "train.reference_batch=4",
    "train.warmup_steps=0",
    "train.precision=float32",
    "train.deterministic=true",
)


def rival_recipe(*settings: str) -> Recipe:
    return load_recipe("paper_quick", [*SETTINGS, *settings])


def tiny_rival(name: str, *settings: str, classes: int = 3) -> RivalNetwork:
    torch.manual_seed(0)
    return build_rival(name, rival_recipe(*settings), [f"class {k}" for k in range(classes)])


def batch_of(
    height: int = 64,
    width: int = 64,
    boxes: tuple[tuple[tuple[float, ...], ...], ...] = (
        ((4.0, 6.0, 24.0, 30.0), (30.0, 30.0, 60.0, 62.0)),
        ((10.0, 8.0, 40.0, 36.0),),
    ),
    labels: tuple[tuple[int, ...], ...] = ((0, 2), (1,)),
) -> Batch:
    """Random images of the same size, without padding, with these objects."""
    pixels = torch.Generator().manual_seed(1)
    images = torch.randint(
        0, 256, (len(boxes), 3, height, width), dtype=torch.uint8, generator=pixels
    )
    sizes = torch.tensor([[height, width]] * len(boxes))
    targets = pad_targets(
        [torch.tensor(of_image).reshape(-1, 4) for of_image in boxes],
        [torch.tensor(of_image, dtype=torch.int64) for of_image in labels],
    )
    return Batch(images, targets, sizes, sizes.clone(), torch.arange(len(boxes)))
