"""Errors: one line on standard error, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from retinanet.cli import app

from .conftest import TINY, Cli

TO_NEW = "{run} {data} --out={new}"
TABLE3 = "paper run table3 --data={data}"

# Arguments, and a part of the message.
BAD_USAGE = [
    ("trian", "train"),
    ("report loss-distribtuion", "loss-distribution"),
    ("train x --stesp 3", "--steps"),
    ("detect {run} {data} --conf=0.5", "no such option: --conf; did you mean --score-threshold?"),
    (
        "train x --lr0 0.1",
        "no such option: --lr0; give the setting, without dashes: train.lr=VALUE",
    ),
    ("train x lr0=0.1", "did you mean train.lr?"),
    ("train x --steps three", "--steps"),
    ("train x --steps 0", "--steps"),
    ("detect x", "SOURCE"),
    ("train", "retinanet train DATA"),
    ("train x train.lrr=1", "did you mean train.lr?"),
    ("train x train.lr", "key=value"),
    ("train x train.lr=fast", "train.lr"),
    ("train x loss.alpha=2", "alpha"),
    ("train x --recipe qick", "did you mean quick?"),
    ("train x --epochs 2 --steps 3", "one of them"),
    ("train x --steps 4 train.steps=5", "given twice: as a setting and by steps; give one of them"),
    ("train x --image-size 64 data.image_size=96", "given twice: as a setting and by image_size"),
    ("train x --epochs 0", "train.epochs: Input should be greater than 0"),
    ("train x --seed -1", "train.seed: Input should be greater than or equal to 0"),
    ("train x --batch-size big", "give a number of images, or auto (got 'big')"),
    ("train --out={run} --more-epochs=0", "--more-epochs (more_epochs) 0: give more than 0"),
    ("train {data} --out={full} --steps=1", "no run to resume"),
    ("data anchors {data} anchors.sizes=[16]", "sizes"),
    ("data convert {data} {new} --to=voc --images=move", "copy"),
    (f"detect {TO_NEW} --format=jsn", "did you mean json?"),
    (f"detect {TO_NEW} --device=gpu", "gpu"),
    ("evaluate {run} {data} --precision=f32", "float32"),
    (f"detect {TO_NEW} --backend=openvin", "did you mean openvino?"),
    (f"detect {TO_NEW} --precision=int8 --backend=torch", "int8 needs backend openvino"),
    (f"detect {TO_NEW} --calibrate={{data}}", "for precision int8"),
    ("evaluate {results} {data} --precision=int8", "evaluated without a network"),
    (f"detect {TO_NEW} --score-threshold=2", "score_threshold"),
    (f"detect {TO_NEW} --tile=big", "nor auto"),
    (f"detect {TO_NEW} --tile=0", "nor auto"),
    ("evaluate {run} {data} --tile=big", "nor auto"),
    (f"detect {TO_NEW} --engine=rai", "mean ray?"),
    (f"detect {TO_NEW} --every=2", "--every is for videos"),
    (f"detect {TO_NEW} --track", "--track is for videos"),
    (f"detect {TO_NEW} --workers=2", "--workers is for --engine ray"),
    (
        "detect {run} clip.mp4 --out={new} --allow-urls",
        "--allow-urls is for images, not for videos: leave it out",
    ),
    (
        f"detect {TO_NEW} --engine=ray --draw-threshold=0",
        "--draw-threshold is for images and videos, not for --engine ray",
    ),
    (f"detect {TO_NEW} --overlap=0", "--overlap is for tiles: give --tile too"),
    ("evaluate {run} {data} --classes=circel", "unknown class 'circel'"),
    ("detect {run} {data} --classes=circle,sqare", "did you mean square?"),
    ("train {data} --classes=circle,", "--classes 'circle,' has no or an empty name"),
    ("bench matchin", "did you mean matching?"),
    ("report speed-accuracy {run}", "--data"),
    ("report loss-distribution {run} {data} --gamma=-1", "got [-1.0]"),
    ("report loss-distribution {run} {data} --gamma=1 --gamma=1", "different"),
    ("report loss-distribution {run} {data} --image-size=8", "image_size"),
    ("report speed-accuracy {run} --data={data} --scale=16", "got [16]"),
    ("report speed-accuracy {run} {run} --data={data}", "given twice: name each run once"),
    (
        "report speed-accuracy {run} --data={data} --precision=int8 --device=cpu --scale=64",
        "--calibrate FOLDER",
    ),
    ("detect {run} clip.mp4 a.jpg --out={new}", "one call: a.jpg is no video"),
    ("export nowhere --to onx", "did you mean onnx"),
    ("export nowhere --to openvino --int8 --fp16", "choose one"),
    ("export nowhere --to onnx --aot", "--aot is for --to torch, got --to onnx"),
    ("export nowhere", "--to"),
    ("serve {run} --port=-1", "--port is out of range: -1"),
    ("serve {run} --host=256.256.256.256 --port=0", "invalid --host: 256.256.256.256"),
    ("serve {run} --queue=0", "--queue is out of range: 0"),
    ("serve {run} --api-key=", "invalid API key"),
    ("serve {run} --port=0 --score-threshold=2", "score_threshold"),
    ("paper run table1", "did you mean table1"),
    ("paper run tabel", "fig7, all"),
    ("paper run table1b --row=gamma2", "did you mean gamma=2"),
    ("paper run fig1 --row=gamma=2", "fig1 has no row to train"),
    ("paper run table1a", "name the data: --data DIR"),
    ("paper run all", "name the data"),
    (f"{TABLE3} --steps=9 --budget=9min", "use one of them"),
    (f"{TABLE3} --full --steps=9", "use one of them"),
    (f"{TABLE3} --full --image-size=64", "leave out --recipe"),
    (f"{TABLE3} --budget=soon", "90s, 20min or 2h"),
    (f"{TABLE3} --budget=0min", "--budget '0min' is not a duration"),
    (f"{TABLE3} --steps=20 --backbone=resnet19", "resnet19"),
    (f"{TABLE3} --steps=20 --device=tpu", "tpu"),
    (f"{TABLE3} --steps=20 train.seed=7", "set by --seeds"),
    (f"{TABLE3} --steps=20 train.epochs=7", "set by --steps or"),
    (f"{TABLE3} --steps=20 model.backbone=a", "set by --backbone"),
    (f"{TABLE3} --steps=20 loss.gamma=3", "set by the rows"),
    (f"{TABLE3} --steps=20 train.lrr=1", "did you mean train.lr?"),
    ("paper run table1e --data={data} --steps=20 --image-size=40", "a larger --image-size"),
    ("paper run table1d --data={data} --steps=20 --image-size=32", "a larger --image-size"),
]
FAILED = [
    ("export nowhere --to onnx", "nowhere"),
    ("serve nowhere", "nowhere"),
    ("paper run table3 --data={new} --steps=20", "there is no such file or folder"),
    ("train {new}", "there is no such file or folder"),
    ("data check {empty}", "no labelled data found in 0 images"),
    ("evaluate {run} {data} --split tset", "did you mean test?"),
    ("evaluate {new} {data}", "{new}"),
    ("detect {run} {new}.jpg", "there is no such file or folder"),
    ("detect {run} {empty}", "no image in this folder"),
    ("data convert {data} {new} --to=coko", "did you mean coco?"),
    ("data convert {data} {data} --to=voc", "another folder"),
    ("evaluate {results} {data}", "image"),
    ("report loss-distribution {run} {data} --split=tset", "did you mean test?"),
]


@pytest.fixture
def paths(tiny_sets: dict[str, Path], tiny_run: Path, tmp_path: Path) -> dict[str, str]:
    """Return the values of the placeholders."""
    empty, full, results = tmp_path / "empty", tmp_path / "full", tmp_path / "results.json"
    empty.mkdir()
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    box = {"image_id": 999, "category_id": 1, "bbox": [0, 0, 5, 5], "score": 0.5}
    results.write_text(json.dumps([box]))
    return {
        "data": str(tiny_sets["coco"]),
        "run": str(tiny_run),
        "new": str(tmp_path / "new"),
        "empty": str(empty),
        "full": str(full),
        "results": str(results),
    }


@pytest.mark.parametrize(
    ("command", "message", "code"),
    [
        *(pytest.param(*row, 2, id=row[0]) for row in BAD_USAGE),
        *(pytest.param(*row, 1, id=row[0]) for row in FAILED),
    ],
)
def test_error_is_one_line(
    cli: Cli, paths: dict[str, str], command: str, message: str, code: int
) -> None:
    tiny = TINY if command.startswith("train {data}") else ()
    ended = cli(*(word.format(**paths) for word in command.split()), *tiny)
    assert ended.code == code
    assert ended.out == ""
    lines = ended.err.splitlines()
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("error: ")
    assert message.format(**paths) in lines[0]
    assert not Path(paths["new"]).exists()


def test_debug_shows_the_traceback(cli: Cli) -> None:
    ended = cli("train", "--debug", "nowhere")
    assert ended.code == 1
    assert "Traceback (most recent call last)" in ended.err
    assert ended.err.splitlines()[-1].startswith("error: nowhere")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(28, "No space left on device", "runs/x"),
            "No space left on device: runs/x; free space, then give the same command again",
        ),
        (
            type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory.\nLong story"),
            "out of memory: CUDA out of memory.; lower --batch-size, or raise train.accumulate",
        ),
        (KeyError("first\nsecond"), "KeyError: 'first\\nsecond' (unexpected; --debug shows where)"),
    ],
)
def test_describe_error(error: Exception, message: str) -> None:
    assert app.describe_error(error) == message


def test_unreadable_images_are_listed_and_the_others_processed(
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
    assert [Path(image["file"]).name for image in ended.json["failures"]] == ["gone.png", "b.png"]
    assert ended.err.splitlines()[0] == "2 images could not be read:"
    assert "b.png" in ended.err
    written = json.loads((tmp_path / "o" / "detections.json").read_text())
    assert [Path(image["file"]).name for image in written["images"]] == ["a.png", "c.png"]
    assert len(written["failures"]) == 2
