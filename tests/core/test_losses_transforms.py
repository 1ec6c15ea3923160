"""torch.func over the public losses: the same gradients as autograd's, and per-sample gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap
from torch.testing import assert_close

from retinanet.anchors import anchor_spec, level_anchors
from retinanet.config import LossSettings
from retinanet.losses import (
    box_loss,
    cross_entropy,
    detection_losses,
    focal_loss,
    focal_loss_star,
    hinge_loss,
)
from retinanet.structures import BACKGROUND, IGNORED, Outputs, Targets

LOSSES = [focal_loss, cross_entropy, focal_loss_star, hinge_loss, partial(focal_loss, alpha=None)]
LOGITS = torch.linspace(-4, 4, 60).reshape(3, 5, 4)
LABELS = torch.tensor([[0, 3, BACKGROUND, IGNORED, 1], [BACKGROUND] * 5, [2, 2, 2, 2, 0]])


def autograd_gradient(loss: Callable[..., Tensor], x: Tensor, *rest: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss(x, *rest), x)[0]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_classification_loss_under_grad_equals_autograd(
    loss: Callable[..., Tensor], reduction: str
) -> None:
    loss = partial(loss, reduction=reduction)
    result = grad(loss)(LOGITS[0], LABELS[0])
    assert_close(result, autograd_gradient(loss, LOGITS[0], LABELS[0]))


@pytest.mark.parametrize("loss", LOSSES)
def test_classification_loss_under_vmap_of_grad_equals_loop(loss: Callable[..., Tensor]) -> None:
    expected = [autograd_gradient(loss, x, y) for x, y in zip(LOGITS, LABELS, strict=True)]
    assert_close(vmap(grad(loss))(LOGITS, LABELS), torch.stack(expected))
    values = [loss(x, y) for x, y in zip(LOGITS, LABELS, strict=True)]
    assert_close(vmap(loss)(LOGITS, LABELS), torch.stack(values))


def test_dense_targets_under_vmap_of_grad_equal_loop() -> None:
    targets = torch.rand(3, 5, 4, generator=torch.Generator().manual_seed(0))
    expected = [autograd_gradient(focal_loss, x, t) for x, t in zip(LOGITS, targets, strict=True)]
    assert_close(vmap(grad(focal_loss))(LOGITS, targets), torch.stack(expected))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:FutureWarning")  # of torch's own jvp
def test_focal_loss_under_jvp_and_hessian() -> None:
    x, labels = LOGITS[0, :2].double(), LABELS[0, :2]
    gradient = autograd_gradient(focal_loss, x, labels)
    direction = torch.ones_like(x)
    _, tangent = jvp(lambda values: focal_loss(values, labels), (x,), (direction,))
    assert_close(tangent, (gradient * direction).sum())
    second = hessian(lambda values: focal_loss(values, labels))(x)
    assert_close(second, torch.autograd.functional.hessian(lambda v: focal_loss(v, labels), x))


def test_label_out_of_range_under_vmap_makes_loss_nan() -> None:
    losses = vmap(focal_loss)(LOGITS, torch.where(LABELS == 3, 4, LABELS))
    assert losses.isnan().tolist() == [True, False, False]


@pytest.mark.parametrize("kind", ["smooth_l1", "l1", "giou", "diou", "ciou"])
def test_box_loss_under_vmap_of_grad_equals_loop(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    deltas = torch.randn(3, 6, 4, generator=generator) * 0.3
    corners = torch.rand(2, 3, 6, 2, generator=generator) * 20
    anchors, boxes = (torch.cat((c, c + 8), dim=-1) for c in corners)

    def loss(d: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return box_loss(kind, d, a, b).sum()

    expected = [
        autograd_gradient(loss, *sample) for sample in zip(deltas, anchors, boxes, strict=True)
    ]
    assert_close(vmap(grad(loss))(deltas, anchors, boxes), torch.stack(expected))


def test_detection_losses_under_vmap_of_grad_equal_loop() -> None:
    spec = anchor_spec([8, 16], sizes=[16, 32], scales=[1.0], aspect_ratios=[1.0, 2.0])
    sides = ((4, 4), (2, 2))
    anchors = level_anchors(spec, sides)
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(3, 2 * (16 + 4) * (3 + 4), generator=generator)
    boxes = torch.tensor([[[0, 0, 16, 16], [8, 8, 30, 30]]] * 3).float()
    boxes[1] *= 0.5
    labels = torch.tensor([[0, 2], [1, BACKGROUND], [IGNORED, 1]])

    def loss(values: Tensor, image_boxes: Tensor, image_labels: Tensor) -> Tensor:
        maps = []
        for channels in (6, 8):
            for h, w in sides:
                level, values = values.split([channels * h * w, len(values) - channels * h * w])
                maps.append(level.reshape(1, channels, h, w))
        outputs = Outputs(tuple(maps[:2]), tuple(maps[2:]))
        targets = Targets(image_boxes[None], image_labels[None])
        return detection_losses(
            outputs,
            anchors,
            targets,
            num_classes=3,
            settings=LossSettings(low_quality_matches=True),
        ).total

    expected = [
        autograd_gradient(loss, *sample) for sample in zip(flat, boxes, labels, strict=True)
    ]
    assert_close(vmap(grad(loss))(flat, boxes, labels), torch.stack(expected))
    assert_close(grad(loss)(flat[0], boxes[0], labels[0]), expected[0])
