"""Whether a step may move the weights: decided where the numbers are, without waiting for them."""

from __future__ import annotations

import torch
from torch import Tensor

from retinanet.losses.detection import Losses

PATIENCE = 20
"""Steps in a row that a loss scale may cost: it halves with each, and from 2^16 it is then 1/16."""


class Guard:
    """Refuses steps whose loss or gradient is not finite.

    One such step ends the run. Under the loss scale of fp16 a gradient may overflow now and then:
    the step is left out and the scale halved, and only :data:`PATIENCE` such steps in a row end the
    run, or a loss that is not finite itself. The host hears of the end when it reads
    :attr:`stopped`, a step late on a GPU; until then every further step is refused as well, so that
    weights, momentum and averages are still those before the step that ended the run.

    Attributes:
        stopped: () bool on the device, whether the run has ended; a new tensor each step.
    """

    def __init__(self, device: torch.device, *, scaled: bool) -> None:
        self._patience = PATIENCE if scaled else 1
        self._in_a_row = torch.zeros((), dtype=torch.float32, device=device)
        self.stopped = torch.zeros((), dtype=torch.bool, device=device)

    def refuses(self, losses: Losses, grad_norm: Tensor) -> Tensor:
        """() float32 on the device: 1 if this step may move nothing, else 0."""
        loss_is_finite = losses.total.detach().isfinite()
        bad = ~(loss_is_finite & grad_norm.isfinite())
        refused = bad | self.stopped
        self._in_a_row = torch.where(bad, self._in_a_row + 1, 0)
        self.stopped = self.stopped | ~loss_is_finite | (self._in_a_row >= self._patience)
        return refused.float()


def step_unless(refused: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Move the weights, unless `refused` (() float32) is 1."""
    if optimizer.defaults.get("fused"):
        # Its kernels look at the flag themselves, on the device (GradScaler tells them so, too).
        optimizer.found_inf = refused  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif not refused:
        optimizer.step()
