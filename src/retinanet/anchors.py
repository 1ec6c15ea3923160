"""Anchors: the boxes that the network scores and corrects (Lin et al. 2017, Sec. 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import SupportsFloat

import torch
from torch import Tensor

from retinanet.config import AnchorConfig, Rounding

_DEFAULTS = AnchorConfig()


@dataclass(frozen=True)
class AnchorSpec:
    """All that determines the anchors of an image.

    Attributes:
        sizes: square root of an anchor's area in pixels at scale 1, per level.
        strides: pixels from cell to cell, per level.
        scales: factors of the size.
        aspect_ratios: height / width.
        rounding: ``none``: exact sizes; ``torchvision``: for torchvision's weights (see
            :func:`level_anchors`).

    Raises:
        ValueError: a list is empty, a number is not over 0, `sizes` and `strides` differ in
            length, or `rounding` is unknown.
    """

    sizes: tuple[float, ...]
    strides: tuple[int, ...]
    scales: tuple[float, ...] = _DEFAULTS.scales
    aspect_ratios: tuple[float, ...] = _DEFAULTS.aspect_ratios
    rounding: Rounding = _DEFAULTS.rounding

    def __post_init__(self) -> None:
        for name in ("sizes", "strides", "scales", "aspect_ratios"):
            numbers = getattr(self, name)
            is_valid = all(
                isinstance(n, SupportsFloat) and 0 < float(n) < math.inf for n in numbers
            )
            if not numbers or not is_valid:
                raise ValueError(f"anchor {name} must be one or more numbers over 0, got {numbers}")
        if len(self.sizes) != len(self.strides):
            raise ValueError(
                f"anchors need one size per level: got {len(self.sizes)} sizes {self.sizes} "
                f"for {len(self.strides)} levels of stride {self.strides}"
            )
        if self.rounding not in ("none", "torchvision"):
            raise ValueError(f"anchor rounding is none or torchvision, got {self.rounding!r}")

    @property
    def per_cell(self) -> int:
        """A: anchors per cell."""
        return len(self.scales) * len(self.aspect_ratios)


def anchor_spec(
    strides: Sequence[int],
    *,
    sizes: Sequence[float] | None = _DEFAULTS.sizes,
    scales: Sequence[float] = _DEFAULTS.scales,
    aspect_ratios: Sequence[float] = _DEFAULTS.aspect_ratios,
    rounding: Rounding = _DEFAULTS.rounding,
) -> AnchorSpec:
    """Build an :class:`AnchorSpec` from lists; `sizes` None is 4 x stride (Sec. 4: 32 on P3).

    Raises:
        ValueError: as :class:`AnchorSpec`.
    """
    if sizes is None:
        sizes = [4.0 * stride for stride in strides]
    return AnchorSpec(
        tuple(float(size) for size in sizes),
        tuple(int(stride) for stride in strides),
        tuple(float(scale) for scale in scales),
        tuple(float(ratio) for ratio in aspect_ratios),
        rounding,
    )


def default_anchor_spec(p2: bool = False) -> AnchorSpec:
    """Build the paper's: areas 32^2 on P3 to 512^2 on P7, A = 9; `p2` adds 16^2 on P2.

    Example: Sec. 4, "in total there are A = 9 anchors per level".

        >>> default_anchor_spec().per_cell
        9
        >>> default_anchor_spec().sizes
        (32.0, 64.0, 128.0, 256.0, 512.0)
    """
    return anchor_spec([2**level for level in range(2 if p2 else 3, 8)])


def feature_sizes(strides: Sequence[int], height: int, width: int) -> tuple[tuple[int, int], ...]:
    """Return rows and columns of each level for an image of `height` x `width` pixels."""
    return tuple((math.ceil(height / stride), math.ceil(width / stride)) for stride in strides)


def level_anchors(
    spec: AnchorSpec,
    feature_sizes: Sequence[tuple[int, int]],
    device: torch.device | str | None = None,
) -> list[Tensor]:
    """Return the anchors of an image by level.

    Their order is: rows, cells of a row, aspect ratios of a cell, scales of a ratio (torchvision's
    order, so that its weights fit). The first cell's anchors are centred on the image's corner
    (torchvision, detectron2; the paper does not say).

    ``rounding="torchvision"`` reproduces torchvision: sizes are truncated to whole pixels, corners
    rounded to whole pixels, and the distance between cells is the image's side divided by the
    level's, in whole pixels: under 128 on P7 of an 800 px image, for instance.

    Args:
        spec: of the anchors.
        feature_sizes: (rows, columns) of each level, as :func:`feature_sizes` returns them.
        device: None: torch's default.

    Returns:
        L tensors (H_l * W_l * A, 4), float32 pixels; cached: do not write to them.

    Raises:
        ValueError: the number of levels differs from the spec's.
    """
    if len(feature_sizes) != len(spec.strides):
        raise ValueError(
            f"the anchors have {len(spec.strides)} levels of stride {spec.strides}, "
            f"got {len(feature_sizes)} feature sizes"
        )
    cells = tuple((int(rows), int(columns)) for rows, columns in feature_sizes)
    # Not torch.get_default_device(), which fails in torch 2.7 once the default was unset.
    target = torch.empty(0).device if device is None else torch.device(device)
    return list(_level_anchors(spec, cells, target))


# 200,000 anchors take 3 MB, for as long as the process runs.
@lru_cache(maxsize=32)
def _level_anchors(
    spec: AnchorSpec, cells: tuple[tuple[int, int], ...], device: torch.device
) -> tuple[Tensor, ...]:
    # Computed on the CPU, whatever torch's default device is; and not as inference tensors, which a
    # later training step could not use.
    with torch.inference_mode(False), torch.no_grad():
        height, width = (side * spec.strides[0] for side in cells[0])
        levels = []
        for size, stride, (rows, columns) in zip(spec.sizes, spec.strides, cells, strict=True):
            steps = (stride, stride)
            if spec.rounding == "torchvision":
                steps = (height // rows, width // columns)
            anchors = anchor_grid(cell_anchors(spec, size), rows, columns, steps)
            # A synchronous copy: the next caller may use another stream.
            levels.append(anchors.to(torch.float32).to(device))
        return tuple(levels)


def anchor_grid(cell: Tensor, rows: int, columns: int, steps: tuple[int, int]) -> Tensor:
    """Repeat a cell's anchors (A, 4) at every cell of a level: (rows * columns * A, 4).

    `steps` are the pixels from row to row and from column to column.
    """
    y = torch.arange(rows, dtype=cell.dtype, device=cell.device) * steps[0]
    x = torch.arange(columns, dtype=cell.dtype, device=cell.device) * steps[1]
    corner_y, corner_x = torch.meshgrid(y, x, indexing="ij")
    corners = torch.stack((corner_x, corner_y, corner_x, corner_y), dim=-1)
    return (corners[:, :, None] + cell).reshape(-1, 4)


def cell_anchors(spec: AnchorSpec, size: float) -> Tensor:
    """Compute the anchors (A, 4) of a level of this `size`, centred on 0: float64 on the CPU."""
    sides = [size * scale for scale in spec.scales]
    if spec.rounding == "torchvision":
        sides = [float(int(side)) for side in sides]
    roots = torch.tensor(spec.aspect_ratios, dtype=torch.float64, device="cpu").sqrt()[:, None]
    side = torch.tensor(sides, dtype=torch.float64, device="cpu")
    half_width, half_height = (side / roots).flatten() / 2, (side * roots).flatten() / 2
    cell = torch.stack((-half_width, -half_height, half_width, half_height), dim=1)
    return cell.round() if spec.rounding == "torchvision" else cell
