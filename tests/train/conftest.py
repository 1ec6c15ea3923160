"""A tiny labelled folder for the tests of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from retinanet.data.synthetic import synthetic_dataset


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-data")
    synthetic_dataset(folder, splits={"train": 12, "val": 4}, image_size=64, seed=3)
    return folder
