"""Track objects across frames: ByteTrack (arXiv:2110.06864), of the library ``trackers``."""

from __future__ import annotations

from typing import Any

import numpy as np

from retinanet.errors import MissingExtraError
from retinanet.inference.detections import to_supervision
from retinanet.structures import Detections

MIN_SCORE = 0.1
"""Boxes of a lower score never continue a track, as in ByteTrack."""

_MIN_IOU = 0.2  # of a box with the predicted box of its track; as in ByteTrack's own code
_MAX_SECONDS_LOST = 1.0  # after which an object gets a new number


class Tracker:
    """Numbers objects 1, 2, ... in the order of their tracks.

    Boxes of at least `threshold` begin tracks; weaker ones only continue tracks without a better
    box, so an object half hidden keeps its number. A track is numbered with its second consecutive
    detection.

    Attributes:
        count: tracks so far.
    """

    def __init__(self, rate: float, *, threshold: float, across_classes: bool) -> None:
        """Begin without tracks.

        Args:
            rate: frames per second of the video.
            threshold: minimum score of a box that begins a track.
            across_classes: a track may change its class. Not for several classes per box, whose
                tracks would then be exchanged.
        """
        try:
            import supervision
            import trackers
        except ImportError as error:
            raise MissingExtraError(error.name or "trackers", "video") from None
        self._empty: Any = supervision.Detections.empty
        self._new_tracker: Any = trackers.ByteTrackTracker
        self._settings = {
            "frame_rate": rate,
            "lost_track_buffer": round(30 * _MAX_SECONDS_LOST),  # in 30ths of a second
            "track_activation_threshold": threshold,
            "minimum_iou_threshold": _MIN_IOU,
            "high_conf_det_threshold": threshold,
        }
        self._across_classes = across_classes
        self._trackers: dict[int, Any] = {}  # by class
        self._numbers: dict[int, dict[int, int]] = {}  # by class and the tracker's own id
        self.count = 0

    def update(self, objects: Detections, time: float) -> list[int | None]:
        """Return the track number of each object in the next frame; None: no track yet.

        Args:
            objects: of that frame.
            time: seconds, more than at the previous call.
        """
        detections = to_supervision(objects)
        detections.data["row"] = np.arange(len(objects))
        labels = detections.class_id
        groups = np.zeros_like(labels) if self._across_classes else labels
        is_used = detections.confidence >= MIN_SCORE
        numbers: list[int | None] = [None] * len(objects)
        for group in sorted({*groups[is_used].tolist(), *self._trackers}):
            own = is_used & (groups == group)
            if group not in self._trackers:
                self._trackers[group] = self._new_tracker(**self._settings)
            tracker, known = self._trackers[group], self._numbers.setdefault(group, {})
            if not own.any() and not tracker.tracks:
                continue
            shown = detections[own] if own.any() else self._empty()
            tracked = tracker.update(shown, timestamp=time)
            ids = tracked.tracker_id.tolist() if len(tracked) else []
            for row, track_id in zip(tracked.data.get("row", ()), ids, strict=True):
                if track_id >= 0:
                    if track_id not in known:
                        self.count += 1
                        known[track_id] = self.count
                    numbers[row] = known[track_id]
            alive = {track.tracker_id for track in tracker.tracks}
            self._numbers[group] = {id_: known[id_] for id_ in known if id_ in alive}
        return numbers
