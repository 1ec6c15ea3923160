"""torch.set_default_dtype changes nothing: training, detection and losses name their own types."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import retinanet as rn

SETTINGS = (
    "model.backbone=mobilenet_v2",
    "model.backbone_weights=none",
    "model.norm=group",
    "model.channels=16",
    "model.head_depth=1",
    "data.image_size=64",
    "data.max_size=64",
    "data.workers=0",
    "data.colour=0.5",
    "data.scale_jitter=[0.5, 2.0]",
    "data.crop=true",
    "data.any_corner=true",
    "train.epochs=1",
    "train.min_steps=2",
    "train.batch_size=4",
    "train.precision=float32",
    "train.deterministic=true",
    "train.ema=0.9",
    "train.clip_norm=1.0",
    "train.warmup_steps=1",
)


@pytest.fixture
def default_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rn.synthetic_dataset(folder, splits={"train": 8, "val": 2}, image_size=64, seed=3)
    return folder


def train_and_detect(data: Path, out: Path, normalizer: str) -> tuple[list[float], rn.Found]:
    """Logged losses of a run of two steps, and detections of its model in tiles."""
    settings = (*SETTINGS, f"loss.normalizer={normalizer}")
    run = rn.train(data, out=out, settings=settings, device="cpu")
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses = [step["loss"] for step in steps if "loss" in step]
    detector = rn.Detector(rn.load_checkpoint(run.model), device="cpu", score_threshold=0.001)
    image = np.random.default_rng(0).integers(0, 256, (96, 160, 3), dtype=np.uint8)
    return losses, detector.detect(image, tile=64)


@pytest.fixture(scope="module")
def expected(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], rn.Found]:
    return train_and_detect(data, tmp_path_factory.mktemp("out") / "run", "running")


@pytest.mark.usefixtures("default_float64")
def test_training_and_detection_under_default_float64_equal_float32(
    data: Path, tmp_path: Path, expected: tuple[list[float], rn.Found]
) -> None:
    losses, detections = train_and_detect(data, tmp_path / "run", "running")
    assert len(losses) > 0
    assert losses == pytest.approx(expected[0], rel=1e-5)
    assert len(detections.scores) == len(expected[1].scores) > 0
    np.testing.assert_allclose(detections.scores, expected[1].scores, atol=1e-5)
    np.testing.assert_allclose(detections.boxes, expected[1].boxes, atol=1e-2)


@pytest.mark.usefixtures("default_float64")
def test_losses_under_default_float64_stay_float32() -> None:
    logits = torch.zeros(5, 3, dtype=torch.float32)
    labels = torch.tensor([0, 1, 2, -1, -2])
    for loss in (rn.focal_loss, rn.cross_entropy, rn.focal_loss_star, rn.hinge_loss):
        assert loss(logits, labels).dtype == torch.float32


@pytest.mark.usefixtures("default_float64")
def test_network_under_default_float64_has_the_weights_of_float32() -> None:
    def build() -> rn.RetinaNet:
        torch.manual_seed(0)
        return rn.build_retinanet(
            backbone="resnet18", num_classes=2, channels=8, norm="group", backbone_weights="none"
        )

    model = build()
    torch.set_default_dtype(torch.float32)
    for value, other in zip(
        model.state_dict().values(), build().state_dict().values(), strict=True
    ):
        torch.testing.assert_close(value, other, rtol=0, atol=0)
