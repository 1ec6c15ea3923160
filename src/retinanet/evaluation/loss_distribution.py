"""Which anchors hold the loss of a trained model: Figure 4 for any checkpoint and any data.

Source: Lin et al. 2017, Sec. 5.1, "Analysis of the Focal Loss": over many positive and negative
windows of a trained model the focal loss is computed for several gamma, sorted from low to high,
normalised to sum to one, and its cumulative share is plotted, positives and negatives apart.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retinanet.anchors import level_anchors
from retinanet.data.dataset import Dataset
from retinanet.data.images import padding_colour
from retinanet.data.loading import default_workers, eval_loader
from retinanet.errors import ConfigError, DataError
from retinanet.evaluation.run import Progress, inverse_labels, match_classes, read_judged
from retinanet.inference.backends import Network
from retinanet.inference.detector import Detector
from retinanet.losses import focal_loss
from retinanet.matching import anchor_labels, match_anchors
from retinanet.model.checkpoint import Checkpoint, load_checkpoint
from retinanet.structures import BACKGROUND, IGNORED, flatten_levels

GAMMAS = (0.0, 0.5, 1.0, 2.0)
"""Those of Figure 4."""

MOST_POSITIVES = 100_000
MOST_NEGATIVES = 10_000_000
"""About as many windows as the paper samples."""

HARDEST = (0.01, 0.1, 0.2)
"""Parts of the anchors, by loss from the highest down, whose share of the loss is told."""

_POINTS = 501
_PIECE = 2**22  # logits whose loss is taken at a time: 16 MB an intermediate
_KEYS = 2**31 - 1  # as many as an int32 has, so that hardly two anchors of COCO draw the same
_SLACK = 1.25  # of a sample's size are held before it is cut to it: rarely, as a cut sees them all

_Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LossCurve:
    """How the loss at one gamma is spread over anchors.

    Attributes:
        gamma: of the focal loss, without alpha.
        mean: loss of an anchor.
        cumulative: the share of the loss that the easiest anchors hold, one for each of
            :attr:`LossDistribution.fractions`; 0 at first, 1 at last. NaN where every loss is 0.
        hardest: the share that the hardest 1%, 10% and 20% of the anchors hold, by :data:`HARDEST`.
    """

    gamma: float
    mean: float
    cumulative: tuple[float, ...]
    hardest: Mapping[float, float]


@dataclass(frozen=True, slots=True)
class LossDistribution:
    """Figure 4 of one model on one split.

    Attributes:
        images: images looked at.
        fractions: of the anchors, 0 to 1, evenly spaced: the x of every curve.
        positives: curves of anchors that answer for an object, one a gamma.
        negatives: of background anchors, one a gamma.
        positive_anchors, negative_anchors, ignored_anchors: how many the images have.
        positives_taken, negatives_taken: how many of those were sampled for the curves.
        classes: sigmoids of an anchor, whose losses are summed.
        foreground_iou, background_iou, low_quality_matches: by which anchors were assigned.
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
        """Everything as JSON's own types; the parts in ``hardest`` as text, NaN as None."""
        values: dict[str, Any] = dataclasses.asdict(self)
        for curve in (*values["positives"], *values["negatives"]):
            curve["cumulative"] = [_or_none(one) for one in curve["cumulative"]]
            curve["hardest"] = {f"{x:g}": _or_none(y) for x, y in curve["hardest"].items()}
        return values


def loss_distribution(
    model: str | Path | Detector | Checkpoint,
    data: str | Path | Dataset,
    *,
    split: str | None = None,
    gammas: Sequence[float] = GAMMAS,
    most_positives: int = MOST_POSITIVES,
    most_negatives: int = MOST_NEGATIVES,
    sample_seed: int = 0,
    workers: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    backend: str = "auto",
    calibrate: Any = None,
    image_size: int | None = None,
    max_size: int | None = None,
    seed: int | None = None,
    val_fraction: float | None = None,
    progress: Progress | None = None,
) -> LossDistribution:
    """The distribution of the loss of a trained model over the anchors of a data set.

    Anchors are assigned to objects as in the model's training. Losses are those of Eq. 4, without
    alpha, and an anchor's is the sum over its classes.

    Args:
        model: a run folder, a checkpoint, a ``torchvision/..`` name, or a :class:`Detector`, for
            which the options from `device` to `max_size` mean nothing.
        data: a labelled folder or file of any format, or a data set.
        split: which part of the data; None as in :func:`retinanet.evaluation.evaluate`.
        gammas: >= 0.
        most_positives, most_negatives: anchors sampled at the most. Where the data has more, that
            many are taken, each with the same chance. Beside the model's memory they take 500 MB
            at the defaults, however large the data is.
        sample_seed: which are taken.
        workers: processes that load images; None: chosen for this machine.
        device, precision, backend, calibrate, image_size, max_size: as in :class:`Detector`.
        seed, val_fraction: as in :func:`retinanet.evaluation.evaluate`.
        progress: told how many images are done.

    Raises:
        ConfigError: gammas are missing, given twice or out of range, or as :class:`Detector`.
        DataError: the data cannot be read or no anchor answers for an object in it, or the model
            says what is not a number.
        WeightsError: the model cannot be read, or lacks classes that the data has objects of.
        ImageError: an image cannot be read.
    """
    check_gammas(gammas)
    if isinstance(model, str | Path):
        model = load_checkpoint(model)
    if isinstance(model, Checkpoint):
        model = Detector(
            model,
            device=device,
            precision=precision,
            backend=backend,
            calibrate=calibrate,
            image_size=image_size,
            max_size=max_size,
        )
    if not isinstance(model.network, Network):
        raise ConfigError(
            f"{model.network.description} gives boxes, not the scores of all anchors: "
            "give the run that it was exported from"
        )
    made = model.info.get("split", {})
    dataset = read_judged(
        data,
        split,
        seed=made.get("seed") if seed is None else seed,
        val_fraction=made.get("val_fraction") if val_fraction is None else val_fraction,
    )
    return distribution_of(
        model.network,
        dataset,
        image_size=model.image_size,
        max_size=model.max_size,
        matching=model.info.get("loss"),
        label_map=match_classes(model.classes, dataset),
        gammas=gammas,
        most_positives=most_positives,
        most_negatives=most_negatives,
        sample_seed=sample_seed,
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
    most_positives: int = MOST_POSITIVES,
    most_negatives: int = MOST_NEGATIVES,
    sample_seed: int = 0,
    workers: int = 0,
    progress: Progress | None = None,
) -> LossDistribution:
    """As :func:`loss_distribution`, of a network that is there and a data set that was read.

    Images go through one by one, so that hardly any anchor lies in padding.

    Args:
        network: as :func:`retinanet.inference.backends.build_network` makes it.
        image_size, max_size: shorter side, and longer side at most, pixels.
        matching: has ``foreground_iou``, ``background_iou`` and ``low_quality_matches`` among
            others (a checkpoint's ``info["loss"]``); what it lacks is the paper's.
        label_map: the data's label of each label of the model (:func:`match_classes`).

    Raises:
        ConfigError, DataError, ImageError: as :func:`loss_distribution`.
    """
    check_gammas(gammas)
    model = network.model
    rules: dict[str, Any] = {
        "foreground_iou": 0.5,
        "background_iou": 0.4,
        "low_quality_matches": False,
    }
    rules |= {name: value for name, value in (matching or {}).items() if name in rules}
    known = None if label_map is None else inverse_labels(label_map)
    positives = _Sample(most_positives)
    negatives = _Sample(most_negatives)
    keys = torch.Generator().manual_seed(sample_seed)
    ignored = 0
    loader = eval_loader(
        dataset,
        batch_size=1,
        image_size=image_size,
        max_size=max_size,
        workers=workers,
        fill=padding_colour(model.pixel_mean),
    )
    for done, loaded in enumerate(loader, start=1):
        batch = loaded.to(network.device, non_blocking=True)
        outputs = network(batch.images)
        shapes = [(one.shape[-2], one.shape[-1]) for one in outputs.logits]
        anchors = torch.cat(level_anchors(model.anchors, shapes, device=network.device))
        matches = match_anchors(anchors, batch.targets, **rules)
        labels = anchor_labels(matches, batch.targets.labels)[0]
        if known is not None:
            known = known.to(labels.device)
            labels = torch.where(labels >= 0, known[labels.clamp(min=0)], labels)
        logits = flatten_levels(outputs.logits, model.num_classes)[0]
        # Drawn on the CPU: the same anchors are taken wherever the network runs.
        drawn = torch.randint(_KEYS, (len(labels),), generator=keys, dtype=torch.int32)
        drawn = drawn.to(labels.device)
        for sample, kind in ((positives, labels >= 0), (negatives, labels == BACKGROUND)):
            rows = (kind & (drawn < sample.limit)).nonzero().flatten()
            losses = anchor_losses(logits[rows], labels[rows], gammas)
            sample.add(drawn[rows].cpu().numpy(), losses.cpu().numpy(), int(kind.sum()))
        ignored += int((labels == IGNORED).sum())
        if progress is not None:
            progress(done, len(dataset))
    positives.cut()
    negatives.cut()
    where = f"{dataset.source} (split {dataset.split!r})"
    if not positives.seen:
        raise DataError(
            f"{where}: no anchor answers for an object, so there are no positives to look at; "
            "take a split with objects, or see `retinanet data anchors` for objects out of reach"
        )
    if not negatives.seen:
        raise DataError(f"{where}: no anchor is background, so there are no negatives to look at")
    fractions = np.linspace(0, 1, _POINTS)
    return LossDistribution(
        images=len(dataset),
        fractions=tuple(fractions.tolist()),
        positives=_curves(positives, gammas, fractions, where),
        negatives=_curves(negatives, gammas, fractions, where),
        positive_anchors=positives.seen,
        negative_anchors=negatives.seen,
        ignored_anchors=ignored,
        positives_taken=positives.taken,
        negatives_taken=negatives.taken,
        classes=model.num_classes,
        source=str(dataset.source),
        split=dataset.split,
        **rules,
    )


def anchor_losses(logits: Tensor, labels: Tensor, gammas: Sequence[float]) -> Tensor:
    """The focal loss of each anchor for several gamma, without alpha (Eq. 4).

    Args:
        logits: (N, K).
        labels: (N,) class 0..K-1 or BACKGROUND.
        gammas: G exponents.

    Returns:
        (N, G) float32 (float64 for float64 logits): sums over the K classes.
    """
    rows = max(1, _PIECE // max(1, logits.shape[1]))
    parts = [
        torch.stack(
            [
                focal_loss(some, own, alpha=None, gamma=gamma, reduction="none").sum(dim=1)
                for gamma in gammas
            ],
            dim=1,
        )
        for some, own in zip(torch.split(logits, rows), torch.split(labels, rows), strict=True)
    ]
    return torch.cat(parts)


def cumulative_share(losses: NDArray[Any], fractions: NDArray[Any]) -> _Array:
    """The share of all loss that the easiest anchors hold (Figure 4's y).

    Args:
        losses: (N,) >= 0, in any order, N > 0.
        fractions: (F,) of the anchors, in [0, 1]; between two anchors the share is interpolated.

    Returns:
        (F,) in [0, 1]; NaN where every loss is 0.
    """
    summed = np.zeros(len(losses) + 1)
    np.cumsum(np.sort(losses), dtype=np.float64, out=summed[1:])
    if summed[-1] == 0:
        return np.full(len(fractions), np.nan)
    places = np.asarray(fractions, dtype=np.float64) * len(losses)
    # Interpolated by hand: np.interp would want another array of N places.
    low = np.minimum(places.astype(np.int64), len(losses) - 1)
    at = summed[low] + (places - low) * (summed[low + 1] - summed[low])
    result: _Array = at / summed[-1]
    return result


def easy_negative_share(
    logits: Tensor,
    labels: Tensor,
    *,
    gamma: float,
    alpha: float | None = None,
    easy: float = 0.6,
) -> float:
    """How much of the classification loss comes from negatives that are right already.

    Source: Lin et al. 2017, Sec. 1 and 3.2: examples with p_t over .6 are well classified; over all
    anchors their cross entropy adds up to more than that of the few objects, their focal loss does
    not.

    Args:
        logits: (R, K).
        labels: (R,) class 0..K-1, BACKGROUND or IGNORED.
        gamma: focusing exponent; 0 is cross entropy.
        alpha: weight of positives, 1 - alpha that of negatives; None: no weights.
        easy: a negative with p_t = 1 - p over it is easy.

    Returns:
        the share in [0, 1], by sigmoids: those whose target is 0 count as negatives, whatever
        anchor they belong to; NaN where there is no loss at all.

    Raises:
        ValueError: as :func:`retinanet.losses.focal_loss`.
    """
    losses = focal_loss(logits, labels, alpha=alpha, gamma=gamma, reduction="none").double()
    places = torch.arange(logits.shape[1], device=labels.device)
    negative = (labels[:, None] != places) & (labels[:, None] != IGNORED)
    right = torch.sigmoid(-logits.to(losses.dtype)) > easy
    total = float(losses.sum())
    return float(losses[negative & right].sum()) / total if total > 0 else math.nan


def check_gammas(gammas: Sequence[float]) -> None:
    """Raise a ConfigError unless there are gammas, each once, finite and not under 0."""
    if not gammas or len(set(gammas)) != len(gammas):
        raise ConfigError(f"gammas are one or more different numbers, got {list(gammas)}")
    for gamma in gammas:
        if not 0 <= gamma < math.inf:
            raise ConfigError(f"gamma is a number from 0 on, got {gamma}")


class _Sample:
    """Losses of anchors, each of which had the same chance to be taken.

    An anchor draws a key in [0, _KEYS), and those with the lowest keys are the sample. `limit` is
    what a key has to be under to be among them still; it is lowered at each :meth:`cut`.
    """

    def __init__(self, most: int) -> None:
        if most < 1:
            raise ConfigError(f"at least one anchor has to be taken, got a limit of {most}")
        self.limit = _KEYS
        self.seen = 0
        self.taken = 0
        self._most = most
        self._keys: list[NDArray[np.int32]] = []
        self._losses: list[NDArray[np.float32]] = []

    def add(self, keys: NDArray[np.int32], losses: NDArray[np.float32], seen: int) -> None:
        """(N,) keys under the limit and (N, G) losses of anchors, of `seen` in the image."""
        self.seen += seen
        self.taken += len(keys)
        self._keys.append(keys)
        self._losses.append(losses.astype(np.float32, copy=False))
        if self.taken > _SLACK * self._most:
            self.cut()

    def cut(self) -> None:
        """Let go of what is over the size that was asked for."""
        if self.taken <= self._most:
            return
        keys = np.concatenate(self._keys)
        # By place, not by the key at that place: anchors of one key would all stay, or none.
        lowest = np.argpartition(keys, self._most - 1)[: self._most]
        self.limit = int(keys[lowest[-1]])
        stays = np.zeros(len(keys), dtype=bool)
        stays[lowest] = True
        del keys, lowest
        begin = 0
        for place, piece in enumerate(self._keys):
            rows = stays[begin : begin + len(piece)]
            begin += len(piece)
            self._keys[place] = piece[rows]
            self._losses[place] = self._losses[place][rows]
        self.taken = self._most

    def losses(self, place: int) -> NDArray[np.float32]:
        """(N,) of the gamma at that place."""
        return np.concatenate([one[:, place] for one in self._losses])


def _curves(
    sample: _Sample, gammas: Sequence[float], fractions: _Array, where: str
) -> tuple[LossCurve, ...]:
    curves = []
    asked = np.concatenate([fractions, 1 - np.array(HARDEST)])
    for place, gamma in enumerate(gammas):
        losses = sample.losses(place)
        mean = float(losses.mean(dtype=np.float64))
        if not math.isfinite(mean):
            raise DataError(
                f"{where}: the model says scores that are not numbers; use another checkpoint, "
                "or precision float32"
            )
        shares = cumulative_share(losses, asked)
        hardest = 1 - shares[len(fractions) :]
        curves.append(
            LossCurve(
                float(gamma),
                mean,
                tuple(shares[: len(fractions)].tolist()),
                dict(zip(HARDEST, hardest.tolist(), strict=True)),
            )
        )
    return tuple(curves)


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
