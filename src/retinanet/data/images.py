"""Pictures from files, bytes and arrays to upright RGB tensors, and tensors to batches."""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from retinanet.errors import ImageError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif"}
    | {".ppm", ".pgm", ".pbm", ".jp2", ".avif"}
)
"""Lower-case suffixes by which pictures are found in a folder; formats are told by content."""

ImageSource = str | os.PathLike[str] | bytes | bytearray | Image.Image | npt.NDArray[Any] | Tensor
"""What :func:`read_image` takes."""

_SIDEWAYS = frozenset({5, 6, 7, 8})  # EXIF orientations that exchange height and width

# warnings.catch_warnings changes the state of the process: two threads in it at once could leave
# every warning switched off for good. A forked child must not inherit the lock held.
_quiet_lock = threading.RLock()


def _renew_lock() -> None:
    global _quiet_lock
    _quiet_lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def read_image(source: ImageSource) -> Tensor:
    """A picture as RGB, upright.

    What a picture holds beside plain 8-bit RGB is brought to it by fixed rules:

    - EXIF orientation (JPEG, PNG, WebP, TIFF; PIL images that still carry it) is applied.
    - Greyscale, palette, CMYK, YCbCr: converted by Pillow.
    - Transparency (RGBA, LA, a palette with it): laid over white, as on a page.
    - 16 bits a channel: the high byte, so 65535 becomes 255. Where a camera fills 12 of the 16 bits
      the picture stays dark: scale such pictures before.
    - Floating point and wider integers say nothing of their range, so it is judged by the values:
      in 0..1 (floats) they are multiplied by 255, in 0..255 they stay, in 0..65535 (integers)
      they count as 16 bits, and any other range is stretched from the least value to the largest.
      Not-a-number becomes the least value.
    - Animations and many pages: the first picture.

    Args:
        source: a file (its format is told by its content, not by its name), the bytes of one, a PIL
            image, an array (H, W) or (H, W, 1 | 2 | 3 | 4) in the order RGB (OpenCV's is BGR:
            reverse it), or a tensor (H, W) or (1 | 2 | 3 | 4, H, W).

    Returns:
        (3, H, W) uint8. In memory the channels of a pixel lie side by side (channels_last), in
        which resizing is 2.6 times faster.

    Raises:
        ImageError: there is no such file, or it is no picture, damaged or cut short, or of more
            than 2 x ``PIL.Image.MAX_IMAGE_PIXELS`` pixels (179 million).
    """
    if isinstance(source, Tensor):
        return _from_array(_channels_last(source), "tensor")
    if isinstance(source, np.ndarray):
        return _from_array(source, "array")
    if isinstance(source, Image.Image):
        name = str(getattr(source, "filename", "") or "PIL image")
        with _failures_named(name), _quiet():
            return _from_pil(source)
    name, file = _opened(source)
    with _failures_named(name):
        with _quiet():
            picture = Image.open(file)
        with picture:
            # Threads decode side by side, outside of the lock; TIFF alone may warn at this point.
            with _quiet() if picture.format == "TIFF" else nullcontext():
                picture.load()
            with _quiet():
                return _from_pil(picture)


def image_size(source: str | os.PathLike[str] | bytes) -> tuple[int, int]:
    """Height and width of a picture as :func:`read_image` gives it, without decoding its pixels.

    Raises:
        ImageError: there is no such file, or it is no picture. Damage to the pixels is not seen.
    """
    name, file = _opened(source)
    with _failures_named(name), _quiet(), Image.open(file) as picture:
        width, height = picture.size
        # Pillow states the size of a TIFF after its orientation, of all others before it.
        sideways = picture.format != "TIFF" and _orientation(picture) in _SIDEWAYS
    return (width, height) if sideways else (height, width)


def network_size(height: int, width: int, shorter: int, longest: int) -> tuple[int, int]:
    """Height and width at which a picture enters the network, its aspect ratio kept.

    The shorter side becomes `shorter`, or less where the longer side would exceed `longest`.
    Neither becomes less than one pixel.
    """
    scale = min(shorter / min(height, width), longest / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize_to(image: Tensor, shorter: int, longest: int) -> tuple[Tensor, tuple[float, float]]:
    """A picture at its :func:`network_size`, bilinear with antialiasing.

    Args:
        image: (3, H, W) uint8; fastest as :func:`read_image` gives it.
        shorter: pixels of the shorter side wanted.
        longest: pixels that the longer side may have.

    Returns:
        (3, h, w) uint8, and (h / H, w / W): what y and x of a box are multiplied by.
    """
    height, width = image.shape[-2:]
    new_height, new_width = network_size(height, width, shorter, longest)
    if (new_height, new_width) != (height, width):
        image = F.resize(image, [new_height, new_width], antialias=True)
    return image, (new_height / height, new_width / width)


def pad_batch(
    images: Sequence[Tensor],
    fill: Sequence[float] = (0, 0, 0),
    divisor: int = 32,
    corners: Sequence[tuple[bool, bool]] | None = None,
) -> tuple[Tensor, Tensor]:
    """Pictures of any sizes to one batch, padded at the right and the bottom.

    Args:
        images: (3, h, w) uint8, one or more.
        fill: RGB of the padding; the model's pixel mean makes it about 0 after normalisation.
        divisor: height and width of the batch are multiples of it.
        corners: for each picture whether it lies at the bottom, and whether at the right, of its
            place in the batch; None: all lie at the top and the left.

    Returns:
        (B, 3, H, W) uint8 in channels_last memory, and (B, 2) int64 heights and widths before.

    Raises:
        ValueError: there is no picture.
    """
    if not images:
        raise ValueError("a batch needs at least one picture")
    sizes = torch.tensor([tuple(image.shape[-2:]) for image in images], dtype=torch.int64)
    height, width = (math.ceil(int(side) / divisor) * divisor for side in sizes.amax(dim=0))
    batch = torch.empty(
        (len(images), 3, height, width), dtype=torch.uint8, memory_format=torch.channels_last
    )
    colour = torch.tensor([round(value) for value in fill], dtype=torch.uint8)[:, None, None]
    for row, image, (low, right) in zip(
        batch, images, corners or [(False, False)] * len(images), strict=True
    ):
        h, w = image.shape[-2:]
        top, left = low * (height - h), right * (width - w)
        row[:, :top] = colour
        row[:, top + h :] = colour
        band = row[:, top : top + h]
        band[:, :, :left] = colour
        band[:, :, left + w :] = colour
        band[:, :, left : left + w] = image
    return batch, sizes


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow warns of big pictures, broken EXIF and the like; what matters is raised by us."""
    with _quiet_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _failures_named(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises into one line with the picture's name."""
    try:
        yield
    except ImageError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name}: there is no such file") from None
    except UnidentifiedImageError:
        raise ImageError(
            f"{name}: not a picture of any known format{_beginning(name)}; replace or remove it"
        ) from None
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{name}: {error}; cut it into tiles, or raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from None
    # Damaged files make Pillow's plugins raise nearly anything: OSError, SyntaxError, struct.error,
    # zlib.error, IndexError, OverflowError, ...
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ImageError(f"{name}: cannot be read: {reason or type(error).__name__}") from None


def _beginning(name: str) -> str:
    """What a file that is no picture starts with: a web page or an LFS pointer is told at once."""
    try:
        with open(name, "rb") as file:
            start = file.read(20)
    except OSError:
        return ""
    return f" (it begins with {start!r})" if start else " (it is empty)"


def _opened(source: str | os.PathLike[str] | bytes | bytearray) -> tuple[str, Any]:
    """A picture's name for messages, and what Pillow opens."""
    if isinstance(source, bytes | bytearray):
        return "bytes of a picture", BytesIO(source)
    return os.fspath(source), source


def _orientation(picture: Image.Image) -> int:
    return int(picture.getexif().get(ExifTags.Base.Orientation, 1))


def _from_pil(picture: Image.Image) -> Tensor:
    upright = ImageOps.exif_transpose(picture)
    if upright.mode.startswith(("I", "F")):
        return _from_array(np.asarray(upright), "picture")
    if upright.has_transparency_data:
        return _from_array(np.asarray(upright.convert("RGBA")), "picture")
    return _from_array(np.asarray(upright.convert("RGB")), "picture")


def _channels_last(source: Tensor) -> npt.NDArray[Any]:
    source = source.detach().cpu()
    if source.is_floating_point():
        source = source.float()  # numpy has no bfloat16
    array: npt.NDArray[Any] = (source.permute(1, 2, 0) if source.dim() == 3 else source).numpy()
    return array


def _from_array(source: npt.NDArray[Any], name: str) -> Tensor:
    """(H, W) or (H, W, 1 | 2 | 3 | 4) of any type to (3, H, W) uint8."""
    array = source
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4) or array.size == 0:
        raise ImageError(
            f"{name} of shape {array.shape}: expected height, width and 1 to 4 channels"
        )
    array = _to_uint8(array)
    if array.shape[2] in (2, 4):
        array = _over_white(array)
    if array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    flags = array.flags
    if not (flags.c_contiguous and flags.writeable) or np.may_share_memory(array, source):
        array = array.copy(order="C")  # the caller's own memory stays the caller's
    return torch.from_numpy(array).permute(2, 0, 1)


def _to_uint8(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * np.uint8(255)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:  # either byte order
        return (array >> 8).astype(np.uint8)
    is_float = array.dtype.kind == "f"
    values = array.astype(np.float64)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if is_float:
        values = np.nan_to_num(values, nan=low, neginf=low, posinf=high)
    if low >= 0 and high <= 255:
        values = values * 255 if is_float and high <= 1 else values
    elif low >= 0 and high <= 65535 and not is_float:
        values = values // 256
    else:
        values = (values - low) * 255 / (high - low) if high > low else values * 0
    return np.rint(values).astype(np.uint8)


def _over_white(array: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Colour and alpha in the last channel to colour over white."""
    colour, alpha = array[:, :, :-1], array[:, :, -1:].astype(np.uint32)
    if (alpha == 255).all():
        return colour.copy()
    mixed = (colour * alpha + 255 * (255 - alpha) + 127) // 255
    return mixed.astype(np.uint8)
