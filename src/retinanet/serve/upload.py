"""Images in a request body, read within the limits and only in memory."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from fastapi import Request
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from retinanet.config import nearest
from retinanet.data.image_files import stored_size
from retinanet.errors import ImageError
from retinanet.serve.settings import Settings

FIELD = "images"
"""Form field of the images."""

_MAX_NAME_LENGTH = 255

# Magic numbers of the accepted formats. Pillow opens more, some of which run programs (Ghostscript
# for EPS) or are slow to decode (PNM as text, P1 to P3: seconds per megapixel).
_MAGIC = re.compile(
    rb"\xff\xd8\xff"  # JPEG
    rb"|\x89PNG\r\n\x1a\n"
    rb"|GIF8[79]a"
    rb"|BM"
    rb"|II[*+]\0|MM\0[*+]"  # TIFF
    rb"|RIFF....WEBP"
    rb"|P[4-6]\s"  # PBM, PGM, PPM
    rb"|\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51"  # JPEG 2000
    rb"|....ftyp(?:avif|avis|mif1|msf1)",
    re.DOTALL,
)
_FORMATS = "JPEG, PNG, WebP, GIF, BMP, TIFF, binary PNM, JPEG 2000 or AVIF"


@dataclass(frozen=True, slots=True)
class Upload:
    """An uploaded image.

    Attributes:
        name: the file name that the client sent; a label, never a path on this machine.
        data: the encoded image.
    """

    name: str
    data: bytes = field(repr=False)


async def read_uploads(request: Request, settings: Settings) -> list[Upload]:
    """Read the images of a ``multipart/form-data`` or ``image/*`` body."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        return await _read_form(request, settings)
    if media_type.startswith("image/"):
        data = b"".join([chunk async for chunk in _stream(request, settings)])
        if not data:
            raise HTTPException(422, "empty request body: send an image")
        return [Upload("image", data)]
    found = repr(_printable(media_type)) if media_type else "no Content-Type"
    raise HTTPException(
        415,
        f"unsupported media type: {found}; send multipart/form-data with the field {FIELD!r}, "
        "or one image as image/*",
    )


async def _stream(request: Request, settings: Settings) -> AsyncGenerator[bytes, None]:
    """Yield the chunks of the body, up to the maximum size."""
    announced = request.headers.get("content-length", "")
    too_large = HTTPException(
        413, f"the request is over {settings.max_bytes:,} bytes: send fewer or smaller images"
    )
    if announced.isascii() and announced.isdecimal() and int(announced) > settings.max_bytes:
        raise too_large
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > settings.max_bytes:
            raise too_large
        yield chunk


async def _read_form(request: Request, settings: Settings) -> list[Upload]:
    async def chunks() -> AsyncGenerator[bytes, None]:
        async for chunk in _stream(request, settings):
            yield chunk
        if not parser.complete:
            raise MultiPartException("it ends before its last boundary")

    parser = _FormParser(request, chunks(), settings)
    try:
        form = await parser.parse()
    except (MultiPartException, ValueError) as error:
        reason = _printable(getattr(error, "message", str(error)))
        raise HTTPException(400, f"malformed multipart form: {reason}") from None
    uploads: list[Upload] = []
    try:
        for name, value in form.multi_items():
            if isinstance(value, str) and name == FIELD:
                raise HTTPException(400, f"form field {FIELD!r} has no filename: send a file")
            if isinstance(value, str) or name != FIELD:
                raise HTTPException(
                    400,
                    f"unknown form field {_printable(name)!r}{nearest(name, [FIELD])}; images go "
                    f"into {FIELD!r}, options into the URL, as in ?score_threshold=0.5",
                )
            label = _printable(value.filename or "") or f"image_{len(uploads):06d}"
            uploads.append(Upload(label, await value.read()))
    finally:
        await form.close()
    if not uploads:
        raise HTTPException(422, f"the form field {FIELD!r} holds no image")
    return uploads


class _FormParser(MultiPartParser):
    """Starlette's form parser, which never spools to disk and limits the number of parts.

    Attributes:
        complete: whether the last boundary was read.
    """

    def __init__(
        self, request: Request, stream: AsyncGenerator[bytes, None], settings: Settings
    ) -> None:
        super().__init__(request.headers, stream)
        self.spool_max_size = settings.max_bytes + 1
        self.complete = False
        self._max_images = settings.queue  # a request with more would never be accepted
        self._num_parts = 0

    def on_part_begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > self._max_images:
            detail = f"more than {self._max_images} images in one request: send fewer"
            raise HTTPException(413, detail)
        super().on_part_begin()

    def on_end(self) -> None:
        self.complete = True


def check_image(data: bytes, settings: Settings) -> None:
    """Check the header of an encoded image before it is decoded."""
    if not data:
        raise HTTPException(422, "the file is empty")
    if not _MAGIC.match(data):
        raise HTTPException(422, f"not an accepted image format: send {_FORMATS}")
    found = ""
    try:
        height, width, tile_pixels = stored_size(data)
        if height * width > settings.max_pixels:
            found = f"{width} x {height}"
        elif tile_pixels > settings.max_pixels:
            found = f"a tile of {tile_pixels:,}"
    except ImageError as error:
        if not isinstance(error.__context__, Image.DecompressionBombError):
            raise HTTPException(422, decode_error(error)) from None
        found = "it has too many"
    if found:
        limit = f"at most {settings.max_pixels:,} are accepted, send it smaller"
        raise HTTPException(413, f"too many pixels: {found}; {limit}")


def decode_error(error: Exception, name: str = "") -> str:
    """Describe why an image could not be decoded, without its name."""
    if not isinstance(error, ImageError):
        return f"cannot be read: {type(error).__name__}"
    reason = " ".join(str(error).removeprefix(f"{name}: ").split())
    return reason.removeprefix("bytes of an image: ")


def _printable(text: str) -> str:
    """Replace unprintable characters and cut `text` to the maximum length of a name."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)[:_MAX_NAME_LENGTH]
