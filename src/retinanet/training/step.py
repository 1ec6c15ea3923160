"""One training step: progress, learning rate, gradients, guard, update, metrics; no device sync.

(Hard example mining, ``loss.mining``, does sync: it has to read which anchors are hard.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import psutil
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from retinanet.anchors import feature_sizes, level_anchors
from retinanet.config import LossSettings, TrainConfig
from retinanet.errors import ConfigError
from retinanet.losses.assignment import match_by_iou
from retinanet.losses.detection import Losses, detection_losses
from retinanet.model.precision import DTYPES
from retinanet.model.retinanet import RetinaNet
from retinanet.structures import Batch, Targets

if TYPE_CHECKING:  # slow to import, and a run folder is read without it
    from accelerate import Accelerator

MAX_CONSECUTIVE_SKIPPED_STEPS = 20
"""Overflows in a row under fp16 that end a run: the loss scale halves each time, 2^16 to 1/16."""


@dataclass
class Progress:
    """Progress of a run.

    Attributes:
        step: steps done.
        steps: steps in all.
        best_ap: the best validation AP so far; -1: none yet.
        best_step: the step it was reached at.
        bad_validations: validations in a row without a better AP.
        stopped_early: whether ``train.early_stop`` or ``train.target_ap50`` ended the run.
        unmatched_steps: steps with objects but without a positive anchor, while none had one; -1
            once there was a positive.
        seconds: time spent training, validation included.
        validation_seconds: time of the last validation.
        metrics: the last validation's metrics.
        best_metrics: those of the best one.
        untuned_ap: AP of the best weights before their post-processing was chosen.
        extensions: those begun, with first_step, steps and epochs.
    """

    step: int = 0
    steps: int = 0
    best_ap: float = -1.0
    best_step: int = 0
    bad_validations: int = 0
    stopped_early: bool = False
    unmatched_steps: int = 0
    seconds: float = 0.0
    validation_seconds: float = 0.0
    metrics: dict[str, Any] = field(default_factory=dict)
    best_metrics: dict[str, Any] = field(default_factory=dict)
    untuned_ap: float = -1.0
    extensions: list[dict[str, Any]] = field(default_factory=list)

    @property
    def first_step(self) -> int:
        """Steps done before the schedule began."""
        return int(self.extensions[-1]["first_step"]) if self.extensions else 0

    @property
    def schedule(self) -> tuple[int, int]:
        """Steps of the schedule that are done, and all of its steps."""
        return self.step - self.first_step, self.steps - self.first_step

    def is_in_extension(self, epochs: float, path: Path) -> bool:
        """Return True if the run was stopped in such an extension, False if it is finished."""
        last = self.extensions[-1] if self.extensions else {}
        if self.finished or last.get("epochs") == epochs:
            return not self.finished
        raise ConfigError(
            f"{path} has done {self.step} of {self.steps} steps: finish it by the command that "
            "started it, and then extend it"
        )

    def extend(self, epochs: float, steps: int) -> None:
        """Begin an extension."""
        self.extensions.append({"first_step": self.step, "steps": steps, "epochs": epochs})
        self.steps, self.stopped_early, self.bad_validations = self.step + steps, False, 0
        if self.untuned_ap >= 0:
            self.best_ap = self.untuned_ap

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        return self.stopped_early or (self.steps > 0 and self.step >= self.steps)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Progress:
        """Read saved fields; those of other versions are ignored."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


def lr_factor(step: int, steps: int, settings: TrainConfig) -> float:
    """Factor of the learning rate in step `step` (from 0) of `steps`.

    The schedule ``steps`` divides by 10 at each milestone, a share of `steps` (Sec. 4.1: 60k and
    80k of 90k); ``cosine`` falls from 1 to 0. The first ``warmup_steps`` rise linearly (Goyal et
    al. 2017, Sec. 2.2).

    Example:
        >>> paper = TrainConfig(milestones=(2 / 3, 8 / 9))
        >>> [lr_factor(s, 90_000, paper) for s in (0, 59_999, 60_000, 79_999, 80_000)]
        [1.0, 1.0, 0.1, 0.1, 0.01]
    """
    warmup = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    if settings.schedule == "cosine":
        return warmup * 0.5 * (1 + math.cos(math.pi * step / steps))
    passed = sum(step >= round(share * steps) for share in settings.milestones)
    return warmup * float(f"1e-{passed}")


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set each group's learning rate to its share of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_share"]


# --- gradients ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StepContext:
    """The inputs of a training step besides the batch.

    Attributes:
        step: from 0; everything drawn at random depends on it and on the seed alone.
        precision: ``float32``, ``bf16`` or ``fp16``.
        scaler: scales the loss under fp16.
        running: () state of the normalizer ``running``: the moving average over whole batches.
        share: of the training steps that are done.
    """

    step: int
    precision: str
    scaler: torch.amp.GradScaler
    running: Tensor
    share: float = 1.0


def backward(
    network: nn.Module,
    model: nn.Module,
    batch: Batch,
    context: StepContext,
    *,
    accelerator: Accelerator,
    settings: LossSettings,
    accumulate: int,
) -> tuple[Losses, Tensor]:
    """Compute losses and gradients of a batch in micro-batches.

    The gradient is that of the whole batch for any number of processes and micro-batches; it is
    averaged over processes in the last micro-batch. Where the normalizer depends on the outputs
    (assignments other than ``iou``, quality and varifocal loss), each micro-batch has its own.
    """
    model = cast(RetinaNet, model)
    settings = settings.at(context.share)
    device, dtype = batch.images.device, DTYPES[context.precision]
    sizes = feature_sizes(model.anchors.strides, *batch.images.shape[-2:])
    anchors = level_anchors(model.anchors, sizes, device)
    # Each micro-batch divides by its part of the whole batch's count.
    parts = accelerator.num_processes * accumulate
    world_foreground = _world_foreground(accelerator, anchors, batch.targets, settings, accumulate)
    losses: list[Losses] = []
    pieces = list(micro_batches(batch, accumulate))
    for piece in pieces:
        wait = accelerator.num_processes > 1 and piece is not pieces[-1]
        with accelerator.no_sync(network) if wait else nullcontext():
            with nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype):
                outputs = network(piece.images)
            losses.append(
                detection_losses(
                    outputs,
                    anchors,
                    piece.targets,
                    num_classes=model.num_classes,
                    running=context.running / parts,
                    world_foreground=world_foreground,
                    overwrite_logits=True,
                    settings=settings,
                )
            )
            torch.autograd.backward(context.scaler.scale(losses[-1].total / accumulate))
    uses_running = settings.normalizer == "running"
    running = losses[-1].normalizer * parts if uses_running else context.running
    total = merge_losses(losses)
    if accelerator.num_processes > 1:
        total = Losses(
            accelerator.reduce(total.classification, reduction="mean"),
            accelerator.reduce(total.box, reduction="mean"),
            accelerator.gather(total.foreground),
            total.normalizer,
        )
    return total, running


def micro_batches(batch: Batch, count: int) -> Iterator[Batch]:
    """Split a batch into `count` equal parts, in order."""
    size = len(batch.images) // count
    for i in range(0, len(batch.images), size):
        part = slice(i, i + size)
        yield Batch(
            batch.images[part],
            Targets(batch.targets.boxes[part], batch.targets.labels[part]),
            batch.sizes[part],
            batch.original_sizes[part],
            batch.indices[part],
        )


def merge_losses(parts: Sequence[Losses]) -> Losses:
    """Losses of a batch, detached, from those of its micro-batches in order."""
    return Losses(
        classification=torch.stack([part.classification.detach() for part in parts]).mean(),
        box=torch.stack([part.box.detach() for part in parts]).mean(),
        foreground=torch.cat([part.foreground for part in parts]),
        normalizer=parts[-1].normalizer,
    )


def _world_foreground(
    accelerator: Accelerator,
    anchors: list[Tensor],
    targets: Targets,
    settings: LossSettings,
    accumulate: int,
) -> Callable[[Tensor], Tensor]:
    """Map a micro-batch's count of foreground anchors to its part of the whole batch's.

    Where the count depends on the outputs, micro-batches are instead averaged as they are.
    """
    whole: Tensor | None = None
    if settings.needs_outputs:
        accumulate = 1
    elif accumulate > 1 and settings.normalizer != "image":
        # The first micro-batch needs the count of all, so they are matched beforehand as well.
        whole = (match_by_iou(torch.cat(anchors), targets, settings) >= 0).sum()

    def share(count: Tensor) -> Tensor:
        own = count if whole is None else whole
        total = accelerator.reduce(own.float(), reduction="sum")
        part: Tensor = total.clamp(min=1) / (accelerator.num_processes * accumulate)
        return part

    return share


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Clip the gradient in place and return its norm before that; `max_norm` 0 only measures."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if max_norm > 0:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


# --- update ---------------------------------------------------------------------------------------


class NonFiniteGuard:
    """Skip optimizer steps with a NaN or Inf loss or gradient on the device, without a sync.

    One such step ends the run. Under the loss scale of fp16 a gradient may overflow now and then:
    the step is skipped and the scale halved; :data:`MAX_CONSECUTIVE_SKIPPED_STEPS` in a row end the
    run, and so does a NaN or Inf loss. The host reads :attr:`stopped` a step late on a GPU; until
    then all further steps are skipped as well, so weights, momentum and EMA stay those before the
    step that ended the run.

    Attributes:
        stopped: () bool on the device, whether the run has ended; a new tensor per step.
    """

    def __init__(self, device: torch.device, *, scaled: bool) -> None:
        self._max_in_a_row = MAX_CONSECUTIVE_SKIPPED_STEPS if scaled else 1
        self._in_a_row = torch.zeros((), dtype=torch.float32, device=device)
        self.stopped = torch.zeros((), dtype=torch.bool, device=device)

    def check(self, losses: Losses, grad_norm: Tensor) -> Tensor:
        """Return () float32 on the device: 1 where this step must be skipped, else 0."""
        loss_is_finite = losses.total.detach().isfinite()
        bad = ~(loss_is_finite & grad_norm.isfinite())
        skip = bad | self.stopped
        self._in_a_row = torch.where(bad, self._in_a_row + 1, 0)
        self.stopped = self.stopped | ~loss_is_finite | (self._in_a_row >= self._max_in_a_row)
        return skip.float()


def optimizer_step(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Update the weights, unless `skip` (() float32) is 1."""
    if optimizer.defaults.get("fused"):
        # Fused kernels read the flag on the device; GradScaler uses the same attribute.
        optimizer.found_inf = skip  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif not skip:
        optimizer.step()


def update_ema(ema: AveragedModel, model: nn.Module, decay: float, skip: Tensor) -> None:
    """Update the EMA weights in place, unless the step was skipped; no device sync.

    Args:
        ema: of `model`; updates are counted on the host. Skipped steps are therefore counted on a
            GPU and not on a CPU: under fp16's loss scale the ramp at the beginning is a few steps
            shorter there.
        decay: share of the old value that is kept, after a ramp at the beginning.
        skip: () float32, 1 where the step did not move the model.
    """
    on_cpu = skip.device.type == "cpu"
    if on_cpu and skip:
        return
    updates = int(ema.n_averaged)
    # The ramp keeps a short run's average from being its first step's weights.
    weight = 1 - min(decay, (1 + updates) / (10 + updates)) if updates else 1.0
    pairs = zip(
        [*ema.module.parameters(), *ema.module.buffers()],
        [*model.parameters(), *model.buffers()],
        strict=True,
    )
    for average, value in pairs:
        lerp_unless(average, value, weight, None if on_cpu else skip)
    ema.n_averaged += 1


@torch.no_grad()
def lerp_unless(average: Tensor, value: Tensor, weight: float, skip: Tensor | None) -> None:
    """Interpolate `average` towards `value` in place, without a device sync.

    Args:
        average: any shape; integers are copied from `value`.
        value: of the same shape and type.
        weight: in (0, 1]; 1 copies `value`.
        skip: () float32, 1 where nothing may change, even where `value` is NaN; None: never skip.
    """
    if skip is not None:
        # Not a weight of 0, which would let a NaN in.
        value = torch.where(skip > 0, average, value)
    if average.is_floating_point() and weight < 1:
        average.lerp_(value, weight)
    else:
        average.copy_(value)


# --- metrics --------------------------------------------------------------------------------------


class PendingStep:
    """A step that the device may still compute, with its metrics on their way to the host."""

    def __init__(
        self, step: int, lr: float, batch: Batch, running: Tensor, share: float = 1.0
    ) -> None:
        self.step, self.lr, self.batch, self.running = step, lr, batch, running
        self.share = share
        self.speed: dict[str, float] = {}
        self._copied: torch.cuda.Event | None = None

    def copy_metrics(self, losses: Losses, grad_norm: Tensor, stopped: Tensor) -> None:
        """Start the copy of the losses, the gradient norm, and whether the run has ended."""
        self._values = torch.stack(
            [
                losses.classification.float(),
                losses.box.float(),
                losses.foreground.float().mean(),
                grad_norm.float(),
                stopped.float(),
            ]
        )
        if self._values.device.type == "cuda":
            pinned = torch.empty(self._values.shape, device="cpu", pin_memory=True)
            self._values = pinned.copy_(self._values, non_blocking=True)
            # Waiting for it leaves the processor to the workers that load images.
            self._copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._copied.record()

    def read(self) -> tuple[dict[str, float], bool]:
        """Wait for the step; return its metrics by their names in the log, and whether it failed.

        ``positives`` are foreground anchors per image.
        """
        if self._copied is not None:
            self._copied.synchronize()
        classification, box, positives, norm, stopped = self._values.tolist()
        metrics = {
            "loss": classification + box,
            "loss_classification": classification,
            "loss_box": box,
            "positives": positives,
            "grad_norm": norm,
        }
        return metrics, stopped > 0


class Meter:
    """Speed, share of time spent waiting for images, and memory."""

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self._batch_size = batch_size
        self._device = device
        self._process = psutil.Process()
        self._mean_seconds: float | None = None
        self.start_step()

    def start_step(self) -> None:
        """Start the clock of a step, before its batch is loaded."""
        self._started = self._loaded = time.perf_counter()

    def batch_loaded(self) -> None:
        """Note that the batch is loaded."""
        self._loaded = time.perf_counter()

    def end_step(self, steps_left: int) -> dict[str, float]:
        """Return the values of the step, by the names of the log."""
        seconds = time.perf_counter() - self._started
        mean = self._mean_seconds
        self._mean_seconds = seconds if mean is None else 0.95 * mean + 0.05 * seconds
        if self._device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(self._device)
        else:
            memory = self._process.memory_info().rss
        return {
            "seconds": round(seconds, 4),
            "images_per_second": round(self._batch_size / self._mean_seconds, 3),
            "waiting": round((self._loaded - self._started) / seconds, 4),
            "memory_mb": round(memory / 1e6, 1),
            "seconds_left": round(steps_left * self._mean_seconds, 1),
        }
