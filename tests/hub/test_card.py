"""The model card: the hub's schema, the run's metrics, and limits that follow from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from retinanet.hub import prepare
from retinanet.model.checkpoint import load_checkpoint, save_checkpoint

hub = pytest.importorskip("huggingface_hub")

NAME = "me/shapes"


def card(run: Path, out: Path, **options: Any) -> str:
    prepare(run, NAME, out, device="cpu", **options)
    return (out / "README.md").read_text("utf-8")


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_card_yaml_follows_the_hubs_schema(run: Path, tmp_path: Path) -> None:
    text = card(run, tmp_path / "out", license="apache-2.0", dataset="me/shapes-data")
    data = hub.ModelCard(text).data
    assert (data.library_name, data.pipeline_tag) == ("retinanet", "object-detection")
    assert (data.license, data.datasets) == ("apache-2.0", ["me/shapes-data"])
    assert "mobilenet-v2" in data.tags
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    assert values == {"map": 0.1235, "map_50": 0.25, "map_75": 0.125}
    for result in data.eval_results:
        assert (result.task_type, result.dataset_split) == ("object-detection", "val")
        assert (result.dataset_type, result.dataset_name) == ("me/shapes-data", "shapes")
    head = yaml.safe_load(card(run, tmp_path / "bare").split("---")[1])
    assert "license" not in head
    assert "datasets" not in head


def test_card_of_a_run_has_metrics_data_training_and_speed(prepared: Path) -> None:
    text = (prepared / "README.md").read_text("utf-8")
    for line in (
        "# shapes",
        'detector = rn.load("hf://me/shapes")',
        "| mean AP over IoU .50 to .95 and classes | 0.123 |",
        "| AP of objects from 32² to 96² | - |",
        "4 images in `train`, 3 images in `val` (seed 0, 20% for validation).",
        "9 steps of 8 images (the weights are those after step 7, the best on `val`)",
        "Loss: focal (alpha 0.25, gamma 2) for classes, smooth_l1 for boxes.",
        "backbone weights backbone.safetensors",
        "Made with retinanet 0.1.0, torch 2.7",
        "detections of a score of at least 0.41",
        "(example_3.jpg)",
    ):
        assert line in text, line


def test_limits_follow_from_the_numbers_of_the_run(run: Path, tmp_path: Path) -> None:
    text = card(run, tmp_path / "few").partition("## Limits")[2]
    for words in (
        "trained on only 4 images",
        "there was no test set",
        "An AP of 0.123 is weak",
        "The validation split is random: where several images show one scene",
        "Classes with too few objects for a reliable AP:",
    ):
        assert words in text, words
    many = [{"name": "x", "objects": 100, "ap": 0.5}]
    change(run / "metrics.json", ap=0.2, per_class=many)
    change(run / "run.json", images={"train": 1000, "val": 9}, split_origin="the format's own")
    text = card(run, tmp_path / "many").partition("## Limits")[2]
    assert text.count("\n- ") == 2
    assert "It was not tested on images of other kinds than those that it was trained on." in text


def test_card_of_a_checkpoint_alone_states_what_is_unknown(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    (run / "best").rename(alone)
    text = card(alone, tmp_path / "out")
    assert "This model was not evaluated on labelled images." in text
    assert "Not recorded with this checkpoint." in text
    assert "Its accuracy is unknown." in text
    assert "model-index" not in text
    files = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert files == ["README.md", "model.json", "model.safetensors"]


def test_card_of_the_last_weights_has_no_metrics_of_the_best(run: Path, tmp_path: Path) -> None:
    (run / "best").rename(run / "last")
    assert "was not evaluated" in card(run, tmp_path / "out")


def test_class_names_are_escaped(run: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(run)
    names = ("a|b", "<script>", "![x](http://x)", *loaded.classes[3:])
    names = names[: len(loaded.classes)]
    save_checkpoint(run / "best", replace(loaded, classes=names))
    rows = [{"name": name, "objects": 5, "ap": 0.5} for name in names]
    change(run / "metrics.json", per_class=rows)
    text = card(run, tmp_path / "out")
    assert "| a\\|b | 5 | 0.500 |" in text
    assert "\\<script\\>" in text
    assert "![x]" not in text.replace("\\![x", "")


def test_a_class_called_like_a_path_keeps_its_name(run: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(run)
    names = ("/m/01g317", *loaded.classes[1:])  # as in Open Images
    save_checkpoint(run / "best", replace(loaded, classes=names))
    change(run / "metrics.json", per_class=[{"name": names[0], "objects": 5, "ap": 0.5}])
    assert "| /m/01g317 | 5 | 0.500 |" in card(run, tmp_path / "out")
    (shown,) = json.loads((tmp_path / "out" / "metrics.json").read_text("utf-8"))["per_class"]
    assert shown["name"] == names[0]
