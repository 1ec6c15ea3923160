"""A window of an image is what the whole image has there, for every kind of file."""

from __future__ import annotations

import gc
import struct
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from retinanet.data import windows
from retinanet.data.image_files import network_size
from retinanet.data.images import read_image, resize_to
from retinanet.data.windows import open_windows, typical_side
from retinanet.errors import ImageError, MissingExtraError

tifffile = pytest.importorskip("tifffile")

HEIGHT, WIDTH = 201, 303
TILE = (64, 96)


def image(channels: int = 3) -> npt.NDArray[np.uint8]:
    """Blocks with noise on them: JPEG has something to lose at every border."""
    rng = np.random.default_rng(channels)
    blocks = rng.integers(0, 236, (HEIGHT // 8 + 1, WIDTH // 8 + 1, channels))
    whole = np.kron(blocks, np.ones((8, 8, 1), np.int64))[:HEIGHT, :WIDTH]
    return (whole + rng.integers(0, 20, whole.shape)).astype(np.uint8)


RGB = image()
GREY = RGB[:, :, 0].copy()
DEEP = RGB.astype(np.uint16) * 256 + 77
RGBA = image(4)
COLOURS = np.random.default_rng(0).integers(0, 65536, (3, 256)).astype(np.uint16)

TIFFS: dict[str, tuple[npt.NDArray[Any], dict[str, Any]]] = {
    "one strip": (RGB, {}),
    "strips": (RGB, {"rowsperstrip": 7}),
    "tiles": (RGB, {"tile": TILE}),
    "big": (RGB, {"tile": TILE, "bigtiff": True}),
    "big endian": (RGB, {"tile": TILE, "byteorder": ">"}),
    "deflate": (RGB, {"tile": TILE, "compression": "deflate"}),
    "predicted": (RGB, {"tile": TILE, "compression": "deflate", "predictor": True}),
    "deflate strips": (RGB, {"rowsperstrip": 10, "compression": "deflate"}),
    "lzw": (RGB, {"tile": TILE, "compression": "lzw", "bigtiff": True}),
    "packbits": (RGB, {"rowsperstrip": 10, "compression": "packbits"}),
    "zstd": (RGB, {"tile": TILE, "compression": "zstd"}),
    "jpeg": (RGB, {"tile": TILE, "compression": "jpeg"}),
    "jpeg strips": (RGB, {"rowsperstrip": 64, "compression": "jpeg"}),
    "jpeg subsampled": (RGB, {"tile": TILE, "compression": "jpeg", "subsampling": (2, 2)}),
    "planes": (RGB.transpose(2, 0, 1), {"planarconfig": "separate", "rowsperstrip": 9}),
    "planes, one strip": (RGB.transpose(2, 0, 1), {"planarconfig": "separate"}),
    "planes, tiles": (
        RGB.transpose(2, 0, 1),
        {"planarconfig": "separate", "tile": TILE, "compression": "deflate"},
    ),
    "16 bits": (DEEP, {"tile": TILE, "compression": "deflate"}),
    "16 bits, big endian": (DEEP, {"byteorder": ">", "rowsperstrip": 9}),
    "16 bits grey": (DEEP[:, :, 0].copy(), {"tile": TILE, "photometric": "minisblack"}),
    "16 bits grey strips": (
        DEEP[:, :, 0].copy(),
        {"byteorder": ">", "rowsperstrip": 9, "photometric": "minisblack"},
    ),
    "grey": (GREY, {"tile": TILE, "photometric": "minisblack", "compression": "lzw"}),
    "white is zero": (GREY, {"tile": TILE, "photometric": "miniswhite"}),
    "bits": (GREY > 128, {"photometric": "minisblack"}),
    "bits, packed": (GREY > 128, {"rowsperstrip": 9, "compression": "packbits"}),
    "palette": (GREY, {"tile": TILE, "photometric": "palette", "colormap": COLOURS}),
    "alpha": (RGBA, {"tile": TILE, "extrasamples": ["unassalpha"], "compression": "deflate"}),
    "alpha multiplied": (RGBA, {"rowsperstrip": 9, "extrasamples": ["assocalpha"]}),
    "fourth channel": (RGBA, {"tile": TILE, "extrasamples": ["unspecified"]}),
    "cmyk": (RGBA, {"tile": TILE, "photometric": "separated", "compression": "deflate"}),
}


def write_tiff(file: Path, kind: str) -> Path:
    array, options = TIFFS[kind]
    given = {"photometric": "rgb", **options} if array.ndim == 3 else options
    tifffile.imwrite(file, array, **given)
    return file


def check_windows(file: Any, whole: torch.Tensor, *, off: int = 0) -> None:
    """Windows are crops of the whole, within `off` levels, and `reduced` is its resize."""
    opened = open_windows(file)
    height, width = whole.shape[-2:]
    assert opened.size == (height, width)
    for x1, y1, x2, y2 in (
        (0, 0, width, height),
        (95, 63, 97, 65),  # where four tiles meet
        (10, 20, 150, 131),
        (width - 31, height - 9, width, height),
        (0, 0, 1, 1),
    ):
        read = opened.read((x1, y1, x2, y2))
        assert (read.int() - whole[:, y1:y2, x1:x2].int()).abs().max() <= off
    for shorter, longest in ((50, 1000), (500, 420), (HEIGHT, WIDTH)):
        expected, _ = resize_to(whole, shorter, longest)
        reduced = opened.reduced(*network_size(height, width, shorter, longest))
        assert reduced.shape == expected.shape
        # Rows first and columns then, or the other way round: each is rounded.
        assert (reduced.int() - expected.int()).abs().max() <= off + 1


@pytest.mark.parametrize("kind", TIFFS)
def test_windows_of_a_tiff_are_crops_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    file = write_tiff(tmp_path / "a.tif", kind)
    whole = read_image(file)
    # Pillow's division by alpha, which is undone over white, rounds; so do decoders of JPEG.
    off = 2 if "multiplied" in kind else 1 if "jpeg" in kind else 0
    if kind in ("tiles", "deflate strips", "planes", "lzw"):  # lossless: without Pillow too
        assert np.array_equal(whole.permute(1, 2, 0).numpy(), RGB)
    monkeypatch.delattr(windows, "read_image")  # nothing is decoded whole
    check_windows(file, whole, off=off)
    check_windows(file.read_bytes(), whole, off=off)


@pytest.mark.parametrize("nested", [True, False])
def test_levels_of_a_pyramid_serve_reduced(tmp_path: Path, nested: bool) -> None:
    """The smaller level is another image here, to be told from the base."""
    file = tmp_path / "pyramid.tif"
    small = np.full((HEIGHT // 2, WIDTH // 2, 3), 200, np.uint8)
    with tifffile.TiffWriter(file, bigtiff=True) as writer:
        options = {"tile": (64, 64), "photometric": "rgb", "compression": "deflate"}
        writer.write(RGB, subifds=1 if nested else 0, **options)
        writer.write(small, subfiletype=1, **options)
    opened = open_windows(file)
    assert opened.read((10, 20, 200, 130)).permute(1, 2, 0).numpy().tolist() == (
        RGB[20:130, 10:200].tolist()
    )
    assert (opened.reduced(40, 60) == 200).all()  # the level is over twice as large
    expected, _ = resize_to(torch.from_numpy(RGB).permute(2, 0, 1), 80, 1000)
    reduced = opened.reduced(*network_size(HEIGHT, WIDTH, 80, 1000))
    assert (reduced.int() - expected.int()).abs().max() <= 1  # of the base


def test_windows_of_other_files_are_crops_of_the_whole(tmp_path: Path) -> None:
    files = []
    for suffix in (".png", ".jpg", ".webp", ".gif"):
        files.append(tmp_path / f"a{suffix}")
        Image.fromarray(RGB).save(files[-1])
    files.append(tmp_path / "palette.bmp")
    Image.fromarray(RGB).quantize(16).save(files[-1])
    files.append(tmp_path / "float.tif")  # its range is that of all values
    tifffile.imwrite(files[-1], GREY.astype(np.float32) / 3, tile=TILE)
    exif = Image.Exif()
    exif[0x0112] = 6
    files.append(tmp_path / "turned.tif")
    tifffile.imwrite(files[-1], RGB, tile=TILE, extratags=[(274, 3, 1, 6, True)])
    files.append(tmp_path / "turned deep.tif")  # of one strip, which Pillow maps into memory
    deep = {"photometric": "minisblack", "extratags": [(274, 3, 1, 6, True)]}
    tifffile.imwrite(files[-1], DEEP[:, :, 0].copy(), **deep)
    assert torch.equal(read_image(files[-1]), read_image(DEEP[:, :, 0]).rot90(-1, (1, 2)))
    files.append(tmp_path / "turned.jpg")
    Image.fromarray(RGB).save(files[-1], exif=exif)
    for file in files:
        check_windows(file, read_image(file))
        check_windows(bytearray(file.read_bytes()), read_image(file))
    check_windows(Image.open(files[-1]), read_image(files[-1]))


def test_windows_of_arrays_and_tensors_are_crops_of_the_whole() -> None:
    tensor = torch.from_numpy(RGB).permute(2, 0, 1)
    floats = GREY.astype(np.float32)
    floats[:9, :9] = 0  # of which alone the range could not be known
    kinds = [RGB, GREY, GREY[:, :, None], RGBA, DEEP, DEEP.astype(">u2"), GREY > 9, tensor, floats]
    for kind in [*kinds, torch.rand(3, HEIGHT, WIDTH)]:
        check_windows(kind, read_image(kind))


def test_images_over_the_limit_of_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    file = tmp_path / "a.tif"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)  # a third of the image
    with pytest.raises(ImageError, match=r"a\.png: .*; save it as an upright, tiled TIFF"):
        open_windows(tmp_path / "a.png")
    tifffile.imwrite(file, RGB, compression="deflate", rowsperstrip=HEIGHT, photometric="rgb")
    with pytest.raises(ImageError, match=r"a\.tif: one of its strips or tiles has 60903 pixels"):
        open_windows(file)
    tifffile.imwrite(file, GREY.astype(np.float32), tile=TILE)
    with pytest.raises(ImageError, match="value_range="):
        open_windows(file)
    read = open_windows(file, value_range=(0, 255)).read((10, 20, 200, 130))
    assert np.array_equal(read[0].numpy(), GREY[20:130, 10:200])


def test_huge_tiff_without_tifffile_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_tiff(tmp_path / "a.tif", "deflate")
    whole = read_image(file)
    monkeypatch.setattr(windows, "find_spec", lambda name: None)
    check_windows(file, whole)  # decoded whole by Pillow
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    with pytest.raises(MissingExtraError, match=r"a\.tif: too large .*'retinanet\[tiff\]'"):
        open_windows(file)


def test_failures(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"nowhere\.tif: there is no such file"):
        open_windows(tmp_path / "nowhere.tif")
    for name, content in (("no.tif", b"II*\0rubbish"), ("no.bmp", b"BM"), ("no.png", b"P6 x")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=name.replace(".", r"\.")):
            open_windows(tmp_path / name)
    # Cut short: what is there of a compressed file can be read.
    file = write_tiff(tmp_path / "a.tif", "one strip")
    file.write_bytes(file.read_bytes()[: -50 * WIDTH * 3])
    with pytest.raises(ImageError, match=r"a\.tif: cannot be read"):
        open_windows(file).read((0, 0, WIDTH, HEIGHT))
    file = write_tiff(tmp_path / "a.tif", "deflate")
    file.write_bytes(file.read_bytes()[:-2000])
    opened = open_windows(file)
    with pytest.raises(ImageError, match=r"a\.tif: cannot be read: the file ends .* too early"):
        opened.read((0, 0, WIDTH, HEIGHT))
    with pytest.raises(ImageError, match=r"a\.tif: cannot be read"):
        opened.reduced(20, 30)
    file = write_tiff(tmp_path / "a.tif", "deflate")
    content = bytearray(file.read_bytes())
    content[-2000:] = bytes(2000)
    file.write_bytes(content)
    opened = open_windows(file)
    assert torch.equal(
        opened.read((0, 0, 96, 64)), torch.from_numpy(RGB[:64, :96]).permute(2, 0, 1)
    )
    for _ in range(2):  # remembered, and said again
        with pytest.raises(ImageError, match=r"a\.tif: cannot be read"):
            opened.read((200, 150, WIDTH, HEIGHT))


def lying_tiff(**said: int) -> bytes:
    """A TIFF of a header alone: deflated RGB unless `said` otherwise, by tags' numbers."""
    tags = {256: 100, 257: 100, 259: 8, 262: 2, 277: 3} | {int(k[1:]): v for k, v in said.items()}
    rows = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())]
    return struct.pack("<2sHIH", b"II", 42, 8, len(rows)) + b"".join(rows) + bytes(4)


MOST = 2**32 - 1


@pytest.mark.parametrize(
    "file",
    [
        lying_tiff(_257=MOST, _278=1, _273=8, _279=10),  # four thousand million strips
        lying_tiff(_256=1000, _257=MOST, _259=1, _278=MOST, _273=8, _279=10),
        lying_tiff(_322=70_000, _323=70_000, _324=8, _325=10),  # a small image in a huge tile
        lying_tiff(_322=0, _323=0, _324=8, _325=10),
        lying_tiff(_322=112, _323=112, _324=8, _325=MOST),
        lying_tiff(_322=112, _323=112, _324=MOST, _325=10),
        b"BM"
        + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 1_500_000, 2**31 - 1, 1, 24, *6 * [0]),
        b"P6 1500000 2000000000 255 ",
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_headers_that_lie(file: bytes) -> None:
    """Refused before there is room for what they claim: a few MB, whatever the numbers are."""
    tracemalloc.start()
    try:
        with pytest.raises(ImageError):
            open_windows(file).read((0, 0, 10, 10))
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_tiles_of_earlier_windows_are_kept(tmp_path: Path) -> None:
    file = write_tiff(tmp_path / "a.tif", "deflate")
    whole, opened = read_image(file), open_windows(file)
    spots = [(50, 30, 150, 100), (60, 40, 160, 110), (90, 60, 100, 70), (0, 0, 192, 128)]
    with ThreadPoolExecutor(4) as pool:  # four windows over the same four tiles
        for (x1, y1, x2, y2), read in zip(spots, pool.map(opened.read, spots), strict=True):
            assert torch.equal(read, whole[:, y1:y2, x1:x2])
    file.write_bytes(b"")  # the tiles in the cache need no file
    assert torch.equal(opened.read((70, 50, 180, 120)), whole[:, 50:120, 70:180])
    with pytest.raises(ImageError, match=r"a\.tif: cannot be read"):
        opened.read((190, 120, 200, 140))


def test_pieces_of_one_window_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "CACHED_BYTES", 1)
    file = write_tiff(tmp_path / "a.tif", "deflate strips")
    whole, opened = read_image(file), open_windows(file)
    opened.read((0, 0, 100, HEIGHT))
    file.write_bytes(b"")
    assert torch.equal(opened.read((100, 0, WIDTH, HEIGHT)), whole[:, :, 100:])


def test_pieces_are_freed_with_their_image(tmp_path: Path) -> None:
    opened: Any = open_windows(write_tiff(tmp_path / "a.tif", "deflate"))
    page = weakref.ref(opened._levels[0])
    opened.read((0, 0, WIDTH, HEIGHT))
    gc.disable()
    try:
        del opened
        assert page() is None
    finally:
        gc.enable()


def test_typical_side(tmp_path: Path) -> None:
    files = []
    for number, (width, height) in enumerate([(30, 90), (50, 40), (70, 71), (200, 100), (9, 9)]):
        files.append(tmp_path / f"{number}.png")
        Image.new("RGB", (width, height)).save(files[-1])
    assert typical_side(files) == 40  # of 30, 40, 70, 100, 9
    assert typical_side(files, max_images=3) == 30  # of 30, 70, 9: every second
    assert typical_side(files * 100) == 40
    assert typical_side(files[:1]) == 30
    with pytest.raises(ValueError, match="no median"):
        typical_side([])
