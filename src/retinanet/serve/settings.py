"""What a service allows, and how it works through what it is asked."""

from __future__ import annotations

from dataclasses import dataclass, field

from retinanet.errors import ConfigError

_MEGABYTE = 2**20


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits of a service; docs/serve.md says why each default is what it is.

    Attributes:
        max_bytes: of a request's body.
        max_pixels: of an image, height times width, read from its header before it is unpacked.
        max_images: of a request.
        queue: images that may wait or be worked on at once; further requests are told to come
            again.
        timeout: seconds from the start of a request to its answer, the upload included.
        header_timeout: seconds that a client may take for a request's headers.
        held_bytes: of all bodies together that are held at once; None: eight of `max_bytes`.
        batch_size: images of the same size that the network takes at once; None: 1 on a CPU and
            8 elsewhere.
        max_wait_ms: milliseconds that the network waits for a batch to fill.
        workers: threads that run the network; the cores are shared between them.
        readers: threads that unpack and resize images; None: one a processor, four at the most.
        api_key: asked of every request but those for the page and the health; None: of none.

    Raises:
        ConfigError: a value out of range.
    """

    max_bytes: int = 32 * _MEGABYTE
    max_pixels: int = 50_000_000
    max_images: int = 32
    queue: int = 128
    timeout: float = 60.0
    header_timeout: float = 10.0
    held_bytes: int | None = None
    batch_size: int | None = None
    max_wait_ms: float = 0.0
    workers: int = 1
    readers: int | None = None
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        least = {
            "max_bytes": 1,
            "max_pixels": 1,
            "max_images": 1,
            "queue": 1,
            "batch_size": 1,
            "max_wait_ms": 0,
            "workers": 1,
            "readers": 1,
        }
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise ConfigError(f"{_option(name)} {value} is under {low}")
        for name in ("timeout", "header_timeout"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{_option(name)} {getattr(self, name)} is not over 0 seconds")
        if self.queue < self.max_images:
            raise ConfigError(
                f"{_option('queue')} {self.queue} is under {_option('max_images')} "
                f"{self.max_images}: a request of so many images could never be taken"
            )
        if self.held_bytes is not None and self.held_bytes < self.max_bytes:
            raise ConfigError(
                f"held_bytes {self.held_bytes} is under max_bytes {self.max_bytes}: "
                "a request of so many bytes could never be taken"
            )
        if self.api_key is not None and not (
            self.api_key.isascii()
            and self.api_key.isprintable()
            and self.api_key.strip() == self.api_key != ""
        ):
            # Its value is never said.
            raise ConfigError(
                "the API key is empty, begins or ends with a space, or holds what a header cannot: "
                "give letters, digits and signs"
            )

    @property
    def all_bytes(self) -> int:
        """Of all bodies together that may be held at once."""
        return 8 * self.max_bytes if self.held_bytes is None else self.held_bytes


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
