"""The network in inference, and from a picture file to what is found in it."""

from __future__ import annotations

import io
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
    jpeg,
    normalised,
    on_meta,
    rms_error,
    same_networks,
)
from retinanet.detect.detector import Detector
from retinanet.detect.found import Found
from retinanet.detect.network import build_network
from retinanet.model.checkpoint import Checkpoint
from retinanet.structures import Outputs, flatten_levels

_DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Of the logits, relative rms. bf16 keeps 8 bits, fp16 11; int8 has 256 steps a channel.
_TOLERANCE = {"float32": 1e-4, "bf16": 0.05, "fp16": 0.02, "int8": 0.2}


def inference(setting: Setting) -> list[Case]:
    """ResNet-50's forward pass beside torchvision's: eager, float32; on a GPU also under fp16."""
    height, width = _side(setting)
    on_gpu = setting.device.type == "cuda"
    ways: dict[str, dict[str, Any]] = {"float32": {"precision": "float32"}, "auto": {}}
    if on_gpu:
        ways["auto, 16 images"] = {"batch": 16}
    else:
        ways["int8"] = {"precision": "int8", "backend": "openvino"}
    if setting.size == "full":
        ways["compile"] = {"backend": "compile"}
    cases = []
    for way, changes in ways.items():
        options = {"precision": "auto", "backend": "auto", "batch": 1, **changes}
        size = f"ResNet-50, {height} x {width}"
        cases.append(Case(way, size, partial(_network, setting, **options)))
    return cases


def _side(setting: Setting) -> tuple[int, int]:
    found: tuple[int, int] = setting.pick((96, 128), (256, 320), (800, 1088))
    return found


def _network(setting: Setting, *, precision: str, backend: str, batch: int) -> Contest:
    height, width = _side(setting)
    device = setting.device
    generator = np.random.default_rng(0)
    pictures = [_pixels(jpeg(height, width, generator)) for _ in range(batch)]
    images = torch.stack(pictures).contiguous(memory_format=torch.channels_last).to(device)
    rival, model = same_networks("resnet50", device)
    rival.eval()
    x = normalised(images, model)
    calibration = [
        _pixels(jpeg(height, width, generator))[None] for _ in range(setting.pick(1, 4, 8))
    ]
    network = build_network(
        model.eval(), device, precision=precision, backend=backend, calibration=calibration
    )
    dtype = _DTYPES.get(network.precision)
    limit = None
    if dtype is not None:
        counted = on_meta("resnet50").eval()
        sample = torch.empty(batch, 3, height, width, device="meta")
        with torch.no_grad():
            flops = count_flops(lambda: counted.head(list(counted.backbone(sample).values())))
        limit = matrix_limit(flops, -(-height // 8), -(-width // 8), batch, dtype, device)

    def ours() -> Outputs:
        return network(images)

    @torch.inference_mode()
    def theirs() -> Tensor:
        logits: Tensor = rival.head(list(rival.backbone(x).values()))["cls_logits"]
        return logits

    def theirs_in_fp16() -> Tensor:
        with torch.autocast("cuda", dtype=torch.float16):
            return theirs()

    def compare(got: Outputs, expected: Tensor) -> str:
        own = flatten_levels(got.logits, model.num_classes)
        error = rms_error(own, expected)
        tolerance = _TOLERANCE[network.precision]
        assert error <= tolerance, f"relative rms {error:.1e} of the logits"
        return f"logits {error:.0e} rms"

    rivals = []
    if "torchvision" in setting.vs:
        rivals.append(Rival("torchvision", theirs, compare))
        if device.type == "cuda" and network.precision != "float32":
            rivals.append(Rival("torchvision fp16", theirs_in_fp16, compare))
    return Contest(ours, rivals, limit=limit, note=network.description)


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

    def ours() -> Found:
        found = detector.detect(file)
        assert isinstance(found, Found)
        return found

    @torch.inference_mode()
    def theirs() -> dict[str, Tensor]:
        found: dict[str, Tensor] = rival([(_pixels(file).float() / 255).to(setting.device)])[0]
        return found

    def compare(got: Found, expected: dict[str, Tensor]) -> str:
        # Pixels differ by rounding to whole levels, which moves scores near each other past the
        # other: most of the better half must be found, in the same places.
        best = len(expected["scores"]) // 2
        boxes, labels = (expected[name][:best].cpu() for name in ("boxes", "labels"))
        near = box_iou(boxes, got.boxes) > 0.9
        again = (near & (labels[:, None] == got.labels)).any(dim=1)
        assert best, "torchvision found nothing to compare"
        share = float(again.float().mean())
        assert share >= (0.9 if precision == "float32" else 0.6), f"{share:.0%} found again"
        return f"{share:.0%} of the better half found again"

    rivals = [Rival("torchvision", theirs, compare)] if "torchvision" in setting.vs else []
    return Contest(ours, rivals)


def _pixels(file: bytes) -> Tensor:
    """(3, H, W) uint8, as people read it."""
    picture = np.array(Image.open(io.BytesIO(file)).convert("RGB"))
    return torch.from_numpy(picture).permute(2, 0, 1)
