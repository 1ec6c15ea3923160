"""From what the network says to the objects found (Lin et al. 2017, Sec. 4, "Inference").

On a CPU the native library, if it is there, looks for the best scores and does the suppression; the
torch code here is the definition of both, and a test holds them equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms, nms

from retinanet.boxes import clip_boxes, decode_boxes
from retinanet.config import DetectConfig
from retinanet.kernels import native
from retinanet.structures import Detections, Outputs, flatten_level

_DEFAULTS = DetectConfig()

# For each score that may go on so many are sorted; of more, most fall off before.
_SORTED_AT_MOST = 16

# Logits of rows that hold something, a level. More (an untrained network, a threshold of 0) are not
# listed one by one, which would take many times their memory.
_LISTED_AT_MOST = 2**23


@torch.no_grad()
def postprocess(
    outputs: Outputs,
    anchors: Sequence[Tensor],
    sizes: Tensor,
    *,
    num_classes: int,
    score_threshold: float = _DEFAULTS.score_threshold,
    topk_candidates: int = _DEFAULTS.topk_candidates,
    nms_threshold: float = _DEFAULTS.nms_threshold,
    detections_per_image: int = _DEFAULTS.detections_per_image,
    class_agnostic_nms: bool = _DEFAULTS.class_agnostic_nms,
) -> list[Detections]:
    """The objects of each image: threshold, best of each level, decoding, non-maximum suppression.

    Source: Lin et al. 2017, Sec. 4, "Inference": scores over .05, at most the best 1,000 of a
    level, NMS at an IoU of .5. COCO's AP looks at 100 detections an image.

    Args:
        outputs: of the network for B images.
        anchors: L tensors (R_l, 4), as :func:`retinanet.anchors.level_anchors` gives them.
        sizes: (B, 2) height and width of each image within its padding; boxes are clipped to it.
        num_classes: K.
        score_threshold: scores must be over it; in [0, 1).
        topk_candidates: scores of a level and image that go on, the best ones.
        nms_threshold: of two boxes of a class with a greater IoU the one of less score goes.
        detections_per_image: at most so many are kept, the best ones.
        class_agnostic_nms: let boxes of different classes suppress each other too.

    Returns:
        B :class:`Detections`, best first, in pixels of the network's input. A logit that is NaN
        finds nothing.

    Raises:
        ValueError: shapes do not fit, or a number is out of range.
    """
    _check(outputs, anchors, sizes, num_classes)
    if not 0 <= score_threshold < 1:
        raise ValueError(f"score_threshold must lie in [0, 1), got {score_threshold}")
    if not 0 < nms_threshold <= 1:
        raise ValueError(f"nms_threshold must lie in (0, 1], got {nms_threshold}")
    if topk_candidates < 1 or detections_per_image < 1:
        raise ValueError(
            "topk_candidates and detections_per_image must be 1 or more, "
            f"got {topk_candidates} and {detections_per_image}"
        )
    # The sigmoid rises, so the logits themselves are compared: few are ever turned into scores.
    least = math.log(score_threshold / (1 - score_threshold)) if score_threshold else -math.inf
    logits = [flatten_level(level, num_classes) for level in outputs.logits]
    deltas = [flatten_level(level, 4) for level in outputs.deltas]
    natively = native.supports_top_scores(logits, deltas, anchors)
    if natively:
        best = native.top_scores(logits, deltas, anchors, least, topk_candidates)
        images = torch.arange(len(sizes), device="cpu").repeat_interleave(best.counts)
        found = _Candidates(images, *best[1:])
    else:
        found = _best_of_levels(logits, deltas, anchors, least, topk_candidates)
    images, labels, scores = found.image, found.label, found.logit.sigmoid()
    boxes = decode_boxes(found.delta, found.anchor)
    boxes = clip_boxes(boxes, sizes.to(boxes.device)[images])
    if natively:
        kept, kept_counts = native.batched_nms(
            boxes,
            scores,
            None if class_agnostic_nms else labels,
            best.counts,
            classes=num_classes,
            threshold=nms_threshold,
            max_count=detections_per_image,
        )
    else:
        groups = images if class_agnostic_nms else images * num_classes + labels
        suppress = _suppress_by_group if boxes.device.type == "cpu" else _suppress_at_once
        kept = suppress(boxes, scores, groups, nms_threshold)
        kept = kept[_first_of_each(images[kept], len(sizes), detections_per_image)]
        kept_counts = images[kept].bincount(minlength=len(sizes))
    counts = kept_counts.tolist()
    parts = (torch.split(values[kept], counts) for values in (boxes, scores, labels))
    return [Detections(*image) for image in zip(*parts, strict=True)]


class _Candidates(NamedTuple):
    """Boxes and scores: image, class and logit (N,) each, rows of deltas and anchors (N, 4) each.

    Those of an image stand level by level, each level's best first, equal ones in order.
    """

    image: Tensor
    label: Tensor
    logit: Tensor
    delta: Tensor
    anchor: Tensor


def _best_of_levels(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    least: float,
    most: int,
) -> _Candidates:
    """Of logits (B, R_l, K) the `most` highest of each image and level that are over `least`."""
    found = []
    for level, level_deltas, level_anchors in zip(logits, deltas, anchors, strict=True):
        image, row, label, logit = _best_of_level(level, least, most)
        own_deltas = level_deltas[image, row].float()
        found.append((image, label, logit, own_deltas, level_anchors[row]))
    return _Candidates(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _best_of_level(logits: Tensor, least: float, most: int) -> tuple[Tensor, ...]:
    """Of logits (B, R, K) the best of each image: image, row, class and logit, (N,) each."""
    classes = logits.shape[2]
    # Most rows hold nothing: their largest logit says so, and they are not looked at again. A row
    # with a NaN, whose largest logit that is, may hold something.
    image, row = (logits.amax(dim=2).float() <= least).logical_not().nonzero(as_tuple=True)
    if len(row) * classes > _LISTED_AT_MOST:
        return _best_of_many(logits, least, most)
    own = logits[image, row].float()
    place, label = (own > least).nonzero(as_tuple=True)
    if len(label) > _SORTED_AT_MOST * most * len(logits):
        return _best_of_many(logits, least, most)
    found = image[place], row[place], label, own[place, label]
    order = found[3].argsort(descending=True, stable=True)
    order = order[_first_of_each(found[0][order], len(logits), most)]
    return tuple(part[order] for part in found)


def _best_of_many(logits: Tensor, least: float, most: int) -> tuple[Tensor, ...]:
    """The same without a list of all that are over `least`."""
    flat, classes = logits.flatten(1), logits.shape[2]
    images, places = [], []
    for each, values in enumerate(flat):
        best = values.topk(min(most, len(values))).values
        if best.isnan().any():  # which topk takes for the greatest of all
            values = values.nan_to_num(-math.inf, math.inf, -math.inf)
            best = values.topk(len(best)).values
        # Of some that are equal topk takes any; the first are wanted.
        place = (values >= best[-1]).nonzero()[:, 0]
        place = place[values[place].float() > least]
        places.append(place[values[place].argsort(descending=True, stable=True)[:most]])
        images.append(torch.full_like(places[-1], each))
    image, place = torch.cat(images), torch.cat(places)
    return image, place // classes, place % classes, flat[image, place].float()


def _first_of_each(groups: Tensor, count: int, most: int) -> Tensor:
    """Places of the first `most` members of each group 0..count-1, group by group."""
    order = groups.argsort(stable=True)
    sizes = groups.bincount(minlength=count)
    starts = sizes.cumsum(0) - sizes
    rank = torch.arange(len(groups), device=groups.device) - starts[groups[order]]
    return order[rank < most]


def _suppress_by_group(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """Places of the boxes that survive NMS among those of their group, best first.

    The work of NMS grows with the square of the number of boxes, so on a CPU small groups are best.
    """
    order = groups.argsort(stable=True)
    sizes = groups.bincount()
    counts = sizes[sizes > 0].tolist()
    kept = [order[:0]]
    for members, own_boxes, own_scores in zip(
        *(torch.split(values, counts) for values in (order, boxes[order], scores[order])),
        strict=True,
    ):
        kept.append(members[nms(own_boxes, own_scores, threshold)])
    together = torch.cat(kept)
    return together[scores[together].argsort(descending=True, stable=True)]


def _suppress_at_once(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """The same for a GPU, in one go: each group is moved to a place of its own.

    Float32 has too few digits for so many places.
    """
    if boxes.device.type == "mps":  # which has no float64
        return _suppress_by_group(boxes.cpu(), scores.cpu(), groups.cpu(), threshold).to(
            boxes.device
        )
    survivors: Tensor = batched_nms(boxes.double(), scores.double(), groups, threshold)
    return survivors


def _check(outputs: Outputs, anchors: Sequence[Tensor], sizes: Tensor, num_classes: int) -> None:
    if not len(outputs.logits) == len(outputs.deltas) == len(anchors) > 0:
        raise ValueError(
            "logits, deltas and anchors have one tensor a level, got "
            f"{len(outputs.logits)}, {len(outputs.deltas)} and {len(anchors)}"
        )
    if sizes.dim() != 2 or sizes.shape[1] != 2:
        raise ValueError(f"sizes are (B, 2) height and width, got {tuple(sizes.shape)}")
    for level, (logits, deltas, boxes) in enumerate(
        zip(outputs.logits, outputs.deltas, anchors, strict=True)
    ):
        if boxes.shape[1:] != (4,):
            raise ValueError(
                f"level {level}: anchors are boxes (R, 4), got shape {tuple(boxes.shape)}"
            )
        if (
            not len(logits) == len(deltas) == len(sizes)
            or logits.numel() != len(sizes) * len(boxes) * num_classes
            or deltas.numel() != len(sizes) * len(boxes) * 4
        ):
            raise ValueError(
                f"level {level}: logits {tuple(logits.shape)}, deltas {tuple(deltas.shape)} and "
                f"{len(boxes)} anchors do not fit {len(sizes)} images and {num_classes} classes"
            )
