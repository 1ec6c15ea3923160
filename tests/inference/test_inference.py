"""Devices, precision, and the way from a batch to boxes on the original images."""

from __future__ import annotations

import pytest
import torch
from white_finder import WhiteFinder, black

from retinanet.errors import ConfigError
from retinanet.inference.inference import (
    autocast,
    choose_device,
    choose_dtype,
    detect_batch,
    padding_colour,
    to_original,
)
from retinanet.inference.network import build_network
from retinanet.model.retinanet import build_retinanet

CPU = torch.device("cpu")


def test_device_auto_is_the_cpu_where_there_is_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "device 'gpu' is not one of auto, cpu, cuda"),
        ("cdua", "did you mean cuda"),
        ("cuda:99", "device 'cuda:99': torch finds [0-9]+ cuda devices here"),
        ("meta", "device 'meta' is not one of"),
    ],
)
def test_device_that_is_not_there(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        choose_device(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("avx512", "amx", "expected"),
    [
        (False, False, torch.float32),
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
    ],
)
def test_precision_auto_asks_the_processor(
    monkeypatch: pytest.MonkeyPatch, avx512: bool, amx: bool, expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert choose_dtype("auto", CPU) == expected


def test_precision_auto_without_anything_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    assert choose_dtype("auto", CPU) == torch.float32


def test_unknown_precision() -> None:
    with pytest.raises(ConfigError, match=r"precision 'fp61' is not one of .*did you mean fp16"):
        choose_dtype("fp61", CPU)


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("float32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_autocast(precision: str, expected: torch.dtype) -> None:
    with autocast(precision, CPU):
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == expected


def test_to_original_scales_each_side_by_its_own_factor() -> None:
    # 100 x 301 resized to 33 x 100: y by 100 / 33, x by 301 / 100; the last box reaches outside.
    boxes = torch.tensor([[10.0, 3.3, 50.0, 33.0], [-2.0, -1.0, 104.0, 40.0]])
    expected = torch.tensor([[30.1, 10.0, 150.5, 100.0], [0.0, 0.0, 301.0, 100.0]])
    torch.testing.assert_close(to_original(boxes, (33, 100), (100, 301)), expected)


def test_to_original_of_nothing() -> None:
    assert to_original(torch.zeros(0, 4), (10, 10), (20, 20)).shape == (0, 4)


def test_detect_batch_maps_each_image_by_its_own_size() -> None:
    model = WhiteFinder()
    images = torch.stack(
        [
            torch.from_numpy(black(64, 96, (16, 8, 24, 16))),
            torch.from_numpy(black(64, 96, (0, 0, 8, 8), (40, 32, 48, 40))),
        ]
    ).permute(0, 3, 1, 2)
    # The second image ends at 36 of 64 rows and 44 of 96 columns: its second cell is cut there.
    sizes = torch.tensor([[64, 96], [36, 44]])
    first, second = detect_batch(
        build_network(model, CPU),
        images,
        sizes,
        torch.tensor([[128, 96], [72, 176]]),
        score_threshold=0.99,
    )
    torch.testing.assert_close(first.boxes, torch.tensor([[16.0, 16, 24, 32]]))
    torch.testing.assert_close(second.boxes, torch.tensor([[0.0, 0, 32, 16], [160, 64, 176, 72]]))
    assert first.labels.tolist() == [0]
    torch.testing.assert_close(first.scores, torch.sigmoid(torch.tensor([5.5])))


def test_padding_colour_is_the_mean() -> None:
    assert padding_colour(WhiteFinder()) == (100, 100, 100)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_finds_about_the_same(precision: str) -> None:
    torch.manual_seed(0)
    model = build_retinanet(
        backbone="mobilenet_v2",
        num_classes=3,
        backbone_weights="none",
        norm="group",
        channels=16,
        head_depth=1,
    ).eval()
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    sizes = torch.tensor([[64, 96], [60, 90]])
    options = {"score_threshold": 0.0, "nms_threshold": 1.0, "detections_per_image": 100}
    full, half = (
        detect_batch(build_network(model, CPU, precision=one), images, sizes, sizes, **options)
        for one in ("float32", precision)
    )
    for one, other in zip(full, half, strict=True):
        assert len(one) == len(other) == 100
        assert other.boxes.dtype == other.scores.dtype == torch.float32
        # Eight bits of mantissa: a score of .01 is right to a few parts in a hundred.
        torch.testing.assert_close(one.scores, other.scores, rtol=0.1, atol=0)
