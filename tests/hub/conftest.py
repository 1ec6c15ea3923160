"""A stand-in for the hub, and a run whose records name the machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from stand_in import HOME, HOST, TOKEN, URL, Hub, default_client

from retinanet.config import load_recipe, to_toml
from retinanet.data import digest, read_splits, usable
from retinanet.data.synthetic import synthetic_dataset
from retinanet.hub import prepare
from retinanet.model.checkpoint import Checkpoint, save_checkpoint
from retinanet.model.retinanet import RetinaNet


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty hub where ``me`` may write, with an own cache and without a token."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    hub = Hub(tokens={TOKEN: "me"})
    monkeypatch.setattr(constants, "ENDPOINT", URL)
    template = URL + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.set_client_factory(hub.client)
    yield hub
    huggingface_hub.set_client_factory(default_client)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small images in the splits train and val."""
    folder = tmp_path_factory.mktemp("data") / "shapes"
    synthetic_dataset(
        folder, splits={"train": 4, "val": 3}, image_size=64, objects=(1, 3), object_size=(16, 24)
    )
    return folder


@pytest.fixture
def run(tmp_path: Path, trained: Path) -> Path:
    """A copy of the run, which a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "runs" / "shapes"))


@pytest.fixture(scope="session")
def prepared(trained: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a push with the data; tests do not change them."""
    folder = tmp_path_factory.mktemp("prepared") / "out"
    prepare(trained, "me/shapes", folder, data=data, device="cpu")
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run folder of an untrained network."""
    splits = read_splits(data)
    classes = splits["train"].classes
    torch.manual_seed(0)
    model = RetinaNet(num_classes=len(classes), backbone="mobilenet_v2", channels=16, head_depth=1)
    checkpoint = Checkpoint(
        model.eval(),
        classes,
        splits["train"].category_ids,
        64,
        96,
        {
            "detect": {"score_threshold": 0.001, "detections_per_image": 20},
            "recipe": f"{HOME}/my.toml",
            "step": 7,
            "split": {"seed": 0, "val_fraction": 0.2},
        },
    )
    folder = tmp_path_factory.mktemp("runs") / "shapes"
    save_checkpoint(folder / "best", checkpoint)
    recipe = load_recipe("paper_quick", [f"model.backbone_weights={HOME}/backbone.safetensors"])
    (folder / "config.toml").write_text(to_toml(recipe))
    trained = digest(usable(splits["train"])[0]) + digest(splits["val"])
    record = {
        "versions": {"retinanet": "0.1.0", "torch": "2.7"},
        "platform": f"Linux-6.1 {HOST}",
        "device": "cpu",
        "device_name": "",
        "threads": 3,
        "data": f"{HOME}/data/shapes",
        "data_digest": trained,
        "split_origin": "seed 0, 20% for validation",
        "images": {name: len(split) for name, split in splits.items()},
        "steps": 9,
    }
    (folder / "run.json").write_text(json.dumps(record))
    per_class = [
        {"name": name, "objects": 40, "ap": 0.1, "ap50": 0.2, "ap75": None, "ar": 0.3}
        for name in classes
    ]
    metrics = {
        "ap": 0.1234567,
        "ap50": 0.25,
        "ap75": 0.125,
        "ap_small": 0.01,
        "ap_medium": None,
        "images": 3,
        "objects": 6,
        "per_class": per_class,
        "best_score": 0.41,
        "images_per_second": 7.25,
        "calibration": {"expected_error": 0.31},
        "note": f"evaluated on {HOME}/data/shapes/val.json",
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder
