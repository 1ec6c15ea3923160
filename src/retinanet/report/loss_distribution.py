"""Distribution of a trained model's loss over anchors: Figure 4 for any checkpoint and data.

Source: Lin et al. 2017, Sec. 5.1, "Analysis of the Focal Loss": the focal loss of many positive and
negative windows of a trained model, for several gamma, sorted from low to high and normalised to
sum to one; plotted is its cumulative distribution, positives and negatives apart.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retinanet.anchors import level_anchors
from retinanet.data.dataset import Dataset
from retinanet.data.images import padding_colour
from retinanet.data.loading import default_workers, eval_loader
from retinanet.errors import ConfigError, DataError
from retinanet.evaluation.predict import Progress, invert_label_map, to_model_labels
from retinanet.evaluation.run import (
    DetectorOptions,
    match_classes,
    open_detector,
    read_eval_dataset,
)
from retinanet.inference.backends import Network
from retinanet.inference.detector import Detector
from retinanet.losses import focal_loss
from retinanet.matching import anchor_labels, match_anchors
from retinanet.model.checkpoint import Checkpoint
from retinanet.structures import BACKGROUND, IGNORED, flatten_levels

GAMMAS = (0.0, 0.5, 1.0, 2.0)
"""Gammas of Figure 4."""

HARDEST = (0.01, 0.1, 0.2)
"""Fractions of the anchors, those with the highest loss, whose share of the loss is reported."""

MATCHING: dict[str, Any] = {
    "foreground_iou": 0.5,
    "background_iou": 0.4,
    "low_quality_matches": False,
}

MAX_KEY = 2**31 - 1
_POINTS = 501
_CHUNK = 2**22  # logits per loss computation: 16 MB per intermediate
_SLACK = 1.25  # a sample is cut when it exceeds its size by this factor

_Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Maximum number of anchors that are sampled; the paper takes about as many as the defaults.

    At the defaults the samples take up to 700 MB, whatever the size of the data.

    Attributes:
        max_positives, max_negatives: where the data has more, each has the same chance.
        seed: of the sample.
    """

    max_positives: int = 100_000
    max_negatives: int = 10_000_000
    seed: int = 0


@dataclass(frozen=True, slots=True)
class LossCurve:
    """Distribution of the loss over anchors for one gamma.

    Attributes:
        gamma: of the focal loss, without alpha.
        mean: mean loss per anchor.
        cumulative: share of the loss in the easiest anchors, for each of
            :attr:`LossDistribution.fractions`: from 0 to 1; NaN where every loss is 0.
        hardest: share of the loss in the hardest anchors, by :data:`HARDEST`.
    """

    gamma: float
    mean: float
    cumulative: tuple[float, ...]
    hardest: Mapping[float, float]


@dataclass(frozen=True, slots=True)
class LossDistribution:
    """Figure 4 of one model on one split.

    Attributes:
        images: number of images.
        fractions: fractions of the anchors, 0 to 1, evenly spaced: the x of every curve.
        positives: curves of anchors matched to an object, one per gamma.
        negatives: curves of background anchors, one per gamma.
        positive_anchors, negative_anchors, ignored_anchors: anchors of the images by kind.
        positives_taken, negatives_taken: anchors sampled.
        classes: number of classes, whose losses are summed per anchor.
        foreground_iou, background_iou, low_quality_matches: how anchors were matched.
        source, split: the data.
    """

    images: int
    fractions: tuple[float, ...]
    positives: tuple[LossCurve, ...]
    negatives: tuple[LossCurve, ...]
    positive_anchors: int
    negative_anchors: int
    ignored_anchors: int
    positives_taken: int
    negatives_taken: int
    classes: int
    foreground_iou: float
    background_iou: float
    low_quality_matches: bool
    source: str
    split: str

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON types; the keys of ``hardest`` are text, NaN is None."""
        values: dict[str, Any] = dataclasses.asdict(self)
        for curve in (*values["positives"], *values["negatives"]):
            curve["cumulative"] = [_finite_or_none(share) for share in curve["cumulative"]]
            curve["hardest"] = {f"{x:g}": _finite_or_none(y) for x, y in curve["hardest"].items()}
        return values


def loss_distribution(
    model: str | Path | Detector | Checkpoint,
    data: str | Path | Dataset,
    *,
    split: str | None = None,
    gammas: Sequence[float] = GAMMAS,
    sampling: Sampling | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    **options: Unpack[DetectorOptions],
) -> LossDistribution:
    """Compute the distribution of a trained model's loss over the anchors of a data set.

    Anchors are matched as in the model's training. Losses are those of Eq. 4, without alpha, summed
    over the classes of an anchor.

    Args:
        model, data, split, options: as in :func:`retinanet.evaluation.evaluate`.
        gammas: >= 0.
        sampling: None: the defaults.
        workers: processes that load images; None: chosen for this machine.
        progress: called after each image.

    Raises:
        ConfigError: gammas are missing, repeated or out of range, or as :class:`Detector`.
        DataError: the data cannot be read, no anchor matches an object, or scores are NaN or Inf.
        WeightsError: the model cannot be read, or lacks classes of objects in the data.
        ImageError: an image cannot be read.
    """
    _check_gammas(gammas)
    detector = open_detector(model, options)
    if not isinstance(detector.network, Network):
        raise ConfigError(
            f"{detector.network.description} outputs boxes, not the scores of all anchors: "
            "give the run that it was exported from"
        )
    dataset = read_eval_dataset(data, split, info=detector.info)
    return distribution_of(
        detector.network,
        dataset,
        image_size=detector.image_size,
        max_size=detector.max_size,
        matching=detector.info.get("loss"),
        label_map=match_classes(detector.classes, dataset),
        gammas=gammas,
        sampling=sampling,
        workers=default_workers() if workers is None else workers,
        progress=progress,
    )


@torch.inference_mode()
def distribution_of(
    network: Network,
    dataset: Dataset,
    *,
    image_size: int,
    max_size: int,
    matching: Mapping[str, Any] | None = None,
    label_map: Sequence[int] | None = None,
    gammas: Sequence[float] = GAMMAS,
    sampling: Sampling | None = None,
    workers: int = 0,
    progress: Progress | None = None,
) -> LossDistribution:
    """Compute :func:`loss_distribution` of a network, image by image.

    Args:
        network: from :func:`retinanet.inference.backends.build_network`.
        dataset: the images.
        image_size, max_size: shorter side, and maximum of the longer side, pixels.
        matching: settings of which those in :data:`MATCHING` are used (``info["loss"]``).
        label_map: the data's label of each label of the model.
        gammas, sampling, workers, progress: as in :func:`loss_distribution`.
    """
    _check_gammas(gammas)
    sampling = sampling or Sampling()
    rules = MATCHING | {name: v for name, v in (matching or {}).items() if name in MATCHING}
    model_labels = None if label_map is None else invert_label_map(label_map)
    positives, negatives = _Sample(sampling.max_positives), _Sample(sampling.max_negatives)
    generator = torch.Generator().manual_seed(sampling.seed)
    ignored = 0
    loader = eval_loader(
        dataset,
        batch_size=1,
        image_size=image_size,
        max_size=max_size,
        workers=workers,
        fill=padding_colour(network.model.pixel_mean),
    )
    for done, batch in enumerate(loader, start=1):
        logits, labels = _anchors_of(network, batch.to(network.device), rules)
        if model_labels is not None:
            labels = to_model_labels(labels, model_labels)
        # On the CPU, so that the sample does not depend on the device.
        keys = torch.randint(MAX_KEY, (len(labels),), generator=generator, dtype=torch.int32)
        keys = keys.to(labels.device)
        for sample, kind in ((positives, labels >= 0), (negatives, labels == BACKGROUND)):
            rows = (kind & (keys < sample.limit)).nonzero().flatten()
            losses = anchor_losses(logits[rows], labels[rows], gammas)
            sample.add(keys[rows].cpu().numpy(), losses.cpu().numpy(), int(kind.sum()))
        ignored += int((labels == IGNORED).sum())
        if progress is not None:
            progress(done, len(dataset))
    where = f"{dataset.source} (split {dataset.split!r})"
    fractions = np.linspace(0, 1, _POINTS)
    return LossDistribution(
        images=len(dataset),
        fractions=tuple(fractions.tolist()),
        positives=_curves(positives, gammas, fractions, f"{where}: no anchor matches an object"),
        negatives=_curves(negatives, gammas, fractions, f"{where}: no anchor is background"),
        positive_anchors=positives.seen,
        negative_anchors=negatives.seen,
        ignored_anchors=ignored,
        positives_taken=positives.taken,
        negatives_taken=negatives.taken,
        classes=network.model.num_classes,
        source=str(dataset.source),
        split=dataset.split,
        **rules,
    )


def _anchors_of(network: Network, batch: Any, rules: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(R, K) logits and (R,) labels of the anchors of an image, labels of the data."""
    outputs = network(batch.images)
    shapes = [(level.shape[-2], level.shape[-1]) for level in outputs.logits]
    anchors = torch.cat(level_anchors(network.model.anchors, shapes, device=network.device))
    labels = anchor_labels(match_anchors(anchors, batch.targets, **rules), batch.targets.labels)
    return flatten_levels(outputs.logits, network.model.num_classes)[0], labels[0]


def anchor_losses(logits: Tensor, labels: Tensor, gammas: Sequence[float]) -> Tensor:
    """Focal loss per anchor for several gamma, without alpha (Eq. 4).

    Args:
        logits: (N, K).
        labels: (N,) class 0..K-1 or BACKGROUND.
        gammas: G exponents.

    Returns:
        (N, G) float32 (float64 for float64 logits): sums over the K classes.
    """
    rows = max(1, _CHUNK // max(1, logits.shape[1]))
    chunks = zip(torch.split(logits, rows), torch.split(labels, rows), strict=True)
    return torch.cat(
        [
            torch.stack(
                [
                    focal_loss(x, y, alpha=None, gamma=gamma, reduction="none").sum(dim=1)
                    for gamma in gammas
                ],
                dim=1,
            )
            for x, y in chunks
        ]
    )


def cumulative_share(losses: NDArray[Any], fractions: NDArray[Any]) -> _Array:
    """Share of the loss in the easiest anchors (Figure 4's y).

    Args:
        losses: (N,) >= 0, in any order, N > 0.
        fractions: (F,) of the anchors, in [0, 1]; interpolated between anchors.

    Returns:
        (F,) in [0, 1]; NaN where every loss is 0.
    """
    sums = np.zeros(len(losses) + 1)
    np.cumsum(np.sort(losses), dtype=np.float64, out=sums[1:])
    if sums[-1] == 0:
        return np.full(len(fractions), np.nan)
    positions = np.asarray(fractions, dtype=np.float64) * len(losses)
    # np.interp would need another array of N positions.
    low = np.minimum(positions.astype(np.int64), len(losses) - 1)
    shares: _Array = (sums[low] + (positions - low) * (sums[low + 1] - sums[low])) / sums[-1]
    return shares


def _check_gammas(gammas: Sequence[float]) -> None:
    if not gammas or len(set(gammas)) != len(gammas):
        raise ConfigError(f"gammas are one or more different numbers, got {list(gammas)}")
    for gamma in gammas:
        if not 0 <= gamma < math.inf:
            raise ConfigError(f"gamma must be 0 or more, got {gamma}")


class _Sample:
    """Losses of at most `max_size` anchors, each with the same chance.

    An anchor draws a key in [0, MAX_KEY), and those with the lowest keys are the sample. Keys from
    `limit` on can no longer be in it.
    """

    def __init__(self, max_size: int) -> None:
        if max_size < 1:
            raise ConfigError(f"samples need one anchor or more, got a maximum of {max_size}")
        self.limit = MAX_KEY
        self.seen = 0
        self._max_size = max_size
        self._keys: list[NDArray[np.int32]] = []
        self._losses: list[NDArray[np.float32]] = []

    @property
    def taken(self) -> int:
        return sum(map(len, self._keys))

    def add(self, keys: NDArray[np.int32], losses: NDArray[np.float32], seen: int) -> None:
        """Add (N,) keys under the limit and (N, G) losses, of `seen` anchors in the image."""
        self.seen += seen
        self._keys.append(keys)
        self._losses.append(losses.astype(np.float32, copy=False))
        if self.taken > _SLACK * self._max_size:
            self._cut()

    def losses(self) -> NDArray[np.float32]:
        """(N, G) losses of the sample."""
        self._cut()
        return self._losses[0]

    def _cut(self) -> None:
        keys, losses = np.concatenate(self._keys), np.concatenate(self._losses)
        if len(keys) > self._max_size:
            lowest = np.argpartition(keys, self._max_size - 1)[: self._max_size]
            self.limit = int(keys[lowest[-1]])
            keys, losses = keys[lowest], losses[lowest]
        self._keys, self._losses = [keys], [losses]


def _curves(
    sample: _Sample, gammas: Sequence[float], fractions: _Array, empty: str
) -> tuple[LossCurve, ...]:
    """Compute the curve of each gamma.

    Raises:
        DataError: the sample is empty, or a loss is NaN or Inf.
    """
    if not sample.seen:
        raise DataError(
            f"{empty}; take a split with objects, or see `retinanet data anchors` for their sizes"
        )
    points = np.concatenate([fractions, 1 - np.array(HARDEST)])
    curves = []
    for gamma, losses in zip(gammas, sample.losses().T, strict=True):
        mean = float(losses.mean(dtype=np.float64))
        if not math.isfinite(mean):
            raise DataError(
                "scores of the model are NaN or Inf; use another checkpoint, or precision float32"
            )
        shares = cumulative_share(losses, points)
        hardest = dict(zip(HARDEST, (1 - shares[len(fractions) :]).tolist(), strict=True))
        curves.append(
            LossCurve(float(gamma), mean, tuple(shares[: len(fractions)].tolist()), hardest)
        )
    return tuple(curves)


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
