"""Files are written, read again from disk, compared with the network, and used like a model."""

from __future__ import annotations

import copy
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from retinanet.cli.app import main
from retinanet.data.images import read_image
from retinanet.errors import ConfigError, DataError, MissingExtraError, WeightsError
from retinanet.exporters.run import SUFFIXES, calibration_inputs, export
from retinanet.exporters.validate import TOLERANCES, Tolerance, compare, match, validate_file
from retinanet.inference import Detector, load
from retinanet.model.checkpoint import Checkpoint, save_checkpoint
from retinanet.report.loss_distribution import loss_distribution
from retinanet.structures import Detections
from tiny_backbone import QUICK_COMPILE, two_level_network

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
openvino = pytest.importorskip("openvino")

WIDE = ("score=1", "box=1000", "apart=1")

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "torch": ("torch", {}),
    "raw": ("onnx", {"form": "scores"}),
    "onnx": ("onnx", {}),
    "openvino": ("openvino", {}),
    "fp16": ("openvino", {"precision": "fp16"}),
    "int8": ("openvino", {"precision": "int8"}),
}


@pytest.fixture(scope="module")
def files(
    run: Path, images: Path, tmp_path_factory: pytest.TempPathFactory, worker_id: str
) -> dict[str, Path]:
    """Return a file per form, exported once for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "exported"
    paths = {name: folder / f"{name}{SUFFIXES[to]}" for name, (to, _) in FORMS.items()}
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").is_file():
            export_all(run, images, paths)
            (folder / "done").touch()
    return paths


def export_all(run: Path, images: Path, paths: dict[str, Path]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, (to, options) in FORMS.items():
            calibrate = {"calibrate": str(images)} if name == "int8" else {}
            # Whole images of noise are not compared: engines resize them differently.
            report = export(
                run, to, out=paths[name], images=2, tolerance=WIDE, **options, **calibrate
            )
            assert report.passed
            if name in ("onnx", "raw", "openvino", "torch"):
                assert report.network_size.score < 1e-4
                assert report.network_size.box < 0.05
                assert report.network_size.matched == report.network_size.boxes > 10
            if name == "onnx":  # OpenVINO's files are made from the same ONNX: converted once
                copy_instead_of_converting(paths["onnx"], patch)


def copy_instead_of_converting(onnx_file: Path, patch: pytest.MonkeyPatch) -> None:
    def copy_onnx(program: None, file: Path, text: str) -> None:
        shutil.copy(onnx_file, file)

    patch.setattr("retinanet.exporters.run.export_program", lambda *_: None)
    patch.setattr("retinanet.exporters.run.write_onnx", copy_onnx)


@pytest.mark.parametrize("name", ["onnx", "raw", "openvino", "torch"])
def test_exported_file_gives_the_detections_of_the_network(
    files: dict[str, Path], eager: Detector, images: Path, name: str
) -> None:
    detector = load(files[name], device="cpu")
    assert detector.classes == eager.classes
    assert detector.category_ids == eager.category_ids
    expected = eager.detect(images)
    for batch_size in (1, 3):
        detected = detector.detect(images, batch_size=batch_size)
        for got, want in zip(detected, expected, strict=True):
            assert len(got.scores) == len(want.scores) > 0
            torch.testing.assert_close(got.scores, want.scores, atol=1e-4, rtol=0)
            torch.testing.assert_close(got.boxes, want.boxes, atol=2e-2, rtol=0)
            assert got.labels.tolist() == want.labels.tolist()


@pytest.mark.slow
def test_exported_file_of_distributions_gives_the_detections_of_the_network(
    checkpoint: Checkpoint, tmp_path: Path, images: Path
) -> None:
    model = two_level_network(3, spread=True, norm="frozen", box_bins=8)
    model.class_head.load_state_dict(checkpoint.model.class_head.state_dict())
    given = replace(checkpoint, model=model)
    report = export(given, "onnx", out=tmp_path / "m.onnx", images=2, tolerance=WIDE)
    assert report.passed
    assert report.network_size.matched == report.network_size.boxes > 10
    assert (report.network_size.score < 1e-4) & (report.network_size.box < 0.05)
    expected = Detector(given, device="cpu", precision="float32").detect(images)
    for got, want in zip(load(report.file, device="cpu").detect(images), expected, strict=True):
        torch.testing.assert_close(got.boxes, want.boxes, atol=2e-2, rtol=0)


@pytest.mark.parametrize("name", ["onnx", "raw"])
def test_exported_file_with_classes_gives_these_only(
    files: dict[str, Path], images: Path, name: str
) -> None:
    every = load(files[name], device="cpu").detect(images)
    chosen = every[0].classes[int(every[0].labels[0])]
    some = load(files[name], device="cpu", classes=[chosen]).detect(images)
    for got, want in zip(some, every, strict=True):
        kept = want.labels == every[0].labels[0]
        assert torch.equal(got.boxes, want.boxes[kept])
        assert torch.equal(got.scores, want.scores[kept])
        assert torch.equal(got.labels, want.labels[kept])


def test_onnx_has_standard_operators_and_metadata(files: dict[str, Path]) -> None:
    model = onnx.load(files["onnx"])
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 22)]
    assert {node.domain for node in model.graph.node} == {""}
    assert [node.op_type for node in model.graph.node].count("NonMaxSuppression") == 1
    assert not model.functions
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in shape] == ["batch", 3, "height", "width"]
    metadata = {item.key: item.value for item in model.metadata_props}
    assert json.loads(metadata["classes"]) == ["ä", "b", "c"]
    assert json.loads(metadata["category_ids"]) == [7, 9, 11]
    assert json.loads(metadata["preprocessing"])["image_size"] == 64
    assert json.loads(metadata["thresholds"])["score_threshold"] == 0.3
    # No path of the machine.
    assert str(Path(__file__).parents[2]).encode() not in files["onnx"].read_bytes()


def test_python_of_the_export_page_runs(
    files: dict[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("onnx", "openvino", "torch"):
        for suffix in (SUFFIXES[name], ".bin"):
            if (file := files[name].with_suffix(suffix)).exists():
                shutil.copy(file, tmp_path / f"model{suffix}")
    shutil.copy(images / "0.png", tmp_path / "street.jpg")
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).resolve().parents[2] / "docs" / "export.md"
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S)
    names: dict[str, Any] = {}
    counts = []
    for block in blocks:
        exec(compile(block, page.name, "exec"), names)
        counts.append(int(names["count"][0]))
    assert len(counts) == 3
    assert max(counts) - min(counts) <= 1  # rounding decides at a threshold
    assert min(counts) > 0


def test_onnx_without_nms_outputs_every_anchor(files: dict[str, Path]) -> None:
    raw = onnx.load(files["raw"])
    assert "NonMaxSuppression" not in {node.op_type for node in raw.graph.node}
    assert [output.name for output in raw.graph.output] == ["boxes", "scores"]


def test_fp16_weights_are_half_and_int8_is_quantized(files: dict[str, Path]) -> None:
    sizes = {
        name: files[name].with_suffix(".bin").stat().st_size
        for name in ("openvino", "fp16", "int8")
    }
    assert sizes["fp16"] < 0.6 * sizes["openvino"]
    assert sizes["int8"] < 0.5 * sizes["openvino"]
    operations = openvino.Core().read_model(files["int8"]).get_ops()
    assert sum(node.get_type_name() == "FakeQuantize" for node in operations) > 10


def test_openvino_resizes_with_antialiasing(
    files: dict[str, Path], eager: Detector, images: Path
) -> None:
    """OpenVINO's own resize has no antialiasing, which matters in an image made 4 times smaller."""
    image = read_image(images / "4.png")
    network: Any = load(files["openvino"], device="cpu").network
    agreement = compare(
        [(eager.detect_prepared([eager.prepare(image)])[0], network.detect([image])[0])],
        Tolerance(0.05, 3, 0.1, 1),
        eager.thresholds,
    )
    assert agreement.apart <= 0.1


def test_built_in_thresholds_can_only_be_narrowed(files: dict[str, Path], images: Path) -> None:
    detector = load(files["onnx"], score_threshold=0.9, detections_per_image=5, device="cpu")
    for result in detector.detect(images):
        assert len(result.scores) <= 5
        assert not len(result.scores) or float(result.scores.min()) > 0.9
    with pytest.raises(ConfigError, match="nms_threshold"):
        detector.detect(images, nms_threshold=0.7)
    # Scores of all anchors take any.
    assert load(files["raw"], device="cpu", nms_threshold=0.7, score_threshold=0.1)


@pytest.mark.parametrize("form", ["onnx", "raw"])
def test_exported_file_has_score_thresholds_by_class(
    files: dict[str, Path], eager: Detector, images: Path, form: str
) -> None:
    own = {"ä": 0.9, "b": 0.6, "c": 0.5}
    detector = load(files[form], device="cpu", score_thresholds=own)
    size = read_image(images / "3.png")  # of the network's size: nothing is resized
    found, expected = detector.detect(size), eager.detect(size, score_thresholds=own)
    assert len(found) == len(expected) > 1  # type: ignore[arg-type]
    assert torch.equal(found.labels, expected.labels)  # type: ignore[union-attr]


def test_exported_scores_can_be_fused(
    files: dict[str, Path], eager: Detector, images: Path
) -> None:
    image = read_image(images / "3.png")
    settings: dict[str, Any] = {"nms": "wbf", "temperature": 1.5}
    found = load(files["raw"], device="cpu", **settings).detect(image)
    expected = eager.detect(image, **settings)
    torch.testing.assert_close(found.boxes, expected.boxes, atol=0.05, rtol=0)  # type: ignore[union-attr]
    torch.testing.assert_close(found.scores, expected.scores, atol=1e-4, rtol=0)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_threshold": 0.1}, "score_threshold 0.3, which allows 0.3 or more, got 0.1"),
        ({"detections_per_image": 30}, "detections_per_image 20, which allows 20 or less"),
        ({"nms_threshold": 0.4}, "nms_threshold 0.5, .* got 0.4: export it again"),
        ({"temperature": 2.0}, "exported with temperature 1.0, .* got 2.0"),
        ({"nms": "soft"}, "exported with nms hard, .* got soft"),
        ({"score_thresholds": {"b": 0.2}}, "score_threshold 0.3, .* or more, got 0.2"),
        ({"flip_tta": True}, "runs once per image, got flip_tta: leave it out"),
        ({"image_size": 128}, "exported with image_size 64, got 128"),
        ({"precision": "int8"}, "exported with precision float32, got int8"),
        ({"backend": "torch"}, "exported with backend onnx, got torch"),
        ({"calibrate": "x"}, "is exported already: calibrate where it is made"),
        ({"device": "meta"}, "device"),
    ],
)
def test_built_in_options_cannot_be_changed(
    files: dict[str, Path], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(files["onnx"], **{"device": "cpu", **options})


def test_exported_file_has_no_network_outputs(files: dict[str, Path], images: Path) -> None:
    detector = load(files["onnx"], device="cpu")
    with pytest.raises(ConfigError, match="give the run that it was exported from"):
        loss_distribution(detector, images)
    with pytest.raises(ConfigError, match="not the network's own outputs"):
        detector.network(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("same", [True, False], ids=["same network", "another network"])
def test_export_validates_the_file(
    files: dict[str, Path],
    checkpoint: Checkpoint,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    same: bool,
) -> None:
    copy_instead_of_converting(files["onnx"], monkeypatch)  # the file of `checkpoint`
    given = replace(checkpoint, model=copy.deepcopy(checkpoint.model))
    if not same:
        given.model.box_head.last.weight.data.mul_(1.5)
    run = save_checkpoint(tmp_path / "run", given)
    out = tmp_path / "out"
    file = out / "m.onnx"
    code = main(["export", str(run), "--to", "onnx", "--out", str(file), "--images", "2"])
    report = json.loads((out / "m.onnx.report.json").read_text())
    printed = capsys.readouterr()
    assert code == (0 if same else 1)
    assert report["passed"] == same
    assert report["network_size"]["boxes"] > 10
    assert ("does NOT match the network" in printed.out) != same
    assert ("compare the AP with --data" in printed.err) != same
    assert sorted(path.name for path in out.iterdir()) == ["m.onnx", "m.onnx.report.json"]
    found = ["--out", str(tmp_path / "found"), "--format", "json"]
    assert main(["detect", str(file), str(images), "--device", "cpu", *found]) == 0
    assert (tmp_path / "found" / "detections.json").is_file()


def test_export_of_some_classes_detects_these_only(
    checkpoint: Checkpoint, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Any] = []

    def stop(some: Detector, draft: Path, text: str, *, compiled: bool) -> None:
        written[:] = some, json.loads(text)
        raise KeyboardInterrupt

    monkeypatch.setattr("retinanet.exporters.run.export_program", lambda some, *_: some)
    monkeypatch.setattr("retinanet.exporters.run.write_torch", stop)
    with pytest.raises(KeyboardInterrupt):
        export(checkpoint, "torch", out=tmp_path / "m.pt2", classes=["c", "ä"])
    some, text = written
    assert (text["classes"], text["category_ids"]) == (["ä", "c"], [7, 11])
    expected = Detector(checkpoint, device="cpu", precision="float32", classes=["ä", "c"])
    pairs = list(zip(some.detect(images), expected.detect(images), strict=True))
    assert sum(len(own) for own, _ in pairs) > 10
    for own, other in pairs:
        names = [
            [found.name_of(label) for label in found.labels.tolist()] for found in (own, other)
        ]
        assert names[0] == names[1]
        torch.testing.assert_close(own.scores, other.scores, atol=1e-4, rtol=0)
    with pytest.raises(ConfigError, match="unknown class 'x': the 3 classes of the model are"):
        export(checkpoint, "torch", out=tmp_path / "n.pt2", classes=["x"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "onnx", "precision": "fp61"}, "did you mean fp16"),
        ({"to": "onnx", "precision": "int8", "calibrate": "x"}, "int8 is for --to openvino, got"),
        ({"to": "torch", "precision": "fp16"}, "fp16 is for --to openvino"),
        ({"to": "openvino", "precision": "int8"}, "int8 needs calibration images"),
        ({"to": "openvino", "calibrate": "x"}, "are for int8"),
        ({"to": "onnx", "images": 0}, "1 or more, got 0"),
        ({"to": "onnx", "out": "m.pt2"}, "a file for onnx ends in .onnx, got m.pt2"),
        ({"to": "onnx", "tolerance": ["scor=1"]}, "tolerance 'scor=1' is not name=number"),
        ({"to": "onnx", "tolerance": ["box=-1"]}, "tolerance 'box=-1'"),
        ({"to": "onnx", "nms": "soft"}, "has hard NMS, but detect.nms is soft: give nms"),
        ({"to": "onnx", "form": "scores", "flip_tta": True}, "once per image, .* is on: give"),
        ({"to": "onnx", "form": "boxes"}, "form 'boxes' is not one of detections, scores"),
        ({"to": "aotinductor"}, "AOTInductor needs an image_size over 128, got 64"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_options_that_do_not_suit(run: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        export(run, **options)


@pytest.mark.parametrize("name", ["onnx", "openvino", "torch"])
def test_damaged_file_is_an_error(files: dict[str, Path], tmp_path: Path, name: str) -> None:
    file = tmp_path / files[name].name
    with pytest.raises(WeightsError, match="there is no file"):
        load(file)
    content = files[name].read_bytes()
    for damaged in (b"not this", content[: len(content) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(WeightsError, match=file.name):
            load(file)


def with_text(values: dict[str, Any], files: dict[str, Path], file: Path) -> Path:
    """Write a copy of the ONNX file with other values in its text."""
    model = onnx.load(files["onnx"])
    for item in model.metadata_props:
        if item.key == "retinanet":
            item.value = json.dumps(json.loads(item.value) | values)
    onnx.save(model, file)
    return file


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"version": 2}, "version 2; this package reads up to 1: upgrade it"),
        ({"format": "other"}, 'lacks "format": "retinanet export"'),
        ({"form": "masks"}, "form is 'masks', not one of detections, scores"),
        ({"target": "torch"}, "target is 'torch', not one of onnx"),
        ({"classes": []}, "classes: Tuple should have at least 1 item"),
        ({"info": {"detect": {"score_threshold": 7}}}, "info.detect has no thresholds"),
    ],
)
def test_invalid_text_is_an_error(
    files: dict[str, Path], tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(WeightsError, match=message):
        load(with_text(values, files, tmp_path / "m.onnx"))


def test_file_without_text_is_an_error(files: dict[str, Path], tmp_path: Path) -> None:
    model = onnx.load(files["onnx"])
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(WeightsError, match="it is not of retinanet export"):
        load(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    ("missing", "to", "extra"),
    [("onnx", "onnx", "onnx"), ("onnxscript", "onnx", "onnx"), ("openvino",) * 3],
)
def test_missing_extra_is_an_error(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, to: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=rf"{missing} is not installed.*\[{extra}\]"):
        export(run, to, out=tmp_path / f"m{SUFFIXES[to]}")
    assert list(tmp_path.iterdir()) == []


def test_missing_onnxruntime_is_an_error(
    files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"onnxruntime is not installed.*\[onnx\]"):
        load(files["onnx"])


def test_compare_by_hand() -> None:
    first = Detections(
        torch.tensor([[0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60.0]]),
        torch.tensor([0.9, 0.8, 0.305]),
        torch.tensor([0, 1, 0]),
    )
    second = Detections(
        torch.tensor([[20, 20, 30, 31], [0, 0, 10, 10.5], [20, 20, 30, 30.0]]),
        torch.tensor([0.85, 0.7, 0.6]),
        torch.tensor([1, 0, 2]),
    )
    left, right = match(first, second)
    assert sorted(zip(left.tolist(), right.tolist(), strict=True)) == [(0, 1), (1, 0)]
    thresholds: Any = {
        "score_threshold": 0.3,
        "detections_per_image": 20,
        "nms_threshold": 0.5,
        "class_agnostic_nms": False,
    }
    agreement = compare([(first, second)], Tolerance(0.1, 0.6, 0, 0), thresholds)
    # A pair differs by .2 in score, the other by 1 pixel; .305 is at the threshold; class 2 is in
    # `second` only.
    assert (agreement.matched, agreement.beyond) == (2, 2)
    assert (agreement.at_a_threshold, agreement.unmatched) == (1, 1)
    assert agreement.score == pytest.approx(0.2)
    assert agreement.box == pytest.approx(1.0)
    assert agreement.apart == 1.0
    assert TOLERANCES["float32"].override(["score=.5"]).score == 0.5


def test_boxes_without_an_area_are_matched_by_their_corners() -> None:
    boxes = torch.tensor([[4, 0, 4, 9], [0, 5, 7, 5.0]])
    scores, labels = torch.tensor([0.9, 0.8]), torch.zeros(2).long()
    left, right = match(
        Detections(boxes, scores, labels), Detections(boxes.flip(0), scores, labels)
    )
    assert sorted(zip(left.tolist(), right.tolist(), strict=True)) == [(0, 1), (1, 0)]


def test_validation_without_a_detection_fails(
    files: dict[str, Path], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    info = {"detect": {**checkpoint.info["detect"], "score_threshold": 0.9999999}}
    file = with_text({"info": info}, files, tmp_path / "m.onnx")
    detector = Detector(replace(checkpoint, info=info), device="cpu", precision="float32")
    report = validate_file(file, detector, images=2)
    assert (report.network_size.boxes, report.network_size.found) == (0, 0)
    assert not report.passed
    assert "nothing was compared" in report.failures[0]


def test_int8_is_not_calibrated_on_validation_images(
    checkpoint: Any, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[dict[str, Any]] = []

    def read(path: str, split: str, **options: Any) -> Any:
        calls.append({"split": split, **options})
        raise DataError("no labels")

    monkeypatch.setattr("retinanet.exporters.run.read_dataset", read)
    info = {**checkpoint.info, "split": {"seed": 5, "val_fraction": 0.3}}
    detector = Detector(replace(checkpoint, info=info), device="cpu", precision="float32")
    assert len(list(calibration_inputs(detector, str(images)))) == 5
    assert calls == [{"split": "train", "extras": False, "seed": 5, "val_fraction": 0.3}]


@pytest.mark.slow
def test_aotinductor(checkpoint: Checkpoint, tmp_path: Path, images: Path) -> None:
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler")
    model = two_level_network(3, spread=True, norm="frozen")
    for name in ("class_head", "box_head"):
        getattr(model, name).load_state_dict(getattr(checkpoint.model, name).state_dict())
    with torch._inductor.config.patch(QUICK_COMPILE):
        report = export(
            replace(checkpoint, model=model),
            "aotinductor",
            out=tmp_path / "m.pt2",
            image_size=160,
            max_size=256,
            score_threshold=0.05,
            images=3,
        )
    assert report.passed, report.failures
    assert report.network_size.matched == report.network_size.boxes > 10
    assert load(report.file, device="cpu").detect(images)
