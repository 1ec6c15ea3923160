"""The figures: hand-computed losses, Appendix B's slopes, shapes of networks, and the files."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from results_setup import collect, done

from retinanet.model.retinanet import RetinaNet
from retinanet.paper.figures import (
    focal_curves,
    plot_architecture,
    plot_focal_loss,
    plot_loss_slopes,
    plot_loss_variants,
    plot_star_grid,
    plot_table,
    read_levels,
    star_curves,
    variant_curves,
    variant_slopes,
)
from retinanet.paper.results import Outcome, Result
from retinanet.report.figure import Files


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_figure_1_by_hand() -> None:
    curves = focal_curves(points=999)  # p = .001, .002, .. .999
    assert list(curves) == ["γ = 0 (CE)", "γ = 0.5", "γ = 1", "γ = 2", "γ = 5"]
    p, ce = (values.numpy() for values in curves["γ = 0 (CE)"])
    fl, last = (curves[label][1].numpy() for label in ("γ = 2", "γ = 5"))
    np.testing.assert_allclose(p, np.arange(1, 1000) / 1000)
    np.testing.assert_allclose(ce, -np.log(p), rtol=1e-9)
    np.testing.assert_allclose(last, -((1 - p) ** 5) * np.log(p))
    # Sec. 3.2: at p_t = .9 a hundred times less than CE, at .968 a thousand times (1 / .032^2 is
    # 977), at .5 four times.
    for i, times in ((900, 100), (968, 976.56), (500, 4)):
        assert ce[i - 1] / fl[i - 1] == pytest.approx(times, rel=1e-4)


def test_figures_5_and_6_are_appendix_a_and_b() -> None:
    # dCE/dx = y (p_t - 1); dFL/dx = y (1 - p_t)^g (g p_t log p_t + p_t - 1);
    # dFL*/dx = y (p_t* - 1).
    curves, slopes = variant_curves(points=13), variant_slopes(points=13)  # x_t = -6, -5, .. 6
    labels = ["CE", "FL γ = 2", "FL* γ = 2, β = 1", "FL* γ = 4, β = 0"]
    assert list(curves) == list(slopes) == labels
    for i, x in enumerate(range(-6, 7)):
        p, star, steep = sigmoid(x), sigmoid(2 * x + 1), sigmoid(4 * x)
        losses = [-math.log(p), -((1 - p) ** 2) * math.log(p)]
        losses += [-math.log(star) / 2, -math.log(steep) / 4]
        gradients = [p - 1, (1 - p) ** 2 * (2 * p * math.log(p) + p - 1), star - 1, steep - 1]
        assert [float(xs[i]) for xs, _ in curves.values()] == [x] * 4
        assert [float(y[i]) for _, y in curves.values()] == pytest.approx(losses)
        assert [float(y[i]) for _, y in slopes.values()] == pytest.approx(gradients)


def test_figure_7_by_hand() -> None:
    ((setting, (x, y)),) = star_curves([(3.0, 1.0)], points=5).items()
    assert setting == (3.0, 1.0)
    assert x.tolist() == [-6, -3, 0, 3, 6]
    expected = [-math.log(sigmoid(3 * value + 1)) / 3 for value in x.tolist()]
    assert y.tolist() == pytest.approx(expected)


def test_architecture_of_the_paper() -> None:
    # Figure 3 and Sec. 4 for ResNet-50.
    maps, levels = read_levels(RetinaNet(backbone="resnet50", num_classes=80), 800, 1024)
    assert maps == [("C3", 512, 100, 128, "", "", ""), ("C4", 1024, 50, 64, "", "", ""),
                    ("C5", 2048, 25, 32, "", "", "")]  # fmt: skip
    assert levels == [
        ("P3", 256, 100, 128, "C3", "1x1", "3x3"),
        ("P4", 256, 50, 64, "C4", "1x1", "3x3"),
        ("P5", 256, 25, 32, "C5", "1x1", "3x3"),
        ("P6", 256, 13, 16, "C5", "3x3, stride 2", ""),
        ("P7", 256, 7, 8, "P6", "3x3, stride 2", ""),
    ]


@pytest.mark.parametrize(
    ("changes", "sources", "channels"),
    [
        (
            {"backbone": "mobilenet_v2", "p2": True, "p6_from": "p5", "stride_padding": "same"},
            ["C2", "C3", "C4", "C5", "P5", "P6"],
            [24, 32, 96, 1280],
        ),
        (
            {"backbone": "resnet18", "norm": "group", "head_norm": "group"},
            ["C3", "C4", "C5", "C5", "P6"],
            [128, 256, 512],
        ),
    ],
)
def test_levels_are_those_of_the_outputs(
    changes: dict[str, Any], sources: list[str], channels: list[int]
) -> None:
    model = RetinaNet(num_classes=3, channels=16, head_depth=1, scales=(1.0,), **changes)
    maps, levels = read_levels(model, 64, 96)
    assert [level.channels for level in maps] == channels
    assert [level.source for level in levels] == sources
    with torch.no_grad():
        outputs = model.eval()(torch.zeros(1, 3, 64, 96))
    assert [(level.height, level.width) for level in levels] == [
        tuple(level.shape[-2:]) for level in outputs.logits
    ]


TABLE = collect({"a": done(0.3, 0.31), "c": [Outcome(0, Result("diverged"))]})
SMALL_NETWORK: dict[str, Any] = {"backbone": "mobilenet_v2", "num_classes": 3, "channels": 16}
PLOTS: dict[str, Callable[[Path], Files]] = {
    "1": plot_focal_loss,
    "3": lambda stem: plot_architecture(RetinaNet(**SMALL_NETWORK), stem),
    "3, without hidden layers": lambda stem: plot_architecture(
        RetinaNet(p2=True, p6_from="p5", head_depth=0, **SMALL_NETWORK), stem
    ),
    "5": plot_loss_variants,
    "6": plot_loss_slopes,
    "7": plot_star_grid,
    "7, measured": lambda stem: plot_star_grid(stem, {(1.0, 2.0): False, (2.0, 1.0): True}, "AP"),
    "table": lambda stem: plot_table(TABLE, stem),
    "empty table": lambda stem: plot_table(collect({}), stem),
}


@pytest.mark.parametrize("name", PLOTS)
def test_plot_writes_png_and_svg(name: str, tmp_path: Path) -> None:
    files = PLOTS[name](tmp_path / "new" / "lr.01")
    assert files == (tmp_path / "new" / "lr.01.png", tmp_path / "new" / "lr.01.svg")
    with Image.open(files.png) as image:
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 3
    svg = files.svg.read_text("utf-8")
    texts = {"3": "P7  /128", "7": "effective (AP over 33.5, COCO): 2", "table": "30.5 ± 0.7"}
    assert texts.get(name, "<path") in svg
    assert "<dc:date>" not in svg
