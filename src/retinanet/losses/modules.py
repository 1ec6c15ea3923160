"""Focal losses for other models: a module, and the softmax form.

Classes may be any dimension of the logits, such as the second of a segmentation network's
(B, C, H, W), and a label may stand for "no loss" (255 in many segmentation data sets).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from retinanet.config import LossConfig
from retinanet.losses.focal import (
    Alpha,
    Reduction,
    check_reduction,
    focal_loss,
    make_formula,
)
from retinanet.structures import BACKGROUND, IGNORED, is_readable

_DEFAULTS = LossConfig()


class FocalLoss(nn.Module):
    r"""Alpha-balanced focal loss of independent sigmoids, as a module.

    Source: Lin et al. 2017 (arXiv:1708.02002), Sec. 3.2, Eq. 5; the function is
    :func:`retinanet.focal_loss`.

    Args:
        alpha: weight of positives in [0, 1], negatives weigh 1 - alpha; K numbers: per class; None:
            no weights.
        gamma: focusing exponent >= 0.
        reduction: ``sum``, ``mean`` over the elements that are not ignored, or ``none``.
        class_dim: dimension of the classes in the logits; 1 for (B, K, H, W).
        ignore_index: value of targets without loss and gradient, besides IGNORED (-2); None: none.

    Raises:
        ValueError: gamma or reduction is out of range.

    Example: a tenth of the pixels of a mask is unlabelled.

        >>> loss = FocalLoss(class_dim=1, ignore_index=255, reduction="mean")
        >>> logits, mask = torch.zeros(2, 3, 10, 10), torch.zeros(2, 10, 10, dtype=torch.uint8)
        >>> mask[:, 0] = 255
        >>> round(float(loss(logits, mask)), 4)
        0.1011
    """

    def __init__(
        self,
        *,
        alpha: Alpha = _DEFAULTS.alpha,
        gamma: float = _DEFAULTS.gamma,
        reduction: Reduction = "sum",
        class_dim: int = -1,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        make_formula("focal", gamma=gamma)
        check_reduction(reduction)
        self.alpha, self.gamma, self.reduction = alpha, gamma, reduction
        self.class_dim, self.ignore_index = class_dim, ignore_index

    def extra_repr(self) -> str:
        """Return the settings for ``print``."""
        names = ("alpha", "gamma", "reduction", "class_dim", "ignore_index")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            logits: K scores along ``class_dim``.
            targets: integers of the logits' shape without ``class_dim``: class 0..K-1, BACKGROUND
                (-1: no class), IGNORED or ``ignore_index``; or of the logits' shape, of any type:
                the target in [0, 1] of each sigmoid, 0 and 1 for a binary mask, or
                ``ignore_index``.

        Returns:
            () or, for ``none``, the shape of the logits.

        Raises:
            ValueError: shapes do not fit, or a target is out of range.
        """
        last = logits.movedim(self.class_dim, -1)
        options = {"alpha": self.alpha, "gamma": self.gamma}
        if targets.shape != logits.shape:
            labels = _to_labels(targets, self.ignore_index)
            loss = focal_loss(last, labels, reduction=self.reduction, **options)  # type: ignore[arg-type]
            return loss.movedim(-1, self.class_dim) if self.reduction == "none" else loss
        ignored = torch.zeros_like(targets, dtype=torch.bool)
        if self.ignore_index is not None:
            ignored = targets == self.ignore_index
        dense = targets.masked_fill(ignored, 0).movedim(self.class_dim, -1)
        dense = dense if dense.is_floating_point() else dense.float()
        loss = focal_loss(last, dense, reduction="none", **options)  # type: ignore[arg-type]
        return _reduce(loss.movedim(-1, self.class_dim), ignored, self.reduction)


def softmax_focal_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    alpha: Sequence[float] | Tensor | None = None,
    gamma: float = _DEFAULTS.gamma,
    reduction: Reduction = "sum",
    class_dim: int = -1,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Focal loss of a softmax over exclusive classes.

    .. math:: FL(p_t) = -\alpha_t (1 - p_t)^\gamma \log p_t

    with the softmax probability :math:`p_t` of the label. Source: Lin et al. 2017, Eq. 5, whose
    p_t is here that of several classes (Sec. 3, footnote 1); detectors use sigmoids.

    Args:
        logits: K scores along `class_dim`, any float type; computed in float32 or wider.
        labels: integers of the logits' shape without `class_dim`: class 0..K-1, IGNORED or
            `ignore_index`.
        alpha: a weight >= 0 per class; None: no weights.
        gamma: focusing exponent >= 0; 0 is cross entropy.
        reduction: ``sum``, ``mean`` over the labels that are not ignored, or ``none``.
        class_dim: dimension of the classes; 1 for (B, K, H, W).
        ignore_index: label without loss and gradient, besides IGNORED (-2); None: none.

    Returns:
        () or, for ``none``, the shape of the labels.

    Raises:
        ValueError: shapes do not fit, or a value is out of range (labels on a GPU are not read: an
            invalid label there makes the loss NaN).

    Example: two equal scores, p_t = .5: .25 ln 2.

        >>> round(float(softmax_focal_loss(torch.zeros(1, 2), torch.tensor([1]))), 4)
        0.1733
    """
    make_formula("focal", gamma=gamma)
    check_reduction(reduction)
    last = logits.movedim(class_dim, -1)
    classes = last.shape[-1]
    if labels.shape != last.shape[:-1] or labels.is_floating_point():
        raise ValueError(
            f"logits {tuple(logits.shape)} with the classes in dimension {class_dim} go with "
            f"integer labels {tuple(last.shape[:-1])}: found {labels.dtype} {tuple(labels.shape)}"
        )
    labels = _to_labels(labels, ignore_index)
    ignored = labels == IGNORED
    invalid = ~ignored & ((labels < 0) | (labels >= classes))
    if is_readable(labels) and invalid.any():
        wrong = int(labels[invalid][0])
        raise ValueError(
            f"labels of a softmax are 0..{classes - 1} or IGNORED: found {wrong}; "
            + ("make the background a class" if wrong == BACKGROUND else "see ignore_index")
        )
    scores = last if last.dtype == torch.float64 else last.float()
    index = labels.clamp(0, classes - 1)
    log_p = scores.log_softmax(-1).gather(-1, index[..., None])[..., 0]
    # 1 - p without cancellation; not 0, where a gamma under 1 has no finite gradient.
    rest = (-torch.expm1(log_p)).clamp(min=torch.finfo(scores.dtype).tiny)
    loss = -log_p * rest.pow(gamma)
    if alpha is not None:
        weights = torch.as_tensor(alpha, dtype=scores.dtype, device=scores.device)
        if weights.shape != (classes,):
            raise ValueError(
                f"alpha is None or a weight for each of the {classes} classes: found "
                f"{tuple(weights.shape)}"
            )
        loss = loss * weights[index]
    return _reduce(loss.masked_fill(invalid, torch.nan), ignored, reduction)


def _to_labels(targets: Tensor, ignore_index: int | None) -> Tensor:
    """Return int64 labels in which `ignore_index` is IGNORED."""
    if targets.is_floating_point() or targets.dtype == torch.bool:
        return targets  # rejected by the loss, with both shapes
    labels = targets.long()  # a mask of uint8 has no -2
    return labels if ignore_index is None else labels.masked_fill(labels == ignore_index, IGNORED)


def _reduce(loss: Tensor, ignored: Tensor, reduction: Reduction) -> Tensor:
    loss = loss.masked_fill(ignored, 0)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (~ignored).sum().clamp(min=1)
