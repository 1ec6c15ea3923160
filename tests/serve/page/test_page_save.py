"""Saved files contain what the server detected, in the layouts of the command line."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from page_driver import BLUE, DIM_RED, GREEN, RED, PageDriver
from PIL import Image
from small_service import colour_detector

from retinanet.inference.writers import write_coco, write_json

Draw = Callable[..., Path]
Detect = Callable[..., Any]


def test_json_contains_the_response(driver: PageDriver, draw: Draw, detect: Detect) -> None:
    file = draw("one.png", (16, 8, RED), (64, 40, GREEN), (80, 40, DIM_RED))
    driver.upload(file)
    response = detect(file)["images"][0]
    assert driver.text("#save-visible-text") == "visible only: 2 of 3 objects"
    name, content = driver.save("#save-json")
    assert name == "detections.json"
    shown = [item for item in response["detections"] if item["score"] >= 0.3]
    assert json.loads(content) == {
        "images": [{**response, "file": "one.png", "detections": shown}],
        "failures": [],
    }
    # The second model is saved separately.
    driver.page.uncheck("#save-visible")
    driver.page.select_option("#second-model", "strict")
    driver.wait()
    driver.page.select_option("#save-model", "strict")
    _, content = driver.save("#save-json")
    response = detect(file, "strict")["images"][0]
    assert json.loads(content)["images"] == [{**response, "file": "one.png"}]
    assert {item["category_id"] for item in response["detections"]} == {2, 4}


def test_json_of_all_equals_the_command_lines(
    failing: PageDriver, draw: Draw, tmp_path: Path
) -> None:
    files = [draw(f"shots/{n}.png", *[(8 * k, 8, BLUE) for k in range(n)]) for n in range(3)]
    broken = tmp_path / "shots" / "3.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    failing.add(tmp_path / "shots", selector="#folder")
    failing.wait()
    failing.page.select_option("#save-which", "all")
    failing.page.uncheck("#save-visible")
    _, content = failing.save("#save-json")
    expected = tmp_path / "detections.json"
    with write_json(expected) as write:
        for detections in colour_detector().stream(files):
            write(detections)
    reference = json.loads(expected.read_text())
    for image in reference["images"]:
        image["file"] = Path(image["file"]).relative_to(tmp_path).as_posix()
    saved = json.loads(content)
    assert saved["images"] == reference["images"]
    [failure] = saved["failures"]
    assert failure["file"] == "shots/3.png"
    assert "The image cannot be read" in failure["reason"]


def test_coco_equals_the_command_lines(driver: PageDriver, draw: Draw, tmp_path: Path) -> None:
    names = ["000139.png", "street.png", "street.webp", "a.b.png", "1712345678901234567.png"]
    driver.upload(*[draw(name, (16, 8, RED), (72, 24, GREEN), (80, 40, DIM_RED)) for name in names])
    driver.page.select_option("#save-which", "all")
    driver.page.uncheck("#save-visible")
    name, content = driver.save("#save-coco")
    assert name == "coco_results.json"
    expected = tmp_path / "coco_results.json"
    with write_coco(expected) as write:
        for detections in colour_detector().stream([tmp_path / name for name in driver.names()]):
            write(detections)
    saved = json.loads(content)
    assert saved == json.loads(expected.read_text())
    ids = {item["image_id"] for item in saved}
    assert ids == {139, "a.b", "street", "street.webp", 1712345678901234567}
    first = {"image_id": 139, "category_id": 3, "bbox": [16, 8, 8, 8]}
    assert first | {"score": pytest.approx(0.994780, abs=1e-6)} in saved


def test_png_is_drawn_at_full_size(driver: PageDriver, draw: Draw) -> None:
    file = draw("large.png", (16, 8, RED), (64, 40, GREEN), (80, 40, DIM_RED))
    with Image.open(file) as small:
        small.resize((960, 640), Image.Resampling.NEAREST).save(file)
    driver.upload(file)
    driver.page.get_by_role("checkbox", name="green 1").uncheck()
    name, content = driver.save("#save-png")
    assert name == "large-detections.png"
    drawn = Image.open(io.BytesIO(content)).convert("RGB")
    assert drawn.size == (960, 640)
    assert drawn.getpixel((200, 120)) == (255, 0, 0)
    # Only the box of the first class is drawn, in its colour.
    assert drawn.getpixel((160, 120)) == (213, 94, 0)
    assert drawn.getpixel((640, 440)) == (0, 255, 0)
    assert drawn.getpixel((800, 440)) == (110, 0, 0)


def test_png_of_all_is_a_zip(driver: PageDriver, draw: Draw, tmp_path: Path) -> None:
    for name in ("ä.png", "ä.webp", "b.tiff"):
        draw(f"shots/{name}", (16, 8, RED))
    driver.add(tmp_path / "shots", selector="#folder")
    driver.wait()
    driver.page.select_option("#save-which", "all")
    name, content = driver.save("#save-png")
    assert name == "images.zip"
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        assert sorted(names) == ["shots/ä-detections-2.png", "shots/ä-detections.png"]
        for name in names:
            with Image.open(archive.open(name)) as drawn:
                assert drawn.size == (96, 64)
    driver.settle()
    assert "could not draw on 1 image: shots/b.tiff" in driver.text("#notice")
