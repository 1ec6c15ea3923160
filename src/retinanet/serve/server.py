"""The server process: its socket, its threads, and its shutdown."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from retinanet.errors import ConfigError, RetinaNetError
from retinanet.serve.settings import Settings


def make_server(app: FastAPI, settings: Settings) -> uvicorn.Server:
    """Build the uvicorn server of an application of :func:`retinanet.serve.build_app`."""
    config = uvicorn.Config(
        app,
        http="h11",  # unlike httptools, it limits the size of the headers
        limit_concurrency=1024,  # connections
        timeout_keep_alive=15,
        timeout_graceful_shutdown=int(settings.timeout) + 5,  # a request ends before
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="critical",  # the middleware logs the errors of the application
        access_log=False,
        server_header=False,
    )
    return uvicorn.Server(config)


def serve(
    app: FastAPI,
    listener: socket.socket,
    settings: Settings,
    on_ready: Callable[[], None] = lambda: None,
) -> bool:
    """Serve until SIGINT or SIGTERM, and finish running requests before returning.

    Returns:
        Whether all requests were finished. If not, after a second Ctrl-C, threads may still run a
        network: end the process with ``os._exit``.
    """
    app.state.batcher.start()
    server = make_server(app, settings)
    listener.listen(server.config.backlog)
    on_ready()
    # uvicorn raises the signal again at the end, and SIGTERM would end the process.
    previous = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        server.run(sockets=[listener])
    except KeyboardInterrupt:
        if not server.force_exit:
            raise
    finally:
        signal.signal(signal.SIGTERM, previous)
    return not server.force_exit


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket before the models are loaded; connections are refused until it listens."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port is out of range: {port}; use 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol, for which asyncio disables Nagle's algorithm: it delays the body of a
    # response by up to 40 ms, until the client has acknowledged the headers.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except socket.gaierror as error:
        listener.close()
        raise ConfigError(f"invalid --host: {host} ({error.strerror})") from None
    except OSError as error:
        listener.close()
        raise RetinaNetError(
            f"cannot serve at {host} port {port}: {error.strerror}; use another --host or --port"
        ) from None
    return listener
