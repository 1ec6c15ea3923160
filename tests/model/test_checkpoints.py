"""Checkpoints: written whole, read without running code, and started from with other classes."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from retinanet.errors import WeightsError
from retinanet.model import (
    Checkpoint,
    RetinaNet,
    load_checkpoint,
    save_checkpoint,
    transfer_weights,
)


def _model(num_classes: int = 3, **settings: Any) -> RetinaNet:
    plain: dict[str, Any] = {"backbone": "mobilenet_v2", "channels": 16, "head_depth": 1}
    return RetinaNet(**{**plain, **settings, "num_classes": num_classes})


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    torch.manual_seed(0)
    model = _model(pixel_mean=(1.5, 2, 3), p2=True, sizes=(10, 20, 40, 80, 160, 320))
    info = {"detect": {"score_threshold": 0.1}, "step": 7}
    return Checkpoint(model, ("red  cell", "Zelle β", "plate"), (5, 1, 90), 416, 672, info)


@pytest.fixture
def folder(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path / "run" / "best", checkpoint)


def _images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, 3, 64, 64), generator=generator, dtype=torch.uint8)


def test_there_and_back(checkpoint: Checkpoint, folder: Path) -> None:
    again = load_checkpoint(folder)
    assert again.classes == checkpoint.classes
    assert again.category_ids == checkpoint.category_ids
    assert (again.image_size, again.max_size) == (416, 672)
    assert again.info == checkpoint.info
    assert again.model.spec == checkpoint.model.spec
    assert again.model.anchors == checkpoint.model.anchors
    assert not again.model.training
    for key, value in checkpoint.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[key], value), key
    with torch.no_grad():
        torch.testing.assert_close(
            again.model(_images()), checkpoint.model.eval()(_images()), atol=1e-6, rtol=1e-5
        )


def test_the_loaded_model_can_be_trained(folder: Path) -> None:
    model = load_checkpoint(folder).model.train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        n for n, p in RetinaNet(model.num_classes, model.spec).named_parameters() if p.requires_grad
    }
    sum(level.float().sum() for level in model(_images()).logits).backward()
    assert model.class_head.last.weight.grad is not None


def test_the_text_is_readable(folder: Path) -> None:
    text = (folder / "model.json").read_text("utf-8")
    assert '"classes": ["red  cell", "Zelle β", "plate"]' in text
    assert '"category_ids": [5, 1, 90]' in text
    values = json.loads(text)
    assert values["classes"][0] == "red  cell"
    assert values["version"] == 1
    assert values["preprocessing"] == {
        "image_size": 416,
        "max_size": 672,
        "pixel_mean": [1.5, 2.0, 3.0],
        "pixel_std": [58.395, 57.12, 57.375],
    }
    assert values["anchors"]["sizes"] == [10, 20, 40, 80, 160, 320]
    assert sorted(file.name for file in folder.iterdir()) == ["model.json", "model.safetensors"]


@pytest.mark.parametrize("way", ["run", "best", "best/model.safetensors", "best/model.json"])
def test_ways_to_name_it(folder: Path, way: str) -> None:
    path = folder.parent if way == "run" else folder.parent / way
    assert load_checkpoint(path).category_ids == (5, 1, 90)


def test_a_run_gives_its_best_else_its_last(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last", replace(checkpoint, info={"which": "last"}))
    assert load_checkpoint(tmp_path).info == {"which": "last"}
    save_checkpoint(tmp_path / "best", replace(checkpoint, info={"which": "best"}))
    assert load_checkpoint(tmp_path).info == {"which": "best"}


def test_half_precision_weights_are_read_as_float32(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
    save_file(half, folder / "model.safetensors")
    model = load_checkpoint(folder).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model(_images())


def test_a_save_over_another_replaces_it(checkpoint: Checkpoint, folder: Path) -> None:
    names = ("x [y],  {z}", 'a "quote"', "two\n  lines ]")  # as JSON is reformatted
    save_checkpoint(folder, replace(checkpoint, info={"step": 8}, classes=names))
    again = load_checkpoint(folder)
    assert (again.info, again.classes) == ({"step": 8}, names)
    assert [one.name for one in folder.parent.iterdir()] == ["best"]


def test_a_folder_that_is_no_checkpoint_is_not_overwritten(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(WeightsError, match="is no checkpoint: choose another"):
        save_checkpoint(tmp_path, checkpoint)
    with pytest.raises(WeightsError, match="is no checkpoint: choose another"):
        save_checkpoint(tmp_path / "thesis.tex", checkpoint)
    with pytest.raises(WeightsError, match="cannot write the checkpoint"):
        save_checkpoint(tmp_path / "thesis.tex" / "best", checkpoint)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_checkpoint_of_a_killed_save_is_read(checkpoint: Checkpoint, folder: Path) -> None:
    folder.rename(folder.with_name(".best.ready"))  # killed before its last rename
    assert load_checkpoint(folder.parent).info["step"] == 7
    save_checkpoint(folder, replace(checkpoint, info={"step": 10}))
    assert load_checkpoint(folder.parent).info["step"] == 10
    assert [path.name for path in folder.parent.iterdir()] == ["best"]


def _edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / "model.json").read_text("utf-8"))
        change(values)
        (folder / "model.json").write_text(json.dumps(values), "utf-8")

    return edit


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.json").unlink(), "incomplete checkpoint .*: it has no model.json"),
        (
            lambda f: (f / "model.safetensors").unlink(),
            "incomplete checkpoint .* no model.safetensors",
        ),
        (lambda f: (f / "model.json").write_text("{"), "model.json is not JSON"),
        (lambda f: (f / "model.json").write_text("{}"), 'lacks "format"'),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "is no safetensors file"),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                (f / "model.safetensors").read_bytes()[:-10]
            ),
            "is no safetensors file",
        ),
        (_edit(lambda v: v.update(version=99)), "version 99; this package reads up to 1: upgrade"),
        (_edit(lambda v: v.pop("network")), "network: Field required"),
        (_edit(lambda v: v.update(info=[])), "info: Input should be an object"),
        (_edit(lambda v: v["classes"].pop()), "2 classes and 3 category_ids differ"),
        (_edit(lambda v: v.update(classes="abc")), "classes: Input should be a valid"),
        (_edit(lambda v: v.update(category_ids=[1, 2, "3"])), "category_ids: .*integer .got '3'"),
        (_edit(lambda v: v.update(category_ids=[1, 2, True])), "category_ids: .*integer .got True"),
        (_edit(lambda v: v["network"].update(evil=1)), "unknown setting 'evil'"),
        (_edit(lambda v: v["network"].pop("prior")), "missing or unknown: prior"),
        (_edit(lambda v: v["network"].update(channels="16")), "channels: .*integer .got '16'"),
        (_edit(lambda v: v["network"].update(channels=True)), "channels: .*integer .got True"),
        (_edit(lambda v: v["network"].update(backbone="os.system")), "no backbone 'os.system'"),
        (
            _edit(lambda v: v["network"].update(norm="x")),
            "invalid model configuration: norm: .*got 'x'",
        ),
        (_edit(lambda v: v["network"].update(channels=10**7)), "do not fit the network"),
        (_edit(lambda v: v["network"].update(head_depth=2)), r"missing .class_head.tower.1.0"),
        (_edit(lambda v: v["anchors"].update(rounding="up")), "rounding"),
        (_edit(lambda v: v["anchors"].update(sizes=[1, 2])), "one size per level"),
        (_edit(lambda v: v["anchors"].update(scales=[])), "scales .. must be one or more"),
        (
            _edit(lambda v: v["anchors"].update(scales=[1.0])),
            r"last.weight is 27x16x3x3, not 9x16x3x3",
        ),
        (
            _edit(lambda v: v["preprocessing"].update(image_size=0)),
            "preprocessing.image_size: .*greater than 0",
        ),
        (_edit(lambda v: v["preprocessing"].update(pixel_std=[1, 1])), "pixel_std"),
        (
            _edit(lambda v: v.update(classes=["a", "b"], category_ids=[1, 2])),
            r"2 of another shape .class_head.last.weight is 27x16x3x3, not 18x1",
        ),
        (_weights(lambda s: s.pop("pyramid.p6.bias")), r"1 missing .pyramid.p6.bias"),
        (_weights(lambda s: s.update(extra=torch.zeros(1))), r"1 unknown .extra"),
    ],
)
def test_damage_is_named(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(WeightsError, match=message) as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_places_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="there is no checkpoint nowhere: give a run"):
        load_checkpoint("nowhere")
    with pytest.raises(WeightsError, match=r"holds no model.json, and neither do"):
        load_checkpoint(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"give the folder that holds .* alone are --backbone-w"):
        load_checkpoint(tmp_path / "weights.bin")
    with pytest.raises(WeightsError, match="there is no such file"):
        load_checkpoint(tmp_path / "weights.pth")


@pytest.mark.parametrize("setting", ["p7_relu", "stride_in_1x1", "head"])
def test_checkpoint_without_a_later_setting_has_its_default(folder: Path, setting: str) -> None:
    _edit(lambda values: values["network"].pop(setting))(folder)
    spec = load_checkpoint(folder).model.spec
    assert getattr(spec, setting) == getattr(type(spec)(), setting)


def test_names_ids_and_model_must_agree(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match="2 class names, 3 category ids, and a model of 3"):
        replace(checkpoint, classes=("a", "b"))


def _rows(model: RetinaNet) -> torch.Tensor:
    """(A, K, channels, 3, 3)."""
    weight = model.class_head.last.weight.detach()
    return weight.reshape(-1, model.num_classes, *weight.shape[1:])


def test_transfer_keeps_rows_of_classes_of_the_same_name() -> None:
    torch.manual_seed(0)
    source = Checkpoint(_model(3), ("cat", "dog", "cow"), (1, 2, 3), 64, 64)
    model = _model(4)
    before = _rows(model).clone()
    classes = ("dog", "hen", "cat", "ox")

    report = transfer_weights(model, classes, source)

    assert report.rows == ("dog", "cat")
    torch.testing.assert_close(_rows(model)[:, 0], _rows(source.model)[:, 1])
    torch.testing.assert_close(_rows(model)[:, 2], _rows(source.model)[:, 0])
    torch.testing.assert_close(_rows(model)[:, [1, 3]], before[:, [1, 3]])
    for name, value in model.state_dict().items():
        if not name.startswith("class_head.last"):
            assert torch.equal(value, source.model.state_dict()[name]), name
            assert name in report.loaded
    assert report.lost == ()


def test_transfer_lists_what_does_not_fit() -> None:
    torch.manual_seed(0)
    source = Checkpoint(_model(2, head_depth=2), ("a", "b"), (1, 2), 64, 64)
    model = _model(2, channels=24, head_norm="group", pixel_mean=(1, 1, 1))
    report = transfer_weights(model, ("a", "b"), source)
    assert report.rows == ()
    assert {
        "pyramid.p7.weight",  # of another shape
        "class_head.tower.0.1.weight",  # which the source lacks
        "class_head.tower.1.0.weight",  # which the model lacks
        "class_head.last.weight",  # of other channels
    } <= {*report.lost}
    assert "backbone.features.0.0.weight" in report.loaded
    assert len(report.loaded) + len(report.lost) >= len(model.state_dict())


def test_transfer_with_other_anchors_leaves_the_last_convolutions() -> None:
    torch.manual_seed(0)
    source = Checkpoint(_model(2), ("a", "b"), (1, 2), 64, 64)
    model = _model(2, aspect_ratios=(0.2, 1.0, 5.0))
    before = model.box_head.last.weight.clone()
    report = transfer_weights(model, ("a", "b"), source)
    assert report.rows == ()
    assert torch.equal(model.box_head.last.weight, before)
    assert "class_head.tower.0.0.weight" in report.loaded


@pytest.mark.parametrize(
    ("target", "given", "which"),
    [(("a", "a"), ("a", "b"), "the data"), (("a", "b"), ("b", "b"), "the source")],
)
def test_transfer_with_two_classes_of_one_name_raises(
    target: tuple[str, ...], given: tuple[str, ...], which: str
) -> None:
    source = Checkpoint(_model(2), given, (0, 1), 64, 96)
    with pytest.raises(WeightsError, match=f"{which} has several classes named"):
        transfer_weights(_model(2), target, source)


def test_transfer_of_nothing_is_an_error() -> None:
    source = Checkpoint(_model(1, backbone="resnet18", norm="group"), ("a",), (1,), 64, 64)
    model = _model(1, channels=24, head_norm="group", norm="group")
    with pytest.raises(WeightsError, match="nothing of the source fits"):
        transfer_weights(model, ("a",), source)
    with pytest.raises(ValueError, match="2 class names for a model of 1"):
        transfer_weights(model, ("a", "b"), source)


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
@pytest.mark.parametrize("name", ["model.safetensors", "model.json"])
def test_load_checkpoint_without_permission_says_so(name: str) -> None:
    with tempfile.TemporaryDirectory() as made:  # pytest's own folders are closed to other users
        folder = Path(made)
        folder.chmod(0o755)
        for file in ("model.safetensors", "model.json"):
            (folder / file).write_text("{}")
        (folder / name).chmod(0)
        user = os.geteuid()
        if user == 0:  # who may read everything
            os.seteuid(65534)
        try:
            with pytest.raises(WeightsError, match=f"{name} cannot be read: Permission denied"):
                load_checkpoint(folder)
        finally:
            os.seteuid(user)
