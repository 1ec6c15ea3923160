"""What a batch holds depends on the seed and the step, and on nothing else."""

from __future__ import annotations

import dataclasses
import gc
import multiprocessing
import os
import pickle
import random
import signal
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from labelled_folders import assert_same, train_loader, training
from PIL import Image

from retinanet.data import loading
from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.data.loading import default_workers, eval_loader
from retinanet.errors import DataError, ImageError
from retinanet.structures import BACKGROUND, IGNORED, Batch


def make_dataset(folder: Path, sizes: Iterable[tuple[int, int]], objects: int = 2) -> Dataset:
    """Images of (height, width); image i holds i % (objects + 1) objects."""
    draw = random.Random(0)
    images = []
    for i, (height, width) in enumerate(sizes):
        path = folder / f"image {i}.png"
        Image.frombytes("RGB", (width, height), draw.randbytes(width * height * 3)).save(path)
        annotations = tuple(
            Annotation((1.0 + n, 2.0, 11.0 + n, 14.0), label=n % 3)
            for n in range(i % (objects + 1))
        )
        images.append(LabelledImage(path, i, annotations))
    return Dataset(tuple(images), ("a", "b", "c"), (1, 2, 3), "train", "coco", folder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Ten small images of several sizes."""
    sizes = [(30 + 3 * i, 48 - 2 * i) for i in range(10)]
    return make_dataset(tmp_path_factory.mktemp("images"), sizes)


def images(batches: Iterable[Batch]) -> list[tuple[Any, ...]]:
    """Each image of the batches without its padding, with its objects, comparable."""
    found = []
    for batch in batches:
        for i, (height, width) in enumerate(batch.sizes.tolist()):
            real = batch.targets.labels[i] != BACKGROUND
            found.append(
                (
                    batch.indices[i].item(),
                    (height, width),
                    batch.images[i, :, :height, :width].flatten().tolist(),
                    batch.targets.boxes[i][real].tolist(),
                    batch.targets.labels[i][real].tolist(),
                )
            )
    return found


def test_batch_layout(dataset: Dataset) -> None:
    batches = training(dataset, fill=(123.7, 116.3, 104.0))
    assert len(batches) == 7
    for batch in batches:
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape[:2] == (4, 3)
        assert batch.images.shape[2] % 32 == batch.images.shape[3] % 32 == 0
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.sizes.dtype == batch.original_sizes.dtype == batch.indices.dtype == torch.int64
        for i, (height, width) in enumerate(batch.sizes.tolist()):
            below, beside = batch.images[i, :, height:], batch.images[i, :, :, width:]
            for channel, value in enumerate((124, 116, 104)):
                assert (below[channel] == value).all()
                assert (beside[channel] == value).all()
            index = int(batch.indices[i])
            assert batch.original_sizes[i].tolist() == [30 + 3 * index, 48 - 2 * index]
            labels = batch.targets.labels[i]
            boxes = batch.targets.boxes[i]
            assert (boxes[labels == BACKGROUND] == 0).all()
            assert (boxes[:, 2] <= width).all()
            assert (boxes[:, 3] <= height).all()


def test_large_jpegs_are_read_reduced_with_boxes_and_sizes_of_the_whole(tmp_path: Path) -> None:
    path = tmp_path / "large.jpg"
    img = Image.new("RGB", (800, 600), (0, 0, 0))
    img.paste((255, 255, 255), (200, 100, 400, 300))
    img.save(path)
    image = LabelledImage(path, 0, (Annotation((200.0, 100.0, 400.0, 300.0), 0),))
    dataset = Dataset((image,), ("a",), (1,), "train", "coco", tmp_path)
    (batch,) = eval_loader(dataset, batch_size=1, image_size=60, max_size=100)
    assert batch.original_sizes.tolist() == [[600, 800]]
    assert batch.sizes.tolist() == [[60, 80]]
    assert batch.targets.boxes.tolist() == [[[20, 10, 40, 30]]]
    assert (batch.images[0, :, 11:29, 21:39] > 240).all()
    assert (batch.images[0, :, 32:60] < 15).all()


@pytest.mark.parametrize("in_worker", [False, True])
def test_batches_of_workers_need_no_copy(
    dataset: Dataset, in_worker: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "get_worker_info", lambda: object() if in_worker else None)
    (batch, *_) = eval_loader(dataset, batch_size=4, image_size=32, max_size=64)
    assert batch.images.is_shared() == in_worker


def test_same_seed_same_batches(dataset: Dataset) -> None:
    torch.manual_seed(0)
    random.seed(0)
    first = training(dataset)
    torch.manual_seed(1)  # the global state plays no part
    random.seed(1)
    second = training(dataset)
    assert_same(first, second)
    assert any(
        not torch.equal(entry.indices, other.indices)
        for entry, other in zip(first, training(dataset, seed=6), strict=True)
    )


@pytest.mark.parametrize(("start", "workers"), [(1, 0), (0, 1), (3, 3)])
def test_resumed_loader_goes_on_where_it_stopped(
    dataset: Dataset, start: int, workers: int
) -> None:
    whole = training(dataset, multi_scale=(24, 32, 40))
    rest = training(dataset, start_step=start, multi_scale=(24, 32, 40), workers=workers)
    assert len(rest) == 7 - start
    assert_same(whole[start:], rest)


def test_each_epoch_holds_each_image_once(dataset: Dataset) -> None:
    indices = torch.cat([batch.indices for batch in training(dataset, steps=10)]).tolist()
    epochs = [indices[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4  # in another order each time
    (batch,) = training(dataset, batch_size=25, steps=1)  # larger than the data
    assert set(Counter(batch.indices.tolist()).values()) == {2, 3}  # two epochs and a half


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batch_of_one_process(dataset: Dataset, world_size: int) -> None:
    whole = training(dataset, multi_scale=(24, 32, 40))
    ranks = [
        training(
            dataset,
            batch_size=4 // world_size,
            rank=rank,
            world_size=world_size,
            multi_scale=(24, 32, 40),
        )
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        assert images([batch]) == images([rank[step] for rank in ranks])


def test_multi_scale_draws_a_side_a_step(dataset: Dataset) -> None:
    batches = training(
        dataset, steps=30, multi_scale=(24, 40), scale_jitter=(1, 1), crop=False, max_size=32 * 4
    )
    sides = [batch.sizes.amin(dim=1) for batch in batches]
    assert all((side == side[0]).all() for side in sides)  # one side for the whole batch
    assert {int(side[0]) for side in sides} == {24, 40}


def test_labels_of_ignored_regions_and_faulty_boxes(tmp_path: Path) -> None:
    nan = float("nan")
    plain = make_dataset(tmp_path, [(40, 40)], objects=0)
    annotations = (
        Annotation((0, 0, 20, 20), 2),
        Annotation((0, 0, 40, 40), 1, crowd=True),
        Annotation((4, 4, 12, 12), 0, difficult=True),
        Annotation((5, 5, 5, 9), 0),  # no width
        Annotation((nan, 5, 9, 9), 0),
        Annotation((30, 30, 60, 60), 1),  # half outside
    )
    image = LabelledImage(plain.images[0].path, 0, annotations)
    faulty = Dataset((image,), ("a", "b", "c"), (1, 2, 3), "val", "coco", tmp_path)
    (batch,) = eval_loader(faulty, batch_size=1, image_size=80, max_size=80)
    assert batch.targets.labels.tolist() == [[2, IGNORED, IGNORED, 1]]
    assert batch.targets.boxes[0].tolist() == [
        [0, 0, 40, 40],
        [0, 0, 80, 80],
        [8, 8, 24, 24],
        [60, 60, 80, 80],
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_in_order_every_image_once(dataset: Dataset, workers: int) -> None:
    loader = eval_loader(dataset, batch_size=4, image_size=32, max_size=64, workers=workers)
    for _ in range(2):  # again with the same workers
        batches = list(loader)
        assert [batch.indices.tolist() for batch in batches] == [
            [0, 1, 2, 3],
            [4, 5, 6, 7],
            [8, 9],
        ]
    assert len(loader) == 3


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_evaluation_ranks_part_the_images(dataset: Dataset, world_size: int) -> None:
    indices = [
        index
        for rank in range(world_size)
        for batch in eval_loader(
            dataset, batch_size=3, image_size=32, max_size=64, rank=rank, world_size=world_size
        )
        for index in batch.indices.tolist()
    ]
    assert sorted(indices) == list(range(10))


@pytest.mark.parametrize("workers", [0, 2])
def test_train_loader_unreadable_image_is_replaced_and_reported_once(
    tmp_path: Path, workers: int
) -> None:
    broken = make_dataset(tmp_path, [(40, 40)] * 12)
    path = broken.images[5].path
    path.write_bytes(path.read_bytes()[:200])
    reported: list[tuple[int, str]] = []
    batches = training(
        broken,
        steps=9,  # three epochs
        workers=workers,
        on_unreadable=lambda index, message: reported.append((index, message)),
    )
    indices = torch.cat([batch.indices for batch in batches]).tolist()
    assert len(indices) == 36
    assert 5 not in indices
    (failure,) = reported
    assert failure[0] == 5
    assert str(path) in failure[1]
    path.write_bytes(broken.images[0].path.read_bytes())
    # Only the unreadable image's positions differ from those of the repaired data.
    repaired = torch.cat([batch.indices for batch in training(broken, steps=9)]).tolist()
    assert [i for i, (entry, other) in enumerate(zip(indices, repaired, strict=True))
            if entry != other] == [i for i, index in enumerate(repaired) if index == 5]  # fmt: skip


def test_eval_loader_unreadable_image_is_skipped(tmp_path: Path) -> None:
    broken = make_dataset(tmp_path, [(40, 40)] * 12)
    broken.images[3].path.write_bytes(b"no image")
    reported: list[int] = []
    loader = eval_loader(
        broken,
        batch_size=1,
        image_size=32,
        max_size=64,
        workers=1,
        on_unreadable=lambda index, message: reported.append(index),
    )
    assert [int(batch.indices[0]) for batch in loader] == [0, 1, 2, *range(4, 12)]
    assert reported == list(loader.unreadable) == [3]
    assert str(broken.images[3].path) in loader.unreadable[3]


@pytest.mark.skipif(not hasattr(signal, "alarm"), reason="the platform has no SIGALRM")
def test_worker_outlives_sigterm_to_all_processes(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, [(40, 40)] * 24)
    loader = eval_loader(dataset, batch_size=1, image_size=32, max_size=64, workers=1)
    batches = iter(loader)
    indices = [int(next(batches).indices[0])]
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGTERM)
    indices += [int(batch.indices[0]) for batch in batches]
    assert indices == list(range(24))


def test_loader_too_many_unreadable_images_raise(tmp_path: Path) -> None:
    broken = make_dataset(tmp_path, [(40, 40)] * 12)
    for index in (3, 7):  # 2 of 12 are over a tenth
        broken.images[index].path.write_bytes(b"no image")
    loader = eval_loader(
        broken, batch_size=1, image_size=32, max_size=64, on_unreadable=lambda index, message: None
    )
    with pytest.raises(DataError, match=r"too many unreadable images: 2 of 12, .*image 7"):
        list(loader)
    (entry,) = make_dataset(tmp_path, [(40, 40)]).images
    entry.path.write_bytes(b"no image")
    alone = dataclasses.replace(broken, images=(entry,))
    with pytest.raises(DataError, match="1 of 1"):
        training(alone, batch_size=1, on_unreadable=lambda index, message: None)


@pytest.mark.parametrize(
    ("method", "script", "workers"),
    [
        ("fork", "f()", 1),
        ("spawn", "f()", 0),
        ("spawn", "if __name__ == '__main__':\n    f()", 1),
    ],
)
def test_loader_without_main_guard_uses_no_spawned_workers(
    dataset: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    script: str,
    workers: int,
) -> None:
    (tmp_path / "script.py").write_text(script)
    monkeypatch.setattr(multiprocessing, "get_start_method", lambda allow_none: method)
    monkeypatch.setattr(
        sys.modules["__main__"], "__file__", str(tmp_path / "script.py"), raising=False
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loader = eval_loader(dataset, batch_size=1, image_size=32, max_size=64, workers=1)
    assert loader.num_workers == workers
    assert ["put its code under if __name__" in str(w.message) for w in caught] == [True] * (
        not workers
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["train", "eval"])
def test_unreadable_image_is_one_clean_line(tmp_path: Path, workers: int, kind: str) -> None:
    broken = make_dataset(tmp_path, [(40, 40)] * 3)
    path = broken.images[1].path
    path.write_bytes(path.read_bytes()[:200])
    common: dict[str, Any] = {"batch_size": 1, "image_size": 32, "max_size": 64, "workers": workers}
    loader = (
        train_loader(broken, steps=3, seed=0, **common)
        if kind == "train"
        else eval_loader(broken, **common)
    )
    with pytest.raises(ImageError) as error:
        list(loader)
    assert str(error.value).startswith(f"{path}: cannot be read: ")
    assert "\n" not in str(error.value)
    assert "Traceback" not in str(error.value)


def test_what_travels_to_workers_is_small(tmp_path: Path) -> None:
    annotations = tuple(Annotation((1.0, 2.0, 3.0, 4.0), 0) for _ in range(10))
    images = tuple(LabelledImage(tmp_path / f"größe {i}.jpg", i, annotations) for i in range(1000))
    many = Dataset(images, ("a",), (1,), "train", "coco", tmp_path)
    loader = eval_loader(many, batch_size=1, image_size=32, max_size=64)
    size = len(pickle.dumps(loader.dataset))
    # Per object four float32 and an int64; per image a path, and little else.
    assert size < 1000 * (10 * 24 + len(bytes(images[0].path)) + 50) + 6000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"workers": -1}, "workers -1"),
        ({"rank": 2, "world_size": 2}, "rank 2"),
        ({"rank": -1}, "rank -1"),
    ],
)
def test_numbers_out_of_range(dataset: Dataset, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        training(dataset, **changes)


def test_a_closed_loader_frees_the_images_that_it_cached(dataset: Dataset) -> None:
    loader = train_loader(dataset, batch_size=4, steps=4, cache="ram", **PLAIN_64)
    list(loader)
    cache = weakref.ref(loader.dataset.images.cache)  # type: ignore[attr-defined]
    assert cache() is not None
    loader.close()
    del loader
    gc.collect()
    assert cache() is None


def test_empty_data(tmp_path: Path) -> None:
    empty = make_dataset(tmp_path, [])
    with pytest.raises(ValueError, match=r"split 'train' of .* has no image"):
        training(empty)
    with pytest.raises(ValueError, match="has no image"):
        eval_loader(empty, batch_size=1, image_size=32, max_size=64)


@pytest.mark.parametrize(
    ("cpus", "processes", "gpu", "expected"),
    [
        (1, 1, False, 0),
        (2, 1, False, 1),
        (64, 1, False, 1),
        (64, 1, True, 8),
        (4, 1, True, 3),
        (8, 4, True, 1),
        (8, 8, True, 0),
        (4, 8, True, 0),
    ],
)
def test_default_workers(
    monkeypatch: pytest.MonkeyPatch, cpus: int, processes: int, gpu: bool, expected: int
) -> None:
    monkeypatch.setattr(loading, "usable_cpus", lambda: cpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert default_workers() == expected


def test_any_corner_moves_images_and_boxes_together(dataset: Dataset) -> None:
    plain: dict[str, Any] = {
        "batch_size": 4,
        "steps": 8,
        "seed": 1,
        "image_size": 64,
        "max_size": 64,
        "scale_jitter": (0.5, 1.0),
        "horizontal_flip": 0.0,
        "fill": (9, 9, 9),
    }
    corners = set()
    for still, moved in zip(
        train_loader(dataset, **plain), train_loader(dataset, any_corner=True, **plain), strict=True
    ):
        assert torch.equal(still.sizes, moved.sizes)
        assert torch.equal(still.targets.labels, moved.targets.labels)
        height, width = still.images.shape[-2:]
        for i, (h, w) in enumerate(still.sizes.tolist()):
            image = still.images[i, :, :h, :w]
            found = [
                (top, left)
                for top in {0, height - h}
                for left in {0, width - w}
                if torch.equal(moved.images[i, :, top : top + h, left : left + w], image)
            ]
            assert len(found) == 1
            top, left = found[0]
            # What is not the image is padding.
            rest = int(moved.images[i].sum()) - int(image.sum())
            assert rest == 9 * 3 * (height * width - h * w)
            real = still.targets.labels[i] != BACKGROUND
            shift = torch.tensor([left, top, left, top], dtype=torch.float32)
            expected = still.targets.boxes[i][real] + shift
            torch.testing.assert_close(moved.targets.boxes[i][real], expected)
            corners.add((top > 0, left > 0))
    assert corners == {(False, False), (False, True), (True, False), (True, True)}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Nine landscape and seven portrait images, whose sizes the labels state."""
    sizes = [(40, 60) if i % 2 == 0 or i == 1 else (60, 40) for i in range(16)]
    dataset = make_dataset(tmp_path_factory.mktemp("mixed"), sizes)
    images = tuple(
        dataclasses.replace(image, height=height, width=width)
        for image, (height, width) in zip(dataset.images, sizes, strict=True)
    )
    return dataclasses.replace(dataset, images=images)


def orientations(batches: Iterable[Batch]) -> list[int]:
    """The number of orientations in each batch."""
    return [len({bool(h < w) for h, w in batch.sizes.tolist()}) for batch in batches]


PLAIN_64: dict[str, Any] = {"seed": 3, "image_size": 64, "max_size": 96}


def test_steps_have_images_of_similar_aspect_ratio(mixed: Dataset) -> None:
    batches = list(train_loader(mixed, batch_size=4, steps=12, **PLAIN_64))
    stream = [index for batch in batches for index in batch.indices.tolist()]
    epochs = [stream[i : i + 16] for i in range(0, 48, 16)]
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    # Of 9 and 7 images in batches of 4, one batch per epoch has both.
    assert orientations(batches).count(2) == 3
    companions = [{*batch.indices.tolist()} for batch in batches if 0 in batch.indices.tolist()]
    assert len(set.union(*companions)) > 4  # with others in each epoch
    ungrouped = train_loader(mixed, batch_size=4, steps=12, aspect_ratio_grouping=False, **PLAIN_64)
    assert orientations(ungrouped).count(2) > 6


def test_grouped_steps_where_epochs_do_not_end_with_a_batch(mixed: Dataset) -> None:
    batches = list(train_loader(mixed, batch_size=3, steps=32, **PLAIN_64))
    stream = [index for batch in batches for index in batch.indices.tolist()]
    epochs = [stream[i : i + 16] for i in range(0, 96, 16)]
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs)
    # At most one batch on the border between the orientations, and one between two epochs.
    assert orientations(batches).count(2) <= 6 + 5
    assert_same(train_loader(mixed, batch_size=3, steps=32, start_step=9, **PLAIN_64), batches[9:])
    ranks = [
        list(train_loader(mixed, batch_size=1, steps=32, rank=r, world_size=3, **PLAIN_64))
        for r in range(3)
    ]
    for batch, *parts in zip(batches, *ranks, strict=True):
        assert batch.indices.tolist() == [int(part.indices[0]) for part in parts]


def test_batch_larger_than_the_data(mixed: Dataset) -> None:
    (batch, _) = train_loader(mixed, batch_size=40, steps=2, **PLAIN_64)
    assert Counter(batch.indices.tolist()).keys() == set(range(16))


def test_quarter_turns_keep_the_images_of_a_step_alike(mixed: Dataset) -> None:
    landscape = dataclasses.replace(
        mixed, images=tuple(image for image in mixed.images if image.width > image.height)
    )
    options = PLAIN_64 | {"rotate90": True}
    batches = list(train_loader(landscape, batch_size=4, steps=16, **options))
    assert orientations(batches) == [1] * 16
    turned = sum(bool(batch.sizes[0, 0] > batch.sizes[0, 1]) for batch in batches)
    assert 3 < turned < 13
