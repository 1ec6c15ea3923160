"""Reports: self-contained files, of complete and incomplete run folders."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_plots import evaluated, log_lines

from retinanet.config import load_recipe, to_toml
from retinanet.data import read_splits
from retinanet.errors import DataError
from retinanet.model.checkpoint import Checkpoint, save_checkpoint
from retinanet.model.retinanet import build_retinanet
from retinanet.report.html import Page, write_report


class Parsed(HTMLParser):
    """Words, tags and addresses of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def assert_self_contained(page: str) -> Parsed:
    seen = Parsed(page)
    assert all(address.startswith(("data:image/", "#")) for address in seen.addresses)
    assert not {"script", "link", "iframe"} & set(seen.tags)
    assert "@import" not in page
    assert "url(" not in page
    return seen


def image(width: int = 30) -> Image.Image:
    pixels = np.zeros((20, width, 3), np.uint8)
    pixels[5:15, 5:15] = 255
    return Image.fromarray(pixels)


def make_run(folder: Path, data: Path | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(load_recipe("quick")))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log_lines()))
    info: dict[str, Any] = {
        "versions": {"torch": "2.7"},
        "device": "cpu",
        "steps": 60,
        "seed": 12345,
    }
    if data is not None:
        info["data"] = str(data)
    (folder / "run.json").write_text(json.dumps(info))
    return folder


def make_data(folder: Path) -> Path:
    folder.mkdir()
    for split in ("train", "val"):
        images, annotations = [], []
        for i in range(8):
            name = f"{split}{i}.png"
            image(64).save(folder / name)
            images.append({"id": i, "file_name": name, "width": 64, "height": 20})
            if i:
                annotations.append(
                    {"id": i, "image_id": i, "category_id": 1 + i % 2, "bbox": [5, 5, 10, 10]}
                )
        (folder / f"{split}.json").write_text(
            json.dumps(
                {
                    "images": images,
                    "annotations": annotations,
                    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
                }
            )
        )
    return folder


def test_page_text_is_escaped_and_numbers_formatted(tmp_path: Path) -> None:
    page = Page("Two <losses>", "focal & plain")
    page.section("Result").text("1 < 2 & 3").heading("smaller")
    page.facts({"AP": 0.51234, "steps": 12345, "loss": None, "done": True})
    page.table(
        ["loss", "AP", "steps"],
        [["focal", 0.5, 90000], ["<plain>", float("nan"), 10]],
        caption="by loss",
        strong=[0],
    )
    page.section("Settings").code("a = '<b>'", folded="config.toml")
    page.link("Run", "#run", "its <folder>")
    file = page.write(tmp_path / "deep" / "page.html")
    seen = assert_self_contained(file.read_text("utf-8"))
    for words in (
        *("Two <losses>", "focal & plain", "1 < 2 & 3", "smaller", "0.512", "12,345", "yes"),
        *("by loss", "0.500", "90,000", "<plain>", "–", "a = '<b>'", "config.toml"),
        "Run: its <folder>",
    ):
        assert words in seen.text
    assert seen.addresses == ["#s0", "#s1", "#run"]
    assert seen.tags.count("section") == 2
    assert seen.tags.count("details") == 1


def test_page_images_are_embedded(tmp_path: Path) -> None:
    png, bmp = tmp_path / "a.png", tmp_path / "a.bmp"
    image().save(png)
    image().save(bmp)
    jpeg = io.BytesIO()
    image().save(jpeg, "JPEG")
    items = [(png, "a & b"), (bmp, ""), (jpeg.getvalue(), ""), (image(), ""), (str(png), "")]
    page = Page("Images").section("All").images(items, columns=2)
    seen = assert_self_contained(page.html())
    kinds = [re.match(r"data:image/(\w+);base64,(.*)", a) for a in seen.addresses]
    assert [kind.group(1) for kind in kinds if kind] == ["png", "jpeg", "jpeg", "jpeg", "png"]
    first = base64.b64decode(kinds[0].group(2))  # type: ignore[union-attr]
    assert first == png.read_bytes()
    assert "a & b" in seen.text


def test_page_unreadable_image_is_an_error(tmp_path: Path) -> None:
    page = Page("Images").section("All")
    with pytest.raises(DataError, match="an image of the report cannot be read"):
        page.images([(tmp_path / "none.png", "")])
    with pytest.raises(DataError, match="cannot be read"):
        page.images([(b"not an image", "")])


def test_page_content_before_a_section_is_an_error() -> None:
    with pytest.raises(ValueError, match="call section"):
        Page("Empty").text("lost")


def test_write_report_complete_run(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    run = make_run(tmp_path / "run", data)
    _, metrics = evaluated(("cat", "dog"))
    for file in (run / "metrics.json", run / "evaluation" / "test" / "metrics.json"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(metrics.to_dict()))
    model = build_retinanet(
        backbone="resnet18",
        num_classes=2,
        backbone_weights="none",
        norm="group",
        channels=16,
        head_depth=1,
    )
    save_checkpoint(run / "best", Checkpoint(model, ("cat", "dog"), (1, 2), 64, 96))
    file = write_report(run, samples=3, device="cpu")
    assert file == run / "report.html"
    seen = assert_self_contained(file.read_text("utf-8"))
    for words in (
        *("Run run", "recipe quick", "Summary", "Training", "Validation", "Evaluation: test"),
        *("Detections", "Data", "Settings", "after step 60, the best of the run"),
        *("best validation AP, at step 60", "0.300", "[train]", "12345", "images without object"),
        *("3 validations", "val2.png: 1 object", "val6.png: 1 object", "detection"),
    ):
        assert words in seen.text
    # 2 of training, 6 of each evaluation, 3 pairs, 1 of the data.
    assert seen.tags.count("img") == 2 + 6 + 6 + 6 + 1
    plots = sorted(str(path.relative_to(run)) for path in run.rglob("*.png"))
    assert "plots/training.png" in plots
    assert "plots/validation/confusion.png" in plots
    assert "evaluation/test/plots/confusion.png" in plots


def test_write_report_incomplete_run_notes_what_is_missing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tmp_path / "gone")
    text = assert_self_contained(write_report(run).read_text("utf-8")).text
    assert "The data can no longer be read" in text
    assert "Validation" not in text.replace("validation", "")

    (run / "run.json").unlink()
    (run / "log.jsonl").unlink()
    text = assert_self_contained(write_report(run).read_text("utf-8")).text
    assert "No training step was logged yet" in text
    assert "does not name the data folder" in text


def test_write_report_without_model_or_with_splits(tmp_path: Path) -> None:
    splits = read_splits(make_data(tmp_path / "data"))
    run = make_run(tmp_path / "run")
    text = assert_self_contained(write_report(run, data=splits).read_text("utf-8")).text
    assert "There is no model to detect objects with" in text
    assert "images without object" in text
    text = assert_self_contained(write_report(run, data=splits, samples=0).read_text("utf-8")).text
    assert "There is no image to show" in text


def test_write_report_bad_run_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not a run folder: .* has no config\.toml"):
        write_report(tmp_path)
    run = make_run(tmp_path / "run")
    for content in ("{}", "[]", '{"ap": 1}'):
        (run / "metrics.json").write_text(content)
        with pytest.raises(DataError, match=r"metrics\.json has no evaluation metrics"):
            write_report(run)
    (run / "metrics.json").write_text("{")
    with pytest.raises(DataError, match=r"metrics\.json is not JSON"):
        write_report(run)
