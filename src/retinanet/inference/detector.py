"""High-level inference API: load a trained model, detect in images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor

from retinanet.config import build_recipe, listed
from retinanet.data.image_files import EncodedImage, network_size
from retinanet.data.images import (
    ImageSource,
    ValueRange,
    check_value_range,
    pad_batch,
    padding_colour,
    resize_to,
)
from retinanet.data.selection import labels_of
from retinanet.errors import ConfigError, ImageError, WeightsError
from retinanet.inference.backends import (
    Network,
    Thresholds,
    build_network,
    detect_batch,
    detection_thresholds,
    group_by,
    map_ahead,
    map_network,
    merge_thresholds,
    network_settings,
    to_original,
)
from retinanet.inference.detections import Failure, ImageDetections
from retinanet.inference.exported import (
    ExportedFile,
    ExportedNetwork,
    check_built_in,
    choose_exported_device,
    is_exported,
    read_exported,
)
from retinanet.inference.sources import Prepared, Source, find_sources, is_single, iter_sources
from retinanet.inference.tiles import Part, Piece, choose_tiling, cut_images, merge_parts
from retinanet.model.checkpoint import Checkpoint, load_checkpoint
from retinanet.model.precision import choose_device
from retinanet.model.retinanet import RetinaNet
from retinanet.structures import Detections

_MAX_FAILURES_WAITING = 64  # failures that wait for a batch to be full


class LoadOptions(Thresholds, total=False):
    """Options of :func:`load`; :class:`Detector` describes them."""

    precision: str
    backend: str
    calibrate: Any
    image_size: int | None
    max_size: int | None


class Detector:
    """A model on its device, ready to detect objects in images. It can be copied and pickled.

    Attributes:
        model: the network, on `device`, in eval mode; missing where `network` is an exported file.
        classes: class names by label.
        category_ids: ids by label in the data that the model was trained on.
        device: where the network runs.
        network: the network with its ``precision``, ``backend`` and ``description``.
        image_size, max_size: shorter side, and maximum of the longer side, in pixels, to which
            images are resized for the network.
        selected: labels that are detected; None: all.
        thresholds: post-processing settings by name.
        eval_thresholds: those of an evaluation, which needs boxes of lower scores.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | ExportedFile,
        *,
        device: str | torch.device = "auto",
        precision: str = "auto",
        backend: str = "auto",
        calibrate: Any = None,
        image_size: int | None = None,
        max_size: int | None = None,
        classes: Sequence[str] | None = None,
        **thresholds: Unpack[Thresholds],
    ) -> None:
        """Move the checkpoint's model to the device and set it to eval mode.

        Args:
            checkpoint: a trained model, or an exported one. The settings built into an exported
                file cannot be changed, except for a higher ``score_threshold`` and fewer
                ``detections_per_image``.
            device: a torch device; ``auto`` is the first available of CUDA, MPS and CPU.
            precision: ``auto`` is bf16 on hardware with bf16 units, else float32; or ``float32``,
                ``bf16``, ``fp16``, ``int8``.
            backend: ``auto``, ``torch``, ``compile`` or ``openvino``
                (:mod:`retinanet.inference.backends`).
            calibrate: for int8: images as :meth:`detect` takes them, of the kind that detection
                will run on; the first 300 are used.
            image_size: None is the training size; larger finds smaller objects.
            max_size: None is the training size, scaled with `image_size`.
            classes: names of the classes to detect, as if the model had no others (an exported file
                applies its limits to all classes first); None: all.
            thresholds: override those of the checkpoint: ``score_threshold`` (of all classes, or
                ``score_thresholds`` by class name), ``topk_candidates`` (per level), ``nms``,
                ``nms_threshold``, ``nms_sigma``, ``detections_per_image``, ``class_agnostic_nms``,
                ``temperature``, ``flip_tta``. Without a score threshold each class has the one of
                the best F1 in validation, else .3.

        Raises:
            ConfigError: an unknown device, precision, backend, class or option, or a value out of
                range.
            MissingExtraError: the backend is not installed.
        """
        self.image_size, self.max_size = _sizes(checkpoint, image_size, max_size)
        stored = checkpoint.info.get("detect", {})
        self.thresholds = detection_thresholds(stored, thresholds)
        network_settings(self.thresholds, checkpoint.classes)  # checks the names of classes
        self.eval_thresholds = merge_thresholds({**stored, "score_thresholds": {}}, thresholds)
        self._max_detections = thresholds.get("detections_per_image")  # of an image in tiles
        self.info = checkpoint.info
        self.classes = checkpoint.classes
        self.category_ids = checkpoint.category_ids
        self.selected = None if classes is None else labels_of(classes, self.classes, "the model")
        self.network: Network | ExportedNetwork
        if isinstance(checkpoint, ExportedFile):
            check_built_in(
                checkpoint,
                calibrate,
                precision=precision,
                backend=backend,
                image_size=self.image_size,
                max_size=self.max_size,
            )
            self.network = ExportedNetwork(checkpoint, choose_exported_device(checkpoint, device))
            self.network.check(self.eval_thresholds)
            self.network.check(self.thresholds)
            self.device = self.network.device
            return
        self.device = choose_device(device)
        self.model = checkpoint.model.eval().to(self.device)
        self._fill = padding_colour(self.model.pixel_mean)
        self.network = build_network(
            self.model,
            self.device,
            precision=precision,
            backend=backend,
            calibration=None if calibrate is None else self._calibration(calibrate),
        )

    def __repr__(self) -> str:
        details = f"images of {self.image_size} px; {self.network.description}"
        return f"Detector({listed(self.classes)}; {details})"

    def detect(
        self,
        source: Any,
        *,
        batch_size: int = 1,
        tile: int | str | None = None,
        overlap: float | None = None,
        value_range: ValueRange | None = None,
        **thresholds: Unpack[Thresholds],
    ) -> ImageDetections | list[ImageDetections]:
        """Detect objects in one image or several.

        Args:
            source: as :func:`retinanet.inference.sources.find_sources` takes it: a path, a folder,
                a glob, an array (RGB, not OpenCV's BGR), a tensor, a PIL image, the bytes of an
                image file, or a list of them.
            batch_size: images per batch of the network; images of another padded size go in a batch
                of their own, so no result depends on this number.
            tile, overlap: as in :meth:`stream`: detect in tiles of huge images too.
            value_range: the values of black and of full intensity, where
                :func:`retinanet.data.images.read_image` cannot infer them.
            thresholds: override :attr:`thresholds` in this call.

        Returns:
            :class:`ImageDetections` for one image; a list for a folder, a glob, a batch or a list.

        Raises:
            DataError: a path does not exist, a folder or glob holds no image, a type is unknown.
            ImageError: an image cannot be read (:meth:`stream` reports it and goes on).
            ConfigError: an unknown option, or a value out of range.
        """
        found = []
        for result in self.stream(
            find_sources(source),
            batch_size=batch_size,
            tile=tile,
            overlap=overlap,
            value_range=value_range,
            **thresholds,
        ):
            if isinstance(result, Failure):
                raise result.error
            found.append(result)
        return found[0] if is_single(source) else found

    __call__ = detect

    def stream(
        self,
        sources: Any,
        *,
        batch_size: int = 1,
        workers: int | None = None,
        tile: int | str | None = None,
        overlap: float | None = None,
        value_range: ValueRange | None = None,
        keep_pixels: bool = False,
        **thresholds: Unpack[Thresholds],
    ) -> Iterator[ImageDetections | Failure]:
        """Detect in any number of images, with memory that does not grow with their number.

        Images are read ahead in threads while the network runs. An image that cannot be read gives
        a :class:`Failure` in its position and does not affect the others.

        Args:
            sources: as in :meth:`detect`, or an endless iterable of such.
            batch_size: images, or tiles, per batch of the network.
            workers: threads that read ahead; None is one per processor, four at most.
            tile: also detect in tiles of this side in pixels, for images whose objects are too
                small in the resized image; ``auto``: the side of the images that the model was
                trained on (:func:`retinanet.inference.tiles.tile_side`); ``none``: no tiles. None:
                no tiles, but those of its training for a model trained on tiles (``data.tile``).
                ``detections_per_image`` then limits a tile, and the image if it is given here or
                to the detector.
            overlap: fraction of a tile's side that the next tile covers too, in [0, 1). None: as
                in training on tiles, else .2.
            value_range: as in :meth:`detect`.
            keep_pixels: keep an image that was read at full size in
                :attr:`ImageDetections.pixels`, so that drawing does not read it again.
            thresholds: as in :meth:`detect`.

        Yields:
            For each image, in order, its detections or why there are none.

        Raises:
            DataError: `sources` is a single path, folder or glob without an image.
            ConfigError: an unknown option, or a value out of range.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size {batch_size} is under 1")
        settings = merge_thresholds(self.thresholds, thresholds)
        side, overlap = choose_tiling(tile, overlap, self.image_size, self.info)
        check_value_range(value_range)
        is_item = isinstance(sources, str | EncodedImage | Tensor | np.ndarray)
        if isinstance(sources, Iterable) and not is_item:
            listed = iter_sources(sources)
        else:
            listed = iter(find_sources(sources))
        if value_range is not None:
            listed = (
                replace(source, value_range=value_range) if isinstance(source, Source) else source
                for source in listed
            )
        given = thresholds.get("detections_per_image")
        max_detections = self._max_detections if given is None else given
        workers = max(1, min(4, os.cpu_count() or 1) if workers is None else workers)
        pieces = map_ahead(
            partial(self._read, keep_pixels=keep_pixels),
            cut_images(listed, side, overlap),
            workers,
            ahead=batch_size,
        )
        batches = map_network(
            self.network, partial(self._detect_batch, settings), _batches(pieces, batch_size)
        )
        return (
            result
            for batch in batches
            for result in self._merge_pieces(batch, settings, max_detections)
        )

    def prepare(self, image: Source | ImageSource, *, keep_pixels: bool = False) -> Prepared:
        """Read and resize an image for :meth:`detect_prepared`; several threads may call this.

        Args:
            image: as :func:`retinanet.data.images.read_image` takes it, or a source.
            keep_pixels: as in :meth:`stream`.

        Raises:
            ImageError: it cannot be read.
        """
        source = image if isinstance(image, Source) else Source(image, "image")
        pixels, size = source.read_reduced(self.image_size, self.max_size)
        resized, _ = resize_to(pixels, self.image_size, self.max_size, size)
        return Prepared(resized, size, pixels if keep_pixels and _sides(pixels) == size else None)

    def detect_prepared(
        self, prepared: Sequence[Prepared], **thresholds: Unpack[Thresholds]
    ) -> list[Detections]:
        """Detect in a batch of prepared images.

        Args:
            prepared: results of :meth:`prepare`; none gives an empty list.
            thresholds: override :attr:`thresholds` in this call.

        Returns:
            For each image its detections, on the CPU, in pixels of the original image.

        Raises:
            ConfigError: an unknown option, or a value out of range.
        """
        used = merge_thresholds(self.thresholds, thresholds)
        images = [image.pixels for image in prepared]
        if isinstance(self.network, ExportedNetwork):
            return [
                self._scale_and_select(objects, image)
                for objects, image in zip(
                    self.network.detect(images, **used), prepared, strict=True
                )
            ]
        found: dict[int, Detections] = {}
        # Padding affects the features: padded to the largest image of a batch, the scores of an
        # image would depend on the others.
        divisor = RetinaNet.size_divisor
        for indices in group_by(images, lambda x: tuple(-(-side // divisor) for side in _sides(x))):
            batch, sizes = pad_batch([images[i] for i in indices], fill=self._fill)
            original_sizes = torch.tensor([prepared[i].size for i in indices])
            results = detect_batch(
                self.network,
                batch.to(self.device),
                sizes,
                original_sizes,
                selected=self.selected,
                **network_settings(used, self.classes),
            )
            for i, objects in zip(indices, results, strict=True):
                found[i] = Detections(
                    objects.boxes.cpu(), objects.scores.cpu(), objects.labels.cpu()
                )
        return [found[i] for i in range(len(prepared))]

    def _scale_and_select(self, objects: Detections, image: Prepared) -> Detections:
        """Scale the detections of an exported file to the original image, and select classes."""
        boxes = to_original(objects.boxes, _sides(image.pixels), image.size)
        if self.selected is None:
            return Detections(boxes, objects.scores, objects.labels)
        kept = torch.isin(objects.labels, torch.tensor(self.selected))
        return Detections(boxes[kept], objects.scores[kept], objects.labels[kept])

    def image_detections(
        self,
        objects: Detections,
        source: Source,
        size: tuple[int, int],
        pixels: Tensor | None = None,
    ) -> ImageDetections:
        """Combine the detections of an image of `size` (height, width) with its metadata."""
        return ImageDetections(
            boxes=objects.boxes,
            scores=objects.scores,
            labels=objects.labels,
            classes=self.classes,
            category_ids=self.category_ids,
            name=source.name,
            size=size,
            image=source.image,
            value_range=source.value_range,
            pixels=pixels,
        )

    def _calibration(self, sources: Any) -> Iterator[Tensor]:
        """Yield the readable images as the network gets them."""
        for source in find_sources(sources):
            try:
                image = self.prepare(source).pixels
            except ImageError:
                continue  # reported when detection reads it
            yield pad_batch([image], fill=self._fill)[0]

    def _read(self, piece: Piece, *, keep_pixels: bool) -> Piece:
        """Read and resize a piece; a failure is recorded in its image."""
        image = piece.image
        if image.failure is not None:
            return piece
        try:
            if image.windows is None:
                piece.prepared = self.prepare(image.source, keep_pixels=keep_pixels)
            elif piece.window is not None:
                piece.prepared = self.prepare(image.windows.read(piece.window))
            else:
                size = image.windows.size
                sides = network_size(*size, self.image_size, self.max_size)
                piece.prepared = Prepared(image.windows.reduced(*sides), size)
        except Exception as error:  # whatever a decoder raises: it is reported, not swallowed
            image.failure = image.source.failure(error)
        return piece

    def _detect_batch(self, thresholds: Thresholds, batch: list[Piece]) -> list[Piece]:
        """Detect in the pieces that could be read."""
        images = [piece.prepared for piece in batch if piece.prepared is not None]
        results = iter(self.detect_prepared(images, **thresholds))
        for piece in batch:
            if piece.prepared is not None:
                piece.objects = next(results)
        return batch

    def _merge_pieces(
        self, batch: list[Piece], thresholds: Thresholds, max_detections: int | None
    ) -> Iterator[ImageDetections | Failure]:
        """Merge detections of pieces; images in tiles keep `max_detections` boxes (None: all)."""
        for piece in batch:
            image = piece.image
            if piece.objects is not None:
                image.parts.append(Part(piece.window, piece.objects))
            if image.failure is not None:
                image.parts.clear()
            if not piece.is_last:
                continue
            if image.failure is not None:
                yield image.failure
                continue
            if image.windows is None:
                assert piece.prepared is not None
                size, pixels = piece.prepared.size, piece.prepared.original
                objects = image.parts[0].objects
            else:
                # Tiles are merged by hard NMS, for which another kind's threshold is not meant.
                hard = merge_thresholds(thresholds, {"nms": "hard"})
                objects = merge_parts(
                    image.parts,
                    image.windows.size,
                    nms_threshold=hard["nms_threshold"],
                    class_agnostic_nms=thresholds["class_agnostic_nms"],
                    max_detections=max_detections,
                )
                size, pixels = image.windows.size, None
            yield self.image_detections(objects, image.source, size, pixels)


def load(
    path_or_name: str | Path,
    device: str | torch.device = "auto",
    *,
    classes: Sequence[str] | None = None,
    **options: Unpack[LoadOptions],
) -> Detector:
    """Load the detector in a run folder or a checkpoint, or of a published name.

    Args:
        path_or_name: a run folder (its best checkpoint, else its last), a checkpoint folder, the
            model.safetensors in one, an exported ``.onnx``, ``.xml`` or ``.pt2`` (a program: open
            only your own), ``coco`` (torchvision's detector, downloaded once), or another name of
            :func:`retinanet.load_checkpoint`.
        device, classes: as in :class:`Detector`.
        options: ``precision``, ``backend``, ``calibrate``, ``image_size``, ``max_size`` and the
            thresholds of :class:`Detector`.

    Raises:
        WeightsError: there is no checkpoint, or it cannot be used.
        ConfigError, MissingExtraError: as :class:`Detector`.
    """
    return Detector(open_model(path_or_name), device=device, classes=classes, **options)


def open_model(path_or_name: str | Path) -> Checkpoint | ExportedFile:
    """Open what :class:`Detector` is built from, by a name as :func:`load` takes it."""
    if not isinstance(path_or_name, str | Path):
        raise WeightsError(
            f"a detector is loaded by its path or name, got {type(path_or_name).__name__}; save a "
            "network with rn.save_checkpoint, or call its detect"
        )
    if is_exported(path_or_name) and not Path(path_or_name).is_dir():
        return read_exported(path_or_name)
    return load_checkpoint(path_or_name)


def _batches(pieces: Iterator[Piece], batch_size: int) -> Iterator[list[Piece]]:
    """Group pieces into batches of `batch_size` readable ones."""
    batch: list[Piece] = []
    for piece in pieces:
        batch.append(piece)
        ready = sum(piece.prepared is not None for piece in batch)
        # Failures wait only for the images before them, and their number is bounded.
        if ready in (0, batch_size) or len(batch) - ready > _MAX_FAILURES_WAITING:
            yield batch
            batch = []
    if batch:
        yield batch


def _sides(pixels: Tensor) -> tuple[int, int]:
    return pixels.shape[-2], pixels.shape[-1]


def _sizes(
    checkpoint: Checkpoint | ExportedFile, image_size: int | None, max_size: int | None
) -> tuple[int, int]:
    """Sides of the checkpoint unless given; a new shorter side scales the longer one."""
    shorter = checkpoint.image_size if image_size is None else image_size
    if max_size is None:
        max_size = round(checkpoint.max_size * shorter / checkpoint.image_size)
    data = build_recipe(
        {"data": {"image_size": shorter, "max_size": max_size}}, "detector options"
    ).data
    return data.image_size, data.max_size
