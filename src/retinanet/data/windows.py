"""Images too large to unpack, read a window at a time.

The pixels of a window are those that :func:`retinanet.data.images.read_image` gives of the whole
image, for the same code makes them: each tile or strip of a TIFF becomes a small TIFF of its own,
which Pillow decodes by the rules that hold for every image.
"""

from __future__ import annotations

import os
import statistics
import struct
import threading
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise, product
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from PIL import BmpImagePlugin, Image, PpmImagePlugin, TiffImagePlugin
from torch import Tensor

from retinanet.data.images import (
    _SIDEWAYS,
    _TURNS,
    ImageSource,
    ValueRange,
    _failures_named,
    _from_pil,
    _opened,
    _orientation,
    _quiet,
    _resized,
    array_size,
    image_size,
    read_image,
)
from retinanet.errors import ImageError

Window = tuple[int, int, int, int]
"""x1, y1, x2, y2 in whole pixels of the upright image, within it."""

CACHED_BYTES = 2**26
"""Unpacked pieces of an image that are kept for the next window; at the least those of one."""

_BAND_BYTES = 2**22
"""Rows that lie in a file as they are, without compression, are read about so many at a time."""


class Windows(ABC):
    """An image of which parts are read; may be used from several threads.

    Attributes:
        size: (height, width) of the upright image.
        down_first: whether windows below each other, rather than side by side, share what has to
            be unpacked: the image is stored on its side.
    """

    size: tuple[int, int]
    down_first: bool = False

    @abstractmethod
    def read(self, window: Window) -> Tensor:
        """(3, h, w) uint8: the pixels of `window`, as ``read_image`` gives them of the whole.

        Raises:
            ImageError: they cannot be read.
        """

    @abstractmethod
    def reduced(self, height: int, width: int) -> Tensor:
        """(3, height, width) uint8: what ``resize_to`` makes of the whole image.

        Rows are made narrow as they come, so that the image's height times the new width is the
        most that is held. Equal to the last bit; of an image that is stored turned, to one level.

        Raises:
            ImageError: as in :meth:`read`.
        """


def open_windows(source: ImageSource, *, value_range: ValueRange | None = None) -> Windows:
    """Look into an image without unpacking it.

    ==================  ========================================================================
    TIFF, BigTIFF       a tile or a strip at a time, in any compression that Pillow reads; strips
                        without compression a few rows at a time; of many pages the first
    BMP, PPM, PGM       as plain rows of 8 bits a channel, without a palette: a few rows at a time
    arrays and tensors  of 8 or 16 bits: the window alone is converted
    all else            JPEG, PNG, WebP, ..: unpacked once, when the first window is read
    ==================  ========================================================================

    What is unpacked at once, an image or one strip of it, may have as many pixels as
    ``read_image`` takes: 2 x ``PIL.Image.MAX_IMAGE_PIXELS``, 179 million. Values without a range
    (floating point, 32 bits) are judged by the whole image and unpacked with it. A file is opened
    for each read: it must stay where it is.

    Raises:
        ImageError: there is no such file, it is no image, or it is too large and of a kind that
            has to be unpacked whole.
    """
    if isinstance(source, Tensor | np.ndarray):
        if _each_for_itself(source, value_range):
            return _Pixels(source, value_range)
        return _Unpacked(source, value_range)
    if isinstance(source, Image.Image):
        return _Unpacked(source, value_range)
    name, stored = _opened(source)
    with _failures_named(name):
        with _file(stored) as file:
            pieces = _find_pieces(file)
        if pieces is None:
            return _Unpacked(source, value_range)
        most = Image.MAX_IMAGE_PIXELS
        if most and pieces.largest > 2 * most:
            raise ImageError(
                f"{name}: one of its strips or tiles has {pieces.largest} pixels, over "
                f"{2 * most}: save it as a TIFF in tiles, or raise PIL.Image.MAX_IMAGE_PIXELS"
            )
        return _Stored(name, stored, pieces, value_range)


def typical_side(images: Sequence[ImageSource], *, most: int = 200) -> int:
    """The median of the shorter sides of up to `most` images, taken evenly, by their headers.

    Raises:
        ValueError: there is no image.
        ImageError: one cannot be opened.
    """
    chosen = images[:: -(-len(images) // most) or 1]
    return int(statistics.median(min(open_windows(one).size) for one in chosen))


class _Unpacked(Windows):
    """An image that is read as ever, when it is first needed."""

    def __init__(self, source: ImageSource, value_range: ValueRange | None) -> None:
        self._lock = threading.Lock()
        self._source = source
        self._value_range = value_range
        self._pixels: Tensor | None = None
        if isinstance(source, Tensor | np.ndarray | Image.Image):
            self._pixels = read_image(source, value_range=value_range)
            self.size = (self._pixels.shape[-2], self._pixels.shape[-1])
            return
        name, stored = _opened(source)
        try:
            with _quiet(), _file(stored) as file, Image.open(file):
                pass
        except Image.DecompressionBombError as error:
            raise ImageError(
                f"{name}: {error}; an image of this kind is unpacked whole: save it as a TIFF of "
                "8 or 16 bits, which is read in windows, or raise PIL.Image.MAX_IMAGE_PIXELS"
            ) from None
        self.size = image_size(source)

    def read(self, window: Window) -> Tensor:
        x1, y1, x2, y2 = window
        part = self._whole()[:, y1:y2, x1:x2]
        return part.permute(1, 2, 0).contiguous().permute(2, 0, 1)  # not a view of all

    def reduced(self, height: int, width: int) -> Tensor:
        whole = self._whole()
        return whole if (height, width) == self.size else _resized(whole, height, width)

    def _whole(self) -> Tensor:
        with self._lock:
            if self._pixels is None:
                self._pixels = read_image(self._source, value_range=self._value_range)
            return self._pixels


class _Pixels(Windows):
    """An array or a tensor of which each pixel is converted for itself."""

    def __init__(self, source: npt.NDArray[Any] | Tensor, value_range: ValueRange | None) -> None:
        self.size = array_size(source)
        self._source = source
        self._value_range = value_range

    def read(self, window: Window) -> Tensor:
        x1, y1, x2, y2 = window
        if isinstance(self._source, Tensor):
            return read_image(self._source[..., y1:y2, x1:x2], value_range=self._value_range)
        return read_image(self._source[y1:y2, x1:x2], value_range=self._value_range)

    def reduced(self, height: int, width: int) -> Tensor:
        rows, columns = self.size
        edges = _edges(rows, max(1, _BAND_BYTES // (3 * columns)))
        bands = (self.read((0, top, columns, low)) for top, low in pairwise(edges))
        return _reduced(bands, self.size, height, width)


@dataclass(frozen=True)
class _Pieces:
    """How an image is stored.

    Attributes:
        tops, lefts: first row, and first column, of the pieces, and where the last ones end.
        orientation: EXIF's, of the whole.
        largest: pixels that are unpacked at once.
        unpack: the piece of a row and a column of pieces, from the opened file; it may be larger
            than its place at the right and at the bottom.
    """

    tops: list[int]
    lefts: list[int]
    orientation: int
    largest: int
    unpack: Callable[[BinaryIO, int, int], Image.Image]


class _Stored(Windows):
    """An image in pieces, those of the last windows kept."""

    def __init__(
        self,
        name: str,
        stored: str | os.PathLike[str] | BytesIO,
        pieces: _Pieces,
        value_range: ValueRange | None,
    ) -> None:
        self._name = name
        self._value_range = value_range
        self._stored = stored
        self._pieces = pieces
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, int], Future[Tensor]] = OrderedDict()
        self._kept_bytes = 0
        self.down_first = pieces.orientation in _SIDEWAYS
        height, width = pieces.tops[-1], pieces.lefts[-1]
        self.size = (width, height) if self.down_first else (height, width)

    def read(self, window: Window) -> Tensor:
        x1, y1, x2, y2 = self._as_stored(window)
        tops, lefts = self._pieces.tops, self._pieces.lefts
        places = list(product(_touched(tops, y1, y2), _touched(lefts, x1, x2)))
        with _failures_named(self._name):
            unpacked = self._take(places)
        pixels = torch.empty(y2 - y1, x2 - x1, 3, dtype=torch.uint8)
        for (row, column), piece in zip(places, unpacked, strict=True):
            top, left = tops[row], lefts[column]
            a, b = max(top, y1), min(tops[row + 1], y2)
            c, d = max(left, x1), min(lefts[column + 1], x2)
            pixels[a - y1 : b - y1, c - x1 : d - x1] = piece[a - top : b - top, c - left : d - left]
        return self._upright(pixels)

    def reduced(self, height: int, width: int) -> Tensor:
        rows, columns = (width, height) if self.down_first else (height, width)
        stored = (self._pieces.tops[-1], self._pieces.lefts[-1])
        with _failures_named(self._name):
            small = _reduced(self._bands(), stored, rows, columns)
        return self._upright(small.permute(1, 2, 0))

    def _bands(self) -> Iterator[Tensor]:
        """Rows of pieces, (3, h, W)."""
        tops, lefts = self._pieces.tops, self._pieces.lefts
        for row, (top, low) in enumerate(pairwise(tops)):
            band = torch.empty(low - top, lefts[-1], 3, dtype=torch.uint8)
            for column, (left, right) in enumerate(pairwise(lefts)):
                band[:, left:right] = self._unpack(row, column)
            yield band.permute(2, 0, 1)

    def _take(self, places: list[tuple[int, int]]) -> list[Tensor]:
        """The pieces at `places`; one that another thread unpacks already is waited for."""
        wanted, missing = [], []
        with self._lock:
            for place in places:
                piece = self._kept.get(place)
                if piece is None:
                    piece = self._kept[place] = Future()
                    missing.append((place, piece))
                    self._kept_bytes += self._bytes(place)
                self._kept.move_to_end(place)
                wanted.append(piece)
            while self._kept_bytes > CACHED_BYTES and len(self._kept) > len(places):
                dropped, _ = self._kept.popitem(last=False)
                self._kept_bytes -= self._bytes(dropped)
        for place, piece in missing:
            try:
                piece.set_result(self._unpack(*place))
            except BaseException as error:  # raised below, and to those who wait for the piece
                piece.set_exception(error)
        return [piece.result() for piece in wanted]

    def _unpack(self, row: int, column: int) -> Tensor:
        """(h, w, 3) of a piece."""
        with _file(self._stored) as file:
            image = self._pieces.unpack(file, row, column)
        tops, lefts = self._pieces.tops, self._pieces.lefts
        pixels = _from_pil(image, self._value_range).permute(1, 2, 0)
        return pixels[: tops[row + 1] - tops[row], : lefts[column + 1] - lefts[column]]

    def _bytes(self, place: tuple[int, int]) -> int:
        row, column = place
        tops, lefts = self._pieces.tops, self._pieces.lefts
        return 3 * (tops[row + 1] - tops[row]) * (lefts[column + 1] - lefts[column])

    def _as_stored(self, window: Window) -> Window:
        """Where in the file a window of the upright image lies."""
        x1, y1, x2, y2 = window
        orientation = self._pieces.orientation
        height, width = self._pieces.tops[-1], self._pieces.lefts[-1]
        if orientation in _SIDEWAYS:
            x1, y1, x2, y2 = y1, x1, y2, x2
        if orientation in (2, 3, 7, 8):
            x1, x2 = width - x2, width - x1
        if orientation in (3, 4, 6, 7):
            y1, y2 = height - y2, height - y1
        return x1, y1, x2, y2

    def _upright(self, pixels: Tensor) -> Tensor:
        """(h, w, 3) as stored to (3, h, w)."""
        turn = _TURNS.get(self._pieces.orientation)
        turned = pixels if turn is None else turn(pixels)
        return turned.contiguous().permute(2, 0, 1)


def _reduced(bands: Iterable[Tensor], size: tuple[int, int], height: int, width: int) -> Tensor:
    """An image of `size` that comes as (3, h, W) from top to bottom, at a new size.

    As torch does it: first each row for itself, rounded, then the columns.
    """
    narrow = torch.empty(size[0], width, 3, dtype=torch.uint8)
    top = 0
    for band in bands:
        rows = band.shape[1]
        fitted = band if band.shape[2] == width else _resized(band, rows, width)
        narrow[top : top + rows] = fitted.permute(1, 2, 0)
        top += rows
    whole = narrow.permute(2, 0, 1)
    return whole if size[0] == height else _resized(whole, height, width)


def _find_pieces(file: BinaryIO) -> _Pieces | None:
    """How the image in `file` is stored; None: it has to be unpacked whole, or is no image."""
    start = file.read(4)
    file.seek(0)
    try:
        if start in TiffImagePlugin.PREFIXES:
            return _pieces_of_tiff(file)
        if start[:2] == b"BM":
            return _pieces_of_rows(BmpImagePlugin.BmpImageFile(file), file)
        if start[:2] in (b"P5", b"P6"):
            return _pieces_of_rows(PpmImagePlugin.PpmImageFile(file), file)
    except SyntaxError:  # Pillow's word for "not mine"
        pass
    return None


def _pieces_of_rows(image: Image.Image, file: BinaryIO) -> _Pieces | None:
    """Of an image whose rows lie in the file one after the other, from either end."""
    tiles: Any = image.tile  # type: ignore[attr-defined]
    if image.mode not in ("L", "RGB", "RGBA") or len(tiles) != 1 or tiles[0][0] != "raw":
        return None
    _, _, start, arguments = tiles[0]
    mode, (width, height) = image.mode, image.size
    rawmode, stride, direction = (
        (arguments, width * len(arguments), 1) if isinstance(arguments, str) else arguments
    )
    _check_length(file, start + stride * height)
    edges = _edges(height, max(1, _BAND_BYTES // stride))

    def unpack(file: BinaryIO, row: int, _: int) -> Image.Image:
        top, low = edges[row], edges[row + 1]
        first = top if direction == 1 else height - low
        data = _bytes_at(file, start + first * stride, (low - top) * stride)
        size = (width, low - top)
        return Image.frombytes(mode, size, data, "raw", rawmode, stride, direction)

    return _Pieces(edges, [0, width], 1, edges[1] * width, unpack)


_WIDTH, _LENGTH, _BITS, _COMPRESSION, _COLOURS = 256, 257, 258, 259, 262
_STRIPS, _SAMPLES, _STRIP_ROWS, _STRIP_BYTES, _PLANAR = 273, 277, 278, 279, 284
_TILE_WIDTH, _TILE_LENGTH, _TILES, _TILE_BYTES = 322, 323, 324, 325
_LONG, _LONG8 = 4, 16

# What says how samples are packed and what they mean: fill order, options of CCITT, predictor,
# colour map, extra samples, sample format, JPEG tables, and those of YCbCr.
_KEPT = (258, 259, 262, 266, 277, 284, 292, 293, 317, 320, 338, 339, 347, 529, 530, 531, 532)

_RAW, _OLD_JPEG, _YCBCR = 1, 6, 6


def _pieces_of_tiff(file: BinaryIO) -> _Pieces | None:
    with _quiet():
        image = TiffImagePlugin.TiffImageFile(file)
        orientation = _orientation(image)
    tags = image.tag_v2
    width, height = tags[_WIDTH], tags[_LENGTH]
    compression = tags.get(_COMPRESSION, _RAW)
    # Mode I and F: their values have no range but that of the whole image.
    if image.mode in ("I", "F") or compression == _OLD_JPEG:
        return None
    tiled = _TILES in tags
    offsets = tags.get(_TILES if tiled else _STRIPS, ())
    counts = tags.get(_TILE_BYTES if tiled else _STRIP_BYTES, ())
    # A tile has its full size at the right and at the bottom too, a strip has not.
    high, wide = (
        (tags[_TILE_LENGTH], tags[_TILE_WIDTH])
        if tiled
        else (min(tags.get(_STRIP_ROWS, height), height), width)
    )
    if min(high, wide) < 1:
        return None
    across, down = -(-width // wide), -(-height // high)
    planes = tags.get(_SAMPLES, 1) if tags.get(_PLANAR, 1) == 2 else 1
    # Before anything is made by these numbers: a header of a few bytes may say any.
    if not len(offsets) == len(counts) == across * down * planes:
        return None  # what the file says of itself does not fit together
    tops, lefts = _edges(height, high), _edges(width, wide)

    def unpack(file: BinaryIO, row: int, column: int) -> Image.Image:
        places = range(row * across + column, len(offsets), across * down)
        segments = [_bytes_at(file, offsets[i], counts[i]) for i in places]
        shape = (high if tiled else tops[row + 1] - tops[row], wide)
        return _small_tiff(tags, shape, segments, tiled)

    strip = _Pieces(tops, lefts, orientation, high * wide, unpack)
    if tiled or compression != _RAW or tags.get(_COLOURS) == _YCBCR:
        return strip
    # Strips without compression are cut into bands of rows: often there is but one strip.
    bits = tags.get(_BITS, (1,))
    bits = bits * tags.get(_SAMPLES, 1) if len(bits) == 1 else bits
    strides = [-(-width * one // 8) for one in (bits if planes > 1 else [sum(bits)])]
    rows = max(1, _BAND_BYTES // sum(strides))
    _check_length(file, sum(strides) * height)
    if high <= rows:
        return strip
    bands = [
        (number, skipped, min(skipped + rows, low - top))
        for number, (top, low) in enumerate(pairwise(tops))
        for skipped in range(0, low - top, rows)
    ]

    def unpack_band(file: BinaryIO, row: int, _: int) -> Image.Image:
        number, first, last = bands[row]
        segments = [
            _bytes_at(file, offset + first * stride, (last - first) * stride)
            for offset, stride in zip(offsets[number::down], strides, strict=True)
        ]
        return _small_tiff(tags, (last - first, width), segments, False)

    band_tops = [tops[number] + first for number, first, _ in bands]
    return _Pieces([*band_tops, height], lefts, orientation, rows * width, unpack_band)


def _small_tiff(
    tags: TiffImagePlugin.ImageFileDirectory_v2,
    shape: tuple[int, int],
    segments: list[bytes],
    tiled: bool,
) -> Image.Image:
    """The image in a single tile or strip (one a plane), by the tags of the image it is of."""
    order = "<" if tags.prefix == b"II" else ">"
    head = tags.prefix + struct.pack(f"{order}HL", 42, 8)  # not BigTIFF; the directory follows
    directory = TiffImagePlugin.ImageFileDirectory_v2(head)
    for tag in _KEPT:
        if tag in tags:
            kind = tags.tagtype[tag]
            directory.tagtype[tag] = _LONG if kind == _LONG8 else kind
            directory[tag] = tags[tag]
    height, width = shape
    numbers: dict[int, Any] = {_WIDTH: width, _LENGTH: height}
    if tiled:
        numbers |= {_TILE_WIDTH: width, _TILE_LENGTH: height}
    else:
        numbers[_STRIP_ROWS] = height
    numbers[_TILE_BYTES if tiled else _STRIP_BYTES] = tuple(map(len, segments))
    where = _TILES if tiled else _STRIPS
    numbers[where] = starts = tuple(
        sum(map(len, segments[:number])) for number in range(len(segments))
    )
    for tag, value in numbers.items():
        directory.tagtype[tag] = _LONG
        directory[tag] = value
    if tiled:  # strips alone are moved behind the directory as it is written
        length = len(head) + len(directory.tobytes(len(head)))
        directory[where] = tuple(length + start for start in starts)
    packed = BytesIO(b"".join([head, directory.tobytes(len(head)), *segments]))
    image = TiffImagePlugin.TiffImageFile(packed)
    image.load()
    return image


def _bytes_at(file: BinaryIO, start: int, count: int) -> bytes:
    _check_length(file, start + count)
    file.seek(start)
    return file.read(count)


def _check_length(file: BinaryIO, least: int) -> None:
    """Whether a file has what it says, before room is made for as much."""
    missing = least - file.seek(0, os.SEEK_END)
    if missing > 0:
        raise ValueError(f"the file ends {missing} bytes too early")


def _touched(edges: list[int], first: int, last: int) -> range:
    """Places of the pieces that hold something of [first, last)."""
    return range(bisect_right(edges, first) - 1, bisect_left(edges, last))


def _edges(length: int, step: int) -> list[int]:
    return [*range(0, length, step), length]


def _each_for_itself(source: npt.NDArray[Any] | Tensor, value_range: ValueRange | None) -> bool:
    """Whether the pixels of an image in memory can be converted without the others."""
    if value_range is not None or source.dtype in (torch.uint8, torch.bool, torch.uint16):
        return True
    return isinstance(source, np.ndarray) and (
        source.dtype in (np.uint8, np.bool_)
        or (source.dtype.kind == "u" and source.dtype.itemsize == 2)
    )


def _file(stored: str | os.PathLike[str] | BytesIO) -> BinaryIO:
    """A file of one's own: several threads read at once."""
    return BytesIO(stored.getbuffer()) if isinstance(stored, BytesIO) else open(stored, "rb")
