"""Device, dtype and autocast: where the network runs, and in which precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, get_args

import torch

from retinanet.config import check_choice, nearest
from retinanet.errors import ConfigError

Precision = Literal["auto", "float32", "bf16", "fp16"]
"""Precision that torch computes in; ``auto`` is bf16 on hardware with bf16 units, else float32."""

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """Return the device called `name`; ``auto`` is the first available of CUDA, MPS and CPU.

    Raises:
        ConfigError: torch does not support the device, or this machine does not have it.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        backend = torch.get_device_module(device.type)
    except (RuntimeError, TypeError):
        hint = nearest(str(name), ("auto", "cpu", "cuda", "mps"))
        raise ConfigError(
            f"device {str(name)!r} is not one of auto, cpu, cuda, cuda:1, mps{hint}"
        ) from None
    count = backend.device_count() if backend.is_available() else 0
    if (device.index or 0) >= count:
        raise ConfigError(
            f"device {str(name)!r}: torch finds {count} {device.type} devices here; "
            "use cpu, or auto for the first available device"
        )
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype that the network computes in on `device`.

    ``auto`` is bfloat16 on a CPU with AVX-512 BF16 or AMX units and on a GPU with bfloat16 units
    (both checked at run time), else float32. Without such units bfloat16 is emulated, and slower.
    """
    check_choice("precision", precision, get_args(Precision))
    if precision == "auto":
        return torch.bfloat16 if _has_bfloat16(device) else torch.float32
    return DTYPES[precision]


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the autocast context of `precision` on `device`; no autocast for float32."""
    dtype = choose_dtype(precision, device)
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        # Private, but torch offers no other check; a missing function counts as no support.
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, bool)() for name in checks)
    return False
