"""A small labelled folder of coloured rectangles."""

from __future__ import annotations

from pathlib import Path

import pytest
from painter import write_painted

from retinanet.data import read_dataset
from retinanet.data.dataset import Dataset


@pytest.fixture(scope="session")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A COCO folder of four images: a red and a green rectangle in each, a blue one in one."""
    return write_painted(tmp_path_factory.mktemp("painted"))


@pytest.fixture
def val(painted: Path) -> Dataset:
    return read_dataset(painted, "val")
