"""Decode, filter and suppress raw outputs (Lin et al. 2017, Sec. 4, "Inference")."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from retinanet.boxes import clip_boxes, decode_boxes
from retinanet.config import DetectConfig
from retinanet.kernels import native
from retinanet.structures import Detections, Outputs, flatten_level

_DEFAULTS = DetectConfig()

_BLOCK = 128  # consecutive logits that are skipped at once if none is above the threshold


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
    selected: Sequence[int] | None = None,
) -> list[Detections]:
    """Select the detections of each image: threshold, best per level, decoding, NMS.

    Source: Lin et al. 2017, Sec. 4, "Inference": scores over .05, at most the best 1,000 per
    level, NMS at an IoU of .5. COCO's AP counts 100 detections per image.

    Args:
        outputs: of the network for B images.
        anchors: L tensors (R_l, 4), as :func:`retinanet.anchors.level_anchors` returns them.
        sizes: (B, 2) height and width of each image within its padding; boxes are clipped to it.
        num_classes: K.
        score_threshold: exclusive, in [0, 1).
        topk_candidates: maximum number of scores per level and image that are decoded.
        nms_threshold: IoU threshold of non-maximum suppression, in (0, 1].
        detections_per_image: maximum number of detections per image.
        class_agnostic_nms: let boxes of different classes suppress each other too.
        selected: labels to detect, as if the network had no others; None: all.

    Returns:
        B :class:`Detections`, best first, in pixels of the network's input. A logit that is NaN
        is never selected.

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
    # The sigmoid is monotonic, so logits are compared: few of them are turned into scores.
    min_logit = math.log(score_threshold / (1 - score_threshold)) if score_threshold else -math.inf
    device = outputs.logits[0].device
    classes = None if selected is None else torch.tensor(selected, device=device)
    levels = []
    for logits, deltas, boxes in zip(outputs.logits, outputs.deltas, anchors, strict=True):
        flat = flatten_level(logits, num_classes)
        flat = flat if classes is None else flat[..., classes]
        image, index, logit = _best_of_level(flat, min_logit, topk_candidates)
        row, label = index // flat.shape[-1], index % flat.shape[-1]
        levels.append(
            (
                image,
                label if classes is None else classes[label],
                logit.sigmoid(),
                decode_boxes(flatten_level(deltas, 4)[image, row].float(), boxes[row]),
            )
        )
    images, labels, scores, boxes = (torch.cat(parts) for parts in zip(*levels, strict=True))
    boxes = clip_boxes(boxes, sizes.to(boxes.device)[images])
    kept = suppress(
        boxes,
        scores,
        torch.zeros_like(labels) if class_agnostic_nms else labels,
        images,
        num_images=len(sizes),
        num_classes=1 if class_agnostic_nms else num_classes,
        threshold=nms_threshold,
        max_count=detections_per_image,
    )
    counts = images[kept].bincount(minlength=len(sizes)).tolist()
    parts = (torch.split(values[kept], counts) for values in (boxes, scores, labels))
    return [Detections(*image) for image in zip(*parts, strict=True)]


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
