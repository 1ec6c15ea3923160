"""Which anchors a step learns from: online hard example mining (OHEM) for a one-stage detector.

Source: Shrivastava et al. 2016 (arXiv:1604.03540), as Lin et al. 2017 (arXiv:1708.02002), Sec. 5.1,
set it against the focal loss: "each example is scored by its loss, non-maximum suppression (nms) is
then applied, and a minibatch is constructed with the highest-loss examples."

This chooses anchors and knows no loss: what it leaves out becomes IGNORED, and any classification
loss may follow. It looks at values, so a GPU is waited for, several times an image.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torchvision.ops import nms

from retinanet.structures import IGNORED

NEGATIVES_PER_POSITIVE: dict[str, float | None] = {"ohem": None, "ohem_1_3": 3.0}
"""Each kind of mining by its name, with its fixed ratio; None: as the losses fall."""

# How many of the best anchors, for one that is wanted, are tried first; each later piece is this
# many times the one before it, up to a limit: NMS takes memory with the square of the piece.
_TRIED_FIRST = 8
_GROWTH = 4
_PIECE_AT_MOST = 2**14


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
    """Labels in which all but the hardest anchors of each image are IGNORED.

    An anchor's score is its loss: the cross entropy summed over its classes, without weights. Of
    two anchors whose predicted boxes overlap by more than the threshold the one of lower score
    goes, whatever their labels. Of equal scores chance decides, drawn for each image from its own
    boxes: near the prior bfloat16 has hardly two different logits, and the first anchors in a row
    would be the upper edge of each image. Then the `size` best of each image are kept.

    With a ratio r the best are kept of each kind: at most size / (1 + r) positives, and r negatives
    for each positive kept ("a variant of OHEM used in SSD ... to help ensure each minibatch has
    enough positives", Sec. 5.1). Below the last negative that a full minibatch holds only positives
    are looked at: the many negatives there can neither be kept nor suppress. An image that keeps no
    positive keeps as many negatives (1 at least) as if it had one: so an empty image is still
    learned from, and not from more of it than of one that holds an object.

    Args:
        logits: L tensors (B, R_l, K) of any float type; scored in float32 (float64 stays), one
            image and level at a time.
        labels: (B, R) integer class 0..K-1, BACKGROUND or IGNORED, which never takes part.
        boxes: (B, R, 4) pixels, predicted; not clipped.
        size: anchors to keep, an image, >= 1.
        nms_threshold: IoU in (0, 1].
        negatives_per_positive: r > 0; None: no ratio.

    Returns:
        (B, R) as `labels`. Fewer than `size` are left where NMS leaves fewer. A logit that is NaN
        scores highest, so that the loss tells of it.

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
        raise ValueError(f"mining keeps 1 anchor of an image or more, got size {size}")
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
        drawn = drawn_order(boxes[image])
        counted = drawn[own[drawn] != IGNORED]
        order = counted[scores[counted].argsort(descending=True, stable=True)]
        kept = order[
            _minibatch(
                boxes[image, order], own[order] >= 0, size, nms_threshold, negatives_per_positive
            )
        ]
        chosen[image, kept] = own[kept]
    return chosen


def drawn_order(boxes: Tensor) -> Tensor:
    """(R,) places in an order of chance that depends on nothing but the boxes (R, 4)."""
    told = struct.pack("d", float(boxes.sum(dtype=torch.float64)))
    # The generator looks at 32 bits, and those of a round number are all zero.
    generator = torch.Generator().manual_seed(zlib.crc32(told))
    return torch.randperm(len(boxes), generator=generator, device="cpu").to(boxes.device)


def _cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Of rows (R, K) the loss of each (R,), as :func:`retinanet.losses.cross_entropy` sums it."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    wrong = logits.detach().to(wide, copy=True)  # the logit seen from the wrong side
    positives = (labels >= 0).nonzero()[:, 0]
    # A label that is none is for the loss to refuse; here it must not lead out of the tensor.
    wrong[positives, labels[positives].clamp(max=logits.shape[1] - 1)] *= -1
    return softplus(wrong).sum(dim=1)


def _minibatch(
    boxes: Tensor, positive: Tensor, size: int, threshold: float, ratio: float | None
) -> Tensor:
    """Places in a list of boxes (N, 4), hardest first, that are kept of it.

    Greedy NMS of the first M boxes keeps exactly those of them that NMS of all keeps, so it goes
    only as far down the list as it must.
    """
    most_positives = 0 if ratio is None else max(1, int(size / (1 + ratio)))
    most_negatives = 0 if ratio is None else max(1, int(ratio * most_positives))
    waiting = torch.arange(len(boxes), device=boxes.device)
    kept, negatives_left, piece = waiting[:0], ratio is not None, _TRIED_FIRST * size
    while len(waiting):
        kept = _survivors(boxes, kept, waiting[:piece], threshold)
        waiting = waiting[piece:]
        negatives = kept[~positive[kept]]
        if ratio is None and len(kept) >= size:
            break
        if negatives_left and len(negatives) >= most_negatives:
            last, negatives_left = int(negatives[most_negatives - 1]), False
            kept = kept[kept <= last]
            waiting = last + 1 + positive[last + 1 :].nonzero()[:, 0]
        if ratio is not None and not negatives_left and positive[kept].sum() >= most_positives:
            break
        piece = min(_GROWTH * piece, max(piece, _PIECE_AT_MOST))
    if ratio is None:
        return kept[:size]
    positives = kept[positive[kept]][:most_positives]
    wanted = min(max(1, int(ratio * max(1, len(positives)))), size - len(positives))
    return torch.cat((positives, kept[~positive[kept]][:wanted]))


def _survivors(boxes: Tensor, kept: Tensor, following: Tensor, threshold: float) -> Tensor:
    """NMS gone on to the places that follow: those kept before come first, and so they stay."""
    places = torch.cat((kept, following))
    ranks = torch.arange(len(places), 0, -1, device=boxes.device).to(boxes.dtype)
    return places[nms(boxes[places], ranks, threshold)]
