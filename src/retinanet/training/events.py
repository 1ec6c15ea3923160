"""Progress events: the command line displays them, a program may read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

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
            loss, images), ``message`` (message), ``end`` (step, best_ap, best_step, seconds,
            interrupted).
        data: the values, by the names above.
    """

    kind: Kind
    data: dict[str, Any] = field(default_factory=dict)


EventCallback = Callable[[Event], object]
"""Receives progress events; training stops after the current step if it returns ``"stop"``."""


Emit = Callable[..., None]
"""Sends an event, ``emit(kind, **values)``, to the callback, from the main process only."""


def ignore(kind: Kind, /, **data: Any) -> None:
    """Discard an event."""
