"""Read labelled data sets; the format is detected."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from retinanet.config import nearest
from retinanet.data import archives
from retinanet.data.dataset import Dataset, LabelledImage
from retinanet.data.finder import LabelSet, Tree, count_suffixes, fold, relative
from retinanet.data.formats import (
    coco,
    csv,
    cvat,
    label_studio,
    reading,
    text_rows,
    voc,
    webdataset,
    yolo,
)
from retinanet.data.formats.json_exports import (
    is_createml,
    is_labelme,
    is_via,
    parse_createml,
    parse_labelme,
    parse_via,
)
from retinanet.data.formats.reading import LabelFile
from retinanet.data.formats.writing import Writing
from retinanet.data.memory import Reader, import_function, read_with
from retinanet.data.splits import split_validation
from retinanet.errors import DataError


class Format(NamedTuple):
    """How a format finds its label files in a tree, reads the splits, and writes them (or None)."""

    label_files: str
    find: Callable[[Tree], LabelSet | None]
    read: Callable[[Tree, LabelSet], reading.Splits]
    write: Callable[[Writing], None] | None = None


def _read_only(
    name: str,
    title: str,
    suffixes: Sequence[str],
    detect: Callable[[Path], bool],
    parse: Callable[..., LabelFile],
    *,
    is_table: bool = True,
    names_of: Callable[[Tree], tuple[Path, list[str]]] = reading.listed_names,
) -> Format:
    """Return a format that is only read, of label files of many images each, or of one."""
    find = partial(reading.find_tables, parse=parse) if is_table else reading.find_files
    return Format(
        title,
        lambda tree: find(name, tree, suffixes, detect),
        partial(reading.read_files, name, parse, names_of=names_of),
    )


def _rows(name: str, title: str) -> Format:
    """Return a format of :mod:`retinanet.data.formats.text_rows`."""
    detect, parse = partial(text_rows.detect, format=name), partial(text_rows.parse, format=name)
    return _read_only(name, f"{title} .txt", [".txt"], detect, parse, is_table=False)


# In the order of preference among labels of the same images.
FORMATS: dict[str, Format] = {
    "coco": Format("COCO .json", coco.find, coco.read, coco.write),
    "labelstudio": _read_only(
        "labelstudio",
        "Label Studio .json",
        [".json"],
        label_studio.detect,
        label_studio.parse,
        names_of=label_studio.class_names,
    ),
    "cvat": _read_only("cvat", "CVAT .xml", [".xml"], cvat.detect, cvat.parse),
    "voc": Format("Pascal VOC .xml", voc.find, voc.read, voc.write),
    "yolo": Format("YOLO .txt or data.yaml", yolo.find, yolo.read, yolo.write),
    "csv": Format("a table of boxes (.csv)", csv.find, csv.read, csv.write),
    "labelme": _read_only(
        "labelme", "LabelMe .json", [".json"], is_labelme, parse_labelme, is_table=False
    ),
    "via": _read_only("via", "VIA .json or .csv", [".json", ".csv"], is_via, parse_via),
    "createml": _read_only("createml", "Create ML .json", [".json"], is_createml, parse_createml),
    "kitti": _rows("kitti", "KITTI"),
    "visdrone": _rows("visdrone", "VisDrone"),
    "dota": _rows("dota", "DOTA"),
    "webdataset": Format("WebDataset .tar", webdataset.find, webdataset.read, webdataset.write),
}

WRITABLE = tuple(name for name, form in FORMATS.items() if form.write is not None)
"""Formats that a data set can be written in."""


_COMPRESSED = (".gz", ".zip", ".bz2", ".xz", ".7z", ".tgz", ".rar")

_SIDE_FILES = frozenset({*csv.CLASS_FILES, label_studio.CONFIG_FILE})  # list classes


@dataclass(frozen=True, slots=True)
class DataSource:
    """What was found below a path: splits, each read when called, and lines that describe them.

    An unnamed split is ``""``; `images` are all images below `top`.
    """

    format: str
    splits: Mapping[str, Callable[[], Dataset]]
    description: tuple[str, ...]
    top: Path = Path()
    images: tuple[Path, ...] = ()

    def describe(self, datasets: Iterable[Dataset]) -> tuple[str, ...]:
        """Return the description, with the images that are in none of all the data sets."""
        used = {
            path
            for dataset in datasets
            for path in (*(i.path for i in dataset.images), *(p.file for p in dataset.problems))
        }
        folders = Counter(image.parent for image in self.images if image not in used)
        if not folders:
            return self.description
        shown = [f"{n} in {relative(folder, self.top)}" for folder, n in folders.most_common(3)]
        more = f" and {len(folders) - 3} more folders" if len(folders) > 3 else ""
        count = f"{folders.total()} image{'s' * (folders.total() > 1)} without labels"
        return (*self.description, f"not read: {count}: {', '.join(shown)}{more}")


def _describe(
    tree: Tree, labels: LabelSet, others: Iterable[LabelSet], splits: Mapping[str, object]
) -> Iterator[str]:
    """Yield what is read and what is left out, a line each."""
    yield (
        f"{tree.path}: {FORMATS[labels.format].label_files}: {labels.describe(tree.top)}; "
        f"{_describe_splits(splits)}"
    )
    used = {file for _, file in labels.by_split()}
    for other in others:
        new = other.stems() - labels.stems()
        what = f"{len(new)} images more" if new else "labels of the same images"
        yield (
            f"not read: {FORMATS[other.format].label_files}: {other.describe(tree.top)} ({what}; "
            f"read it with --format {other.format})"
        )
        used |= {file for _, file in other.by_split()}
    yield from (f"not read: {note}" for note in labels.notes)
    for folder in tree.skipped:
        yield f"not read: {relative(folder, tree.top)}: detections or a training run"
    noted = " ".join(labels.notes)
    unused = [
        relative(file, tree.top)
        for file in tree.with_suffix(".json", ".xml", ".csv", ".tsv")
        if file not in used and str(file) not in noted and file.name not in _SIDE_FILES
    ]
    if unused and labels.format != "webdataset":  # its labels are in the shards
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        yield f"not read: {', '.join(unused[:3])}{more} (no boxes of a known format)"


def _describe_splits(splits: Mapping[str, object]) -> str:
    drawn = "; val is drawn from train" if _draws_val(splits) else ""
    return f"splits {', '.join(filter(None, _split_names(splits)))}{drawn}"


def find_data(
    path: str | Path | Reader, format: str | None = None, *, extras: bool = True
) -> DataSource:
    """Find the labelled data below a path, in any layout.

    Of several formats the one that labels the most images is taken, of labels of the same images
    the first of :data:`FORMATS`. Arguments are those of :func:`read_dataset`.

    Raises:
        DataError: there is no such path or format, no labels are found, two formats label as many
            images, and not the same ones, or a file is broken.
    """
    if callable(path):
        return _read_reader(path)
    reader = None if Path(path).exists() else import_function(str(path), "reader")
    if reader is not None:
        return _read_reader(reader)
    path = Path(path)
    if format is not None and format not in FORMATS:
        raise DataError(f"no format {format!r}: {', '.join(FORMATS)}{nearest(format, FORMATS)}")
    if not archives.is_remote(path) and not path.exists():
        raise DataError(f"{path}: there is no such file or folder")
    tree = Tree(path, extras=extras)
    names = [format] if format else [name for name in FORMATS if name != "webdataset"]
    found = [labels for name in names if (labels := FORMATS[name].find(tree)) is not None]
    if not found and format is None:
        found = [labels for labels in [webdataset.find(tree)] if labels is not None]
    if not found:
        raise DataError(_nothing_found(tree, format))
    if len(found) > 1:
        found.sort(key=lambda labels: -len(labels.stems()))
        first, second = found[0].stems(), found[1].stems()
        if len(first) == len(second) and first != second:
            names = [f"{labels.describe(tree.top)} ({labels.format})" for labels in found[:2]]
            raise DataError(
                f"{path}: {names[0]} and {names[1]} label {len(first)} images each, and not the "
                f"same; give the path of one of them, or --format"
            )
    labels, *others = found
    splits = _name_rest(FORMATS[labels.format].read(tree, labels))
    # stems() reads a COCO file as a whole.
    elsewhere = frozenset().union(*(o.stems() for o in others)) - labels.stems() if others else ()
    if elsewhere:
        splits = {name: partial(_without, split, elsewhere) for name, split in splits.items()}
    images = tuple(tree.images) if path.is_dir() and tree.root == tree.top else ()
    description = tuple(_describe(tree, labels, others, splits))
    return DataSource(labels.format, splits, description, tree.top, images)


def _name_rest(splits: reading.Splits) -> reading.Splits:
    """Name the images of no split beside others: ``train``, or ``other`` without the others'."""
    if "" not in splits or len(splits) == 1:
        return splits
    rest = splits[""]
    named = {name: cache(split) for name, split in splits.items() if name}  # other() reads them too

    def other() -> Dataset:
        known = {image.path for split in named.values() for image in split().images}
        dataset = rest()
        images = tuple(image for image in dataset.images if image.path not in known)
        return replace(dataset, images=images)

    if {"train", "trainval"} & named.keys():
        return {**named, "other": other}
    return {"train": rest, **named}


def _without(split: Callable[[], Dataset], stems: frozenset[str]) -> Dataset:
    """Leave out images without a label here that have one in another format."""
    dataset = split()
    images = tuple(i for i in dataset.images if i.label_file or fold(i.path.stem) not in stems)
    return replace(dataset, images=images)


def _read_reader(reader: Reader) -> DataSource:
    """Return what a reader of the user yields."""
    datasets = read_with(reader)
    name = getattr(reader, "__name__", "reader")
    images = sum(map(len, datasets.values()))
    splits = _name_rest({split: partial(datasets.__getitem__, split) for split in datasets})
    return DataSource("reader", splits, (f"{name}: {images} images; {_describe_splits(splits)}",))


def _nothing_found(tree: Tree, format: str | None) -> str:
    """Return what is in a folder without labels, and why none of it is used."""
    what = "no labelled data found" if format is None else f"no {format} data"
    reasons = []
    for suffix in (".json", ".xml", ".csv", ".txt", ".yaml", *_COMPRESSED):
        files = tree.with_suffix(suffix)
        if files:
            reasons.append(f"{relative(files[0], tree.top)}: {_reason(files[0])}")
    there = ", ".join([f"{len(tree.images)} images", *count_suffixes(tree.label_files)])
    known = FORMATS if format is None else {format: FORMATS[format]}
    wanted = ", ".join(form.label_files for form in known.values())
    why = f" ({'; '.join(reasons)})" if reasons else ""
    hint = f"; if they lie beside it, give {tree.path.parent}" if tree.images and not why else ""
    return f"{tree.path}: {what} in {there}{why}; label files are {wanted}{hint}"


def _reason(file: Path) -> str:
    """Return why a file is not read, by its suffix."""
    suffix = file.suffix.lower()
    is_json = ".json" in (suffix, Path(file.stem).suffix.lower())
    if suffix in _COMPRESSED and not is_json:
        return "compressed; unpack it"
    if suffix == ".csv":
        return csv.missing_columns(file)
    if is_json and reading.json_has(file, b"[", (b'"score"', b'"category_id"')):
        return "detection results, not labels"
    if is_json:
        return "not COCO (images, annotations, categories), Label Studio, LabelMe, VIA or Create ML"
    if suffix == ".xml":
        return "its root is neither <annotation> (VOC) nor <annotations> (CVAT)"
    if suffix == ".txt":
        return "no image of its name, or no rows of class x y width height"
    return "no names and train"


def read_dataset(
    path: str | Path | Reader,
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
        DataError: as :func:`find_data`, or there is no such split (it suggests the nearest).
    """
    source = find_data(path, format, extras=extras)
    names = _split_names(source.splits)
    if split == "all":
        dataset = _whole([source.splits[name]() for name in _disjoint(source.splits)])
        return replace(dataset, description=source.describe([dataset]))
    if split not in {*source.splits, *names}:
        hints = "".join(f"; {note}" for note in source.description[1:] if f" {split}" in note)
        raise DataError(
            f"{path}: no split {split!r}; it has {', '.join((*names, 'all'))}"
            f"{nearest(split, names)}{hints}"
        )
    dataset = _load(source.splits, [split], seed, val_fraction)[split]
    return replace(dataset, description=source.description)


def read_splits(
    path: str | Path | Reader,
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
    source = find_data(path, format, extras=extras)
    datasets = _load(source.splits, _split_names(source.splits), seed, val_fraction)
    description = source.describe(datasets.values())
    return {name: replace(d, description=description) for name, d in datasets.items()}


def digest(dataset: Dataset, sizes: Mapping[str, int] | None = None) -> str:
    """Hexadecimal SHA-256 of what a run depends on: classes, labels, files' names and sizes.

    `sizes` are bytes to assume for some files, by path: the repair of an unreadable image is no
    other data.
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


def _load(
    lazy: Mapping[str, Callable[[], Dataset]], names: Iterable[str], seed: int, val_fraction: float
) -> dict[str, Dataset]:
    """Read splits; val is drawn from the training images if there is none."""
    drawn: dict[str, Dataset] = {}
    name = _train_source(lazy)
    if name is not None and _draws_val(lazy) and {"train", "val"} & {*names}:
        source = lazy[name]()
        train, val = split_validation(source.images, val_fraction, seed)
        of = f" of {name}" if name else ""
        origin = f"seed {seed}, {val_fraction:.0%}{of} for validation"
        # What could not be read belongs to no split; it is reported once.
        drawn["train"] = replace(source, images=train, split_origin=origin)
        drawn["val"] = replace(source, images=val, split_origin=origin, problems=())
    return {
        name: replace(drawn[name] if name in drawn else lazy[name](), split=name) for name in names
    }


def _whole(parts: list[Dataset]) -> Dataset:
    images: list[LabelledImage] = [image for part in parts for image in part.images]
    return replace(
        parts[0],
        images=tuple(images),
        split="all",
        problems=tuple(problem for part in parts for problem in part.problems),
        split_origin="all splits together",
    )
