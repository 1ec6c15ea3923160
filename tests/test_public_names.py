"""The names that users write stay; asking for one of them imports only then."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import retinanet as rn

# A name taken from this list breaks somebody's program: that wants a major version.
PUBLIC = [
    "AnchorSpec",
    "BACKGROUND",
    "Checkpoint",
    "ConfigError",
    "DataError",
    "Dataset",
    "Detections",
    "Detector",
    "Failure",
    "FocalLoss",
    "IGNORED",
    "ImageDetections",
    "ImageError",
    "LossSettings",
    "Losses",
    "Metrics",
    "MissingExtraError",
    "ModelSpec",
    "NonFiniteLossError",
    "Outputs",
    "Recipe",
    "RetinaNet",
    "RetinaNetError",
    "Targets",
    "Transform",
    "WeightsError",
    "__version__",
    "anchor_labels",
    "anchor_spec",
    "box_loss",
    "distribution_focal_loss",
    "build_retinanet",
    "check_datasets",
    "clip_boxes",
    "cross_entropy",
    "decode_boxes",
    "detection_losses",
    "draw_boxes",
    "encode_boxes",
    "evaluate",
    "evaluate_detections",
    "export",
    "feature_sizes",
    "focal_loss",
    "focal_loss_star",
    "hinge_loss",
    "level_anchors",
    "load",
    "load_checkpoint",
    "load_recipe",
    "match_anchors",
    "pad_targets",
    "quality_focal_loss",
    "read_dataset",
    "read_splits",
    "save_checkpoint",
    "softmax_focal_loss",
    "synthetic_dataset",
    "train",
    "varifocal_loss",
]


def test_public_names() -> None:
    assert sorted(rn.__all__) == sorted(PUBLIC)


def test_every_name_is_there() -> None:
    assert [name for name in PUBLIC if getattr(rn, name, None) is None] == []
    assert set(PUBLIC) <= {*dir(rn)}


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(rn.__file__).read_text("utf-8"))
    shown = {
        alias.asname: f"{node.module}.{alias.name}"
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    homes = {name: f"{home}.{name}" for home, names in rn._HOMES.items() for name in names}
    assert shown == homes


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="'retinanet' has no attribute 'focal_los'"):
        rn.focal_los  # noqa: B018


def test_import_alone_is_light() -> None:
    code = "import sys, retinanet; sys.exit(bool({'torch', 'numpy'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_functions_show_their_signature() -> None:
    assert list(inspect.signature(rn.train).parameters)[:2] == ["data", "out"]
    assert "data" in inspect.signature(rn.evaluate).parameters
    assert "to" in inspect.signature(rn.export).parameters


def test_functions_stay_callable_after_their_modules_are_imported() -> None:
    for module in ("evaluation.run", "training.trainer", "exporters.run"):
        import_module(f"retinanet.{module}")
    assert all(map(callable, (rn.train, rn.evaluate, rn.export)))
