"""Online hard example mining (OHEM) for a one-stage detector: select anchors by their loss.

Source: Shrivastava et al. 2016 (arXiv:1604.03540), as Lin et al. 2017 (arXiv:1708.02002), Sec. 5.1,
compare it with the focal loss: "each example is scored by its loss, non-maximum suppression (nms)
is then applied, and a minibatch is constructed with the highest-loss examples."

It selects anchors only: all others become IGNORED, and any classification loss may follow. It reads
values, so it needs several device syncs per image.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from retinanet.structures import IGNORED

NEGATIVES_PER_POSITIVE: dict[str, float | None] = {"ohem": None, "ohem_1_3": 3.0}
"""Fixed ratio of each kind of mining; None: no ratio."""

# NMS goes down the ranking in chunks, since its memory grows with the square of their size: the
# first has this many anchors per anchor to keep, each later one is larger, up to a limit.
FIRST_CHUNK = 8
_GROWTH = 4
MAX_CHUNK = 2**14


@torch.no_grad()
def hard_examples(
    logits: Sequence[Tensor],
    labels: Tensor,
    boxes: Tensor,
    *,
    size: int,
    nms_threshold: float,
    negatives_per_positive: float | None = None,
) -> Tensor:
    """Return labels in which all but the hardest anchors of each image are IGNORED.

    An anchor's score is its loss: the cross entropy summed over its classes, without weights. NMS
    over the predicted boxes, whatever their labels, removes the lower score of a pair. Ties are
    broken by a random order seeded from the image's own boxes: near the prior bfloat16 has hardly
    two different logits, and by index the upper edge of each image would always win. Then the
    `size` best of each image are kept.

    With a ratio r the best of each kind are kept: at most size / (1 + r) positives, and r negatives
    for each positive kept ("a variant of OHEM used in SSD ... to help ensure each minibatch has
    enough positives", Sec. 5.1). Below the last negative of a full minibatch only positives are
    considered: the negatives there can neither be kept nor suppress. An image that keeps no
    positive keeps the negatives (at least 1) of one positive, so that empty images contribute.

    Args:
        logits: L tensors (B, R_l, K) of any float type; scored in float32 (float64 stays), one
            image and level at a time.
        labels: (B, R) integer class 0..K-1, BACKGROUND or IGNORED, which never takes part.
        boxes: (B, R, 4) pixels, predicted; not clipped.
        size: anchors to keep per image, >= 1.
        nms_threshold: IoU in (0, 1].
        negatives_per_positive: r > 0; None: no ratio.

    Returns:
        (B, R) as `labels`. Fewer than `size` are left where NMS leaves fewer. A logit that is NaN
        scores highest, so that the loss becomes NaN.

    Raises:
        ValueError: shapes do not fit, or a number is out of range.
    """
    rows = [level.shape[1] for level in logits]
    expected = (*labels.shape, 4)
    if labels.dim() != 2 or tuple(boxes.shape) != expected or sum(rows) != labels.shape[1]:
        raise ValueError(
            f"mining takes logits of all the rows of labels (B, R), and boxes (B, R, 4), got "
            f"{sum(rows)} rows of logits, labels {tuple(labels.shape)}, boxes {tuple(boxes.shape)}"
        )
    if size < 1:
        raise ValueError(f"mining keeps at least 1 anchor per image, got size {size}")
    if not 0 < nms_threshold <= 1:
        raise ValueError(f"the NMS threshold of mining must lie in (0, 1], got {nms_threshold}")
    if negatives_per_positive is not None and not negatives_per_positive > 0:
        raise ValueError(
            f"negatives_per_positive must be over 0 (None: no ratio), got {negatives_per_positive}"
        )
    boxes = boxes if boxes.dtype == torch.float64 else boxes.float()
    chosen = torch.full_like(labels, IGNORED)
    for image, own in enumerate(labels):
        parts = zip(logits, torch.split(own, rows), strict=True)
        scores = torch.cat([_cross_entropies(level[image], part) for level, part in parts])
        shuffled = tie_break_order(boxes[image])
        counted = shuffled[own[shuffled] != IGNORED]
        order = counted[scores[counted].argsort(descending=True, stable=True)]
        kept = order[
            _minibatch(
                boxes[image, order], own[order] >= 0, size, nms_threshold, negatives_per_positive
            )
        ]
        chosen[image, kept] = own[kept]
    return chosen


def tie_break_order(boxes: Tensor) -> Tensor:
    """Return (R,) indices in a random order seeded from the boxes (R, 4) only."""
    total = struct.pack("d", float(boxes.sum(dtype=torch.float64)))
    # The generator uses 32 bits of the seed, and those of a round number are all zero.
    generator = torch.Generator().manual_seed(zlib.crc32(total))
    return torch.randperm(len(boxes), generator=generator, device="cpu").to(boxes.device)


def _cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the cross entropy (R,) of rows (R, K), summed over the classes."""
    working = torch.float64 if logits.dtype == torch.float64 else torch.float32
    negated_margin = logits.detach().to(working, copy=True)  # -x_t
    positives = (labels >= 0).nonzero()[:, 0]
    # Invalid labels are rejected by the loss; here they must not index out of bounds.
    negated_margin[positives, labels[positives].clamp(max=logits.shape[1] - 1)] *= -1
    return softplus(negated_margin).sum(dim=1)


def _minibatch(
    boxes: Tensor, positive: Tensor, size: int, threshold: float, ratio: float | None
) -> Tensor:
    """Return the indices that are kept of a list of boxes (N, 4), hardest first.

    Greedy NMS of the first M boxes keeps exactly those of them that NMS of all keeps, so it goes
    only as far down the list as needed.
    """
    max_positives = 0 if ratio is None else max(1, int(size / (1 + ratio)))
    max_negatives = 0 if ratio is None else max(1, int(ratio * max_positives))
    pending = torch.arange(len(boxes), device=boxes.device)
    kept, negatives_left, chunk = pending[:0], ratio is not None, FIRST_CHUNK * size
    while len(pending):
        kept = _survivors(boxes, kept, pending[:chunk], threshold)
        pending = pending[chunk:]
        negatives = kept[~positive[kept]]
        if ratio is None and len(kept) >= size:
            break
        if negatives_left and len(negatives) >= max_negatives:
            last, negatives_left = int(negatives[max_negatives - 1]), False
            kept = kept[kept <= last]
            pending = last + 1 + positive[last + 1 :].nonzero()[:, 0]
        if ratio is not None and not negatives_left and positive[kept].sum() >= max_positives:
            break
        chunk = min(_GROWTH * chunk, max(chunk, MAX_CHUNK))
    if ratio is None:
        return kept[:size]
    positives = kept[positive[kept]][:max_positives]
    wanted = min(max(1, int(ratio * max(1, len(positives)))), size - len(positives))
    return torch.cat((positives, kept[~positive[kept]][:wanted]))


def _survivors(boxes: Tensor, kept: Tensor, following: Tensor, threshold: float) -> Tensor:
    """Continue NMS with the indices that follow; those kept before come first and stay."""
    from torchvision.ops import nms  # slow to import

    indices = torch.cat((kept, following))
    ranks = torch.arange(len(indices), 0, -1, device=boxes.device).to(boxes.dtype)
    return indices[nms(boxes[indices], ranks, threshold)]
