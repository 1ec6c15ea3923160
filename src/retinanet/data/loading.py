"""Batches for training and evaluation.

Training reads an endless stream: the permutation of epoch 0, then that of epoch 1, and so on. Step
s of P processes with B images each takes positions s * P * B up to (s + 1) * P * B of it, of which
rank r takes its own B. Every choice is drawn from (seed, epoch, image) or (seed, step), so a batch
depends neither on the step at which the loader was started nor on the number of workers, and the
images of a step do not depend on how many processes share them. With ``data.balance`` the images
of an epoch are drawn from (seed, epoch), rare classes more often (:mod:`retinanet.data.balance`).
With ``data.aspect_ratio_grouping`` a batch has images of similar height / width, which need little
padding.
The images that a mosaic, copy-paste or mixup adds to an image (:mod:`retinanet.data.augment`) are
drawn from its epoch, by its generator.

For data in shards (:mod:`retinanet.data.formats.webdataset`) the order of an epoch may be that of
the shards, shuffled, with the images of a few of them shuffled together.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from retinanet.config import DataConfig
from retinanet.data import archives
from retinanet.data.augment import (
    Mix,
    ReadImage,
    UserTransform,
    draw_mix,
    mix_images,
    user_transform,
)
from retinanet.data.balance import RepeatFactors, balance
from retinanet.data.cache import ImageCache, build_cache, file_numbers
from retinanet.data.cpus import usable_cpus
from retinanet.data.dataset import Dataset, LabelledImage
from retinanet.data.image_files import network_size
from retinanet.data.images import pad_batch, read_image, read_reduced, with_size
from retinanet.data.transforms import Transform
from retinanet.data.windows import Window, read_window
from retinanet.errors import DataError, ImageError
from retinanet.structures import IGNORED, Batch, pad_targets

DIVISOR = 32
"""Height and width of every batch are multiples of it: the coarsest stride of a plain backbone."""


Unreadable = tuple[int, str]
"""Index of an image in its data set, and the error message."""

MAX_UNREADABLE = 0.1
"""Share of a data set's images that may be skipped as unreadable (one image always may)."""

_SORTED_BATCHES = 16  # sorted by aspect ratio together

_MAX_SUBSTITUTES = 100  # images tried in place of an unreadable one

_READ_IN_WINDOWS = (".tif", ".tiff")  # with tiles: not cached, as only the tile is decoded

_RECENT_IMAGES = 64  # with shards, what is mixed into an image is drawn from these before it


class BatchLoader(DataLoader[Batch]):
    """A DataLoader that yields :class:`~retinanet.structures.Batch`.

    Args:
        batches: maps a number to a batch, None or an error, and the unreadable images.
        numbers: of the batches, in order.
        workers: processes that load; 0: this one.
        num_images: images in the data set.
        on_unreadable: called once per image that cannot be read, in this process. None: the first
            one raises :class:`~retinanet.errors.ImageError`, also out of a worker.

    Attributes:
        unreadable: error message of each skipped image by its index in the data set.
        message: a warning for the user, if any: there is no cache.
        end: () int64 number of steps of a training, in shared memory: writing to it moves its last
            steps, which are without mosaic, copy-paste and mixup.
    """

    message: str | None = None
    end: Tensor

    def __init__(
        self,
        batches: TorchDataset[Any],
        numbers: range,
        workers: int,
        num_images: int,
        on_unreadable: Callable[[int, str], None] | None,
    ) -> None:
        if workers and _workers_would_rerun_script():
            warnings.warn(
                "images are loaded in this process, without workers: they would run the script "
                'again; put its code under if __name__ == "__main__":, or set workers to 0',
                stacklevel=3,
            )
            workers = 0
        super().__init__(
            batches,
            batch_size=None,  # an item is a batch already
            sampler=numbers,
            num_workers=workers,
            worker_init_fn=_outlive_sigterm if workers else None,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            prefetch_factor=4 if workers else None,
        )
        self._num_images = num_images
        self._on_unreadable = on_unreadable
        self.unreadable: dict[int, str] = {}

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch, failures in super().__iter__():
            try:
                self._check_unreadable(failures)
                if isinstance(batch, DataError):
                    raise batch
            except DataError:
                # Left to the garbage collector, with the traceback that refers to the workers, each
                # is waited for in vain for five seconds.
                self.close()
                raise
            if batch is not None:
                yield batch

    def close(self) -> None:
        """End the workers now; the garbage collector may leave them until later."""
        self._iterator = None

    def check_worker_number_rationality(self) -> None:
        """Accept more workers than processors: reading from slow storage waits more than it works.

        DataLoader warns of it.
        """

    def _check_unreadable(self, failures: Sequence[Unreadable]) -> None:
        """Record unreadable images."""
        for index, message in failures:
            if self._on_unreadable is None:
                raise ImageError(message)
            if index in self.unreadable:
                continue
            self.unreadable[index] = message
            self._on_unreadable(index, message)
            check_unreadable(len(self.unreadable), self._num_images, message)


def check_unreadable(count: int, total: int, last: str) -> None:
    """Raise a DataError if more than :data:`MAX_UNREADABLE` of the images are unreadable.

    `last` is the error message of one.
    """
    if count > max(1, MAX_UNREADABLE * total) or count == total:
        raise DataError(
            f"too many unreadable images: {count} of {total}, the last: {last}; "
            "run retinanet data check"
        )


def _outlive_sigterm(_: int) -> None:
    """Let a worker run on for 30 s after SIGTERM.

    timeout, systemd and Slurm send it to all processes at once, and the main one needs the worker
    until its step ends.
    """
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def _workers_would_rerun_script() -> bool:
    """Whether a worker process would execute the user's script from its first line.

    Under the start methods spawn and forkserver (macOS, Windows, Linux from Python 3.14 on) a
    worker imports the main module, and multiprocessing raises where that starts workers itself.
    """
    method = multiprocessing.get_start_method(allow_none=True)
    script = str(getattr(sys.modules["__main__"], "__file__", ""))
    if (method or multiprocessing.get_all_start_methods()[0]) == "fork" or script[-3:] != ".py":
        return False
    return "__name__" not in Path(script).read_text("utf-8", errors="replace")


def train_loader(
    dataset: Dataset,
    config: DataConfig,
    *,
    batch_size: int,
    steps: range,
    seed: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    fill: Sequence[float] = (0, 0, 0),
    on_unreadable: Callable[[int, str], None] | None = None,
) -> BatchLoader:
    """Load the batches of `steps`, in order.

    Args:
        dataset: one or more images; those without an object are background.
        config: image sizes, augmentation (:class:`~retinanet.data.transforms.Transform`) and order.
            With ``any_corner`` each image is aligned with a random corner of the batch: a network
            that sees padding only below and at the right misses objects there in images without.
            With the order ``shards`` the shards are shuffled, and the images of ``shard_window``
            shards at a time are shuffled together.
            With ``balance`` an epoch has :func:`~retinanet.data.balance.epoch_size` images.
            With ``aspect_ratio_grouping`` the images of a batch have similar aspect ratios; those
            whose size the labels do not state count as square. With ``rotate90`` all images of a
            batch are rotated by 0 or 180 degrees, or all by 90 or 270.
        batch_size: images per batch and process. May exceed the data set: epochs follow each other
            without a gap.
        steps: the numbers of the batches, such as ``range(start_step, end)`` of a resumed run. The
            last ``close_augmentation * end`` before the end are without mosaic, copy-paste and
            mixup; the end may be changed (:attr:`BatchLoader.end`).
        seed: of order, flips, jitter, crops, colours and multi-scale sides.
        workers: processes that load; 0: this one. See :func:`default_workers`.
        rank, world_size: index of this process, and number of processes.
        fill: RGB of the padding: the model's pixel mean, so that it is about 0 when normalised.
        on_unreadable: called once with index and message of each image that cannot be read, which
            is replaced by the next readable one of its epoch. None: the first one raises.

    Returns:
        A batch per step. Ignored annotations have the label IGNORED; boxes are clipped to the
        image, and dropped if nothing is left. Each process pads to the largest of its own images.
    """
    _check(dataset, batch_size, workers, rank, world_size)
    cache, message = build_cache(dataset, config.cache)
    end = torch.tensor(steps.stop).share_memory_()  # type: ignore[no-untyped-call]
    batches = _TrainBatches(
        _Images(dataset, cache),
        config,
        batch_size,
        seed,
        rank,
        world_size,
        tuple(fill),
        _shard_numbers(dataset) if config.order == "shards" else None,
        _padded_ratios(dataset, config) if config.aspect_ratio_grouping else None,
        balance(dataset, config),
        user_transform(config, len(dataset.classes)),
        end,
    )
    loader = BatchLoader(batches, steps, workers, len(dataset), on_unreadable)
    loader.end = end
    loader.message = message
    return loader


def eval_loader(
    dataset: Dataset,
    *,
    batch_size: int,
    image_size: int,
    max_size: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    fill: Sequence[float] = (0, 0, 0),
    on_unreadable: Callable[[int, str], None] | None = None,
) -> BatchLoader:
    """Load every image once, in the data set's order, resized only.

    Each of several processes loads every `world_size`-th batch, from batch `rank` on. Arguments and
    errors are those of :func:`train_loader`; an unreadable image is left out, and the last batch
    may be smaller.
    """
    _check(dataset, batch_size, workers, rank, world_size)
    batches = _EvalBatches(
        _Images(dataset), Transform(max_size), batch_size, image_size, tuple(fill)
    )
    numbers = range(rank, -(-len(dataset) // batch_size), world_size)
    return BatchLoader(batches, numbers, workers, len(dataset), on_unreadable)


def _check(dataset: Dataset, batch_size: int, workers: int, rank: int, world_size: int) -> None:
    if not len(dataset):
        raise ValueError(f"split {dataset.split!r} of {dataset.source} has no image")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is not 1 or more")
    if workers < 0:
        raise ValueError(f"workers {workers} is not 0 or more")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in 0..world_size - 1 ({world_size - 1})")


def default_workers() -> int:
    """Default number of worker processes that load images for this process.

    The processors that this process may use (affinity and container limits) are divided among the
    processes that train on this machine (LOCAL_WORLD_SIZE). With a GPU each keeps one for itself
    and loads with the others, at most eight; without one the network needs them all, and a single
    worker loads ahead: one core reads images many times faster than the others train on them.
    """
    share = usable_cpus() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if share < 2:
        return 0
    return min(8, share - 1) if torch.cuda.is_available() else 1


class _Images:
    """Files and objects of a data set in one flat buffer.

    A worker process copies each page of memory with a Python object that it touches, and would in
    time hold all annotations itself. A buffer is shared, and quick to send.
    """

    def __init__(self, dataset: Dataset, cache: ImageCache | None = None) -> None:
        self.cache = cache
        self.file_numbers = torch.tensor(file_numbers(dataset))
        records = [_record(image) for image in dataset.images]
        self._buffer = b"".join(records)
        self._ends = torch.tensor([0, *accumulate(map(len, records))])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(
        self, index: int
    ) -> tuple[str | archives.Member, Window | None, Tensor, Tensor]:
        """File, window of it, (M, 4) boxes in pixels of the window on disk, and (M,) labels."""
        start, end = self._ends[index : index + 2].tolist()
        file, window, boxes, labels = pickle.loads(self._buffer[start:end])
        boxes = np.frombuffer(boxes, np.float32).reshape(-1, 4).copy()
        return (
            file,
            window,
            torch.from_numpy(boxes),
            torch.from_numpy(np.frombuffer(labels, np.int64).copy()),
        )


def _record(image: LabelledImage) -> bytes:
    file: str | archives.Member = str(image.path)
    with suppress(DataError):  # reading it raises
        file = archives.find_member(image.path) or file
    boxes = np.array([a.box for a in image.annotations], np.float32)
    labels = np.array([IGNORED if a.ignored else a.label for a in image.annotations], np.int64)
    return pickle.dumps((file, image.window, boxes.tobytes(), labels.tobytes()))


def _shard_numbers(dataset: Dataset) -> Tensor:
    """Return the number of each image's shard."""
    numbers: dict[str, int] = {}
    found = []
    for image in dataset.images:
        archive = archives.archive_of(image.path)
        if archive is None:
            raise DataError(
                f"data.order=shards: {image.path} is in no shard; create shards with "
                f'"retinanet data convert {dataset.source} DIR --to webdataset", or leave '
                f"data.order as it is"
            )
        found.append(numbers.setdefault(archive, len(numbers)))
    return torch.tensor(found)


@dataclass(frozen=True, slots=True)
class _Plan:
    """An image of a batch, its generator, and how it is mixed; drawn before anything is read.

    `others` are the positions in the stream of the images that are mixed into it.
    """

    index: int
    draw: random.Random
    mix: Mix
    others: tuple[int, ...]


@dataclass(eq=False)
class _TrainBatches(TorchDataset[Any]):
    """Training batches by step."""

    images: _Images
    config: DataConfig
    batch_size: int
    seed: int
    rank: int
    world_size: int
    fill: tuple[float, ...]
    shards: Tensor | None
    ratios: Tensor | None
    repeats: RepeatFactors | None
    function: UserTransform | None
    end: Tensor
    _orders: dict[int, Sequence[int]] = field(default_factory=dict, init=False)  # of two epochs

    def __getitem__(self, step: int) -> tuple[Batch | DataError | None, list[Unreadable]]:
        config = self.config
        shorter, longest = config.image_size, config.max_size
        if config.multi_scale:
            shorter = random.Random(f"{self.seed} side {step}").choice(config.multi_scale)
            longest = round(longest * shorter / config.image_size)
        rotations90: tuple[int, ...] = (0,)
        if config.rotate90:  # per batch, as landscape and portrait images pad each other
            rotations90 = random.Random(f"{self.seed} rotation {step}").choice([(0, 2), (1, 3)])
        transform = Transform(
            max_size=longest,
            horizontal_flip=config.horizontal_flip,
            vertical_flip=config.vertical_flip,
            scale_jitter=config.scale_jitter,
            crop=config.crop,
            rotations90=rotations90,
            rotation=config.rotation,
            shear=config.shear,
            translate=config.translate,
            colour=config.colour,
            erase=config.erase,
            function=self.function,
            fill=self.fill,
        )
        end = int(self.end)
        mixed = step < end - round(end * config.close_augmentation)
        first = (step * self.world_size + self.rank) * self.batch_size
        plans = {i: self._plan(i, mixed) for i in range(first, first + self.batch_size)}
        wanted = [[p.index, *(self._choose(i)[0] for i in p.others)] for p in plans.values()]
        reader = _Reader(self.images, chain.from_iterable(wanted))
        samples = []
        try:
            for position, plan in plans.items():
                for substitute in self._substitutes(position):
                    if substitute != position:
                        plan = self._plan(substitute, mixed)
                    sample = self._sample(plan, reader, transform, shorter)
                    if sample is not None:
                        break
                samples.append(sample)
        except DataError as error:  # raised in a worker, its message would be a traceback
            return error, reader.failures
        return _collate(samples, self.fill, config.any_corner), reader.failures

    def _plan(self, position: int, mixed: bool) -> _Plan:
        index, draw = self._choose(position)
        mix = draw_mix(self.config, draw) if mixed else Mix()
        count = len(mix.factors[1:]) + mix.copy_paste + mix.mixup
        return _Plan(index, draw, mix, tuple(self._other(position, draw) for _ in range(count)))

    def _other(self, position: int, draw: random.Random) -> int:
        """Draw the position of an image to mix into the one at `position`."""
        if self.shards is None:
            return position - position % self._epoch_size + draw.randrange(self._epoch_size)
        back = draw.randint(1, _RECENT_IMAGES)
        return position - back if back <= position else position + back

    def _sample(
        self, plan: _Plan, reader: _Reader, transform: Transform, shorter: int
    ) -> _Sample | None:
        """Read an image and those that are mixed into it; None: it cannot be read."""
        own_size, *sizes = plan.mix.reading_sizes(transform, shorter)
        read = reader.read(plan.index, *own_size)
        if read is None:
            return None

        def others() -> Iterator[ReadImage]:
            for position, size in zip(plan.others, sizes, strict=True):
                indices = (self._choose(i)[0] for i in self._substitutes(position))
                found = (reader.read(index, *size) for index in indices)
                yield next((image for image in found if image is not None), read)

        image, boxes, labels = mix_images(
            plan.mix, chain([read], others()), transform, shorter, plan.draw
        )
        return _Sample(plan.index, plan.draw, image, boxes, labels, read.size)

    def _substitutes(self, position: int) -> Iterator[int]:
        """Yield a position, then those of the images to take in place of an unreadable one.

        They are of the same epoch, so that the choice depends on the data and the seed alone.
        """
        count = self._epoch_size
        epoch, index = divmod(position, count)
        for offset in range(min(_MAX_SUBSTITUTES, count - 1) + 1):
            yield epoch * count + (index + offset) % count

    def _choose(self, position: int) -> tuple[int, random.Random]:
        """Return the image at a position of the stream, and the generator of its augmentation."""
        epoch, position = divmod(position, self._epoch_size)
        index = self._order(epoch)[position]
        # The repetitions of an image in an epoch are augmented differently.
        repetition = "" if self.repeats is None else f" {position}"
        return index, random.Random(f"{self.seed} image {epoch} {index}{repetition}")

    def _order(self, epoch: int) -> Sequence[int]:
        """Return the images of an epoch in order; random.Random gives the same everywhere."""
        if epoch in self._orders:
            return self._orders[epoch]
        draw = random.Random(f"{self.seed} epoch {epoch}")
        order: list[int] = []
        for images in self._to_shuffle(draw):
            draw.shuffle(images)
            if self.ratios is not None:
                batch = self.batch_size * self.world_size
                first = -(epoch * self._epoch_size + len(order)) % batch
                images = _group(images, self.ratios, first, batch, draw)
            order += images
        # A batch may span two epochs.
        self._orders = {old: self._orders[old] for old in [*self._orders][-1:]} | {epoch: order}
        return order

    def _to_shuffle(self, draw: random.Random) -> Iterator[list[int]]:
        """Yield the images of an epoch that are shuffled together."""
        if self.shards is None:
            yield list(range(len(self.images))) if self.repeats is None else self.repeats.draw(draw)
            return
        by_shard: list[list[int]] = [[] for _ in range(int(self.shards.max()) + 1)]
        for image, shard in enumerate(self.shards.tolist()):
            by_shard[shard].append(image)
        draw.shuffle(by_shard)
        window = self.config.shard_window
        for first in range(0, len(by_shard), window):
            yield list(chain.from_iterable(by_shard[first : first + window]))

    @cached_property
    def _epoch_size(self) -> int:
        return len(self.images) if self.repeats is None else self.repeats.epoch_size


@dataclass(eq=False)
class _EvalBatches(TorchDataset[Any]):
    """Batches of all images in order, by number."""

    images: _Images
    transform: Transform
    batch_size: int
    image_size: int
    fill: tuple[float, ...]

    def __getitem__(self, number: int) -> tuple[Batch | None, list[Unreadable]]:
        first = number * self.batch_size
        indices = range(first, min(first + self.batch_size, len(self.images)))
        reader = _Reader(self.images, indices)
        samples = []
        for index in indices:
            read = reader.read(index, *self.transform.reading_size(self.image_size))
            if read is not None:
                draw = random.Random(0)
                image, boxes, labels = self.transform(
                    read.image,
                    read.boxes,
                    read.labels,
                    shorter=self.image_size,
                    generator=draw,
                    size=read.size,
                )
                samples.append(_Sample(index, draw, image, boxes, labels, read.size))
        return _collate(samples, self.fill), reader.failures


def _group(
    images: list[int], ratios: Tensor, first: int, batch_size: int, draw: random.Random
) -> list[int]:
    """Reorder shuffled images so that those of a batch have similar aspect ratios.

    Sorted are windows of :data:`_SORTED_BATCHES` batches, and then the batches are shuffled: which
    images share a batch differs from epoch to epoch. The first batch begins at position `first`;
    parts of batches before and after whole ones keep their images.
    """
    last = max(first, len(images) - (len(images) - first) % batch_size)
    batches: list[list[int]] = []
    for start in range(first, last, _SORTED_BATCHES * batch_size):
        window = torch.tensor(images[start : min(start + _SORTED_BATCHES * batch_size, last)])
        window = window[ratios[window].argsort(stable=True)]
        batches += [batch.tolist() for batch in torch.split(window, batch_size)]
    draw.shuffle(batches)
    return [*images[:first], *chain.from_iterable(batches), *images[last:]]


def _padded_ratios(dataset: Dataset, config: DataConfig) -> Tensor:
    """Return the aspect ratio of each image, padded on its own; 1 where its size is unknown.

    Images of one padded size have one ratio, so that they meet in every combination.
    """

    def ratio(image: LabelledImage) -> float:
        if not image.height or not image.width:
            return 1.0
        size = network_size(image.height, image.width, config.image_size, config.max_size)
        height, width = (-(-side // DIVISOR) for side in size)
        return height / width

    return torch.tensor([ratio(image) for image in dataset.images])


@dataclass(frozen=True, slots=True, eq=False)
class _Sample:
    """A transformed image, and the generator of its corner."""

    index: int
    draw: random.Random
    image: Tensor
    boxes: Tensor
    labels: Tensor
    original_size: tuple[int, int]


class _Reader:
    """Reads the images of a batch; `failures` are those that could not be read.

    The files of `indices`, which are probably read, are fetched together if they are remote.
    """

    def __init__(self, images: _Images, indices: Iterable[int]) -> None:
        self._images = images
        self._records: dict[int, tuple[Any, Window | None, Tensor, Tensor]] = {}
        self._fetch(indices)
        self.failures: list[Unreadable] = []

    def read(self, index: int, shorter: int, longest: int) -> ReadImage | None:
        """Read an image no smaller than needed; None, and a failure, if it cannot be read."""
        if index not in self._records:
            self._fetch([index])
        file, _, boxes, labels = self._records[index]
        try:
            if isinstance(file, ImageError):
                raise file
            image, size = self._read(index, shorter, longest)
        except ImageError as error:
            self.failures.append((index, str(error)))
            return None
        return ReadImage(image, boxes, labels, size)

    def _read(self, index: int, shorter: int, longest: int) -> tuple[Tensor, tuple[int, int]]:
        """Read an image or its tile, no smaller than needed; also the size of the whole of it."""
        file, window, *_ = self._records[index]
        cache, number = self._images.cache, int(self._images.file_numbers[index])
        if window is None:
            read = partial(read_reduced, file, shorter, longest)
            if cache is None:
                return read()
            image, size = cache.read(number, (shorter, longest), read)
            return image.clone(), size  # the user's transform may change it
        whole = None
        if cache is not None and not os.fspath(file).lower().endswith(_READ_IN_WINDOWS):
            whole, _ = cache.read(number, None, lambda: with_size(read_image(file)))
        return with_size(read_window(file, window, whole))

    def _fetch(self, indices: Iterable[int]) -> None:
        records = {index: self._images[index] for index in indices}
        cache, numbers = self._images.cache, self._images.file_numbers
        new = [i for i in records if cache is None or not cache.has(int(numbers[i]))]
        fetched = dict(zip(new, _fetched([records[i][0] for i in new]), strict=True))
        for index, record in records.items():
            self._records[index] = (fetched.get(index, record[0]), *record[1:])


def _fetched(files: list[str | archives.Member]) -> list[str | archives.Member | ImageError]:
    """Remote files with their bytes, fetched together; where that fails, each by itself."""
    try:
        return [*archives.fetch_remote(files)]
    except ImageError as error:
        return [error] if len(files) == 1 else [_fetched([file])[0] for file in files]


def _collate(
    samples: Sequence[_Sample | None], fill: Sequence[float], any_corner: bool = False
) -> Batch | None:
    """Return the batch of samples; None if there is none, or one is missing."""
    present = [sample for sample in samples if sample is not None]
    if not present or len(present) < len(samples):
        return None
    boxes = [sample.boxes for sample in present]
    corners = None
    if any_corner:
        corners = [(sample.draw.random() < 0.5, sample.draw.random() < 0.5) for sample in present]
    in_worker = get_worker_info() is not None  # other memory would be copied
    images = [sample.image for sample in present]
    padded, sizes = pad_batch(images, fill, DIVISOR, corners, shared=in_worker)
    if corners is not None:
        free = torch.tensor(padded.shape[-2:]) - sizes
        for i, (bottom, right) in enumerate(corners):
            down, across = free[i] * torch.tensor([bottom, right])
            boxes[i] = boxes[i] + torch.stack([across, down]).repeat(2)
    return Batch(
        padded,
        pad_targets(boxes, [sample.labels for sample in present]),
        sizes,
        torch.tensor([sample.original_size for sample in present], dtype=torch.int64),
        torch.tensor([sample.index for sample in present], dtype=torch.int64),
    )
