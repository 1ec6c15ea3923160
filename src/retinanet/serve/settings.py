"""Limits and threads of a service."""

from __future__ import annotations

from dataclasses import dataclass, field

from retinanet.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits and threads of a service; docs/serve.md gives the reason of each default.

    Attributes:
        max_bytes: bytes per request body.
        max_pixels: pixels per image (height times width), read from its header before decoding.
        max_images: images per request.
        queue: images waiting or in work; further requests are answered with 503.
        timeout: seconds per request, upload included.
        batch_size: images per batch, all of one size; None: 1 on a CPU, 8 elsewhere.
        max_wait_ms: milliseconds to wait for a batch to fill.
        workers: threads that run the network; they share the CPU cores. None: one per core, at
            most 4, with torch on a CPU, else 1.
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
    batch_size: int | None = None
    max_wait_ms: float = 0.0
    workers: int | None = None
    decode_threads: int | None = None
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check the values."""
        counts = ("max_bytes", "max_pixels", "max_images", "queue", "batch_size", "workers")
        for name in (*counts, "decode_threads", "max_wait_ms"):
            value, minimum = getattr(self, name), 0 if name == "max_wait_ms" else 1
            if value is not None and not value >= minimum:
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option} is out of range: {value}; minimum {minimum}")
        if not self.timeout > 0:
            raise ConfigError(f"--timeout is out of range: {self.timeout}; must be positive")
        if self.queue < self.max_images:
            raise ConfigError(
                f"--queue {self.queue} is smaller than --max-images {self.max_images}: a request "
                "with that many images would never be accepted; raise --queue"
            )
        key = self.api_key
        if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key):
            key = ""
        if key == "":  # the message does not show the key
            raise ConfigError(
                "invalid API key: it is empty, starts or ends with a space, or contains characters "
                "that a header cannot hold; use ASCII letters, digits and punctuation"
            )
