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

import ast
import multiprocessing
import os
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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


Unreadable = tuple[int, str]
"""Index of an image in its data set, and the error message."""

MAX_UNREADABLE = 0.1
"""Share of a data set's images that may be skipped as unreadable (one image always may)."""

_MAX_SUBSTITUTES = 100  # images tried in place of an unreadable one


class BatchLoader(DataLoader[Batch]):
    """A DataLoader that yields :class:`~retinanet.structures.Batch`.

    Attributes:
        skip_unreadable: whether to skip images that cannot be read; otherwise the first one raises
            :class:`~retinanet.errors.ImageError` with its one-line message, also from a worker.
        on_unreadable: called once per skipped image, in the main process.
        num_images: images in the data set.
        unreadable: error message of each skipped image by its index in the data set.
    """

    skip_unreadable: bool
    on_unreadable: Callable[[int, str], None] | None
    num_images: int
    unreadable: dict[int, str]

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for batch, failures in super().__iter__():
            try:
                self._check_unreadable(failures)
            except DataError:
                # Ends the workers now. Left to the garbage collector, with the traceback that
                # refers to them, they are waited for in vain: five seconds each.
                self._iterator = None
                raise
            if batch is not None:
                yield batch

    def check_worker_number_rationality(self) -> None:
        """Accept more workers than processors: reading from slow storage waits more than it works.

        DataLoader warns of it.
        """

    def _check_unreadable(self, failures: Sequence[Unreadable]) -> None:
        """
        Raises:
            ImageError: an image is unreadable, and unreadable images are not skipped.
            DataError: more than :data:`MAX_UNREADABLE` of the images are unreadable.
        """
        for index, message in failures:
            if not self.skip_unreadable:
                raise ImageError(message)
            if index in self.unreadable:
                continue
            self.unreadable[index] = message
            if self.on_unreadable is not None:
                self.on_unreadable(index, message)
            limit = max(1, MAX_UNREADABLE * self.num_images)
            if len(self.unreadable) > limit or len(self.unreadable) == self.num_images:
                raise DataError(
                    f"too many unreadable images: {len(self.unreadable)} of {self.num_images}, "
                    f"the last: {message}; run retinanet data check"
                )


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
    skip_unreadable: bool = False,
    on_unreadable: Callable[[int, str], None] | None = None,
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

        skip_unreadable: use the next readable image of the epoch in place of one that cannot be
            read; False: raise.
        on_unreadable: called with index and message of each skipped image, once.

    Returns:
        `steps` - `start_step` batches. Annotations that are ignored have the label IGNORED; boxes
        are cut to the image, and dropped where nothing is left. Each process pads to the
        largest of its own images.

    Raises:
        ValueError: the data set is empty, or a number is out of range.
        DataError: `order` is ``shards`` and an image lies in none.
        ImageError: (while iterating) an image cannot be read.
        DataError: (while iterating) more than :data:`MAX_UNREADABLE` of the images cannot be read.
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
    loader = _loader(batches, range(start_step, steps), workers)
    return _skipping(loader, dataset, skip_unreadable, on_unreadable)


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
    skip_unreadable: bool = False,
    on_unreadable: Callable[[int, str], None] | None = None,
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
    loader = _loader(batches, range(rank, len(batches), world_size), workers)
    return _skipping(loader, dataset, skip_unreadable, on_unreadable)


def readable_part(
    dataset: Dataset, *, image_size: int, max_size: int, workers: int = 0
) -> tuple[Dataset, dict[int, str]]:
    """Read every image once, and leave out those that cannot be read.

    Returns:
        The data set without them, and the error messages by their index in `dataset`.

    Raises:
        DataError: more than :data:`MAX_UNREADABLE` of the images cannot be read.
    """
    loader = eval_loader(
        dataset,
        batch_size=1,
        image_size=image_size,
        max_size=max_size,
        workers=workers,
        skip_unreadable=True,
    )
    for _ in loader:
        pass
    kept = tuple(image for i, image in enumerate(dataset.images) if i not in loader.unreadable)
    return replace(dataset, images=kept), loader.unreadable


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


class _TrainBatches(TorchDataset[Any]):
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

    def __getitem__(self, step: int) -> tuple[Batch | None, list[Unreadable]]:
        shorter, transform = self._image_size, self._transform
        if self._multi_scale:
            draw = random.Random(f"{self._seed} side {step}")
            shorter = draw.choice(self._multi_scale)
            longest = round(transform.max_size * shorter / self._image_size)
            transform = replace(transform, max_size=longest)
        first = (step * self._world_size + self._rank) * self._batch_size
        positions = range(first, first + self._batch_size)
        samples, failures = _read_samples(
            self._images, [self._chosen(position) for position in positions], transform, shorter
        )
        for i, position in enumerate(positions):
            for further in range(1, min(_MAX_SUBSTITUTES, len(self._images) - 1) + 1):
                if samples[i] is not None:
                    break
                # Of the same epoch, so that the choice depends on the data and the seed alone.
                epoch, place = divmod(position, len(self._images))
                substitute = epoch * len(self._images) + (place + further) % len(self._images)
                (samples[i],), more = _read_samples(
                    self._images, [self._chosen(substitute)], transform, shorter
                )
                failures += more
        return _collate(samples, self._fill, self._any_corner), failures

    def _chosen(self, position: int) -> tuple[int, random.Random]:
        """The image at a position of the endless stream, and what its augmentation draws from."""
        epoch, place = divmod(position, len(self._images))
        if self._shards is None:
            index = _order(self._seed, epoch, len(self._images))[place]
        else:
            index = _order_by_shards(self._seed, epoch, self._shards)[place]
        return index, random.Random(f"{self._seed} image {epoch} {index}")


class _EvalBatches(TorchDataset[Any]):
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

    def __getitem__(self, batch: int) -> tuple[Batch | None, list[Unreadable]]:
        first = batch * self._batch_size
        last = min(first + self._batch_size, len(self._images))
        chosen = [(index, random.Random(0)) for index in range(first, last)]
        samples, failures = _read_samples(self._images, chosen, self._transform, self._image_size)
        return _collate([sample for sample in samples if sample], self._fill), failures


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


@dataclass(frozen=True, slots=True, eq=False)
class _Sample:
    """One image after the transform, and what it draws its corner from."""

    index: int
    draw: random.Random
    image: Tensor
    boxes: Tensor
    labels: Tensor
    original_size: tuple[int, int]


def _read_samples(
    images: _Images,
    chosen: Sequence[tuple[int, random.Random]],
    transform: Transform,
    shorter: int,
) -> tuple[list[_Sample | None], list[Unreadable]]:
    """Read and transform images; None and a message for each that cannot be read."""
    samples: list[_Sample | None] = []
    failures: list[Unreadable] = []
    for (index, draw), file in zip(
        chosen, _fetched([images.path(index) for index, _ in chosen]), strict=True
    ):
        try:
            if isinstance(file, ImageError):
                raise file
            image, size = read_reduced(file, *transform.reading_size(shorter))
        except ImageError as error:
            samples.append(None)
            failures.append((index, str(error)))
            continue
        image, boxes, labels = transform(
            image, *images.objects(index), shorter=shorter, generator=draw, size=size
        )
        samples.append(_Sample(index, draw, image, boxes, labels, size))
    return samples, failures


def _fetched(
    files: list[str | archives.Member],
) -> Sequence[str | archives.Member | ImageError]:
    """Remote files with their bytes, fetched together; where that fails, each by itself."""
    try:
        return archives.fetch_remote(files)
    except ImageError as error:
        if len(files) == 1:
            return [error]
        return [_fetched([file])[0] for file in files]


def _collate(
    samples: Sequence[_Sample | None], fill: Sequence[float], any_corner: bool = False
) -> Batch | None:
    """The batch of some images; None: there is none, or one is missing."""
    present = [sample for sample in samples if sample is not None]
    if not present or len(present) < len(samples):
        return None
    boxes = [sample.boxes for sample in present]
    corners = None
    if any_corner:
        corners = [(sample.draw.random() < 0.5, sample.draw.random() < 0.5) for sample in present]
    in_worker = get_worker_info() is not None  # plain memory would be copied on its way
    images = [sample.image for sample in present]
    padded, sizes = pad_batch(images, fill, DIVISOR, corners, shared=in_worker)
    if corners is not None:
        free = torch.tensor(padded.shape[-2:]) - sizes
        for i, (low, right) in enumerate(corners):
            down, across = free[i] * torch.tensor([low, right])
            boxes[i] = boxes[i] + torch.stack([across, down]).repeat(2)
    return Batch(
        padded,
        pad_targets(boxes, [sample.labels for sample in present]),
        sizes,
        torch.tensor([sample.original_size for sample in present], dtype=torch.int64),
        torch.tensor([sample.index for sample in present], dtype=torch.int64),
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
    if workers and _workers_would_rerun_script():
        warnings.warn(
            "images are loaded in this process, without workers: they would run the script "
            'again; put its code under if __name__ == "__main__":, or set workers to 0',
            stacklevel=3,
        )
        workers = 0
    loader = BatchLoader(
        batches,
        batch_size=None,  # an item is a batch already
        sampler=numbers,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
    )
    loader.skip_unreadable, loader.on_unreadable = False, None
    loader.num_images, loader.unreadable = len(numbers), {}
    return loader


def _skipping(
    loader: BatchLoader,
    dataset: Dataset,
    skip_unreadable: bool,
    on_unreadable: Callable[[int, str], None] | None,
) -> BatchLoader:
    loader.skip_unreadable, loader.on_unreadable = skip_unreadable, on_unreadable
    loader.num_images = len(dataset)
    return loader


def _workers_would_rerun_script() -> bool:
    """Whether a worker process would execute the user's script from its first line.

    Under the start methods spawn and forkserver (macOS, Windows, Linux from Python 3.14 on) a
    worker imports the main module, and multiprocessing raises RuntimeError where that starts
    workers itself.
    """
    method = multiprocessing.get_start_method(allow_none=True)
    if (method or multiprocessing.get_all_start_methods()[0]) == "fork":
        return False
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is None:  # an interactive session is not imported again
        return False
    try:
        tree = ast.parse(Path(script).read_bytes())
    except (OSError, SyntaxError, ValueError):  # a launcher, which is no Python source
        return False
    return not any(
        isinstance(statement, ast.If)
        and any(
            isinstance(node, ast.Name) and node.id == "__name__"
            for node in ast.walk(statement.test)
        )
        for statement in tree.body
    )
