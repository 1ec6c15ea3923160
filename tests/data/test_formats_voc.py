"""Reading Pascal VOC."""

from __future__ import annotations

from pathlib import Path

import pytest
from labelled_folders import MakeImage, voc_xml, write

from retinanet.data import find_data, read_dataset, read_splits
from retinanet.errors import DataError


def _make(root: Path, make_image: MakeImage, stems: str = "abc") -> None:
    for seed, stem in enumerate(stems):
        make_image(root / "JPEGImages" / f"{stem}.jpg", seed=seed)
        text = voc_xml(f"{stem}.jpg", [("dog" if stem == "a" else "cat", (1, 2, 11, 7))])
        write(root / "Annotations" / f"{stem}.xml", text)


def _lists(root: Path, **lists: str) -> None:
    for name, stems in lists.items():
        write(root / "ImageSets" / "Main" / f"{name}.txt", "".join(f"{s}\n" for s in stems))


def test_coordinates_as_they_stand(tmp_path: Path, make_image: MakeImage) -> None:
    _make(tmp_path, make_image, "a")
    more = "<pose>Left</pose><truncated>1</truncated><difficult>1</difficult>"
    text = voc_xml("a.jpg", [("cat", (1, 2.5, 11, 7)), ("dog", (1, 1, 2, 2))], more=more)
    write(tmp_path / "Annotations" / "a.xml", text)
    (image,) = read_dataset(tmp_path, "all").images
    first, second = image.annotations
    assert (first.box, first.label, first.id) == ((1, 2.5, 11, 7), 0, 0)
    assert first.difficult
    assert first.ignored
    assert first.extra == {"pose": "Left", "truncated": 1}
    assert (second.label, second.id) == (1, 1)
    assert (image.width, image.height, image.id) == (40, 30, "a")
    assert image.label_file == tmp_path / "Annotations" / "a.xml"


def test_splits_share_one_list_of_classes(tmp_path: Path, make_image: MakeImage) -> None:
    _make(tmp_path, make_image)
    _lists(tmp_path, train="a", val="b", trainval="ab", test="c", dog_train="a")
    splits = read_splits(tmp_path)
    assert list(splits) == ["train", "val", "test"]
    assert {item.classes for item in splits.values()} == {("cat", "dog")}
    assert {item.split_origin for item in splits.values()} == {"the format's own"}
    assert [image.id for image in read_dataset(tmp_path, "trainval").images] == ["a", "b"]
    assert len(read_dataset(tmp_path, "all")) == 3  # not five: trainval is train and val again


def test_classes_txt_gives_order_and_bounds(tmp_path: Path, make_image: MakeImage) -> None:
    _make(tmp_path, make_image)
    write(tmp_path / "classes.txt", "zebra\ncat\n")
    dataset = read_dataset(tmp_path, "all")
    assert dataset.classes == ("zebra", "cat")
    problem, dropped = dataset.problems
    assert dropped.reason == "each of its objects is faulty"
    assert (problem.kind, problem.object) == ("class-unknown", 0)
    assert problem.file == tmp_path / "Annotations" / "a.xml"
    assert problem.reason == "a.jpg: object 0: class 'dog' is not one of 2 known"


def test_faulty_files_and_objects_are_recorded(tmp_path: Path, make_image: MakeImage) -> None:
    _make(tmp_path, make_image, "abc")
    _lists(tmp_path, train="abc", val="q")
    write(tmp_path / "Annotations" / "b.xml", "<annotation><object></annotation>")
    text = voc_xml("c.jpg", [("cat", ("wide", 1, 5, 5)), ("cat", (1, 1, 5, 5)), ("", (1, 1, 5, 5))])
    write(tmp_path / "Annotations" / "c.xml", text)
    splits = read_splits(tmp_path)
    train = splits["train"]
    assert [image.id for image in train.images] == ["a", "c"]
    assert [a.id for a in train.images[1].annotations] == [1]
    broken, number, nameless = train.problems
    assert (broken.kind, broken.object) == ("label-unreadable", None)
    assert broken.reason.startswith("not XML: mismatched tag: line 1, column 22")
    assert (number.kind, number.object) == ("box-not-a-number", 0)
    assert number.reason == (
        "c.jpg: object 0 (cat): xmin 'wide', ymin '1', xmax '5', ymax '5': not four numbers"
    )
    assert (nameless.kind, nameless.object) == ("class-unknown", 2)
    (missing,) = splits["val"].problems
    assert missing.kind == "label-missing"
    assert missing.reason == "q is in the split val, but has no Annotations/q.xml"
    assert missing.file == tmp_path / "ImageSets" / "Main" / "val.txt"


def test_a_image_without_xml_is_no_background(tmp_path: Path, make_image: MakeImage) -> None:
    _make(tmp_path, make_image, "ab")
    make_image(tmp_path / "JPEGImages" / "c.jpg")
    dataset = read_dataset(tmp_path, "all")
    assert [image.id for image in dataset.images] == ["a", "b"]
    (problem,) = dataset.problems
    assert (problem.kind, problem.file.name) == ("label-missing", "c.jpg")


def test_xml_of_other_programs_is_not_voc(tmp_path: Path) -> None:
    write(tmp_path / "a.xml", "<project/>")
    with pytest.raises(DataError, match="no labelled data found"):
        find_data(tmp_path)


@pytest.mark.data
def test_real_voc(real_data: Path) -> None:
    splits = read_splits(real_data / "bccd")
    assert {name: len(item) for name, item in splits.items()} == {
        "train": 205,
        "val": 87,
        "test": 72,
    }
    assert {item.classes for item in splits.values()} == {("Platelets", "RBC", "WBC")}
    assert {item.format for item in splits.values()} == {"voc"}
    assert sum(len(i.annotations) for item in splits.values() for i in item.images) == 4888
    assert len(read_dataset(real_data / "bccd", "trainval")) == 292
