"""What a run says while it goes on; the command line draws it, a program may read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    Attributes:
        kind: ``start`` and ``resume`` (step, steps, images, classes, lr, batch_size, device,
            precision, split_origin), ``step`` (step, steps, loss, loss_classification, loss_box,
            positives, grad_norm, lr, images_per_second, waiting, memory_mb, seconds_left),
            ``validating`` (done, total), ``validation`` (step, ap, ap50, loss), ``message``
            (message), ``end`` (step, best_ap, best_step, seconds, interrupted).
        data: the values, by the names above.
    """

    kind: Literal["start", "resume", "step", "validating", "validation", "message", "end"]
    data: dict[str, Any] = field(default_factory=dict)


Listener = Callable[[Event], None]
