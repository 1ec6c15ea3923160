"""Sources of images: paths, folders, globs, pixels, and their errors."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from retinanet.errors import DataError, ImageError
from retinanet.inference import Failure, find_sources
from retinanet.inference.sources import Source, is_single, is_video, iter_sources
from white_finder import Pixels


def names(given: Any) -> list[str]:
    return [source.name for source in find_sources(given)]


def test_find_sources_of_files_and_folders(folder: Path) -> None:
    assert names(folder / "a.png") == names(str(folder / "a.png")) == ["a.png"]
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "b.png").write_bytes((folder / "a.png").read_bytes())
    assert names(folder) == ["a.png", "left/a.png", "right/a.png"]
    file = folder / "image.dat"  # the suffix does not matter for a file that is named
    file.write_bytes((folder / "a.png").read_bytes())
    (source,) = find_sources(file)
    assert source.read().shape == (3, 128, 192)


def test_find_sources_leaves_out_training_runs(folder: Path) -> None:
    plots = folder / "runs" / "cats" / "plots"
    plots.mkdir(parents=True)
    (plots / "loss.png").write_bytes((folder / "a.png").read_bytes())
    assert "runs/cats/plots/loss.png" in names(folder)
    for name in ("config.toml", "run.json", "log.jsonl"):
        (plots.parent / name).touch()
    assert names(folder) == ["a.png", "left/a.png", "right/a.png"]
    assert names(plots) == ["loss.png"]  # named, it is read


def test_find_sources_of_globs(folder: Path) -> None:
    assert names(str(folder / "*.png")) == ["a.png"]
    assert names(str(folder / "*")) == ["a.png"]
    assert names(str(folder / "*" / "*.png")) == ["left/a.png", "right/a.png"]
    (folder / "left" / "loop").symlink_to(folder)
    assert names(str(folder / "**" / "*.png")) == ["a.png", "left/a.png", "right/a.png"]
    file = folder / "a[1].png"  # an existing file is no glob
    file.write_bytes((folder / "a.png").read_bytes())
    assert names(file) == ["a[1].png"]
    assert is_single(file)


def test_find_sources_names_files_by_their_folders_only_where_names_repeat(folder: Path) -> None:
    assert names([folder / "left", folder / "right"]) == ["left/a.png", "right/a.png"]
    assert names([folder / "left" / "a.png", folder / "a.png"]) == ["left/a.png", "a.png"]
    Image.new("RGB", (8, 8)).save(folder / "right" / "b.png")
    assert names([folder / "left" / "a.png", folder / "right" / "b.png"]) == ["a.png", "b.png"]


def test_find_sources_keeps_relative_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert [str(source.image) for source in find_sources("left")] == [os.path.join("left", "a.png")]


def test_find_sources_of_pixels_and_bytes(square: Pixels, folder: Path) -> None:
    tensor = torch.from_numpy(square).permute(2, 0, 1)
    grey = square[:, :, 0]
    data = (folder / "a.png").read_bytes()
    given = [square, Image.fromarray(square), tensor, tensor.float() / 255, data]
    given += [grey, grey[:, :, None], tensor[:1], Image.fromarray(grey)]
    for source in find_sources([*given, folder / "a.png", str(folder / "a.png")]):
        torch.testing.assert_close(source.read(), tensor, rtol=0, atol=0)
        assert is_single(source.image)
    encoded = BytesIO()
    Image.new("RGB", (20, 10)).save(encoded, "JPEG")
    (source,) = find_sources(encoded.getvalue())
    assert source.read().shape == (3, 10, 20)
    for batch in (np.stack([square, square]), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)):
        assert len(set(names(batch))) == 2
        assert not is_single(batch)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere/a.jpg", "nowhere/a.jpg: there is no such file or folder"),
        ("nowhere/*.jpg", r"nowhere/\*.jpg: no image matches"),
        ("{folder}/*.txt", "no image matches"),
        ("{folder}/a**b.png", "invalid glob"),
        ("{folder}/empty", r"no image in this folder \(.*\.jpg"),
        (17, "unknown type of source: int; give a path"),
        ({"a": 1}, "unknown type of source: dict"),
        (["nowhere/a.jpg"], "nowhere/a.jpg: there is no such file"),
        (None, "unknown type of source: NoneType"),
    ],
)
def test_find_sources_without_images_is_an_error(given: Any, message: str, folder: Path) -> None:
    (folder / "empty").mkdir()
    (folder / "empty" / "notes.txt").write_text("")
    with pytest.raises(DataError, match=message):
        find_sources(given.format(folder=folder) if isinstance(given, str) else given)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((3, 48, 64), np.uint8), r"image_000000: .*\(3, 48, 64\)"),
        (np.zeros(12, np.uint8), r"image_000000: .*\(12,\)"),
        (np.zeros((0, 5, 3), np.uint8), r"\(0, 5, 3\)"),
        (np.full((4, 4), "x", dtype=object), "image_000000: "),
        (torch.zeros(48, 64, 3), "image_000000: "),
        (b"these bytes are no image", "image_000000: "),
    ],
)
def test_source_that_is_no_image_is_an_error(image: Any, message: str) -> None:
    (source,) = find_sources(image)
    with pytest.raises(ImageError, match=message):
        source.read()


def test_iter_sources_yields_failures_in_their_positions(folder: Path) -> None:
    found = list(iter_sources([folder / "a.png", "nowhere.png", 17]))
    assert [getattr(source, "name", None) for source in found] == ["a.png", None, None]
    assert found[1:] == [
        Failure("nowhere.png", "nowhere.png: there is no such file or folder", DataError()),
        Failure(
            "image_000002",
            "unknown type of source: int; give a path, a folder, a glob, an array, a tensor, a "
            "PIL image, the bytes of an image file, or a list of them",
            DataError(),
        ),
    ]


def test_iter_sources_of_an_iterator_is_lazy() -> None:
    images = iter([np.zeros((4, 4), np.uint8)] * 10)
    next(iter_sources(images))
    assert len(list(images)) == 9


def test_iter_sources_once_leaves_out_repeated_files(folder: Path, square: Pixels) -> None:
    given = [folder / "left", str(folder / "left" / "a.png"), folder, folder / "gone.png"]
    found = list(iter_sources(given, once=True))
    sources = [source.name for source in found if isinstance(source, Source)]
    assert sources == ["left/a.png", "a.png", "right/a.png"]
    assert isinstance(found[-1], Failure)
    assert len(list(iter_sources(given))) == 6  # a list of n images has n results
    link = folder / "b.png"  # a link is an image of its own
    link.symlink_to(folder / "a.png")
    found = list(iter_sources([folder / "a.png", link], once=True))
    assert [source.name for source in found if isinstance(source, Source)] == ["a.png", "b.png"]
    assert len(list(iter_sources([square, square], once=True))) == 2


def test_source_read_reduced_returns_the_size_of_the_whole(tmp_path: Path, square: Pixels) -> None:
    file = tmp_path / "large.jpg"
    Image.fromarray(square).resize((1024, 768)).save(file)
    pixels, size = Source(file, "large.jpg").read_reduced(96, 200)
    assert tuple(pixels.shape) == (3, 192, 256)
    assert size == (768, 1024)
    pixels, size = Source(square, "square").read_reduced(16, 20)
    assert tuple(pixels.shape[1:]) == size == (128, 192)
    with pytest.raises(ImageError, match=r"^odd: unsupported array layout: shape \(2, 2, 7\)"):
        Source(np.zeros((2, 2, 7)), "odd").read_reduced(16, 20)
    with pytest.raises(ImageError, match="there is no such file"):
        Source("gone.jpg", "gone.jpg").read_reduced(16, 20)


def test_is_video_by_suffix_or_camera_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_video("clips/a.MP4")
    assert is_video("0")
    assert is_video("RTSP://camera/live")
    assert not is_video("http://host/a.mp4")  # which is never opened unasked
    assert not is_video("a.jpg")
    assert is_video("2024")
    for name in ("2024", "day.mov"):
        (tmp_path / name).mkdir()
        assert not is_video(name)
        assert not is_video(tmp_path / name)
