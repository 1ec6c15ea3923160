"""The cache of decoded images gives what reading them gives."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from labelled_folders import training
from PIL import Image

from retinanet.data import cache as module
from retinanet.data.cache import ImageCache, build_cache
from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.data.images import read_image, read_reduced
from retinanet.data.tiling import tile_dataset
from retinanet.structures import Batch

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux")


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Six images, some of which a JPEG decoder reduces to a half or a quarter."""
    images = []
    sizes = [(40, 50), (131, 170), (265, 331), (66, 67), (300, 140), (33, 90)]
    for i, (height, width) in enumerate(sizes):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), np.uint8)
        path = tmp_path / f"{i}.{('jpg', 'png')[i % 3 == 0]}"
        Image.fromarray(pixels).save(path)
        images.append(LabelledImage(path, i, (Annotation((3, 4, 30, 30), 0),), width, height))
    return Dataset(tuple(images), ("a",), (1,), "train", "coco", tmp_path)


def assert_same(expected: list[Batch], found: list[Batch]) -> None:
    assert len(expected) == len(found)
    for first, second in zip(expected, found, strict=True):
        assert torch.equal(first.images, second.images)
        assert torch.equal(first.indices, second.indices)
        assert torch.equal(first.targets.boxes, second.targets.boxes)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_batches_are_those_without_a_cache(
    dataset: Dataset, kind: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options: dict[str, Any] = {"steps": 6, "multi_scale": (32, 48), "scale_jitter": (0.5, 1.0)}
    expected = training(dataset, **options)
    assert_same(expected, training(dataset, cache=kind, workers=workers, **options))
    assert not list((tmp_path / "cache").glob("*/*"))  # the file has no name


@pytest.mark.parametrize("workers", [0, 1])
def test_tiles_are_those_without_a_cache(dataset: Dataset, workers: int) -> None:
    tiles = tile_dataset(dataset, 64, 0.2)
    options: dict[str, Any] = {"steps": 12, "tile": 64, "image_size": 64}
    expected = training(tiles, **options)
    assert_same(expected, training(tiles, cache="ram", workers=workers, **options))


def test_files_are_decoded_once(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"steps": 6, "batch_size": 3, "cache": "ram"}  # three epochs
    expected = training(dataset, **options | {"cache": "none"})
    seen: list[Path] = []

    def counted(source: Any, *sides: int) -> Any:
        seen.append(Path(source))
        return read_reduced(source, *sides)

    monkeypatch.setattr("retinanet.data.loading.read_reduced", counted)
    assert_same(expected, training(dataset, **options))
    assert sorted(seen) == sorted(image.path for image in dataset.images)


def test_cache_keeps_reductions_apart(dataset: Dataset) -> None:
    path = dataset.images[2].path  # 265 x 331
    cache = ImageCache(1, 10**6)
    reads = 0
    for _ in range(2):
        for wanted in ((33, 64), (66, 100), (200, 300), None):

            def read(wanted: tuple[int, int] | None = wanted) -> Any:
                nonlocal reads
                reads += 1
                image = read_image(path) if wanted is None else None
                return (image, (265, 331)) if image is not None else read_reduced(path, *wanted)  # type: ignore[misc]

            expected = read_image(path) if wanted is None else read_reduced(path, *wanted)[0]
            image, size = cache.read(0, wanted, read)
            assert torch.equal(image, expected)
            assert size == (265, 331)
    assert reads == 3  # at a quarter, at a half, and whole


@pytest.mark.parametrize("full", ["capacity", "disk"])
def test_images_that_do_not_fit_are_read_again(
    dataset: Dataset, full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if full == "disk":

        def pwrite(*_: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "pwrite", pwrite)
    cache = ImageCache(2, 3 * 40 * 50 + 10 if full == "capacity" else 10**6, tmp_path / "a")
    reads = []

    def read(number: int) -> Any:
        reads.append(number)
        return read_reduced(dataset.images[0].path, 32, 64)

    for number in (0, 1, 0, 1):
        found = cache.read(number, (32, 64), lambda number=number: read(number))  # type: ignore[misc]
        assert torch.equal(found[0], read_image(dataset.images[0].path))
    assert reads == ([0, 1, 1] if full == "capacity" else [0, 1, 0, 1])


def in_place(image: torch.Tensor, boxes: torch.Tensor, labels: torch.Tensor, generator: Any) -> Any:
    """A transform of a user that changes the image itself."""
    image //= 2
    return image, boxes, labels


def test_transform_in_place_leaves_the_cache_as_it_is(dataset: Dataset) -> None:
    single = replace(dataset, images=dataset.images[:1])  # 40 x 50: not resized
    options: dict[str, Any] = {"steps": 3, "batch_size": 1, "image_size": 40, "max_size": 50}
    options |= {"colour": 0, "vertical_flip": 0, "horizontal_flip": 0, "crop": False}
    options |= {"scale_jitter": (1.0, 1.0), "transform": f"{__name__}:in_place"}
    expected = training(single, **options)
    assert_same(expected, training(single, cache="ram", **options))


def test_build_cache_that_cannot_be_made_says_so(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    cache, message = build_cache(dataset, "disk")
    assert cache is None
    assert message is not None
    assert message.startswith("warning: data.cache=disk: [Errno ")
    assert message.endswith(": images are not cached")


def test_build_cache_elsewhere_than_on_linux_says_so(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build_cache(dataset, "none") == (None, None)
    monkeypatch.setattr(module.sys, "platform", "darwin")
    message = "warning: data.cache=disk needs Linux: images are not cached"
    assert build_cache(dataset, "disk") == (None, message)
