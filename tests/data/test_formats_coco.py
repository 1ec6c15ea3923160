"""Reading COCO JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from labelled_folders import MakeImage, coco_image, coco_json, coco_object, write

from retinanet.data import read_dataset, read_splits
from retinanet.errors import DataError


def test_boxes_ids_and_flags(tmp_path: Path, make_image: MakeImage) -> None:
    make_image(tmp_path / "train" / "a.jpg")
    objects = [
        coco_object(7, 3, [1, 2, 10, 5], 2, iscrowd=1, area=33.5, score=0.5),
        coco_object(9, 3, [0.5, 0, 4.25, 6]),
    ]
    image = coco_image(3, "a.jpg") | {"license": 4}
    write(tmp_path / "train.json", coco_json([image], objects))
    write(tmp_path / "val.json", coco_json([]))
    dataset = read_dataset(tmp_path, "train")
    (item,) = dataset.images
    assert (dataset.format, dataset.classes, dataset.category_ids) == (
        "coco",
        ("cat", "dog"),
        (1, 2),
    )
    assert (item.id, item.width, item.height, item.extra) == (3, 40, 30, {"license": 4})
    assert item.path == tmp_path / "train" / "a.jpg"
    crowd, other = item.annotations
    # x + width = 1 + 10, y + height = 2 + 5
    assert (crowd.box, crowd.label, crowd.id, crowd.crowd, crowd.area) == (
        (1, 2, 11, 7), 1, 7, True, 33.5
    )  # fmt: skip
    assert crowd.extra == {"score": 0.5}
    assert crowd.ignored
    assert (other.box, other.label, other.crowd, other.area) == ((0.5, 0, 4.75, 6), 0, False, None)
    assert read_dataset(tmp_path, "train", extras=False).images[0].annotations[0].extra == {}


@pytest.mark.parametrize("mask", [None, "x", [3], [["a", 1]], {"size": [30, 40], "counts": "a"}])
def test_mask_that_is_no_polygon_of_a_box_within_a_pixel(
    tmp_path: Path, make_image: MakeImage, mask: Any
) -> None:
    make_image(tmp_path / "a.jpg")
    objects = [coco_object(n, 1, [1, 2, 10, 5]) for n in (1, 2)]
    objects.append(coco_object(3, 1, [0.25, 0.5, 0.5, 0.25], segmentation=mask))
    write(tmp_path / "train.json", coco_json([coco_image(1, "a.jpg")], objects))
    (image,) = read_dataset(tmp_path, "train").images
    assert image.annotations[2].box == (10, 15, 30, 22.5)


@pytest.mark.parametrize("ids", [(1, 2), (2, 1)])
@pytest.mark.parametrize("kept", [0, 1])
def test_image_listed_twice_is_dropped_if_both_entries_have_no_usable_object(
    ids: tuple[int, int], kept: int, tmp_path: Path, make_image: MakeImage
) -> None:
    make_image(tmp_path / "a.jpg")
    objects = [coco_object(1, 1, [None, 0, 4, 4]), coco_object(2, 2, [1, 1, 9, 9])]
    images = [coco_image(id_, "a.jpg") for id_ in ids]
    write(tmp_path / "train.json", coco_json(images, objects[: 1 + kept]))
    dataset = read_dataset(tmp_path, "train")
    assert [len(image.annotations) for image in dataset.images] == [1] * kept
    fixes = [problem.fix for problem in dataset.problems]
    assert ("the image is dropped" in fixes) == (not kept)


def test_categories_that_are_nested_too_deeply(tmp_path: Path) -> None:
    nested = "[" * 100_000 + "]" * 100_000
    write(tmp_path / "train.json", f'{{"images": [], "annotations": [], "categories": {nested}}}')
    with pytest.raises(DataError, match=r"train\.json: cannot be read: maximum recursion"):
        read_splits(tmp_path)


def test_file_name_with_folders_of_another_machine(tmp_path: Path, make_image: MakeImage) -> None:
    make_image(tmp_path / "images" / "a.jpg")
    make_image(tmp_path / "sub" / "b.jpg")
    make_image(tmp_path / "images" / "c.jpg")
    names = ("/home/x/data/a.jpg", "sub/b.jpg", "C:\\x\\c.jpg", "none.jpg")
    images = [coco_image(number, name) for number, name in enumerate(names)]
    file = write(tmp_path / "train.json", coco_json(images))
    found = [image.path.relative_to(tmp_path) for image in read_dataset(file, "all").images]
    assert list(map(str, found)) == ["images/a.jpg", "sub/b.jpg", "images/c.jpg", "images/none.jpg"]


def test_instances_win_over_captions(tmp_path: Path) -> None:
    folder = tmp_path / "annotations"
    write(folder / "instances_val2017.json", coco_json([coco_image(1, "a.jpg")]))
    write(folder / "captions_val2017.json", '{"images": [], "annotations": []}')
    assert len(read_dataset(tmp_path, "val")) == 1


def test_labels_are_the_same_in_every_split(tmp_path: Path) -> None:
    def category(id_: int, name: str) -> dict[str, object]:
        return {"id": id_, "name": name}

    train = {"images": [], "annotations": [], "categories": [category(9, "z"), category(2, "b")]}
    val = {"images": [], "annotations": [], "categories": [category(5, "m")]}
    write(tmp_path / "train.json", json.dumps(train))
    write(tmp_path / "val.json", json.dumps(val))
    for dataset in read_splits(tmp_path).values():
        assert dataset.classes == ("b", "m", "z")
        assert dataset.category_ids == (2, 5, 9)
    val["categories"] = [category(2, "other")]
    write(tmp_path / "val.json", json.dumps(val))
    with pytest.raises(DataError, match=r"val.json: category 2 is 'other', but 'b' in another"):
        read_splits(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"images": [],\n"annotations": [}',
            r"train.json: not JSON: Expecting value at line 2 column 17",
        ),
        ('{"images": 3, "annotations": [], "categories": []}', "has no list 'images'"),
        ('{"images": [], "annotations": []}', "has no list 'categories'"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": "x", "name": "a"}]}',
            "needs a whole number as id",
        ),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, '
            '{"id": 1, "name": "b"}]}',
            "two categories have the id 1",
        ),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path / "train.json", text)
    with pytest.raises(DataError, match=message) as caught:
        read_dataset(tmp_path, "train")
    assert "\n" not in str(caught.value)


def test_results_are_not_labels(tmp_path: Path) -> None:
    file = write(tmp_path / "results.json", '[{"image_id": 1, "category_id": 1, "score": 0.5}]')
    with pytest.raises(DataError, match="detection results, not labels"):
        read_dataset(file)
    with pytest.raises(DataError, match="no coco data in"):
        read_dataset(file, format="coco")


def test_faulty_objects_are_recorded(tmp_path: Path) -> None:
    images = [coco_image(1, "a.jpg"), coco_image(1, "b.jpg"), {"id": 2}]
    objects = [
        coco_object(1, 1, [0, 0, 5, 5]),
        coco_object(1, 1, [0, 0, 6, 6]),
        coco_object(3, 8, [0, 0, 5, 5]),
        coco_object(4, 1, [0, 0, 5, 5], 77),
        coco_object(5, 1, [0, 0, "wide", 5]),
        coco_object(6, 1, [0, 0, 5]),
        {"id": 7, "image_id": 1, "category_id": 1},
        "nonsense",
    ]
    file = write(tmp_path / "train.json", coco_json(images, objects))
    dataset = read_dataset(file, "all")
    assert len(dataset) == 1
    assert [a.id for a in dataset.images[0].annotations] == [1, 1]
    found = [(p.kind, p.object) for p in dataset.problems]
    assert found == [
        ("image-id-duplicate", 1),
        ("label-unreadable", 2),
        ("annotation-id-duplicate", 1),
        ("annotation-orphan", 3),
        ("class-unknown", 4),
        ("box-not-a-number", 5),
        ("box-not-a-number", 6),
        ("box-not-a-number", 7),
        ("label-unreadable", 7),
    ]
    reasons = {p.kind: p.reason for p in dataset.problems[:6]}
    assert reasons["image-id-duplicate"].startswith(
        "image id 1 belongs to a.jpg and again to b.jpg"
    )
    assert reasons["annotation-orphan"] == "annotation 3 is of image 8, which is not in the file"
    assert reasons["class-unknown"] == (
        "annotation 4 of image 1 (a.jpg): category_id 77 is not in categories"
    )
    assert reasons["box-not-a-number"] == (
        "annotation 5 of image 1 (a.jpg): bbox [0, 0, 'wide', 5] is not four numbers"
    )
    assert all(p.file == file for p in dataset.problems)


@pytest.mark.data
def test_real_coco(real_data: Path) -> None:
    splits = read_splits(real_data / "coco_320")
    assert {name: len(item) for name, item in splits.items()} == {"train": 2921, "val": 206}
    assert sum(len(image.annotations) for image in splits["train"].images) == 27509
    assert sum(a.crowd for image in splits["val"].images for a in image.annotations) == 21
    assert splits["val"].category_ids[-1] == 90
    assert all(image.path.is_file() for image in splits["train"].images)
    nuclei = read_splits(real_data / "nuclei")
    assert {name: len(item) for name, item in nuclei.items()} == {"train": 532, "val": 132}
    only_file = real_data / "coco_eval" / "instances_val2014_100.json"
    assert len(read_dataset(only_file, "val")) == 100
