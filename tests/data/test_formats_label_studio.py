"""Reading Label Studio's exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from labelled_folders import MakeImage, write

from retinanet.data import check_datasets, find_data, read_dataset, read_splits
from retinanet.errors import DataError

# 10 and 20 percent of 40 x 30 pixels are 4 and 6.
SHARES = {"x": 10, "y": 20, "width": 25, "height": 50}
BOX = (4, 6, 14, 21)


def region(label: Any = "cat", id_: Any = "r1", value: Any = None, **more: Any) -> dict[str, Any]:
    """One result of an annotation."""
    value = {**SHARES, "rotation": 0, "rectanglelabels": [label]} if value is None else value
    return {
        "id": id_,
        "type": "rectanglelabels",
        "from_name": "label",
        "to_name": "image",
        "original_width": 40,
        "original_height": 30,
        "image_rotation": 0,
        "value": value,
        **more,
    }


def task(image: str, *regions: Any, id_: Any = 1, **more: Any) -> dict[str, Any]:
    annotation = {"id": 5, "was_cancelled": False, "ground_truth": False, "result": list(regions)}
    whole = {"id": id_, "data": {"image": image}, "annotations": [annotation], "predictions": []}
    return {**whole, **more}


def export(folder: Path, *tasks: Any, name: str = "project-1.json") -> Path:
    return write(folder / name, json.dumps(list(tasks)))


def test_rectangles_and_background(tmp_path: Path, make_image: MakeImage) -> None:
    for seed, name in enumerate(("a.jpg", "b.jpg")):
        make_image(tmp_path / name, seed=seed)
    file = export(tmp_path, task("a.jpg", region(), region("ant", "r2")), task("b.jpg", id_=2))
    for path in (file, tmp_path):
        assert find_data(path).format == "labelstudio"
        dataset = read_dataset(path, "all")
        assert dataset.problems == ()
        assert dataset.classes == ("ant", "cat")
        first, second = dataset.images
        assert (first.path, first.id, first.width, first.height) == (tmp_path / "a.jpg", 1, 40, 30)
        assert [(a.box, a.label, a.id) for a in first.annotations] == [
            (BOX, 1, "r1"),
            (BOX, 0, "r2"),
        ]
        assert second.annotations == ()
    assert check_datasets(read_splits(tmp_path)).problems == ()


@pytest.mark.parametrize(
    "faulty",
    [
        {**SHARES, "rotation": 30, "rectanglelabels": ["cat"]},  # its region states no size
        {**SHARES, "rectanglelabels": []},
        {**SHARES, "x": "left", "rectanglelabels": ["cat"]},
    ],
)
def test_image_whose_only_box_is_dropped_is_no_background(
    faulty: dict[str, Any], tmp_path: Path, make_image: MakeImage
) -> None:
    for seed, name in enumerate(("a.jpg", "b.jpg", "c.jpg")):
        make_image(tmp_path / name, seed=seed)
    dropped = region(value=faulty, original_width=None, original_height=None)
    export(tmp_path, task("a.jpg", dropped), task("b.jpg", region(), id_=2), task("c.jpg", id_=3))
    dataset = read_dataset(tmp_path, "all")
    assert [image.path.name for image in dataset.images] == ["b.jpg", "c.jpg"]
    last = dataset.problems[-1]
    assert (last.kind, last.file) == ("label-unreadable", tmp_path / "a.jpg")
    assert (last.reason, last.fix) == ("each of its objects is faulty", "the image is dropped")


def test_json_min(tmp_path: Path, make_image: MakeImage) -> None:
    make_image(tmp_path / "a.jpg")
    make_image(tmp_path / "b.jpg", seed=1)
    sizes = {"original_width": 40, "original_height": 30}
    item = {**SHARES, "rotation": 0, "rectanglelabels": ["cat"], **sizes}
    row = {
        "id": 1,
        "image": "/data/upload/1/0123abcd-a.jpg",
        "label": [item],
        "annotator": 1,
        "annotation_id": 9,
        "lead_time": 3.5,
    }
    other = {**row, "annotation_id": 10, "label": []}  # of a second person
    empty = {"id": 2, "image": "/data/upload/1/0123abcd-b.jpg", "annotator": 1, "annotation_id": 11}
    export(tmp_path, row, other, empty)
    assert find_data(tmp_path).format == "labelstudio"
    dataset = read_dataset(tmp_path, "all")
    assert dataset.problems == ()
    assert [i.path.name for i in dataset.images] == ["a.jpg", "b.jpg"]
    assert [[a.box for a in i.annotations] for i in dataset.images] == [[BOX], []]


@pytest.mark.parametrize(
    ("address", "position"),
    [
        ("a.jpg", "a.jpg"),
        ("/data/local-files/?d=project/left/a%20b.jpg", "left/a b.jpg"),
        ("http://localhost:8080/data/local-files/?d=left/a.jpg", "left/a.jpg"),
        ("/data/upload/12/0123abcd-a.jpg", "a.jpg"),
        ("/data/upload/12/0123abcd-a.jpg", "0123abcd-a.jpg"),
        ("s3://bucket/right/a.jpg", "right/a.jpg"),
        ("https://host.example/x/a%2B.jpg?X-Signature=1%2F2", "images/a+.jpg"),
        ("https://host.example/a.jpg", "a.png"),
        ("C:\\images\\a.jpg", "a.jpg"),
        ("../../left/a.jpg", "left/a.jpg"),
    ],
)
def test_images_by_their_address(
    tmp_path: Path, make_image: MakeImage, address: str, position: str
) -> None:
    make_image(tmp_path / position)
    export(tmp_path, task(address, region()))
    assert read_dataset(tmp_path, "all").images[0].path == tmp_path / position


def test_sizes_that_the_regions_lack_are_read(tmp_path: Path, make_image: MakeImage) -> None:
    make_image(tmp_path / "a.jpg", size=(80, 60))
    export(tmp_path, task("a.jpg", region(original_width=None, original_height=None)))
    image = read_dataset(tmp_path, "all").images[0]
    assert (image.width, image.height) == (80, 60)
    assert image.annotations[0].box == (8, 12, 28, 42)


def test_the_image_under_another_key(tmp_path: Path, make_image: MakeImage) -> None:
    make_image(tmp_path / "a.jpg")
    item = task("")
    item["data"] = {"note": "seen at noon", "photograph": "s3://x/a.jpg", "patient": 7}
    export(tmp_path, item)
    (image,) = read_dataset(tmp_path, "all").images
    assert image.path == tmp_path / "a.jpg"
    assert image.extra == {"note": "seen at noon", "patient": 7}


def test_whose_annotation_counts(tmp_path: Path, make_image: MakeImage) -> None:
    make_image(tmp_path / "a.jpg")

    def by(label: str, **more: Any) -> dict[str, Any]:
        return {"result": [region(label)], **more}

    skipped, first, second = by("skipped", was_cancelled=True), by("first"), by("second")
    truth = by("truth", ground_truth=True)
    for given, wanted in (
        ([skipped, first, second], "first"),
        ([skipped, first, truth], "truth"),
        ([by("x", was_cancelled=True, ground_truth=True), second], "second"),
    ):
        export(tmp_path, task("a.jpg", annotations=given))
        assert read_dataset(tmp_path, "all").classes == (wanted,)


def test_tasks_that_nobody_labelled(tmp_path: Path, make_image: MakeImage) -> None:
    for seed, name in enumerate("abcd"):
        make_image(tmp_path / f"{name}.jpg", seed=seed)
    predicted = [{"result": [region()], "model_version": "retinanet"}]
    export(
        tmp_path,
        task("a.jpg", annotations=[{"result": [region()], "was_cancelled": True}], id_=1),
        task("b.jpg", annotations=[], id_=2),
        task("c.jpg", annotations=[], predictions=predicted, id_=3),
        task("d.jpg", region(), id_=4),
    )
    dataset = read_dataset(tmp_path, "all")
    assert [item.path.name for item in dataset.images] == ["d.jpg"]
    assert [(p.kind, p.object, p.reason) for p in dataset.problems] == [
        ("label-missing", 1, "task 1 (a.jpg) was skipped"),
        ("label-missing", 2, "task 2 (b.jpg) is not labelled yet"),
        (
            "label-missing",
            3,
            "task 3 (c.jpg) has predictions alone, which no person has confirmed",
        ),
    ]


def test_a_size_that_cannot_be_known(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg", "no image")
    item = region(original_width="wide", original_height=None)
    export(tmp_path, task("a.jpg", item))
    dataset = read_dataset(tmp_path, "all")
    assert dataset.images[0].annotations == ()
    (problem,) = dataset.problems
    assert problem.kind == "image-unreadable"
    assert "fractions of an image whose size cannot be read" in problem.reason


def test_several_labels_and_a_rectangle_with_labels_beside_it(
    tmp_path: Path, make_image: MakeImage
) -> None:
    make_image(tmp_path / "a.jpg")
    both = region(value={**SHARES, "rectanglelabels": ["cat", "ant"]})
    bare = region(type="rectangle", value=SHARES, id_="r2")
    named = region(type="labels", value={**SHARES, "labels": ["bee"]}, id_="r2")
    choice = {"id": "r2", "type": "choices", "value": {"choices": ["sharp"]}}
    export(tmp_path, task("a.jpg", both, bare, named, choice))
    dataset = read_dataset(tmp_path, "all")
    assert dataset.problems == ()
    found = [(dataset.classes[a.label], a.id) for a in dataset.images[0].annotations]
    assert found == [("cat", "r1"), ("ant", "r1-2"), ("bee", "r2")]


def test_classes_of_the_labelling_interface(tmp_path: Path, make_image: MakeImage) -> None:
    make_image(tmp_path / "a.jpg")
    labels = "".join(f'<Label value="{name}"/>' for name in ("dog", "cat"))
    config = (
        '<View><Image name="image" value="$image"/>'
        f'<RectangleLabels name="label" toName="image">{labels}</RectangleLabels></View>'
    )
    write(tmp_path / "label_studio_config.xml", config)
    export(tmp_path, task("a.jpg", region(), region("cow", "r2")))
    dataset = read_dataset(tmp_path, "all")
    assert dataset.classes == ("dog", "cat")
    (problem,) = dataset.problems
    assert (problem.kind, problem.object) == ("class-unknown", "r2")
    assert problem.reason == "a.jpg: object r2: class 'cow' is not one of 2 known"
    write(tmp_path / "label_studio_config.xml", "<View")
    with pytest.raises(DataError, match=r"label_studio_config\.xml: not XML"):
        read_splits(tmp_path)
    (tmp_path / "label_studio_config.xml").unlink()
    write(tmp_path / "classes.txt", "cow\ncat\n\n")
    assert read_dataset(tmp_path, "all").classes == ("cow", "cat")


def test_turned_rectangles(tmp_path: Path, make_image: MakeImage) -> None:
    make_image(tmp_path / "a.jpg")
    turned = region(value={**SHARES, "rotation": 90, "rectanglelabels": ["cat"]})
    viewed = region(id_="r2", image_rotation=90)
    export(tmp_path, task("a.jpg", turned, viewed))
    dataset = read_dataset(tmp_path, "all")
    assert [(p.kind, p.object, p.fix) for p in dataset.problems] == [
        ("box-rotated", "r1", "the upright box around it is used"),
        ("box-rotated", "r2", "dropped"),
    ]
    # Clockwise about (4, 6): 10 to the right becomes 10 down, 15 down becomes 15 to the left.
    (item,) = dataset.images[0].annotations
    assert item.box == pytest.approx((-11, 6, 4, 16))


def test_faults_are_recorded(tmp_path: Path, make_image: MakeImage) -> None:
    make_image(tmp_path / "a.jpg")
    export(
        tmp_path,
        task(
            "a.jpg",
            region(),
            "nonsense",
            region(id_="r2", value="nonsense"),
            region(id_="r3", value={**SHARES, "x": "left", "rectanglelabels": ["cat"]}),
            region(id_="r4", value={**SHARES}),
            region(id_="r5", value={**SHARES, "rotation": "NaN", "rectanglelabels": ["cat"]}),
            region(id_="r6", type="polygonlabels"),
            region(id_="r7", type=["list"]),
        ),
        "nonsense",
        {"id": 3, "data": {"text": "no image"}, "annotations": []},
        {"id": 4, "data": {"image": "data:image/png;base64,AAAA"}, "annotations": []},
        task("a.jpg", region()),
        task("b.jpg", id_=6, annotations=[{"result": "nonsense"}]),
    )
    dataset = read_dataset(tmp_path, "all")
    assert [a.id for a in dataset.images[0].annotations] == ["r1"]
    found = [(p.kind, p.object) for p in dataset.problems]
    assert found == [
        ("label-unreadable", 1),
        ("label-unreadable", 2),
        ("box-not-a-number", "r3"),
        ("class-unknown", "r4"),
        ("box-not-a-number", "r5"),
        ("shape-not-box", "r6"),
        ("label-unreadable", 1),
        ("label-unreadable", 3),
        ("label-unreadable", 4),
        ("image-id-duplicate", 1),
        ("label-unreadable", 6),
    ]
    assert dataset.problems[2].reason == (
        "a.jpg: region r3: x 'left', y 20, width 25, height 50, rotation None: not numbers"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"data": 1, "annotations": ', "not JSON: Expecting value at line 1 column 29"),
        ('[{"data": ' * 100_000 + '"annotations"', "cannot be read"),
        ('[{"data": {}, "annotations": [], "id": ' + "9" * 5000 + "}]", "cannot be read"),
        ('["data", "annotations"] x', "not JSON: Extra data"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_splits(write(tmp_path / "x.json", text))


def test_other_lists_are_not_tasks(tmp_path: Path) -> None:
    write(tmp_path / "coco_results.json", '[{"image_id": 1, "category_id": 1, "bbox": []}]')
    write(tmp_path / "empty.json", "")
    write(tmp_path / "data.json", '{"data": [], "annotations": []}')
    with pytest.raises(DataError, match=r"not COCO .* Label Studio"):
        find_data(tmp_path)


def test_two_addresses_of_one_file(tmp_path: Path, make_image: MakeImage) -> None:
    for seed, name in enumerate(("street.jpg", "a.jpg", "b.jpg")):
        make_image(tmp_path / "images" / name, seed=seed)
    export(
        tmp_path,
        task("/data/upload/3/0123abcd-street.jpg", region(), id_=1),
        task("/data/upload/3/89abcdef-street.jpg", region(), id_=2),
        task("a.jpg", region(), id_=3),
        task("b.jpg", region(), id_=4),
    )
    dataset = read_dataset(tmp_path, "all")
    assert [image.id for image in dataset.images] == [3, 4]
    assert [(item.kind, item.object) for item in dataset.problems] == [
        ("image-missing", 1), ("image-missing", 2)
    ]  # fmt: skip
    assert "match this file" in dataset.problems[0].reason
