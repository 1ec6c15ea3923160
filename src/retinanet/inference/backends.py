"""Networks for inference: precision, backend and threads; from a batch of images to detections.

Three backends give the same outputs: ``torch`` (:mod:`retinanet.model.fused`), ``compile`` (through
torch.compile; compiling takes half a minute per image size) and ``openvino`` (an extra, with int8).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal, TypeVar, Unpack, cast, get_args

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from retinanet.config import build_recipe, check_choice, nearest
from retinanet.errors import ConfigError
from retinanet.model.fused import can_pack, fused_copy
from retinanet.model.precision import NAMES, Precision, autocast, choose_dtype
from retinanet.model.retinanet import RetinaNet, output_anchors
from retinanet.postprocess import PostprocessSettings, mirror_images, postprocess
from retinanet.structures import Detections, Outputs

Backend = Literal["auto", "torch", "compile", "openvino"]
"""Backend of the network; ``auto`` is torch, and OpenVINO for int8."""

Sides = Tensor | tuple[int, int] | list[int]
"""Height and width."""

DETECTION_SCORE = 0.3
"""Minimum score of a detection in a class without an own threshold; evaluation uses .05."""

_MAX_WORKERS = 4  # threads that run a network; each has the feature maps of a batch in memory

_setting_cores = threading.Lock()

_T = TypeVar("_T")
_R = TypeVar("_R")


class Thresholds(PostprocessSettings, total=False):
    """Post-processing settings; defaults are those of :class:`retinanet.config.DetectConfig`.

    Attributes:
        score_thresholds: by class name; other classes have ``score_threshold``.
        flip_tta: run the network on the mirrored image too.
    """

    score_thresholds: Mapping[str, float]
    flip_tta: bool


def merge_thresholds(*layers: Any) -> Thresholds:
    """Merge mappings of thresholds over the defaults; later ones override, None is unset.

    A ``score_threshold`` is for all classes: it overrides the ``score_thresholds`` of the layers
    before it. Another kind of ``nms`` drops their ``nms_threshold``, which was for their kind.

    Raises:
        ConfigError: an unknown name, or a value out of range.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        given = {name: value for name, value in dict(layer).items() if value is not None}
        if "score_threshold" in given:
            merged["score_thresholds"] = {}
        if given.get("nms", merged.get("nms", "hard")) != merged.get("nms", "hard"):
            merged.pop("nms_threshold", None)
        merged |= given
    if "classes" in merged:
        raise ConfigError("classes are chosen with rn.load(.., classes=[..]), or as found['car']")
    checked = build_recipe({"detect": merged}, "detector options").detect
    return cast(Thresholds, checked.model_dump())


def detection_thresholds(stored: Mapping[str, Any], given: Mapping[str, Any]) -> Thresholds:
    """Return the thresholds of a detector whose results people use.

    Args:
        stored: those of the checkpoint. A class without an own score threshold in it has
            :data:`DETECTION_SCORE`, or the threshold of evaluation if that is higher.
        given: override those; a ``score_threshold`` is for all classes.

    Raises:
        ConfigError: as :func:`merge_thresholds`.
    """
    merged = merge_thresholds(stored, given)
    if given.get("score_threshold") is None:
        merged["score_threshold"] = max(merged["score_threshold"], DETECTION_SCORE)
    return merged


def network_settings(thresholds: Mapping[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    """Return thresholds as :func:`detect_batch` takes them: score thresholds by label.

    Raises:
        ConfigError: a score threshold is of a class that `classes` lacks.
    """
    settings = {**thresholds}
    by_name = settings.pop("score_thresholds", {})
    for name in by_name:
        if name not in classes:
            raise ConfigError(
                f"detect.score_thresholds has a class that the model lacks: {name!r}; "
                f"leave it out{nearest(name, classes)}"
            )
    if by_name:
        rest = settings["score_threshold"]
        settings["class_thresholds"] = [by_name.get(name, rest) for name in classes]
    return settings


@dataclass(eq=False)
class Network:
    """A trained network, ready for inference. It can be copied and pickled.

    Attributes:
        model: the network that it was built from, unchanged. Later training does not affect this.
        device: where it runs.
        precision: "float32", "bf16", "fp16" or "int8".
        backend: "torch", "compile" or "openvino".
        description: precision, backend and details in a few words.
        run: images to outputs.
    """

    model: RetinaNet
    device: torch.device
    precision: str
    backend: str
    description: str
    run: Callable[[Tensor], Outputs]

    def __call__(self, images: Tensor) -> Outputs:
        """(B, 3, H, W) RGB, uint8 or float 0..255, padded to multiples of 32, on the device."""
        with torch.inference_mode():
            return self.run(images)


def build_network(
    model: RetinaNet,
    device: torch.device,
    *,
    precision: str = "auto",
    backend: str = "auto",
    calibration: Iterable[Tensor] | None = None,
) -> Network:
    """Build a network for inference.

    Args:
        model: trained; it is moved to the device and set to eval mode. A RetinaNet is copied;
            another module with its attributes and outputs is run by torch as it is.
        device: where to run.
        precision: ``auto``: bf16 on hardware with bf16 units, else float32; or float32, bf16, fp16,
            int8 (OpenVINO on a CPU).
        backend: a :data:`Backend`.
        calibration: for int8: images as the network gets them, (1, 3, H, W) uint8; 100 to 300 of
            the kind that detection will run on.

    Raises:
        ConfigError: an unknown name, a combination that does not exist, or no calibration images.
        MissingExtraError: OpenVINO, or NNCF for int8, is not installed.
    """
    check_choice("backend", backend, get_args(Backend))
    check_choice("precision", precision, (*get_args(Precision), "int8"))
    if calibration is not None and precision != "int8":
        raise ConfigError(
            f"images to calibrate on are for precision int8, got {precision}: "
            "give --precision int8, or no --calibrate"
        )
    if backend == "auto":
        backend = "openvino" if precision == "int8" else "torch"
    if not isinstance(model, RetinaNet):
        name = NAMES[choose_dtype(precision, device)]
        run = partial(_run_autocast, model.eval().to(device), name, device)
        return Network(model, device, name, "torch", f"torch on {device.type}, {name}", run)
    if backend == "openvino":
        return _openvino(model, device, precision, calibration)
    if precision == "int8":
        raise ConfigError(f"precision int8 needs backend openvino, got {backend}")
    dtype = choose_dtype(precision, device)
    model.eval().to(device)
    is_compiled = backend == "compile"
    fused = fused_copy(model, dtype, pack=not is_compiled)
    details = [f"torch on {device.type}", NAMES[dtype]]
    if _has_batch_norm(model) and not _has_batch_norm(fused):
        details.append("batch norm folded")
    if is_compiled:
        details.append("compiled")
    elif device.type == "cpu" and can_pack(dtype):
        details.append("oneDNN with fused activations")
    run = _Compiled(fused, device) if is_compiled else fused
    return Network(model, device, NAMES[dtype], backend, ", ".join(details), run)


def _openvino(
    model: RetinaNet, device: torch.device, precision: str, calibration: Iterable[Tensor] | None
) -> Network:
    if device.type != "cpu":
        raise ConfigError(
            f"backend openvino runs on the CPU, the device is {device}: give --device cpu, "
            "or --backend torch"
        )
    from retinanet.inference.openvino_backend import openvino_network

    if precision == "auto":
        precision = NAMES[choose_dtype("auto", device)]
    run = openvino_network(model.eval().to(device), precision, calibration)
    description = f"OpenVINO, {precision}"
    if run.deviation is not None:
        description += f" ({run.deviation:.1%} rms from float32 on the calibration images)"
    return Network(model, device, precision, "openvino", description, run)


def _has_batch_norm(model: RetinaNet) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def _run_autocast(model: Any, precision: str, device: torch.device, images: Tensor) -> Outputs:
    with autocast(precision, device):
        outputs: Outputs = model(images)
    return outputs


class _Compiled:
    """A network through torch.compile; on a GPU the kernels of a size are replayed as one graph.

    A copy compiles again.
    """

    def __init__(self, model: RetinaNet, device: torch.device) -> None:
        self._model, self._device = model, device
        mode = "reduce-overhead" if device.type == "cuda" else None
        self._call = torch.compile(model, mode=mode)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Compiled, (self._model, self._device)

    def __call__(self, images: Tensor) -> Outputs:
        try:
            outputs: Outputs = self._call(images)
        except Exception as error:
            if "compiler" not in f"{type(error).__name__} {error}".lower():
                raise
            raise ConfigError(
                "backend compile needs a C++ compiler (and Triton on a GPU) that works: "
                f"{str(error).strip().splitlines()[0]}; --backend torch needs none"
            ) from None
        if self._device.type == "cuda":
            # The next call overwrites the memory of a replayed graph.
            return Outputs(*(tuple(level.clone() for level in part) for part in outputs))
        return outputs


def detect_batch(
    network: Network,
    images: Tensor,
    sizes: Tensor,
    original_sizes: Tensor,
    *,
    selected: Sequence[int] | None = None,
    flip_tta: bool = False,
    on_outputs: Callable[[Outputs], None] | None = None,
    **settings: Unpack[PostprocessSettings],
) -> list[Detections]:
    """Detect the objects in a batch.

    Args:
        network: of :func:`build_network`.
        images: (B, 3, H, W) uint8 RGB, or float 0..255, on the network's device.
        sizes: (B, 2) height and width of each image before padding.
        original_sizes: (B, 2) height and width of each image before resizing.
        selected: labels to detect; None: all.
        flip_tta: run the network on the mirrored images too.
        on_outputs: called with the outputs for `images`, before they are post-processed.
        settings: those that differ from the defaults.

    Returns:
        For each image its detections, in pixels of the original image and clipped to it.
    """
    outputs = network(images)
    if on_outputs is not None:
        on_outputs(outputs)
    found = postprocess(
        outputs,
        output_anchors(network.model, outputs),
        sizes,
        num_classes=network.model.num_classes,
        selected=selected,
        mirrored=network(mirror_images(images, sizes)) if flip_tta else None,
        **settings,
    )
    return [
        Detections(to_original(objects.boxes, size, original), objects.scores, objects.labels)
        for objects, size, original in zip(
            found, sizes.tolist(), original_sizes.tolist(), strict=True
        )
    ]


def group_by(images: Sequence[Tensor], key: Callable[[Tensor], Hashable]) -> list[list[int]]:
    """Group the indices of images that may share a batch: those of equal `key`."""
    groups: dict[Hashable, list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault(key(image), []).append(index)
    return list(groups.values())


def to_original(boxes: Tensor, size: Sides, original_size: Sides) -> Tensor:
    """Scale boxes (..., 4) from the resized `size` to pixels of `original_size` (height, width).

    Height and width have separate factors: resized sides are whole pixels, so a common factor would
    leave large boxes off by half a pixel.
    """
    before = torch.as_tensor(original_size, dtype=torch.float64)
    scale = (before / torch.as_tensor(size, dtype=torch.float64)).flip(0).repeat(2)
    limit = before.flip(0).repeat(2)
    scaled = boxes * scale.to(boxes.dtype).to(boxes.device)
    return torch.minimum(scaled.clamp(min=0), limit.to(boxes.dtype).to(boxes.device))


# --- several threads ------------------------------------------------------------------------------


def network_workers(network: Any) -> int:
    """Return the number of threads that run a network at once: with torch on a CPU several.

    On a CPU that is faster than each image on all cores: the cores of one convolution wait for each
    other at its end, and long where one of them has other work; those of different images do not.
    """
    on_cpu = network.device.type == "cpu" and network.backend == "torch"
    return min(_MAX_WORKERS, torch.get_num_threads()) if on_cpu else 1


def use_cores(cores: int) -> None:
    """Set the number of cores that torch uses in the calling thread; not in others."""
    # Setting it also sets the default of new threads: that is read and set again in a new thread,
    # as running threads keep their number.
    with _setting_cores, ThreadPoolExecutor(1) as new_thread:
        default = new_thread.submit(torch.get_num_threads).result()
        torch.get_num_threads()  # a thread takes the default at its first use
        torch.set_num_threads(cores)
        new_thread.submit(torch.set_num_threads, default).result()


def map_ahead(
    call: Callable[[_T], _R], items: Iterable[_T], workers: int, *, cores: int = 1, ahead: int = 0
) -> Iterator[_R]:
    """Yield the results of the calls in order, made in threads; the first is made in this one.

    So it does not wait for the second item of a live source, and a single image has all cores.

    Args:
        call: may be called by several threads at once.
        items: taken in the calling thread; after the first at most `workers + ahead` before they
            are needed.
        workers: number of threads.
        cores: number of cores that torch uses in each.
        ahead: further items that are taken early.
    """
    items = iter(items)
    for first in islice(items, 1):
        yield call(first)
        del first  # it may be a huge image
    pending: deque[Future[_R]] = deque()
    with ThreadPoolExecutor(workers, "map", initializer=use_cores, initargs=(cores,)) as pool:
        try:
            while True:
                taken = islice(items, workers + ahead - len(pending))
                pending.extend(pool.submit(call, item) for item in taken)
                if not pending:
                    return
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def map_network(
    network: Any, call: Callable[[_T], _R], items: Iterable[_T], *, ahead: int = 0
) -> Iterator[_R]:
    """Yield the results of calls that run a network, in order; its workers share the cores."""
    workers = network_workers(network)
    if workers == 1:
        return map(call, items)
    cores = torch.get_num_threads() // workers
    return map_ahead(call, items, workers, cores=cores, ahead=ahead)
