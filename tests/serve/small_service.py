"""A service with a detector whose results can be computed by hand: it detects white squares."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPResponse
from typing import Any

import numpy as np
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from torch import Tensor, nn

from retinanet.inference import Detector, Source
from retinanet.model.checkpoint import Checkpoint
from retinanet.serve import Settings, build_app
from retinanet.serve.server import bind, make_server
from retinanet.structures import Outputs
from white_finder import ColourFinder, WhiteFinder

PNG = {"Content-Type": "image/png"}


class Gated(nn.Module):
    """Clear the gate to block the network."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.gate = threading.Event()
        self.gate.set()

    def forward(self, images: Tensor) -> Outputs:
        self.gate.wait()
        return super().forward(images)  # type: ignore[no-any-return]


class GatedWhiteFinder(Gated, WhiteFinder):
    pass


class GatedColourFinder(Gated, ColourFinder):
    pass


def white_detector() -> Detector:
    return _detector(GatedWhiteFinder(), ("white", "bright"), (7, 9), 0.5)


def colour_detector(
    half: float = 150.0,
    classes: Sequence[str] = ("red", "green", "<i>blue</i>"),
    category_ids: Sequence[int] = (3, 7, 9),
) -> Detector:
    """Images of 64 x 96 pixels reach the network as they are."""
    return _detector(GatedColourFinder(half), classes, category_ids, 0.05)


def _detector(
    network: Any, classes: Sequence[str], category_ids: Sequence[int], threshold: float
) -> Detector:
    checkpoint = Checkpoint(network, tuple(classes), tuple(category_ids), 64, 128)
    return Detector(checkpoint, device="cpu", precision="float32", score_threshold=threshold)


def finder(detector: Detector) -> Any:
    return detector.model


def png_image(
    height: int = 128, width: int = 192, kind: str = "PNG", x: int = 32, **options: Any
) -> bytes:
    """A file: black, with a white square of 16 pixels at (x, 16)."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[16:32, x : x + 16] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def form(*images: bytes | tuple[str, bytes]) -> list[tuple[str, tuple[str, bytes]]]:
    """Files of a form, as (name, content) or as content."""
    named = [
        image if isinstance(image, tuple) else (f"{i}.png", image) for i, image in enumerate(images)
    ]
    return [("images", file) for file in named]


def expected(detector: Detector, name: str, data: bytes, **thresholds: Any) -> dict[str, Any]:
    """Detections by the detector itself."""
    [image] = detector.stream([Source(data, name)], **thresholds)
    return image.to_dict()


def wait_until(condition: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.002)


@contextmanager
def client(
    detectors: Mapping[str, Detector] | Detector | None = None,
    settings: Settings | None = None,
    **options: Any,
) -> Iterator[TestClient]:
    """A client of a service in this process."""
    app = build_app(detectors or white_detector(), settings or Settings(workers=1), **options)
    with TestClient(app) as test_client:
        yield test_client


class Running:
    """A service with a port, in a thread."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self.app = app
        self.batcher = app.state.batcher
        self._listener = bind("127.0.0.1", 0)
        self.port = self._listener.getsockname()[1]
        self._server = make_server(app, settings)
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],))

    def __enter__(self) -> Running:
        self._thread.start()
        wait_until(lambda: self._server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(120)
        assert not self._thread.is_alive()

    def send(self, *parts: bytes) -> tuple[int, bytes]:
        """Send a request in parts; return status and body of the response."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=120) as line:
            for part in parts:
                line.sendall(part)
            response = HTTPResponse(line)
            response.begin()
            return response.status, response.read()

    def leave(self, part: bytes, until: Callable[[], bool] = lambda: True) -> None:
        """Send a part of a request, wait, and close the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=120) as line:
            line.sendall(part)
            wait_until(until)


@contextmanager
def running(
    detectors: Mapping[str, Detector] | Detector | None = None,
    settings: Settings | None = None,
    **options: Any,
) -> Iterator[Running]:
    """A service that sockets can reach."""
    settings = settings or Settings(workers=1)
    app = build_app(detectors or white_detector(), settings, **options)
    with Running(app, settings) as service:
        yield service


def post_request(content: bytes, length: int | None = None, more: str = "") -> bytes:
    """The bytes of a POST request."""
    head = (
        f"POST /v1/detect HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n{more}"
        f"Content-Length: {len(content) if length is None else length}\r\n\r\n"
    )
    return head.encode() + content
