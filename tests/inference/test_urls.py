"""Images by address: from a server of this process, with its limits and its errors."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from PIL import Image

from retinanet.cli import main
from retinanet.errors import ConfigError, DataError, ImageError
from retinanet.inference import Detector, ImageDetections, UrlSource, find_sources
from retinanet.inference import detector as detector_module
from retinanet.inference.urls import fetch
from white_finder import Pixels


class Handler(BaseHTTPRequestHandler):
    image = b""
    logins: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        self.logins.append(self.headers["Authorization"])
        if self.path == "/headers":
            for _ in range(20):
                self.wfile.write(b"X-Slow: 1\r\n" if _ else b"HTTP/1.0 200 OK\r\n")
                time.sleep(0.05)
            return
        if self.path.startswith("/round"):
            time.sleep(0.1)
            self.send_response(302)
            self.send_header("Location", f"{self.path}x")
            self.end_headers()
            return
        if self.path.startswith("/away"):
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            self.end_headers()
            return
        self.send_response(200 if self.path != "/none" else 404)
        self.end_headers()
        for _ in range(20 if self.path == "/slow" else 1):
            try:
                self.wfile.write(b"x" if self.path == "/slow" else self.image)
                self.wfile.flush()
                time.sleep(0.05 if self.path == "/slow" else 0)
            except OSError:
                return

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(square: Pixels) -> Iterator[str]:
    file = io.BytesIO()
    Image.fromarray(square).save(file, "PNG")
    Handler.image = file.getvalue()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_url_is_fetched_where_it_was_asked_for(
    detector: Detector, server: str, tmp_path: Path, square: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"http://{server}/street/1.png?size=2"
    source = UrlSource.of(address.replace("//", "//me:secret@"))
    assert source.name == "127.0.0.1/street/1.png"
    found = detector.detect(source)
    assert isinstance(found, ImageDetections)
    assert found["white"].boxes.tolist() == [[32, 16, 48, 32]]
    assert [crop.size for crop in found.crop()] == [(16, 16)] * 2  # of the bytes that were fetched
    assert Handler.logins == ["Basic bWU6c2VjcmV0"]  # me:secret, and fetched once
    tiled = detector.detect(source, tile=96)
    assert isinstance(tiled, ImageDetections)
    assert len(tiled["white"]) >= 1
    with pytest.raises(DataError, match="not fetched by default; give --allow-urls, or in Python"):
        detector.detect(address)
    with pytest.raises(DataError, match=r"//host/a.mp4: no image; videos are files"):
        detector.detect("http://me:secret@host/a.mp4")
    for wrong in ("ftp://a", "http://[::1/a", "http:///a"):
        with pytest.raises(ConfigError, match="no http:// or https:// address: "):
            UrlSource.of(wrong)
    assert UrlSource.of("http://h/..%2f../%2e%2e/a/../1.png").name == "h/a/1.png"
    same = [UrlSource.of(f"http://me:secret@h/1.png?size={i}") for i in (1, 2)]
    assert [found.name for found in find_sources(same)] == ["h/1.png"] * 2  # writers number them

    monkeypatch.setattr(detector_module, "open_model", lambda name: None)
    monkeypatch.setattr(detector_module, "Detector", lambda *_, **__: detector)
    out = tmp_path / "found"
    missing = f"http://{server}/none"
    words = ["detect", "model", address, missing, "--out", str(out)]
    assert main([*words, "--format=json,images", "--allow-urls"]) == 1
    content = json.loads((out / "detections.json").read_text())
    assert [image["file"] for image in content["images"]] == ["127.0.0.1/street/1.png"]
    assert content["failures"][0]["reason"] == f"{missing}: cannot be fetched: Not Found"
    assert (out / "images/127.0.0.1/street/1.png").is_file()


def test_urls_are_off_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["detect", "model", "http://me:secret@host/1.png"]) == 1
    message = capsys.readouterr().err
    assert "http://host/1.png: addresses are not fetched by default; give --allow-urls" in message
    assert "secret" not in message


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/none", "cannot be fetched: Not Found"),
        ("/away", "cannot be fetched"),  # never a file of this machine
        ("/large", "over 100 bytes"),
        *((path, "not fetched within 0.2 s") for path in ("/slow", "/headers", "/round")),
    ],
)
def test_limits_of_fetch(server: str, path: str, message: str) -> None:
    limit = 100 if path == "/large" else 10**6
    with pytest.raises(ImageError, match=message):
        fetch(f"http://{server}{path}", max_bytes=limit, max_seconds=0.2)


def test_host_that_does_not_answer_is_an_error() -> None:
    source = UrlSource.of("http://me:se@cret@127.0.0.1:9/a?b=c@d")  # as urlsplit: at the last @
    with pytest.raises(
        ImageError, match=r"^http://127.0.0.1:9/a\?b=c@d: cannot be fetched: .*refused"
    ) as error:
        source.load()
    assert source.failure(error.value).source == "http://127.0.0.1:9/a?b=c@d"
