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
        queue: images waiting or in work; further requests are answered with 503.
        timeout: seconds per request, upload included.
        batch_size: images per batch, all of one size; None: 1 on a CPU, 8 elsewhere.
        workers: threads that run the network; they share the CPU cores. None: one per core, at
            most 4, with torch on a CPU, else 1.
        api_key: key that requests must send, except for the page and the health checks; None: no
            key is needed.

    Raises:
        ConfigError: a value is out of range.
    """

    max_bytes: int = 32 * 2**20
    max_pixels: int = 50_000_000
    queue: int = 128
    timeout: float = 60.0
    batch_size: int | None = None
    workers: int | None = None
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("max_bytes", "max_pixels", "queue", "batch_size", "workers"):
            value = getattr(self, name)
            if value is not None and not value >= 1:
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option} is out of range: {value}; minimum 1")
        if not self.timeout > 0:
            raise ConfigError(f"--timeout is out of range: {self.timeout}; must be positive")
        key = self.api_key
        if key is not None and not (
            key and key.isascii() and key.isprintable() and key == key.strip()
        ):
            raise ConfigError(  # the message does not show the key
                "invalid API key: it is empty, starts or ends with a space, or contains characters "
                "that a header cannot hold; use ASCII letters, digits and punctuation"
            )
