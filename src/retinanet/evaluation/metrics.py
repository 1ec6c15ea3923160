"""What an evaluation says, as plain numbers that can be written to JSON and read back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

NAN = math.nan


@dataclass(frozen=True, slots=True)
class ClassMetrics:
    """One class. A value that the data cannot give (no object of that size) is NaN.

    Attributes:
        name: the class.
        category_id: the data's own id.
        objects: objects that count (neither crowd nor difficult).
        detections: boxes of this class that were judged.
        ap, ap50, ap75: mean over IoU .50:.95; at IoU .50; at IoU .75.
        ap_small, ap_medium, ap_large: objects under 32^2 square pixels, to 96^2, over it.
        ar: recall at `max_detections`, mean over IoU .50:.95.
        best_f1: best harmonic mean of precision and recall at IoU .50.
        best_score: the score threshold that gives it.
    """

    name: str
    category_id: int
    objects: int
    detections: int
    ap: float = NAN
    ap50: float = NAN
    ap75: float = NAN
    ap_small: float = NAN
    ap_medium: float = NAN
    ap_large: float = NAN
    ar: float = NAN
    best_f1: float = NAN
    best_score: float = NAN


@dataclass(frozen=True, slots=True)
class Curves:
    """Precision at each recall, as COCO interpolates it: the best at that recall or more.

    Attributes:
        recall: 101 values, 0 to 1.
        precision: mean over classes, by IoU: ``0.50``, ``0.75`` and ``0.50:0.95`` (their mean).
        per_class: precision at IoU .50, in the order of :attr:`Metrics.per_class`; empty where
            a class has no object.
    """

    recall: tuple[float, ...]
    precision: Mapping[str, tuple[float, ...]]
    per_class: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class Errors:
    """Kinds of error and what AP50 each costs.

    Source: Bolya et al. 2020, TIDE (arXiv:2008.08115), Sec. 2.

    Attributes:
        delta_ap: AP50 gained if that kind alone were mended: ``classification`` ``localisation``
            ``both`` ``duplicate`` ``background`` ``missed``, and the two sums ``false_positive``
            ``false_negative``.
        counts: how many there are, by kind.
        ap50: the AP50 they are taken from.
    """

    delta_ap: Mapping[str, float]
    counts: Mapping[str, int]
    ap50: float


@dataclass(frozen=True, slots=True)
class Confusion:
    """What objects were taken for, boxes matched at IoU .50 whatever their class.

    Attributes:
        classes: K names; row and column K are the background.
        matrix: (K + 1) x (K + 1) counts; rows the truth, columns what was found. The last column
            counts missed objects, the last row boxes on background.
        score_threshold: boxes under it were not looked at.
    """

    classes: tuple[str, ...]
    matrix: tuple[tuple[int, ...], ...]
    score_threshold: float


@dataclass(frozen=True, slots=True)
class CalibrationBin:
    """Boxes whose score lies in [lower, upper): how many, mean score, share that is right."""

    lower: float
    upper: float
    detections: int
    score: float
    precision: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """How far a score is the chance of being right, at IoU .50.

    Attributes:
        expected_error: mean distance of score and precision, weighted by detections (ECE).
        largest_error: the same in the worst bin.
        bins: ten of equal width.
    """

    expected_error: float
    largest_error: float
    bins: tuple[CalibrationBin, ...]


@dataclass(frozen=True, slots=True)
class Metrics:
    """COCO's twelve numbers and what stands behind them.

    A number that the data cannot give (there is no small object, say) is NaN, and null in JSON.

    Attributes:
        ap: mean over IoU .50, .55, ... .95, over classes that have objects.
        ap50, ap75: at IoU .50 and .75.
        ap_small, ap_medium, ap_large: objects under 32^2 square pixels, to 96^2, over it.
        ar1, ar10, ar100: recall with so many boxes of a class in an image, mean over IoU .50:.95;
            NaN where that is over `max_detections`.
        ar, ar_small, ar_medium, ar_large: recall with `max_detections`.
        max_detections: boxes of a class in an image that count, best first (COCO: 100).
        images: images that were judged.
        objects: objects that count; `ignored`: crowd and difficult ones, which do not.
        left_out: objects whose box is not a box (not a number, inverted).
        detections: detections, counted or not.
        objects_over_limit: objects that cannot be matched, as their image has more than
            `max_detections` of a class, or more than the detector's ``detections_per_image``.
        detections_over_limit: detections beyond `max_detections` of a class and image: not counted.
        per_class: in the order of the data's classes.
        best_f1: best mean over classes of F1 at IoU .50; `best_score`: the highest score threshold
            (in hundredths) that gives it.
        curves, errors, confusion, calibration: see their classes.
        loss, loss_classification, loss_box: validation loss, mean over images; None: not computed.
        images_per_second: the speed of loading, network and post-processing; None: not measured.
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar1: float
    ar10: float
    ar100: float
    ar: float
    ar_small: float
    ar_medium: float
    ar_large: float
    max_detections: int
    images: int
    objects: int
    ignored: int
    left_out: int
    detections: int
    per_class: tuple[ClassMetrics, ...] = field(repr=False)
    best_f1: float
    best_score: float
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

    def summary(self) -> dict[str, float]:
        """COCO's twelve numbers by their usual short names, in the usual order."""
        limit = f"AR{self.max_detections}"
        numbers = {
            "AP": self.ap,
            "AP50": self.ap50,
            "AP75": self.ap75,
            "APs": self.ap_small,
            "APm": self.ap_medium,
            "APl": self.ap_large,
            "AR1": self.ar1,
            "AR10": self.ar10,
            "AR100": self.ar100,
            limit: self.ar,
            "ARs": self.ar_small,
            "ARm": self.ar_medium,
            "ARl": self.ar_large,
        }
        order = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
        recalls = [name for name in numbers if name.startswith("AR") and name not in order]
        kept = [name for name in recalls if name == limit or not math.isnan(numbers[name])]
        sized = [name for name in ("ARs", "ARm", "ARl") if name not in kept]
        return {name: numbers[name] for name in [*order, *kept, *sized]}

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON's own types; NaN becomes None."""
        plain = _plain(self)
        assert isinstance(plain, dict)
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The metrics that :meth:`to_dict` wrote.

        Raises:
            KeyError, TypeError: a value is missing or unknown.
        """
        rest = dict(values)
        curves, errors = rest.pop("curves"), rest.pop("errors")
        confusion, calibration = rest.pop("confusion"), rest.pop("calibration")
        classes = tuple(ClassMetrics(**_number_or_nan(one)) for one in rest.pop("per_class"))
        absent = ("loss", "loss_classification", "loss_box", "images_per_second")
        optional = {name: rest.pop(name, None) for name in absent}
        return cls(
            **_number_or_nan(rest),
            **optional,
            per_class=classes,
            curves=Curves(
                recall=_floats(curves["recall"]),
                precision={iou: _floats(one) for iou, one in curves["precision"].items()},
                per_class=tuple(_floats(one) for one in curves["per_class"]),
            ),
            errors=Errors(**_number_or_nan(errors)),
            confusion=Confusion(
                classes=tuple(confusion["classes"]),
                matrix=tuple(tuple(row) for row in confusion["matrix"]),
                score_threshold=confusion["score_threshold"],
            ),
            calibration=Calibration(
                expected_error=calibration["expected_error"],
                largest_error=calibration["largest_error"],
                bins=tuple(CalibrationBin(**_number_or_nan(one)) for one in calibration["bins"]),
            ),
        )


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {one.name: _plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _number_or_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: NAN if value is None else value for name, value in values.items()}


def _floats(values: list[float | None]) -> tuple[float, ...]:
    return tuple(NAN if value is None else value for value in values)
