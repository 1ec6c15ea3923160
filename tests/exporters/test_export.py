"""Files are written, read again from disk, compared with the network, and used like a model."""

from __future__ import annotations

import copy
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from retinanet.cli.app import main
from retinanet.data.images import read_image
from retinanet.errors import ConfigError, DataError, MissingExtraError, WeightsError
from retinanet.exporters import run as export_run
from retinanet.exporters.run import SUFFIXES, calibration_inputs, export
from retinanet.exporters.validate import TOLERANCES, Tolerance, compare, match, validate_file
from retinanet.inference import Detector, load
from retinanet.model.checkpoint import Checkpoint, save_checkpoint
from retinanet.report.loss_distribution import loss_distribution
from retinanet.structures import Detections

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
openvino = pytest.importorskip("openvino")

WIDE = ("score=1", "box=1000", "apart=1")
GONE = 2**31 - 1  # no process has it: Linux has fewer


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "torch": ("torch", {}),
    "raw": ("torch", {"nms": False}),
    "onnx": ("onnx", {}),
    "openvino": ("openvino", {}),
    "fp16": ("openvino", {"precision": "fp16"}),
    "int8": ("openvino", {"precision": "int8"}),
}


@pytest.fixture(scope="module")
def files(
    run: Path, images: Path, tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> dict[str, Path]:
    """One file per form, exported once for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "exported"
    paths = {name: folder / f"{name}{SUFFIXES[to]}" for name, (to, _) in FORMS.items()}
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").is_file():
            export_all(run, images, paths)
            (folder / "done").touch()
    return paths


def export_all(run: Path, images: Path, paths: dict[str, Path]) -> None:
    def copy_onnx(file: Path, *_: Any) -> None:
        shutil.copy(paths["onnx"], file)

    with pytest.MonkeyPatch.context() as patch:
        for name, (to, options) in FORMS.items():
            calibrate = {"calibrate": str(images)} if name == "int8" else {}
            # Whole images of noise are not compared: engines resize them differently.
            report = export(
                run, to, out=paths[name], images=4, tolerance=WIDE, **options, **calibrate
            )
            assert report.passed
            if name in ("onnx", "raw", "openvino", "torch"):
                assert report.network_size.score < 1e-4
                assert report.network_size.box < 0.05
                assert report.network_size.matched == report.network_size.boxes > 10
            if name == "onnx":  # OpenVINO's files are made from the same ONNX: converted once
                patch.setattr(export_run, "write_onnx", copy_onnx)


@pytest.mark.parametrize("name", ["onnx", "raw", "openvino", "torch"])
def test_file_finds_what_the_network_finds(
    files: dict[str, Path], eager: Detector, images: Path, name: str
) -> None:
    detector = load(files[name], device="cpu")
    assert detector.classes == eager.classes
    assert detector.category_ids == eager.category_ids
    for batch_size in (1, 3):
        both = zip(
            detector.detect(images, batch_size=batch_size), eager.detect(images), strict=True
        )
        for got, want in both:
            assert len(got.scores) == len(want.scores) > 0
            torch.testing.assert_close(got.scores, want.scores, atol=1e-4, rtol=0)
            torch.testing.assert_close(got.boxes, want.boxes, atol=2e-2, rtol=0)
            assert got.labels.tolist() == want.labels.tolist()


def test_onnx_holds_standard_operators_and_says_what_it_is(files: dict[str, Path]) -> None:
    model = onnx.load(files["onnx"])
    onnx.checker.check_model(model, full_check=True)
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 22)]
    assert {node.domain for node in model.graph.node} == {""}
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("NonMaxSuppression") == 1
    assert not model.functions
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert [one.dim_param or one.dim_value for one in shape] == ["batch", 3, "height", "width"]
    said = {one.key: one.value for one in model.metadata_props}
    assert json.loads(said["classes"]) == ["ä", "b", "c"]
    assert json.loads(said["category_ids"]) == [7, 9, 11]
    assert json.loads(said["preprocessing"])["image_size"] == 64
    assert json.loads(said["thresholds"])["score_threshold"] == 0.3
    # Nothing of the machine that it was made on.
    assert str(Path(__file__).parents[2]).encode() not in files["onnx"].read_bytes()


@pytest.mark.slow
def test_onnx_without_nms_outputs_every_anchor(run: Path, tmp_path: Path) -> None:
    report = export(run, "onnx", out=tmp_path / "raw.onnx", nms=False, images=4, tolerance=WIDE)
    assert report.network_size.score < 1e-4
    raw = onnx.load(report.file)
    assert "NonMaxSuppression" not in {node.op_type for node in raw.graph.node}
    assert [output.name for output in raw.graph.output] == ["boxes", "scores"]


def test_fp16_is_half_and_int8_is_quantized(files: dict[str, Path]) -> None:
    sizes = {
        name: files[name].with_suffix(".bin").stat().st_size
        for name in ("openvino", "fp16", "int8")
    }
    assert sizes["fp16"] < 0.6 * sizes["openvino"]
    assert sizes["int8"] < 0.5 * sizes["openvino"]
    nodes = openvino.Core().read_model(files["int8"]).get_ops()
    assert sum(one.get_type_name() == "FakeQuantize" for one in nodes) > 20


def test_openvino_resizes_as_the_detector_does(
    files: dict[str, Path], eager: Detector, images: Path
) -> None:
    """Its own resize is none: an image made four times smaller tells."""
    image = read_image(images / "4.png")
    network: Any = load(files["openvino"], device="cpu").network
    agreed = compare(
        [(eager.detect_prepared([eager.prepare(image)])[0], network.detect([image])[0])],
        Tolerance(0.05, 3, 0.1, 1),
        eager.thresholds,
    )
    assert agreed.apart <= 0.1


def test_thresholds_that_are_built_in(files: dict[str, Path], images: Path) -> None:
    detector = load(files["onnx"], score_threshold=0.9, detections_per_image=5, device="cpu")
    for one in detector.detect(images):
        assert len(one.scores) <= 5
        assert not len(one.scores) or float(one.scores.min()) > 0.9
    for asked, why in (
        ({"score_threshold": 0.1}, "score_threshold 0.3, which allows 0.3 or more, got 0.1"),
        ({"detections_per_image": 30}, "detections_per_image 20, which allows 20 or less"),
        ({"nms_threshold": 0.4}, "nms_threshold 0.5, .* got 0.4: export it again"),
        ({"image_size": 128}, "exported with image_size 64, got 128"),
        ({"precision": "int8"}, "exported with precision float32, got int8"),
        ({"backend": "torch"}, "exported with backend onnx, got torch"),
        ({"calibrate": "x"}, "is exported already: calibrate where it is made"),
        ({"device": "meta"}, "device"),
    ):
        with pytest.raises(ConfigError, match=why):
            load(files["onnx"], **{"device": "cpu", **asked})
    with pytest.raises(ConfigError, match="nms_threshold"):
        detector.detect(images, nms_threshold=0.7)
    # Scores of all anchors take any.
    assert load(files["raw"], device="cpu", nms_threshold=0.7, score_threshold=0.1)


def test_what_needs_the_network_itself_says_so(files: dict[str, Path], images: Path) -> None:
    detector = load(files["onnx"], device="cpu")
    with pytest.raises(ConfigError, match="give the run that it was exported from"):
        loss_distribution(detector, images)
    with pytest.raises(ConfigError, match="not the network's own outputs"):
        detector.network(torch.zeros(1, 3, 64, 64))


def test_command_line(
    files: dict[str, Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "found"), "--format", "json"]
    assert main(["detect", str(files["onnx"]), str(images), "--device", "cpu", *out]) == 0
    assert (tmp_path / "found" / "detections.json").is_file()
    assert main(["export", "nowhere", "--to", "onnx"]) == 1
    assert main(["export", "nowhere", "--to", "onx"]) == 2
    assert main(["export", "nowhere", "--to", "openvino", "--int8", "--fp16"]) == 2
    assert main(["export", "nowhere", "--to", "onnx", "--aot"]) == 2
    said = capsys.readouterr().err
    assert "did you mean onnx" in said
    assert "choose one" in said
    assert "--aot is for --to torch, got --to onnx" in said


def test_a_file_that_differs_is_a_failure(
    files: dict[str, Path], eager: Detector, tmp_path: Path
) -> None:
    model = onnx.load(files["onnx"])
    weights = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    values = np.frombuffer(weights.raw_data, np.float32).copy()
    values[::2] *= 1.5
    weights.raw_data = values.tobytes()
    onnx.save(model, tmp_path / "broken.onnx")
    report = validate_file(tmp_path / "broken.onnx", eager, images=4)
    assert not report.passed
    assert "at the network's size" in report.failures[0]


@pytest.mark.parametrize("sound", [True, False], ids=["sound", "of another network"])
def test_exit_code_and_report(
    files: dict[str, Path],
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    sound: bool,
) -> None:
    def write(file: Path, *_: Any, **__: Any) -> None:
        shutil.copy(files["onnx"], file)

    monkeypatch.setattr(export_run, "write_onnx", write)  # the file of `checkpoint`, whatever is
    given = replace(checkpoint, model=copy.deepcopy(checkpoint.model))
    if not sound:
        given.model.box_head.last.weight.data.mul_(1.5)
    run = save_checkpoint(tmp_path / "run", given)
    left, kept = (tmp_path / f".m.onnx.{pid}.x" for pid in (GONE, os.getpid()))
    left.mkdir()
    (left / "m.onnx").touch()
    kept.mkdir()  # of an export that is at work
    file = tmp_path / "m.onnx"
    code = main(["export", str(run), "--to", "onnx", "--out", str(file), "--images", "2"])
    said = json.loads((tmp_path / "m.onnx.report.json").read_text())
    shown = capsys.readouterr()
    assert code == (0 if sound else 1)
    assert said["passed"] == sound
    assert said["network_size"]["boxes"] > 10
    assert ("does NOT match the network" in shown.out) != sound
    assert ("compare the AP with --data" in shown.err) != sound
    assert file.is_file()
    assert [one for one in tmp_path.iterdir() if one.name.startswith(".")] == [kept]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"to": "onx"}, "did you mean onnx"),
        ({"to": "onnx", "precision": "fp61"}, "did you mean fp16"),
        ({"to": "onnx", "precision": "int8", "calibrate": "x"}, "int8 is for --to openvino, got"),
        ({"to": "torch", "precision": "fp16"}, "fp16 is for --to openvino"),
        ({"to": "openvino", "precision": "int8"}, "int8 needs calibration images"),
        ({"to": "openvino", "calibrate": "x"}, "are for int8"),
        ({"to": "onnx", "images": 0}, "1 or more, got 0"),
        ({"to": "onnx", "out": "m.pt2"}, "a file for onnx ends in .onnx, got m.pt2"),
        ({"to": "onnx", "tolerance": ["scor=1"]}, "tolerance 'scor=1' is not name=number"),
        ({"to": "onnx", "tolerance": ["box=-1"]}, "tolerance 'box=-1'"),
        ({"to": "aotinductor"}, "AOTInductor needs an image_size over 128, got 64"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_options_that_do_not_go_together(run: Path, options: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        export(run, **options)


@pytest.mark.parametrize("name", ["onnx", "openvino", "torch"])
def test_damaged_and_foreign_files(files: dict[str, Path], tmp_path: Path, name: str) -> None:
    file = tmp_path / files[name].name
    with pytest.raises(WeightsError, match="there is no file"):
        load(file)
    file.write_bytes(b"not this")
    with pytest.raises(WeightsError, match=file.name):
        load(file)
    file.write_bytes(files[name].read_bytes()[: files[name].stat().st_size // 2])
    with pytest.raises(WeightsError, match=file.name):
        load(file)


def text_of(values: dict[str, Any], files: dict[str, Path], file: Path) -> Path:
    model = onnx.load(files["onnx"])
    for one in model.metadata_props:
        if one.key == "retinanet":
            one.value = json.dumps(json.loads(one.value) | values)
    onnx.save(model, file)
    return file


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"version": 2}, "version 2; this package reads up to 1: upgrade it"),
        ({"format": "other"}, 'lacks "format": "retinanet export"'),
        ({"form": "masks"}, "form is 'masks', not one of detections, scores"),
        ({"target": "torch"}, "target is 'torch', not one of onnx"),
        ({"classes": []}, "classes: Tuple should have at least 1 item"),
        ({"info": {"detect": {"score_threshold": 7}}}, "info.detect has no thresholds"),
    ],
)
def test_texts_that_cannot_be(
    files: dict[str, Path], tmp_path: Path, values: dict[str, Any], why: str
) -> None:
    with pytest.raises(WeightsError, match=why):
        load(text_of(values, files, tmp_path / "m.onnx"))


def test_a_file_without_the_text_is_another_s(files: dict[str, Path], tmp_path: Path) -> None:
    model = onnx.load(files["onnx"])
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(WeightsError, match="it is not of retinanet export"):
        load(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("missing", "to", "extra"),
    [
        ("onnx", "onnx", "onnx"),
        ("onnxscript", "onnx", "onnx"),
        ("openvino", "openvino", "openvino"),
    ],
)
def test_missing_extras(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, to: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    suffix = "onnx" if to == "onnx" else "xml"
    with pytest.raises(MissingExtraError, match=rf"{missing} is not installed.*\[{extra}\]"):
        export(run, to, out=tmp_path / f"m.{suffix}")
    assert list(tmp_path.iterdir()) == []  # no half of anything


def test_missing_onnxruntime(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"onnxruntime is not installed.*\[onnx\]"):
        load(files["onnx"])


def test_matching_by_hand() -> None:
    one = Detections(
        torch.tensor([[0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60.0]]),
        torch.tensor([0.9, 0.8, 0.305]),
        torch.tensor([0, 1, 0]),
    )
    other = Detections(
        torch.tensor([[20, 20, 30, 31], [0, 0, 10, 10.5], [20, 20, 30, 30.0]]),
        torch.tensor([0.85, 0.7, 0.6]),
        torch.tensor([1, 0, 2]),
    )
    left, right = match(one, other)
    assert sorted(zip(left.tolist(), right.tolist(), strict=True)) == [(0, 1), (1, 0)]
    thresholds: Any = {
        "score_threshold": 0.3,
        "detections_per_image": 20,
        "nms_threshold": 0.5,
        "class_agnostic_nms": False,
    }
    agreed = compare([(one, other)], Tolerance(0.1, 0.6, 0, 0), thresholds)
    # Of the pairs one differs by .2 in score, the other by 1 pixel; .305 is at the threshold; class
    # 2 is in one of them alone.
    assert (agreed.matched, agreed.beyond, agreed.at_a_threshold, agreed.unmatched) == (2, 2, 1, 1)
    assert agreed.score == pytest.approx(0.2)
    assert agreed.box == pytest.approx(1.0)
    assert agreed.apart == 1.0
    assert TOLERANCES["float32"].override(["score=.5"]).score == 0.5


def test_boxes_without_an_area_are_matched_by_their_corners() -> None:
    one = Detections(
        torch.tensor([[4, 0, 4, 9], [0, 5, 7, 5.0]]),
        torch.tensor([0.9, 0.8]),
        torch.zeros(2).long(),
    )
    left, right = match(one, Detections(one.boxes.flip(0), one.scores, one.labels))
    assert sorted(zip(left.tolist(), right.tolist(), strict=True)) == [(0, 1), (1, 0)]


def test_nothing_to_compare_is_no_success(
    files: dict[str, Path], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    detect = {**checkpoint.info["detect"], "score_threshold": 0.9999999}
    file = text_of({"info": {"detect": detect}}, files, tmp_path / "m.onnx")
    blind = Detector(
        replace(checkpoint, info={"detect": detect}), device="cpu", precision="float32"
    )
    report = validate_file(file, blind, images=2)
    assert (report.network_size.boxes, report.network_size.found) == (0, 0)
    assert not report.passed
    assert "nothing was compared" in report.failures[0]


def test_int8_is_not_calibrated_on_what_it_is_judged_by(
    checkpoint: Any, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def read(path: str, split: str, **options: Any) -> Any:
        asked.append({"split": split, **options})
        raise DataError("no labels")

    monkeypatch.setattr("retinanet.exporters.run.read_dataset", read)
    info = {**checkpoint.info, "split": {"seed": 5, "val_fraction": 0.3}}
    detector = Detector(replace(checkpoint, info=info), device="cpu", precision="float32")
    assert len(list(calibration_inputs(detector, str(images)))) == 5
    assert asked == [{"split": "train", "extras": False, "seed": 5, "val_fraction": 0.3}]


@pytest.mark.slow
def test_aotinductor(checkpoint: Any, tmp_path: Path, images: Path) -> None:
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler")
    report = export(
        checkpoint,
        "aotinductor",
        out=tmp_path / "m.pt2",
        image_size=160,
        max_size=256,
        images=3,
    )
    assert report.passed, report.failures
    assert report.network_size.matched == report.network_size.boxes > 10
    assert load(report.file, device="cpu").detect(images)
