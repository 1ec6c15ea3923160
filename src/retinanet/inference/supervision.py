"""Detections to and from supervision, for its annotators, zones and trackers.

Source: https://supervision.roboflow.com/

Boxes are (x1, y1, x2, y2) pixels on both sides, float32, so the way there and back changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from retinanet.errors import DataError, MissingExtraError
from retinanet.inference.found import Found
from retinanet.structures import Detections


def to_supervision(
    objects: Found | Detections,
    classes: Sequence[str] | None = None,
    *,
    tracks: Sequence[int] | None = None,
) -> Any:
    """`objects` as ``supervision.Detections``, in their order.

    ``xyxy`` (N, 4) float32, ``confidence`` (N,) float32, ``class_id`` (N,) int64, and
    ``data["class_name"]`` (N,) where the names are known, which supervision's annotators show. The
    arrays are copies. ``metadata`` stays empty: supervision refuses to merge what differs in it.

    Args:
        objects: of one image.
        classes: names by label; None: those of a :class:`Found`.
        tracks: (N,) a number that an object keeps from frame to frame: ``tracker_id``.

    Raises:
        MissingExtraError: supervision is not installed.
        ValueError: `tracks` are not as many as the objects.
    """
    try:
        import supervision
    except ImportError:
        raise MissingExtraError("supervision", "supervision") from None
    if classes is None and isinstance(objects, Found):
        classes = objects.classes
    if tracks is not None and len(tracks) != len(objects):
        raise ValueError(f"{len(tracks)} tracks of {len(objects)} objects")
    labels = objects.labels.cpu().numpy().astype(np.int64)
    data: dict[str, Any] = {}
    if classes is not None:
        data["class_name"] = np.array([classes[label] for label in labels], dtype=np.str_)
    return supervision.Detections(
        xyxy=objects.boxes.cpu().numpy().astype(np.float32).reshape(-1, 4),
        confidence=objects.scores.cpu().numpy().astype(np.float32),
        class_id=labels,
        tracker_id=None if tracks is None else np.array(tracks, dtype=np.int64),
        data=data,
    )


def from_supervision(objects: Any, *, num_classes: int | None = None) -> Detections:
    """``supervision.Detections`` as ours, best first; those of one score keep their order.

    Masks, tracks and other data have no place in ours and stay behind.

    Args:
        objects: with ``class_id`` and ``confidence``, unless it is empty.
        num_classes: K; labels must be under it. None: any.

    Raises:
        DataError: there are no classes or confidences, or a label that is not 0..K-1.
    """
    count = len(objects)
    if count:
        for name in ("class_id", "confidence"):
            if getattr(objects, name) is None:
                raise DataError(
                    f"supervision's Detections of {count} objects have no {name}; set it first"
                )
    boxes = np.asarray(objects.xyxy, dtype=np.float32).reshape(-1, 4)
    scores = np.asarray([] if not count else objects.confidence, dtype=np.float32)
    labels = np.asarray([] if not count else objects.class_id, dtype=np.int64)
    if count and (labels.min() < 0 or (num_classes is not None and labels.max() >= num_classes)):
        odd = labels.min() if labels.min() < 0 else labels.max()
        known = "any class" if num_classes is None else f"the classes 0 to {num_classes - 1}"
        raise DataError(f"supervision's class_id {odd} is not one of {known}")
    order = np.argsort(-scores, kind="stable")
    return Detections(
        torch.from_numpy(boxes[order]),
        torch.from_numpy(scores[order]),
        torch.from_numpy(labels[order]),
    )
