"""The network in inference, and from an image file to what is found in it."""

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

from retinanet.bench.contest import Case, Contest, Rival, Setting
from retinanet.bench.limits import count_flops, matrix_limit
from retinanet.bench.samples import (
    TORCHVISION_CLASSES,
    held_bytes,
    jpeg,
    normalised,
    on_meta,
    rms_error,
    same_networks,
)
from retinanet.inference.backends import build_network
from retinanet.inference.detections import ImageDetections
from retinanet.inference.detector import Detector
from retinanet.model.checkpoint import Checkpoint
from retinanet.model.precision import DTYPES
from retinanet.structures import Outputs, flatten_levels

# Of the logits and of the deltas, relative rms. bf16 keeps 8 bits, fp16 11; int8 has 256 steps a
# channel.
_TOLERANCE = {"float32": 1e-4, "bf16": 0.05, "fp16": 0.02, "int8": 0.1}

_Sides = tuple[int, int]
_Raw = list[tuple[Tensor, Tensor]]


def inference(setting: Setting) -> list[Case]:
    """ResNet-50's forward pass beside torchvision's: eager, float32; on a GPU also under fp16."""
    height, width = _side(setting)
    on_gpu = setting.device.type == "cuda"
    # Weights are kept arranged for few sizes: one again and again, as in the other ways, is the
    # best case, and a folder of images is not like that.
    several = [
        (height, width),
        (width, height),
        (height, height),
        (height, setting.pick(160, 384, 1216)),
    ]
    ways: dict[str, dict[str, Any]] = {
        "float32": {"precision": "float32"},
        "auto": {},
        "auto, four sizes in turn": {"sides": several},
    }
    if on_gpu:
        ways["auto, 16 images"] = {"batch": 16}
    else:
        ways["int8"] = {"precision": "int8", "backend": "openvino"}
    if setting.size == "full":
        ways["compile"] = {"backend": "compile"}
    cases = []
    for way, changes in ways.items():
        options = {
            "precision": "auto",
            "backend": "auto",
            "batch": 1,
            "sides": [(height, width)],
            **changes,
        }
        size = "ResNet-50, " + ", ".join(f"{h} x {w}" for h, w in options["sides"])
        cases.append(Case(way, size, partial(_network, setting, **options)))
    return cases


def _side(setting: Setting) -> _Sides:
    found: _Sides = setting.pick((96, 128), (256, 320), (800, 1088))
    return found


def _network(
    setting: Setting, *, precision: str, backend: str, batch: int, sides: Sequence[_Sides]
) -> Contest:
    height, width = sides[0]
    device = setting.device
    generator = np.random.default_rng(0)
    batches = [
        torch.stack([_pixels(jpeg(h, w, generator)) for _ in range(batch)])
        .contiguous(memory_format=torch.channels_last)
        .to(device)
        for h, w in sides
    ]
    rival, model = same_networks("resnet50", device)
    rival.eval()
    inputs = [normalised(images, model) for images in batches]
    calibration = None
    if precision == "int8":
        calibration = [
            _pixels(jpeg(height, width, generator))[None] for _ in range(setting.pick(1, 4, 8))
        ]
    network = build_network(
        model.eval(), device, precision=precision, backend=backend, calibration=calibration
    )
    dtype = DTYPES.get(network.precision)
    limit = None
    if dtype is not None:
        counted = on_meta("resnet50").eval()
        flops = 0.0
        for images in batches:
            sample = torch.empty(images.shape, device="meta")
            with torch.no_grad():
                flops += count_flops(partial(_raw, counted, sample))
        limit = matrix_limit(flops, -(-height // 8), -(-width // 8), batch, dtype, device)

    def ours() -> list[Outputs]:
        return [network(images) for images in batches]

    @torch.inference_mode()
    def theirs() -> _Raw:
        return [_raw(rival, x) for x in inputs]

    def theirs_in_fp16() -> _Raw:
        with torch.autocast("cuda", dtype=torch.float16):
            return theirs()

    def compare(got: list[Outputs], expected: _Raw) -> str:
        return compare_outputs(got, expected, model.num_classes, _TOLERANCE[network.precision])

    rivals = []
    if "torchvision" in setting.vs:
        rivals.append(Rival("torchvision", theirs, compare, partial(held_bytes, rival)))
        if device.type == "cuda" and network.precision != "float32":
            rivals.append(
                Rival("torchvision fp16", theirs_in_fp16, compare, partial(held_bytes, rival))
            )
    # OpenVINO's and a compiler's memory is not torch's to count.
    held = partial(held_bytes, network) if network.backend == "torch" else None
    return Contest(ours, rivals, limit=limit, note=network.description, held=held)


def _raw(network: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, R, K) and deltas (B, R, 4) of torchvision's network."""
    raw = network.head(list(network.backbone(x).values()))
    return raw["cls_logits"], raw["bbox_regression"]


def compare_outputs(
    got: Sequence[Outputs],
    expected: Sequence[tuple[Tensor, Tensor]],
    classes: int,
    tolerance: float,
) -> str:
    """How far logits and deltas are apart, of the batch where they are farthest.

    Raises:
        AssertionError: farther than `tolerance`, as relative rms.
    """
    worst = {"logits": 0.0, "deltas": 0.0}
    for own, theirs in zip(got, expected, strict=True):
        flat = flatten_levels(own.logits, classes), flatten_levels(own.deltas, 4)
        for name, one, other in zip(worst, flat, theirs, strict=True):
            worst[name] = max(worst[name], rms_error(one, other))
    for name, error in worst.items():
        assert error <= tolerance, f"relative rms {error:.1e} of the {name}"
    return ", ".join(f"{name} {error:.0e}" for name, error in worst.items()) + " rms"


def detection(setting: Setting) -> list[Case]:
    """A JPEG in memory to detections, beside Pillow and torchvision's whole model."""
    height, width = _side(setting)
    size = f"ResNet-50, JPEG {width // 2} x {height // 2} to {height} px"
    return [
        Case(way, size, partial(_detection, setting, precision))
        for way, precision in {"float32": "float32", "auto": "auto"}.items()
    ]


def _detection(setting: Setting, precision: str) -> Contest:
    height, width = _side(setting)
    # Half as large as for the network, so that the sides stay whole: torchvision rounds down.
    file = jpeg(height // 2, width // 2, np.random.default_rng(0))
    # Scores that differ enough for some to be over the threshold.
    rival, model = same_networks("resnet50", setting.device, contrast=0.08)
    rival.eval()
    rival.detections_per_img = 100
    rival.transform.min_size, rival.transform.max_size = (height,), width
    rival.transform.image_mean = (model.pixel_mean.flatten() / 255).tolist()
    rival.transform.image_std = (model.pixel_std.flatten() / 255).tolist()
    names = tuple(str(k) for k in range(TORCHVISION_CLASSES))
    checkpoint = Checkpoint(
        model=model,
        classes=names,
        category_ids=tuple(range(TORCHVISION_CLASSES)),
        image_size=height,
        max_size=width,
        info={},
    )
    detector = Detector(checkpoint, device=setting.device, precision=precision)

    def ours() -> ImageDetections:
        found = detector.detect(file)
        assert isinstance(found, ImageDetections)
        return found

    @torch.inference_mode()
    def theirs() -> dict[str, Tensor]:
        found: dict[str, Tensor] = rival([(_pixels(file).float() / 255).to(setting.device)])[0]
        return found

    def compare(got: ImageDetections, expected: dict[str, Tensor]) -> str:
        # Pixels differ by rounding to whole levels, which moves scores near each other past the
        # other: nearly all of the better half must be found, in the same places.
        best = len(expected["scores"]) // 2
        boxes, labels = (expected[name][:best].cpu() for name in ("boxes", "labels"))
        near = box_iou(boxes, got.boxes) > 0.9
        again = (near & (labels[:, None] == got.labels)).any(dim=1)
        assert best, "torchvision found nothing to compare"
        share = float(again.float().mean())
        assert share >= (0.95 if precision == "float32" else 0.9), f"{share:.0%} found again"
        return f"{share:.0%} of the better half found again"

    rivals = []
    if "torchvision" in setting.vs:
        rivals.append(Rival("torchvision", theirs, compare, partial(held_bytes, rival)))
    return Contest(ours, rivals, held=partial(held_bytes, detector))


def _pixels(file: bytes) -> Tensor:
    """(3, H, W) uint8, as people read it."""
    image = np.array(Image.open(io.BytesIO(file)).convert("RGB"))
    return torch.from_numpy(image).permute(2, 0, 1)
