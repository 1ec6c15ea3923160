"""Evaluate a model or a COCO results file on a labelled data set."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

from retinanet.config import listed, repeated_names
from retinanet.data import find_data, read_dataset
from retinanet.data.check import fault_summary
from retinanet.data.dataset import Dataset
from retinanet.data.loading import default_workers
from retinanet.data.memory import Reader, from_torch
from retinanet.data.selection import SINGLE_CLASS, select_as_trained, select_classes
from retinanet.errors import ConfigError, DataError, WeightsError
from retinanet.evaluation.coco import MAX_DETECTIONS, evaluate_detections, max_detections_for
from retinanet.evaluation.metrics import Metrics
from retinanet.evaluation.predict import Predictions, Progress, run_detector, run_inference
from retinanet.evaluation.results import Results, ground_truth
from retinanet.files import write_atomic
from retinanet.inference.backends import (
    Network,
    Thresholds,
    merge_thresholds,
    network_settings,
    network_workers,
)
from retinanet.inference.detector import Detector, LoadOptions, open_model
from retinanet.inference.exported import ExportedFile, ExportedNetwork
from retinanet.inference.tiles import choose_tiling
from retinanet.model.checkpoint import Checkpoint


class RunOptions(TypedDict, total=False):
    """Options of running a model over a data set; :func:`evaluate` describes them."""

    batch_size: int
    workers: int | None
    tile: int | str | None
    overlap: float | None
    progress: Progress | None


class DetectorOptions(LoadOptions, total=False):
    """Options of :class:`~retinanet.inference.detector.Detector`."""

    device: Any


class EvaluationOptions(DetectorOptions, RunOptions, total=False):
    """Options of a detector and of running it."""


def run_options(options: Mapping[str, Any]) -> RunOptions:
    """Return the :class:`RunOptions` among options."""
    return cast(RunOptions, {k: v for k, v in options.items() if k in RunOptions.__annotations__})


def evaluate(
    model: str | Path | Detector | Checkpoint | Sequence[Mapping[str, Any]],
    data: str | Path | Reader | Dataset | Any,
    *,
    split: str | None = None,
    out: str | Path | None = None,
    max_detections: int | None = None,
    classes: Sequence[str] | None = None,
    **options: Unpack[EvaluationOptions],
) -> Metrics:
    """Evaluate a model, or the COCO results of any detector, on labelled images.

    The classes of model and data are matched by name. Detections of classes that the data lacks
    are ignored. A model that was trained on selected or merged classes is evaluated on the same.
    Images that cannot be read are left out, and named in :attr:`Metrics.unreadable`.

    Args:
        model: a run folder, a checkpoint, an exported file, a ``torchvision/..`` name, a
            :class:`Detector`, or a COCO results file (``.json``) or list, to which `options` do
            not apply.
        data: a labelled folder or file of any format; or a :class:`Dataset` or map-style data set
            as :func:`retinanet.train` takes it, or several by split.
        split: of the data; None is ``val``, or the split of a single file (for results: all of
            it). A split that the data lacks is made as in the model's training.
        out: a folder for ``metrics.json`` and ``results.json`` (:func:`write_results`).
        max_detections: detections per class and image that count. None is COCO's 100, or the
            largest number of objects in an image of the data where that is more. The model's
            ``detections_per_image`` and ``topk_candidates`` are raised to it, unless they are among
            `options`.
        classes: names of the data's classes to evaluate on, with their metrics of an evaluation on
            all; no loss where the model has others. None: all.
        options: ``batch_size`` (4), ``workers`` that load images (None: chosen for this machine),
            ``tile`` and ``overlap`` as in :meth:`Detector.stream` (with tiles, as with exported
            files, no loss), ``progress``, called after each batch, and those of :class:`Detector`;
            for a :class:`Detector` only thresholds have an effect.

    Raises:
        DataError: the data cannot be read, more than a tenth of the images are unreadable, or the
            results do not fit the data.
        WeightsError: the model cannot be read, or lacks classes of objects in the data.
        ConfigError, MissingExtraError: as :class:`Detector`.
    """
    if _is_results(model):
        names = ("precision", "backend", "calibrate")
        if given := [name for name in names if options.get(name) not in (None, "auto")]:
            raise ConfigError(
                f"{', '.join(given)} given for a results file, which is evaluated without a "
                "network: leave it out"
            )
        source: Any = Path(model) if isinstance(model, str) else model
        results = Results.read(source, read_eval_dataset(data, split, for_results=True))
        if classes is not None:
            results = results.of_classes(select_classes(results.dataset, classes))
        dataset = results.dataset
        metrics = evaluate_detections(dataset, results, max_detections=max_detections)
    else:
        detector = open_detector(model, options)
        dataset = read_eval_dataset(data, split, info=detector.info)
        limit, raised = raised_limits(dataset, max_detections, detector)
        if classes is not None:
            dataset = select_classes(dataset, classes)
        changed = raised | {k: v for k, v in options.items() if k in Thresholds.__annotations__}
        loss = detector.info.get("loss")
        if classes is not None and not set(detector.classes) <= set(dataset.classes):
            loss = None  # objects of the other classes would count as background
        predictions = predict(detector, dataset, changed, loss=loss, **run_options(options))
        results = predictions.results
        metrics = predictions.evaluate(max_detections=limit)
    faults = filter(None, [fault_summary(dataset)])
    metrics = replace(metrics, notes=(*dataset.description, *faults))
    if out is not None:
        write_results(out, metrics, results)
    return metrics


def predict(
    detector: Detector,
    dataset: Dataset,
    changed: Mapping[str, Any] | None = None,
    *,
    loss: Mapping[str, Any] | None = None,
    batch_size: int = 4,
    workers: int | None = None,
    tile: int | str | None = None,
    overlap: float | None = None,
    progress: Progress | None = None,
) -> Predictions:
    """Run a detector of any kind over a data set with the thresholds of an evaluation."""
    changed, network = changed or {}, detector.network
    thresholds = merge_thresholds(detector.eval_thresholds, changed)
    label_map = match_classes(detector.classes, dataset)
    options: dict[str, Any] = {
        "batch_size": batch_size, "label_map": label_map, "progress": progress
    }  # fmt: skip
    side, _ = choose_tiling(tile, overlap, detector.image_size, detector.info)
    if side is None and isinstance(network, Network):
        if workers is None:
            # Threads that run the network leave this one free to load.
            workers = 0 if network_workers(network) > 1 else default_workers()
        predictions = run_inference(
            network,
            dataset,
            image_size=detector.image_size,
            max_size=detector.max_size,
            workers=workers,
            loss=loss,
            selected=detector.selected,
            **network_settings(thresholds, detector.classes),
            **options,
        )
    else:
        names = ("score_threshold", "score_thresholds")
        options |= {**changed, **{name: thresholds[name] for name in names}}  # type: ignore[literal-required]
        predictions = run_detector(detector, dataset, tile=tile, overlap=overlap, **options)
    return replace(predictions, detections_per_image=thresholds["detections_per_image"])


def match_classes(classes: Sequence[str], dataset: Dataset) -> tuple[int, ...]:
    """Match a model's classes to a data set's by name.

    Returns:
        For each class of the model its label in the data, -1 where the data lacks the class.

    Raises:
        WeightsError: the data has objects of classes that the model lacks, or two classes of the
            model have the same name.
    """
    if repeated := repeated_names(classes):
        raise WeightsError(
            "classes are matched by name, but several classes of the model are named "
            f"{listed(map(repr, repeated))}: rename them in its model.json"
        )
    labels = {a.label for image in dataset.images for a in image.annotations if not a.ignored}
    missing = [name for label in sorted(labels) if (name := dataset.classes[label]) not in classes]
    if missing:
        raise WeightsError(
            f"the model lacks {len(missing)} classes of objects in {dataset.source} "
            f"({dataset.split}): {listed(map(repr, missing))}; its {len(classes)} classes are "
            f"{listed(map(repr, classes))}; --classes evaluates on some classes only"
        )
    labels_by_name = {name: label for label, name in enumerate(dataset.classes)}
    return tuple(labels_by_name.get(name, -1) for name in classes)


def read_eval_dataset(
    data: str | Path | Reader | Dataset | Any,
    split: str | None = None,
    *,
    info: Mapping[str, Any] | None = None,
    for_results: bool = False,
) -> Dataset:
    """Read the images to evaluate on."""
    if isinstance(data, Mapping):
        if (split or "val") not in data:
            raise DataError(f"the data has no split {split or 'val'!r}: found {', '.join(data)}")
        data = data[split or "val"]
    if not isinstance(data, Dataset | str | Path) and hasattr(data, "__getitem__"):
        data = from_torch(data, split=split or "val")
    if isinstance(data, Dataset):
        return select_as_trained(data, info or {})
    if not callable(data) and not isinstance(data, str | Path):
        raise ConfigError(
            f"data is a {type(data).__name__}: give a path, a data set, or data sets by split"
        )
    path = data if callable(data) else Path(data)
    if split is None:
        is_file = isinstance(path, Path) and path.is_file()
        split = _split_of_file(Path(str(path)), for_results) if is_file else "val"
    made = {} if info is None else info.get("split") or {}
    options = {name: made[name] for name in ("seed", "val_fraction") if made.get(name) is not None}
    dataset = read_dataset(path, split, extras=False, **options)
    if not len(dataset):
        raise DataError(f"{path}: split {dataset.split!r} has no image")
    return select_as_trained(dataset, info or {})


def write_results(folder: str | Path, metrics: Metrics, results: Results) -> None:
    """Write ``metrics.json`` and ``results.json`` (COCO's results format).

    For data of other formats than COCO's, and for merged classes, ``instances.json`` has the labels
    in COCO's format with the image ids of the results, so that any COCO tool can repeat the
    evaluation.
    """
    folder = Path(folder)
    results.write(folder / "results.json")
    if results.dataset.format != "coco" or results.dataset.classes == (SINGLE_CLASS,):
        write_atomic(folder / "instances.json", json.dumps(ground_truth(results.dataset)) + "\n")
    text = json.dumps(metrics.to_dict(), indent=1, allow_nan=False)
    write_atomic(folder / "metrics.json", text + "\n")


def open_detector(model: Any, options: Mapping[str, Any]) -> Detector:
    """Build a detector of a name or a checkpoint; a :class:`Detector` is returned as it is."""
    if isinstance(model, Detector):
        return model
    if not isinstance(model, Checkpoint | ExportedFile):
        model = open_model(model)
    own: Any = {k: v for k, v in options.items() if k not in RunOptions.__annotations__}
    return Detector(model, **own)


def raised_limits(
    dataset: Dataset, max_detections: int | None, detector: Detector
) -> tuple[int, dict[str, Any]]:
    """Return the detections per class and image that count, and the limits that are raised.

    Up to COCO's 100 the model's own limits are kept, unless `max_detections` is given; those of an
    exported file are fixed.
    """
    limit = max_detections_for(dataset) if max_detections is None else max_detections
    fixed = limit <= MAX_DETECTIONS or isinstance(detector.network, ExportedNetwork)
    if max_detections is None and fixed:
        return limit, {}
    limits = ("detections_per_image", "topk_candidates")
    return limit, {name: limit for name in limits if detector.eval_thresholds[name] < limit}  # type: ignore[literal-required]


def _is_results(model: Any) -> bool:
    if isinstance(model, str | Path):
        path = Path(model)
        return path.suffix == ".json" and path.name != "model.json"
    return isinstance(model, Sequence)


def _split_of_file(path: Path, for_results: bool) -> str:
    """Split of a label file: of a training file the validation part, for results all of it."""
    splits = tuple(find_data(path).splits)
    if len(splits) != 1:
        return "val"
    if for_results:
        return "all"
    return "val" if splits[0] in ("", "train", "trainval") else splits[0]
