"""The network as it is run for detection: its precision, and what runs it.

Three backends give the same outputs: ``torch`` (:mod:`retinanet.model.fused`, at once), ``compile``
(the same through torch.compile, half a minute at the first image of a size) and ``openvino`` (an
extra; the one with int8).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, TypedDict, Unpack, get_args

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from retinanet.anchors import level_anchors
from retinanet.config import check_choice
from retinanet.errors import ConfigError
from retinanet.model.fused import can_pack, fused_copy
from retinanet.model.precision import DTYPES, Precision, autocast, choose_dtype
from retinanet.model.retinanet import RetinaNet
from retinanet.postprocess import postprocess
from retinanet.structures import Detections, Outputs

Backend = Literal["auto", "torch", "compile", "openvino"]
"""What runs the network; ``auto`` is torch, and OpenVINO for int8."""

Sides = Tensor | tuple[int, int] | list[int]
"""Height and width."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Thresholds(TypedDict, total=False):
    """What becomes of the scores; :func:`retinanet.postprocess.postprocess` has the defaults."""

    score_threshold: float
    topk_candidates: int
    nms_threshold: float
    detections_per_image: int
    class_agnostic_nms: bool


class Network:
    """A trained network, ready to be run.

    Attributes:
        model: the network that it was made of, which stays as it is. What was trained into it later
            is not in here.
        device: where it runs.
        precision: "float32", "bf16", "fp16" or "int8".
        backend: "torch", "compile" or "openvino".
        description: both, and how, in a few words.
    """

    def __init__(
        self,
        model: RetinaNet,
        device: torch.device,
        precision: str,
        backend: str,
        description: str,
        run: Callable[[Tensor], Outputs],
    ) -> None:
        self.model = model
        self.device = device
        self.precision = precision
        self.backend = backend
        self.description = description
        self._run = run

    def __call__(self, images: Tensor) -> Outputs:
        """(B, 3, H, W) RGB, uint8 or float 0..255, padded to multiples of 32, on the device."""
        with torch.inference_mode():
            return self._run(images)


def build_network(
    model: RetinaNet,
    device: torch.device,
    *,
    precision: str = "auto",
    backend: str = "auto",
    calibration: Iterable[Tensor] | None = None,
) -> Network:
    """Make a network ready for detection.

    Args:
        model: trained; it is moved to the device and set to eval mode. A RetinaNet is copied;
            another module with its attributes and outputs is run by torch as it is.
        device: where to run.
        precision: ``auto``: bf16 where the hardware has units for it, else float32; or float32,
            bf16, fp16, int8 (OpenVINO on a CPU).
        backend: a :data:`Backend`.
        calibration: for int8: images as the network gets them, (1, 3, H, W) uint8; 100 to 300 of
            the kind that will be searched.

    Raises:
        ConfigError: an unknown name, a combination that does not exist, or no calibration.
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
        return _as_it_is(model, device, precision)
    if backend == "openvino":
        if device.type != "cpu":
            raise ConfigError(
                f"backend openvino runs on the CPU, the device is {device}: give --device cpu, "
                "or --backend torch"
            )
        from retinanet.inference.openvino_backend import openvino_network

        chosen = precision
        if precision == "auto":
            chosen = _NAMES[choose_dtype("auto", device)]
        run = openvino_network(model.eval().to(device), chosen, calibration)
        return Network(model, device, chosen, backend, f"OpenVINO, {chosen}", run)
    if precision == "int8":
        raise ConfigError(f"precision int8 needs backend openvino, got {backend}")
    dtype = choose_dtype(precision, device)
    model.eval().to(device)
    compiled = backend == "compile"
    fused = fused_copy(model, dtype, pack=not compiled)
    how = ["torch on " + device.type, _NAMES[dtype]]
    if _has_batch_norm(model) and not _has_batch_norm(fused):
        how.append("batch norm folded")
    if compiled:
        how.append("compiled")
    elif device.type == "cpu" and can_pack(dtype):
        how.append("oneDNN with fused activations")
    description = ", ".join(how)
    run = _compiled(fused, device) if compiled else fused
    return Network(model, device, _NAMES[dtype], backend, description, run)


def _has_batch_norm(model: RetinaNet) -> bool:
    return any(isinstance(module, _BatchNorm) for module in model.modules())


def _as_it_is(model: RetinaNet, device: torch.device, precision: str) -> Network:
    name = _NAMES[choose_dtype(precision, device)]
    model.eval().to(device)

    def run(images: Tensor) -> Outputs:
        with autocast(name, device):
            outputs: Outputs = model(images)
        return outputs

    return Network(model, device, name, "torch", f"torch on {device.type}, {name}", run)


def _compiled(model: RetinaNet, device: torch.device) -> Callable[[Tensor], Outputs]:
    """Through torch.compile; on a GPU the launches of a size are replayed as one graph."""
    call = torch.compile(model, mode="reduce-overhead" if device.type == "cuda" else None)

    def run(images: Tensor) -> Outputs:
        try:
            outputs: Outputs = call(images)
        except Exception as error:
            if "compiler" not in f"{type(error).__name__} {error}".lower():
                raise
            raise ConfigError(
                "backend compile needs a C++ compiler (and Triton on a GPU) that works: "
                f"{str(error).strip().splitlines()[0]}; --backend torch needs none"
            ) from None
        if device.type == "cuda":
            # The next call writes over the memory of a replayed graph.
            return Outputs(*(tuple(one.clone() for one in part) for part in outputs))
        return outputs

    return run


def detect_batch(
    network: Network,
    images: Tensor,
    sizes: Tensor,
    original_sizes: Tensor,
    **thresholds: Unpack[Thresholds],
) -> list[Detections]:
    """Find the objects in a batch.

    Args:
        network: as :func:`retinanet.inference.backends.build_network` makes it.
        images: (B, 3, H, W) uint8 RGB, or float 0..255, on the network's device.
        sizes: (B, 2) height and width of each image before padding.
        original_sizes: (B, 2) height and width of each image before resizing.
        thresholds: those that are not :func:`retinanet.postprocess.postprocess`'s own.

    Returns:
        For each image its detections, in the pixels of the original image and within it.
    """
    outputs = network(images)
    return detections_of(network.model, outputs, sizes, original_sizes, **thresholds)


def detections_of(
    model: RetinaNet,
    outputs: Outputs,
    sizes: Tensor,
    original_sizes: Tensor,
    **thresholds: Unpack[Thresholds],
) -> list[Detections]:
    """As :func:`detect_batch`, of outputs that are there already (the loss wants them too)."""
    feature_sizes = [(level.shape[-2], level.shape[-1]) for level in outputs.logits]
    found = postprocess(
        outputs,
        level_anchors(model.anchors, feature_sizes, device=outputs.logits[0].device),
        sizes,
        num_classes=model.num_classes,
        **thresholds,
    )
    return [
        Detections(to_original(one.boxes, size, original), one.scores, one.labels)
        for one, size, original in zip(found, sizes.tolist(), original_sizes.tolist(), strict=True)
    ]


def to_original(boxes: Tensor, size: Sides, original_size: Sides) -> Tensor:
    """Boxes (..., 4) of an image resized to `size` (height, width), in the pixels it had before.

    Height and width each have their own factor: the resized sides are whole pixels, so one factor
    for both would leave large boxes off by half a pixel.
    """
    before = torch.as_tensor(original_size, dtype=torch.float64)
    scale = (before / torch.as_tensor(size, dtype=torch.float64)).flip(0).repeat(2)
    limit = before.flip(0).repeat(2)
    scaled = boxes * scale.to(boxes.dtype).to(boxes.device)
    return torch.minimum(scaled.clamp(min=0), limit.to(boxes.dtype).to(boxes.device))
