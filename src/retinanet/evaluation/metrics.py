"""Metrics as plain numbers that can be written to JSON and read back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, TypeAdapter

NAN = math.nan

_SHOWN_CLASSES = 20

# NaN is null in JSON.
Number = Annotated[float, BeforeValidator(lambda value: NAN if value is None else value)]
Curve = tuple[Number, ...]


AP_METRICS = {
    "AP": "ap",
    "AP50": "ap50",
    "AP75": "ap75",
    "APs": "ap_small",
    "APm": "ap_medium",
    "APl": "ap_large",
}
"""COCO's short names of the values of AP, and their names here."""


@dataclass(frozen=True, slots=True)
class ClassMetrics:
    """Metrics of a class, as in :class:`Metrics`; NaN where the data has no object of that size.

    Attributes:
        category_id: id in the data.
        best_f1: best harmonic mean of precision and recall at IoU .50.
        best_score: score threshold of `best_f1`.
    """

    name: str
    category_id: int
    objects: int
    detections: int
    ap: Number = NAN
    ap50: Number = NAN
    ap75: Number = NAN
    ap_small: Number = NAN
    ap_medium: Number = NAN
    ap_large: Number = NAN
    ar: Number = NAN
    best_f1: Number = NAN
    best_score: Number = NAN


@dataclass(frozen=True, slots=True)
class Curves:
    """Precision-recall curves, interpolated as in COCO: the maximum at that recall or higher.

    Attributes:
        recall: 101 values, 0 to 1.
        precision: mean over classes, by IoU: ``0.50``, ``0.75`` and ``0.50:0.95`` (their mean).
        per_class: precision at IoU .50, in the order of :attr:`Metrics.per_class`; empty for
            classes without objects.
    """

    recall: Curve
    precision: Mapping[str, Curve]
    per_class: tuple[Curve, ...]


@dataclass(frozen=True, slots=True)
class Errors:
    """Kinds of error and the AP50 that each costs.

    Source: Bolya et al. 2020, TIDE (arXiv:2008.08115), Sec. 2.

    Attributes:
        delta_ap: AP50 gained by fixing that kind alone: ``classification`` ``localisation``
            ``both`` ``duplicate`` ``background`` ``missed``, and the two sums ``false_positive``
            ``false_negative``.
        counts: number of errors by kind.
        ap50: AP50 that the gains are added to.
    """

    delta_ap: Mapping[str, Number]
    counts: Mapping[str, int]
    ap50: Number


@dataclass(frozen=True, slots=True)
class Confusion:
    """Confusion matrix; detections are matched at IoU .50 regardless of class.

    Attributes:
        classes: K names; row and column K are the background.
        matrix: (K + 1) x (K + 1) counts; rows are ground truth, columns detections. The last
            column counts missed objects, the last row detections on background.
        score_threshold: detections below it are excluded.
    """

    classes: tuple[str, ...]
    matrix: tuple[tuple[int, ...], ...]
    score_threshold: Number


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Detections with a score in [lower, upper): number, mean score, precision."""

    lower: float
    upper: float
    detections: int
    score: Number
    precision: Number


@dataclass(frozen=True, slots=True)
class Calibration:
    """Calibration of the scores at IoU .50.

    Attributes:
        expected_error: expected calibration error (ECE): mean difference of score and precision,
            weighted by detections.
        largest_error: largest difference of a bin.
        bins: ten bins of equal width.
    """

    expected_error: Number
    largest_error: Number
    bins: tuple[CalibrationBin, ...]


@dataclass(frozen=True, slots=True)
class Metrics:
    """COCO's twelve numbers, metrics per class and the error analysis.

    A number without data (no small object, say) is NaN, and null in JSON.

    Attributes:
        ap: mean over IoU .50, .55, ... .95, over classes that have objects.
        ap50, ap75: at IoU .50 and .75.
        ap_small, ap_medium, ap_large: objects under 32^2 square pixels, to 96^2, over it.
        ar1, ar10, ar100: recall with 1, 10, 100 detections per class and image, mean over IoU
            .50:.95; NaN beyond `max_detections`.
        ar, ar_small, ar_medium, ar_large: recall with `max_detections`.
        max_detections: detections per class and image that count, best first (COCO: 100).
        images: number of images, without `unreadable`.
        objects, ignored: number of objects, and of crowd and difficult objects, not among them.
        left_out: objects with an invalid box (NaN, Inf, inverted).
        detections: detections, counted or not.
        objects_over_limit: objects that cannot be matched, as their image has more than
            `max_detections` of a class, or more than the detector's ``detections_per_image``.
        detections_over_limit: detections beyond `max_detections` of a class and image: not counted.
        per_class: in the order of the data's classes.
        best_f1: best mean over classes of F1 at IoU .50; `best_score`: its score threshold, the
            highest multiple of .01.
        curves, errors, confusion, calibration: see their classes.
        loss, loss_classification, loss_box: validation loss, mean over images; None: not computed.
        images_per_second: speed of loading, network and post-processing; None: not measured.
        unreadable: error message by path of the images that were left out.
        notes: what was read, and what was left out, a line each.
    """

    ap: Number
    ap50: Number
    ap75: Number
    ap_small: Number
    ap_medium: Number
    ap_large: Number
    ar1: Number
    ar10: Number
    ar100: Number
    ar: Number
    ar_small: Number
    ar_medium: Number
    ar_large: Number
    max_detections: int
    images: int
    objects: int
    ignored: int
    left_out: int
    detections: int
    per_class: tuple[ClassMetrics, ...] = field(repr=False)
    best_f1: Number
    best_score: Number
    curves: Curves = field(repr=False)
    errors: Errors = field(repr=False)
    confusion: Confusion = field(repr=False)
    calibration: Calibration = field(repr=False)
    loss: float | None = None
    loss_classification: float | None = None
    loss_box: float | None = None
    images_per_second: float | None = None
    objects_over_limit: int = 0
    detections_over_limit: int = 0
    unreadable: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def summary(self) -> dict[str, float]:
        """COCO's twelve numbers by their short names, in COCO's order."""
        recalls = {"AR1": self.ar1, "AR10": self.ar10, "AR100": self.ar100}
        return {
            **{short: getattr(self, name) for short, name in AP_METRICS.items()},
            **{name: value for name, value in recalls.items() if not math.isnan(value)},
            f"AR{self.max_detections}": self.ar,
            "ARs": self.ar_small,
            "ARm": self.ar_medium,
            "ARl": self.ar_large,
        }

    def __str__(self) -> str:
        """Return a table: COCO's numbers, the counts, and a line per class."""
        parts = [f"{name} {_figure(value)}" for name, value in self.summary().items()]
        lines = [
            "  ".join(parts[:6]),
            "  ".join(parts[6:]),
            f"{self.images} images, {self.objects} objects, {self.detections} detections; best F1 "
            f"{_figure(self.best_f1)} at score {_figure(self.best_score)}",
        ]
        rows = self.per_class if len(self.per_class) > 1 else ()
        if rows:
            width = max(len("class"), *(len(row.name) for row in rows))
            lines.append(f"{'class':{width}}  objects     AP   AP50")
        lines += [
            f"{row.name:{width}}  {row.objects:7}  {_figure(row.ap):>5}  {_figure(row.ap50):>5}"
            for row in rows[:_SHOWN_CLASSES]
        ]
        if len(rows) > _SHOWN_CLASSES:
            lines.append(f"and {len(rows) - _SHOWN_CLASSES} more classes, in per_class")
        return "\n".join(lines)

    __repr__ = __str__

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON types; NaN becomes None."""
        return to_json_types(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read the output of :meth:`to_dict`.

        Raises:
            ValueError: a value is missing or of another type.
        """
        metrics: Self = TypeAdapter(cls).validate_python(values)
        return metrics


def _figure(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def to_json_types(value: Any) -> dict[str, Any]:
    """Convert a dataclass to JSON types; NaN and Inf become None."""
    values: dict[str, Any] = json.loads(TypeAdapter(type(value)).dump_json(value))
    return values
