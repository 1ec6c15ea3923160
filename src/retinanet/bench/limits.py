"""What the machine allows at most, measured beside what is judged by it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from retinanet.bench.contest import Limit
from retinanet.model.fused import FusedConv2d, can_pack


def copy_limit(tensors: Sequence[Tensor]) -> Limit:
    """Read the tensors once, and write as much once, into memory that is there already."""
    sources = [one.detach() for one in tensors]
    copies = [torch.empty_like(one) for one in sources]

    def copy() -> list[Tensor]:
        return [to.copy_(of) for to, of in zip(copies, sources, strict=True)]

    return Limit("copy", copy)


def read_limit(tensors: Sequence[Tensor]) -> Limit:
    """Read the tensors once: their sums, or largest values, whichever torch has faster."""
    # Flat views: a reduction over permuted memory would be another one.
    flat = [one.detach().as_strided((one.numel(),), (1,)) for one in tensors]
    call = fastest(
        [
            lambda: [one.sum() for one in flat],
            lambda: [one.amax() for one in flat],
        ]
    )
    return Limit("read", call)


def matrix_limit(
    flops: float, height: int, width: int, batch: int, dtype: torch.dtype, device: torch.device
) -> Limit:
    """So many operations at the pace of the pyramid's and the heads' own convolution.

    That is 256 channels to 256, 3x3, over a map of P3's size, in the layout or packing of the
    weights in which it runs fastest here.

    Args:
        flops: operations of the work (a multiplication and an addition are two).
        height, width: of the map.
        batch: images.
        dtype: in which the work is done.
        device: where.
    """
    convolution = nn.Conv2d(256, 256, 3, padding=1).to(device, dtype).eval()
    last = nn.Conv2d(256, 256, 3, padding=1).to(device, dtype).eval()
    last = last.to(memory_format=torch.channels_last)
    x = torch.randn(batch, 256, height, width).to(device, dtype)
    x_last = x.contiguous(memory_format=torch.channels_last)
    ways = [lambda: convolution(x), lambda: last(x_last)]
    if device.type == "cpu" and can_pack(dtype):
        arranged = FusedConv2d(convolution)
        arranged.shapes_kept = 1
        ways.append(lambda: arranged(x_last))
        with torch.inference_mode():
            arranged(x_last)  # its weights are arranged at the next call, which is the first try
    with torch.inference_mode():
        best = fastest(ways, device)

    @torch.inference_mode()
    def convolve() -> None:
        best()

    own = 2 * 9 * 256 * 256 * height * width * batch
    return Limit("matrix peak", convolve, flops / own)


def count_flops(call: Callable[[], Any]) -> float:
    """Floating-point operations of the convolutions and matrix products in `call`.

    A backward pass counts too; on the meta device nothing is computed.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def fastest(
    ways: Sequence[Callable[[], Any]], device: torch.device | None = None
) -> Callable[[], Any]:
    """Of several calls the one that takes least, of five tries each after a first."""
    for way in ways:
        way()
    seconds: list[list[float]] = [[] for _ in ways]
    for _ in range(5):
        for own, way in zip(seconds, ways, strict=True):
            own.append(clock(way, device))
    medians = [statistics.median(own) for own in seconds]
    return ways[medians.index(min(medians))]


def clock(call: Callable[[], Any], device: torch.device | None = None) -> float:
    """Seconds of one call, until the device has done it."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device | None) -> None:
    if device is not None and device.type != "cpu":
        torch.get_device_module(device.type).synchronize()
