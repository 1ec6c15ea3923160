"""The Python in README and docs runs as it is printed."""

from __future__ import annotations

import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import retinanet as rn
from retinanet.config import load_recipe
from retinanet.data.synthetic import synthetic_dataset
from retinanet.training.trainer import train

_ROOT = Path(__file__).resolve().parents[1]
_BLOCKS = [
    pytest.param(block, id=f"{file.name}-{i}")
    for file in (_ROOT / "README.md", *sorted((_ROOT / "docs").glob("*.md")))
    for i, block in enumerate(
        re.findall(r"^```python\n(.*?)^```", file.read_text("utf-8"), re.M | re.S)
    )
]
_TINY = (
    "auto=false",
    "model.backbone=mobilenet_v2",
    "model.backbone_weights=none",
    "model.norm=group",
    "model.channels=16",
    "model.head_depth=1",
    "data.image_size=64",
    "data.max_size=64",
    "data.workers=0",
    "train.steps=2",
    "train.batch_size=2",
)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the examples speak of: cells/, runs/cells, street.jpg."""
    folder = tmp_path_factory.mktemp("desk")
    splits = synthetic_dataset(folder / "cells", splits={"train": 4, "val": 2}, image_size=64)
    train(load_recipe("quick", _TINY), splits, folder / "runs" / "cells", device="cpu")
    shutil.copy(splits["val"].images[0].path, folder / "street.jpg")
    return folder


def test_there_are_examples() -> None:
    assert len(_BLOCKS) >= 6


@pytest.mark.parametrize("block", _BLOCKS)
def test_example_runs(block: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)
    if "rn.train(" in block:
        # Its backbone's weights would be fetched: that the call fits the signature is what counts.
        signature = inspect.signature(rn.train)

        def called(*arguments: Any, **named: Any) -> Any:
            signature.bind(*arguments, **named)
            return train(load_recipe("quick", _TINY), desk / "cells", desk / "again", device="cpu")

        monkeypatch.setattr(rn, "train", called)
    names = {"logits": torch.zeros(5, 3), "labels": torch.tensor([0, 1, 2, -1, -2])}
    exec(compile(block, "example", "exec"), names)
