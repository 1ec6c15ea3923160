"""What a service counts, for Prometheus: a registry of its own, labels of few values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from retinanet.serve.refusal import REASONS

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BATCHES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """Counters of one service.

    Args:
        queue_length: gives the number of images that wait for the network or to be unpacked.
    """

    def __init__(self, queue_length: Callable[[], int]) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._registry: Any = CollectorRegistry()

        def made(kind: Any, name: str, what: str, *labels: str, **more: Any) -> Any:
            return kind(f"retinanet_{name}", what, labels, registry=self._registry, **more)

        self._requests = made(Counter, "requests", "Requests.", "route", "method", "status")
        self._latency = made(
            Histogram, "request_seconds", "From headers to answer.", "route", buckets=_SECONDS
        )
        self._failures = made(Counter, "failures", "Requests or images refused.", "reason")
        self._batches = made(
            Histogram, "batch_images", "Images a run of the network.", buckets=_BATCHES
        )
        self._images = made(Counter, "images", "Images searched.", "model")
        self._network = made(Counter, "network_seconds", "That the network ran.", "model")
        made(Gauge, "queue_images", "Images that wait.").set_function(queue_length)
        for reason in REASONS:
            self._failures.labels(reason)  # 0 from the start: a rate of it can be taken

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """A request was answered."""
        self._requests.labels(route, method, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def failure(self, reason: str) -> None:
        """A request or an image was refused, for one of `REASONS`."""
        self._failures.labels(reason).inc()

    def batch(self, model: str, images: int, seconds: float) -> None:
        """The network of a model ran."""
        self._batches.observe(images)
        self._images.labels(model).inc(images)
        self._network.labels(model).inc(seconds)

    def text(self) -> tuple[bytes, str]:
        """All of it in Prometheus' text format, and that format's media type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST
