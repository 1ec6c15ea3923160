"""Small services on their own ports, and one Chromium for all tests of the page."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from page_driver import KEY, PageDriver
from PIL import Image
from small_service import colour_detector, running

from retinanet.serve import Settings

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--use-fake-device-for-media-stream",
]


@pytest.fixture(scope="package")
def server() -> Iterator[str]:
    """``colours``; ``strict``, which detects bright squares only; ``other`` with other classes."""
    detectors = {
        "colours": colour_detector(),
        "strict": colour_detector(190.0, ("red", "green", "violet"), (2, 4, 6)),
        "other": colour_detector(classes=("violet", "rose", "sky"), category_ids=(1, 2, 3)),
    }
    metrics = {"colours": {"AP": 0.5784, "AP50": 0.8912, "data": "cells", "split": "val"}}
    with running(detectors, metrics=metrics) as service:
        yield f"http://127.0.0.1:{service.port}/"


@pytest.fixture(scope="package")
def guarded() -> Iterator[str]:
    """A service with a key and low limits."""
    settings = Settings(api_key=KEY, max_bytes=4000, max_pixels=20_000)
    with running({"colours": colour_detector()}, settings) as service:
        yield f"http://127.0.0.1:{service.port}/"


@pytest.fixture(scope="package")
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium: Any, server: str) -> Iterator[Callable[..., PageDriver]]:
    """Open the page; at the end check that it logged no error and loaded nothing from elsewhere.

    ``failures=True`` allows failed requests, which Chromium logs as errors. ``ready=False`` does
    not wait for the models.
    """
    drivers: list[PageDriver] = []

    def make(
        address: str = server,
        *,
        failures: bool = False,
        ready: bool = True,
        script: str = "",
        **options: Any,
    ) -> PageDriver:
        context = chromium.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        context.set_default_timeout(30_000)
        context.add_init_script(script)
        driver = PageDriver(context.new_page(), address, failures)
        drivers.append(driver)
        driver.page.goto(address)
        if ready:
            driver.page.wait_for_selector("#model-facts dl")
        return driver

    yield make
    for driver in drivers:
        driver.page.context.close()
        own = (driver.address, "blob:", "data:")
        assert [url for url in driver.requests if not url.startswith(own)] == []
        assert driver.errors == []


@pytest.fixture
def driver(open_page: Callable[..., PageDriver]) -> PageDriver:
    return open_page()


@pytest.fixture
def failing(open_page: Callable[..., PageDriver]) -> PageDriver:
    """A page whose requests may fail."""
    return open_page(failures=True)


@pytest.fixture
def draw(tmp_path: Path) -> Callable[..., Path]:
    """Write a black image with squares of 8 x 8 pixels at (x, y) in a colour."""

    def write(
        name: str,
        *squares: tuple[int, int, tuple[int, int, int]],
        height: int = 64,
        width: int = 96,
        **options: Any,
    ) -> Path:
        pixels = np.zeros((height, width, 3), np.uint8)
        for x, y, colour in squares:
            pixels[y : y + 8, x : x + 8] = colour
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file, **options)
        return file

    return write


@pytest.fixture
def detect(server: str) -> Callable[..., dict[str, Any]]:
    """Detect objects in a file without the page."""

    def post(file: Path, model: str = "colours") -> dict[str, Any]:
        url = f"{server}v1/detect?model={model}"
        headers = {"Content-Type": "image/png"}
        return httpx.post(url, content=file.read_bytes(), headers=headers, timeout=60).json()

    return post
