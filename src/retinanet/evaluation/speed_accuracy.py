"""AP against time for models at several scales on this machine: Figure 2 for any checkpoints.

Source: Lin et al. 2017, Figure 2 and Table 1e: RetinaNet at depths 50 and 101 and scales of 400 to
800 pixels, AP against milliseconds an image.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from retinanet.data.dataset import Dataset
from retinanet.data.images import padding_colour
from retinanet.data.loading import default_workers, eval_loader
from retinanet.errors import ConfigError, DataError
from retinanet.evaluation.coco import evaluate_detections
from retinanet.evaluation.metrics import Metrics
from retinanet.evaluation.run import Progress, match_classes, read_judged, search
from retinanet.inference.backends import Network, detect_batch
from retinanet.inference.detector import Detector
from retinanet.model.checkpoint import Checkpoint, load_checkpoint

SCALES = (400, 500, 600, 700, 800)
"""Shorter sides of the paper's Figure 2, pixels; 600 is what its models were trained with."""

_TRAINED = 600
_LEAST_SCALE, _LARGEST_SCALE = 32, 8192
_WARM = 2  # the second call of a shape is the one that arranges weights for it
_T = TypeVar("_T")


class Timed(NamedTuple):
    """Seconds of a call: the median over rounds, and the quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class SpeedPoint:
    """One model at one scale.

    Attributes:
        model: its name.
        scale, max_size: shorter side, and longer side at most, pixels.
        ap, ap50, ap75, ap_small, ap_medium, ap_large: as :class:`retinanet.evaluation.Metrics`; NaN
            where the data has no such object.
        milliseconds: an image at batch size 1: network and post-processing of images that are
            decoded and resized already; the median over rounds.
        milliseconds_low, milliseconds_high: its quartiles.
        network: what ran it, in a few words.
    """

    model: str
    scale: int
    max_size: int
    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    milliseconds: float
    milliseconds_low: float
    milliseconds_high: float
    network: str


@dataclass(frozen=True, slots=True)
class SpeedAccuracy:
    """Figure 2 of some models on one split and one machine.

    Attributes:
        points: model by model, scales from small to large.
        images: images that were judged; `timed`: how many of them were timed.
        rounds: how often each setting was timed.
        source, split: the data.
        machine: what it was measured on, as the caller says.
    """

    points: tuple[SpeedPoint, ...]
    images: int
    timed: int
    rounds: int
    source: str
    split: str
    machine: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON's own types; NaN becomes None."""
        values: dict[str, Any] = dataclasses.asdict(self)
        for point in values["points"]:
            for name, value in point.items():
                if isinstance(value, float) and not math.isfinite(value):
                    point[name] = None
        return values


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
    device: str = "auto",
    precision: str = "auto",
    backend: str = "auto",
    calibrate: Any = None,
    machine: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> SpeedAccuracy:
    """AP and milliseconds an image of each model at each scale.

    Args:
        models: run folders, checkpoints or ``torchvision/..`` names, by the names that the points
            get.
        data: a labelled folder or file of any format, or a data set.
        split: as in :func:`retinanet.evaluation.evaluate`; every model is judged on the same
            images.
        scales: shorter sides, pixels; None: the paper's, from 4/6 to 8/6 of what each model was
            trained with. The longer side's limit keeps its ratio to it.
        rounds: how often each setting is timed; they take turns, so that what else the machine
            does meets all of them.
        images: how many of the split are timed, evenly spread over it; a round of a setting is
            all of them, one by one.
        batch_size, workers: for AP; the times are those of single images.
        device, precision, backend, calibrate: as in :class:`Detector`.
        machine: goes into the result.
        progress: told how many settings have their AP.

    Raises:
        ConfigError: there is no model, a scale or a count is out of range, or as
            :class:`Detector`.
        DataError: the data cannot be read, or the models held out different images of it.
        WeightsError: a model cannot be read, or lacks classes that the data has objects of.
        ImageError: an image cannot be read.
        MissingExtraError: the backend is not installed.
    """
    if not models:
        raise ConfigError("there is no model to measure: give one or more run folders")
    for name, count in (("rounds", rounds), ("images", images)):
        if count < 1:
            raise ConfigError(f"{name} is 1 or more, got {count}")
    check_scales(scales)
    checkpoints = {
        name: model if isinstance(model, Checkpoint) else load_checkpoint(model)
        for name, model in models.items()
    }
    dataset = _same_images(checkpoints, data, split)
    # All of them before the first is measured: an error tells at once.
    label_maps = {
        name: match_classes(checkpoint.classes, dataset) for name, checkpoint in checkpoints.items()
    }
    settings = [
        (name, checkpoint, scale)
        for name, checkpoint in checkpoints.items()
        for scale in (paper_scales(checkpoint.image_size) if scales is None else sorted(scales))
    ]
    judged: list[tuple[str, Detector, Metrics]] = []
    calls: dict[str, Callable[[], object]] = {}
    chosen = _spread(dataset, images)
    for name, checkpoint, scale in settings:
        detector = Detector(
            checkpoint,
            device=device,
            precision=precision,
            backend=backend,
            calibrate=calibrate,
            image_size=scale,
        )
        assert isinstance(detector.network, Network)  # it is built from a checkpoint
        searched = search(
            detector.network,
            dataset,
            image_size=detector.image_size,
            max_size=detector.max_size,
            batch_size=batch_size,
            workers=default_workers() if workers is None else workers,
            label_map=label_maps[name],
            **detector.thresholds,
        )
        metrics = evaluate_detections(dataset, searched.results, analysis=False)
        calls[f"{name} {scale}"] = search_call(detector, chosen)
        judged.append((name, detector, metrics))
        if progress is not None:
            progress(len(judged), len(settings))
    times = time_in_turns(calls, rounds)
    points = []
    for (name, detector, metrics), taken in zip(judged, times.values(), strict=True):
        median, low, high = (1000 * seconds / len(chosen) for seconds in taken)
        points.append(
            SpeedPoint(
                model=name,
                scale=detector.image_size,
                max_size=detector.max_size,
                ap=metrics.ap,
                ap50=metrics.ap50,
                ap75=metrics.ap75,
                ap_small=metrics.ap_small,
                ap_medium=metrics.ap_medium,
                ap_large=metrics.ap_large,
                milliseconds=median,
                milliseconds_low=low,
                milliseconds_high=high,
                network=detector.network.description,
            )
        )
    return SpeedAccuracy(
        points=tuple(points),
        images=len(dataset),
        timed=len(chosen),
        rounds=rounds,
        source=str(dataset.source),
        split=dataset.split,
        machine=dict(machine or {}),
    )


def time_in_turns(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    warm: int = _WARM,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timed]:
    """How long calls take that have the machine in turns.

    Args:
        calls: by name; one that uses a GPU waits for it itself.
        rounds: in each of which every call is timed once.
        warm: calls of each before that, not timed.
        clock: seconds.

    Raises:
        ValueError: `rounds` is under 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds is 1 or more, got {rounds}")
    for call in calls.values():
        for _ in range(warm):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = clock()
            call()
            seconds[name].append(clock() - began)
    return {name: _timed(values) for name, values in seconds.items()}


def search_call(detector: Detector, dataset: Dataset) -> Callable[[], object]:
    """A call that searches every image of `dataset`, one by one, and waits for the boxes.

    The images are decoded, resized, padded and put on the device here, once.

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
    batches = [batch.to(detector.device) for batch in loader]
    # Images of one size after each other, as weights are arranged for sizes that come again.
    batches.sort(key=lambda one: tuple(one.images.shape))

    network = detector.network
    assert isinstance(network, Network)  # it is built from a checkpoint

    def call() -> None:
        for batch in batches:
            found = detect_batch(
                network,
                batch.images,
                batch.sizes,
                batch.original_sizes,
                **detector.thresholds,
            )
            for one in found:
                for part in (one.boxes, one.scores, one.labels):
                    part.cpu()  # waits for a GPU

    return call


def paper_scales(trained: int) -> tuple[int, ...]:
    """The paper's scales for a model that was trained with another shorter side than 600 pixels.

    >>> paper_scales(600)
    (400, 500, 600, 700, 800)
    >>> paper_scales(192)
    (128, 160, 192, 224, 256)
    """
    sides = (max(_LEAST_SCALE, round(trained * scale / _TRAINED)) for scale in SCALES)
    return tuple(dict.fromkeys(sides))


def check_scales(scales: Sequence[int] | None) -> None:
    """Raise a ConfigError unless there are scales, each once, that an image can be resized to."""
    if scales is None:
        return
    if not scales or len(set(scales)) != len(scales):
        raise ConfigError(f"scales are one or more different numbers, got {list(scales)}")
    for scale in scales:
        if not _LEAST_SCALE <= scale <= _LARGEST_SCALE:
            raise ConfigError(
                f"scale is a shorter side of {_LEAST_SCALE} to {_LARGEST_SCALE} pixels, got {scale}"
            )


def _timed(seconds: list[float]) -> Timed:
    if len(seconds) == 1:
        return Timed(seconds[0], seconds[0], seconds[0])
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timed(statistics.median(seconds), low, high)


def _same_images(
    checkpoints: Mapping[str, Checkpoint], data: str | Path | Dataset, split: str | None
) -> Dataset:
    """The split on which all models can be judged: what none of them has trained on.

    A model that does not say how its split was made, such as a published one, held out nothing of
    this data and is judged on what the others held out.
    """
    splits = {name: one.info.get("split") for name, one in checkpoints.items()}
    held: dict[str, Mapping[str, Any]] = {name: made for name, made in splits.items() if made}
    first: tuple[str, Dataset] | None = None
    for name, made in (held or {next(iter(checkpoints)): {}}).items():
        dataset = read_judged(
            data, split, seed=made.get("seed"), val_fraction=made.get("val_fraction")
        )
        if first is None:
            first = name, dataset
        elif [one.path for one in dataset.images] != [one.path for one in first[1].images]:
            raise DataError(
                f"{dataset.source}: {first[0]} and {name} held out different images of it "
                f"({first[1].split_origin}; {dataset.split_origin}); "
                "give a split that neither has trained on, such as a label file of its own"
            )
    assert first is not None
    return first[1]


def _spread(dataset: Dataset, count: int) -> Dataset:
    return dataclasses.replace(dataset, images=tuple(_evenly(dataset.images, count)))


def _evenly(values: Sequence[_T], count: int) -> Iterable[_T]:
    """At most `count` of them, evenly spread from the first to the last."""
    if len(values) <= count:
        return values
    step = (len(values) - 1) / max(1, count - 1)
    return [values[round(place * step)] for place in range(count)]
