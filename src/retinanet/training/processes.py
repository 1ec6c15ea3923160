"""Devices, processes and signals: what surrounds the loop, on accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import nn

from retinanet.errors import ConfigError, MissingExtraError
from retinanet.interrupts import StopRequest, stop_on_signal


def open_accelerator(device: str, trackers: tuple[str, ...], out: Path) -> Accelerator:
    """The devices and processes of this run.

    Raises:
        ConfigError: there is no such device.
        MissingExtraError: a tracker is not installed.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device {device!r} is not auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: this torch sees no CUDA device; use --device cpu")
    for tracker in trackers:
        _require_tracker(tracker)
    return Accelerator(
        # Precision is ours (recipe): accelerate's own would copy the logits to float32.
        mixed_precision="no",
        cpu=device == "cpu" or not torch.accelerator.is_available(),
        log_with=list(trackers) or None,
        project_dir=str(out / "tensorboard"),
        # A validation runs on the main process alone, and the others wait for it.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=4))],
    )


def _require_tracker(name: str) -> None:
    from accelerate.utils import is_mlflow_available, is_tensorboard_available, is_wandb_available

    available = {
        "tensorboard": is_tensorboard_available,
        "wandb": is_wandb_available,
        "mlflow": is_mlflow_available,
    }
    if not available[name]():
        raise MissingExtraError(name, name)


def from_main(accelerator: Accelerator, value: float) -> float:
    """The main process' value, on every process."""
    if accelerator.num_processes == 1:
        return value
    mine = value if accelerator.is_main_process else 0.0
    return float(accelerator.reduce(torch.tensor(mine, device=accelerator.device), reduction="sum"))


@contextmanager
def sync_if(accelerator: Accelerator, network: nn.Module, last: bool) -> Iterator[None]:
    """Gradients are averaged over processes only in the last micro-batch."""
    if last or accelerator.num_processes == 1:
        yield
    else:
        with accelerator.no_sync(network):
            yield


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Algorithms that give the same bits each time, within."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def stop_after_step(accelerator: Accelerator) -> Iterator[StopRequest]:
    """Turn the first Ctrl-C or SIGTERM into a request to stop after the current step.

    With several processes each would stop at another step and the rest would wait for it forever,
    so there a signal ends the process at once, and the run resumes from the last saved state.
    """
    if accelerator.num_processes > 1:
        yield StopRequest()
        return
    with stop_on_signal() as stop:
        yield stop
