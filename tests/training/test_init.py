"""Start from another detector: the network follows it, and classes of the same name keep rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import Stop, messages, stop_at
from torch import Tensor, nn
from torchvision.models import detection

import retinanet as rn
from retinanet import Checkpoint, Dataset, RetinaNet, load_recipe, save_checkpoint
from retinanet.data.synthetic import synthetic_dataset
from retinanet.errors import ConfigError, WeightsError
from retinanet.training.events import Event

SMALL = ("train.steps=1", "train.batch_size=2", "train.precision=float32", "data.workers=0")
NETWORK: dict[str, Any] = {
    "channels": 32,
    "head_depth": 2,
    "head_norm": "group",
    "p6_from": "p5",
    "sizes": (24, 48, 96, 192, 384),
    "aspect_ratios": (0.8, 1.25),
    "rounding": "torchvision",
    "pixel_mean": (1, 2, 3),
    "pixel_std": (4, 5, 6),
}


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dataset]:
    """Images with the classes person, kite and car."""
    folder = tmp_path_factory.mktemp("shared-classes")
    splits = synthetic_dataset(folder, splits={"train": 4, "val": 2}, image_size=64, seed=1)
    return {
        name: replace(split, classes=("person", "kite", "car")) for name, split in splits.items()
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose network differs from the recipe's in every setting it can."""
    torch.manual_seed(0)
    model = RetinaNet(3, backbone="tiny", norm="trained", **NETWORK)
    folder = tmp_path_factory.mktemp("source") / "best"
    return save_checkpoint(folder, Checkpoint(model, ("car", "cat", "human"), (1, 2, 3), 96, 160))


def _train(
    splits: Mapping[str, Dataset], out: Path, *settings: str, recipe: str = "quick", **options: Any
) -> tuple[rn.Checkpoint, list[str]]:
    """Train a step at a rate of nothing; return the checkpoint and the messages."""
    events: list[Event] = []
    settings = (*SMALL, "train.lr=1e-12", *settings)
    rn.train(
        splits, out=out, recipe=recipe, settings=settings, device="cpu", on_event=events.append,
        **options,
    )  # fmt: skip
    return rn.load_checkpoint(out / "last"), messages(events)


def _rows(state: Mapping[str, Tensor], name: str, num_classes: int) -> Tensor:
    """Rows of the class head: (A, K, ...)."""
    return state[name].reshape(-1, num_classes, *state[name].shape[1:])


def test_network_follows_the_checkpoint(
    source: Path, splits: dict[str, Dataset], tmp_path: Path
) -> None:
    trained, told = _train(splits, tmp_path / "run", init=source)
    spec = trained.model.spec
    assert (spec.backbone, spec.norm) == ("tiny", "trained")
    for key, value in NETWORK.items():
        assert getattr(spec, key) == value, key
    assert (trained.image_size, trained.max_size) == (96, 160)
    state, given = trained.model.state_dict(), load_file(source / "model.safetensors")
    for name, value in given.items():
        # Its batch norm is trained, so statistics and counts move.
        if not name.startswith("class_head.last") and "running" not in name and value.ndim:
            torch.testing.assert_close(state[name], value, atol=1e-6, rtol=1e-5)
    rows = _rows(state, "class_head.last.bias", 3)
    theirs = _rows(given, "class_head.last.bias", 3)
    torch.testing.assert_close(rows[:, 2], theirs[:, 0])  # car
    assert any("model.channels=32 (recipe 128)" in line for line in told)
    assert any(
        "class rows loaded: car; classes without rows there: person, kite" in t for t in told
    )
    config = load_recipe(tmp_path / "run" / "config.toml")
    assert (config.model.channels, config.train.init) == (32, str(source))


def test_named_setting_stays_and_its_cost_is_told(
    source: Path, splits: dict[str, Dataset], tmp_path: Path
) -> None:
    trained, told = _train(
        splits, tmp_path / "run", "model.p2=false", "data.image_size=64", "data.max_size=64",
        "model.p6_from=c5", init=source,
    )  # fmt: skip
    assert trained.model.spec.p6_from == "c5"
    assert trained.image_size == 64
    # C5 has 256 channels and P5 32: only the weight of P6 differs.
    (line,) = (line for line in told if "lost" in line)
    assert "tensors loaded (lost: 1 of pyramid); class rows" in line


def test_mostly_lost_weights_are_an_error_unless_partial(
    source: Path, splits: dict[str, Dataset], tmp_path: Path
) -> None:
    settings = ("model.channels=16", "data.image_size=64", "data.max_size=64")
    with pytest.raises(WeightsError, match=r"loaded \(lost: 16 of pyramid, .*--init-partial"):
        _train(splits, tmp_path / "run", *settings, init=source)
    with pytest.raises(ConfigError, match="give --backbone tiny"):
        _train(splits, tmp_path / "run", "model.backbone=resnet18", init=source)
    trained, _ = _train(splits, tmp_path / "run", *settings, "train.init_partial=true", init=source)
    assert trained.model.spec.channels == 16


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_class_map_renames_classes(
    suffix: str, source: Path, splits: dict[str, Dataset], tmp_path: Path
) -> None:
    file = tmp_path / f"map.{suffix}"
    file.write_text('{"person": "human"}' if suffix == "json" else 'person = "human"')
    trained, told = _train(splits, tmp_path / "run", f"train.class_map={file}", init=source)
    rows = _rows(trained.model.state_dict(), "class_head.last.weight", 3)
    theirs = _rows(load_file(source / "model.safetensors"), "class_head.last.weight", 3)
    torch.testing.assert_close(rows[:, [0, 2]], theirs[:, [2, 0]], atol=1e-6, rtol=1e-5)
    assert any("class rows loaded: person, car" in line for line in told)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("people = 'human'", "'people' is no class of the data; did you mean person"),
        ("person = 'humans'", "'humans' is no class of the checkpoint; did you mean human"),
        ("person = 3", "is no table of names"),
        ("person: human", "cannot be read as TOML or JSON"),
    ],
)
def test_wrong_class_map_is_named(
    text: str, message: str, source: Path, splits: dict[str, Dataset], tmp_path: Path
) -> None:
    (tmp_path / "map.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        _train(splits, tmp_path / "run", f"train.class_map={tmp_path}/map.toml", init=source)


def test_resumed_run_needs_no_source(
    source: Path, splits: dict[str, Dataset], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    save_checkpoint(copy, rn.load_checkpoint(source))
    options: dict[str, Any] = {"out": tmp_path / "run", "init": copy, "device": "cpu"}
    settings = [*SMALL, "train.steps=2"]
    with pytest.raises(Stop):
        rn.train(splits, settings=settings, on_event=stop_at(1), **options)
    for file in copy.iterdir():
        file.unlink()
    assert rn.train(splits, settings=settings, **options).step == 2
    with pytest.raises(ConfigError, match=r"a run with train.init = '.*copy', and now it is None"):
        rn.train(splits, settings=settings, **options | {"init": None})


# --- COCO weights ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def coco_state() -> dict[str, Tensor]:
    """Random weights with the names and shapes of the published file."""
    torch.manual_seed(0)
    model = detection.retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None)
    for name, part in model.named_modules():
        if isinstance(part, nn.BatchNorm2d) and name.endswith("bn3"):
            nn.init.constant_(part.weight, 0.2)  # a residual network in eval mode grows otherwise
    head = model.head.classification_head.cls_logits
    nn.init.normal_(head.weight, std=0.01)
    nn.init.uniform_(head.bias, -5, -2)
    return dict(model.state_dict())


@pytest.fixture
def coco(coco_state: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the weights where torchvision's download would leave them."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    url = detection.RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1.url
    file = tmp_path / "torch" / "hub" / "checkpoints" / Path(url).name
    file.parent.mkdir(parents=True)
    torch.save(coco_state, file)
    return file


def test_finetune_from_coco_and_detect(
    coco: Path, coco_state: dict[str, Tensor], splits: dict[str, Dataset], tmp_path: Path
) -> None:
    settings = [*SMALL, "train.tune_detection=false", "data.image_size=64", "data.max_size=64"]
    options: dict[str, Any] = {"out": tmp_path / "run", "recipe": "finetune", "device": "cpu"}
    events: list[Event] = []

    def stop_at_the_first_step(event: Event) -> None:
        events.append(event)
        stop_at(1)(event)

    with pytest.raises(Stop):
        rn.train(splits, settings=settings, on_event=stop_at_the_first_step, **options)

    assert any("from coco: 307 of 307 tensors loaded" in line for line in messages(events))
    state = load_file(tmp_path / "run" / "last" / "model.safetensors")  # before the first step
    for ours, theirs in (("weight", "weight"), ("bias", "bias")):
        rows = _rows(state, f"class_head.last.{ours}", 3)
        published = _rows(coco_state, f"head.classification_head.cls_logits.{theirs}", 91)
        assert torch.equal(rows, published[:, [1, 38, 3]])  # COCO's ids of person, kite and car
    key = "backbone.body.layer4.2.conv3.weight"
    assert torch.equal(state[key.replace("body.", "")], coco_state[key])

    coco.unlink()  # a resumed run needs no weights but its own
    run = rn.train(splits, settings=settings, **options)
    assert run.step == 1
    detector = rn.load(run.folder, device="cpu", score_threshold=0.001)
    found = detector.detect(splits["val"].images[0].path)
    assert len(found) > 0
    assert torch.isfinite(torch.as_tensor(found.boxes)).all()
    text = json.loads((tmp_path / "run" / "best" / "model.json").read_text())
    assert (text["network"]["channels"], text["network"]["head_norm"]) == (256, "group")
    assert text["anchors"]["rounding"] == "torchvision"


def test_p2_on_top_of_coco_keeps_the_other_levels(coco: Path) -> None:
    given = rn.load_checkpoint("coco")
    model = RetinaNet(1, given.model.spec, p2=True, sizes=None)
    report = rn.model.transfer_weights(model, ("person",), given)
    assert report.lost == tuple(
        f"pyramid.{part}.0.{leaf}" for part in ("lateral", "output") for leaf in ("weight", "bias")
    )
    torch.testing.assert_close(
        model.pyramid.lateral[1].weight, given.model.pyramid.lateral[0].weight
    )
