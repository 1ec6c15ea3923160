"""Errors that clients receive: an HTTP status, one line of text, and a reason for the metrics."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.exceptions import HTTPException


class RequestError(HTTPException):
    """An error response.

    Args:
        status_code: HTTP status.
        reason: value of the label ``reason`` of ``retinanet_failures_total``.
        detail: one line for the user; never a path or other details of this machine.
        headers: extra response headers.
    """

    def __init__(
        self, status_code: int, reason: str, detail: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status_code, detail, headers)
        self.reason = reason


def busy(detail: str, retry_after: float = 1.0) -> RequestError:
    """Return a 503 error with `retry_after` seconds in its Retry-After header."""
    return RequestError(503, "busy", detail, {"Retry-After": str(max(1, round(retry_after)))})
