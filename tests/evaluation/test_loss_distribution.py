"""Figure 4: whose loss is counted, how it is sorted and shared out, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_evaluate_run
import torch
from numpy.typing import NDArray
from PIL import Image
from test_evaluate_run import tiny_checkpoint
from torch import Tensor

from retinanet.anchors import level_anchors
from retinanet.data.dataset import Dataset
from retinanet.data.loading import eval_loader
from retinanet.errors import ConfigError, DataError, WeightsError
from retinanet.inference.backends import Network, build_network
from retinanet.matching import anchor_labels, match_anchors
from retinanet.model.checkpoint import save_checkpoint
from retinanet.report.loss_distribution import (
    MAX_KEY,
    LossDistribution,
    Sampling,
    _Sample,
    anchor_losses,
    cumulative_share,
    distribution_of,
    loss_distribution,
)
from retinanet.structures import BACKGROUND, IGNORED, Outputs, flatten_levels

painted, val = test_evaluate_run.painted, test_evaluate_run.val  # fixtures

GAMMAS = (0.0, 0.5, 1.0, 2.0)


def by_hand(logits: Sequence[float], label: int, gamma: float) -> float:
    """Eq. 4 of one anchor, summed over its classes."""
    total = 0.0
    for k, x in enumerate(logits):
        p = 1 / (1 + math.exp(-x))
        p_t = p if k == label else 1 - p
        total -= (1 - p_t) ** gamma * math.log(p_t)
    return total


def share_by_loop(losses: Sequence[float], fraction: float) -> float:
    """What the easiest anchors hold: whole ones, and of the last the part that is left."""
    left, held = fraction * len(losses), 0.0
    for loss in sorted(losses):
        held += min(1.0, max(0.0, left)) * loss
        left -= 1
    return held / sum(losses)


def network_of(**changes: Any) -> Network:
    model = tiny_checkpoint(**changes).model
    # Scores of a trained model, not those of the prior.
    with torch.no_grad():
        model.class_head.last.weight.mul_(60)
    return build_network(model, torch.device("cpu"), precision="float32")


def measure(network: Network, dataset: Dataset, **changes: Any) -> LossDistribution:
    options: dict[str, Any] = {"image_size": 64, "max_size": 96}
    return distribution_of(network, dataset, **{**options, **changes})


def losses_by_loop(
    network: Network, dataset: Dataset, gamma: float, **matching: Any
) -> tuple[list[float], list[float], int]:
    """Losses of positives and of negatives, and how many anchors were ignored."""
    model = network.model
    positives, negatives, ignored = [], [], 0
    for batch in eval_loader(
        dataset, batch_size=1, image_size=64, max_size=96, fill=(124, 116, 104)
    ):
        outputs: Outputs = network(batch.images)
        shapes = [(one.shape[-2], one.shape[-1]) for one in outputs.logits]
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
    expected = [share_by_loop(losses.tolist(), one) for one in fractions]
    np.testing.assert_allclose(cumulative_share(losses, fractions), expected, rtol=1e-12)


def test_cumulative_share_by_hand() -> None:
    # Sorted 1, 2, 3, 4 of 10: half of the anchors hold 3, three quarters 6.
    shares = cumulative_share(np.array([4.0, 1, 3, 2]), np.array([0, 0.25, 0.5, 0.75, 1]))
    np.testing.assert_allclose(shares, [0, 0.1, 0.3, 0.6, 1])
    assert np.isnan(cumulative_share(np.zeros(3), np.array([0.5]))).all()


def test_anchor_losses_by_hand() -> None:
    logits = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    labels = torch.tensor([0, 1, 2, BACKGROUND, BACKGROUND, 0, 1, 2, BACKGROUND])
    expected = [
        [by_hand(row, label, gamma) for gamma in GAMMAS]
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    torch.testing.assert_close(
        anchor_losses(logits, labels, GAMMAS), torch.tensor(expected, dtype=torch.float64)
    )


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = torch.randn(50, 3), torch.randint(-1, 3, (50,))
    whole = anchor_losses(logits, labels, GAMMAS)
    monkeypatch.setattr("retinanet.report.loss_distribution._CHUNK", 20)
    torch.testing.assert_close(anchor_losses(logits, labels, GAMMAS), whole)
    assert anchor_losses(logits[:0], labels[:0], GAMMAS).shape == (0, 4)


def test_distribution_against_loops(val: Dataset) -> None:
    network = network_of()
    found = measure(network, val, gammas=(0.0, 2.0))
    assert found.images == 4
    assert (found.source, found.split, found.classes) == (str(val.source), "val", 3)
    for place, gamma in enumerate((0.0, 2.0)):
        positives, negatives, ignored = losses_by_loop(network, val, gamma)
        assert found.positive_anchors == found.positives_taken == len(positives) > 0
        assert found.negative_anchors == found.negatives_taken == len(negatives)
        assert found.ignored_anchors == ignored > 0
        for curve, losses in (
            (found.positives[place], positives),
            (found.negatives[place], negatives),
        ):
            assert curve.gamma == gamma
            assert curve.mean == pytest.approx(sum(losses) / len(losses), rel=1e-4)
            for at in (0, 100, 400, 495, 500):
                expected = share_by_loop(losses, found.fractions[at])
                assert curve.cumulative[at] == pytest.approx(expected, abs=2e-4)
            for part, share in curve.hardest.items():
                assert share == pytest.approx(1 - share_by_loop(losses, 1 - part), abs=2e-4)
    assert (found.fractions[0], found.fractions[-1], len(found.fractions)) == (0, 1, 501)


def test_matching_is_that_of_the_checkpoint(val: Dataset) -> None:
    network = network_of()
    rules = {"foreground_iou": 0.6, "background_iou": 0.3, "low_quality_matches": True}
    found = measure(network, val, matching={**rules, "gamma": 2.0, "normalizer": "running"})
    positives, negatives, ignored = losses_by_loop(network, val, 0.0, **rules)
    assert (found.positive_anchors, found.negative_anchors, found.ignored_anchors) == (
        len(positives), len(negatives), ignored,
    )  # fmt: skip
    assert (found.foreground_iou, found.background_iou, found.low_quality_matches) == (
        0.6,
        0.3,
        True,
    )
    assert measure(network, val).positive_anchors != found.positive_anchors


def test_classes_are_matched_by_name(val: Dataset) -> None:
    # The data's labels in the order of the model, or in another order with the map to it.
    network = network_of()
    turned = {0: 2, 1: 0, 2: 1}
    other = replace(
        val,
        classes=("green", "blue", "red"),
        images=tuple(
            replace(
                one,
                annotations=tuple(replace(a, label=turned[a.label]) for a in one.annotations),
            )
            for one in val.images
        ),
    )
    straight = measure(network, val)
    assert measure(network, other, label_map=(2, 0, 1)).positives == straight.positives
    assert measure(network, other).positives != straight.positives


def test_sample_is_even_bounded_and_seeded(val: Dataset) -> None:
    network = network_of()
    every = measure(network, val)
    some = measure(network, val, sampling=Sampling(10, 300))
    assert some.positive_anchors == every.positive_anchors
    assert some.negative_anchors == every.negative_anchors
    assert every.positive_anchors > 10
    assert (some.positives_taken, some.negatives_taken) == (10, 300)
    assert some == measure(network, val, sampling=Sampling(10, 300))
    other = measure(network, val, sampling=Sampling(10, 300, 1))
    assert other.negatives != some.negatives
    # A sample of half of them tells the same.
    half = measure(network, val, sampling=Sampling(max_negatives=every.negative_anchors // 2 + 1))
    for one, whole in zip(half.negatives, every.negatives, strict=True):
        assert one.mean == pytest.approx(whole.mean, rel=0.2)


def sample_of(most: int, keys: Sequence[NDArray[np.int32]]) -> _Sample:
    """A sample of images, in which each anchor's loss is the number of its image."""
    sample = _Sample(most)
    for number, own in enumerate(keys):
        own = own[own < sample.limit]
        sample.add(own, np.full((len(own), 2), number, np.float32), len(keys[number]))
    sample.losses()  # cuts it
    return sample


def test_sample_is_of_the_lowest_keys() -> None:
    rng = np.random.default_rng(0)
    sizes = (0, 7, 500, 30, 0, 900, 1, 250, 400)
    keys = [rng.integers(MAX_KEY, size=size, dtype=np.int32) for size in sizes]
    owner = np.repeat(np.arange(len(sizes)), sizes)
    in_order = owner[np.argsort(np.concatenate(keys))]
    for most in (1, 2, 20, 299, 300, 2087, 2088, 2089, 10_000):
        sample = sample_of(most, keys)
        assert (sample.seen, sample.taken) == (2088, min(most, 2088))
        for place in (0, 1):
            assert sorted(sample.losses()[:, place]) == sorted(in_order[:most])


def test_sample_of_equal_keys_is_not_empty() -> None:
    # More anchors of one key than the sample holds, which halving or a bare limit would all drop.
    for most in (1, 3, 4):
        assert sample_of(most, [np.full(5, 9, np.int32)] * 6).taken == most
        assert sample_of(most, [np.zeros(5, np.int32)] * 6).taken == most


def test_every_image_gives_its_part(val: Dataset, tmp_path: Path) -> None:
    # First empty images, of no loss, then crowded ones, of much: each kind gives half, though the
    # sample is full before the first crowded one comes.
    images = []
    for name, colour in (("empty", 0), ("crowded", 255)):
        Image.new("RGB", (96, 64), (colour,) * 3).save(tmp_path / f"{name}.png")
        images += [replace(val.images[0], path=tmp_path / f"{name}.png")] * 6
    network = network_of()

    def run(imgs: Tensor) -> Outputs:
        outputs = network(imgs)
        score = 9.0 if imgs.float().mean() > 100 else -30.0
        return Outputs(tuple(torch.full_like(one, score) for one in outputs.logits), outputs.deltas)

    judge = Network(network.model, torch.device("cpu"), "float32", "torch", "by brightness", run)
    for seed in range(4):
        found = measure(
            judge, replace(val, images=tuple(images)), sampling=Sampling(10**5, 600, seed)
        )
        assert found.negative_anchors > 4 * 600
        assert found.negatives_taken == 600
        # Each of the 3 classes of a crowded anchor costs log(1 + e^9) = 9.0001. Half of 600 is 300,
        # give or take 12.
        assert found.negatives[0].mean / (3 * 9.0001) == pytest.approx(0.5, abs=0.09)
        # The hardest tenth are crowded ones, which are alike: a tenth of 600 over some 300.
        assert found.negatives[0].hardest[0.1] == pytest.approx(0.2, abs=0.04)


def test_focal_loss_moves_the_loss_to_the_hard(val: Dataset) -> None:
    # Sec. 5.1: as gamma rises the negatives' loss concentrates on the hard ones.
    found = measure(network_of(), val)
    shares = [one.hardest[0.1] for one in found.negatives]
    assert shares == sorted(shares)
    assert shares[-1] > shares[0]


def test_as_json(val: Dataset) -> None:
    found = measure(network_of(), val, gammas=(2.0,))
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
    assert [one.gamma for one in found.positives] == list(GAMMAS)
    # An untrained model scores all alike, so the loss is spread evenly over the negatives.
    assert found.negatives[0].hardest[0.2] == pytest.approx(0.2, abs=0.02)
    larger = loss_distribution(
        checkpoint, painted, device="cpu", precision="float32", workers=0, image_size=128
    )
    assert larger.negative_anchors > 2 * found.negative_anchors


def test_what_is_refused(val: Dataset, painted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of()
    nothing = replace(val, images=tuple(replace(one, annotations=()) for one in val.images))
    with pytest.raises(DataError, match=r"split 'val'.*no anchor matches an object"):
        measure(network, nothing)
    with monkeypatch.context() as patch:
        patch.setattr(
            "retinanet.report.loss_distribution.match_anchors",
            lambda anchors, *_, **__: torch.zeros(1, len(anchors), dtype=torch.int64),
        )
        with pytest.raises(DataError, match="no anchor is background"):
            measure(network, val)
    for gammas, said in (
        ((), "one or more"),
        ((1.0, 1.0), "different numbers"),
        ((-0.5,), "got -0.5"),
        ((math.nan,), "got nan"),
        ((math.inf,), "got inf"),
    ):
        with pytest.raises(ConfigError, match=said):
            loss_distribution(tiny_checkpoint(), val, gammas=gammas, device="cpu")
    with pytest.raises(ConfigError, match="one anchor or more"):
        measure(network, val, sampling=Sampling(max_negatives=0))
    with pytest.raises(DataError, match="no split 'tset'"):
        loss_distribution(tiny_checkpoint(), painted, split="tset", device="cpu")
    with pytest.raises(WeightsError, match="'blue'"):
        loss_distribution(tiny_checkpoint(("red", "green")), val, device="cpu")
    with torch.no_grad():
        network.model.class_head.last.bias.fill_(math.nan)  # type: ignore[union-attr]
    broken = build_network(network.model, torch.device("cpu"), precision="float32")
    with pytest.raises(DataError, match="scores of the model are NaN or Inf"):
        measure(broken, val)
