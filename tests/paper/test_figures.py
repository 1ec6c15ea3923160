"""The numbers of the figures: hand-computed losses, Appendix B's slopes, shapes of networks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from retinanet.model.retinanet import RetinaNet
from retinanet.paper.figures import (
    PAPER_EFFECTIVE,
    focal_curves,
    read_architecture,
    star_curves,
    variant_curves,
    variant_slopes,
)
from retinanet.report.paper_plots import Convolution


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_figure_1_by_hand() -> None:
    curves = {curve.label: curve for curve in focal_curves(points=999)}  # p = .001, .002, .. .999
    assert list(curves) == ["γ = 0 (CE)", "γ = 0.5", "γ = 1", "γ = 2", "γ = 5"]
    ce, fl = curves["γ = 0 (CE)"], curves["γ = 2"]
    np.testing.assert_allclose(ce.x, np.arange(1, 1000) / 1000)
    np.testing.assert_allclose(ce.y, -np.log(ce.x), rtol=1e-9)
    np.testing.assert_allclose(curves["γ = 5"].y, -((1 - np.array(ce.x)) ** 5) * np.log(ce.x))
    # Sec. 3.2: at p_t = .9 a hundred times less than CE, at .968 a thousand times (1 / .032^2 is
    # 977), at .5 four times.
    for p, times in ((900, 100), (968, 976.56), (500, 4)):
        assert ce.y[p - 1] / fl.y[p - 1] == pytest.approx(times, rel=1e-4)


def test_figure_5_by_hand() -> None:
    ce, fl, star, steep = variant_curves(points=13)  # x_t = -6, -5, .. 6
    assert [curve.label for curve in (ce, fl, star, steep)] == [
        "CE", "FL γ = 2", "FL* γ = 2, β = 1", "FL* γ = 4, β = 0",
    ]  # fmt: skip
    for i, x in enumerate(range(-6, 7)):
        p = sigmoid(x)
        assert ce.x[i] == x
        assert ce.y[i] == pytest.approx(-math.log(p))
        assert fl.y[i] == pytest.approx(-((1 - p) ** 2) * math.log(p))
        assert star.y[i] == pytest.approx(-math.log(sigmoid(2 * x + 1)) / 2)
        assert steep.y[i] == pytest.approx(-math.log(sigmoid(4 * x)) / 4)


def test_figure_6_is_appendix_b() -> None:
    # dCE/dx = y (p_t - 1); dFL/dx = y (1 - p_t)^g (g p_t log p_t + p_t - 1);
    # dFL*/dx = y (p_t* - 1).
    ce, fl, star, steep = variant_slopes(points=49)
    for i, x in enumerate(np.linspace(-6, 6, 49)):
        p = sigmoid(x)
        assert ce.y[i] == pytest.approx(p - 1)
        assert fl.y[i] == pytest.approx((1 - p) ** 2 * (2 * p * math.log(p) + p - 1))
        assert star.y[i] == pytest.approx(sigmoid(2 * x + 1) - 1)
        assert steep.y[i] == pytest.approx(sigmoid(4 * x) - 1)


def test_figure_7_marks_effective_settings() -> None:
    curves = {(curve.gamma, curve.beta): curve for curve in star_curves(points=5)}
    assert len(curves) == 12
    assert {key for key, curve in curves.items() if curve.effective} == {(2.0, 1.0), (4.0, 0.0)}
    assert all(curve.effective in (True, None) for curve in curves.values())
    assert curves[3.0, 1.0].x == (-6, -3, 0, 3, 6)
    for i, x in enumerate((-6, -3, 0, 3, 6)):
        expected = -math.log(sigmoid(3 * x + 1)) / 3
        assert curves[3.0, 1.0].y[i] == pytest.approx(expected)
    measured = {**PAPER_EFFECTIVE, (1, 2): False, (7.5, 0.25): True}
    curves = {(curve.gamma, curve.beta): curve for curve in star_curves(measured, points=5)}
    assert len(curves) == 13
    assert curves[1.0, 2.0].effective is False
    assert curves[7.5, 0.25].effective is True
    assert {curve.effective for curve in star_curves({}, points=5)} == {None}


def test_architecture_of_the_paper() -> None:
    # Figure 3 and Sec. 4 for ResNet-50 and 80 classes.
    found = read_architecture(RetinaNet(backbone="resnet50", num_classes=80), 800, 1024)
    assert [
        (level.name, level.stride, level.channels, level.height, level.width)
        for level in found.maps
    ] == [
        ("C3", 8, 512, 100, 128),
        ("C4", 16, 1024, 50, 64),
        ("C5", 32, 2048, 25, 32),
    ]
    levels = [
        (level.name, level.stride, level.channels, level.height, level.width)
        for level in found.levels
    ]
    assert levels == [
        ("P3", 8, 256, 100, 128),
        ("P4", 16, 256, 50, 64),
        ("P5", 32, 256, 25, 32),
        ("P6", 64, 256, 13, 16),
        ("P7", 128, 256, 7, 8),
    ]
    assert [level.source for level in found.levels] == ["C3", "C4", "C5", "C5", "P6"]
    assert [level.convolution for level in found.levels] == [
        Convolution(1, 1, 512, 256),
        Convolution(1, 1, 1024, 256),
        Convolution(1, 1, 2048, 256),
        Convolution(3, 2, 2048, 256),
        Convolution(3, 2, 256, 256),
    ]
    assert [level.output for level in found.levels] == [Convolution(3, 1, 256, 256)] * 3 + [
        None
    ] * 2
    tower = (Convolution(3, 1, 256, 256),) * 4
    assert found.class_subnet.convolutions == (*tower, Convolution(3, 1, 256, 720))
    assert found.box_subnet.convolutions == (*tower, Convolution(3, 1, 256, 36))
    assert (found.class_subnet.outputs, found.box_subnet.outputs) == (80, 4)
    # (100 * 128 + 50 * 64 + 25 * 32 + 13 * 16 + 7 * 8) * 9
    assert found.anchors == 153_576
    assert (found.backbone, found.height, found.width) == ("resnet50", 800, 1024)


@pytest.mark.parametrize(
    ("changes", "first", "sources", "channels"),
    [
        (
            {"backbone": "mobilenet_v2", "p2": True, "p6_from": "p5", "stride_padding": "same"},
            2,
            ["C2", "C3", "C4", "C5", "P5", "P6"],
            [24, 32, 96, 1280],
        ),
        (
            {"backbone": "resnet18", "norm": "group", "head_norm": "group", "head_depth": 0},
            3,
            ["C3", "C4", "C5", "C5", "P6"],
            [128, 256, 512],
        ),
    ],
)
def test_architecture_of_others(
    changes: dict[str, Any], first: int, sources: list[str], channels: list[int]
) -> None:
    options = {"num_classes": 3, "channels": 16, "head_depth": 1, "scales": (1.0,), **changes}
    model = RetinaNet(**options)
    found = read_architecture(model, 250, 333)
    assert (found.height, found.width) == (256, 352)
    assert [level.name for level in found.levels] == [f"P{i}" for i in range(first, 8)]
    assert [level.stride for level in found.levels] == list(model.strides)
    assert [level.channels for level in found.maps] == channels
    assert [level.source for level in found.levels] == sources
    assert {level.channels for level in found.levels} == {options["channels"]}
    assert [len(level.convolutions) for level in (found.class_subnet, found.box_subnet)] == [
        options["head_depth"] + 1
    ] * 2
    assert found.class_subnet.convolutions[-1].out_channels == 9
    assert (found.class_subnet.per_cell, found.class_subnet.outputs) == (3, 3)
    with torch.no_grad():
        outputs = model.eval()(torch.zeros(1, 3, 256, 352))
    assert [(level.height, level.width) for level in found.levels] == [
        tuple(level.shape[-2:]) for level in outputs.logits
    ]


def test_architecture_of_a_small_image() -> None:
    model = RetinaNet(backbone="resnet18", num_classes=2, norm="trained", channels=16)
    last = read_architecture(model, 32, 32).levels[-1]
    assert (last.height, last.width) == (1, 1)
