"""Compare an exported file with the network that it was made from, box by box and by AP."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

from retinanet import __version__
from retinanet.data.dataset import Dataset
from retinanet.data.images import read_image, resize_to
from retinanet.data.synthetic import synthetic_dataset
from retinanet.errors import ConfigError, DataError
from retinanet.evaluation.run import evaluate, read_eval_dataset
from retinanet.inference.backends import Thresholds
from retinanet.inference.detector import Detector
from retinanet.inference.exported import ExportedNetwork, read_exported
from retinanet.inference.sources import Prepared
from retinanet.structures import Detections

_MIN_IOU = 0.5  # of matched boxes
_SAME_CORNERS = 0.1  # pixels; matches boxes without an area, as at an image's edge
_NMS_MARGIN = 0.05  # this close to the IoU threshold, rounding may decide which box is kept


@dataclass(frozen=True)
class Tolerance:
    """Allowed difference between a file and the network.

    Attributes:
        score: difference of the scores of matched boxes.
        box: difference of a corner of matched boxes, pixels of the image.
        apart: share of the boxes that may differ by more or have no match.
        ap: decrease of AP.
    """

    score: float
    box: float
    apart: float
    ap: float

    def override(self, settings: Iterable[str]) -> Tolerance:
        """Return a copy with ``name=value`` settings applied.

        Raises:
            ConfigError: an unknown name, or a value that is not a number of 0 or more.
        """
        values = asdict(self)
        for setting in settings:
            name, _, value = setting.partition("=")
            try:
                number = float(value)
            except ValueError:
                number = -1
            if name not in values or not number >= 0:
                raise ConfigError(
                    f"tolerance {setting!r} is not name=number, of {', '.join(values)}, 0 or more"
                )
            values[name] = number
        return Tolerance(**values)

    def widened(self, by: Tolerance) -> Tolerance:
        """Return the sum of both."""
        return Tolerance(*map(sum, zip(astuple(self), astuple(by), strict=True)))


TOLERANCES = {
    "float32": Tolerance(score=0.001, box=0.1, apart=0.002, ap=0.002),
    "fp16": Tolerance(score=0.01, box=1.0, apart=0.05, ap=0.005),
    "int8": Tolerance(score=0.1, box=10.0, apart=0.25, ap=0.02),
}
"""By precision, for images of the network's size.

Chosen from files of models for blood cells, nuclei and COCO (float16: 1.7 to 4.0% apart on four
images, .0005 AP on BCCD); only AP shows whether a file beyond them is worse.
"""

RESIZED = Tolerance(score=0.03, box=3.0, apart=0.05, ap=1.0)
"""Added for images that the engine resizes itself: pixels may round differently."""


@dataclass(frozen=True)
class Agreement:
    """Comparison of two sets of detections in the same images.

    Attributes:
        images: number of images.
        boxes: detections of the network.
        found: detections of the file.
        matched: pairs of the same class with an IoU of .5 or more.
        at_a_threshold: unmatched boxes where rounding may decide: the score is close to the score
            threshold or to that of the last box kept, or a better box is close to the IoU
            threshold of NMS.
        unmatched: other unmatched boxes.
        beyond: matched pairs that differ by more than the tolerance.
        score, box: largest difference of matched scores and corners (pixels).
        apart: share of the objects that differ by more than the tolerance or have no match.
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
    apart: float


@dataclass(frozen=True)
class ExportReport:
    """An exported file and its comparison with the network.

    Attributes:
        file, target, precision, form: as in :class:`retinanet.inference.exported.ExportedFile`.
        bytes: size of the file, weights included.
        images: description of the images compared.
        tolerance: for images of the network's size.
        network_size: comparison on images of the network's size, as ``retinanet detect`` does.
        whole: comparison on images that the file resizes itself.
        ap, ap_file: AP of the network and of the file; None without labelled data.
        failures: differences beyond the tolerance; empty if the file is valid.
    """

    file: Path
    target: str
    precision: str
    form: str
    bytes: int
    images: str
    tolerance: Tolerance
    network_size: Agreement
    whole: Agreement
    ap: float | None
    ap_file: float | None
    failures: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether all differences are within the tolerance."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON types."""
        extra = {"retinanet": __version__, "file": self.file.name, "passed": self.passed}
        return {**asdict(self), **extra}


def validate_file(
    file: str | Path,
    detector: Detector,
    *,
    data: str | Path | Dataset | None = None,
    split: str | None = None,
    images: int = 20,
    tolerance: Tolerance | None = None,
    run: Path | None = None,
) -> ExportReport:
    """Compare an exported file with the network.

    Args:
        file: the exported file.
        detector: the network, in float32 on the CPU, with the file's sizes and thresholds.
        data: labelled images to compare on, also by AP.
        split: of `data`; None as in :func:`retinanet.evaluation.evaluate`.
        images: number of images compared.
        tolerance: None: that of the file's precision.
        run: a run folder, whose validation images are used without `data`.

    Raises:
        WeightsError: the file cannot be used.
        DataError, ImageError: the data cannot be read.
    """
    exported = read_exported(file)
    precision = exported.precision
    allowed = tolerance or TOLERANCES[precision]
    file_detector = Detector(exported, device="cpu")
    with _sample_images(data, split, run, detector, images) as (sample, description):
        at_size, whole = _compare_detectors(detector, file_detector, sample, allowed)
    advice = "" if precision == "float32" else ", or export in float32"
    failures = [
        f"{where}: {agreement.apart:.2%} of the boxes differ by more than {limit.score:g} in "
        f"score or {limit.box:g} pixels or have no match, over {limit.apart:.2%}: compare the AP "
        f"with --data{advice}"
        for where, agreement, limit in (
            ("at the network's size", at_size, allowed),
            ("whole images", whole, allowed.widened(RESIZED)),
        )
        if not agreement.apart <= limit.apart
    ]
    if at_size.matched == 0:
        failures.append(
            f"in {description} the network found {at_size.boxes} boxes, the file {at_size.found}, "
            "none of them the same: nothing was compared; give images with objects (--data)"
        )
    ap = ap_file = None
    if data is not None:
        # The file cannot give more detections per image than were built in.
        limit_ = detector.eval_thresholds["detections_per_image"]
        ap, ap_file = (
            evaluate(either, data, split=split, detections_per_image=limit_).ap
            for either in (detector, file_detector)
        )
        if not ap_file >= ap - allowed.ap:
            failures.append(f"AP {ap_file:.4f} is under {ap:.4f} by more than {allowed.ap:g}")
    return ExportReport(
        file=Path(file),
        target=exported.target,
        precision=precision,
        form=exported.form,
        bytes=sum(path.stat().st_size for path in parts_of(Path(file))),
        images=description,
        tolerance=allowed,
        network_size=at_size,
        whole=whole,
        ap=ap,
        ap_file=ap_file,
        failures=tuple(failures),
    )


def parts_of(file: Path) -> list[Path]:
    """Return the paths of an exported file: OpenVINO has a ``.bin`` too."""
    return [file, file.with_suffix(".bin")] if file.suffix == ".xml" else [file]


def _compare_detectors(
    detector: Detector, file_detector: Detector, images: Iterable[Tensor], tolerance: Tolerance
) -> tuple[Agreement, Agreement]:
    """Compare on resized images, and on images that the file resizes."""
    network = file_detector.network
    assert isinstance(network, ExportedNetwork)
    resized_pairs, whole_pairs = [], []
    for image in images:
        resized, _ = resize_to(image, detector.image_size, detector.max_size)
        prepared = [Prepared(resized, (image.shape[1], image.shape[2]))]
        expected, own = (
            each.detect_prepared(prepared, **each.eval_thresholds)[0]
            for each in (detector, file_detector)
        )
        resized_pairs.append((expected, own))
        whole_pairs.append((expected, network.detect([image], **detector.eval_thresholds)[0]))
    return (
        compare(resized_pairs, tolerance, detector.eval_thresholds),
        compare(whole_pairs, tolerance.widened(RESIZED), detector.eval_thresholds),
    )


def compare(
    pairs: Iterable[tuple[Detections, Detections]], tolerance: Tolerance, thresholds: Thresholds
) -> Agreement:
    """Compare the detections of the network and of the file, a pair per image."""
    names = ("images", "boxes", "found", "matched", "at_a_threshold", "unmatched", "beyond")
    counts = dict.fromkeys(names, 0)
    scores, corners = ([torch.zeros(1)] for _ in range(2))
    for expected, detected in pairs:
        left, right = match(expected, detected)
        score = (expected.scores[left] - detected.scores[right]).abs()
        corner = (expected.boxes[left] - detected.boxes[right]).abs().amax(dim=1)
        scores.append(score)
        corners.append(corner)
        counts["images"] += 1
        counts["boxes"] += len(expected)
        counts["found"] += len(detected)
        counts["matched"] += len(left)
        counts["beyond"] += int(((score > tolerance.score) | (corner > tolerance.box)).sum())
        for own, other, matched in ((expected, detected, left), (detected, expected, right)):
            for row in sorted(set(range(len(own))) - set(matched.tolist())):
                rounding = _at_a_threshold(own, other, row, tolerance, thresholds)
                counts["at_a_threshold" if rounding else "unmatched"] += 1
    different = counts["beyond"] + counts["unmatched"]
    return Agreement(
        **counts,
        score=float(torch.cat(scores).max()),
        box=float(torch.cat(corners).max()),
        apart=different / max(1, counts["matched"] + counts["unmatched"]),
    )


def match(first: Detections, second: Detections) -> tuple[Tensor, Tensor]:
    """Match boxes of the same class greedily by IoU; returns the rows in each."""
    iou = box_iou(first.boxes, second.boxes)
    distance = (first.boxes[:, None] - second.boxes).abs().amax(dim=2)
    iou[distance <= _SAME_CORNERS] = 1
    iou[first.labels[:, None] != second.labels] = 0
    candidates = (iou >= _MIN_IOU).nonzero()
    order = iou[candidates.unbind(1)].argsort(descending=True, stable=True)
    matched: dict[int, int] = {}
    for row, column in candidates[order].tolist():
        if row not in matched and column not in matched.values():
            matched[row] = column
    left, right = list(matched), list(matched.values())
    return torch.tensor(left, dtype=torch.int64), torch.tensor(right, dtype=torch.int64)


def _at_a_threshold(
    own: Detections, other: Detections, row: int, tolerance: Tolerance, thresholds: Thresholds
) -> bool:
    """Return whether rounding may explain that `other` lacks a box."""
    score = float(own.scores[row])
    if score - thresholds["score_threshold"] <= tolerance.score:
        return True
    full = len(other) == thresholds["detections_per_image"]
    if full and score - float(other.scores[-1]) <= tolerance.score:
        return True
    # A box of either side with about the same score or more, at the IoU threshold.
    for side in (own, other):
        difference = box_iou(own.boxes[row][None], side.boxes)[0] - thresholds["nms_threshold"]
        rivals = side.scores >= score - tolerance.score
        if not thresholds["class_agnostic_nms"]:
            rivals &= side.labels == own.labels[row]
        if bool((rivals & (difference.abs() <= _NMS_MARGIN)).any()):
            return True
    return False


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """Pick at most `count` items, evenly spread."""
    step = max(1.0, len(items) / max(1, count))
    return [items[int(i * step)] for i in range(min(count, len(items)))]


@contextmanager
def _sample_images(
    data: str | Path | Dataset | None,
    split: str | None,
    run: Path | None,
    detector: Detector,
    count: int,
) -> Iterator[tuple[Iterator[Tensor], str]]:
    """Yield images to compare on and their description: of the data, the run, or synthetic."""
    if data is None:
        dataset = _validation_split(run, detector.info)
    else:
        dataset = read_eval_dataset(data, split, info=detector.info)
    with tempfile.TemporaryDirectory() as folder:
        if dataset is not None:
            chosen = spread(dataset.images, count)
            description = f"{len(chosen)} of {dataset.source} ({dataset.split})"
        else:
            splits, size = {"val": count}, detector.image_size
            chosen = [
                *synthetic_dataset(Path(folder), splits=splits, image_size=size)["val"].images
            ]
            description = f"{count} synthetic images, as the model's data is not available"
        yield (read_image(image.path) for image in chosen), description


def _validation_split(run: Path | None, info: Mapping[str, Any]) -> Dataset | None:
    """Return the validation split of a run, if its images are available."""
    for folder in () if run is None else (run, run.parent):
        try:
            data = json.loads((folder / "run.json").read_text("utf-8"))["data"]
            dataset = read_eval_dataset(data, "val", info=info)
        except (OSError, ValueError, KeyError, TypeError, DataError, ConfigError):
            continue
        if all(Path(image.path).is_file() for image in dataset.images[:1]):
            return dataset
    return None
