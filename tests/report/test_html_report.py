"""Reports: self-contained files, of complete and incomplete run folders."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from results import evaluated, log_lines

from retinanet.config import load_recipe, to_toml
from retinanet.data import read_splits
from retinanet.data.synthetic import synthetic_dataset
from retinanet.errors import DataError
from retinanet.evaluation.coco import evaluate_detections
from retinanet.model.checkpoint import Checkpoint, save_checkpoint
from retinanet.report.html import Page, add_metrics, write_report
from tiny_backbone import tiny_network


class Parsed(HTMLParser):
    """Words, tags and addresses of a page, which refers to nothing outside of it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(page)
        self.text = " ".join(" ".join(self.words).split())
        assert all(a.startswith(("data:image/", "#", "a%20b")) for a in self.addresses)
        assert not {"script", "link", "iframe"} & set(self.tags)
        assert "@import" not in page
        assert "url(" not in page

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def report_text(run: Path, **options: Any) -> str:
    return Parsed(write_report(run, **options).read_text("utf-8")).text


def make_run(folder: Path, data: Path | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(load_recipe("quick")))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log_lines()))
    info = {"versions": {"torch": "2.7"}, "device": "cpu", "steps": 60, "seed": 12345}
    more = {} if data is None else {"data": str(data)}
    (folder / "run.json").write_text(json.dumps(info | more))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    synthetic_dataset(folder, splits={"train": 4, "val": 8}, image_size=64, empty=0.0)
    return folder


def test_page_text_is_escaped_and_numbers_formatted(tmp_path: Path) -> None:
    page = Page("Two <losses>", "focal & plain")
    page.section("Result").text("1 < 2 & 3").heading("smaller")
    page.facts({"AP": 0.51234, "steps": 12345, "loss": None, "done": True})
    rows = [["focal", 0.5, 90000], ["<plain>", float("nan"), 10]]
    page.table(["loss", "AP", "steps"], rows, strong=[0])
    page.section("Settings").code("a = '<b>'", folded="config.toml")
    page.links({"Run": {"its <folder>": "a b"}}, folded="Runs")
    file = page.write(tmp_path / "deep" / "page.html")
    seen = Parsed(file.read_text("utf-8"))
    for words in (
        *("Two <losses>", "focal & plain", "1 < 2 & 3", "smaller", "0.512", "12,345", "yes"),
        *("0.500", "90,000", "<plain>", "–", "a = '<b>'", "config.toml"),
        "Run: its <folder>",
    ):
        assert words in seen.text
    assert seen.addresses == ["#s0", "#s1", "a%20b"]
    assert (seen.tags.count("section"), seen.tags.count("details")) == (2, 2)
    with pytest.raises(ValueError, match="call section"):
        Page("Empty").text("lost")


def test_page_images_are_embedded(tmp_path: Path) -> None:
    image = Image.new("RGB", (30, 20), (200, 30, 30))
    png, bmp = tmp_path / "a.png", tmp_path / "a.bmp"
    image.save(png)
    image.save(bmp)
    items = [(png, "a & b"), (bmp, ""), (image, "")]
    page = Page("Images").section("All").images(items, columns=2)
    seen = Parsed(page.html())
    parts = [re.match(r"data:image/(\w+);base64,(.*)", a) for a in seen.addresses]
    kinds, contents = zip(*(part.groups() for part in parts if part), strict=True)
    assert kinds == ("png", "jpeg", "jpeg")
    assert base64.b64decode(contents[0]) == png.read_bytes()
    assert "a & b" in seen.text
    (tmp_path / "bad.png").write_bytes(b"not an image")
    for bad in (tmp_path / "none.png", tmp_path / "bad.png"):
        with pytest.raises(DataError, match="an image of the report cannot be read"):
            page.images([(bad, "")])


def test_write_report_complete_run(data: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", data)
    _, metrics = evaluated(("cat", "dog"))
    for file in (run / "metrics.json", run / "evaluation" / "test" / "metrics.json"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(metrics.to_dict()))
    classes = read_splits(data)["val"].classes
    model = tiny_network(len(classes))
    ids = tuple(range(len(classes)))
    save_checkpoint(run / "best", Checkpoint(model, classes, ids, 64, 96))
    file = write_report(run, samples=3, device="cpu")
    assert file == run / "report.html"
    seen = Parsed(file.read_text("utf-8"))
    for words in (
        *("Run run", "recipe quick", "Summary", "Training", "Validation", "Evaluation: test"),
        *("Detections", "Data", "Settings", "after step 60, the best of the run"),
        *("best validation AP, at step 60", "0.300", "[train]", "12345", "images without object"),
        *("3 validations", "000001.png: ", "000006.png: ", " detections"),
    ):
        assert words in seen.text
    # 2 of training, 5 of each evaluation, 3 pairs, 1 of the data.
    assert seen.tags.count("img") == 2 + 5 + 5 + 6 + 1
    plots = {str(path.relative_to(run)) for path in run.rglob("*.png")}
    assert {"plots/training.png", "plots/validation/confusion.png"} < plots
    assert "evaluation/test/plots/confusion.png" in plots


def test_write_report_incomplete_run_notes_what_is_missing(data: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", tmp_path / "gone")
    text = report_text(run)
    assert "The data can no longer be read" in text
    assert "Validation" not in text.replace("validation", "")
    splits = read_splits(data)
    text = report_text(run, data=splits)
    assert "There is no model to detect objects with" in text
    assert "images without object" in text
    assert "There is no image to show" in report_text(run, data=splits, samples=0)
    (run / "run.json").unlink()
    (run / "log.jsonl").unlink()
    text = report_text(run)
    assert "No training step was logged yet" in text
    assert "does not name the data folder" in text


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


def test_metrics_without_detections_have_no_nan(tmp_path: Path) -> None:
    dataset, _ = evaluated(("cat",))
    page = Page("Nothing").section("Validation")
    add_metrics(page, evaluate_detections(dataset, []), tmp_path)
    assert "nan" not in Parsed(page.html()).text
