"""Selected and merged classes."""

from __future__ import annotations

from pathlib import Path

import pytest

from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.data.selection import (
    SINGLE_CLASS,
    labels_of,
    merge_classes,
    select,
    select_as_trained,
    select_classes,
)
from retinanet.errors import ConfigError

BOX = (0.0, 0.0, 8.0, 8.0)


@pytest.fixture
def animals() -> Dataset:
    """Three images: a cat and a dog; an ignored cat and a cow; nothing."""
    annotations = [
        (Annotation(BOX, 0, id=1), Annotation(BOX, 1, id=2)),
        (Annotation(BOX, 0, id=3, crowd=True), Annotation(BOX, 2, id=4)),
        (),
    ]
    images = tuple(LabelledImage(Path(f"{i}.png"), i, a) for i, a in enumerate(annotations))
    return Dataset(images, ("cat", "dog", "cow"), (10, 20, 30), "train", "coco", Path("farm"))


def objects(dataset: Dataset) -> list[list[tuple[int | str, str]]]:
    """Id and class name of the objects of each image."""
    return [[(a.id, dataset.classes[a.label]) for a in i.annotations] for i in dataset.images]


def test_select_classes_keeps_images_order_and_category_ids(animals: Dataset) -> None:
    chosen = select_classes(animals, ["cow", "cat"])
    assert (chosen.classes, chosen.category_ids) == (("cat", "cow"), (10, 30))
    assert objects(chosen) == [[(1, "cat")], [(3, "cat"), (4, "cow")], []]
    assert [a.crowd for a in chosen.images[1].annotations] == [True, False]
    assert chosen.description == (
        "train: 2 of 3 classes are selected: cat, cow; objects of other classes, removed: 1",
    )
    assert select_classes(chosen, ["cow", "cat"]) is chosen


def test_merge_classes_gives_every_object_one_class(animals: Dataset) -> None:
    merged = merge_classes(animals)
    assert (merged.classes, merged.category_ids) == ((SINGLE_CLASS,), (1,))
    assert objects(merged) == [[(1, "object"), (2, "object")], [(3, "object"), (4, "object")], []]
    assert merge_classes(merged) is merged


def test_select_twice_equals_once(animals: Dataset) -> None:
    assert select(animals, (), False) is animals
    chosen = select(animals, ["cat"], True)
    assert objects(chosen) == [[(1, "object")], [(3, "object")], []]
    assert select(chosen, ["cat"], True) is chosen


def test_select_as_trained_skips_classes_that_the_data_lacks(animals: Dataset) -> None:
    info = {"selection": {"classes": ["cat", "horse"], "single_class": False}}
    assert select_as_trained(animals, info).classes == ("cat",)
    assert select_as_trained(animals, {}) is animals


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["cat", "dogs"], r"unknown class 'dogs': the 3 classes of farm are cat, dog, cow; did "
                          r"you mean dog\?"),
        ([], "no class is selected"),
    ],
)  # fmt: skip
def test_labels_of_unknown_or_no_names_are_an_error(names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        labels_of(names, ("cat", "dog", "cow"), "farm")
