"""Settings chosen from the data: synthetic labels, with results worked out by hand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from retinanet.config import Recipe, load_recipe
from retinanet.data import read_splits, usable
from retinanet.data.balance import repeat_factors
from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.training.data import recipe_recall
from retinanet.training.optim import resolve_steps
from retinanet.training.settings_from_data import choose_settings, needs, values

Box = tuple[float, float, float, float]


def labels(
    images: Sequence[Sequence[tuple[Box, int]]],
    size: tuple[int, int] = (480, 640),
    classes: int = 1,
) -> Dataset:
    """A data set of labels alone: (box, label) by image; `size` is height and width."""
    return Dataset(
        source=Path("labels"),
        format="synthetic",
        split="train",
        classes=tuple(f"kind {label}" for label in range(classes)),
        category_ids=tuple(range(1, classes + 1)),
        images=tuple(
            LabelledImage(
                path=Path(f"{i}.png"),
                id=i,
                height=size[0],
                width=size[1],
                annotations=tuple(Annotation(box, label) for box, label in objects),
            )
            for i, objects in enumerate(images)
        ),
    )


def squares(side: float, per_image: int, *, images: int = 20, **options: Any) -> Dataset:
    """Squares of one side at random positions, in the upper part of 640 x 480 pixels."""
    generator = random.Random(0)

    def box() -> Box:
        x, y = generator.uniform(0, 640 - side), generator.uniform(0, (480 - side) / 2)
        return (x, y, x + side, y + side)

    return labels([[(box(), 0) for _ in range(per_image)] for _ in range(images)], **options)


def chosen(
    dataset: Dataset, *settings: str, recipe: str = "quick", **options: Any
) -> dict[str, Any]:
    loaded = load_recipe(recipe, ["auto=true", *settings])
    return values(choose_settings(loaded, dataset, **options))


class WithoutC2(torch.nn.Module):
    """A backbone of C3 to C5 alone."""

    channels, strides = (8, 16, 32), (8, 16, 32)


def test_backbone_without_c2_has_no_p2() -> None:
    assert chosen(squares(12, 3), image_size=384)["model.p2"]
    stated = f"model.backbone={__name__}:WithoutC2"
    assert "model.p2" not in chosen(squares(12, 3), stated, "model.frozen_stages=0", image_size=384)


def test_large_objects_keep_the_small_image() -> None:
    # 100 of 480 px are 80 px at 384, ten cells of P3; anchors of 81 px exist in the recipe.
    assert chosen(squares(100, 3), on_gpu=True, image_size=384) == {}


def test_large_objects_take_a_smaller_image_on_a_cpu() -> None:
    # 240 of 480 px are 128 px, the anchor of P5, at 256.
    found = chosen(squares(240, 1))
    assert (found["data.image_size"], found["data.max_size"]) == (256, 427)
    # A fifth are small: 37 px are 2.7 cells of P3, 21.6 px, at 280, rounded up: no P2.
    mixed = labels([[((0.0, 0.0, s, s), 0)] for s in (240.0,) * 12 + (37.0,) * 3])
    assert chosen(mixed)["data.image_size"] == 288
    assert "model.p2" not in chosen(mixed)
    assert "data.image_size" not in chosen(squares(240, 1), "data.image_size=384")
    assert chosen(squares(240, 1), on_gpu=True)["data.image_size"] == 640
    assert chosen(squares(470, 1))["data.image_size"] == 128


@pytest.mark.parametrize(("small", "large", "size"), [(61.0, 360.0, 192), (23.0, 168.0, 512)])
def test_large_objects_with_small_ones_take_a_larger_image_rather_than_p2(
    small: float, large: float, size: int
) -> None:
    # 61 of 480 px are 21.6 at 170 and 23 at 451: rounded up, as P2 costs twice as much.
    mixed = labels([[((0.0, 0.0, s, s), 0)] for s in (large,) * 12 + (small,) * 3])
    found = chosen(mixed)
    assert (found["data.image_size"], found.get("model.p2")) == (size, None)


def test_small_objects_take_the_cheapest_sufficient_size() -> None:
    # P3 needs 2.7 cells of 8 px, 21.6 px: 25 of 480 px are 20 px at 384 and 23.3 at 448, which is
    # (448 / 384)^2 = 1.36 times the cost; P2 would be 2.
    found = chosen(squares(25, 3))
    assert (found["data.image_size"], found["data.max_size"]) == (448, 747)
    assert "model.p2" not in found


def test_tiny_objects_take_p2() -> None:
    # 15 of 480 px are 20 px at 640, too few for P3, and 12 px at 384, 3 cells of P2.
    found = chosen(squares(15, 3))
    assert found["model.p2"] is True
    assert "data.image_size" not in found


def test_objects_too_small_for_all_sizes_take_the_best_within_the_cost() -> None:
    # 8 px: with P2 448 px cost 2.7, and 512 px 3.6, over the limit of 3.2.
    found = chosen(squares(8, 3))
    assert (found["model.p2"], found["data.image_size"]) == (True, 448)


def test_tiny_objects_in_large_images_take_tiles() -> None:
    # 16 of 2400 px are 4 px at 640. A tile gives them 32 px at 384, or enlarges twofold: 192 px.
    objects = [((100.0 * i, 100.0 * i, 100.0 * i + 16, 100.0 * i + 16), 0) for i in range(1, 20)]
    dataset = labels([objects] * 2, size=(2400, 3200))
    found = chosen(dataset)
    assert found["data.tile"] == 192
    # At the recipe's size the objects are 32 px, enough for P3.
    assert not {"data.image_size", "model.p2"} & found.keys()
    assert "data.tile" not in chosen(dataset, "data.tile=none")
    assert "data.tile" not in chosen(dataset, "data.order=shards")
    assert "data.tile" not in chosen(squares(8, 3))  # 11 px at 640
    # The limit of detections is of whole images.
    many = labels([objects * 10], size=(2400, 3200))
    assert chosen(many)["detect.detections_per_image"] == 285


def test_images_are_not_enlarged_much() -> None:
    # 1.5 times 160 px are 240, and the multiple of 32 below is 224.
    boxes = [[((10.0, 10.0, 70.0, 70.0), 0)]] * 4
    found = chosen(labels(boxes, size=(160, 160)))
    assert (found["data.image_size"], found["data.max_size"]) == (224, 373)
    assert chosen(labels(boxes, size=(160, 160)), on_gpu=True)["data.image_size"] == 224


def test_what_a_training_needs_follows_from_the_median_class_and_the_median_object() -> None:
    # 3 classes with 20, 40 and 200 objects in 100 images: 2,000 of the second are 5,000 images, but
    # 12 epochs are 1,200. With 100 times as many objects in as many images 50 images are enough.
    def box(side: float) -> Box:
        return (0.0, 0.0, side, side)

    counts = (20, 40, 200)
    objects = [(box(40), label) for label, count in enumerate(counts) for _ in range(count)]
    images = [objects[i::100] for i in range(100)]
    need = needs(labels(images, classes=3), 100)
    assert need.images == 1200
    assert needs(labels([image * 100 for image in images], classes=3), 100).images == 50
    # Of images without objects more are needed; an epoch may have fewer of them than there are.
    sparse = labels([*(image * 100 for image in images), *[[]] * 900], classes=3)
    assert needs(sparse, 1000).images == 500
    assert needs(sparse, 200).images == 100
    # 40 px of 480 are 21.6 px (2.7 cells of P3) from 259 px on, and 1.5 x 480 is 720 px.
    assert need.min_side == 288
    assert need.max_side == 704


def test_a_plan_without_p2_is_kept() -> None:
    dataset = squares(14, 8)
    assert values(choose_settings(load_recipe("quick"), dataset))["model.p2"]
    chosen = values(choose_settings(load_recipe("quick"), dataset, image_size=384, p2=False))
    assert "model.p2" not in chosen
    assert chosen.get("data.image_size", 384) == 384


def test_a_gpu_takes_larger_images() -> None:
    # 15 of 480 px are 20 px at 640, and 720 px, 1.5 times 480, allow no 800.
    found = chosen(squares(15, 3), on_gpu=True)
    assert (found["data.image_size"], found["model.p2"]) == (640, True)


def test_anchors_match_long_objects() -> None:
    # 1:5 boxes of 30 x 150 and 150 x 30 px: the recipe's 1:2 anchors overlap them by .46 at most.
    boxes: list[Box] = [(x, 90.0, x + 30, 240.0) for x in range(20, 600, 40)]
    boxes += [(x, 300.0, x + 150, 330.0) for x in range(20, 450, 40)]
    dataset = labels([[(box, 0) for box in boxes]] * 5)
    recipe = load_recipe("paper_quick")
    found = chosen(dataset, recipe="paper_quick")
    assert min(found["anchors.aspect_ratios"]) < 0.4
    assert max(found["anchors.aspect_ratios"]) > 2.5
    assert recipe_recall(recipe, dataset) < 0.5
    assert recipe_recall(recipe.choose(found), dataset) >= 0.98


def test_objects_that_no_anchor_matches_are_matched_to_their_best() -> None:
    found = chosen(squares(3, 3), recipe="paper_quick")
    assert found["matching.low_quality_matches"] is True
    assert "matching.low_quality_matches" not in chosen(squares(100, 3), recipe="paper_quick")


def test_many_classes_take_group_norm_in_the_heads() -> None:
    assert "model.head_norm" not in chosen(squares(100, 3, classes=7))
    dataset = squares(100, 3, classes=8)
    assert chosen(dataset, on_gpu=True)["model.head_norm"] == "group"
    for stated in ("model.head_norm=none", "model.head=torch.nn:Conv2d"):
        assert "model.head_norm" not in chosen(dataset, stated)


def test_without_a_gpu_the_network_is_small() -> None:
    found = chosen(squares(100, 3), "train.batch_size=8")
    assert found == {"model.backbone": "mobilenet_v2", "model.channels": 64, "model.head_depth": 2}
    stated = chosen(
        squares(100, 3), "model.backbone=resnet18", "model.channels=32", "train.batch_size=8"
    )
    assert stated == {"model.head_depth": 2}
    scratch = ("model.backbone_weights=none", "model.norm=group")
    assert chosen(squares(100, 3), *scratch)["model.backbone"] == "mobilenet_v2"
    assert "model.backbone" not in chosen(squares(100, 3), on_gpu=True)


def test_without_a_gpu_few_steps_are_of_half_the_images() -> None:
    # 24 epochs of 499 and 500 images are 1497 and 1500 steps of 8.
    batch = {"train.batch_size": 4, "train.min_steps": 800}
    found = chosen(squares(100, 1, images=499))
    assert found["train.batch_size"] == 4
    assert "train.min_steps" not in found
    assert not batch.keys() & chosen(squares(100, 1, images=500)).keys()
    few = squares(100, 3)
    assert batch.items() <= chosen(few).items()
    recipe = load_recipe("quick")
    assert resolve_steps(20, recipe.choose(chosen(few)).train) == 800
    assert not batch.keys() & chosen(few, on_gpu=True).keys()
    assert not batch.keys() & chosen(few, "train.batch_size=8").keys()
    assert not batch.keys() & chosen(few, "train.steps=100").keys()
    assert not batch.keys() & chosen(few, processes=8).keys()  # an image each
    assert not batch.keys() & chosen(few, "train.accumulate=8").keys()
    assert not batch.keys() & chosen(few, "train.time=100").keys()  # the plan decides
    # The limits of the steps would take images away.
    assert not batch.keys() & chosen(few, "train.max_steps=500").keys()
    assert not batch.keys() & chosen(few, "train.min_steps=1000").keys()
    limited = squares(100, 1, images=400)  # 1200 steps
    assert "train.batch_size" in chosen(limited)
    assert not batch.keys() & chosen(limited, "train.max_steps=1300").keys()


def test_backbone_follows_from_its_weights(tmp_path: Path) -> None:
    small, lite = tmp_path / "small.safetensors", tmp_path / "lite.safetensors"
    save_file(torchvision.models.mobilenet_v2().features.state_dict(prefix="features."), small)
    save_file({"a": torch.zeros(1)}, lite, {"layout": "timm tf_efficientnet_lite2, features_only"})
    for weights, name in (
        (str(small), "mobilenet_v2"),
        (str(lite), "timm/tf_efficientnet_lite2"),
        ("ResNet18_Weights.IMAGENET1K_V1", "resnet18"),
    ):
        setting = f"model.backbone_weights={weights}"
        for on_gpu in (False, True):
            found = chosen(squares(100, 3), setting, on_gpu=on_gpu, image_size=384)
            assert found["model.backbone"] == name
        assert "model.backbone" not in chosen(squares(100, 3), setting, "model.backbone=resnet34")
    # ResNet-50 and MobileNetV2 have an entry of this name.
    assert "model.backbone" not in chosen(squares(100, 3), "model.backbone_weights=IMAGENET1K_V2")


def test_an_assignment_without_a_threshold_needs_no_other_anchors() -> None:
    assert not {"anchors.sizes", "matching.low_quality_matches"} & set(chosen(squares(3, 3)))


def test_detections_are_half_more_than_the_densest_image_has() -> None:
    dataset = squares(40, 200, images=3)
    assert chosen(dataset)["detect.detections_per_image"] == 300
    assert "detect.detections_per_image" not in chosen(squares(40, 66, images=3))  # 99


def everywhere(ratio: float, classes: Sequence[str] = ("cell",)) -> Dataset:
    """12 boxes in each of 60 images, uniformly placed, in all of the image; height / width."""
    generator = random.Random(0)
    width, height = 60 / ratio**0.5, 60 * ratio**0.5
    images = []
    for _ in range(60):
        corners = [
            (generator.uniform(0, 640 - width), generator.uniform(0, 480 - height))
            for _ in range(12)
        ]
        images.append([((x, y, x + width, y + height), 0) for x, y in corners])
    return replace(labels(images), classes=tuple(classes))


def test_vertical_flip_where_labels_have_no_orientation() -> None:
    found = chosen(everywhere(1.0))
    assert (found["data.vertical_flip"], found["data.rotate90"]) == (0.5, True)
    # All boxes slightly wider than tall: those of turned images would not be.
    found = chosen(everywhere(0.92))
    assert found["data.vertical_flip"] == 0.5
    assert "data.rotate90" not in found


@pytest.mark.parametrize(
    "dataset",
    [
        everywhere(2.0),  # tall, as people
        everywhere(1.0, ["arrow up"]),
        everywhere(1.0, ["6"]),
        squares(60, 12, images=60),  # all in the upper half
        squares(60, 3, images=200),  # few per image
    ],
    ids=["tall", "named by a direction", "characters", "upper half", "few"],
)
def test_no_vertical_flip_where_orientation_may_matter(dataset: Dataset) -> None:
    assert not {"data.vertical_flip", "data.rotate90"} & chosen(dataset).keys()


def test_skewed_classes_are_balanced_by_a_threshold_with_effect() -> None:
    # kind 0 in 100 images, kind 1 in 40, kind 2 in 2: the median class is in 40, but no image is
    # repeated more than 4 times, sqrt(32 / 2).
    box = (100.0, 100.0, 200.0, 200.0)
    images = [[(box, 0)] + [(box, 1)] * (i < 40) + [(box, 2)] * (i in (50, 60)) for i in range(100)]
    dataset = labels(images, classes=3)
    found = chosen(dataset)
    assert (found["data.balance"], found["data.balance_threshold"]) == ("repeat_factor", 0.32)
    assert repeat_factors(dataset, 0.32).classes == {"kind 2": pytest.approx(4.0)}
    even = labels([[(box, 0), (box, 1)]] * 50, classes=2)
    assert "data.balance" not in chosen(even)
    assert "data.balance" not in chosen(dataset, "data.order=shards")


def test_a_large_validation_split_is_validated_less_often() -> None:
    # 800 steps of 4 images; of 3200 images a tenth is 320, of 3 x 320 validated without gradients:
    # 960 = 2 x 480.
    dataset = squares(100, 3)
    assert chosen(dataset, num_val=480)["train.validate_every"] == 0.5
    assert chosen(dataset, num_val=2000)["train.validate_every"] == 800
    assert "train.validate_every" not in chosen(dataset, num_val=100)  # 9, and the recipe has 8
    # An image has 3 x 3 tiles.
    assert chosen(dataset, "data.tile=256", num_val=53)["train.validate_every"] == 0.5


@pytest.mark.parametrize(
    "setting",
    [
        "data.image_size=384",
        "model.p2=false",
        "anchors.sizes=[32,64,128,256,512]",
        "anchors.aspect_ratios=[1.0]",
        "matching.low_quality_matches=false",
        "detect.detections_per_image=100",
    ],
)
def test_what_the_user_states_is_kept(setting: str) -> None:
    dataset = squares(6, 200, images=3)
    name = setting.partition("=")[0]
    recipe = "quick" if name.startswith("model.") else "paper_quick"
    assert {"model.p2", "matching.low_quality_matches"} <= chosen(
        dataset, recipe="paper_quick"
    ).keys()
    found = chosen(dataset, setting, recipe=recipe)
    assert name not in found
    assert found  # the rest is still chosen


def test_nothing_is_chosen_without_auto() -> None:
    dataset = squares(6, 200, images=3)
    assert chosen(dataset, "auto=false") == {}
    assert choose_settings(load_recipe("paper_1x"), dataset) == []
    assert choose_settings(Recipe(), dataset) == []


def test_a_recipe_file_keeps_what_it_states(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("auto = true\n[data]\nimage_size = 448\nmax_size = 600\n")
    found = values(choose_settings(load_recipe(file), squares(6, 200, images=3)))
    assert not {"data.image_size", "data.max_size"} & found.keys()
    assert "detect.detections_per_image" in found


def test_chosen_values_state_nothing_and_validate() -> None:
    recipe = load_recipe("quick", ["train.lr=0.1"])
    changed = recipe.choose({"data.image_size": 512})
    assert changed.data.image_size == 512
    assert not changed.states("data.image_size")
    assert changed.states("train.lr")


# --- real data ------------------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "flip", "turn", "dense"),
    [
        ("nuclei", True, True, True),
        ("bccd", True, False, False),
        ("coco128", False, False, False),
    ],
)
def test_real_data(name: str, flip: bool, turn: bool, dense: bool, real_data: Path) -> None:
    splits = read_splits(real_data / name, extras=False)
    found = chosen(usable(splits["train"])[0], num_val=len(splits["val"]))
    assert ("data.vertical_flip" in found, "data.rotate90" in found) == (flip, turn)
    assert ("detect.detections_per_image" in found) == dense
