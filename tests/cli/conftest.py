"""A tiny data set in four formats, a run trained on it, and the command line as a function."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from retinanet.cli import main
from retinanet.data import convert
from retinanet.data.synthetic import synthetic_dataset

TINY = (
    "auto=false",
    "--backbone=tiny",
    "--backbone-weights=none",
    "--batch-size=2",
    "--image-size=64",
    "model.channels=16",
    "model.head_depth=1",
    "model.norm=trained",
    "anchors.sizes=[16,32,64,128,256]",
    "data.workers=0",
    "train.warmup_steps=0",
    "train.precision=float32",
)
"""A network that trains in a second."""


@dataclass(frozen=True)
class Ended:
    """Result of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as JSON."""
        return json.loads(self.out)


Cli = Callable[..., Ended]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line with these arguments, in this process."""

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ended(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def tiny_sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the same eight images as COCO, VOC, YOLO and CSV, by format."""
    folder = tmp_path_factory.mktemp("tiny")
    synthetic_dataset(
        folder / "coco",
        splits={"train": 4, "val": 2, "test": 2},
        image_size=64,
        objects=(1, 2),
        object_size=(16, 24),
        empty=0.0,
    )
    for form in ("voc", "yolo", "csv"):
        convert(folder / "coco", folder / form, form)
    return {form: folder / form for form in ("coco", "voc", "yolo", "csv")}


@pytest.fixture(scope="session")
def tiny_run(tiny_sets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run of two steps; tests do not change it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main(["train", str(tiny_sets["coco"]), *TINY, "--steps=2", f"--out={folder}"]) == 0
    return folder
