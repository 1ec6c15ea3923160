"""Batches for training and evaluation.

The order of training is a stream without end: the permutation of epoch 0, then that of epoch 1,
and so on. Step s of P processes with B images each takes the places s * P * B up to (s + 1) * P
* B of it, and rank r takes its own B of those. Every choice is drawn from (seed, epoch, image)
or (seed, step), so a batch depends neither on the step at which the loader was started nor on the
number of workers, and the images of a step do not depend on how many processes share them.

For data in shards (:mod:`retinanet.data.formats.webdataset`) there is another order, in which each
process reads shards of its own, a few at a time. It has all of the above but the last: with another
number of processes, or of images a process, an epoch goes by in another order.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from retinanet.data import archives
from retinanet.data.dataset import Dataset
from retinanet.data.images import pad_batch, read_reduced
from retinanet.data.transforms import Transform
from retinanet.errors import DataError, ImageError
from retinanet.structures import IGNORED, Batch, pad_targets

DIVISOR = 32
"""Height and width of every batch are multiples of it: the coarsest stride of a plain backbone."""


Order = Literal["images", "shards"]
"""What an epoch is a permutation of: all images, or shards and then the images of a few."""


class BatchLoader(DataLoader[Batch]):
    """A DataLoader of :class:`~retinanet.structures.Batch`, one an item.

    An image that cannot be read raises :class:`~retinanet.errors.ImageError` with its own one-line
    message, also out of a worker process.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        failure = None
        for item in super().__iter__():
            # A DataLoader puts the worker's traceback into the message of what it re-raises, so the
            # failure travels as a value.
            if isinstance(item, _Failure):
                failure = item
                break
            yield item
        if failure is not None:
            # Ends the workers now. Left to the garbage collector, with the traceback that refers to
            # them, they are waited for in vain: five seconds each.
            self._iterator = None
            raise ImageError(failure.message)


def train_loader(
    dataset: Dataset,
    *,
    batch_size: int,
    steps: int,
    seed: int,
    image_size: int,
    max_size: int,
    start_step: int = 0,
    multi_scale: Sequence[int] = (),
    horizontal_flip: float = 0.5,
    vertical_flip: float = 0.0,
    scale_jitter: tuple[float, float] = (1.0, 1.0),
    crop: bool = False,
    colour: float = 0.0,
    any_corner: bool = False,
    order: Order = "images",
    shard_window: int = 4,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    fill: Sequence[float] = (0, 0, 0),
) -> BatchLoader:
    """Batches of steps `start_step` to `steps` - 1, in order.

    Args:
        dataset: one or more images; those without an object are background.
        batch_size: images a batch, of one process. May exceed the data set: its epochs follow
            each other without a gap.
        steps: the step after the last.
        seed: of order, flips, jitter, crops, colours and sides.
        image_size: pixels of the shorter side.
        max_size: pixels that the longer side may have.
        start_step: the first step, where a run is resumed.
        multi_scale: shorter sides of which one is drawn a step, the same on all ranks; `max_size`
            grows and shrinks with it. Empty: `image_size` always.
        horizontal_flip, vertical_flip, scale_jitter, crop, colour: see
            :class:`~retinanet.data.transforms.Transform`.
        any_corner: let each image lie in a random corner of its place in the batch, so that each
            of its borders is now the batch's and now padding. A network that sees padding below
            and at the right alone misses objects there once an image comes without.
        order: ``images``: each epoch is a permutation of all images, the same for any number of
            processes. ``shards``: the shards are shuffled, dealt out to the processes in pieces of
            as many images as each takes of that epoch (a shard where two pieces meet is read by
            both, each its part), and the images of `shard_window` shards at a time are shuffled
            together. Every image still comes once an epoch over all processes.
        shard_window: how many shards a process reads at a time: more mix better, and ask more of
            the disk and of the memory that keeps what was read of it.
        workers: processes that load; 0: the caller's own. See :func:`default_workers`.
        rank, world_size: this process's place among those that train together.
        fill: RGB of the padding: the model's pixel mean, so that it is about 0 after normalisation.

    Returns:
        `steps` - `start_step` batches. Annotations that are ignored have the label IGNORED; boxes
        are cut to the image, and dropped where nothing is left. Each process pads to the
        largest of its own images.

    Raises:
        ValueError: the data set is empty, or a number is out of range.
        DataError: `order` is ``shards`` and an image lies in none.
        ImageError: (from the loop) an image cannot be read.
    """
    _check(dataset, batch_size, workers, rank, world_size)
    if shard_window < 1:
        raise ValueError(f"shard_window {shard_window} is not 1 or more")
    if not 0 <= start_step <= steps:
        raise ValueError(f"start_step {start_step} is not in 0..steps ({steps})")
    batches = _TrainBatches(
        _Images(dataset),
        Transform(max_size, horizontal_flip, vertical_flip, scale_jitter, crop, colour),
        batch_size=batch_size,
        seed=seed,
        image_size=image_size,
        multi_scale=tuple(multi_scale),
        rank=rank,
        world_size=world_size,
        fill=tuple(fill),
        any_corner=any_corner,
        shards=(
            _shards(dataset, shard_window, batch_size, world_size) if order == "shards" else None
        ),
    )
    return _loader(batches, range(start_step, steps), workers)


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
) -> BatchLoader:
    """Every image once, in the data set's order, unchanged but for the resize.

    Of several processes each takes every `world_size`-th batch, from batch `rank` on. The
    arguments and errors are those of :func:`train_loader`; the last batch may be smaller.
    """
    _check(dataset, batch_size, workers, rank, world_size)
    batches = _EvalBatches(
        _Images(dataset),
        Transform(max_size),
        batch_size=batch_size,
        image_size=image_size,
        fill=tuple(fill),
    )
    return _loader(batches, range(rank, len(batches), world_size), workers)


def default_workers() -> int:
    """How many processes should load images for this one, without crowding the machine.

    The processors that this process may use (affinity and container limits) are shared among the
    processes that train on this machine (LOCAL_WORLD_SIZE). With a GPU each keeps one for itself
    and loads with the others, eight at the most; without one the network needs them all and a
    single process loads ahead, since one core reads images many times faster than the rest
    train on them.
    """
    share = usable_cpus() // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if share < 2:
        return 0
    return min(8, share - 1) if torch.cuda.is_available() else 1


def usable_cpus() -> int:
    """Processors that this process may use: its affinity, and a container's quota."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text("ascii").split()
        return max(1, min(cpus, int(quota) // int(period)))
    except (OSError, ValueError):  # no such limit ("max"), or no Linux
        return cpus


class _Failure:
    """An image that could not be read, on its way out of a worker."""

    def __init__(self, message: str) -> None:
        self.message = message


class _Images:
    """Paths and objects of a data set in a few flat buffers.

    Worker processes copy a page of memory once they touch a Python object on it; a hundred thousand
    annotations would in time be held by each of them. Buffers are shared, and quick to send.
    """

    def __init__(self, dataset: Dataset) -> None:
        paths = [os.fsencode(image.path) for image in dataset.images]
        self._paths = b"".join(paths)
        self._path_ends = torch.tensor([0, *accumulate(map(len, paths))])
        self._members = _members(dataset)
        annotations = [image.annotations for image in dataset.images]
        self._ends = torch.tensor([0, *accumulate(map(len, annotations))])
        flat = [one for of_image in annotations for one in of_image]
        self._boxes = torch.tensor([one.box for one in flat], dtype=torch.float32).reshape(-1, 4)
        self._labels = torch.tensor(
            [IGNORED if one.ignored else one.label for one in flat], dtype=torch.int64
        )

    def __len__(self) -> int:
        return len(self._ends) - 1

    def path(self, index: int) -> str | archives.Member:
        """Where an image is, in a shard with its place there: no worker reads an index."""
        start, end = self._path_ends[index : index + 2].tolist()
        path = self._paths[start:end]
        if self._members is None:
            return os.fsdecode(path)
        length, offset, size = self._members[index].tolist()
        if not length:
            return os.fsdecode(path)
        name = os.fsdecode(path[-length:]).replace(os.sep, "/")
        archive = archives.address_of(os.fsdecode(path[: -length - 1]))
        return archives.Member(archive, name, offset, size)

    def objects(self, index: int) -> tuple[Tensor, Tensor]:
        """(M, 4) boxes in pixels of the image on disk, and (M,) labels."""
        start, end = self._ends[index : index + 2].tolist()
        return self._boxes[start:end], self._labels[start:end]


def _members(dataset: Dataset) -> Tensor | None:
    """(N, 3) length in bytes of the name in the shard, offset and size; None: there are no shards.

    Zeros where an image is in none, or not where it should be: whoever reads it will say so.
    """
    rows: list[tuple[int, int, int]] = []
    for image in dataset.images:
        try:
            member = archives.find_member(image.path)
        except DataError:
            member = None
        length = 0 if member is None else len(os.fsencode(member.name))
        rows.append((0, 0, 0) if member is None else (length, member.offset, member.size))
    return torch.tensor(rows) if any(length for length, _, _ in rows) else None


@dataclass(frozen=True, slots=True, eq=False)
class _Shards:
    """The images by shard, and how they are dealt out.

    Attributes:
        images: (N,) indices, shard after shard.
        ends: (S + 1,) where each shard begins and ends in them.
        window: shards that are shuffled together.
        batch_size: images that a process takes at a time.
        world_size: processes.
    """

    images: Tensor
    ends: Tensor
    window: int
    batch_size: int
    world_size: int


def _shards(dataset: Dataset, window: int, batch_size: int, world_size: int) -> _Shards:
    """
    Raises:
        DataError: an image lies in no shard.
    """
    by_shard: dict[str, list[int]] = {}
    for index, image in enumerate(dataset.images):
        archive = archives.archive_of(image.path)
        if archive is None:
            raise DataError(
                f"data.order=shards: {image.path} lies in no shard; make them with "
                f'"retinanet data convert {dataset.source} DIR --to webdataset", or leave '
                f"data.order as it is"
            )
        by_shard.setdefault(archive, []).append(index)
    return _Shards(
        torch.tensor(list(chain.from_iterable(by_shard.values()))),
        torch.tensor([0, *accumulate(map(len, by_shard.values()))]),
        window,
        batch_size,
        world_size,
    )


class _TrainBatches(TorchDataset["Batch | _Failure"]):
    def __init__(
        self,
        images: _Images,
        transform: Transform,
        *,
        batch_size: int,
        seed: int,
        image_size: int,
        multi_scale: tuple[int, ...],
        rank: int,
        world_size: int,
        fill: tuple[float, ...],
        any_corner: bool,
        shards: _Shards | None,
    ) -> None:
        self._images = images
        self._transform = transform
        self._batch_size = batch_size
        self._seed = seed
        self._image_size = image_size
        self._multi_scale = multi_scale
        self._rank = rank
        self._world_size = world_size
        self._fill = fill
        self._any_corner = any_corner
        self._shards = shards

    def __getitem__(self, step: int) -> Batch | _Failure:
        shorter, transform = self._image_size, self._transform
        if self._multi_scale:
            draw = random.Random(f"{self._seed} side {step}")
            shorter = draw.choice(self._multi_scale)
            longest = round(transform.max_size * shorter / self._image_size)
            transform = replace(transform, max_size=longest)
        first = (step * self._world_size + self._rank) * self._batch_size
        chosen = []
        for place in range(first, first + self._batch_size):
            epoch, position = divmod(place, len(self._images))
            if self._shards is None:
                index = _order(self._seed, epoch, len(self._images))[position]
            else:
                index = _order_by_shards(self._seed, epoch, self._shards)[position]
            chosen.append((index, random.Random(f"{self._seed} image {epoch} {index}")))
        return _load(self._images, chosen, transform, shorter, self._fill, self._any_corner)


class _EvalBatches(TorchDataset["Batch | _Failure"]):
    def __init__(
        self,
        images: _Images,
        transform: Transform,
        *,
        batch_size: int,
        image_size: int,
        fill: tuple[float, ...],
    ) -> None:
        self._images = images
        self._transform = transform
        self._batch_size = batch_size
        self._image_size = image_size
        self._fill = fill

    def __len__(self) -> int:
        return -(-len(self._images) // self._batch_size)

    def __getitem__(self, batch: int) -> Batch | _Failure:
        first = batch * self._batch_size
        last = min(first + self._batch_size, len(self._images))
        chosen = [(index, random.Random(0)) for index in range(first, last)]
        return _load(self._images, chosen, self._transform, self._image_size, self._fill)


@lru_cache(maxsize=2)  # a batch may lie across two epochs
def _order(seed: int, epoch: int, count: int) -> Sequence[int]:
    """The permutation of an epoch; random.Random gives the same on every platform."""
    order = list(range(count))
    random.Random(f"{seed} epoch {epoch}").shuffle(order)
    return order


@lru_cache(maxsize=2)
def _order_by_shards(seed: int, epoch: int, shards: _Shards) -> Sequence[int]:
    """The permutation of an epoch in which each process meets a piece of the shuffled shards.

    Each process takes the places of the epoch that any order gives it, and finds there the images
    of its own piece: so steps, epochs and resuming are those of the order by images.
    """
    ends = shards.ends.tolist()
    images = shards.images.tolist()
    turns = list(range(len(ends) - 1))
    random.Random(f"{seed} shards {epoch}").shuffle(turns)
    sequence = [(shard, i) for shard in turns for i in images[ends[shard] : ends[shard + 1]]]
    first = epoch * len(images)
    ranks = [
        place // shards.batch_size % shards.world_size
        for place in range(first, first + len(images))
    ]
    shares = Counter(ranks)
    pieces: list[Iterator[int]] = []
    begin = 0
    for rank in range(shards.world_size):
        piece = sequence[begin : begin + shares[rank]]
        begin += shares[rank]
        draw = random.Random(f"{seed} windows {epoch} {rank}")
        pieces.append(iter(_shuffled_by_windows(piece, shards.window, draw)))
    return [next(pieces[rank]) for rank in ranks]


def _shuffled_by_windows(
    piece: Sequence[tuple[int, int]], window: int, draw: random.Random
) -> list[int]:
    """Images of (shard, image) in which those of `window` shards at a time are shuffled."""
    shards = list(dict.fromkeys(shard for shard, _ in piece))
    turn = {shard: place // window for place, shard in enumerate(shards)}
    windows: list[list[int]] = [[] for _ in range(-(-len(shards) // window))]
    for shard, image in piece:
        windows[turn[shard]].append(image)
    for one in windows:
        draw.shuffle(one)
    return list(chain.from_iterable(windows))


def _load(
    samples: _Images,
    chosen: Sequence[tuple[int, random.Random]],
    transform: Transform,
    shorter: int,
    fill: Sequence[float],
    any_corner: bool = False,
) -> Batch | _Failure:
    images, boxes, labels, original_sizes = [], [], [], []
    try:
        files = archives.fetched([samples.path(index) for index, _ in chosen])
    except ImageError as error:
        return _Failure(str(error))
    for (index, generator), file in zip(chosen, files, strict=True):
        try:
            image, size = read_reduced(file, *transform.reading_size(shorter))
        except ImageError as error:
            return _Failure(str(error))
        original_sizes.append(size)
        image, image_boxes, image_labels = transform(
            image, *samples.objects(index), shorter=shorter, generator=generator, size=size
        )
        images.append(image)
        boxes.append(image_boxes)
        labels.append(image_labels)
    corners = None
    if any_corner:
        corners = [(draw.random() < 0.5, draw.random() < 0.5) for _, draw in chosen]
    in_worker = get_worker_info() is not None  # plain memory would be copied on its way
    padded, sizes = pad_batch(images, fill, DIVISOR, corners, shared=in_worker)
    if corners is not None:
        room = torch.tensor(padded.shape[-2:]) - sizes
        for place, (low, right) in enumerate(corners):
            down, across = room[place] * torch.tensor([low, right])
            boxes[place] = boxes[place] + torch.stack([across, down]).repeat(2)
    return Batch(
        padded,
        pad_targets(boxes, labels),
        sizes,
        torch.tensor(original_sizes, dtype=torch.int64),
        torch.tensor([index for index, _ in chosen], dtype=torch.int64),
    )


def _check(dataset: Dataset, batch_size: int, workers: int, rank: int, world_size: int) -> None:
    if not len(dataset):
        raise ValueError(f"split {dataset.split!r} of {dataset.source} has no image")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is not 1 or more")
    if workers < 0:
        raise ValueError(f"workers {workers} is not 0 or more")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in 0..world_size - 1 ({world_size - 1})")


def _loader(batches: TorchDataset[Any], numbers: range, workers: int) -> BatchLoader:
    return BatchLoader(
        batches,
        batch_size=None,  # an item is a batch already
        sampler=numbers,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
    )
