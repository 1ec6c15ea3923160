"""Box losses: hand numbers, torchvision's own, gradients, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.testing import assert_close
from torchvision.ops import (
    complete_box_iou_loss,
    distance_box_iou_loss,
    generalized_box_iou_loss,
)

from retinanet.boxes import decode_boxes
from retinanet.config import LossSettings
from retinanet.losses import BOX_LOSSES, box_loss, detection
from retinanet.matching import match_anchors
from retinanet.structures import BACKGROUND, Outputs, Targets

ANCHOR = torch.tensor([[0.0, 0.0, 10.0, 10.0]])


def random_case(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(2, count, 2, generator=generator) * 100
    sides = torch.rand(2, count, 2, generator=generator) * 40 + 5
    anchors, boxes = torch.cat((corners, corners + sides), dim=2)
    return torch.randn(count, 4, generator=generator) * 0.3, anchors, boxes


def test_smooth_l1_by_hand() -> None:
    # the box that the anchor itself is: all four deltas should be 0
    deltas = torch.tensor([[0.05, -0.11, 0.5, 0.0]])
    # .05^2 / .22 + .11^2 / .22 (= .055, the same from both sides) + (.5 - .055)
    expected = torch.tensor([0.05**2 / 0.22 + 0.055 + 0.445])
    assert_close(box_loss("smooth_l1", deltas, ANCHOR, ANCHOR), expected)
    # beta .5: all are in the square part
    squares = torch.tensor([0.05**2 + 0.11**2 + 0.25])
    assert_close(box_loss("smooth_l1", deltas, ANCHOR, ANCHOR, beta=0.5), squares)


def test_l1_by_hand() -> None:
    box = torch.tensor([[5.0, 0.0, 15.0, 20.0]])  # wanted: .5, .5, 0, ln 2
    deltas = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    assert_close(box_loss("l1", deltas, ANCHOR, box), torch.tensor([0.5 + 0.5 + math.log(2)]))


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [
        ("giou", generalized_box_iou_loss),
        ("diou", distance_box_iou_loss),
        ("ciou", complete_box_iou_loss),
    ],
)
def test_box_losses_and_gradients_are_torchvisions(
    kind: str, theirs: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """Boxes that overlap, that do not, that touch, and that are one and the same."""
    deltas, anchors, boxes = random_case(300, seed=4)
    boxes[:100] = anchors[:100] + 2
    boxes[100:110] = anchors[100:110]
    boxes[110:120] = anchors[110:120] + (anchors[110:120, 2:] - anchors[110:120, :2]).repeat(1, 2)
    deltas[100:120] = 0
    ours_in, theirs_in = (deltas.clone().requires_grad_() for _ in range(2))
    ours = box_loss(kind, ours_in, anchors, boxes)
    expected = theirs(decode_boxes(theirs_in, anchors), boxes)
    assert_close(ours, expected)
    ours.sum().backward()
    expected.sum().backward()
    assert_close(ours_in.grad, theirs_in.grad)


@pytest.mark.parametrize("kind", list(BOX_LOSSES))
def test_gradcheck(kind: str) -> None:
    deltas, anchors, boxes = (one.double() for one in random_case(6))
    assert gradcheck(
        # CIoU holds the weight of its shape term fixed, as its paper has it.
        lambda x: box_loss(kind if kind != "ciou" else "diou", x, anchors, boxes),
        deltas.requires_grad_(),
    )


@pytest.mark.parametrize("kind", list(BOX_LOSSES))
def test_wild_predictions_stay_finite(kind: str) -> None:
    wild = torch.tensor([[0.0, 0.0, -1e4, -1e4], [1e4, -1e4, 1e4, 1e4], [0.0, 0.0, -1e4, 1e4]])
    deltas = wild.requires_grad_()
    anchors = ANCHOR.repeat(3, 1)
    loss = box_loss(kind, deltas, anchors, anchors + 3)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert deltas.grad is not None
    assert deltas.grad.isfinite().all()


@pytest.mark.parametrize("kind", list(BOX_LOSSES))
def test_no_box(kind: str) -> None:
    nothing = torch.zeros(0, 4, requires_grad=True)
    loss = box_loss(kind, nothing, torch.zeros(0, 4), torch.zeros(0, 4))
    assert loss.shape == (0,)
    loss.sum().backward()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="one of smooth_l1, l1, giou, diou, ciou, got 'iou'"):
        box_loss("iou", ANCHOR, ANCHOR, ANCHOR)
    with pytest.raises(ValueError, match=r"are \(N, 4\) each, got \[\(1, 4\), \(2, 4\), \(1, 4\)"):
        box_loss("l1", ANCHOR, ANCHOR.repeat(2, 1), ANCHOR)
    with pytest.raises(ValueError, match=r"are \(N, 4\) each, got"):
        box_loss("l1", ANCHOR[0], ANCHOR[0], ANCHOR[0])
    with pytest.raises(ValueError, match=r"beta must be over 0 \(for 0 take the kind l1\), got 0"):
        box_loss("smooth_l1", ANCHOR, ANCHOR, ANCHOR, beta=0.0)


@pytest.mark.parametrize("kind", BOX_LOSSES)
@pytest.mark.parametrize("objects", [True, False])
def test_masked_box_loss_of_devices_equals_that_of_selected_foreground(
    kind: str, objects: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other devices than the CPU mask all anchors; Inf and NaN of the background must not leak."""
    generator = torch.Generator().manual_seed(2)
    corner = torch.rand(400, 2, generator=generator) * 200
    anchors = torch.cat((corner, corner + 20 + 60 * torch.rand(400, 2, generator=generator)), dim=1)
    boxes = anchors[:10].view(2, 5, 4) + 3 * torch.rand(2, 5, 4, generator=generator)
    boxes[1, 4] = 0  # padding
    targets = Targets(boxes, torch.tensor([[0, 1, 0, 1, 0], [1, 1, 1, 1, BACKGROUND]]))
    if not objects:
        targets = Targets(boxes[:, :0], targets.labels[:, :0])
    foreground = match_anchors(anchors, targets) >= 0
    assert foreground.any() == objects
    deltas = torch.randn(2, 400, 4, generator=generator) * 0.3
    wild = torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38])
    deltas[~foreground] = wild[torch.arange(int((~foreground).sum()) * 4) % 4].view(-1, 4)
    deltas.requires_grad_()
    level = deltas.transpose(1, 2)[..., None]  # one level of 400 rows, a column, an anchor per cell
    outputs = Outputs((torch.zeros(2, 2, 400, 1),), (level,))

    def loss_and_gradient() -> tuple[Tensor, Tensor]:
        losses = detection.detection_losses(
            outputs, [anchors], targets, num_classes=2, settings=LossSettings(box=kind)
        )
        return losses.box, torch.autograd.grad(losses.box, deltas)[0]

    expected, expected_gradient = loss_and_gradient()
    monkeypatch.setattr(detection, "is_readable", lambda values: False)
    masked, gradient = loss_and_gradient()
    assert_close(masked, expected)
    assert gradient.isfinite().all()
    assert gradient.any() == objects
    assert_close(gradient, expected_gradient)
