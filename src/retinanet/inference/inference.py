"""From a batch of images to what is found in them: shared by detection and evaluation."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal, Protocol, TypedDict, Unpack, get_args

import torch
from torch import Tensor

from retinanet.anchors import level_anchors
from retinanet.config import check_choice, nearest
from retinanet.errors import ConfigError
from retinanet.model.retinanet import RetinaNet
from retinanet.postprocess import postprocess
from retinanet.structures import Detections, Outputs

if TYPE_CHECKING:
    from retinanet.inference.network import Network

Precision = Literal["auto", "float32", "bf16", "fp16"]
"""In what torch computes; ``auto`` is bf16 where the hardware has units for it."""

Sides = Tensor | tuple[int, int] | list[int]
"""Height and width."""

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Normalising(Protocol):
    """A network that takes the mean from its images itself."""

    @property
    def pixel_mean(self) -> Tensor: ...


class Thresholds(TypedDict, total=False):
    """What becomes of the scores; :func:`retinanet.postprocess.postprocess` has the defaults."""

    score_threshold: float
    topk_candidates: int
    nms_threshold: float
    detections_per_image: int
    class_agnostic_nms: bool


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """The device of that name; ``auto`` is the first there is of CUDA, MPS and the CPU.

    Raises:
        ConfigError: torch knows no such device, or this machine has none.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        backend = torch.get_device_module(device.type)
    except RuntimeError:
        hint = nearest(str(name), ("auto", "cpu", "cuda", "mps"))
        raise ConfigError(
            f"device {str(name)!r} is not one of auto, cpu, cuda, cuda:1, mps{hint}"
        ) from None
    count = backend.device_count() if backend.is_available() else 0
    if (device.index or 0) >= count:
        raise ConfigError(
            f"device {str(name)!r}: torch finds {count} {device.type} devices here; "
            "use cpu, or auto to take what there is"
        )
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The type that the network computes in on `device`.

    ``auto`` is bfloat16 on a CPU with AVX-512 BF16 or AMX units and on a GPU with bfloat16 units,
    both asked at run time, else float32. Without such units bfloat16 is emulated, and slower.

    Raises:
        ConfigError: `precision` is not a :data:`Precision`.
    """
    check_choice("precision", precision, get_args(Precision))
    if precision == "auto":
        return torch.bfloat16 if _has_bfloat16(device) else torch.float32
    return DTYPES[precision]


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """The context in which the network runs at `precision` on `device`."""
    dtype = choose_dtype(precision, device)
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def padding_colour(model: Normalising) -> tuple[int, int, int]:
    """The colour that is about zero once the model has normalised it."""
    red, green, blue = (round(value) for value in model.pixel_mean.flatten().tolist())
    return red, green, blue


@torch.inference_mode()
def detect_batch(
    network: Network,
    images: Tensor,
    sizes: Tensor,
    original_sizes: Tensor,
    **thresholds: Unpack[Thresholds],
) -> list[Detections]:
    """Find the objects in a batch.

    Args:
        network: as :func:`retinanet.inference.network.build_network` makes it.
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


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        # Private, but the only way that torch gives; one that is gone reads as no.
        asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, bool)() for name in asked)
    return False
