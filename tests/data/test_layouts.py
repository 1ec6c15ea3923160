"""Each layout of files is read completely: all images, all objects, from every starting path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from layouts import (
    CLASSES,
    LAYOUTS,
    OBJECTS,
    Layout,
    coco_dict,
    write,
    write_coco,
    write_images,
    write_voc,
    write_yolo,
)

from retinanet.data.dataset import Dataset
from retinanet.data.formats import read_dataset, read_splits
from retinanet.errors import DataError


def boxes(dataset: Dataset) -> set[tuple[str, tuple[float, ...]]]:
    return {
        (dataset.classes[annotation.label], annotation.box)
        for image in dataset.images
        for annotation in image.annotations
    }


def assert_complete(dataset: Dataset, count: int) -> None:
    assert [problem.reason for problem in dataset.problems] == []
    assert len(dataset.images) == count
    assert len({image.path for image in dataset.images}) == count
    assert all(image.path.is_file() for image in dataset.images)
    assert sum(len(image.annotations) for image in dataset.images) == 2 * count
    assert dataset.classes == CLASSES
    expected = {(name, tuple(map(float, box))) for name, box in OBJECTS}
    assert {(n, tuple(round(v, 3) for v in b)) for n, b in boxes(dataset)} == expected


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest, tmp_path: Path) -> Layout:
    chosen = LAYOUTS[request.param]
    chosen.build(tmp_path)
    return chosen


def test_layout_is_read_from_its_root(layout: Layout, tmp_path: Path) -> None:
    datasets = read_splits(tmp_path)
    total = sum(layout.splits.values())
    assert sum(len(dataset) for dataset in datasets.values()) == total
    for name, count in layout.splits.items():
        if name in ("", "train") and "val" not in layout.splits:
            continue  # a validation split is drawn
        assert_complete(datasets[name], count)
    whole = read_dataset(tmp_path, "all")
    assert_complete(whole, total)
    assert whole.format == layout.format


def test_layout_is_read_from_other_paths(layout: Layout, tmp_path: Path) -> None:
    for start, count in layout.starts.items():
        assert_complete(read_dataset(tmp_path / start, "all"), count)


def test_description_names_what_is_read_and_what_is_not(layout: Layout, tmp_path: Path) -> None:
    first, *others = read_dataset(tmp_path, "all").description
    for split in filter(None, layout.splits):
        assert split in first
    for part in layout.left_out:
        assert any(part in line for line in others)


def test_labels_of_different_images_in_two_formats_are_an_error(tmp_path: Path) -> None:
    write_voc(tmp_path / "a", ["x"])
    write_coco(tmp_path / "b.json", ["y.jpg"])
    write_images(tmp_path / "images", ["x", "y"])
    with pytest.raises(DataError, match=r"b\.json \(coco\) and a/x\.xml \(voc\) label 1 images"):
        read_dataset(tmp_path, "all")
    assert len(read_dataset(tmp_path, "all", format="voc")) == 1


def test_one_name_in_two_folders_belongs_to_the_folder_of_its_label(tmp_path: Path) -> None:
    for camera in ("cam1", "cam2"):
        write_images(tmp_path / "images" / camera, ["0"])
    names = ["C:\\d\\cam2\\0.jpg", "C:\\d\\cam1\\0.jpg"]
    write_coco(tmp_path / "labels.json", names)
    found = read_dataset(tmp_path, "all").images
    assert [image.path.parent.name for image in found] == ["cam2", "cam1"]


def test_name_that_fits_several_files_is_a_problem(tmp_path: Path) -> None:
    for camera in ("cam1", "cam2"):
        write_images(tmp_path / camera, ["0"])
    write_coco(tmp_path / "labels.json", ["0.jpg"])
    dataset = read_dataset(tmp_path, "all")
    (problem,) = dataset.problems
    assert (problem.kind, len(dataset)) == ("image-ambiguous", 0)
    assert "cam1/0.jpg and cam2/0.jpg" in problem.reason


def test_missing_image_is_not_replaced_by_a_mask(tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["a"])
    write_images(tmp_path / "masks", ["a", "b"], ".png")
    write_coco(tmp_path / "labels.json", ["a.jpg", "b.jpg"])
    paths = [image.path for image in read_dataset(tmp_path, "all").images]
    assert paths == [tmp_path / "images" / "a.jpg", tmp_path / "images" / "b.jpg"]


def test_image_listed_twice_keeps_the_objects_of_both(tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["a"])
    content = coco_dict(["a.jpg", "a.jpg"])
    content["annotations"][-1]["bbox"] = [1, 1, 3, 3]
    write(tmp_path / "labels.json", json.dumps(content))
    dataset = read_dataset(tmp_path, "all")
    assert [len(image.annotations) for image in dataset.images] == [3]
    assert [problem.kind for problem in dataset.problems] == ["image-duplicate"]


def test_links_hidden_files_and_loops_are_no_trouble(tmp_path: Path) -> None:
    LAYOUTS["voc-xmls"].build(tmp_path / "data")
    write(tmp_path / "data" / "annotations" / "xmls" / "._img_0.xml", "binary")
    write(tmp_path / "data" / ".cache" / "x.xml", "<annotation></annotation>")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "set").symlink_to(tmp_path / "data")
    assert_complete(read_dataset(tmp_path / "linked", "all"), 3)


def test_names_that_yaml_takes_for_other_values_stay_text(tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["a"])
    write(tmp_path / "labels" / "a.txt", "2 .5 .5 .2 .2\n")
    write(tmp_path / "data.yaml", "train: images\nnc: 3\nnames: [on, off, 007]\n")
    assert read_dataset(tmp_path, "all").classes == ("on", "off", "007")


def test_voc_list_with_blanks_in_names(tmp_path: Path) -> None:
    names = ["my photo 0", "b"]
    write_voc(tmp_path / "Annotations", names)
    write_images(tmp_path / "JPEGImages", names)
    write(tmp_path / "ImageSets" / "Main" / "train.txt", "my photo 0\nb  1\n")
    assert_complete(read_dataset(tmp_path, "all"), 2)


def test_split_without_any_label_is_a_problem(tmp_path: Path) -> None:
    write_images(tmp_path / "images" / "train", ["a"])
    write_yolo(tmp_path / "labels" / "train", ["a"])
    write_images(tmp_path / "images" / "val", ["b", "c"])
    write(tmp_path / "data.yaml", "train: images/train\nval: images/val\nnames: [cat, dog]\n")
    (problem,) = read_dataset(tmp_path, "val").problems
    assert problem.kind == "label-missing"
    assert "none of its 2 images has a label; looked for" in problem.reason


def test_nothing_found_says_what_is_there(tmp_path: Path) -> None:
    write_images(tmp_path, ["a", "b"])
    write(tmp_path / "table.csv", "file,label\na.jpg,cat\n")
    with pytest.raises(DataError) as caught:
        read_dataset(tmp_path)
    assert "no labelled data found in 2 images, 1 .csv" in str(caught.value)
    assert "no column for the box; columns are file, label" in str(caught.value)
