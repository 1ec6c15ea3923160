"""Images from files, bytes and arrays to upright RGB tensors, and tensors to batches."""

from __future__ import annotations

import atexit
import hashlib
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFile, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from retinanet.data.image_files import (
    SIDEWAYS,
    TIFF_STARTS,
    EncodedImage,
    exif_orientation,
    image_errors,
    network_size,
    open_source,
    quiet,
)
from retinanet.errors import ConfigError, ImageError

try:
    import simplejpeg
except ImportError:  # there is no wheel for this machine: Pillow decodes all
    simplejpeg = None

ImageSource = str | os.PathLike[str] | EncodedImage | Image.Image | npt.NDArray[Any] | Tensor
"""Image types accepted by :func:`read_image`."""

ValueRange = tuple[float, float]
"""The values of black and of full intensity, such as ``(0, 1)`` or ``(0, 4095)``."""

_OVERSHOOT = 0.1
"""Fraction of its range by which values may lie outside: bicubic resizing overshoots."""

_REDUCTION_MARGIN = 2
"""A reduced decoding must have at least as many times the wanted size."""

REDUCTIONS = (8, 4, 2)
"""The reductions that libjpeg-turbo has fast code for; 5/8 is slower than the whole image."""

_DAMAGE = re.compile(r"premature end of data|bad Huffman code|[0-9]{3,} extraneous bytes")
"""Messages of JPEG decoders that mean lost pixels. Fewer extraneous bytes are the padding of some
cameras."""


def read_image(source: ImageSource, *, value_range: ValueRange | None = None) -> Tensor:
    """Read an image as upright 8-bit RGB.

    Other image types are converted by fixed rules:

    - EXIF orientation (JPEG, PNG, WebP, TIFF; PIL images that still carry it) is applied.
    - Greyscale, palette, CMYK, YCbCr: converted by Pillow.
    - Transparency (RGBA, LA, a palette with it): laid over white, as on a page.
    - 16 bits per channel (unsigned): the high byte, so 65535 becomes 255. An image of a 12-bit
      camera stays dark without ``value_range=(0, 4095)``.
    - Floats of -0.1..1.1 are clamped to 0..1 and multiplied by 255. Floats of which none is under
      -25.5 and the largest is in 25.5..280.5 are clamped to 0..255. (These margins are a tenth of
      the range: bicubic resizing overshoots.) Other integers must lie in 0..255. Any other range
      is ambiguous and an error; state it with `value_range`.
    - NaN becomes black; infinities are clamped.
    - Animations and many pages: the first image.

    Args:
        source: a file (its format is told by its content, not by its name), also one inside a tar
            (``shard.tar/KEY.jpg``, see :mod:`retinanet.data.archives`), the bytes of one, a PIL
            image, an array (H, W) or (H, W, 1 | 2 | 3 | 4) in the order RGB (OpenCV's is BGR:
            reverse it), or a tensor (H, W) or (1 | 2 | 3 | 4, H, W).
        value_range: the values of black and of full intensity, for arrays and tensors of any type
            and for image files of more than 8 bits per channel; values outside are clamped. None:
            by the rules above.

    Returns:
        (3, H, W) uint8. In memory the channels of a pixel lie side by side (channels_last), in
        which resizing is 2.6 times faster.

    Raises:
        ImageError: there is no such file, or it is no image, damaged or cut short, or of more
            than 2 x ``PIL.Image.MAX_IMAGE_PIXELS`` pixels (179 million); an array or tensor has
            another shape, or its range is ambiguous.
        ConfigError: `value_range` is not (low, high) with low < high.
    """
    return _read(source, None, value_range)[0]


def read_reduced(
    source: ImageSource, shorter: int, longest: int, *, value_range: ValueRange | None = None
) -> tuple[Tensor, tuple[int, int]]:
    """Read an image as :func:`read_image`, decoded no larger than :func:`resize_to` needs it.

    A JPEG may be decoded at a half, a quarter or an eighth of its size: the largest of these
    reductions at which it stays twice its :func:`network_size` (of the sides `shorter`, at most
    `longest`) or more. What the resize then gives differs by about one level of 255 a pixel in the
    mean, and objects move by less than a quarter of a pixel.

    Returns: (3, h, w) uint8 as of :func:`read_image`, and (height, width) of the whole image, to be
        given to :func:`resize_to`.

    Raises:
        ImageError, ConfigError: as :func:`read_image`.
    """
    return _read(source, (shorter, longest), value_range)


def check_value_range(value_range: ValueRange | None) -> None:
    """Raise ConfigError unless `value_range` is None or (low, high) with low < high."""
    if value_range is None:
        return
    try:
        low, high = map(float, value_range)
        valid = math.isfinite(low) and math.isfinite(high) and low < high
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ConfigError(
            f"invalid value_range: {value_range!r}; give (low, high) with low < high, such as "
            f"(0, 1), (0, 255) or (0, 65535)"
        )


def _read(
    source: ImageSource, wanted: tuple[int, int] | None, value_range: ValueRange | None
) -> tuple[Tensor, tuple[int, int]]:
    """Return the image, and the size of the whole; `wanted` is (shorter, longest)."""
    check_value_range(value_range)
    if isinstance(source, Tensor | np.ndarray):
        return with_size(_from_pixels(source, value_range))
    if isinstance(source, Image.Image):
        name = str(getattr(source, "filename", "") or "PIL image")
        with image_errors(name), quiet():
            return with_size(pil_to_rgb(source, value_range))
    name, file = open_source(source)
    with image_errors(name):
        with quiet():
            image = Image.open(file)
        with image:
            return _decode(name, image, wanted, value_range)


def _decode(
    name: str,
    image: ImageFile.ImageFile,
    wanted: tuple[int, int] | None,
    value_range: ValueRange | None,
) -> tuple[Tensor, tuple[int, int]]:
    """Decode an opened file; plain JPEGs by simplejpeg, to Pillow's pixels but faster."""
    width, height = image.size
    is_jpeg = image.format in ("JPEG", "MPO")
    factor = reduction(height, width, *wanted) if wanted and is_jpeg else 1
    # The decoder rounds up: of 4,001 columns an eighth is 501, the last of which is mostly
    # repeated. Rounding to the nearest keeps the pixel grid within half a reduced pixel.
    rows, columns = (max(1, (side + factor // 2) // factor) for side in (height, width))
    with quiet():  # of a PNG it may follow the pixels, which are decoded outside of the lock
        orientation = exif_orientation(image) if is_jpeg else 1
    size = (width, height) if orientation in SIDEWAYS else (height, width)
    complaint = ""
    if is_jpeg and simplejpeg is not None and image.mode in ("RGB", "L"):
        smallest = {"min_height": -(-height // factor), "min_width": -(-width // factor)}
        assert image.fp is not None
        image.fp.seek(0)
        try:
            pixels = simplejpeg.decode_jpeg(image.fp.read(), **smallest)[:rows, :columns]
            return turn_upright(torch.from_numpy(pixels).permute(2, 0, 1), orientation), size
        except ValueError as error:
            complaint = str(error)  # Pillow decides whether the file is damaged
    if factor > 1:
        image.draft(None, (width // factor, height // factor))
    if image.format == "TIFF":
        image.filename = ""  # Pillow would map a turned one into memory by its upright size
    # Threads decode outside of the lock; only TIFF may warn here.
    with quiet() if image.format == "TIFF" else nullcontext():
        image.load()
    if _DAMAGE.search(complaint):
        raise ImageError(f"{name}: cannot be read: {complaint}; replace or remove it")
    with quiet():
        if factor == 1:
            return with_size(pil_to_rgb(image, value_range))
        return pil_to_rgb(image.crop((0, 0, columns, rows)), value_range), size


def is_tiff(stored: str | os.PathLike[str] | BytesIO) -> bool:
    """Whether a file starts as a TIFF or a BigTIFF."""
    if isinstance(stored, BytesIO):
        start = bytes(stored.getbuffer()[:4])
    else:
        with open(stored, "rb") as file:
            start = file.read(4)
    return start in TIFF_STARTS


def turn_upright(image: Tensor, orientation: int) -> Tensor:
    """Turn a (3, h, w) image of an EXIF orientation upright, in channels_last memory."""
    pixels = image.permute(1, 2, 0)
    if orientation in _TURNS:
        pixels = _TURNS[orientation](pixels)
    return pixels.contiguous().permute(2, 0, 1)


_TURNS: dict[int, Callable[[Tensor], Tensor]] = {
    2: lambda pixels: pixels.flip(1),
    3: lambda pixels: pixels.flip(0, 1),
    4: lambda pixels: pixels.flip(0),
    5: lambda pixels: pixels.transpose(0, 1),
    6: lambda pixels: pixels.flip(0).transpose(0, 1),
    7: lambda pixels: pixels.flip(0, 1).transpose(0, 1),
    8: lambda pixels: pixels.flip(1).transpose(0, 1),
}
"""Turns (H, W, 3) pixels of each EXIF orientation upright."""


def reduction(height: int, width: int, shorter: int, longest: int) -> int:
    """Return the largest factor, of 1, 2, 4 and 8, by which an image may be decoded smaller."""
    new_height, new_width = network_size(height, width, shorter, longest)
    least = min(height / new_height, width / new_width) / _REDUCTION_MARGIN
    return next((factor for factor in REDUCTIONS if least >= factor), 1)


def with_size(image: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Return an image with its (height, width)."""
    return image, (image.shape[-2], image.shape[-1])


def resize_to(
    image: Tensor, shorter: int, longest: int, size: tuple[int, int] | None = None
) -> tuple[Tensor, tuple[float, float]]:
    """Resize an image to its :func:`network_size`, bilinear with antialiasing.

    `size` is (height, width) of the whole image, where :func:`read_reduced` made it smaller.
    Returns (3, h, w) uint8, and what y and x of a box in the whole image are multiplied by.
    """
    height, width = size or image.shape[-2:]
    new_height, new_width = network_size(height, width, shorter, longest)
    image = resize_pixels(image, new_height, new_width)
    return image, (new_height / height, new_width / width)


def resize_pixels(image: Tensor, height: int, width: int) -> Tensor:
    """Resize (3, h, w) uint8, bilinear with antialiasing, equal to torchvision's transforms.v2.

    (Importing that takes a second.)
    """
    if (height, width) == tuple(image.shape[-2:]):
        return image
    batch = image[None]
    if batch.is_contiguous(memory_format=torch.channels_last):
        # The first stride of a batch of one is arbitrary; with this one torch detects
        # channels_last, for which its code is faster.
        batch = batch.as_strided(batch.shape, (batch.numel(), *image.stride()))
    return interpolate(
        batch, (height, width), mode="bilinear", align_corners=False, antialias=True
    )[0]


def pad_batch(
    images: Sequence[Tensor],
    fill: Sequence[float] = (0, 0, 0),
    divisor: int = 32,
    corners: Sequence[tuple[bool, bool]] | None = None,
    *,
    shared: bool = False,
) -> tuple[Tensor, Tensor]:
    """Pad (3, h, w) uint8 images of any sizes to one batch, at the right and the bottom.

    Args:
        images: one or more.
        fill: RGB of the padding; the model's pixel mean makes it about 0 after normalisation.
        divisor: height and width of the batch are multiples of it.
        corners: for each image whether it is aligned with the bottom, and with the right; None: no.
        shared: allocate shared memory, into which a DataLoader's worker would copy the batch.

    Returns:
        (B, 3, H, W) uint8 in channels_last memory, and (B, 2) int64 heights and widths before.
    """
    if not images:
        raise ValueError("a batch needs at least one image")
    sizes = torch.tensor([tuple(image.shape[-2:]) for image in images], dtype=torch.int64)
    height, width = (math.ceil(int(side) / divisor) * divisor for side in sizes.amax(dim=0))
    batch = _allocate((len(images), height, width, 3), shared).permute(0, 3, 1, 2)
    colour = filled_row(fill, width)
    for row, image, (bottom, right) in zip(
        batch, images, corners or [(False, False)] * len(images), strict=True
    ):
        h, w = image.shape[-2:]
        top, left = bottom * (height - h), right * (width - w)
        row[:, :top] = colour
        row[:, top + h :] = colour
        band = row[:, top : top + h]
        band[:, :, :left] = colour[:, :, :left]
        band[:, :, left + w :] = colour[:, :, left + w :]
        band[:, :, left : left + w] = image
    return batch, sizes


def filled_row(fill: Sequence[float], width: int) -> Tensor:
    """Return (3, 1, width) uint8 of an RGB colour, to fill rows with.

    Copied whole, rows in channels_last memory are filled many times faster than pixel by pixel.
    """
    colour = torch.tensor([round(value) for value in fill], dtype=torch.uint8)
    return colour.repeat(1, width, 1).permute(2, 0, 1)


def padding_colour(pixel_mean: Tensor) -> tuple[int, int, int]:
    """Return the RGB colour that is about zero after normalisation by `pixel_mean` (3 values)."""
    red, green, blue = (round(value) for value in pixel_mean.flatten().tolist())
    return red, green, blue


def _allocate(shape: tuple[int, ...], shared: bool) -> Tensor:
    """Uninitialised uint8."""
    if shared:
        # As torch's own collate function in a worker; there is no public function for it.
        storage = torch.UntypedStorage._new_shared(math.prod(shape))  # type: ignore[no-untyped-call]
        return torch.empty(0, dtype=torch.uint8).set_(storage).reshape(shape)
    # numpy requests huge pages, torch does not: new memory takes a tenth of the time.
    return torch.from_numpy(np.empty(shape, dtype=np.uint8))


def pil_to_rgb(image: Image.Image, value_range: ValueRange | None = None) -> Tensor:
    """Convert a PIL image to (3, H, W) uint8, upright."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(("I", "F")):
        return to_rgb(np.asarray(upright), value_range)
    mode = "RGBA" if upright.has_transparency_data else "RGB"
    return to_rgb(np.asarray(upright.convert(mode)), None)


def array_size(source: npt.NDArray[Any] | Tensor) -> tuple[int, int]:
    """Height and width of an array or a tensor in the layout of an image; else an ImageError."""
    shape, is_tensor = tuple(source.shape), isinstance(source, Tensor)
    axis = 0 if is_tensor else 2
    if len(shape) == 2 or (len(shape) == 3 and shape[axis] in (1, 2, 3, 4)):
        height, width = [side for i, side in enumerate(shape) if len(shape) == 2 or i != axis]
        if height and width:
            return int(height), int(width)
    name, layout, fix = (
        ("tensor", "(channels, height, width)", "permute(2, 0, 1)")
        if is_tensor
        else ("array", "(height, width, channels)", "transpose(1, 2, 0)")
    )
    is_swapped = len(shape) == 3 and shape[2 - axis] in (1, 3, 4)
    raise ImageError(
        f"unsupported {name} layout: shape {shape}; expected (height, width) or {layout} with 1 to "
        f"4 channels{f', as {fix} makes it' if is_swapped else ''}"
    )


def _from_pixels(source: npt.NDArray[Any] | Tensor, value_range: ValueRange | None) -> Tensor:
    """Convert an array or a tensor in memory, which is not shared with the result."""
    array_size(source)
    array = _as_array(source)
    rgb = to_rgb(array, value_range)
    return rgb.clone() if np.may_share_memory(rgb.numpy(), array) else rgb


def _as_array(source: npt.NDArray[Any] | Tensor) -> npt.NDArray[Any]:
    """(H, W) or (H, W, C), sharing memory with the source where possible."""
    if isinstance(source, np.ndarray):
        return source
    source = source.detach().cpu()
    if source.dtype in (torch.bfloat16, torch.float16):
        source = source.float()  # numpy has no bfloat16
    array: npt.NDArray[Any] = (source.permute(1, 2, 0) if source.dim() == 3 else source).numpy()
    return array


def to_rgb(array: npt.NDArray[Any], value_range: ValueRange | None) -> Tensor:
    """(H, W) or (H, W, 1 | 2 | 3 | 4) of any type to (3, H, W) uint8 in channels_last memory."""
    if array.ndim == 2:
        array = array[:, :, None]
    array = _to_uint8(array, value_range)
    if array.shape[2] in (2, 4):
        array = _over_white(array)
    if array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    if not (array.flags.c_contiguous and array.flags.writeable):
        array = array.copy(order="C")
    return torch.from_numpy(array).permute(2, 0, 1)


def _to_uint8(array: npt.NDArray[Any], value_range: ValueRange | None) -> npt.NDArray[np.uint8]:
    if array.dtype.kind not in "buif":
        raise ImageError(f"unsupported pixel type: {array.dtype}; expected numbers or booleans")
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if value_range is None:
        if array.dtype == np.uint8:
            return array
        if array.dtype.kind == "u" and array.dtype.itemsize == 2:  # either byte order
            return (array >> 8).astype(np.uint8)
        value_range = find_value_range(array) or (0, 255)
    low, high = value_range
    values = (array.astype(np.float64) - low) * (255 / (high - low))
    return np.rint(np.clip(np.nan_to_num(values, posinf=255), 0, 255)).astype(np.uint8)


def find_value_range(source: npt.NDArray[Any] | Tensor) -> ValueRange | None:
    """Return the range of floats or wide integers, by the rules of :func:`read_image`.

    None for types with a range of their own (booleans, unsigned 8 and 16 bits).

    Raises:
        ImageError: the range is ambiguous.
    """
    array = _as_array(source)
    if array.dtype == np.bool_ or (array.dtype.kind == "u" and array.dtype.itemsize <= 2):
        return None
    is_float = array.dtype.kind == "f"
    finite = array[np.isfinite(array)] if is_float else array
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if not is_float and low >= 0 and high <= 255:
        return 0, 255
    if is_float and low >= -_OVERSHOOT and high <= 1 + _OVERSHOOT:
        return 0, 1
    if is_float and low >= -255 * _OVERSHOOT and 255 * _OVERSHOOT <= high <= 255 + 255 * _OVERSHOOT:
        return 0, 255
    raise ImageError(
        f"ambiguous value range: {array.dtype} values from {low:.6g} to {high:.6g}; give "
        f"uint8, or state the range, as in value_range=(0, 1), (0, 255) or (0, 65535)"
    )


def _over_white(array: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Colour and alpha in the last channel to colour over white."""
    colour, alpha = array[:, :, :-1], array[:, :, -1:].astype(np.uint32)
    if (alpha == 255).all():
        return colour.copy()
    mixed = (colour * alpha + 255 * (255 - alpha) + 127) // 255
    return mixed.astype(np.uint8)


def as_file(image: ImageSource, name: str) -> Path:
    """Return the path of an image; one in memory is written as PNG into a temporary folder.

    The file is called `name` and a digest of its content.
    """
    if isinstance(image, str | os.PathLike):
        return Path(image)
    try:
        pixels = np.ascontiguousarray(read_image(image).permute(1, 2, 0).numpy())
    except ImageError as error:
        raise ImageError(f"image {name}: {error}") from None
    # By its content: the same data has the same names, on which drawn splits and digests depend.
    digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()[:16]
    file = _temporary_folder() / f"{name}-{digest}.png"
    if not file.exists():
        Image.fromarray(pixels).save(file, compress_level=1)
    return file


@lru_cache(maxsize=1)
def _temporary_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="retinanet-images-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
