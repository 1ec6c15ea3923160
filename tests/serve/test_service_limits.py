"""The limits of the service, each at its boundary, and what must never happen."""

from __future__ import annotations

import gc
import socket
import struct
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from small_service import (
    PNG,
    client,
    finder,
    form,
    png_image,
    post_request,
    running,
    wait_until,
    white_detector,
)
from starlette.exceptions import HTTPException

from retinanet.errors import ConfigError
from retinanet.inference.exported import ExportedNetwork
from retinanet.serve import Settings
from retinanet.serve.batching import Batcher
from retinanet.serve.server import bind


@pytest.fixture(autouse=True)
def no_file_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("an upload went to a temporary file")

    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", fail)
    for name in ("TemporaryFile", "NamedTemporaryFile", "mkstemp"):
        monkeypatch.setattr(tempfile, name, fail)


# Bytes.


def test_body_bytes_are_limited() -> None:
    data = png_image()
    with client(settings=Settings(max_bytes=len(data))) as service:
        assert service.post("/v1/detect", content=data, headers=PNG).status_code == 200
        response = service.post("/v1/detect", content=data + b"x", headers=PNG)
        assert response.status_code == 413
        assert f"over {len(data):,} bytes" in response.json()["detail"]
        # Without a Content-Length.
        chunked = service.post("/v1/detect", content=iter([data, b"x"]), headers=PNG)
        assert chunked.status_code == 413
        chunked = service.post("/v1/detect", content=iter([data[:50], data[50:]]), headers=PNG)
        assert chunked.status_code == 200
        assert service.post("/v1/detect", files=form(data, data)).status_code == 413


def test_large_form_stays_in_memory() -> None:
    large = png_image() + bytes(3_000_000)  # Starlette's own limit is 1 MB
    with client() as service:
        response = service.post("/v1/detect", files=form(large, large))
    assert response.status_code == 200
    assert len(response.json()["images"]) == 2


def test_rejected_body_gets_its_response() -> None:
    data = png_image()
    with running(settings=Settings(max_bytes=1_000_000)) as service:
        for _ in range(3):
            status, body = service.send(post_request(bytes(3_000_000)))
            assert (status, b"1,000,000 bytes" in body) == (413, True)
        # Rejected by its announced length, before the body is sent.
        more = "Expect: 100-continue\r\n"
        assert service.send(post_request(b"", 5_000_000, more))[0] == 413
        # An announced length that is too small: the rest is not a request.
        assert service.send(post_request(data, 60))[0] in (400, 422)
        assert service.send(post_request(data))[0] == 200


# Pixels.


def png_chunk(kind: bytes, data: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + checksum


def png_with_size(width: int, height: int) -> bytes:
    """A few bytes whose header announces an image of any size."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + body + png_chunk(b"IEND", b"")


def with_size(kind: str, width: int, height: int, **options: Any) -> bytes:
    """A file of a format whose header announces a wrong size."""
    data = bytearray(png_image(64, 64, kind, **options))
    if kind == "JPEG":
        start = data.index(b"\xff\xc0") + 5
        data[start : start + 4] = struct.pack(">HH", height, width)
    elif kind == "TIFF":
        (start,) = struct.unpack_from("<I", data, 4)
        (count,) = struct.unpack_from("<H", data, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            (tag,) = struct.unpack_from("<H", data, entry)
            if tag in (256, 257):
                struct.pack_into("<HII", data, entry + 2, 4, 1, width if tag == 256 else height)
    return bytes(data)


def test_pixels_are_limited() -> None:
    with client(settings=Settings(max_pixels=100 * 100)) as service:
        for height, width, status in ((100, 100, 200), (50, 200, 200), (101, 100, 413)):
            content = png_image(height, width)
            response = service.post("/v1/detect", content=content, headers=PNG)
            assert response.status_code == status, response.json()
        assert response.json()["detail"] == (
            "image: too many pixels: 100 x 101; at most 10,000 are accepted, send it smaller"
        )
        files = form(png_image(101, 100), png_image(100, 100))
        response = service.post("/v1/detect", files=files)
        assert response.status_code == 200
        [failure] = response.json()["failures"]
        assert failure["file"] == "0.png"
        assert "at most 10,000" in failure["reason"]


BOMBS = {
    "png": png_with_size(50_000, 50_000),
    "png of the limit of Pillow": png_with_size(13_000, 13_000),
    "png of 2^31 columns": png_with_size(2**31 - 1, 1),
    "jpeg": with_size("JPEG", 65_500, 65_500),
    "tiff": with_size("TIFF", 100_000, 100_000),
    "tiff, compressed": with_size("TIFF", 50_000, 50_000, compression="tiff_lzw"),
    "ppm": b"P6 50000 50000 255\n" + bytes(100),
}


def test_decompression_bomb_is_rejected_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = white_detector()
    decoded: list[Any] = []
    monkeypatch.setattr(detector, "prepare", decoded.append)
    with client(detector) as service:
        for name, bomb in BOMBS.items():
            response = service.post("/v1/detect", content=bomb, headers=PNG)
            assert response.status_code == 413, (name, response.text)
            assert decoded == [], name


def test_gif_frame_larger_than_its_header_is_rejected() -> None:
    # Pillow enlarges the image to the frame before it counts the pixels.
    data = bytearray(png_image(64, 64, "GIF"))
    data[6:10] = struct.pack("<HH", 8, 8)
    start = data.index(b"\x2c", 13 + 3 * 2 ** ((data[10] & 7) + 1))
    struct.pack_into("<HH", data, start + 5, 60_000, 60_000)
    with client() as service:
        response = service.post("/v1/detect", content=bytes(data), headers=PNG)
    assert response.status_code == 413


def test_compressed_text_in_png_is_not_expanded() -> None:
    packed = zlib.compress(bytes(150_000_000), 1)
    whole = png_image()
    end = whole.index(b"IDAT") - 4
    bomb = whole[:end] + png_chunk(b"zTXt", b"Comment\0\0" + packed) + whole[end:]
    before = psutil.Process().memory_info().rss
    with client() as service:
        response = service.post("/v1/detect", content=bomb, headers=PNG)
    assert response.status_code in (200, 422)
    assert psutil.Process().memory_info().rss - before < 100e6


def test_large_exif_in_jpeg_is_accepted() -> None:
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    with client() as service:
        data = png_image(kind="JPEG", exif=exif.tobytes())
        assert service.post("/v1/detect", content=data, headers=PNG).status_code == 200


def test_every_documented_format_is_read() -> None:
    kinds = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "MPO")
    with client() as service:
        for kind in kinds:
            headers = {"Content-Type": "image/x"}
            response = service.post("/v1/detect", content=png_image(kind=kind), headers=headers)
            assert response.status_code == 200, (kind, response.text)
            box = response.json()["images"][0]["detections"][0]["box"]
            assert box == pytest.approx([32, 16, 48, 32], abs=0.5), kind


def test_other_formats_are_not_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = ("EPS", "PDF", "TGA", "ICO", "PCX", "DDS", "SGI", "ICNS")
    files = [png_image(128, 128, kind) for kind in kinds]
    files.append(b"P3\n64 64\n255\n" + b"0 " * (3 * 64 * 64))  # pixels as text
    opened: list[Any] = []
    with client() as service:
        monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(a))
        for data in files:
            response = service.post("/v1/detect", content=data, headers=PNG)
            assert response.status_code == 422
            assert "not an accepted image format: send JPEG" in response.json()["detail"]
    assert opened == []


# Number of images.


def test_images_per_request_are_limited_by_the_queue() -> None:
    with client(settings=Settings(queue=3)) as service:
        assert service.post("/v1/detect", files=form(*3 * [png_image()])).status_code == 200
        response = service.post("/v1/detect", files=form(*4 * [png_image()]))
    assert response.status_code == 413
    assert response.json()["detail"] == "more than 3 images in one request: send fewer"


def test_full_queue_is_503_with_retry_after() -> None:
    detector = white_detector()
    settings = Settings(queue=3, workers=1)
    two = form(png_image(), png_image())
    with client(detector, settings) as service, ThreadPoolExecutor(4) as pool:

        def post() -> Any:
            return service.post("/v1/detect", content=png_image(), headers=PNG)

        assert post().status_code == 200
        finder(detector).gate.clear()
        batcher = service.app.state.batcher  # type: ignore[attr-defined]
        accepted = [pool.submit(post) for _ in range(2)]
        wait_until(lambda: batcher.num_pending == 2 and batcher.num_running == 1)
        assert "retinanet_queue_images 1.0" in service.get("/metrics").text
        response = service.post("/v1/detect", files=two)
        assert response.status_code == 503
        assert response.json()["detail"] == "queue is full: 2 of 3 images; try again"
        assert int(response.headers["retry-after"]) >= 1
        accepted.append(pool.submit(post))
        wait_until(lambda: batcher.num_pending == 3)
        assert post().status_code == 503
        finder(detector).gate.set()
        assert [future.result(120).status_code for future in accepted] == 3 * [200]
        assert service.post("/v1/detect", files=two).status_code == 200
        assert batcher.num_pending == 0


# Time.


def test_timeout_cancels_waiting_images(caplog: pytest.LogCaptureFixture) -> None:
    detector = white_detector()
    settings = Settings(timeout=1.5, workers=1)
    with client(detector, settings) as service, ThreadPoolExecutor(4) as pool:
        batcher = service.app.state.batcher  # type: ignore[attr-defined]
        finder(detector).batches.clear()
        finder(detector).gate.clear()
        futures = [
            pool.submit(service.post, "/v1/detect", content=png_image(), headers=PNG)
            for _ in range(4)
        ]
        responses = [future.result(120) for future in futures]
        assert [response.status_code for response in responses] == 4 * [504]
        assert "took over 1.5 seconds" in responses[0].json()["detail"]
        assert service.post("/v1/detect", files=form(png_image(), b"x")).status_code == 504
        assert batcher.num_pending <= 1  # the one in the network
        finder(detector).gate.set()
        wait_until(lambda: batcher.num_pending == 0 and batcher.num_running == 0)
        assert service.post("/v1/detect", content=png_image(), headers=PNG).status_code == 200
    assert len(finder(detector).batches) == 2  # the network did not run for cancelled images
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_disconnected_client_cancels_its_images() -> None:
    detector = white_detector()
    with running(detector, Settings(workers=1)) as service, ThreadPoolExecutor(1) as pool:
        batcher = service.batcher
        finder(detector).batches.clear()
        finder(detector).gate.clear()
        stays = pool.submit(service.send, post_request(png_image()))
        wait_until(lambda: batcher.num_running == 1)
        service.leave(post_request(png_image()), lambda: batcher.num_pending == 2)
        wait_until(lambda: batcher.num_pending == 1)
        finder(detector).gate.set()
        assert stays.result(120)[0] == 200
        text = batcher.metrics.export().decode()
        assert 'retinanet_requests_total{method="POST",route="/v1/detect",status="499"} 1.0' in text
        assert len(finder(detector).batches) == 1
        service.leave(post_request(png_image())[:-20])  # during its upload
        wait_until(lambda: 'status="499"} 2.0' in batcher.metrics.export().decode())
        assert service.send(post_request(png_image()))[0] == 200


def test_slow_upload_is_408() -> None:
    with running(settings=Settings(timeout=0.4)) as service:
        status, body = service.send(post_request(png_image())[:-30])
        assert status == 408
        assert b"the upload took over 0.4 seconds" in body


# Isolation.


def test_url_in_body_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    with client() as service:

        def fail(*_: Any, **__: Any) -> Any:
            raise AssertionError("connection to another machine")

        monkeypatch.setattr(socket.socket, "connect", fail)
        monkeypatch.setattr(socket, "getaddrinfo", fail)
        for content in (b"http://example.com/a.png", b"file:///etc/passwd", b"/etc/passwd"):
            response = service.post("/v1/detect", content=content, headers=PNG)
            assert response.status_code == 422
            response = service.post("/v1/detect", files=form(("http://a/b.png", content)))
            assert response.status_code == 422
            assert "root:" not in response.text


def tiled(side: int) -> bytes:
    """A TIFF of 100 x 100 in one tile of side x side, packed."""
    pack = zlib.compressobj(9)
    row = bytes(3 * side)
    data = b"".join(pack.compress(row) for _ in range(side)) + pack.flush()
    tags = [(256, 100), (257, 100), (258, 8), (259, 8), (262, 2), (277, 3)]
    tags += [(322, side), (323, side), (324, 0), (325, len(data))]
    start = 8 + 2 + 12 * len(tags) + 4
    entries = b""
    for tag, value in tags:
        count, value = {258: (3, start), 324: (1, start + 6)}.get(tag, (1, value))
        entries += struct.pack("<HHII", tag, 3 if tag == 258 else 4, count, value)
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    return head + entries + bytes(4) + struct.pack("<3H", 8, 8, 8) + data


def test_tiff_tile_pixels_are_limited() -> None:
    with client(settings=Settings(max_pixels=1_000_000)) as service:
        response = service.post("/v1/detect", content=tiled(1008), headers=PNG)
        assert response.status_code == 413, response.text
        assert "a tile of 1,016,064; at most 1,000,000" in response.text
        accepted = service.post("/v1/detect", content=tiled(992), headers=PNG)
        assert accepted.status_code == 200, accepted.text


def test_thresholds_built_into_an_exported_file_cannot_change() -> None:
    class Fixed(ExportedNetwork):
        def __init__(self) -> None:
            self.device, self.backend = torch.device("cpu"), "onnx"

        def check(self, thresholds: Any) -> None:
            if thresholds["score_threshold"] != 0.5:
                raise ConfigError("white.onnx was exported with another score_threshold")

    detector = white_detector()
    detector.network = Fixed()
    batcher = Batcher({"model": detector}, Settings())
    with pytest.raises(HTTPException, match=r"white\.onnx was exported with") as caught:
        batcher.submit("model", [], {"score_threshold": 0.4})
    assert caught.value.status_code == 400
    with pytest.raises(HTTPException, match="the server is starting"):  # the thresholds are valid
        batcher.submit("model", [], {"score_threshold": 0.5})


def test_responses_are_sent_without_delay() -> None:
    with bind("127.0.0.1", 0) as listener:
        # asyncio disables Nagle's algorithm, which delays a body by 40 ms, for this protocol only.
        assert listener.proto == socket.IPPROTO_TCP
