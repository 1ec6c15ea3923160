"""Prometheus metrics of one service, and the ASGI middleware that counts its requests."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"})
_SECURITY_HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; "
        b"form-action 'none'; frame-ancestors 'none'",
    ),
    (b"permissions-policy", b"camera=(self), microphone=(), geolocation=()"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
]

log = logging.getLogger("retinanet.serve")


class Metrics:
    """Metrics of one service, in a registry of its own.

    Args:
        queue_length: returns the number of images that wait for decoding or for the network.
    """

    def __init__(self, queue_length: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()

        def create(kind: Any, name: str, help_text: str, *labels: str, **options: Any) -> Any:
            name = f"retinanet_{name}"
            return kind(name, help_text, labels, registry=self._registry, **options)

        self.requests = create(Counter, "requests", "Requests.", "route", "method", "status")
        self.latency = create(
            Histogram, "request_seconds", "Time per request.", "route", buckets=_SECONDS
        )
        self.images = create(Counter, "images", "Images processed.", "model")
        self.failed_images = create(Counter, "failed_images", "Rejected images.", "model")
        create(Gauge, "queue_images", "Images waiting.").set_function(queue_length)

    def export(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class Middleware:
    """Count requests, add security headers, and answer unexpected errors with 500."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_SECURITY_HEADERS]
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            log.exception("request failed")
            if status == 0:
                response = JSONResponse({"detail": "internal server error; see the log"}, 500)
                await response(scope, receive, send_with_headers)
        # Labels never hold text that a client can choose.
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        # 499: the client disconnected before the response, as nginx counts it.
        self._metrics.requests.labels(route, method, str(status or 499)).inc()
        self._metrics.latency.labels(route).observe(time.perf_counter() - start)
