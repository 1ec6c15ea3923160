"""Choose the kind of NMS, the temperature and score thresholds of a model on labelled images.

The weights stay as they are. The settings are those of ``detect`` in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch

from retinanet.data.dataset import Dataset
from retinanet.data.images import padding_colour
from retinanet.data.loading import default_workers
from retinanet.data.memory import Reader
from retinanet.errors import ConfigError, DataError
from retinanet.evaluation.coco import evaluate_detections, score_bins
from retinanet.evaluation.metrics import CalibrationBin, Metrics
from retinanet.evaluation.predict import run_batches
from retinanet.evaluation.results import Results
from retinanet.evaluation.run import (
    EvaluationOptions,
    RunOptions,
    match_classes,
    open_detector,
    raised_limits,
    read_eval_dataset,
    run_options,
)
from retinanet.inference.backends import Network, network_settings, to_original
from retinanet.inference.detector import Detector
from retinanet.inference.tiles import choose_tiling
from retinanet.model.checkpoint import Checkpoint, find_checkpoint, load_checkpoint, update_info
from retinanet.model.retinanet import output_anchors
from retinanet.postprocess import (
    Candidates,
    calibrate_scores,
    find_candidates,
    merge_candidates,
    mirror_images,
)
from retinanet.structures import Batch, Detections

MIN_GAIN = 0.003
"""AP that another NMS must gain on all images, without a loss on either half of them."""

MIN_OBJECTS = 5
"""Objects of a class in validation; a class with fewer has the threshold of all classes."""

NMS_GRID: tuple[dict[str, Any], ...] = (
    *({"nms": "hard", "nms_threshold": threshold} for threshold in (0.4, 0.5, 0.6, 0.7)),
    *({"nms": "soft", "nms_sigma": sigma} for sigma in (0.3, 0.5, 0.7)),
    *({"nms": "wbf", "nms_threshold": threshold} for threshold in (0.5, 0.6, 0.7)),
)
"""Settings of NMS that are compared."""

NMS_KINDS = ("hard", "soft", "wbf")

_NMS = frozenset(("nms", "nms_threshold", "nms_sigma"))
_CALIBRATION = frozenset(("temperature", "score_threshold"))
_TEMPERATURES = np.geomspace(0.25, 4, 401)  # steps of .7%
_SCORE_BINS = 1000  # a score is known to .001 then, by far enough for a temperature


@dataclass(frozen=True, slots=True)
class Tuning:
    """Settings chosen on labelled images.

    Attributes:
        settings: of ``detect``: ``nms``, ``nms_threshold``, ``nms_sigma``, ``temperature``,
            ``score_threshold``, ``score_thresholds``.
        ap: AP of each setting of NMS that was tried, by a name such as ``wbf .6``.
        before, after: metrics without and with the settings.
    """

    settings: Mapping[str, Any]
    ap: Mapping[str, float]
    before: Metrics
    after: Metrics

    def describe(self) -> str:
        """Describe the choice on one line."""
        chosen = nms_name(self.settings)
        scores = [f"{name} {low:.2f}" for name, low in self.settings["score_thresholds"].items()]
        error = self.after.calibration.expected_error
        return (
            f"NMS {chosen} (AP {self.before.ap:.3f}, now {self.after.ap:.3f}), temperature "
            f"{self.settings['temperature']:.3g} (calibration error {error:.3f}), "
            "score thresholds " + (", ".join(scores) or "none: nothing was detected")
        )


def tune(
    model: str | Path | Detector | Checkpoint,
    data: str | Path | Reader | Dataset,
    *,
    split: str | None = None,
    keep: Collection[str] = (),
    kinds: Collection[str] = NMS_KINDS,
    **options: Unpack[EvaluationOptions],
) -> Tuning:
    """Choose NMS, temperature and score thresholds for a model.

    The network runs once per image; every setting is then applied to the same candidates.

    1. NMS: the setting of :data:`NMS_GRID` with the highest AP, if it gains more than
       :data:`MIN_GAIN` over the model's on all images and loses on neither half of them (images
       at even and odd positions).
    2. Temperature (Guo et al. 2017, Sec. 4.2): that of the lowest negative log-likelihood of the
       detections being correct at IoU .50, if it lowers the expected calibration error too. The
       order of the scores stays, and ``score_threshold`` is scaled along: AP stays.
    3. Score thresholds (:func:`f1_thresholds`).

    Args:
        model, data, split, options: as in :func:`retinanet.evaluation.evaluate`; no exported file,
            no results and no tiles.
        keep: names of settings of ``detect`` that stay the model's. NMS is chosen as a whole, or
            kept if it has one of them, and so are temperature and ``score_threshold``.
        kinds: of NMS to choose from.

    Raises:
        ConfigError: the model is an exported file, whose post-processing is fixed, or was trained
            on tiles: candidates of whole images are other ones than those of tiles.
        DataError: the data cannot be read, or has no object.
        WeightsError: as :func:`retinanet.evaluation.evaluate`.
    """
    detector = open_detector(model, options)
    if not isinstance(detector.network, Network):
        raise ConfigError(
            f"post-processing of an exported file is fixed: {model}; tune the run that it was "
            "exported from, and export again"
        )
    tiling = options.get("tile"), options.get("overlap")
    if choose_tiling(*tiling, detector.image_size, detector.info)[0] is not None:
        raise ConfigError(
            f"post-processing is chosen on whole images, but the model was trained on tiles "
            f"(data.tile), or a tile is given: {model}; evaluate it without tuning"
        )
    dataset = read_eval_dataset(data, split, info=detector.info)
    if not any(image.has_object for image in dataset.images):
        raise DataError(f"{dataset.source}: no object to tune the detection on; give another split")
    limit, raised = raised_limits(dataset, None, detector)
    base = _uncalibrated({**detector.eval_thresholds, **raised})
    store = _Candidates(detector, dataset, base, run_options(options))
    before = store.metrics(base, limit)
    grid = [row for row in NMS_GRID if row["nms"] in kinds and _NMS.isdisjoint(keep)]
    nms, ap = _choose_nms(store, base, before.ap, limit, grid)
    chosen = {**base, **nms}
    after = store.metrics(chosen, limit) if nms else before
    own = None if _CALIBRATION.isdisjoint(keep) else detector.eval_thresholds
    chosen, after = _choose_calibration(store, chosen, after, limit, own)
    settings = {
        **{name: chosen[name] for name in sorted(_NMS | _CALIBRATION)},
        "score_thresholds": f1_thresholds(after, detector.classes),
    }
    return Tuning(settings, ap, before, after)


def store_tuning(model: str | Path, tuning: Tuning) -> Path:
    """Write the settings into the ``model.json`` of a run or checkpoint."""
    folder = find_checkpoint(Path(model))
    info = load_checkpoint(folder).info
    update_info(folder, {**info, "detect": {**info.get("detect", {}), **tuning.settings}})
    return folder


def nms_name(settings: Mapping[str, Any]) -> str:
    """Name a setting of NMS: ``hard .5``, or ``soft sigma .5``."""
    key, word = ("nms_sigma", " sigma") if settings["nms"] == "soft" else ("nms_threshold", "")
    return f"{settings['nms']}{word} {settings[key]:g}".replace(" 0.", " .")


def f1_thresholds(metrics: Metrics, classes: Sequence[str]) -> dict[str, float]:
    """Return the score threshold of the best F1 at IoU .50 per class.

    A class with fewer than :data:`MIN_OBJECTS` objects has the best threshold of all classes
    together (:attr:`Metrics.best_score`). Thresholds are exclusive: just under the score.

    Args:
        metrics: of an evaluation.
        classes: of the model.
    """
    rows = {row.name: row for row in metrics.per_class}
    thresholds = {}
    for name in classes:
        row = rows.get(name)
        score = metrics.best_score
        if row and row.objects >= MIN_OBJECTS and not math.isnan(row.best_score):
            score = row.best_score
        if not math.isnan(score):
            thresholds[name] = max(0, math.ceil(score * 10_000) - 1) / 10_000
    return thresholds


def fit_temperature(bins: Sequence[CalibrationBin]) -> float:
    """Fit a temperature to scores and precision (Guo et al. 2017, Sec. 4.2).

    Args:
        bins: many narrow ones.

    Returns:
        The temperature in [.25, 4] of the lowest negative log-likelihood; 1 if no detection is
        correct, for which the lowest would be the lower limit, and no score over a threshold.
    """
    filled = [b for b in bins if b.detections]
    if not any(b.precision for b in filled):
        return 1.0
    weight, precision, score = (
        np.array([getattr(b, name) for b in filled])
        for name in ("detections", "precision", "score")
    )
    score = score.clip(1e-6, 1 - 1e-6)
    scaled = (np.log(score / (1 - score)) / _TEMPERATURES[:, None]).astype(np.float64)
    # -log(sigmoid(x)) = log(1 + exp(-x)), of the correct detections and, negated, of the others.
    losses = precision * np.logaddexp(0, -scaled) + (1 - precision) * np.logaddexp(0, scaled)
    return float(_TEMPERATURES[(losses @ weight).argmin()])


def _choose_nms(
    store: _Candidates,
    base: Mapping[str, Any],
    base_ap: float,
    limit: int,
    grid: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the best setting of NMS, empty for that of `base`, and the AP of all."""

    def ap(settings: Mapping[str, Any], part: slice = slice(None)) -> float:
        results = store.results({**base, **settings}, part)
        return evaluate_detections(
            results.dataset, results, max_detections=limit, analysis=False
        ).ap

    found = {nms_name(base): base_ap}
    best: Mapping[str, Any] = {}
    for settings in grid:
        name = nms_name({**base, **settings})
        if name not in found:
            found[name] = ap(settings)
            if found[name] > found[nms_name({**base, **best})]:
                best = settings
    gain = found[nms_name({**base, **best})] - base_ap
    halves = (slice(0, None, 2), slice(1, None, 2))
    if not gain > MIN_GAIN or any(ap(best, half) < ap({}, half) for half in halves):
        best = {}
    return dict(best), found


def _choose_calibration(
    store: _Candidates,
    settings: Mapping[str, Any],
    before: Metrics,
    limit: int,
    own: Mapping[str, Any] | None,
) -> tuple[dict[str, Any], Metrics]:
    """Return the settings with temperature and ``score_threshold``, and their metrics."""
    if own is not None:
        kept = {**settings, **{name: own[name] for name in _CALIBRATION}}
        return kept, store.metrics(kept, limit)
    temperature = fit_temperature(score_bins(store.results(settings), _SCORE_BINS, limit))
    scaled = _scaled(settings["score_threshold"], temperature)
    calibrated = {**settings, "temperature": temperature, "score_threshold": scaled}
    after = store.metrics(calibrated, limit)
    if after.calibration.expected_error < before.calibration.expected_error:
        return calibrated, after
    return dict(settings), before


def _uncalibrated(thresholds: Mapping[str, Any]) -> dict[str, Any]:
    """Return thresholds without the temperature, for the same candidates."""
    score = _scaled(thresholds["score_threshold"], 1 / thresholds["temperature"])
    return {**thresholds, "temperature": 1.0, "score_threshold": score}


def _scaled(score: float, temperature: float) -> float:
    """Return the calibrated score; 0 stays."""
    return float(calibrate_scores(torch.tensor(score, dtype=torch.float64), temperature))


class _Candidates:
    """The candidates of a data set, on the CPU, to which every kind of NMS can be applied."""

    def __init__(
        self,
        detector: Detector,
        dataset: Dataset,
        thresholds: Mapping[str, Any],
        options: RunOptions,
    ) -> None:
        """Run the network once on each image."""
        network = detector.network
        assert isinstance(network, Network)
        self._num_classes = network.model.num_classes
        self._label_map = match_classes(detector.classes, dataset)
        # Fusion needs the most candidates.
        settings = network_settings({**thresholds, "nms": "wbf"}, detector.classes)
        flip_tta = settings.pop("flip_tta")
        self._found: list[tuple[Batch, Candidates]] = []  # the batches without pixels

        def detect(batch: Batch) -> list[Detections]:
            outputs = network(batch.images)
            mirrored = network(mirror_images(batch.images, batch.sizes)) if flip_tta else None
            candidates = find_candidates(
                outputs,
                output_anchors(network.model, outputs),
                batch.sizes,
                num_classes=self._num_classes,
                selected=detector.selected,
                mirrored=mirrored,
                **settings,
            )
            candidates = Candidates(*(values.cpu() for values in candidates))
            self._found.append((replace(batch, images=torch.empty(0)), candidates))
            nothing = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long())
            return [nothing] * len(batch.indices)

        workers = options.get("workers")
        predictions = run_batches(
            detect,
            dataset,
            device=network.device,
            fill=padding_colour(network.model.pixel_mean),
            image_size=detector.image_size,
            max_size=detector.max_size,
            batch_size=options.get("batch_size", 4),
            workers=default_workers() if workers is None else workers,
            progress=options.get("progress"),
        )
        self.dataset = predictions.results.dataset
        read = sorted(index for batch, _ in self._found for index in batch.indices.tolist())
        self._positions = {index: position for position, index in enumerate(read)}

    def metrics(self, thresholds: Mapping[str, Any], limit: int) -> Metrics:
        """Evaluate thresholds; `limit` detections per class and image count."""
        return evaluate_detections(
            self.dataset,
            self.results(thresholds),
            max_detections=limit,
            detections_per_image=thresholds["detections_per_image"],
        )

    def results(self, thresholds: Mapping[str, Any], step: slice = slice(None)) -> Results:
        """Apply NMS."""
        settings = network_settings(thresholds, ())
        del settings["flip_tta"]
        lowest = _scaled(settings["score_threshold"], 1 / settings["temperature"])
        images = self.dataset.images
        positions = {image: i for i, image in enumerate(range(len(images))[step])}
        results = Results(replace(self.dataset, images=images[step]), self._label_map)
        for batch, candidates in self._found:
            if settings["nms"] != "wbf":
                high = candidates.scores > lowest
                candidates = Candidates(*(values[high] for values in candidates))
            detections = merge_candidates(
                candidates,
                num_images=len(batch.indices),
                num_classes=self._num_classes,
                **settings,
            )
            for index, own, size, original in zip(
                batch.indices.tolist(),
                detections,
                batch.sizes.tolist(),
                batch.original_sizes.tolist(),
                strict=True,
            ):
                if (position := positions.get(self._positions[index])) is not None:
                    boxes = to_original(own.boxes, size, original)
                    results.add(position, Detections(boxes, own.scores, own.labels))
        return results
