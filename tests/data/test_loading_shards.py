"""Training from shards: the batches of the folder, and an order by shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
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


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_folder(folder: Dataset, shards: Dataset, workers: int) -> None:
    assert_same(training(shards, workers=workers), training(folder))
    options: Any = {"batch_size": 5, "image_size": 32, "max_size": 64}
    assert_same(
        list(eval_loader(shards, workers=workers, **options)), list(eval_loader(folder, **options))
    )


@pytest.mark.parametrize("window", [1, 4])
def test_order_by_shards_reads_a_few_shards_at_a_time(shards: Dataset, window: int) -> None:
    options: Any = {"order": "shards", "shard_window": window, "batch_size": 1}
    batches = training(shards, steps=3 * COUNT, **options)
    stream = [int(batch.indices[0]) for batch in batches]
    epochs = [stream[epoch * COUNT : (epoch + 1) * COUNT] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    archives = [archive_of(image.path) for image in shards.images]
    for epoch in epochs:
        read = [archives[index] for index in epoch]
        turns = list(dict.fromkeys(read))
        assert len(turns) == 8
        # Never back once a window is done, and mixed within it.
        assert [turns.index(a) // window for a in read] == sorted(
            turns.index(a) // window for a in read
        )
        assert (read != sorted(read, key=turns.index)) == (window > 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_order_by_shards_resumes_and_is_shared_by_processes(shards: Dataset, workers: int) -> None:
    options: Any = {"order": "shards", "shard_window": 2, "batch_size": 2}
    whole = training(shards, steps=12, **options)
    assert_same(training(shards, steps=12, start_step=5, workers=workers, **options), whole[5:])
    options |= {"world_size": 2, "batch_size": 1}
    ranks = [training(shards, steps=12, rank=rank, **options) for rank in range(2)]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert batch.indices.tolist() == [int(part.indices[0]) for part in parts]


def test_images_outside_of_shards_are_refused(folder: Dataset, shards: Dataset) -> None:
    with pytest.raises(DataError, match=r"data.order=shards: .*image 00.png is in no shard; c"):
        training(folder, order="shards")


def test_a_shard_that_changes_while_it_is_read(folder: Dataset, tmp_path: Path) -> None:
    convert({"train": folder}, tmp_path / "out", "webdataset")
    dataset = read_dataset(tmp_path / "out", "all")
    options: Any = {"batch_size": 4, "steps": 9, "seed": 0, "image_size": 32, "max_size": 32}
    loader = train_loader(dataset, **options)
    shard = tmp_path / "out" / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(ImageError, match=r"train-000000.tar/image \d\d.\w+: .* is cut off"):
        list(loader)
    shard.unlink()
    with pytest.raises(ImageError, match=r"train-000000.tar/image \d\d.\w+: .*[Nn]o such file"):
        list(train_loader(dataset, **options))


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
def test_shards_on_s3(folder: Dataset, bucket: str) -> None:
    dataset = read_dataset(bucket, "all")
    for workers in (0, 2):
        assert_same(training(dataset, workers=workers), training(folder))
    with pytest.raises(DataError, match="no labelled data found"):
        read_dataset("s3://nobucket/shards")
