"""Images for labelled folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from labelled_folders import MakeImage
from PIL import Image


@pytest.fixture
def make_image() -> MakeImage:
    """Makes an image of noise, another for each seed; (width, height) as PIL has it."""

    def make(path: Path, size: tuple[int, int] = (40, 30), seed: int = 0, **save: Any) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, **save)
        return path

    return make
