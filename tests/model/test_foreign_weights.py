"""RetinaNets of detectron2 and mmdetection: names, shapes and functions of their own networks.

The references below are their forward passes, written from their configurations (R-50-FPN).
"""

from __future__ import annotations

import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from retinanet.anchors import feature_sizes, level_anchors
from retinanet.errors import WeightsError
from retinanet.model import load_checkpoint
from retinanet.model.weight_files import read_tensors
from retinanet.structures import flatten_level

_BODY = "backbone.bottom_up."
DETECTRON2: dict[str, Callable[..., str]] = {
    "stem": lambda: f"{_BODY}stem.conv1",
    "stem_norm": lambda: f"{_BODY}stem.conv1.norm",
    "conv": lambda stage, block, i: f"{_BODY}res{stage}.{block}.conv{i}",
    "norm": lambda stage, block, i: f"{_BODY}res{stage}.{block}.conv{i}.norm",
    "shortcut": lambda stage, block: f"{_BODY}res{stage}.{block}.shortcut",
    "shortcut_norm": lambda stage, block: f"{_BODY}res{stage}.{block}.shortcut.norm",
    "lateral": lambda level: f"backbone.fpn_lateral{level}",
    "output": lambda level: f"backbone.fpn_output{level}",
    "extra": lambda level: f"backbone.top_block.p{level}",
    "cls": lambda i: f"head.cls_subnet.{2 * i}",
    "reg": lambda i: f"head.bbox_subnet.{2 * i}",
    "last_cls": lambda: "head.cls_score",
    "last_reg": lambda: "head.bbox_pred",
}
MMDETECTION: dict[str, Callable[..., str]] = {
    "stem": lambda: "backbone.conv1",
    "stem_norm": lambda: "backbone.bn1",
    "conv": lambda stage, block, i: f"backbone.layer{stage - 1}.{block}.conv{i}",
    "norm": lambda stage, block, i: f"backbone.layer{stage - 1}.{block}.bn{i}",
    "shortcut": lambda stage, block: f"backbone.layer{stage - 1}.{block}.downsample.0",
    "shortcut_norm": lambda stage, block: f"backbone.layer{stage - 1}.{block}.downsample.1",
    "lateral": lambda level: f"neck.lateral_convs.{level - 3}.conv",
    "output": lambda level: f"neck.fpn_convs.{level - 3}.conv",
    "extra": lambda level: f"neck.fpn_convs.{level - 3}.conv",
    "cls": lambda i: f"bbox_head.cls_convs.{i}.conv",
    "reg": lambda i: f"bbox_head.reg_convs.{i}.conv",
    "last_cls": lambda: "bbox_head.retina_cls",
    "last_reg": lambda: "bbox_head.retina_reg",
}
BLOCKS = {2: 3, 3: 4, 4: 6, 5: 3}


def random_state(names: dict[str, Callable[..., str]], num_classes: int) -> dict[str, Tensor]:
    """Random weights with the names and shapes of R-50-FPN."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def conv(name: str, out: int, given: int, side: int, bias: bool = True) -> None:
        weight = torch.randn(out, given, side, side, generator=generator)
        state[f"{name}.weight"] = weight * (2 / given / side**2) ** 0.5
        if bias:
            state[f"{name}.bias"] = 0.01 * torch.randn(out, generator=generator)

    def norm(name: str, width: int) -> None:
        for leaf, low in (("weight", 0.5), ("bias", 0), ("running_mean", 0), ("running_var", 0.8)):
            state[f"{name}.{leaf}"] = low + 0.2 * torch.rand(width, generator=generator)

    conv(names["stem"](), 64, 3, 7, bias=False)
    norm(names["stem_norm"](), 64)
    width = 64
    for stage, blocks in BLOCKS.items():
        middle = 64 * 2 ** (stage - 2)
        for block in range(blocks):
            shapes = ((middle, width, 1), (middle, middle, 3), (4 * middle, middle, 1))
            for i, shape in enumerate(shapes, 1):
                conv(names["conv"](stage, block, i), *shape, bias=False)
                norm(names["norm"](stage, block, i), shape[0])
            if block == 0:
                conv(names["shortcut"](stage, block), 4 * middle, width, 1, bias=False)
                norm(names["shortcut_norm"](stage, block), 4 * middle)
            width = 4 * middle
    for level, channels in ((3, 512), (4, 1024), (5, 2048)):
        conv(names["lateral"](level), 256, channels, 1)
        conv(names["output"](level), 256, 256, 3)
    conv(names["extra"](6), 256, 2048, 3)
    conv(names["extra"](7), 256, 256, 3)
    for i in range(4):
        conv(names["cls"](i), 256, 256, 3)
        conv(names["reg"](i), 256, 256, 3)
    conv(names["last_cls"](), 9 * num_classes, 256, 3)
    conv(names["last_reg"](), 9 * 4, 256, 3)
    return state


def reference(
    state: dict[str, Tensor],
    names: dict[str, Callable[..., str]],
    image: Tensor,
    *,
    stride_in_1x1: bool,
    p7_relu: bool,
) -> list[tuple[Tensor, Tensor]]:
    """Logits and deltas of a normalized image, by level."""

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        padding = weight.shape[-1] // 2
        return F.conv2d(x, weight, state.get(f"{name}.bias"), stride, padding)

    def norm(name: str, x: Tensor) -> Tensor:
        leaves = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(state[f"{name}.{leaf}"] for leaf in leaves), eps=1e-5)

    x = F.relu(norm(names["stem_norm"](), conv(names["stem"](), image, 2)))
    x = F.max_pool2d(x, 3, 2, 1)
    maps = {}
    for stage, blocks in BLOCKS.items():
        for block in range(blocks):
            stride = 2 if block == 0 and stage > 2 else 1
            strides = (stride, 1, 1) if stride_in_1x1 else (1, stride, 1)
            y = x
            for i, step in enumerate(strides, 1):
                y = norm(
                    names["norm"](stage, block, i), conv(names["conv"](stage, block, i), y, step)
                )
                y = F.relu(y) if i < 3 else y
            if block == 0:
                x = conv(names["shortcut"](stage, block), x, stride)
                x = norm(names["shortcut_norm"](stage, block), x)
            x = F.relu(x + y)
        maps[stage] = x
    inner = {level: conv(names["lateral"](level), maps[level]) for level in (3, 4, 5)}
    for level in (4, 3):
        inner[level] = inner[level] + F.interpolate(inner[level + 1], scale_factor=2.0)
    levels = [conv(names["output"](level), inner[level]) for level in (3, 4, 5)]
    p6 = conv(names["extra"](6), maps[5], 2)
    levels += [p6, conv(names["extra"](7), F.relu(p6) if p7_relu else p6, 2)]

    def head(kind: str, x: Tensor) -> Tensor:
        for i in range(4):
            x = F.relu(conv(names[kind](i), x))
        return conv(names[f"last_{kind}"](), x)

    return [(head("cls", level), head("reg", level)) for level in levels]


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Compare relative to the spread, which differs from level to level."""
    spread = expected.std()
    torch.testing.assert_close(found / spread, expected / spread, atol=1e-3, rtol=1e-3)


def _image() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (1, 3, 64, 96), generator=generator).float()


def test_detectron2_is_the_same_function(tmp_path: Path) -> None:
    state = random_state(DETECTRON2, 80)
    state["backbone.bottom_up.stem.conv1.weight"] *= 0.02  # images are not divided
    statistics = {
        "pixel_mean": torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1),
        "pixel_std": torch.ones(3, 1, 1),
        "anchor_generator.cell_anchors.0": torch.zeros(9, 4),
    }
    torch.save({"model": state | statistics, "iteration": 89999}, tmp_path / "model_final.pth")

    checkpoint = load_checkpoint(tmp_path / "model_final.pth")

    assert len(checkpoint.classes) == 80
    assert (checkpoint.classes[79], checkpoint.category_ids[79]) == ("toothbrush", 90)
    assert checkpoint.info["detect"]["detections_per_image"] == 100
    bgr = _image().flip(1) - torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)
    expected = reference(state, DETECTRON2, bgr, stride_in_1x1=True, p7_relu=True)
    with torch.no_grad():
        outputs = checkpoint.model(_image())
    spec = checkpoint.model.anchors
    anchors = level_anchors(spec, feature_sizes(spec.strides, 64, 96))
    for level, (logits, deltas) in enumerate(expected):
        # A cell's anchors there: three sizes, and for each the ratios height / width.
        size, row = 32 * 2**level, []
        for scale in (1, 2 ** (1 / 3), 2 ** (2 / 3)):
            for ratio in (0.5, 1, 2):
                width = size * scale / ratio**0.5
                row.append((-width / 2, -width * ratio / 2, width / 2, width * ratio / 2))
        distance = torch.cdist(torch.tensor(row), anchors[level][:9], p=float("inf"))
        same = distance.argmin(1)
        assert distance.min(1).values.max() < 1e-3
        assert sorted(same.tolist()) == list(range(9))
        rows, columns = logits.shape[-2:]
        for theirs, found, depth in (
            (logits, outputs.logits[level], 80),
            (deltas, outputs.deltas[level], 4),
        ):
            ours = flatten_level(found, depth).view(rows * columns, 9, depth)[:, same]
            other = flatten_level(theirs, depth).view(rows * columns, 9, depth)
            assert_same(ours, other)


@pytest.mark.parametrize("caffe", [False, True], ids=["pytorch", "caffe"])
def test_mmdetection_is_the_same_function(caffe: bool, tmp_path: Path) -> None:
    state = random_state(MMDETECTION, 3)
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    image = _image()
    normalized = (image - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    if caffe:
        normalized = (image - mean.view(3, 1, 1)).flip(1)
        state["backbone.conv1.weight"] *= 0.02
    # As trained: the variance of the first convolution's outputs on such images.
    response = F.conv2d(normalized, state["backbone.conv1.weight"])
    state["backbone.bn1.running_var"] = response.var((0, 2, 3))
    meta = {"mmdet_version": "2.3.0", "CLASSES": ("cell", "plate", "nucleus")}
    torch.save({"meta": meta, "state_dict": OrderedDict(state)}, tmp_path / "epoch_12.pth")

    checkpoint = load_checkpoint(tmp_path / "epoch_12.pth")

    assert checkpoint.classes == ("cell", "plate", "nucleus")
    assert checkpoint.model.spec.stride_in_1x1 == caffe
    expected = reference(state, MMDETECTION, normalized, stride_in_1x1=caffe, p7_relu=False)
    with torch.no_grad():
        outputs = checkpoint.model(image)
    for level, (logits, deltas) in enumerate(expected):
        assert_same(outputs.logits[level], logits)
        assert_same(outputs.deltas[level], deltas)


def test_colour_order_that_is_not_known_is_an_error(tmp_path: Path) -> None:
    state = random_state(DETECTRON2, 1)  # divided by a deviation: RGB or BGR
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="without pixel_mean the order of the colours"):
        load_checkpoint(tmp_path / "a.pth")


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    state = random_state(MMDETECTION, 1)
    del state["bbox_head.retina_cls.bias"], state["backbone.bn1.running_var"]
    torch.save(state, tmp_path / "a.pth")
    missing = r"missing: backbone\.bn1\.running_var, class_head\.last\.bias"
    with pytest.raises(WeightsError, match=missing):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("backbone.bottom_up.stem.conv1", (64, 147), "conv1.weight of 4 dimensions (found 2)"),
        ("backbone.fpn_lateral3", (), "lateral.0.weight of 4 dimensions (found 0)"),
        ("head.cls_score", (9, 256), "class_head.last.weight is 9x256, not 9x256x3x3"),
    ],
)
def test_tensors_of_another_number_of_dimensions_are_named(
    name: str, shape: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    state = random_state(DETECTRON2, 1) | {f"{name}.weight": torch.zeros(shape)}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=re.escape(message)):
        load_checkpoint(tmp_path / "a.pth")


def test_pixel_mean_without_three_values_is_an_error(tmp_path: Path) -> None:
    torch.save(random_state(DETECTRON2, 1) | {"pixel_mean": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="pixel_mean has 1 values, not 3"):
        load_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickled_arrays_are_read(protocol: int, tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    values = {"model": {"a": array, "b": np.asarray(3)}, "__author__": "somebody"}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(values, protocol))
    state = read_tensors(tmp_path / "a.pkl", "a.pkl").state
    assert torch.equal(state["a"], torch.tensor([[0.0, 1, 2], [3, 4, 5]]))
    assert int(state["b"]) == 3


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", ["pkl", "pth"])
def test_pickle_that_runs_code_is_not_opened(suffix: str, tmp_path: Path) -> None:
    made, file = tmp_path / "made", tmp_path / f"a.{suffix}"
    values = {"state_dict": {}, "hook": _Evil(made)}
    if suffix == "pkl":
        file.write_bytes(pickle.dumps(values))
    else:
        torch.save(values, file)
    with pytest.raises(WeightsError, match=r"unpickling \w+\.mkdir in it may run any code"):
        load_checkpoint(file)
    assert not made.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither .safetensors nor a torch file"),
        (b"not a pickle", "neither .safetensors nor a torch file"),
        (pickle.dumps([1, 2], 2), "neither .safetensors nor a torch file|no state dict"),
    ],
)
@pytest.mark.parametrize("suffix", ["pkl", "pth"])
def test_other_files_are_named(content: bytes, message: str, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"a.{suffix}"
    file.write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        load_checkpoint(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("state", "meta", "message"),
    [
        ({"model.0.conv.weight": torch.zeros(1)}, {}, "no RetinaNet of torchvision, detectron2 or"),
        ({"head.cls_score.weight": torch.zeros(9, 1, 3, 3)}, {}, "no RetinaNet on resnet18, "),
        ({"bbox_head.retina_cls.weight": torch.zeros(1)}, {"mmdet_version": "1.2.0"}, "tion 1.2.0"),
    ],
)
def test_networks_that_are_not_supported_are_named(
    state: dict[str, Tensor], meta: dict[str, str], message: str, tmp_path: Path
) -> None:
    torch.save({"state_dict": state, "meta": meta}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=message):
        load_checkpoint(tmp_path / "a.pth")
