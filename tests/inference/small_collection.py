"""A checkpoint of a small network with random weights, images, and the rows of a collection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from retinanet.inference import Failure, load
from retinanet.model.checkpoint import Checkpoint, save_checkpoint
from retinanet.model.retinanet import RetinaNet

SETTINGS: dict[str, Any] = {"device": "cpu", "precision": "float32"}


def save_small_model(folder: Path, seed: int = 0, backbone: str = "tiny") -> Path:
    """Save random weights that give different scores."""
    torch.manual_seed(seed)
    model = RetinaNet(backbone=backbone, num_classes=2, channels=16, head_depth=1, prior=0.1)
    for weights in model.parameters():
        if weights.dim() == 4 and weights.shape[1] > 1:
            torch.nn.init.kaiming_normal_(weights)
    with torch.no_grad():
        model.class_head.last.weight.mul_(200)
    info = {"detect": {"score_threshold": 0.2, "detections_per_image": 5}}
    return save_checkpoint(folder, Checkpoint(model, ("white", "bright"), (7, 9), 64, 128, info))


def save_images(folder: Path, count: int) -> Path:
    """Save images of noise, of different sizes."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        height, width = rng.integers(40, 120, 2)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


def local_rows(model: Path, sources: Any) -> list[dict[str, Any]]:
    """Rows of the local engine."""
    results = load(model, **SETTINGS).stream(sources)
    return [result.to_dict() for result in results if not isinstance(result, Failure)]


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Rows of a collection, in the order of its shards."""
    import pyarrow.parquet as pq

    files = sorted((out / "parquet").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def assert_same_rows(
    found: list[dict[str, Any]], expected: list[dict[str, Any]], *, names: bool = True
) -> None:
    """Compare the rows of two engines, up to the last digits."""
    assert sum(len(row["detections"]) for row in expected) > len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        for key in ("file", "height", "width") if names else ("height", "width"):
            assert ours[key] == theirs[key]
        for a, b in zip(ours["detections"], theirs["detections"], strict=True):
            assert (a["class"], a["category_id"]) == (b["class"], b["category_id"])
            assert a["score"] == pytest.approx(b["score"], abs=1e-4)
            assert a["box"] == pytest.approx(b["box"], abs=0.01)
