"""A trained model as a person uses it: an image in, what is found in it out."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Unpack, cast

import numpy as np
import torch
from torch import Tensor

from retinanet.config import build_recipe
from retinanet.data.images import (
    EncodedImage,
    ImageSource,
    ValueRange,
    check_value_range,
    network_size,
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

_MOST_BROKEN = 64  # images or tiles that wait for a batch to be full


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image as the network takes it.

    Attributes:
        pixels: (3, h, w) uint8 RGB at the network's size.
        size: (height, width) of the whole image, pixels.
    """

    pixels: Tensor
    size: tuple[int, int]


class Detector:
    """A model on its device, with everything needed to search images.

    Attributes:
        model: the network, on `device`, in eval mode; not there where `network` is an exported
            file.
        classes: class names by label.
        category_ids: the ids by label of the data that the model was trained on.
        device: where the network runs.
        network: what runs it: its ``precision``, ``backend`` and ``description`` say how.
        image_size, max_size: pixels of the shorter side and at most of the longer side to which
            images are resized for the network.
        thresholds: what becomes of the scores, by name.
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
        """Take over the checkpoint's model: it is moved to the device and set to eval mode.

        Args:
            checkpoint: a trained model, or one that was exported: what is built into such a file
                can be asked for and not changed, but for a higher ``score_threshold`` and fewer
                ``detections_per_image``.
            device: a torch device; ``auto`` is the first there is of CUDA, MPS and the CPU.
            precision: ``auto`` is bf16 where the hardware has units for it, else float32; or
                ``float32``, ``bf16``, ``fp16``, ``int8``.
            backend: ``auto``, ``torch``, ``compile`` or ``openvino``
                (:mod:`retinanet.inference.backends`).
            calibrate: for int8: images as :meth:`detect` takes them, of the kind that will be
                searched; 300 of them are looked at.
            image_size: None is what the model was trained with; larger finds smaller objects.
            max_size: None is what the model was trained with, and grown with `image_size`.
            thresholds: laid over those of the checkpoint: ``score_threshold``,
                ``topk_candidates`` (a level), ``nms_threshold``, ``detections_per_image``,
                ``class_agnostic_nms``.

        Raises:
            ConfigError: an unknown device, precision, backend or option, or a value out of range.
            MissingExtraError: the backend is not installed.
        """
        self.image_size, self.max_size = _sizes(checkpoint, image_size, max_size)
        self.thresholds = _thresholds(checkpoint.info.get("detect", {}), thresholds)
        self._most = thresholds.get("detections_per_image")  # of an image in tiles
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
            calibration=None if calibrate is None else self._images(calibrate),
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
        """Search one image or several.

        Args:
            source: what :func:`retinanet.inference.sources.find_sources` takes: a path, a folder, a
                glob, an array (RGB, not OpenCV's BGR), a tensor, a PIL image, the bytes of a
                image file, or a list of them.
            batch_size: images that the network takes at once, where they have the same size for it:
                others go in batches of their own, so that no result depends on this number.
            tile, overlap: as in :meth:`stream`: search huge images in tiles too.
            value_range: the values of black and of full intensity of the images, where
                :func:`retinanet.data.images.read_image` cannot know them.
            thresholds: laid over :attr:`thresholds` for this call.

        Returns:
            :class:`ImageDetections` for one image; a list for a folder, a glob, a batch or a list.

        Raises:
            DataError: a path does not exist, a folder or glob holds no image, a type is unknown.
            ImageError: an image cannot be read (:meth:`stream` names it and goes on).
            ConfigError: an unknown option, or a value out of range.
        """
        found = []
        for one in self.stream(
            find_sources(source),
            batch_size=batch_size,
            tile=tile,
            overlap=overlap,
            value_range=value_range,
            **thresholds,
        ):
            if isinstance(one, Failure):
                raise one.error
            found.append(one)
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
        **thresholds: Unpack[Thresholds],
    ) -> Iterator[ImageDetections | Failure]:
        """Search any number of images in memory that does not grow with their number.

        Images are read ahead in threads while the network runs. One that cannot be read comes out
        as a :class:`Failure` in its place; the others are not touched by it.

        Args:
            sources: as in :meth:`detect`, or an endless iterable of such.
            batch_size: images, or tiles, that the network takes at once.
            workers: threads that read ahead; None is one a processor, four at the most.
            tile: also search each image in tiles of so many pixels, as an image with objects
                too small for the whole wants it; ``auto``: as large as the images that the model
                was trained on (:func:`retinanet.inference.tiles.tile_side`). None: the whole alone.
                ``detections_per_image`` then counts for a tile, and for an image if it is given
                here or to the detector.
            overlap: share of a tile's side that the next tile has too, in [0, 1).
            value_range: as in :meth:`detect`.
            thresholds: as in :meth:`detect`.

        Yields:
            For each image, in order, what was found or why nothing could be.

        Raises:
            DataError: `sources` is a single path, folder or glob that stands for no image.
            ConfigError: an unknown option, or a value out of range.
        """
        if batch_size < 1:
            raise ConfigError(f"batch_size {batch_size} is under 1")
        if workers is None:
            workers = min(4, os.cpu_count() or 1)
        settings = _thresholds(self.thresholds, thresholds)
        check_tiling(tile, overlap)
        side = None if tile is None else tile_side(tile, self.image_size, self.info)
        check_value_range(value_range)
        one_thing = isinstance(sources, str | EncodedImage | Tensor | np.ndarray)
        if isinstance(sources, Iterable) and not one_thing:
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
        most = self._most if given is None else given
        return self._stream(pieces, batch_size, max(1, workers), settings, most)

    def prepare(self, image: Source | ImageSource) -> Prepared:
        """Read and resize one image for :meth:`search`; may be called from several threads.

        Raises:
            ImageError: it cannot be read.
        """
        source = image if isinstance(image, Source) else Source(image, "image")
        pixels, size = source.read_reduced(self.image_size, self.max_size)
        resized, _ = resize_to(pixels, self.image_size, self.max_size, size)
        return Prepared(resized, size)

    def search(
        self, prepared: Sequence[Prepared], **thresholds: Unpack[Thresholds]
    ) -> list[Detections]:
        """Search a batch of prepared images at once.

        Args:
            images: as :meth:`prepare` makes them; none gives an empty list.
            thresholds: laid over :attr:`thresholds` for this call, unchecked.

        Returns:
            For each what was found, on the CPU, in the pixels of the whole image.
        """
        if not prepared:
            return []
        if isinstance(self.network, ExportedNetwork):
            laid = {**self.thresholds, **thresholds}
            reduced = self.network.find([one.pixels for one in prepared], **laid)
            return [
                Detections(
                    to_original(of.boxes, (one.pixels.shape[1], one.pixels.shape[2]), one.size),
                    of.scores,
                    of.labels,
                )
                for of, one in zip(reduced, prepared, strict=True)
            ]
        used = Thresholds(**{**self.thresholds, **thresholds})
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

    def found(self, objects: Detections, source: Source, size: tuple[int, int]) -> ImageDetections:
        """`objects` of an image of `size` (height, width) with all that a person wants to know."""
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
        )

    def _stream(
        self,
        pieces: Iterator[Piece | Failure],
        batch_size: int,
        workers: int,
        thresholds: Thresholds,
        most: int | None,
    ) -> Iterator[ImageDetections | Failure]:
        waiting: list[_Ready | Failure] = []
        ready = 0
        for one in _read_ahead(pieces, self._read, workers=workers, ahead=workers + batch_size):
            waiting.append(one)
            ready += _to_search(one) is not None
            # What is broken waits for nothing but what is before it, and not without end.
            if ready in (0, batch_size) or len(waiting) - ready > _MOST_BROKEN:
                yield from self._search(waiting, thresholds, most)
                waiting, ready = [], 0
        yield from self._search(waiting, thresholds, most)

    def _images(self, sources: Any) -> Iterator[Tensor]:
        """Those that can be read, one by one as the network gets them."""
        for source in find_sources(sources):
            try:
                image = self.prepare(source).pixels
            except ImageError:
                continue  # named when it is searched
            yield pad_batch([image], fill=self._fill)[0]

    def _read(self, piece: Piece) -> _Ready:
        image = piece.image
        if image.failure is not None:
            return _Ready(piece, image.failure)
        try:
            return _Ready(piece, self._prepare(piece))
        except Exception as error:  # whatever a decoder raises: it is reported, not swallowed
            return _Ready(piece, image.source.failure(error))

    def _prepare(self, piece: Piece) -> Prepared:
        windows = piece.image.windows
        if windows is None:
            return self.prepare(piece.image.source)
        if piece.window is None:
            sides = network_size(*windows.size, self.image_size, self.max_size)
            return Prepared(windows.reduced(*sides), windows.size)
        pixels = windows.read(piece.window)
        resized, _ = resize_to(pixels, self.image_size, self.max_size)
        return Prepared(resized, (pixels.shape[-2], pixels.shape[-1]))

    def _search(
        self, waiting: list[_Ready | Failure], thresholds: Thresholds, most: int | None
    ) -> Iterator[ImageDetections | Failure]:
        """`most` boxes of an image in tiles are kept; None: all."""
        ready = [one for one in map(_to_search, waiting) if one is not None]
        found = iter(self.search(ready, **thresholds))
        for one in waiting:
            if isinstance(one, Failure):
                yield one
                continue
            image, window = one.piece.image, one.piece.window
            if isinstance(one.prepared, Failure):
                image.failure = image.failure or one.prepared
                image.parts.clear()
            else:
                size, objects = one.prepared.size, next(found)
                if one.piece.window is None and one.piece.last:
                    yield self.found(objects, image.source, size)
                    continue
                image.parts.append(Part(window, objects))
            if not one.piece.last:
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
                most=most,
            )
            yield self.found(objects, image.source, size)


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
    """The detector in a run folder, a checkpoint, or of a published name.

    Args:
        path_or_name: a run folder (its best checkpoint, else its last), a checkpoint folder, the
            model.safetensors in one, an exported ``.onnx``, ``.xml`` or ``.pt2`` (which is a
            program: open your own alone), or ``torchvision/retinanet_resnet50_fpn_v2``.
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
    """What :class:`Detector` is built from, of a name as :func:`load` takes it.

    Raises:
        WeightsError: as :func:`load`.
    """
    if is_exported(path_or_name) and not Path(path_or_name).is_dir():
        return read_exported(path_or_name)
    return load_checkpoint(path_or_name)


@dataclass(frozen=True, slots=True)
class _Ready:
    """A piece read and resized, or why it is not."""

    piece: Piece
    prepared: Prepared | Failure


def _of_one_padded_size(images: Sequence[Prepared]) -> list[list[int]]:
    """Positions of the images by their height and width padded to multiples of 32.

    Padding reaches the features: padded to the largest of a batch, the scores of an image would
    depend on the other images.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for position, image in enumerate(images):
        divisor = RetinaNet.size_divisor
        padded = tuple(-(-side // divisor) * divisor for side in image.pixels.shape[-2:])
        groups.setdefault(padded, []).append(position)
    return list(groups.values())


def _to_search(one: _Ready | Failure) -> Prepared | None:
    if isinstance(one, _Ready) and isinstance(one.prepared, Prepared):
        return one.prepared
    return None


def _read_ahead(
    pieces: Iterator[Piece | Failure],
    read: Callable[[Piece], _Ready],
    *,
    workers: int,
    ahead: int,
) -> Iterator[_Ready | Failure]:
    """Read pieces in threads, `ahead` of them at the most before they are asked for; in order."""

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
            for one in pending:
                one.cancel()


def _sizes(
    checkpoint: Checkpoint | ExportedFile, image_size: int | None, max_size: int | None
) -> tuple[int, int]:
    """Those of the checkpoint unless given; a new shorter side takes the longer with it."""
    shorter = checkpoint.image_size if image_size is None else image_size
    if max_size is None:
        max_size = round(checkpoint.max_size * shorter / checkpoint.image_size)
    data = build_recipe(
        {"data": {"image_size": shorter, "max_size": max_size}}, "detector options"
    ).data
    return data.image_size, data.max_size


def _thresholds(known: Any, given: Thresholds) -> Thresholds:
    """`given` laid over `known`, checked; None keeps what is known."""
    laid = dict(known) | {name: value for name, value in given.items() if value is not None}
    checked = build_recipe({"detect": laid}, "detector options").detect
    return cast(Thresholds, checked.model_dump())
