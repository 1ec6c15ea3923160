"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# With `pytest -n` each worker takes its share of the processors, and so do the processes that its
# tests start: threads that wait for each other would cost more than they give. Before torch.
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if _WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _WORKERS)))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


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
