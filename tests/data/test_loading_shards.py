"""Training from shards: the batches of the folder, and an order in which processes share shards."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from labelled_folders import assert_same, train_loader, training
from PIL import Image

from retinanet.data import Dataset, convert, read_dataset
from retinanet.data.archives import archive_of
from retinanet.data.dataset import Annotation, LabelledImage
from retinanet.data.loading import eval_loader
from retinanet.errors import DataError, ImageError

COUNT = 23


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """23 small images of several sizes, some without objects."""
    root = tmp_path_factory.mktemp("images")
    images = []
    for i in range(COUNT):
        path = root / f"image {i:02d}.{'jpg' if i % 2 else 'png'}"
        size = (30 + 2 * i, 60 - i)
        noise = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        objects = tuple(Annotation((1.5 + n, 2, 11 + n, 14), n % 3, n) for n in range(i % 4))
        images.append(LabelledImage(path, i, objects, size[1], size[0]))
    return Dataset(tuple(images), ("a", "b", "c"), (1, 2, 3), "train", "coco", root)


@pytest.fixture(scope="module")
def shards(folder: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The same in eight shards of three and less."""
    out = tmp_path_factory.mktemp("shards") / "out"
    convert({"train": folder}, out, "webdataset", shard_size="3")
    return replace(read_dataset(out, "all"), split="train")


def drawn(dataset: Dataset, world_size: int, batch_size: int, steps: int, **more: Any) -> list[Any]:
    """[rank][step]: the indices that a process meets."""
    return [
        [
            batch.indices.tolist()
            for batch in train_loader(
                dataset, batch_size=batch_size, steps=steps, seed=3, image_size=32, max_size=32,
                order="shards", rank=rank, world_size=world_size, **more,
            )
        ]
        for rank in range(world_size)
    ]  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_folder(folder: Dataset, shards: Dataset, workers: int) -> None:
    assert_same(training(shards, workers=workers), training(folder))
    options: Any = {"batch_size": 5, "image_size": 32, "max_size": 64}
    assert_same(
        list(eval_loader(shards, workers=workers, **options)), list(eval_loader(folder, **options))
    )


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_every_image_once_an_epoch_over_all_processes(
    shards: Dataset, world_size: int, batch_size: int
) -> None:
    epochs = 3
    steps = math.ceil(epochs * COUNT / (world_size * batch_size))
    by_rank = drawn(shards, world_size, batch_size, steps)
    assert {len(batches) for batches in by_rank} == {steps}
    assert {len(batch) for batches in by_rank for batch in batches} == {batch_size}
    # Place s * P * B + r * B + i of the whole stream, as by images.
    stream = [
        index for of_step in zip(*by_rank, strict=True) for batch in of_step for index in batch
    ]
    passes = [stream[epoch * COUNT : (epoch + 1) * COUNT] for epoch in range(epochs)]
    assert all(sorted(item) == list(range(COUNT)) for item in passes)
    assert len({tuple(item) for item in passes}) == epochs


def archive_numbers(dataset: Dataset, indices: list[int]) -> list[int]:
    names = list(dict.fromkeys(archive_of(image.path) for image in dataset.images))
    return [names.index(archive_of(dataset.images[index].path)) for index in indices]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("window", [1, 2, 4])
def test_a_process_reads_a_few_shards_of_its_own_at_a_time(
    shards: Dataset, world_size: int, window: int
) -> None:
    steps = COUNT // world_size
    seen: list[list[int]] = [
        archive_numbers(shards, list(chain(*batches)))
        for batches in drawn(shards, world_size, 1, steps, shard_window=window)
    ]
    # Eight shards; where two pieces meet a shard is read by both.
    assert sum(len(set(item)) for item in seen) <= 8 + world_size - 1
    assert max(Counter(shard for item in seen for shard in set(item)).values()) <= 2
    for item in seen:
        turns = list(dict.fromkeys(item))
        reached = 0
        for shard in item:
            # Never more than a window ahead, and never back once a window is done.
            position = turns.index(shard)
            assert position // window >= reached
            reached = position // window
    if window == 4 and world_size == 1:
        assert seen[0][:12] != sorted(seen[0][:12], key=seen[0].index)  # mixed within the window


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_by_shards_as_if_never_stopped(shards: Dataset, workers: int) -> None:
    options: Any = {"order": "shards", "shard_window": 2, "steps": 12, "rank": 1, "world_size": 2}
    whole = training(shards, **options)
    for start in (1, 5, 11):
        rest = training(shards, **options, start_step=start, workers=workers)
        assert_same(rest, whole[start:])


def test_images_outside_of_shards_are_refused(folder: Dataset, shards: Dataset) -> None:
    with pytest.raises(DataError, match=r"data.order=shards: .*image 00.png is in no shard; c"):
        training(folder, order="shards")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_changes_while_it_is_read(
    folder: Dataset, tmp_path: Path, workers: int
) -> None:
    convert({"train": folder}, tmp_path / "out", "webdataset")
    dataset = read_dataset(tmp_path / "out", "all")
    loader = train_loader(
        dataset, batch_size=4, steps=9, seed=0, image_size=32, max_size=32, workers=workers
    )
    shard = tmp_path / "out" / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(ImageError, match=r"train-000000.tar/image \d\d.\w+: is not at byte \d+"):
        list(loader)
    shard.unlink()
    loader = train_loader(
        dataset, batch_size=4, steps=9, seed=0, image_size=32, max_size=32, workers=workers
    )
    with pytest.raises(ImageError, match=r"train-000000.tar/image \d\d.\w+: .*[Nn]o such file"):
        list(loader)


@pytest.fixture(scope="module")
def bucket(shards: Dataset) -> Iterator[str]:
    """The shards on an s3 server of this machine."""
    server_module = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        store = s3fs.S3FileSystem()
        store.mkdir("shards-to-train-from")
        store.put(str(shards.source), "shards-to-train-from/of", recursive=True)
        yield "s3://shards-to-train-from/of"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_on_s3(folder: Dataset, bucket: str, workers: int) -> None:
    dataset = read_dataset(bucket, "all")
    assert_same(training(dataset, workers=workers), training(folder))
    assert len(training(dataset, workers=workers, order="shards")) == 7
    with pytest.raises(DataError, match="no labelled data found"):
        read_dataset("s3://nobucket/shards")
