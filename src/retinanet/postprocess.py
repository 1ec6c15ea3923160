"""Decode, filter and suppress raw outputs (Lin et al. 2017, Sec. 4, "Inference")."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, Unpack, get_args

import torch
from torch import Tensor

from retinanet.boxes import box_iou, clip_boxes, decode_boxes
from retinanet.config import DetectConfig, NmsKind
from retinanet.kernels import native
from retinanet.structures import Detections, Outputs, flatten_level

_DEFAULTS: dict[str, Any] = {
    **DetectConfig().model_dump(exclude={"score_thresholds", "flip_tta"}),
    "class_thresholds": None,
}

_COUNTS = ("topk_candidates", "detections_per_image")

_BLOCK = 128  # consecutive logits that are skipped at once if none is above the threshold


class PostprocessSettings(TypedDict, total=False):
    """Settings of :func:`postprocess`, with the defaults of ``DetectConfig``.

    Attributes:
        score_threshold: exclusive, in [0, 1).
        class_thresholds: K scores by label that replace `score_threshold`; None: none.
        topk_candidates: maximum number of scores per level and image that are decoded.
        nms: kind of non-maximum suppression (:func:`merge_candidates`).
        nms_threshold: IoU threshold of ``hard`` and ``wbf``, in (0, 1].
        nms_sigma: of ``soft``, over 0.
        detections_per_image: maximum number of detections per image.
        class_agnostic_nms: let boxes of different classes suppress each other too.
        temperature: of the scores (:func:`calibrate_scores`), over 0.
    """

    score_threshold: float
    class_thresholds: Sequence[float] | None
    topk_candidates: int
    nms: NmsKind
    nms_threshold: float
    nms_sigma: float
    detections_per_image: int
    class_agnostic_nms: bool
    temperature: float


class Candidates(NamedTuple):
    """Boxes of a batch before non-maximum suppression.

    Attributes:
        boxes: (N, 4) float32 pixels of the network's input, clipped to the image.
        scores: (N,) float32, not calibrated.
        labels: (N,) int64 class 0..K-1.
        images: (N,) int64 index of the image, 0..B-1.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    images: Tensor


@torch.no_grad()
def postprocess(
    outputs: Outputs,
    anchors: Sequence[Tensor],
    sizes: Tensor,
    *,
    num_classes: int,
    selected: Sequence[int] | None = None,
    mirrored: Outputs | None = None,
    **settings: Unpack[PostprocessSettings],
) -> list[Detections]:
    """Select the detections of each image: threshold, best per level, decoding, NMS.

    Source: Lin et al. 2017, Sec. 4, "Inference": scores over .05, at most the best 1,000 per
    level, NMS at an IoU of .5. COCO's AP counts 100 detections per image.

    Args:
        outputs: of the network for B images.
        anchors: L tensors (R_l, 4), as :func:`retinanet.anchors.level_anchors` returns them.
        sizes: (B, 2) height and width of each image within its padding; boxes are clipped to it.
        num_classes: K.
        selected: labels to detect, as if the network had no others; None: all.
        mirrored: of the network for :func:`mirror_images`; its boxes are mirrored back, and NMS is
            over the boxes of both. None: no test-time augmentation.
        settings: those that differ from the defaults.

    Returns:
        B :class:`Detections`, best first, in pixels of the network's input. A logit that is NaN
        is never selected.

    Raises:
        ValueError: shapes do not fit, or a number is out of range.
    """
    candidates = find_candidates(
        outputs,
        anchors,
        sizes,
        num_classes=num_classes,
        selected=selected,
        mirrored=mirrored,
        **settings,
    )
    return merge_candidates(candidates, num_images=len(sizes), num_classes=num_classes, **settings)


def find_candidates(
    outputs: Outputs,
    anchors: Sequence[Tensor],
    sizes: Tensor,
    *,
    num_classes: int,
    selected: Sequence[int] | None = None,
    mirrored: Outputs | None = None,
    **settings: Unpack[PostprocessSettings],
) -> Candidates:
    """Decode the best scores of each level that are over the threshold.

    Arguments and errors are those of :func:`postprocess`.
    """
    _check(outputs, anchors, sizes, num_classes)
    _check_settings(num_classes, settings)
    if mirrored is not None:
        options: dict[str, Any] = {"num_classes": num_classes, "selected": selected, **settings}
        own, other = (
            find_candidates(levels, anchors, sizes, **options) for levels in (outputs, mirrored)
        )
        width = sizes[:, 1].to(other.boxes)[other.images, None]
        other.boxes[:, [0, 2]] = width - other.boxes[:, [2, 0]]
        return Candidates(*(torch.cat(parts) for parts in zip(own, other, strict=True)))
    used = {**_DEFAULTS, **settings}
    limits, min_logit = _min_logits(used, num_classes)
    device = outputs.logits[0].device
    classes = None if selected is None else torch.tensor(selected, device=device)
    limits = None if limits is None else limits.to(device)
    levels = []
    for logits, deltas, boxes in zip(outputs.logits, outputs.deltas, anchors, strict=True):
        flat = flatten_level(logits, num_classes)
        flat = flat if classes is None else flat[..., classes]
        image, index, logit = _best_of_level(flat, min_logit, used["topk_candidates"])
        row, label = index // flat.shape[-1], index % flat.shape[-1]
        label = label if classes is None else classes[label]
        if limits is not None:
            high = logit > limits[label]
            image, row, label, logit = image[high], row[high], label[high], logit[high]
        levels.append(
            (
                decode_boxes(flatten_level(deltas, 4)[image, row].float(), boxes[row]),
                logit.sigmoid(),
                label,
                image,
            )
        )
    boxes, scores, labels, images = (torch.cat(parts) for parts in zip(*levels, strict=True))
    boxes = clip_boxes(boxes, sizes.to(boxes.device)[images])
    return Candidates(boxes, scores, labels, images)


def merge_candidates(
    candidates: Candidates,
    *,
    num_images: int,
    num_classes: int,
    **settings: Unpack[PostprocessSettings],
) -> list[Detections]:
    """Merge the candidates of each object to one detection, and calibrate the scores.

    ``hard``: the boxes of lower score with an IoU over ``nms_threshold`` are removed.

    ``soft``: their scores are multiplied by exp(-IoU^2 / ``nms_sigma``) instead, whatever the IoU;
    boxes whose score falls to the threshold are removed (Bodla et al. 2017, arXiv:1704.04503,
    Eq. 3).

    ``wbf``: weighted box fusion (Solovyev et al. 2021, arXiv:1910.13302, Sec. 3) of the boxes of
    one model: a box with an IoU over ``nms_threshold`` with the fused box of a cluster joins it,
    the best score first, and the fused box is the mean weighted by scores. A cluster has the score
    of its best box (the authors' ``conf_type="max"``; a mean is for several models). Whatever the
    ``score_threshold``, all candidates over the paper's .05 are fused: it changes no box.

    Args:
        candidates: of :func:`find_candidates`.
        num_images: B.
        num_classes: K.
        settings: as in :func:`postprocess`.

    Returns:
        B :class:`Detections`, best first.
    """
    used = {**_DEFAULTS, **settings}
    boxes, scores, labels, images = candidates
    agnostic, max_count = used["class_agnostic_nms"], used["detections_per_image"]
    groups = torch.zeros_like(labels) if agnostic else labels
    if used["nms"] == "hard":
        kept = suppress(
            boxes,
            scores,
            groups,
            images,
            num_images=num_images,
            num_classes=1 if agnostic else num_classes,
            threshold=used["nms_threshold"],
            max_count=max_count,
        )
        boxes, scores = boxes[kept], scores[kept]
    else:
        keys = images * num_classes + groups
        if used["nms"] == "soft":
            kept, scores = soften(boxes, scores, keys, sigma=used["nms_sigma"], max_count=max_count)
            boxes = boxes[kept]
        else:
            kept, boxes = fuse(boxes, scores, keys, threshold=used["nms_threshold"])
            scores = scores[kept]
        limits, min_logit = _min_logits(used, num_classes, final=True)
        low = min_logit if limits is None else limits.to(scores.device)[labels[kept]]
        best = (scores.logit() > low).nonzero()[:, 0]
        best = best[_first(images[kept[best]], scores[best], num_images, max_count)]
        kept, boxes, scores = kept[best], boxes[best], scores[best]
    scores = calibrate_scores(scores, used["temperature"])
    counts = images[kept].bincount(minlength=num_images).tolist()
    parts = (torch.split(values, counts) for values in (boxes, scores, labels[kept]))
    return [Detections(*image) for image in zip(*parts, strict=True)]


def calibrate_scores(scores: Tensor, temperature: float) -> Tensor:
    """Divide the logits of scores by a temperature; their order stays.

    Source: Guo et al. 2017 (arXiv:1706.04599), Sec. 4.2, with the sigmoid instead of the softmax.
    """
    return scores if temperature == 1 else (scores.logit() / temperature).sigmoid()


def mirror_images(images: Tensor, sizes: Tensor) -> Tensor:
    """Mirror each image left to right within its padding.

    Args:
        images: (B, 3, H, W), padded at the right and the bottom.
        sizes: (B, 2) height and width of each image before padding.
    """
    mirrored = images.clone()
    for image, width in zip(mirrored, sizes[:, 1].tolist(), strict=True):
        image[..., :width] = image[..., :width].flip(-1)
    return mirrored


def soften(
    boxes: Tensor, scores: Tensor, groups: Tensor, *, sigma: float, max_count: int
) -> tuple[Tensor, Tensor]:
    """Apply Gaussian soft-NMS per group (Bodla et al. 2017, Eq. 3).

    Args:
        boxes: (N, 4) pixels.
        scores: (N,).
        groups: (N,) int64 image and class.
        sigma: of the Gaussian.
        max_count: maximum number of boxes per group, the best.

    Returns:
        (M,) indices of the boxes in the order of their choice, and their (M,) new scores.
    """
    table, rows = _group_table(scores, groups)
    own = boxes[table]
    left = torch.where(rows, scores[table], -1.0)
    every = torch.arange(len(table), device=boxes.device)
    kept, chosen = [table.new_zeros(0)], [scores.new_zeros(0)]
    for _ in range(min(max_count, table.shape[1])):
        best, index = left.max(dim=1)
        is_left = best > 0
        if not is_left.any():
            break
        kept.append(table[every, index][is_left])
        chosen.append(best[is_left])
        decay = (-(box_iou(own[every, index][:, None], own) ** 2) / sigma).exp()
        left = (left * decay).scatter(1, index[:, None], -1.0)
    return torch.cat(kept), torch.cat(chosen)


def fuse(
    boxes: Tensor, scores: Tensor, groups: Tensor, *, threshold: float
) -> tuple[Tensor, Tensor]:
    """Fuse boxes per group to means weighted by scores (Solovyev et al. 2021, Sec. 3).

    Args:
        boxes: (N, 4) pixels.
        scores: (N,).
        groups: (N,) int64 image and class.
        threshold: IoU over which a box joins a cluster.

    Returns:
        (M,) index of the best box of each cluster, and the (M, 4) fused boxes.
    """
    table, rows = _group_table(scores, groups)
    own, weights = boxes[table], torch.where(rows, scores[table], 0.0)
    fused, sums = torch.zeros_like(own), torch.zeros_like(weights)
    first = torch.full_like(table, -1)
    counts = table.new_zeros(len(table))
    # Group after group, and so box after box of all groups at once.
    for rank in range(table.shape[1]):
        is_box = rows[:, rank]
        box, weight = own[is_box, rank], weights[is_box, rank, None]
        size = int(counts.max()) if rank else 0
        best = box.new_full((len(box),), -1.0)
        index = counts[is_box]
        if size:
            iou = box_iou(box[:, None], fused[is_box, :size])
            iou = torch.where(first[is_box, :size] >= 0, iou, -1.0)
            best, nearest = iou.max(dim=1)
            index = torch.where(best > threshold, nearest, index)
        is_new = best <= threshold
        group = is_box.nonzero()[:, 0]
        total = sums[group, index, None] + weight
        # The mean is updated, not a sum of products: a cluster of one box keeps it exactly.
        fused[group, index] += (box - fused[group, index]) * (weight / total)
        sums[group, index] = total[:, 0]
        first[group[is_new], index[is_new]] = table[group[is_new], rank]
        counts[group] += is_new.long()
    is_cluster = first >= 0
    return first[is_cluster], fused[is_cluster]


def _group_table(scores: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Arrange boxes by group, best first.

    Returns:
        (G, S) indices of the boxes of each group, padded with 0, and (G, S) bool: no padding.
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[groups[order].argsort(stable=True)]
    ordered = groups[order]
    is_start = torch.ones_like(ordered, dtype=torch.bool)
    is_start[1:] = ordered[1:] != ordered[:-1]
    starts = is_start.nonzero()[:, 0]
    group = is_start.cumsum(0) - 1
    rank = torch.arange(len(order), device=order.device) - starts[group]
    table = order.new_zeros(len(starts), int(rank.max()) + 1 if len(rank) else 0)
    is_box = torch.zeros_like(table, dtype=torch.bool)
    table[group, rank], is_box[group, rank] = order, True
    return table, is_box


def _min_logits(
    settings: Mapping[str, Any], num_classes: int, *, final: bool = False
) -> tuple[Tensor | None, float]:
    """Return the exclusive thresholds of the logits.

    Args:
        settings: all of :class:`PostprocessSettings`.
        num_classes: K.
        final: of detections; False: of candidates, of which fusion needs more.

    Returns:
        (K,) by label, or None if they are the same for all; and the lowest.
    """
    thresholds = settings["class_thresholds"] or [settings["score_threshold"]]
    # The sigmoid is monotonic, so logits are compared: few of them are turned into scores.
    limits = [
        settings["temperature"] * math.log(score / (1 - score)) if score else -math.inf
        for score in thresholds
    ]
    if settings["nms"] == "wbf" and not final:
        paper = _DEFAULTS["score_threshold"]
        limits = [min(limit, math.log(paper / (1 - paper))) for limit in limits]
    lowest = min(limits)
    by_label = torch.tensor(limits) if max(limits) > lowest else None
    return by_label, lowest


def suppress(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    images: Tensor,
    *,
    num_images: int,
    num_classes: int,
    threshold: float,
    max_count: int,
) -> Tensor:
    """Apply non-maximum suppression per image and class.

    Args:
        boxes: (N, 4) float32 pixels.
        scores: (N,) float32.
        labels: (N,) int64 class 0..K-1.
        images: (N,) int64 index of the image, 0..B-1.
        num_images: B.
        num_classes: K.
        threshold: IoU above which the box of the lower score is removed.
        max_count: maximum number of survivors per image.

    Returns:
        (M,) indices of the survivors, image by image, best first, equal scores by index.
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[images[order].argsort(stable=True)]
    boxes, scores, labels, images = boxes[order], scores[order], labels[order], images[order]
    on_cpu = boxes.device.type == "cpu"
    if on_cpu and boxes.dtype == torch.float32 and native.available():
        kept = native.suppress(
            boxes,
            labels,
            images.bincount(minlength=num_images),
            num_classes=num_classes,
            threshold=threshold,
            max_count=max_count,
        )
        return order[kept]
    from torchvision.ops import batched_nms, nms  # slow to import

    groups = images * num_classes + labels
    if on_cpu or boxes.device.type == "mps":  # which has no float64
        # The work of NMS grows with the square of the number of boxes: group by group is best.
        by_group = groups.argsort(stable=True)
        counts = groups.bincount(minlength=1).tolist()
        kept = torch.cat(
            [
                group[nms(boxes[group], scores[group], threshold)]
                for group in torch.split(by_group, counts)
                if len(group)
            ]
            or [by_group]
        )
    else:
        # Each group is shifted to coordinates of its own, which need more digits than float32's.
        kept = batched_nms(boxes.double(), scores.double(), groups, threshold)
    kept = kept.sort().values
    return order[kept[_is_first(images[kept], num_images, max_count)]]


def _best_of_level(
    logits: Tensor, min_logit: float, max_count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Select the `max_count` highest logits of each image that are above `min_logit`.

    Args:
        logits: (B, R, K).

    Returns:
        (N,) each, image by image, best first, equal logits by index: the image, the index
        r * K + k, and the logit in float32.
    """
    flat = logits.flatten(1)
    images, count = flat.shape
    if not flat.numel():
        empty = torch.zeros(0, dtype=torch.int64, device=flat.device)
        return empty, empty, empty.float()
    size = min(_BLOCK, count)
    whole = count // size * size
    maxima = [flat[:, :whole].view(images, -1, size).amax(dim=2)]
    if whole < count:
        maxima.append(flat[:, whole:].amax(dim=1, keepdim=True))
    highest = torch.cat(maxima, dim=1).float()
    if highest.isnan().any():
        numbers = logits.nan_to_num(-math.inf, math.inf, -math.inf)
        return _best_of_level(numbers, min_logit, max_count)
    image, block = (highest > min_logit).nonzero(as_tuple=True)
    if len(image) > max_count and image.bincount().max() > max_count:
        # The best logits lie in the blocks of the highest maxima, the first of equals.
        floor = highest.topk(max_count, dim=1).values[:, -1]
        high = highest[image, block] >= floor[image]
        image, block = image[high], block[high]
        first = _first(image, highest[image, block], images, max_count).sort().values
        image, block = image[first], block[first]
    # The last block is read with elements of the block before it, which are then left out.
    start = (block * size).clamp(max=count - size)
    candidates = flat.unfold(1, size, 1)[image, start].float()
    index = start[:, None] + torch.arange(size, device=flat.device)
    row, column = ((candidates > min_logit) & (index >= block[:, None] * size)).nonzero(
        as_tuple=True
    )
    image, index, logit = image[row], index[row, column], candidates[row, column]
    first = _first(image, logit, images, max_count)
    return image[first], index[first], logit[first]


def _first(images: Tensor, values: Tensor, num_images: int, max_count: int) -> Tensor:
    """Return the indices of the highest values of each image, image by image, equals in order."""
    order = values.argsort(descending=True, stable=True)
    order = order[images[order].argsort(stable=True)]
    return order[_is_first(images[order], num_images, max_count)]


def _is_first(images: Tensor, num_images: int, max_count: int) -> Tensor:
    """Mark the first `max_count` elements of each image; `images` (N,) is sorted."""
    sizes = images.bincount(minlength=num_images)
    starts = sizes.cumsum(0) - sizes
    return torch.arange(len(images), device=images.device) - starts[images] < max_count


def _check_settings(num_classes: int, settings: PostprocessSettings) -> None:
    if unknown := set(settings) - set(_DEFAULTS):
        raise TypeError(f"unknown settings of postprocess: {', '.join(sorted(unknown))}")
    used = {**_DEFAULTS, **settings}
    thresholds = used["class_thresholds"] or [used["score_threshold"]]
    if used["class_thresholds"] and len(thresholds) != num_classes:
        raise ValueError(
            f"class_thresholds has {len(thresholds)} numbers, and there are {num_classes} classes"
        )
    kinds = get_args(NmsKind)
    limits = [
        *(("score_threshold", score, 0 <= score < 1, "in [0, 1)") for score in thresholds),
        ("nms", used["nms"], used["nms"] in kinds, f"one of {', '.join(kinds)}"),
        ("nms_threshold", used["nms_threshold"], 0 < used["nms_threshold"] <= 1, "in (0, 1]"),
        *((name, used[name], used[name] > 0, "over 0") for name in ("nms_sigma", "temperature")),
        *((name, used[name], used[name] >= 1, "1 or more") for name in _COUNTS),
    ]
    for name, value, is_valid, allowed in limits:
        if not is_valid:
            raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _check(outputs: Outputs, anchors: Sequence[Tensor], sizes: Tensor, num_classes: int) -> None:
    if not len(outputs.logits) == len(outputs.deltas) == len(anchors) > 0:
        raise ValueError(
            "logits, deltas and anchors have one tensor per level, got "
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
