"""A detector whose answers can be worked out on paper: it finds white squares."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from retinanet.anchors import AnchorSpec
from retinanet.structures import Outputs

Pixels = npt.NDArray[np.uint8]


class WhiteFinder(nn.Module):
    """Each white cell of 8 x 8 pixels of the network's input is an object of class 0 ("white").

    Class 1 ("bright") has a lower score at the same place, so there are two classes on one box.
    """

    num_classes = 2
    strides = (8,)
    size_divisor = 32
    anchors = AnchorSpec((16.0,), (8,), (1.0,), (1.0,))

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pixel_mean", torch.full((3, 1, 1), 100.4))
        self.batches: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Outputs:
        self.batches.append(tuple(images.shape))
        cells = nn.functional.avg_pool2d(images.float().mean(dim=1, keepdim=True), 8)
        logit = (cells - 200) / 10  # white: 5.5, so a score of .996; padding: -10
        deltas = torch.zeros(len(images), 4, *cells.shape[-2:])
        # The anchor is 16 x 16 about the cell's upper left corner; the answer is the cell itself:
        # centre moved by 4 of 16 pixels, sides halved.
        deltas[:, :2] = 0.25
        deltas[:, 2:] = np.log(0.5)
        return Outputs((torch.cat([logit, logit - 2], dim=1),), (deltas,))


def black(height: int, width: int, *squares: tuple[int, int, int, int]) -> Pixels:
    """A black image with white (x1, y1, x2, y2)."""
    image = np.zeros((height, width, 3), np.uint8)
    for x1, y1, x2, y2 in squares:
        image[y1:y2, x1:x2] = 255
    return image
