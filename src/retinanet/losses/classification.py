"""Losses over independent sigmoids: cross entropy, focal loss, its variant FL*, and the hinge loss.

All are functions of u = -x_t, the logit seen from the wrong side: u = x where the target is 0 and
u = -x where it is 1. ``_focal``, ``_focal_star`` and ``_hinge`` give such a function and its slope;
all else here is the same for every loss.

Two ways lead to one result. Dense targets, ``reduction="none"``, second derivatives and compiled
code take the formula as it is written (``_reference``) and autograd's gradient. Integer labels
take ``_LabelLoss``: no one-hot targets, and the gradient, known in closed form (Appendix B), is
made with the value while a piece of the logits is in the cache: by the native library on a CPU and
by a Triton kernel on a GPU where they are there and know the loss, else piece by piece in torch.
Tests hold all of them equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.functional import softplus

from retinanet import native, triton_probe
from retinanet.structures import BACKGROUND, IGNORED, is_readable

Reduction = Literal["none", "sum", "mean"]
Alpha = float | Sequence[float] | Tensor | None
Kind = Literal["focal", "focal_star", "hinge"]
_Formula = tuple[Kind, float, float]  # gamma and beta; of the hinge its margin and 0
_Curve = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# logits (N, K), labels (N,), weights (N,), weights of positives and negatives, the formula, and the
# gradient (N, K) to be filled or None, to the loss ().
_Way = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, _Formula, Tensor | None], Tensor]

# From here on log(1 + exp(x)) is x to the last bit, in float64 too, and exp(x) is no infinity yet.
_LINEAR_FROM = 80.0

# What the native library has curves of. (Of Triton's kernel its `serves` says so.)
_NATIVE_KINDS = ("focal", "focal_star")

# Elements worked on at a time, a thread: 2,048 anchors of 80 classes, four intermediates of 640 kB.
_CPU_PIECE = 2048 * 80
_GPU_PIECE = 2**23


def focal_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    alpha: Alpha = 0.25,
    gamma: float = 2.0,
    reduction: Reduction = "sum",
) -> Tensor:
    r"""Alpha-balanced focal loss of independent sigmoids.

    .. math:: FL(p_t) = -\alpha_t (1 - p_t)^\gamma \log p_t

    Source: Lin et al. 2017 (arXiv:1708.02002), Sec. 3.2, Eq. 5; gradient: Appendix B.

    Args:
        logits: (..., K) raw scores of any float type; computed in float32 (float64 stays).
        targets: integers (...): class 0..K-1, BACKGROUND (-1: no class) or IGNORED (-2: no loss
            and no gradient); or floats (..., K) in [0, 1]: the target of each sigmoid. Soft targets
            t enter as torchvision has it: p_t = t p + (1 - t) (1 - p), alpha_t likewise, and cross
            entropy with t.
        alpha: weight of positives in [0, 1], negatives weigh 1 - alpha; K numbers: one a class;
            None: no weights (Eq. 4).
        gamma: focusing exponent >= 0; 0 gives Eq. 3.
        reduction: ``sum``; ``mean`` over the elements that are not ignored; ``none``.

    Returns:
        () or, for ``none``, (..., K) with 0 where ignored; float32 or float64. For a detector
        divide the sum by the number of anchors assigned to an object (Sec. 4.1). Value and gradient
        are finite for every finite logit. With integer labels the relative error of the float32
        sum is below 2e-6 for any number of elements: blocks are summed in float32, their sums in
        float64.

    Raises:
        ValueError: shapes do not fit, or alpha, gamma, reduction or a target is out of range
            (values that lie on a GPU are not looked at: that would wait for it).

    Differs: torchvision takes one-hot targets alone, has no IGNORED, and spells None as -1.

    Example: Sec. 3.2, "with gamma = 2, an example classified with p_t = 0.9 would have 100x lower
    loss compared with CE".

        >>> logit = torch.tensor([[0.9]]).logit()
        >>> label = torch.tensor([0])
        >>> ce = cross_entropy(logit, label)
        >>> fl = focal_loss(logit, label, alpha=None, gamma=2.0)
        >>> round(float(ce / fl), 1)
        100.0
    """
    return _loss(logits, targets, _formula("focal", gamma=gamma), alpha, reduction)


def cross_entropy(
    logits: Tensor, targets: Tensor, *, alpha: Alpha = None, reduction: Reduction = "sum"
) -> Tensor:
    r"""Cross entropy of independent sigmoids, alpha-balanced if asked: focal loss with gamma 0.

    .. math:: CE(p_t) = -\alpha_t \log p_t

    Source: Lin et al. 2017 (arXiv:1708.02002), Sec. 3 and 3.1, Eq. 1 to 3.

    Args, Returns, Raises: as :func:`focal_loss`.

    Example: Sec. 3.3, without the prior every sigmoid starts at one half, and an anchor of K = 80
    classes costs K ln 2.

        >>> round(float(cross_entropy(torch.zeros(1, 80), torch.tensor([-1]))), 2)
        55.45
    """
    return _loss(logits, targets, _formula("focal", gamma=0.0), alpha, reduction)


def focal_loss_star(
    logits: Tensor,
    targets: Tensor,
    *,
    gamma: float = 2.0,
    beta: float = 0.0,
    alpha: Alpha = None,
    reduction: Reduction = "sum",
) -> Tensor:
    r"""FL*: cross entropy of a steeper and shifted sigmoid.

    .. math:: FL^*(x_t) = -\alpha_t \log(\sigma(\gamma x_t + \beta)) / \gamma

    Source: Lin et al. 2017 (arXiv:1708.02002), Appendix A, Eq. 6 and 7; gradient: Appendix B.

    Args:
        gamma: steepness > 0. With `beta` 0, 1 gives cross entropy.
        beta: shift; the higher, the less an example of a given x_t costs.

    Other Args, Returns, Raises: as :func:`focal_loss`. A soft target t mixes the loss of a
    positive and of a negative, t to 1 - t.

    Example: on the decision border, x_t = 0, it costs ln 2 / gamma.

        >>> round(float(focal_loss_star(torch.zeros(1, 1), torch.tensor([0]), gamma=4.0)), 4)
        0.1733
    """
    formula = _formula("focal_star", gamma=gamma, beta=beta)
    return _loss(logits, targets, formula, alpha, reduction)


def hinge_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    margin: float = 0.5,
    alpha: Alpha = None,
    reduction: Reduction = "sum",
) -> Tensor:
    r"""Hinge loss on p_t: nothing to learn above a margin.

    .. math:: \alpha_t \max(0, m - p_t)

    Source: Lin et al. 2017 (arXiv:1708.02002), Sec. 5.1: "the hinge loss on p_t, which sets loss to
    0 above a certain value of p_t", tried and found unstable. It is flat on both sides: an example
    that is wholly wrong has no gradient either.

    Args:
        margin: m in (0, 1], the value of p_t from which an example costs nothing. The paper gives
            none: .5, the decision border, is ours.

    Other Args, Returns, Raises: as :func:`focal_loss`. A soft target t mixes the loss of a
    positive and of a negative, t to 1 - t. At p_t = m the gradient is 0.

    Example: at p_t = .1 it costs .5 - .1.

        >>> logit = torch.tensor([[0.1]]).logit()
        >>> round(float(hinge_loss(logit, torch.tensor([0]))), 4)
        0.4
    """
    return _loss(logits, targets, _formula("hinge", margin=margin), alpha, reduction)


def weighted_label_loss(
    logits: Tensor,
    labels: Tensor,
    row_weights: Tensor,
    *,
    kind: Kind,
    gamma: float = 2.0,
    beta: float = 0.0,
    margin: float = 0.5,
    alpha: Alpha = None,
    overwrite_logits: bool = False,
) -> Tensor:
    """Sum of rows' losses, each times its weight: what a detector with a normaliser an image needs.

    Args:
        logits: (N, K).
        labels: (N,) integer class 0..K-1, BACKGROUND or IGNORED.
        row_weights: (N,) float; no gradient flows to them.
        kind, gamma, beta, margin, alpha: as in the public functions; a number that the kind does
            not have is not looked at.
        overwrite_logits: the gradient may be written over the logits, which saves as much memory
            as they take. Only for logits that nobody reads afterwards (a convolution does not
            need its output to go backward); autograd refuses those who kept them for their own
            gradient. The loss can then be derived once, and not twice.

    Returns:
        () float32, or float64 for float64 logits.

    Raises:
        ValueError: as :func:`focal_loss`.
        RuntimeError: in the backward pass, if the logits were given up and are wanted again.
    """
    if labels.shape != logits.shape[:1] or logits.dim() != 2 or row_weights.shape != labels.shape:
        raise ValueError(
            "a weighted loss takes logits (N, K), labels (N,) and weights (N,), got "
            f"{tuple(logits.shape)}, {tuple(labels.shape)} and {tuple(row_weights.shape)}"
        )
    formula = _formula(kind, gamma=gamma, beta=beta, margin=margin)
    return _weighted_sum(logits, labels, row_weights, formula, alpha, overwrite_logits)


def _weighted_sum(
    logits: Tensor,
    labels: Tensor,
    row_weights: Tensor,
    formula: _Formula,
    alpha: Alpha,
    overwrite_logits: bool = False,
) -> Tensor:
    _check_labels(labels, logits.shape[1])
    positive, negative = _alpha_pair(alpha, logits)
    weights = torch.where(labels == IGNORED, 0, row_weights.detach()).to(_working_type(logits))
    labels = labels.long()
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        # The compiler fuses the formula as written; torch.func's transforms trace it.
        return _reference_sum(logits, labels, weights, positive, negative, formula)
    want_gradient = torch.is_grad_enabled() and logits.requires_grad
    result: Tensor = _LabelLoss.apply(
        logits,
        labels,
        weights,
        positive,
        negative,
        formula,
        want_gradient,
        overwrite_logits and want_gradient,
    )
    return result


def _focal(gamma: float, beta: float) -> _Curve:
    """f(u) = p^gamma cost with p = sigmoid(u) = 1 - p_t and cost = log(1 + e^u)."""

    def curve(u: Tensor, work: Tensor) -> tuple[Tensor, Tensor]:
        p, rest, cost, beyond = _sigmoid_and_softplus(u, 1.0, 0.0, work)
        if gamma == 0:
            return cost.add_(beyond), p
        # f' = p^gamma (p + gamma (1 - p) cost), where 1 - p is 0 in the linear part
        slope = rest.mul_(cost).mul_(gamma).add_(p)
        cost.add_(beyond)
        factor = torch.pow(p, gamma, out=beyond)
        return cost.mul_(factor), slope.mul_(factor)

    return curve


def _focal_star(gamma: float, beta: float) -> _Curve:
    """f(u) = log(1 + e^(gamma u - beta)) / gamma."""

    def curve(u: Tensor, work: Tensor) -> tuple[Tensor, Tensor]:
        p, _, cost, beyond = _sigmoid_and_softplus(u, gamma, beta, work)
        return cost.add_(beyond), p

    return curve


def _hinge(margin: float, _: float) -> _Curve:
    """f(u) = max(0, margin - p_t) with p_t = sigmoid(-u)."""

    def curve(u: Tensor, work: Tensor) -> tuple[Tensor, Tensor]:
        p_t, slope, loss, costs = work.unbind()
        torch.neg(u, out=p_t).sigmoid_()
        torch.neg(p_t, out=loss).add_(margin).clamp_(min=0)
        # f' = p_t (1 - p_t) below the margin
        torch.neg(p_t, out=slope).add_(1).mul_(p_t)
        return loss, slope.mul_(torch.sign(loss, out=costs))

    return curve


# Each gives a function that makes f(u) and f'(u) in the memory of 4 scratch tensors of u's shape.
_CURVES: dict[str, Callable[[float, float], _Curve]] = {
    "focal": _focal,
    "focal_star": _focal_star,
    "hinge": _hinge,
}


def _sigmoid_and_softplus(
    u: Tensor, gamma: float, beta: float, work: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With z = gamma u - beta: sigmoid(z), sigmoid(-z), and two parts of log(1 + e^z) / gamma.

    The second part is what z adds beyond `_LINEAR_FROM`, where there is nothing left to add to z.

    One exponential and one logarithm for all three. torch's log1p takes four times as long on a CPU
    as log with the rounding of 1 + e^z made good; new memory for each step would take twice that.
    """
    e, rest, cost, spare = work.unbind()
    if gamma == 1 and beta == 0:
        torch.clamp(u, max=_LINEAR_FROM, out=e)
    else:
        torch.sub(u, beta / gamma, out=e).mul_(gamma).clamp_(max=_LINEAR_FROM)
    e.exp_()
    total = torch.add(e, 1, out=rest)
    torch.log(total, out=cost)
    lost = torch.sub(e, torch.sub(total, 1, out=spare), out=spare)
    total.reciprocal_()
    cost.addcmul_(lost, rest)
    if gamma != 1:
        cost.div_(gamma)
    beyond = torch.sub(u, (_LINEAR_FROM + beta) / gamma, out=spare).clamp_(min=0)
    return e.mul_(rest), rest, cost, beyond


class _LabelLoss(torch.autograd.Function):
    """:func:`_sum_and_gradient` as autograd knows it."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        weights: Tensor,
        positive: Tensor,
        negative: Tensor,
        formula: _Formula,
        want_gradient: bool,
        overwrite: bool,
    ) -> Tensor:
        loss, ctx.gradient = _sum_and_gradient(
            logits, labels, weights, positive, negative, formula, want_gradient, overwrite
        )
        ctx.overwritten = overwrite
        if overwrite:
            # Whoever saved the logits for a gradient of theirs is told so when it comes to that.
            increment_version(logits)
        else:
            ctx.save_for_backward(logits, labels, weights, positive, negative)
        ctx.formula = formula
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        constants = (None,) * 7
        # Scaled in place and given away, which saves a copy; with retain_graph it is made again.
        gradient, ctx.gradient = ctx.gradient, None
        if ctx.overwritten:
            if torch.is_grad_enabled() or gradient is None:
                raise RuntimeError(
                    "the gradient was written over the logits, so this loss can be derived only "
                    "once: for second derivatives, or a second backward pass, leave "
                    "overwrite_logits=False"
                )
            return _scaled(gradient, upstream), *constants
        logits, labels, weights, positive, negative = ctx.saved_tensors
        if torch.is_grad_enabled():
            # create_graph: a gradient that can itself be derived takes the formula.
            loss = _reference_sum(logits, labels, weights, positive, negative, ctx.formula)
            return *torch.autograd.grad(loss, logits, upstream, create_graph=True), *constants
        if gradient is None:
            _, gradient = _sum_and_gradient(
                logits, labels, weights, positive, negative, ctx.formula, True
            )
            assert gradient is not None
        return _scaled(gradient, upstream).to(logits.dtype), *constants


def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """The gradient times what came from above, in its own memory."""
    if upstream.device.type == "cpu" and float(upstream) == 1:
        return gradient
    # The kernel works in float32.
    fits = gradient.is_cuda and gradient.is_contiguous() and gradient.dtype != torch.float64
    if fits and triton_probe.usable(gradient.device):
        from retinanet.losses import triton_loss

        # Only the kernel can see, without a wait, that there is nothing to multiply.
        return triton_loss.scale_(gradient, upstream)
    return gradient.mul_(upstream)


def _sum_and_gradient(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    positive: Tensor,
    negative: Tensor,
    formula: _Formula,
    want_gradient: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The weighted loss () of rows (N, K) with labels (N,), and its gradient.

    float16 has a float32 gradient, as it would lose the many small ones before the loss scale can
    lift them. With `overwrite` any other is written over the logits.
    """
    gradient = None
    if want_gradient and overwrite and logits.dtype != torch.float16:
        gradient = logits.detach()
    elif want_gradient:
        stored = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        gradient = torch.empty_like(logits, dtype=stored, memory_format=torch.contiguous_format)
    run: _Way = _in_pieces
    if logits.device.type == "cpu":
        if formula[0] in _NATIVE_KINDS and native.label_loss_served(logits):
            run = native.label_loss
    elif logits.device.type == "cuda":
        run = _on_gpu(logits, formula)
    return run(logits, labels, weights, positive, negative, formula, gradient), gradient


def _on_gpu(logits: Tensor, formula: _Formula) -> _Way:
    """The Triton kernel, or the pieces where there is no Triton or it does not know the case."""
    from retinanet.losses import triton_loss

    return triton_loss.sum_and_gradient if triton_loss.serves(logits, formula) else _in_pieces


def _in_pieces(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    positive: Tensor,
    negative: Tensor,
    formula: _Formula,
    gradient: Tensor | None,
) -> Tensor:
    """The loss (), and its gradient into `gradient`, which may be the logits, in plain torch."""
    name, *numbers = formula
    curve = _CURVES[name](*numbers)
    count, classes = logits.shape
    kind, on_cpu = weights.dtype, logits.device.type == "cpu"
    # The one class of each row that has a class is put right at the end. A GPU does it for all
    # rows, so that it need not say which they are.
    rows = torch.arange(count, device=labels.device)
    if on_cpu:
        rows = rows[labels >= 0]
    own = labels[rows].clamp(min=0)
    own_logits = logits[rows, own].to(kind)
    # Nearly every element is a negative, so all are first taken for one, ...
    elements = _CPU_PIECE * min(8, torch.get_num_threads()) if on_cpu else _GPU_PIECE
    step = min(max(1, elements // classes), max(1, count))
    scratch = logits.new_empty((5, step, classes), dtype=kind)
    row_losses = weights.new_empty(count)
    for start in range(0, count, step):
        piece = slice(start, min(start + step, count))
        work = scratch[:, : piece.stop - start]
        x = logits[piece] if logits.dtype == kind else work[4].copy_(logits[piece])
        value, slope = curve(x, work[:4])
        torch.sum(value.mul_(negative), dim=1, out=row_losses[piece])
        if gradient is not None:
            torch.mul(slope, weights[piece, None] * negative, out=slope)
            gradient[piece] = slope
    loss = _accurate_sum(row_losses * weights)
    # ... then come the positives.
    right = torch.where(labels[rows] >= 0, weights[rows], 0)
    as_positive, positive_slope = curve(-own_logits, own_logits.new_empty((4, len(rows))))
    as_negative, _ = curve(own_logits, own_logits.new_empty((4, len(rows))))
    own_positive, own_negative = positive.expand(classes)[own], negative.expand(classes)[own]
    loss = loss + _accurate_sum((own_positive * as_positive - own_negative * as_negative) * right)
    if gradient is not None:
        corrected = (-own_positive * positive_slope * right).to(gradient.dtype)
        gradient[rows, own] = torch.where(right > 0, corrected, gradient[rows, own])
    return loss.to(kind)


def _accurate_sum(values: Tensor) -> Tensor:
    """() sum in float64 where the device has it: the error does not grow with the number."""
    return values.sum() if values.device.type == "mps" else values.sum(dtype=torch.float64)


def _reference_sum(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    positive: Tensor,
    negative: Tensor,
    formula: _Formula,
) -> Tensor:
    """The loss of :func:`_sum_and_gradient` from :func:`_reference`."""
    classes = logits.shape[1]
    # Labels that could not be checked before make the loss NaN, as the Triton kernel does.
    weights = torch.where((labels < IGNORED) | (labels >= classes), math.nan, weights)
    targets = _one_hot(labels, classes, weights.dtype)
    loss = _reference(logits.to(weights.dtype), targets, formula)
    return (loss * (positive * targets + negative * (1 - targets)) * weights[:, None]).sum()


def _reference(logits: Tensor, targets: Tensor, formula: _Formula) -> Tensor:
    """The unweighted loss of each element as the paper writes it; targets dense, all (..., K)."""
    kind, gamma, beta = formula
    if kind == "hinge":
        margin = gamma
        as_positive = torch.relu(margin - torch.sigmoid(logits))
        as_negative = torch.relu(margin - torch.sigmoid(-logits))
        return targets * as_positive + (1 - targets) * as_negative
    if kind == "focal_star":
        steep = {"beta": gamma, "threshold": _LINEAR_FROM}
        as_positive = softplus(-logits - beta / gamma, **steep)
        as_negative = softplus(logits - beta / gamma, **steep)
        return targets * as_positive + (1 - targets) * as_negative
    as_positive = softplus(-logits, threshold=_LINEAR_FROM)
    as_negative = softplus(logits, threshold=_LINEAR_FROM)
    loss = targets * as_positive + (1 - targets) * as_negative
    if gamma == 0:
        return loss
    # 1 - p_t; the clamp keeps it over 0, where the slope of a power under 1 is infinite.
    bounded = logits.clamp(-_LINEAR_FROM, _LINEAR_FROM)
    wrong = targets * torch.sigmoid(-bounded) + (1 - targets) * torch.sigmoid(bounded)
    return wrong.pow(gamma) * loss


def _loss(
    logits: Tensor,
    targets: Tensor,
    formula: _Formula,
    alpha: Alpha,
    reduction: Reduction,
) -> Tensor:
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction is none, sum or mean, got {reduction!r}")
    if not logits.is_floating_point() or logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits are floats of shape (..., K), got {logits.dtype} {tuple(logits.shape)}"
        )
    integer = not targets.is_floating_point() and targets.dtype != torch.bool
    expected = logits.shape[:-1] if integer else logits.shape
    if targets.shape != expected:
        raise ValueError(
            f"logits {tuple(logits.shape)} go with integer labels of shape "
            f"{tuple(logits.shape[:-1])} or float targets of shape {tuple(logits.shape)}; "
            f"got {targets.dtype} targets of shape {tuple(targets.shape)}"
        )
    classes = logits.shape[-1]
    positive, negative = _alpha_pair(alpha, logits)
    working = _working_type(logits)
    if integer and reduction != "none":
        labels = targets.reshape(-1)
        ones = torch.ones(labels.shape, dtype=working, device=logits.device)
        flat = logits.reshape(-1, classes)
        total = _weighted_sum(flat, labels, ones, formula, alpha)
        if reduction == "sum":
            return total
        return total / ((labels != IGNORED).sum() * classes).clamp(min=1)
    if integer:
        _check_labels(targets, classes)
        dense = _one_hot(targets, classes, working)
        counted = (targets != IGNORED)[..., None]
    else:
        dense = targets.to(working)
        _check_dense(dense)
        counted = None
    loss = _reference(logits.to(working), dense, formula)
    if alpha is not None:
        loss = loss * (positive * dense + negative * (1 - dense))
    if counted is not None:
        loss = torch.where(counted, loss, 0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / max(1, loss.numel())


def _working_type(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _one_hot(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    places = torch.arange(classes, device=labels.device)
    return (labels[..., None] == places).to(dtype)


def _alpha_pair(alpha: Alpha, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of positives and of negatives: () or (K,) each."""
    kind, device, classes = _working_type(logits), logits.device, logits.shape[-1]
    if alpha is None:
        one = torch.ones((), dtype=kind, device=device)
        return one, one
    place = alpha.device if isinstance(alpha, Tensor) else "cpu"  # not torch's default
    weight = torch.as_tensor(alpha, dtype=kind, device=place)
    if weight.dim() > 1 or (weight.dim() == 1 and len(weight) != classes):
        raise ValueError(
            f"alpha is a number, None or one number for each of the {classes} classes, "
            f"got {tuple(weight.shape)}"
        )
    if is_readable(weight):
        outside = ~((weight >= 0) & (weight <= 1)).reshape(-1)
        if outside.any():
            raise ValueError(
                f"alpha must lie in [0, 1] (None: no weights), got {weight.reshape(-1)[outside][0]}"
            )
    if isinstance(alpha, float | int):  # filled in there: a copy to a GPU would wait for it
        weight = torch.full((), alpha, dtype=kind, device=device)
    weight = weight.to(device).detach()
    return weight, 1 - weight


def _formula(kind: Kind, *, gamma: float = 2.0, beta: float = 0.0, margin: float = 0.5) -> _Formula:
    """A kind with the two numbers that it has, both looked at."""
    if kind == "hinge":
        if not 0 < margin <= 1:
            raise ValueError(f"margin must lie in (0, 1], as p_t does, got {margin}")
        return kind, margin, 0.0
    if not 0 <= gamma < math.inf or (gamma == 0 and kind == "focal_star"):
        raise ValueError(f"gamma must be {'> 0' if kind == 'focal_star' else '>= 0'}, got {gamma}")
    if not math.isfinite(beta):
        raise ValueError(f"beta must be a finite number, got {beta}")
    return kind, gamma, beta


def _check_labels(labels: Tensor, classes: int) -> None:
    if labels.dtype == torch.bool or labels.is_floating_point():
        raise ValueError(f"labels are integers, got {labels.dtype}")
    # Looking at values on a GPU would wait for it; there the Triton kernel makes such a loss NaN.
    if not is_readable(labels) or labels.numel() == 0:
        return
    low, high = (int(end) for end in labels.aminmax())
    if low < IGNORED or high >= classes:
        wrong = high if high >= classes else low
        raise ValueError(
            f"label {wrong} is neither a class 0..{classes - 1} nor BACKGROUND ({BACKGROUND}) nor "
            f"IGNORED ({IGNORED})"
        )


def _check_dense(targets: Tensor) -> None:
    if not is_readable(targets) or targets.numel() == 0:
        return
    low, high = (float(end) for end in targets.aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"float targets lie in [0, 1], got {low if not low >= 0 else high}")
