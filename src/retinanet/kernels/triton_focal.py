"""Triton kernel of the classification losses: loss and gradient in one pass over the logits.

Each logit is read once and its gradient is written once; labels stay integers, and nothing of the
logits' size is allocated besides. The definition is the plain formula of
:mod:`retinanet.losses.focal`. Importing this module needs Triton; ask
:func:`retinanet.kernels.triton_probe.is_usable` first.
"""

from __future__ import annotations

import os

import torch
import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]
from torch import Tensor

from retinanet.structures import IGNORED

_IGNORED = tl.constexpr(IGNORED)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Elements per program: with 8 warps each thread has four loads of 128 bits in flight, which is what
# it takes to saturate the memory bandwidth. Not tuned on a GPU.
_BLOCK = 4096
_WARPS = 8
_MAX_GROUP = 16  # consecutive elements that share one lookup of their row's label


def supports(logits: Tensor, formula: tuple[str, float, float]) -> bool:
    """Return True if :func:`sum_and_gradient` can be called with these.

    Args:
        logits: (N, K).
        formula: name, gamma and beta.
    """
    # Under TRITON_INTERPRET=1 kernels run on a CPU, slowly: for tests.
    interpreted = logits.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return (
        (logits.device.type == "cuda" or interpreted)
        and logits.dim() == 2
        and logits.dtype in _DTYPES
        and logits.is_contiguous()
        and formula[0] in ("focal", "focal_star")
    )


def sum_and_gradient(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    positive: Tensor,
    negative: Tensor,
    formula: tuple[str, float, float],
    gradient: Tensor | None,
) -> Tensor:
    """Compute the weighted loss of rows, and its gradient, without a device sync.

    Deterministic: a program sums its own elements, and the sums are added in order, in float64.

    Args:
        logits: (N, K) contiguous, as :func:`supports` accepts them; computed in float32.
        labels: (N,) int64 class 0..K-1, BACKGROUND or IGNORED; any other makes the loss NaN.
        weights: (N,) factors of the rows; IGNORED rows count 0 whatever theirs is.
        positive: () or (K,) alpha of positives.
        negative: () or (K,) alpha of negatives.
        formula: name, gamma and beta.
        gradient: (N, K) contiguous, of any float type, to be filled; it may be `logits` itself.
            None: not computed.

    Returns:
        () float32.
    """
    name, gamma, beta = formula
    elements, classes = logits.numel(), logits.shape[1]
    programs = -(-elements // _BLOCK)
    sums = torch.empty(programs, dtype=torch.float32, device=logits.device)
    if programs:
        with torch.cuda.device_of(logits):  # type: ignore[no-untyped-call]
            loss_and_gradient[(programs,)](
                logits,
                labels.contiguous(),
                weights.float().contiguous(),
                positive.float().contiguous(),
                negative.float().contiguous(),
                logits if gradient is None else gradient,
                sums,
                elements,
                gamma,
                beta,
                CLASSES=classes,
                GROUP=min(_MAX_GROUP, classes & -classes),
                STAR=name == "focal_star",
                POWER=int(gamma) if gamma in (0, 1, 2) else -1,  # 0, 1 and 2 need no power
                CLASS_ALPHA=positive.dim() == 1,
                WANTED=gradient is not None,
                BLOCK=_BLOCK,
                num_warps=_WARPS,
                enable_fp_fusion=True,
            )
    return sums.sum(dtype=torch.float64).float()


def scale_(values: Tensor, factor: Tensor) -> Tensor:
    """Multiply in place by a number that only the device knows.

    In training it is 1, unless losses are scaled or accumulated. The host could not see that
    without a sync, but the kernel can, and then the gradient is neither read nor written again.

    Args:
        values: contiguous, as :func:`sum_and_gradient` fills it.
        factor: () any float type.

    Returns:
        `values`.
    """
    if values.numel():
        with torch.cuda.device_of(values):  # type: ignore[no-untyped-call]
            scale[(-(-values.numel() // _BLOCK),)](
                values, factor, values.numel(), BLOCK=_BLOCK, num_warps=_WARPS,
                enable_fp_fusion=True,
            )  # fmt: skip
    return values


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _log1p(e):  # type: ignore[no-untyped-def]
    """log(1 + e) for e in [0, 1] within a relative 2e-7; the library's takes three times as long.

    A Chebyshev fit of log(1 + e) / e, of degree 8.
    """
    y = 0.005253457929939032 * e - 0.02958850748836994
    y = y * e + 0.07836166769266129
    y = y * e - 0.13674770295619965
    y = y * e + 0.19111430644989014
    y = y * e - 0.24844369292259216
    y = y * e + 0.33319270610809326
    y = y * e - 0.49999502301216125
    y = y * e + 1.0
    return y * e


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _value_and_slope(u, gamma, beta, STAR: tl.constexpr, POWER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Loss f(u) and slope f'(u) at the negated margin u = -x_t."""
    if STAR:
        u = u - beta / gamma
        z = gamma * u
    else:
        z = u
    # With e <= 1 nothing overflows: log(1 + e^z) = max(z, 0) + log(1 + e).
    e = tl.exp(-tl.abs(z))
    inverse = 1.0 / (1.0 + e)
    tail = _log1p(e)
    p = tl.where(z >= 0, 1.0, e) * inverse
    if STAR:
        loss = tl.maximum(u, 0.0) + tail / gamma
        slope = p
    elif POWER == 0:
        loss = tl.maximum(u, 0.0) + tail
        slope = p
    else:
        # f = p^gamma cost and f' = p^gamma (p + gamma (1 - p) cost).
        cost = tl.maximum(u, 0.0) + tail
        rest = tl.where(z >= 0, e, 1.0) * inverse
        if POWER == 1:
            factor = p
        elif POWER == 2:
            factor = p * p
        else:
            factor = tl.exp(gamma * (tl.minimum(u, 0.0) - tail))  # log p without another log
        loss = factor * cost
        slope = factor * (p + gamma * (rest * cost))
    return loss, slope


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def loss_and_gradient(  # type: ignore[no-untyped-def]
    logits,
    labels,
    weights,
    positive,
    negative,
    gradient,
    sums,
    elements,
    gamma,
    beta,
    CLASSES: tl.constexpr,
    GROUP: tl.constexpr,
    STAR: tl.constexpr,
    POWER: tl.constexpr,
    CLASS_ALPHA: tl.constexpr,
    WANTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of the logits, read as one long row so that no lane idles whatever CLASSES is.

    GROUP elements, a power of 2 that divides CLASSES, lie in the same row: label and weight are
    loaded once per group.
    """
    # 64 bits: a batch may have more than 2^31 logits.
    start = tl.program_id(0).to(tl.int64) * BLOCK
    first_row = start // CLASSES
    within = (start - first_row * CLASSES).to(tl.int32)
    groups = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP
    mask = groups < elements - start
    row = (within + groups) // CLASSES
    offsets = groups + tl.arange(0, GROUP)[None, :]
    column = within + offsets - row * CLASSES

    x = tl.load(logits + start + offsets, mask=mask, other=0.0).to(tl.float32)
    label = tl.load(labels + first_row + row, mask=mask, other=_IGNORED)
    weight = tl.load(weights + first_row + row, mask=mask, other=0.0)
    weight = tl.where(label == _IGNORED, 0.0, weight)
    # Labels are not checked on the host: an invalid one makes the loss NaN.
    weight = tl.where((label >= CLASSES) | (label < _IGNORED), float("nan"), weight)
    label = label.to(tl.int32)  # only now: truncated before, an invalid one could look like a class
    own = label == column
    if CLASS_ALPHA:
        alpha = tl.where(own, tl.load(positive + column), tl.load(negative + column))
    else:
        alpha = tl.where(own, tl.load(positive), tl.load(negative))
    weight = weight * alpha

    loss, slope = _value_and_slope(tl.where(own, -x, x), gamma, beta, STAR, POWER)
    tl.store(sums + tl.program_id(0), tl.sum(loss * weight))
    if WANTED:
        slope = tl.where(own, -slope, slope) * weight
        tl.store(gradient + start + offsets, slope.to(gradient.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def scale(values, factor, elements, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Multiply `values` by the number at `factor` in place; a factor of 1 touches no memory."""
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        offsets = tl.arange(0, BLOCK)
        mask = offsets < elements - start
        pointers = values + start + offsets
        scaled = tl.load(pointers, mask=mask, other=0.0).to(tl.float32) * by
        tl.store(pointers, scaled.to(values.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def set_to_one(value):  # type: ignore[no-untyped-def]
    """Store 1: the smallest kernel, to find out whether kernels run at all."""
    tl.store(value, 1.0)
