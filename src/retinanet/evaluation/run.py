"""A model, or the results of one, judged on a labelled data set."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor

from retinanet.anchors import level_anchors
from retinanet.config import LossSettings, repeated_names
from retinanet.data import find_format, read_dataset
from retinanet.data.dataset import Dataset
from retinanet.data.formats import FORMATS
from retinanet.data.images import padding_colour
from retinanet.data.loading import default_workers, eval_loader
from retinanet.errors import ConfigError, DataError, WeightsError
from retinanet.evaluation.coco import MAX_DETECTIONS, evaluate_detections, max_detections_for
from retinanet.evaluation.metrics import Metrics
from retinanet.evaluation.results import Results, ground_truth
from retinanet.files import write_atomic
from retinanet.inference.backends import Network, Thresholds, build_network, detections_of
from retinanet.inference.detections import Failure
from retinanet.inference.detector import Detector, open_model
from retinanet.inference.exported import ExportedFile, ExportedNetwork
from retinanet.losses.detection import detection_losses
from retinanet.model.checkpoint import Checkpoint
from retinanet.model.precision import choose_device
from retinanet.model.retinanet import RetinaNet
from retinanet.structures import Batch, Detections, Targets, concatenate_batches

_MAX_WAITING = 4
"""Batches of images that wait for others of their padded size."""

Progress = Callable[[int, int], None]
"""Told how many images are done, of how many."""


@dataclass(frozen=True, slots=True)
class Searched:
    """What a model found in a data set.

    Attributes:
        results: the boxes.
        loss, loss_classification, loss_box: as in :class:`Metrics`.
        images_per_second: loading, network and post-processing together.
    """

    results: Results
    loss: float | None
    loss_classification: float | None
    loss_box: float | None
    images_per_second: float


def evaluate(
    model: str | Path | Detector | Checkpoint | Sequence[Mapping[str, Any]],
    data: str | Path | Dataset,
    *,
    split: str | None = None,
    out: str | Path | None = None,
    max_detections: int | None = None,
    batch_size: int = 4,
    workers: int | None = None,
    device: str = "auto",
    precision: str = "auto",
    backend: str = "auto",
    calibrate: Any = None,
    image_size: int | None = None,
    max_size: int | None = None,
    tile: int | str | None = None,
    overlap: float = 0.2,
    seed: int | None = None,
    val_fraction: float | None = None,
    progress: Progress | None = None,
    **thresholds: Unpack[Thresholds],
) -> Metrics:
    """AP and more of a model, or of results that some detector wrote.

    The classes of model and data are matched by name, in whatever order they are. Boxes of classes
    that the data does not have are left out: the data cannot judge them.

    Args:
        model: a run folder, a checkpoint, an exported file, a ``torchvision/..`` name, a
            :class:`Detector`, or a COCO results file (``.json``) or list; what follows from
            `batch_size` on is for models.
        data: a labelled folder or file of any format, or a data set.
        split: which part of the data; None is ``val``, or the split that a file is of (results: all
            of the file).
        out: a folder for ``metrics.json`` and ``results.json`` (:func:`write_results`).
        max_detections: detections per class and image that count. None is COCO's 100, or the
            largest number of objects in an image of the data where that is more. The model's
            ``detections_per_image`` and ``topk_candidates`` are raised to it, unless they are among
            `thresholds`.
        batch_size: images that the network takes at once.
        workers: processes that load images; None: chosen for this machine.
        device, precision, backend, calibrate, image_size, max_size: as in :class:`Detector`.
        tile, overlap: as in :meth:`Detector.stream`; tiles, and exported files, give no loss.
        seed, val_fraction: how a split is made where the data has none; None is as the model was
            trained, so that nothing it has seen is judged.
        progress: told how many images are done.
        thresholds: laid over the model's own.

    Raises:
        DataError: the data cannot be read, or the results do not fit it.
        WeightsError: the model cannot be read, or lacks classes that the data has objects of.
        ConfigError: an unknown device, precision or backend, or a threshold out of range.
        MissingExtraError: the backend is not installed.
        ImageError: an image cannot be read.
    """
    if _is_results(model):
        if (precision, backend, calibrate) != ("auto", "auto", None):
            raise ConfigError(
                "results are judged without a network: leave out precision, backend and calibrate"
            )
        source = Path(model) if isinstance(model, str | Path) else model
        dataset = read_judged(data, split, of_results=True, seed=seed, val_fraction=val_fraction)
        results = Results.read(source, dataset)  # type: ignore[arg-type]
        metrics = evaluate_detections(dataset, results, max_detections=max_detections)
    else:
        checkpoint = open_model(model) if isinstance(model, str | Path) else model
        info: dict[str, Any] = checkpoint.info  # type: ignore[union-attr]
        if isinstance(checkpoint, Checkpoint | ExportedFile):
            detector = Detector(
                checkpoint,
                device=device,
                precision=precision,
                backend=backend,
                calibrate=calibrate,
                image_size=image_size,
                max_size=max_size,
                **thresholds,
            )
        else:
            detector = checkpoint  # type: ignore[assignment]
        made = info.get("split", {})
        dataset = read_judged(
            data,
            split,
            seed=made.get("seed") if seed is None else seed,
            val_fraction=made.get("val_fraction") if val_fraction is None else val_fraction,
        )
        label_map = match_classes(detector.classes, dataset)
        limit, raised = _raised_limits(dataset, max_detections, detector.thresholds)
        if isinstance(detector.network, ExportedNetwork) and max_detections is None:
            raised = {}  # a file gives the detections that were built in, and no more
        changes: dict[str, Any] = {**raised, **thresholds}
        used = Thresholds(**{**detector.thresholds, **changes})  # type: ignore[typeddict-item]
        if tile is None and isinstance(detector.network, Network):
            searched = search(
                detector.network,
                dataset,
                image_size=detector.image_size,
                max_size=detector.max_size,
                batch_size=batch_size,
                workers=default_workers() if workers is None else workers,
                loss=info.get("loss"),
                label_map=label_map,
                progress=progress,
                **used,
            )
        else:
            searched = search_images(
                detector,
                dataset,
                batch_size=batch_size,
                label_map=label_map,
                tile=tile,
                overlap=overlap,
                progress=progress,
                **changes,
            )
        metrics = _judge(searched, limit, used["detections_per_image"])
        results = searched.results
    if out is not None:
        write_results(out, metrics, results)
    return metrics


def evaluate_model(
    model: RetinaNet,
    dataset: Dataset,
    *,
    image_size: int,
    max_size: int,
    batch_size: int = 1,
    workers: int = 0,
    device: str | torch.device = "auto",
    precision: str = "float32",
    loss: Mapping[str, Any] | None = None,
    label_map: Sequence[int] | None = None,
    max_detections: int | None = None,
    progress: Progress | None = None,
    **thresholds: Unpack[Thresholds],
) -> Metrics:
    """AP, validation loss and speed of a model that comes back in the mode in which it was.

    Args:
        model: it is moved to `device`.
        device, precision: as in :mod:`retinanet.inference.backends`.
        max_detections: as in :func:`evaluate`; `thresholds` are raised to it.

    The others are those of :func:`search`.
    """
    limit, raised = _raised_limits(dataset, max_detections, thresholds)
    used = Thresholds(**{**thresholds, **raised})  # type: ignore[typeddict-item]
    was_training = model.training
    try:
        searched = search(
            build_network(model, choose_device(device), precision=precision),
            dataset,
            image_size=image_size,
            max_size=max_size,
            batch_size=batch_size,
            workers=workers,
            loss=loss,
            label_map=label_map,
            progress=progress,
            **used,
        )
    finally:
        model.train(was_training)
    return _judge(searched, limit, used.get("detections_per_image", MAX_DETECTIONS))


def _raised_limits(
    dataset: Dataset, max_detections: int | None, thresholds: Thresholds
) -> tuple[int, dict[str, int]]:
    """How many detections count, and the thresholds raised to let the model give as many.

    Up to COCO's 100 the model's own limits are kept, unless `max_detections` is given.
    """
    limit = max_detections_for(dataset) if max_detections is None else max_detections
    if max_detections is None and limit <= MAX_DETECTIONS:
        return limit, {}
    defaults = {"detections_per_image": MAX_DETECTIONS, "topk_candidates": 1000}
    current = {name: int(thresholds.get(name, value)) for name, value in defaults.items()}  # type: ignore[call-overload]
    return limit, {name: limit for name, value in current.items() if value < limit}


@torch.inference_mode()
def search(
    network: Network,
    dataset: Dataset,
    *,
    image_size: int,
    max_size: int,
    batch_size: int = 1,
    workers: int = 0,
    loss: Mapping[str, Any] | None = None,
    label_map: Sequence[int] | None = None,
    progress: Progress | None = None,
    **thresholds: Unpack[Thresholds],
) -> Searched:
    """Run a model over every image once; images are let go as soon as they are searched.

    Images are padded to a multiple of 32 and batched with others of the same padded size, so
    `batch_size` does not change the results. The loss is that of training on the same forward: its
    mean over images, or, for the normalizers ``batch`` and ``running``, the sum over all images
    divided by all their foreground anchors (with mining that of the boxes alone).

    Args:
        network: as :func:`retinanet.inference.backends.build_network` makes it.
        dataset: the images and their objects.
        image_size, max_size: shorter side, and longer side at most, pixels.
        batch_size: images at once.
        workers: processes that load images; 0: this one.
        loss: fields of :class:`retinanet.config.LossSettings`; None: no loss.
        label_map: the data's label of each label of the model (:func:`match_classes`).
        progress: told how many images are done.
        thresholds: as in :func:`retinanet.inference.backends.detect_batch`.

    Raises:
        ImageError: an image cannot be read.
        DataError: the model says a box or a score that is not a number.
    """
    model = network.model
    results = Results(dataset, label_map)
    sums = None if loss is None else _LossSums(loss, model.num_classes, label_map)
    began = time.perf_counter()
    if len(dataset):
        loader = eval_loader(
            dataset,
            batch_size=1,
            image_size=image_size,
            max_size=max_size,
            workers=workers,
            fill=padding_colour(model.pixel_mean),
        )
        loaded = (batch.to(network.device, non_blocking=True) for batch in loader)
        done = 0
        for batch in batches_of_one_size(loaded, batch_size):
            outputs = network(batch.images)
            if sums is not None:
                shapes = [(one.shape[-2], one.shape[-1]) for one in outputs.logits]
                anchors = level_anchors(model.anchors, shapes, device=network.device)
                sums.add(outputs, anchors, batch)
            found = detections_of(model, outputs, batch.sizes, batch.original_sizes, **thresholds)
            for index, detections in zip(batch.indices.tolist(), found, strict=True):
                results.add(index, detections)
            done += len(found)
            if progress is not None:
                progress(done, len(dataset))
    seconds = time.perf_counter() - began
    classification, box = (None, None) if sums is None else sums.means()
    return Searched(
        results,
        None if classification is None or box is None else classification + box,
        classification,
        box,
        len(dataset) / seconds,
    )


def batches_of_one_size(images: Iterable[Batch], batch_size: int) -> Iterator[Batch]:
    """Join batches of a single image to batches of images with the same padded size.

    Batches come as they fill up, the rest at the end, so images change places;
    :attr:`Batch.indices` keeps track. At most four batches of images are held back: beyond that the
    largest incomplete batch is given.

    Args:
        images: batches of one image each, padded on its own.
        batch_size: images per batch.
    """
    waiting: dict[tuple[int, ...], list[Batch]] = {}
    for image in images:
        same = waiting.setdefault(tuple(image.images.shape), [])
        same.append(image)
        held = sum(map(len, waiting.values()))
        if len(same) < batch_size and held > _MAX_WAITING * batch_size:
            same = max(waiting.values(), key=len)
        if len(same) == batch_size or held > _MAX_WAITING * batch_size:
            yield concatenate_batches(same)
            same.clear()
    for rest in waiting.values():
        if rest:
            yield concatenate_batches(rest)


def search_images(
    detector: Detector,
    dataset: Dataset,
    *,
    batch_size: int = 1,
    label_map: Sequence[int] | None = None,
    tile: int | str | None = None,
    overlap: float = 0.2,
    progress: Progress | None = None,
    **thresholds: Unpack[Thresholds],
) -> Searched:
    """As :func:`search`, through :meth:`Detector.stream` as a person uses it, and without a loss.

    Raises:
        ImageError: an image cannot be read.
        DataError: the detector says a box or a score that is not a number.
    """
    results = Results(dataset, label_map)
    began = time.perf_counter()
    paths = [image.path for image in dataset.images]
    streamed = detector.stream(
        paths, batch_size=batch_size, tile=tile, overlap=overlap, **thresholds
    )
    for index, one in enumerate(streamed):
        if isinstance(one, Failure):
            raise one.error
        results.add(index, Detections(one.boxes, one.scores, one.labels))
        if progress is not None:
            progress(index + 1, len(dataset))
    return Searched(results, None, None, None, len(dataset) / (time.perf_counter() - began))


def match_classes(classes: Sequence[str], dataset: Dataset) -> tuple[int, ...]:
    """The data's label of each class of a model, by name; -1: the data has no such class.

    Raises:
        WeightsError: the data has objects of classes that the model does not know, or several
            classes of the model have the same name.
        DataError: several classes of the data have the same name.
    """
    for what, names, error in (
        ("the model", classes, WeightsError),
        (f"{dataset.source}", dataset.classes, DataError),
    ):
        if repeated := repeated_names(names):
            raise error(
                f"classes are matched by name, and {what} has several named "
                f"{', '.join(map(repr, repeated[:5]))}: rename or merge them"
            )
    held = {one.label for image in dataset.images for one in image.annotations if not one.ignored}
    missing = [
        dataset.classes[label] for label in sorted(held) if dataset.classes[label] not in classes
    ]
    if missing:
        named = ", ".join(repr(name) for name in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise WeightsError(
            f"the model does not know {len(missing)} of the classes that {dataset.source} "
            f"({dataset.split}) has objects of: {named}{more}; "
            f"it knows {len(classes)}: {', '.join(classes[:5])}{', ..' if len(classes) > 5 else ''}"
        )
    labels = {name: label for label, name in enumerate(dataset.classes)}
    return tuple(labels.get(name, -1) for name in classes)


def write_results(folder: str | Path, metrics: Metrics, results: Results) -> None:
    """Write ``metrics.json`` and ``results.json``, COCO's results.

    For data that is not COCO's, ``instances.json`` has the labels in COCO's layout with the image
    ids that the results use, so that any COCO tool can repeat the figures.
    """
    folder = Path(folder)
    results.write(folder / "results.json")
    if results.dataset.format != "coco":
        write_atomic(folder / "instances.json", json.dumps(ground_truth(results.dataset)) + "\n")
    text = json.dumps(metrics.to_dict(), indent=1, allow_nan=False)
    write_atomic(folder / "metrics.json", text + "\n")


def _wide(values: Tensor) -> Tensor:
    """In float64, which Apple's GPUs do not have."""
    return values.float() if values.device.type == "mps" else values.double()


class _LossSums:
    """The loss of a data set from those of its batches.

    The device is waited for once, at the end; with mining at every batch, as that looks at values.
    """

    def __init__(
        self, options: Mapping[str, Any], num_classes: int, label_map: Sequence[int] | None
    ) -> None:
        self._settings = LossSettings(**options)
        self._by_image = self._settings.normalizer == "image"
        # What is mined has its own mean in each image, whatever divides the box loss.
        self._class_by_image = self._by_image or self._settings.mining != "none"
        if not self._by_image:
            self._settings = self._settings.model_copy(update={"normalizer": "batch"})
        self._num_classes = num_classes
        self._model_labels = None if label_map is None else inverse_labels(label_map)
        self._parts: list[Tensor] = []

    def add(self, outputs: Any, anchors: list[Tensor], batch: Batch) -> None:
        targets = batch.targets
        if self._model_labels is not None:
            known = self._model_labels.to(targets.labels.device)
            labels = torch.where(
                targets.labels >= 0, known[targets.labels.clamp(min=0)], targets.labels
            )
            targets = Targets(targets.boxes, labels)
        losses = detection_losses(
            outputs, anchors, targets, num_classes=self._num_classes, settings=self._settings
        )
        count = _wide(losses.foreground.sum())
        images = count.new_tensor(len(batch.images))
        # What the batch's loss was divided by, and what that adds to the whole's divisor.
        by_image, by_anchor = (images, images), (count.clamp(min=1), count)
        class_weight, class_share = by_image if self._class_by_image else by_anchor
        box_weight, box_share = by_image if self._by_image else by_anchor
        self._parts.append(
            _wide(
                torch.stack(
                    [
                        losses.classification * class_weight,
                        class_share,
                        losses.box * box_weight,
                        box_share,
                    ]
                )
            )
        )

    def means(self) -> tuple[float | None, float | None]:
        """Classification and box loss; None where there is no image."""
        if not self._parts:
            return None, None
        sums = torch.stack(self._parts).sum(dim=0).tolist()
        classification, class_share, box, box_share = sums
        return classification / max(1.0, class_share), box / max(1.0, box_share)


def inverse_labels(label_map: Sequence[int]) -> Tensor:
    """(K of the data,) label of the model of each label of the data; classes without one: 0.

    Those have no object that counts (:func:`match_classes` saw to it).
    """
    inverse = torch.zeros(max([*label_map, 0]) + 1, dtype=torch.int64)
    for model_label, label in enumerate(label_map):
        if label >= 0:
            inverse[label] = model_label
    return inverse


def _judge(searched: Searched, max_detections: int, detections_per_image: int) -> Metrics:
    metrics = evaluate_detections(
        searched.results.dataset,
        searched.results,
        max_detections=max_detections,
        detections_per_image=detections_per_image,
    )
    return replace(
        metrics,
        loss=searched.loss,
        loss_classification=searched.loss_classification,
        loss_box=searched.loss_box,
        images_per_second=searched.images_per_second,
    )


def _is_results(model: Any) -> bool:
    if isinstance(model, str | Path):
        path = Path(model)
        return path.suffix == ".json" and path.name != "model.json"
    return isinstance(model, Sequence)


def read_judged(
    data: str | Path | Dataset,
    split: str | None,
    *,
    of_results: bool = False,
    seed: int | None = None,
    val_fraction: float | None = None,
) -> Dataset:
    """The images that something is judged on; arguments and errors as :func:`evaluate`."""
    if isinstance(data, Dataset):
        return data
    path = Path(data)
    if split is None:
        split = _split_of_file(path, of_results) if path.is_file() else "val"
    made: dict[str, Any] = {"seed": seed, "val_fraction": val_fraction}
    known = {name: value for name, value in made.items() if value is not None}
    dataset = read_dataset(path, split, extras=False, **known)
    if not len(dataset):
        raise DataError(f"{path}: split {dataset.split!r} has no image")
    return dataset


def _split_of_file(path: Path, of_results: bool) -> str:
    """What a file of labels stands for: its only split; results are of all that it holds.

    A model is not judged on what it was trained on: of a training file, its held-out part.
    """
    splits = tuple(FORMATS[find_format(path)].read(path, extras=False))
    if len(splits) != 1:
        return "val"
    if of_results:
        return "all"
    return "val" if splits[0] in ("", "train", "trainval") else splits[0]
