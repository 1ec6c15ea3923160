"""Fixtures of the ground floor's tests."""

from __future__ import annotations

import pytest

from retinanet import native


@pytest.fixture(params=["native", "torch"])
def each_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the native library, and with the torch code that serves where it is not built."""
    if request.param == "torch":
        monkeypatch.setattr(native, "_library", native._Library(None, 0, "switched off"))
    elif not native.available():
        pytest.skip(native.description())
    return str(request.param)
