"""A trained model as a file for other engines, checked beside the model before it is done."""

from __future__ import annotations

import glob
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Unpack

import psutil
import torch
from torch import Tensor

from retinanet import __version__
from retinanet.config import check_choice
from retinanet.data import read_dataset
from retinanet.data.dataset import Dataset
from retinanet.data.images import pad_batch, padding_colour, read_image, resize_to
from retinanet.data.synthetic import synthetic_dataset
from retinanet.errors import (
    ConfigError,
    DataError,
    ImageError,
    MissingExtraError,
    WeightsError,
)
from retinanet.evaluation.run import evaluate, read_eval_dataset
from retinanet.exporters.check import Agreement, Tolerance, compare, spread
from retinanet.exporters.graph import (
    RawDetector,
    WholeDetector,
    network_size,
    network_size_of_tensors,
    suppress_by_engine,
    suppress_by_torchvision,
)
from retinanet.exporters.program import export_program
from retinanet.files import write_atomic
from retinanet.inference.backends import Thresholds
from retinanet.inference.detector import Detector, Prepared
from retinanet.inference.exported import (
    DETECTIONS,
    FORMAT,
    FORMAT_VERSION,
    SCORES,
    ExportedFile,
    ExportedNetwork,
    read_exported,
)
from retinanet.inference.openvino_backend import CALIBRATION_IMAGES
from retinanet.inference.sources import find_sources
from retinanet.model.checkpoint import Checkpoint, checkpoint_text, load_checkpoint
from retinanet.model.fused import fused_copy
from retinanet.structures import Detections

TARGETS = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}

TOLERANCES = {
    "float32": Tolerance(score=0.001, box=0.1, apart=0.002, ap=0.002),
    "fp16": Tolerance(score=0.01, box=1.0, apart=0.05, ap=0.005),
    "int8": Tolerance(score=0.1, box=10.0, apart=0.25, ap=0.02),
}
"""Of the file on images of the network's size, by precision.

Chosen by judgement, over what files of models for blood cells, nuclei and COCO showed (float16: 1.7
to 4.0% apart on four images, .0005 AP on BCCD); not bounds that were measured. Whether a file
beyond them is worse only AP tells.
"""

RESIZED = Tolerance(score=0.03, box=3.0, apart=0.05, ap=1.0)
"""What is added on whole images, which an engine resizes itself: a pixel may round otherwise."""

_AOT_SIDE = 128  # the coarsest level's stride: see export_program

Progress = Callable[[str], None]
"""Told what is being done."""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What was written, and how it compares with the network.

    Attributes:
        file: the file; OpenVINO's weights lie beside it in a ``.bin``.
        target, precision, form: as of :class:`retinanet.inference.exported.ExportedFile`.
        bytes: of the file, weights included.
        images: which were compared.
        tolerance: of images at the network's size.
        network_size: images that have the network's size, as ``retinanet detect`` gives them.
        whole: whole images, which the file resizes itself.
        ap, ap_file: of the network and of the file; None: no data was given.
        failures: what is beyond the tolerance, in words; empty: the file is good.
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
        """Whether nothing is beyond the tolerance."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "retinanet": __version__,
            "file": self.file.name,
            "target": self.target,
            "precision": self.precision,
            "form": self.form,
            "bytes": self.bytes,
            "images": self.images,
            "tolerance": asdict(self.tolerance),
            "network_size": self.network_size.to_dict(),
            "whole": self.whole.to_dict(),
            "ap": self.ap,
            "ap_file": self.ap_file,
            "failures": list(self.failures),
            "passed": self.passed,
        }


def export(
    model: str | Path | Checkpoint,
    to: str,
    *,
    out: str | Path | None = None,
    int8: bool = False,
    calibrate: Any = None,
    fp16: bool = False,
    nms: bool = True,
    aot: bool = False,
    data: str | Path | Dataset | None = None,
    split: str | None = None,
    images: int = 20,
    tolerance: Iterable[str] = (),
    image_size: int | None = None,
    max_size: int | None = None,
    progress: Progress | None = None,
    **thresholds: Unpack[Thresholds],
) -> ExportReport:
    """Write a model as a file that other engines run, and compare the file with the model.

    The file holds everything from the uint8 image to boxes in its pixels. It is written beside
    its place and renamed into it, then read again from there and run. ``FILE.report.json`` says
    what came of it.

    Args:
        model: a run folder, a checkpoint, or a name, as :func:`retinanet.load` takes it.
        to: "onnx", "openvino" or "torch".
        out: the file, with the suffix of `to`; None: ``model.onnx``, ``model.xml``, ``model.pt2``
            in the run folder.
        int8: OpenVINO: the network in int8, calibrated on `calibrate`.
        calibrate: a data set (its training images) or what :meth:`Detector.detect` takes.
        fp16: OpenVINO: weights in float16, computed with in float32: half the size.
        nms: False: boxes and scores of all anchors, for an engine that has its own NMS.
        aot: torch: compiled to machine code by AOTInductor, for this kind of processor.
        data: labelled images to compare on, and to judge both by AP.
        split: of `data`; None: as in :func:`retinanet.evaluation.evaluate`.
        images: how many are compared.
        tolerance: ``score=``, ``box=``, ``apart=``, ``ap=`` laid over that of the precision
            (:class:`retinanet.exporters.check.Tolerance`).
        image_size, max_size: as in :class:`Detector`; built into the file.
        progress: told what is being done.
        thresholds: laid over the model's own; built into the file.

    Returns:
        what was found; ``passed`` is False where the file is beyond the tolerance.

    Raises:
        ConfigError: an unknown option, or options that do not go together.
        WeightsError: the model cannot be used, or the file cannot be written.
        DataError, ImageError: the data cannot be read.
        MissingExtraError: what writes or runs the file is not installed.
    """
    check_choice("--to", to, tuple(TARGETS))
    precision = "int8" if int8 else "fp16" if fp16 else "float32"
    _check(to, int8, fp16, aot, calibrate, images)
    allowed = TOLERANCES[precision].laid_over(tolerance)
    _need(to, int8)
    say = progress or (lambda _: None)
    checkpoint = model if isinstance(model, Checkpoint) else load_checkpoint(model)
    detector = Detector(
        checkpoint,
        device="cpu",
        precision="float32",
        image_size=image_size,
        max_size=max_size,
        **thresholds,
    )
    if aot and detector.image_size <= _AOT_SIDE:
        raise ConfigError(
            f"AOTInductor takes an image_size over {_AOT_SIDE}, got {detector.image_size}: "
            "export without --aot"
        )
    file = _place(None if isinstance(model, Checkpoint) else Path(model), to, out)
    target = "aotinductor" if aot else to
    text = _text(checkpoint, detector, target, precision, DETECTIONS if nms else SCORES)
    with _draft(file) as draft:
        if to == "torch":
            _write_torch(draft, detector, text, nms=nms, aot=aot, say=say)
        else:
            _write_onnx(draft.with_suffix(".onnx"), detector, text, nms=nms, say=say)
        if to == "openvino":
            calibration = _calibration(detector, calibrate) if int8 else None
            _write_openvino(draft, text, int8, fp16, calibration, say)
    say("comparing it with the network")
    report = check_file(
        file,
        detector,
        data=data,
        split=split,
        images=images,
        tolerance=allowed,
        of=None if isinstance(model, Checkpoint) else Path(model),
        progress=progress,
    )
    write_atomic(report_file(file), json.dumps(report.to_dict(), indent=1) + "\n")
    return report


def report_file(file: Path) -> Path:
    """Where the report of an exported file is."""
    return file.with_name(file.name + ".report.json")


def check_file(
    file: str | Path,
    detector: Detector,
    *,
    data: str | Path | Dataset | None = None,
    split: str | None = None,
    images: int = 20,
    tolerance: Tolerance | None = None,
    of: Path | None = None,
    progress: Progress | None = None,
) -> ExportReport:
    """Run an exported file beside the network that it is of.

    Args:
        file: the exported file.
        detector: the network, in float32 on the CPU, with the file's sizes and thresholds.
        data, split, images: as in :func:`export`.
        tolerance: None: that of the file's precision.
        of: the run folder, whose own data serves where there is no `data`.
        progress: told what is being done.

    Raises:
        WeightsError: the file cannot be used.
        DataError, ImageError: the data cannot be read.
    """
    exported = read_exported(file)
    allowed = tolerance or TOLERANCES[exported.precision]
    own = Detector(exported, device="cpu")
    network = own.network
    assert isinstance(network, ExportedNetwork)
    whole: list[tuple[Detections, Detections]] = []
    same: list[tuple[Detections, Detections]] = []
    with _images(data, split, of, detector, images) as (chosen, described):
        for image in chosen:
            size = (image.shape[1], image.shape[2])
            resized, _ = resize_to(image, detector.image_size, detector.max_size)
            prepared = [Prepared(resized, size)]
            expected = detector.detect_prepared(prepared)[0]
            same.append((expected, own.detect_prepared(prepared)[0]))
            whole.append((expected, network.detect([image], **detector.thresholds)[0]))
    wider = allowed.widened(RESIZED)
    at_size = compare(same, allowed, detector.thresholds)
    at_whole = compare(whole, wider, detector.thresholds)
    failures = [
        f"{what}: {agreement.apart:.2%} of the boxes differ by more than {limit.score:g} in score "
        f"or {limit.box:g} pixels or have no match, over {limit.apart:.2%}: {_next(exported)}"
        for what, agreement, limit in (
            ("at the network's size", at_size, allowed),
            ("whole images", at_whole, wider),
        )
        if not agreement.apart <= limit.apart
    ]
    if at_size.matched == 0:
        failures.append(
            f"in {described} the network found {at_size.boxes} boxes, the file {at_size.found}, "
            "none of them the same: nothing was compared; give images with objects (--data)"
        )
    ap = ap_file = None
    if data is not None:
        (progress or (lambda _: None))("judging both")
        most = detector.thresholds["detections_per_image"]  # the file cannot give more
        ap, ap_file = (
            evaluate(either, data, split=split, detections_per_image=most).ap
            for either in (detector, own)
        )
        if not ap_file >= ap - allowed.ap:
            failures.append(f"AP {ap_file:.4f} is under {ap:.4f} by more than {allowed.ap:g}")
    return ExportReport(
        file=Path(file),
        target=exported.target,
        precision=exported.precision,
        form=exported.form,
        bytes=sum(one.stat().st_size for one in _files(Path(file))),
        images=described,
        tolerance=allowed,
        network_size=at_size,
        whole=at_whole,
        ap=ap,
        ap_file=ap_file,
        failures=tuple(failures),
    )


def _next(exported: ExportedFile) -> str:
    """What to do about a file that differs."""
    return "judge it by AP with --data" + (
        "" if exported.precision == "float32" else ", or export in float32"
    )


def _check(to: str, int8: bool, fp16: bool, aot: bool, calibrate: Any, images: int) -> None:
    if int8 and fp16:
        raise ConfigError("int8 and fp16 are two precisions: choose one")
    for name, given, home in (("int8", int8, "openvino"), ("fp16", fp16, "openvino")):
        if given and to != home:
            raise ConfigError(f"{name} is for --to {home}, got {to}")
    if aot and to != "torch":
        raise ConfigError(f"aot is for --to torch, got {to}")
    if int8 and calibrate is None:
        raise ConfigError(
            "int8 is calibrated on images of the kind that will be searched: "
            "give a data set or a folder (--calibrate)"
        )
    if calibrate is not None and not int8:
        raise ConfigError("images to calibrate on are for int8: give --int8, or no --calibrate")
    if images < 1:
        raise ConfigError(f"images to compare on are 1 or more, got {images}")


_PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino", "onnx", "onnxscript"),
    "torch": (),
}


def _need(to: str, int8: bool) -> None:
    """See that what writes and runs the file is there, before the work of minutes."""
    for package in (*_PACKAGES[to], *(("nncf",) if int8 else ())):
        try:
            import_module(package)
        except ImportError:
            extra = "openvino" if package in ("openvino", "nncf") else "onnx"
            raise MissingExtraError(package, extra) from None


def _place(model: Path | None, to: str, out: str | Path | None) -> Path:
    suffix = TARGETS[to]
    if out is None:
        return (model if model is not None and model.is_dir() else Path()) / f"model{suffix}"
    file = Path(out)
    if file.suffix.lower() != suffix:
        raise ConfigError(f"a file for {to} ends in {suffix}, got {file}")
    return file


def _text(
    checkpoint: Checkpoint, detector: Detector, target: str, precision: str, form: str
) -> str:
    """As of a checkpoint, with what is built into the file."""
    values = checkpoint_text(checkpoint)
    values["preprocessing"] = {
        **values["preprocessing"],
        "image_size": detector.image_size,
        "max_size": detector.max_size,
    }
    values["info"] = {**values["info"], "detect": dict(detector.thresholds)}
    values |= {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "made_by": f"retinanet {__version__}",
        "target": target,
        "form": form,
        "precision": precision,
    }
    return json.dumps(values, ensure_ascii=False)


@contextmanager
def _draft(file: Path) -> Iterator[Path]:
    """A file of this name in a folder beside; what is there at the end is renamed into place."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _clear(file)
        folder = Path(tempfile.mkdtemp(prefix=f".{file.name}.{os.getpid()}.", dir=file.parent))
    except OSError as error:
        raise WeightsError(f"cannot write {file}: {error}") from None
    try:
        draft = folder / file.name
        yield draft
        made = [one for one in _files(draft) if one.is_file()]
        for one in made:
            with one.open("r+b") as opened:
                os.fsync(opened.fileno())
        # Two files cannot be renamed at once: without the first, the second is nobody's.
        for old in (file, report_file(file)):
            old.unlink(missing_ok=True)
        for one in reversed(made):
            one.replace(file.with_name(one.name))
    except OSError as error:
        raise WeightsError(f"cannot write {file}: {error}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _clear(file: Path) -> None:
    """Remove what killed exports to this file left beside it: their process is gone."""
    for folder in file.parent.glob(f".{glob.escape(file.name)}.*.*"):
        process = folder.name.removeprefix(f".{file.name}.").split(".")[0]
        if process.isdecimal() and folder.is_dir() and not psutil.pid_exists(int(process)):
            shutil.rmtree(folder, ignore_errors=True)


def _files(file: Path) -> list[Path]:
    """A file and what belongs to it."""
    return [file, file.with_suffix(".bin")] if file.suffix == ".xml" else [file]


def _whole(detector: Detector, *, nms: bool, engine: bool, saved: bool) -> WholeDetector:
    kind = WholeDetector if nms else RawDetector
    return kind(
        fused_copy(detector.model, torch.float32, pack=False),
        image_size=detector.image_size,
        max_size=detector.max_size,
        thresholds=detector.thresholds,
        suppress=suppress_by_engine if engine else suppress_by_torchvision,
        size=network_size_of_tensors if saved else network_size,
    )


def _write_onnx(file: Path, detector: Detector, text: str, *, nms: bool, say: Progress) -> None:
    from retinanet.exporters.onnx_file import onnx_model

    say("following the network")
    program = export_program(
        _whole(detector, nms=nms, engine=True, saved=False), detector.image_size, detector.max_size
    )
    say("writing it as ONNX")
    values = json.loads(text)
    properties = {
        key: json.dumps(values[key], ensure_ascii=False)
        for key in ("classes", "category_ids", "preprocessing")
    }
    properties["thresholds"] = json.dumps(values["info"]["detect"])
    model = onnx_model(program, DETECTIONS if nms else SCORES, text, properties)
    file.write_bytes(model.SerializeToString())


def _write_openvino(
    draft: Path,
    text: str,
    int8: bool,
    fp16: bool,
    calibration: Iterable[Tensor] | None,
    say: Progress,
) -> None:
    from retinanet.exporters.openvino_file import openvino_model

    say("calibrating" if int8 else "writing it for OpenVINO")
    onnx_file = draft.with_suffix(".onnx")
    model = openvino_model(onnx_file, text, int8=int8, calibration=calibration)
    import openvino

    openvino.save_model(model, draft, compress_to_fp16=fp16)
    onnx_file.unlink()


def _write_torch(
    file: Path, detector: Detector, text: str, *, nms: bool, aot: bool, say: Progress
) -> None:
    from retinanet.exporters.torch_file import compile_program, save_program

    say("following the network")
    program = export_program(
        _whole(detector, nms=nms, engine=False, saved=not aot),
        detector.image_size,
        detector.max_size,
    )
    say("compiling; minutes" if aot else "writing it")
    (compile_program if aot else save_program)(program, file, text)


def _calibration(detector: Detector, given: Any) -> Iterator[Tensor]:
    """Images as the network gets them; of a data set its training images."""
    sources: Sequence[Any]
    try:
        # Not the images that check_file() will judge by: what was held out of training.
        split = {
            key: value
            for key in ("seed", "val_fraction")
            if (value := _split(detector).get(key)) is not None
        }
        dataset = (
            given
            if isinstance(given, Dataset)
            else read_dataset(given, "train", extras=False, **split)
        )
        sources = [image.path for image in dataset.images]
    except (DataError, TypeError):
        sources = find_sources(given)
    fill = padding_colour(detector.model.pixel_mean)
    for source in spread(sources, CALIBRATION_IMAGES):
        try:
            prepared = detector.prepare(source).pixels
        except ImageError:
            continue  # as good as not given
        yield pad_batch([prepared], fill=fill)[0].contiguous()


def _split(detector: Detector) -> dict[str, Any]:
    """How the data that the model was trained on were divided, where they came undivided."""
    return dict(detector.info.get("split") or {})


@contextmanager
def _images(
    data: str | Path | Dataset | None,
    split: str | None,
    of: Path | None,
    detector: Detector,
    count: int,
) -> Iterator[tuple[Iterator[Tensor], str]]:
    """Whole images to compare on, and what they are."""
    dataset: Dataset | None = None
    if data is not None:
        dataset = read_eval_dataset(data, split, info=detector.info)
    else:
        dataset = _own_data(of, detector.info)
    if dataset is not None:
        chosen = spread(dataset.images, count)
        described = f"{len(chosen)} of {dataset.source} ({dataset.split})"
        yield _read([image.path for image in chosen]), described
        return
    with tempfile.TemporaryDirectory() as folder:
        drawn = synthetic_dataset(
            Path(folder), splits={"val": count}, image_size=detector.image_size
        )["val"]
        described = f"{count} synthetic images, as there is no data of the model's here"
        yield _read([image.path for image in drawn.images]), described


def _read(paths: Sequence[Any]) -> Iterator[Tensor]:
    return (read_image(path) for path in paths)


def _own_data(of: Path | None, info: dict[str, Any]) -> Dataset | None:
    """What a run was validated on, if it is there."""
    for folder in () if of is None else (of, of.parent):
        try:
            data = json.loads((folder / "run.json").read_text("utf-8"))["data"]
            found = read_eval_dataset(data, "val", info=info)
        except (OSError, ValueError, KeyError, TypeError, DataError, ConfigError):
            continue
        if all(Path(image.path).is_file() for image in found.images[:1]):
            return found
    return None
