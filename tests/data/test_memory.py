"""Data made in Python: arrays, map-style data sets, and readers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import retinanet as rn
from retinanet.data import digest, read_dataset, read_splits, usable
from retinanet.data.images import read_image
from retinanet.data.memory import from_torch
from retinanet.errors import DataError, ImageError

RED = np.full((30, 40, 3), (200, 10, 20), np.uint8)


@pytest.mark.parametrize(
    "image",
    [
        RED,
        Image.fromarray(RED),
        torch.from_numpy(RED).permute(2, 0, 1),
        RED.astype(np.float32) / 255,
    ],
    ids=["array", "pil", "tensor", "float"],
)
def test_images_in_memory_keep_their_pixels(image: Any) -> None:
    dataset = rn.Dataset.from_arrays([image], [[[1, 2, 11, 12]]], [[1]], ["cat", "dog"])
    (found,) = dataset.images
    assert torch.equal(read_image(found.path), torch.from_numpy(RED).permute(2, 0, 1))
    assert [(a.box, a.label) for a in found.annotations] == [((1, 2, 11, 12), 1)]
    assert (dataset.classes, dataset.split) == (("cat", "dog"), "train")


@pytest.mark.parametrize(
    ("boxes", "labels", "reason"),
    [
        ([], [[0]], "differ in number"),
        ([[[1, 2, 3, 4]]], [[0, 1]], r"boxes of shape \(1, 4\) and 2 labels"),
        ([[[1, 2, 3]]], [[0]], r"boxes of shape \(1, 3\)"),
        ([[[1, 2, 3, 4]]], [[2]], r"labels \[2.0\] are not all whole numbers from 0 to 1"),
        ([[[1, 2, 3, 4]]], [[0.5]], "are not all whole numbers"),
        ([["a"]], [[0]], "boxes are not numbers"),
        ([[[0.1, 0.1, 0.5, 0.6]]], [[0]], r"boxes are in pixels: found none over 0\.6; multiply"),
    ],
)
def test_arrays_that_do_not_fit_are_an_error(boxes: Any, labels: Any, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        rn.Dataset.from_arrays([RED], boxes, labels, ["cat", "dog"])


def test_empty_boxes_alone_are_no_fractions() -> None:
    dataset = rn.Dataset.from_arrays([RED], [[[0, 0, 0, 0]]], [[0]], ["cat"])
    _, dropped = usable(dataset)
    assert dropped[0].kind == "box-empty"


def test_image_of_an_unknown_range_is_named() -> None:
    image = np.full((8, 8, 3), 1000.0)
    with pytest.raises(ImageError, match=r"image train-0: ambiguous value range: .*; give uint8"):
        rn.Dataset.from_arrays([image], [[[1, 2, 3, 4]]], [[0]], ["cat"])


class MapStyle:
    """Three images with an object each, the second without."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        count = int(index != 1)
        boxes = torch.tensor([[1.0, 2, 21, 22]])[:count]
        target = {"boxes": boxes, "labels": torch.ones(count, dtype=torch.int64)}
        return torch.from_numpy(RED + index).permute(2, 0, 1), target


def test_map_style_data_set() -> None:
    dataset = from_torch(MapStyle(), split="val")
    assert [len(image.annotations) for image in dataset.images] == [1, 0, 1]
    assert dataset.classes == ("0", "1")
    assert from_torch(MapStyle(), ["back", "cat"], split="val").classes == ("back", "cat")


def test_rows_of_hugging_face() -> None:
    rows = [{"image": Image.fromarray(RED), "objects": {"bbox": [[1, 2, 3, 4]], "category": [0]}}]
    dataset = from_torch(rows, ["cat"], split="train")
    assert dataset.images[0].annotations[0].box == (1, 2, 4, 6)


def test_item_of_another_form_is_an_error() -> None:
    with pytest.raises(DataError, match="item 0 of the data set is not"):
        from_torch([RED], split="train")


def reader() -> Any:
    """Yield two images of train and one of val."""
    for split, count in (("train", 2), ("val", 1)):
        for index in range(count):
            yield RED + index, [[1, 2, 11, 12]], ["dog" if index else "cat"], split


def test_reader_of_the_user() -> None:
    splits = read_splits(reader)
    assert {name: len(dataset) for name, dataset in splits.items()} == {"train": 2, "val": 1}
    assert splits["val"].classes == ("cat", "dog")
    assert splits["val"].description == ("reader: 3 images; splits train, val",)


def test_reader_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Image.fromarray(RED).save("a.png")
    (tmp_path / "boards.py").write_text("def read():\n    yield 'a.png', [[1, 2, 3, 4]], ['cat']\n")
    dataset = read_dataset("boards:read", "all")
    assert [image.path for image in dataset.images] == [Path("a.png")]
    with pytest.raises(DataError, match="boards:write: the reader cannot be imported"):
        read_dataset("boards:write")


def test_training_on_map_style_data_sets(tmp_path: Path) -> None:
    settings = ["model.backbone_weights=none", "model.norm=group", "train.steps=2"]
    settings += ["train.batch_size=1", "data.image_size=64", "data.workers=0"]
    run = rn.train(
        {"train": MapStyle(), "val": MapStyle()},
        out=tmp_path / "run",
        settings=settings,
        device="cpu",
        classes=["back", "cat"],
    )
    assert run.folder is not None


def test_data_made_twice_are_the_same() -> None:
    first, again = (read_splits(reader) for _ in range(2))
    assert {name: digest(split) for name, split in first.items()} == {
        name: digest(split) for name, split in again.items()
    }
