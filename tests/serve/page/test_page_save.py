"""What the page gives to keep is what the server said, in the layouts of the command line."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from colour_finder import colour_finder
from page_driver import BLUE, DIM_RED, GREEN, RED, PageDriver
from PIL import Image

from retinanet.inference.writers import write_coco, write_json

Draw = Callable[..., Path]
Ask = Callable[..., Any]


def everything(driver: PageDriver) -> None:
    driver.page.uncheck("#save-visible")


def test_json_contains_the_response(driver: PageDriver, draw: Draw, ask: Ask) -> None:
    file = draw("one.png", (16, 8, RED), (64, 40, GREEN), (80, 40, DIM_RED))
    driver.upload(file)
    said = ask(file)["images"][0]
    assert driver.text("#save-visible-text") == "visible only: 2 of 3 objects"
    name, content = driver.save("#save-json")
    assert name == "detections.json"
    shown = [one for one in said["detections"] if one["score"] >= 0.3]
    assert json.loads(content) == {
        "images": [{**said, "file": "one.png", "detections": shown}],
        "failures": [],
    }
    everything(driver)
    _, content = driver.save("#save-json")
    assert json.loads(content)["images"] == [{**said, "file": "one.png"}]


def test_json_of_all_equals_the_command_lines(
    driver: PageDriver, draw: Draw, tmp_path: Path
) -> None:
    files = [draw(f"shots/{n}.png", *[(8 * k, 8, BLUE) for k in range(n)]) for n in range(3)]
    broken = tmp_path / "shots" / "3.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    driver.failures_expected = True
    driver.page.set_input_files("#folder", str(tmp_path / "shots"))
    driver.wait()
    driver.page.select_option("#save-which", "all")
    everything(driver)
    _, content = driver.save("#save-json")
    expected = tmp_path / "detections.json"
    with write_json(expected) as write:
        for found in colour_finder().stream(files):
            write(found)
    reference = json.loads(expected.read_text())
    for one in reference["images"]:
        one["file"] = Path(one["file"]).relative_to(tmp_path).as_posix()
    saved = json.loads(content)
    assert saved["images"] == reference["images"]
    assert [one["file"] for one in saved["failures"]] == ["shots/3.png"]
    assert "The image cannot be read" in saved["failures"][0]["reason"]


def test_coco_equals_the_command_lines(driver: PageDriver, draw: Draw, tmp_path: Path) -> None:
    names = ["000139.png", "street.png", "street.webp", "a.b.png", "0.png"]
    files = [draw(name, (16, 8, RED), (72, 24, GREEN), (80, 40, DIM_RED)) for name in names]
    driver.upload(*files)
    driver.page.select_option("#save-which", "all")
    everything(driver)
    name, content = driver.save("#save-coco")
    assert name == "coco_results.json"
    expected = tmp_path / "coco_results.json"
    with write_coco(expected) as write:
        order = driver.page.eval_on_selector_all(".thumb", "(all) => all.map((one) => one.title)")
        for found in colour_finder().stream([tmp_path / one for one in order]):
            write(found)
    assert json.loads(content) == json.loads(expected.read_text())
    ids = list(dict.fromkeys(one["image_id"] for one in json.loads(content)))
    assert ids == [0, 139, "a.b", "street", "street.webp"]
    first = json.loads(content)[0]
    assert first == {
        "image_id": 0,
        "category_id": 3,
        "bbox": [16, 8, 8, 8],
        "score": pytest.approx(0.994780, abs=1e-6),
    }


def test_png_is_drawn_at_full_size(driver: PageDriver, draw: Draw) -> None:
    file = draw("large.png", (16, 8, RED), (64, 40, GREEN), (80, 40, DIM_RED))
    with Image.open(file) as small:
        small.resize((960, 640), Image.Resampling.NEAREST).save(file)
    driver.upload(file)
    driver.page.get_by_role("checkbox", name="green 1").uncheck()
    name, content = driver.save("#save-png")
    assert name == "large-detections.png"
    drawn = Image.open(io.BytesIO(content)).convert("RGB")
    assert drawn.size == (960, 640)  # as it came, whatever the window's size
    assert drawn.getpixel((200, 120)) == (255, 0, 0)
    # Vermilion is the first class's, at the edge of its box, and of no other box.
    assert drawn.getpixel((160, 120)) == (213, 94, 0)
    assert drawn.getpixel((640, 440)) == (0, 255, 0)
    assert drawn.getpixel((800, 440)) == (110, 0, 0)


def test_png_of_all_is_a_zip(driver: PageDriver, draw: Draw, tmp_path: Path) -> None:
    draw("shots/a.png", (16, 8, RED))
    draw("shots/a.webp", (16, 8, RED))
    draw("shots/b.tiff", (16, 8, RED))
    driver.page.set_input_files("#folder", str(tmp_path / "shots"))
    driver.wait()
    driver.page.select_option("#save-which", "all")
    name, content = driver.save("#save-png")
    assert name == "images.zip"
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None  # every checksum holds
        assert archive.namelist() == ["shots/a-detections.png", "shots/a-detections-2.png"]
        with Image.open(archive.open("shots/a-detections.png")) as drawn:
            assert drawn.size == (96, 64)
    assert "could not draw on 1 image: shots/b.tiff" in driver.text("#message")


def test_second_model_is_saved_separately(driver: PageDriver, draw: Draw, ask: Ask) -> None:
    file = draw("one.png", (16, 8, RED), (64, 40, BLUE))
    driver.upload(file)
    driver.page.select_option("#second-model", "strict")
    driver.wait()
    driver.page.select_option("#save-model", "strict")
    _, content = driver.save("#save-json")
    said = ask(file, "strict")["images"][0]
    assert json.loads(content)["images"] == [{**said, "file": "one.png"}]
    assert {one["category_id"] for one in said["detections"]} == {2, 6}
