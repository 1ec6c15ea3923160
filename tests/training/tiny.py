"""A recipe small enough to train in seconds, for the tests of this folder."""

from __future__ import annotations

from retinanet.config import Recipe, load_recipe

TINY = (
    "model.backbone=mobilenet_v2",
    "model.backbone_weights=none",
    "model.norm=group",
    "model.frozen_stages=0",
    "model.channels=16",
    "model.head_depth=1",
    "data.image_size=64",
    "data.max_size=64",
    "data.workers=0",
    "data.scale_jitter=[1.0, 1.0]",
    "train.batch_size=4",
    "train.warmup_steps=0",
    "train.precision=float32",
    "train.deterministic=true",
)


def tiny_recipe(*settings: str) -> Recipe:
    """The tiny recipe with further settings over it."""
    return load_recipe("quick", [*TINY, *settings])
