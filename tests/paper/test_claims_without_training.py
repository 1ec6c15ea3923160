"""Claims of the paper about the first steps of training.

Sec. 3.2's numbers (p_t = .9 costs 100 times less, .968 1000 times, p_t <= .5 at most 4 times) are
in ``tests/core/test_losses_classification.py``.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from retinanet.anchors import anchor_spec, feature_sizes, level_anchors
from retinanet.config import load_recipe
from retinanet.losses import cross_entropy, focal_loss
from retinanet.losses.detection import detection_losses
from retinanet.matching import anchor_labels, match_anchors
from retinanet.model.retinanet import build_retinanet
from retinanet.structures import BACKGROUND, IGNORED, Targets, pad_targets
from retinanet.training.optim import build_optimizer

CLASSES = 80  # COCO's


def dark_squares(seed: int) -> tuple[Tensor, Targets]:
    """Return (1, 3, 128, 128) uint8 noise with three darker squares, and their boxes."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (3, 128, 128), dtype=np.uint8)
    boxes = []
    for size in rng.integers(32, 48, 3):
        x, y = rng.integers(0, 128 - size, 2)
        image[:, y : y + size, x : x + size] //= 4
        boxes.append([x, y, x + size, y + size])
    labels = torch.from_numpy(rng.integers(0, CLASSES, 3))
    targets = pad_targets([torch.tensor(np.array(boxes), dtype=torch.float32)], [labels])
    return torch.from_numpy(image)[None], targets


def first_losses(prior: float, steps: int, seed: int) -> list[float]:
    """Return the class loss of the first steps, up to the first NaN or Inf.

    With the paper's loss, heads, initial weights, SGD, learning rate and momentum, on 3,069 anchors
    of which about 100 are matched to a box: far fewer negatives per positive than in the paper, so
    that divergence is not made easier. Other than there: one image per step, a ResNet-18 without
    ImageNet weights (group norm) and 64 channels.
    """
    recipe = load_recipe("paper_1x", ["loss.classification=cross_entropy", "loss.alpha=none"])
    train = recipe.train
    assert (train.optimizer, train.lr, train.momentum) == ("sgd", 0.01, 0.9)  # Sec. 4.1
    torch.manual_seed(seed)
    model = build_retinanet(
        backbone="resnet18",
        num_classes=CLASSES,
        backbone_weights="none",
        norm="group",
        channels=64,
        head_depth=recipe.model.head_depth,
        prior=prior,
    )
    image, targets = dark_squares(seed)
    anchors = level_anchors(model.anchors, feature_sizes(model.anchors.strides, 128, 128))
    optimizer = build_optimizer(model, train)
    losses: list[float] = []
    for _ in range(steps):
        found = detection_losses(
            model(image), anchors, targets, num_classes=CLASSES, settings=recipe.loss_settings
        )
        if not torch.isfinite(found.total):
            break
        losses.append(float(found.classification.detach()))
        optimizer.zero_grad()
        torch.autograd.backward(found.total)
        optimizer.step()
    return losses


def test_cross_entropy_diverges_without_the_prior_and_not_with_it() -> None:
    """Sec. 5.1: plain CE diverges at once; the prior alone prevents it."""
    steps = 12
    with_prior = first_losses(load_recipe("paper_1x").model.prior, steps, seed=0)
    without = first_losses(0.5, steps, seed=0)  # a bias of 0
    assert len(with_prior) == steps  # finite throughout
    assert all(after < before for before, after in pairwise(with_prior))
    assert len(without) < steps or max(without) > 1e6 * without[0]
    # It also begins far higher: every sigmoid costs ln 2 instead of -log .99.
    assert without[0] > 30 * with_prior[0]


@pytest.fixture(scope="module")
def labels() -> Tensor:
    """(1, R) labels of the paper's anchors in an image of 600 x 1000 px with 36 objects."""
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(np.log(24), np.log(320), (36, 2)))
    corners = rng.uniform(0, 1, (36, 2)) * (np.array([1000, 600]) - sides)
    boxes = torch.tensor(np.concatenate([corners, corners + sides], 1), dtype=torch.float32)
    targets = pad_targets([boxes], [torch.from_numpy(rng.integers(0, CLASSES, 36))])
    spec = anchor_spec([8, 16, 32, 64, 128])
    anchors = torch.cat(level_anchors(spec, feature_sizes(spec.strides, 600, 1000)))
    # 75 x 125 + 38 x 63 + 19 x 32 + 10 x 16 + 5 x 8 = 12,577 cells of 9 anchors: Sec. 3.3's ~100k.
    assert len(anchors) == 12_577 * 9
    matched = anchor_labels(match_anchors(anchors, targets), targets.labels)
    assert 100 < int((matched >= 0).sum()) < 3000
    return matched


@pytest.mark.parametrize(
    ("prior", "ce", "focal"),
    [
        # A negative costs -log .99 = .01 and a positive -log .01 = 4.6, but there are thousands per
        # positive. Focal loss scales them by .01^2 and .99^2.
        (0.01, (0.9, 1.0), (0.0, 0.01)),
        # All p_t are one half: focal loss scales positives and negatives alike, to a quarter.
        (0.5, (0.999, 1.0), (0.999, 1.0)),
    ],
)
def test_share_of_negatives_in_the_initial_loss(
    labels: Tensor, prior: float, ce: tuple[float, float], focal: tuple[float, float]
) -> None:
    """Sec. 3.2, 3.3: with the prior, negatives dominate cross entropy, not the focal loss."""
    noise = torch.randn(*labels.shape, CLASSES, generator=torch.Generator().manual_seed(0))
    logits = noise * 0.1 - math.log((1 - prior) / prior)
    foreground = labels >= 0
    counted = int((labels != IGNORED).sum()) * CLASSES
    positives = int(foreground.sum())
    negatives = counted - positives
    rows, own = logits[foreground], labels[foreground].unsqueeze(-1)
    for gamma, (low, high) in ((0.0, ce), (2.0, focal)):

        def loss(x: Tensor, y: Tensor, gamma: float = gamma) -> float:
            return float(focal_loss(x, y, alpha=None, gamma=gamma))

        # The positive of a foreground anchor is the sigmoid of its own class: as a single class.
        positive = loss(rows.gather(-1, own), torch.zeros(len(rows), dtype=torch.int64))
        share = 1 - positive / loss(logits, labels)
        assert low < share < high
        # By hand, every score exactly at the prior.
        negative = negatives * prior**gamma * -math.log(1 - prior)
        positive = positives * (1 - prior) ** gamma * -math.log(prior)
        assert share == pytest.approx(negative / (negative + positive), rel=0.05)


def test_the_prior_lowers_the_cross_entropy_of_the_background() -> None:
    # K ln 2 = 55.5 per anchor without it (Sec. 3.3), -K log .99 = .80 with it: 69 times less.
    background = torch.full((10,), BACKGROUND)
    without = float(cross_entropy(torch.zeros(10, CLASSES), background)) / 10
    with_prior = float(cross_entropy(torch.full((10, CLASSES), -math.log(99)), background)) / 10
    assert without == pytest.approx(80 * 0.693147, rel=1e-5)
    assert with_prior == pytest.approx(80 * 0.0100503, rel=1e-5)
    assert without / with_prior == pytest.approx(68.97, rel=1e-3)
