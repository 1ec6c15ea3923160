"""Numbers that objects keep from frame to frame: ByteTrack, of the library ``trackers``."""

from __future__ import annotations

from typing import Any

import numpy as np

from retinanet.errors import MissingExtraError
from retinanet.structures import Detections

WEAKEST = 0.1
"""Boxes under this score go on with no track; ByteTrack (arXiv:2110.06864) looks no lower."""

_LEAST_IOU = 0.2  # of a box with where its track should be; as ByteTrack's own code has it
_SECONDS_LOST = 1.0  # an object that is not found for longer comes back under another number


class Tracker:
    """Gives each object a number from 1 on, in the order of their coming.

    Boxes of at least `threshold` begin tracks, weaker ones only carry on with tracks that found no
    better; so an object half hidden keeps its number. It gets the number when it has been found in
    two searched frames in a row.

    Attributes:
        count: how many numbers have been given.
    """

    def __init__(self, rate: float, *, threshold: float, across_classes: bool) -> None:
        """Begin without objects.

        Args:
            rate: frames a second of the clip, of all frames, searched or not.
            threshold: score from which a box begins a track.
            across_classes: whether an object may change its class; where several classes may be
                found in one place, their tracks would change places.

        Raises:
            MissingExtraError: trackers or supervision is not installed.
        """
        try:
            import supervision
            import trackers
        except ImportError as error:
            raise MissingExtraError(error.name or "trackers", "video") from None
        self._supervision: Any = supervision
        self._kind: Any = trackers.ByteTrackTracker
        self._settings = {
            "frame_rate": rate,
            "lost_track_buffer": round(30 * _SECONDS_LOST),  # it counts in 30ths of a second
            "track_activation_threshold": threshold,
            "minimum_iou_threshold": _LEAST_IOU,
            "high_conf_det_threshold": threshold,
        }
        self._across_classes = across_classes
        self._trackers: dict[int, Any] = {}
        self._numbers: dict[int, dict[int, int]] = {}
        self.count = 0

    def update(self, objects: Detections, time: float) -> list[int | None]:
        """The number of each of the objects found in the next searched frame.

        Args:
            objects: found in it.
            time: seconds, more than at the call before.

        Returns:
            For each object its number; None: it has none, or none yet.
        """
        boxes = objects.boxes.numpy().astype(np.float64)
        scores = objects.scores.numpy()
        labels = objects.labels.numpy()
        groups = np.zeros_like(labels) if self._across_classes else labels
        numbers: list[int | None] = [None] * len(scores)
        for group in sorted({*groups[scores >= WEAKEST].tolist(), *self._trackers}):
            rows = np.flatnonzero((groups == group) & (scores >= WEAKEST))
            tracker = self._trackers.get(group)
            if tracker is None:
                tracker = self._trackers[group] = self._kind(**self._settings)
                self._numbers[group] = {}
            if not len(rows) and not tracker.tracks:
                continue
            tracked = tracker.update(
                self._supervision.Detections(
                    xyxy=boxes[rows],
                    confidence=scores[rows],
                    class_id=labels[rows],
                    data={"row": rows},
                )
                if len(rows)
                else self._supervision.Detections.empty(),
                timestamp=time,
            )
            known = self._numbers[group]
            if len(tracked):
                for row, own in zip(tracked.data["row"], tracked.tracker_id, strict=True):
                    if own >= 0:
                        if own not in known:
                            self.count += 1
                            known[int(own)] = self.count
                        numbers[row] = known[int(own)]
            alive = {one.tracker_id for one in tracker.tracks}
            self._numbers[group] = {own: number for own, number in known.items() if own in alive}
        return numbers
