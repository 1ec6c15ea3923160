"""Selection of classes: some of a data set's, or all of them as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from retinanet.config import nearest
from retinanet.data.dataset import Dataset, LabelledImage
from retinanet.errors import ConfigError

SINGLE_CLASS = "object"
"""Name of the class into which all classes are merged."""

_MAX_NAMES = 10  # class names in an error message


def labels_of(names: Sequence[str], classes: Sequence[str], source: object) -> tuple[int, ...]:
    """Return the labels of the named classes, in ascending order.

    Raises:
        ConfigError: no name is given, or a class is unknown (the nearest name is given).
    """
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
    """Keep the objects of some classes only; all images stay.

    Objects of other classes are removed: they are background for the classes that are kept.

    Args:
        dataset: any.
        names: of the classes; they keep the data set's order and category ids.

    Raises:
        ConfigError: as :func:`labels_of`.
    """
    labels = labels_of(names, dataset.classes, dataset.source)
    if len(labels) == len(dataset.classes):
        return dataset
    new_labels = {label: new for new, label in enumerate(labels)}
    images = tuple(
        replace(
            image,
            annotations=tuple(
                replace(annotation, label=new_labels[annotation.label])
                for annotation in image.annotations
                if annotation.label in new_labels
            ),
        )
        for image in dataset.images
    )
    classes = tuple(dataset.classes[label] for label in labels)
    removed = _num_objects(dataset.images) - _num_objects(images)
    return replace(
        dataset,
        images=images,
        classes=classes,
        category_ids=tuple(dataset.category_ids[label] for label in labels),
        description=(
            *dataset.description,
            f"{dataset.split}: {len(classes)} of {len(dataset.classes)} classes are selected: "
            f"{', '.join(classes)}; objects of other classes, removed: {removed}",
        ),
    )


def merge_classes(dataset: Dataset) -> Dataset:
    """Give all objects one class, named ``object``, with category id 1."""
    if dataset.classes == (SINGLE_CLASS,):
        return dataset
    images = tuple(
        replace(image, annotations=tuple(replace(a, label=0) for a in image.annotations))
        for image in dataset.images
    )
    return replace(
        dataset,
        images=images,
        classes=(SINGLE_CLASS,),
        category_ids=(1,),
        description=(
            *dataset.description,
            f"{dataset.split}: {len(dataset.classes)} classes are merged into {SINGLE_CLASS!r}",
        ),
    )


def select(dataset: Dataset, classes: Sequence[str], single_class: bool) -> Dataset:
    """Apply ``data.classes`` (none: all) and ``data.single_class``; twice is the same as once.

    Raises:
        ConfigError: as :func:`labels_of`.
    """
    if single_class and dataset.classes == (SINGLE_CLASS,):
        return dataset
    if classes:
        dataset = select_classes(dataset, classes)
    return merge_classes(dataset) if single_class else dataset


def select_as_trained(dataset: Dataset, info: Mapping[str, Any]) -> Dataset:
    """Apply the selection that a model was trained with; classes that the data lacks are skipped.

    Args:
        dataset: any.
        info: of the model's checkpoint.
    """
    selection = info.get("selection") or {}
    classes = [name for name in selection.get("classes", ()) if name in dataset.classes]
    return select(dataset, classes, bool(selection.get("single_class")))


def _num_objects(images: Sequence[LabelledImage]) -> int:
    return sum(len(image.annotations) for image in images)
