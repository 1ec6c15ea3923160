"""The pyramid where its coarsest maps are a single cell."""

from __future__ import annotations

import torch

from retinanet.model.heads import FeaturePyramid


def _dirty_the_heap() -> None:
    """Leave infinities in memory that is about to be given out again."""
    for size in (64, 512, 2304, 4096, 20_000, 65_536, 300_000):
        for dtype in (torch.float32, torch.bfloat16):
            torch.full((size,), float("inf"), dtype=dtype)


def test_bf16_gradients_of_single_cells_are_those_of_float32() -> None:
    torch.manual_seed(0)
    pyramid = FeaturePyramid((8, 8, 8), 16, "c5")
    maps = [torch.randn(2, 8, side, side) for side in (4, 2, 1)]  # an image of 32 pixels

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        pyramid.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            levels = pyramid(maps)
        _dirty_the_heap()
        sum(level.float().square().sum() for level in levels).backward()
        return [pyramid.p6.weight.grad, pyramid.p7.weight.grad]

    expected = gradients(torch.float32)
    for _ in range(20):
        for found, right in zip(gradients(torch.bfloat16), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=0.05, atol=0.05)
