"""Networks in exported files: ``.onnx``, OpenVINO's ``.xml`` and torch's ``.pt2``.

Such a file contains the whole detector (:mod:`retinanet.exporters`): image in, boxes out. Images
are resized before, as for every network; the file's own resizing then leaves them as they are.

An ONNX or OpenVINO file is data. A ``.pt2`` is a program, and a file of AOTInductor is machine
code: opening it runs its author's code.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import torch
from torch import Tensor

from retinanet.anchors import feature_sizes
from retinanet.config import build_recipe
from retinanet.data.image_files import network_size
from retinanet.errors import ConfigError, MissingExtraError, WeightsError, import_extra
from retinanet.inference.backends import (
    Thresholds,
    group_by,
    merge_thresholds,
    network_settings,
)
from retinanet.model.checkpoint import parse_text
from retinanet.model.precision import choose_device
from retinanet.model.retinanet import RetinaNet
from retinanet.postprocess import postprocess
from retinanet.structures import Detections, Outputs

FORMAT = "retinanet export"
FORMAT_VERSION = 1
TEXT_KEY = "retinanet"
"""Key of the metadata: a metadata property (ONNX), an rt_info (OpenVINO), ``extra/retinanet``."""

DETECTIONS, SCORES = "detections", "scores"
"""Forms: with post-processing; or boxes and scores of all anchors, for an external NMS."""

SUFFIXES = (".onnx", ".xml", ".pt2")

_TARGETS = {".onnx": ("onnx",), ".xml": ("openvino",), ".pt2": ("torch", "aotinductor")}
_RUNNERS = {
    "onnx": "ONNX Runtime",
    "openvino": "OpenVINO",
    "torch": "torch.export",
    "aotinductor": "AOTInductor",
}
_Run = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class ExportedFile:
    """Metadata of an exported file; attributes that a Checkpoint has too mean the same.

    Attributes:
        path: the file.
        target: "onnx", "openvino", "torch" or "aotinductor".
        form: :data:`DETECTIONS` or :data:`SCORES`.
        precision: "float32", "fp16" or "int8".
        thresholds: the built-in ones.
        strides: pixels of the network's input per cell, by level.
        per_cell: anchors per cell.
    """

    path: Path
    target: str
    form: str
    precision: str
    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    image_size: int
    max_size: int
    thresholds: Thresholds
    strides: tuple[int, ...]
    per_cell: int
    info: dict[str, Any]


def is_exported(path: Any) -> bool:
    """Return whether `path` names an exported file, by its suffix."""
    return isinstance(path, str | Path) and Path(path).suffix.lower() in SUFFIXES


def read_exported(path: str | Path) -> ExportedFile:
    """Read the metadata of an exported file, without loading the network."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"there is no file {path}: give an exported {', '.join(SUFFIXES)}")
    suffix = path.suffix.lower()
    text = {".onnx": _onnx_text, ".xml": _openvino_text, ".pt2": _torch_text}[suffix](path)
    if not text:
        _reject(path, f"it has no text {TEXT_KEY!r}: it is not of retinanet export")
    try:
        values = json.loads(text)
    except ValueError as error:
        _reject(path, f"its text is not JSON: {error}")
    checked = parse_text(values, path, FORMAT, FORMAT_VERSION)
    spec = checked.spec
    known = {
        "target": _TARGETS[suffix],
        "form": (DETECTIONS, SCORES),
        "precision": ("float32", "fp16", "int8"),
    }
    for key, choices in known.items():
        if values.get(key) not in choices:
            _reject(path, f"{key} is {values.get(key)!r}, not one of {', '.join(choices)}")
    try:
        detect = build_recipe({"detect": checked.info.get("detect")}, str(path)).detect
    except ConfigError as error:
        _reject(path, f"info.detect has no thresholds: {error}")
    return ExportedFile(
        path=path,
        **{key: values[key] for key in known},
        classes=checked.classes,
        category_ids=checked.category_ids,
        image_size=checked.image_size,
        max_size=checked.max_size,
        thresholds=cast(Thresholds, detect.model_dump()),
        strides=(4,) * spec.p2 + (8, 16, 32, 64, 128),
        per_cell=len(spec.scales) * len(spec.aspect_ratios),
        info=checked.info,
    )


def choose_exported_device(file: ExportedFile, name: str | torch.device) -> torch.device:
    """Choose the device as :func:`retinanet.model.precision.choose_device`, for an exported file.

    ``auto`` is CUDA for ONNX where torch and ONNX Runtime both have it, else the CPU.
    """
    device = choose_device(name)
    if device.type == "cpu":
        return device
    if file.target == "onnx" and device.type == "cuda":
        onnxruntime = import_extra("onnxruntime", "onnx")
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            return device
        problem = "this onnxruntime runs {} on the CPU alone, the device is {}: "
        remedy = "pip install onnxruntime-gpu, or give --device cpu"
    else:
        problem = "{} runs on the CPU, the device is {}: "
        remedy = "give --device cpu, or the run that it was exported from"
    if name == "auto":
        return torch.device("cpu")
    raise ConfigError(problem.format(file.path.name, device) + remedy)


def check_built_in(file: ExportedFile, calibrate: Any, **options: int | str) -> None:
    """Check that ``precision``, ``backend`` and sizes are those that were built in, or auto."""
    for key, wanted in options.items():
        built = file.target if key == "backend" else getattr(file, key)
        if wanted not in ("auto", built):
            raise ConfigError(
                f"{file.path.name} was exported with {key} {built}, got {wanted}: "
                "leave it out, or export again"
            )
    if calibrate is not None:
        raise ConfigError(
            f"{file.path.name} is exported already: calibrate where it is made "
            "(retinanet export --int8 --calibrate)"
        )


class ExportedNetwork:
    """The detector in an exported file, ready for inference. A copy or pickle loads the file again.

    Attributes:
        file: its metadata.
        device: where it runs.
        precision: "float32", "fp16" (of the weights only, on a CPU) or "int8".
        backend: "onnx", "openvino", "torch" or "aotinductor".
        description: precision and backend in a few words.
    """

    def __init__(self, file: ExportedFile, device: torch.device) -> None:
        """Load the network; it uses as many threads as torch.

        Args:
            file: of :func:`read_exported`.
            device: of :func:`choose_exported_device`.
        """
        self.file = file
        self.device = device
        self.precision = file.precision
        self.backend = file.target
        runner = _RUNNERS[file.target]
        self.description = f"{runner} on {device.type}, {file.precision}, {file.path.name}"
        if not file.path.is_file():
            _reject(file.path, "the exported file is missing; export it again")
        if file.target == "onnx":
            self._run = _onnx_run(file.path, device)
        elif file.target == "openvino":
            self._run = _openvino_run(file.path)
        else:
            self._run = _torch_run(file.path, file.target)

    def __reduce__(self) -> tuple[Any, ...]:
        return ExportedNetwork, (self.file, self.device)

    def __call__(self, images: Tensor) -> NoReturn:
        """Raise: an exported file gives boxes, not the network's outputs."""
        raise ConfigError(
            f"{self.file.path.name} gives boxes, not the network's own outputs: "
            "give the run that it was exported from"
        )

    def check(self, thresholds: Thresholds) -> None:
        """Check that the file supports `thresholds`."""
        if thresholds.get("flip_tta"):
            raise ConfigError(
                f"{self.file.path.name} runs once per image, got flip_tta: leave it out, or give "
                "the run that it was exported from"
            )
        if self.file.form == SCORES:
            return
        lowest = min(thresholds.get("score_thresholds", {}).values(), default=1.0)
        for key, built in cast(dict[str, Any], self.file.thresholds).items():
            if key == "score_thresholds":
                continue
            wanted: Any = thresholds.get(key, built)
            fits, allowed = wanted == built, ""
            if key == "score_threshold":
                wanted = min(wanted, lowest)
                fits, allowed = wanted >= built, " or more"
            elif key == "detections_per_image":
                fits, allowed = wanted <= built, " or less"
            if not fits:
                raise ConfigError(
                    f"{self.file.path.name} was exported with {key} {built}, which allows "
                    f"{built}{allowed}, got {wanted}: export it again with {wanted}"
                )

    @torch.inference_mode()
    def detect(self, images: Sequence[Tensor], **thresholds: Any) -> list[Detections]:
        """Detect in images of any sizes; boxes are in pixels of these images.

        Args:
            images: (3, H, W) uint8 RGB; those of the same size run as one batch.
            thresholds: override the built-in ones.
        """
        used = merge_thresholds(self.file.thresholds, thresholds)
        self.check(used)
        settings = network_settings(used, self.file.classes)
        del settings["flip_tta"]
        read = self._select if self.file.form == DETECTIONS else self._postprocess
        found: dict[int, Detections] = {}
        for indices in group_by(images, lambda image: image.shape):
            batch = torch.stack([images[i] for i in indices]).contiguous()
            outputs = self._run(batch)
            for row, index in enumerate(indices):
                own = [part[row].cpu() for part in outputs]
                found[index] = read(own, batch.shape[2:], settings)
        return [found[index] for index in range(len(images))]

    def _select(
        self, parts: list[Tensor], size: Sequence[int], settings: Mapping[str, Any]
    ) -> Detections:
        boxes, scores, labels, count = parts
        by_label = settings.get("class_thresholds")
        low: Any = settings["score_threshold"]
        if by_label is not None:
            low = torch.tensor(by_label)[labels[: int(count)]]
        kept = (scores[: int(count)] > low).nonzero()[: settings["detections_per_image"], 0]
        # Copies: the output may be the engine's own memory, and is mostly padding.
        return Detections(boxes[kept], scores[kept], labels[kept])

    def _postprocess(
        self, parts: list[Tensor], size: Sequence[int], settings: Mapping[str, Any]
    ) -> Detections:
        """Post-process as for every network, with the boxes as its anchors."""
        boxes, scores = parts
        height, width = size
        sides = network_size(height, width, self.file.image_size, self.file.max_size)
        divisor = RetinaNet.size_divisor
        padded = (-(-side // divisor) * divisor for side in sides)
        cells = feature_sizes(self.file.strides, *padded)
        counts = [rows * columns * self.file.per_cell for rows, columns in cells]
        # The file's scores are calibrated.
        logits = torch.split(scores.logit() * self.file.thresholds["temperature"], counts)
        return postprocess(
            Outputs(
                tuple(level.t()[None, :, :, None] for level in logits),
                tuple(level.new_zeros(1, 4, len(level), 1) for level in logits),
            ),
            torch.split(boxes, counts),
            torch.tensor([[height, width]]),
            num_classes=len(self.file.classes),
            **settings,
        )[0]


def _onnx_session(path: Path, providers: list[Any], *, optimize: bool) -> Any:
    onnxruntime = import_extra("onnxruntime", "onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimize:
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # own types and RuntimeError for a damaged file
        _reject(path, f"it cannot be read as ONNX: {error}")


def _onnx_text(path: Path) -> str:
    session = _onnx_session(path, ["CPUExecutionProvider"], optimize=False)
    return str(session.get_modelmeta().custom_metadata_map.get(TEXT_KEY, ""))


def _onnx_run(path: Path, device: torch.device) -> _Run:
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index or 0}))
    session = _onnx_session(path, providers, optimize=True)
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Sequence[Tensor]:
        return [torch.from_numpy(output) for output in session.run(None, {name: images.numpy()})]

    return run


def _openvino_model(path: Path) -> Any:
    from retinanet.inference.openvino_backend import openvino_core

    try:
        return openvino_core().read_model(path)
    except MissingExtraError:
        raise
    except Exception as error:
        _reject(path, f"OpenVINO cannot read it (it needs the .bin beside it): {error}")


def _openvino_text(path: Path) -> str:
    model = _openvino_model(path)
    return str(model.get_rt_info([TEXT_KEY]).astype(str)) if model.has_rt_info([TEXT_KEY]) else ""


def _openvino_run(path: Path) -> _Run:
    from retinanet.inference.openvino_backend import compile_on_cpu

    # Below float32, boxes would be pixels off; int8 convolutions stay int8.
    compiled = compile_on_cpu(_openvino_model(path))

    def run(images: Tensor) -> Sequence[Tensor]:
        # A request per call: several threads may call.
        results = compiled.create_infer_request().infer([images.numpy()])
        return [torch.from_numpy(np.array(results[output])) for output in compiled.outputs]

    return run


def _torch_text(path: Path) -> str:
    """Read the text without running the file's code."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(f"/extra/{TEXT_KEY}"):
                    return archive.read(name).decode("utf-8")
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        _reject(path, f"it is no package of torch: {error}")
    return ""


def _torch_run(path: Path, target: str) -> _Run:
    import torchvision  # noqa: F401  the file calls its nms by name

    try:
        if target == "torch":
            return cast(_Run, torch.export.load(path).module())
        return cast(_Run, torch._inductor.aoti_load_package(str(path)))
    except Exception as error:
        _reject(path, f"{_RUNNERS[target]} cannot load it: {error}")


def _reject(path: Path, why: str) -> NoReturn:
    raise WeightsError(f"{path}: {' '.join(why.split())}") from None
