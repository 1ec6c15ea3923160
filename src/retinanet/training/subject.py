"""What the loop trains: a RetinaNet, or another detector by the same rules and from the same data.

Whatever is not in here (data, order, augmentation, schedule, optimiser, averaging, what is kept and
when) is the loop's, and so the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from retinanet.data.dataset import Dataset
from retinanet.evaluation.metrics import Metrics
from retinanet.losses.detection import Losses
from retinanet.structures import Batch


class Subject(Protocol):
    """A kind of detector, for one run of the loop.

    Its networks have a ``pixel_mean`` (3, 1, 1) of 0..255 RGB, with which images are padded, and
    a part named ``backbone``, which has its own share of the learning rate.

    Attributes:
        info: what ``run.json`` says of it; ``rival`` in it is the name of another detector, and a
            run of one does not go on as another.
    """

    info: Mapping[str, Any]

    def build(self) -> nn.Module:
        """The network as a new run starts with it."""

    def restore(self, folder: Path) -> nn.Module:
        """The network of a checkpoint, with nothing but what is in the run's own folder."""

    def backward(
        self,
        network: nn.Module,
        model: nn.Module,
        batch: Batch,
        *,
        step: int,
        precision: str,
        scaler: torch.amp.GradScaler,
        running: Tensor,
    ) -> tuple[Losses, Tensor]:
        """Loss and gradient of a batch.

        Args:
            network: `model`, or what holds it where there are several processes.
            batch: this process' part.
            step: from 0; whatever is drawn at random depends on it and on the seed alone.
            running: () a number that goes from step to step.

        Returns:
            The losses of the whole batch, and `running` after it.
        """

    def evaluate(
        self,
        model: nn.Module,
        dataset: Dataset,
        *,
        batch_size: int,
        workers: int,
        precision: str,
        progress: Callable[[int, int], None],
    ) -> Metrics:
        """What the network is worth on a data set."""

    def write(self, folder: Path, model: nn.Module, step: int) -> None:
        """Write a checkpoint into a folder, which exists."""

    def report_nonfinite(
        self,
        run: Path,
        model: nn.Module,
        *,
        step: int,
        batch: Batch,
        running: Tensor,
        numbers: Mapping[str, Any],
        write: bool,
    ) -> NoReturn:
        """Raise a NonFiniteLossError that names the step.

        Args:
            run: the run folder.
            model: with the weights before the step.
            running: () as it was before the step.
            numbers: of the log, and ``lr`` and ``precision``.
            write: whether this process may write into the run folder.
        """


MakeSubject = Callable[[Accelerator, Dataset, Callable[..., None]], Subject]
"""From the devices, the data to train on, and what tells events, to what is trained.

It raises what is wrong with the recipe for this data before anything is written.
"""
