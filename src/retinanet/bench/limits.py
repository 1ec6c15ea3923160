"""Lower bounds of the time on this machine, measured together with what is compared to them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from retinanet.bench.benchmark import Limit
from retinanet.model.fused import FusedConv2d, can_pack


def copy_limit(tensors: Sequence[Tensor]) -> Limit:
    """Time of reading the tensors once and writing as much into allocated memory."""
    sources = [tensor.detach() for tensor in tensors]
    copies = [torch.empty_like(tensor) for tensor in sources]

    def copy() -> list[Tensor]:
        return [target.copy_(source) for target, source in zip(copies, sources, strict=True)]

    return Limit("copy", copy)


def read_limit(tensors: Sequence[Tensor]) -> Limit:
    """Time of reading the tensors once: the faster of torch's sum and maximum."""
    # Flat views: a reduction over permuted memory is slower.
    flat = [tensor.detach().as_strided((tensor.numel(),), (1,)) for tensor in tensors]
    sums, maxima = (lambda: [x.sum() for x in flat]), (lambda: [x.amax() for x in flat])
    return Limit("read", fastest([sums, maxima]))


def matrix_limit(
    flops: float, height: int, width: int, batch: int, dtype: torch.dtype, device: torch.device
) -> Limit:
    """Time of `flops` operations at the rate of the pyramid's and the heads' convolution.

    That is a 3x3 convolution from 256 to 256 channels over `batch` maps of P3's size, in the
    fastest memory layout or weight packing on this machine. A multiply-add counts as two.
    """
    convolution = nn.Conv2d(256, 256, 3, padding=1).to(device, dtype).eval()
    last = nn.Conv2d(256, 256, 3, padding=1).to(device, dtype).eval()
    last = last.to(memory_format=torch.channels_last)
    x = torch.randn(batch, 256, height, width).to(device, dtype)
    x_last = x.contiguous(memory_format=torch.channels_last)
    implementations = [lambda: convolution(x), lambda: last(x_last)]
    with torch.inference_mode():
        if device.type == "cpu" and can_pack(dtype):
            packed = FusedConv2d(convolution)
            packed.shapes_kept = 1
            implementations.append(lambda: packed(x_last))
            packed(x_last)  # packs its weights at the next call, which is not timed
        best = fastest(implementations, device)

    @torch.inference_mode()
    def convolve() -> None:
        best()

    return Limit("matrix peak", convolve, flops / (2 * 9 * 256 * 256 * height * width * batch))


def count_flops(call: Callable[[], Any]) -> float:
    """Count floating-point operations of convolutions and matrix products, backward included.

    On the meta device nothing is computed.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def fastest(
    calls: Sequence[Callable[[], Any]], device: torch.device | None = None
) -> Callable[[], Any]:
    """Return the call with the smallest median of five interleaved runs after a warm-up."""
    for call in calls:
        call()
    rounds = [[clock(call, device) for call in calls] for _ in range(5)]
    medians = [statistics.median(times) for times in zip(*rounds, strict=True)]
    return calls[medians.index(min(medians))]


def clock(call: Callable[[], Any], device: torch.device | None = None) -> float:
    """Seconds of one call, with a device sync before and after it."""
    _synchronize(device)
    start = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: torch.device | None) -> None:
    if device is not None and device.type != "cpu":
        torch.get_device_module(device.type).synchronize()
