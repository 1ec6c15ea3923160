"""Outputs of detection are never inputs; a reused folder loses exactly what detection wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from retinanet.data import images as data_images
from retinanet.errors import DataError
from retinanet.inference import Detector, Failure, find_sources
from retinanet.inference.detections import ImageDetections
from retinanet.inference.writers import open_outputs
from white_finder import Pixels


def detect_into(detector: Detector, sources: Any, out: Path, formats: str) -> list[str]:
    with open_outputs(out, formats.split(",")) as write:
        names = []
        for result in detector.stream(find_sources(sources), keep_pixels=True):
            assert isinstance(result, ImageDetections)
            write(result)
            names.append(result.name)
    return names


@pytest.mark.parametrize("out", ["found", ".", "images"])
@pytest.mark.parametrize("pattern", [".", "**/*.png"])
def test_detect_in_one_folder_three_times_finds_the_same_images(
    detector: Detector, folder: Path, monkeypatch: pytest.MonkeyPatch, out: str, pattern: str
) -> None:
    monkeypatch.chdir(folder)
    before = {file: file.read_bytes() for file in Path().rglob("*") if file.is_file()}
    for _ in range(3):
        names = detect_into(detector, pattern, Path(out), "json,images")
        assert names == ["a.png", "left/a.png", "right/a.png"]
    assert {file: file.read_bytes() for file in before} == before
    text = json.loads(Path(out, "detections.json").read_text())
    assert len(text["images"]) == 3
    drawn = {f"images/{name}" for name in names}
    lines = Path(out, ".retinanet-outputs").read_text().splitlines()[1:]
    listed = [json.loads(line)["file"] for line in lines]
    assert set(listed) == {*drawn, "detections.json"}


def test_reused_folder_loses_the_earlier_outputs_and_nothing_else(
    detector: Detector, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    detect_into(detector, folder, out, "json,images,yolo,cvat")
    (out / "images" / "mine.png").write_bytes(b"mine")
    (out / "notes.txt").write_text("mine")
    detect_into(detector, folder / "a.png", out, "csv,images")
    files = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert files == {
        *("images/a.png", "images/mine.png", "notes.txt", "detections.csv", ".retinanet-outputs")
    }
    assert not (out / "labels").exists()
    assert not (out / "images" / "left").exists()


def test_killed_run_is_cleaned_by_the_next(
    detector: Detector, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def killed() -> None:
        with open_outputs(out, ["json", "images"]) as write:
            write(next(detector.stream(folder)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    with (out / ".retinanet-outputs").open("a") as file:
        file.write('\n{"file": "ima')  # the process died here
    assert (out / "images" / "a.png").is_file()
    detect_into(detector, folder / "left", out, "json")
    assert sorted(file.name for file in out.iterdir()) == [".retinanet-outputs", "detections.json"]


def test_file_of_another_program_is_not_overwritten(
    detector: Detector, folder: Path, square: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)  # whose images/a.png is an input
    before = (folder / "a.png").read_bytes()
    with pytest.raises(DataError, match=r"was not written by retinanet detect: images/a\.png"):
        detect_into(detector, "images", Path(), "images")
    assert (folder / "a.png").read_bytes() == before
    (folder / ".retinanet-outputs").write_text('{"name": "a web app"}\n')
    with pytest.raises(DataError, match=r"not a manifest of retinanet detect: .*another --out"):
        detect_into(detector, "images", folder, "json")
    assert len(find_sources("images")) == 3  # reading minds no such file


def test_manifest_that_leads_outside_deletes_nothing(
    detector: Detector, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    detect_into(detector, folder / "a.png", out, "json")
    with (out / ".retinanet-outputs").open("a") as file:
        for name in ("../images/a.png", str(folder / "a.png")):
            file.write("\n" + json.dumps({"file": name, "kind": "images"}))
    detect_into(detector, folder / "left", out, "json")
    assert (folder / "a.png").is_file()


def test_output_named_explicitly_is_an_error(detector: Detector, folder: Path) -> None:
    detect_into(detector, folder, folder / "found", "images")
    with pytest.raises(DataError, match="is an output of an earlier detection; copy it"):
        find_sources(folder / "found" / "images" / "a.png")
    with pytest.raises(DataError, match=r"no image in this folder .* but 3 outputs of an earlier"):
        find_sources(folder / "found")
    assert not [one for one in detector.stream([folder]) if isinstance(one, Failure)]


def test_image_that_is_drawn_is_decoded_once(
    detector: Detector, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    plain = Image.open

    def counted(file: Any, *args: Any, **options: Any) -> Any:
        opened.append(str(getattr(file, "name", file)))
        return plain(file, *args, **options)

    monkeypatch.setattr(data_images.Image, "open", counted)
    detect_into(detector, folder / "a.png", tmp_path / "out", "images")
    assert len(opened) == 1
    shown = plain(tmp_path / "out" / "images" / "a.png")
    again = detector.detect(folder / "a.png")
    assert isinstance(again, ImageDetections)
    assert shown.tobytes() == again.draw().tobytes()
