"""Optional C library: the two loops in which a CPU spends most of its time besides the network.

``pip install`` builds it where there is a C compiler and succeeds without it where there is none;
then, and with ``RETINANET_NATIVE=0`` in the environment, each caller uses its pure torch code,
which is also the definition of the functions here. ``supports_label_loss`` and
``supports_top_scores`` return True for the tensors that the functions accept.

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

SOURCES = ("native.c", "kernels.h")
"""What setup.py builds the library from; their checksum is its version."""

LEVELS = ("baseline", "avx2", "avx512")

# Elements that are worth another thread.
_ELEMENTS_PER_THREAD = 2**15

# From this many bytes on a gradient bypasses the caches, which it would only flush.
MIN_BYTES_PAST_CACHES = 2**24

_CURVES = {("focal", 0.0): 0, ("focal", 1.0): 1, ("focal", 2.0): 2}
_ANY_FOCAL, _STAR = 3, 4

_TYPES = (torch.float32, torch.bfloat16)


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

    Of the levels ``baseline``, ``avx2`` and ``avx512`` the highest that the processor has is used.
    """
    if library.functions is None:
        return f"pure torch ({library.reason})"
    threads = torch.get_num_threads() if library.functions.retinanet_threaded() else 1
    return f"{LEVELS[library.level]}, {threads} {'thread' if threads == 1 else 'threads'}"


def supports_label_loss(logits: Tensor, formula: tuple[str, float, float]) -> bool:
    """Return True if :func:`label_loss` accepts these.

    Logits must be float32 or bfloat16, contiguous, on a CPU; the formula focal or focal_star.
    """
    known = formula[0] in ("focal", "focal_star")
    return known and available() and _is_supported(logits) and logits.numel() > 0


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
        library.level,
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
        gradient is not None and not in_place and size >= MIN_BYTES_PAST_CACHES,
        partial.data_ptr(),
    )
    return partial.sum().float()


class TopScores(NamedTuple):
    """The best scores of B images, by image, then by level, each list best first.

    Attributes:
        counts: (B,) int64 number of scores per image; their sum is N.
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


def supports_top_scores(
    logits: Sequence[Tensor], deltas: Sequence[Tensor], anchors: Sequence[Tensor]
) -> bool:
    """Return True if :func:`top_scores` accepts these: float32 or bfloat16, dense, on a CPU."""
    return (
        available()
        and all(_is_supported(level) for level in (*logits, *deltas))
        and all(_is_supported(boxes) and boxes.dtype == torch.float32 for boxes in anchors)
        and len({level.dtype for level in logits}) == len({level.dtype for level in deltas}) == 1
        # Indices within an image and level are 32 bits wide.
        and all(level[0].numel() < 2**32 for level in logits if len(level))
    )


def top_scores(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    min_logit: float,
    max_count: int,
) -> TopScores:
    """Select the `max_count` highest logits of each image and level that are above `min_logit`.

    Ties are broken by index, the lower first. A NaN is never above.

    Args:
        logits: L tensors (B, R_l, K), contiguous.
        deltas: L tensors (B, R_l, 4), contiguous.
        anchors: L tensors (R_l, 4) float32, contiguous.
        min_logit: exclusive.
        max_count: 1 or more.

    Raises:
        MemoryError: the list of selected scores cannot be allocated.
    """
    functions = _functions()
    images, _, classes = logits[0].shape
    rows = (c_int64 * len(logits))(*(level.shape[1] for level in logits))
    counts = torch.zeros(images, dtype=torch.int64, device="cpu")
    handle = functions.retinanet_find(
        library.level,
        _threads(sum(level.numel() for level in logits)),
        logits[0].dtype == torch.bfloat16,
        len(logits),
        _pointers(logits),
        rows,
        images,
        classes,
        min_logit,
        min(max_count, 2**62),
        counts.data_ptr(),
    )
    if not handle:
        raise MemoryError("no memory for the list of scores over the threshold")
    try:
        total = int(counts.sum())
        best = TopScores(
            counts,
            torch.empty(total, dtype=torch.int64, device="cpu"),
            torch.empty(total, dtype=torch.float32, device="cpu"),
            torch.empty(total, 4, dtype=torch.float32, device="cpu"),
            torch.empty(total, 4, dtype=torch.float32, device="cpu"),
        )
        functions.retinanet_take(
            handle,
            deltas[0].dtype == torch.bfloat16,
            _pointers(deltas),
            _pointers(anchors),
            rows,
            *(part.data_ptr() for part in best[1:]),
        )
    finally:
        functions.retinanet_drop(handle)
    return best


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor | None,
    counts: Tensor,
    *,
    classes: int,
    threshold: float,
    max_count: int,
) -> tuple[Tensor, Tensor]:
    """Apply NMS per class and image and keep the `max_count` best survivors of each image.

    Source: Lin et al. 2017, Sec. 4; the survivors are exactly those of ``torchvision.ops.nms``.

    Args:
        boxes: (N, 4) float32 of all images, one image after the other.
        scores: (N,) float32, no NaN.
        labels: (N,) int64 class 0..K-1, or None: all boxes of an image suppress each other.
        counts: (B,) int64 number of boxes per image; their sum is N.
        classes: K.
        threshold: IoU above which the box of the lower score is removed.
        max_count: 1 or more.

    Returns:
        indices (M,) int64 of the survivors, by image, best first, equal scores by class and then by
        index; and their number per image, (B,) int64.

    Raises:
        ValueError: shapes or counts do not fit, or a label is not 0..K-1.
        MemoryError: the memory to sort the boxes cannot be allocated.
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
        library.level,
        # Each thread takes whole images; a few boxes are not worth a thread.
        min(_threads(64 * len(scores)), max(1, len(counts))),
        boxes.data_ptr(),
        scores.data_ptr(),
        None if labels is None else labels.data_ptr(),
        offsets.data_ptr(),
        len(counts),
        classes,
        threshold,
        min(max_count, 2**62),
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


def _is_supported(values: Tensor) -> bool:
    # A subclass (a tracer's, for instance) may have no memory to point at.
    return (
        type(values) in (Tensor, torch.nn.Parameter)
        and values.device.type == "cpu"
        and values.dtype in _TYPES
        and values.is_contiguous()
    )


def _threads(elements: int) -> int:
    return max(1, min(torch.get_num_threads(), elements // _ELEMENTS_PER_THREAD))


def _pointers(tensors: Sequence[Tensor]) -> object:
    return (c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


def _functions() -> CDLL:
    if library.functions is None:
        raise RuntimeError(f"the native library is not in use: {library.reason}")
    return library.functions


def load_library(folder: Path) -> Library:
    """Load the library from a folder, unless it is switched off or does not fit its sources."""
    if os.environ.get("RETINANET_NATIVE", "1") == "0":
        return Library(None, 0, "RETINANET_NATIVE=0")
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
            return Library(None, 0, f"{file.name} does not load: {error}")
        if version != _version_of_sources(folder, version):
            return Library(None, 0, f"{file.name} was built from other sources: install again")
        return Library(functions, level, "")
    return Library(None, 0, "not built")


def _version_of_sources(folder: Path, otherwise: int) -> int:
    """Return the version that setup.py gives a library built from the sources in `folder`.

    An editable installation has them next to the library, where they may have changed since it was
    built. A wheel has none: return `otherwise`.
    """
    version = 0
    for name in SOURCES:
        try:
            version = crc32((folder / name).read_bytes(), version)
        except OSError:
            return otherwise
    return version


def _declare(functions: CDLL) -> None:
    """Declare the types of each function, in the order of native.c.

    Raises:
        AttributeError: the library lacks a function.
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


library = load_library(Path(__file__).parent)
