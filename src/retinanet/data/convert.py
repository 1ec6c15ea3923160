"""Convert data sets between formats."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from retinanet.config import nearest
from retinanet.data import archives
from retinanet.data.dataset import Dataset, LabelledImage
from retinanet.data.finder import can_be_a_file
from retinanet.data.formats import FORMATS, WRITABLE, find_data, read_splits
from retinanet.data.formats.writing import SHARD_SIZE, Placing, Writing, new_folder, size_of
from retinanet.errors import ConfigError, DataError, ImageError


@dataclass(frozen=True, slots=True)
class Written:
    """A written data set: images and objects by split, without those counted in `lost`."""

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
    """Write a data set with all its splits in another format; the source is never modified.

    What both formats can hold is kept: boxes, classes, splits, images without objects, and, except
    for YOLO, ids, crowds, difficult objects, areas and other values. Faulty boxes are kept if the
    format can state them; see :func:`retinanet.data.fix.write_fixed` to correct them.

    Args:
        source: a folder or file, or its splits; `format`, `seed` and `val_fraction` as in
            :func:`retinanet.data.formats.read_dataset`.
        target: a new or empty folder.
        to: ``coco``, ``voc``, ``yolo``, ``csv`` or ``webdataset``.
        images: ``copy``, ``hardlink`` or ``symlink``.
        shard_size: maximum samples (``1000``) or bytes (``256MB``) per WebDataset shard.
        progress: called with the numbers of images done and in total.

    Raises:
        DataError: an unknown format, a source that cannot be read, or a target that is not empty or
            inside the source.
        ConfigError: an invalid shard size, or one for a format without shards.
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
    writing = Writing(splits, Path(target), images, {}, progress, lost, shard_size or SHARD_SIZE)
    return write(writing, to)


def write(writing: Writing, to: str) -> Written:
    """Write splits whose images all exist into a new folder, in the format `to`."""
    splits, target = writing.splits, writing.folder
    if not splits or not any(len(dataset) for dataset in splits.values()):
        raise DataError(f"{target}: there is no image to write")
    for name, dataset in splits.items():
        # Files and folders are named after it, and it may come from an untrusted file.
        if name in (".", "..") or set(name) & set("/\\\0") or not can_be_a_file(name):
            raise DataError(
                f"{dataset.source}: a split is named {name!r}, which is no file name; rename it"
            )
    write_format = FORMATS[to].write
    assert write_format is not None, f"{to} cannot be written"  # callers check WRITABLE
    with new_folder(target, {dataset.source for dataset in splits.values()}) as draft:
        write_format(replace(writing, folder=draft))
        _verify(draft, to, splits)
    return Written(
        target,
        to,
        {name: len(dataset) for name, dataset in splits.items()},
        {name: sum(len(i.annotations) for i in d.images) for name, d in splits.items()},
        {name: dataset.split_origin for name, dataset in splits.items()},
        dict(+writing.lost),
    )


def _verify(folder: Path, to: str, splits: Mapping[str, Dataset]) -> None:
    """Read a written folder back and compare images and boxes."""
    written = find_data(folder, to).splits
    for name, dataset in splits.items():
        # YOLO cannot mark objects that are ignored, and they are left out.
        kept = [
            a for i in dataset.images for a in i.annotations if not (to == "yolo" and a.ignored)
        ]
        found = written[name]() if name in written else replace(dataset, images=())
        if any(problem.kind == "image-unreadable" for problem in found.problems):
            continue  # an image of the source that cannot be decoded: its boxes are not read
        boxes = [a.box for image in found.images for a in image.annotations]
        if len(found) != len(dataset) or len(boxes) != len(kept):
            raise DataError(
                f"{name}: {len(dataset)} images with {len(kept)} objects were written as {to}, but "
                f"{len(found)} with {len(boxes)} are read back"
                f"{': ' + found.problems[0].reason if found.problems else ''}; nothing is kept"
            )
        pairs = zip(sorted(a.box for a in kept), sorted(boxes), strict=True)
        if any(abs(a - b) > 0.01 for pair in pairs for a, b in zip(*pair, strict=True)):
            raise DataError(f"{name}: boxes differ after writing them as {to}; nothing is kept")


def _writable(dataset: Dataset, lost: Counter[str]) -> Dataset:
    """Drop what cannot be written: missing images, and boxes that are not four finite numbers."""
    images: list[LabelledImage] = []
    lost.update(
        f"unreadable labels ({problem.kind})"
        for problem in dataset.problems
        if "dropped" in problem.fix
    )
    for image in dataset.images:
        if not archives.is_image_file(image.path):
            lost["missing images"] += 1
            continue
        try:
            height, width = size_of(image)
        except ImageError:
            lost["unreadable images"] += 1
            continue
        kept = tuple(a for a in image.annotations if all(map(math.isfinite, a.box)))
        lost["boxes that are not four finite numbers"] += len(image.annotations) - len(kept)
        images.append(replace(image, annotations=kept, width=width, height=height))
    return replace(dataset, images=tuple(images))
