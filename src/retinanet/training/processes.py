"""Devices, processes and signals, on accelerate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs, utils
from torch import nn

from retinanet.errors import ConfigError
from retinanet.model.precision import choose_device


def open_accelerator(device: str, trackers: tuple[str, ...], out: Path) -> Accelerator:
    """Set up the devices and processes of this run."""
    chosen = choose_device(device)
    for tracker in trackers:
        if not getattr(utils, f"is_{tracker}_available")():
            raise ConfigError(f"tracker {tracker} is not installed: pip install {tracker}")
    accelerator = Accelerator(
        # The recipe's precision is used: accelerate's own would copy the logits to float32.
        mixed_precision="no",
        # accelerate keeps its first choice for the life of the process; ours is set below.
        cpu=chosen.type == "cpu" and int(os.environ.get("WORLD_SIZE", "1")) > 1,
        log_with=list(trackers) or None,
        project_dir=str(out / "tensorboard"),
        # A validation runs on the main process alone, and the others wait for it.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=4))],
    )
    if accelerator.num_processes == 1:
        accelerator.state.device = chosen
    elif chosen.index is not None:
        raise ConfigError(
            f"device {device}: each of {accelerator.num_processes} processes takes its own; "
            f"give --device {chosen.type}"
        )
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)
    return accelerator


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Let trained batch norm compute its statistics over the processes of a training.

    Source: Peng et al. 2018 (MegDet, arXiv:1711.07240), Sec. 3.2. Parameters and names stay, so the
    state dict is that of plain batch norm, and so are the outputs in eval mode. Frozen batch norm
    is not changed.

    Args:
        model: changed in place.
        device: of the processes.

    Raises:
        ConfigError: `device` is the CPU, on which torch does not synchronize batch norm.
    """
    if device.type == "cpu":
        raise ConfigError(
            "model.norm=sync: torch synchronizes batch norm over processes on GPUs only; with "
            "several CPU processes set model.norm to group, or to trained (statistics per process)"
        )
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            convert: Any = None
            if type(child) is nn.BatchNorm2d:
                convert = nn.SyncBatchNorm.convert_sync_batchnorm
            elif isinstance(child, nn.BatchNorm2d) and type(child).__module__.startswith("timm."):
                convert = import_module("timm.layers").convert_sync_batchnorm  # with its activation
            if convert is not None:
                setattr(parent, name, convert(child))


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Use deterministic algorithms within, where `enabled`."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(enabled or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
