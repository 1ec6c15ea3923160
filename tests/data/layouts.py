"""Tiny data sets in the folder layouts that people have, with what each must be read as.

Every image is 40 x 30 pixels with two objects, (4, 5, 14, 15) of class ``cat`` and (20, 10, 30, 25)
of class ``dog``, unless the layout says otherwise.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

WIDTH, HEIGHT = 40, 30
OBJECTS = (("cat", (4, 5, 14, 15)), ("dog", (20, 10, 30, 25)))
CLASSES = ("cat", "dog")


@dataclass(frozen=True)
class Layout:
    """A layout of files.

    Attributes:
        title: for the table in the documentation.
        build: writes the files into a folder.
        format: the format that it is read as.
        splits: number of images per split; a validation split that is drawn is not listed.
        starts: further paths that must be read as the same objects, relative to the root: a label
            folder, a file; with the number of images.
        left_out: parts of the lines that report what was found and not read.
        classes: of the first and the second object.
    """

    title: str
    build: Callable[[Path], None]
    format: str
    splits: Mapping[str, int]
    starts: Mapping[str, int] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    classes: tuple[str, str] = CLASSES


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def write_image(path: Path, value: int = 128) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), (value % 256, 80, 40)).save(path)


def write_images(folder: Path, stems: Iterable[str], suffix: str = ".jpg") -> None:
    for number, stem in enumerate(stems):
        write_image(folder / f"{stem}{suffix}", 40 * number)


def stems(count: int, prefix: str = "img") -> list[str]:
    return [f"{prefix}_{number}" for number in range(count)]


def voc_text(filename: str, folder: str = "images") -> str:
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{b[0]}</xmin><ymin>{b[1]}</ymin>"
        f"<xmax>{b[2]}</xmax><ymax>{b[3]}</ymax></bndbox></object>"
        for name, b in OBJECTS
    )
    return (
        f"<annotation><folder>{folder}</folder><filename>{filename}</filename><size>"
        f"<width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>{objects}"
        "</annotation>"
    )


def write_voc(folder: Path, names: Iterable[str], suffix: str = ".jpg") -> None:
    for stem in names:
        write(folder / f"{stem}.xml", voc_text(f"{Path(stem).name}{suffix}"))


def yolo_text() -> str:
    lines = []
    for label, (_, (x1, y1, x2, y2)) in enumerate(OBJECTS):
        cx, cy = (x1 + x2) / 2 / WIDTH, (y1 + y2) / 2 / HEIGHT
        lines.append(f"{label} {cx} {cy} {(x2 - x1) / WIDTH} {(y2 - y1) / HEIGHT}\n")
    return "".join(lines)


def write_yolo(folder: Path, names: Iterable[str]) -> None:
    for stem in names:
        write(folder / f"{stem}.txt", yolo_text())


def coco_dict(file_names: Iterable[str], first_id: int = 1) -> dict[str, Any]:
    images, annotations = [], []
    for number, name in enumerate(file_names, start=first_id):
        images.append({"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT})
        for category, (_, (x1, y1, x2, y2)) in enumerate(OBJECTS, start=1):
            box = [x1, y1, x2 - x1, y2 - y1]
            annotations.append(
                {
                    "id": 10 * number + category,
                    "image_id": number,
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_coco(file: Path, file_names: Iterable[str], first_id: int = 1) -> None:
    write(file, json.dumps(coco_dict(file_names, first_id)))


def write_rows(file: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([list(header), *map(list, rows)])


TF_HEADER = ("filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax")


def tf_rows(file_names: Iterable[str]) -> list[tuple[Any, ...]]:
    return [(name, WIDTH, HEIGHT, cls, *box) for name in file_names for cls, box in OBJECTS]


Labels = Callable[[Path, str, list[str]], None]
"""Writes the labels of the images of a split: root, split and stems."""

SPLITS = {"train": 3, "val": 2}
ROBOFLOW = {"train": 3, "valid": 2}


def layout(
    labels: Labels,
    images: str,
    splits: Mapping[str, int] = SPLITS,
    *,
    suffix: str = ".jpg",
    more: Mapping[str, str] | None = None,
) -> Callable[[Path], None]:
    """Return a function that writes images, labels, and other files by name.

    In `images` ``{}`` is the split. Of one split without a name the stems are img_0 and so on.
    """

    def build(root: Path) -> None:
        for split, count in splits.items():
            names = stems(count, split or "img")
            write_images(root / images.format(split), names, suffix)
            labels(root, split, names)
        for name, text in (more or {}).items():
            write(root / name, text)

    return build


def each(folder: str, text: Callable[[str], str], suffix: str) -> Labels:
    """Labels of a file per image."""

    def labels(root: Path, split: str, names: list[str]) -> None:
        for stem in names:
            write(root / folder.format(split) / f"{stem}{suffix}", text(stem))

    return labels


def voc(folder: str) -> Labels:
    return each(folder, lambda stem: voc_text(f"{stem}.jpg"), ".xml")


def yolo(folder: str) -> Labels:
    return each(folder, lambda _: yolo_text(), ".txt")


def coco(file: str) -> Labels:
    return lambda root, split, names: write_coco(
        root / file.format(split), [f"{stem}.jpg" for stem in names]
    )


def table(file: str) -> Labels:
    return lambda root, split, names: write_rows(
        root / file.format(split), TF_HEADER, tf_rows(f"{stem}.jpg" for stem in names)
    )


def json_file(file: str, content: Callable[[list[str]], Any]) -> Labels:
    return lambda root, split, names: write(root / file.format(split), json.dumps(content(names)))


def together(*builds: Callable[[Path], None]) -> Callable[[Path], None]:
    def build(root: Path) -> None:
        for part in builds:
            part(root)

    return build


# -- parts that stand beside others --------------------------------------------------------------


def voc_with_a_small_folder_beside(root: Path) -> None:
    """Upper-case folders, and a small folder whose name is like a split's."""
    write_voc(root / "ANNOTATIONS", stems(6))
    write_images(root / "IMAGES", stems(6))
    write_voc(root / "Validation_Images", stems(2, "extra"))
    write_images(root / "Validation_Images", stems(2, "extra"))


def vocdevkit(root: Path) -> None:
    for year, counts in (("VOC2007", (2, 1)), ("VOC2012", (3, 2))):
        base = root / "VOCdevkit" / year
        for split, count in zip(("train", "val"), counts, strict=True):
            names = stems(count, f"{year}_{split}")
            write_voc(base / "Annotations", names)
            write_images(base / "JPEGImages", names)
            write(base / "ImageSets" / "Main" / f"{split}.txt", "".join(f"{n}\n" for n in names))


def pets(root: Path) -> None:
    layout(voc("annotations/xmls"), "images", {"": 3})(root)
    write(root / "annotations" / "list.txt", "#Image CLASS-ID\nimg_0 1\nimg_1 1\n")
    write_images(root / "annotations" / "trimaps", stems(3), ".png")


def cvat_voc(root: Path) -> None:
    names = ["cam1/a", "cam1/b", "cam2/a"]
    write_voc(root / "Annotations", names)
    write_images(root / "JPEGImages", names)
    lines = "".join(f"{name}\n" for name in names)
    write(root / "ImageSets" / "Main" / "default.txt", lines)
    write(root / "labelmap.txt", "# label:color_rgb:parts:actions\ncat:::\ndog:::\n")


def coco_per_image(root: Path) -> None:
    for number, stem in enumerate(stems(3), start=1):
        write_coco(root / "labels" / f"{stem}.json", [f"{stem}.jpg"], number)
    write_images(root / "images", stems(3))


def yolo_lists(root: Path, line: str = "./images/{}.jpg", val: str = "./images/{}.jpg") -> None:
    """Lists of images over one folder."""
    layout(yolo("labels"), "images", {"": 6}, more={"classes.txt": "cat\ndog\n"})(root)
    write(root / "train.txt", "".join(f"{line.format(stem)}\n" for stem in stems(6)[:4]))
    write(root / "val.txt", "".join(f"{val.format(stem)}\n" for stem in stems(6)[4:]))


def yolo_yaml(train: str, val: str, extra: str = "") -> dict[str, str]:
    return {"data.yaml": f"train: {train}\nval: {val}\n{extra}nc: 2\nnames: ['cat', 'dog']\n"}


def yolo_lists_of_another_machine(root: Path) -> None:
    folder = "/content/drive/project"
    yolo_lists(root, folder + "/images/{}.jpg", ".\\images\\{}.jpg")
    (root / "classes.txt").unlink()
    for name, text in yolo_yaml(f"{folder}/train.txt", f"{folder}/val.txt").items():
        write(root / name, text)


def vott(root: Path) -> None:
    """VoTT's export beside a file of old detection results."""
    folder = root / "vott-csv-export"
    write_images(folder, stems(3))
    rows = [(f"{stem}.jpg", *box, cls) for stem in stems(3) for cls, box in OBJECTS]
    header = ("image", "xmin", "ymin", "xmax", "ymax", "label")
    write_rows(folder / "project-export.csv", header, rows)
    results = [("old_0.jpg", 1, 1, 5, 5, 0, 0.9, WIDTH, HEIGHT)]
    header += ("confidence", "x_size", "y_size")
    write_rows(root / "Detection_Results.csv", header, results)


# -- texts of other tools ------------------------------------------------------------------------


def labelme_text(stem: str) -> str:
    shapes = [
        {"label": name, "points": [box[:2], box[2:]], "shape_type": "rectangle"}
        for name, box in OBJECTS
    ]
    content = {"version": "5.2.1", "shapes": shapes, "imagePath": f"..\\images\\{stem}.jpg"}
    return json.dumps(content | {"imageData": None, "imageHeight": HEIGHT, "imageWidth": WIDTH})


def via_regions() -> list[dict[str, Any]]:
    (cat, (x1, y1, x2, y2)), (dog, (a, b, c, d)) = OBJECTS
    rectangle = {"name": "rect", "x": x1, "y": y1, "width": x2 - x1, "height": y2 - y1}
    polygon = {"name": "polygon", "all_points_x": [a, c, c], "all_points_y": [b, b, d]}
    return [
        {"shape_attributes": rectangle, "region_attributes": {"type": cat}},
        {"shape_attributes": polygon, "region_attributes": {"type": dog}},
    ]


def via_content(names: list[str]) -> dict[str, Any]:
    return {
        f"{stem}.jpg1234": {"filename": f"{stem}.jpg", "size": 1234, "regions": via_regions()}
        for stem in names
    }


def via_csv(root: Path, split: str, names: list[str]) -> None:
    rows = [
        (f"{stem}.jpg", *(json.dumps(region[key]) for key in region))
        for stem in names
        for region in via_regions()
    ]
    header = ("filename", "region_shape_attributes", "region_attributes")
    write_rows(root / "via.csv", header, rows)


def createml_content(names: list[str]) -> list[dict[str, Any]]:
    sides = ("x", "y", "width", "height")
    annotations = [
        {
            "label": name,
            "coordinates": dict(
                zip(sides, ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), strict=True)
            ),
        }
        for name, (x1, y1, x2, y2) in OBJECTS
    ]
    return [{"image": f"{stem}.jpg", "annotations": annotations} for stem in names]


def kitti_text(_: str) -> str:
    return "".join(
        f"{name} 0.00 0 -1.57 {x1} {y1} {x2} {y2} 1 1 1 1 1 1 0\n"
        for name, (x1, y1, x2, y2) in OBJECTS
    )


def visdrone_text(_: str) -> str:
    """Category 4 is car, 1 pedestrian."""
    (_, (x1, y1, x2, y2)), (_, (a, b, c, d)) = OBJECTS
    return f"{x1},{y1},{x2 - x1},{y2 - y1},1,4,0,0\n{a},{b},{c - a},{d - b},1,1,0,0,\n"


def dota_text(_: str) -> str:
    rows = "".join(
        f"{x1} {y1} {x2} {y1} {x2} {y2} {x1} {y2} {name} 0\n" for name, (x1, y1, x2, y2) in OBJECTS
    )
    return f"imagesource:GoogleEarth\ngsd:0.1\n{rows}"


# fmt: off
LAYOUTS: dict[str, Layout] = {
    "voc-annotations-images": Layout(
        "`annotations/*.xml`, `images/`",
        layout(voc("annotations"), "images", {"": 3}),
        "voc", {"": 3}, {"annotations": 3, "annotations/img_1.xml": 1}),
    "voc-annots-images": Layout(
        "`annots/*.xml`, `images/`",
        layout(voc("annots"), "images", {"": 3}),
        "voc", {"": 3}, {"annots": 3}),
    "voc-dataset-split-annots": Layout(
        "`dataset/train/annots/*.xml`, `dataset/train/images/`",
        layout(voc("dataset/{}/annots"), "dataset/{}/images"),
        "voc", {"train": 3, "val": 2}, {"dataset": 5, "dataset/train": 3, "dataset/val/annots": 2}),
    "voc-and-csv": Layout(
        "`images/train/*.xml` and `.jpg` with `images/train_labels.csv`",
        together(layout(voc("images/{}"), "images/{}", {"train": 3, "test": 2}),
            layout(table("images/{}_labels.csv"), "images/{}", {"train": 3, "test": 2})),
        "voc", {"train": 3, "test": 2}, {"images/train": 3, "images/train_labels.csv": 3},
            ("train_labels.csv",)),
    "voc-capitals": Layout(
        "`ANNOTATIONS/*.xml`, `IMAGES/`, beside a smaller labelled folder",
        voc_with_a_small_folder_beside,
        "voc", {"train": 6, "val": 2}, {"ANNOTATIONS": 6, "Validation_Images": 2}),
    "voc-devkit": Layout(
        "`VOCdevkit/VOC2007` and `VOC2012` together",
        vocdevkit,
        "voc", {"train": 5, "val": 3}, {"VOCdevkit": 8, "VOCdevkit/VOC2007": 3,
            "VOCdevkit/VOC2012/Annotations": 5}),
    "voc-xmls": Layout(
        "`annotations/xmls/*.xml`, `images/`",
        pets,
        "voc", {"": 3}, {"annotations": 3, "annotations/xmls": 3}),
    "voc-split-annotations": Layout(
        "`train/annotations/*.xml`, `train/images/`",
        layout(voc("{}/annotations"), "{}/images"),
        "voc", {"train": 3, "val": 2}, {"train": 3}),
    "voc-cvat": Layout(
        "CVAT's VOC: folders in `Annotations/` and `JPEGImages/`, `ImageSets/Main/default.txt`",
        cvat_voc,
        "voc", {"": 3}),
    "coco": Layout(
        "`annotations/instances_train2017.json`, `train2017/`",
        layout(coco("annotations/instances_{}2017.json"), "{}2017"),
        "coco", {"train": 3, "val": 2}, {"annotations": 5,
            "annotations/instances_val2017.json": 2}),
    "coco-per-image": Layout(
        "one COCO JSON per image: `labels/*.json`, `images/`",
        coco_per_image,
        "coco", {"": 3}, {"labels": 3}),
    "coco-parts": Layout(
        "several COCO JSON files of one split",
        together(layout(coco("annotations/train_{}.json"), "images", {"a": 2, "b": 2}),
            layout(coco("annotations/{}.json"), "images", {"val": 1})),
        "coco", {"train": 4, "val": 1}, {"annotations/val.json": 1}),
    "roboflow-coco": Layout(
        "Roboflow COCO: `train/_annotations.coco.json` beside the images",
        layout(coco("{}/_annotations.coco.json"), "{}", ROBOFLOW | {"test": 1},
            more={"README.roboflow.txt": "exported\n"}),
        "coco", {"train": 3, "val": 2, "test": 1}, {"valid": 2}),
    "yolo": Layout(
        "`data.yaml`, `images/train/`, `labels/train/*.txt`",
        layout(yolo("labels/{}"), "images/{}", more=yolo_yaml("images/train", "images/val")),
        "yolo", {"train": 3, "val": 2}, {"data.yaml": 5}),
    "roboflow-yolo": Layout(
        "Roboflow YOLO: `train/images/`, `train/labels/`, `test` missing",
        layout(yolo("{}/labels"), "{}/images", ROBOFLOW, more=yolo_yaml("../train/images",
            "../valid/images", "test: ../test/images\n")),
        "yolo", {"train": 3, "val": 2}, {"data.yaml": 5}),
    "yolo-capitals": Layout(
        "`Train/Images/`, `Train/Labels/*.txt`, `classes.txt`",
        layout(yolo("{}/Labels"), "{}/Images", {"Train": 3, "Val": 2},
            more={"classes.txt": "cat\ndog\n"}),
        "yolo", {"train": 3, "val": 2}),
    "yolo-lists": Layout(
        "`train.txt` and `val.txt` over one `images/`",
        yolo_lists,
        "yolo", {"train": 4, "val": 2}),
    "yolo-moved": Layout(
        "lists and `data.yaml` with paths of another machine",
        yolo_lists_of_another_machine,
        "yolo", {"train": 4, "val": 2}),
    "darknet": Layout(
        "Darknet: `obj.data`, `obj.names`, `train.txt`",
        layout(yolo("obj_train_data"), "obj_train_data", {"": 3}, more={"obj.names": "cat\ndog\n",
            "obj.data": "classes = 2\ntrain = data/train.txt\nnames = data/obj.names\n",
            "train.txt": "".join(f"data/obj_train_data/{stem}.jpg\n" for stem in stems(3))}),
        "yolo", {"train": 3}),
    "roboflow-darknet": Layout(
        "Roboflow Darknet: `train/*.txt` beside the images, `_darknet.labels`",
        layout(yolo("{}"), "{}", ROBOFLOW,
            more={f"{split}/_darknet.labels": "cat\ndog\n" for split in ROBOFLOW}),
        "yolo", {"train": 3, "val": 2}),
    "tensorflow-csv": Layout(
        "TensorFlow Object Detection CSV: `train/_annotations.csv`",
        layout(table("{}/_annotations.csv"), "{}", ROBOFLOW),
        "csv", {"train": 3, "val": 2}),
    "vott": Layout(
        "VoTT CSV, beside a file of detection results",
        vott,
        "csv", {"": 3}, left_out=("Detection_Results.csv",)),
    "labelme": Layout(
        "LabelMe: a `.json` per image",
        layout(each("json", labelme_text, ".json"), "images", {"": 3}),
        "labelme", {"": 3}, {"json": 3}),
    "via-json": Layout(
        "VGG Image Annotator: `train/via_region_data.json` beside the images",
        layout(json_file("{}/via_region_data.json", via_content), "{}"),
        "via", {"train": 3, "val": 2}, {"val": 2}),
    "via-csv": Layout(
        "VGG Image Annotator: `.csv`",
        layout(via_csv, "", {"": 3}),
        "via", {"": 3}, {"via.csv": 3}),
    "createml": Layout(
        "Create ML: `train/_annotations.createml.json`",
        layout(json_file("{}/_annotations.createml.json", createml_content), "{}", ROBOFLOW),
        "createml", {"train": 3, "val": 2}),
    "kitti": Layout(
        "KITTI: `training/label_2/*.txt`, `training/image_2/`",
        layout(each("training/label_2", kitti_text, ".txt"), "training/image_2", {"": 3},
            suffix=".png"),
        "kitti", {"train": 3}),
    "visdrone": Layout(
        "VisDrone: `VisDrone2019-DET-train/annotations/*.txt`",
        layout(each("VisDrone2019-DET-{}/annotations", visdrone_text, ".txt"),
            "VisDrone2019-DET-{}/images"),
        "visdrone", {"train": 3, "val": 2}, classes=("car", "pedestrian")),
    "dota": Layout(
        "DOTA: `train/labelTxt/*.txt` (the box around each quadrilateral)",
        layout(each("{}/labelTxt", dota_text, ".txt"), "{}/images", suffix=".png"),
        "dota", {"train": 3, "val": 2}),
}
# fmt: on
