"""Boxes as distributions over the distances of their sides (``box_bins``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import retinanet as rn
from retinanet.model.checkpoint import transfer_weights
from retinanet.model.fused import fused_copy
from tiny_backbone import tiny_network, two_level_network

BINS = 16
IMAGES = torch.randint(
    0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


class OneByOne(nn.Conv2d):
    """A head of the user."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__(channels, outputs, 1)


def slow_deltas(level: np.ndarray, row: int, column: int, anchor: int) -> list[float]:
    """Convert the logits of one anchor of (channels, H, W) by plain loops."""
    distances = []
    for side in range(4):
        first = (anchor * 4 + side) * (BINS + 1)
        logits = level[first : first + BINS + 1, row, column].astype(np.float64)
        p = np.exp(logits - logits.max())
        distances.append(sum(i * value for i, value in enumerate(p / p.sum())))
    left, top, right, bottom = distances
    sides = (left + right) / 4, (top + bottom) / 4
    return [(right - left) / 8, (bottom - top) / 8, *np.log(sides).tolist()]


def test_deltas_are_those_of_the_expected_distances() -> None:
    model = tiny_network(3, spread=True, box_bins=BINS)
    outputs = model(IMAGES)
    for level, (deltas, logits) in enumerate(
        zip(outputs.deltas, outputs.distributions, strict=True)
    ):
        assert deltas.shape[1] == 36
        assert logits.shape[1] == 36 * (BINS + 1)
        row, column, anchor = logits.shape[2] - 1, 0, (4 * level) % 9
        expected = slow_deltas(logits[1].detach().numpy(), row, column, anchor)
        given = deltas[1, anchor * 4 : anchor * 4 + 4, row, column].tolist()
        assert given == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("mode", [True, False])
def test_outputs_are_the_same_in_both_modes_and_begin_at_the_anchors(mode: bool) -> None:
    outputs = tiny_network(2, box_bins=BINS).train(mode)(IMAGES)
    assert len(outputs.distributions) == len(outputs.deltas) == 5
    assert max(float(level.detach().abs().max()) for level in outputs.deltas) < 0.1
    assert tiny_network(2).train(mode)(IMAGES).distributions == ()


@pytest.mark.parametrize("bins", [4, 7, 16])
def test_boxes_begin_at_the_anchors_with_any_number_of_bins(bins: int) -> None:
    model = tiny_network(2, box_bins=bins)
    torch.nn.init.zeros_(model.box_head.last.weight)
    for level in model(IMAGES).deltas:
        torch.testing.assert_close(level, torch.zeros_like(level), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_copy_gives_the_deltas_of_the_network(dtype: torch.dtype) -> None:
    model = tiny_network(2, spread=True, box_bins=BINS)
    fused = fused_copy(model, dtype)(IMAGES)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02  # of an anchor's side
    for level, expected in zip(fused.deltas, model(IMAGES).deltas, strict=True):
        assert level.dtype == dtype
        torch.testing.assert_close(level.float(), expected, atol=tolerance, rtol=tolerance)


def test_checkpoint_keeps_the_bins_and_older_ones_have_none(tmp_path: Path) -> None:
    model = tiny_network(2, spread=True, box_bins=BINS)
    checkpoint = rn.Checkpoint(model, ("a", "b"), (1, 2), 64, 96)
    folder = rn.save_checkpoint(tmp_path / "m", checkpoint)
    again = rn.load_checkpoint(folder).model
    assert again.spec.box_bins == BINS
    torch.testing.assert_close(again(IMAGES).deltas[0], model(IMAGES).deltas[0])
    plain = rn.save_checkpoint(
        tmp_path / "plain", rn.Checkpoint(tiny_network(1), ("a",), (1,), 64, 96)
    )
    text = json.loads((plain / "model.json").read_text())
    del text["network"]["box_bins"]
    (plain / "model.json").write_text(json.dumps(text))
    assert rn.load_checkpoint(plain).model.spec.box_bins == 0


def test_start_from_a_detector_without_bins_loads_all_but_the_last_of_the_box_head() -> None:
    source = rn.Checkpoint(tiny_network(2, spread=True), ("a", "b"), (1, 2), 64, 96)
    model = tiny_network(2, box_bins=BINS)
    report = transfer_weights(model, ("b", "c"), source)
    assert {name for name in report.lost if name.startswith("box_head")} == {
        "box_head.last.weight",
        "box_head.last.bias",
    }
    assert report.rows == ("b",)
    assert "box_head.tower.0.0.weight" in report.loaded


def test_own_head_has_the_outputs_of_all_bins() -> None:
    model = tiny_network(2, head=OneByOne, box_bins=BINS)
    assert model.box_head.out_channels == 36 * (BINS + 1)
    losses = model.loss(IMAGES, [{"boxes": torch.tensor([[4.0, 4, 40, 50]]), "labels": [1]}] * 2)
    losses.total.backward()
    assert model.box_head.weight.grad.any()


@pytest.mark.parametrize("compiled", [False, True])
def test_bins_are_detected_like_deltas(compiled: bool) -> None:
    """Post-processing, mirrored images and loss take the outputs of any box head."""
    model = two_level_network(2, spread=True, box_bins=BINS)
    call: Any = torch.compile(model, backend="eager") if compiled else model
    outputs: rn.Outputs = call(IMAGES)
    plain = model(IMAGES)
    for part, expected in zip(outputs, plain, strict=True):
        for level, other in zip(part, expected, strict=True):
            torch.testing.assert_close(level, other)
    found = model.detect(IMAGES, score_threshold=0.01, flip_tta=True)
    assert all(len(one) for one in found)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: rn.RetinaNet(1, box_bins=2), "box_bins 2 has no boxes of twice an anchor's side"),
        (lambda: rn.RetinaNet(1, box_bins=-1), "box_bins: Input should be greater than or equal"),
        (lambda: rn.LossSettings(distribution_weight=-1), "distribution_weight"),
        (
            lambda: rn.load_recipe("paper_1x", ["loss.distribution_weight=0.5"]),
            "^loss.distribution_weight 0.5 has no effect without bins: set model.box_bins=16",
        ),
        (lambda: rn.load_recipe("quick", ["model.reg_max=16"]), r"did you mean model.box_bins\?"),
    ],
)
def test_settings_that_make_no_sense_are_errors(build: Any, message: str) -> None:
    with pytest.raises((rn.ConfigError, ValueError), match=message):
        build()


def test_distribution_weight_may_be_of_the_network_to_start_from() -> None:
    rn.load_recipe("quick", ["loss.distribution_weight=0.5", "model.box_bins=16"])
    rn.load_recipe("quick", ["loss.distribution_weight=0.5", "train.init=runs/other"])
