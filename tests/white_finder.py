"""Detectors whose results can be worked out on paper: of white squares, and of colours."""

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

    Its score is .996. Class 1 ("bright") has .971 at the same place, so there are two classes on
    one box.
    """

    num_classes = 2
    strides = (8,)
    size_divisor = 32
    anchors = AnchorSpec((16.0,), (8,), (1.0,), (1.0,))

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pixel_mean", torch.full((3, 1, 1), 100.4))
        self.batches: list[tuple[int, ...]] = []

    def logits(self, cells: Tensor) -> Tensor:
        """Compute the logit of each class from the mean colour of each cell."""
        logit = (cells.mean(dim=1, keepdim=True) - 200) / 10  # white: 5.5; padding: -10
        return torch.cat([logit, logit - 2], dim=1)

    def forward(self, images: Tensor) -> Outputs:
        self.batches.append(tuple(images.shape))
        logits = self.logits(nn.functional.avg_pool2d(images.float(), 8))
        deltas = torch.zeros(len(images), 4, *logits.shape[-2:])
        # The anchor is 16 x 16 about the cell's upper left corner; the box is the cell itself:
        # centre moved by 4 of 16 pixels, sides halved.
        deltas[:, :2] = 0.25
        deltas[:, 2:] = np.log(0.5)
        return Outputs((logits,), (deltas,))


class ColourFinder(WhiteFinder):
    """The score of class k is sigmoid((channel k - half) / 20).

    Where half is 150, 255 gives .9948, 200 gives .9241, 170 gives .7311 and 110 gives .1192.
    """

    num_classes = 3

    def __init__(self, half: float) -> None:
        super().__init__()
        self.half = half
        self.pixel_mean.zero_()

    def logits(self, cells: Tensor) -> Tensor:
        return (cells - self.half) / 20


def black(height: int, width: int, *squares: tuple[int, int, int, int]) -> Pixels:
    """A black image with white (x1, y1, x2, y2)."""
    image = np.zeros((height, width, 3), np.uint8)
    for x1, y1, x2, y2 in squares:
        image[y1:y2, x1:x2] = 255
    return image
