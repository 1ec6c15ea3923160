"""Read labelled data sets; the format is detected."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from retinanet.config import nearest
from retinanet.data import archives
from retinanet.data.dataset import Dataset, LabelledImage
from retinanet.data.formats import coco, csv, cvat, label_studio, voc, webdataset, yolo
from retinanet.data.formats.labels import LabelFile
from retinanet.data.formats.writing import Writing
from retinanet.data.splits import split_validation
from retinanet.errors import DataError


class Format(NamedTuple):
    """Functions of a format.

    Attributes:
        matches: tests whether a folder or file is of this format.
        detect: tests whether a file is a label file of this format, by its content.
        parse: returns the images, objects and faults of a label file (of a shard: of each sample).
        read: returns the splits by name, each read when called; an unnamed split is ``""``.
        write: writes splits into a new folder; None for formats that are only read.
        looked_for: what `matches` looks for, in words.
    """

    matches: Callable[[Path], Any]
    detect: Callable[[Path], bool]
    parse: Callable[..., LabelFile | list[LabelFile]]
    read: Callable[..., dict[str, Callable[[], Dataset]]]
    write: Callable[[Writing], None] | None
    looked_for: str


def _format(module: Any) -> Format:
    return Format(
        getattr(module, "matches", None) or module.find,
        module.detect,
        module.parse,
        module.read,
        getattr(module, "write", None),
        module.LOOKED_FOR,
    )


# In the order of detection: a VOC folder may contain a CSV file too, and CVAT's XML root begins as
# VOC's.
FORMATS: dict[str, Format] = {
    "coco": _format(coco),
    "labelstudio": _format(label_studio),
    "cvat": _format(cvat),
    "voc": _format(voc),
    "yolo": _format(yolo),
    "csv": _format(csv),
    "webdataset": _format(webdataset),
}

WRITABLE = tuple(name for name, form in FORMATS.items() if form.write is not None)
"""Formats that a data set can be written in."""


def find_format(path: str | Path) -> str:
    """Detect the format of a folder or file.

    Raises:
        DataError: it does not exist, or has no known format; the message lists what was looked for.
    """
    path = Path(path)
    _check_exists(path)
    for name, form in FORMATS.items():
        if form.matches(path):
            return name
    looked = "; ".join(form.looked_for for form in FORMATS.values())
    raise DataError(f"{path}: no labelled data found here. Looked for {looked}")


def read_dataset(
    path: str | Path,
    split: str = "train",
    *,
    format: str | None = None,
    seed: int = 0,
    val_fraction: float = 0.2,
    extras: bool = True,
) -> Dataset:
    """Read one split of a labelled data set, in any format.

    Faulty objects are kept, or listed in :attr:`Dataset.problems`; see
    :func:`retinanet.data.check.usable` for those to train on.

    Args:
        path: a folder, or a COCO JSON, data.yaml or CSV file.
        split: ``train``, ``val``, ``test`` or another that the data has; ``all`` is every image.
            Without splits, ``train`` and ``val`` are drawn by `seed`; with ``train`` but no
            ``val``, that is drawn from ``train``, and ``test`` is unchanged.
        format: one of :data:`FORMATS`, such as ``coco``; None detects it.
        seed: of the validation split.
        val_fraction: fraction of the images for ``val``, in (0, 1), if it has to be drawn.
        extras: keep values that training does not need (masks, licences, ...); False saves memory.

    Raises:
        DataError: the format is unknown (the message lists what was looked for), there is no such
            split (it suggests the nearest), or a file cannot be read.
    """
    lazy = _open(path, format, extras)
    names = _split_names(lazy)
    if split in lazy and not (split == "train" and _draws_val(lazy)):
        return _named(lazy[split](), split)
    if split in names:
        return _draw_val(lazy, seed, val_fraction)[split]
    if split == "all":
        return _whole([lazy[name]() for name in _disjoint(lazy)])
    raise DataError(
        f"{path}: no split {split!r}; it has {', '.join((*names, 'all'))}{nearest(split, names)}"
    )


def read_splits(
    path: str | Path,
    *,
    format: str | None = None,
    seed: int = 0,
    val_fraction: float = 0.2,
    extras: bool = True,
) -> dict[str, Dataset]:
    """Read all splits of a labelled data set, in the order train, val, test, others.

    Arguments, errors and drawn splits as :func:`read_dataset`. VOC's ``trainval`` is left out if
    there are train and val, which it repeats.
    """
    lazy = _open(path, format, extras)
    drawn = _draw_val(lazy, seed, val_fraction) if _draws_val(lazy) else {}
    return {
        name: drawn[name] if name in drawn else _named(lazy[name](), name)
        for name in _split_names(lazy)
    }


def digest(dataset: Dataset, sizes: Mapping[str, int] | None = None) -> str:
    """Hexadecimal SHA-256 of what a run depends on: classes, labels, files' names and sizes.

    Args:
        dataset: the data.
        sizes: bytes to assume for some files, by path (training records those of unreadable images,
            whose repair is no other data).
    """
    sizes = sizes or {}
    total = hashlib.sha256(repr((dataset.classes, dataset.category_ids)).encode())
    for image in dataset.images:
        try:
            known = sizes.get(str(image.path))
            size = archives.file_size(image.path) if known is None else known
        except (OSError, DataError):
            size = -1
        boxes = [(a.box, a.label, a.crowd, a.difficult) for a in image.annotations]
        total.update(repr((image.path.name, size, boxes)).encode())
    return total.hexdigest()


def _open(path: str | Path, format: str | None, extras: bool) -> dict[str, Callable[[], Dataset]]:
    path = Path(path)
    if format is None:
        format = find_format(path)
    elif format not in FORMATS:
        raise DataError(f"no format {format!r}: {', '.join(FORMATS)}{nearest(format, FORMATS)}")
    else:
        _check_exists(path)
    lazy = FORMATS[format].read(path)
    if not lazy:
        raise DataError(f"{path}: no {format} data here. Looked for {FORMATS[format].looked_for}")
    if extras:
        return lazy
    return {split: partial(_without_extras, read) for split, read in lazy.items()}


def _without_extras(read: Callable[[], Dataset]) -> Dataset:
    dataset = read()
    images = []
    for image in dataset.images:
        annotations = tuple(replace(a, extra={}) if a.extra else a for a in image.annotations)
        images.append(replace(image, extra={}, annotations=annotations))
    return replace(dataset, images=tuple(images), extra={})


def _check_exists(path: Path) -> None:
    """Raise DataError if a local path does not exist."""
    if not archives.is_remote(path) and not path.exists():
        raise DataError(f"{path}: there is no such file or folder")


def _disjoint(lazy: Mapping[str, object]) -> list[str]:
    """Names of the splits that share no images: VOC's trainval is train and val again."""
    return [name for name in lazy if name != "trainval" or not {"train", "val"} & set(lazy)]


def _train_source(lazy: Mapping[str, object]) -> str | None:
    """Return the split that val is drawn from if there is none."""
    return next((name for name in ("train", "trainval", "") if name in lazy), None)


def _draws_val(lazy: Mapping[str, object]) -> bool:
    return "val" not in lazy and _train_source(lazy) is not None


def _split_names(lazy: Mapping[str, object]) -> list[str]:
    names = set(_disjoint(lazy))
    if _draws_val(lazy):
        names = names - {"", "trainval"} | {"train", "val"}
    order = ["train", "val", "test"]
    return [n for n in order if n in names] + sorted(names - set(order))


def _draw_val(
    lazy: Mapping[str, Callable[[], Dataset]], seed: int, val_fraction: float
) -> dict[str, Dataset]:
    name = _train_source(lazy)
    assert name is not None
    source = lazy[name]()
    train, val = split_validation(source.images, val_fraction, seed)
    of = f" of {name}" if name else ""
    origin = f"seed {seed}, {val_fraction:.0%}{of} for validation"
    return {
        "train": replace(source, images=train, split="train", split_origin=origin),
        # What could not be read belongs to no split; it is reported once.
        "val": replace(source, images=val, split="val", split_origin=origin, problems=()),
    }


def _named(dataset: Dataset, split: str) -> Dataset:
    return dataset if dataset.split == split else replace(dataset, split=split)


def _whole(parts: list[Dataset]) -> Dataset:
    images: list[LabelledImage] = [image for part in parts for image in part.images]
    return replace(
        parts[0],
        images=tuple(images),
        split="all",
        problems=tuple(problem for part in parts for problem in part.problems),
        split_origin="all splits together",
    )
