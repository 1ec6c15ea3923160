"""How often images occur in an epoch.

By repeat factor sampling images with rare classes are drawn more often (Gupta et al. 2019); of
tiles without objects a share is drawn.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from retinanet.config import DataConfig
from retinanet.data.dataset import Dataset

_SHOWN_CLASSES = 10


@dataclass(frozen=True, slots=True, eq=False)
class RepeatFactors:
    """Expected occurrences per image in an epoch, (N,), and the factors over 1 by class."""

    images: NDArray[np.float64]
    classes: Mapping[str, float]

    @property
    def epoch_size(self) -> int:
        """Number of images in an epoch: the sum of the factors, rounded."""
        return int(np.floor(self.images).sum()) + self._num_extra()

    def draw(self, generator: random.Random) -> list[int]:
        """Draw the images of an epoch: an image of factor 2.3 occurs twice or three times.

        The fractional parts are drawn by systematic sampling, so that all epochs have one size.
        """
        whole = np.floor(self.images)
        occurrences: list[int] = np.repeat(np.arange(len(whole)), whole.astype(np.int64)).tolist()
        count = self._num_extra()
        if not count:
            return occurrences
        order = list(range(len(whole)))
        generator.shuffle(order)
        ends = np.cumsum((self.images - whole)[order])
        points = (generator.random() + np.arange(count)) * (ends[-1] / count)
        positions = np.searchsorted(ends, points, side="right").clip(max=len(order) - 1)
        return occurrences + [order[position] for position in positions.tolist()]

    def _num_extra(self) -> int:
        return round(math.fsum((self.images - np.floor(self.images)).tolist()))

    def describe(self) -> str:
        """Describe the factors in a line."""
        if not self.classes:
            return "balance: no class is rare enough to repeat its images"
        shown = [f"{name} {factor:.2f}" for name, factor in self.classes.items()]
        more = f" and {len(shown) - _SHOWN_CLASSES} more" if len(shown) > _SHOWN_CLASSES else ""
        return (
            f"balance: an epoch has {self.epoch_size} images of {len(self.images)}; repeat factors "
            f"over 1: {', '.join(shown[:_SHOWN_CLASSES])}{more}"
        )


def repeat_factors(dataset: Dataset, threshold: float) -> RepeatFactors:
    """Compute the repeat factors of a data set's images; ignored objects do not count.

    Source: Gupta et al. 2019 (LVIS), Appendix B.2: r(c) = max(1, sqrt(t / f(c))) with the fraction
    f(c) of the images that contain class c; r(I) is the maximum over the classes in image I.
    """
    labels = [{a.label for a in image.annotations if not a.ignored} for image in dataset.images]
    counts = Counter(label for present in labels for label in present)
    factors = {
        label: max(1.0, math.sqrt(threshold * len(labels) / count))
        for label, count in counts.items()
    }
    per_image = [max((factors[label] for label in present), default=1.0) for present in labels]
    rare = sorted((item for item in factors.items() if item[1] > 1), key=lambda item: -item[1])
    return RepeatFactors(
        np.asarray(per_image, dtype=np.float64),
        {dataset.classes[label]: factor for label, factor in rare},
    )


def balance(dataset: Dataset, config: DataConfig) -> RepeatFactors | None:
    """Return the repeat factors by ``data.balance``, and ``data.empty_tiles`` for empty tiles.

    Empty is a tile without an object that is not ignored. None: every image occurs once per epoch.
    """
    repeats = None
    if config.balance != "none":
        repeats = repeat_factors(dataset, config.balance_threshold)
    is_empty = np.array(
        [image.window is not None and not image.has_object for image in dataset.images], dtype=bool
    )
    if config.empty_tiles == 1 or not is_empty.any():
        return repeats
    factors = np.ones(len(dataset)) if repeats is None else repeats.images
    return RepeatFactors(
        np.where(is_empty, config.empty_tiles, factors), {} if repeats is None else repeats.classes
    )


def epoch_size(dataset: Dataset, config: DataConfig) -> int:
    """Return the number of images in an epoch, repetitions included."""
    repeats = balance(dataset, config)
    return len(dataset) if repeats is None else repeats.epoch_size
