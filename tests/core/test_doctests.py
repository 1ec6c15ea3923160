"""The examples in docstrings run and give the values they state."""

from __future__ import annotations

import doctest
from importlib import import_module
from types import ModuleType

import pytest
import torch

MODULES = [
    "boxes",
    "anchors",
    "matching",
    "losses.focal",
    "losses.detection",
    "postprocess",
    "structures",
    "config",
    *("losses.modules", "model.heads", "paper.budget", "report.html", "report.speed_accuracy"),
    *("training.optim", "training.step", "training.time_limit"),
]


def run(module: ModuleType) -> doctest.TestResults:
    return doctest.testmod(module, extraglobs={"torch": torch})


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    assert run(import_module(f"retinanet.{name}")).failed == 0


def test_focal_loss_has_an_example() -> None:
    assert run(import_module("retinanet.losses.focal")).attempted >= 4
