"""Each layout of files is read completely: all images, all objects, from every starting path."""

from __future__ import annotations

import contextlib
import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from layouts import (
    CLASSES,
    HEIGHT,
    LAYOUTS,
    OBJECTS,
    TF_HEADER,
    WIDTH,
    Layout,
    coco_dict,
    stems,
    tf_rows,
    voc_text,
    write,
    write_coco,
    write_image,
    write_images,
    write_rows,
    write_voc,
    write_yolo,
)

from retinanet.data import write_fixed
from retinanet.data.check import check_datasets
from retinanet.data.convert import convert
from retinanet.data.dataset import Dataset
from retinanet.data.formats import read_dataset, read_splits
from retinanet.errors import DataError


def boxes(dataset: Dataset) -> set[tuple[str, tuple[float, ...]]]:
    return {
        (dataset.classes[annotation.label], annotation.box)
        for image in dataset.images
        for annotation in image.annotations
    }


def assert_complete(dataset: Dataset, count: int, classes: tuple[str, str] = CLASSES) -> None:
    assert [problem.reason for problem in dataset.problems] == []
    assert len(dataset.images) == count
    assert len({image.path for image in dataset.images}) == count
    assert all(image.path.is_file() for image in dataset.images)
    assert sum(len(image.annotations) for image in dataset.images) == 2 * count
    assert dataset.classes == classes
    pairs = zip(classes, OBJECTS, strict=True)
    expected = {(name, tuple(map(float, box))) for name, (_, box) in pairs}
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
        assert_complete(datasets[name], count, layout.classes)
    whole = read_dataset(tmp_path, "all")
    assert_complete(whole, total, layout.classes)
    assert whole.format == layout.format


def test_layout_is_read_from_other_paths(layout: Layout, tmp_path: Path) -> None:
    for start, count in layout.starts.items():
        assert_complete(read_dataset(tmp_path / start, "all"), count, layout.classes)


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
    write(tmp_path / "labels.json.gz", "no gzip")
    write(tmp_path / "labels.zip", "")
    with pytest.raises(DataError, match=r"json\.gz: not COCO .*labels\.zip: compressed; unpack it"):
        read_dataset(tmp_path)


# -- values ------------------------------------------------------------------------------------


def test_one_value_beyond_one_does_not_make_fractions_pixels(tmp_path: Path) -> None:
    write_images(tmp_path, ["a"])
    rows = [("a.jpg", "cat", 0.1, 0.5, 1.0000005, 0.75), ("a.jpg", "cat", 0.5, 0.5, 0.75, 0.9)]
    write_rows(tmp_path / "t.csv", ("image", "class", "xmin", "ymin", "xmax", "ymax"), rows)
    (image,) = read_dataset(tmp_path, "all").images
    assert image.annotations[0].box == pytest.approx((4, 15, 40, 22.5), abs=1e-3)


def test_normalised_coco_boxes_are_scaled_and_reported(tmp_path: Path) -> None:
    write_images(tmp_path, ["a"])
    content = coco_dict(["a.jpg"])
    for item in content["annotations"]:
        item["bbox"] = [0.25, 0.5, 0.5, 0.5]
    write(tmp_path / "labels.json", json.dumps(content))
    dataset = read_dataset(tmp_path, "all")
    assert dataset.images[0].annotations[0].box == (10, 15, 30, 30)
    assert [problem.kind for problem in dataset.problems] == ["box-normalised"]


def test_lvis_names_and_masks_without_boxes(tmp_path: Path) -> None:
    write_images(tmp_path / "val2017", ["a"])
    content = coco_dict(["a.jpg"])
    del content["images"][0]["file_name"]
    content["images"][0]["coco_url"] = "http://images.cocodataset.org/val2017/a.jpg"
    first, second = content["annotations"]
    del first["bbox"], second["bbox"]
    first["segmentation"] = [[4, 5, 14, 5, 14, 15]]
    # Columns of 30 pixels: the second object's rectangle.
    counts = [20 * HEIGHT + 10, 15] + [15, 15] * 9 + [(WIDTH - 30) * HEIGHT + 5]
    second["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": counts}
    write(tmp_path / "labels.json", json.dumps(content))
    assert_complete(read_dataset(tmp_path, "all"), 1)


def test_groups_of_open_images_are_crowds(tmp_path: Path) -> None:
    write_images(tmp_path, ["a"])
    header = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", "IsGroupOf")
    rows = [("a", "/m/01g317", 0.1, 0.5, 0.1, 0.5, 1), ("a", "/m/01g317", 0.5, 0.9, 0.1, 0.5, 0)]
    write_rows(tmp_path / "labels.csv", header, rows)
    (image,) = read_dataset(tmp_path, "all").images
    assert [annotation.crowd for annotation in image.annotations] == [True, False]


def test_keypoint_rows_have_the_box_first(tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["a"])
    write(tmp_path / "labels" / "a.txt", "0 .5 .5 .5 .5 .1 .1 2 .2 .2 2\n")
    write(tmp_path / "data.yaml", "train: images\nnames: [person]\nkpt_shape: [2, 3]\n")
    (image,) = read_dataset(tmp_path, "all").images
    assert image.annotations[0].box == (10, 7.5, 30, 22.5)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
@pytest.mark.parametrize("name", ["labels.csv", "labels.json", "labels.json.gz"])
def test_encodings_of_spreadsheets(tmp_path: Path, encoding: str, name: str) -> None:
    write_images(tmp_path, ["a"])
    file = tmp_path / name
    if file.suffix == ".csv":
        write_rows(file, TF_HEADER, tf_rows(["a.jpg"]))
    else:
        write_coco(file, ["a.jpg"])
    content = file.read_text("utf-8").encode(encoding)
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    assert_complete(read_dataset(tmp_path, "all"), 1)
    assert_complete(read_dataset(file, "all"), 1)


def test_percent_encoded_names_are_a_last_resort(tmp_path: Path) -> None:
    write_images(tmp_path, ["my photo"])
    write_coco(tmp_path / "labels.json", ["my%20photo.jpg"])
    dataset = read_dataset(tmp_path, "all")
    assert [image.path.name for image in dataset.images] == ["my photo.jpg"]
    assert [problem.kind for problem in dataset.problems] == ["image-name-encoded"]


@pytest.mark.parametrize("encoding", ["GBK", "utf-8", "windows-1252"])
def test_voc_in_other_encodings_and_with_a_namespace(tmp_path: Path, encoding: str) -> None:
    name = "M\u00fcll" if encoding == "windows-1252" else "\u732b"
    text = voc_text("a.jpg").replace("cat", name).replace("<annotation>", '<annotation xmlns="x">')
    (tmp_path / "a.xml").write_bytes(
        f'<?xml version="1.0" encoding="{encoding}"?>{text}'.encode(encoding)
    )
    write_images(tmp_path, ["a"])
    assert set(read_dataset(tmp_path, "all").classes) == {name, "dog"}


def test_classes_that_differ_in_case_are_reported(tmp_path: Path) -> None:
    data = tmp_path / "data"
    text = voc_text("a.jpg").replace("dog", "Cat")
    write(data / "a.xml", text)
    write_images(data, ["a"])
    dataset = read_dataset(data, "all")
    assert dataset.classes == ("Cat", "cat")
    assert [problem.kind for problem in dataset.problems] == ["class-similar"]
    splits = {"all": dataset}
    write_fixed(splits, check_datasets(splits), tmp_path / "fixed")
    fixed = read_dataset(tmp_path / "fixed", "all")
    assert (fixed.classes, fixed.problems) == (("Cat",), ())
    assert len(fixed.images[0].annotations) == 2
    write(data / "a.xml", text.replace("cat", "a").replace("Cat", "A"))
    (problem,) = read_dataset(data, "all").problems
    assert problem.fix == ""  # letters


def test_data_without_any_object_is_a_problem(tmp_path: Path) -> None:
    write_images(tmp_path, ["a", "b"])
    content = coco_dict(["a.jpg", "b.jpg"])
    write(tmp_path / "labels.json", json.dumps(content | {"annotations": []}))
    assert check_datasets(read_splits(tmp_path)).counts == {"no-objects": 1}


def test_boxes_under_a_pixel_look_normalised(tmp_path: Path) -> None:
    write_voc(tmp_path, ["a"])
    text = (tmp_path / "a.xml").read_text()
    for old, new in (("4", "0.1"), ("5", "0.1"), ("14", "0.5"), ("15", "0.5")):
        text = text.replace(f">{old}<", f">{new}<")
    write(tmp_path / "a.xml", text)
    write_images(tmp_path, ["a"])
    dataset = read_dataset(tmp_path, "all")
    report = check_datasets({"all": dataset})
    assert report.counts == {"box-normalised": 1}
    assert dataset.images[0].annotations[0].box == (4, 3, 20, 15)


def test_documentation_lists_the_layouts() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")
    table = text.partition("<!-- layouts -->\n")[2].partition("<!-- end of layouts -->")[0]
    rows = [f"| {layout.title} | {layout.format} |" for layout in LAYOUTS.values()]
    assert table.splitlines()[2:] == rows


# -- parts that could be lost ------------------------------------------------------------------


def test_images_of_no_split_beside_train_are_the_split_other(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name, count in (("train", 3), ("holdout", 2)):
        write_coco(data / f"{name}.json", [f"{stem}.jpg" for stem in stems(count, name)])
        write_images(data / "images", stems(count, name))
    splits = read_splits(data)
    assert set(splits) == {"train", "val", "other"}
    assert_complete(splits["other"], 2)
    assert_complete(read_dataset(data, "all"), 5)
    convert(data, tmp_path / "out", "voc")
    assert_complete(read_dataset(tmp_path / "out", "all"), 5)


def test_whole_beside_its_splits_adds_only_what_they_lack(tmp_path: Path) -> None:
    names = [f"{stem}.jpg" for stem in stems(6)]
    write_images(tmp_path / "images", stems(6))
    write_coco(tmp_path / "annotations" / "instances.json", names)
    write_coco(tmp_path / "annotations" / "train.json", names[:3])
    write_coco(tmp_path / "annotations" / "val.json", names[3:5])
    splits = read_splits(tmp_path)
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 3,
        "val": 2,
        "other": 1,
    }
    write_coco(tmp_path / "annotations" / "instances.json", names[:5])
    counts = {name: len(split) for name, split in read_splits(tmp_path).items()}
    assert counts == {"train": 3, "val": 2}


@pytest.mark.parametrize("files", [".retinanet-outputs", "config.toml run.json log.jsonl"])
def test_detections_and_runs_inside_the_data_are_not_read(tmp_path: Path, files: str) -> None:
    LAYOUTS["yolo-lists"].build(tmp_path)
    write_images(tmp_path / "found" / "images", stems(6))
    for file in files.split():
        write(tmp_path / "found" / file, "")
    dataset = read_dataset(tmp_path, "all")
    assert_complete(dataset, 6)
    assert "not read: found: detections or a training run" in dataset.description


def test_different_lists_of_classes_are_an_error(tmp_path: Path) -> None:
    for folder, names in (("a", "cat\ndog\n"), ("b", "dog\ncat\n")):
        write_images(tmp_path / folder, stems(2, folder))
        write_yolo(tmp_path / folder, stems(2, folder))
        write(tmp_path / folder / "classes.txt", names)
    with pytest.raises(DataError, match=r"a/classes\.txt and .*b/classes\.txt list other classes"):
        read_dataset(tmp_path, "all")
    assert_complete(read_dataset(tmp_path / "a", "all"), 2)


def test_part_of_a_yolo_data_set_has_the_names_of_the_whole(tmp_path: Path) -> None:
    LAYOUTS["roboflow-yolo"].build(tmp_path)
    assert_complete(read_dataset(tmp_path / "valid", "all"), 2)
    assert_complete(read_dataset(tmp_path / "train" / "labels", "all"), 3)


def test_lists_of_stems_with_comments(tmp_path: Path) -> None:
    write_images(tmp_path / "images", stems(4))
    write_yolo(tmp_path / "labels", stems(4))
    write(tmp_path / "classes.txt", "cat\ndog\n")
    write(tmp_path / "ImageSets" / "Main" / "train.txt", "# of 2024\nimg_0\nimg_1\nimg_2\n")
    write(tmp_path / "ImageSets" / "Main" / "val.txt", "img_3\n")
    splits = read_splits(tmp_path)
    assert {name: len(split) for name, split in splits.items()} == {"train": 3, "val": 1}


def test_images_that_another_format_labels_are_no_background(tmp_path: Path) -> None:
    write_images(tmp_path, stems(5))
    write_yolo(tmp_path, stems(3))
    write(tmp_path / "classes.txt", "cat\ndog\n")
    write_voc(tmp_path / "xml", stems(5)[3:])
    dataset = read_dataset(tmp_path, "all")
    assert_complete(dataset, 3)
    assert any("2 images more" in line for line in dataset.description)


def test_label_of_two_images_is_of_the_one_in_its_folders(tmp_path: Path) -> None:
    write_images(tmp_path / "images", stems(2))
    write_images(tmp_path / "images_small", stems(2))
    write_yolo(tmp_path / "labels", stems(2))
    write(tmp_path / "classes.txt", "cat\ndog\n")
    dataset = read_dataset(tmp_path, "all")
    assert {image.path.parent.name for image in dataset.images} == {"images"}
    assert [problem.kind for problem in dataset.problems] == ["image-ambiguous"] * 2


def test_text_of_windows_and_names_of_macos(tmp_path: Path) -> None:
    write_images(tmp_path, ["Ba\u0308r"])
    text = ",".join(TF_HEADER) + f"\nB\u00e4r.jpg,{WIDTH},{HEIGHT},B\u00f6r,1,2,3,4\n"
    (tmp_path / "labels.csv").write_bytes(text.encode("cp1252"))
    dataset = read_dataset(tmp_path, "all")
    assert dataset.classes == ("B\u00f6r",)
    assert dataset.images[0].path.is_file()


def test_several_data_sets_of_yolo_are_an_error(tmp_path: Path) -> None:
    for name in "ab":
        LAYOUTS["yolo"].build(tmp_path / name)
    with pytest.raises(DataError, match=r"several data sets: a/data.yaml, b/data.yaml; give the"):
        read_splits(tmp_path)
    with pytest.raises(DataError, match=rf"if they lie beside it, give {tmp_path / 'a'}$"):
        read_splits(tmp_path / "a" / "images")
    assert_complete(read_dataset(tmp_path / "a", "all"), 5)


def test_images_without_labels_are_described(tmp_path: Path) -> None:
    LAYOUTS["coco"].build(tmp_path)
    write_images(tmp_path / "test2017", stems(2))
    write_images(tmp_path / "masks", ["train_0"], ".png")
    line = "not read: 3 images without labels: 2 in test2017, 1 in masks"
    assert read_splits(tmp_path)["train"].description[-1] == line
    assert read_dataset(tmp_path, "all").description[-1] == line


@pytest.mark.parametrize(("file", "count"), [("train.txt", 4), ("labels/img_4.txt", 1)])
def test_text_file_of_yolo_is_a_data_set(tmp_path: Path, file: str, count: int) -> None:
    LAYOUTS["yolo-lists"].build(tmp_path)
    assert_complete(read_dataset(tmp_path / file, "all"), count)
    with pytest.raises(DataError, match=r"classes\.txt: no labelled data found"):
        read_dataset(tmp_path / "classes.txt", "all")


def test_addresses_of_images_are_found_by_name_or_reported(tmp_path: Path) -> None:
    write_images(tmp_path / "images", ["a", "my b"])
    address = "https://host.org/set"
    names = [f"{address}/{name}?key={'k' * 400}" for name in ("a.jpg", "my%20b.jpg", "c.jpg")]
    write_coco(tmp_path / "labels.json", names)
    dataset = read_dataset(tmp_path, "all")
    assert [image.path.name for image in dataset.images] == ["a.jpg", "my b.jpg", "c.jpg"]
    (problem,) = check_datasets({"all": dataset}).problems
    assert problem.kind == "image-missing"
    assert f"image 3 is at {address}/c.jpg, and no file of this name is in" in problem.reason


# -- labels of other images --------------------------------------------------------------------


def test_image_of_another_split_or_camera_is_not_taken(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_images(tmp_path / split / "images", ["0"])
        rows = tf_rows(["images/0.jpg", "images/1.jpg"] if split == "test" else ["images/0.jpg"])
        write_rows(tmp_path / split / "_annotations.csv", TF_HEADER, rows)
    write_images(tmp_path / "train" / "images", ["1"])
    paths = [image.path for image in read_dataset(tmp_path, "test").images]
    assert [path.is_file() for path in paths] == [True, False]


def test_missing_images_of_a_camera_leave_the_other_alone(tmp_path: Path) -> None:
    write_images(tmp_path / "images" / "cam1", ["0"])
    write_coco(tmp_path / "labels.json", ["cam1/0.jpg", "cam2/0.jpg"])
    dataset = read_dataset(tmp_path, "all")
    assert [image.path.is_file() for image in dataset.images] == [True, False]


def test_background_image_is_not_labelled_by_another_camera(tmp_path: Path) -> None:
    write_yolo(tmp_path / "cam1" / "labels", ["0", "1"])
    write_images(tmp_path / "cam1" / "images", ["1"])
    write_images(tmp_path / "cam2" / "images", ["0"])
    write_yolo(tmp_path / "cam2" / "labels", ["2"])
    write_images(tmp_path / "cam2" / "images", ["2"])
    write(tmp_path / "classes.txt", "cat\ndog\n")
    counts = {i.path.name: len(i.annotations) for i in read_dataset(tmp_path, "all").images}
    assert counts == {"1.jpg": 2, "0.jpg": 0, "2.jpg": 2}


def test_files_of_images_without_objects_are_empty(tmp_path: Path) -> None:
    LAYOUTS["dota"].build(tmp_path)
    for index in range(9):
        write(tmp_path / "val" / "labelTxt" / f"a{index}.txt", "")
        write_image(tmp_path / "val" / "images" / f"a{index}.png")
    splits = read_splits(tmp_path)
    assert {name: len(split) for name, split in splits.items()} == {"train": 3, "val": 11}


@pytest.mark.parametrize("region", ["DontCare", "others"])
def test_regions_of_kitti_are_not_those_of_visdrone(tmp_path: Path, region: str) -> None:
    rows = [f"{name} 0 0 0 1 2 11 12 1 1 1 1 1 1 0\n" for name in ("Car", region)]
    write(tmp_path / "label_2" / "a.txt", "".join(rows))
    write_image(tmp_path / "image_2" / "a.png")
    dataset = read_dataset(tmp_path, "all")
    is_region = region == "DontCare"
    assert dataset.classes == (("Car",) if is_region else ("Car", "others"))
    assert [a.crowd for a in dataset.images[0].annotations] == [False, is_region]


def test_missing_images_of_a_list_are_reported(tmp_path: Path) -> None:
    LAYOUTS["yolo-lists"].build(tmp_path)
    write(tmp_path / "train.txt", "/x/images/img_0.jpg\n/x/images/gone.jpg\n/x/images/lost.jpg\n")
    splits = read_splits(tmp_path)
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 3,
        "val": 2,
        "other": 3,
    }
    assert check_datasets({"train": splits["train"]}).counts == {"image-missing": 2}


def test_images_outside_the_lists_are_the_split_other(tmp_path: Path) -> None:
    LAYOUTS["yolo-lists"].build(tmp_path)
    write_images(tmp_path / "images", ["more"])
    write_yolo(tmp_path / "labels", ["more"])
    assert_complete(read_splits(tmp_path)["other"], 1)


def test_images_beside_another_folder_are_not_taken(tmp_path: Path) -> None:
    write_voc(tmp_path / "a" / "labels", ["x"])
    write_images(tmp_path / "b" / "images", ["x"])
    (image,) = read_dataset(tmp_path / "a" / "labels", "all").images
    assert not image.path.is_file()


def test_validation_images_in_the_folder_of_training(tmp_path: Path) -> None:
    write_images(tmp_path / "train2017", ["a", "b"])
    write_coco(tmp_path / "annotations" / "instances_train.json", ["a.jpg"])
    write_coco(tmp_path / "annotations" / "instances_val.json", ["b.jpg"])
    assert_complete(read_dataset(tmp_path, "val"), 1)


def test_files_that_cannot_be_read_stop_nothing(tmp_path: Path) -> None:
    LAYOUTS["labelme"].build(tmp_path)
    write(tmp_path / "notes.txt", "nan,1,2,3,4,5,6,7\n")
    write(tmp_path / "json" / "settings.json", "{}")
    for suffix in ("txt", "csv"):
        (tmp_path / f"gone.{suffix}").symlink_to(tmp_path / "nowhere")
    write(tmp_path / "via.json", '{"_via_img_metadata": [], "regions": [], "shape_attributes": []}')
    assert_complete(read_dataset(tmp_path, "all"), 3)


@pytest.mark.parametrize("xs", [5, None, ["a", 1], [1]])
def test_polygon_of_via_without_points_is_a_problem(tmp_path: Path, xs: Any) -> None:
    write_images(tmp_path, ["a"])
    shape = {"name": "polygon", "all_points_x": xs, "all_points_y": [1, 2]}
    regions = [{"shape_attributes": shape, "region_attributes": {"class": "cat"}}]
    write(tmp_path / "via.json", json.dumps({"a": {"filename": "a.jpg", "regions": regions}}))
    problem, _ = read_dataset(tmp_path, "all").problems
    assert problem.kind == "box-not-a-number"


ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1e308, 10**400, "", "x", "\x00", "\ud800", "a" * 5000, [], {}, [[]]),
    *({"x": 1}, float("nan"), "//[x", "/data/local-files/?d=", "..", "nan", [None], ["a"]),
)
ODD_BYTES = (b"-1", b"1e999", b"\xff", b"\x00", b"&x;", b"<", b">", b'"', b"[", b"", b"nan")


def mutated(value: Any, draw: random.Random) -> Any:
    """Exchange about one part in twelve for what should not be there."""
    if draw.random() < 0.08:
        return draw.choice(ODD)
    if isinstance(value, dict):
        return {k: mutated(v, draw) for k, v in value.items() if draw.random() > 0.02}
    if isinstance(value, list):
        return [mutated(item, draw) for item in value]
    return value


def test_mutated_label_files_never_crash(layout: Layout, tmp_path: Path) -> None:
    draw = random.Random(layout.title)
    files = [f for f in sorted(tmp_path.rglob("*.*")) if f.suffix not in (".jpg", ".png", "")]
    for turn in range(8):
        file = draw.choice(files)
        content = file.read_bytes()
        if turn % 2 and file.suffix == ".json":
            file.write_text(json.dumps(mutated(json.loads(content), draw)))
        else:
            changed = bytearray(content)
            for _ in range(draw.randint(1, 3)):
                at = draw.randrange(len(changed) or 1)
                changed[at : at + draw.choice((0, 1, 5, 40))] = draw.choice(ODD_BYTES)
            file.write_bytes(changed)
        with contextlib.suppress(DataError):
            read_splits(tmp_path)
        file.write_bytes(content)
