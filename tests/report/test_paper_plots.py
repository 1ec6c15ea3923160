"""Figures 2 and 4: both files, equal bytes, odd and empty input."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image

from retinanet.report.figure import Files
from retinanet.report.loss_distribution import LossCurve, LossDistribution
from retinanet.report.paper_plots import (
    SpeedMark,
    plot_loss_distribution,
    plot_speed_accuracy,
    speed_marks,
)
from retinanet.report.speed_accuracy import SpeedAccuracy, SpeedPoint

PAPER = (
    SpeedMark("RetinaNet-50", 64, 30.5, "400"),
    SpeedMark("RetinaNet-50", 153, 35.7, "800"),
    SpeedMark("RetinaNet-101", 81, 31.9, "400"),
    SpeedMark("RetinaNet-101", 198, 37.8, "800"),
    SpeedMark("YOLOv2", 25, 21.6),
    SpeedMark("FPN FRCN", 172, 36.2),
)


def distribution() -> LossDistribution:
    curves = tuple(
        LossCurve(gamma, 1.0, (0.0, 0.5 ** (gamma + 1), 1.0), {0.1: 0.5}) for gamma in (0.0, 2.0)
    )
    counts = (10, 5000, 1, 10, 400)
    return LossDistribution(
        "cells", "val", 3, curves, curves, (0.0, 0.5, 1.0), *counts, 3, 0.5, 0.4, False
    )


def speed() -> SpeedAccuracy:
    def point(model: str, scale: int, ap: float, ms: float) -> SpeedPoint:
        return SpeedPoint(model, scale, 2 * scale, {"AP": ap}, "torch", ms, ms - 1, ms + 2)

    points = (
        point("cells", 128, 0.2, 10),
        point("cells", 192, 0.4, 20),
        point("x", 64, math.nan, 5),
    )
    return SpeedAccuracy(points, 4, 2, 3, "cells", "val", {})


LONG_NAMES = [SpeedMark(f"{'folder/' * 30}{i}", 10 + i, 20, "64") for i in (1, 2, 2, *range(3, 30))]
PLOTS: dict[str, Callable[[Path], Files]] = {
    "fig2": lambda stem: plot_speed_accuracy(
        speed_marks(speed()), stem, published=PAPER, data="cells", machine="a machine"
    ),
    "fig2, the paper's": lambda stem: plot_speed_accuracy((), stem, published=PAPER),
    "fig2, long names": lambda stem: plot_speed_accuracy(
        LONG_NAMES,
        stem,
        published=PAPER,
        data="folder/" * 30,
        machine="a machine with a long name " * 8,
    ),
    "fig2, one point": lambda stem: plot_speed_accuracy(speed_marks(speed())[:1], stem),
    "fig4": lambda stem: plot_loss_distribution(
        distribution(), stem, title="cells", published=(0.8, 0.5)
    ),
}


@pytest.mark.parametrize("name", PLOTS)
def test_paper_plot_writes_png_and_svg(name: str, tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    files = PLOTS[name](tmp_path / "new" / "lr.01")
    assert files == (tmp_path / "new" / "lr.01.png", tmp_path / "new" / "lr.01.svg")
    with Image.open(files.png) as image:
        assert min(image.size) > 200
        assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 3
    svg = files.svg.read_text("utf-8")
    assert "<dc:date>" not in svg
    assert dict(mpl.rcParams) == before
    if name == "fig2":
        for first, second in zip(files, PLOTS[name](tmp_path / "again"), strict=True):
            assert first.read_bytes() == second.read_bytes()
    if name == "fig2, long names":
        assert "<!-- Z  " in svg
        assert "<!-- A1  " in svg


def test_speed_marks_are_in_points_of_ap(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no point to draw"):
        plot_speed_accuracy((), tmp_path / "x")
    # AP from a fraction to points; NaN is left out.
    assert speed_marks(speed()) == (
        SpeedMark("cells", 10, 20.0, "128", 9, 12),
        SpeedMark("cells", 20, 40.0, "192", 19, 22),
    )
