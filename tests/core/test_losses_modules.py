"""FocalLoss and softmax_focal_loss against torchvision, torch and numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.ops import sigmoid_focal_loss

import retinanet as rn


def segmentation() -> tuple[Tensor, Tensor]:
    """Logits (2, 4, 5, 6) and a mask of uint8 with 255 for unlabelled pixels."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(0, 4, (2, 5, 6), generator=generator, dtype=torch.uint8)
    mask[:, 1] = 255
    return torch.randn(2, 4, 5, 6, generator=generator).requires_grad_(), mask


def one_hot(mask: Tensor) -> Tensor:
    return F.one_hot(mask.long().clamp(max=3), 4).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_segmentation_equals_torchvision_without_the_ignored_pixels(reduction: Any) -> None:
    logits, mask = segmentation()
    kept = (mask != 255)[:, None].expand_as(logits)
    every = sigmoid_focal_loss(logits, one_hot(mask), alpha=0.25, gamma=2.0)
    expected = {
        "sum": every[kept].sum(),
        "mean": every[kept].mean(),
        "none": every.where(kept, 0),
    }[reduction]
    loss = rn.FocalLoss(class_dim=1, ignore_index=255, reduction=reduction)
    found = loss(logits, mask)
    assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert_close(gradient, torch.autograd.grad(expected.sum(), logits)[0])
    assert not gradient[~kept].any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float32])
def test_one_hot_targets_of_any_type_equal_labels(dtype: torch.dtype) -> None:
    logits, mask = segmentation()
    mask = mask.clamp(max=3)
    loss = rn.FocalLoss(class_dim=1)
    assert_close(loss(logits, one_hot(mask).to(dtype)), loss(logits, mask))


def test_binary_mask_with_ignored_pixels_equals_torchvision() -> None:
    logits, mask = segmentation()
    binary = torch.where(mask == 255, 255, (mask > 1).int())[:, None]
    score = logits[:, :1]
    kept = binary != 255
    every = sigmoid_focal_loss(score, (binary == 1).float(), alpha=0.75, gamma=1.0)
    loss = rn.FocalLoss(alpha=0.75, gamma=1.0, class_dim=1, ignore_index=255, reduction="mean")
    assert_close(loss(score, binary), every[kept].mean())


def test_class_dim_is_any_dimension() -> None:
    logits, mask = segmentation()
    last = rn.FocalLoss(ignore_index=255)(logits.permute(0, 2, 3, 1), mask)
    assert_close(rn.FocalLoss(class_dim=-3, ignore_index=255)(logits, mask), last)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(2, 5, 7, dtype=torch.int64), r"integer labels of shape \(2, 5, 6\)"),
        (torch.full((2, 5, 6), 4), r"label 4 is neither a class 0\.\.3"),
        (torch.full((2, 4, 5, 6), 255), r"float targets lie in \[0, 1\], got 255"),
        (torch.zeros(2, 5, 6), "got torch.float32 targets"),
    ],
)
def test_wrong_targets_are_rejected(targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rn.FocalLoss(class_dim=1)(segmentation()[0], targets)


def test_wrong_targets_are_rejected_with_what_to_give() -> None:
    logits, labels = segmentation()[0], torch.zeros(2, 5, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"classes in dimension 1: FocalLoss\(class_dim=1\)"):
        rn.FocalLoss()(logits, labels)
    with pytest.raises(ValueError, match="give 0 and 1 of a single class in the logits' shape"):
        rn.FocalLoss(class_dim=1)(logits[:, :1], labels + 1)


def test_wrong_settings_are_rejected_at_once() -> None:
    with pytest.raises(ValueError, match="gamma must be >= 0, got -1"):
        rn.FocalLoss(gamma=-1)
    with pytest.raises(ValueError, match="reduction is none, sum or mean, got 'avg'"):
        rn.FocalLoss(reduction="avg")  # type: ignore[arg-type]
    assert "gamma=2.0, reduction='sum', class_dim=-1" in repr(rn.FocalLoss())


def test_softmax_focal_loss_with_gamma_0_is_cross_entropy() -> None:
    logits, mask = segmentation()
    weights = [0.5, 1.0, 2.0, 4.0]
    found = rn.softmax_focal_loss(
        logits, mask, alpha=weights, gamma=0, class_dim=1, ignore_index=255
    )
    expected = F.cross_entropy(
        logits, mask.long(), torch.tensor(weights), ignore_index=255, reduction="sum"
    )
    assert_close(found, expected)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_softmax_focal_loss_equals_the_formula(reduction: Any) -> None:
    logits, mask = segmentation()
    x = logits.detach().double().numpy()
    p = np.exp(x) / np.exp(x).sum(axis=1, keepdims=True)
    p_t = np.take_along_axis(p, mask.clamp(max=3).long().numpy()[:, None], axis=1)[:, 0]
    kept = (mask != 255).numpy()
    every = np.where(kept, -((1 - p_t) ** 2) * np.log(p_t), 0)
    expected = {"sum": every.sum(), "mean": every[kept].mean(), "none": every}[reduction]
    found = rn.softmax_focal_loss(
        logits.double(), mask, class_dim=1, ignore_index=255, reduction=reduction
    )
    assert_close(found, torch.as_tensor(expected))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_softmax_focal_loss_is_finite_for_extreme_logits(gamma: float) -> None:
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    loss = rn.softmax_focal_loss(logits, torch.tensor([0, 0]), gamma=gamma)
    loss.backward()
    assert_close(loss, torch.tensor(400.0))
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([[0]], {}, r"go with integer labels \(1,\): found torch.int64 \(1, 1\)"),
        ([2], {}, r"0\.\.1 or IGNORED: found 2; see ignore_index"),
        ([-1], {}, r"found -1; make the background a class"),
        ([0], {"alpha": [1.0]}, r"each of the 2 classes: found \(1,\)"),
        ([0], {"gamma": -1.0}, "gamma must be >= 0"),
    ],
)
def test_softmax_focal_loss_rejects(labels: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rn.softmax_focal_loss(torch.zeros(1, 2), torch.tensor(labels), **options)


def test_focal_loss_module_compiles() -> None:
    logits, mask = segmentation()
    loss = rn.FocalLoss(class_dim=1, ignore_index=255)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    assert_close(compiled(logits, mask), loss(logits, mask))
