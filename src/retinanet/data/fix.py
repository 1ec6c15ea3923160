"""Corrected copies of labelled data sets."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from retinanet.data.boxes import fixed_box
from retinanet.data.check import CheckReport, ImageInfo, in_two_splits, labelled_as_stored, same_key
from retinanet.data.convert import Written, write
from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.data.formats import WRITABLE
from retinanet.data.formats.reading import JSON_TEXT
from retinanet.data.formats.writing import Placing, Writing
from retinanet.data.selection import relabel
from retinanet.errors import DataError


def write_fixed(
    splits: Mapping[str, Dataset],
    report: CheckReport,
    folder: str | Path,
    *,
    images: Placing = "copy",
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Write a corrected copy in the same format (COCO for formats that are only read).

    The data themselves are never modified. Boxes are clipped to their image, and inverted ones
    swapped back; empty ones, those that are not finite numbers, and repeated objects are dropped,
    and so are images that are missing or unreadable. Sizes and extensions are corrected, and an
    image in two splits is kept in the first of test, others, val and train. Boxes labelled on the
    image as stored, before its EXIF orientation, are rotated with it.

    Args:
        splits, report: the checked splits, and what :func:`check_datasets` returned for them.
        folder, images, progress: as in :func:`retinanet.data.convert.convert`.

    Raises:
        DataError: the folder is not empty or is inside the data, or the report is of other data.
    """
    unknown = [i.path for d in splits.values() for i in d.images if i.path not in report.image_info]
    if unknown:
        raise DataError(f"{unknown[0]}: was not checked; check these splits first")
    repeated = {(split, index) for split, index, _ in in_two_splits(splits, report.image_info)}
    fixed: dict[str, Dataset] = {}
    for name, dataset in _merge_similar(splits).items():
        kept = [
            _fixed_image(image, report.image_info[image.path])
            for index, image in enumerate(dataset.images)
            if (name, index) not in repeated and not report.image_info[image.path].failure
        ]
        fixed[name] = replace(dataset, images=tuple(kept), problems=())
    formats = {dataset.format for dataset in splits.values()}
    if len(formats) != 1:
        raise DataError(f"the splits are of several formats: {', '.join(sorted(formats))}")
    form = formats.pop()
    suffixes = {path: info.suffix for path, info in report.image_info.items() if info.suffix}
    writing = Writing(fixed, Path(folder), images, suffixes, progress)
    return write(writing, form if form in WRITABLE else "coco")


def _merge_similar(splits: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """Merge classes that differ in case or blanks into the one of the most objects.

    Single characters, as of texts, are left: a is not A.
    """
    counts = Counter(
        dataset.classes[annotation.label]
        for dataset in splits.values()
        for image in dataset.images
        for annotation in image.annotations
    )
    merged: dict[str, Dataset] = {}
    for split, dataset in splits.items():
        groups: dict[str, list[str]] = {}
        for name in dataset.classes:
            key = name.strip().casefold()
            groups.setdefault(name if len(key) == 1 else key, []).append(name)
        best = {n: max(names, key=lambda n: counts[n]) for names in groups.values() for n in names}
        kept = [label for label, name in enumerate(dataset.classes) if best[name] == name]
        if len(kept) == len(dataset.classes):
            merged[split] = dataset
            continue
        new = {dataset.classes[label]: number for number, label in enumerate(kept)}
        labels = {label: new[best[name]] for label, name in enumerate(dataset.classes)}
        merged[split] = relabel(dataset, labels, kept)
    return merged


def _fixed_image(image: LabelledImage, info: ImageInfo) -> LabelledImage:
    is_unrotated = labelled_as_stored(image, info)
    kept: dict[tuple[object, ...], Annotation] = {}
    for annotation in image.annotations:
        stored = annotation.box
        if is_unrotated and image.width and image.height:
            stored = _rotated(stored, image.width, image.height, info.orientation)
        box = fixed_box(stored, info.width, info.height)
        if box is None:
            continue
        if box != annotation.box:
            x1, y1, x2, y2 = annotation.box
            area, extra = annotation.area, dict(annotation.extra)
            # An area of the box changes with it; that of a mask does not.
            if area is not None and math.isclose(area, (x2 - x1) * (y2 - y1)):
                area = None
            if is_unrotated:
                extra.pop(JSON_TEXT, None)
            annotation = replace(annotation, box=box, area=area, extra=extra)
        kept.setdefault(same_key(annotation), annotation)
    return replace(image, annotations=tuple(kept.values()), width=info.width, height=info.height)


def _rotated(
    box: tuple[float, float, float, float], width: int, height: int, orientation: int
) -> tuple[float, float, float, float]:
    """Rotate a box of the image as stored (`width` x `height`) upright; EXIF 5 to 8."""
    x1, y1, x2, y2 = box
    left, right = (y1, y2) if orientation in (5, 8) else (height - y2, height - y1)
    top, bottom = (x1, x2) if orientation in (5, 6) else (width - x2, width - x1)
    return left, top, right, bottom
