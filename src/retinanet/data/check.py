"""What is wrong in a labelled data set, and how much of everything there is."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from retinanet.data.dataset import Annotation, Dataset, LabelledImage, Problem

EDGE = 0.5
"""Pixels that a box may stick out of its picture: less is a rounding of the labels."""


def usable(dataset: Dataset) -> tuple[Dataset, list[Problem]]:
    """The part of a data set that can be trained and evaluated on. No picture is opened.

    Left out are pictures whose file is not there, and objects without a size: empty, inverted,
    not a number, or wholly outside the picture (by the labels' size). Boxes partly outside stay
    as they are.

    Returns:
        the data set without them (:attr:`Dataset.problems` unchanged), and what was left out and
        why.
    """
    left_out: list[Problem] = []
    images: list[LabelledImage] = []
    for image in dataset.images:
        if not image.path.is_file():
            left_out.append(_missing(image))
            continue
        kept: list[Annotation] = []
        for annotation in image.annotations:
            problem = _unusable(dataset, image, annotation, image.width, image.height)
            if problem is None:
                kept.append(annotation)
            else:
                left_out.append(problem)
        same = len(kept) == len(image.annotations)
        images.append(image if same else replace(image, annotations=tuple(kept)))
    return replace(dataset, images=tuple(images)), left_out


def _missing(image: LabelledImage) -> Problem:
    objects = f", which has {len(image.annotations)} objects" if image.annotations else ""
    return Problem(
        "image-missing",
        image.path,
        None,
        f"no such picture{objects} in {_label_name(image)}",
        "the picture is dropped",
    )


def _label_name(image: LabelledImage) -> str:
    return str(image.label_file) if image.label_file else "the labels"


def _where(dataset: Dataset, image: LabelledImage, annotation: Annotation) -> str:
    """The object in words: where one file labels many pictures, with its picture."""
    of = f" of image {image.id} ({image.path.name})" if dataset.format in ("coco", "csv") else ""
    name = dataset.classes[annotation.label]
    return f"object {annotation.id}{of}: {name} box {_text(annotation.box)}"


def _text(box: tuple[float, float, float, float]) -> str:
    return f"[{', '.join(f'{side:.6g}' for side in box)}]"


def _label_file(image: LabelledImage) -> Path:
    return image.label_file or image.path


def _unusable(
    dataset: Dataset,
    image: LabelledImage,
    annotation: Annotation,
    width: int | None,
    height: int | None,
) -> Problem | None:
    """What keeps an object from being trained on, or None. Sizes None: not known."""
    found = next(_box_faults(annotation.box, width, height), None)
    if found is None or found[2] == "clipped":
        return None
    kind, fault, fix = found
    reason = f"{_where(dataset, image, annotation)} {fault}"
    return Problem(kind, _label_file(image), annotation.id, reason, fix)


def _box_faults(
    box: tuple[float, float, float, float], width: int | None, height: int | None
) -> Iterator[tuple[str, str, str]]:
    """Kind, reason and fix of the faults of one box; the gravest comes first, and at most one."""
    x1, y1, x2, y2 = box
    if not all(math.isfinite(side) for side in box):
        yield "box-not-a-number", "is not four finite numbers", "dropped"
    elif x2 < x1 or y2 < y1:
        sides = " and ".join(
            name for name, bad in (("left and right", x2 < x1), ("top and bottom", y2 < y1)) if bad
        )
        # A box that is inverted and empty cannot be put right by swapping.
        fix = "dropped" if x2 == x1 or y2 == y1 else "swapped"
        yield "box-inverted", f"has {sides} exchanged", fix
    elif x2 == x1 or y2 == y1:
        lacks = " and no ".join(
            name for name, bad in (("width", x2 == x1), ("height", y2 == y1)) if bad
        )
        yield "box-empty", f"has no {lacks}", "dropped"
    elif width is not None and height is not None:
        size = f"the picture of {width} x {height}"
        if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
            yield "box-outside", f"lies wholly outside {size}", "dropped"
        elif x1 < -EDGE or y1 < -EDGE or x2 > width + EDGE or y2 > height + EDGE:
            yield "box-outside", f"sticks out of {size}", "clipped"
