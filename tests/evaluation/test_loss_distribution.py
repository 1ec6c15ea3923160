"""Figure 4: losses of the matched anchors, their cumulative shares, and errors."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from painter import tiny_checkpoint
from PIL import Image
from torch import Tensor

from retinanet.anchors import level_anchors
from retinanet.data.dataset import Dataset
from retinanet.data.loading import eval_loader
from retinanet.errors import ConfigError, DataError, WeightsError
from retinanet.inference.backends import Network
from retinanet.inference.detector import Detector
from retinanet.losses.assignment import Assignment
from retinanet.matching import anchor_labels, match_anchors
from retinanet.model.checkpoint import save_checkpoint
from retinanet.report.loss_distribution import (
    GAMMAS,
    LossDistribution,
    anchor_losses,
    cumulative_share,
    loss_distribution,
)
from retinanet.structures import BACKGROUND, IGNORED, Outputs, flatten_levels


def by_hand(logits: Sequence[float], label: int, gamma: float) -> float:
    """Eq. 4 of one anchor, summed over its classes."""
    total = 0.0
    for k, x in enumerate(logits):
        p = 1 / (1 + math.exp(-x))
        p_t = p if k == label else 1 - p
        total -= (1 - p_t) ** gamma * math.log(p_t)
    return total


def share_by_loop(losses: Sequence[float], fraction: float) -> float:
    """Share of the easiest anchors, of the last of which only a part counts."""
    left, total = fraction * len(losses), 0.0
    for loss in sorted(losses):
        total += min(1.0, max(0.0, left)) * loss
        left -= 1
    return total / sum(losses)


def detector_of(classes: tuple[str, ...] = ("red", "green", "blue"), **loss: Any) -> Detector:
    checkpoint = tiny_checkpoint(classes, loss=loss)
    # Scores of a trained model, not those of the prior.
    with torch.no_grad():
        checkpoint.model.class_head.last.weight.mul_(60)
    return Detector(checkpoint, device="cpu", precision="float32")


def measure(detector: Detector, dataset: Dataset, **changes: Any) -> LossDistribution:
    return loss_distribution(detector, dataset, workers=0, **changes)


def losses_by_loop(
    detector: Detector, dataset: Dataset, gamma: float, **matching: Any
) -> tuple[list[float], list[float], int]:
    """Losses of positives and of negatives, and how many anchors were ignored."""
    model, network = detector.model, detector.network
    assert isinstance(network, Network)
    positives, negatives, ignored = [], [], 0
    for batch in eval_loader(
        dataset, batch_size=1, image_size=64, max_size=96, fill=(124, 116, 104)
    ):
        outputs: Outputs = network(batch.images)
        shapes = [(level.shape[-2], level.shape[-1]) for level in outputs.logits]
        anchors = torch.cat(level_anchors(model.anchors, shapes))
        matches = match_anchors(anchors, batch.targets, **matching)
        labels = anchor_labels(matches, batch.targets.labels)[0].tolist()
        rows = flatten_levels(outputs.logits, model.num_classes)[0].double().tolist()
        for row, label in zip(rows, labels, strict=True):
            if label == IGNORED:
                ignored += 1
            else:
                kind = negatives if label == BACKGROUND else positives
                kind.append(by_hand(row, label, gamma))
    return positives, negatives, ignored


def test_cumulative_share_against_a_loop() -> None:
    losses = np.random.default_rng(0).gamma(0.3, size=37)
    fractions = np.array([0, 0.01, 0.25, 0.5, 0.777, 0.99, 1])
    expected = [share_by_loop(losses.tolist(), x) for x in fractions]
    np.testing.assert_allclose(cumulative_share(losses, fractions), expected, rtol=1e-12)


def test_cumulative_share_by_hand() -> None:
    # Sorted 1, 2, 3, 4 of 10: half of the anchors hold 3, three quarters 6.
    shares = cumulative_share(np.array([4.0, 1, 3, 2]), np.array([0, 0.25, 0.5, 0.75, 1]))
    np.testing.assert_allclose(shares, [0, 0.1, 0.3, 0.6, 1])
    assert np.isnan(cumulative_share(np.zeros(3), np.array([0.5]))).all()


def test_anchor_losses_by_hand_in_chunks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    labels = torch.tensor([0, 1, 2, BACKGROUND, BACKGROUND, 0, 1, 2, BACKGROUND])
    expected = [
        [by_hand(row, label, gamma) for gamma in GAMMAS]
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    for chunk in (2**22, 7):
        monkeypatch.setattr("retinanet.report.loss_distribution.CHUNK", chunk)
        losses = anchor_losses(logits, labels, GAMMAS)
        torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64))
    assert anchor_losses(logits[:0], labels[:0], GAMMAS).shape == (0, 4)


def test_distribution_against_loops(val: Dataset) -> None:
    detector = detector_of()
    found = measure(detector, val, gammas=(0.0, 2.0))
    assert found.images == 4
    assert (found.source, found.split, found.classes) == (str(val.source), "val", 3)
    for i, gamma in enumerate((0.0, 2.0)):
        positives, negatives, ignored = losses_by_loop(detector, val, gamma)
        assert found.positive_anchors == found.positives_taken == len(positives) > 0
        assert found.negative_anchors == found.negatives_taken == len(negatives)
        assert found.ignored_anchors == ignored > 0
        for curve, losses in ((found.positives[i], positives), (found.negatives[i], negatives)):
            assert curve.gamma == gamma
            assert curve.mean == pytest.approx(sum(losses) / len(losses), rel=1e-4)
            for at in (0, 100, 400, 495, 500):
                expected = share_by_loop(losses, found.fractions[at])
                assert curve.cumulative[at] == pytest.approx(expected, abs=2e-4)
            for part, share in curve.hardest.items():
                assert share == pytest.approx(1 - share_by_loop(losses, 1 - part), abs=2e-4)
    assert (found.fractions[0], found.fractions[-1], len(found.fractions)) == (0, 1, 501)


def test_matching_is_that_of_the_checkpoint(val: Dataset) -> None:
    rules = {"foreground_iou": 0.6, "background_iou": 0.3, "low_quality_matches": True}
    detector = detector_of(**rules, gamma=2.0, normalizer="running")
    found = measure(detector, val)
    positives, negatives, ignored = losses_by_loop(detector, val, 0.0, **rules)
    assert (found.positive_anchors, found.negative_anchors, found.ignored_anchors) == (
        len(positives), len(negatives), ignored,
    )  # fmt: skip
    assert {name: getattr(found, name) for name in rules} == rules
    assert measure(detector_of(), val).positive_anchors != found.positive_anchors


def test_classes_are_matched_by_name(val: Dataset) -> None:
    turned = {0: 2, 1: 0, 2: 1}
    images = [
        replace(
            image,
            annotations=tuple(replace(a, label=turned[a.label]) for a in image.annotations),
        )
        for image in val.images
    ]
    other = replace(val, classes=("green", "blue", "red"), images=tuple(images))
    straight = measure(detector_of(), val)
    assert measure(detector_of(), other).positives == straight.positives
    swapped = measure(detector_of(("green", "blue", "red")), val)
    assert swapped.positives != straight.positives


def test_negatives_over_the_maximum_are_sampled_evenly(
    val: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # First empty images, of no loss, then crowded images, of much: each kind gives half.
    images = []
    for name, colour in (("empty", 0), ("crowded", 255)):
        Image.new("RGB", (96, 64), (colour,) * 3).save(tmp_path / f"{name}.png")
        images += [replace(val.images[0], path=tmp_path / f"{name}.png")] * 6
    detector = detector_of()
    network = detector.network

    def run(imgs: Tensor) -> Outputs:
        outputs = network(imgs)  # type: ignore[operator]
        score = 9.0 if imgs.float().mean() > 100 else -30.0
        return Outputs(tuple(torch.full_like(x, score) for x in outputs.logits), outputs.deltas)

    detector.network = Network(
        detector.model, torch.device("cpu"), "float32", "torch", "by brightness", run
    )
    monkeypatch.setattr("retinanet.report.loss_distribution.MAX_NEGATIVES", 1500)
    found = measure(detector, replace(val, images=tuple(images)))
    assert found.negative_anchors > 3 * 1500
    assert found.negatives_taken == pytest.approx(1500, rel=0.1)
    assert found.positives_taken == found.positive_anchors
    # Each of the 3 classes of a crowded anchor costs log(1 + e^9) = 9.0001.
    assert found.negatives[0].mean / (3 * 9.0001) == pytest.approx(0.5, abs=0.05)
    # The hardest tenth are of crowded images, whose anchors are alike: a tenth over a half.
    assert found.negatives[0].hardest[0.1] == pytest.approx(0.2, abs=0.02)


def test_focal_loss_moves_the_loss_to_the_hard(val: Dataset) -> None:
    # Sec. 5.1: as gamma rises the negatives' loss concentrates on the hard ones.
    found = measure(detector_of(), val)
    shares = [curve.hardest[0.1] for curve in found.negatives]
    assert shares == sorted(shares)
    assert shares[-1] > shares[0]


def test_as_json(val: Dataset) -> None:
    found = measure(detector_of(), val, gammas=(2.0,))
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["positives"][0]["hardest"].keys() == {"0.01", "0.1", "0.2"}
    assert len(values["negatives"][0]["cumulative"]) == 501
    empty = replace(found.positives[0], cumulative=(math.nan,), hardest={0.01: math.nan})
    values = replace(found, positives=(empty,)).to_dict()
    assert values["positives"][0]["cumulative"] == [None]
    assert values["positives"][0]["hardest"] == {"0.01": None}


def test_of_a_run_folder(painted: Path, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(
        ("blue", "red", "green"), loss={"foreground_iou": 0.4, "background_iou": 0.3}
    )
    save_checkpoint(tmp_path / "run" / "best", checkpoint)
    seen: list[tuple[int, int]] = []
    found = loss_distribution(
        tmp_path / "run",
        painted,
        device="cpu",
        precision="float32",
        workers=0,
        progress=lambda done, of: seen.append((done, of)),
    )
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert (found.foreground_iou, found.background_iou) == (0.4, 0.3)
    assert [curve.gamma for curve in found.positives] == list(GAMMAS)
    # An untrained model scores all alike, so the loss is spread evenly over the negatives.
    assert found.negatives[0].hardest[0.2] == pytest.approx(0.2, abs=0.02)
    larger = loss_distribution(
        checkpoint, painted, device="cpu", precision="float32", workers=0, image_size=128
    )
    assert larger.negative_anchors > 2 * found.negative_anchors


def test_loss_distribution_invalid_input_is_an_error(
    val: Dataset, painted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = replace(val, images=tuple(replace(image, annotations=()) for image in val.images))
    with pytest.raises(DataError, match=r"split 'val'.*no anchor matches an object"):
        measure(detector_of(), nothing)
    with monkeypatch.context() as patch:
        patch.setattr(
            "retinanet.report.loss_distribution.assign_anchors",
            lambda _, anchors, *__, **___: Assignment(
                torch.zeros(1, sum(map(len, anchors)), dtype=torch.int64), None
            ),
        )
        with pytest.raises(DataError, match="no anchor is background"):
            measure(detector_of(), val)
    for gammas, message in (
        ((), "one or more"),
        ((1.0, 1.0), "different numbers"),
        ((-0.5,), r"got \[-0.5\]"),
        ((math.nan,), r"got \[nan\]"),
        ((math.inf,), r"got \[inf\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            measure(detector_of(), val, gammas=gammas)
    with pytest.raises(DataError, match="no split 'tset'"):
        loss_distribution(tiny_checkpoint(), painted, split="tset", device="cpu")
    with pytest.raises(WeightsError, match="'blue'"):
        loss_distribution(tiny_checkpoint(("red", "green")), val, device="cpu")
    broken = tiny_checkpoint()
    torch.nn.init.constant_(broken.model.class_head.last.bias, math.nan)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="scores of the model are NaN or Inf"):
        loss_distribution(broken, val, workers=0, device="cpu", precision="float32")
