"""The limits of the service, each at its boundary, and what must never happen."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import socket
import struct
import sys
import tempfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from PIL import Image
from small_service import (
    ask,
    client,
    finder,
    png_image,
    post,
    running,
    wait_until,
    white_detector,
)
from torch import Tensor

from retinanet.inference.exported import ExportedFile, ExportedNetwork
from retinanet.serve import Settings
from retinanet.serve import outside as outside_module
from retinanet.serve.upload import Upload

PNG = {"Content-Type": "image/png"}


@pytest.fixture(autouse=True)
def nothing_is_spooled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("an upload went to a temporary file")

    for name in ("SpooledTemporaryFile", "TemporaryFile", "NamedTemporaryFile", "mkstemp"):
        monkeypatch.setattr(tempfile, name, refuse)


def form(*images: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("images", (f"{i}.png", one)) for i, one in enumerate(images)]


# Bytes.


def test_a_body_may_have_so_many_bytes_and_not_one_more() -> None:
    data = png_image()
    with client(white_detector(), Settings(max_bytes=len(data))) as one:
        assert one.post("/v1/detect", content=data, headers=PNG).status_code == 200
        answer = one.post("/v1/detect", content=data + b"x", headers=PNG)
        assert answer.status_code == 413
        assert f"over {len(data):,} bytes" in answer.json()["detail"]
        # Without a Content-Length.
        chunked = one.post("/v1/detect", content=iter([data, b"x"]), headers=PNG)
        assert chunked.status_code == 413
        chunked = one.post("/v1/detect", content=iter([data[:50], data[50:]]), headers=PNG)
        assert chunked.status_code == 200
        large = form(data, data)
        assert one.post("/v1/detect", files=large).status_code == 413
        assert 'failures_total{reason="bytes"} 3.0' in one.get("/metrics").text


def test_a_large_form_stays_in_memory() -> None:
    large = png_image() + bytes(3_000_000)  # over the size at which Starlette takes to the disk
    with client(white_detector()) as one:
        answer = one.post("/v1/detect", files=form(large, large))
    assert answer.status_code == 200
    assert len(answer.json()["images"]) == 2


def test_no_more_is_read_than_is_taken() -> None:
    # The client says 10 bytes less than it sends, or nothing, or ten times more, or sends for ever.
    data = png_image()

    async def endless(port: int) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            b"POST /v1/detect HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        sent = 0
        try:
            while True:
                writer.write(b"10000\r\n" + bytes(65536) + b"\r\n")
                await asyncio.wait_for(writer.drain(), 5)
                sent += 65536
                if reader.at_eof() or sent > 100_000_000:
                    break
                await asyncio.sleep(0)
        except (ConnectionError, TimeoutError):
            pass
        with contextlib.suppress(ConnectionError):  # who never stops may not hear why
            assert (await reader.readuntil(b"\r\n\r\n")).split()[1] == b"413"
        writer.close()
        return sent

    with running(white_detector(), Settings(max_bytes=200_000)) as one:
        sent = asyncio.run(endless(one.port))
        assert (
            'failures_total{reason="bytes"} 1.0' in one.app.state.batcher.metrics.text()[0].decode()
        )
        assert sent < 20_000_000  # what is in the sockets on both sides beside four times the limit
        head = post(data).replace(
            f"Content-Length: {len(data)}".encode(), b"Content-Length: 999999"
        )
        status, headers, _ = asyncio.run(ask(one.port, head))
        assert status == 413
        assert b"connection: close" in headers
        # Another that says too little is cut there: what is behind is no request.
        short = post(data).replace(f"Content-Length: {len(data)}".encode(), b"Content-Length: 60")
        assert asyncio.run(ask(one.port, short))[0] in (400, 422)
        assert asyncio.run(ask(one.port, post(data)))[0] == 200


def test_who_asks_first_is_told_before_it_sends() -> None:
    with running(white_detector(), Settings(max_bytes=1000)) as one:
        head = (
            b"POST /v1/detect HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
            b"Content-Length: 5000\r\nExpect: 100-continue\r\n\r\n"
        )
        began = time.monotonic()
        assert asyncio.run(ask(one.port, head))[0] == 413
        assert time.monotonic() - began < 1.5  # no wait for a body that will not come


def test_a_refused_body_is_read_so_that_its_sender_hears_why() -> None:
    large = bytes(3_000_000)
    with running(white_detector(), Settings(max_bytes=1_000_000)) as one:
        for _ in range(5):
            status, headers, body = asyncio.run(ask(one.port, post(large)))
            assert (status, b"1,000,000 bytes" in body) == (413, True)
            assert b"connection: close" not in headers


def test_all_bodies_together_have_a_limit() -> None:
    data = png_image()
    settings = Settings(max_bytes=len(data) + 10, held_bytes=len(data) + 10)
    detector = white_detector()
    with client(detector, settings) as one, ThreadPoolExecutor(1) as pool:
        gate = finder(detector).open
        gate.clear()
        first = pool.submit(one.post, "/v1/detect", content=data, headers=PNG)
        wait_until(lambda: one.app.state.batcher._at_network == 1)  # type: ignore[attr-defined]
        answer = one.post("/v1/detect", content=data, headers=PNG)
        assert answer.status_code == 503
        assert "as many uploads as it can" in answer.json()["detail"]
        assert answer.headers["retry-after"] == "1"
        gate.set()
        assert first.result(120).status_code == 200
        assert one.post("/v1/detect", content=data, headers=PNG).status_code == 200


# Pixels.


def png_that_says(width: int, height: int) -> bytes:
    """A few bytes that unpack to an image of any size."""
    body = zlib.compress(bytes(1000))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def resized(kind: str, width: int, height: int, **options: Any) -> bytes:
    """A file of this format whose header says another size than it has."""
    data = bytearray(png_image(64, 64, kind, **options))
    if kind == "JPEG":
        place = data.index(b"\xff\xc0") + 5
        data[place : place + 4] = struct.pack(">HH", height, width)
    elif kind == "GIF":
        data[6:10] = struct.pack("<HH", width, height)
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", width, height)
    elif kind == "TIFF":
        (start,) = struct.unpack_from("<I", data, 4)
        (many,) = struct.unpack_from("<H", data, start)
        for i in range(many):
            entry = start + 2 + 12 * i
            (tag,) = struct.unpack_from("<H", data, entry)
            if tag in (256, 257):
                struct.pack_into("<HII", data, entry + 2, 4, 1, width if tag == 256 else height)
    elif kind == "WEBP":
        # VP8X: the canvas, in 24 bits each, less one
        body = bytes(data[12:])
        canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        extended = b"VP8X" + struct.pack("<I", 10) + bytes([0, 0, 0, 0]) + canvas
        data = bytearray(b"RIFF" + struct.pack("<I", 4 + len(extended + body)) + b"WEBP")
        data += extended + body
    return bytes(data)


def test_a_image_may_have_so_many_pixels_and_not_one_more() -> None:
    with client(white_detector(), Settings(max_pixels=100 * 100)) as one:
        for height, width, status in ((100, 100, 200), (50, 200, 200), (101, 100, 413)):
            answer = one.post("/v1/detect", content=png_image(height, width), headers=PNG)
            assert answer.status_code == status, answer.json()
        assert answer.json()["detail"] == (
            "image: its 100 x 101 pixels are more than the 10,000 that are taken: make it smaller"
        )
        mixed = one.post("/v1/detect", files=form(png_image(101, 100), png_image(100, 100)))
        assert mixed.status_code == 200
        assert [one["file"] for one in mixed.json()["failures"]] == ["0.png"]
        assert "more than the 10,000" in mixed.json()["failures"][0]["reason"]


BOMBS = {
    "png": png_that_says(50_000, 50_000),
    "png of the limit of Pillow": png_that_says(13_000, 13_000),
    "png of 2^31 columns": png_that_says(2**31 - 1, 1),
    "jpeg": resized("JPEG", 65_500, 65_500),
    "gif": resized("GIF", 65_535, 65_535),
    "bmp": resized("BMP", 60_000, 60_000),
    "tiff": resized("TIFF", 100_000, 100_000),
    "tiff, packed": resized("TIFF", 50_000, 50_000, compression="tiff_lzw"),
    "webp": resized("WEBP", 16_000, 16_000),
    "ppm": b"P6 50000 50000 255\n" + bytes(100),
}


def test_a_bomb_is_refused_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = white_detector()
    unpacked: list[Any] = []
    monkeypatch.setattr(detector, "prepare", unpacked.append)
    with client(detector) as one:
        for name, bomb in BOMBS.items():
            answer = one.post("/v1/detect", content=bomb, headers=PNG)
            # A header that no decoder believes is as good.
            refused = (413, 422) if name == "webp" else (413,)
            assert answer.status_code in refused, (name, answer.text)
            assert unpacked == [], name


def test_what_unpacks_to_more_than_its_header_says() -> None:
    # A frame larger than its GIF: Pillow enlarges the image to it, before the pixels are counted.
    data = bytearray(resized("GIF", 8, 8))
    place = data.index(b"\x2c", 13 + 3 * 2 ** ((data[10] & 7) + 1))
    assert struct.unpack_from("<HHHH", data, place + 1) == (0, 0, 64, 64)
    struct.pack_into("<HH", data, place + 5, 60_000, 60_000)
    with client(white_detector()) as one:
        answer = one.post("/v1/detect", content=bytes(data), headers={"Content-Type": "image/gif"})
    assert answer.status_code == 413


def test_text_that_unpacks_to_much_is_no_image() -> None:
    packed = zlib.compress(bytes(200_000_000), 1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    whole = png_image()
    end = whole.index(b"IDAT") - 4
    bomb = whole[:end] + chunk(b"zTXt", b"Comment\0\0" + packed) + whole[end:]
    before = psutil.Process().memory_info().rss
    with client(white_detector()) as one:
        answer = one.post("/v1/detect", content=bomb, headers=PNG)
    assert answer.status_code in (200, 422)
    assert psutil.Process().memory_info().rss - before < 100e6


def test_large_notes_in_a_jpeg_are_carried() -> None:
    exif = Image.Exif()
    exif[0x010E] = "x" * 60_000
    with client(white_detector()) as one:
        data = png_image(kind="JPEG", exif=exif.tobytes())
        assert one.post("/v1/detect", content=data, headers=PNG).status_code == 200


@pytest.mark.parametrize(
    "kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "MPO"]
)
def test_every_format_that_is_promised(kind: str) -> None:
    with client(white_detector()) as one:
        data = png_image(kind=kind)
        answer = one.post("/v1/detect", content=data, headers={"Content-Type": "image/x"})
    assert answer.status_code == 200, answer.json()
    assert answer.json()["images"][0]["detections"][0]["box"] == pytest.approx(
        [32, 16, 48, 32], abs=0.5
    )


@pytest.mark.parametrize("kind", ["EPS", "PDF", "TGA", "ICO", "PCX", "DDS", "SGI", "ICNS"])
def test_no_other_format_is_opened(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = png_image(128, 128, kind)
    opened: list[Any] = []
    with client(white_detector()) as one:
        monkeypatch.setattr(Image, "open", lambda *a, **k: opened.append(a))
        answer = one.post("/v1/detect", content=data, headers={"Content-Type": "image/x"})
    assert answer.status_code == 422
    assert "it is no image that is taken: send JPEG, PNG" in answer.json()["detail"]
    assert opened == []


# How many.


def test_a_request_may_have_so_many_images_and_not_one_more() -> None:
    with client(white_detector(), Settings(max_images=3)) as one:
        assert one.post("/v1/detect", files=form(*3 * [png_image()])).status_code == 200
        answer = one.post("/v1/detect", files=form(*4 * [png_image()]))
    assert answer.status_code == 413
    assert answer.json()["detail"] == "more than 3 images in one request: send fewer"


def test_a_full_queue_says_when_to_come_again() -> None:
    detector = white_detector()
    with client(detector, Settings(queue=3, max_images=2)) as one, ThreadPoolExecutor(4) as pool:
        assert one.post("/v1/detect", content=png_image(), headers=PNG).status_code == 200
        finder(detector).open.clear()
        batcher = one.app.state.batcher  # type: ignore[attr-defined]
        first = [
            pool.submit(one.post, "/v1/detect", content=png_image(), headers=PNG) for _ in range(2)
        ]
        wait_until(lambda: batcher._inside == 2)
        wait_until(lambda: batcher.waiting == 1)
        assert "retinanet_queue_images 1.0" in one.get("/metrics").text
        two = one.post("/v1/detect", files=form(png_image(), png_image()))
        assert two.status_code == 503
        assert two.json()["detail"] == "2 images are waiting, of 3 that may: try again"
        assert int(two.headers["retry-after"]) >= 1
        first.append(pool.submit(one.post, "/v1/detect", content=png_image(), headers=PNG))
        wait_until(lambda: batcher._inside == 3)
        assert one.post("/v1/detect", content=png_image(), headers=PNG).status_code == 503
        finder(detector).open.set()
        assert [one.result(120).status_code for one in first] == 3 * [200]
        assert one.post("/v1/detect", files=form(png_image(), png_image())).status_code == 200
        assert batcher._inside == 0
        assert 'failures_total{reason="busy"} 2.0' in one.get("/metrics").text


# Time.


def test_what_takes_too_long_is_given_up_and_dropped() -> None:
    detector = white_detector()
    with client(detector, Settings(timeout=1.5)) as one, ThreadPoolExecutor(4) as pool:
        batcher = one.app.state.batcher  # type: ignore[attr-defined]
        finder(detector).batches.clear()
        finder(detector).open.clear()
        asked = [
            pool.submit(one.post, "/v1/detect", content=png_image(), headers=PNG) for _ in range(4)
        ]
        answers = [one.result(120) for one in asked]
        assert [answer.status_code for answer in answers] == 4 * [504]
        assert "it took over 1.5 seconds" in answers[0].json()["detail"]
        assert batcher._inside <= 1  # the network has one; the others have left the queue
        finder(detector).open.set()
        wait_until(lambda: batcher._inside == 0 and batcher._at_network == 0)
        assert one.post("/v1/detect", content=png_image(), headers=PNG).status_code == 200
    assert len(finder(detector).batches) == 2  # those that nobody waited for were not searched


def test_who_has_gone_is_not_searched_for() -> None:
    detector = white_detector()

    async def leave(port: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(png_image()))
        await writer.drain()
        while one.app.state.batcher._inside < 2:
            await asyncio.sleep(0.005)
        writer.close()

    with running(detector) as one, ThreadPoolExecutor(1) as pool:
        batcher = one.app.state.batcher
        finder(detector).batches.clear()
        finder(detector).open.clear()
        stays = pool.submit(lambda: asyncio.run(ask(one.port, post(png_image()))))
        wait_until(lambda: batcher._at_network == 1)
        asyncio.run(leave(one.port))
        wait_until(lambda: batcher._inside == 1)
        finder(detector).open.set()
        assert stays.result(120)[0] == 200
        text = batcher.metrics.text()[0].decode()
        assert 'retinanet_requests_total{method="POST",route="/v1/detect",status="499"} 1.0' in text
        assert 'failures_total{reason="gone"} 1.0' in text
    assert len(finder(detector).batches) == 1


def test_who_leaves_in_the_middle_of_an_upload() -> None:
    async def leave(port: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(png_image())[:-20])
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()

    with running(white_detector()) as one:
        asyncio.run(leave(one.port))
        wait_until(lambda: 'status="499"} 1.0' in one.app.state.batcher.metrics.text()[0].decode())
        assert asyncio.run(ask(one.port, post(png_image())))[0] == 200


def test_a_slow_upload_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside_module, "_DRAIN_SECONDS", 0.1)
    whole = post(png_image())
    with running(white_detector(), Settings(timeout=0.4)) as one:
        began = time.monotonic()
        status, headers, body = asyncio.run(ask(one.port, whole[:-30]))
        assert time.monotonic() - began < 10
        assert status == 408
        assert b"the upload took over 0.4 seconds" in body
        assert b"connection: close" in headers


def test_slow_and_endless_headers_have_an_end() -> None:
    async def hang(port: int, *parts: bytes) -> tuple[float, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        began = time.monotonic()
        got = b""
        try:
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.05)
            got = await asyncio.wait_for(reader.read(), 10)
        except ConnectionError:
            pass
        writer.close()
        return time.monotonic() - began, got

    with running(white_detector(), Settings(header_timeout=0.5)) as one:
        for parts in ((), (b"GET / HT",), (b"GET / HTTP/1.1\r\nX: ", *(30 * [b"x"]))):
            seconds, got = asyncio.run(hang(one.port, *parts))
            assert 0.3 < seconds < 5, parts
            assert got == b""
        # A second request on the connection, after a first one that was whole.
        begun = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
        seconds, got = asyncio.run(hang(one.port, begun, b"GET /heal"))
        assert got.startswith(b"HTTP/1.1 200")
        assert 0.3 < seconds < 5
        many = [b"GET / HTTP/1.1\r\nHost: x\r\n", *(3 * [b"X: " + 30_000 * b"x" + b"\r\n"])]
        seconds, got = asyncio.run(hang(one.port, *many))
        assert b" 200 " not in got
        # The time of a request itself is not that of headers.
        detector_slow = asyncio.run(ask(one.port, *_thirds(post(png_image())), pause=0.3))
        assert detector_slow[0] == 200


def _thirds(whole: bytes) -> list[bytes]:
    head, body = whole.split(b"\r\n\r\n", 1)
    return [head + b"\r\n\r\n", body[:40], body[40:]]


@pytest.mark.parametrize("protocol", ["h11", "httptools"])
def test_both_of_uvicorns_protocols_are_guarded(
    protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if protocol == "httptools":
        pytest.importorskip("httptools")
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as Protocol
    else:
        from uvicorn.protocols.http.h11_impl import H11Protocol as Protocol  # type: ignore[assignment]
    from uvicorn.protocols.http import auto

    monkeypatch.setattr(auto, "AutoHTTPProtocol", Protocol)
    test_slow_and_endless_headers_have_an_end()
    test_a_refused_body_is_read_so_that_its_sender_hears_why()
    test_no_more_is_read_than_is_taken()


# Elsewhere.


def test_no_answer_is_left_unread(caplog: pytest.LogCaptureFixture) -> None:
    # Such a future would be complained of when it is collected.
    detector = white_detector()
    with client(detector, Settings(timeout=0.6)) as one:
        finder(detector).open.clear()
        for _ in range(3):
            assert one.post("/v1/detect", files=form(png_image(), b"x")).status_code == 504
        finder(detector).open.set()
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_an_address_in_the_body_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    with client(white_detector()) as one:

        def refuse(*_: Any, **__: Any) -> Any:
            raise AssertionError("somebody was called")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        for content in (b"http://example.com/a.png", b"file:///etc/passwd", b"/etc/passwd"):
            answer = one.post("/v1/detect", content=content, headers=PNG)
            assert answer.status_code == 422
            answer = one.post("/v1/detect", files={"images": ("http://a/b.png", content)})
            assert answer.status_code == 422
            assert "root:" not in answer.text


def test_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with client(white_detector()) as one:
        name = str(tmp_path / "made.png")
        assert one.post("/v1/detect", files={"images": (name, png_image())}).status_code == 200
        large = io.BytesIO(png_image() + bytes(2_000_000))
        assert one.post("/v1/detect", files={"images": ("../x.png", large)}).status_code == 200
    assert list(tmp_path.iterdir()) == []


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


def test_a_small_tiff_may_not_have_huge_tiles() -> None:
    with client(white_detector(), Settings(max_pixels=1_000_000)) as one:
        answer = one.post("/v1/detect", content=tiled(1008), headers={"Content-Type": "image/tiff"})
        assert answer.status_code == 413, answer.text
        assert "the 1,016,064 pixels of a tile in it are more than the 1,000,000" in answer.text
        taken = one.post("/v1/detect", content=tiled(992), headers={"Content-Type": "image/tiff"})
        assert taken.status_code == 200, taken.text


def test_pixels_written_as_text_are_not_read() -> None:
    with client(white_detector()) as one:
        data = b"P3\n64 64\n255\n" + b"0 " * (3 * 64 * 64)
        answer = one.post("/v1/detect", content=data, headers={"Content-Type": "image/x-ppm"})
    assert answer.status_code == 422
    assert "it is no image that is taken" in answer.json()["detail"]


def test_what_is_given_up_holds_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = white_detector()
    opened = threading.Event()
    prepare = detector.prepare

    def slowly(source: Any) -> Any:
        opened.wait(120)
        return prepare(source)

    with client(detector, Settings(readers=1)) as one:
        monkeypatch.setattr(detector, "prepare", slowly)
        batcher = one.app.state.batcher  # type: ignore[attr-defined]
        data = png_image()
        uploads = [Upload(f"{i}.png", data) for i in range(6)]
        before = sys.getrefcount(data)
        first, *given_up = batcher.submit("model", uploads, {})
        uploads.clear()
        for answer in given_up:
            answer.cancel()
        # The first is being read; the others stand in the readers' line, and hold nothing.
        assert sys.getrefcount(data) <= before - 4
        opened.set()
        assert first.result(120).found.name == "0.png"


def test_a_page_of_another_site_cannot_send_images() -> None:
    with client(white_detector()) as one:

        def status(**headers: str) -> int:
            given = {name.replace("_", "-"): value for name, value in headers.items()}
            answer = one.post("/v1/detect", content=png_image(), headers={**PNG, **given})
            if answer.status_code == 403:
                assert answer.json()["detail"] == "pages of other sites may not send images here"
            return answer.status_code

        assert status(Sec_Fetch_Site="cross-site", Origin="https://elsewhere.example") == 403
        assert status(Sec_Fetch_Site="same-site", Origin="http://testserver:81") == 403
        assert status(Sec_Fetch_Site="same-origin", Origin="https://behind.a.proxy") == 200
        assert status(Sec_Fetch_Site="none") == 200
        # Without a secure address browsers say the origin alone.
        assert status(Origin="http://elsewhere.example") == 403
        assert status(Origin="null") == 403
        assert status(Origin="http://testserver") == 200
        assert 'failures_total{reason="foreign"} 4.0' in one.get("/metrics").text


def test_what_is_built_into_an_exported_file_cannot_be_asked_otherwise() -> None:
    def nothing(images: Tensor) -> list[Tensor]:
        batch = len(images)
        empty = torch.zeros(batch, 5)
        return [torch.zeros(batch, 5, 4), empty, empty.long(), torch.zeros(batch).long()]

    detector = white_detector()
    file = ExportedFile(
        path=Path("white.onnx"),
        target="onnx",
        form="detections",
        precision="float32",
        classes=detector.classes,
        category_ids=detector.category_ids,
        image_size=64,
        max_size=128,
        thresholds=detector.thresholds,
        strides=(8,),
        per_cell=1,
        info={},
    )
    network = object.__new__(ExportedNetwork)
    network.file, network.description, network._run = file, "ONNX Runtime on cpu", nothing
    detector.network = network
    with client(detector) as one:

        def ask(options: str) -> Any:
            return one.post(f"/v1/detect?{options}", content=png_image(), headers=PNG)

        assert ask("score_threshold=0.6&detections_per_image=3").status_code == 200
        for option in ("score_threshold=0.4", "nms_threshold=0.9", "class_agnostic=true"):
            answer = ask(option)
            assert answer.status_code == 400, answer.text
            assert "white.onnx was exported with" in answer.json()["detail"]
