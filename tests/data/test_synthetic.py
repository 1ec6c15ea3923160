"""The made-up images: always the same, truly labelled, and with the paper's imbalance."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from retinanet.data import read_splits
from retinanet.data.dataset import Dataset
from retinanet.data.synthetic import CLASSES, synthetic_dataset


def pixels(dataset: Dataset, index: int) -> np.ndarray:
    with Image.open(dataset.images[index].path) as image:
        return np.array(image)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dataset]:
    return synthetic_dataset(tmp_path_factory.mktemp("made"), splits={"train": 60, "val": 10})


def test_reads_back_as_it_was_returned(made: dict[str, Dataset]) -> None:
    read = read_splits(made["train"].source)
    assert set(read) == {"train", "val"}
    for split, dataset in made.items():
        again = read[split]
        assert again.classes == dataset.classes == CLASSES
        assert again.category_ids == dataset.category_ids == (1, 2, 3)
        assert again.format == dataset.format
        assert not again.problems
        assert [item.path for item in again.images] == [item.path for item in dataset.images]
        for item, other in zip(again.images, dataset.images, strict=True):
            assert (item.id, item.width, item.height) == (other.id, other.width, other.height)
            assert item.label_file == other.label_file
            for a, b in zip(item.annotations, other.annotations, strict=True):
                assert a.box == pytest.approx(b.box, abs=1e-9)
                assert (a.label, a.id, a.area) == (b.label, b.id, b.area)


def test_same_seed_same_pixels_and_labels(tmp_path: Path) -> None:
    small: dict[str, Any] = {"splits": {"train": 3}, "image_size": 64}
    first = synthetic_dataset(tmp_path / "a", seed=7, **small)["train"]
    second = synthetic_dataset(tmp_path / "b", seed=7, **small)["train"]
    other = synthetic_dataset(tmp_path / "c", seed=8, **small)["train"]
    for i in range(3):
        assert (pixels(first, i) == pixels(second, i)).all()
        assert first.images[i].annotations == second.images[i].annotations
        assert (pixels(first, i) != pixels(other, i)).any()


def test_pixels_are_these_on_every_platform(tmp_path: Path) -> None:
    # Made on Linux x86-64 with Python 3.11 and numpy 2; a change here changes every figure of the
    # demo.
    dataset = synthetic_dataset(tmp_path, splits={"train": 4}, image_size=96)["train"]
    digest = hashlib.sha256(b"".join(pixels(dataset, i).tobytes() for i in range(4))).hexdigest()
    assert digest[:16] == "2c893e98c58d1ecd"


def test_larger_set_begins_with_the_smaller(tmp_path: Path, made: dict[str, Dataset]) -> None:
    few = synthetic_dataset(tmp_path, splits={"train": 2})["train"]
    for i in range(2):
        assert (pixels(few, i) == pixels(made["train"], i)).all()
    # And the splits differ.
    assert (pixels(made["train"], 0) != pixels(made["val"], 0)).any()


def test_objects_lie_inside_apart_and_in_range(made: dict[str, Dataset]) -> None:
    for image in made["train"].images:
        boxes = [item.box for item in image.annotations]
        for x1, y1, x2, y2 in boxes:
            assert 0 <= x1 < x2 <= 160
            assert 0 <= y1 < y2 <= 160
            # A square of side 32 turned by 20 degrees is 32 (cos 20 + sin 20) = 41.01 wide.
            assert 32 * 10 / 41.02 < max(x2 - x1, y2 - y1) < 41.02
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


def test_objects_are_in_the_images_where_the_labels_say(tmp_path: Path) -> None:
    plain = synthetic_dataset(
        tmp_path, splits={"train": 20}, objects=(1, 1), clutter=0.0, empty=0.0
    )["train"]
    for i, image in enumerate(plain.images):
        (item,) = image.annotations
        array = pixels(plain, i).astype(float)
        x1, y1, x2, y2 = (int(value) for value in item.box)
        # The strongest edges of the image are those of the object.
        edges = np.zeros((160, 160))
        edges[1:] += np.abs(np.diff(array, axis=0)).sum(axis=2)
        edges[:, 1:] += np.abs(np.diff(array, axis=1)).sum(axis=2)
        y, x = np.unravel_index(edges.argmax(), edges.shape)
        assert x1 - 1 <= x <= x2 + 2
        assert y1 - 1 <= y <= y2 + 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 31}, "image_size 31"),
        ({"objects": (3, 2)}, r"objects \(3, 2\)"),
        ({"objects": (-1, 2)}, r"objects \(-1, 2\)"),
        ({"object_size": (3, 20)}, r"object_size \(3, 20\)"),
        ({"object_size": (20, 81)}, r"half of image_size \(80\)"),
        ({"clutter": 1.1}, "clutter 1.1"),
        ({"empty": -0.1}, "empty -0.1"),
    ],
)
def test_numbers_out_of_range(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthetic_dataset(tmp_path, **options)
