"""The server process: its socket, its threads, and its shutdown."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI

from retinanet.data.cpus import usable_cpus
from retinanet.errors import ConfigError, RetinaNetError
from retinanet.serve.settings import Settings

_MAX_HEADER_BYTES = 64 * 1024
_MAX_CONNECTIONS = 1024
_KEEP_ALIVE_SECONDS = 15


class Server(uvicorn.Server):
    """A uvicorn server that ends without raising the signal that ended it.

    Args:
        app: an application of :func:`retinanet.serve.build_app`.
        settings: its settings.
        on_ready: called once requests are accepted.

    Attributes:
        exit_signal: the signal that ended the server, if any.
    """

    def __init__(
        self, app: FastAPI, settings: Settings, on_ready: Callable[[], None] = lambda: None
    ) -> None:
        config = uvicorn.Config(
            app,
            http="h11",  # unlike httptools, it limits the size of the headers
            h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(settings.timeout) + 5,  # a request ends before
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="critical",  # the middleware logs the errors of the application
            access_log=False,
            server_header=False,
            proxy_headers=False,  # nothing depends on the client's address
        )
        super().__init__(config)
        self.exit_signal: int | None = None
        self._app = app
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept requests."""
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Finish running requests and exit; a second Ctrl-C exits without finishing them."""
        # uvicorn's own method records the signal to raise it again, so that SIGTERM would not exit
        # with code 0.
        self.exit_signal = sig
        self._app.state.stopping = True
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True


def serve(app: FastAPI, listener: socket.socket, settings: Settings, **options: Any) -> Server:
    """Serve until SIGINT or SIGTERM, and finish running requests before returning.

    Args:
        app: an application of :func:`retinanet.serve.build_app`.
        listener: a socket of :func:`bind`; closed at the end.
        settings: the settings of `app`.
        options: passed to :class:`Server`.

    Returns:
        The server, with the signal that ended it. If its ``force_exit`` is set, requests were not
        finished and threads may still run a network: end the process with ``os._exit``.

    Raises:
        Exception: any exception of a network during its warm-up.
    """
    app.state.batcher.start()
    server = Server(app, settings, **options)
    server.run(sockets=[listener])
    return server


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket before the models are loaded; connections are refused until it listens.

    Args:
        host: host name or address of this machine.
        port: 0 picks a free port.

    Raises:
        ConfigError: the host or port does not exist.
        RetinaNetError: the address is in use, not permitted, or not of this machine.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port is out of range: {port}; use 0 to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
    except OSError as error:
        raise ConfigError(f"invalid --host: {host} ({error.strerror})") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise RetinaNetError(
            f"cannot serve at {host} port {port}: {error.strerror}; use another --host or --port"
        ) from None
    return listener


def share_cores(workers: int) -> None:
    """Divide the CPU cores among the threads that run a network."""
    if workers > 1:
        torch.set_num_threads(max(1, usable_cpus() // workers))
