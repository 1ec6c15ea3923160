"""A service with small models on its own port, and Chromium."""

from __future__ import annotations

import json
import shutil
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from colour_finder import Square, colour_finder, image
from page_driver import KEY, PageDriver

from retinanet.serve import Settings, build_app

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--use-fake-device-for-media-stream",
]


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The address of an application that runs in a thread."""
    uvicorn = pytest.importorskip("uvicorn")
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """``colours``; ``strict``, which finds bright squares alone; ``other`` with other classes."""
    pytest.importorskip("fastapi")
    detectors = {
        "colours": colour_finder(),
        "strict": colour_finder(190.0, ("red", "green", "violet"), (2, 4, 6)),
        "other": colour_finder(classes=("violet", "rose", "sky"), category_ids=(1, 2, 3)),
    }
    judged = {"colours": {"AP": 0.5784, "AP50": 0.8912, "data": "/x/cells", "split": "val"}}
    with served(build_app(detectors, metrics={**judged, "strict": None, "other": None})) as address:
        yield address


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    """A service with a key and low limits."""
    pytest.importorskip("fastapi")
    settings = Settings(api_key=KEY, max_bytes=4000, max_pixels=20_000)
    with served(build_app({"colours": colour_finder()}, settings)) as address:
        yield address


@pytest.fixture(scope="module")
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

    ``failures=True`` allows failed requests, which Chromium logs as errors.
    """
    contexts = []
    drivers: list[PageDriver] = []

    def make(
        address: str = server, *, failures: bool = False, opened: bool = True, **options: Any
    ) -> PageDriver:
        script = options.pop("script", None)
        options.setdefault("viewport", {"width": 1280, "height": 800})
        context = chromium.new_context(**options)
        context.set_default_timeout(60_000)
        contexts.append(context)
        if script:
            context.add_init_script(script)
        driver = PageDriver(context.new_page(), address)
        driver.failures_expected = failures
        drivers.append(driver)
        return driver.open() if opened else driver

    yield make
    for context in contexts:
        context.close()
    for driver in drivers:
        own = (driver.address, "blob:", "data:")
        assert [url for url in driver.requests if not url.startswith(own)] == []
        ignored = "Failed to load resource" if driver.failures_expected else None
        assert [one for one in driver.errors if not (ignored and ignored in one)] == []


@pytest.fixture
def driver(open_page: Callable[..., PageDriver]) -> PageDriver:
    return open_page()


@pytest.fixture
def draw(tmp_path: Path) -> Callable[..., Path]:
    """Writes an image with squares, and gives its path."""

    def write(name: str, *squares: Square, **options: Any) -> Path:
        size = {key: options.pop(key) for key in ("height", "width") if key in options}
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        image(*squares, **size).save(file, **options)
        return file

    return write


@pytest.fixture
def ask(server: str) -> Callable[..., dict[str, Any]]:
    """Detect in a file without the page."""

    def post(file: Path, model: str = "colours") -> dict[str, Any]:
        request = urllib.request.Request(
            f"{server}v1/detect?model={model}",
            file.read_bytes(),
            {"Content-Type": "image/png"},
        )
        with urllib.request.urlopen(request) as response:
            return json.load(response)

    return post
