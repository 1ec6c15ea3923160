"""A recipe small enough to train in seconds, and helpers to look at its runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import tiny_backbone  # noqa: F401
from retinanet.config import Recipe, load_recipe
from retinanet.training.events import Event

TINY = (
    "model.backbone=tiny",
    "model.backbone_weights=none",
    "model.norm=group",
    "model.frozen_stages=0",
    "model.channels=16",
    "model.head_depth=1",
    "data.image_size=64",
    "data.max_size=64",
    "data.workers=0",
    "data.scale_jitter=[1.0, 1.0]",
    "train.batch_size=4",
    "train.warmup_steps=0",
    "train.precision=float32",
    "train.tune_detection=false",
    "train.deterministic=true",
)


class Stop(Exception):
    """Raised by an event callback, as if the process were killed."""


def tiny_recipe(*settings: str) -> Recipe:
    """The tiny recipe with further settings over it."""
    return load_recipe("paper_quick", [*TINY, *settings])


def stop_at(step: int) -> Callable[[Event], None]:
    """A callback that raises :class:`Stop` after a step."""

    def callback(event: Event) -> None:
        if event.kind == "step" and event.data["step"] == step:
            raise Stop

    return callback


def read_log(run: Path) -> list[dict[str, Any]]:
    """Lines of the log without times and memory."""
    timed = {"seconds", "images_per_second", "waiting", "memory_mb", "seconds_left"}
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def steps_of(run: Path) -> list[int]:
    """Steps in the log, without validations."""
    return [line["step"] for line in read_log(run) if "loss_box" in line]


def messages(events: list[Event]) -> list[str]:
    return [event.data["message"] for event in events if event.kind == "message"]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    """Compare the last weights of two runs bit for bit."""
    expected, found = weights(first / "last"), weights(second / "last")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
