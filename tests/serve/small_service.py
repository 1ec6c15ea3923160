"""A service about a detector whose answers can be worked out on paper: it finds white squares."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image
from torch import Tensor, nn

from retinanet.anchors import AnchorSpec
from retinanet.inference import Detector
from retinanet.model.checkpoint import Checkpoint
from retinanet.serve import Settings, build_app
from retinanet.serve.server import bind, serve
from retinanet.structures import Outputs


class WhiteFinder(nn.Module):
    """Each white cell of 8 x 8 pixels of the network's input is an object of class 0."""

    num_classes = 2
    strides = (8,)
    size_divisor = 32
    anchors = AnchorSpec((16.0,), (8,), (1.0,), (1.0,))

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pixel_mean", torch.full((3, 1, 1), 100.4))
        self.batches: list[tuple[int, ...]] = []
        self.open = threading.Event()  # a network can be made to take long
        self.open.set()
        self.entered = threading.Event()

    def forward(self, images: Tensor) -> Outputs:
        self.entered.set()
        self.open.wait()
        self.batches.append(tuple(images.shape))
        cells = nn.functional.avg_pool2d(images.float().mean(dim=1, keepdim=True), 8)
        logit = (cells - 200) / 10  # white: 5.5, so a score of .996
        deltas = torch.zeros(len(images), 4, *cells.shape[-2:])
        # The anchor is 16 x 16 about the cell's upper left corner; the answer is the cell itself.
        deltas[:, :2] = 0.25
        deltas[:, 2:] = float(np.log(0.5))
        return Outputs((torch.cat([logit, logit - 2], dim=1),), (deltas,))


def white_detector() -> Detector:
    model: Any = WhiteFinder()
    detect = {"detect": {"score_threshold": 0.5}}
    checkpoint = Checkpoint(model, ("white", "bright"), (7, 9), 64, 128, detect)
    return Detector(checkpoint, device="cpu", precision="float32")


def finder(detector: Detector) -> WhiteFinder:
    model: Any = detector.model
    return model


def png_image(
    height: int = 128, width: int = 192, kind: str = "PNG", x: int = 32, **options: Any
) -> bytes:
    """A file: black, with a white square of 16 pixels at (x, 16)."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[16:32, x : x + 16] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def wait_until(true: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.002)


@contextmanager
def client(
    detectors: Mapping[str, Detector] | Detector,
    settings: Settings | None = None,
    **more: Any,
) -> Iterator[TestClient]:
    """A client of a service in this process, which is ready."""
    app = build_app(detectors, settings, **more)
    with TestClient(app) as one:
        wait_until(lambda: app.state.batcher.warm)
        yield one


class Running:
    """A service with a port of its own, in a thread."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self.app = app
        self._listening = bind("127.0.0.1", 0)
        self.port = self._listening.getsockname()[1]
        self._server: Any = None
        self._thread = threading.Thread(target=self._run, args=(settings,))

    def _run(self, settings: Settings) -> None:
        serve(self.app, self._listening, settings, started=self._keep)

    def _keep(self, server: Any) -> None:
        self._server = server

    def __enter__(self) -> Running:
        self._thread.start()
        wait_until(lambda: self.app.state.batcher.warm)
        wait_until(lambda: self._server is not None and self._server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(120)
        assert not self._thread.is_alive()


@contextmanager
def running(detector: Detector, settings: Settings | None = None) -> Iterator[Running]:
    """A service that sockets can reach."""
    settings = settings or Settings()
    with Running(build_app({"squares": detector}, settings), settings) as one:
        yield one


def post(content: bytes, kind: str = "image/png", address: str = "/v1/detect") -> bytes:
    """A request as it goes over the line."""
    head = (
        f"POST {address} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


async def ask(port: int, *parts: bytes, pause: float = 0.0) -> tuple[int, bytes, bytes]:
    """Status, headers and body of the answer to a request that is sent in parts."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await writer.drain()
            if pause:
                await asyncio.sleep(pause)
        head = await reader.readuntil(b"\r\n\r\n")
        body = b""
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                body = await reader.readexactly(int(line.split(b":")[1]))
        return int(head.split()[1]), head, body
    finally:
        writer.close()
