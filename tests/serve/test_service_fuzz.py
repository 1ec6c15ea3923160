"""Broken files: each is refused or searched, none is a failure of the server."""

from __future__ import annotations

import io
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_service import client

from retinanet.serve import Settings

KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("JPEG", {}),
    (
        "JPEG",
        {"progressive": True, "exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0" + 12 * b"\1"},
    ),
    ("MPO", {}),
    ("PNG", {}),
    ("WEBP", {}),
    ("GIF", {}),
    ("BMP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "jpeg"}),
    ("PPM", {}),
    ("JPEG2000", {}),
    ("AVIF", {}),
)


def whole_files() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    photo = Image.fromarray(pixels).resize((96, 72), Image.Resampling.BICUBIC)
    files = []
    for kind, options in KINDS:
        file = io.BytesIO()
        photo.save(file, kind, **options)
        files.append(file.getvalue())
    return files


def mutated(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    place = chance.randrange(len(changed))
    how = chance.randrange(6)
    if how == 0:
        return bytes(changed[:place])
    if how == 1:  # the header
        for _ in range(chance.randint(1, 8)):
            changed[chance.randrange(min(len(changed), 200))] = chance.randrange(256)
    elif how == 2:
        for _ in range(chance.randint(1, 64)):
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    elif how == 3:
        changed[place : place + 40] = chance.randbytes(40)
    elif how == 4:
        changed[place : place + chance.randint(0, 40)] = b""
    else:  # sizes and counts at their ends
        value = chance.choice(
            [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\xff\xff"]
        )
        place = chance.randrange(min(len(changed), 200))
        changed[place : place + 4] = value
    return bytes(changed)


def test_broken_files_are_never_a_500(recwarn: pytest.WarningsRecorder) -> None:
    chance = random.Random(5)
    whole = whole_files()
    statuses: Counter[int] = Counter()
    with client(settings=Settings(max_pixels=1_000_000, timeout=20)) as one:
        for data in whole:
            answer = one.post("/v1/detect", content=data, headers={"Content-Type": "image/x"})
            assert answer.status_code == 200, answer.json()
        for i in range(260):
            data = mutated(whole[i % len(whole)], chance)
            answer = one.post("/v1/detect", content=data, headers={"Content-Type": "image/x"})
            assert answer.status_code in (200, 413, 422), (i, answer.text)
            statuses[answer.status_code] += 1
            if answer.status_code != 200:
                detail = answer.json()["detail"]
                assert detail == " ".join(detail.split())
                assert "bytes of an image" not in detail
        text = one.get("/metrics").text
        assert 'reason="internal"} 0.0' in text
        assert 'reason="timeout"} 0.0' in text
    assert min(statuses[code] for code in (200, 422)) > 20
    assert statuses[413] > 0


def test_broken_forms_are_never_a_500() -> None:
    chance = random.Random(6)
    form = (
        b'--bound\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n'
        b"Content-Type: image/png\r\n\r\n" + whole_files()[3] + b"\r\n--bound--\r\n"
    )
    kind = {"Content-Type": "multipart/form-data; boundary=bound"}
    statuses: Counter[int] = Counter()
    with client(settings=Settings(max_pixels=1_000_000)) as one:
        assert one.post("/v1/detect", content=form, headers=kind).status_code == 200
        for _ in range(120):
            content = mutated(form, chance)
            answer = one.post("/v1/detect", content=content, headers=kind)
            assert answer.status_code in (200, 400, 413, 422), answer.text
            statuses[answer.status_code] += 1
    assert statuses[400] > 10
