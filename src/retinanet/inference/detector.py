"""High-level inference API: load a trained model, detect in images."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Unpack, cast

import numpy as np
import torch
from torch import Tensor

from retinanet.config import build_recipe
from retinanet.data.image_files import EncodedImage, network_size
from retinanet.data.images import (
    ImageSource,
    ValueRange,
    check_value_range,
    pad_batch,
    padding_colour,
    resize_to,
)
from retinanet.errors import ConfigError, ImageError
from retinanet.inference.backends import (
    Network,
    Thresholds,
    build_network,
    detect_batch,
    merge_thresholds,
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
from retinanet.inference.sources import Source, find_sources, is_single, iter_sources
from retinanet.inference.tiles import (
    Part,
    Piece,
    check_tiling,
    cut_images,
    merge_parts,
    tile_side,
)
from retinanet.model.checkpoint import Checkpoint, load_checkpoint
from retinanet.model.precision import choose_device
from retinanet.model.retinanet import RetinaNet
from retinanet.structures import Detections

_MAX_FAILURES_WAITING = 64  # failures that wait for a batch to be full


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image at the network's size.

    Attributes:
        pixels: (3, h, w) uint8 RGB, resized for the network.
        size: (height, width) of the original image, pixels.
        original: (3, height, width) uint8 RGB, where it was read at full size and is to be kept.
    """

    pixels: Tensor
    size: tuple[int, int]
    original: Tensor | None = None


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
        thresholds: post-processing settings by name.
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
            thresholds: override those of the checkpoint: ``score_threshold``, ``topk_candidates``
                (per level), ``nms_threshold``, ``detections_per_image``, ``class_agnostic_nms``.

        Raises:
            ConfigError: an unknown device, precision, backend or option, or a value out of range.
            MissingExtraError: the backend is not installed.
        """
        self.image_size, self.max_size = _sizes(checkpoint, image_size, max_size)
        self.thresholds = merge_thresholds(checkpoint.info.get("detect", {}), thresholds)
        self._max_detections = thresholds.get("detections_per_image")  # of an image in tiles
        self.info = checkpoint.info
        self.classes = checkpoint.classes
        self.category_ids = checkpoint.category_ids
        self.network: Network | ExportedNetwork
        if isinstance(checkpoint, ExportedFile):
            check_built_in(
                checkpoint,
                precision=precision,
                backend=backend,
                calibrate=calibrate,
                image_size=self.image_size,
                max_size=self.max_size,
            )
            self.network = ExportedNetwork(checkpoint, choose_exported_device(checkpoint, device))
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

    def detect(
        self,
        source: Any,
        *,
        batch_size: int = 1,
        tile: int | str | None = None,
        overlap: float = 0.2,
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

    def stream(
        self,
        sources: Any,
        *,
        batch_size: int = 1,
        workers: int | None = None,
        tile: int | str | None = None,
        overlap: float = 0.2,
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
                trained on (:func:`retinanet.inference.tiles.tile_side`). None: no tiles.
                ``detections_per_image`` then limits a tile, and the image if it is given here or
                to the detector.
            overlap: share of a tile's side that the next tile covers too, in [0, 1).
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
        if workers is None:
            workers = min(4, os.cpu_count() or 1)
        settings = merge_thresholds(self.thresholds, thresholds)
        check_tiling(tile, overlap)
        side = None if tile is None else tile_side(tile, self.image_size, self.info)
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
        pieces = cut_images(listed, side, overlap)
        given = thresholds.get("detections_per_image")
        max_detections = self._max_detections if given is None else given
        read = partial(self._read, keep_pixels=keep_pixels)
        return self._stream(pieces, read, batch_size, max(1, workers), settings, max_detections)

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
        is_whole = (pixels.shape[-2], pixels.shape[-1]) == size
        return Prepared(resized, size, pixels if keep_pixels and is_whole else None)

    def detect_prepared(
        self, prepared: Sequence[Prepared], **thresholds: Unpack[Thresholds]
    ) -> list[Detections]:
        """Detect in a batch of prepared images.

        Args:
            prepared: results of :meth:`prepare`; none gives an empty list.
            thresholds: override :attr:`thresholds` in this call, unchecked.

        Returns:
            For each image its detections, on the CPU, in pixels of the original image.
        """
        if not prepared:
            return []
        used = Thresholds(**{**self.thresholds, **thresholds})
        if isinstance(self.network, ExportedNetwork):
            reduced = self.network.detect([image.pixels for image in prepared], **used)
            return [
                Detections(
                    to_original(objects.boxes, _sides(image.pixels), image.size),
                    objects.scores,
                    objects.labels,
                )
                for objects, image in zip(reduced, prepared, strict=True)
            ]
        found: list[Detections | None] = [None] * len(prepared)
        for positions in _of_one_padded_size(prepared):
            same = [prepared[position] for position in positions]
            images, sizes = pad_batch([image.pixels for image in same], fill=self._fill)
            original_sizes = torch.tensor([image.size for image in same])
            batch = detect_batch(
                self.network, images.to(self.device), sizes, original_sizes, **used
            )
            for position, objects in zip(positions, batch, strict=True):
                found[position] = Detections(
                    objects.boxes.cpu(), objects.scores.cpu(), objects.labels.cpu()
                )
        return cast(list[Detections], found)

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

    def _stream(
        self,
        pieces: Iterator[Piece | Failure],
        read: Callable[[Piece], _Ready],
        batch_size: int,
        workers: int,
        thresholds: Thresholds,
        max_detections: int | None,
    ) -> Iterator[ImageDetections | Failure]:
        waiting: list[_Ready | Failure] = []
        ready = 0
        for item in _read_ahead(pieces, read, workers=workers, ahead=workers + batch_size):
            waiting.append(item)
            ready += _prepared_of(item) is not None
            # A failure waits only for the images before it, and their number is bounded.
            if ready in (0, batch_size) or len(waiting) - ready > _MAX_FAILURES_WAITING:
                yield from self._detect_waiting(waiting, thresholds, max_detections)
                waiting, ready = [], 0
        yield from self._detect_waiting(waiting, thresholds, max_detections)

    def _calibration(self, sources: Any) -> Iterator[Tensor]:
        """Yield the readable images as the network gets them."""
        for source in find_sources(sources):
            try:
                image = self.prepare(source).pixels
            except ImageError:
                continue  # reported when detection reads it
            yield pad_batch([image], fill=self._fill)[0]

    def _read(self, piece: Piece, *, keep_pixels: bool) -> _Ready:
        image = piece.image
        if image.failure is not None:
            return _Ready(piece, image.failure)
        try:
            return _Ready(piece, self._prepare(piece, keep_pixels))
        except Exception as error:  # any decoder's: it is reported, not swallowed
            return _Ready(piece, image.source.failure(error))

    def _prepare(self, piece: Piece, keep_pixels: bool) -> Prepared:
        windows = piece.image.windows
        if windows is None:
            return self.prepare(piece.image.source, keep_pixels=keep_pixels)
        if piece.window is None:
            sides = network_size(*windows.size, self.image_size, self.max_size)
            return Prepared(windows.reduced(*sides), windows.size)
        pixels = windows.read(piece.window)
        resized, _ = resize_to(pixels, self.image_size, self.max_size)
        return Prepared(resized, _sides(pixels))

    def _detect_waiting(
        self,
        waiting: list[_Ready | Failure],
        thresholds: Thresholds,
        max_detections: int | None,
    ) -> Iterator[ImageDetections | Failure]:
        """Detect in a batch; images in tiles keep `max_detections` boxes (None: all)."""
        ready = [image for image in map(_prepared_of, waiting) if image is not None]
        found = iter(self.detect_prepared(ready, **thresholds))
        for item in waiting:
            if isinstance(item, Failure):
                yield item
                continue
            image, window = item.piece.image, item.piece.window
            if isinstance(item.prepared, Failure):
                image.failure = image.failure or item.prepared
                image.parts.clear()
            else:
                prepared, objects = item.prepared, next(found)
                if window is None and item.piece.last:
                    yield self.image_detections(
                        objects, image.source, prepared.size, prepared.original
                    )
                    continue
                image.parts.append(Part(window, objects))
            if not item.piece.last:
                continue
            if image.failure is not None:
                yield image.failure
                continue
            assert image.windows is not None
            size = image.windows.size
            objects = merge_parts(
                image.parts,
                size,
                nms_threshold=thresholds["nms_threshold"],
                class_agnostic_nms=thresholds["class_agnostic_nms"],
                most=max_detections,
            )
            yield self.image_detections(objects, image.source, size)


def load(
    path_or_name: str | Path,
    device: str | torch.device = "auto",
    *,
    precision: str = "auto",
    backend: str = "auto",
    calibrate: Any = None,
    image_size: int | None = None,
    max_size: int | None = None,
    **thresholds: Unpack[Thresholds],
) -> Detector:
    """Load the detector in a run folder or a checkpoint, or of a published name.

    Args:
        path_or_name: a run folder (its best checkpoint, else its last), a checkpoint folder, the
            model.safetensors in one, an exported ``.onnx``, ``.xml`` or ``.pt2`` (a program: open
            only your own), or ``torchvision/retinanet_resnet50_fpn_v2``.
        device: as in :class:`Detector`, and so are the options that follow.

    Raises:
        WeightsError: there is no checkpoint, or it cannot be used.
        ConfigError, MissingExtraError: as :class:`Detector`.
    """
    return Detector(
        open_model(path_or_name),
        device=device,
        precision=precision,
        backend=backend,
        calibrate=calibrate,
        image_size=image_size,
        max_size=max_size,
        **thresholds,
    )


def open_model(path_or_name: str | Path) -> Checkpoint | ExportedFile:
    """Open what :class:`Detector` is built from, by a name as :func:`load` takes it.

    Raises:
        WeightsError: as :func:`load`.
    """
    if is_exported(path_or_name) and not Path(path_or_name).is_dir():
        return read_exported(path_or_name)
    return load_checkpoint(path_or_name)


@dataclass(frozen=True, slots=True)
class _Ready:
    """A piece that is read and resized, or why it is not."""

    piece: Piece
    prepared: Prepared | Failure


def _prepared_of(item: _Ready | Failure) -> Prepared | None:
    if isinstance(item, _Ready) and isinstance(item.prepared, Prepared):
        return item.prepared
    return None


def _of_one_padded_size(images: Sequence[Prepared]) -> list[list[int]]:
    """Group the positions of images by their height and width padded to multiples of 32.

    Padding reaches the features: padded to the largest of a batch, the scores of an image would
    depend on the other images.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for position, image in enumerate(images):
        divisor = RetinaNet.size_divisor
        padded = tuple(-(-side // divisor) * divisor for side in image.pixels.shape[-2:])
        groups.setdefault(padded, []).append(position)
    return list(groups.values())


def _sides(pixels: Tensor) -> tuple[int, int]:
    return pixels.shape[-2], pixels.shape[-1]


def _read_ahead(
    pieces: Iterator[Piece | Failure],
    read: Callable[[Piece], _Ready],
    *,
    workers: int,
    ahead: int,
) -> Iterator[_Ready | Failure]:
    """Read pieces in threads, in order, at most `ahead` of them before they are needed."""

    def attempt(piece: Piece | Failure) -> _Ready | Failure:
        return piece if isinstance(piece, Failure) else read(piece)

    with ThreadPoolExecutor(workers, thread_name_prefix="read-image") as pool:
        pending: deque[Future[_Ready | Failure]] = deque()
        try:
            pending.extend(pool.submit(attempt, piece) for piece in islice(pieces, ahead))
            while pending:
                first = pending.popleft()
                pending.extend(pool.submit(attempt, piece) for piece in islice(pieces, 1))
                yield first.result()
        finally:
            for future in pending:
                future.cancel()


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
