"""From every format to every other, there and back."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from labelled_folders import MakeImage, coco_image, coco_json, coco_object, write
from pycocotools.coco import COCO

from retinanet.data import Annotation, Dataset, LabelledImage, convert, read_dataset, read_splits
from retinanet.data.archives import read_image_file
from retinanet.errors import ConfigError, DataError

FORMATS = ("coco", "voc", "yolo", "csv", "webdataset")


@pytest.fixture
def source(tmp_path: Path, make_image: MakeImage) -> Path:
    """A COCO data set that uses what formats differ in."""
    root = tmp_path / "source"
    for split, names in (("train", ("a.png", "b.jpg")), ("val", ("v.png",)), ("test", ("t.png",))):
        for name in names:
            make_image(root / split / name, (64, 48), seed=len(split) + ord(name[0]))
    objects = [
        coco_object(11, 5, [1.25, 2, 10.5, 5.75], 90, area=33.5, truncated=1, pose="Left"),
        coco_object(12, 5, [0.1, 0.2, 63.9, 47.8], 7),
        coco_object(14, 5, [42.65, 3, 7.77, 9.01], 7, score=0.25, part={"name": "head"}),
    ]
    ignored = [
        coco_object(20, 8, [4, 4, 20, 20], 7, iscrowd=1, segmentation={"counts": [1], "size": [2]}),
        coco_object(21, 8, [5, 5, 9, 9], 7, difficult=1),
        coco_object(22, 8, [6, 6, 9, 9], 90),
    ]
    size = (64, 48)
    a, b = coco_image(5, "a.png", size), coco_image(6, "b.jpg", size)  # b is background
    categories = [{"id": 7, "name": "traffic light", "supercategory": "street"},
                  {"id": 30, "name": "ünused"}, {"id": 90, "name": "cat"}]  # fmt: skip

    def content(images: Any, annotations: Any) -> str:
        whole = json.loads(coco_json(images, annotations))
        return json.dumps(whole | {"categories": categories, "info": {"year": 2024}})

    write(root / "train.json", content([a | {"license": 3}, b], objects))
    write(root / "val.json", content([coco_image(8, "v.png", size)], ignored))
    write(root / "test.json", content([coco_image(9, "t.png", size)], []))
    return root


def _plain(splits: dict[str, Dataset], *, ids: bool = False, more: bool = False) -> Any:
    """What is to be compared, of everything."""

    def said(a: Annotation) -> Any:
        return (a.crowd, a.difficult, a.id, dict(a.extra)) if more else None

    def objects(image: LabelledImage, classes: tuple[str, ...]) -> Any:
        kept = [a for a in image.annotations if more or not a.ignored]
        return [(a.box, classes[a.label], said(a)) for a in kept]

    return {
        name: [
            (
                image.path.name,
                read_image_file(image.path),
                (image.width, image.height),
                image.id if ids else None,
                objects(image, dataset.classes),
            )
            for image in dataset.images
        ]
        for name, dataset in splits.items()
    }


@pytest.mark.parametrize(
    ("first", "second"), list(zip(FORMATS, (*FORMATS[1:], FORMATS[0]), strict=True))
)
def test_there_and_back_between_all(tmp_path: Path, source: Path, first: str, second: str) -> None:
    """Boxes, classes, splits, images and background images, through every format."""
    convert(source, tmp_path / "one", first)
    convert(tmp_path / "one", tmp_path / "two", second)
    convert(tmp_path / "two", tmp_path / "back", first)
    item, back = read_splits(tmp_path / "one"), read_splits(tmp_path / "back")
    assert {dataset.format for dataset in back.values()} == {first}
    assert _plain(back) == _plain(item)
    assert {d.classes for d in back.values()} == {("traffic light", "ünused", "cat")}
    assert list(back) == ["train", "val", "test"]
    assert [d.problems for d in back.values()] == [(), (), ()]


@pytest.mark.parametrize("through", ["voc", "csv"])
def test_ids_flags_and_other_values_come_back(tmp_path: Path, source: Path, through: str) -> None:
    written = convert(source, tmp_path / "there", through)
    convert(tmp_path / "there", tmp_path / "back", "coco")
    before, after = read_splits(source), read_splits(tmp_path / "back")
    assert _plain(after, ids=True, more=True) == _plain(before, ids=True, more=True)
    assert after["train"].images[0].annotations[0].area == 33.5
    assert after["val"].images[0].annotations[0].crowd
    if through == "csv":
        assert after["train"].category_ids == (7, 30, 90)
    assert next(iter(written.lost)).startswith("values of the whole data set")


@pytest.mark.parametrize("through", ["coco", "webdataset"])
def test_formats_that_lose_nothing(tmp_path: Path, source: Path, through: str) -> None:
    assert convert(source, tmp_path / "there", through).lost == {}
    assert convert(tmp_path / "there", tmp_path / "copy", "coco").lost == {}
    before, after = read_splits(source), read_splits(tmp_path / "copy")
    assert _plain(after, ids=True, more=True) == _plain(before, ids=True, more=True)
    for name, dataset in before.items():
        for key in ("classes", "category_ids", "extra"):
            assert getattr(after[name], key) == getattr(dataset, key)
        assert [i.extra for i in after[name].images] == [i.extra for i in dataset.images]
    text = (tmp_path / "copy" / "train.json").read_text("utf-8")
    assert json.loads(text)["annotations"][2]["bbox"] == [42.65, 3, 7.77, 9.01]
    assert json.loads(text)["categories"][0]["supercategory"] == "street"
    mask = json.loads((tmp_path / "copy" / "val.json").read_text("utf-8"))["annotations"][0]
    assert mask["segmentation"] == {"counts": [1], "size": [2]}
    coco = COCO(str(tmp_path / "copy" / "val.json"))  # pycocotools reads what is written
    assert sorted(coco.anns) == [20, 21, 22]
    assert coco.anns[20]["iscrowd"] == 1


def test_yolo_says_what_it_cannot_hold(tmp_path: Path, source: Path) -> None:
    written = convert(source, tmp_path / "yolo", "yolo")
    assert written.lost["objects that are ignored (crowd or difficult)"] == 2
    assert written.lost["areas that are not the box's"] == 1
    assert written.lost["values of 'truncated'"] == 1
    assert written.images == {"train": 2, "val": 1, "test": 1}
    content = yaml.safe_load((tmp_path / "yolo" / "data.yaml").read_text("utf-8"))
    assert content == {
        "train": "images/train",
        "val": "images/val",
        "test": "images/test",
        "names": {0: "traffic light", 1: "ünused", 2: "cat"},
    }
    # box [1.25, 2, 10.5, 5.75] of 64 x 48: centre (6.5, 4.875)
    first = (tmp_path / "yolo" / "labels" / "train" / "a.txt").read_text().splitlines()[0]
    expected = [6.5 / 64, 4.875 / 48, 10.5 / 64, 5.75 / 48]
    assert [float(word) for word in first.split()] == pytest.approx([2, *expected], abs=1e-10)
    assert (tmp_path / "yolo" / "labels" / "train" / "b.txt").read_text() == ""


def test_voc_as_other_programs_read_it(tmp_path: Path, source: Path) -> None:
    from xml.etree import ElementTree

    convert(source, tmp_path / "voc", "voc")
    names = sorted(p.name for p in (tmp_path / "voc" / "JPEGImages").iterdir())
    assert names == ["a.png", "b.jpg", "t.png", "v.png"]
    tree = ElementTree.parse(tmp_path / "voc" / "Annotations" / "v.xml").getroot()
    assert tree.findtext("filename") == "v.png"
    assert tree.findtext("size/width") == "64"
    # A program that knows no crowds at least ignores them.
    assert [o.findtext("difficult") for o in tree.iter("object")] == ["1", "1", "0"]
    assert (tmp_path / "voc" / "ImageSets" / "Main" / "trainval.txt").read_text().split() == [
        "a", "b", "v"
    ]  # fmt: skip
    assert len(read_dataset(tmp_path / "voc", "trainval")) == 3


def test_voc_to_voc_keeps_nested_values(tmp_path: Path, make_image: MakeImage) -> None:
    make_image(tmp_path / "in" / "JPEGImages" / "a.jpg", (64, 48))
    text = (
        "<annotation><source><database>X</database></source><segmented>0</segmented>"
        "<size><width>64</width><height>48</height><depth>1</depth></size>"
        "<object><name>cat</name><pose>007</pose><truncated>1</truncated>"
        "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8.5</ymax></bndbox>"
        "<part><name>head</name></part><part><name>tail</name></part></object></annotation>"
    )
    write(tmp_path / "in" / "Annotations" / "a.xml", text)
    splits = {"train": read_dataset(tmp_path / "in", "all")}
    convert(splits, tmp_path / "out", "voc")
    before, after = splits["train"].images[0], read_dataset(tmp_path / "out", "all").images[0]
    assert after.extra == before.extra
    assert after.extra == {"source": {"database": "X"}, "segmented": 0, "depth": 1}
    assert after.annotations == before.annotations
    assert after.annotations[0].extra == {
        "pose": "007",
        "truncated": 1,
        "part": [{"name": "head"}, {"name": "tail"}],
    }


def test_names_that_would_meet(tmp_path: Path, make_image: MakeImage) -> None:
    """a.png and a.jpg share a YOLO label file; x/a.png and y/a.png share a folder."""
    names = ["x/a.png", "y/a.png", "x/a.jpg", "x/A.png"]
    for seed, name in enumerate(names):
        make_image(tmp_path / "in" / "images" / name, seed=seed)
    objects = [coco_object(i, i, [i + 1, 1, 5, 5]) for i in range(4)]
    write(
        tmp_path / "in" / "train.json",
        coco_json([coco_image(i, name) for i, name in enumerate(names)], objects),
    )
    for to in FORMATS:
        convert({"train": read_dataset(tmp_path / "in", "all")}, tmp_path / to, to)
        found = read_dataset(tmp_path / to, "all")
        assert sorted((i.annotations[0].box[0], read_image_file(i.path)) for i in found.images) == [
            (i + 1, (tmp_path / "in" / "images" / name).read_bytes())
            for i, name in enumerate(names)
        ]


@pytest.mark.parametrize("placing", ["copy", "hardlink", "symlink"])
def test_how_images_are_placed(tmp_path: Path, source: Path, placing: Any) -> None:
    calls: list[tuple[int, int]] = []
    convert(source, tmp_path / "out", "coco", images=placing,
            progress=lambda done, total: calls.append((done, total)))  # fmt: skip
    placed, original = tmp_path / "out" / "train" / "a.png", source / "train" / "a.png"
    assert placed.read_bytes() == original.read_bytes()
    assert placed.is_symlink() == (placing == "symlink")
    assert (os.stat(placed).st_ino == os.stat(original).st_ino) == (placing != "copy")
    assert calls[-1] == (2 + 1 + 1, 2 + 1 + 1)


def test_faults_come_along_where_they_can(tmp_path: Path, make_image: MakeImage) -> None:
    make_image(tmp_path / "in" / "a.png")
    write(tmp_path / "in" / "broken.png", "text")
    images = [coco_image(1, "a.png"), coco_image(2, "gone.png"), coco_image(3, "broken.png")]
    del images[2]["width"]
    boxes = [[5, 5, 0, 4], [9, 9, -4, 70], [float("nan"), 1, 1, 1], [1, 1, 1, 1]]
    objects = [coco_object(i, 1, box, 9 if i == 3 else 1) for i, box in enumerate(boxes)]
    write(tmp_path / "in" / "train.json", coco_json(images, objects))
    splits = {"train": read_dataset(tmp_path / "in", "all")}
    for to in FORMATS:
        written = convert(splits, tmp_path / to, to)
        assert written.lost == {
            "unreadable labels (class-unknown)": 1,
            "missing images": 1,
            "unreadable images": 1,
            "boxes that are not four finite numbers": 1,
        }
        (image,) = read_dataset(tmp_path / to, "all").images
        assert [a.box for a in image.annotations] == [(5, 5, 5, 9), (9, 9, 5, 79)]


def test_refusals(tmp_path: Path, source: Path) -> None:
    with pytest.raises(
        DataError, match="no format 'yolov8': coco, voc, yolo, csv, webdataset; did you mean yolo"
    ):
        convert(source, tmp_path / "out", "yolov8")
    with pytest.raises(DataError, match="must not be, contain or be inside the source data"):
        convert(source, source / "voc", "voc")
    write(tmp_path / "file", "")
    with pytest.raises(DataError, match="exists and is not an empty folder"):
        convert(source, tmp_path / "file", "voc")
    with pytest.raises(DataError, match="a symlink cannot be in a tar"):
        convert(source, tmp_path / "out", "webdataset", images="symlink")
    with pytest.raises(ConfigError, match=r"a shard size \(9\) is for webdataset; voc has no"):
        convert(source, tmp_path / "out", "voc", shard_size="9")
    nothing = {name: replace(d, images=()) for name, d in read_splits(source).items()}
    with pytest.raises(DataError, match="there is no image to write"):
        convert(nothing, tmp_path / "out", "voc")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "source"]


def test_a_failure_leaves_nothing_behind(tmp_path: Path, source: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", "coco", progress=stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
