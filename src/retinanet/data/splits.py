"""Splits of a data set: by the names of files and folders, else drawn by a seed."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence

from retinanet.data.dataset import LabelledImage

_WORDS = {
    "trainval": "trainval",
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "minival": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
_WORD = re.compile(rf"(?<![a-z])({'|'.join(sorted(_WORDS, key=len, reverse=True))})(?![a-z])")


def split_word(name: str) -> str | None:
    """Return the split in the name of a file or folder: ``instances_val2017`` is ``val``."""
    found = _WORD.search(name.lower())
    return _WORDS[found.group(1)] if found else None


def split_validation(
    images: Sequence[LabelledImage], fraction: float, seed: int
) -> tuple[tuple[LabelledImage, ...], tuple[LabelledImage, ...]]:
    """Split images into training and validation images, each in the order given.

    The choice depends on the seed and the file names alone, and images added later move few of the
    others. Of more than one image each side has at least one.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction {fraction} is not in (0, 1)")
    if len(images) < 2:
        return tuple(images), ()
    count = min(max(1, round(fraction * len(images))), len(images) - 1)
    keys = [hashlib.sha256(os.fsencode(f"{seed}/{image.path.name}")).digest() for image in images]
    chosen = set(sorted(range(len(images)), key=lambda i: (keys[i], i))[:count])
    return (
        tuple(image for i, image in enumerate(images) if i not in chosen),
        tuple(image for i, image in enumerate(images) if i in chosen),
    )
