"""Windows of images that are too large to decode whole.

Of a TIFF only the tiles or strips under a window are decoded, by tifffile and imagecodecs (the
extra ``tiff``). Every other file is decoded whole by Pillow, when its first window is read.
"""

from __future__ import annotations

import os
import statistics
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO
from itertools import pairwise, product
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from retinanet.data.image_files import image_errors, image_size, open_source
from retinanet.data.images import (
    ImageSource,
    ValueRange,
    array_size,
    check_value_range,
    find_value_range,
    is_tiff,
    pil_to_rgb,
    read_image,
    resize_pixels,
    to_rgb,
)
from retinanet.errors import ImageError, MissingExtraError

Window = tuple[int, int, int, int]
"""x1, y1, x2, y2 in whole pixels of the upright image, within it."""

CACHED_BYTES = 2**26
"""Decoded tiles or strips of an image that are kept for the next window; at least those of one."""

_BAND_PIXELS = 2**20  # rows that are resized at a time have about as many
_LEVEL_MARGIN = 2  # a pyramid level must have as many times the wanted size


class Windows(ABC):
    """An image of which parts are read; usable from several threads.

    Attributes:
        size: (height, width) of the upright image.
    """

    size: tuple[int, int]

    @abstractmethod
    def read(self, window: Window) -> Tensor:
        """Read a window as (3, h, w) uint8, the crop of the whole image.

        Raises:
            ImageError: it cannot be read.
        """

    def reduced(self, height: int, width: int) -> Tensor:
        """Read the whole image resized to (3, height, width) uint8.

        Bands of rows are narrowed as they are read, so that at most the image's height times the
        new width is in memory. Differs from ``resize_to`` of the whole by at most a level, or, of
        a TIFF with smaller pyramid levels, by what these differ from the image.
        """
        rows, columns = self.size
        narrow = torch.empty(rows, width, 3, dtype=torch.uint8)
        for top, bottom in pairwise([*range(0, rows, self._band_rows()), rows]):
            band = self.read((0, top, columns, bottom))
            narrow[top:bottom] = resize_pixels(band, bottom - top, width).permute(1, 2, 0)
        return resize_pixels(narrow.permute(2, 0, 1), height, width)

    def _band_rows(self) -> int:
        return max(1, _BAND_PIXELS // self.size[1])


def open_windows(source: ImageSource, *, value_range: ValueRange | None = None) -> Windows:
    """Open an image for reading windows of it.

    Of TIFF and BigTIFF (with the extra ``tiff``; the first page; upright; 8 and 16 bits and
    bilevel, in any compression of imagecodecs, other types of values with `value_range`) only
    tiles or strips are decoded, and smaller pyramid levels serve :meth:`Windows.reduced`. Of arrays
    and tensors, also ``numpy.memmap``, the window is converted. All else (JPEG, PNG, ...) is
    decoded whole when the first window is read.

    What is decoded at once, an image, a tile or a strip, may have at most 2 x
    ``PIL.Image.MAX_IMAGE_PIXELS`` pixels (179 million). A file must stay where it is.

    Args:
        source, value_range: as in :func:`retinanet.data.images.read_image`.

    Raises:
        ImageError: there is no such file, it is no image, or it has to be decoded whole and is too
            large.
        MissingExtraError: it is a TIFF that is too large to be decoded whole, and the extra
            ``tiff`` is not installed.
        ConfigError: as in :func:`retinanet.data.images.read_image`.
    """
    check_value_range(value_range)
    if isinstance(source, Tensor | np.ndarray):
        return _InMemory(source, value_range)
    if isinstance(source, Image.Image):
        return _InMemory(read_image(source, value_range=value_range), None)
    name, stored = open_source(source)
    with image_errors(name):
        if not is_tiff(stored):
            return _Whole(source, name, stored, value_range)
        has_extra = bool(find_spec("tifffile") and find_spec("imagecodecs"))
        windows = _open_tiff(name, stored, value_range) if has_extra else None
        return windows or _Whole(source, name, stored, value_range, needs_extra=not has_extra)


def read_window(
    source: str | os.PathLike[str], window: Window, whole: Tensor | None = None
) -> Tensor:
    """Read one window of an image file; `whole` is the image, if it is decoded already."""
    windows = open_windows(source if whole is None else whole)
    (height, width), (x1, y1, x2, y2) = windows.size, window
    if not (0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height):
        raise ImageError(
            f"{os.fspath(source)}: the tile {window} is outside the image of {width} x {height} "
            "pixels: the labels state another size; run retinanet data check"
        )
    return windows.read(window)


def typical_side(images: Sequence[ImageSource], *, max_images: int = 200) -> int:
    """Return the median of the shorter sides of up to `max_images` images, by their headers."""
    chosen = images[:: -(-len(images) // max_images) or 1]
    return int(statistics.median(min(open_windows(image).size) for image in chosen))


class _InMemory(Windows):
    """An array or a tensor."""

    def __init__(self, source: npt.NDArray[Any] | Tensor, value_range: ValueRange | None) -> None:
        self.size = array_size(source)
        self._source = source
        self._value_range = value_range or find_value_range(source)

    def read(self, window: Window) -> Tensor:
        x1, y1, x2, y2 = window
        is_tensor = isinstance(self._source, Tensor)
        part = self._source[..., y1:y2, x1:x2] if is_tensor else self._source[y1:y2, x1:x2]
        return read_image(part, value_range=self._value_range)


class _Whole(Windows):
    """A file that is decoded whole when its first window is read."""

    def __init__(
        self,
        source: ImageSource,
        name: str,
        stored: str | os.PathLike[str] | BytesIO,
        value_range: ValueRange | None,
        *,
        needs_extra: bool = False,
    ) -> None:
        try:
            with _open_file(stored) as file, Image.open(file):
                pass
        except Image.DecompressionBombError as error:
            if needs_extra:
                raise MissingExtraError(
                    f"{name}: too large to be decoded whole, and tifffile", "tiff"
                ) from None
            raise ImageError(
                f"{name}: {error}; save it as an upright, tiled TIFF of 8 or 16 bits, of which "
                f"windows are read (with a value_range= also of other types), or raise "
                f"PIL.Image.MAX_IMAGE_PIXELS"
            ) from None
        assert not isinstance(source, Image.Image | Tensor | np.ndarray)
        self.size = image_size(source)
        self._source = source
        self._value_range = value_range
        self._lock = threading.Lock()
        self._pixels: Tensor | None = None

    def read(self, window: Window) -> Tensor:
        x1, y1, x2, y2 = window
        part = self._decoded()[:, y1:y2, x1:x2]
        return part.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # not a view of all

    def reduced(self, height: int, width: int) -> Tensor:
        return resize_pixels(self._decoded(), height, width)

    def _decoded(self) -> Tensor:
        with self._lock:
            if self._pixels is None:
                self._pixels = read_image(self._source, value_range=self._value_range)
            return self._pixels


# ---- TIFF

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_JPEG, _PREMULTIPLIED, _UNASSOCIATED = 7, 1, 2


def _open_tiff(
    name: str, stored: str | os.PathLike[str] | BytesIO, value_range: ValueRange | None
) -> Windows | None:
    """Windows of a TIFF, or None where Pillow must decode it."""
    import tifffile

    with _open_file(stored) as file, tifffile.TiffFile(file) as tiff:
        page = tiff.pages.first
        if not _is_supported(page, value_range):
            return None
        levels: list[Any] = [page]
        if tiff.series:
            levels += [level.keyframe for level in tiff.series[0].levels[1:]]
        if len(levels) == 1:
            levels += [other.aspage() for other in tiff.pages]
        pages = [
            _TiffPage(name, stored, level, value_range)
            for level in levels
            if level is page or (_is_supported(level, value_range) and _is_same(level, page))
        ]
    return _Pyramid(pages)


def _is_supported(page: Any, value_range: ValueRange | None) -> bool:
    """Return whether the colours can be converted here, window by window."""
    kind, samples = page.photometric, page.samplesperpixel
    if page.tags.valueof("Orientation", 1) in range(2, 9):
        return False
    needed = {_RGB: 3, _YCBCR: 3, _CMYK: 4}.get(kind, 1)
    if kind not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR):
        return False
    if samples < needed or (kind == _YCBCR and page.compression != _JPEG):
        return False
    if page.dtype is None or page.shaped[1] != 1:
        return False
    if kind in (_PALETTE, _CMYK):
        return bool(page.bitspersample == 8)
    is_plain = page.bitspersample == 1 or page.dtype in (np.uint8, np.uint16)
    return page.bitspersample in (1, 8, 16, 32, 64) and (is_plain or value_range is not None)


def _is_same(level: Any, page: Any) -> bool:
    """Return whether `level` is a smaller one of the same image: of its aspect ratio and type."""
    height, width = level.shaped[2:4]
    scale_y, scale_x = page.shaped[2] / height, page.shaped[3] / width
    same_shape = abs(scale_y / scale_x - 1) < 0.02 and scale_y > 1
    same_type = (level.dtype, level.photometric) == (page.dtype, page.photometric)
    return bool(same_shape and same_type)


class _Pyramid(Windows):
    """A page with smaller levels of the same image."""

    def __init__(self, levels: Sequence[_TiffPage]) -> None:
        self._levels = levels
        self.size = levels[0].size

    def read(self, window: Window) -> Tensor:
        return self._levels[0].read(window)

    def reduced(self, height: int, width: int) -> Tensor:
        large_enough = [
            level
            for level in self._levels
            if level.size[0] >= _LEVEL_MARGIN * height and level.size[1] >= _LEVEL_MARGIN * width
        ]
        smallest = min(large_enough or self._levels[:1], key=lambda level: level.size)
        return smallest.reduced(height, width)


class _TiffPage(Windows):
    """A page of a TIFF as it is stored, whatever its orientation."""

    def __init__(
        self,
        name: str,
        stored: str | os.PathLike[str] | BytesIO,
        page: Any,
        value_range: ValueRange | None,
    ) -> None:
        self._name = name
        self._stored = stored
        # An 8-bit file has the range of 8 bits.
        self._value_range = None if page.bitspersample <= 8 else value_range
        planes, _, height, width, _ = page.shaped
        self.size = (height, width)
        self._rows, self._columns = (
            (page.tilelength, page.tilewidth)
            if page.is_tiled
            else (min(page.rowsperstrip, height), width)
        )
        if min(self._rows, self._columns) < 1:
            raise ValueError("it has tiles or strips without pixels")
        self._grid = (planes, -(-height // self._rows), -(-width // self._columns))
        self._samples = page.samplesperpixel
        self._dtype = np.dtype(page.dtype)
        self._photometric = page.photometric
        self._alpha = page.extrasamples[0] if page.extrasamples else 0
        self._colormap = page.colormap
        self._offsets, self._counts = page.dataoffsets, page.databytecounts
        self._segment = page.decode
        self._jpegtables = page.jpegtables
        # Before memory is allocated: a header of a few bytes may state any numbers.
        if not len(self._offsets) == len(self._counts) == int(np.prod(self._grid)):
            raise ValueError("its number of tiles or strips does not match its size")
        self._mapped = self._map(page) if page.is_contiguous else None
        limit = Image.MAX_IMAGE_PIXELS
        if self._mapped is None and limit and self._rows * self._columns > 2 * limit:
            raise ImageError(
                f"{name}: one of its strips or tiles has {self._rows * self._columns} pixels, over "
                f"{2 * limit}; save it as a TIFF in tiles, or raise PIL.Image.MAX_IMAGE_PIXELS"
            )
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[int, int], npt.NDArray[Any]] = OrderedDict()

    def read(self, window: Window) -> Tensor:
        with image_errors(self._name):
            return self._convert(self._values(window))

    def _band_rows(self) -> int:
        pieces = super()._band_rows() // self._rows
        return self._rows * max(1, pieces) if self._mapped is None else super()._band_rows()

    def _map(self, page: Any) -> npt.NDArray[Any]:
        """Uncompressed values as (planes, height, width, samples), without reading them."""
        planes, _, *shape = page.shaped
        dtype = self._dtype.newbyteorder(page.parent.byteorder)
        if isinstance(self._stored, BytesIO):
            data: Any = self._stored.getbuffer()
        else:
            data = np.memmap(self._stored, mode="r")
        return np.ndarray((planes, *shape), dtype, data, self._offsets[0])

    def _values(self, window: Window) -> npt.NDArray[Any]:
        """(h, w, samples) as stored."""
        x1, y1, x2, y2 = window
        if self._mapped is not None:
            part = self._mapped[:, y1:y2, x1:x2]
            return np.concatenate(list(part), axis=2)
        rows = range(y1 // self._rows, -(-y2 // self._rows))
        columns = range(x1 // self._columns, -(-x2 // self._columns))
        values = np.empty((y2 - y1, x2 - x1, self._samples), self._dtype)
        size = self._rows * self._columns * self._samples * self._dtype.itemsize
        capacity = max(len(rows) * len(columns), CACHED_BYTES // size)
        for row, column in product(rows, columns):
            piece = self._cache.get((row, column))
            if piece is None:
                piece = self._decode(row, column)
            with self._lock:
                self._cache[row, column] = piece
                self._cache.move_to_end((row, column))
                while len(self._cache) > capacity:
                    self._cache.popitem(last=False)
            top, left = row * self._rows, column * self._columns
            a, b = max(top, y1), min(top + self._rows, y2)
            c, d = max(left, x1), min(left + self._columns, x2)
            values[a - y1 : b - y1, c - x1 : d - x1] = piece[a - top : b - top, c - left : d - left]
        return values

    def _decode(self, row: int, column: int) -> npt.NDArray[Any]:
        """Decode a tile or strip."""
        planes, down, across = self._grid
        parts = []
        for plane in range(planes):
            index = (plane * down + row) * across + column
            with _open_file(self._stored) as file:
                file.seek(self._offsets[index])
                data = file.read(self._counts[index])
            if len(data) < self._counts[index]:
                raise ValueError(f"the file ends {self._counts[index] - len(data)} bytes too early")
            segment, _, shape = self._segment(data or None, index, jpegtables=self._jpegtables)
            parts.append(np.zeros(shape[1:], self._dtype) if segment is None else segment[0])
        return parts[0] if planes == 1 else np.concatenate(parts, axis=2)

    def _convert(self, values: npt.NDArray[Any]) -> Tensor:
        """(h, w, samples) as stored to (3, h, w) uint8."""
        kind = self._photometric
        if kind == _PALETTE:
            colours = (np.asarray(self._colormap) >> 8).astype(np.uint8)
            return to_rgb(np.ascontiguousarray(colours.T[values[:, :, 0]]), None)
        if kind == _CMYK:
            cmyk = np.ascontiguousarray(values[:, :, :4])
            return pil_to_rgb(Image.fromarray(cmyk, "CMYK"))
        count = 3 if kind in (_RGB, _YCBCR) else 1
        rgb = to_rgb(values[:, :, :count], self._value_range)
        if kind == _WHITE_IS_ZERO:
            rgb = 255 - rgb
        if self._alpha not in (_PREMULTIPLIED, _UNASSOCIATED):
            return rgb
        alpha = to_rgb(values[:, :, count : count + 1], self._value_range).int()
        if self._alpha == _PREMULTIPLIED:
            return (rgb.int() + 255 - alpha).clamp_(max=255).to(torch.uint8)
        return ((rgb.int() * alpha + 255 * (255 - alpha) + 127) // 255).to(torch.uint8)


def _open_file(stored: str | os.PathLike[str] | BytesIO) -> BinaryIO:
    """Return a file object per reader: several threads read at once."""
    return BytesIO(stored.getbuffer()) if isinstance(stored, BytesIO) else open(stored, "rb")
