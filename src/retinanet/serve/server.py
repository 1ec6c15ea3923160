"""The process that serves: its socket, clients that are too slow for it, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from retinanet.data.loading import usable_cpus
from retinanet.errors import ConfigError, RetinaNetError
from retinanet.serve.settings import Settings

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

_HEADER_BYTES = 64 * 1024
_KEEP_ALIVE = 15  # seconds that a connection may be idle between requests
_BACKLOG = 1024


@dataclass(frozen=True, slots=True)
class Ended:
    """How a server ended.

    Attributes:
        signal: that it got; None: it was told by other means.
        at_once: whether requests were left, and with them threads that may be in the middle of a
            network: the process should not clean up behind them.
    """

    signal: int | None
    at_once: bool


def bind(host: str, port: int) -> socket.socket:
    """A socket at the address, before anything slow is done; nobody is let in yet.

    Args:
        host: a name or an address of this machine.
        port: 0: one that is free.

    Raises:
        ConfigError: there is no such host or port.
        RetinaNetError: it is taken, not allowed, or no address of this machine.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port} is not in 0..65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind)
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror}") from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise RetinaNetError(
            f"cannot serve at {host} port {port}: {error.strerror}; give another --host or --port"
        ) from None
    return listening


def share_cores(workers: int) -> None:
    """Give each of the threads that run a network its share of the cores."""
    if workers > 1:
        torch.set_num_threads(max(1, usable_cpus() // workers))


def serve(
    app: FastAPI,
    listening: socket.socket,
    settings: Settings,
    *,
    ready: Callable[[], None] = lambda: None,
    started: Callable[[uvicorn.Server], None] = lambda server: None,
) -> Ended:
    """Serve until SIGINT or SIGTERM: what runs is finished first, but after a second SIGINT.

    Args:
        app: of :func:`retinanet.serve.build_app`.
        listening: of :func:`bind`; closed at the end.
        settings: those of `app`.
        ready: called once the networks are warm.
        started: called before with the server, whose ``should_exit`` ends it too.

    Returns:
        What ended it.

    Raises:
        Exception: what a network raised at its first image.
    """
    import uvicorn

    batcher = app.state.batcher

    class Server(uvicorn.Server):
        ended_by: int | None = None
        told = False

        async def on_tick(self, counter: int) -> bool:
            if batcher.warm and not self.told:
                self.told = True
                ready()
            return batcher.failed is not None or await super().on_tick(counter)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            self.ended_by = sig
            app.state.stopping = True
            if self.should_exit and sig == signal.SIGINT:
                self.force_exit = True
            self.should_exit = True

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            # As uvicorn's, which raises the signal again at the end: a SIGTERM would be no success.
            if threading.current_thread() is not threading.main_thread():
                yield  # signals are for the main thread alone
                return
            before = {
                one: signal.signal(one, self.handle_exit) for one in (signal.SIGINT, signal.SIGTERM)
            }
            try:
                yield
            finally:
                for one, handler in before.items():
                    signal.signal(one, handler)

    server = Server(
        uvicorn.Config(
            app,
            http=_protocol(settings.header_timeout),
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="critical",  # what an application raises is logged by ours
            access_log=False,
            server_header=False,
            proxy_headers=False,  # nothing depends on who asks
            timeout_keep_alive=_KEEP_ALIVE,
            # Each request has its own end before; this is for what none of them foresees.
            timeout_graceful_shutdown=int(settings.timeout) + 5,
            backlog=_BACKLOG,
        )
    )
    started(server)
    server.run(sockets=[listening])
    if batcher.failed is not None:
        raise batcher.failed
    return Ended(server.ended_by, server.force_exit)


def _protocol(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's HTTP, with an end to the time and the bytes that a request's headers may take.

    uvicorn itself waits for ever for headers that never end, and httptools has no limit to them.
    """
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    base: Any = AutoHTTPProtocol

    class Guarded(base):  # type: ignore[misc]
        _clock: asyncio.TimerHandle | None = None
        _header_bytes = 0

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._start_clock()

        def data_received(self, data: bytes) -> None:
            before = self.cycle
            idle = self._idle()
            super().data_received(data)
            if self.cycle is not before or not idle:
                self._stop_clock()
                self._header_bytes = 0
                return
            self._start_clock()
            self._header_bytes += len(data)
            if self._header_bytes > _HEADER_BYTES and not self.transport.is_closing():
                self.transport.write(
                    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
                    b"connection: close\r\ncontent-length: 0\r\n\r\n"
                )
                self.transport.close()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_clock()
            super().connection_lost(exc)

        def _idle(self) -> bool:
            """Whether no request is being answered: what comes is the next one's headers."""
            return self.cycle is None or self.cycle.response_complete

        def _start_clock(self) -> None:
            if self._clock is None:
                loop = asyncio.get_running_loop()
                self._clock = loop.call_later(seconds, self._too_slow)

        def _stop_clock(self) -> None:
            if self._clock is not None:
                self._clock.cancel()
                self._clock = None

        def _too_slow(self) -> None:
            self._clock = None
            if self._idle() and not self.transport.is_closing():
                self.transport.close()

    return Guarded
