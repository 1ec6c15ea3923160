"""Device, dtype and autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retinanet.errors import ConfigError
from retinanet.model.precision import autocast, choose_device, choose_dtype

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
        (None, "device 'None' is not one of auto, cpu"),
    ],
)
def test_device_that_is_not_there(name: Any, message: str) -> None:
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
