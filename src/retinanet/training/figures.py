"""The numbers of a step that a user watches: losses, speed, waiting, memory."""

from __future__ import annotations

import time
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor

from retinanet.losses.detection import Losses


@dataclass(frozen=True, slots=True)
class StepFigures:
    """The numbers of one step, on the host."""

    loss: float
    loss_classification: float
    loss_box: float
    positives: float
    grad_norm: float

    def as_dict(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in self.__slots__}


class FiguresInFlight:
    """A step's numbers on their way to the host: one copy, for which nothing waits on a GPU."""

    def __init__(self, losses: Losses, grad_norm: Tensor, stopped: Tensor) -> None:
        self._values = torch.stack(
            [
                losses.classification.float(),
                losses.box.float(),
                losses.foreground.float().mean(),
                grad_norm.float(),
                stopped.float(),
            ]
        )
        self._arrived: torch.cuda.Event | None = None
        if self._values.device.type == "cuda":
            pinned = torch.empty(self._values.shape, device="cpu", pin_memory=True)
            self._values = pinned.copy_(self._values, non_blocking=True)
            # Whoever waits for it leaves the processor to the workers that load images.
            self._arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._arrived.record()

    def read(self) -> tuple[StepFigures, bool]:
        """The numbers, and whether the step ended the run; waits until that step is done."""
        if self._arrived is not None:
            self._arrived.synchronize()
        classification, box, positives, norm, stopped = self._values.tolist()
        figures = StepFigures(classification + box, classification, box, positives, norm)
        return figures, stopped > 0


class Meter:
    """Speed, waiting and memory of the steps, as a user wants to see them."""

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self._batch_size = batch_size
        self._device = device
        self._process = psutil.Process()
        self._mean_seconds: float | None = None

    def begin(self) -> None:
        """A step begins."""
        self._began = self._got = time.perf_counter()

    def got_data(self) -> None:
        """Its batch is there."""
        self._got = time.perf_counter()

    def end(self, steps_left: int) -> dict[str, float]:
        """It is done: the numbers, by the names of the log."""
        seconds = time.perf_counter() - self._began
        mean = self._mean_seconds
        self._mean_seconds = seconds if mean is None else 0.95 * mean + 0.05 * seconds
        if self._device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self._device)
        else:
            memory = self._process.memory_info().rss
        return {
            "seconds": round(seconds, 4),
            "images_per_second": round(self._batch_size / self._mean_seconds, 3),
            "waiting": round((self._got - self._began) / seconds, 4),
            "memory_mb": round(memory / 1e6, 1),
            "seconds_left": round(steps_left * self._mean_seconds, 1),
        }
