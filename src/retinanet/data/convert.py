"""A data set of one format written in another."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from retinanet.config import nearest
from retinanet.data import archives
from retinanet.data.dataset import Dataset, LabelledImage
from retinanet.data.formats import FORMATS, WRITABLE, read_splits
from retinanet.data.formats.labels import can_be_a_file
from retinanet.data.formats.writing import SHARD_SIZE, Placing, Writing, new_folder, size_of
from retinanet.errors import ConfigError, DataError, ImageError


@dataclass(frozen=True, slots=True)
class Written:
    """A data set as it was written.

    Attributes:
        folder: where it lies.
        format: ``coco``, ``voc``, ``yolo``, ``csv`` or ``webdataset``.
        images: images by split.
        objects: objects by split, without those counted in `lost`.
        origins: how each split came about.
        lost: what did not come along, in words, with its count.
    """

    folder: Path
    format: str
    images: Mapping[str, int]
    objects: Mapping[str, int]
    origins: Mapping[str, str]
    lost: Mapping[str, int]


def convert(
    source: str | Path | Mapping[str, Dataset],
    target: str | Path,
    to: str,
    *,
    format: str | None = None,
    seed: int = 0,
    val_fraction: float = 0.2,
    images: Placing = "copy",
    shard_size: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Write a data set in another format, splits and all; the source is never touched.

    What both formats can hold comes through there and back: boxes, classes, splits, images
    without objects, and, but for YOLO, ids, crowds, difficult objects, areas and other values.
    Faults of the labels come along where the format can state them; see
    :func:`retinanet.data.fix.write_fixed` to mend them.

    Args:
        source: a folder or file, or its splits.
        target: a new or empty folder.
        to: ``coco``, ``voc``, ``yolo``, ``csv`` or ``webdataset``.
        format: of the source; None finds it.
        seed, val_fraction: for splits where the source has none; see
            :func:`retinanet.data.formats.read_dataset`.
        images: ``copy``, ``hardlink`` or ``symlink``.
        shard_size: samples (``1000``) or bytes (``256MB``, the default) of a WebDataset shard at
            the most.
        progress: is called with images done and in all.

    Raises:
        DataError: an unknown format, a source that cannot be read, or a target that is not empty or
            lies in the source.
        ConfigError: a size of shards that makes no sense, or for a format without.
    """
    if to not in WRITABLE:
        if to in FORMATS:
            raise DataError(f"{to} can be read, not written; choose {', '.join(WRITABLE)}")
        raise DataError(f"no format {to!r}: {', '.join(WRITABLE)}{nearest(to, WRITABLE)}")
    if shard_size is not None and to != "webdataset":
        raise ConfigError(f"a shard size ({shard_size}) is for webdataset; {to} has no shards")
    if isinstance(source, Mapping):
        splits = dict(source)
    else:
        splits = read_splits(source, format=format, seed=seed, val_fraction=val_fraction)
    lost: Counter[str] = Counter()
    splits = {name: _writable(dataset, lost) for name, dataset in splits.items()}
    return write(
        splits,
        target,
        to,
        images=images,
        shard_size=shard_size or SHARD_SIZE,
        progress=progress,
        lost=lost,
    )


def write(
    splits: Mapping[str, Dataset],
    target: str | Path,
    to: str,
    *,
    images: Placing = "copy",
    shard_size: str = SHARD_SIZE,
    suffixes: Mapping[Path, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    lost: Counter[str] | None = None,
) -> Written:
    """Write splits whose images are all there into a new folder; arguments as :func:`convert`.

    Args:
        suffixes: other extensions for some images.
        lost: what is already known not to come along.
    """
    if not splits or not any(len(dataset) for dataset in splits.values()):
        raise DataError(f"{target}: there is no image to write")
    for name, dataset in splits.items():
        # Files and folders are called by it, and it may come out of another's file.
        if name in (".", "..") or set(name) & set("/\\\0") or not can_be_a_file(name):
            raise DataError(
                f"{dataset.source}: a split is called {name!r}, which no file can be; name it anew"
            )
    folder = Path(target)
    write_format = FORMATS[to].write
    assert write_format is not None, f"{to} cannot be written"  # callers look at WRITABLE
    with new_folder(folder, {dataset.source for dataset in splits.values()}) as draft:
        writing = Writing(
            splits, draft, images, suffixes or {}, progress, lost or Counter(), shard_size
        )
        write_format(writing)
    return Written(
        folder,
        to,
        {name: len(dataset) for name, dataset in splits.items()},
        {name: sum(len(i.annotations) for i in d.images) for name, d in splits.items()},
        {name: dataset.split_origin for name, dataset in splits.items()},
        dict(+writing.lost),
    )


def _writable(dataset: Dataset, lost: Counter[str]) -> Dataset:
    """What can be written at all: images that are there, boxes of four numbers."""
    images: list[LabelledImage] = []
    for problem in dataset.problems:
        lost[f"unreadable labels ({problem.kind})"] += 1
    for image in dataset.images:
        if not archives.is_image_file(image.path):
            lost["images that are not there"] += 1
            continue
        try:
            height, width = size_of(image)
        except ImageError:
            lost["images that cannot be read"] += 1
            continue
        kept = tuple(a for a in image.annotations if all(map(math.isfinite, a.box)))
        lost["boxes that are not numbers"] += len(image.annotations) - len(kept)
        images.append(replace(image, annotations=kept, width=width, height=height))
    return replace(dataset, images=tuple(images))
