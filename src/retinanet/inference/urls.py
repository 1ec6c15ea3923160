"""Images by http:// and https:// addresses, fetched only where that was asked for."""

from __future__ import annotations

import http.client
import re
import urllib.error
import urllib.request
from base64 import b64encode
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread
from time import monotonic
from typing import Any
from urllib.parse import unquote, urlsplit

from retinanet import __version__
from retinanet.errors import ConfigError, ImageError
from retinanet.inference.sources import Source, hide_password, is_url

MAX_BYTES = 64 * 2**20
"""Maximum size of a fetched image."""

MAX_SECONDS = 30.0
"""Maximum time in which an image is fetched."""

_CHUNK = 2**16

# No file:// and no ftp://, to which a server could redirect.
_HANDLERS = (
    urllib.request.ProxyHandler,
    urllib.request.HTTPHandler,
    urllib.request.HTTPSHandler,
    urllib.request.HTTPDefaultErrorHandler,
    urllib.request.HTTPRedirectHandler,
    urllib.request.HTTPErrorProcessor,
    urllib.request.UnknownHandler,
)


@dataclass(frozen=True, slots=True)
class UrlSource(Source):
    """An image that is fetched when it is read, and then kept in memory.

    ``detector.detect(UrlSource.of("https://example.com/street.jpg"))``
    """

    @classmethod
    def of(cls, url: str) -> UrlSource:
        """Return the source of an address; its name is that of the host and the path.

        Raises:
            ConfigError: it is no http:// or https:// address.
        """
        try:
            parts = urlsplit(url)
        except ValueError:
            parts = None
        if parts is None or not parts.hostname or not is_url(url):
            raise ConfigError(f"no http:// or https:// address: {hide_password(url)!r}")
        path = "".join(letter for letter in unquote(parts.path) if letter.isprintable())
        inside = [part for part in re.split(r"[/\\]", path) if part.strip(".")]
        return cls(url, "/".join((parts.hostname, *(inside or ["image"]))))

    def load(self) -> Any:
        """Fetch the image on the first call; errors as :func:`fetch`."""
        if isinstance(self.image, str):
            object.__setattr__(self, "image", fetch(self.image))
        return self.image


def fetch(url: str, *, max_bytes: int = MAX_BYTES, max_seconds: float = MAX_SECONDS) -> bytes:
    """Fetch the content of an http:// or https:// address.

    Args:
        url: the address.
        max_bytes: maximum size.
        max_seconds: maximum time, with the name's lookup, redirects and headers.

    Raises:
        ImageError: it cannot be fetched, is too large, or takes too long.
    """
    shown, result = hide_password(url), Future[bytes]()

    def run() -> None:
        try:
            result.set_result(_fetch(url, max_bytes, max_seconds))
        except Exception as error:
            result.set_exception(error)

    # A socket's timeout is of each read, so that a slow server could take any time.
    Thread(target=run, name="fetch", daemon=True).start()
    try:
        return result.result(max_seconds)
    except TimeoutError:
        raise ImageError(f"{shown}: not fetched within {max_seconds:g} s") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, TimeoutError):
            raise ImageError(f"{shown}: not fetched within {max_seconds:g} s") from None
        raise ImageError(f"{shown}: cannot be fetched: {reason}") from None


def _fetch(url: str, max_bytes: int, max_seconds: float) -> bytes:
    shown, ends = hide_password(url), monotonic() + max_seconds
    opener = urllib.request.OpenerDirector()
    for handler in _HANDLERS:
        opener.add_handler(handler())
    request = urllib.request.Request(shown, headers={"User-Agent": f"retinanet/{__version__}"})
    parts = urlsplit(url)
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        # Not sent on to where the server redirects.
        request.add_unredirected_header("Authorization", f"Basic {b64encode(login).decode()}")
    content = bytearray()
    with opener.open(request, timeout=max_seconds) as response:
        while chunk := response.read1(_CHUNK):
            content += chunk
            if len(content) > max_bytes:
                raise ImageError(f"{shown}: over {max_bytes:,} bytes; download it yourself")
            if monotonic() > ends:
                raise TimeoutError
    return bytes(content)
