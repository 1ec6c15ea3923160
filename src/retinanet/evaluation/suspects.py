"""Labels that are probably wrong or missing, and images that are worth labelling next.

A label is suspect where a model disagrees with it: hotcoco's ``image_diagnostics`` finds the
detections without a label and those of another class than the label that they cover.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from numpy.typing import NDArray

from retinanet.boxes import box_iou
from retinanet.data.dataset import Annotation, Dataset
from retinanet.data.formats.writing import size_of
from retinanet.data.memory import Reader
from retinanet.evaluation.coco import diagnose
from retinanet.evaluation.predict import Progress
from retinanet.evaluation.results import GroundTruth, Results
from retinanet.evaluation.run import (
    EvaluationOptions,
    open_detector,
    predict,
    raised_limits,
    read_eval_dataset,
    run_options,
)
from retinanet.inference.detections import Failure, ImageDetections
from retinanet.inference.detector import Detector
from retinanet.inference.sources import find_sources
from retinanet.model.checkpoint import Checkpoint

KINDS = {
    "missing": "an object is detected that has no label",
    "class": "the detection on the label has another class",
    "box": "the detection lies beside the label, at an IoU under .5",
    "extra": "nothing is detected on the label",
}
"""Kinds of suspects."""

_NEAR_IOU = 0.1  # from which a detection may be of a label that it does not match
_SAME_IOU = 0.5

_Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Suspect:
    """A label that is probably wrong, or an object that is probably not labelled.

    Attributes:
        kind: of :data:`KINDS`.
        score: by which suspects are ranked, in [0, 1].
        image: index in the data set.
        label: the annotation; None: a missing one.
        box, class_name, confidence: of the detection; None: a label without one.
    """

    kind: str
    score: float
    image: int
    label: Annotation | None
    box: tuple[float, float, float, float] | None = None
    class_name: str | None = None
    confidence: float | None = None


@dataclass(frozen=True, slots=True)
class Suspects:
    """Suspects of a data set, the most likely first.

    Attributes:
        dataset: the images that could be read.
        suspects: all of them.
        unreadable: error message by path of the other images.
    """

    dataset: Dataset
    suspects: tuple[Suspect, ...]
    unreadable: Mapping[str, str]

    def to_rows(self) -> list[dict[str, Any]]:
        """Return a flat row per suspect: a table for JSON or CSV."""
        rows = []
        for rank, found in enumerate(self.suspects, start=1):
            image, label = self.dataset.images[found.image], found.label
            row: dict[str, Any] = {
                "rank": rank,
                "kind": found.kind,
                "score": round(found.score, 4),
                "image": str(image.path),
                "label_file": None if image.label_file is None else str(image.label_file),
                "object": None if label is None else label.id,
                "class": None if label is None else self.dataset.classes[label.label],
                "detected_class": found.class_name,
                "confidence": None if found.confidence is None else round(found.confidence, 4),
            }
            given = None if label is None else label.box
            for name, box in (("", given), ("detected_", found.box)):
                sides = [None] * 4 if box is None else [round(float(side), 2) for side in box]
                row |= {f"{name}{key}": side for key, side in zip(_SIDES, sides, strict=True)}
            rows.append(row)
        return rows

    def to_detections(self) -> Iterator[ImageDetections]:
        """Yield each image that has suspects, the worst first, as boxes to review.

        Its labels have the score 1, less that of their suspicion; detections have their own.
        """
        by_image: dict[int, list[Suspect]] = defaultdict(list)
        for suspect in self.suspects:
            by_image[suspect.image].append(suspect)
        names = relative_names(self.dataset)
        for index, found in by_image.items():
            image = self.dataset.images[index]
            doubts = {id(own.label): own.score for own in found if own.label is not None}
            rows = [(a.box, 1 - doubts.get(id(a), 0.0), a.label) for a in image.annotations]
            for own in found:
                if own.box is not None and own.class_name is not None:
                    label = self.dataset.classes.index(own.class_name)
                    rows.append((own.box, own.confidence or 0.0, label))
            yield ImageDetections(
                boxes=torch.tensor([row[0] for row in rows]).reshape(-1, 4),
                scores=torch.tensor([row[1] for row in rows]),
                labels=torch.tensor([row[2] for row in rows], dtype=torch.int64),
                classes=self.dataset.classes,
                category_ids=self.dataset.category_ids,
                name=names[index],
                size=size_of(image),
                image=image.path,
            )


_SIDES = ("x1", "y1", "x2", "y2")


def relative_names(dataset: Dataset) -> list[str]:
    """Return the path of each image below the data's folder, else its file name."""
    source = dataset.source if dataset.source.is_dir() else dataset.source.parent
    return [
        (path.relative_to(source) if path.is_relative_to(source) else Path(path.name)).as_posix()
        for path in (image.path for image in dataset.images)
    ]


def find_suspects(
    model: str | Path | Detector | Checkpoint,
    data: str | Path | Reader | Dataset,
    *,
    split: str = "all",
    **options: Unpack[EvaluationOptions],
) -> Suspects:
    """Find the labels on which a model disagrees most.

    Four kinds (:data:`KINDS`), of detections over the score threshold that ``detect`` has for their
    class. For ``missing`` the score is the detection's; for ``class`` its share of its sum with
    the score of the labelled class at the label (that there is an object is not in question); for
    ``box`` the detection's times one minus the IoU; for ``extra`` the fraction of the class's
    labels on which something is detected, times one minus the score at the label.

    Args:
        model, data: as in :func:`retinanet.evaluation.evaluate`.
        split: of the data. A model remembers some wrong labels that it was trained on: those of
            other images are found more reliably.
        options: as in :func:`retinanet.evaluation.evaluate`.

    Raises:
        DataError, WeightsError, ConfigError: as :func:`retinanet.evaluation.evaluate`.
    """
    detector = open_detector(model, options)
    dataset = read_eval_dataset(data, split, info=detector.info)
    _, raised = raised_limits(dataset, None, detector)
    predictions = predict(detector, dataset, raised, **run_options(options))
    by_class = detector.thresholds["score_thresholds"]
    rest = detector.thresholds["score_threshold"]
    lowest = [by_class.get(name, rest) for name in dataset.classes]
    found = suspects_of(predictions.results, lowest)
    return Suspects(predictions.results.dataset, tuple(found), predictions.unreadable)


def suspects_of(results: Results, thresholds: Iterable[float]) -> list[Suspect]:
    """Rank the suspects of detections.

    Args:
        results: with low scores too (.05).
        thresholds: by label of the data: the score from which a detection counts.
    """
    dataset = results.dataset
    limits = dict(zip(dataset.category_ids, thresholds, strict=True))
    table = results.table()
    lowest = np.array([limits[int(category)] for category in table[:, 6]])
    confident = np.flatnonzero(table[:, 5] >= lowest)
    report, truth = diagnose(results, table[confident]), GroundTruth.of(dataset)
    missed = np.array([report["gt_status"].get(i + 1) == "fn" for i in range(len(truth))], bool)
    is_false = np.zeros(len(table), bool)
    is_false[confident] = [report["dt_status"].get(i + 1) == "fp" for i in range(len(confident))]
    wrong = {
        int(confident[error["dt_id"] - 1]): error["gt_id"] - 1
        for error in report["label_errors"]
        if error["type"] == "wrong_label"
    }
    annotations = [annotation for image in dataset.images for annotation in image.annotations]
    objects, rows = _groups(truth.image_ids), _groups(table[:, 0])
    nothing = np.zeros(0, np.int64)
    found = [
        _Image(
            index,
            dataset,
            [annotations[i] for i in truth.objects[own]],
            table[near],
            missed[own],
            is_false[near],
            {
                i: int(np.searchsorted(own, wrong[row]))
                for i, row in enumerate(near)
                if row in wrong
            },
        )
        for index, id_ in enumerate(results.image_ids)
        for own, near in [(objects.get(id_, nothing), rows.get(id_, nothing))]
    ]
    hits = Counter(label for image in found for label in image.matched_labels())
    totals = Counter(a.label for a in annotations if not a.ignored)
    recall = {label: hits[label] / total for label, total in totals.items()}
    suspects = [suspect for image in found for suspect in image.suspects(recall)]
    return sorted(suspects, key=lambda suspect: -suspect.score)


def _groups(ids: NDArray[Any]) -> dict[int, NDArray[np.int64]]:
    """Return the positions of each id."""
    order = np.argsort(ids, kind="stable")
    unique, starts = np.unique(ids[order], return_index=True)
    return dict(zip(map(int, unique), np.split(order, starts[1:]), strict=False))  # none: one part


@dataclass(frozen=True, slots=True)
class _Image:
    """The labels and detections of an image."""

    index: int
    dataset: Dataset
    labels: list[Annotation]  # M with a valid box
    table: _Array  # (N, 7) detections, as of Results.table
    missed: NDArray[np.bool_]  # (M,) labels without a matching detection over its threshold
    false: NDArray[np.bool_]  # (N,) such detections that match no label
    wrong: Mapping[int, int]  # row of such a detection: label of another class that it covers

    def matched_labels(self) -> Iterator[int]:
        """Yield the class of each label that is matched."""
        for label, missed in zip(self.labels, self.missed, strict=True):
            if not (missed or label.ignored):
                yield label.label

    def suspects(self, recall: Mapping[int, float]) -> Iterator[Suspect]:
        """Yield the suspects of the image; `recall` is by class."""
        if not self.missed.any() and not self.false.any():
            return
        label_of = {category: label for label, category in enumerate(self.dataset.category_ids)}
        classes = np.array([label_of[int(category)] for category in self.table[:, 6]], np.int64)
        boxes = np.concatenate([self.table[:, 1:3], self.table[:, 1:3] + self.table[:, 3:5]], 1)
        own_boxes = np.array([label.box for label in self.labels]).reshape(-1, 4)
        own_classes = np.array([label.label for label in self.labels], np.int64)
        iou = _iou(boxes, own_boxes)
        is_same = classes[:, None] == own_classes
        # Best score of the labelled class at each label, over the threshold or not.
        agreement = np.where(is_same & (iou >= _SAME_IOU), self.table[:, 5:6], 0.0)
        agreed = agreement.max(axis=0, initial=0.0)
        left = self.missed.copy()
        missing: list[_Array] = []
        for row in np.argsort(-self.table[:, 5], kind="stable"):
            if not self.false[row]:
                continue
            score = float(self.table[row, 5])
            near = np.where(left & is_same[row], iou[row], 0.0)
            label, kind = int(near.argmax()) if len(near) else -1, "box"
            if row in self.wrong and left[self.wrong[row]]:
                label, kind = self.wrong[row], "class"
                rank = score / (score + agreed[label])
            elif label >= 0 and near[label] >= _NEAR_IOU:
                rank = score * (1 - near[label])
            elif iou[row].max(initial=0.0) < _SAME_IOU:
                if missing and _iou(boxes[[row]], np.array(missing)).max() >= _SAME_IOU:
                    continue  # a second class of the same object
                missing.append(boxes[row])
                label, kind, rank = -1, "missing", score
            else:
                continue
            if label >= 0:
                left[label] = False
            x1, y1, x2, y2 = boxes[row].tolist()
            yield Suspect(
                kind,
                float(rank),
                self.index,
                self.labels[label] if label >= 0 else None,
                (x1, y1, x2, y2),
                self.dataset.classes[classes[row]],
                score,
            )
        for position in np.flatnonzero(left):
            lonely = self.labels[position]
            rank = recall.get(lonely.label, 0.0) * (1 - agreed[position])
            yield Suspect("extra", float(rank), self.index, lonely)


def _iou(boxes: _Array, others: _Array) -> _Array:
    """Return the (N, M) IoU of (N, 4) and (M, 4) boxes."""
    iou: _Array = box_iou(torch.from_numpy(boxes)[:, None], torch.from_numpy(others)).numpy()
    return iou


@dataclass(frozen=True, slots=True)
class Candidate:
    """An unlabelled image that is worth labelling.

    Attributes:
        uncertainty: the expected number of wrong decisions if each detection of a score of .5 or
            more is taken for an object: the sum of min(score, 1 - score).
        found: its detections, also of low scores.
    """

    uncertainty: float
    found: ImageDetections


def rank_images(
    detector: Detector,
    sources: Any,
    number: int,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[list[Candidate], list[Failure]]:
    """Return the images on which a detector is least certain, and those that cannot be read.

    Args:
        detector: with calibrated scores, if its model was tuned.
        sources: images as :meth:`Detector.stream` takes them.
        number: of images to return.
        progress: called after each image.
        options: of :meth:`Detector.stream`.
    """
    options.setdefault("score_threshold", detector.eval_thresholds["score_threshold"])
    best: list[tuple[float, int, ImageDetections]] = []
    failures = []
    listed = find_sources(sources)
    for index, found in enumerate(detector.stream(listed, **options)):
        if progress is not None:
            progress(index + 1, len(listed))
        if isinstance(found, Failure):
            failures.append(found)
            continue
        uncertainty = float(torch.minimum(found.scores, 1 - found.scores).sum())
        # The index breaks ties: of equal images the first.
        keep = heapq.heappush if len(best) < number else heapq.heappushpop
        keep(best, (uncertainty, -index, found))
    ranked = sorted(best, key=lambda item: (-item[0], -item[1]))
    return [Candidate(uncertainty, found) for uncertainty, _, found in ranked], failures
