"""Images of every kind come out upright, RGB and uint8, or as one line that says why not."""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps, features
from torch import Tensor

from retinanet.data import images
from retinanet.data.image_files import image_size, network_size, stored_size
from retinanet.data.images import pad_batch, read_image, read_reduced, resize_to
from retinanet.data.windows import open_windows
from retinanet.errors import ConfigError, ImageError


@pytest.fixture
def photo() -> Image.Image:
    """Smooth colours with some noise, 40 high and 56 wide: no two corners alike."""
    y, x = np.mgrid[0:40, 0:56]
    noise = np.random.default_rng(0).integers(0, 20, (40, 56))
    pixels = np.stack([x * 4 + noise, y * 5 + noise, 255 - x * 2 - y * 2], axis=2)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def by_pillow(source: Path | bytes) -> Tensor:
    with Image.open(BytesIO(source) if isinstance(source, bytes) else source) as image:
        upright = ImageOps.exif_transpose(image).convert("RGB")
        return torch.from_numpy(np.array(upright)).permute(2, 0, 1)


def encoded(image: Image.Image, format_: str, **options: object) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def with_orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("quality", [30, 100])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_pixels_are_pillows(
    photo: Image.Image, quality: int, subsampling: int, progressive: bool, mode: str
) -> None:
    options: dict[str, object] = {"quality": quality, "progressive": progressive}
    if mode == "RGB":
        options["subsampling"] = subsampling
    data = encoded(photo.convert(mode), "JPEG", **options)
    torch.testing.assert_close(read_image(data), by_pillow(data), rtol=0, atol=0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation(photo: Image.Image, orientation: int, format_: str) -> None:
    if format_ == "WEBP" and not features.check("webp"):
        pytest.skip("this Pillow has no WebP")
    data = encoded(photo, format_, exif=with_orientation(orientation))
    image = read_image(data)
    torch.testing.assert_close(image, by_pillow(data), rtol=0, atol=0)
    assert torch.equal(read_image(Image.open(BytesIO(data))), image)
    assert tuple(image.shape) == ((3, 40, 56) if orientation < 5 else (3, 56, 40))
    assert image_size(data) == tuple(image.shape[-2:])
    assert image.stride()[0] == 1  # the channels of a pixel lie side by side


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP"])
def test_stored_size_unpacks_nothing(
    photo: Image.Image, format_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if format_ == "WEBP" and not features.check("webp"):
        pytest.skip("this Pillow has no WebP")
    data = encoded(photo, format_)

    def refuse(*_: object) -> None:
        raise AssertionError("it was unpacked")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)
    assert stored_size(data) == (40, 56, 0)


GREY_ALPHA = np.array([[[100, 255], [100, 0]]], np.uint8)
RGBA = np.array([[[100, 0, 200, 255], [100, 0, 200, 0], [100, 0, 200, 51]]], np.uint8)


def two_colours(mode: str) -> Image.Image:
    """Of 10, 20, 30 and 200, 100, 50; by a palette if `mode` is P."""
    img = Image.new(mode, (2, 1), 0 if mode == "P" else (10, 20, 30))
    if mode == "P":
        img.putpalette([10, 20, 30, 200, 100, 50])
    img.putpixel((1, 0), 1 if mode == "P" else (200, 100, 50))
    return img


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("source", "format_", "options", "expected"),
    [
        (Image.fromarray(np.uint8([[7, 9]])), "PNG", {}, [[7] * 3, [9] * 3]),
        (Image.fromarray(np.array([[True, False]])), "PNG", {}, [[255] * 3, [0] * 3]),
        (two_colours("P"), "PNG", {}, [[10, 20, 30], [200, 100, 50]]),
        (two_colours("P"), "PNG", {"transparency": 0}, [[255] * 3, [200, 100, 50]]),
        (two_colours("P"), "GIF", {"transparency": 0}, [[255] * 3, [200, 100, 50]]),
        (two_colours("P"), "PNG", {"transparency": b"\0\xff"}, [[255] * 3, [200, 100, 50]]),
        (two_colours("RGB"), "PNG", {"transparency": (10, 20, 30)}, [[255] * 3, [200, 100, 50]]),
        (Image.fromarray(GREY_ALPHA, "LA"), "PNG", {}, [[100] * 3, [255] * 3]),
        # alpha 51 is a fifth: 100 / 5 + 255 * 4 / 5 = 224; 0 + 204 = 204; 40 + 204 = 244
        (Image.fromarray(RGBA), "PNG", {}, [[100, 0, 200], [255] * 3, [224, 204, 244]]),
        # 16 bits: the high byte
        (Image.fromarray(np.uint16([[255, 32768]])), "PNG", {}, [[0] * 3, [128] * 3]),
        (Image.fromarray(np.uint16([[256, 65535]])), "TIFF", {}, [[1] * 3, [255] * 3]),
        (Image.frombytes("I;16B", (2, 1), b"\x80\1\xff\xff"), "TIFF", {}, [[128] * 3, [255] * 3]),
    ],
)
def test_read_image_of_every_mode_is_rgb(
    source: Image.Image, format_: str, options: dict[str, Any], expected: list[list[int]]
) -> None:
    assert read_image(encoded(source, format_, **options))[:, 0].T.tolist() == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),  # 0..1: 127.5 rounds to the even 128
        ([0.0, 0.5, 1.0000002], [0, 128, 255]),  # a rounding error over 1
        ([-0.06, 0.5, 1.08], [0, 128, 255]),  # bicubic resizing overshoots on both sides
        ([0.0, 64.4, 255.0], [0, 64, 255]),  # 0..255
        ([-9.0, 64.4, 267.0], [0, 64, 255]),
        ([0.0, float("nan"), 1.0], [0, 0, 255]),
        ([float("-inf"), 0.5, float("inf")], [0, 128, 255]),
        ([float("nan")] * 3, [0, 0, 0]),
    ],
)
def test_read_image_of_floats_in_a_known_range_scales_and_clamps(
    values: list[float], expected: list[int]
) -> None:
    array = np.array([values], np.float32)
    assert read_image(array)[0].tolist() == [expected]
    assert read_image(torch.from_numpy(array).double())[0].tolist() == [expected]
    assert read_image(encoded(Image.fromarray(array), "TIFF"))[0].tolist() == [expected]


def test_read_image_of_integers_of_8_bits_keeps_them() -> None:
    array = np.array([[0, 100, 255]], np.int32)
    assert read_image(array)[0].tolist() == [[0, 100, 255]]
    assert read_image(torch.tensor(array).long())[0].tolist() == [[0, 100, 255]]
    assert read_image(encoded(Image.fromarray(array), "TIFF"))[0].tolist() == [[0, 100, 255]]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.float32([[-2.1, 0, 2.6]]), "float32 values from -2.1 to 2.6"),  # normalised
        (np.float64([[0, 0.5, 1.2]]), "float64 values from 0 to 1.2"),
        (np.float32([[-123, 0, 151]]), "float32 values from -123 to 151"),  # mean subtracted
        (np.float32([[0, 1000, 4095]]), "float32 values from 0 to 4095"),
        (np.int32([[0, 256, 1000]]), "int32 values from 0 to 1000"),
        (np.int16([[-1, 0, 200]]), "int16 values from -1 to 200"),
    ],
)
def test_read_image_of_an_ambiguous_range_names_value_range(array: np.ndarray, words: str) -> None:
    sources = [array, torch.from_numpy(array)]
    if array.dtype in (np.float32, np.int32):
        sources.append(encoded(Image.fromarray(array), "TIFF"))
    for source in sources:
        with pytest.raises(ImageError, match=r"ambiguous value range: .* value_range=") as error:
            read_image(source)
        assert words in one_line(error)


@pytest.mark.parametrize(
    ("array", "value_range", "expected"),
    [
        (np.float32([[-2, 0, 2, 9]]), (-2, 2), [0, 128, 255, 255]),  # 2/4 * 255 = 127.5
        (np.int32([[0, 500, 1000]]), (0, 1000), [0, 128, 255]),
        (np.uint16([[0, 819, 4095]]), (0, 4095), [0, 51, 255]),  # 819 / 4095 = 1/5
        (np.uint8([[0, 1]]), (0, 1), [0, 255]),
        (np.float32([[0, 0.2, 1]]), (0, 255), [0, 0, 1]),  # a dark image
    ],
)
def test_read_image_with_value_range_scales_and_clamps(
    array: np.ndarray, value_range: tuple[float, float], expected: list[int]
) -> None:
    for source in (array, torch.from_numpy(array)):
        assert read_image(source, value_range=value_range)[0].tolist() == [expected]
        small, _ = read_reduced(source, 1, 9, value_range=value_range)
        assert small[0].tolist() == [expected]
        opened = open_windows(source, value_range=value_range)
        assert opened.read((1, 0, 2, 1))[0].tolist() == [expected[1:2]]
    if array.dtype != np.uint8:
        file = encoded(Image.fromarray(array), "TIFF")
        assert read_image(file, value_range=value_range)[0].tolist() == [expected]
        opened = open_windows(file, value_range=value_range)
        assert opened.read((1, 0, 2, 1))[0].tolist() == [expected[1:2]]


@pytest.mark.parametrize("value_range", [(1, 0), (0, 0), (0, float("inf")), (0,), 255, "ab"])
def test_read_image_with_an_invalid_value_range_raises(value_range: Any) -> None:
    with pytest.raises(ConfigError, match=r"invalid value_range: .*; give \(low, high\)"):
        read_image(np.zeros((2, 2), np.uint8), value_range=value_range)


# --- arrays, tensors, PIL images ---------------------------------------------------------------


def test_array_and_tensor_agree(photo: Image.Image) -> None:
    array = np.array(photo)
    expected = torch.from_numpy(array).permute(2, 0, 1)
    assert torch.equal(read_image(array), expected)
    assert torch.equal(read_image(photo), expected)
    assert torch.equal(read_image(expected), expected)
    assert torch.equal(read_image(expected.float() / 255), expected)
    assert torch.equal(read_image((expected.double() / 255).numpy().transpose(1, 2, 0)), expected)
    assert torch.equal(read_image(array[:, :, 0]), expected[:1].expand(3, -1, -1))
    assert torch.equal(read_image(array[::-1, :, ::-1]), expected.flip(0, 1))
    assert read_image(torch.rand(3, 4, 5, dtype=torch.bfloat16, requires_grad=True)).shape == (
        (3, 4, 5)
    )
    assert read_image(np.array([[True, False]]))[0].tolist() == [[255, 0]]
    for source in (array, expected):  # the caller's memory is not shared
        read_image(source).zero_()
        assert source.any()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (np.zeros(3, np.uint8), "array layout: shape (3,)"),
        (np.zeros((9, 9, 5), np.uint8), "array layout: shape (9, 9, 5)"),
        (np.zeros((2, 2, 2, 2), np.uint8), "array layout: shape (2, 2, 2, 2)"),
        (np.zeros((0, 4, 3), np.uint8), "array layout: shape (0, 4, 3)"),
        (np.zeros((3, 8, 8), np.uint8), "4 channels, as transpose(1, 2, 0) makes it"),
        (
            torch.zeros(8, 8, 3),
            "tensor layout: shape (8, 8, 3); expected (height, width) or (channels, height, "
            "width) with 1 to 4 channels, as permute(2, 0, 1) makes it",
        ),
        (torch.zeros(5, 8, 8), "tensor layout: shape (5, 8, 8)"),
    ],
)
def test_read_image_of_another_layout_names_its_shape_and_the_accepted(
    source: Any, words: str
) -> None:
    for read in (read_image, open_windows):
        with pytest.raises(ImageError, match=r"unsupported (array|tensor) layout") as error:
            read(source)
        assert words in one_line(error)


def test_read_image_of_other_types_than_numbers_names_them() -> None:
    with pytest.raises(ImageError, match="unsupported pixel type: complex64; expected numbers"):
        read_image(np.zeros((2, 2), np.complex64))


# --- failures ----------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[ImageError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("read", [read_image, image_size, stored_size])
def test_files_that_are_no_images(read: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<!DOCTYPE html>\n<html>")
    (tmp_path / "empty.png").touch()
    (tmp_path / "bands.tif").write_bytes(b"II*\0" + bytes(40))
    for name, reason in (
        ("gone.jpg", "there is no such file"),
        ("", "cannot be read: Is a directory"),
        ("page.jpg", r"not an image of any known format \(it begins with b'<!DOCTYPE html>"),
        ("bands.tif", "a TIFF that is damaged or of unsupported bands"),
        ("empty.png", r"not an image of any known format \(it is empty\)"),
    ):
        with pytest.raises(
            ImageError, match=f"{re.escape(str(tmp_path / name))}: {reason}"
        ) as error:
            read(tmp_path / name)
        one_line(error)


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "TIFF", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.97])
def test_truncated(photo: Image.Image, tmp_path: Path, format_: str, share: float) -> None:
    data = encoded(photo.resize((200, 200)), format_)
    file = tmp_path / f"cut.{format_.lower()}"
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageError) as error:
        read_image(file)
    assert str(file) in one_line(error)
    assert format_ != "JPEG" or "cannot be read: image file is truncated" in one_line(error)


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "TIFF", "GIF", "BMP"])
def test_damage_raises_nothing_else(
    photo: Image.Image, format_: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data = encoded(photo, format_)
    rng = np.random.default_rng(0)
    for _ in range(30):
        broken = bytearray(data)
        for position in rng.integers(2, len(data), 4):
            broken[position] = int(rng.integers(0, 256))
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            with contextlib.suppress(ImageError):  # and nothing else
                image = read_image(bytes(broken))
                assert image.dtype == torch.uint8
                assert image.shape[0] == 3
        assert heard == []
    # A decoder must not write past us either.
    assert capfd.readouterr().err == ""


def test_huge_image(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("L", (60, 60)), "PNG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # 3,600 pixels: Pillow only warns
        assert read_image(data).shape == (3, 60, 60)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # over twice as many: it refuses
        for read in (read_image, image_size):
            with pytest.raises(ImageError, match=r"3600 pixels.*cut it into tiles"):
                read(data)


def test_garbage_in_the_middle_is_no_image(photo: Image.Image, tmp_path: Path) -> None:
    # Pillow would fill the rest of the image with whatever comes.
    data = encoded(photo.resize((400, 400)), "JPEG", quality=95)
    middle = len(data) // 2
    noise = np.random.default_rng(0).integers(0, 255, 500, np.uint8).tobytes()
    file = tmp_path / "rotten.jpg"
    damaged = {
        "replaced": data[:middle] + noise + data[middle + 500 :],
        "zeros": data[:middle] + bytes(3000) + data[middle + 3000 :],
        "missing": data[:middle] + data[middle + 3000 :],
    }
    for variant, content in damaged.items():
        file.write_bytes(content)
        for read in (read_image, lambda source: read_reduced(source, 100, 100)):
            with pytest.raises(ImageError) as error:
                read(file)
            assert one_line(error).startswith(f"{file}: cannot be read: "), variant


def test_harmless_oddities_of_a_jpeg_are_let_through(photo: Image.Image) -> None:
    data = encoded(photo, "JPEG", exif=with_orientation(6))
    expected = read_image(data)
    for odd in (
        data + b"a thumbnail, say",  # after the end
        data[:-2] + bytes(9) + data[-2:],  # before it: some cameras pad
        data[:2] + b"\xff" * 3 + data[2:],  # between markers
        data[:-2] + b"whatever",  # no end, as cheap cameras leave it; all pixels are there
    ):
        assert torch.equal(read_image(odd), expected)
        assert torch.equal(by_pillow(odd), expected)


@pytest.mark.parametrize("orientation", [None, 1, 3, 6])
def test_pixels_are_the_same_without_the_fast_decoder(
    photo: Image.Image, orientation: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {} if orientation is None else {"exif": with_orientation(orientation)}
    data = encoded(photo.resize((201, 150)), "JPEG", **options)
    fast = read_image(data), read_reduced(data, 20, 40)
    monkeypatch.setattr(images, "simplejpeg", None)
    assert torch.equal(read_image(data), fast[0])
    pixels, size = read_reduced(data, 20, 40)
    assert torch.equal(pixels, fast[1][0])
    assert size == fast[1][1]
    with pytest.raises(ImageError, match="truncated"):
        read_image(data[:1000])


# --- reduced size ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "factor"),
    [
        (800, 1600, 8),  # 50 x 100 is wanted: exactly 16 times
        (799, 1600, 4),  # 49.9 rounds to 50: a little under 16 times
        (400, 800, 4),
        (200, 400, 2),
        (199, 400, 1),
        (100, 200, 1),
        (20, 30, 1),
    ],
)
def test_reduced_to_twice_the_wanted_size_at_least(height: int, width: int, factor: int) -> None:
    pixels, size = read_reduced(encoded(Image.new("RGB", (width, height)), "JPEG"), 50, 100)
    assert tuple(pixels.shape) == (3, round(height / factor), round(width / factor))
    assert size == (height, width)
    assert pixels.stride()[0] == 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "CMYK"])  # the fast decoder, and Pillow
@pytest.mark.parametrize(("height", "width"), [(400, 560), (403, 563)])
def test_reduced_image_is_the_whole_oneresize_pixels(
    photo: Image.Image, orientation: int, mode: str, height: int, width: int
) -> None:
    smooth = photo.resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    data = encoded(smooth, "JPEG", quality=95, exif=with_orientation(orientation))
    whole = read_image(data)
    pixels, size = read_reduced(data, 40, 70)
    assert size == tuple(whole.shape[-2:])
    assert pixels.shape[-1] < whole.shape[-1] / 3.9
    got, scale = resize_to(pixels, 40, 70, size)
    expected, whole_scale = resize_to(whole, 40, 70)
    assert scale == whole_scale
    assert got.shape == expected.shape
    gap = (got.int() - expected.int()).abs().float()
    assert gap.mean() < 1.2


@pytest.mark.parametrize("orientation", [1, 3])
def test_reduced_image_has_no_margin(orientation: int) -> None:
    # 513 columns make 65 at an eighth, of which the last holds one column of the image; it
    # would move all others by up to 7 pixels of the whole.
    pixels = np.zeros((512, 513, 3), np.uint8)
    pixels[:, 256:] = 255
    data = encoded(Image.fromarray(pixels), "JPEG", exif=with_orientation(orientation))
    reduced, size = read_reduced(data, 32, 33)
    assert size == (512, 513)
    assert tuple(reduced.shape) == (3, 64, 64)
    assert (reduced[:, :, :31].float().mean() < 128) == (orientation == 1)


# --- sizes and batches -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (480, 640, (600, 800)),  # 600 / 480 = 1.25
        (640, 480, (800, 600)),
        (400, 1000, (400, 1000)),  # 1.5 would make the longer side 1,500: limited to 1,000 / 1,000
        (300, 500, (600, 1000)),  # exactly at both
        (300, 501, (599, 1000)),  # 1000 / 501 * 300 = 598.8
        (1, 5000, (1, 1000)),  # never without height
        (600, 600, (600, 600)),
    ],
)
def test_network_size(height: int, width: int, expected: tuple[int, int]) -> None:
    assert network_size(height, width, 600, 1000) == expected


def test_resize_gives_the_exact_scale(photo: Image.Image) -> None:
    image = read_image(photo)
    small, scale = resize_to(image, 27, 100)  # 40 x 56: 27 / 40 * 56 = 37.8
    assert tuple(small.shape) == (3, 27, 38)
    assert scale == (27 / 40, 38 / 56)
    # The same as for memory of the common order, and near Pillow's.
    contiguous, _ = resize_to(image.contiguous(), 27, 100)
    assert (small.int() - contiguous.int()).abs().max() <= 1
    pillows = np.array(photo.resize((38, 27), Image.Resampling.BILINEAR))
    assert (small.int() - torch.from_numpy(pillows).permute(2, 0, 1).int()).abs().max() <= 1
    same, scale = resize_to(image, 40, 56)
    assert same is image
    assert scale == (1, 1)


@pytest.mark.parametrize("size", [(27, 38), (100, 63), (13, 300), (1, 5)])
def test_resize_is_torchvisions(photo: Image.Image, size: tuple[int, int]) -> None:
    from torchvision.transforms.v2 import functional as F

    image = read_image(photo)
    for item in (image, image.contiguous(), image.flip(2), image[:, 3:31, 2:40]):
        expected = F.resize(item, list(size), antialias=True)
        assert torch.equal(images.resize_pixels(item, *size), expected)
    assert images.resize_pixels(image, *size).stride()[0] == 1  # still channels_last


def test_pad_batch() -> None:
    images = [
        torch.full((3, 33, 20), 1, dtype=torch.uint8),
        torch.full((3, 10, 64), 2, dtype=torch.uint8),
    ]
    batch, sizes = pad_batch(images, (123.7, 116.3, 104.0))
    assert tuple(batch.shape) == (2, 3, 64, 64)
    assert sizes.tolist() == [[33, 20], [10, 64]]
    assert batch.is_contiguous(memory_format=torch.channels_last)
    expected = torch.tensor([124, 116, 104], dtype=torch.uint8)[None, :, None, None]
    expected = expected.expand(2, 3, 64, 64).clone()
    expected[0, :, :33, :20] = 1
    expected[1, :, :10, :] = 2
    assert torch.equal(batch, expected)


def test_heic_needs_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.HEIC"
    file.write_bytes(b"\0\0\0\x18ftypheic")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match="pip install pillow-heif"):
        read_image(file)


def test_heic_is_read_where_the_package_is_installed(tmp_path: Path) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    image = Image.new("RGB", (64, 48), (200, 40, 60))
    pillow_heif.from_pillow(image).save(tmp_path / "a.heic")
    assert image_size(tmp_path / "a.heic") == (48, 64)
    assert (
        read_image(tmp_path / "a.heic").float().mean((1, 2)) - torch.tensor([200, 40, 60])
    ).abs().max() < 4
