"""Distribution focal loss: by hand, by a slow plain formula, and in the losses of a detector."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.testing import assert_close

import retinanet as rn
from retinanet.boxes import distances_to_deltas, side_distances
from retinanet.losses import assign_anchors, detection, distribution_focal_loss
from retinanet.structures import flatten_levels

BINS = 8
GENERATOR_SEED = 3


def slow(logits: np.ndarray, distance: float) -> float:
    """Equation 6 of Li et al. 2020 for one side, with the clamp of the published code."""
    n = len(logits) - 1
    y = min(max(distance, 0.0), n - 0.1)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    i = math.floor(y)
    return float(-((i + 1 - y) * np.log(p[i]) + (y - i) * np.log(p[i + 1])))


def test_loss_is_the_cross_entropy_with_the_bins_around_the_distance() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(200, BINS + 1)) * 3
    distances = generator.uniform(-2, BINS + 3, 200)
    distances[:5] = [0, 1, BINS - 1, BINS, BINS - 0.05]
    expected = [slow(*pair) for pair in zip(logits, distances, strict=True)]
    loss = distribution_focal_loss(torch.tensor(logits), torch.tensor(distances))
    assert_close(loss, torch.tensor(expected, dtype=torch.float64))
    # Two bins of probability 1/2 for a distance in the middle between them: ln 2, no gradient.
    sure = torch.tensor([[-40.0, 0.0, 0.0, -40.0]], requires_grad=True)
    loss = distribution_focal_loss(sure, torch.tensor([1.5]))
    assert_close(loss, torch.tensor([math.log(2)]))
    assert_close(torch.autograd.grad(loss.sum(), sure)[0], torch.zeros(1, 4))


def test_gradient_is_the_probability_less_the_share_of_the_bin() -> None:
    logits = torch.randn(3, 2, BINS + 1, dtype=torch.float64, requires_grad=True)
    distances = torch.tensor([[0.25, 3.0], [7.6, 4.5], [-1.0, 99.0]], dtype=torch.float64)
    assert gradcheck(lambda x: distribution_focal_loss(x, distances), (logits,))
    (gradient,) = torch.autograd.grad(distribution_focal_loss(logits, distances).sum(), logits)
    share = torch.zeros(3, 2, BINS + 1, dtype=torch.float64)
    shares = [{0: 0.75, 1: 0.25}, {3: 1.0}, {7: 0.4, 8: 0.6}, {4: 0.5, 5: 0.5}, {0: 1.0}]
    for row, bins in zip(share.view(6, -1), [*shares, {7: 0.1, 8: 0.9}], strict=True):
        for index, part in bins.items():
            row[index] = part
    assert_close(gradient, logits.detach().softmax(-1) - share)


def test_loss_of_bfloat16_is_computed_in_float32() -> None:
    logits = (torch.randn(50, BINS + 1) * 4).bfloat16()
    distances = torch.rand(50) * BINS
    loss = distribution_focal_loss(logits, distances)
    assert_close(loss, distribution_focal_loss(logits.float(), distances), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3, 4, 9), (4,), (3, 1)])
def test_shapes_that_do_not_fit_are_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"distributions are \(..., n \+ 1\) for distances"):
        distribution_focal_loss(torch.zeros(shape), torch.zeros(3))


def test_distances_and_deltas_by_hand() -> None:
    anchor = torch.tensor([0.0, 0.0, 40.0, 20.0])  # a quarter: 10 and 5 px; centre 20, 10
    boxes = torch.tensor([[0.0, 0, 40, 20], [10, -15, 60, 20], [25, 12, 30, 14]])
    distances = torch.tensor([[2.0, 2, 2, 2], [1, 5, 4, 2], [-0.5, -0.4, 1, 0.8]])
    assert_close(side_distances(anchor, boxes), distances)
    deltas = distances_to_deltas(distances)
    assert_close(deltas[1], torch.tensor([3 / 8, -3 / 8, math.log(5 / 4), math.log(7 / 4)]))
    assert_close(deltas, rn.encode_boxes(anchor, boxes))
    assert_close(rn.decode_boxes(deltas, anchor), boxes)
    assert distances_to_deltas(torch.zeros(1, 4)).isfinite().all()
    with pytest.raises(ValueError, match=r"distances are \(\.\.\., 4\), got \(3,\)"):
        distances_to_deltas(torch.zeros(3))
    with pytest.raises(ValueError, match="boxes are"):
        side_distances(anchor, torch.zeros(3))


def case() -> tuple[rn.Outputs, list[Tensor], rn.Targets]:
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    spec = rn.anchor_spec([8, 16])
    cells = rn.feature_sizes(spec.strides, 64, 96)

    def levels(channels: int) -> tuple[Tensor, ...]:
        return tuple(
            torch.randn(2, channels, *cell, generator=generator)
            .to(memory_format=torch.channels_last)
            .requires_grad_()
            for cell in cells
        )

    targets = rn.pad_targets(
        [torch.tensor([[3.0, 5, 40, 44], [30, 10, 90, 60]]), torch.zeros(0, 4)],
        [torch.tensor([1, 0]), torch.zeros(0, dtype=torch.int64)],
    )
    outputs = rn.Outputs(levels(18), levels(36), levels(36 * (BINS + 1)))
    return outputs, rn.level_anchors(spec, cells), targets


@pytest.mark.parametrize("classification", ["focal", "quality_focal"])
@pytest.mark.parametrize("readable", [True, False])
def test_detection_loss_adds_the_weighted_mean_over_the_sides(
    classification: str, readable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs, anchors, targets = case()
    options = {"classification": classification, "normalizer": "batch"}
    plain = rn.LossSettings(**options, distribution_weight=0)
    settings = rn.LossSettings(**options)
    assignment = assign_anchors(outputs, anchors, targets, num_classes=2, settings=settings)
    flat = flatten_levels(outputs.distributions, 4 * (BINS + 1)).detach()
    expected, divisor = 0.0, 0.0
    for image, row in (assignment.matches >= 0).nonzero().tolist():
        box = targets.boxes[image, assignment.matches[image, row]]
        sides = side_distances(torch.cat(anchors)[row], box)
        logits = flat[image, row].view(4, BINS + 1)
        weight = 1.0 if assignment.scores is None else float(assignment.scores[image, row])
        pairs = zip(logits.double().numpy(), sides.tolist(), strict=True)
        expected += weight * sum(slow(*pair) for pair in pairs) / 4
        divisor += weight
    monkeypatch.setattr(detection, "is_readable", lambda values: readable)
    losses, without = (
        rn.detection_losses(outputs, anchors, targets, num_classes=2, settings=given)
        for given in (settings, plain)
    )
    added = float((losses.box - without.box).detach())
    assert added == pytest.approx(0.25 * expected / max(1, divisor), rel=1e-4)
    gradients = torch.autograd.grad(losses.box - without.box, outputs.distributions)
    foreground = (assignment.matches >= 0).unsqueeze(-1).expand(-1, -1, 4 * (BINS + 1))
    moved = flatten_levels(gradients, 4 * (BINS + 1)) != 0
    assert moved.any()
    assert not (moved & ~foreground).any()


def test_every_distribution_has_a_gradient_without_objects() -> None:
    outputs, anchors, targets = case()
    nothing = rn.Targets(targets.boxes[:, :0], targets.labels[:, :0])
    losses = rn.detection_losses(outputs, anchors, nothing, num_classes=2)
    assert float(losses.box.detach()) == 0
    gradients = torch.autograd.grad(losses.total, outputs.distributions)
    assert not any(gradient.any() for gradient in gradients)


def test_distributions_that_do_not_fit_are_an_error() -> None:
    outputs, anchors, targets = case()
    for distributions, message in (
        (outputs.distributions[:1], "anchors have 2, 2 and 2 levels, distributions 1"),
        (tuple(level[:, 1:] for level in outputs.distributions), r"distributions \(2, 323, 8, 12"),
        (
            tuple(level[..., 1:] for level in outputs.distributions),
            r"distributions \(2, 324, 8, 11",
        ),
    ):
        wrong = outputs._replace(distributions=distributions)
        with pytest.raises(ValueError, match=message):
            rn.detection_losses(wrong, anchors, targets, num_classes=2)
