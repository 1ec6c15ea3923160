"""Steps, learning rates and parameter groups, against numbers by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from retinanet.config import TrainConfig
from retinanet.training.optim import build_optimizer, resolve_steps
from retinanet.training.step import lr_factor, set_lr


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (10, 100),  # 2 x 10 / 4 = 5, under min_steps
        (400, 200),  # 2 x 400 / 4
        (401, 201),  # 200.5 rounded up: the last images count
        (10_000, 300),  # 5,000, over max_steps
    ],
)
def test_resolve_steps_from_epochs_within_limits(images: int, expected: int) -> None:
    settings = TrainConfig(steps=7, epochs=2, min_steps=100, max_steps=300, batch_size=4)
    assert resolve_steps(images, settings) == expected


def test_resolve_steps_without_epochs_ignores_the_limits() -> None:
    assert resolve_steps(5, TrainConfig(steps=7, min_steps=9, max_steps=9, batch_size=1)) == 7


def test_lr_factor_warmup_is_linear_and_reaches_one() -> None:
    settings = TrainConfig(milestones=(0.5,), warmup_steps=4)
    assert [lr_factor(s, 100, settings) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_lr_factor_cosine_falls_from_one_to_almost_zero() -> None:
    cosine = TrainConfig(schedule="cosine")
    assert lr_factor(0, 100, cosine) == 1.0
    assert lr_factor(50, 100, cosine) == pytest.approx(0.5)
    assert 0 < lr_factor(99, 100, cosine) < 0.001


class _TwoParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(1, 1, 1)
        self.head = nn.Conv2d(1, 1, 1)
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_build_optimizer_biases_do_not_decay_and_the_backbone_has_its_share(kind: Any) -> None:
    model = _TwoParts()
    settings = TrainConfig(optimizer=kind, lr=1.0, weight_decay=0.1, backbone_lr_factor=0.25)
    optimizer = build_optimizer(model, settings)
    set_lr(optimizer, 2.0)
    found = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found == {
        id(model.backbone.weight): (0.5, 0.1),
        id(model.backbone.bias): (0.5, 0.0),
        id(model.head.weight): (2.0, 0.1),
        id(model.head.bias): (2.0, 0.0),
    }


def test_sgd_step_by_hand() -> None:
    model = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    optimizer = build_optimizer(model, TrainConfig(lr=0.1, momentum=0.9, weight_decay=0.5))
    for expected in (
        0.75,  # velocity = 2 + .5 * 1 = 2.5; 1 - .1 * 2.5
        0.2875,  # velocity = .9 * 2.5 + 2 + .5 * .75 = 4.625; .75 - .4625
    ):
        model.weight.grad = torch.full_like(model.weight, 2.0)
        optimizer.step()
        assert model.weight.item() == pytest.approx(expected)
