"""Reading CSV."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from labelled_folders import MakeImage, write

from retinanet.data import find_data, read_dataset, read_splits
from retinanet.errors import DataError


@pytest.mark.parametrize(
    "text",
    [
        "filename,width,height,class,xmin,ymin,xmax,ymax\na.jpg,40,30,cat,1,2,11,7\n",
        "filename,cell_type,xmin,xmax,ymin,ymax\na.jpg,cat,1,11,2,7\n",
        "image;label;left;top;right;bottom\na.jpg;cat;1;2;11;7\n",
        "Y_Max\tX_Max\tY_Min\tX_Min\tName\tImage Path\n7\t11\t2\t1\tcat\tdata/a.jpg\n",
        "path,name,x1,y1,x2,y2\na.jpg,cat,1,2,11,7\n",
        "image_id,x,y,w,h,class\na,1,2,10,5,cat\n",
        'image_id,width,height,bbox,label\na,40,30,"[1.0, 2.0, 10.0, 5.0]",cat\n',
        "filename,category,x,y,width,height\na.jpg,cat,1,2,10,5\n",
        "/data/a.jpg,1,2,11,7,cat\n",
        "ImageID,LabelName,XMin,XMax,YMin,YMax\na,cat,0.025,0.275,0.0666666667,0.2333333333\n",
        "\ufefffilename,class,xmin,ymin,xmax,ymax\r\n a.jpg, cat, 1, 2, 11, 7\r\n\r\n",
    ],
)
def test_columns_by_name(tmp_path: Path, make_image: MakeImage, text: str) -> None:
    make_image(tmp_path / "images" / "a.jpg")
    file = write(tmp_path / "labels.csv", text)
    for path in (file, tmp_path):
        assert find_data(path).format == "csv"
        dataset = read_dataset(path, "all")
        assert dataset.problems == ()
        assert dataset.classes == ("cat",)
        (image,) = dataset.images
        assert image.path == tmp_path / "images" / "a.jpg"
        (annotation,) = image.annotations
        assert annotation.box == pytest.approx((1, 2, 11, 7), abs=1e-6)


def test_rows_of_a_image_meet_and_others_are_background(
    tmp_path: Path, make_image: MakeImage
) -> None:
    for name in "abc":
        make_image(tmp_path / f"{name}.jpg")
    text = "a.jpg,1,2,11,7,cat\nb.jpg,,,,,\na.jpg,2,2,5,5,ant\nc.jpg,1,1,2,2,cat\n"
    dataset = read_dataset(write(tmp_path / "x.csv", text), "all")
    assert dataset.classes == ("ant", "cat")
    assert [[a.label for a in image.annotations] for image in dataset.images] == [[1, 0], [], [1]]
    assert [a.id for a in dataset.images[0].annotations] == [0, 2]


def test_splits_by_column_and_by_file(tmp_path: Path, make_image: MakeImage) -> None:
    for seed, name in enumerate("abc"):
        make_image(tmp_path / "one" / f"{name}.jpg", seed=seed)
    header = "filename,class,xmin,ymin,xmax,ymax"
    text = f"{header},split\na.jpg,cat,1,1,2,2,TRAIN\nb.jpg,dog,1,1,2,2,valid\nc.jpg,,,,,,test\n"
    write(tmp_path / "one" / "labels.csv", text)
    splits = read_splits(tmp_path / "one")
    assert {name: item.images[0].id for name, item in splits.items()} == {
        "train": "a",
        "val": "b",
        "test": "c",
    }
    assert {item.classes for item in splits.values()} == {("cat", "dog")}

    for part in ("train", "valid"):
        make_image(tmp_path / "two" / part / "a.jpg")
        write(tmp_path / "two" / part / "_annotations.csv", f"{header}\na.jpg,cat,1,1,2,2\n")
    splits = read_splits(tmp_path / "two")
    assert {name: item.images[0].path.parent.name for name, item in splits.items()} == {
        "train": "train",
        "val": "valid",
    }

    for part in ("train", "val"):
        make_image(tmp_path / "three" / "images" / f"{part}.jpg")
        write(tmp_path / "three" / f"{part}.csv", f"{header}\n{part}.jpg,cat,1,1,2,2\n")
    assert list(read_splits(tmp_path / "three")) == ["train", "val"]


def test_classes_csv_gives_ids(tmp_path: Path, make_image: MakeImage) -> None:
    make_image(tmp_path / "a.jpg")
    write(tmp_path / "labels.csv", "a.jpg,1,2,11,7,cat\na.jpg,1,2,11,8,cow\n")
    write(tmp_path / "classes.csv", "dog,3\ncat,7\n")
    dataset = read_dataset(tmp_path, "all")
    assert (dataset.classes, dataset.category_ids) == (("dog", "cat"), (3, 7))
    (problem,) = dataset.problems
    assert (problem.kind, problem.object) == ("class-unknown", 1)
    assert problem.reason == "a.jpg: object 1: class 'cow' is not one of 2 known"


def test_number_classes_are_ordered_as_numbers(tmp_path: Path, make_image: MakeImage) -> None:
    make_image(tmp_path / "a.jpg")
    file = write(tmp_path / "x.csv", "a.jpg,1,2,11,7,10\na.jpg,1,2,11,7,9\n")
    assert read_dataset(file, "all").classes == ("9", "10")


def test_faulty_rows_are_recorded(tmp_path: Path, make_image: MakeImage) -> None:
    make_image(tmp_path / "a.jpg")
    text = (
        "filename,class,xmin,ymin,xmax,ymax\n"
        "a.jpg,cat,1,2,11,7\n"
        "a.jpg,cat,one,2,11,7\n"
        "a.jpg,cat,,,,\n"
        "a.jpg,,1,2,3,4\n"
        ",cat,1,2,3,4\n"
        "a.jpg,cat,1,2,nan,4\n"
    )
    dataset = read_dataset(write(tmp_path / "x.csv", text), "all")
    assert [a.id for a in dataset.images[0].annotations] == [0, 5]
    assert [(p.kind, p.object, p.reason) for p in dataset.problems] == [
        ("box-not-a-number", 1, "line 3: a.jpg (cat): 'one', '2', '11', '7': not four numbers"),
        ("box-not-a-number", 2, "line 4: a.jpg (cat): '', '', '', '': not four numbers"),
        ("class-unknown", 3, "line 5: a.jpg has no class"),
        ("label-unreadable", 4, "line 6: names no image"),
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("a,b,c\n1,2,3\n", "no column for the image; columns are a, b, c"),
        ("class,xmin,ymin,xmax,ymax\ncat,1,2,3,4\n", "no column for the image"),
        ("file,label\na.jpg,cat\n", "no column for the box; columns are file, label"),
    ],
)
def test_other_tables_are_no_labelled_data(tmp_path: Path, text: str, reason: str) -> None:
    file = write(tmp_path / "x.csv", text)
    for format_ in (None, "csv"):
        with pytest.raises(DataError, match=re.escape(f"x.csv: {reason}")):
            read_dataset(file, format=format_)


@pytest.mark.data
def test_real_csv(real_data: Path) -> None:
    # Its columns run xmin, xmax, ymin, ymax; the folder that it lies in is VOC.
    from_csv = read_dataset(real_data / "bccd" / "test.csv", "test")
    assert from_csv.format == "csv"
    assert len(from_csv) == 364
    assert all(image.path.is_file() for image in from_csv.images)
    from_xml = {i.path: i for i in read_dataset(real_data / "bccd", "all").images}
    for image in from_csv.images:
        boxes = [(a.box, a.label) for a in image.annotations]
        assert boxes == [(a.box, a.label) for a in from_xml[image.path].annotations]
