"""Fixtures for the tests of the core modules."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from retinanet.kernels import native


@pytest.fixture(params=["float64", "bfloat16", "meta"])
def default(request: pytest.FixtureRequest) -> Iterator[str]:
    """Defaults of torch that a user may have set: a type, or another device."""
    before = torch.get_default_dtype()
    if request.param == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(getattr(torch, request.param))
    yield str(request.param)
    torch.set_default_dtype(before)
    torch.set_default_device(None)


@pytest.fixture(params=["native", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run with the C library, and with the torch code used where it is not built."""
    if request.param == "torch":
        monkeypatch.setattr(native, "library", native.Library(None, 0, "switched off"))
    elif not native.available():
        pytest.skip(native.description())
    return str(request.param)
