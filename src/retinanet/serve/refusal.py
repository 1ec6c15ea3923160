"""Why a request is not answered, in the words that the client gets."""

from __future__ import annotations

from collections.abc import Mapping


class Refusal(Exception):
    """An answer that is not what was asked for.

    Args:
        status: of HTTP.
        reason: of :data:`REASONS`, for the metrics.
        detail: one line for a person, without anything of this machine.
        headers: that go with it.
    """

    def __init__(
        self, status: int, reason: str, detail: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.reason = reason
        self.detail = detail
        self.headers = dict(headers or {})


REASONS = (
    "option",
    "key",
    "foreign",
    "address",
    "model",
    "bytes",
    "pixels",
    "images",
    "kind",
    "unreadable",
    "slow_client",
    "busy",
    "timeout",
    "gone",
    "internal",
)
"""Why requests fail, in the metrics: a label has no other value."""


def busy(detail: str, seconds: float = 1.0) -> Refusal:
    """503: come again in so many seconds."""
    return Refusal(503, "busy", detail, {"Retry-After": str(max(1, round(seconds)))})
