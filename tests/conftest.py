"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets; tests that read it are marked ``data`` and skip without it."""
    default = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
    folder = Path(os.environ.get("RETINANET_DATA", default)).resolve()
    if not (folder / "bccd").is_dir():
        pytest.skip(f"no real data at {folder}; set RETINANET_DATA to its folder")
    return folder


@pytest.fixture(scope="session")
def real_weights(real_data: Path) -> Path:
    """An ImageNet MobileNetV2 backbone, kept beside the real data."""
    file = real_data.parent / "weights" / "mobilenet_v2_imagenet.safetensors"
    if not file.is_file():
        pytest.skip(f"no backbone weights at {file}")
    return file
