"""Memory of a training step: the micro-batches that fit (``train.accumulate=0``)."""

from __future__ import annotations

import ctypes
import gc
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from retinanet.data.cpus import free_memory
from retinanet.errors import ConfigError
from retinanet.structures import Batch, pad_targets
from retinanet.training.task import TaskSettings

TryStep = Callable[[TaskSettings, Batch], object]
"""Does a training step with settings, and discards it."""


_SHARE = 0.8  # of the available memory that a step may take
_PEAK = 1.2  # memory of a step in what its forward pass saves: .9 to 1 measured, and a reserve

_MALLOC_OPTIONS = {-4: 0, -1: -1}  # glibc's M_MMAP_MAX and M_TRIM_THRESHOLD (malloc.h)


class OutOfMemoryError(ConfigError):
    """A training step does not fit into memory."""


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next tensors, where it is glibc.

    Otherwise each feature map of over 32 MB is mapped anew, and the system clears its pages when
    they are first used: on a CPU up to a third of a training step. The whole process then holds the
    most memory that it has needed.

    Returns:
        whether it does.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    assert library is not None
    return all(library.mallopt(option, value) for option, value in _MALLOC_OPTIONS.items())


def fit_memory(settings: TaskSettings, try_step: TryStep) -> int:
    """Return the least number of micro-batches with which a step of the largest batch fits.

    Raises:
        ConfigError: a step of a single image does not fit, or there are several processes, which
            would wait for each other.
    """
    if settings.accelerator.num_processes > 1:
        raise ConfigError(
            "--batch-size auto (train.accumulate=0) tries steps in a single process: give "
            "several processes train.accumulate=N"
        )
    count = settings.batch_size
    images = count
    if settings.accelerator.device.type == "cpu":
        # A CPU gets more than it has, and the system ends the process when it is used.
        free = _SHARE * free_memory()
        images = int(free / _bytes_per_image(settings, try_step))
    candidates = (n for n in divisors(count) if count // n <= images)
    parts = next((n for n in candidates if _fits(settings, n, try_step)), None)
    if parts is None:
        _, _, height, width = largest_batch(settings, 1).images.shape
        raise ConfigError(
            f"an image of {width} x {height} px does not fit into the memory of "
            f"{settings.accelerator.device}: give a smaller data.image_size, or data.tile"
        )
    return parts


def divisors(count: int) -> list[int]:
    """Return the numbers of micro-batches into which a batch can be split, ascending."""
    return [parts for parts in range(1, count + 1) if count % parts == 0]


def largest_batch(settings: TaskSettings, count: int) -> Batch:
    """Return `count` black images of the largest size and number of objects in the data."""
    data, images = settings.recipe.data, settings.train_set.images
    shorter = max((data.image_size, *data.multi_scale))
    height = width = 0.0
    for image in images:
        sides = (image.height or 0, image.width or 0)
        if not all(sides):
            height = width = data.max_size
            break
        scale = min(shorter / min(sides), data.max_size / max(sides))
        scale *= 1.0 if data.crop is True else data.scale_jitter[1]
        height, width = max(height, scale * sides[0]), max(width, scale * sides[1])
    size = [math.ceil(side / 32) * 32 for side in (height, width)]
    objects = max(len(image.annotations) for image in images)
    boxes = torch.tensor([0.0, 0, size[1] / 2, size[0] / 2]).expand(objects, 4)
    return Batch(
        torch.zeros(count, 3, *size, dtype=torch.uint8),
        pad_targets([boxes] * count, [torch.zeros(objects, dtype=torch.int64)] * count),
        torch.tensor([size] * count),
        torch.tensor([size] * count),
        torch.zeros(count, dtype=torch.int64),
    )


@contextmanager
def memory_errors(settings: TaskSettings) -> Iterator[None]:
    """Turn torch's errors of GPU and CPU memory into the setting to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not is_memory and "DefaultCPUAllocator" not in str(error):
            raise
        count, accumulate = settings.batch_size, settings.recipe.train.accumulate
        parts = next((n for n in divisors(count) if n > accumulate), None)
        advice = "give a smaller data.image_size, or data.tile"
        if parts is not None:
            advice = (
                f"give train.accumulate={parts} (by {count // parts}; batch and learning rate "
                "stay), or --batch-size auto, which finds it"
            )
        raise OutOfMemoryError(
            f"out of memory on {settings.accelerator.device} with {count // accumulate} images of "
            f"up to {settings.recipe.data.max_size} px at a time: {advice}"
        ) from error


def _fits(settings: TaskSettings, parts: int, try_step: TryStep) -> bool:
    recipe = settings.recipe.choose({"train.accumulate": parts})
    try:
        try_step(replace(settings, recipe=recipe), largest_batch(settings, settings.batch_size))
    except OutOfMemoryError:
        return False
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return True


def _bytes_per_image(settings: TaskSettings, try_step: TryStep) -> float:
    """Estimate the memory of a step per image from what its forward pass saves for the backward."""
    recipe = settings.recipe.choose({"train.batch_size": 1, "train.accumulate": 1})
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            try_step(replace(settings, recipe=recipe), largest_batch(settings, 1))
    except OutOfMemoryError:
        return math.inf
    return _PEAK * sum(sizes.values())
