"""Prometheus metrics of one service, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from retinanet.serve.errors import REASONS

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BATCH_SIZES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """Counters of one service.

    Args:
        queue_length: returns the number of images that wait for decoding or for the network.
    """

    def __init__(self, queue_length: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()

        def create(kind: Any, name: str, help_text: str, *labels: str, **options: Any) -> Any:
            name = f"retinanet_{name}"
            return kind(name, help_text, labels, registry=self._registry, **options)

        self._requests = create(Counter, "requests", "Requests.", "route", "method", "status")
        self._latency = create(
            Histogram, "request_seconds", "Time per request.", "route", buckets=_SECONDS
        )
        self._failures = create(Counter, "failures", "Rejected requests and images.", "reason")
        self._batches = create(Histogram, "batch_images", "Images per batch.", buckets=_BATCH_SIZES)
        self._images = create(Counter, "images", "Images processed.", "model")
        self._network = create(Counter, "network_seconds", "Time in the network.", "model")
        create(Gauge, "queue_images", "Images waiting.").set_function(queue_length)
        for reason in REASONS:
            self._failures.labels(reason)  # starts at 0, so that rates are defined

    def count_request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request that was answered after `seconds`."""
        self._requests.labels(route, method, str(status)).inc()
        self._latency.labels(route).observe(seconds)

    def count_failure(self, reason: str) -> None:
        """Count a rejected request or image; `reason` is one of `REASONS`."""
        self._failures.labels(reason).inc()

    def count_batch(self, model: str, images: int, seconds: float) -> None:
        """Count a batch of `images` that took `seconds` in the network."""
        self._batches.observe(images)
        self._images.labels(model).inc(images)
        self._network.labels(model).inc(seconds)

    def export(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
