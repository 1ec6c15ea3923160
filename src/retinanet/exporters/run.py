"""Export a trained model to a file for other engines and validate it against the network."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Unpack

from torch import Tensor

from retinanet import __version__
from retinanet.config import check_choice
from retinanet.data import read_dataset
from retinanet.data.dataset import Dataset
from retinanet.data.images import pad_batch, padding_colour
from retinanet.data.selection import labels_of
from retinanet.errors import ConfigError, DataError, ImageError, WeightsError, import_extra
from retinanet.exporters.graph import export_program, write_torch
from retinanet.exporters.onnx import write_onnx
from retinanet.exporters.openvino import write_openvino
from retinanet.exporters.validate import TOLERANCES, ExportReport, parts_of, spread, validate_file
from retinanet.files import write_atomic
from retinanet.inference.backends import Thresholds
from retinanet.inference.detector import Detector
from retinanet.inference.exported import DETECTIONS, FORMAT, FORMAT_VERSION, SCORES
from retinanet.inference.openvino_backend import CALIBRATION_IMAGES
from retinanet.inference.sources import find_sources
from retinanet.model.checkpoint import (
    Checkpoint,
    checkpoint_text,
    load_checkpoint,
    transfer_weights,
)
from retinanet.model.retinanet import RetinaNet

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2", "aotinductor": ".pt2"}
"""File suffix by target."""

PRECISIONS = ("float32", "fp16", "int8")

_PACKAGES = {
    "onnx": {"onnx": "onnx", "onnxscript": "onnx", "onnxruntime": "onnx"},
    "openvino": {"openvino": "openvino", "onnx": "onnx", "onnxscript": "onnx"},
    "int8": {"nncf": "openvino"},
}
"""Packages and their extras by target and precision."""

_AOT_MIN_SIZE = 128  # the coarsest level's stride: see export_program


class ExportOptions(Thresholds, total=False):
    """Settings built into the file."""

    image_size: int | None
    max_size: int | None
    form: str
    classes: Sequence[str] | None


def export(
    model: str | Path | Checkpoint,
    to: str,
    *,
    out: str | Path | None = None,
    precision: str = "float32",
    calibrate: Any = None,
    data: str | Path | Dataset | None = None,
    split: str | None = None,
    images: int = 20,
    tolerance: Iterable[str] = (),
    progress: Callable[[str], None] = lambda message: None,
    **options: Unpack[ExportOptions],
) -> ExportReport:
    """Export a model and validate the file against the network.

    The file takes uint8 images of any size and returns boxes in their pixels. It is written
    atomically, then read from disk and run; the comparison is in ``FILE.report.json``.

    Args:
        model: a run folder, a checkpoint, or a name, as in :func:`retinanet.load`.
        to: "onnx", "openvino", "torch" (``torch.export``) or "aotinductor" (compiled for this CPU).
        out: the file; None: ``model.onnx``, ``model.xml`` or ``model.pt2`` in the run folder.
        precision: "float32", or for OpenVINO "fp16" (weights, half the size) or "int8".
        calibrate: for int8: a data set (its training images) or images as
            :meth:`Detector.detect` takes them.
        data, split, images: what to compare on, as in :func:`validate_file`.
        tolerance: ``score=``, ``box=``, ``apart=``, ``ap=``: changes to the precision's
            :class:`~retinanet.exporters.validate.Tolerance`.
        progress: called with messages.
        options: built into the file: sizes and thresholds other than the model's; ``classes``:
            names of those to detect, as if the model had no others; ``form="scores"``: boxes and
            scores of all anchors, for an engine with its own NMS.

    Returns:
        The comparison; ``passed`` is False if the file is beyond the tolerance.

    Raises:
        ConfigError: an unknown option, or options that cannot be combined.
        WeightsError: the model cannot be used, or the file cannot be written.
        DataError, ImageError: the data cannot be read.
        MissingExtraError: a package that writes or runs the file is not installed.
    """
    _check_options(to, precision, calibrate, images)
    allowed = TOLERANCES[precision].override(tolerance)
    settings: dict[str, Any] = {**options}
    form = settings.pop("form", DETECTIONS)
    check_choice("form", form, (DETECTIONS, SCORES))
    checkpoint = model if isinstance(model, Checkpoint) else load_checkpoint(model)
    if (classes := settings.pop("classes", None)) is not None:
        checkpoint = select_checkpoint_classes(checkpoint, classes)
    detector = Detector(checkpoint, device="cpu", precision="float32", **settings)
    _check_detector(detector, to, form)
    run = None if isinstance(model, Checkpoint) else Path(model)
    file = _output_file(run, to, out)
    report_file = file.with_name(file.name + ".report.json")
    text = _metadata(checkpoint, detector, target=to, form=form, precision=precision)
    with _draft(file, report_file) as draft:
        progress("tracing the network")
        program = export_program(detector, to, form)
        progress("compiling, which takes minutes" if to == "aotinductor" else "writing the file")
        if to in ("torch", "aotinductor"):
            write_torch(program, draft, text, compiled=to == "aotinductor")
        else:
            write_onnx(program, draft.with_suffix(".onnx"), text)
        if to == "openvino":
            calibration = calibration_inputs(detector, calibrate) if precision == "int8" else None
            write_openvino(draft, text, precision, calibration)
    progress("comparing with the network")
    report = validate_file(
        file, detector, data=data, split=split, images=images, tolerance=allowed, run=run
    )
    write_atomic(report_file, json.dumps(report.to_dict(), indent=1) + "\n")
    return report


def select_checkpoint_classes(checkpoint: Checkpoint, names: Sequence[str]) -> Checkpoint:
    """Return a checkpoint whose class head has the rows of some classes only."""
    labels = labels_of(names, checkpoint.classes, "the model")
    classes = tuple(checkpoint.classes[label] for label in labels)
    model = RetinaNet(len(classes), checkpoint.model.spec)
    transfer_weights(model, classes, checkpoint)
    info = {**checkpoint.info}
    selection, detect = info.get("selection") or {}, {**info.get("detect", {})}
    if not selection.get("single_class"):
        info["selection"] = {**selection, "classes": list(classes)}
    scores = detect.get("score_thresholds") or {}
    detect["score_thresholds"] = {name: scores[name] for name in classes if name in scores}
    ids = tuple(checkpoint.category_ids[label] for label in labels)
    return replace(
        checkpoint,
        model=model.eval(),
        classes=classes,
        category_ids=ids,
        info={**info, "detect": detect},
    )


def _check_options(to: str, precision: str, calibrate: Any, images: int) -> None:
    """Check options and packages, before minutes of work."""
    check_choice("--to", to, tuple(SUFFIXES))
    check_choice("precision", precision, PRECISIONS)
    if precision != "float32" and to != "openvino":
        raise ConfigError(f"{precision} is for --to openvino, got {to}")
    if precision == "int8" and calibrate is None:
        raise ConfigError(
            "int8 needs calibration images like those to be detected in: "
            "give a data set or a folder (--calibrate)"
        )
    if calibrate is not None and precision != "int8":
        raise ConfigError("calibration images are for int8: give --int8, or no --calibrate")
    if images < 1:
        raise ConfigError(f"images must be 1 or more, got {images}")
    for package, extra in {**_PACKAGES.get(to, {}), **_PACKAGES.get(precision, {})}.items():
        import_extra(package, extra)


def _check_detector(detector: Detector, to: str, form: str) -> None:
    """Check that a file can do what the detector does before and after the network."""
    if to == "aotinductor" and detector.image_size <= _AOT_MIN_SIZE:
        raise ConfigError(
            f"AOTInductor needs an image_size over {_AOT_MIN_SIZE}, got {detector.image_size}; "
            "export without --aot"
        )
    settings = detector.eval_thresholds
    if settings["flip_tta"]:
        raise ConfigError(
            "an exported file runs once per image, but detect.flip_tta is on: "
            "give flip_tta=False (--no-flip-tta)"
        )
    if form == DETECTIONS and settings["nms"] != "hard":
        raise ConfigError(
            f"an exported file has hard NMS, but detect.nms is {settings['nms']}: give nms "
            '"hard" (--nms hard), or form "scores", boxes and scores of all anchors (--no-nms)'
        )


def _output_file(run: Path | None, to: str, out: str | Path | None) -> Path:
    suffix = SUFFIXES[to]
    if out is None:
        return (run if run is not None and run.is_dir() else Path()) / f"model{suffix}"
    file = Path(out)
    if file.suffix.lower() != suffix:
        raise ConfigError(f"a file for {to} ends in {suffix}, got {file}")
    return file


def _metadata(checkpoint: Checkpoint, detector: Detector, **values: str) -> str:
    """Return the text of a checkpoint with the settings that are built into the file."""
    by_class = {"score_thresholds": detector.thresholds["score_thresholds"]}
    info = {**checkpoint.info, "detect": {**detector.eval_thresholds, **by_class}}
    built_in = replace(
        checkpoint, info=info, image_size=detector.image_size, max_size=detector.max_size
    )
    text = {
        **checkpoint_text(built_in),
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "made_by": f"retinanet {__version__}",
        **values,
    }
    return json.dumps(text, ensure_ascii=False)


@contextmanager
def _draft(file: Path, report_file: Path) -> Iterator[Path]:
    """Yield a path in a temporary folder; files written there are renamed to `file` at the end."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as folder:
            draft = Path(folder) / file.name
            yield draft
            written = parts_of(draft)
            for path in written:
                with path.open("r+b") as opened:
                    os.fsync(opened.fileno())
            # Two files cannot be renamed at once: without the .xml, the .bin is not used.
            for old in (file, report_file):
                old.unlink(missing_ok=True)
            for path in reversed(written):
                path.replace(file.with_name(path.name))
    except OSError as error:
        raise WeightsError(f"cannot write {file}: {error}") from None


def calibration_inputs(detector: Detector, source: Any) -> Iterator[Tensor]:
    """Yield calibration images at the network's size; of a data set its training images."""
    split = detector.info.get("split") or {}
    options = {key: split[key] for key in ("seed", "val_fraction") if split.get(key) is not None}
    try:
        # Not the validation split, on which the file is compared.
        dataset = (
            source
            if isinstance(source, Dataset)
            else read_dataset(source, "train", extras=False, **options)
        )
        sources: list[Any] = [image.path for image in dataset.images]
    except (DataError, TypeError):
        sources = [*find_sources(source)]
    fill = padding_colour(detector.model.pixel_mean)
    for image in spread(sources, CALIBRATION_IMAGES):
        try:
            prepared = detector.prepare(image).pixels
        except ImageError:
            continue
        yield pad_batch([prepared], fill=fill)[0].contiguous()
