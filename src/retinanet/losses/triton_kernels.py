"""The Triton kernel of :mod:`retinanet.losses.triton_loss`; importing it needs Triton."""

from __future__ import annotations

import triton  # type: ignore[import-untyped, import-not-found, unused-ignore]
import triton.language as tl  # type: ignore[import-untyped, import-not-found, unused-ignore]

from retinanet.structures import IGNORED

_IGNORED = tl.constexpr(IGNORED)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _log_of_one_and(e):  # type: ignore[no-untyped-def]
    """log(1 + e) for e in [0, 1] within 2e-7 of it: the library's takes three times as long.

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
    """One block of the logits, taken as one long row so that no lane idles whatever the classes.

    GROUP elements, a power of 2 that divides the classes, lie in one row together: label and weight
    are looked up once a group.
    """
    # 64 bits only once a program: a batch may have more than 2^31 logits.
    start = tl.program_id(0).to(tl.int64) * BLOCK
    first_row = start // CLASSES
    within = (start - first_row * CLASSES).to(tl.int32)
    groups = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP
    there = groups < elements - start
    row = (within + groups) // CLASSES
    offsets = groups + tl.arange(0, GROUP)[None, :]
    column = within + offsets - row * CLASSES

    x = tl.load(logits + start + offsets, mask=there, other=0.0).to(tl.float32)
    label = tl.load(labels + first_row + row, mask=there, other=_IGNORED)
    weight = tl.load(weights + first_row + row, mask=there, other=0.0)
    weight = tl.where(label == _IGNORED, 0.0, weight)
    # Nobody has looked at the labels: one that is none ends the training, by a loss of NaN.
    weight = tl.where((label >= CLASSES) | (label < _IGNORED), float("nan"), weight)
    label = label.to(tl.int32)  # only now: cut off before, a wrong one could look like a class
    own = label == column
    if CLASS_ALPHA:
        alpha = tl.where(own, tl.load(positive + column), tl.load(negative + column))
    else:
        alpha = tl.where(own, tl.load(positive), tl.load(negative))
    weight = weight * alpha

    # u is the logit seen from the wrong side; f(u) the loss and f'(u) its slope.
    u = tl.where(own, -x, x)
    if STAR:
        u = u - beta / gamma
        z = gamma * u
    else:
        z = u
    # With e <= 1 nothing overflows: log(1 + e^z) = max(z, 0) + log(1 + e).
    e = tl.exp(-tl.abs(z))
    inverse = 1.0 / (1.0 + e)
    tail = _log_of_one_and(e)
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
    tl.store(sums + tl.program_id(0), tl.sum(loss * weight))
    if WANTED:
        slope = tl.where(own, -slope, slope) * weight
        tl.store(gradient + start + offsets, slope.to(gradient.dtype.element_ty), mask=there)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def scale(values, factor, elements, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """`values` times the number at `factor`, in place; times 1 it touches no memory."""
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        offsets = tl.arange(0, BLOCK)
        there = offsets < elements - start
        places = values + start + offsets
        scaled = tl.load(places, mask=there, other=0.0).to(tl.float32) * by
        tl.store(places, scaled.to(values.dtype.element_ty), mask=there)
