"""A detector of white squares, and images that hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from retinanet.inference import Detector
from retinanet.model.checkpoint import Checkpoint
from white_finder import Pixels, WhiteFinder, black


@pytest.fixture
def checkpoint() -> Checkpoint:
    model: Any = WhiteFinder()
    return Checkpoint(
        model, ("white", "bright"), (7, 9), 64, 128, {"detect": {"score_threshold": 0.5}}
    )


@pytest.fixture
def detector(checkpoint: Checkpoint) -> Detector:
    return Detector(checkpoint, device="cpu", precision="float32")


@pytest.fixture
def square() -> Pixels:
    """128 x 192 pixels, twice the network's: its one white cell is (16, 8, 24, 16) there."""
    return black(128, 192, (32, 16, 48, 32))


@pytest.fixture
def folder(tmp_path: Path, square: Pixels) -> Path:
    """Two images of the same name in two folders, one beside them, and what is no image."""
    root = tmp_path / "images"
    for name in ("a.png", "left/a.png", "right/a.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(square).save(root / name)
    (root / "notes.txt").write_text("not an image")
    (root / "._a.png").write_text("what macOS leaves")
    return root
