"""Mosaic, copy-paste, mixup and the other augmentations: boxes by their pixels, and by hand."""

from __future__ import annotations

import math
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labelled_folders import assert_same, train_loader, training
from PIL import Image, ImageDraw
from test_transforms import NO, Draws, painted, run
from torch import Tensor
from torch.testing import assert_close
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from retinanet.config import DataConfig, load_recipe
from retinanet.data import Annotation, Dataset, LabelledImage, convert, read_dataset
from retinanet.data.augment import Mix, ReadImage, draw_mix, mix_images
from retinanet.data.transforms import Transform, hide_boxes
from retinanet.errors import ConfigError, DataError
from retinanet.structures import BACKGROUND, IGNORED, Batch
from retinanet.training.overfit import overfit_recipe

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255))
MIXED: dict[str, Any] = {
    "mosaic": 0.5, "mixup": 0.5, "copy_paste": 0.5, "rotation": 20.0, "shear": 5.0,
    "translate": 0.1, "rotate90": True, "erase": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Six black images of several shapes, each with a rectangle in the colour of its class."""
    root = tmp_path_factory.mktemp("coloured")
    images = []
    for label, colour in enumerate(COLOURS):
        width, height = 60 + 12 * label, 110 - 8 * label
        box = (8 + label, 12, 40 + 2 * label, 44 - label)
        img = Image.new("RGB", (width, height))
        img.paste(colour, box)
        img.save(root / f"{label}.png")
        path = root / f"{label}.png"
        images.append(LabelledImage(path, label, (Annotation(box, label),), width, height))
    return Dataset(tuple(images), tuple("rgbymc"), tuple(range(1, 7)), "train", "coco", root)


def of_colour(image: Tensor, label: int) -> np.ndarray:
    """(H, W): the pixels that are nearest to the colour of a class."""
    colour = torch.tensor(COLOURS[label])[:, None, None]
    return ((image.int() - colour).abs().amax(dim=0) < 100).numpy()


def objects(batches: list[Batch]) -> list[tuple[Tensor, list[float], int]]:
    """The image without its padding, the box and the label of each object."""
    found = []
    for batch in batches:
        for i, (height, width) in enumerate(batch.sizes.tolist()):
            image = batch.images[i, :, :height, :width]
            real = batch.targets.labels[i] != BACKGROUND
            boxes, labels = batch.targets.boxes[i][real], batch.targets.labels[i][real]
            pairs = zip(boxes.tolist(), labels.tolist(), strict=True)
            found += [(image, box, label) for box, label in pairs]
    return found


def load(dataset: Dataset, **options: Any) -> list[Batch]:
    common: dict[str, Any] = {"batch_size": 4, "steps": 12, "seed": 3, "image_size": 96,
                              "max_size": 160, "close_augmentation": 0.0}  # fmt: skip
    return list(train_loader(dataset, **(common | options)))


def assert_boxes_enclose_their_colour(batches: list[Batch], min_objects: int) -> None:
    """Each box is touched by its colour at all four sides, up to a pixel of blur.

    Classes that are in an image twice are left out: their objects may touch.
    """
    checked = 0
    found = objects(batches)
    for image, box, label in found:
        alone = sum(other is image and kind == label for other, _, kind in found) == 1
        if label == IGNORED or min(box[2] - box[0], box[3] - box[1]) < 4 or not alone:
            continue
        x1, y1 = (max(0, math.floor(side) - 3) for side in box[:2])
        x2, y2 = (math.ceil(side) + 3 for side in box[2:])
        ys, xs = np.nonzero(of_colour(image[:, y1:y2, x1:x2], label))
        extent = [xs.min() + x1, ys.min() + y1, xs.max() + x1 + 1, ys.max() + y1 + 1]
        assert extent == pytest.approx(box, abs=1.51)
        checked += 1
    assert checked >= min_objects


@pytest.mark.parametrize(
    "options",
    [
        {"mosaic": 1.0},
        {"mosaic": 1.0, "scale_jitter": (0.5, 2.0), "crop": True, "rotate90": True},
        {"crop": "iou", "scale_jitter": (0.7, 1.0)},
        {"translate": 0.4, "rotate90": True},
        {"horizontal_flip": 0.5, "vertical_flip": 0.5, "scale_jitter": (1, 2), "crop": True},
        {"any_corner": True},
    ],
)
def test_boxes_stay_on_their_pixels(coloured: Dataset, options: dict[str, Any]) -> None:
    batches = load(coloured, **options)
    if options.get("any_corner"):  # padded at any side
        batches = [replace(b, sizes=torch.tensor([b.images.shape[-2:]] * 4)) for b in batches]
    assert_boxes_enclose_their_colour(batches, 30)


def test_mosaic_shows_four_images_and_labels_all_that_is_seen(coloured: Dataset) -> None:
    batches = load(coloured, mosaic=1.0, max_size=200, horizontal_flip=0.0, fill=(128, 128, 128))
    counts = []
    for batch in batches:
        for i, (height, width) in enumerate(batch.sizes.tolist()):
            image = batch.images[i, :, :height, :width]
            boxes, labels = batch.targets.boxes[i], batch.targets.labels[i]
            counts.append(int((labels != BACKGROUND).sum()))
            rest = np.ones((height, width), bool)
            for x1, y1, x2, y2 in boxes[labels != BACKGROUND].tolist():
                area = slice(math.floor(y1), math.ceil(y2)), slice(math.floor(x1), math.ceil(x2))
                rest[area] = False
            assert not (rest & (image.amax(dim=0).numpy() > 150)).any()
            # The canvas has the size of its first image, and no gap where the shapes are alike.
            first = batch.original_sizes[i].double()
            assert (height, width) == tuple((first * 96 / first.min()).round().int().tolist())
            assert (image == 128).all(dim=0).double().mean() < 0.35
    assert max(counts) == 4
    assert len(set(counts)) > 1


def test_mosaic_parts_are_read_at_the_size_they_need() -> None:
    transform = Transform(200, scale_jitter=(0.5, 2.0))
    mix = Mix((0.5, 0.5), (0.5, 0.6, 0.8, 1.0), copy_paste=True)
    assert mix.reading_sizes(transform, 100) == [
        (50, 100), (60, 120), (80, 160), (100, 200), (200, 400)
    ]  # fmt: skip
    assert Mix().reading_sizes(transform, 100) == [(200, 400)]
    factors = [
        factor
        for seed in range(200)
        for factor in draw_mix(DataConfig(mosaic=1), random.Random(seed)).factors
    ]
    assert min(factors) < 0.4
    assert max(factors) <= 1


def test_mosaic_of_large_jpegs_has_the_boxes_of_the_whole(tmp_path: Path) -> None:
    images = []
    for label, colour in enumerate(COLOURS):
        img = Image.new("RGB", (1001, 750))
        img.paste(colour, (300, 150, 700, 550))
        img.save(tmp_path / f"{label}.jpg", quality=95, subsampling=0)
        objects = (Annotation((300, 150, 700, 550), label),)
        images.append(LabelledImage(tmp_path / f"{label}.jpg", label, objects))
    dataset = Dataset(tuple(images), tuple("rgbymc"), tuple(range(1, 7)), "train", "", tmp_path)
    assert_boxes_enclose_their_colour(load(dataset, mosaic=1.0, steps=6), 20)


# --- affine maps -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"rotation": 180.0}, {"shear": 30.0}, {"rotation": 30.0,
                                     "shear": 15.0, "translate": 0.1}])  # fmt: skip
def test_affine_boxes_enclose_ellipses(options: dict[str, float]) -> None:
    box = (50.0, 70.0, 130.0, 110.0)
    img = Image.new("L", (180, 200))
    ImageDraw.Draw(img).ellipse((box[0], box[1], box[2] - 1, box[3] - 1), fill=255)
    image = torch.from_numpy(np.array(img))[None].repeat(3, 1, 1)
    for seed in range(10):
        out, boxes, labels = Transform(1000, **options)(
            image, torch.tensor([box]), torch.tensor([0]),
            shorter=180, generator=random.Random(seed),
        )  # fmt: skip
        ys, xs = np.nonzero(out[0].numpy() > 127)
        extent = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert boxes[0].tolist() == pytest.approx(extent, abs=1.2)
        assert labels.tolist() == [0]


@pytest.mark.parametrize("draw", [0.1, 0.4, 0.75])
def test_rotation_is_torchvisions(draw: float) -> None:
    noise = torch.randint(0, 256, (3, 9, 12), generator=torch.Generator().manual_seed(0))
    image = F.resize(noise.byte(), [72, 96], antialias=True)
    transform = Transform(1000, rotation=90.0, fill=(10.0, 20.0, 30.0))
    # jitter, angle, two shears, two shifts, two flips
    out, *_ = run(transform, image, [], [], 72, [0, draw, 0.5, 0.5, 0.5, 0.5, NO, NO])
    expected = F.affine(
        image, -90 + 180 * draw, [0, 0], 1, [0, 0], InterpolationMode.BILINEAR, [10, 20, 30]
    )
    # At the border torchvision has the fill without blending.
    inside = F.affine(torch.full_like(image, 255), -90 + 180 * draw, [0, 0], 1, [0, 0],
                      InterpolationMode.BILINEAR) == 255  # fmt: skip
    difference = (out.int() - expected.int()).abs()
    assert difference[inside].max() <= 1
    assert (out[:, 0, 0] == torch.tensor([10, 20, 30])).all() == (draw != 0.5)


def test_translation_moves_out_of_the_image() -> None:
    # 40 x 60: by .5 * 60 to the right; what leaves is dropped or, under a quarter, IGNORED.
    draws = [0, 0.5, 0.5, 0.5, 1.0, 0.5, NO, NO]
    out, boxes, labels = run(
        Transform(1000, translate=0.5), painted(40, 60, [(5, 5, 15, 15)]),
        [(5, 5, 15, 15), (40, 0, 50, 10), (20, 20, 40, 30), (26, 20, 46, 30)], [0, 1, 2, 3],
        40, draws,
    )  # fmt: skip
    assert boxes == [[35, 5, 45, 15], [50, 20, 60, 30], [56, 20, 60, 30]]
    assert labels == [0, 2, IGNORED]
    assert torch.equal(out, painted(40, 60, [(35, 5, 45, 15)]))


# --- occlusion ---------------------------------------------------------------------------------


def test_hidden_objects_shrink_are_ignored_or_dropped() -> None:
    shown = np.zeros((40, 40), np.int16)
    shown[0:20, 10:20] = 1
    boxes = torch.tensor([
        [0.0, 0, 15, 10],  # a third at the right
        [8.5, 5, 19.5, 15],  # all but columns 8 and 9
        [12, 2, 18, 12],  # all
        [5, 15, 25, 35],  # a corner of it: no side
        [12, 2, 18, 12],  # of the upper layer
        [30, 30, 30.3, 30.2],  # tiny, elsewhere
    ])  # fmt: skip
    labels = torch.tensor([1, 2, 3, 4, 5, IGNORED])
    new, kept = hide_boxes(boxes, labels, [0, 0, 0, 0, 1, 0], shown)
    expected = [[0, 0, 10, 10], [8.5, 5, 10, 15], [5, 15, 25, 35], [12, 2, 18, 12]]
    torch.testing.assert_close(new[:4], torch.tensor(expected, dtype=torch.float32))
    assert kept.tolist() == [1, IGNORED, 4, 5, IGNORED]


def test_erasing_replaces_a_rectangle_by_noise() -> None:
    for seed in range(20):
        image = torch.full((3, 60, 80), 200, dtype=torch.uint8)
        whole = torch.tensor([[0.0, 0, 80, 60]])
        out, boxes, labels = Transform(1000, erase=1.0)(
            image, whole, torch.tensor([7]), shorter=60, generator=random.Random(seed)
        )
        ys, xs = np.nonzero((out != 200).any(dim=0).numpy())
        rows, columns = ys.max() - ys.min() + 1, xs.max() - xs.min() + 1
        assert 0.018 < rows * columns / 4800 < 0.42  # Zhong et al. 2020: .02 to .4, rounded
        assert 0.25 < rows / columns < 3.7
        assert len(ys) > 0.99 * rows * columns
        assert out[:, ys, xs].float().mean() == pytest.approx(127.5, abs=20)
        assert labels.tolist() == [7]
        assert (boxes[0, 2:] - boxes[0, :2]).prod() >= 0.6 * 4800
        assert (image == 200).all()


def test_pasted_objects_hide_what_is_below() -> None:
    def read(label: int, box: tuple[int, int, int, int], height: int, width: int) -> ReadImage:
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        image[label, box[1] : box[3], box[0] : box[2]] = 255
        return ReadImage(image, torch.tensor([box]).float(), torch.tensor([label]), (height, width))

    kinds = set()
    for seed in range(60):
        images = read(0, (4, 4, 30, 20), 40, 60), read(1, (10, 20, 32, 38), 50, 40)
        out, boxes, labels = mix_images(
            Mix(copy_paste=True), iter(images), Transform(60), 40, random.Random(seed)
        )
        found = dict(zip(labels.tolist(), boxes.tolist(), strict=True))
        for label in (0, 1):
            ys, xs = np.nonzero(out[label].numpy() == 255)
            extent = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(xs) else None
            kept = len(xs) / (26 * 16) >= 0.25 or label == 1
            assert found.get(label if kept else IGNORED) == extent
        kinds.add("whole" if found.get(0) == [4, 4, 30, 20] else min(found))
        assert boxes[-1, 2:].tolist() == (boxes[-1, :2] + torch.tensor([22, 18])).tolist()
    assert kinds >= {"whole", 0}


def test_paste_takes_other_objects_along() -> None:
    image = torch.zeros(3, 50, 50, dtype=torch.uint8)
    target = ReadImage(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), (50, 50))
    boxes = torch.tensor([[10.0, 10, 30, 30], [20, 10, 40, 30], [28, 10, 48, 30]])
    # With the only object that is not ignored half of the second and a tenth of the third box.
    for kinds, expected in (
        ([4, IGNORED, IGNORED], [4, IGNORED, IGNORED]),
        ([IGNORED, 4, IGNORED], [IGNORED, 4, IGNORED]),
    ):
        source = ReadImage(image + 99, boxes, torch.tensor(kinds), (50, 50))
        out, found, labels = mix_images(
            Mix(copy_paste=True), iter([target, source]), Transform(50), 50, random.Random(1)
        )
        assert labels.tolist() == expected
        window = found[kinds.index(4)].tolist()
        assert [window[2] - window[0], window[3] - window[1]] == [20, 20]
        assert int((out[0] == 99).sum()) == 400
        assert (found[:, :2] >= found.new_tensor(window[:2])).all()
        assert (found[:, 2:] <= found.new_tensor(window[2:])).all()


def test_mixup_averages_and_keeps_the_boxes_of_both() -> None:
    first = ReadImage(
        torch.full((3, 40, 60), 100, dtype=torch.uint8),
        torch.tensor([[0.0, 0, 60, 40]]), torch.tensor([0]), (40, 60),
    )  # fmt: skip
    second = ReadImage(
        torch.full((3, 60, 40), 201, dtype=torch.uint8),
        torch.tensor([[0.0, 0, 40, 50], [0, 30, 40, 60], [10, 36, 20, 60], [0, 50, 9, 60]]),
        torch.tensor([1, 2, 3, 4]), (60, 40),
    )  # fmt: skip
    out, boxes, labels = mix_images(
        Mix(mixup=True), iter([first, second]), Transform(60), 40, random.Random(0)
    )
    expected = torch.full((3, 40, 60), 100, dtype=torch.uint8)
    expected[:, :, :40] = 150
    assert torch.equal(out, expected)
    assert boxes.tolist() == [[0, 0, 60, 40], [0, 0, 40, 40], [0, 30, 40, 40], [10, 36, 20, 40]]
    assert labels.tolist() == [0, 1, 2, IGNORED]  # a third and a sixth stay


# --- reproducibility ---------------------------------------------------------------------------


@pytest.mark.parametrize(("start", "workers"), [(3, 0), (0, 2), (2, 1)])
def test_mixed_batches_depend_on_seed_and_step_only(
    coloured: Dataset, start: int, workers: int
) -> None:
    whole = training(coloured, **MIXED)
    assert_same(whole[start:], training(coloured, start_step=start, workers=workers, **MIXED))


def test_mixed_batches_of_ranks_are_those_of_one_process(coloured: Dataset) -> None:
    whole = objects(training(coloured, **MIXED))
    ranks = [
        training(coloured, batch_size=2, rank=rank, world_size=2, **MIXED) for rank in range(2)
    ]
    parts = objects([batch for pair in zip(*ranks, strict=True) for batch in pair])
    assert len(whole) == len(parts)
    for (image, box, label), (other, *rest) in zip(whole, parts, strict=True):
        assert rest == [box, label]
        assert torch.equal(image, other)


def test_last_steps_are_not_mixed(coloured: Dataset) -> None:
    mixed = training(coloured, steps=8, mosaic=1.0, copy_paste=1.0, close_augmentation=0.25)
    plain = training(coloured, steps=8)
    assert_same(mixed[6:], plain[6:])
    assert not any(
        torch.equal(batch.targets.boxes, other.targets.boxes)
        for batch, other in zip(mixed[:6], plain[:6], strict=True)
    )
    # Also after resuming, where the loader is given the rest of the steps.
    options: Any = {"steps": 8, "start_step": 5, "mosaic": 1.0, "copy_paste": 1.0}
    assert_same(mixed[5:], training(coloured, close_augmentation=0.25, **options))


def test_last_steps_follow_a_number_of_steps_that_changes(coloured: Dataset) -> None:
    options: Any = {"batch_size": 4, "seed": 5, "image_size": 64, "max_size": 64, "mosaic": 1.0}
    loader = train_loader(coloured, steps=8, close_augmentation=0.5, **options)
    loader.end.fill_(100)
    batches = iter(loader)
    mixed = [next(batches) for _ in range(3)]
    loader.end.fill_(6)  # the last three of these
    closed = [next(batches) for _ in range(3)]
    of_six = list(train_loader(coloured, steps=6, close_augmentation=0.5, **options))
    assert_same(mixed + closed, of_six)


def test_unreadable_image_is_replaced_in_a_mosaic(coloured: Dataset, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    broken = LabelledImage(tmp_path / "broken.png", 9, (Annotation((0, 0, 9, 9), 5),))
    images = (*coloured.images[:5] * 3, broken)
    dataset = replace(coloured, images=images)
    reported: list[int] = []
    batches = load(dataset, mosaic=1.0, on_unreadable=lambda index, _: reported.append(index))
    assert reported == [15]
    assert all(label != 5 for _, _, label in objects(batches))
    alone = replace(coloured, images=(coloured.images[0], broken))
    batches = load(alone, mosaic=1.0, on_unreadable=lambda index, _: None)
    assert {label for _, _, label in objects(batches)} <= {0, IGNORED}


def test_images_of_shards_are_mixed_with_those_read_shortly_before(tmp_path: Path) -> None:
    root, out = tmp_path / "images", tmp_path / "shards"
    root.mkdir()
    images = []
    for label in range(140):
        Image.new("RGB", (40, 40)).save(root / f"{label}.png")
        annotation = Annotation((0, 0, 40, 40), label)
        images.append(LabelledImage(root / f"{label}.png", label, (annotation,), 40, 40))
    names = tuple(f"{label:03d}" for label in range(140))
    folder = Dataset(tuple(images), names, tuple(range(1, 141)), "train", "coco", root)
    convert({"train": folder}, out, "webdataset", shard_size="10")
    shards = read_dataset(out, "all")
    options: Any = {"order": "shards", "batch_size": 1, "steps": 106, "close_augmentation": 0.0,
                    "crop": False, "scale_jitter": (1, 1)}  # fmt: skip
    recent = training(shards, start_step=36, **options)
    mixed = training(shards, start_step=100, mosaic=1.0, **options)
    labels = {label for _, _, label in objects(mixed)} - {IGNORED}
    assert len(labels) > 12
    assert labels <= {int(batch.indices[0]) for batch in recent}
    assert_same(mixed[3:], training(shards, start_step=103, mosaic=1.0, workers=1, **options))


@pytest.mark.parametrize("seed", range(3))
def test_crowds_tiny_boxes_and_background_images_are_mixed(tmp_path: Path, seed: int) -> None:
    kinds: list[tuple[Annotation, ...]] = [
        (),
        (Annotation((0, 0, 60, 50), 0, crowd=True), Annotation((10, 10, 10.3, 10.4), 1)),
        (Annotation((-9, -9, 90, 90), 2), Annotation((5, 5, 5, 9), 0)),
        (Annotation((1, 1, 60, 3), 1, difficult=True),),
    ]
    sizes = [(60, 50), (50, 60), (64, 40), (300, 3)]
    images = []
    for i, (objects_, size) in enumerate(zip(kinds, sizes, strict=True)):
        Image.new("RGB", size, (i * 60, 9, 9)).save(tmp_path / f"{i}.png")
        images.append(LabelledImage(tmp_path / f"{i}.png", i, objects_))
    dataset = Dataset(tuple(images), ("a", "b", "c"), (1, 2, 3), "train", "coco", tmp_path)
    for crop in (True, "iou"):
        for batch in load(dataset, steps=8, seed=seed, scale_jitter=(0.5, 1.5), colour=0.5,
                          **(MIXED | {"crop": crop})):  # fmt: skip
            boxes, labels = batch.targets.boxes, batch.targets.labels
            real = labels != BACKGROUND
            assert ((labels >= 0) & (labels < 3) | (labels == IGNORED) | ~real).all()
            sides = batch.sizes[:, [1, 0]].repeat(1, 2)[:, None].expand_as(boxes)
            assert ((boxes >= 0) & (boxes <= sides))[real].all()
            assert (boxes[..., 2:] > boxes[..., :2])[real].all()


# --- settings and the user's function ----------------------------------------------------------


def test_overfitting_mixes_nothing() -> None:
    settings = [f"data.{name}={value}".replace("True", "true") for name, value in MIXED.items()]
    recipe = load_recipe("quick", [*settings, "data.crop=iou", "data.transform=a:b"])
    assert recipe.data.crop == "iou"
    plain = overfit_recipe(recipe, 8, 10).data
    assert plain == plain.model_copy(
        update=dict.fromkeys(["mosaic", "mixup", "copy_paste", "rotation", "shear", "translate"], 0)
        | {"rotate90": False, "erase": 0, "crop": False, "transform": None}
    )


@pytest.mark.parametrize("setting", ["mosaic=1.5", "shear=45", "crop=centre", "erase=-1"])
def test_settings_out_of_range(setting: str) -> None:
    with pytest.raises(ConfigError, match=f"data.{setting.split('=')[0]}"):
        load_recipe("quick", [f"data.{setting}"])


def darken(image: Tensor, boxes: Tensor, labels: Tensor, generator: random.Random) -> Any:
    """A transform of the user that marks each image with a random number."""
    image = image // 2
    image[:, 0, 0] = generator.randrange(256)
    return image, boxes + torch.tensor([0, 0, 500, 0]), labels


def test_user_transform_comes_last(coloured: Dataset) -> None:
    options: Any = {"transform": f"{__name__}:darken", "workers": 1}
    plain, changed = load(coloured, steps=3), load(coloured, steps=3, **options)
    assert_same(changed, load(coloured, steps=3, **options))
    for before, after in zip(plain, changed, strict=True):
        for i, (height, width) in enumerate(before.sizes.tolist()):
            half = before.images[i, :, :height, :width] // 2
            image = after.images[i, :, :height, :width]
            assert torch.equal(half[:, 1:], image[:, 1:])
            assert after.targets.boxes[i, 0, 2] == width  # clipped
    marks = {int(mark) for batch in changed for mark in batch.images[:, 0, 0, 0]}
    assert len(marks) > 6


mirror = v2.RandomHorizontalFlip(1.0)
crop = v2.RandomCrop((40, 40))


def test_user_transform_of_torchvision(coloured: Dataset) -> None:
    plain = load(coloured, steps=1)
    changed = load(coloured, steps=1, transform=f"{__name__}:mirror")
    for before, after in zip(plain, changed, strict=True):
        for i, (height, width) in enumerate(before.sizes.tolist()):
            image = before.images[i, :, :height, :width].flip(-1)
            assert torch.equal(after.images[i, :, :height, :width], image)
            found = after.targets.boxes[i, 0]
            x1, _, x2, _ = before.targets.boxes[i, 0].tolist()
            assert_close(found[[0, 2]], torch.tensor([width - x2, width - x1]))


def test_user_transform_of_torchvision_is_drawn_from_the_seed(coloured: Dataset) -> None:
    first, second = (load(coloured, steps=3, transform=f"{__name__}:crop") for _ in range(2))
    assert_same(first, second)
    assert all(batch.sizes.eq(40).all() for batch in first)


RESULTS: dict[str, Any] = {
    "nothing": lambda image, boxes, labels: None,
    "lists": lambda image, boxes, labels: (image, [], []),
    "floats": lambda image, boxes, labels: (image.float(), boxes, labels),
    "short": lambda image, boxes, labels: (image, boxes, labels[:0]),
    "class": lambda image, boxes, labels: (image, boxes, labels + 6),
    "inverted": lambda image, boxes, labels: (image, boxes[:, [2, 3, 0, 1]], labels),
    "nan": lambda image, boxes, labels: (image, boxes * math.nan, labels),
    "fractions": lambda image, boxes, labels: (image, boxes / 200, labels),
    "raises": lambda image, boxes, labels: image[7],
}


@pytest.mark.parametrize(
    ("kind", "message", "workers"),
    [
        ("nothing", "returned NoneType, not a tuple of three; it must return", 0),
        ("lists", r"returned \(Tensor, list, list\), not tensors", 0),
        ("floats", r"returned an image of shape \(3, 110, 60\) and type torch.float32", 0),
        ("short", r"returned boxes of shape \(1, 4\) and labels of \(0,\)", 0),
        ("class", "returned label 6 of 6 classes", 0),
        ("inverted", r"returned the box \[.*\], not x1 < x2 and y1 < y2 in pixels", 0),
        ("nan", r"returned the box \[nan, nan, nan, nan\], not x1 < x2", 0),
        ("fractions", "returned boxes that are fractions of the image, not pixels", 0),
        ("raises", "failed: IndexError: index 7 is out of bounds", 0),
        ("raises", "failed: IndexError: index 7 is out of bounds", 1),
    ],
)
def test_faulty_user_transform(
    coloured: Dataset, monkeypatch: pytest.MonkeyPatch, kind: str, message: str, workers: int
) -> None:
    module = sys.modules[__name__]
    monkeypatch.setattr(module, "darken", lambda *arguments: RESULTS[kind](*arguments[:3]))
    first = replace(coloured, images=coloured.images[:1])
    with pytest.raises(DataError, match=f"^data.transform={__name__}:darken {message}") as error:
        load(first, steps=1, image_size=60, transform=f"{__name__}:darken", workers=workers)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("darken", "data.transform=darken is not a function at the top"),
        ("test_augment:COLOURS", "is not a function"),
        ("test_augment:nothing", "data.transform=test_augment:nothing: the transform cannot be im"),
        ("no_such_module:f", "the transform cannot be imported: No module"),
    ],
)
def test_unknown_user_transform(coloured: Dataset, name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(coloured, transform=name)


def test_draws_of_a_generator_are_unchanged_without_mixing() -> None:
    assert draw_mix(DataConfig(), Draws([])) == Mix()
