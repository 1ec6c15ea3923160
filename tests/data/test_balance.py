"""Repeat factor sampling, by numbers worked out by hand."""

from __future__ import annotations

import math
import random
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from labelled_folders import MakeImage, train_loader

from retinanet.config import DataConfig, load_recipe
from retinanet.data.balance import RepeatFactors, epoch_size, repeat_factors
from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.errors import ConfigError

BOX = (0.0, 0.0, 8.0, 8.0)


def dataset_of(labels: list[list[int]], paths: list[Path] | None = None) -> Dataset:
    """Images with objects of these labels; a negative label is an ignored object of class 2."""
    images = []
    for i, row in enumerate(labels):
        objects = tuple(
            Annotation(BOX, label) if label >= 0 else Annotation(BOX, 2, crowd=True)
            for label in row
        )
        images.append(LabelledImage(paths[i] if paths else Path(f"{i}.png"), i, objects))
    return Dataset(tuple(images), ("a", "b", "c"), (1, 2, 3), "train", "coco", Path("farm"))


def test_repeat_factors_by_hand() -> None:
    # Class a is in 8 of 16 images, b in 2, c in 1 (the ignored object does not count).
    labels = [[0], [0, 0]] * 3 + [[0, 1], [0, 2], [1], [-1]] + [[]] * 6
    found = repeat_factors(dataset_of(labels), 0.5)
    b, c = 2.0, math.sqrt(8)  # sqrt(.5 / (2 / 16)), sqrt(.5 / (1 / 16))
    assert found.images.tolist() == pytest.approx([1] * 6 + [b, c, b, 1] + [1] * 6)
    assert found.classes == {"c": pytest.approx(c), "b": pytest.approx(b)}
    assert found.epoch_size == 20  # 13 + 2 + 2 + 2.83, rounded
    assert found.describe() == (
        "balance: an epoch has 20 images of 16; repeat factors over 1: c 2.83, b 2.00"
    )
    assert repeat_factors(dataset_of(labels), 0.01).epoch_size == 16
    assert "no class is rare" in repeat_factors(dataset_of(labels), 0.01).describe()


def test_draw_occurrences_are_the_factors_on_average() -> None:
    factors = np.array([1.0, 2.3, 1.25, 3.0, 1.7, 1.0])
    repeats = RepeatFactors(factors, {})
    assert repeats.epoch_size == 10  # 9 whole ones and 1.25, rounded
    total: Counter[int] = Counter()
    epochs = 4000
    for epoch in range(epochs):
        drawn = Counter(repeats.draw(random.Random(epoch)))
        assert drawn.total() == 10
        for index, factor in enumerate(factors):
            assert math.floor(factor) <= drawn[index] <= math.ceil(factor)
        total += drawn
    means = [total[index] / epochs for index in range(6)]
    # The fractional parts are scaled by 1 / 1.25, so that their sum is whole.
    assert means == pytest.approx([1, 2.24, 1.2, 3, 1.56, 1], abs=0.03)


@pytest.fixture
def rare(tmp_path: Path, make_image: MakeImage) -> Dataset:
    """Eight images; class b is in the last only, with factor 2 at the threshold .5."""
    paths = [make_image(tmp_path / f"{i}.png", seed=i) for i in range(8)]
    return dataset_of([[0]] * 7 + [[1]], paths)


def indices(dataset: Dataset, **options: Any) -> list[list[int]]:
    settings: dict[str, Any] = {"balance": "repeat_factor", "balance_threshold": 0.5}
    settings |= {"batch_size": 3, "seed": 4, "image_size": 32, "max_size": 64}
    return [batch.indices.tolist() for batch in train_loader(dataset, **(settings | options))]


def test_train_loader_repeats_rare_images_in_every_epoch(rare: Dataset) -> None:
    config = DataConfig(balance="repeat_factor", balance_threshold=0.5)
    assert epoch_size(rare, config) == 9
    batches = indices(rare, steps=6)  # two epochs
    for epoch in (batches[:3], batches[3:]):
        assert Counter(chain.from_iterable(epoch)) == Counter([*range(8), 7])
    assert batches[:3] != batches[3:]


def test_train_loader_balanced_order_is_the_same_resumed_and_with_workers(rare: Dataset) -> None:
    batches = indices(rare, steps=7)
    assert indices(rare, steps=7, start_step=4) == batches[4:]
    assert indices(rare, steps=3, workers=1) == batches[:3]
    ranks = [indices(rare, steps=7, batch_size=1, rank=r, world_size=3) for r in range(3)]
    assert [[*chain(*parts)] for parts in zip(*ranks, strict=True)] == batches
    assert indices(rare, steps=7, seed=5) != batches


def test_train_loader_repetitions_are_augmented_differently(rare: Dataset) -> None:
    options: dict[str, Any] = {"image_size": 32, "max_size": 64, "scale_jitter": (0.5, 2.0)}
    options |= {"balance": "repeat_factor", "balance_threshold": 0.5}
    batches = list(train_loader(rare, batch_size=9, steps=1, seed=4, **options))
    sizes = batches[0].sizes[batches[0].indices == 7].tolist()
    assert len(sizes) == 2
    assert sizes[0] != sizes[1]


def test_balance_with_order_shards_is_an_error() -> None:
    settings = ["data.balance=repeat_factor", "data.order=shards"]
    with pytest.raises(ConfigError, match=r"order shards reads each shard once per epoch"):
        load_recipe("quick", settings)
