"""Plots of complete, odd and empty results; nothing but the file changes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from PIL import Image
from results import evaluated, log_lines

from retinanet.data.dataset import Annotation
from retinanet.errors import DataError
from retinanet.evaluation.coco import evaluate_detections
from retinanet.report.figure import format_compact, open_figure
from retinanet.report.plots import (
    moving_mean,
    plot_confusion,
    plot_evaluation,
    plot_object_sizes,
    plot_running,
    plot_training,
)
from retinanet.training.run_folder import read_log


def is_drawn(file: Path) -> bool:
    with Image.open(file) as image:
        pixels = np.asarray(image.convert("L"))
    return image.format == "PNG" and pixels.shape[1] > 500 and (pixels < 200).mean() > 0.002


def test_plot_evaluation_writes_every_plot_and_equal_metrics_give_equal_files(
    tmp_path: Path,
) -> None:
    settings = dict(mpl.rcParams)
    _, metrics = evaluated(("cat", "dog"))
    first, second = (plot_evaluation(metrics, tmp_path / folder) for folder in ("a", "b"))
    assert set(first) == {"precision_recall", "classes", "errors", "confusion", "calibration"}
    for name, file in first.items():
        assert is_drawn(file)
        assert file.read_bytes() == second[name].read_bytes()
    assert dict(mpl.rcParams) == settings


def test_plot_evaluation_many_classes_and_odd_names(tmp_path: Path) -> None:
    # Warnings are errors: dollar signs are no formulas, and letters may be missing in the font.
    names = ("US$ 5 and $ 6", "_under^score", "猫", "a name that is much longer than the space is")
    _, metrics = evaluated((*names, *(f"class {i}" for i in range(60))), images=40)
    files = plot_evaluation(metrics, tmp_path)
    assert all(is_drawn(file) for file in files.values())
    with Image.open(files["confusion"]) as image:
        assert image.height < 2500  # twenty classes and not sixty-four


def test_plot_evaluation_no_detection_and_no_object(tmp_path: Path) -> None:
    dataset, _ = evaluated(("cat", "dog"))
    nothing = evaluate_detections(dataset, [])
    assert all(is_drawn(file) for file in plot_evaluation(nothing, tmp_path / "nothing").values())
    images = tuple(replace(image, annotations=()) for image in dataset.images)
    metrics = evaluate_detections(replace(dataset, images=images), [])
    assert plot_evaluation(metrics, tmp_path / "empty") == {}
    assert is_drawn(plot_confusion(metrics, tmp_path / "confusion.png"))


@pytest.mark.parametrize(
    "lines",
    [
        log_lines(),
        [],
        log_lines(1),
        [line for line in log_lines() if "validation" not in line],
        [{"step": 1, "loss": math.nan, "lr": 0.0}, {"step": 2, "loss": math.inf, "lr": 0.1}],
        [{"step": 5, "validation": {"ap": math.nan, "ap50": math.nan, "loss": None}}],
        [{"step": 5, "validation": {"ap": 0.2}}],
    ],
    ids=["whole", "empty", "one step", "no validation", "not finite", "no object", "AP alone"],
)
def test_plot_training_and_running(tmp_path: Path, lines: list[dict[str, Any]]) -> None:
    assert is_drawn(plot_training(lines, tmp_path / "training.png"))
    assert is_drawn(plot_running(lines, tmp_path / "running.png"))


def test_read_log_skips_a_truncated_line(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in log_lines()) + '{"step": 61, "lo')
    assert read_log(log) == log_lines()
    with pytest.raises(DataError, match=r"log .*none\.jsonl cannot be read: No such file"):
        read_log(tmp_path / "none.jsonl")


def test_plot_object_sizes_skips_invalid_boxes(tmp_path: Path) -> None:
    dataset, _ = evaluated(("cat", "dog"))
    faulty = (Annotation((math.nan, 0, 1, 1), 0), Annotation((5, 5, 5, 9), 0))
    spoilt = replace(dataset, images=(replace(dataset.images[0], annotations=faulty),))
    splits = {"train": dataset, "val": spoilt, "test": replace(dataset, images=())}
    assert is_drawn(plot_object_sizes(splits, tmp_path / "sizes.png"))
    assert is_drawn(plot_object_sizes({}, tmp_path / "none.png"))


def test_moving_mean_by_hand() -> None:
    # Means of three values; of two at the ends.
    expected = [(1 + 2) / 2, (1 + 2 + 6) / 3, (2 + 6 + 4) / 3, (6 + 4) / 2]
    np.testing.assert_allclose(moving_mean(np.array([1.0, 2.0, 6.0, 4.0]), 3), expected)


def test_open_figure_logarithmic_ticks_are_plain_numbers(tmp_path: Path) -> None:
    with open_figure(3, 2, tmp_path / "log.svg") as figure:
        axis = figure.subplots()
        axis.plot([1, 2], [1, 20_000])
        axis.set_yscale("log")
    text = (tmp_path / "log.svg").read_text("utf-8")  # each text is repeated in a comment
    assert "<!-- 10,000 -->" in text
    assert "math" not in text


def test_format_compact() -> None:
    numbers = (0, 9500, 12_000, 3_400_000)
    assert [format_compact(number) for number in numbers] == ["0", "9500", "12k", "3.4M"]
