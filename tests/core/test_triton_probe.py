"""Triton's kernels are used only on a GPU that has shown that it runs them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from retinanet import matching, triton_probe
from retinanet.losses import triton_loss

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RETINANET_TRITON", raising=False)
    monkeypatch.setattr(triton_probe, "_installed", lambda: True)
    triton_probe._runs_on.cache_clear()
    yield
    triton_probe._runs_on.cache_clear()


def fake_kernel(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> list[torch.device]:
    """The list fills with the devices that are asked."""
    asked: list[torch.device] = []

    def run(device: torch.device) -> None:
        asked.append(device)
        if error is not None:
            raise error

    monkeypatch.setattr(triton_probe, "_run_one_element", run)
    return asked


def in_matching() -> bool:
    anchors: Any = SimpleNamespace(device=GPU, dtype=torch.float32)
    return matching._triton_serves(anchors)


def in_the_loss() -> bool:
    logits: Any = SimpleNamespace(
        device=GPU, dtype=torch.float32, dim=lambda: 2, is_contiguous=lambda: True
    )
    return triton_loss.serves(logits, ("focal", 2.0, 0.0))


USERS = pytest.mark.parametrize("user", [in_matching, in_the_loss])


@USERS
def test_a_gpu_that_runs_a_kernel_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, user: Callable[[], bool]
) -> None:
    asked = fake_kernel(monkeypatch, None)
    assert user()
    assert user()
    assert asked == [GPU]


@USERS
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Failed to find C compiler.\nPlease specify via CC"), "Failed to find C com"),
        (NotImplementedError(), "NotImplementedError"),
    ],
)
def test_one_that_fails_is_named_in_one_line_once(
    monkeypatch: pytest.MonkeyPatch, user: Callable[[], bool], error: Exception, reason: str
) -> None:
    asked = fake_kernel(monkeypatch, error)
    with pytest.warns(RuntimeWarning, match=f"do not run on cuda:0, .*: {reason}") as told:
        assert not user()
    assert "\n" not in str(told[0].message)
    assert "RETINANET_TRITON=0" in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not in_matching()
        assert not in_the_loss()
    assert asked == [GPU]


@USERS
def test_the_switch_asks_nobody(monkeypatch: pytest.MonkeyPatch, user: Callable[[], bool]) -> None:
    asked = fake_kernel(monkeypatch, None)
    monkeypatch.setenv("RETINANET_TRITON", "0")
    assert not user()
    assert asked == []


def test_without_triton_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_kernel(monkeypatch, None)
    monkeypatch.setattr(triton_probe, "_installed", lambda: False)
    assert not triton_probe.usable(GPU)
    assert asked == []


def test_the_interpreter_needs_no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_kernel(monkeypatch, None)
    assert triton_probe.usable(torch.device("cpu"))
    assert asked == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_this_gpu() -> None:
    assert triton_probe.usable(torch.device("cuda"))
