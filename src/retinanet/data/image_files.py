"""Image files without their pixels: names, sizes from headers, and errors. Imports no torch."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from itertools import chain
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from retinanet.data.archives import find_member
from retinanet.data.cpus import usable_cpus
from retinanet.errors import ImageError, RetinaNetError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
    | {".ppm", ".pgm", ".pbm", ".jp2", ".avif", ".heic", ".heif"}
)
"""Lower-case suffixes of images in a folder; the format of a file is found by its content."""

TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of a TIFF and of a BigTIFF."""

EncodedImage = bytes | bytearray | memoryview
"""The bytes of an image file."""

_CHUNK = 64  # images that a thread reads at a time

SIDEWAYS = frozenset({5, 6, 7, 8})  # EXIF orientations that exchange height and width

# warnings.catch_warnings is not thread-safe: two threads could leave every warning switched off. A
# forked child must not inherit the lock while it is held.
_lock = threading.RLock()


def _renew_lock() -> None:
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


_SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2"}


def suffix_of(form: str) -> str:
    """Return the extension of Pillow's name of a format."""
    return _SUFFIXES.get(form, f".{form.lower()}")


def image_size(source: str | os.PathLike[str] | EncodedImage) -> tuple[int, int]:
    """Height and width of an image as :func:`read_image` gives it, from its header."""
    with quiet():
        return _upright_size(source)


def image_sizes(paths: Sequence[str | os.PathLike[str]]) -> list[tuple[int, int] | ImageError]:
    """Return the sizes of many images, read in threads; the error of those that cannot be read."""

    def read(chunk: Sequence[str | os.PathLike[str]]) -> list[tuple[int, int] | ImageError]:
        sizes: list[tuple[int, int] | ImageError] = []
        for path in chunk:
            try:
                sizes.append(_upright_size(path))
            except ImageError as error:
                sizes.append(error)
        return sizes

    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    with quiet(), ThreadPoolExecutor(min(16, 4 * usable_cpus())) as pool:
        return list(chain.from_iterable(pool.map(read, chunks)))


def _upright_size(source: str | os.PathLike[str] | EncodedImage) -> tuple[int, int]:
    name, file = open_source(source)
    with image_errors(name), Image.open(file) as image:
        width, height = image.size
        # Pillow states the size of a TIFF after its orientation, of all others before it.
        sideways = image.format != "TIFF" and exif_orientation(image) in SIDEWAYS
    return (width, height) if sideways else (height, width)


def network_size(height: int, width: int, shorter: int, longest: int) -> tuple[int, int]:
    """Height and width at which an image enters the network, its aspect ratio kept.

    The shorter side becomes `shorter`, or less where the longer would exceed `longest`; at least 1.
    """
    scale = min(shorter / min(height, width), longest / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def stored_size(source: str | os.PathLike[str] | EncodedImage) -> tuple[int, int, int]:
    """Height and width as stored, and pixels per tile of a TIFF, else 0; from the header alone.

    :func:`image_size` may decode a PNG; a tile is decoded whole however small the image is.
    """
    name, file = open_source(source)
    with image_errors(name), quiet(), Image.open(file) as image:
        tags = getattr(image, "tag_v2", {})
        width, length = (int(np.max(tags.get(tag, 0))) for tag in (322, 323))
        return image.height, image.width, width * length


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress Pillow's warnings of big images, broken EXIF and the like."""
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def image_errors(name: str) -> Iterator[None]:
    """Convert what a decoder raises to an ImageError of one line with the image's name."""
    try:
        yield
    except RetinaNetError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name}: there is no such file") from None
    except UnidentifiedImageError:
        raise ImageError(f"{name}: {unidentified(name)}; replace or remove it") from None
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{name}: {error}; cut it into tiles, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from None
    # Damaged files make Pillow's plugins raise nearly anything: OSError, SyntaxError, struct.error,
    # zlib.error, IndexError, OverflowError, ...
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ImageError(f"{name}: cannot be read: {reason or type(error).__name__}") from None


def unidentified(name: str) -> str:
    """Return why Pillow knows no format of a file, such as a Git LFS pointer."""
    if _is_heif(name) and not _register_heif():
        return "HEIC images need the package pillow-heif: pip install pillow-heif"
    reason = "not an image of any known format"
    try:
        with open(name, "rb") as file:
            start = file.read(20)
    except OSError:
        return reason
    if start[:4] in TIFF_STARTS:
        return "a TIFF that is damaged or of unsupported bands; convert it to 8 bits, grey or RGB"
    return f"{reason} ({f'it begins with {start!r}' if start else 'it is empty'})"


def open_source(source: str | os.PathLike[str] | EncodedImage) -> tuple[str, Any]:
    """Return the name of an encoded image for messages, and its path or its bytes."""
    if isinstance(source, bytes | bytearray | memoryview):
        return "bytes of an image", BytesIO(source)
    held = find_member(source)
    if _is_heif(os.fspath(source)):
        _register_heif()
    return os.fspath(source), source if held is None else BytesIO(held.read())


def _is_heif(name: str) -> bool:
    return name.lower().endswith((".heic", ".heif"))


def _register_heif() -> bool:
    """Let Pillow read HEIC; whether pillow-heif is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image; 1 if it states none."""
    return int(image.getexif().get(ExifTags.Base.Orientation, 1))
