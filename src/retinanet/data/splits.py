"""Which images train and which are held back: by the format's word, else by a seed."""

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
    """The split that a file's or folder's name speaks of: ``instances_val2017`` is ``val``.

    Returns:
        ``train``, ``val``, ``test`` or ``trainval``; None where the name holds no such word.
    """
    found = _WORD.search(name.lower())
    return _WORDS[found.group(1)] if found else None


def split_validation(
    images: Sequence[LabelledImage], share: float, seed: int
) -> tuple[tuple[LabelledImage, ...], tuple[LabelledImage, ...]]:
    """Parts images into those that train and those held back, each in the order given.

    An image's side depends on the seed and its file name alone: it is the same on every machine
    and in every order of listing, and images added later move few of the others.

    Args:
        images: M images.
        share: of them to hold back, in (0, 1); at least one image is on each side where M > 1.
        seed: any whole number.

    Returns:
        (kept, held back); with a single image nothing is held back.
    """
    if not 0 < share < 1:
        raise ValueError(f"share {share} is not in (0, 1)")
    if len(images) < 2:
        return tuple(images), ()
    count = min(max(1, round(share * len(images))), len(images) - 1)
    keys = [hashlib.sha256(os.fsencode(f"{seed}/{image.path.name}")).digest() for image in images]
    held = set(sorted(range(len(images)), key=lambda i: (keys[i], i))[:count])
    return (
        tuple(image for i, image in enumerate(images) if i not in held),
        tuple(image for i, image in enumerate(images) if i in held),
    )
