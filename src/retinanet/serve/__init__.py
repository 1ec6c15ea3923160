"""HTTP service for detectors: a web page, a REST API, and the limits of both (docs/serve.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from retinanet.errors import ConfigError, MissingExtraError
from retinanet.inference import Detector
from retinanet.serve.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["Settings", "build_app"]


def build_app(
    detectors: Mapping[str, Detector] | Detector,
    settings: Settings | None = None,
    *,
    metrics: Mapping[str, Mapping[str, Any] | None] | None = None,
) -> FastAPI:
    """Build the service as an ASGI application; its startup warms up the networks.

    Args:
        detectors: detectors by model name; the first is the default model. A single detector is
            named ``model``.
        settings: limits; None for the defaults.
        metrics: AP, AP50, data and split by model name, reported by ``/v1/model``.

    Raises:
        ConfigError: there is no detector, or several workers were requested for a detector that
            does not run with torch on a CPU.
        MissingExtraError: a package of the extra ``serve`` is not installed.
    """
    check_installed()
    from retinanet.serve.app import make_app
    from retinanet.serve.batching import Batcher

    by_name = {"model": detectors} if isinstance(detectors, Detector) else dict(detectors)
    settings = settings or Settings()
    if not by_name:
        raise ConfigError("no model to serve: pass at least one detector")
    if (settings.workers or 1) > 1:
        for name, detector in by_name.items():
            if detector.device.type != "cpu" or detector.network.backend != "torch":
                raise ConfigError(
                    f"--workers {settings.workers} needs the torch backend on a CPU: {name} runs "
                    f"with {detector.network.description}; leave --workers at 1"
                )
    return make_app(Batcher(by_name, settings), settings, metrics or {})


def check_installed() -> None:
    """Raise MissingExtraError if a package of the extra ``serve`` is not installed."""
    from importlib.util import find_spec

    for package in ("fastapi", "prometheus_client", "python_multipart", "uvicorn"):
        if find_spec(package) is None:
            raise MissingExtraError(package.replace("_", "-"), "serve")
