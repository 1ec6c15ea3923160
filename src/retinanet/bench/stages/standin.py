"""build_network until it is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from retinanet.detect.inference import autocast, choose_dtype
from retinanet.errors import MissingExtraError


@dataclass
class _Network:
    model: Any
    device: torch.device
    precision: str
    backend: str
    description: str

    def __call__(self, images: Any) -> Any:
        with autocast(self.precision, self.device):
            return self.model(images)


def build_network(
    model: Any,
    device: torch.device,
    *,
    precision: str = "auto",
    backend: str = "auto",
    calibration: Any = None,
) -> _Network:
    if backend == "openvino":
        raise MissingExtraError("int8 inference needs openvino", "openvino")
    if precision == "auto":
        fast = choose_dtype("auto", device) == torch.bfloat16
        precision = "bf16" if fast else "float32"
    return _Network(model, device, precision, "torch", f"{precision}, torch")
