"""Broken files and forms: each is rejected or processed, none is a failure of the server."""

from __future__ import annotations

import io
import random
from collections import Counter
from typing import Any

import numpy as np
from PIL import Image
from small_service import client

from retinanet.serve import Settings

EXIF = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0" + 12 * b"\1"
KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    *(("JPEG", {}), ("JPEG", {"progressive": True, "exif": EXIF}), ("MPO", {}), ("PNG", {})),
    *(("WEBP", {}), ("GIF", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "jpeg"})),
    *(("TIFF", {"compression": "tiff_lzw"}), ("PPM", {}), ("JPEG2000", {}), ("AVIF", {})),
)
EXTREMES = (4 * b"\0", 4 * b"\xff", b"\x7f\xff\xff\xff", b"\0\0\xff\xff")
LIMITS = Settings(max_pixels=1_000_000, timeout=20)


def whole_files() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
    photo = Image.fromarray(pixels).resize((96, 72), Image.Resampling.BICUBIC)
    files = []
    for kind, options in KINDS:
        file = io.BytesIO()
        photo.save(file, kind, **options)
        files.append(file.getvalue())
    return files


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Cut, flip, overwrite or remove bytes, or set sizes and counts to extreme values."""
    changed = bytearray(data)
    start = rng.randrange(len(changed))
    kind = rng.randrange(5)
    if kind == 0:
        return data[:start]
    if kind == 1:  # in the header
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(min(len(changed), 200))] = rng.randrange(256)
    elif kind == 2:
        for _ in range(rng.randint(1, 64)):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    elif kind == 3:
        changed[start : start + rng.randint(0, 40)] = rng.choice([b"", rng.randbytes(40)])
    else:
        start = rng.randrange(min(len(changed), 200))
        changed[start : start + 4] = rng.choice(EXTREMES)
    return bytes(changed)


def test_broken_files_are_never_a_500() -> None:
    rng = random.Random(5)
    headers = {"Content-Type": "image/x"}
    statuses: Counter[int] = Counter()
    with client(settings=LIMITS) as service:
        files = whole_files()
        for data in files:
            response = service.post("/v1/detect", content=data, headers=headers)
            assert response.status_code == 200, response.json()
        for i in range(160):
            data = mutate(files[i % len(files)], rng)
            response = service.post("/v1/detect", content=data, headers=headers)
            assert response.status_code in (200, 413, 422), (i, response.text)
            statuses[response.status_code] += 1
            if response.status_code != 200:
                detail = response.json()["detail"]
                assert detail == " ".join(detail.split())
                assert "bytes of an image" not in detail
    assert min(statuses[200], statuses[422]) > 20
    assert statuses[413] > 0


def test_broken_forms_are_never_a_500() -> None:
    rng = random.Random(6)
    form = (
        b'--bound\r\nContent-Disposition: form-data; name="images"; filename="a.png"\r\n'
        b"Content-Type: image/png\r\n\r\n" + whole_files()[3] + b"\r\n--bound--\r\n"
    )
    headers = {"Content-Type": "multipart/form-data; boundary=bound"}
    statuses: Counter[int] = Counter()
    with client(settings=LIMITS) as service:
        assert service.post("/v1/detect", content=form, headers=headers).status_code == 200
        for _ in range(80):
            response = service.post("/v1/detect", content=mutate(form, rng), headers=headers)
            assert response.status_code in (200, 400, 413, 422), response.text
            statuses[response.status_code] += 1
    assert statuses[400] > 10
