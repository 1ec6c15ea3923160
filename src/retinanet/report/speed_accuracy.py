"""AP against time for models at several scales on this machine: Figure 2 for any checkpoints.

Source: Lin et al. 2017, Figure 2 and Table 1e: RetinaNet at depths 50 and 101 and scales of 400 to
800 pixels, AP against milliseconds per image.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np

from retinanet.data.dataset import Dataset
from retinanet.data.images import padding_colour
from retinanet.data.loading import eval_loader
from retinanet.errors import ConfigError, DataError, ImageError
from retinanet.evaluation.metrics import AP_METRICS, Number, to_json_types
from retinanet.evaluation.predict import Progress
from retinanet.evaluation.run import DetectorOptions, match_classes, predict, read_eval_dataset
from retinanet.inference.backends import Network, detect_batch, network_settings
from retinanet.inference.detector import Detector
from retinanet.model.checkpoint import Checkpoint, load_checkpoint

SCALES = (400, 500, 600, 700, 800)
"""Shorter sides of Figure 2, pixels; its models were trained at 600."""

_TRAINED_SCALE = 600
_MIN_SCALE, _MAX_SCALE = 32, 8192
_WARMUP_CALLS = 2  # the second call with a shape packs weights for it


class CallTime(NamedTuple):
    """Median and quartiles of the seconds of a call."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class SpeedPoint:
    """A model at a scale.

    Attributes:
        model: its name.
        scale, max_size: shorter side, and maximum of the longer side, pixels.
        metrics: by column: AP, AP50, AP75, APs, APm and APl.
        network: description of the backend.
        milliseconds: per image at batch size 1: network and post-processing, without decoding and
            resizing; median over rounds.
        milliseconds_low, milliseconds_high: quartiles.
    """

    model: str
    scale: int
    max_size: int
    metrics: Mapping[str, Number]
    network: str
    milliseconds: float = 0.0
    milliseconds_low: float = 0.0
    milliseconds_high: float = 0.0


@dataclass(frozen=True, slots=True)
class SpeedAccuracy:
    """Figure 2 of some models on one split and one machine; of `images`, `timed` were timed."""

    points: tuple[SpeedPoint, ...]
    images: int
    timed: int
    rounds: int
    source: str
    split: str
    machine: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON types; NaN becomes None."""
        return to_json_types(self)


def speed_accuracy(
    models: Mapping[str, str | Path | Checkpoint],
    data: str | Path | Dataset,
    *,
    split: str | None = None,
    scales: Sequence[int] | None = None,
    rounds: int = 7,
    images: int = 8,
    batch_size: int = 4,
    workers: int | None = None,
    machine: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **options: Unpack[DetectorOptions],
) -> SpeedAccuracy:
    """Measure AP and milliseconds per image of each model at each scale.

    Args:
        models: run folders, checkpoints or ``torchvision/..`` names, by the name of their points.
        data, split: as in :func:`retinanet.evaluation.evaluate`; the same images for every model.
        scales: shorter sides, pixels; None: the paper's, from 4/6 to 8/6 of each model's training
            scale. The maximum of the longer side keeps its ratio to it.
        rounds: times that each setting is timed, in turns.
        images: images timed, evenly spread over the split, one by one in each round.
        batch_size, workers: for AP.
        machine: description for the result.
        progress: called with the number of settings evaluated.
        options: as in :class:`Detector`.

    Raises:
        ConfigError: no model, a scale or count out of range, or as :class:`Detector`.
        DataError: the models have different validation splits, or as for an evaluation.
        ImageError: an image cannot be read.
    """
    if not models:
        raise ConfigError("no model to measure: give one or more run folders")
    if min(rounds, images) < 1:
        raise ConfigError(f"rounds and images must be 1 or more, got {rounds} and {images}")
    if scales is not None:
        if not scales or len(set(scales)) != len(scales):
            raise ConfigError(f"scales are one or more different numbers, got {list(scales)}")
        if not _MIN_SCALE <= min(scales) <= max(scales) <= _MAX_SCALE:
            raise ConfigError(f"scales are {_MIN_SCALE} to {_MAX_SCALE} pixels, got {list(scales)}")
    checkpoints = {
        name: model if isinstance(model, Checkpoint) else load_checkpoint(model)
        for name, model in models.items()
    }
    dataset = _common_split(checkpoints, data, split)
    # All models before the first measurement: an error shows at once.
    for checkpoint in checkpoints.values():
        match_classes(checkpoint.classes, dataset)
    settings = [
        (name, checkpoint, scale)
        for name, checkpoint in checkpoints.items()
        for scale in (paper_scales(checkpoint.image_size) if scales is None else sorted(scales))
    ]
    timed = replace(dataset, images=tuple(spread_evenly(dataset.images, images)))
    untimed: list[SpeedPoint] = []
    calls: dict[str, Callable[[], object]] = {}
    for name, checkpoint, scale in settings:
        at_scale: dict[str, Any] = {**options, "image_size": scale}
        detector = Detector(checkpoint, **at_scale)
        calls[f"{name} {scale}"] = detection_call(detector, timed)
        untimed.append(_untimed_point(name, detector, dataset, batch_size, workers))
        if progress is not None:
            progress(len(untimed), len(settings))
    points = []
    for point, seconds in zip(untimed, time_in_turns(calls, rounds).values(), strict=True):
        median, low, high = (1000 * value / len(timed) for value in seconds)
        points.append(
            replace(point, milliseconds=median, milliseconds_low=low, milliseconds_high=high)
        )
    return SpeedAccuracy(
        points=tuple(points),
        images=len(dataset),
        timed=len(timed),
        rounds=rounds,
        source=str(dataset.source),
        split=dataset.split,
        machine=dict(machine or {}),
    )


def _untimed_point(
    name: str, detector: Detector, dataset: Dataset, batch_size: int, workers: int | None
) -> SpeedPoint:
    predictions = predict(detector, dataset, batch_size=batch_size, workers=workers, tile="none")
    metrics = predictions.evaluate(analysis=False)
    if metrics.unreadable:
        raise ImageError(next(iter(metrics.unreadable.values())))
    aps = {column: getattr(metrics, field) for column, field in AP_METRICS.items()}
    size = detector.image_size, detector.max_size
    return SpeedPoint(name, *size, aps, detector.network.description)


def time_in_turns(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warmup: int = _WARMUP_CALLS,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, CallTime]:
    """Time several calls in turns, once per round; a call that uses a GPU synchronises itself.

    `warmup` calls of each before the first round are not timed.
    """
    for call in calls.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            seconds[name].append(clock() - start)
    return {
        name: CallTime(*np.quantile(values, (0.5, 0.25, 0.75)).tolist())
        for name, values in seconds.items()
    }


def detection_call(detector: Detector, dataset: Dataset) -> Callable[[], object]:
    """Return a function that detects in every image of a data set, one by one.

    The images are decoded, resized, padded and moved to the device here, once.

    Raises:
        ImageError: an image cannot be read.
    """
    loader = eval_loader(
        dataset,
        batch_size=1,
        image_size=detector.image_size,
        max_size=detector.max_size,
        fill=padding_colour(detector.model.pixel_mean),
    )
    # Sorted by size: weights are packed for sizes that come again.
    batches = sorted(
        (batch.to(detector.device) for batch in loader), key=lambda b: tuple(b.images.shape)
    )
    network = detector.network
    assert isinstance(network, Network)  # built from a checkpoint

    def call() -> None:
        for batch in batches:
            for detections in detect_batch(
                network,
                batch.images,
                batch.sizes,
                batch.original_sizes,
                **network_settings(detector.eval_thresholds, detector.classes),
            ):
                for values in (detections.boxes, detections.scores, detections.labels):
                    values.cpu()  # waits for a GPU

    return call


def paper_scales(trained: int) -> tuple[int, ...]:
    """Compute the paper's scales relative to the training scale (600 pixels in the paper).

    >>> paper_scales(600)
    (400, 500, 600, 700, 800)
    >>> paper_scales(192)
    (128, 160, 192, 224, 256)
    """
    sides = (max(_MIN_SCALE, round(trained * scale / _TRAINED_SCALE)) for scale in SCALES)
    return tuple(dict.fromkeys(sides))


def _common_split(
    checkpoints: Mapping[str, Checkpoint], data: str | Path | Dataset, split: str | None
) -> Dataset:
    """Read the split that no model was trained on.

    A model without a record of its split (a published one) is evaluated on that of the others.
    """
    with_split = {name: c.info for name, c in checkpoints.items() if c.info.get("split")}
    datasets = {name: read_eval_dataset(data, split, info=i) for name, i in with_split.items()}
    if not datasets:
        return read_eval_dataset(data, split, info={})
    (first, dataset), *others = datasets.items()
    for name, other in others:
        if [image.path for image in dataset.images] != [image.path for image in other.images]:
            raise DataError(
                f"{dataset.source}: {first} and {name} have different validation splits of it "
                f"({dataset.split_origin}; {other.split_origin}); "
                "give a split that neither was trained on, such as a label file of its own"
            )
    return dataset


def spread_evenly(values: Sequence[Any], count: int) -> Sequence[Any]:
    """Return at most `count` of the values, evenly spread from the first to the last."""
    positions = np.linspace(0, len(values) - 1, min(count, len(values))).round().astype(int)
    return [values[i] for i in positions]
