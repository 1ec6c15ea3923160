"""Selection of classes: some of a data set's, or all of them as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from retinanet.config import nearest
from retinanet.data.dataset import Dataset
from retinanet.data.formats.coco import CATEGORY_EXTRAS
from retinanet.errors import ConfigError, DataError

SINGLE_CLASS = "object"
"""Name of the class into which all classes are merged."""

_MAX_NAMES = 10  # class names in an error message


def labels_of(names: Sequence[str], classes: Sequence[str], source: object) -> tuple[int, ...]:
    """Return the labels of the named classes, ascending; an unknown one is a ConfigError."""
    if not names:
        raise ConfigError("no class is selected: give one or more names")
    for name in names:
        if name not in classes:
            more = ", ..." if len(classes) > _MAX_NAMES else ""
            raise ConfigError(
                f"unknown class {name!r}: the {len(classes)} classes of {source} are "
                f"{', '.join(classes[:_MAX_NAMES])}{more}{nearest(name, classes)}"
            )
    return tuple(label for label, name in enumerate(classes) if name in names)


def select_classes(dataset: Dataset, names: Sequence[str]) -> Dataset:
    """Keep the objects of some classes only, in the data set's order; all images stay.

    Objects of other classes are removed: they are background for the classes that are kept.
    """
    labels = labels_of(names, dataset.classes, dataset.source)
    if len(labels) == len(dataset.classes):
        return dataset
    chosen = relabel(dataset, {label: new for new, label in enumerate(labels)}, labels)
    pairs = zip(dataset.images, chosen.images, strict=True)
    removed = sum(len(old.annotations) - len(new.annotations) for old, new in pairs)
    line = (
        f"{dataset.split}: {len(labels)} of {len(dataset.classes)} classes are selected: "
        f"{', '.join(chosen.classes)}; objects of other classes, removed: {removed}"
    )
    return replace(chosen, description=(*dataset.description, line))


def relabel(dataset: Dataset, labels: Mapping[int, int], kept: Sequence[int]) -> Dataset:
    """Give objects new labels by the old ones, and remove those of others.

    `kept` are the old labels whose classes the new ones have.
    """
    images = tuple(
        replace(
            image,
            annotations=tuple(
                replace(annotation, label=labels[annotation.label])
                for annotation in image.annotations
                if annotation.label in labels
            ),
        )
        for image in dataset.images
    )
    extra = dict(dataset.extra)
    if CATEGORY_EXTRAS in extra:
        extra[CATEGORY_EXTRAS] = [extra[CATEGORY_EXTRAS][label] for label in kept]
    return replace(
        dataset,
        images=images,
        classes=tuple(dataset.classes[label] for label in kept),
        category_ids=tuple(dataset.category_ids[label] for label in kept),
        extra=extra,
    )


def merge_classes(dataset: Dataset) -> Dataset:
    """Give all objects one class, named ``object``, with category id 1."""
    if dataset.classes == (SINGLE_CLASS,):
        return dataset
    merged = relabel(dataset, dict.fromkeys(range(len(dataset.classes)), 0), [])
    extra = {key: value for key, value in merged.extra.items() if key != CATEGORY_EXTRAS}
    line = f"{dataset.split}: {len(dataset.classes)} classes are merged into {SINGLE_CLASS!r}"
    return replace(
        merged,
        classes=(SINGLE_CLASS,),
        category_ids=(1,),
        extra=extra,
        description=(*dataset.description, line),
    )


def select(dataset: Dataset, classes: Sequence[str], single_class: bool) -> Dataset:
    """Apply ``data.classes`` (none: all) and ``data.single_class``; twice is the same as once."""
    if single_class and dataset.classes == (SINGLE_CLASS,):
        return dataset
    if classes:
        dataset = select_classes(dataset, classes)
    return merge_classes(dataset) if single_class else dataset


def select_as_trained(dataset: Dataset, info: Mapping[str, Any]) -> Dataset:
    """Apply the selection that a model was trained with; classes that the data lacks are skipped.

    Data with none of the classes are a DataError.
    """
    selection = info.get("selection") or {}
    wanted = tuple(selection.get("classes", ()))
    classes = [name for name in wanted if name in dataset.classes]
    if wanted and not classes and dataset.classes != (SINGLE_CLASS,):
        raise DataError(
            f"{dataset.source}: none of the classes that the model was trained on "
            f"({', '.join(wanted[:5])}) is among {', '.join(dataset.classes[:5])}"
            f"{nearest(wanted[0], dataset.classes)}"
        )
    return select(dataset, classes, bool(selection.get("single_class")))
