"""A real checkpoint of a small network, images for it, and what it finds in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from retinanet.inference import load
from retinanet.inference.detections import Failure
from retinanet.model.checkpoint import Checkpoint, save_checkpoint
from retinanet.model.retinanet import RetinaNet

SETTINGS: dict[str, Any] = {"device": "cpu", "precision": "float32"}


def save_small_model(folder: Path, seed: int = 0) -> Path:
    """Random weights, large enough that scores differ."""
    torch.manual_seed(seed)
    model = RetinaNet(backbone="mobilenet_v2", num_classes=2, channels=16, head_depth=1, prior=0.1)
    for weights in model.parameters():
        if weights.dim() == 4 and weights.shape[1] > 1:
            torch.nn.init.kaiming_normal_(weights)
    with torch.no_grad():
        model.class_head.last.weight.mul_(200)
    info = {"detect": {"score_threshold": 0.2, "detections_per_image": 5}}
    return save_checkpoint(folder, Checkpoint(model, ("white", "bright"), (7, 9), 64, 128, info))


def save_images(folder: Path, count: int, seed: int = 0) -> Path:
    """Of noise, each another size."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        height, width = rng.integers(40, 120, 2)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


def local_rows(model: Path, sources: Any, batch_size: int = 1) -> list[dict[str, Any]]:
    """What the local engine finds."""
    streamed = load(model, **SETTINGS).stream(sources, batch_size=batch_size)
    return [one.to_dict() for one in streamed if not isinstance(one, Failure)]


def jsonl_rows(out: Path) -> list[dict[str, Any]]:
    """What a collection found, in the order of its shards."""
    files = sorted((out / "jsonl").iterdir())
    return [json.loads(line) for file in files for line in file.read_text("utf-8").splitlines()]


def parquet_rows(out: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    files = sorted((out / "parquet").iterdir())
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def shard_metadata(out: Path) -> list[dict[str, Any]]:
    """Return the metadata of the shards that exist."""
    import pyarrow.parquet as pq

    files = sorted((out / "parquet").glob("*.parquet"))
    return [json.loads(pq.read_metadata(file).metadata[b"retinanet"]) for file in files]


def assert_same_rows(
    found: list[dict[str, Any]], expected: list[dict[str, Any]], *, names: bool = True
) -> None:
    """That two engines found the same, but for the last digits."""
    assert len(found) == len(expected)
    assert sum(len(row["detections"]) for row in expected) > len(expected)
    for one, other in zip(found, expected, strict=True):
        for key in ("file", "height", "width") if names else ("height", "width"):
            assert one[key] == other[key]
        assert len(one["detections"]) == len(other["detections"])
        for a, b in zip(one["detections"], other["detections"], strict=True):
            assert (a["class"], a["category_id"]) == (b["class"], b["category_id"])
            assert a["score"] == pytest.approx(b["score"], abs=1e-4)
            assert a["box"] == pytest.approx(b["box"], abs=0.01)
