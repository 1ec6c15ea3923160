"""Labelled data made in Python: arrays, data sets of torchvision's kind, and readers.

Images in memory are written as PNG files into a temporary folder of this process, so that workers,
resuming and reports treat them as any others.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from retinanet.data.dataset import Dataset
from retinanet.data.splits import split_word
from retinanet.errors import DataError

Reader = Callable[[], Iterable[tuple[Any, ...]]]
"""Yields ``(image, boxes, names)`` or ``(image, boxes, names, split)``; see :func:`read_with`."""


def from_torch(dataset: Any, classes: Sequence[str] | None = None, *, split: str) -> Dataset:
    """Build a data set from a map-style data set of torchvision's kind.

    Args:
        dataset: ``len(dataset)`` items ``(image, {"boxes": (M, 4), "labels": (M,)})``, the image as
            in :meth:`Dataset.from_arrays`; all are read once. A Hugging Face data set has rows
            ``{"image", "objects": {"bbox": [x, y, width, height], "category"}}``.
        classes: names by label; None: ``dataset.classes``, else the labels as text.
        split: name of the split.

    Raises:
        DataError: an item has another form, or a label has no name.
    """
    from retinanet.data.images import as_file

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
        images.append(as_file(image, f"{split or 'image'}-{index}"))
        boxes.append(found[0])
        labels.append(np.asarray(found[1]).reshape(-1))
    names = classes if classes is not None else getattr(dataset, "classes", None)
    if names is None:
        last = max((int(numbers.max()) for numbers in labels if numbers.size), default=0)
        names = [str(number) for number in range(last + 1)]
    return Dataset.from_arrays(images, boxes, labels, names, split=split)


def read_with(reader: Reader) -> dict[str, Dataset]:
    """Read the splits that a function of the user yields.

    It yields per image ``(image, boxes, names)``: the image as in :meth:`Dataset.from_arrays`, (M,
    4) boxes x1, y1, x2, y2 in pixels, and M class names; optionally the split, fourth.

    Raises:
        DataError: it yields another form.
        ImageError: an image cannot be read.
    """
    from retinanet.data.images import as_file

    rows: dict[str, list[tuple[Any, Any, Sequence[str]]]] = {}
    items = reader()
    if not isinstance(items, Iterable):
        raise DataError(
            f"the reader returned {type(items).__name__}; it must yield (image, boxes, names)"
        )
    for index, item in enumerate(items):
        if not isinstance(item, tuple) or len(item) not in (3, 4):
            raise DataError(
                f"item {index} of the reader is a {type(item).__name__}, not a tuple "
                "(image, boxes, names) or (image, boxes, names, split)"
            )
        split = (item[3] or "") if len(item) == 4 else ""
        split = split_word(str(split)) or str(split)
        image = as_file(item[0], f"{split or 'image'}-{len(rows.get(split, []))}")
        rows.setdefault(split, []).append((image, item[1], [str(n) for n in item[2]]))
    classes = sorted({name for group in rows.values() for _, _, names in group for name in names})
    label = {name: number for number, name in enumerate(classes)}
    datasets = {}
    for split, group in rows.items():
        images, boxes, names = zip(*group, strict=True)
        labels = [[label[name] for name in of_image] for of_image in names]
        datasets[split] = Dataset.from_arrays(images, boxes, labels, classes, split=split)
    return datasets


def import_function(name: str, kind: str) -> Callable[..., Any] | None:
    """Import a function of the user by ``module:function``; None if the text has another form.

    Modules of the current folder are found; `kind` names the function in messages.
    """
    module, colon, function = name.partition(":")
    parts = (*module.split("."), function)
    if not colon or not all(part.isidentifier() for part in parts):
        return None
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        imported: Callable[..., Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise DataError(f"{name}: the {kind} cannot be imported: {error}") from None
    return imported
