"""Classes of one name, in every format that lists its classes."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from labelled_folders import MakeImage, coco_image, coco_json, coco_object, voc_xml, write

from retinanet.data import Dataset, check_datasets, read_splits
from retinanet.errors import DataError

NAMES = ("circle", "square", "square")
BOXES = ([0, 0, 4, 4], [5, 0, 8, 8], [0, 10, 8, 8])  # x, y, width, height; of classes 0, 1, 2


def _coco(root: Path) -> None:
    objects = [coco_object(i, 1, box, category=i + 1) for i, box in enumerate(BOXES)]
    write(root / "train.json", coco_json([coco_image(1, "a.png")], objects, NAMES))


def _yolo(root: Path) -> None:
    write(root / "data.yaml", f"train: images\nnames: [{', '.join(NAMES)}]\n")
    rows = [
        f"{i} {(x + w / 2) / 40} {(y + h / 2) / 30} {w / 40} {h / 30}\n"
        for i, (x, y, w, h) in enumerate(BOXES)
    ]
    write(root / "images" / "a.txt", "".join(rows))
    (root / "a.png").rename(root / "images" / "a.png")


def _voc(root: Path) -> None:
    write(root / "classes.txt", "\n".join(NAMES))
    objects = [
        (name, (x, y, x + w, y + h)) for name, (x, y, w, h) in zip(NAMES, BOXES, strict=True)
    ]
    write(root / "a.xml", voc_xml("a.png", objects))


def _csv(root: Path) -> None:
    write(root / "classes.csv", "".join(f"{name},{i}\n" for i, name in enumerate(NAMES)))
    rows = [
        f"a.png,{name},{x},{y},{x + w},{y + h}\n"
        for name, (x, y, w, h) in zip(NAMES, BOXES, strict=True)
    ]
    write(root / "train.csv", "filename,class,xmin,ymin,xmax,ymax\n" + "".join(rows))


def _webdataset(root: Path) -> None:
    objects = [
        {"class": name, "category_id": i, "box": [x, y, x + w, y + h]}
        for i, (name, (x, y, w, h)) in enumerate(zip(NAMES, BOXES, strict=True), start=1)
    ]
    label = write(root / "a.json", json.dumps({"objects": objects}))
    with tarfile.open(root / "train-0.tar", "w") as tar:
        for file in (root / "a.png", label):
            tar.add(file, file.name)
            file.unlink()
    catalogue = {
        "layout": "retinanet-webdataset",
        "version": 1,
        "classes": NAMES,
        "category_ids": [1, 2, 3],
        "splits": {"train": {"shards": ["train-0.tar"]}},
    }
    write(root / "retinanet.json", json.dumps(catalogue))


@pytest.mark.parametrize("make", [_coco, _yolo, _voc, _csv, _webdataset])
def test_classes_of_one_name_are_merged_and_reported(
    make: Callable[[Path], None], tmp_path: Path, make_image: MakeImage
) -> None:
    root = tmp_path / "data"
    make_image(root / "a.png")
    make(root)
    splits = read_splits(root)
    dataset = splits["train"]
    assert dataset.classes == ("circle", "square")
    first = dataset.category_ids[0]
    assert dataset.category_ids == (first, first + 1)
    (image,) = dataset.images
    assert [annotation.label for annotation in image.annotations] == [0, 1, 1]
    problems = [p for p in check_datasets(splits).problems if p.kind == "class-duplicate"]
    assert [p.reason for p in problems] == [
        f"classes {first + 1} and {first + 2} are both named 'square'"
    ]
    assert problems[0].fix.startswith(f"merged into {first + 1}")


def test_dataset_of_classes_of_one_name_is_an_error() -> None:
    with pytest.raises(DataError, match="several classes are named 'square'; give each class"):
        Dataset((), NAMES, (1, 2, 3), "train", "coco", Path("here"))


def test_dataset_category_ids_that_are_not_exact_in_results_are_an_error() -> None:
    Dataset((), ("a", "b"), (1, 2**53), "train", "coco", Path("here"))
    with pytest.raises(DataError, match="category id 9007199254740993 is over 2"):
        Dataset((), ("a", "b"), (1, 2**53 + 1), "train", "coco", Path("here"))
