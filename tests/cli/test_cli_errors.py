"""Errors: one line on standard error, and an exit code that says whose fault it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from retinanet.cli import app

from .conftest import TINY, Cli

BAD_USAGE = {
    "a command": (["trian"], "train"),
    "an option": (["train", "x", "--stesp", "3"], "--steps"),
    "an option of another tool": (
        ["detect", "{run}", "{data}", "--conf=0.5"],
        "no such option: --conf; did you mean --score-threshold?",
    ),
    "a setting as an option": (
        ["train", "x", "--lr0", "0.1"],
        "no such option: --lr0; give the setting, without dashes: train.lr=VALUE",
    ),
    "a setting of another tool": (["train", "x", "lr0=0.1"], "did you mean train.lr?"),
    "an option's value": (["train", "x", "--steps", "three"], "--steps"),
    "an option's range": (["train", "x", "--steps", "0"], "--steps"),
    "a missing argument": (["detect", "x"], "SOURCE"),
    "no data": (["train"], "retinanet train DATA"),
    "a setting": (["train", "x", "train.lrr=1"], "did you mean train.lr?"),
    "a setting without a value": (["train", "x", "train.lr"], "key=value"),
    "a setting's type": (["train", "x", "train.lr=fast"], "train.lr"),
    "a setting's range": (["train", "x", "loss.alpha=2"], "alpha"),
    "a recipe": (["train", "x", "--recipe", "qick"], "did you mean quick?"),
    "two lengths": (["train", "x", "--epochs", "2", "--steps", "3"], "one of them"),
    "anchors": (["data", "anchors", "{data}", "anchors.sizes=[16]"], "sizes"),
    "a way to place images": (
        ["data", "convert", "{data}", "{new}", "--to=voc", "--images=move"],
        "copy",
    ),
    "an output format": (
        ["detect", "{run}", "{data}", "--out={new}", "--format=jsn"],
        "did you mean json?",
    ),
    "a device": (["detect", "{run}", "{data}", "--out={new}", "--device=gpu"], "gpu"),
    "a precision": (["evaluate", "{run}", "{data}", "--precision=f32"], "float32"),
    "a backend": (
        ["detect", "{run}", "{data}", "--out={new}", "--backend=openvin"],
        "did you mean openvino?",
    ),
    "a precision of another backend": (
        ["detect", "{run}", "{data}", "--out={new}", "--precision=int8", "--backend=torch"],
        "int8 needs backend openvino",
    ),
    "a calibration without int8": (
        ["detect", "{run}", "{data}", "--out={new}", "--calibrate={data}"],
        "to calibrate on are for precision int8",
    ),
    "a precision of results": (
        ["evaluate", "{results}", "{data}", "--precision=int8"],
        "evaluated without a network",
    ),
    "a threshold": (
        ["detect", "{run}", "{data}", "--out={new}", "--score-threshold=2"],
        "score_threshold",
    ),
    "a tile": (["detect", "{run}", "{data}", "--out={new}", "--tile=big"], "nor auto"),
    "no tile": (["detect", "{run}", "{data}", "--out={new}", "--tile=0"], "nor auto"),
    "a tile to judge with": (["evaluate", "{run}", "{data}", "--tile=big"], "nor auto"),
    "an engine": (["detect", "{run}", "{data}", "--out={new}", "--engine=rai"], "mean ray?"),
    "an option of videos": (
        ["detect", "{run}", "{data}", "--out={new}", "--every=2"],
        "--every is for videos",
    ),
    "an option of collections": (
        ["detect", "{run}", "{data}", "--out={new}", "--workers=2"],
        "--workers is for --engine ray",
    ),
    "an option of images": (
        ["detect", "{run}", "clip.mp4", "--out={new}", "--tile=64"],
        "--tile is for images and --engine ray, not for videos: leave it out",
    ),
    "an option that a collection has not": (
        ["detect", "{run}", "{data}", "--out={new}", "--engine=ray", "--format=csv"],
        "--format is for images, not for --engine ray",
    ),
    "an overlap of nothing": (
        ["detect", "{run}", "{data}", "--out={new}", "--overlap=0.2"],
        "--overlap is for tiles: give --tile too",
    ),
    "a stage": (["bench", "matchin"], "did you mean matching?"),
    "a folder with other things": (
        ["train", "{data}", "--out={empty}.full", *TINY, "--steps=1"],
        "no run to resume",
    ),
}

FAILED = {
    "no such data": (["train", "{new}"], "there is no such file or folder"),
    "no labelled data": (["data", "check", "{empty}"], "no labelled data found in 0 images"),
    "a split": (["evaluate", "{run}", "{data}", "--split", "tset"], "did you mean test?"),
    "no such model": (["evaluate", "{new}", "{data}"], "{new}"),
    "no such image": (["detect", "{run}", "{new}.jpg"], "there is no such file or folder"),
    "a folder without images": (["detect", "{run}", "{empty}"], "no image in this folder"),
    "a format": (["data", "convert", "{data}", "{new}", "--to=coko"], "did you mean coco?"),
    "a folder that is full": (
        ["data", "convert", "{data}", "{data}", "--to=voc"],
        "another folder",
    ),
    "results of other data": (["evaluate", "{results}", "{data}"], "image"),
}


def _fill(
    arguments: list[str], tiny_sets: dict[str, Path], tiny_run: Path, tmp_path: Path
) -> dict[str, str]:
    (tmp_path / "empty").mkdir()
    full = tmp_path / "empty.full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    results = tmp_path / "results.json"
    box = {"image_id": 999, "category_id": 1, "bbox": [0, 0, 5, 5], "score": 0.5}
    results.write_text(json.dumps([box]))
    return {
        "data": str(tiny_sets["coco"]),
        "run": str(tiny_run),
        "new": str(tmp_path / "new"),
        "empty": str(tmp_path / "empty"),
        "results": str(results),
    }


@pytest.mark.parametrize(
    ("arguments", "said", "code"),
    [
        *(pytest.param(*one, 2, id=f"usage: {name}") for name, one in BAD_USAGE.items()),
        *(pytest.param(*one, 1, id=f"failed: {name}") for name, one in FAILED.items()),
    ],
)
def test_error_is_one_line(
    cli: Cli,
    tiny_sets: dict[str, Path],
    tiny_run: Path,
    tmp_path: Path,
    arguments: list[str],
    said: str,
    code: int,
) -> None:
    names = _fill(arguments, tiny_sets, tiny_run, tmp_path)
    ended = cli(*(one.format(**names) if "{" in one else one for one in arguments))
    assert ended.code == code
    assert ended.out == ""
    lines = ended.err.splitlines()
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("error: ")
    assert said.format(**names) in lines[0]


def test_debug_shows_the_traceback(cli: Cli) -> None:
    ended = cli("train", "--debug", "nowhere")
    assert ended.code == 1
    assert "Traceback (most recent call last)" in ended.err
    assert ended.err.splitlines()[-1].startswith("error: nowhere")


def test_an_error_that_nobody_expected_is_one_line_too(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyError("first\nsecond")

    monkeypatch.setattr("retinanet.data.read_splits", fail)
    ended = cli("data", "check", "x")
    assert ended.code == 1
    assert ended.err.startswith("error: KeyError: ")
    assert ended.err.endswith("(unexpected; --debug shows where)\n")
    assert len(ended.err.splitlines()) == 1


def test_a_full_disk_is_said_as_the_system_says_it() -> None:
    error = OSError(28, "No space left on device", "runs/x")
    assert app._one_line(error) == (
        "No space left on device: runs/x; free space, then give the same command again"
    )


def test_out_of_memory_says_what_to_do() -> None:
    error = type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory.\nLong story")
    said = app._one_line(error)
    assert said.startswith("out of memory: CUDA out of memory.; lower --batch-size")
    assert "Long story" not in said


def test_one_broken_image_is_named_and_stops_nothing(
    cli: Cli, tiny_run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (70, 50), "red").save(folder / "a.png")
    (folder / "b.png").write_bytes(b"not an image")
    Image.new("RGB", (70, 50), "blue").save(folder / "c.png")
    ended = cli("detect", tiny_run, folder, tmp_path / "gone.png", f"--out={tmp_path / 'o'}",
                "--json")  # fmt: skip
    assert ended.code == 1
    assert ended.json["images"] == 2
    assert ended.json["network"].startswith("torch on cpu")
    assert [Path(one["file"]).name for one in ended.json["failures"]] == ["gone.png", "b.png"]
    assert ended.err.splitlines()[0] == "2 images could not be read:"
    assert "b.png" in ended.err
    written = json.loads((tmp_path / "o" / "detections.json").read_text())
    assert [Path(one["file"]).name for one in written["images"]] == ["a.png", "c.png"]
    assert len(written["failures"]) == 2
