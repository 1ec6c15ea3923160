"""Tiles of images to train on, by numbers worked out by hand."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labelled_folders import train_loader
from PIL import Image

from retinanet.config import DataConfig, load_recipe
from retinanet.data.balance import balance, epoch_size
from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.data.images import read_image
from retinanet.data.statistics import count_objects
from retinanet.data.tiling import recommend_tile, tile_dataset
from retinanet.errors import ConfigError, ImageError
from retinanet.structures import BACKGROUND, IGNORED

Box = tuple[float, float, float, float]


def dataset_of(*images: LabelledImage) -> Dataset:
    return Dataset(images, ("a", "b"), (1, 2), "train", "coco", Path("farm"))


def objects(tile: LabelledImage) -> list[tuple[int | str, Box, bool]]:
    return [(a.id, a.box, a.ignored) for a in tile.annotations]


def test_tile_dataset_of_1000_by_700_by_hand() -> None:
    annotations = (
        Annotation((10, 10, 60, 60), 0, "corner"),
        Annotation((500, 100, 524, 120), 1, "half"),  # 12 of 24 columns in the first tile
        Annotation((506, 600, 536, 640), 0, "fifth"),  # 6 of 30
        Annotation((509, 20, 521, 30), 0, "quarter"),  # 3 of 12
        Annotation((980, 690, 1020, 700), 0, "outside", area=7.0),  # 20 x 10 of it in the image
        Annotation((700, 300, 900, 660), 0, "crowd", crowd=True),
    )
    image = LabelledImage(Path("a.png"), 7, annotations, 1000, 700)
    tiles = tile_dataset(dataset_of(image), 512, 0.2)
    # A step of 409: two steps across the 488 that are left over, one down the 188.
    assert [tile.window for tile in tiles.images] == [
        (0, 0, 512, 512), (244, 0, 756, 512), (488, 0, 1000, 512),
        (0, 188, 512, 700), (244, 188, 756, 700), (488, 188, 1000, 700),
    ]  # fmt: skip
    assert {(t.id, t.path, t.width, t.height) for t in tiles.images} == {
        (7, Path("a.png"), 512, 512)
    }
    assert list(map(objects, tiles.images)) == [
        [
            ("corner", (10, 10, 60, 60), False),
            ("half", (500, 100, 512, 120), False),
            ("quarter", (509, 20, 512, 30), False),
        ],
        [
            ("half", (256, 100, 280, 120), False),
            ("quarter", (265, 20, 277, 30), False),
            ("crowd", (456, 300, 512, 512), True),
        ],
        [
            ("half", (12, 100, 36, 120), False),
            ("quarter", (21, 20, 33, 30), False),
            ("crowd", (212, 300, 412, 512), True),
        ],
        [("fifth", (506, 412, 512, 452), True)],
        [("fifth", (262, 412, 292, 452), False), ("crowd", (456, 112, 512, 472), True)],
        [
            ("fifth", (18, 412, 48, 452), False),
            ("outside", (492, 502, 512, 512), False),
            ("crowd", (212, 112, 412, 472), True),
        ],
    ]
    assert all(a.area is None for tile in tiles.images for a in tile.annotations)
    assert tiles.description == (
        "train: 6 tiles of 512 pixels and smaller images, 5 with objects; 1 of 1 images are cut",
    )


def test_tile_dataset_small_images_stay_whole(tmp_path: Path) -> None:
    small = LabelledImage(Path("a.png"), 0, (Annotation((0, 0, 9, 9), 0),), 64, 40)
    file = tmp_path / "b.png"
    Image.new("RGB", (80, 30)).save(file)
    unstated = LabelledImage(file, 1)
    missing = LabelledImage(tmp_path / "c.png", 2)
    tiles = tile_dataset(dataset_of(small, unstated, missing), 64, 0)
    assert [tile.window for tile in tiles.images] == [
        None, (0, 0, 64, 30), (16, 0, 80, 30), None,
    ]  # fmt: skip
    assert tiles.images[0] is small
    assert tiles.images[3] is missing


def test_tile_dataset_names_objects_larger_than_tiles() -> None:
    large = Annotation((0, 0, 400, 400), 0)  # 100 x 100 is a sixteenth of it
    image = LabelledImage(Path("a.png"), 0, (large, Annotation((0, 0, 200, 200), 0)), 400, 400)
    tiles = tile_dataset(dataset_of(image), 100, 0)
    assert "1 objects of train are so large that no tile shows 25%" in tiles.description[-1]


@pytest.mark.parametrize(("side", "overlap"), [(64, 0.2), (64, 0.5), (100, 0.33)])
def test_objects_that_fit_the_overlap_are_whole_in_a_tile(side: int, overlap: float) -> None:
    draw = random.Random(0)
    for width, height in ((301, 199), (640, 65), (97, 1000)):
        limit = overlap * side
        boxes = []
        for _ in range(300):
            w, h = draw.uniform(1, limit), draw.uniform(1, limit)
            x, y = draw.uniform(0, width - w), draw.uniform(0, height - h)
            boxes.append(Annotation((x, y, x + w, y + h), 0, len(boxes)))
        image = LabelledImage(Path("a.png"), 0, tuple(boxes), width, height)
        sizes = {a.id: (a.box[2] - a.box[0], a.box[3] - a.box[1]) for a in boxes}
        whole = {
            a.id
            for tile in tile_dataset(dataset_of(image), side, overlap).images
            for a in tile.annotations
            if np.allclose((a.box[2] - a.box[0], a.box[3] - a.box[1]), sizes[a.id], atol=1e-9)
        }
        assert whole == set(sizes)


@pytest.fixture
def large(tmp_path: Path) -> Dataset:
    """Two images of 150 x 100 pixels: an object in each, 8 tiles of 64 without overlap more."""
    images = []
    for i, suffix in enumerate(("png", "tif")):
        pixels = np.random.default_rng(i).integers(0, 256, (100, 150, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.{suffix}")
        found = (Annotation((4.0, 6.0, 30.0, 20.0), i),)
        images.append(LabelledImage(tmp_path / f"{i}.{suffix}", i, found, 150, 100))
    return dataset_of(*images)


PLAIN: dict[str, Any] = {"batch_size": 3, "image_size": 64, "max_size": 64, "horizontal_flip": 0}


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_reads_tiles_as_crops_of_the_images(large: Dataset, workers: int) -> None:
    tiles = tile_dataset(large, 64, 0)
    options = {**PLAIN, "tile": 64, "empty_tiles": 1.0, "workers": workers}
    seen = []
    for batch in train_loader(tiles, steps=4, seed=0, **options):
        for i, index in enumerate(batch.indices.tolist()):
            tile = tiles.images[index]
            assert tile.window is not None
            x1, y1, x2, y2 = tile.window
            assert torch.equal(batch.images[i], read_image(tile.path)[:, y1:y2, x1:x2])
            assert batch.original_sizes[i].tolist() == [64, 64]
            real = batch.targets.labels[i] != BACKGROUND
            assert batch.targets.boxes[i][real].tolist() == [list(a.box) for a in tile.annotations]
            seen.append(index)
    assert sorted(seen) == list(range(12))  # an epoch: 3 x 2 tiles of each image


def test_loader_gives_cut_objects_the_label_ignored(large: Dataset) -> None:
    box = (60.0, 10.0, 80.0, 20.0)  # 4 of 20 columns in the first tile
    image = replace(large.images[0], annotations=(Annotation(box, 1),))
    tiles = tile_dataset(replace(large, images=(image,)), 64, 0)
    found = {}
    for batch in train_loader(tiles, steps=2, seed=0, tile=64, empty_tiles=1.0, **PLAIN):
        for i, index in enumerate(batch.indices.tolist()):
            found[index] = batch.targets.labels[i][batch.targets.labels[i] != BACKGROUND].tolist()
    # From 0, 43 and 86 across, 0 and 36 down.
    assert found == {0: [IGNORED], 1: [1], 2: [], 3: [], 4: [], 5: []}


def test_empty_tiles_are_drawn_at_their_rate(large: Dataset) -> None:
    tiles = tile_dataset(large, 32, 0)  # 5 x 4 of each image
    config = DataConfig(tile=32, tile_overlap=0, empty_tiles=0.25)
    full = {i for i, tile in enumerate(tiles.images) if tile.annotations}
    assert (len(tiles), len(full)) == (40, 2)
    assert epoch_size(tiles, config) == 2 + round(38 * 0.25)
    repeats = balance(tiles, config)
    assert repeats is not None
    drawn = [repeats.draw(random.Random(epoch)) for epoch in range(200)]
    assert all(full <= set(epoch) and len(epoch) == len(set(epoch)) == 12 for epoch in drawn)
    counts = Counter(index for epoch in drawn for index in epoch if index not in full)
    assert len(counts) == 38
    assert min(counts.values()) > 25  # 200 x 10 / 38 = 53 on average
    # A background image that is no tile is drawn like any other; and none of the tiles.
    background = dataset_of(*tiles.images, LabelledImage(Path("b.png"), 9))
    assert epoch_size(background, DataConfig(tile=32, empty_tiles=0)) == 3
    assert epoch_size(background, DataConfig(tile=32, empty_tiles=1)) == 41
    # Class b is in one of 40 tiles: sqrt(.1 / (1 / 40)) = 2; so is a.
    config = replace_config(config, balance="repeat_factor", balance_threshold=0.1)
    assert epoch_size(tiles, config) == 4 + round(38 * 0.25)


def replace_config(config: DataConfig, **changes: Any) -> DataConfig:
    return DataConfig(**{**config.model_dump(), **changes})


def test_tile_of_wrong_size_in_the_labels_is_an_error(large: Dataset) -> None:
    image = replace(large.images[0], width=200, height=100)
    tiles = tile_dataset(replace(large, images=(image,)), 64, 0)
    with pytest.raises(ImageError, match="outside the image of 150 x 100 pixels: the labels state"):
        list(train_loader(tiles, steps=3, seed=0, tile=64, empty_tiles=1.0, **PLAIN))


def test_tile_settings() -> None:
    assert load_recipe("quick").data.tile is None
    assert load_recipe("quick", ["data.tile=0"]).data.tile is None
    assert load_recipe("quick", ["data.tile=none"]).data.tile is None
    assert load_recipe("quick", ["data.tile=512"]).data.tile == 512
    for wrong in ("31", "-64", "true", "big"):
        with pytest.raises(ConfigError, match=r"data\.tile"):
            load_recipe("quick", [f"data.tile={wrong}"])
    with pytest.raises(ConfigError, match=r"give data\.order=images, or data\.tile=none"):
        load_recipe("quick", ["data.tile=512", "data.order=shards"])


@pytest.mark.parametrize(
    ("objects", "size", "expected"),
    [
        ([20] * 20, (4000, 3000), 256),  # 2.6 px at 384: 384 x 20 / 32 = 240, in steps of 32
        ([10] * 20, (4000, 3000), 192),  # 120 would magnify more than twofold
        ([20] * 17 + [100] * 3, (4000, 3000), 512),  # 5 x 100
        ([20] * 17 + [700] * 3, (4000, 3000), None),  # 3500 is larger than the image
        ([140] * 20, (4000, 3000), None),  # 17.9 px at 384
        ([15] * 20, (400, 380), 192),  # 15.2 px at 384, 30 in tiles
        ([], (4000, 3000), None),
    ],
)
def test_recommend_tile_by_hand(
    objects: list[int], size: tuple[int, int], expected: int | None
) -> None:
    found = tuple(Annotation((0, 0, side, side), 0, i) for i, side in enumerate(objects))
    image = LabelledImage(Path("a.png"), 0, found, *size)
    assert recommend_tile(count_objects(dataset_of(image), {}), 384, 640) == expected
