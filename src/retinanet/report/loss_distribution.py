"""Distribution of a trained model's loss over anchors: Figure 4 for any checkpoint and data.

Source: Lin et al. 2017, Sec. 5.1, "Analysis of the Focal Loss": the focal loss of many positive and
negative windows of a trained model, for several gamma, sorted from low to high and normalised to
sum to one; plotted is its cumulative distribution, positives and negatives apart.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retinanet.anchors import level_anchors
from retinanet.config import LossSettings
from retinanet.data.dataset import Dataset
from retinanet.data.images import padding_colour
from retinanet.data.loading import default_workers, eval_loader
from retinanet.errors import ConfigError, DataError
from retinanet.evaluation.metrics import to_json_types
from retinanet.evaluation.predict import Progress, to_model_labels
from retinanet.evaluation.run import (
    DetectorOptions,
    match_classes,
    open_detector,
    read_eval_dataset,
)
from retinanet.inference.backends import Network
from retinanet.inference.detector import Detector
from retinanet.losses import focal_loss
from retinanet.losses.assignment import assign_anchors
from retinanet.matching import anchor_labels
from retinanet.model.checkpoint import Checkpoint
from retinanet.structures import BACKGROUND, IGNORED, flatten_levels

GAMMAS = (0.0, 0.5, 1.0, 2.0)
"""Gammas of Figure 4."""

HARDEST = (0.01, 0.1, 0.2)
"""Fractions of the anchors, those with the highest loss, whose share of the loss is reported."""

MAX_NEGATIVES = 10_000_000
"""Background anchors that are sampled, about; the paper takes as many."""

_POINTS = 501
CHUNK = 2**22  # logits per loss computation: 16 MB per intermediate

_Array = NDArray[np.float64]
_Array32 = NDArray[np.float32]


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
        fractions: fractions of the anchors, 0 to 1, evenly spaced: the x of every curve.
        positives, negatives: curves of matched and of background anchors, one per gamma.
        positive_anchors, negative_anchors, ignored_anchors: anchors of the images by kind.
        positives_taken, negatives_taken: anchors sampled, each with the same chance.
        classes: number of classes, whose losses are summed per anchor.
        foreground_iou, background_iou, low_quality_matches: how anchors were matched.
    """

    source: str
    split: str
    images: int
    positives: tuple[LossCurve, ...]
    negatives: tuple[LossCurve, ...]
    fractions: tuple[float, ...]
    positive_anchors: int
    negative_anchors: int
    ignored_anchors: int
    positives_taken: int
    negatives_taken: int
    classes: int
    foreground_iou: float
    background_iou: float
    low_quality_matches: bool

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON types; the keys of ``hardest`` are text, NaN is None."""
        return to_json_types(self)


def loss_distribution(
    model: str | Path | Detector | Checkpoint,
    data: str | Path | Dataset,
    *,
    split: str | None = None,
    gammas: Sequence[float] = GAMMAS,
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
        workers: processes that load images; None: chosen for this machine.
        progress: called after each image.

    Raises:
        ConfigError: gammas are missing, repeated or out of range, or as :class:`Detector`.
        DataError: no anchor matches an object, scores are NaN or Inf, or as for an evaluation.
    """
    if not gammas or len(set(gammas)) != len(gammas) or not all(0 <= g < math.inf for g in gammas):
        raise ConfigError(f"gammas are one or more different numbers >= 0, got {list(gammas)}")
    detector = open_detector(model, options)
    network = detector.network
    if not isinstance(network, Network):
        raise ConfigError(
            f"{network.description} outputs boxes, not the scores of all anchors: "
            "give the run that it was exported from"
        )
    dataset = read_eval_dataset(data, split, info=detector.info)
    settings = LossSettings(**(detector.info.get("loss") or {}))
    positives, negatives, counts = _collect_losses(
        detector, network, dataset, settings, gammas, workers, progress
    )
    where = f"{dataset.source} (split {dataset.split!r})"
    fractions = np.linspace(0, 1, _POINTS)
    return LossDistribution(
        images=len(dataset),
        fractions=tuple(fractions.tolist()),
        positives=_curves(positives, gammas, fractions, f"{where}: no anchor matches an object"),
        negatives=_curves(negatives, gammas, fractions, f"{where}: no anchor is background"),
        positive_anchors=sum(map(len, positives)),
        negative_anchors=counts["background"],
        ignored_anchors=counts["ignored"],
        positives_taken=sum(map(len, positives)),
        negatives_taken=sum(map(len, negatives)),
        classes=network.model.num_classes,
        foreground_iou=settings.foreground_iou,
        background_iou=settings.background_iou,
        low_quality_matches=settings.low_quality_matches,
        source=str(dataset.source),
        split=dataset.split,
    )


def _collect_losses(
    detector: Detector,
    network: Network,
    dataset: Dataset,
    settings: LossSettings,
    gammas: Sequence[float],
    workers: int | None,
    progress: Progress | None,
) -> tuple[list[_Array32], list[_Array32], Counter[str]]:
    """(N, G) losses of the positives and of sampled negatives per image, and anchors by kind."""
    label_map = match_classes(detector.classes, dataset)
    generator = torch.Generator().manual_seed(0)
    positives: list[_Array32] = []
    negatives: list[_Array32] = []
    counts: Counter[str] = Counter()
    loader = eval_loader(
        dataset,
        batch_size=1,
        image_size=detector.image_size,
        max_size=detector.max_size,
        workers=default_workers() if workers is None else workers,
        fill=padding_colour(network.model.pixel_mean),
    )
    for done, batch in enumerate(loader, start=1):
        logits, labels = _anchors_of(network, batch.to(network.device), settings)
        labels = to_model_labels(labels, label_map)
        # About as many in all: all images are resized to about the same number of anchors. Drawn
        # on the CPU, so that the sample does not depend on the device.
        chance = MAX_NEGATIVES / (len(labels) * len(dataset))
        drawn = (torch.rand(len(labels), generator=generator) < chance).to(labels.device)
        background = labels == BACKGROUND
        for kept, rows in ((positives, labels >= 0), (negatives, background & drawn)):
            kept.append(anchor_losses(logits[rows], labels[rows], gammas).cpu().numpy())
        counts["background"] += int(background.sum())
        counts["ignored"] += int((labels == IGNORED).sum())
        if progress is not None:
            progress(done, len(dataset))
    return positives, negatives, counts


def _anchors_of(network: Network, batch: Any, settings: LossSettings) -> tuple[Tensor, Tensor]:
    """(R, K) logits and (R,) labels of the anchors of an image, labels of the data."""
    outputs = network(batch.images)
    shapes = [(level.shape[-2], level.shape[-1]) for level in outputs.logits]
    assignment = assign_anchors(
        outputs,
        level_anchors(network.model.anchors, shapes, device=network.device),
        batch.targets,
        num_classes=network.model.num_classes,
        settings=settings,
    )
    labels = anchor_labels(assignment.matches, batch.targets.labels)
    return flatten_levels(outputs.logits, network.model.num_classes)[0], labels[0]


def anchor_losses(logits: Tensor, labels: Tensor, gammas: Sequence[float]) -> Tensor:
    """Return (N, G) focal losses without alpha (Eq. 4), summed over classes, for G gammas.

    `logits` are (N, K), `labels` (N,) class 0..K-1 or BACKGROUND.
    """
    rows = max(1, CHUNK // max(1, logits.shape[1]))
    chunks = []
    for x, y in zip(torch.split(logits, rows), torch.split(labels, rows), strict=True):
        losses = (focal_loss(x, y, alpha=None, gamma=g, reduction="none") for g in gammas)
        chunks.append(torch.stack([loss.sum(dim=1) for loss in losses], dim=1))
    return torch.cat(chunks)


def cumulative_share(losses: NDArray[Any], fractions: NDArray[Any]) -> _Array:
    """Return the share of the loss in the easiest anchors (Figure 4's y), interpolated.

    `losses` are (N,) >= 0, N > 0, `fractions` (F,) of the anchors in [0, 1]. Returns (F,), NaN
    where every loss is 0.
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


def _curves(
    parts: Sequence[_Array32], gammas: Sequence[float], fractions: _Array, empty: str
) -> tuple[LossCurve, ...]:
    """Compute the curve of each gamma from parts of (N, G) losses."""
    if not any(map(len, parts)):
        raise DataError(
            f"{empty}; take a split with objects, or see `retinanet data anchors` for their sizes"
        )
    points = np.concatenate([fractions, 1 - np.array(HARDEST)])
    curves = []
    for i, gamma in enumerate(gammas):
        losses = np.concatenate([part[:, i] for part in parts])
        mean = float(losses.mean(dtype=np.float64))
        if not math.isfinite(mean):
            raise DataError(
                "scores of the model are NaN or Inf; use another checkpoint, or precision float32"
            )
        shares = cumulative_share(losses, points).tolist()
        hardest = {part: 1 - share for part, share in zip(HARDEST, shares[_POINTS:], strict=True)}
        curves.append(LossCurve(float(gamma), mean, tuple(shares[:_POINTS]), hardest))
    return tuple(curves)
