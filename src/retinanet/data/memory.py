"""Labelled data made in Python: arrays, data sets of torchvision's kind, and readers.

Images in memory are written as PNG files into a temporary folder of this process, so that workers,
resuming and reports treat them as any others.
"""

from __future__ import annotations

import atexit
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.errors import DataError

Reader = Callable[[], Iterable[tuple[Any, ...]]]
"""Yields ``(image, boxes, names)`` or ``(image, boxes, names, split)``; see :func:`read_with`."""


def from_arrays(
    images: Iterable[Any],
    boxes: Iterable[Any],
    labels: Iterable[Any],
    classes: Sequence[str],
    *,
    split: str = "train",
) -> Dataset:
    """Build a data set from images, boxes and labels in memory.

    Args:
        images: paths, PIL images, arrays (H, W) or (H, W, 3) in RGB, or tensors (3, H, W).
        boxes: per image (M, 4) x1, y1, x2, y2 in pixels.
        labels: per image (M,) indices in `classes`.
        classes: names of the classes, all different.
        split: name of the split.

    Raises:
        DataError: the numbers of images, boxes and labels differ, or a label is out of range.
        ImageError: an image cannot be read.
    """
    classes = tuple(map(str, classes))
    found: list[LabelledImage] = []
    try:
        rows = list(zip(images, boxes, labels, strict=True))
    except ValueError:
        raise DataError("images, boxes and labels differ in number: give one of each") from None
    for index, (image, image_boxes, image_labels) in enumerate(rows):
        corners = _numbers(image_boxes, index, "boxes")
        numbers = _numbers(image_labels, index, "labels").reshape(-1)
        if corners.size != 4 * len(numbers) or (corners.size and corners.shape[-1] != 4):
            raise DataError(
                f"image {index}: boxes of shape {corners.shape} and {len(numbers)} labels; "
                "expected (M, 4) and (M,)"
            )
        if any(not 0 <= n < len(classes) or n != int(n) for n in numbers.tolist()):
            raise DataError(
                f"image {index}: labels {numbers.tolist()[:5]} are not all whole numbers from 0 to "
                f"{len(classes) - 1}; there are {len(classes)} classes"
            )
        annotations = tuple(
            Annotation((box[0], box[1], box[2], box[3]), int(label), number)
            for number, (box, label) in enumerate(
                zip(corners.reshape(-1, 4).tolist(), numbers.tolist(), strict=True)
            )
        )
        found.append(LabelledImage(_file_of(image, split, index), index, annotations))
    return Dataset(
        tuple(found), classes, tuple(range(len(classes))), split, "memory", Path("memory")
    )


def from_torch(dataset: Any, classes: Sequence[str] | None = None, *, split: str) -> Dataset:
    """Build a data set from a map-style data set of torchvision's kind.

    Args:
        dataset: ``len(dataset)`` items ``(image, {"boxes": (M, 4), "labels": (M,)})``, the image as
            in :func:`from_arrays`; all of it is read once. A Hugging Face data set has rows
            ``{"image", "objects": {"bbox": [x, y, width, height], "category"}}``.
        classes: names by label; None: ``dataset.classes``, else the labels as text.
        split: name of the split.

    Raises:
        DataError: an item has another form, or a label has no name.
        ImageError: an image cannot be read.
    """
    images, boxes, labels = [], [], []
    for index in range(len(dataset)):
        item = dataset[index]
        try:
            if isinstance(item, Mapping):
                image, objects = item["image"], item["objects"]
                corners = np.asarray(objects["bbox"], np.float64).reshape(-1, 4)
                corners[:, 2:] += corners[:, :2]
                found = corners, objects["category"]
            else:
                image, target = item
                found = target["boxes"], target["labels"]
        except (TypeError, ValueError, KeyError, IndexError) as error:
            raise DataError(
                f"item {index} of the data set is not (image, {{'boxes', 'labels'}}): "
                f"{type(error).__name__}: {error}"
            ) from None
        images.append(image)
        boxes.append(_numbers(found[0], index, "boxes"))
        labels.append(_numbers(found[1], index, "labels").reshape(-1))
    names = classes if classes is not None else getattr(dataset, "classes", None)
    if names is None:
        last = max((int(numbers.max()) for numbers in labels if numbers.size), default=0)
        names = [str(number) for number in range(last + 1)]
    return from_arrays(images, boxes, labels, names, split=split)


def read_with(reader: Reader) -> dict[str, Dataset]:
    """Read the splits that a function of the user yields.

    Args:
        reader: yields per image ``(image, boxes, names)``: the image as in :func:`from_arrays`,
            (M, 4) boxes x1, y1, x2, y2 in pixels, and M class names; optionally the split, fourth.

    Raises:
        DataError: it yields another form.
    """
    rows: dict[str, list[tuple[Any, Any, Sequence[str]]]] = {}
    for index, item in enumerate(reader()):
        if not isinstance(item, tuple) or len(item) not in (3, 4):
            raise DataError(
                f"item {index} of the reader is a {type(item).__name__}, not a tuple "
                "(image, boxes, names) or (image, boxes, names, split)"
            )
        split = item[3] if len(item) == 4 else ""
        rows.setdefault(str(split), []).append((item[0], item[1], [str(n) for n in item[2]]))
    classes = sorted({name for group in rows.values() for _, _, names in group for name in names})
    label = {name: number for number, name in enumerate(classes)}
    return {
        split: from_arrays(
            [image for image, _, _ in group],
            [boxes for _, boxes, _ in group],
            [[label[name] for name in names] for _, _, names in group],
            classes,
            split=split,
        )
        for split, group in rows.items()
    }


def import_reader(name: str) -> Reader | None:
    """Import a reader by ``module:function``; None if the text has another form.

    Raises:
        DataError: there is no such module or function.
    """
    module, colon, function = name.partition(":")
    parts = (*module.split("."), function)
    if not colon or not all(part.isidentifier() for part in parts):
        return None
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        reader: Reader = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise DataError(f"{name}: the reader cannot be imported: {error}") from None
    return reader


def _numbers(values: Any, index: int, what: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"image {index}: {what} are not numbers: {str(values)[:80]}") from None


def _file_of(image: Any, split: str, index: int) -> Path:
    """Return the path of an image; one in memory is written as PNG."""
    if isinstance(image, str | os.PathLike):
        return Path(image)
    from retinanet.data.images import read_image

    pixels = read_image(image).permute(1, 2, 0).numpy()
    file = _folder() / f"{len(os.listdir(_folder())):07d}-{split or 'image'}-{index}.png"
    Image.fromarray(pixels).save(file, compress_level=1)
    return file


@lru_cache(maxsize=1)
def _folder() -> Path:
    folder = tempfile.mkdtemp(prefix="retinanet-images-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
