"""The optional C library: the two loops in which a CPU spends most of its time beside the network.

``pip install`` builds it where there is a C compiler and goes without it where there is none; then,
and with ``RETINANET_NATIVE=0`` in the environment, the pure torch code of each caller serves. That
code is also the definition of what the functions here do. ``label_loss_served`` and
``best_of_levels_served`` say whether they can do it for the given tensors; ``suppress`` takes what
``best_of_levels`` found.

New tensors here name their device and type: C writes to them, whatever torch's defaults are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from ctypes import (
    CDLL,
    POINTER,
    c_double,
    c_float,
    c_int,
    c_int64,
    c_uint32,
    c_void_p,
)
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor

# What setup.py builds the library from, and takes its version of.
_SOURCES = ("native.c", "kernels.h")

_LEVELS = ("baseline", "avx2", "avx512")

# Elements that are worth another thread.
_ELEMENTS_A_THREAD = 2**15

# From this many bytes on a gradient is written past the caches, which it would only empty.
_PAST_CACHES_FROM = 2**24

_CURVES = {("focal", 0.0): 0, ("focal", 1.0): 1, ("focal", 2.0): 2}
_ANY_FOCAL, _STAR = 3, 4

_TYPES = (torch.float32, torch.bfloat16)


class _Library(NamedTuple):
    """The loaded library or, if there is none, why."""

    functions: CDLL | None
    level: int
    reason: str


def available() -> bool:
    """Whether the library is there and switched on."""
    return _library.functions is not None


def description() -> str:
    """Which code runs: ``avx512, 4 threads``, or ``pure torch (not built)``.

    The levels are ``baseline``, ``avx2`` and ``avx512``; the best one that the processor has runs.
    """
    if _library.functions is None:
        return f"pure torch ({_library.reason})"
    threads = torch.get_num_threads() if _library.functions.retinanet_threaded() else 1
    return f"{_LEVELS[_library.level]}, {threads} {'thread' if threads == 1 else 'threads'}"


def label_loss_served(logits: Tensor) -> bool:
    """Whether :func:`label_loss` takes these logits: float32 or bfloat16, in order, on a CPU."""
    return available() and _served(logits) and logits.numel() > 0


def label_loss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    positive: Tensor,
    negative: Tensor,
    formula: tuple[str, float, float],
    gradient: Tensor | None,
) -> Tensor:
    """The weighted classification loss of rows, and its gradient.

    Args:
        logits: (N, K) float32 or bfloat16, contiguous.
        labels: (N,) int64 class 0..K-1, or below 0 for none.
        weights: (N,) float32 factor of each row.
        positive, negative: () or (K,) float32: weights of positives and of negatives.
        formula: kind, gamma and beta as of ``retinanet.losses.classification``.
        gradient: (N, K) to be filled, of the logits' type, or None; may be the logits themselves.

    Returns:
        () float32, the same for any number of threads.
    """
    functions = _functions()
    count, classes = logits.shape
    kind, gamma, beta = formula
    curve = _STAR if kind == "focal_star" else _CURVES.get((kind, gamma), _ANY_FOCAL)
    labels, weights = labels.contiguous(), weights.contiguous()
    per_class = positive.dim() > 0
    positive, negative = positive.contiguous(), negative.contiguous()
    size = logits.numel() * logits.element_size()
    in_place = gradient is not None and gradient.data_ptr() == logits.data_ptr()
    pieces = functions.retinanet_loss_pieces(count, classes)
    partial = torch.empty(pieces, dtype=torch.float64, device="cpu")
    functions.retinanet_loss(
        _library.level,
        _threads(logits.numel()),
        logits.dtype == torch.bfloat16,
        logits.data_ptr(),
        labels.data_ptr(),
        weights.data_ptr(),
        positive.data_ptr(),
        negative.data_ptr(),
        per_class,
        count,
        classes,
        curve,
        gamma,
        beta,
        beta / gamma if kind == "focal_star" else 0.0,
        None if gradient is None else gradient.data_ptr(),
        gradient is not None and not in_place and size >= _PAST_CACHES_FROM,
        partial.data_ptr(),
    )
    return partial.sum().float()


class Best(NamedTuple):
    """The best scores of B images, image by image, level by level, each list best first.

    Attributes:
        counts: (B,) int64 how many of the N are of each image.
        labels: (N,) int64 class.
        logits: (N,) float32.
        deltas: (N, 4) float32 the row of the deltas.
        anchors: (N, 4) float32 the row of the anchors.
    """

    counts: Tensor
    labels: Tensor
    logits: Tensor
    deltas: Tensor
    anchors: Tensor


def best_of_levels_served(
    logits: Sequence[Tensor], deltas: Sequence[Tensor], anchors: Sequence[Tensor]
) -> bool:
    """Whether :func:`best_of_levels` takes these: float32 or bfloat16, in order, on a CPU."""
    return (
        available()
        and all(_served(one) for one in (*logits, *deltas))
        and all(_served(one) and one.dtype == torch.float32 for one in anchors)
        and len({one.dtype for one in logits}) == len({one.dtype for one in deltas}) == 1
        # Places within an image and level are 32 bits wide.
        and all(one[0].numel() < 2**32 for one in logits if len(one))
    )


def best_of_levels(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    least: float,
    most: int,
) -> Best:
    """The `most` highest logits of each image and level that are over `least`.

    Of equal logits the first are taken, and stand first. A NaN is over nothing.

    Args:
        logits: L tensors (B, R_l, K), contiguous.
        deltas: L tensors (B, R_l, 4), contiguous.
        anchors: L tensors (R_l, 4) float32, contiguous.
        least: a logit.
        most: 1 or more.

    Raises:
        MemoryError: there is not enough for the list of what was found.
    """
    functions = _functions()
    images, _, classes = logits[0].shape
    rows = (c_int64 * len(logits))(*(level.shape[1] for level in logits))
    counts = torch.zeros(images, dtype=torch.int64, device="cpu")
    found = functions.retinanet_find(
        _library.level,
        _threads(sum(level.numel() for level in logits)),
        logits[0].dtype == torch.bfloat16,
        len(logits),
        _pointers(logits),
        rows,
        images,
        classes,
        least,
        min(most, 2**62),
        counts.data_ptr(),
    )
    if not found:
        raise MemoryError("no memory for the list of scores over the threshold")
    try:
        total = int(counts.sum())
        best = Best(
            counts,
            torch.empty(total, dtype=torch.int64, device="cpu"),
            torch.empty(total, dtype=torch.float32, device="cpu"),
            torch.empty(total, 4, dtype=torch.float32, device="cpu"),
            torch.empty(total, 4, dtype=torch.float32, device="cpu"),
        )
        functions.retinanet_take(
            found,
            deltas[0].dtype == torch.bfloat16,
            _pointers(deltas),
            _pointers(anchors),
            rows,
            *(part.data_ptr() for part in best[1:]),
        )
    finally:
        functions.retinanet_drop(found)
    return best


def suppress(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    counts: Tensor,
    *,
    classes: int,
    threshold: float,
    most: int,
) -> tuple[Tensor, Tensor]:
    """Non-maximum suppression in each class of each image, the `most` best survivors of an image.

    Source: Lin et al. 2017, Sec. 4; the survivors are those of ``torchvision.ops.nms``, bit by bit.

    Args:
        boxes: (N, 4) float32 of all images, one image after the other.
        scores: (N,) float32, no NaN.
        labels: (N,) int64 class 0..K-1, or None: all boxes of an image suppress each other.
        counts: (B,) int64 how many of the boxes are of each image; their sum is N.
        classes: K.
        threshold: of two boxes with a greater IoU the one of less score goes.
        most: 1 or more.

    Returns:
        places (M,) int64 of the survivors, image by image, best first, equal scores by class and
        then by place; and how many they are in each image, (B,) int64.

    Raises:
        ValueError: shapes or counts do not fit, or a label is not 0..K-1: C would go past the end.
        MemoryError: there is not enough to sort the boxes.
    """
    functions = _functions()
    offsets = torch.zeros(len(counts) + 1, dtype=torch.int64, device="cpu")
    torch.cumsum(counts, 0, out=offsets[1:])
    _check_groups(boxes, scores, labels, counts, int(offsets[-1]), classes)
    kept = torch.empty(len(scores), dtype=torch.int64, device="cpu")
    survivors = torch.empty_like(counts)
    boxes, scores = boxes.contiguous(), scores.contiguous()
    labels = labels if labels is None else labels.contiguous()
    done = functions.retinanet_suppress(
        _library.level,
        # An image is a thread's work; a few boxes are nobody's.
        min(_threads(64 * len(scores)), max(1, len(counts))),
        boxes.data_ptr(),
        scores.data_ptr(),
        None if labels is None else labels.data_ptr(),
        offsets.data_ptr(),
        len(counts),
        classes,
        threshold,
        min(most, 2**62),
        kept.data_ptr(),
        survivors.data_ptr(),
    )
    if not done:
        raise MemoryError("no memory to sort the boxes")
    starts = offsets[:-1].tolist()
    parts = [
        kept[start : start + count] for start, count in zip(starts, survivors.tolist(), strict=True)
    ]
    return torch.cat(parts) if parts else kept, survivors


def _check_groups(
    boxes: Tensor, scores: Tensor, labels: Tensor | None, counts: Tensor, total: int, classes: int
) -> None:
    count = len(scores)
    if boxes.shape != (count, 4) or (labels is not None and labels.shape != (count,)):
        raise ValueError(
            f"{count} scores go with boxes ({count}, 4) and labels ({count},), got "
            f"{tuple(boxes.shape)} and {None if labels is None else tuple(labels.shape)}"
        )
    if total != count or (len(counts) and int(counts.min()) < 0):
        raise ValueError(f"counts are 0 or more and add up to {count} boxes, got {counts.tolist()}")
    if labels is not None and count:
        low, high = (int(end) for end in labels.aminmax())
        if low < 0 or high >= classes:
            wrong = low if low < 0 else high
            raise ValueError(f"labels to suppress are 0..{classes - 1}, got {wrong}")


def _served(values: Tensor) -> bool:
    # A subclass (of a tracer, say) may have no memory to point at.
    return (
        type(values) in (Tensor, torch.nn.Parameter)
        and values.device.type == "cpu"
        and values.dtype in _TYPES
        and values.is_contiguous()
    )


def _threads(elements: int) -> int:
    return max(1, min(torch.get_num_threads(), elements // _ELEMENTS_A_THREAD))


def _pointers(tensors: Sequence[Tensor]) -> object:
    return (c_void_p * len(tensors))(*(one.data_ptr() for one in tensors))


def _functions() -> CDLL:
    if _library.functions is None:
        raise RuntimeError(f"the native library is not in use: {_library.reason}")
    return _library.functions


def _load(folder: Path) -> _Library:
    if os.environ.get("RETINANET_NATIVE", "1") == "0":
        return _Library(None, 0, "RETINANET_NATIVE=0")
    for suffix in EXTENSION_SUFFIXES:
        file = folder / f"_library{suffix}"
        if not file.is_file():
            continue
        try:
            functions = CDLL(str(file))
            _declare(functions)
            version = functions.retinanet_version()
            level = functions.retinanet_level()
        except (OSError, AttributeError) as error:
            return _Library(None, 0, f"{file.name} does not load: {error}")
        if version != _version_of_sources(folder, version):
            return _Library(None, 0, f"{file.name} is of other sources: install again")
        return _Library(functions, level, "")
    return _Library(None, 0, "not built")


def _version_of_sources(folder: Path, otherwise: int) -> int:
    """What setup.py calls a library built of the sources in `folder`.

    An editable installation has them beside the library, where they may have changed since it was
    built. A wheel does not, and cannot: `otherwise`.
    """
    version = 0
    for name in _SOURCES:
        try:
            version = crc32((folder / name).read_bytes(), version)
        except OSError:
            return otherwise
    return version


def _declare(functions: CDLL) -> None:
    """Say what each function takes, in the order of native.c.

    Raises:
        AttributeError: the library is without one of them.
    """
    pointer, integer, long = c_void_p, c_int, c_int64
    functions.retinanet_version.argtypes = []
    functions.retinanet_version.restype = c_uint32
    functions.retinanet_level.argtypes = []
    functions.retinanet_level.restype = integer
    functions.retinanet_threaded.argtypes = []
    functions.retinanet_threaded.restype = integer
    functions.retinanet_loss_pieces.argtypes = [long, long]
    functions.retinanet_loss_pieces.restype = long
    functions.retinanet_loss.argtypes = [
        *[integer] * 3,
        *[pointer] * 5,
        integer,
        *[long] * 2,
        integer,
        *[c_float] * 3,
        pointer,
        integer,
        pointer,
    ]
    functions.retinanet_loss.restype = None
    functions.retinanet_find.argtypes = [
        *[integer] * 3,
        long,
        pointer,
        POINTER(long),
        *[long] * 2,
        c_float,
        long,
        pointer,
    ]
    functions.retinanet_find.restype = pointer
    functions.retinanet_take.argtypes = [
        pointer,
        integer,
        *[pointer] * 2,
        POINTER(long),
        *[pointer] * 4,
    ]
    functions.retinanet_take.restype = None
    functions.retinanet_drop.argtypes = [pointer]
    functions.retinanet_drop.restype = None
    functions.retinanet_suppress.argtypes = [
        *[integer] * 2,
        *[pointer] * 4,
        *[long] * 2,
        c_double,
        long,
        *[pointer] * 2,
    ]
    functions.retinanet_suppress.restype = integer


_library = _load(Path(__file__).parent)
