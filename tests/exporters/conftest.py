"""A tiny random detector whose scores are spread out, as a checkpoint and in float32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

from retinanet.inference import Detector
from retinanet.model.checkpoint import Checkpoint, save_checkpoint
from tiny_backbone import tiny_network

DETECT = {
    "score_threshold": 0.3,
    "topk_candidates": 50,
    "nms_threshold": 0.5,
    "detections_per_image": 20,
    "class_agnostic_nms": False,
}


@pytest.fixture(scope="session")
def checkpoint() -> Checkpoint:
    model = tiny_network(3, norm="frozen", spread=True)
    model.class_head.last.weight.data.mul_(8)
    nn.init.constant_(model.class_head.last.bias, -3.0)
    model.box_head.last.weight.data.mul_(0.02)  # else boxes cover all or nothing
    return Checkpoint(model, ("ä", "b", "c"), (7, 9, 11), 64, 96, {"detect": DETECT})


@pytest.fixture(scope="session")
def run(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("run") / "model", checkpoint)


@pytest.fixture(scope="session")
def eager(checkpoint: Checkpoint) -> Detector:
    return Detector(checkpoint, device="cpu", precision="float32")


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of noise: wide, tall, small, of the network's size, limited by the longer side."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i, (height, width) in enumerate([(120, 170), (170, 120), (20, 24), (64, 64), (40, 300)]):
        pixels = random.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(folder / f"{i}.png")
    return folder
