"""An exported file beside the network that it was made of, box by box."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

from retinanet.errors import ConfigError
from retinanet.inference.backends import Thresholds
from retinanet.structures import Detections

_SAME_OBJECT = 0.5
"""Boxes of one class with this IoU or more may be the same object's."""

_SAME_PLACE = 0.1
"""Pixels; boxes without an area, as at an image's edge, are the same by their corners."""

_NEAR_IOU = 0.05
"""So close to the threshold of NMS a small difference decides which of two boxes goes."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a file may be from the network.

    Attributes:
        score: largest difference of a matched box's score that is none.
        box: largest difference of a corner that is none, pixels of the image.
        apart: share of the boxes that may differ by more, or have no match.
        ap: by how much AP may be lower.
    """

    score: float
    box: float
    apart: float
    ap: float

    def laid_over(self, settings: Iterable[str]) -> Tolerance:
        """With ``name=value`` over it.

        Raises:
            ConfigError: no such name, or the value is no number of 0 or more.
        """
        changed = {}
        names = [field.name for field in fields(self)]
        for setting in settings:
            name, _, value = setting.partition("=")
            try:
                number = float(value)
            except ValueError:
                number = -1
            if name not in names or not number >= 0:
                raise ConfigError(
                    f"tolerance {setting!r} is not name=number, of {', '.join(names)}, 0 or more"
                )
            changed[name] = number
        return replace(self, **changed)

    def widened(self, by: Tolerance) -> Tolerance:
        """With `by` added to each."""
        return Tolerance(
            **{one.name: getattr(self, one.name) + getattr(by, one.name) for one in fields(self)}
        )


@dataclass(frozen=True, slots=True)
class Agreement:
    """What two searches of the same images have in common.

    Attributes:
        images: how many were searched.
        boxes: found by the network itself.
        found: found by the file.
        matched: pairs of the same class with an IoU of .5 or more.
        at_a_threshold: boxes of either side without a match for a reason that a rounding decides:
            their score is at the score threshold or at that of the last box kept, or a better box
            is at NMS's threshold.
        unmatched: boxes of either side without a match and without such a reason.
        beyond: matched pairs that differ by more than the tolerance.
        score, box: largest difference of a matched pair; box: of a corner, pixels.
        score_median, box_median: of the differences.
    """

    images: int
    boxes: int
    found: int
    matched: int
    at_a_threshold: int
    unmatched: int
    beyond: int
    score: float
    box: float
    score_median: float
    box_median: float

    @property
    def apart(self) -> float:
        """Share of the objects that either side knows and the other does not, or differently."""
        return (self.beyond + self.unmatched) / max(1, self.matched + self.unmatched)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "apart": self.apart}


def compare(
    pairs: Iterable[tuple[Detections, Detections]], tolerance: Tolerance, thresholds: Thresholds
) -> Agreement:
    """Compare what the network and the file found in each image.

    Args:
        pairs: for each image the network's detections and the file's.
        tolerance: what counts as a difference.
        thresholds: those in use, all of them.
    """
    counts = dict.fromkeys(
        ("images", "boxes", "found", "matched", "at_a_threshold", "unmatched", "beyond"), 0
    )
    scores, corners = ([torch.zeros(0, dtype=torch.float32)] for _ in range(2))
    for expected, got in pairs:
        left, right = match(expected, got)
        score = (expected.scores[left] - got.scores[right]).abs()
        corner = (expected.boxes[left] - got.boxes[right]).abs().amax(dim=1)
        scores.append(score)
        corners.append(corner)
        counts["images"] += 1
        counts["boxes"] += len(expected)
        counts["found"] += len(got)
        counts["matched"] += len(left)
        counts["beyond"] += int(((score > tolerance.score) | (corner > tolerance.box)).sum())
        for own, other, known in ((expected, got, left), (got, expected, right)):
            for place in sorted(set(range(len(own))) - set(known.tolist())):
                excused = _at_a_threshold(own, other, place, tolerance, thresholds)
                counts["at_a_threshold" if excused else "unmatched"] += 1
    score, corner = torch.cat(scores), torch.cat(corners)
    return Agreement(
        **counts,
        score=float(score.max()) if len(score) else 0.0,
        box=float(corner.max()) if len(corner) else 0.0,
        score_median=float(score.median()) if len(score) else 0.0,
        box_median=float(corner.median()) if len(corner) else 0.0,
    )


def match(one: Detections, other: Detections) -> tuple[Tensor, Tensor]:
    """Places in each of the boxes that are the same object's, the greatest IoU first."""
    overlap = box_iou(one.boxes, other.boxes)
    apart = (one.boxes[:, None] - other.boxes).abs().amax(dim=2)
    overlap[apart <= _SAME_PLACE] = 1
    overlap[one.labels[:, None] != other.labels] = 0
    left: list[int] = []
    right: list[int] = []
    rows, columns = (overlap >= _SAME_OBJECT).nonzero(as_tuple=True)
    for place in overlap[rows, columns].argsort(descending=True, stable=True).tolist():
        row, column = int(rows[place]), int(columns[place])
        if row not in left and column not in right:
            left.append(row)
            right.append(column)
    return torch.tensor(left, dtype=torch.int64), torch.tensor(right, dtype=torch.int64)


def _at_a_threshold(
    own: Detections, other: Detections, place: int, tolerance: Tolerance, thresholds: Thresholds
) -> bool:
    """Whether a rounding may be why `other` has no such box."""
    score = float(own.scores[place])
    if score - thresholds["score_threshold"] <= tolerance.score:
        return True
    full = len(other) == thresholds["detections_per_image"]
    if full and score - float(other.scores[-1]) <= tolerance.score:
        return True
    # Who suppresses whom: a box of either side that is about as good or better, at the threshold.
    for side in (own, other):
        near = box_iou(own.boxes[place][None], side.boxes)[0] - thresholds["nms_threshold"]
        rivals = side.scores >= score - tolerance.score
        if not thresholds["class_agnostic_nms"]:
            rivals &= side.labels == own.labels[place]
        if bool((rivals & (near.abs() <= _NEAR_IOU)).any()):
            return True
    return False


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items, evenly over all of them."""
    step = max(1.0, len(items) / max(1, count))
    return [items[int(i * step)] for i in range(min(count, len(items)))]
