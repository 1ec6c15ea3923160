"""Limits and threads of a service."""

from __future__ import annotations

from dataclasses import dataclass, field

from retinanet.errors import ConfigError

_MINIMUM = {
    **dict.fromkeys(["max_bytes", "max_pixels", "max_images", "queue", "batch_size"], 1),
    **dict.fromkeys(["workers", "decode_threads"], 1),
    "max_wait_ms": 0,
}


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits and threads of a service; docs/serve.md gives the reason of each default.

    Attributes:
        max_bytes: bytes per request body.
        max_pixels: pixels per image (height times width), read from its header before decoding.
        max_images: images per request.
        queue: images waiting or in work; further requests are answered with 503.
        timeout: seconds per request, upload included.
        max_held_bytes: bytes of all request bodies held at once; None: eight times `max_bytes`.
        batch_size: images per batch, all of one size; None: 1 on a CPU, 8 elsewhere.
        max_wait_ms: milliseconds to wait for a batch to fill.
        workers: threads that run the network; they share the CPU cores.
        decode_threads: threads that decode and resize images; None: one per core, at most 4.
        api_key: key that requests must send, except for the page and the health checks; None: no
            key is needed.

    Raises:
        ConfigError: a value is out of range.
    """

    max_bytes: int = 32 * 2**20
    max_pixels: int = 50_000_000
    max_images: int = 32
    queue: int = 128
    timeout: float = 60.0
    max_held_bytes: int | None = None
    batch_size: int | None = None
    max_wait_ms: float = 0.0
    workers: int = 1
    decode_threads: int | None = None
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check the values."""
        for name, minimum in _MINIMUM.items():
            value = getattr(self, name)
            if value is not None and not value >= minimum:
                raise ConfigError(f"{_option(name)} is out of range: {value}; minimum {minimum}")
        if not self.timeout > 0:
            raise ConfigError(f"--timeout is out of range: {self.timeout}; must be positive")
        if self.queue < self.max_images:
            raise ConfigError(
                f"--queue {self.queue} is smaller than --max-images {self.max_images}: a request "
                "with that many images would never be accepted; raise --queue"
            )
        if self.held_bytes_limit < self.max_bytes:
            raise ConfigError(
                f"max_held_bytes {self.max_held_bytes} is smaller than max_bytes "
                f"{self.max_bytes}: a request of that size would never be accepted"
            )
        key = self.api_key
        if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key):
            key = ""
        if key == "":  # the message does not show the key
            raise ConfigError(
                "invalid API key: it is empty, starts or ends with a space, or contains characters "
                "that a header cannot hold; use ASCII letters, digits and punctuation"
            )

    @property
    def held_bytes_limit(self) -> int:
        """Maximum bytes of all request bodies held at once."""
        return 8 * self.max_bytes if self.max_held_bytes is None else self.max_held_bytes


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
