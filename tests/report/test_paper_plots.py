"""The paper's figures: both files, equal bytes, odd and empty input."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import pytest
from PIL import Image

from retinanet.model.retinanet import RetinaNet
from retinanet.paper.figures import (
    focal_curves,
    read_architecture,
    star_curves,
    variant_curves,
    variant_slopes,
)
from retinanet.report.loss_distribution import LossCurve, LossDistribution
from retinanet.report.paper_plots import (
    Files,
    SpeedMark,
    TableRow,
    letters,
    plot_architecture,
    plot_focal_loss,
    plot_loss_distribution,
    plot_loss_slopes,
    plot_loss_variants,
    plot_speed_accuracy,
    plot_star_grid,
    plot_table,
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
ROWS = (
    TableRow("alpha .10", 0.0, 0.0, 0.0),
    TableRow("alpha .75 that costs US$ 5", 31.4, 0.3, 31.1),
    TableRow("not run", None, None, 30.8),
    TableRow("ours alone", 12.0, None, None),
    TableRow("spoilt " * 20, math.nan, None, 3.0),
)


def distribution() -> LossDistribution:
    curves = tuple(
        LossCurve(gamma, 1.0, (0.0, 0.5 ** (gamma + 1), 1.0), {0.1: 0.5}) for gamma in (0.0, 2.0)
    )
    return LossDistribution(
        images=3,
        fractions=(0.0, 0.5, 1.0),
        positives=curves,
        negatives=curves,
        positive_anchors=10,
        negative_anchors=5000,
        ignored_anchors=1,
        positives_taken=10,
        negatives_taken=400,
        classes=3,
        foreground_iou=0.5,
        background_iou=0.4,
        low_quality_matches=False,
        source="cells",
        split="val",
    )


def speed() -> SpeedAccuracy:
    def point(model: str, scale: int, ap: float, ms: float) -> SpeedPoint:
        return SpeedPoint(
            model, scale, 2 * scale, ap, ap, ap, ap, ap, ap, ms, ms - 1, ms + 2, "torch"
        )

    points = (
        point("cells", 128, 0.2, 10),
        point("cells", 192, 0.4, 20),
        point("x", 64, math.nan, 5),
    )
    return SpeedAccuracy(points, 4, 2, 3, "cells", "val", {})


PLOTS: dict[str, Callable[[Path], Files]] = {
    "fig1": lambda file: plot_focal_loss(focal_curves(), file),
    "fig2": lambda file: plot_speed_accuracy(
        speed_marks(speed()), file, published=PAPER, where="cells", machine="a machine"
    ),
    "fig2, the paper's": lambda file: plot_speed_accuracy((), file, published=PAPER),
    "fig2, long names": lambda file: plot_speed_accuracy(
        [SpeedMark(f"{'folder/' * 30}{i}", 10 + i, 20, "64") for i in (1, 2, 2, 3)],
        file,
        published=PAPER,
        where="folder/" * 30,
        machine="a machine with a long name " * 8,
    ),
    "fig2, one point": lambda file: plot_speed_accuracy(speed_marks(speed())[:1], file),
    "fig3": lambda file: plot_architecture(
        read_architecture(RetinaNet(backbone="resnet50", num_classes=80)), file
    ),
    "fig3, another": lambda file: plot_architecture(
        read_architecture(
            RetinaNet(
                backbone="mobilenet_v2", num_classes=3, p2=True, p6_from="p5", head_depth=0,
                channels=16,
            )
        ),
        file,
    ),
    "fig4": lambda file: plot_loss_distribution(
        distribution(), file, title="cells", published=[(0.8, 0.5)]
    ),
    "fig5": lambda file: plot_loss_variants(variant_curves(), file),
    "fig6": lambda file: plot_loss_slopes(variant_slopes(), file),
    "fig7": lambda file: plot_star_grid(star_curves(), file, bar="AP over 33.5"),
    "fig7, nothing tried": lambda file: plot_star_grid(star_curves({}), file),
    "fig7, all tried": lambda file: plot_star_grid(
        star_curves({(g, b): g + b > 2 for g in (1.0, 2.0, 3.0) for b in (0.0, 1.0, 2.0)}), file
    ),
    "table": lambda file: plot_table(ROWS, file, title="Table 1a", measured_on="cells " * 40),
    "empty table": lambda file: plot_table((), file),
}  # fmt: skip


@pytest.mark.parametrize("name", PLOTS)
def test_paper_plot_writes_png_and_svg(name: str, tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    files = PLOTS[name](tmp_path / "new" / "figure")
    assert files == (tmp_path / "new" / "figure.png", tmp_path / "new" / "figure.svg")
    assert {file.name for file in files.png.parent.iterdir()} == {"figure.png", "figure.svg"}
    with Image.open(files.png) as image:
        assert min(image.size) > 200
        assert len(image.convert("RGB").getcolors(maxcolors=2**24) or []) > 3
    svg = files.svg.read_text("utf-8")
    assert svg.startswith("<?xml")
    assert "<path" in svg
    assert "<dc:date>" not in svg
    assert dict(mpl.rcParams) == before
    if name in ("fig2", "fig3", "table"):
        for first, second in zip(files, PLOTS[name](tmp_path / "again" / "figure"), strict=True):
            assert first.read_bytes() == second.read_bytes()


def test_plot_table_replaces_a_suffix_and_keeps_a_dot(tmp_path: Path) -> None:
    names = [plot_table(ROWS, tmp_path / name).png.name for name in ("a.png", "b.svg", "lr.01")]
    assert names == ["a.png", "b.png", "lr.01.png"]


def test_speed_marks_are_in_points_of_ap(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no point to draw"):
        plot_speed_accuracy((), tmp_path / "x")
    # AP from a fraction to points; NaN is left out.
    assert speed_marks(speed()) == (
        SpeedMark("cells", 10, 20.0, "128", 9, 12),
        SpeedMark("cells", 20, 40.0, "192", 19, 22),
    )


def test_letters_continue_after_z() -> None:
    assert letters(28)[:2] + letters(28)[25:] == ["A", "B", "Z", "A1", "B1"]
