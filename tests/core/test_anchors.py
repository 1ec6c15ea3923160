"""Anchors: the paper's numbers, torchvision's generator, the cache, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from retinanet.anchors import (
    AnchorSpec,
    anchor_spec,
    default_anchor_spec,
    feature_sizes,
    level_anchors,
)


def sides(boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]


def test_areas_and_ratios_of_the_paper() -> None:
    """Sec. 4: areas 32^2 on P3 to 512^2 on P7, times 2^0, 2^(1/3), 2^(2/3) in side."""
    spec = default_anchor_spec()
    assert spec.strides == (8, 16, 32, 64, 128)
    for size, anchors in zip(
        (32, 64, 128, 256, 512), level_anchors(spec, [(1, 1)] * 5), strict=True
    ):
        width, height = sides(anchors)
        areas = torch.tensor([(size * 2 ** (k / 3)) ** 2 for k in range(3)])
        assert_close((width * height).reshape(3, 3), areas.expand(3, 3), rtol=1e-5, atol=0)
        ratios = torch.tensor([0.5, 1.0, 2.0])[:, None].expand(3, 3)
        assert_close((height / width).reshape(3, 3), ratios, rtol=1e-5, atol=0)


def test_by_hand() -> None:
    spec = anchor_spec([8, 16], sizes=[10, 20], scales=[1, 2], aspect_ratios=[1, 4])
    first, second = level_anchors(spec, [(1, 2), (1, 1)])
    # 10 x 10 and 20 x 20, then ratio 4: 5 x 20 and 10 x 40; the second cell lies 8 px to the right
    cell = [[-5, -5, 5, 5], [-10, -10, 10, 10], [-2.5, -10, 2.5, 10], [-5, -20, 5, 20]]
    right = [[x1 + 8, y1, x2 + 8, y2] for x1, y1, x2, y2 in cell]
    assert_close(first, torch.tensor(cell + right, dtype=torch.float32))
    assert_close(second, torch.tensor(cell, dtype=torch.float32) * 2)


@pytest.mark.parametrize(("height", "width"), [(256, 384), (416, 672), (800, 1088), (32, 96)])
def test_rounding_is_torchvisions(height: int, width: int) -> None:
    spec = anchor_spec([8, 16, 32, 64, 128], rounding="torchvision")
    cells = feature_sizes(spec.strides, height, width)
    sizes = tuple(
        (side, int(side * 2 ** (1 / 3)), int(side * 2 ** (2 / 3)))
        for side in (32, 64, 128, 256, 512)
    )
    generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    images = ImageList(torch.zeros(1, 3, height, width), [(height, width)])
    (theirs,) = generator(images, [torch.zeros(1, 1, *cell) for cell in cells])
    assert_close(torch.cat(level_anchors(spec, cells)), theirs, rtol=0, atol=0)


def test_feature_sizes_round_up() -> None:
    assert feature_sizes([8, 64], 640, 800) == ((80, 100), (10, 13))
    assert feature_sizes([8, 64], 641, 801) == ((81, 101), (11, 13))


def test_same_anchors_are_kept() -> None:
    spec = anchor_spec([8])
    first = level_anchors(spec, [(3, 4)], "cpu")
    again = level_anchors(anchor_spec([8]), [(3, 4)], torch.device("cpu"))
    assert first[0] is again[0]
    assert level_anchors(spec, [(4, 3)])[0] is not first[0]


def test_defaults_of_torch_change_nothing(default: str) -> None:
    # sizes of its own for each, or another test's anchors would be handed out
    spec = anchor_spec([8], sizes=[{"float64": 41, "bfloat16": 42, "meta": 43}[default]])
    (anchors,) = level_anchors(spec, [(3, 4)], "cpu")
    assert anchors.dtype == torch.float32
    assert anchors.device.type == "cpu"
    widths = anchors[:, 2] - anchors[:, 0]
    assert float(widths[3]) == pytest.approx(spec.sizes[0])  # ratio 1, scale 1
    if default == "meta":
        assert level_anchors(spec, [(3, 4)])[0].is_meta


def test_anchors_made_in_inference_mode_can_be_trained_with() -> None:
    spec = anchor_spec([8], sizes=[33])
    with torch.inference_mode():
        level_anchors(spec, [(2, 5)])
    (anchors,) = level_anchors(spec, [(2, 5)])
    deltas = torch.zeros(len(anchors), 4, requires_grad=True)
    (deltas * anchors).sum().backward()
    assert deltas.grad is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strides": []}, r"anchor sizes must be one or more numbers over 0, got \(\)"),
        ({"strides": [8], "sizes": [1, 2]}, "got 2 sizes .* for 1 levels"),
        ({"strides": [8], "sizes": [0]}, r"sizes must be .* got \(0.0,\)"),
        ({"strides": [0], "sizes": [8]}, r"strides must be .* got \(0,\)"),
        ({"strides": [8], "scales": [-1]}, r"scales must be .* got \(-1.0,\)"),
        ({"strides": [8], "scales": []}, "scales must be one or more"),
        ({"strides": [8], "aspect_ratios": [float("nan")]}, "aspect_ratios must be"),
        ({"strides": [8], "rounding": "up"}, "rounding is none or torchvision, got 'up'"),
    ],
)
def test_impossible_anchors(arguments, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        anchor_spec(**arguments)


def test_sizes_in_torchvisions_form_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"sizes must be .* got \(\(32,\), \(64,\)\)"):
        AnchorSpec(sizes=((32,), (64,)), strides=(8, 16))  # type: ignore[arg-type]


def test_levels_must_agree() -> None:
    with pytest.raises(ValueError, match=r"2 levels of stride \(8, 16\), got 1 feature sizes"):
        level_anchors(anchor_spec([8, 16]), [(1, 1)])
