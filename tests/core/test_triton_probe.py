"""The probe that decides, once per GPU, whether Triton kernels are used."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from retinanet.kernels import triton_probe

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def reset_probe(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RETINANET_TRITON", raising=False)
    monkeypatch.setattr(triton_probe, "is_installed", lambda: True)
    triton_probe._runs_on.cache_clear()
    yield
    triton_probe._runs_on.cache_clear()


def patch_probe(monkeypatch: pytest.MonkeyPatch, error: Exception | None) -> list[torch.device]:
    """Replace the probe; the list fills with the devices that are probed."""
    probed: list[torch.device] = []

    def run(device: torch.device) -> None:
        probed.append(device)
        if error is not None:
            raise error

    monkeypatch.setattr(triton_probe, "run_probe", run)
    return probed


def test_gpu_that_runs_a_kernel_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    probed = patch_probe(monkeypatch, None)
    assert triton_probe.is_usable(GPU)
    assert triton_probe.is_usable(GPU)
    assert probed == [GPU]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Failed to find C compiler.\nPlease specify via CC"), "Failed to find C com"),
        (NotImplementedError(), "NotImplementedError"),
    ],
)
def test_gpu_that_fails_is_named_in_a_line_once(
    monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    probed = patch_probe(monkeypatch, error)
    with pytest.warns(RuntimeWarning, match=f"do not run on cuda:0, .*: {reason}") as caught:
        assert not triton_probe.is_usable(GPU)
    assert "\n" not in str(caught[0].message)
    assert "RETINANET_TRITON=0" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not triton_probe.is_usable(GPU)
    assert probed == [GPU]


def test_switched_off_or_not_installed_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    probed = patch_probe(monkeypatch, None)
    monkeypatch.setenv("RETINANET_TRITON", "0")
    assert not triton_probe.is_usable(GPU)
    monkeypatch.delenv("RETINANET_TRITON")
    monkeypatch.setattr(triton_probe, "is_installed", lambda: False)
    assert not triton_probe.is_usable(GPU)
    assert probed == []
