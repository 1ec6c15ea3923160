"""Detectors as a service: a page, REST, and the limits that both need (docs/serve.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from retinanet.errors import ConfigError, MissingExtraError
from retinanet.inference import Detector
from retinanet.serve.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["Settings", "build_app"]

_PACKAGES = {"prometheus_client": "prometheus-client", "python_multipart": "python-multipart"}


def build_app(
    detectors: Mapping[str, Detector] | Detector,
    settings: Settings | None = None,
    *,
    judged: Mapping[str, Mapping[str, Any] | None] | None = None,
) -> FastAPI:
    """The service as an ASGI application; its startup warms the networks up.

    Args:
        detectors: by the name that clients call them; the first answers where none is named. One
            alone is called ``model``.
        settings: limits; None: the defaults.
        judged: AP, AP50, data and split of each model, which ``/v1/model`` says.

    Raises:
        ConfigError: there is no detector, or several workers for one that cannot be shared.
        MissingExtraError: a package of the extra ``serve`` is not installed.
    """
    check_installed()
    from retinanet.serve.app import make_app
    from retinanet.serve.batching import Batcher

    known = {"model": detectors} if isinstance(detectors, Detector) else dict(detectors)
    settings = settings or Settings()
    if not known:
        raise ConfigError("there is no model to serve")
    if settings.workers > 1:
        for name, one in known.items():
            if one.device.type != "cpu" or one.network.backend != "torch":
                raise ConfigError(
                    f"{settings.workers} workers share the cores of a CPU, with backend torch; "
                    f"{name} runs by {one.network.description}: leave --workers at 1"
                )
    return make_app(Batcher(known, settings), settings, judged or {})


def check_installed() -> None:
    """Raise a MissingExtraError for the first package of the extra that is not there."""
    from importlib.util import find_spec

    for package in ("fastapi", "prometheus_client", "python_multipart", "uvicorn"):
        if find_spec(package) is None:
            raise MissingExtraError(_PACKAGES.get(package, package), "serve")
