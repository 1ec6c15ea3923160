"""Losses over independent sigmoids: focal loss, cross entropy, FL* and the hinge loss.

Dense targets, ``reduction="none"``, second derivatives, ``torch.compile`` and ``torch.func`` use
the formula as it is written (:func:`plain_loss`) and autograd. Integer labels with a sum or a mean
compute loss and gradient in one pass: with the C kernel on a CPU or the Triton kernel on a GPU
where they are available and support the case, else with torch operations in chunks that stay in
the cache. Tests hold all of them equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.functional import softplus

from retinanet.config import QUALITY_LOSSES, LossConfig
from retinanet.kernels import native, triton_probe
from retinanet.structures import BACKGROUND, IGNORED, is_readable

Reduction = Literal["none", "sum", "mean"]
Alpha = float | Sequence[float] | Tensor | None
Kind = Literal["focal", "focal_star", "hinge", "quality_focal", "varifocal"]
Formula = tuple[Kind, float, float]
"""Kind, gamma and beta; for the hinge loss its margin and 0."""

_DEFAULTS = LossConfig()

# From here on log(1 + exp(x)) equals x in float64 too, and exp(x) does not overflow yet.
_LINEAR_FROM = 80.0

# Elements per chunk of torch operations: on a CPU per thread.
_CPU_CHUNK = 2**17
_GPU_CHUNK = 2**23


def focal_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    alpha: Alpha = _DEFAULTS.alpha,
    gamma: float = _DEFAULTS.gamma,
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
        alpha: weight of positives in [0, 1], negatives weigh 1 - alpha; K numbers: per class;
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
            (values on a GPU are not checked, which would need a device sync; an invalid label there
            makes the loss NaN).

    Differs: torchvision only takes one-hot targets, has no IGNORED, and writes None as -1.

    Example: Sec. 3.2, "with gamma = 2, an example classified with p_t = 0.9 would have 100x lower
    loss compared with CE".

        >>> logit = torch.tensor([[0.9]]).logit()
        >>> label = torch.tensor([0])
        >>> ce = cross_entropy(logit, label)
        >>> fl = focal_loss(logit, label, alpha=None, gamma=2.0)
        >>> round(float(ce / fl), 1)
        100.0
    """
    return _loss(logits, targets, make_formula("focal", gamma=gamma), alpha, reduction)


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
    return _loss(logits, targets, make_formula("focal", gamma=0.0), alpha, reduction)


def focal_loss_star(
    logits: Tensor,
    targets: Tensor,
    *,
    gamma: float = _DEFAULTS.gamma,
    beta: float = _DEFAULTS.beta,
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
    formula = make_formula("focal_star", gamma=gamma, beta=beta)
    return _loss(logits, targets, formula, alpha, reduction)


def hinge_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    margin: float = _DEFAULTS.margin,
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
    return _loss(logits, targets, make_formula("hinge", margin=margin), alpha, reduction)


def quality_focal_loss(
    logits: Tensor, targets: Tensor, *, gamma: float = _DEFAULTS.gamma, reduction: Reduction = "sum"
) -> Tensor:
    r"""Quality focal loss: the focal loss for a target in [0, 1], such as the IoU of a box.

    .. math:: QFL(p) = -|y - p|^\gamma ((1 - y) \log(1 - p) + y \log p)

    Source: Li et al. 2020 (arXiv:2006.04388), Sec. 3.2, Eq. 2, which calls the exponent beta.

    Args:
        logits: (..., K) raw scores of any float type; computed in float32 (float64 stays).
        targets: (..., K) floats y in [0, 1]; or integers as for :func:`focal_loss`, whose loss
            without alpha this then is.
        gamma: focusing exponent >= 0.
        reduction: as for :func:`focal_loss`.

    Returns, Raises: as :func:`focal_loss`.

    Example: at p = y the loss is 0, for every y.

        >>> y = torch.tensor([[0.7]])
        >>> round(float(quality_focal_loss(y.logit(), y)), 6)
        0.0
    """
    return _loss(logits, targets, make_formula("quality_focal", gamma=gamma), None, reduction)


def varifocal_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    alpha: Alpha = _DEFAULTS.alpha,
    gamma: float = _DEFAULTS.gamma,
    reduction: Reduction = "sum",
) -> Tensor:
    r"""Varifocal loss: focal for negatives, cross entropy weighted by the target for positives.

    .. math:: VFL(p) = -y (y \log p + (1 - y) \log(1 - p)) \text{ for } y > 0,
              \text{ else } -(1 - \alpha) p^\gamma \log(1 - p)

    Source: Zhang et al. 2021 (arXiv:2008.13367), Sec. 3.2, Eq. 2.

    Args:
        logits: (..., K) raw scores of any float type; computed in float32 (float64 stays).
        targets: (..., K) floats y in [0, 1]; or integers as for :func:`focal_loss`, with y = 1.
        alpha: in [0, 1], or K numbers: negatives weigh 1 - alpha (the paper's alpha, .75); None: 1.
        gamma: focusing exponent >= 0 of the negatives.
        reduction: as for :func:`focal_loss`.

    Returns, Raises: as :func:`focal_loss`.

    Example: y = .5 at p = .5 costs half a cross entropy of ln 2.

        >>> round(float(varifocal_loss(torch.zeros(1, 1), torch.tensor([[0.5]]))), 4)
        0.3466
    """
    return _loss(logits, targets, make_formula("varifocal", gamma=gamma), alpha, reduction)


def plain_loss(logits: Tensor, targets: Tensor, formula: Formula) -> Tensor:
    """Compute the unweighted loss of each element as the paper writes it.

    Args:
        logits: (..., K) float32 or float64.
        targets: (..., K) of the same type, in [0, 1].
        formula: kind, gamma and beta.

    Returns:
        (..., K).
    """
    kind, gamma, beta = formula

    def of_negative(u: Tensor) -> Tensor:
        if kind == "hinge":
            return torch.relu(gamma - torch.sigmoid(-u))
        if kind == "focal_star":
            return softplus(u - beta / gamma, beta=gamma, threshold=_LINEAR_FROM)
        return softplus(u, threshold=_LINEAR_FROM)

    loss = targets * of_negative(-logits) + (1 - targets) * of_negative(logits)
    if kind == "varifocal":
        factor = torch.sigmoid(logits.clamp(-_LINEAR_FROM, _LINEAR_FROM)).pow(gamma)
        return torch.where(targets > 0, targets, factor) * loss
    if kind in ("focal_star", "hinge") or gamma == 0:
        return loss
    if kind == "quality_focal":
        bounded = logits.clamp(-_LINEAR_FROM, _LINEAR_FROM)
        distance = (
            targets * torch.sigmoid(-bounded) - (1 - targets) * torch.sigmoid(bounded)
        ).abs()
        # The slope of a power below 1 is infinite at 0, and 0 times a large loss must stay 0.
        return distance.clamp(min=torch.finfo(distance.dtype).tiny).pow(gamma) * loss
    # 1 - p_t; the clamp keeps it above 0, where the slope of a power below 1 is infinite.
    bounded = logits.clamp(-_LINEAR_FROM, _LINEAR_FROM)
    wrong = targets * torch.sigmoid(-bounded) + (1 - targets) * torch.sigmoid(bounded)
    return wrong.pow(gamma) * loss


def plain_label_loss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    positive: Tensor,
    negative: Tensor,
    formula: Formula,
    scores: Tensor | None = None,
) -> Tensor:
    """Sum the plain formula over rows with integer labels: the definition of the kernels.

    Args, Returns: as :func:`sum_in_chunks`, with the attributes of its targets.
    """
    targets = _one_hot(labels, logits.shape[1], weights.dtype)
    if scores is not None:
        targets = targets * scores[:, None]
    loss = plain_loss(logits.to(weights.dtype), targets, formula)
    weighted = loss * _balance(targets, positive, negative, formula) * weights[:, None]
    if weighted.device.type == "mps":  # which has no float64
        return weighted.sum()
    return weighted.sum(dtype=torch.float64).to(weights.dtype)


class _Labels(NamedTuple):
    """Integer targets of rows of logits (N, K), and how they are weighted.

    Attributes:
        labels: (N,) int64.
        weights: (N,) float32 or float64 factors of the rows, 0 where ignored.
        positive, negative: () or (K,) alpha of positives and of negatives.
        formula: kind, gamma and beta.
        scores: (N,) target of each row's class, float32 or float64; None: 1.
    """

    labels: Tensor
    weights: Tensor
    positive: Tensor
    negative: Tensor
    formula: Formula
    scores: Tensor | None = None


def weighted_sum(
    logits: Tensor,
    labels: Tensor,
    row_weights: Tensor,
    formula: Formula,
    alpha: Alpha = None,
    *,
    scores: Tensor | None = None,
    overwrite_logits: bool = False,
) -> Tensor:
    """Sum the losses of rows, each times its weight.

    Args:
        logits: (N, K).
        labels: (N,) integer class 0..K-1, BACKGROUND or IGNORED.
        row_weights: (N,) float; no gradient flows to them.
        formula: from :func:`make_formula`.
        alpha: as in the public functions.
        scores: (N,) target in [0, 1] of each row's class, for the formulas ``quality_focal`` and
            ``varifocal``; None: 1. No gradient flows to them.
        overwrite_logits: allow the gradient to be written over the logits, which saves as much
            memory as they take. Only for logits that nothing reads afterwards (a convolution does
            not need its output in the backward pass); autograd raises an error where another
            function saved them for its own gradient. The loss can then be differentiated once only.

    Returns:
        () float32, or float64 for float64 logits.
    """
    _check_labels(labels, logits.shape[1])
    positive, negative = _alpha_pair(alpha, logits)
    weights = torch.where(labels == IGNORED, 0, row_weights.detach()).to(_working_type(logits))
    if scores is not None:
        scores = scores.detach().to(weights.dtype)
    elif formula[0] in QUALITY_LOSSES:
        scores = torch.ones_like(weights)
    targets = _Labels(labels.long(), weights, positive, negative, formula, scores)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        # The compiler fuses the formula as written; torch.func's transforms trace it.
        return plain_label_loss(logits, *targets)
    want_gradient = torch.is_grad_enabled() and logits.requires_grad
    overwrite = overwrite_logits and want_gradient
    result: Tensor = _LabelLoss.apply(logits, targets.labels, targets, want_gradient, overwrite)
    return result


class _LabelLoss(torch.autograd.Function):
    """Loss whose gradient is computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        targets: _Labels,
        want_gradient: bool,
        overwrite: bool,
    ) -> Tensor:
        ctx.gradient = _empty_gradient(logits, overwrite) if want_gradient else None
        loss = _sum_and_gradient(logits, targets, ctx.gradient)
        ctx.targets, ctx.overwritten = targets, overwrite
        if overwrite:
            # Functions that saved the logits for their own gradient then raise an error.
            increment_version(logits)
        else:
            ctx.save_for_backward(logits, labels)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in place and given away, which saves a copy; with retain_graph it is made again.
        gradient, ctx.gradient = ctx.gradient, None
        if ctx.overwritten:
            if torch.is_grad_enabled() or gradient is None:
                raise RuntimeError(
                    "the gradient was written over the logits, so this loss can be derived only "
                    "once: for second derivatives, or a second backward pass, leave "
                    "overwrite_logits=False"
                )
            return _scaled(gradient, upstream), None, None, None, None
        logits, _ = ctx.saved_tensors
        if torch.is_grad_enabled():
            # create_graph: a gradient that can itself be differentiated needs the formula.
            loss = plain_label_loss(logits, *ctx.targets)
            (second,) = torch.autograd.grad(loss, logits, upstream, create_graph=True)
            return second, None, None, None, None
        if gradient is None:
            gradient = _empty_gradient(logits)
            _sum_and_gradient(logits, ctx.targets, gradient)
        return _scaled(gradient, upstream).to(logits.dtype), None, None, None, None


def _empty_gradient(logits: Tensor, overwrite: bool = False) -> Tensor:
    """Return the memory for the gradient: with `overwrite` the logits' own.

    The gradient of float16 logits is float32: small values would vanish before the loss scaling.
    """
    if logits.dtype == torch.float16:
        return torch.empty_like(logits, dtype=torch.float32, memory_format=torch.contiguous_format)
    if overwrite:
        return logits.detach()
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _scaled(gradient: Tensor, upstream: Tensor) -> Tensor:
    """Multiply the gradient by the upstream gradient, in its own memory."""
    if upstream.device.type == "cpu" and float(upstream) == 1:
        return gradient
    # The kernel computes in float32.
    fits = gradient.is_cuda and gradient.is_contiguous() and gradient.dtype != torch.float64
    if fits and triton_probe.is_usable(gradient.device):
        from retinanet.kernels import triton_focal

        # Only the kernel can see, without a device sync, that the factor is 1.
        return triton_focal.scale_(gradient, upstream)
    return gradient.mul_(upstream)


def _sum_and_gradient(logits: Tensor, targets: _Labels, gradient: Tensor | None) -> Tensor:
    """Sum the losses of rows (N, K) and fill `gradient` unless it is None."""
    if targets.scores is not None:
        return _sum_with_scores(logits, targets, gradient)
    labels, weights, positive, negative, formula, _ = targets
    if native.supports_label_loss(logits, targets.formula):
        return native.label_loss(logits, labels, weights, positive, negative, formula, gradient)
    if logits.is_cuda and triton_probe.is_usable(logits.device):
        from retinanet.kernels import triton_focal

        if triton_focal.supports(logits, targets.formula):
            return triton_focal.sum_and_gradient(
                logits, labels, weights, positive, negative, formula, gradient
            )
    return sum_in_chunks(logits, targets, gradient)


def _sum_with_scores(logits: Tensor, targets: _Labels, gradient: Tensor | None) -> Tensor:
    """Sum the losses of rows whose own class has a score as its target.

    All other elements are negatives of the focal loss, which the fast kernels sum with a weight of
    0 for the own classes; these few are then added.
    """
    labels, scores, classes = targets.labels, targets.scores, logits.shape[1]
    assert scores is not None
    row = torch.arange(len(labels), device=labels.device)
    if labels.device.type == "cpu":  # a GPU takes every row, to avoid a sync
        row = row[labels >= 0]
    has_score = (labels[row] >= 0) & (labels[row] < classes)
    own = row, labels[row].clamp(0, classes - 1)
    logit = logits[own].to(scores.dtype)  # a copy: the gradient may be written over the logits
    negatives = targets._replace(
        positive=torch.zeros_like(targets.positive),
        formula=("focal", targets.formula[1], 0.0),
        scores=None,
    )
    total = _sum_and_gradient(logits, negatives, gradient)
    target = scores[row]
    positive, negative = (alpha.expand(classes)[own[1]] for alpha in targets[2:4])
    factor = _balance(target, positive, negative, targets.formula)
    factor = factor * torch.where(has_score, targets.weights[row], 0)
    with torch.set_grad_enabled(gradient is not None):
        logit.requires_grad_(gradient is not None)
        loss = (plain_loss(logit, target, targets.formula) * factor).sum()
    if gradient is not None:
        (slope,) = torch.autograd.grad(loss, logit)
        gradient[own] = torch.where(has_score, slope.to(gradient.dtype), gradient[own])
    return total + loss.detach()


def _balance(targets: Tensor, positive: Tensor, negative: Tensor, formula: Formula) -> Tensor:
    """Return the factors of elements with these targets: alpha's, or varifocal's of negatives."""
    if formula[0] == "varifocal":
        return torch.where(targets > 0, 1, negative)
    return positive * targets + negative * (1 - targets)


def sum_in_chunks(logits: Tensor, targets: _Labels, gradient: Tensor | None) -> Tensor:
    """Sum the losses and fill the gradient with torch operations, in chunks of rows.

    Args:
        logits: (N, K).
        targets: invalid labels make the loss NaN.
        gradient: (N, K) to be filled, or None; may be `logits` itself.

    Returns:
        () of the type of the weights.
    """
    labels, weights, positive, negative, formula, _ = targets
    count, classes = logits.shape
    dtype, on_cpu = weights.dtype, logits.device.type == "cpu"
    weights = torch.where((labels < IGNORED) | (labels >= classes), math.nan, weights)
    positives = positive.expand(classes)
    elements = _CPU_CHUNK * torch.get_num_threads() if on_cpu else _GPU_CHUNK
    step = min(count, max(1, elements // classes))
    work = logits.new_empty((5, step, classes), dtype=dtype)
    total = weights.new_zeros((), dtype=dtype if logits.is_mps else torch.float64)
    for start in range(0, count, max(1, step)):
        rows = slice(start, min(start + step, count))
        label, weight = labels[rows], weights[rows]
        # The elements of the rows' own classes. A GPU takes one of each row, to avoid a sync.
        row = torch.arange(len(label), device=label.device)
        row = row[label >= 0] if on_cpu else row
        own = row, label[row].clamp(0, classes - 1)
        is_positive, own_weight = label[row] >= 0, positives[own[1]] * weight[row]
        u, *spare = work[:, : len(label)]
        u.copy_(logits[rows])
        u[own] = torch.where(is_positive, -u[own], u[own])  # -x_t
        value, slope = _value_and_slope(u, formula, *spare)
        own_value, own_slope = value[own], slope[own]
        value[own] = torch.where(is_positive, 0, own_value)
        total += (value.mul_(negative).sum(dim=1) * weight).sum(dtype=total.dtype)
        total += (own_value * own_weight).where(is_positive, 0).sum(dtype=total.dtype)
        if gradient is not None:
            part = gradient[rows].copy_(slope.mul_(weight[:, None] * negative))
            part[own] = torch.where(is_positive, (-own_slope * own_weight).to(part), part[own])
    return total.to(dtype)


def _value_and_slope(
    u: Tensor, formula: Formula, e: Tensor, total: Tensor, cost: Tensor, rest: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the loss f(u) of a negative with logit u, and f'(u), in the memory of the arguments.

    One exponential, one logarithm and one division: torch's softplus takes four times as long.
    """
    kind, gamma, beta = formula
    if kind == "hinge":
        p_t = torch.neg(u, out=e).sigmoid_()
        value = torch.neg(p_t, out=cost).add_(gamma).clamp_(min=0)
        return value, torch.neg(p_t, out=rest).add_(1).mul_(p_t).mul_(torch.sign(value, out=total))
    star = kind == "focal_star"
    if star:
        torch.mul(u, gamma, out=e).sub_(beta).clamp_(max=_LINEAR_FROM)
    else:
        torch.clamp(u, max=_LINEAR_FROM, out=e)
    e.exp_()
    torch.add(e, 1, out=total)
    torch.log(total, out=cost)
    torch.reciprocal(total, out=rest)  # 1 - p
    cost.addcmul_(total.sub_(1).sub_(e), rest, value=-1)  # what 1 + e lost by rounding
    p = e.mul_(rest)
    if star:
        return cost.div_(gamma).add_(u.sub_((_LINEAR_FROM + beta) / gamma).clamp_(min=0)), p
    linear = u.sub_(_LINEAR_FROM).clamp_(min=0)
    if gamma == 0:
        return cost.add_(linear), p
    factor = torch.pow(p, gamma, out=total)
    # f' = p^gamma (p + gamma (1 - p) cost), where 1 - p is 0 in the linear part
    slope = rest.mul_(cost).mul_(gamma).add_(p).mul_(factor)
    return cost.add_(linear).mul_(factor), slope


def _loss(
    logits: Tensor, targets: Tensor, formula: Formula, alpha: Alpha, reduction: Reduction
) -> Tensor:
    check_reduction(reduction)
    if not logits.is_floating_point() or logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits are floats of shape (..., K), got {logits.dtype} {tuple(logits.shape)}"
        )
    integer = not targets.is_floating_point() and targets.dtype != torch.bool
    expected = logits.shape[:-1] if integer else logits.shape
    if targets.shape != expected:
        is_second = logits.dim() > 2 and targets.shape == logits.shape[:1] + logits.shape[2:]
        raise ValueError(
            f"logits {tuple(logits.shape)} go with integer labels of shape "
            f"{tuple(logits.shape[:-1])} or float targets of shape {tuple(logits.shape)}; "
            f"got {targets.dtype} targets of shape {tuple(targets.shape)}"
            + ("; classes in dimension 1: FocalLoss(class_dim=1)" if is_second else "")
        )
    classes, working = logits.shape[-1], _working_type(logits)
    if integer and reduction != "none":
        labels = targets.reshape(-1)
        ones = torch.ones(labels.shape, dtype=working, device=logits.device)
        total = weighted_sum(logits.reshape(-1, classes), labels, ones, formula, alpha)
        if reduction == "sum":
            return total
        return total / ((labels != IGNORED).sum() * classes).clamp(min=1)
    positive, negative = _alpha_pair(alpha, logits)
    counted = None
    if integer:
        _check_labels(targets, classes)
        dense = _one_hot(targets, classes, working)
        counted = (targets != IGNORED)[..., None]
    else:
        dense = targets.to(working)
        _check_dense(dense)
    loss = plain_loss(logits.to(working), dense, formula)
    if alpha is not None:
        loss = loss * _balance(dense, positive, negative, formula)
    if counted is not None:
        loss = torch.where(counted, loss, 0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / max(1, loss.numel())


def check_reduction(reduction: str) -> None:
    """Raise a ValueError for an unknown reduction."""
    if reduction not in ("none", "sum", "mean"):
        raise ValueError(f"reduction is none, sum or mean, got {reduction!r}")


def _working_type(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _one_hot(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Return (..., K) with NaN for labels that are neither a class, BACKGROUND nor IGNORED."""
    every_class = torch.arange(classes, device=labels.device)
    invalid = (labels < IGNORED) | (labels >= classes)
    targets = (labels[..., None] == every_class).to(dtype)
    return targets.masked_fill(invalid[..., None], math.nan)


def _alpha_pair(alpha: Alpha, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights of positives and of negatives: () or (K,) each."""
    kind, device, classes = _working_type(logits), logits.device, logits.shape[-1]
    if alpha is None:
        unweighted = torch.ones((), dtype=kind, device=device)
        return unweighted, unweighted
    if isinstance(alpha, Tensor):
        weight = alpha.to(kind)
    else:
        weight = torch.as_tensor(alpha, dtype=kind, device="cpu")
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
    # A tuple of types: torch 2.7 cannot compile a union.
    if isinstance(alpha, (float, int)):  # filled on the device: a copy to a GPU would sync
        weight = torch.full((), alpha, dtype=kind, device=device)
    elif not isinstance(alpha, Tensor) and device.type != "cpu":
        weight = _on_device(tuple(alpha), kind, device)
    weight = weight.to(device).detach()
    return weight, 1 - weight


@lru_cache(maxsize=32)
def _on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copy numbers to a device once: a copy per step would sync."""
    with torch.inference_mode(False):  # so that autograd accepts the cached tensor later
        return torch.tensor(values, dtype=dtype, device=device)


def make_formula(
    kind: Kind, *, gamma: float = 0.0, beta: float = 0.0, margin: float = 1.0
) -> Formula:
    """Return a kind with its two parameters, both checked."""
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
    # Labels that are not read here make the loss NaN.
    if not is_readable(labels) or labels.numel() == 0:
        return
    low, high = (int(end) for end in labels.aminmax())
    if low < IGNORED or high >= classes:
        wrong = high if high >= classes else low
        raise ValueError(
            f"label {wrong} is neither a class 0..{classes - 1} nor BACKGROUND ({BACKGROUND}) nor "
            f"IGNORED ({IGNORED})"
            + ("; give 0 and 1 of a single class in the logits' shape" if classes == 1 else "")
        )


def _check_dense(targets: Tensor) -> None:
    if not is_readable(targets) or targets.numel() == 0:
        return
    low, high = (float(end) for end in targets.aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"float targets lie in [0, 1], got {low if not low >= 0 else high}")
