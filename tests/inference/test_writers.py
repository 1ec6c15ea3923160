"""Files of what was found: read back by their usual readers, and whole or absent."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from retinanet import __version__
from retinanet.data import read_dataset
from retinanet.errors import ConfigError, DataError
from retinanet.inference import Detector, Failure, ImageDetections
from retinanet.inference.writers import OUTPUT_FORMATS, open_outputs, write_coco, write_json
from white_finder import Pixels

FAILURE = Failure("b/broken.jpg", "b/broken.jpg: cut short", ValueError())


def found(
    name: str = "a.png", image: Any = None, boxes: Any = ((1, 2, 11, 22),)
) -> ImageDetections:
    """Objects of falling score in an image of 40 x 20."""
    count = len(boxes)
    return ImageDetections(
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        scores=torch.linspace(0.75, 0.25, count) if count > 1 else torch.full((count,), 0.75),
        labels=torch.arange(count) % 2,
        classes=("cat", "dog, or wölf"),
        category_ids=(17, 90),
        name=name,
        size=(40, 20),
        image=name if image is None else image,
    )


def write(
    folder: Path, formats: list[str], *results: ImageDetections | Failure, **options: Any
) -> None:
    with open_outputs(folder, formats, **options) as write_one:
        for result in results:
            write_one(result)


def files(folder: Path) -> list[str]:
    """All files but the manifest."""
    names = (f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file())
    return sorted(name for name in names if not name.endswith(".retinanet-outputs"))


TWO = ((1, 2, 11, 22), (0, 0, 20, 40))


def test_json(tmp_path: Path) -> None:
    write(tmp_path, ["json"], found("x/a.png", boxes=TWO), FAILURE, found("b.png", boxes=()))
    text = (tmp_path / "detections.json").read_text("utf-8")
    assert json.loads(text) == {
        "images": [
            {
                "file": "x/a.png",
                "height": 40,
                "width": 20,
                "detections": [
                    {"class": "cat", "category_id": 17, "score": 0.75, "box": [1, 2, 11, 22]},
                    {
                        "class": "dog, or wölf",
                        "category_id": 90,
                        "score": 0.25,
                        "box": [0, 0, 20, 40],
                    },
                ],
            },
            {"file": "b.png", "height": 40, "width": 20, "detections": []},
        ],
        "failures": [{"file": "b/broken.jpg", "reason": "b/broken.jpg: cut short"}],
    }
    assert "wölf" in text  # for people
    assert max(len(line) for line in text.splitlines()) < 120
    write(tmp_path, ["json"])
    assert json.loads((tmp_path / "detections.json").read_text()) == {"images": [], "failures": []}


def test_coco_results(tmp_path: Path) -> None:
    results = [found("000000000139.png", boxes=TWO), FAILURE, found("x/cat.2.png"), found(boxes=())]
    write(tmp_path, ["coco"], *results)
    assert json.loads((tmp_path / "coco_results.json").read_text()) == [
        {"image_id": 139, "category_id": 17, "bbox": [1, 2, 10, 20], "score": 0.75},
        {"image_id": 139, "category_id": 90, "bbox": [0, 0, 20, 40], "score": 0.25},
        {"image_id": "x/cat.2", "category_id": 17, "bbox": [1, 2, 10, 20], "score": 0.75},
    ]
    write(tmp_path, ["coco"], found(boxes=()))
    assert json.loads((tmp_path / "coco_results.json").read_text()) == []


def test_coco_results_of_equal_stems_have_different_ids(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    names = ("139.jpg", "0139.png", "a.jpg", "a.png", "a.png")
    with write_coco(file) as write:
        for name in names:
            write(found(name))
    ids = list(dict.fromkeys(row["image_id"] for row in json.loads(file.read_text())))
    assert ids == [139, "0139.png", "a", "a.png", "a.png-2"]


def test_csv(tmp_path: Path) -> None:
    write(tmp_path, ["csv"], found("x/a.png", boxes=TWO), FAILURE, found(boxes=()))
    with (tmp_path / "detections.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["cat", "dog, or wölf"]
    assert rows[0] == {
        "file": "x/a.png",
        "width": "20",
        "height": "40",
        "class": "cat",
        "score": "0.75",
        "x1": "1.0",
        "y1": "2.0",
        "x2": "11.0",
        "y2": "22.0",
    }


def test_yolo(tmp_path: Path) -> None:
    write(tmp_path, ["yolo"], found("x/a.png", boxes=TWO), FAILURE, found("b.png", boxes=()))
    assert files(tmp_path) == ["classes.txt", "labels/b.txt", "labels/x/a.txt"]
    # Centre (6, 12) of 20 x 40; sides 10 x 20.
    assert (tmp_path / "labels/x/a.txt").read_text() == (
        "0 0.300000 0.300000 0.500000 0.500000 0.750000\n"
        "1 0.500000 0.500000 1.000000 1.000000 0.250000\n"
    )
    assert (tmp_path / "labels/b.txt").read_text() == ""
    assert (tmp_path / "classes.txt").read_text("utf-8") == "cat\ndog, or wölf\n"


def test_images(tmp_path: Path) -> None:
    pixels = np.zeros((40, 20, 3), np.uint8)
    results = [
        found(name, pixels, boxes=((2, 4, 18, 36),)) for name in ("x/a.png", "a.gif", "image_0")
    ]
    write(tmp_path, ["images"], *results, found("b.tif", pixels), FAILURE)
    assert files(tmp_path / "images") == ["a.jpg", "b.tif", "image_0.jpg", "x/a.png"]
    with Image.open(tmp_path / "images" / "b.tif") as tiff:
        assert tiff.info["compression"] == "tiff_adobe_deflate"
    drawn = np.asarray(Image.open(tmp_path / "images/x/a.png"))
    assert drawn.shape == (480, 240, 3)  # enlarged, so that captions can be read
    assert drawn.any()
    write(tmp_path, ["images"], results[0], drawn_score=0.8)
    assert not np.asarray(Image.open(tmp_path / "images/x/a.png")).any()


def test_output_names_are_unique(tmp_path: Path) -> None:
    pixels = np.zeros((40, 20, 3), np.uint8)
    names = ["1.jpg", "1.png", "x/1.jpg", "1.JPG", "1.jpg", "../1.jpg", "/1.jpg", "a.jpg", "A.jpg"]
    write(tmp_path / "out", ["yolo", "images"], *[found(name, pixels) for name in names])
    labels, images = files(tmp_path / "out/labels"), files(tmp_path / "out/images")
    assert len(labels) == len(images) == len(names)
    assert {"1.txt", "1.png.txt", "x/1.txt", "1.JPG.txt", "a.txt", "A.jpg.txt"} < set(labels)
    assert {"1.jpg", "1.png", "x/1.jpg"} < set(images)
    assert len({name.casefold() for name in labels}) == len(names)
    assert files(tmp_path) == sorted(
        ["out/classes.txt", *(f"out/labels/{n}" for n in labels)]
        + [f"out/images/{n}" for n in images]
    )


def test_files_are_complete_or_unchanged(tmp_path: Path) -> None:
    formats = ["json", "coco", "csv", "labelstudio", "cvat"]
    write(tmp_path, formats, found())
    before = {name: (tmp_path / name).read_text() for name in files(tmp_path)}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(tmp_path, formats, found("other.png"), found(boxes=[[math.nan] * 4]))
    assert {name: (tmp_path / name).read_text() for name in files(tmp_path)} == before
    with write_json(tmp_path / "new.json") as write_one:
        write_one(found())
        assert not (tmp_path / "new.json").exists()


def test_unknown_format_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"output format 'jsn' is not one of .*did you mean json"),
        open_outputs(tmp_path / "out", ["coco", "jsn"]),
    ):
        pass
    assert not (tmp_path / "out").exists()


def test_all_formats_with_an_unreadable_image(
    detector: Detector, folder: Path, tmp_path: Path
) -> None:
    (folder / "broken.png").write_bytes(b"\x89PNG and no more")
    out = tmp_path / "found"
    write(out, list(OUTPUT_FORMATS), *detector.stream(folder, batch_size=2))
    images = ["a.png", "left/a.png", "right/a.png"]
    assert files(out) == sorted(
        ["classes.txt", "coco_results.json", "detections.csv", "detections.json"]
        + ["cvat_annotations.xml", "cvat_labels.json"]
        + ["label_studio_config.xml", "label_studio_tasks.json"]
        + [f"images/{name}" for name in images]
        + [f"labels/{name[:-4]}.txt" for name in images]
    )
    told = json.loads((out / "detections.json").read_text())
    assert [one["file"] for one in told["images"]] == [str(folder / name) for name in images]
    assert [one["file"] for one in told["failures"]] == [str(folder / "broken.png")]
    assert len(json.loads((out / "coco_results.json").read_text())) == 6


def test_draw_on_any_kind_of_image(square: Pixels, folder: Path, detector: Detector) -> None:
    result = detector.detect(folder / "a.png")
    assert isinstance(result, ImageDetections)
    for drawn in (result.draw(), result.draw(square), result.draw(Image.fromarray(square))):
        assert drawn.size == (576, 384)  # enlarged threefold, so that captions can be read
        colours = np.asarray(drawn).astype(int)
        assert (colours.max(axis=2) - colours.min(axis=2) > 50).any()
    colours = np.asarray(result.draw(score_threshold=1.1)).astype(int)
    assert (colours.max(axis=2) == colours.min(axis=2)).all()


def test_draw_on_an_image_of_another_size_is_an_error(square: Pixels, detector: Detector) -> None:
    result = detector.detect(square)
    assert isinstance(result, ImageDetections)
    with pytest.raises(DataError, match=r"image to draw on is 50 x 40, .* 192 x 128 pixels"):
        result.draw(np.zeros((40, 50, 3), np.uint8))


def test_label_studio_tasks(tmp_path: Path) -> None:
    results = [found("x/a b&c.png", boxes=TWO), FAILURE, found("b.png", boxes=())]
    write(tmp_path, ["labelstudio"], *results)
    tasks = json.loads((tmp_path / "label_studio_tasks.json").read_text())
    first, second = tasks
    assert first["data"] == {"image": "/data/local-files/?d=x/a%20b%26c.png"}
    (prediction,) = first["predictions"]
    assert prediction["model_version"] == f"retinanet {__version__}"
    assert prediction["score"] == 0.5
    one, other = prediction["result"]
    # (1, 2, 11, 22) in 20 x 40 pixels.
    assert one == {
        "id": "box0",
        "type": "rectanglelabels",
        "from_name": "label",
        "to_name": "image",
        "original_width": 20,
        "original_height": 40,
        "image_rotation": 0,
        "score": 0.75,
        "value": {
            "x": 5.0,
            "y": 5.0,
            "width": 50.0,
            "height": 50.0,
            "rotation": 0,
            "rectanglelabels": ["cat"],
        },
    }
    assert other["value"]["rectanglelabels"] == ["dog, or wölf"]
    assert second["predictions"][0]["result"] == []
    assert "annotations" not in first  # a person has not seen it

    view = ElementTree.parse(tmp_path / "label_studio_config.xml").getroot()
    image, control = view
    assert (image.get("name"), image.get("value")) == ("image", "$image")
    assert (control.get("name"), control.get("toName")) == ("label", "image")
    assert [one.get("value") for one in control] == ["cat", "dog, or wölf"]

    write(tmp_path, ["labelstudio"], found("b.png"), image_root="https://host.example/x/")
    (task,) = json.loads((tmp_path / "label_studio_tasks.json").read_text())
    assert task["data"] == {"image": "https://host.example/x/b.png"}
    write(tmp_path, ["labelstudio"])
    assert json.loads((tmp_path / "label_studio_tasks.json").read_text()) == []


def test_cvat_annotations(tmp_path: Path) -> None:
    write(tmp_path, ["cvat"], found('x/a<&">\x01.png', boxes=TWO), FAILURE, found("b", boxes=()))
    root = ElementTree.parse(tmp_path / "cvat_annotations.xml").getroot()
    assert (root.tag, root.findtext("version")) == ("annotations", "1.1")
    labels = [one.findtext("name") for one in root.iter("label")]
    assert labels == ["cat", "dog, or wölf"]
    first, second = root.findall("image")
    assert first.attrib == {"id": "0", "name": 'x/a<&">�.png', "width": "20", "height": "40"}
    assert (second.get("id"), len(second)) == ("1", 0)
    boxes = first.findall("box")
    assert boxes[0].attrib == {
        "label": "cat",
        "source": "auto",
        "occluded": "0",
        "xtl": "1.000",
        "ytl": "2.000",
        "xbr": "11.000",
        "ybr": "22.000",
        "z_order": "0",
    }
    assert boxes[1].findtext("attribute[@name='score']") == "0.250000"
    raw = json.loads((tmp_path / "cvat_labels.json").read_text())
    assert [(one["name"], one["type"]) for one in raw] == [(name, "rectangle") for name in labels]
    assert raw[0]["attributes"][0]["name"] == "score"
    write(tmp_path, ["cvat"])
    assert len(ElementTree.parse(tmp_path / "cvat_annotations.xml").getroot()) == 1


@pytest.mark.parametrize("form", ["labelstudio", "cvat"])
def test_pre_annotations_are_read_back_as_labels(tmp_path: Path, form: str) -> None:
    """As after a person has confirmed every box and exported the project."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(50, 2, generator=generator) * torch.tensor([10.0, 20.0])
    boxes = torch.cat([corner, corner + 1 + torch.rand(50, 2, generator=generator) * 9], dim=1)
    results = [found("left/a.png", boxes=boxes.tolist()), found("b.png", boxes=())]
    for one in results:
        (tmp_path / one.name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (20, 40)).save(tmp_path / one.name)
    write(tmp_path, [form], *results)
    if form == "labelstudio":
        file = tmp_path / "label_studio_tasks.json"
        tasks = json.loads(file.read_text())
        for task in tasks:
            task["annotations"] = [{"result": task["predictions"][0]["result"]}]
        file.write_text(json.dumps(tasks))
    dataset = read_dataset(tmp_path, "all")
    assert dataset.format == form
    assert dataset.problems == ()
    assert dataset.classes == results[0].classes
    assert [image.path for image in dataset.images] == [tmp_path / one.name for one in results]
    first, second = dataset.images
    assert (first.width, first.height) == (20, 40)
    assert second.annotations == ()
    again = torch.tensor([a.box for a in first.annotations])
    torch.testing.assert_close(again, boxes, rtol=0, atol=5.1e-4 if form == "cvat" else 2e-6)
    assert [a.label for a in first.annotations] == results[0].labels.tolist()
