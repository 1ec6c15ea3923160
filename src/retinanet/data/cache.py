"""Decoded images, kept in memory or in a file for the next epochs and shared by all workers."""

from __future__ import annotations

import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from retinanet.data.cpus import free_memory
from retinanet.data.dataset import Dataset
from retinanet.data.images import REDUCTIONS, reduction

ReadResult = tuple[Tensor, tuple[int, int]]
"""(3, h, w) uint8, and (height, width) of the whole image: as of ``read_reduced``."""

_MAX_SHARE = 0.5  # of the free memory, or of the free disk

# The table has three numbers per file, height and width of the whole image and 1 if its format has
# no reduced decoding, then offset, height and width of the pixels per factor; an offset of 0: none.
_FACTORS = (1, *sorted(REDUCTIONS))
_ROWS = 1 + len(_FACTORS)


class ImageCache:
    """Decoded images by number, in a file without a name that all processes map.

    The file is in memory (``memfd``), or on the disk in `folder`. Having no name, it leaves nothing
    behind however the processes end. Images beyond `capacity` bytes are not kept.
    """

    def __init__(self, num_files: int, capacity: int, folder: Path | None = None) -> None:
        self._start = 8 * (1 + num_files * _ROWS * 3)
        self._size = self._start + capacity
        if folder is None:
            self._open(os.memfd_create("retinanet-images"))
        else:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                self._open(os.dup(file.fileno()))
        with self._locked():  # not all network disks have locks
            self._free[0] = self._start  # the first free byte

    def read(
        self, number: int, wanted: tuple[int, int] | None, read: Callable[[], ReadResult]
    ) -> ReadResult:
        """Return an image from the cache, or read it and keep it.

        Args:
            number: of the file.
            wanted: shorter and longest side, as given to ``read_reduced``; None: the whole image.
            read: reads the image at the wanted size, in channels_last memory.

        Returns:
            What `read` returns. The pixels are those of the cache: do not change them.
        """
        with self._locked():
            found = self._find(number, wanted)
        if found is not None:
            return found
        image, size = read()
        with self._locked():
            self._keep(number, wanted, image, size)
        return image, size

    def has(self, number: int) -> bool:
        """Return whether an image is kept, at some size."""
        return bool(self._table[number, 1:, 0].any())

    def _find(self, number: int, wanted: tuple[int, int] | None) -> ReadResult | None:
        height, width, is_irreducible = self._table[number, 0].tolist()
        if not height:
            return None
        factor = 1 if wanted is None or is_irreducible else reduction(height, width, *wanted)
        offset, rows, columns = self._table[number, 1 + _FACTORS.index(factor)].tolist()
        if not offset:
            return None
        count = 3 * rows * columns
        pixels = torch.frombuffer(self._map, dtype=torch.uint8, count=count, offset=offset)
        return pixels.reshape(rows, columns, 3).permute(2, 0, 1), (height, width)

    def _keep(
        self, number: int, wanted: tuple[int, int] | None, image: Tensor, size: tuple[int, int]
    ) -> None:
        whole, *slots = self._table[number]
        rows, columns = image.shape[-2:]
        factor = min(_FACTORS, key=lambda factor: abs(size[0] - rows * factor))
        is_irreducible = wanted is not None and reduction(*size, *wanted) != factor
        whole[:] = *size, whole[2] or is_irreducible
        slot = slots[_FACTORS.index(factor)]
        start = int(self._free[0])
        if slot[0] or start + image.numel() > self._size:
            return
        try:
            # Not through the map: on a full disk that is a signal, and this an error.
            written = os.pwrite(self._file, image.permute(1, 2, 0).numpy().tobytes(), start)
        except OSError:
            written = 0
        if written == image.numel():
            slot[:] = start, rows, columns
            self._free[0] = start + written

    @contextmanager
    def _locked(self) -> Iterator[None]:
        import fcntl  # not on Windows

        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def _open(self, file: int) -> None:
        os.ftruncate(file, self._size)  # sparse: takes no space yet
        self._file = file
        self._path = f"/proc/{os.getpid()}/fd/{file}"
        self._map = mmap.mmap(file, self._size)
        numbers = np.frombuffer(self._map, np.int64, self._start // 8)
        self._free, self._table = numbers[:1], numbers[1:].reshape(-1, _ROWS, 3)

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process opens the file by, while this one has it open."""
        names = ("_start", "_size", "_path")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open(os.open(self._path, os.O_RDWR))

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)  # the map lives as long as tensors of it


def build_cache(
    dataset: Dataset, kind: Literal["none", "ram", "disk"]
) -> tuple[ImageCache | None, str | None]:
    """Build the cache of a data set's files, by ``data.cache``, or a message why there is none.

    At most half of the free memory or disk is used, divided among the processes that train on this
    machine (LOCAL_WORLD_SIZE); images beyond are read each time.
    """
    if kind == "none":
        return None, None
    if sys.platform != "linux":
        return None, f"warning: data.cache={kind} needs Linux: images are not cached"
    folder = None
    try:
        if kind == "disk":
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "retinanet"
            folder.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(folder).free
        else:
            free = free_memory()
        capacity = int(free * _MAX_SHARE) // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        return ImageCache(max(file_numbers(dataset), default=-1) + 1, capacity, folder), None
    except OSError as error:
        return None, f"warning: data.cache={kind}: {error}: images are not cached"


def file_numbers(dataset: Dataset) -> list[int]:
    """Return the number of each item's file; the tiles of an image have one file."""
    numbers: dict[Path, int] = {}
    return [numbers.setdefault(image.path, len(numbers)) for image in dataset.images]
