"""COCO metrics by hotcoco, a compiled evaluator with the numbers of pycocotools.

Source: Lin et al. 2014 (arXiv:1405.0312) and https://cocodataset.org/#detection-eval.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import hotcoco
import numpy as np
from numpy.typing import NDArray

from retinanet.data.dataset import Dataset
from retinanet.evaluation.metrics import (
    Calibration,
    CalibrationBin,
    ClassMetrics,
    Confusion,
    Curves,
    Errors,
    Metrics,
)
from retinanet.evaluation.results import GroundTruth, Results, coco_categories, coco_images
from retinanet.structures import Detections

MAX_DETECTIONS = 100
"""Detections per class and image that COCO counts."""

_Array = NDArray[np.float64]
# Indices into the arrays precision (T, R, K, areas, limits) and recall (T, K, areas, limits).
_ALL, _SMALL, _MEDIUM, _LARGE = range(4)
_IOU_50, _IOU_75 = 0, 5
_RECALLS: _Array = np.linspace(0.0, 1.0, 101)

_ERROR_KINDS = {
    "Cls": "classification",
    "Loc": "localisation",
    "Both": "both",
    "Dupe": "duplicate",
    "Bkg": "background",
    "Miss": "missed",
    "FP": "false_positive",
    "FN": "false_negative",
}


def evaluate_detections(
    dataset: Dataset,
    detections: Results | Iterable[tuple[int, Detections]] | Sequence[Mapping[str, Any]],
    *,
    max_detections: int | None = None,
    detections_per_image: int | None = None,
    analysis: bool = True,
) -> Metrics:
    """Compute COCO's metrics of the detections of a data set.

    Crowd and difficult objects are ignored, and so are detections that match them.

    Args:
        dataset: images and their objects; images without detections count too.
        detections: (index in the data set, detections in pixels of the image) pairs, or COCO
            results (a list of dicts), or :class:`Results`.
        max_detections: detections per class and image that count, best first; None is
            :func:`max_detections_for`: COCO's 100 unless an image has more objects.
        detections_per_image: the detector's own limit over all classes; None: unknown. It only
            enters :attr:`Metrics.objects_over_limit`.
        analysis: also analyse the errors, a third of the time; else ``errors``, ``confusion`` and
            ``calibration`` are empty.

    Raises:
        DataError: the results do not fit the data (see :meth:`Results.read`).
        ValueError: max_detections is under 1.
    """
    if max_detections is None:
        max_detections = max_detections_for(dataset)
    if max_detections < 1:
        raise ValueError(f"max_detections {max_detections} is under 1")
    results = _as_results(dataset, detections)
    truth = GroundTruth.of(dataset)
    table = results.table()
    evaluator = _run(dataset, truth, table, max_detections)
    scores: _Array = evaluator.eval["scores"][..., -1]
    best_score, best_f1 = _best_threshold(evaluator.eval["precision"][..., -1], scores)
    ignored = int(truth.ignored.sum())
    errors = Errors({}, {}, math.nan)
    confusion, calibration = Confusion((), (), math.nan), Calibration(math.nan, math.nan, ())
    if analysis:
        errors, calibration = _errors(evaluator), _calibration(evaluator)
        confusion = _confusion(evaluator, dataset, 0.0 if math.isnan(best_score) else best_score)
    return Metrics(
        **_summary(evaluator, max_detections),
        max_detections=max_detections,
        images=len(dataset),
        objects=len(truth) - ignored,
        ignored=ignored,
        left_out=truth.left_out,
        detections=len(table),
        objects_over_limit=_objects_over_limit(dataset, max_detections, detections_per_image),
        detections_over_limit=_detections_over_limit(table, max_detections),
        per_class=_per_class(evaluator, dataset, truth, table),
        best_f1=best_f1,
        best_score=best_score,
        curves=_curves(evaluator, dataset),
        errors=errors,
        confusion=confusion,
        calibration=calibration,
    )


def _summary(evaluator: Any, max_detections: int) -> dict[str, Any]:
    """AP and AR over all classes, by their names in :class:`Metrics`."""
    precision: _Array = evaluator.eval["precision"][..., -1]
    recall: _Array = evaluator.eval["recall"]
    limits: list[int] = evaluator.params.max_dets
    average_recall = {limit: _mean(recall[:, :, _ALL, index]) for index, limit in enumerate(limits)}
    return {
        **_average_precision(precision),
        **{f"ar{limit}": average_recall.get(limit, math.nan) for limit in (1, 10, 100)},
        "ar": average_recall[max_detections],
        "ar_small": _mean(recall[..., _SMALL, -1]),
        "ar_medium": _mean(recall[..., _MEDIUM, -1]),
        "ar_large": _mean(recall[..., _LARGE, -1]),
    }


def _average_precision(precision: _Array) -> dict[str, float]:
    """AP of (T, R, .., areas) precision, by the names in :class:`Metrics`."""
    return {
        "ap": _mean(precision[..., _ALL]),
        "ap50": _mean(precision[_IOU_50, ..., _ALL]),
        "ap75": _mean(precision[_IOU_75, ..., _ALL]),
        "ap_small": _mean(precision[..., _SMALL]),
        "ap_medium": _mean(precision[..., _MEDIUM]),
        "ap_large": _mean(precision[..., _LARGE]),
    }


def max_detections_for(dataset: Dataset) -> int:
    """Return the number of detections per image that a data set needs.

    COCO's 100, or the largest number of objects (crowd and difficult excluded) in an image where
    that is more: with fewer detections some objects could never be matched.
    """
    largest = max((sum(not a.ignored for a in i.annotations) for i in dataset.images), default=0)
    return max(MAX_DETECTIONS, largest)


def _objects_over_limit(dataset: Dataset, per_class: int, per_image: int | None) -> int:
    """Count the objects for which their image can have no counted detection."""
    total = 0
    for image in dataset.images:
        counts = Counter(a.label for a in image.annotations if not a.ignored)
        over = sum(max(0, count - per_class) for count in counts.values())
        total += over if per_image is None else max(over, counts.total() - per_image)
    return total


def _detections_over_limit(table: _Array, limit: int) -> int:
    """Count the detections beyond `limit` of their class and image."""
    _, images, counts = np.unique(table[:, 0], return_inverse=True, return_counts=True)
    if counts.max(initial=0) <= limit:
        return 0
    _, classes = np.unique(table[:, 6], return_inverse=True)
    _, counts = np.unique(images * (classes.max() + 1) + classes, return_counts=True)
    return int((counts - limit).clip(min=0).sum())


def _as_results(
    dataset: Dataset,
    detections: Results | Iterable[tuple[int, Detections]] | Sequence[Mapping[str, Any]],
) -> Results:
    if isinstance(detections, Results):
        return detections
    if isinstance(detections, Sequence) and (not detections or isinstance(detections[0], Mapping)):
        return Results.read(cast(Sequence[Mapping[str, Any]], detections), dataset)
    results = Results(dataset)
    for index, image_detections in cast(Iterable[tuple[int, Detections]], detections):
        results.add(index, image_detections)
    return results


def _run(dataset: Dataset, truth: GroundTruth, table: _Array, max_detections: int) -> Any:
    gt = hotcoco.COCO.from_arrays(
        coco_images(dataset),
        coco_categories(dataset),
        truth.image_ids,
        truth.category_ids,
        truth.boxes,
        area=truth.areas,
        iscrowd=truth.ignored.astype(np.int64),
    )
    evaluator = hotcoco.COCOeval(gt, gt.load_res(table), "bbox")
    standard = {limit for limit in (1, 10, 100) if limit < max_detections}
    evaluator.params.max_dets = sorted(standard | {max_detections})
    evaluator.evaluate()
    evaluator.accumulate()
    return evaluator


def _mean(values: _Array) -> float:
    """Mean of the defined values (the evaluator's -1 means: no object)."""
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else math.nan


def _class_indices(evaluator: Any, dataset: Dataset) -> list[int]:
    """Index of each class of the data in the evaluator's arrays."""
    order = {category: index for index, category in enumerate(evaluator.params.cat_ids)}
    return [order[category] for category in dataset.category_ids]


def _per_class(
    evaluator: Any, dataset: Dataset, truth: GroundTruth, table: _Array
) -> tuple[ClassMetrics, ...]:
    precision: _Array = evaluator.eval["precision"][..., -1]
    recall: _Array = evaluator.eval["recall"][..., _ALL, -1]
    scores: _Array = evaluator.eval["scores"][_IOU_50, ..., _ALL, -1]
    objects = Counter[int](truth.category_ids[~truth.ignored].tolist())
    detected = Counter[int](table[:, 6].astype(np.int64).tolist())
    classes = []
    for index, name, category in zip(
        _class_indices(evaluator, dataset), dataset.classes, dataset.category_ids, strict=True
    ):
        own = precision[:, :, index]
        f1 = _f1(own[_IOU_50, :, _ALL])
        best = int(f1.argmax())
        has_objects = objects[category] > 0
        classes.append(
            ClassMetrics(
                name=name,
                category_id=category,
                objects=objects[category],
                detections=detected[category],
                **_average_precision(own),
                ar=_mean(recall[:, index]),
                best_f1=float(f1[best]) if has_objects else math.nan,
                best_score=float(scores[best, index]) if has_objects and f1[best] else math.nan,
            )
        )
    return tuple(classes)


def _f1(precision: _Array) -> _Array:
    """F1 of (R, ...) precision at the 101 recall levels."""
    recall = _RECALLS.reshape(-1, *[1] * (precision.ndim - 1))
    sums = np.maximum(precision, 0) + recall
    return np.divide(
        2 * np.maximum(precision, 0) * recall, sums, out=np.zeros_like(sums), where=sums > 0
    )


def _best_threshold(precision: _Array, scores: _Array) -> tuple[float, float]:
    """Score threshold with the best mean over classes of F1 at IoU .50, and that F1.

    Thresholds are multiples of .01. At a threshold the recall of a class is the last of the 101
    recall levels whose score reaches it, so recall is rounded down to .01: F1 changes by less
    than .01.
    """
    own = precision[_IOU_50, ..., _ALL]  # (R, K)
    has_objects: NDArray[np.bool_] = own[0] > -1
    if not has_objects.any():
        return math.nan, math.nan
    own, own_scores = own[:, has_objects], scores[_IOU_50, ..., _ALL][:, has_objects]
    f1 = _f1(own)
    best, best_f1 = math.nan, 0.0
    for threshold in np.arange(99, 0, -1) / 100:  # the highest of equal ones
        # Recall levels that are not reached have score 0 and precision 0.
        reached = (own_scores >= threshold).sum(axis=0) - 1
        values = np.take_along_axis(f1, reached.clip(0)[None], axis=0)[0]
        mean = float(np.where(reached >= 0, values, 0.0).mean())
        if mean > best_f1:
            best, best_f1 = float(threshold), mean
    return best, best_f1


def _curves(evaluator: Any, dataset: Dataset) -> Curves:
    precision: _Array = evaluator.eval["precision"][..., _ALL, -1]  # (T, R, K)
    has_objects = precision[0, 0] > -1
    means: dict[str, _Array] = {}
    if has_objects.any():
        mean = precision[..., has_objects].mean(axis=-1)
        means = {"0.50": mean[_IOU_50], "0.75": mean[_IOU_75], "0.50:0.95": mean.mean(axis=0)}
    return Curves(
        recall=_rounded(_RECALLS),
        precision={iou: _rounded(values) for iou, values in means.items()},
        per_class=tuple(
            _rounded(precision[_IOU_50, :, index]) if has_objects[index] else ()
            for index in _class_indices(evaluator, dataset)
        ),
    )


def _rounded(values: _Array) -> tuple[float, ...]:
    """Round to four digits: enough for plots, and a small file."""
    return tuple(np.round(values, 4).tolist())


def _errors(evaluator: Any) -> Errors:
    kinds = evaluator.tide_errors(pos_thr=0.5, bg_thr=0.1)
    return Errors(
        delta_ap={name: float(kinds["delta_ap"][kind]) for kind, name in _ERROR_KINDS.items()},
        counts={
            name: int(kinds["counts"][kind])
            for kind, name in _ERROR_KINDS.items()
            if kind in kinds["counts"]
        },
        ap50=float(kinds["ap_base"]),
    )


def _confusion(evaluator: Any, dataset: Dataset, score_threshold: float) -> Confusion:
    confusion = evaluator.confusion_matrix(iou_thr=0.5, min_score=score_threshold)
    order = {category: index for index, category in enumerate(confusion["cat_ids"])}
    indices = [*(order[category] for category in dataset.category_ids), len(order)]
    matrix = confusion["matrix"][np.ix_(indices, indices)]
    return Confusion(
        classes=dataset.classes,
        matrix=tuple(tuple(row) for row in matrix.astype(np.int64).tolist()),
        score_threshold=score_threshold,
    )


def score_bins(results: Results, bins: int, max_detections: int) -> tuple[CalibrationBin, ...]:
    """Return score and precision at IoU .50 of the detections, in `bins` bins of equal width."""
    dataset = results.dataset
    evaluator = _run(dataset, GroundTruth.of(dataset), results.table(), max_detections)
    return _calibration(evaluator, bins).bins


def diagnose(results: Results, table: _Array) -> Mapping[str, Any]:
    """Match detections to the objects at an IoU of .5, and find label errors (hotcoco's).

    Args:
        results: of the data set.
        table: the rows of its table to match.

    Returns:
        ``dt_status`` and ``gt_status`` (``tp``, ``fp``; ``matched``, ``fn``) and ``label_errors``,
        by ids that count from 1: rows of `table`, and objects of :class:`GroundTruth`.
    """
    dataset = results.dataset
    evaluator = _run(dataset, GroundTruth.of(dataset), table, max(1, len(table)))
    found: Mapping[str, Any] = evaluator.image_diagnostics(iou_thr=0.5, score_thr=0.0)
    return found


def _calibration(evaluator: Any, bins: int = 10) -> Calibration:
    calibration = evaluator.calibration(n_bins=bins, iou_threshold=0.5)
    return Calibration(
        expected_error=float(calibration["ece"]),
        largest_error=float(calibration["mce"]),
        bins=tuple(
            CalibrationBin(
                lower=float(bin_["bin_lower"]),
                upper=float(bin_["bin_upper"]),
                detections=int(bin_["count"]),
                score=float(bin_["avg_confidence"]),
                precision=float(bin_["avg_accuracy"]),
            )
            for bin_ in calibration["bins"]
        ),
    )
