"""What the check finds, what the fix does about it, and what is counted."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labelled_folders import MakeImage, coco_image, coco_json, coco_object, voc_xml, write
from PIL import Image
from torchvision.ops import box_iou

from retinanet.anchors import anchor_spec, default_anchor_spec, feature_sizes, level_anchors
from retinanet.data import (
    Annotation,
    Dataset,
    LabelledImage,
    Problem,
    anchor_recall,
    check_datasets,
    convert,
    read_dataset,
    read_splits,
    usable,
    write_fixed,
)
from retinanet.data.boxes import check_box, fixed_box
from retinanet.data.check import KINDS
from retinanet.data.image_files import network_size
from retinanet.data.images import read_image
from retinanet.errors import DataError

NAN = math.nan


def _one(
    tmp_path: Path, *boxes: tuple[float, float, float, float], size: Any = (40, 30), **more: Any
) -> Dataset:
    """An image a.png of 40 x 30, with these boxes of class cat."""
    annotations = tuple(Annotation(box, 0, id=i) for i, box in enumerate(boxes))
    width, height = size
    image = LabelledImage(tmp_path / "a.png", 1, annotations, width, height, tmp_path / "labels")
    return Dataset((image,), ("cat", "dog"), (1, 2), "train", "coco", tmp_path, **more)


def _problems(dataset: Dataset, **options: bool) -> list[Problem]:
    problems = check_datasets({dataset.split: dataset}, **options).problems
    return [problem for problem in problems if problem.kind != "no-objects"]


# (box, kind, what the reason ends with, fix) on an image of 40 x 30
BOXES = [
    ((5, 5, 5, 9), "box-empty", "cat box [5, 5, 5, 9] has no width", "dropped"),
    ((5, 5, 8, 5), "box-empty", "cat box [5, 5, 8, 5] has no height", "dropped"),
    ((5, 5, 5, 5), "box-empty", "has no width and no height", "dropped"),
    ((9, 5, 5, 9), "box-inverted", "has left and right swapped", "swapped back"),
    ((9, 9, 5, 5), "box-inverted", "left and right and top and bottom swapped", "swapped back"),
    ((9, 5, 5, 5), "box-inverted", "has left and right swapped", "dropped"),
    ((-1, 5, 9, 9), "box-outside", "extends beyond the image of 40 x 30", "clipped"),
    ((5, 5, 41, 9), "box-outside", "extends beyond the image of 40 x 30", "clipped"),
    ((40, 5, 50, 9), "box-outside", "is wholly outside the image of 40 x 30", "dropped"),
    ((5, -9, 9, 0), "box-outside", "is wholly outside the image of 40 x 30", "dropped"),
    ((NAN, 5, 9, 9), "box-not-a-number", "[nan, 5, 9, 9] is not four finite numbers", "dropped"),
    ((5, 5, math.inf, 9), "box-not-a-number", "is not four finite numbers", "dropped"),
]


@pytest.mark.parametrize(("box", "kind", "reason", "fix"), BOXES)
def test_faults_of_boxes(
    tmp_path: Path, make_image: MakeImage, box: Any, kind: str, reason: str, fix: str
) -> None:
    make_image(tmp_path / "a.png")
    (problem,) = _problems(_one(tmp_path, box))
    assert (problem.kind, problem.object, problem.fix) == (kind, 0, fix)
    assert problem.file == tmp_path / "labels"
    assert problem.reason.startswith("annotation 0 of image 1 (a.png): cat box [")
    assert problem.reason.endswith(reason)

    trained, left_out = usable(_one(tmp_path, box))
    if fix == "clipped":
        assert len(trained.images[0].annotations) == 1
        assert left_out == []
    else:
        assert trained.images == ()
        assert left_out[0] == problem
        assert left_out[1].reason == "each of its objects is faulty"


@pytest.mark.parametrize(
    "box", [(0, 0, 40, 30), (-0.5, -0.5, 40.5, 30.5), (39, 3, 39.01, 3.01), (39, 29, 40, 30)]
)
def test_boxes_without_fault(tmp_path: Path, make_image: MakeImage, box: Any) -> None:
    make_image(tmp_path / "a.png")
    assert _problems(_one(tmp_path, box)) == []
    assert fixed_box(box, 40, 30) == box


def test_fixed_boxes() -> None:
    assert fixed_box((9, 8, 5, 4), 40, 30) == (5, 4, 9, 8)
    assert fixed_box((-3, 5, 50, 31), 40, 30) == (0, 5, 40, 30)
    assert fixed_box((50, 5, -3, 9), 40, 30) == (0, 5, 40, 9)  # inverted, and then outside
    assert fixed_box((40, 5, 50, 9), 40, 30) is None
    assert fixed_box((40, 5, 50, 9), None, None) == (40, 5, 50, 9)
    assert check_box((40, 5, 50, 9), None, None) is None


def test_repeated_objects(tmp_path: Path, make_image: MakeImage) -> None:
    make_image(tmp_path / "a.png")
    dataset = _one(tmp_path, (1, 1, 5, 5), (1, 1, 5, 6), (1.001, 1, 5, 5), (NAN,) * 4, (NAN,) * 4)
    found = [p for p in _problems(dataset) if p.kind == "box-duplicate"]
    assert [(p.object, p.fix) for p in found] == [(2, "dropped")]
    assert found[0].reason.endswith("repeats annotation 0")
    # The same box of another class is another object.
    image = dataset.images[0]
    two = (Annotation((1, 1, 5, 5), 0, 0), Annotation((1, 1, 5, 5), 1, 1))
    other = LabelledImage(image.path, 1, two, 40, 30)
    assert _problems(Dataset((other,), ("cat", "dog"), (1, 2), "train", "coco", tmp_path)) == []


def _cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


@pytest.mark.parametrize("decode", [True, False])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tif", ".webp"])
def test_truncated_images(tmp_path: Path, make_image: MakeImage, suffix: str, decode: bool) -> None:
    path = make_image(tmp_path / f"a{suffix}", (200, 150))
    dataset = Dataset((LabelledImage(path, 1),), ("cat",), (1,), "train", "coco", tmp_path)
    assert _problems(dataset, decode=decode) == []
    _cut(path)
    (problem,) = _problems(dataset, decode=decode)
    assert problem.kind in ("image-truncated", "image-unreadable")
    assert problem.kind == "image-truncated" or suffix == ".webp"  # its decoder does not say
    assert problem.reason.startswith("cannot be decoded: ")
    assert (problem.file, problem.fix) == (path, "the image is dropped")


@pytest.mark.parametrize(
    ("make", "kind", "reason"),
    [
        (lambda path: None, "image-missing", "no such image; .*labels gives it 1 object$"),
        (lambda path: path.write_bytes(b""), "image-unreadable", r"\(it is empty\)$"),
        (
            lambda path: path.write_text("<html>404"),
            "image-unreadable",
            r"^not an image of any known format \(it begins with b'<html>404'\)$",
        ),
        (lambda path: path.mkdir(), "image-unreadable", "^cannot be read: Is a directory$"),
    ],
)
def test_images_that_are_none(
    tmp_path: Path, make: Callable[[Path], None], kind: str, reason: str
) -> None:
    make(tmp_path / "a.png")
    (problem,) = _problems(_one(tmp_path, (1, 1, 5, 5)))
    assert (problem.kind, problem.file) == (kind, tmp_path / "a.png")
    assert re.search(reason, problem.reason)
    trained, left_out = usable(_one(tmp_path, (1, 1, 5, 5)))
    assert ([problem.kind for problem in left_out] == ["image-missing"]) == (not len(trained))


def test_extensions_that_lie(tmp_path: Path, make_image: MakeImage) -> None:
    make_image(tmp_path / "a.png", format="JPEG")
    (problem,) = _problems(_one(tmp_path, (1, 1, 5, 5)))
    assert problem.kind == "image-extension"
    assert problem.reason == "is named .png, but its content is jpg"
    assert problem.fix == "named .jpg"
    for name in ("a.jpeg", "a.JPG", "a.jpe"):
        path = make_image(tmp_path / name, format="JPEG")
        dataset = Dataset((LabelledImage(path, 1),), ("cat",), (1,), "train", "coco", tmp_path)
        assert _problems(dataset) == []


def test_wrong_sizes(tmp_path: Path, make_image: MakeImage) -> None:
    make_image(tmp_path / "a.png")
    (problem,) = _problems(_one(tmp_path, (1, 1, 5, 5), size=(41, 30)))
    assert (problem.kind, problem.object) == ("size-wrong", 1)
    assert problem.reason == (
        "image 1 (a.png): the labels state 41 x 30 (width x height), the image is 40 x 30"
    )
    assert _problems(_one(tmp_path, (1, 1, 5, 5), size=(None, None))) == []
    # A box is held against the image, not against what the labels say of it.
    found = _problems(_one(tmp_path, (1, 1, 60, 5), size=(100, 100)))
    assert [p.kind for p in found] == ["size-wrong", "box-outside"]


def test_the_same_image_in_two_splits(tmp_path: Path, make_image: MakeImage) -> None:
    root = tmp_path / "data"
    make_image(root / "train" / "a.png", seed=1)
    make_image(root / "val" / "b.png", seed=1)  # the same content
    make_image(root / "test" / "c.bmp", seed=1)  # the same pixels
    make_image(root / "train" / "d.png", seed=2)
    for split, names in (("train", ("a.png", "d.png")), ("val", ("b.png",)), ("test", ("c.bmp",))):
        images = [coco_image(i, name) for i, name in enumerate(names)]
        write(root / f"{split}.json", coco_json(images))
    splits = read_splits(root)
    report = check_datasets(splits)
    kind = "image-in-two-splits"
    found = {p.file.name: (p.kind, p.reason, p.fix) for p in report.problems if p.kind == kind}
    test_image = root / "test" / "c.bmp"
    assert found == {
        "a.png": (
            kind,
            f"in split train and in split test: the same pixels as {test_image}",
            "dropped from train",
        ),
        "b.png": (
            kind,
            f"in split val and in split test: the same pixels as {test_image}",
            "dropped from val",
        ),
    }
    write_fixed(splits, report, tmp_path / "fixed")
    fixed = read_splits(tmp_path / "fixed")
    # val has nothing left, and none is made up for it
    assert {name: len(item) for name, item in fixed.items()} == {"train": 1, "val": 0, "test": 1}


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_headers_show_sizes_names_and_copies_but_no_damage(
    tmp_path: Path, make_image: MakeImage, suffix: str
) -> None:
    exif = Image.Exif()
    exif[274] = 6
    file = make_image(tmp_path / "train" / f"a{suffix}", (40, 30), exif=exif)
    make_image(tmp_path / "val" / f"b{suffix}", (40, 30), exif=exif)
    make_image(tmp_path / "val" / "c.webp", (40, 30), format="JPEG" if suffix == ".jpg" else "PNG")
    damaged = make_image(tmp_path / "val" / f"d{suffix}", (64, 64), seed=3)
    content = bytearray(damaged.read_bytes())
    content[600:900] = bytes(300)
    damaged.write_bytes(content)
    for split, names in (("train", file.name), ("val", f"b{suffix} c.webp d{suffix}")):
        images = [coco_image(i, name) for i, name in enumerate(names.split())]
        images = [image | {"width": 64, "height": 64} if "d." in image["file_name"] else image
                  for image in images]  # fmt: skip
        write(tmp_path / f"{split}.json", coco_json(images, [coco_object(1, 0, [1, 1, 4, 4])]))
    splits = read_splits(tmp_path)
    counts = check_datasets(splits, decode=False).counts
    assert counts == {"size-wrong": 2, "image-extension": 1, "image-in-two-splits": 1}
    decoded = check_datasets(splits).counts
    if suffix == ".png":  # which has checksums
        assert decoded == {**counts, "image-unreadable": 1}


def test_a_image_listed_in_two_splits(tmp_path: Path, make_image: MakeImage) -> None:
    for seed, stem in enumerate("abc"):
        make_image(tmp_path / "JPEGImages" / f"{stem}.jpg", seed=seed)
        write(tmp_path / "Annotations" / f"{stem}.xml", voc_xml("", [("cat", (1, 1, 5, 5))]))
    for split, stems in (("train", "ab"), ("val", "bc"), ("trainval", "abc")):
        write(tmp_path / "ImageSets" / "Main" / f"{split}.txt", "\n".join(stems))
    # trainval is train and val by its nature, and no problem
    (problem,) = check_datasets(read_splits(tmp_path)).problems
    assert problem.file == tmp_path / "JPEGImages" / "b.jpg"
    assert problem.reason == "in split train and in split val: the same file"


def _faulty(root: Path, make_image: MakeImage) -> Path:
    """A COCO data set with a fault of every kind that COCO can have."""
    make_image(root / "train" / "good.png", seed=1)
    make_image(root / "train" / "lies.png", seed=2, format="JPEG")
    _cut(make_image(root / "train" / "cut.jpg", (200, 150), seed=3))
    write(root / "train" / "text.jpg", "text")
    make_image(root / "train" / "twin.png", seed=4)
    make_image(root / "val" / "twin.png", seed=4)
    names = ["good.png", "lies.png", "cut.jpg", "text.jpg", "twin.png", "gone.png"]
    images = [coco_image(i, name) for i, name in enumerate(names)]
    images += [coco_image(1, "again.png")]
    images[1]["width"] = 99
    boxes = [[1, 1, 4, 4], [1, 1, 4, 4], [1, 1, 0, 4], [9, 9, -4, -4], [30, 20, 20, 20],
             [50, 1, 4, 4], [NAN, 1, 4, 4], ["x", 1, 4, 4]]  # fmt: skip
    objects = [coco_object(i, 0, box) for i, box in enumerate(boxes)]
    objects += [coco_object(5, 1, [1, 1, 4, 4]), coco_object(20, 77, [1, 1, 4, 4])]
    objects += [coco_object(21, 0, [1, 1, 4, 4], 9), "nonsense"]
    objects += [coco_object(22 + i, i, [2, 2, 6, 6]) for i in range(2, 6)]
    write(root / "train.json", coco_json(images, objects, ("cat", "dog", "cat")))
    write(
        root / "val.json", coco_json([coco_image(0, "twin.png")], [coco_object(0, 0, [1, 1, 3, 3])])
    )
    return root


@pytest.mark.parametrize("form", ["voc", "webdataset"])
def test_the_copy_is_of_the_same_format(tmp_path: Path, make_image: MakeImage, form: str) -> None:
    convert(_faulty(tmp_path / "coco", make_image), tmp_path / form, form)
    splits = read_splits(tmp_path / form)
    report = check_datasets(splits)
    assert {"box-inverted", "box-outside", "box-empty", "image-extension"} <= set(report.counts)
    assert write_fixed(splits, report, tmp_path / "fixed").format == form
    again = read_splits(tmp_path / "fixed")
    assert check_datasets(again).problems == ()
    assert {d.format for d in again.values()} == {form}


def test_every_kind_at_once_and_the_fix(tmp_path: Path, make_image: MakeImage) -> None:
    source = _faulty(tmp_path / "data", make_image)
    before = {p: p.read_bytes() for p in source.rglob("*") if p.is_file()}
    splits = read_splits(source)
    calls: list[tuple[int, int]] = []
    report = check_datasets(splits, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 7) for i in range(1, 8)]
    others = {"label-missing", "box-rotated", "shape-not-box", "class-similar", "box-normalised"}
    others |= {"image-ambiguous", "image-duplicate", "image-name-encoded", "no-objects"}
    of_coco = set(KINDS) - others - {"image-changed", "index-missing", "key-duplicate"}
    assert set(report.counts) == of_coco
    assert all(p.reason and "\n" not in p.reason for p in report.problems)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["counts"] == report.counts
    assert len(plain["problems"]) == len(report.problems)
    assert plain["statistics"]["train"]["images"] == 6

    target = tmp_path / "fixed"
    written = write_fixed(splits, report, target)
    assert written.folder == target
    assert written.images == {"train": 2, "val": 1}
    again = read_splits(target)
    assert check_datasets(again).problems == ()
    train = again["train"].images
    assert [image.path.name for image in train] == ["good.png", "lies.jpg"]
    assert (train[1].width, train[1].height) == (40, 30)
    assert [a.box for a in train[0].annotations] == [(1, 1, 5, 5), (5, 5, 9, 9), (30, 20, 40, 30)]
    assert {p: p.read_bytes() for p in source.rglob("*") if p.is_file()} == before


def test_the_copy_never_touches_the_data(tmp_path: Path, make_image: MakeImage) -> None:
    source = _faulty(tmp_path / "data", make_image)
    splits = read_splits(source)
    report = check_datasets(splits)
    for target in (source, source / "inside", tmp_path):
        with pytest.raises(DataError, match="must not be, contain or be inside the source data"):
            write_fixed(splits, report, target)
    assert not (source / "inside").exists()
    link = tmp_path / "link"
    link.symlink_to(source)
    with pytest.raises(DataError, match="must not be, contain or be inside the source data"):
        write_fixed(splits, report, link / "inside")
    full = tmp_path / "full"
    write(full / "mine.txt", "keep")
    with pytest.raises(DataError, match="exists and is not an empty folder"):
        write_fixed(splits, report, full)
    assert [p.name for p in full.iterdir()] == ["mine.txt"]
    with pytest.raises(DataError, match="was not checked; check these splits first"):
        write_fixed(splits, check_datasets({"val": splits["val"]}), tmp_path / "other")
    empty = tmp_path / "empty"
    empty.mkdir()
    write_fixed(splits, report, empty)
    assert sorted(p.name for p in empty.iterdir()) == ["train", "train.json", "val", "val.json"]


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_labels_of_a_lying_image_are_turned(tmp_path: Path, orientation: int) -> None:
    """Labels made on the pixels as stored, of an image that EXIF turns."""
    pixels = np.zeros((30, 40, 3), dtype=np.uint8)
    pixels[4:10, 8:25] = 255  # the object, as stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "data").mkdir()
    Image.fromarray(pixels).save(tmp_path / "data" / "a.png", exif=exif)
    label = coco_object(1, 1, [8, 4, 17, 6], segmentation=[[8, 4, 25, 4, 25, 10]])
    write(tmp_path / "data" / "train.json", coco_json([coco_image(1, "a.png")], [label]))
    splits = {"train": read_dataset(tmp_path / "data", "all")}
    report = check_datasets(splits)
    problem = next(p for p in report.problems if p.kind == "size-wrong")
    assert f"after its EXIF orientation {orientation}" in problem.reason
    assert problem.fix == "size and boxes rotated"
    write_fixed(splits, report, tmp_path / "fixed")
    (image,) = read_dataset(tmp_path / "fixed", "all").images
    (annotation,) = image.annotations
    x1, y1, x2, y2 = (int(side) for side in annotation.box)
    upright = read_image(image.path)
    assert (image.height, image.width) == (40, 30) == tuple(upright.shape[1:])
    expected = torch.zeros_like(upright)
    expected[:, y1:y2, x1:x2] = 255
    torch.testing.assert_close(upright, expected)
    assert "segmentation" not in annotation.extra


def test_statistics(tmp_path: Path, make_image: MakeImage) -> None:
    make_image(tmp_path / "a.png", (200, 150))
    make_image(tmp_path / "b.png", (40, 30), seed=1)
    boxes = [(0, 0, 32, 32), (0, 0, 31, 32), (0, 0, 96, 96), (0, 0, 95, 96), (5, 5, 5, 9)]
    first = tuple(Annotation(box, i % 2, i) for i, box in enumerate(boxes))
    first += (Annotation((0, 0, 20, 20), 0, 9, crowd=True),)
    images = (
        LabelledImage(tmp_path / "a.png", 1, first),
        LabelledImage(tmp_path / "b.png", 2),
    )
    dataset = Dataset(images, ("cat", "dog", "cow"), (1, 2, 3), "train", "coco", tmp_path)
    found = check_datasets({"train": dataset}).statistics["train"]
    assert (found.images, found.background_images, found.objects, found.ignored) == (2, 1, 4, 1)
    assert found.classes == {"cat": 2, "dog": 2, "cow": 0}
    assert found.images_of_class == {"cat": 1, "dog": 1, "cow": 0}
    # 31 x 32 < 32^2 <= 32 x 32 and 95 x 96 < 96^2 <= 96 x 96
    assert found.sizes == {"small": 1, "medium": 2, "large": 1}
    assert found.side["0"] == pytest.approx(math.sqrt(31 * 32), abs=1e-3)
    assert found.side["100"] == 96
    assert found.aspect_ratio["100"] == pytest.approx(32 / 31, abs=1e-3)
    assert found.boxes_per_image == {"min": 0, "median": 2, "max": 4, "mean": 2}
    assert found.image_sizes == {"200 x 150": 1, "40 x 30": 1}
    assert found.image_width == {"min": 40, "median": 120, "max": 200}
    assert found.image_height == {"min": 30, "median": 90, "max": 150}


@pytest.mark.parametrize("rounding", ["none", "torchvision"])
@pytest.mark.parametrize("p2", [False, True])
def test_anchor_recall_equals_all_anchors_tried(tmp_path: Path, rounding: Any, p2: bool) -> None:
    """Against the best IoU over every anchor of the network, one by one."""
    draw = np.random.default_rng(0)
    spec = anchor_spec([2**level for level in range(2 if p2 else 3, 8)], rounding=rounding)
    images, best = [], []
    for number, (height, width) in enumerate([(97, 260), (300, 200), (128, 128)]):
        corners = draw.uniform(0, 1, (40, 2, 2)) * (width, height)
        boxes = np.concatenate([corners.min(1), corners.max(1)], axis=1) + np.array([0, 0, 1, 1])
        boxes = boxes.clip(0, (width, height, width, height))
        images.append(
            LabelledImage(
                tmp_path / f"{number}.png", number,
                tuple(Annotation(tuple(map(float, box)), i % 2, i) for i, box in enumerate(boxes)),
                width, height,
            )
        )  # fmt: skip
        new = network_size(height, width, 150, 320)
        padded = [math.ceil(side / 32) * 32 for side in new]
        anchors = torch.cat(level_anchors(spec, feature_sizes(spec.strides, *padded)))
        scale = torch.tensor([new[1] / width, new[0] / height] * 2)
        best.append(box_iou(torch.from_numpy(boxes).float() * scale, anchors).amax(dim=1))
    iou = torch.cat(best)
    dataset = Dataset(tuple(images), ("cat", "dog"), (1, 2), "train", "coco", tmp_path)
    found = anchor_recall({"train": dataset}, spec, 150, 320)
    assert found.objects == 120
    assert found.matched == int((iou >= 0.5).sum())
    assert 0 < found.recall < 1
    assert found.mean_iou == pytest.approx(float(iou.mean()), abs=1e-5)
    assert sum(hit for hit, _ in found.by_class.values()) == found.matched
    assert sum(every for _, every in found.by_size.values()) == 120
    assert found.to_dict()["recall"] == found.recall


def test_anchor_recall_at_the_last_cell(tmp_path: Path) -> None:
    """Anchors of side 4 every 8 pixels: the last centre of 64 is 56, not 64."""
    spec = anchor_spec([8], sizes=[4], scales=[1], aspect_ratios=[1])
    dataset = _one(tmp_path, (54, 54, 58, 58), (56, 54, 60, 58), (60, 60, 64, 64), size=(64, 64))
    found = anchor_recall({"train": dataset}, spec, 64, 64)
    # 1; half of each in common: 8 / (16 + 16 - 8) = 1/3; (60..64) and (54..58) do not meet
    assert found.mean_iou == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert (found.matched, found.objects) == (1, 3)


def test_anchor_recall_reads_sizes_that_labels_lack(tmp_path: Path, make_image: MakeImage) -> None:
    make_image(tmp_path / "a.png")
    known = anchor_recall({"a": _one(tmp_path, (3, 3, 20, 17))}, default_anchor_spec(), 64, 640)
    unknown = _one(tmp_path, (3, 3, 20, 17), size=(None, None))
    assert anchor_recall({"a": unknown}, default_anchor_spec(), 64, 640) == known


@pytest.mark.data
def test_real_faults_are_found(real_data: Path) -> None:
    report = check_datasets(read_splits(real_data / "bccd"))
    assert [(p.file.name, p.object, p.kind) for p in report.problems] == [
        ("BloodImage_00343.xml", 3, "box-empty"),
        ("BloodImage_00338.xml", 12, "box-empty"),
    ]
    assert report.problems[0].reason == (
        "object 3: RBC box [181, 329, 181, 329] has no width and no height"
    )
    _, left_out = usable(read_dataset(real_data / "coco_320", "train"))
    (problem,) = left_out
    assert (problem.file.name, problem.object) == ("train.json", 10148)
    assert problem.reason == (
        "annotation 10148 of image 361919 (000000361919.jpg): "
        "skis box [102.5, 190.05, 105, 190.05] has no height"
    )


def test_check_imports_no_torch(tmp_path: Path, make_image: MakeImage) -> None:
    make_image(tmp_path / "a.jpg")
    write(tmp_path / "a.txt", "0 .5 .5 .5 .5")
    script = (
        "import sys; from retinanet.data import check_datasets, read_splits; "
        f"check_datasets(read_splits({str(tmp_path)!r})); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
