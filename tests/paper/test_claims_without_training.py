"""What the paper says of the first steps, shown without training a model to its end.

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
from retinanet.config import Recipe, load_recipe
from retinanet.losses import cross_entropy, focal_loss
from retinanet.losses.detection import detection_losses
from retinanet.matching import anchor_labels, match_anchors
from retinanet.model.retinanet import build_retinanet
from retinanet.structures import BACKGROUND, IGNORED, Targets, pad_targets
from retinanet.training.optim import build_optimizer

CLASSES = 80  # COCO's


def dark_squares(
    side: int, count: int, sizes: tuple[int, int], seed: int
) -> tuple[Tensor, Targets]:
    """An image of noise with darker squares, (1, 3, side, side) uint8, and where they are."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (3, side, side), dtype=np.uint8)
    boxes = []
    for size in rng.integers(*sizes, count):
        x, y = rng.integers(0, side - size, 2)
        image[:, y : y + size, x : x + size] //= 4
        boxes.append([x, y, x + size, y + size])
    labels = torch.from_numpy(rng.integers(0, CLASSES, count))
    targets = pad_targets([torch.tensor(np.array(boxes), dtype=torch.float32)], [labels])
    return torch.from_numpy(image)[None], targets


# --- Sec. 3.3 and 5.1: cross entropy with and without the prior ---------------------------------


def first_losses(prior: float, steps: int, seed: int) -> list[float]:
    """The class loss of the first steps, as far as it is a number.

    The paper's loss, heads (four convolutions and the last), initial weights, SGD, learning rate
    and momentum, on an image of 3,069 anchors, of which about 100 are assigned to an object: far
    fewer negatives to a positive than in the paper, so that divergence is not made easier. Other
    than there: one image per step, a ResNet-18 from nothing (group norm) and 64 channels.
    """
    recipe = load_recipe("paper_1x", ["loss.classification=cross_entropy", "loss.alpha=none"])
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
    image, targets = dark_squares(128, 3, (32, 48), seed)
    anchors = level_anchors(model.anchors, feature_sizes(model.anchors.strides, 128, 128))
    optimizer = paper_optimizer(recipe, model)
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


def paper_optimizer(recipe: Recipe, model: torch.nn.Module) -> torch.optim.Optimizer:
    train = recipe.train
    assert (train.optimizer, train.lr, train.momentum) == ("sgd", 0.01, 0.9)  # Sec. 4.1
    return build_optimizer(model, train)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_cross_entropy_without_the_prior_diverges_where_the_prior_keeps_it_finite(
    seed: int,
) -> None:
    """Sec. 5.1: plain CE diverges at once; the prior alone mends that."""
    steps = 12
    with_prior = first_losses(load_recipe("paper_1x").model.prior, steps, seed)
    without = first_losses(0.5, steps, seed)  # a bias of 0
    assert len(with_prior) == steps  # finite throughout
    assert all(after < before for before, after in pairwise(with_prior))
    # Either no number any more, or a million times what it began with.
    assert len(without) < steps or max(without) > 1e6 * without[0]
    # It also begins far higher: every sigmoid costs ln 2 instead of -log .99.
    assert without[0] > 30 * with_prior[0]


# --- Sec. 1, 3.2, 3.3: what easy negatives hold of the loss at the start ------------------------


@pytest.fixture(scope="module")
def start() -> Tensor:
    """(1, R) labels of the paper's anchors in an image of 600 x 1000 px with 36 objects."""
    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(np.log(24), np.log(320), (36, 2)))
    corners = rng.uniform(0, 1, (36, 2)) * (np.array([1000, 600]) - sides)
    boxes = torch.tensor(np.concatenate([corners, corners + sides], 1), dtype=torch.float32)
    targets = pad_targets([boxes], [torch.from_numpy(rng.integers(0, CLASSES, 36))])
    spec = anchor_spec([8, 16, 32, 64, 128])
    anchors = torch.cat(level_anchors(spec, feature_sizes(spec.strides, 600, 1000)))
    return anchor_labels(match_anchors(anchors, targets), targets.labels)


def test_the_anchors_are_the_papers(start: Tensor) -> None:
    # 75 x 125 + 38 x 63 + 19 x 32 + 10 x 16 + 5 x 8 = 12,577 cells of 9 anchors: Sec. 3.3's ~100k.
    assert start.numel() == 12_577 * 9
    assert 100 < int((start >= 0).sum()) < 3000


def shares(labels: Tensor, prior: float) -> tuple[float, float]:
    """What negatives hold of the whole loss at the start: with CE, and with focal loss, gamma 2.

    A negative is an anchor's sigmoid of a class that is not there. Scores lie about the prior.
    """
    noise = torch.randn(*labels.shape, CLASSES, generator=torch.Generator().manual_seed(0))
    logits = noise * 0.1 - math.log((1 - prior) / prior)
    of_object = labels >= 0
    rows, own = logits[of_object], labels[of_object].unsqueeze(-1)
    found = []
    for loss in (cross_entropy, lambda x, y: focal_loss(x, y, alpha=None, gamma=2.0)):
        # Of a foreground anchor the sigmoid of its own class is the positive: as one class alone.
        positive = float(loss(rows.gather(-1, own), torch.zeros(len(rows), dtype=torch.int64)))
        found.append(1 - positive / float(loss(logits, labels)))
    return found[0], found[1]


def expected_shares(labels: Tensor, prior: float) -> tuple[float, float]:
    """The same by hand, every score exactly at the prior."""
    counted = int((labels != IGNORED).sum()) * CLASSES
    positives = int((labels >= 0).sum())
    negatives = counted - positives
    found = []
    for gamma in (0.0, 2.0):
        negative = negatives * prior**gamma * -math.log(1 - prior)
        positive = positives * (1 - prior) ** gamma * -math.log(prior)
        found.append(negative / (negative + positive))
    return found[0], found[1]


def test_with_the_prior_easy_negatives_hold_the_cross_entropy_and_not_the_focal_loss(
    start: Tensor,
) -> None:
    # Each costs -log .99 = .01 beside a positive's -log .01 = 4.6, but there are thousands to one.
    # Focal loss takes .01^2 of the one and .99^2 of the other.
    ce, focal = shares(start, 0.01)
    assert ce > 0.9
    assert focal < 0.01
    assert (ce, focal) == pytest.approx(expected_shares(start, 0.01), rel=0.05)


def test_without_the_prior_negatives_hold_every_loss(start: Tensor) -> None:
    # All p_t are one half: focal loss scales positives and negatives alike, to a quarter.
    ce, focal = shares(start, 0.5)
    assert ce > 0.999
    assert focal > 0.999
    assert (ce, focal) == pytest.approx(expected_shares(start, 0.5), rel=1e-4)


def test_the_prior_lowers_the_cross_entropy_of_the_background() -> None:
    # K ln 2 = 55.5 an anchor without it (Sec. 3.3), -K log .99 = .80 with it: 69 times less.
    background = torch.full((10,), BACKGROUND)
    without = float(cross_entropy(torch.zeros(10, CLASSES), background)) / 10
    with_prior = float(cross_entropy(torch.full((10, CLASSES), -math.log(99)), background)) / 10
    assert without == pytest.approx(80 * 0.693147, rel=1e-5)
    assert with_prior == pytest.approx(80 * 0.0100503, rel=1e-5)
    assert without / with_prior == pytest.approx(68.97, rel=1e-3)
