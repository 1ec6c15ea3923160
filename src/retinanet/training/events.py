"""Progress events: the command line displays them, a program may read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from retinanet.errors import ConfigError

Kind = Literal["choices", "start", "resume", "step", "validating", "validation", "message", "end"]


@dataclass(frozen=True, slots=True)
class Event:
    """A progress event.

    Attributes:
        kind: ``choices`` (choices: settings chosen from the data, each with setting, value and
            reason), ``start`` and ``resume`` (step, steps, images, tiles, classes, lr, batch_size,
            device, processes, precision, split_origin), ``step`` (step, steps, loss,
            loss_classification, loss_box, positives, grad_norm, lr, images_per_second, waiting,
            memory_mb, seconds_left), ``validating`` (done, total), ``validation`` (step, ap, ap50,
            loss), ``message`` (message), ``end`` (step, best_ap, best_step, seconds, interrupted).
        data: the values, by the names above.
    """

    kind: Kind
    data: dict[str, Any] = field(default_factory=dict)


EventCallback = Callable[[Event], object]
"""Receives progress events; training stops after the current step if it returns ``"stop"``."""


class Emit(Protocol):
    """A function that sends an event to the callback, from the main process only."""

    def __call__(self, kind: Kind, /, **data: Any) -> None:
        """Send the event of that kind with these values."""


class Emitter:
    """Sends events to a callback, and keeps its request to stop.

    Attributes:
        stop: True once the callback has returned ``"stop"``.
    """

    def __init__(self, callback: EventCallback | None) -> None:
        self._callback = callback
        self.stop = False

    def __call__(self, kind: Kind, /, **data: Any) -> None:
        """Send the event of that kind with these values."""
        answer = None if self._callback is None else self._callback(Event(kind, data))
        if answer is None:
            return
        if not (isinstance(answer, str) and answer == "stop"):
            raise ConfigError(f"on_event returned {answer!r}: return None, or 'stop' to stop")
        self.stop = True


def ignore(kind: Kind, /, **data: Any) -> None:
    """Discard an event."""
