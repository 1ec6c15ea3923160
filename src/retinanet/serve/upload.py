"""Images in a request body, read within the limits and only in memory."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from fastapi import Request
from PIL import Image
from starlette.formparsers import MultiPartException, MultiPartParser

from retinanet.config import nearest
from retinanet.data.image_files import stored_size, stored_tile
from retinanet.errors import ImageError
from retinanet.serve.errors import RequestError, busy
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


class ByteSemaphore:
    """Limit on the bytes of all request bodies held at once."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held = 0

    def acquire(self, size: int) -> None:
        """Reserve `size` bytes, or raise a 503 error."""
        if self.held + size > self.capacity:
            raise busy("too many uploads at once: try again")
        self.held += size

    def release(self, size: int) -> None:
        """Return `size` reserved bytes."""
        self.held -= size


class Body:
    """A request body, read chunk by chunk within the limits.

    Attributes:
        size: bytes read, all reserved in the semaphore; the caller releases them.
    """

    def __init__(self, request: Request, settings: Settings, semaphore: ByteSemaphore) -> None:
        self._request = request
        self._settings = settings
        self._semaphore = semaphore
        self.size = 0

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Yield the chunks; raise a 413 or 503 error for the first chunk over a limit."""
        async for chunk in self._request.stream():
            check_body_size(self.size + len(chunk), self._settings)
            self._semaphore.acquire(len(chunk))
            self.size += len(chunk)
            yield chunk

    async def read_uploads(self) -> list[Upload]:
        """Read the images of a ``multipart/form-data`` or ``image/*`` body.

        Raises:
            RequestError: 400 malformed form, 413 too large, 415 another media type, 422 no image.
        """
        media_type = self._request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type == "multipart/form-data":
            return await self._read_form()
        if media_type.startswith("image/"):
            data = b"".join([chunk async for chunk in self.stream()])
            if not data:
                raise RequestError(422, "unreadable", "empty request body: send an image")
            return [Upload("image", data)]
        found = repr(_printable(media_type)) if media_type else "no Content-Type"
        raise RequestError(
            415,
            "media_type",
            f"unsupported media type: {found}; send multipart/form-data with the field {FIELD!r}, "
            "or one image as image/*",
        )

    async def _read_form(self) -> list[Upload]:
        async def chunks() -> AsyncGenerator[bytes, None]:
            async for chunk in self.stream():
                yield chunk
            if not parser.complete:
                raise _malformed("it ends before its last boundary")

        parser = _FormParser(self._request, chunks(), self._settings)
        try:
            form = await parser.parse()
        except (MultiPartException, ValueError) as error:
            raise _malformed(getattr(error, "message", str(error))) from None
        uploads: list[Upload] = []
        try:
            for name, value in form.multi_items():
                if name != FIELD or isinstance(value, str):
                    raise _unknown_field(_printable(name))
                label = _printable(value.filename or "") or f"image_{len(uploads):06d}"
                uploads.append(Upload(label, await value.read()))
        finally:
            await form.close()
        if not uploads:
            raise RequestError(422, "unreadable", f"the form field {FIELD!r} holds no image")
        return uploads


class _FormParser(MultiPartParser):
    """Starlette's form parser, which never spools to disk and limits the number of parts.

    Attributes:
        complete: whether the last boundary was found.
    """

    def __init__(
        self, request: Request, stream: AsyncGenerator[bytes, None], settings: Settings
    ) -> None:
        super().__init__(request.headers, stream)
        self.spool_max_size = settings.max_bytes + 1
        self.complete = False
        self._max_images = settings.max_images
        self._num_parts = 0

    def on_part_begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > self._max_images:
            raise RequestError(
                413, "images", f"more than {self._max_images} images in one request: send fewer"
            )
        super().on_part_begin()

    def on_end(self) -> None:
        self.complete = True


def check_body_size(size: int, settings: Settings) -> None:
    """Raise a 413 error if a body of `size` bytes is over the limit."""
    if size > settings.max_bytes:
        raise RequestError(
            413,
            "bytes",
            f"the request is over {settings.max_bytes:,} bytes: send fewer or smaller images",
        )


def check_image(data: bytes, settings: Settings) -> None:
    """Check the header of an encoded image before it is decoded.

    Raises:
        RequestError: 413 too many pixels; 422 another format or a broken header.
    """
    if not data:
        raise RequestError(422, "unreadable", "the file is empty")
    if not _MAGIC.match(data):
        raise RequestError(422, "unreadable", f"not an accepted image format: send {_FORMATS}")
    try:
        height, width = stored_size(data)
        tile_pixels = stored_tile(data) if data[:2] in (b"II", b"MM") else 0
    except ImageError as error:
        if isinstance(error.__context__, Image.DecompressionBombError):
            raise _too_many_pixels("it has too many", settings) from None
        raise RequestError(422, "unreadable", decode_error(error)) from None
    if height * width > settings.max_pixels:
        raise _too_many_pixels(f"{width} x {height}", settings)
    if tile_pixels > settings.max_pixels:
        raise _too_many_pixels(f"a tile of {tile_pixels:,}", settings)


def decode_error(error: Exception, name: str = "") -> str:
    """Describe why an image could not be decoded, without its name."""
    if not isinstance(error, ImageError):
        return f"cannot be read: {type(error).__name__}"
    reason = " ".join(str(error).removeprefix(f"{name}: ").split())
    return reason.removeprefix("bytes of an image: ")


def _too_many_pixels(found: str, settings: Settings) -> RequestError:
    return RequestError(
        413,
        "pixels",
        f"too many pixels: {found}; at most {settings.max_pixels:,} are accepted, send it smaller",
    )


def _malformed(reason: str) -> RequestError:
    return RequestError(400, "media_type", f"malformed multipart form: {_printable(reason)}")


def _unknown_field(name: str) -> RequestError:
    if name == FIELD:
        return RequestError(400, "option", f"form field {FIELD!r} has no filename: send a file")
    return RequestError(
        400,
        "option",
        f"unknown form field {name!r}{nearest(name, [FIELD])}; images go into {FIELD!r}, options "
        "into the URL, as in ?score_threshold=0.5",
    )


def _printable(text: str) -> str:
    """Replace unprintable characters and cut `text` to the maximum length of a name."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)[:_MAX_NAME_LENGTH]
