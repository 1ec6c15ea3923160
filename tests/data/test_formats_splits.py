"""Splits, whatever the format; what a run depends on."""

from __future__ import annotations

from pathlib import Path

import pytest
from labelled_folders import MakeImage, coco_image, coco_json, coco_object, write

from retinanet.data import LabelledImage, digest, read_dataset, read_splits
from retinanet.data.splits import split_validation, split_word
from retinanet.errors import DataError


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("train", "train"),
        ("instances_val2017", "val"),
        ("valid", "val"),
        ("Validation", "val"),
        ("test-dev2017", "test"),
        ("trainval", "trainval"),
        ("trainval2012", "trainval"),
        ("training", "train"),
        ("minival", "val"),
        ("trains", None),
        ("contest", None),
        ("evaluation", None),
        ("images", None),
    ],
)
def test_split_word(name: str, word: str | None) -> None:
    assert split_word(name) == word


def _images(count: int) -> list[LabelledImage]:
    return [LabelledImage(Path(f"{i}.jpg"), i) for i in range(count)]


def test_split_validation_depends_on_seed_and_name_alone() -> None:
    images = _images(100)
    kept, held = split_validation(images, 0.2, seed=0)
    assert (len(kept), len(held)) == (80, 20)
    assert {i.id for i in kept} | {i.id for i in held} == set(range(100))
    assert [i.id for i in kept] == sorted(i.id for i in kept)  # in the order given
    _, backwards = split_validation(images[::-1], 0.2, seed=0)
    assert {i.id for i in backwards} == {i.id for i in held}
    moved = [LabelledImage(Path("/elsewhere") / i.path, i.id) for i in images]
    assert {i.id for i in split_validation(moved, 0.2, seed=0)[1]} == {i.id for i in held}
    assert {i.id for i in split_validation(images, 0.2, seed=1)[1]} != {i.id for i in held}
    # A hash decides, so it is the same on every machine: these never change.
    assert sorted(i.id for i in split_validation(_images(10), 0.3, seed=0)[1]) == [1, 2, 6]


@pytest.mark.parametrize(("count", "share", "held"), [(1, 0.2, 0), (2, 0.01, 1), (2, 0.99, 1)])
def test_split_validation_leaves_something_on_both_sides(
    count: int, share: float, held: int
) -> None:
    assert len(split_validation(_images(count), share, seed=0)[1]) == held


def test_split_validation_refuses_shares_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match=r"fraction 1.5 is not in \(0, 1\)"):
        split_validation(_images(3), 1.5, seed=0)


def _coco(root: Path, **splits: int) -> Path:
    for split, count in splits.items():
        images = [coco_image(i, f"{split}{i}.jpg") for i in range(count)]
        write(root / f"{split}.json", coco_json(images))
    return root


def test_val_is_held_out_of_train_and_test_untouched(tmp_path: Path) -> None:
    _coco(tmp_path, train=10, test=4)
    splits = read_splits(tmp_path, seed=3, val_fraction=0.3)
    assert {name: len(item) for name, item in splits.items()} == {"train": 7, "val": 3, "test": 4}
    assert splits["train"].split_origin == "seed 3, 30% of train for validation"
    assert splits["val"].split_origin == "seed 3, 30% of train for validation"
    assert splits["test"].split_origin == "the format's own"
    for name, item in splits.items():
        alone = read_dataset(tmp_path, name, seed=3, val_fraction=0.3)
        assert alone == item
    assert len(read_dataset(tmp_path, "all")) == 14


def test_a_single_file_is_what_its_name_says(tmp_path: Path) -> None:
    _coco(tmp_path, train=10, val=2, cells=5)
    assert list(read_splits(tmp_path / "val.json")) == ["val"]
    made = read_splits(tmp_path / "train.json")
    assert {name: len(item) for name, item in made.items()} == {"train": 8, "val": 2}
    made = read_splits(tmp_path / "cells.json")
    assert {name: len(item) for name, item in made.items()} == {"train": 4, "val": 1}
    assert made["val"].split_origin == "seed 0, 20% for validation"
    assert len(read_dataset(tmp_path / "cells.json", "all")) == 5


def test_missing_splits_and_folders_are_told(tmp_path: Path) -> None:
    _coco(tmp_path, train=2, val=2, test=2)
    with pytest.raises(
        DataError, match="no split 'tset'; it has train, val, test, all; did you me"
    ):
        read_dataset(tmp_path, "tset")
    with pytest.raises(DataError, match="no split 'train'; it has val, all"):
        read_dataset(tmp_path / "val.json", "train")
    with pytest.raises(DataError, match="there is no such file or folder"):
        read_dataset(tmp_path / "gone")
    with pytest.raises(DataError, match="there is no such file or folder"):
        read_dataset(tmp_path / "gone", format="coco")
    with pytest.raises(
        DataError, match="no format 'coca': coco, labelstudio, cvat, voc, yolo, csv, labelme"
    ):
        read_dataset(tmp_path, format="coca")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        read_dataset(tmp_path / "empty")
    for what in (
        "COCO .json",
        "Pascal VOC .xml",
        "YOLO .txt or data.yaml",
        "a table of boxes (.csv)",
    ):
        assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_digest_follows_labels_and_files(tmp_path: Path, make_image: MakeImage) -> None:
    def make(folder: str, box: list[float], seed: int, size: tuple[int, int] = (40, 30)) -> str:
        make_image(tmp_path / folder / "a.png", size, seed)
        text = coco_json([coco_image(1, "a.png")], [coco_object(1, 1, box)])
        write(tmp_path / folder / "train.json", text)
        return digest(read_dataset(tmp_path / folder / "train.json", "all"))

    first = make("one", [1, 1, 5, 5], 0)
    assert len(first) == 64
    assert make("two", [1, 1, 5, 5], 0) == first  # wherever it lies
    assert make("three", [1, 1, 5, 6], 0) != first
    assert make("four", [1, 1, 5, 5], 0, (41, 30)) != first
