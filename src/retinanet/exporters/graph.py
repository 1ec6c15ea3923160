"""The whole detector as one graph: an image of any size in, boxes in its own pixels out.

What surrounds the network elsewhere (:mod:`retinanet.data.images` before it,
:mod:`retinanet.postprocess` behind it) is written here for tensors of fixed rank alone, so that
``torch.export`` can follow it: there is no list of images, and what was found is padded to a
fixed number. Those rooms are the definition; tests hold this one to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from retinanet.anchors import anchor_grid, cell_anchors
from retinanet.boxes import clip_boxes, decode_boxes
from retinanet.data.images import padding_colour
from retinanet.inference.backends import Thresholds, to_original
from retinanet.model.retinanet import RetinaNet
from retinanet.structures import Outputs, flatten_level

NOTHING = -1
"""Label of the rows behind the last object."""

_NO_SCORE = -1.0  # of a candidate that is none; scores are 0 or more


class Suppression(NamedTuple):
    """How boxes suppress each other.

    Attributes:
        classes: K; 1 where boxes of different classes do so too.
        threshold: of two boxes with a greater IoU the one of less score goes.
        most: more boxes than that of one class are never asked for.
        side: the boxes lie within so many pixels.
    """

    classes: int
    threshold: float
    most: int
    side: int


Suppress = Callable[[Tensor, Tensor, Tensor, Suppression], Tensor]
"""(B, T, 4) boxes, (B, T) scores (under 0: none), (B, T) labels to (B, T) bool: those that stay."""


class WholeDetector(nn.Module):
    """Images to what is found in them, in one piece.

    Args:
        network: as :func:`retinanet.model.fused.fused_copy` makes it, without packing.
        image_size, max_size: pixels of the shorter side, and of the longer one at most.
        thresholds: all of :class:`retinanet.inference.backends.Thresholds`.
        suppress: what does the suppression; engines differ in what they have for it.
        size: :func:`network_size`, or :func:`network_size_of_tensors`.
    """

    colour: Tensor

    def __init__(
        self,
        network: RetinaNet,
        *,
        image_size: int,
        max_size: int,
        thresholds: Thresholds,
        suppress: Suppress,
        size: Callable[[int, int, int, int], tuple[int, int]],
    ) -> None:
        super().__init__()
        self.size = size
        self.network = network
        self.image_size, self.max_size = image_size, max_size
        self.topk_candidates = thresholds["topk_candidates"]
        self.detections_per_image = thresholds["detections_per_image"]
        threshold = thresholds["score_threshold"]
        self.least = math.log(threshold / (1 - threshold)) if threshold else -math.inf
        self.suppression = Suppression(
            1 if thresholds["class_agnostic_nms"] else network.num_classes,
            thresholds["nms_threshold"],
            self.detections_per_image,
            max_size,
        )
        self.suppress = suppress
        colour = torch.tensor(padding_colour(network.pixel_mean), dtype=torch.float32)
        self.register_buffer("colour", colour.view(3, 1, 1), persistent=False)
        for level, root in enumerate(network.anchors.sizes):
            cell = cell_anchors(network.anchors, root).float()
            self.register_buffer(f"cell_{level}", cell, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Find objects.

        Args:
            images: (B, 3, H, W) uint8 RGB, whole images of one size.

        Returns:
            (B, D, 4) float32 boxes in pixels of the images, (B, D) float32 scores, (B, D) int64
            labels, best first, D = ``detections_per_image``, and (B,) int64 how many there are:
            behind them boxes and scores are 0 and labels :data:`NOTHING`.
        """
        padded, size, original = self.prepare(images)
        outputs = self.network(padded)
        found = [
            best_of_level(*level, self.least, self.topk_candidates)
            for level in self.levels(outputs, padded)
        ]
        logits, labels, deltas, anchors = (
            torch.cat(parts, dim=1) for parts in zip(*found, strict=True)
        )
        boxes = clip_boxes(decode_boxes(deltas, anchors), size)
        scores = torch.where(logits > -math.inf, logits.sigmoid(), _NO_SCORE)
        stays = self.suppress(boxes, scores, labels, self.suppression)
        scores = torch.where(stays, scores, _NO_SCORE)
        missing = self.detections_per_image - scores.shape[1]
        if missing > 0:  # more are asked for than there are candidates: known before any image
            scores = F.pad(scores, (0, missing), value=_NO_SCORE)
            boxes, labels = F.pad(boxes, (0, 0, 0, missing)), F.pad(labels, (0, missing))
        scores, place = scores.topk(self.detections_per_image, dim=1)
        boxes = boxes.gather(1, place[:, :, None].expand(-1, -1, 4))
        there = scores > _NO_SCORE
        return (
            to_original(boxes, size, original) * there[:, :, None],
            scores.clamp(min=0),
            torch.where(there, labels.gather(1, place), NOTHING),
            there.sum(dim=1),
        )

    def prepare(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Resize and pad.

        Returns:
            (B, 3, h, w) float32 0..255, h and w multiples of 32; (2,) float64 height and width
            without the padding; (2,) of the images.
        """
        height, width = images.shape[-2:]
        rows, columns = self.size(height, width, self.image_size, self.max_size)
        resized = F.interpolate(
            images, (rows, columns), mode="bilinear", align_corners=False, antialias=True
        )
        divisor = self.network.size_divisor
        # What is padded to is said as whole cells: so every later shape is a plain multiple.
        high, wide = (divisor * ((side + divisor - 1) // divisor) for side in (rows, columns))
        margin = (0, wide - columns, 0, high - rows)
        # Each channel is padded with a colour of its own; whole numbers stay what they are.
        padded = F.pad(resized.float() - self.colour, margin) + self.colour
        return padded, _sides(rows, columns), _sides(height, width)

    def levels(self, outputs: Outputs, padded: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each level logits (B, R_l, K), deltas (B, R_l, 4), both float32, and anchors."""
        network = self.network
        found = []
        for level, (logits, deltas) in enumerate(zip(outputs.logits, outputs.deltas, strict=True)):
            rows, columns = logits.shape[-2:]
            stride = network.strides[level]
            steps = (stride, stride)
            if network.anchors.rounding == "torchvision":
                steps = (padded.shape[-2] // rows, padded.shape[-1] // columns)
            cell = cast(Tensor, getattr(self, f"cell_{level}"))
            found.append(
                (
                    flatten_level(logits, network.num_classes).float(),
                    flatten_level(deltas, 4).float(),
                    anchor_grid(cell, rows, columns, steps),
                )
            )
        return found


class RawDetector(WholeDetector):
    """The same up to the suppression, for engines that bring their own."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Score every anchor.

        Args:
            images: as :meth:`WholeDetector.forward`.

        Returns:
            (B, R, 4) float32 boxes in pixels of the images and within them, and (B, R, K) float32
            scores, in the order of the anchors, level by level.
        """
        padded, size, original = self.prepare(images)
        levels = self.levels(self.network(padded), padded)
        boxes = torch.cat([decode_boxes(deltas, anchors) for _, deltas, anchors in levels], dim=1)
        scores = torch.cat([logits for logits, _, _ in levels], dim=1).sigmoid()
        return to_original(clip_boxes(boxes, size), size, original), scores


def network_size(height: int, width: int, shorter: int, longest: int) -> tuple[int, int]:
    """As :func:`retinanet.data.images.network_size`, of sides that torch.export has not fixed."""
    scale = torch.sym_min(
        shorter / torch.sym_min(height, width), longest / torch.sym_max(height, width)
    )
    rows, columns = (
        cast(int, torch.sym_max(1, cast(int, round(side * scale)))) for side in (height, width)
    )
    return rows, columns


def network_size_of_tensors(height: int, width: int, shorter: int, longest: int) -> tuple[int, int]:
    """The same for a program that is saved, which cannot hold Python's ``round``.

    AOTInductor, of torch 2.15, reads feature maps of such sizes in the wrong order.
    """
    sides = _sides(height, width)
    # Not `shorter / sides`, which torch makes a product with the reciprocal: rounded twice.
    wanted = sides.new_tensor((shorter, longest))
    scale = (wanted / torch.stack((sides.amin(dim=0), sides.amax(dim=0)))).amin(dim=0)
    whole = (sides * scale).round().clamp(min=1).long()
    rows, columns = cast(list[int], [side.item() for side in whole])  # int() would fix them
    for side in (rows, columns):
        torch._check(side >= 1)
        torch._check(side <= longest)
    return rows, columns


def _sides(height: int, width: int) -> Tensor:
    """(2,) float64."""
    return torch.stack([torch.scalar_tensor(side, dtype=torch.float64) for side in (height, width)])


def best_of_level(
    logits: Tensor, deltas: Tensor, anchors: Tensor, least: float, most: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The `most` highest logits of each image that are over `least`, of equal ones the first.

    Returns:
        (B, most) logits, best first, -inf where there are no more; (B, most) labels; (B, most, 4)
        deltas and anchors.
    """
    count, classes = logits.shape[1:]
    logits = torch.where(logits > least, logits, -math.inf)  # NaN is over nothing
    # The best logits lie in the rows of the best largest logits: most rows are looked at once.
    rows = F.pad(logits.amax(dim=2), (0, most), value=-math.inf).topk(most, dim=1).indices
    rows = rows.sort(dim=1).values
    inside = rows < count
    rows = rows.clamp(max=count - 1)
    own = logits.gather(1, rows[:, :, None].expand(-1, -1, classes))
    own = torch.where(inside[:, :, None], own, -math.inf)
    best, place = own.flatten(1).topk(most, dim=1)
    row = rows.gather(1, place // classes)
    own_deltas = deltas.gather(1, row[:, :, None].expand(-1, -1, 4))
    return best, place % classes, own_deltas, anchors[row]


def suppress_by_torchvision(
    boxes: Tensor, scores: Tensor, labels: Tensor, how: Suppression
) -> Tensor:
    """A :data:`Suppress` for torch, all images and classes in one go."""
    images = torch.arange(boxes.shape[0], device=boxes.device)[:, None].expand_as(labels)
    groups = images if how.classes == 1 else images * how.classes + labels
    place = (scores >= 0).flatten().nonzero()[:, 0]
    # Two boxes stand in front that nothing suppresses: torchvision tells torch.export that two or
    # more are left, and the exported program insists on it.
    two = torch.arange(2, device=boxes.device)
    corners = torch.cat((two.new_zeros(2, 4), boxes.flatten(0, 1)[place]))
    corners[:2, 2:] += 1
    # Each group is moved to a place of its own; float32 has too few digits for so many.
    groups = torch.cat((two, groups.flatten()[place] + 2))
    moved = corners.double() + (groups * (how.side + 1))[:, None]
    own_scores = torch.cat((two.to(scores.dtype) + 1, scores.flatten()[place]))
    kept = nms(moved, own_scores.double(), how.threshold)
    stays = torch.zeros(2 + scores.numel(), dtype=torch.bool, device=boxes.device)
    stays = stays.index_fill(0, torch.cat((two, place + 2))[kept], True)
    return stays[2:].view_as(scores)


@torch.library.custom_op("retinanet::suppress", mutates_args=())
def _suppress(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    classes: int,
    threshold: float,
    most: int,
    side: int,
) -> Tensor:
    return suppress_by_torchvision(
        boxes, scores, labels, Suppression(classes, threshold, most, side)
    )


@_suppress.register_fake
def _(boxes: Tensor, scores: Tensor, labels: Tensor, *_: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def suppress_by_engine(boxes: Tensor, scores: Tensor, labels: Tensor, how: Suppression) -> Tensor:
    """A :data:`Suppress` that stays one node, ``retinanet::suppress``, for a converter to fill."""
    return cast(Tensor, _suppress(boxes, scores, labels, *how))
