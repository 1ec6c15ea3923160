"""What counts as an image, and what is said where there is none."""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from white_finder import Pixels

from retinanet.errors import DataError, ImageError
from retinanet.inference import Failure, find_sources
from retinanet.inference.sources import Source, is_single, is_video, iter_sources


def names(given: Any) -> list[str]:
    return [source.name for source in find_sources(given)]


def test_file(folder: Path) -> None:
    assert names(folder / "a.png") == names(str(folder / "a.png")) == ["a.png"]


def test_folder_with_all_below_it_by_relative_path(folder: Path) -> None:
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "b.png").write_bytes((folder / "a.png").read_bytes())
    assert names(folder) == ["a.png", "left/a.png", "right/a.png"]


def test_glob(folder: Path) -> None:
    assert names(str(folder / "*.png")) == ["a.png"]
    assert names(str(folder / "*")) == ["a.png"]
    assert names(str(folder / "*" / "*.png")) == ["left/a.png", "right/a.png"]
    assert names(str(folder / "**" / "*.png")) == ["a.png", "left/a.png", "right/a.png"]


def test_file_whose_name_looks_like_a_glob(folder: Path) -> None:
    file = folder / "a[1].png"
    file.write_bytes((folder / "a.png").read_bytes())
    assert names(file) == ["a[1].png"]
    assert is_single(file)


def test_file_of_another_suffix_is_taken_when_named(folder: Path) -> None:
    file = folder / "image.dat"
    file.write_bytes((folder / "a.png").read_bytes())
    (source,) = find_sources(file)
    assert source.read().shape == (3, 128, 192)


def test_equal_names_in_a_list_are_told_apart_by_their_folders(folder: Path) -> None:
    assert names([folder / "left", folder / "right"]) == ["left/a.png", "right/a.png"]
    assert names([folder / "left" / "a.png", folder / "a.png"]) == ["left/a.png", "a.png"]
    # Names that differ stay short.
    Image.new("RGB", (8, 8)).save(folder / "right" / "b.png")
    assert names([folder / "left" / "a.png", folder / "right" / "b.png"]) == ["a.png", "b.png"]


def test_pixels(square: Pixels, folder: Path) -> None:
    tensor = torch.from_numpy(square).permute(2, 0, 1)
    given = [
        square,
        Image.fromarray(square),
        tensor,
        tensor.float() / 255,
        (folder / "a.png").read_bytes(),
        folder / "a.png",
        str(folder / "a.png"),
    ]
    for source in find_sources(given):
        torch.testing.assert_close(source.read(), tensor, rtol=0, atol=0)
        assert is_single(source.image)
    grey = square[:, :, 0]
    for one in (grey, grey[:, :, None], tensor[:1], Image.fromarray(grey)):
        (source,) = find_sources(one)
        torch.testing.assert_close(source.read(), tensor, rtol=0, atol=0)


def test_batches(square: Pixels) -> None:
    for batch in (np.stack([square, square]), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)):
        assert len(set(names(batch))) == 2
        assert not is_single(batch)


def test_encoded_bytes() -> None:
    encoded = BytesIO()
    Image.new("RGB", (20, 10)).save(encoded, "JPEG")
    (source,) = find_sources(encoded.getvalue())
    assert source.read().shape == (3, 10, 20)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere/a.jpg", "nowhere/a.jpg: there is no such file or folder"),
        ("nowhere/*.jpg", r"nowhere/\*.jpg: no image matches"),
        (17, "cannot search a int; give a path"),
        ({"a": 1}, "cannot search a dict"),
        (["nowhere/a.jpg"], "nowhere/a.jpg: there is no such file"),
        (None, "cannot search a NoneType"),
    ],
)
def test_nothing_to_search(given: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_sources(given)


def test_folder_without_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"no image in this folder \(.*\.jpg"):
        find_sources(tmp_path)


def test_glob_that_matches_no_image(folder: Path) -> None:
    with pytest.raises(DataError, match="no image matches"):
        find_sources(str(folder / "*.txt"))


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
def test_pixels_that_are_no_image(image: Any, message: str) -> None:
    (source,) = find_sources(image)
    with pytest.raises(ImageError, match=message):
        source.read()


def test_what_cannot_be_found_is_a_failure_in_its_place(folder: Path) -> None:
    found = list(iter_sources([folder / "a.png", "nowhere.png", 17]))
    assert [getattr(one, "name", None) for one in found] == ["a.png", None, None]
    assert found[1:] == [
        Failure("nowhere.png", "nowhere.png: there is no such file or folder", DataError()),
        Failure(
            "image_000002",
            "cannot search a int; give a path, a folder, a glob, an array, a tensor, a PIL image, "
            "the bytes of an image file, or a list of them",
            DataError(),
        ),
    ]


def test_an_iterator_is_not_run_ahead_of() -> None:
    taken = 0

    def images() -> Any:
        nonlocal taken
        for _ in range(10):
            taken += 1
            yield np.zeros((4, 4), np.uint8)

    lazily = iter_sources(images())
    next(lazily)
    assert taken == 1


def test_relative_paths_stay_as_they_were_given(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert [str(source.image) for source in find_sources("left")] == [os.path.join("left", "a.png")]


def test_a_file_given_twice_is_searched_once_where_asked(folder: Path) -> None:
    given = [folder / "left", str(folder / "left" / "a.png"), folder, folder / "gone.png"]
    found = list(iter_sources(given, once=True))
    assert [one.name for one in found if isinstance(one, Source)] == [
        "left/a.png",
        "a.png",
        "right/a.png",
    ]
    assert isinstance(found[-1], Failure)
    assert len(list(iter_sources(given))) == 6  # a list of n images has n answers


def test_a_link_to_a_file_is_a_image_of_its_own(folder: Path) -> None:
    """Stores without duplicates are full of links: each name wants its answer."""
    link = folder / "b.png"
    link.symlink_to(folder / "a.png")
    found = list(iter_sources([folder / "a.png", link], once=True))
    assert [one.name for one in found] == ["a.png", "b.png"]


def test_pixels_are_never_repeats(square: Pixels) -> None:
    assert len(list(iter_sources([square, square], once=True))) == 2


def test_reduced_reading(tmp_path: Path, square: Pixels) -> None:
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


def test_a_video_is_told_by_its_suffix_and_a_camera_by_its_number(tmp_path: Path) -> None:
    assert is_video("clips/a.MP4")
    assert is_video("0")
    assert not is_video("a.jpg")
    for name in ("2024", "day.mov"):
        (tmp_path / name).mkdir()
        assert not is_video(tmp_path / name)


def test_a_folder_whose_name_is_a_number_is_no_camera(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_video("2024")
    (tmp_path / "2024").mkdir()
    assert not is_video("2024")
