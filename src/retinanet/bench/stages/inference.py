"""Inference of the network alone, and detection from an image file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_iou

from retinanet.bench.benchmark import Benchmark, Case, Limit, Rival, Setting
from retinanet.bench.limits import count_flops, matrix_limit
from retinanet.bench.samples import (
    TORCHVISION_CLASSES,
    jpeg,
    normalised,
    on_meta,
    retained_bytes,
    rms_error,
    same_networks,
    torchvision_outputs,
)
from retinanet.inference.backends import build_network
from retinanet.inference.detections import ImageDetections
from retinanet.inference.detector import Detector
from retinanet.model.checkpoint import Checkpoint
from retinanet.model.precision import DTYPES
from retinanet.structures import Outputs, flatten_levels

# Relative rms of logits and of deltas. bf16 keeps 8 bits, fp16 11; int8 has 256 steps per channel.
_TOLERANCE = {"float32": 1e-4, "bf16": 0.05, "fp16": 0.02, "int8": 0.1}

_Sides = tuple[int, int]


def inference(setting: Setting) -> list[Case]:
    """Run ResNet-50's forward pass against torchvision's in float32; on a GPU also in fp16."""
    height, width = _image_size(setting)
    # Packed weights are kept for a few image sizes: one size, as in the other cases, is the best
    # case; a folder of images has several.
    other_width = setting.pick(160, 384, 1216)
    several = [(height, width), (width, height), (height, height), (height, other_width)]
    cases: dict[str, dict[str, Any]] = {
        "float32": {"precision": "float32"},
        "auto": {},
        "auto, four sizes in turn": {"sides": several},
    }
    if setting.device.type == "cuda":
        cases["auto, 16 images"] = {"batch": 16}
    else:
        cases["int8"] = {"precision": "int8", "backend": "openvino"}
    if setting.size == "full":  # compiling takes half a minute
        cases["compile"] = {"backend": "compile"}
    default = {"precision": "auto", "backend": "auto", "batch": 1, "sides": [(height, width)]}
    return [
        Case(
            name,
            f"{_network_name(setting)}, "
            + ", ".join(f"{h} x {w}" for h, w in changes.get("sides", several[:1])),
            partial(_inference, setting, **{**default, **changes}),
        )
        for name, changes in cases.items()
    ]


def _image_size(setting: Setting) -> _Sides:
    sides: _Sides = setting.pick((96, 128), (256, 320), (800, 1088))
    return sides


def _backbone(setting: Setting) -> str:
    backbone: str = setting.pick("resnet18", "resnet50", "resnet50")
    return backbone


def _network_name(setting: Setting) -> str:
    return _backbone(setting).replace("resnet", "ResNet-")


def _inference(
    setting: Setting, *, precision: str, backend: str, batch: int, sides: Sequence[_Sides]
) -> Benchmark:
    device = setting.device
    rng = np.random.default_rng(0)

    def image(height: int, width: int) -> Tensor:
        return _decode(jpeg(height, width, rng))

    batches = [
        torch.stack([image(h, w) for _ in range(batch)])
        .contiguous(memory_format=torch.channels_last)
        .to(device)
        for h, w in sides
    ]
    rival, model = same_networks(_backbone(setting), device)
    rival.eval()
    inputs = [normalised(images, model) for images in batches]
    calibration = None
    if precision == "int8":
        calibration = [image(*sides[0])[None] for _ in range(setting.pick(1, 4, 8))]
    network = build_network(
        model.eval(), device, precision=precision, backend=backend, calibration=calibration
    )
    dtype = DTYPES.get(network.precision)

    @torch.inference_mode()
    def theirs(fp16: bool) -> list[tuple[Tensor, Tensor]]:
        with torch.autocast("cuda", dtype=torch.float16, enabled=fp16):
            return [torchvision_outputs(rival, x) for x in inputs]

    rivals = []
    if "torchvision" in setting.vs:
        tolerance = _TOLERANCE[network.precision]
        compare = partial(compare_outputs, classes=model.num_classes, tolerance=tolerance)
        names = {"torchvision": False}
        if device.type == "cuda" and network.precision != "float32":
            names["torchvision fp16"] = True
        retained = partial(retained_bytes, rival)
        rivals = [Rival(name, partial(theirs, fp16), compare, retained)
                  for name, fp16 in names.items()]  # fmt: skip
    return Benchmark(
        lambda: [network(images) for images in batches],
        rivals,
        limit=None if dtype is None else _network_limit(_backbone(setting), batches, dtype),
        note=network.description,
        # OpenVINO's and a compiler's memory is not torch's.
        retained=partial(retained_bytes, network) if network.backend == "torch" else None,
    )


def _network_limit(backbone: str, batches: Sequence[Tensor], dtype: torch.dtype) -> Limit:
    network = on_meta(backbone).eval()
    with torch.no_grad():
        flops = sum(
            count_flops(partial(torchvision_outputs, network, torch.empty(x.shape, device="meta")))
            for x in batches
        )
    batch, _, height, width = batches[0].shape
    return matrix_limit(flops, -(-height // 8), -(-width // 8), batch, dtype, batches[0].device)


def compare_outputs(
    output: Sequence[Outputs],
    expected: Sequence[tuple[Tensor, Tensor]],
    classes: int,
    tolerance: float,
) -> str:
    """Largest relative rms of logits and of deltas over the batches.

    Raises:
        AssertionError: it exceeds `tolerance`.
    """
    worst = {"logits": 0.0, "deltas": 0.0}
    for ours, theirs in zip(output, expected, strict=True):
        flat = flatten_levels(ours.logits, classes), flatten_levels(ours.deltas, 4)
        for name, a, b in zip(worst, flat, theirs, strict=True):
            worst[name] = max(worst[name], rms_error(a, b))
    for name, error in worst.items():
        assert error <= tolerance, f"relative rms {error:.1e} of the {name}"
    return ", ".join(f"{name} {error:.0e}" for name, error in worst.items()) + " rms"


def detection(setting: Setting) -> list[Case]:
    """Detect from a JPEG in memory, against Pillow and torchvision's whole model."""
    height, width = _image_size(setting)
    size = f"{_network_name(setting)}, JPEG {width // 2} x {height // 2} to {height} px"
    return [
        Case(precision, size, partial(_detection, setting, precision))
        for precision in ("float32", "auto")
    ]


def _detection(setting: Setting, precision: str) -> Benchmark:
    height, width = _image_size(setting)
    # Half the network's input, so that resized sides are whole: torchvision rounds down.
    file = jpeg(height // 2, width // 2, np.random.default_rng(0))
    # Scores vary enough for some to exceed the threshold.
    rival, model = same_networks(_backbone(setting), setting.device, contrast=0.08)
    rival.eval()
    rival.detections_per_img = 100
    rival.transform.min_size, rival.transform.max_size = (height,), width
    rival.transform.image_mean = (model.pixel_mean.flatten() / 255).tolist()
    rival.transform.image_std = (model.pixel_std.flatten() / 255).tolist()
    checkpoint = Checkpoint(
        model=model,
        classes=tuple(str(k) for k in range(TORCHVISION_CLASSES)),
        category_ids=tuple(range(TORCHVISION_CLASSES)),
        image_size=height,
        max_size=width,
        info={},
    )
    detector = Detector(checkpoint, device=setting.device, precision=precision)

    @torch.inference_mode()
    def theirs() -> dict[str, Tensor]:
        image = (_decode(file).float() / 255).to(setting.device)
        detections: dict[str, Tensor] = rival([image])[0]
        return detections

    rivals = []
    if "torchvision" in setting.vs:
        compare = partial(_compare_detections, 0.95 if precision == "float32" else 0.9)
        rivals.append(Rival("torchvision", theirs, compare, partial(retained_bytes, rival)))
    retained = partial(retained_bytes, detector)
    return Benchmark(partial(detector.detect, file), rivals, retained=retained)


def _compare_detections(
    min_fraction: float, output: ImageDetections, expected: dict[str, Tensor]
) -> str:
    # Rounding of pixels changes the order of close scores, so only the better half is compared.
    half = len(expected["scores"]) // 2
    boxes, labels = (expected[name][:half].cpu() for name in ("boxes", "labels"))
    same = (box_iou(boxes, output.boxes) > 0.9) & (labels[:, None] == output.labels)
    assert half, "torchvision detected nothing to compare"
    fraction = float(same.any(dim=1).float().mean())
    assert fraction >= min_fraction, f"{fraction:.0%} detected by both"
    return f"{fraction:.0%} of the better half detected by both"


def _decode(file: bytes) -> Tensor:
    """(3, H, W) uint8, decoded by Pillow."""
    image = np.array(Image.open(io.BytesIO(file)).convert("RGB"))
    return torch.from_numpy(image).permute(2, 0, 1)
