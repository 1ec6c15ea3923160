"""The classification losses in Triton, for GPUs: loss and gradient in one pass over the logits.

Each logit is read once and its gradient written once; labels stay integers, and nothing of the
logits' size is made besides. The definition is that of :mod:`retinanet.losses.classification`.
This module imports without Triton; the kernel itself does not, and lies apart.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from retinanet import triton_probe

_TYPES = (torch.float32, torch.bfloat16, torch.float16)

# Elements a program: with 8 warps each thread has four loads of 128 bits on the way at once, which
# is what it takes to fill the memory's pipe. Not tuned on a GPU.
_BLOCK = 4096
_WARPS = 8
_MOST_A_GROUP = 16  # neighbours that share one look at their row's label


def serves(logits: Tensor, formula: tuple[str, float, float]) -> bool:
    """Whether :func:`sum_and_gradient` can be called with these.

    Args:
        logits: (N, K).
        formula: name, gamma and beta.
    """
    # Under TRITON_INTERPRET=1 kernels run on a CPU, slowly: for tests.
    interpreted = logits.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return (
        (logits.device.type == "cuda" or interpreted)
        and logits.dim() == 2
        and logits.dtype in _TYPES
        and logits.is_contiguous()
        and formula[0] in ("focal", "focal_star")
        and not torch.compiler.is_compiling()
        and triton_probe.usable(logits.device)
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
    """The weighted loss of rows, and its gradient, without waiting for the device.

    The same bits each time: a program adds up its own elements, and the sums are added in order.

    Args:
        logits: (N, K) contiguous, as :func:`serves` takes them; computed in float32.
        labels: (N,) int64 class 0..K-1, BACKGROUND or IGNORED; any other makes the loss NaN.
        weights: (N,) factors of the rows; IGNORED rows count 0 whatever theirs is.
        positive: () or (K,) alpha of the class that is there.
        negative: () or (K,) alpha of those that are not.
        formula: name, gamma and beta.
        gradient: (N, K) contiguous, of any float type, to be filled; it may be `logits` itself.
            None: not wanted.

    Returns:
        () float32.
    """
    from retinanet.losses.triton_kernels import loss_and_gradient

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
                GROUP=min(_MOST_A_GROUP, classes & -classes),
                STAR=name == "focal_star",
                # 0, 1 and 2 need no power.
                POWER=int(gamma) if gamma in (0, 1, 2) else -1,
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
    without waiting, but the kernel can, and then the gradient is neither read nor written again.

    Args:
        values: contiguous, as :func:`sum_and_gradient` fills it.
        factor: () any float type.

    Returns:
        `values`.
    """
    from retinanet.losses.triton_kernels import scale

    if values.numel():
        with torch.cuda.device_of(values):  # type: ignore[no-untyped-call]
            scale[(-(-values.numel() // _BLOCK),)](
                values, factor, values.numel(), BLOCK=_BLOCK, num_warps=_WARPS,
                enable_fp_fusion=True,
            )  # fmt: skip
    return values
