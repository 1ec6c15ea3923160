"""Training on tiles, end to end on a tiny synthetic set of images of 64 x 64."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import Stop, assert_same_weights, messages, stop_at, tiny_recipe

from retinanet.cli.training import describe_start
from retinanet.data import digest, read_splits
from retinanet.data.dataset import Dataset
from retinanet.data.tiling import tile_dataset
from retinanet.errors import DataError
from retinanet.evaluation.run import evaluate
from retinanet.inference.detector import load
from retinanet.model.checkpoint import load_checkpoint
from retinanet.training.data import read_training_data
from retinanet.training.events import Event, ignore
from retinanet.training.trainer import train

# 3 x 3 tiles per image: from 0, 16 and 32.
TILES = ("data.tile=32", "data.tile_overlap=0.3", "train.steps=4", "train.validate_every=2")


def test_train_on_tiles_resumes_and_evaluates_whole_images(tiny_data: Path, tmp_path: Path) -> None:
    settings = ("train.save_every=1", "detect.score_threshold=0.001", "train.tune_detection=true")
    recipe = tiny_recipe(*TILES, *settings)  # it is not tuned on whole images
    events: list[Event] = []
    whole = train(recipe, tiny_data, tmp_path / "whole", device="cpu", on_event=events.append)
    with pytest.raises(Stop):
        train(recipe, tiny_data, tmp_path / "run", device="cpu", on_event=stop_at(3))
    run = train(recipe, tiny_data, tmp_path / "run", device="cpu")
    assert_same_weights(whole.folder, run.folder)
    (start,) = (event.data for event in events if event.kind == "start")
    assert (start["images"], start["tiles"]) == (12, 12 * 9)
    assert "training on 108 tiles of 12 images" in describe_start("start", start)
    assert "train: 108 tiles of 32 pixels and smaller images" in start["data"][-1]
    info = json.loads((run.folder / "run.json").read_text())
    splits = read_splits(tiny_data, extras=False)
    assert info["images"] == {"train": 12, "val": 4}
    assert info["data_digest"] == digest(splits["train"]) + digest(splits["val"])
    checkpoint = load_checkpoint(run.folder / "best")
    assert checkpoint.info["tile"] == {"side": 32, "overlap": 0.3}
    assert checkpoint.info["image_side"] == 32
    # Validation is of whole images, by tiles, as a later evaluation by default.
    found = evaluate(run.folder / "best", tiny_data, device="cpu", precision="float32")
    plain = evaluate(run.folder / "best", tiny_data, device="cpu", precision="float32", tile="none")
    assert (found.images, found.loss) == (4, None)
    stored = json.loads((run.folder / "metrics.json").read_text())
    assert found.ap == pytest.approx(stored["ap"], abs=1e-9)
    assert found.detections == stored["detections"]
    assert found.detections != plain.detections > 0
    assert plain.loss is not None
    assert found.ap == pytest.approx(run.best_ap, abs=1e-9)
    # A detector uses the tiles too.
    detector = load(run.folder, device="cpu", precision="float32", score_threshold=0.001)
    image = splits["val"].images[0].path
    boxes = [
        detector.detect(image, **tiles).boxes for tiles in ({}, {"tile": 32}, {"tile": "none"})
    ]  # type: ignore[union-attr, arg-type]
    assert torch.equal(boxes[0], boxes[1])
    assert boxes[0].shape != boxes[2].shape


def test_training_data_of_tiles(tiny_data: Path) -> None:
    data = read_training_data(tiny_data, tiny_recipe(*TILES), ignore)
    assert (len(data.train), len(data.train_images), data.num_images["train"]) == (108, 12, 12)
    assert data.train.images == tile_dataset(data.train_images, 32, 0.3).images
    assert data.val is not None
    assert all(image.window is None for image in data.val.images)
    pixels = np.zeros((128, 128, 3), np.uint8)  # a tile shows a sixteenth of the object
    large = Dataset.from_arrays([pixels], [[(0, 0, 128, 128)]], [[0]], ["a"])
    with pytest.raises(DataError, match="no tile of 32 pixels has an object to train on"):
        read_training_data({"train": large}, tiny_recipe("data.tile=32"), ignore)


def test_unreadable_image_of_many_tiles_is_named_once(tiny_data: Path, tmp_path: Path) -> None:
    splits = read_splits(tiny_data)
    broken = tmp_path / "broken.png"
    broken.write_bytes(splits["train"].images[0].path.read_bytes()[:200])
    first, *others = splits["train"].images
    images = (replace(first, path=broken), *others)
    data = splits | {"train": replace(splits["train"], images=images)}
    events: list[Event] = []
    recipe = tiny_recipe(*TILES, "train.steps=27", "data.empty_tiles=1")
    del data["val"]
    train(recipe, data, tmp_path / "run", device="cpu", on_event=events.append)
    assert sum("broken.png" in text for text in messages(events)) == 1
    assert len((tmp_path / "run" / "unreadable.jsonl").read_text().splitlines()) == 1
