"""Run a model over a data set: detections, validation loss and speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from retinanet.config import QUALITY_LOSSES, LossSettings
from retinanet.data.dataset import Dataset
from retinanet.data.images import padding_colour
from retinanet.data.loading import check_unreadable, eval_loader
from retinanet.errors import DataError
from retinanet.evaluation.coco import evaluate_detections
from retinanet.evaluation.metrics import Metrics
from retinanet.evaluation.results import Results
from retinanet.inference.backends import Network, detect_batch, map_network
from retinanet.inference.detections import Failure
from retinanet.inference.detector import Detector
from retinanet.losses.detection import detection_losses
from retinanet.model.retinanet import RetinaNet, output_anchors
from retinanet.structures import Batch, Detections, Outputs, Targets, concatenate_batches

_MAX_PENDING_BATCHES = 4

Progress = Callable[[int, int], None]
"""Called with the number of finished images and the number of all images."""


@dataclass(frozen=True, slots=True)
class Predictions:
    """Output of a model on a data set.

    Attributes:
        results: the detections in the images that could be read.
        unreadable: error message by path of the other images.
        images_per_second: loading, network and post-processing together.
        loss_classification, loss_box: as in :class:`~retinanet.evaluation.metrics.Metrics`.
        detections_per_image: limit of the detector; None: unknown.
    """

    results: Results
    unreadable: Mapping[str, str]
    images_per_second: float
    loss_classification: float | None = None
    loss_box: float | None = None
    detections_per_image: int | None = None

    def evaluate(self, **options: Any) -> Metrics:
        """Compute the metrics; options as for :func:`evaluate_detections`."""
        classification, box = self.loss_classification, self.loss_box
        options = {"detections_per_image": self.detections_per_image, **options}
        return replace(
            evaluate_detections(self.results.dataset, self.results, **options),
            loss=None if classification is None or box is None else classification + box,
            loss_classification=self.loss_classification,
            loss_box=self.loss_box,
            images_per_second=self.images_per_second,
            unreadable=self.unreadable,
        )


@torch.inference_mode()
def run_inference(
    network: Network,
    dataset: Dataset,
    *,
    image_size: int,
    max_size: int,
    batch_size: int = 1,
    workers: int = 0,
    loss: Mapping[str, Any] | None = None,
    label_map: Sequence[int] | None = None,
    selected: Sequence[int] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Predictions:
    """Run a network over every image of a data set once.

    Images are padded to a multiple of 32 and batched with others of the same padded size, so
    `batch_size` does not change the results. The loss is the training loss of the same forward
    pass: its mean over images, or, for the normalizers ``batch`` and ``running``, its sum over all
    images divided by the number of foreground anchors (with mining only that of the boxes).

    Args:
        network: from :func:`retinanet.inference.backends.build_network`.
        dataset: the images and their objects.
        image_size, max_size: shorter side, and maximum of the longer side, pixels.
        batch_size: images per batch.
        workers: processes that load images; 0: none besides this one.
        loss: fields of :class:`retinanet.config.LossSettings`; None: no loss.
        label_map: the data's label of each label of the model (:func:`match_classes`).
        selected: labels to detect; None: all.
        progress: called after each batch.
        settings: of :func:`retinanet.inference.backends.network_settings`.

    Raises:
        DataError: a box or score is NaN or Inf, or more than a tenth of the images are unreadable.
    """
    model = network.model
    losses = None if loss is None else _MeanLoss(loss, model, label_map)

    @torch.inference_mode()  # several threads may call it
    def detect(batch: Batch) -> list[Detections]:
        add_loss = None if losses is None else partial(losses.add, batch)
        sizes = batch.sizes, batch.original_sizes
        options: dict[str, Any] = {"selected": selected, "on_outputs": add_loss, **settings}
        return detect_batch(network, batch.images, *sizes, **options)

    predictions = run_batches(
        detect,
        dataset,
        network=network,
        device=network.device,
        fill=padding_colour(model.pixel_mean),
        image_size=image_size,
        max_size=max_size,
        batch_size=batch_size,
        workers=workers,
        label_map=label_map,
        progress=progress,
    )
    if losses is None:
        return predictions
    classification, box = losses.means()
    return replace(predictions, loss_classification=classification, loss_box=box)


def run_batches(
    detect: Callable[[Batch], list[Detections]],
    dataset: Dataset,
    *,
    device: torch.device,
    batch_size: int,
    network: Network | None = None,
    label_map: Sequence[int] | None = None,
    progress: Progress | None = None,
    **loading: Any,
) -> Predictions:
    """Load every image once, and call `detect` with batches of images of one padded size."""
    collected = _Collector(dataset, label_map, progress)
    images: Iterator[Batch] = iter(())
    if len(dataset):
        loader = eval_loader(dataset, batch_size=1, on_unreadable=collected.skip, **loading)
        images = (image.to(device, non_blocking=True) for image in loader)
    batches = group_by_size(images, batch_size)

    def call(batch: Batch) -> tuple[list[int], list[Detections]]:
        return batch.indices.tolist(), detect(batch)

    for found in map(call, batches) if network is None else map_network(network, call, batches):
        collected.add(*found)
    return collected.predictions()


def run_detector(
    detector: Detector,
    dataset: Dataset,
    *,
    label_map: Sequence[int] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Predictions:
    """Run a detector over a data set: tiles and exported files, without a loss."""
    collected = _Collector(dataset, label_map, progress)
    paths = [image.path for image in dataset.images]
    for index, output in enumerate(detector.stream(paths, **options)):
        if not isinstance(output, Failure):
            boxes = Detections(output.boxes, output.scores, output.labels)
            collected.add([index], [boxes])
        elif isinstance(output.error, DataError):
            collected.skip(index, output.reason)
            check_unreadable(len(collected.unreadable), len(dataset), output.reason)
        else:
            raise output.error
    return collected.predictions()


class _Collector:
    """Detections and unreadable images of a data set, by index."""

    def __init__(
        self, dataset: Dataset, label_map: Sequence[int] | None, progress: Progress | None
    ) -> None:
        self._dataset, self._label_map, self._progress = dataset, label_map, progress
        self._detections: dict[int, Detections] = {}
        self.unreadable: dict[int, str] = {}
        self._start = time.perf_counter()

    def add(self, indices: Sequence[int], detections: Sequence[Detections]) -> None:
        for index, found in zip(indices, detections, strict=True):
            self._detections[index] = found.to("cpu")
        if self._progress is not None:
            done = len(self._detections) + len(self.unreadable)
            self._progress(done, len(self._dataset))

    def skip(self, index: int, message: str) -> None:
        """Leave out an image."""
        self.unreadable[index] = message

    def predictions(self) -> Predictions:
        images = self._dataset.images
        kept = sorted(self._detections)
        dataset = self._dataset
        if self.unreadable:
            dataset = replace(dataset, images=tuple(images[index] for index in kept))
        results = Results(dataset, self._label_map)
        for position, index in enumerate(kept):
            results.add(position, self._detections[index])
        return Predictions(
            results,
            {str(images[index].path): self.unreadable[index] for index in sorted(self.unreadable)},
            len(images) / (time.perf_counter() - self._start),
        )


def group_by_size(images: Iterable[Batch], batch_size: int) -> Iterator[Batch]:
    """Join batches of one image into batches of images with the same padded size.

    The order of the images changes (see :attr:`Batch.indices`). Incomplete batches are kept back
    until they are full, up to four batches of images in all; then the largest is yielded.
    """
    pending: dict[tuple[int, ...], list[Batch]] = {}
    for image in images:
        group = pending.setdefault(tuple(image.images.shape), [])
        group.append(image)
        too_many = sum(map(len, pending.values())) > _MAX_PENDING_BATCHES * batch_size
        if too_many and len(group) < batch_size:
            group = max(pending.values(), key=len)
        if too_many or len(group) == batch_size:
            yield concatenate_batches(group)
            group.clear()
    yield from (concatenate_batches(group) for group in pending.values() if group)


class _MeanLoss:
    """Mean of the loss over a data set; one device sync at the end (with mining, per batch)."""

    def __init__(
        self, options: Mapping[str, Any], model: RetinaNet, label_map: Sequence[int] | None
    ) -> None:
        self._settings = LossSettings(**options)
        self._per_image = self._settings.normalizer == "image"
        # With mining, the class loss is a mean per image, whatever the box loss is divided by.
        self._class_per_image = self._per_image or self._settings.mining != "none"
        if not self._per_image:
            self._settings = self._settings.model_copy(update={"normalizer": "batch"})
        self._model = model
        self._label_map = label_map
        self._sums: dict[int, Tensor] = {}  # by a batch's first image, as threads end in any order

    def add(self, batch: Batch, outputs: Outputs) -> None:
        """Add a batch."""
        targets = batch.targets
        if self._label_map is not None:
            targets = Targets(targets.boxes, to_model_labels(targets.labels, self._label_map))
        losses = detection_losses(
            outputs,
            output_anchors(self._model, outputs),
            targets,
            num_classes=self._model.num_classes,
            settings=self._settings,
        )
        foreground = _float64(losses.foreground.sum())
        images = foreground.new_tensor(len(batch.images))
        # Divisor of the batch's loss, and its part of the divisor of the data set's loss.
        per_image, per_anchor = (images, images), (foreground.clamp(min=1), foreground)
        if self._settings.classification in QUALITY_LOSSES:
            per_anchor = (_float64(losses.normalizer), _float64(losses.normalizer))
        class_divisor, class_count = per_image if self._class_per_image else per_anchor
        box_divisor, box_count = per_image if self._per_image else per_anchor
        class_sum, box_sum = losses.classification * class_divisor, losses.box * box_divisor
        sums = _float64(torch.stack([class_sum, class_count, box_sum, box_count]))
        self._sums[int(batch.indices[0])] = sums

    def means(self) -> tuple[float | None, float | None]:
        """Classification and box loss; None without images."""
        if not self._sums:
            return None, None
        ordered = [self._sums[index] for index in sorted(self._sums)]
        class_sum, class_count, box_sum, box_count = torch.stack(ordered).sum(dim=0).tolist()
        return class_sum / max(1.0, class_count), box_sum / max(1.0, box_count)


def _float64(values: Tensor) -> Tensor:
    """Float64 where the device has it (MPS does not)."""
    return values.float() if values.device.type == "mps" else values.double()


def to_model_labels(labels: Tensor, label_map: Sequence[int]) -> Tensor:
    """Convert labels of the data to those of the model; negative ones (background, ignored) stay.

    Those of classes that the model lacks become 0: :func:`match_classes` makes sure that the data
    has no counted object of such classes.

    Args:
        labels: of any shape.
        label_map: the data's label of each label of the model, -1 for none.
    """
    of_data = torch.tensor([*label_map], dtype=torch.int64)
    known = (of_data >= 0).nonzero().flatten()
    inverse = torch.zeros(max([*label_map, 0]) + 1, dtype=torch.int64)
    inverse[of_data[known]] = known
    return torch.where(labels >= 0, inverse.to(labels.device)[labels.clamp(min=0)], labels)
