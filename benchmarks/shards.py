"""Time reading WebDataset shards against the folder that they were made of.

    python benchmarks/shards.py ../shared/data/coco_320 [--rounds 7] [--workers 0]

The rows of a round are interleaved, so that other load affects all of them.
``batches``: the loader of training, with decoding and resizing. ``bytes``: the files alone, in a
random order, and one after another as the webdataset library reads them. ``cold``: the files are
dropped from the page cache before (``posix_fadvise``; not from the disk's own). ``cpu_us``:
processor time in microseconds per image (median, min, max), more telling than rates on a busy
machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import webdataset as wds

from retinanet.config import DataConfig
from retinanet.data import Dataset, convert, read_dataset, usable
from retinanet.data.archives import Member, archive_of, find_member
from retinanet.data.loading import train_loader

_SIZE, _LONGEST, _BATCH = 384, 640, 16


def batches(dataset: Dataset, order: str, workers: int, steps: int) -> Callable[[], int]:
    """Read batches as training does."""

    def read() -> int:
        loader = train_loader(
            dataset, DataConfig(image_size=_SIZE, max_size=_LONGEST, order=order),
            batch_size=_BATCH, steps=range(steps), seed=0, workers=workers,
        )  # fmt: skip
        return sum(len(batch.images) for batch in loader)

    return read


def contents(dataset: Dataset) -> Callable[[], int]:
    """Read the bytes of the files, in a random order."""
    files = [find_member(image.path) or image.path for image in dataset.images]  # as the loader

    def read() -> int:
        random.Random(0).shuffle(files)
        for file in files:
            _ = file.read() if isinstance(file, Member) else file.read_bytes()
        return len(files)

    return read


def by_library(shards: list[str]) -> Callable[[], int]:
    """Read all samples in order by the webdataset library, undecoded."""

    def read() -> int:
        return sum(1 for _ in wds.WebDataset(shards, shardshuffle=False))

    return read


def files_of(dataset: Dataset) -> list[str]:
    """The files on the disk."""
    found = (archive_of(image.path) or os.fspath(image.path) for image in dataset.images)
    return list(dict.fromkeys(found))


def forget(files: list[str]) -> None:
    """Drop files from the page cache."""
    for file in files:
        handle = os.open(file, os.O_RDONLY)
        os.fdatasync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def measured(
    rows: dict[str, tuple[Callable[[], int], list[str]]], rounds: int, cold: bool
) -> Iterator[dict[str, object]]:
    """Images per second of each row over the rounds."""
    rates: dict[str, list[float]] = {name: [] for name in rows}
    costs: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds + 1):  # the first warms up
        for name, (read, files) in rows.items():
            if cold:
                forget(files)
            began, busy = time.perf_counter(), time.process_time()
            count = read()
            seconds, busy = time.perf_counter() - began, time.process_time() - busy
            if number:
                rates[name].append(count / seconds)
                costs[name].append(busy / count * 1e6)
    for name, found in rates.items():
        yield {
            "what": name,
            "cold": cold,
            "median": round(statistics.median(found), 1),
            "min": round(min(found), 1),
            "max": round(max(found), 1),
            "cpu_us": [round(f(costs[name]), 1) for f in (statistics.median, min, max)],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--shard-size", default="20MB")
    parser.add_argument("--folder", type=Path, help="Where the shards are made; a temporary one.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as made:
        plain, _ = usable(read_dataset(given.data, "train"))
        # The same images side by side on the same disk.
        convert({"train": plain}, Path(made) / "coco", "coco")
        convert({"train": plain}, Path(made) / "shards", "webdataset", shard_size=given.shard_size)
        folder, _ = usable(read_dataset(Path(made) / "coco", "train"))
        folder = replace(folder, split="train")
        shards, _ = usable(read_dataset(Path(made) / "shards", "all"))
        in_folder, in_shards = files_of(folder), files_of(shards)
        for cold in (False, True):
            rows = {
                "batches, folder": (
                    batches(folder, "images", given.workers, given.steps), in_folder
                ),
                "batches, shards by images": (
                    batches(shards, "images", given.workers, given.steps), in_shards
                ),
                "batches, shards by shards": (
                    batches(shards, "shards", given.workers, given.steps), in_shards
                ),
                "bytes, folder": (contents(folder), in_folder),
                "bytes, shards": (contents(shards), in_shards),
                "bytes, webdataset library in turn": (by_library(in_shards), in_shards),
            }  # fmt: skip
            for line in measured(rows, given.rounds, cold):
                print(json.dumps({**line, "shards": len(in_shards), "load": os.getloadavg()[0]}))


if __name__ == "__main__":
    main()
