"""Optional C library: the classification loss and non-maximum suppression on a CPU.

``pip install`` builds it where there is a C compiler and succeeds without it where there is none;
then, and with ``RETINANET_NATIVE=0`` in the environment, each caller uses its torch code, which is
also the definition of the functions here.

New tensors here state their device and type: C writes to them, whatever torch's defaults are.
"""

from __future__ import annotations

import os
from ctypes import CDLL, c_double, c_float, c_int, c_int64, c_uint32, c_void_p
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor

SOURCES = ("native.c", "kernels.h")
"""Sources from which setup.py builds the library; their checksum is its version."""

LEVELS = ("baseline", "avx2", "avx512")

_PIECE = 1024  # elements per partial sum, as in native.c
ELEMENTS_PER_THREAD = 2**15  # fewer do not pay for another thread
_CURVES = {("focal", 0.0): 0, ("focal", 1.0): 1, ("focal", 2.0): 2}
_ANY_FOCAL, _STAR = 3, 4

_INT, _LONG, _FLOAT, _POINTER = c_int, c_int64, c_float, c_void_p
# Result and argument types of each function, in the order of native.c.
_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "retinanet_version": (c_uint32, []),
    "retinanet_level": (_INT, []),
    "retinanet_threaded": (_INT, []),
    "retinanet_loss": (
        None,
        [*[_INT] * 3, *[_POINTER] * 5, _INT, *[_LONG] * 2, _INT, *[_FLOAT] * 2, *[_POINTER] * 2],
    ),
    "retinanet_suppress": (
        None,
        [*[_INT] * 2, *[_POINTER] * 3, *[_LONG] * 2, c_double, _LONG, *[_POINTER] * 2],
    ),
}


class Library(NamedTuple):
    """The loaded library or, if there is none, the reason."""

    functions: CDLL | None
    level: int
    reason: str


def available() -> bool:
    """Return True if the library was built, loaded and not switched off."""
    return library.functions is not None


def description() -> str:
    """Describe the code in use: ``avx512, 4 threads``, or ``pure torch (not built)``.

    The level is the highest of ``baseline``, ``avx2`` and ``avx512`` that the processor has.
    """
    if library.functions is None:
        return f"pure torch ({library.reason})"
    threads = torch.get_num_threads() if library.functions.retinanet_threaded() else 1
    return f"{LEVELS[library.level]}, {threads} {'thread' if threads == 1 else 'threads'}"


def supports_label_loss(logits: Tensor, formula: tuple[str, float, float]) -> bool:
    """Return True if :func:`label_loss` accepts these.

    Logits must be float32 or bfloat16, contiguous, on a CPU; the formula focal or focal_star.
    """
    return (
        available()
        and formula[0] in ("focal", "focal_star")
        # A subclass (a tracer's, for instance) may have no memory.
        and type(logits) in (Tensor, torch.nn.Parameter)
        and logits.device.type == "cpu"
        and logits.dtype in (torch.float32, torch.bfloat16)
        and logits.is_contiguous()
        and logits.numel() > 0
    )


def label_loss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    positive: Tensor,
    negative: Tensor,
    formula: tuple[str, float, float],
    gradient: Tensor | None,
) -> Tensor:
    """Compute the weighted classification loss of rows, and its gradient.

    Args:
        logits: (N, K) float32 or bfloat16, contiguous.
        labels: (N,) int64 class 0..K-1, or below 0 for none.
        weights: (N,) float32 factor of each row.
        positive, negative: () or (K,) float32: weights of positives and of negatives.
        formula: kind, gamma and beta, as in :mod:`retinanet.losses.focal`.
        gradient: (N, K) to be filled, of the logits' type, or None; may be `logits` itself.

    Returns:
        () float32, the same for any number of threads.
    """
    kind, gamma, beta = formula
    labels, weights = labels.contiguous(), weights.contiguous()
    positive, negative = positive.contiguous(), negative.contiguous()
    partial = torch.empty(-(-logits.numel() // _PIECE), dtype=torch.float64, device="cpu")
    _functions().retinanet_loss(
        library.level,
        _threads(logits.numel()),
        logits.dtype == torch.bfloat16,
        logits.data_ptr(),
        labels.data_ptr(),
        weights.data_ptr(),
        positive.data_ptr(),
        negative.data_ptr(),
        positive.dim() > 0,
        *logits.shape,
        _STAR if kind == "focal_star" else _CURVES.get((kind, gamma), _ANY_FOCAL),
        gamma,
        beta,
        None if gradient is None else gradient.data_ptr(),
        partial.data_ptr(),
    )
    return partial.sum().float()


def suppress(
    boxes: Tensor,
    labels: Tensor,
    counts: Tensor,
    *,
    num_classes: int,
    threshold: float,
    max_count: int,
) -> Tensor:
    """Apply NMS per class and image and keep the `max_count` best survivors of each image.

    Source: Lin et al. 2017, Sec. 4; the survivors are exactly those of ``torchvision.ops.nms``.

    Args:
        boxes: (N, 4) float32 on the CPU, image by image, best first.
        labels: (N,) int64 class 0..K-1.
        counts: (B,) int64 number of boxes per image; their sum is N.
        num_classes: K.
        threshold: IoU above which the box of the lower score is removed.
        max_count: 1 or more.

    Returns:
        (M,) int64 indices of the survivors, in rising order.

    Raises:
        MemoryError: the memory for the boxes of an image cannot be allocated.
    """
    offsets = torch.zeros(len(counts) + 1, dtype=torch.int64, device="cpu")
    torch.cumsum(counts, 0, out=offsets[1:])
    kept = torch.empty(len(boxes), dtype=torch.int64, device="cpu")
    survivors = torch.zeros_like(counts)
    boxes, labels = boxes.contiguous(), labels.contiguous()
    _functions().retinanet_suppress(
        library.level,
        # Each thread takes whole images; a few boxes are not worth a thread.
        min(_threads(64 * len(boxes)), max(1, len(counts))),
        boxes.data_ptr(),
        labels.data_ptr(),
        offsets.data_ptr(),
        len(counts),
        num_classes,
        threshold,
        min(max_count, 2**62),
        kept.data_ptr(),
        survivors.data_ptr(),
    )
    if (survivors < 0).any():
        raise MemoryError("no memory to sort the boxes")
    starts = offsets[:-1].tolist()
    ends = (offsets[:-1] + survivors).tolist()
    return torch.cat([kept[:0], *(kept[a:b] for a, b in zip(starts, ends, strict=True))])


def _threads(elements: int) -> int:
    return max(1, min(torch.get_num_threads(), elements // ELEMENTS_PER_THREAD))


def _functions() -> CDLL:
    if library.functions is None:
        raise RuntimeError(f"the native library is not in use: {library.reason}")
    return library.functions


def load_library(folder: Path) -> Library:
    """Load the library from a folder, unless it is switched off or does not fit its sources."""
    if os.environ.get("RETINANET_NATIVE", "1") == "0":
        return Library(None, 0, "RETINANET_NATIVE=0")
    # A name without Python's version first: it is what setup.py writes.
    for suffix in reversed(EXTENSION_SUFFIXES):
        file = folder / f"_library{suffix}"
        if not file.is_file():
            continue
        try:
            functions = CDLL(str(file))
            for name, (result, arguments) in _SIGNATURES.items():
                function = getattr(functions, name)
                function.restype, function.argtypes = result, arguments
            version = functions.retinanet_version()
        except (OSError, AttributeError) as error:
            return Library(None, 0, f"{file.name} does not load: {error}")
        # An editable installation has the sources next to the library; a wheel has none.
        sources = [folder / name for name in SOURCES]
        if all(source.is_file() for source in sources) and version != crc32(
            b"".join(source.read_bytes() for source in sources)
        ):
            return Library(None, 0, f"{file.name} was built from other sources: install again")
        return Library(functions, functions.retinanet_level(), "")
    return Library(None, 0, "not built")


library = load_library(Path(__file__).parent)
