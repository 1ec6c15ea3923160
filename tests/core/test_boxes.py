"""Coding of boxes: hand numbers, the inverse, torchvision's coder, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchvision import ops
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import clip_boxes_to_image

from retinanet.boxes import MAX_LOG_SCALE, box_iou, clip_boxes, decode_boxes, encode_boxes


def random_boxes(count: int, generator: torch.Generator, side: float = 400.0) -> Tensor:
    centre = torch.rand(count, 2, generator=generator) * side
    half = torch.rand(count, 2, generator=generator) * side / 4 + 1
    return torch.cat((centre - half, centre + half), dim=1)


def test_encode_by_hand() -> None:
    anchor = torch.tensor([[10.0, 20.0, 30.0, 60.0]])  # centre (20, 40), 20 x 40
    box = torch.tensor([[15.0, 10.0, 25.0, 90.0]])  # centre (20, 50), 10 x 80
    # dx = 0 / 20, dy = 10 / 40, dw = log(10 / 20), dh = log(80 / 40)
    assert_close(encode_boxes(anchor, box), torch.tensor([[0, 0.25, -math.log(2), math.log(2)]]))
    weighted = encode_boxes(anchor, box, weights=(10, 10, 5, 5))
    assert_close(weighted, torch.tensor([[0, 2.5, -5 * math.log(2), 5 * math.log(2)]]))


def test_decode_by_hand() -> None:
    anchor = torch.tensor([[0.0, 0.0, 10.0, 20.0]])  # centre (5, 10)
    deltas = torch.tensor([[1.0, -0.5, math.log(2), 0.0]])
    # centre (5 + 10, 10 - 10) = (15, 0), size 20 x 20
    assert_close(decode_boxes(deltas, anchor), torch.tensor([[5.0, -10.0, 25.0, 10.0]]))


def test_coding_equals_torchvision() -> None:
    generator = torch.Generator().manual_seed(2)
    anchors, boxes = random_boxes(500, generator), random_boxes(500, generator)
    deltas = torch.randn(500, 4, generator=generator) * 3
    coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
    ours = encode_boxes(anchors, boxes, weights=coder.weights)
    assert_close(ours, coder.encode_single(boxes, anchors))
    assert_close(
        decode_boxes(deltas, anchors, weights=coder.weights), coder.decode_single(deltas, anchors)
    )


def test_shapes_broadcast() -> None:
    generator = torch.Generator().manual_seed(3)
    anchors = random_boxes(7, generator)
    deltas = torch.randn(2, 7, 4, generator=generator)
    together = decode_boxes(deltas, anchors)
    assert together.shape == (2, 7, 4)
    assert_close(together[1], decode_boxes(deltas[1], anchors))
    assert_close(encode_boxes(anchors, together)[1], encode_boxes(anchors, together[1]))


@pytest.mark.parametrize("beyond", [MAX_LOG_SCALE + 1e-3, 100.0, 1e4])
def test_decode_bounds_the_scale(beyond: float) -> None:
    anchor = torch.tensor([[0.0, 0.0, 16.0, 16.0]])
    box = decode_boxes(torch.tensor([[0.0, 0.0, beyond, beyond]]), anchor)
    # 16 px times 1000 / 16
    assert_close(box, torch.tensor([[-492.0, -492.0, 508.0, 508.0]]))


def test_half_precision_deltas_are_decoded_in_float32() -> None:
    deltas = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.bfloat16)
    anchor = torch.tensor([[100.0, 100.0, 900.0, 900.0]])
    box = decode_boxes(deltas, anchor)
    assert box.dtype == torch.float32
    assert_close(box, decode_boxes(deltas.float(), anchor))


def test_clip_by_hand() -> None:
    boxes = torch.tensor([[-5.0, -6.0, 50.0, 60.0], [5.0, 6.0, 7.0, 8.0], [200.0, 0, 300.0, 9.0]])
    expected = torch.tensor([[0.0, 0.0, 40.0, 30.0], [5.0, 6.0, 7.0, 8.0], [40.0, 0, 40.0, 9.0]])
    assert_close(clip_boxes(boxes, (30, 40)), expected)
    assert_close(clip_boxes(boxes, (30, 40)), clip_boxes_to_image(boxes, (30, 40)))


def test_clip_takes_a_size_a_box() -> None:
    boxes = torch.tensor([[0.0, 0.0, 50.0, 60.0]]).repeat(2, 1)
    sizes = torch.tensor([[30, 40], [70, 45]])
    assert_close(
        clip_boxes(boxes, sizes), torch.tensor([[0.0, 0.0, 40.0, 30.0], [0.0, 0.0, 45.0, 60.0]])
    )


@pytest.mark.parametrize("function", [encode_boxes, decode_boxes])
def test_coding_refuses_what_is_no_box(function) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"are \(\.\.\., 4\), got \(3, 5\)"):
        function(torch.zeros(3, 5), torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"are \(\.\.\., 4\), got \(3, 2\)"):
        function(torch.zeros(3, 4), torch.ones(3, 2))


def test_clip_refuses_wrong_shapes() -> None:
    with pytest.raises(ValueError, match=r"boxes are \(\.\.\., 4\), got \(2, 3\)"):
        clip_boxes(torch.zeros(2, 3), (3, 4))
    with pytest.raises(ValueError, match=r"sizes are \(\.\.\., 2\) height and width, got \(3,\)"):
        clip_boxes(torch.zeros(2, 4), torch.tensor([1, 2, 3]))


def test_iou_equals_torchvision_and_is_0_for_empty_boxes() -> None:
    generator = torch.Generator().manual_seed(5)
    first, second = random_boxes(40, generator), random_boxes(30, generator)
    assert torch.equal(box_iou(first[:, None], second), ops.box_iou(first, second))
    point = torch.tensor([3.0, 3.0, 3.0, 3.0])
    assert box_iou(point, point) == 0
