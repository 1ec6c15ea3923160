"""Reading YOLO txt."""

from __future__ import annotations

from pathlib import Path

import pytest
from labelled_folders import MakeImage, write

from retinanet.data import find_data, read_dataset, read_splits, usable
from retinanet.data.check import fault_summary
from retinanet.errors import DataError

ROW = "1 0.5 0.5 0.25 0.2\n"  # of 40 x 30: centre (20, 15), 10 wide, 6 high


def _pair(root: Path, make_image: MakeImage, images: str, labels: str, stem: str = "a") -> Path:
    path = make_image(root / images / f"{stem}.jpg", seed=ord(stem[0]))
    write(root / labels / f"{stem}.txt", ROW)
    return path


@pytest.mark.parametrize("names", ["[cat, dog]", "{0: cat, 1: dog}", "\n  - cat\n  - dog"])
@pytest.mark.parametrize(
    ("header", "train", "val"),
    [
        ("", "images/train", "images/val"),
        ("path: .\n", "./images/train", "images/val"),
        ("path: ../datasets/gone\n", "images/train", "images/val"),
        ("", "../images/train", "../images/val"),
        ("", "[images/train]", "train_list.txt"),
    ],
)
def test_data_yaml(
    tmp_path: Path, make_image: MakeImage, names: str, header: str, train: str, val: str
) -> None:
    first = _pair(tmp_path, make_image, "images/train", "labels/train")
    other = _pair(tmp_path, make_image, "images/val", "labels/val", "b")
    write(tmp_path / "train_list.txt", "./images/val/b.jpg\n")
    file = write(tmp_path / "data.yaml", f"{header}train: {train}\nval: {val}\nnames: {names}\n")
    for path in (tmp_path, file):
        splits = read_splits(path)
        assert list(splits) == ["train", "val"]
        dataset = splits["train"]
        assert (dataset.format, dataset.classes, dataset.category_ids) == (
            "yolo", ("cat", "dog"), (0, 1)
        )  # fmt: skip
        (image,) = dataset.images
        assert image.path == first
        (annotation,) = image.annotations
        # 20 - 10 / 2, 15 - 6 / 2, 20 + 10 / 2, 15 + 6 / 2
        assert (annotation.box, annotation.label) == ((15, 12, 25, 18), 1)
        assert splits["val"].images[0].path.samefile(other)


def test_trees_without_yaml(tmp_path: Path, make_image: MakeImage) -> None:
    _pair(tmp_path / "split", make_image, "images/train2017", "labels/train2017")
    _pair(tmp_path / "split", make_image, "images/val2017", "labels/val2017", "b")
    assert list(read_splits(tmp_path / "split")) == ["train", "val"]

    for stem in "abcde":
        _pair(tmp_path / "whole", make_image, "images", "labels", stem)
    write(tmp_path / "whole" / "classes.txt", "cat\ndog\n")
    splits = read_splits(tmp_path / "whole")
    assert {name: len(item) for name, item in splits.items()} == {"train": 4, "val": 1}
    assert splits["train"].classes == ("cat", "dog")
    assert splits["train"].split_origin == "seed 0, 20% for validation"

    for stem in "ab":
        _pair(tmp_path / "flat", make_image, ".", ".", stem)
    write(tmp_path / "flat" / "classes.txt", "cat\ndog\n")
    assert find_data(tmp_path / "flat").format == "yolo"
    dataset = read_dataset(tmp_path / "flat", "all")
    assert dataset.problems == ()
    assert [len(image.annotations) for image in dataset.images] == [1, 1]


def test_no_file_and_an_empty_file_are_background(tmp_path: Path, make_image: MakeImage) -> None:
    _pair(tmp_path, make_image, "images", "labels")
    make_image(tmp_path / "images" / "b.jpg")
    make_image(tmp_path / "images" / "c.jpg")
    write(tmp_path / "labels" / "c.txt", "\n")
    dataset = read_dataset(tmp_path, "all")
    assert [len(image.annotations) for image in dataset.images] == [1, 0, 0]
    assert dataset.problems == ()
    assert dataset.images[1].label_file is None
    assert dataset.images[2].label_file == tmp_path / "labels" / "c.txt"


def test_polygons_become_boxes(tmp_path: Path, make_image: MakeImage) -> None:
    _pair(tmp_path, make_image, "images", "labels")
    write(tmp_path / "labels" / "a.txt", "0 0.25 0.5 0.5 0.1 0.75 0.9\n")
    (annotation,) = read_dataset(tmp_path, "all").images[0].annotations
    assert annotation.box == (10, 3, 30, 27)
    assert annotation.extra == {"segmentation": "[[10.0,15.0,20.0,3.0,30.0,27.0]]"}


def test_faulty_rows_are_recorded(tmp_path: Path, make_image: MakeImage) -> None:
    _pair(tmp_path, make_image, "images", "labels")
    rows = [ROW, "0 0.5 0.5 0.1", "0 x 0.5 0.1 0.1", "5 0.5 0.5 0.1 0.1", "-1 .5 .5 .1 .1",
            "0 nan 0.5 0.1 0.1"]  # fmt: skip
    write(tmp_path / "labels" / "a.txt", "\n".join(row.strip() for row in rows))
    write(tmp_path / "labels" / "gone.txt", ROW)
    write(tmp_path / "classes.txt", "cat\ndog\n")
    dataset = read_dataset(tmp_path, "all")
    assert [a.id for a in dataset.images[0].annotations] == [0, 5]  # NaN is left to the check
    found = [(p.kind, p.file.name, p.object) for p in dataset.problems]
    assert found == [
        ("image-missing", "gone.txt", None),
        ("label-unreadable", "a.txt", 1),
        ("label-unreadable", "a.txt", 2),
        ("label-unreadable", "a.txt", 4),
        ("class-unknown", "a.txt", 3),
    ]
    reasons = [problem.reason for problem in dataset.problems]
    assert reasons[:2] == [
        "labels 1 objects, but has no image gone.*",
        "row 2 (0 0.5 0.5 0.1): 4 values, not 5 (class x y width height) or a class and 3 or more "
        "points",
    ]
    assert reasons[2].endswith("holds a word that is no number")
    assert reasons[3].endswith("class -1 is not a whole number from 0")
    assert reasons[4] == "a.jpg: object 3: class '5' is not one of 2 known"


def test_boxes_of_an_unreadable_image_are_told(tmp_path: Path, make_image: MakeImage) -> None:
    _pair(tmp_path, make_image, "images", "labels")
    _pair(tmp_path, make_image, "images", "labels", "b")
    write(tmp_path / "images" / "b.jpg", "a web page")
    (problem,) = read_dataset(tmp_path, "all").problems
    assert (problem.kind, problem.file.name) == ("image-unreadable", "b.jpg")
    assert problem.reason.startswith("its boxes are fractions of an image whose size cannot be")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: images\nnames: [a, b", "not YAML: expected .* at line 2 column 13"),
        ("train: images\nnames: {0: a, 2: b}\n", r"numbered 0 to 1 without a gap, got \[0, 2\]"),
        ("train: images\nnames: {a: b}\n", "names must go by number"),
        ("train: images\nnames:\n", "has no names"),
        ("train: nowhere\nnames: [a, b]\n", "train: nowhere is not a folder or a list"),
        ("train: empty\nnames: [a, b]\n", "no images in the folders of its splits"),
    ],
)
def test_a_broken_data_yaml_is_one_line(
    tmp_path: Path, make_image: MakeImage, text: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    make_image(tmp_path / "images" / "a.jpg")
    write(tmp_path / "data.yaml", text)
    with pytest.raises(DataError, match=message) as caught:
        read_dataset(tmp_path, "train")
    assert "\n" not in str(caught.value)
    assert "data.yaml: " in str(caught.value)


def test_missing_val_folder_is_an_error_where_val_is_read(
    tmp_path: Path, make_image: MakeImage
) -> None:
    make_image(tmp_path / "images" / "a.jpg")
    write(tmp_path / "labels" / "a.txt", "0 .5 .5 .2 .2")
    write(tmp_path / "data.yaml", "train: images\nval: nowhere\nnames: [a]\n")
    assert len(read_dataset(tmp_path, "train")) == 1
    for read in (lambda: read_dataset(tmp_path, "val"), lambda: read_splits(tmp_path)):
        with pytest.raises(DataError, match=r"data\.yaml: val: nowhere is not a folder or a list"):
            read()


def test_image_of_faulty_rows_alone_is_left_out_of_training(
    tmp_path: Path, make_image: MakeImage
) -> None:
    for name, rows in (("a", "0 .5 .5 .2 .2"), ("b", "0 .5 .5 .2"), ("c", "")):
        make_image(tmp_path / "images" / f"{name}.jpg")
        write(tmp_path / "labels" / f"{name}.txt", rows)
    write(tmp_path / "data.yaml", "train: images\nnames: [a]\n")
    dataset = read_dataset(tmp_path, "all")
    kept, left_out = usable(dataset)
    assert [image.path.name for image in kept.images] == ["a.jpg", "c.jpg"]  # c is background
    summary = fault_summary(kept, left_out)
    assert summary is not None
    b = tmp_path / "images" / "b.jpg"
    assert f"images without any usable object: {b}; see" in summary


def test_data_yaml_runs_no_code(tmp_path: Path) -> None:
    text = f"train: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\nnames: [a]\n"
    write(tmp_path / "data.yaml", text)
    with pytest.raises(DataError, match="made is not a folder or a list"):
        read_dataset(tmp_path)
    assert not (tmp_path / "made").exists()


@pytest.mark.data
def test_real_yolo(real_data: Path) -> None:
    splits = read_splits(real_data / "coco128")
    assert {name: len(item) for name, item in splits.items()} == {"train": 128, "val": 128}
    assert splits["train"].classes[0] == "person"
    assert len(splits["train"].classes) == 80
    assert any(not image.annotations for image in splits["train"].images)
    # Two label files of the original have no image.
    assert [p.file.name for p in splits["train"].problems] == [
        "000000000656.txt",
        "000000000659.txt",
    ]
