"""What lies about the routes: every request is timed, every answer has the headers of safety."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from retinanet.serve.metrics import Metrics

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"})

_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_SAFETY = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]

_DRAIN_SECONDS = 2.0
_DRAIN_BYTES = 4
"""How long, and how many times the bytes that are taken, a refused body is read on. A client that
still sends when the connection closes is reset, and may never see why."""

log = logging.getLogger("retinanet.serve")


class Outside:
    """An ASGI application about another one.

    Args:
        app: the routes.
        metrics: where requests are counted.
        max_bytes: of a body.
    """

    def __init__(self, app: Application, *, metrics: Metrics, max_bytes: int) -> None:
        self._app = app
        self._metrics = metrics
        self._max_bytes = max_bytes

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = {name.lower(): value for name, value in scope["headers"]}
        body = _Body(receive, has_body(headers), headers.get(b"expect", b"") != b"")
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *_SAFETY]
                if not await body.drained(_DRAIN_BYTES * self._max_bytes):
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            await self._app(scope, body.receive, answer)
        except Exception:
            log.exception("a request failed")
            self._metrics.failure("internal")
            if status == 0:
                await _send_internal(answer)
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        # Without a status nobody was there any more to be answered; 499 is what others call that.
        self._metrics.request(route, method, status or 499, time.perf_counter() - began)


class _Body:
    """A request's body: knows how much of it has not come yet."""

    def __init__(self, receive: Receive, has_body: bool, asks_first: bool) -> None:
        self._receive = receive
        self._more = has_body
        self._asks_first = asks_first  # and sends nothing before it is told to

    async def receive(self) -> Message:
        self._asks_first = False
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            self._more = False
        return message

    async def drained(self, most: int) -> bool:
        """Read on what nobody wants, for a while; whether all has come."""
        if self._asks_first:
            return not self._more
        try:
            async with asyncio.timeout(_DRAIN_SECONDS):
                while self._more and most > 0:
                    most -= len((await self.receive()).get("body", b""))
        except TimeoutError:
            pass
        return not self._more


def has_body(headers: MutableMapping[bytes, bytes]) -> bool:
    """Whether a request says that something follows its headers."""
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"


async def _send_internal(send: Send) -> None:
    content = json.dumps({"detail": "the server failed; its log says where"}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
    ]
    await send({"type": "http.response.start", "status": 500, "headers": headers})
    await send({"type": "http.response.body", "body": content})
