"""The images in a request's body: read within limits, in memory alone."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from PIL import Image

from retinanet.config import nearest
from retinanet.data.images import stored_size, stored_tile
from retinanet.errors import ImageError
from retinanet.serve.refusal import Refusal, busy
from retinanet.serve.settings import Settings

FIELD = "images"
"""The form field of the images."""

_LONGEST_NAME = 255

# Beginnings of the formats that are unpacked. Pillow knows more, some of which run programs (EPS
# goes to Ghostscript, through files); none of those begins like one of these.
_BEGINNINGS = (
    rb"\xff\xd8\xff",  # JPEG
    rb"\x89PNG\r\n\x1a\n",
    rb"GIF8[79]a",
    rb"BM",
    rb"II[*+]\0|MM\0[*+]",  # TIFF
    rb"RIFF....WEBP",
    rb"P[4-6]\s",  # PBM, PGM, PPM; those of text, P1 to P3, take Pillow seconds a megapixel
    rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",  # JPEG 2000
    rb"....ftyp(?:avif|avis|mif1|msf1)",
)
_SERVED = re.compile(b"|".join(b"(?:%s)" % one for one in _BEGINNINGS), re.DOTALL)

FORMATS = "JPEG, PNG, WebP, GIF, BMP, TIFF, binary PNM, JPEG 2000 or AVIF"


@dataclass(frozen=True, slots=True)
class Upload:
    """An image as it came.

    Attributes:
        name: what the client calls it: a label, never a path of this machine.
        data: the file's content.
    """

    name: str
    data: bytes = field(repr=False)


class Room:
    """Bytes of bodies that are held at once, over all requests of a service."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0

    @contextmanager
    def lent(self) -> Iterator[Callable[[int], None]]:
        """Give what it yields the bytes as they come; all are given back at the end.

        Raises:
            Refusal: 503, others hold too many.
        """
        mine = 0

        def take(size: int) -> None:
            nonlocal mine
            if self.held + size > self.most:
                raise busy("the server holds as many uploads as it can: try again")
            self.held += size
            mine += size

        try:
            yield take
        finally:
            self.held -= mine


async def read_images(
    content_type: str,
    chunks: AsyncIterator[bytes],
    settings: Settings,
    take: Callable[[int], None],
) -> list[Upload]:
    """The images of a body, no more of which is read than is allowed.

    Args:
        content_type: the header: ``multipart/form-data`` with images in :data:`FIELD`, or
            ``image/*`` for a body that is one image.
        chunks: the body as it comes.
        settings: how many bytes and images there may be.
        take: told of each chunk's bytes before they are kept.

    Raises:
        Refusal: 400 the form is broken, 413 too much, 415 neither kind, 422 no image in it.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        form = _Form(content_type, settings)
        async for chunk in _limited(chunks, settings, take):
            form.write(chunk)
        return form.images()
    if kind.startswith("image/"):
        body = bytearray()
        async for chunk in _limited(chunks, settings, take):
            body += chunk
        if not body:
            raise Refusal(422, "unreadable", "there is no image in the request: its body is empty")
        return [Upload("image", bytes(body))]
    got = f"{_plain(kind)!r}" if kind else "no Content-Type"
    raise Refusal(
        415,
        "kind",
        f"send images as multipart/form-data in the field {FIELD!r}, or one as image/*; got {got}",
    )


async def _limited(
    chunks: AsyncIterator[bytes], settings: Settings, take: Callable[[int], None]
) -> AsyncIterator[bytes]:
    total = 0
    async for chunk in chunks:
        total += len(chunk)
        check_bytes(total, settings)
        take(len(chunk))
        yield chunk


def check_bytes(size: int, settings: Settings) -> None:
    """Raise a 413 where a body of `size` bytes is more than is taken."""
    if size > settings.max_bytes:
        raise Refusal(
            413,
            "bytes",
            f"the request is over {settings.max_bytes:,} bytes: send fewer or smaller images",
        )


def check_image(data: bytes, settings: Settings) -> None:
    """Look at an image's header, before anything is unpacked.

    Raises:
        Refusal: 413 too many pixels; 422 it is of a kind that is not served, or has no sound
            header.
    """
    if not data:
        raise Refusal(422, "unreadable", "the file is empty")
    if not _SERVED.match(data):
        raise Refusal(422, "unreadable", f"it is no image that is taken: send {FORMATS}")
    try:
        height, width = stored_size(data)
        tile = stored_tile(data) if data[:2] in (b"II", b"MM") else 0
    except ImageError as error:
        if isinstance(error.__context__, Image.DecompressionBombError):
            raise _too_many_pixels("it", settings) from None
        raise Refusal(422, "unreadable", reason_of(error)) from None
    if height * width > settings.max_pixels:
        raise _too_many_pixels(f"its {width} x {height} pixels", settings)
    if tile > settings.max_pixels:
        raise _too_many_pixels(f"the {tile:,} pixels of a tile in it", settings)


def _too_many_pixels(what: str, settings: Settings) -> Refusal:
    more = "are more" if what != "it" else "has more pixels"
    return Refusal(
        413,
        "pixels",
        f"{what} {more} than the {settings.max_pixels:,} that are taken: make it smaller",
    )


def reason_of(error: Exception, name: str = "") -> str:
    """Why an image could not be read, without its name, which the answer has beside it."""
    if not isinstance(error, ImageError):
        return f"it cannot be unpacked: {type(error).__name__}"
    reason = " ".join(str(error).removeprefix(f"{name}: ").split())
    return reason.removeprefix("bytes of an image: ")


def _plain(text: str) -> str:
    """`text` as a label: printable, and not too long."""
    return "".join(one if one.isprintable() else "�" for one in text)[:_LONGEST_NAME]


class _Form:
    """A multipart form, taken apart as it comes; nothing of it is spooled to a disk."""

    def __init__(self, content_type: str, settings: Settings) -> None:
        from python_multipart.multipart import MultipartParser, parse_options_header

        boundary = parse_options_header(content_type)[1].get(b"boundary")
        if not boundary:
            raise Refusal(400, "kind", "the multipart form has no boundary in its Content-Type")
        self._most = settings.max_images
        self._uploads: list[Upload] = []
        self._parse_options = parse_options_header
        self._headers: dict[bytes, bytes] = {}
        self._name, self._value = bytearray(), bytearray()
        self._part: bytearray | None = None
        self._label = ""
        self._finished = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": lambda data, a, b: self._name.extend(data[a:b]),
                    "on_header_value": lambda data, a, b: self._value.extend(data[a:b]),
                    "on_header_end": self._header,
                    "on_headers_finished": self._headers_finished,
                    "on_part_data": self._data,
                    "on_part_end": self._end,
                    "on_end": self._finish,
                },
            )
        except ValueError as error:
            raise _broken_form(error) from None

    def write(self, chunk: bytes) -> None:
        try:
            self._parser.write(chunk)
        except ValueError as error:  # every error of the parser is one
            raise _broken_form(error) from None

    def images(self) -> list[Upload]:
        if not self._finished:
            raise _broken_form("it ends before its last boundary")
        if not self._uploads:
            raise Refusal(422, "unreadable", f"there is no image in the form's field {FIELD!r}")
        return self._uploads

    def _begin(self) -> None:
        self._headers = {}

    def _header(self) -> None:
        self._headers[bytes(self._name).lower()] = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def _headers_finished(self) -> None:
        _, options = self._parse_options(self._headers.get(b"content-disposition", b""))
        field = _plain(options.get(b"name", b"").decode("utf-8", "replace"))
        if field != FIELD:
            raise Refusal(
                400,
                "option",
                f"unknown form field {field!r}: images go into {FIELD!r}, "
                f"options behind the address, as in ?score_threshold=0.5{nearest(field, [FIELD])}",
            )
        if len(self._uploads) == self._most:
            raise Refusal(
                413, "images", f"more than {self._most} images in one request: send fewer"
            )
        name = _plain(options.get(b"filename", b"").decode("utf-8", "replace"))
        self._label = name or f"image_{len(self._uploads):06d}"
        self._part = bytearray()

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._part is not None:
            self._part += data[start:end]

    def _end(self) -> None:
        if self._part is not None:
            self._uploads.append(Upload(self._label, bytes(self._part)))
        self._part = None

    def _finish(self) -> None:
        self._finished = True


def _broken_form(error: Exception | str) -> Refusal:
    return Refusal(400, "kind", f"the multipart form is broken: {_plain(str(error))}")
