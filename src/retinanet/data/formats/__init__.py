"""Labelled data sets from files: the format is found by itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from retinanet.config import nearest
from retinanet.data import archives
from retinanet.data.dataset import Dataset, LabelledImage
from retinanet.data.formats import coco, csv, cvat, label_studio, voc, webdataset, yolo
from retinanet.data.formats.writing import Writing
from retinanet.data.splits import split_validation
from retinanet.errors import DataError


class Format(NamedTuple):
    """What a format can do.

    Attributes:
        recognise: whether a folder or file is of this format.
        read: its splits by name, each read when called; the split of no name is ``""``.
        write: writes splits into a new folder; None: the format is read alone.
        looked_for: what `recognise` looks for, in words.
    """

    recognise: Callable[[Path], bool]
    read: Callable[..., dict[str, Callable[[], Dataset]]]
    write: Callable[[Writing], None] | None
    looked_for: str


# In the order of asking: a VOC folder may well hold a CSV beside it, and CVAT's root is called all
# but as VOC's.
FORMATS: dict[str, Format] = {
    "coco": Format(coco.is_coco, coco.read_coco, coco.write_coco, coco.LOOKED_FOR),
    "labelstudio": Format(
        label_studio.is_label_studio, label_studio.read_label_studio, None, label_studio.LOOKED_FOR
    ),
    "cvat": Format(cvat.is_cvat, cvat.read_cvat, None, cvat.LOOKED_FOR),
    "voc": Format(voc.is_voc, voc.read_voc, voc.write_voc, voc.LOOKED_FOR),
    "yolo": Format(yolo.is_yolo, yolo.read_yolo, yolo.write_yolo, yolo.LOOKED_FOR),
    "csv": Format(csv.is_csv, csv.read_csv, csv.write_csv, csv.LOOKED_FOR),
    "webdataset": Format(
        webdataset.is_webdataset,
        webdataset.read_webdataset,
        webdataset.write_webdataset,
        webdataset.LOOKED_FOR,
    ),
}

WRITABLE = tuple(name for name, form in FORMATS.items() if form.write is not None)
"""Formats that a data set can be written in."""


def find_format(path: str | Path) -> str:
    """The name of the format of a folder or file.

    Raises:
        DataError: nothing is there, or nothing that we know; the message lists what was looked for.
    """
    place = Path(path)
    _must_exist(place)
    for name, form in FORMATS.items():
        if form.recognise(place):
            return name
    looked = "; ".join(form.looked_for for form in FORMATS.values())
    raise DataError(f"{place}: no labelled data found here. Looked for {looked}")


def read_dataset(
    path: str | Path,
    split: str = "train",
    *,
    format: str | None = None,
    seed: int = 0,
    val_fraction: float = 0.2,
    extras: bool = True,
) -> Dataset:
    """One split of a labelled data set, in any of the formats.

    Faulty objects are kept or listed in :attr:`Dataset.problems`; see
    :func:`retinanet.data.check.usable` for those that can be trained on.

    Args:
        path: a folder, or a COCO JSON, data.yaml or CSV file.
        split: ``train``, ``val``, ``test`` or another that the data has; ``all`` is every image.
            Where the format has no splits, ``train`` and ``val`` are made by `seed`; where it has
            ``train`` but no ``val``, that is held out of ``train`` and ``test`` stays untouched.
        format: one of :data:`FORMATS`, such as ``coco``; None finds it.
        seed: which images are held out.
        val_fraction: share of the images for ``val``, in (0, 1), where it has to be made.
        extras: keep what training does not need (masks, licences, ...); False saves memory.

    Raises:
        DataError: nothing is recognised (the message says what was looked for), there is no such
            split (it gives the nearest), or a file as a whole cannot be read.
    """
    lazy = _open(path, format, extras)
    names = _split_names(lazy)
    if split in lazy and not (split == "train" and _val_is_made(lazy)):
        return _named(lazy[split](), split)
    if split in names:
        return _made(lazy, seed, val_fraction)[split]
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
    """Every split of a labelled data set, in the order train, val, test, others.

    Arguments, errors and made splits as :func:`read_dataset`. VOC's ``trainval``, which repeats
    train and val, is left out where they are there.
    """
    lazy = _open(path, format, extras)
    made = _made(lazy, seed, val_fraction) if _val_is_made(lazy) else {}
    return {
        name: made[name] if name in made else _named(lazy[name](), name)
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
    place = Path(path)
    if format is None:
        format = find_format(place)
    elif format not in FORMATS:
        raise DataError(f"no format {format!r}: {', '.join(FORMATS)}{nearest(format, FORMATS)}")
    else:
        _must_exist(place)
    lazy = FORMATS[format].read(place, extras=extras)
    if not lazy:
        raise DataError(f"{place}: no {format} data here. Looked for {FORMATS[format].looked_for}")
    return lazy


def _must_exist(place: Path) -> None:
    """A remote store is asked by the format that reads one."""
    if not archives.is_remote(place) and not place.exists():
        raise DataError(f"{place}: there is no such file or folder")


def _disjoint(lazy: Mapping[str, object]) -> list[str]:
    """Names of the splits that share no images: VOC's trainval is train and val again."""
    return [name for name in lazy if name != "trainval" or not {"train", "val"} & set(lazy)]


def _train_source(lazy: Mapping[str, object]) -> str | None:
    """The split that val is held out of where there is none."""
    return next((name for name in ("train", "trainval", "") if name in lazy), None)


def _val_is_made(lazy: Mapping[str, object]) -> bool:
    return "val" not in lazy and _train_source(lazy) is not None


def _split_names(lazy: Mapping[str, object]) -> list[str]:
    names = set(_disjoint(lazy))
    if _val_is_made(lazy):
        names = names - {"", "trainval"} | {"train", "val"}
    order = ["train", "val", "test"]
    return [n for n in order if n in names] + sorted(names - set(order))


def _made(
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
        # What could not be read belongs to no split; it is told once.
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
