"""The whole detector as a program of ``torch.export``: what every file is made from."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from retinanet.inference.openvino_backend import any_size

MAX_BATCH, MAX_SIDE = 4096, 65535

OUTPUTS = {
    "detections": ("boxes", "scores", "labels", "count"),
    "scores": ("boxes", "scores"),
}


def export_program(
    detector: nn.Module, image_size: int, max_size: int
) -> torch.export.ExportedProgram:
    """Follow a :class:`retinanet.exporters.graph.WholeDetector` for any batch, height and width."""
    # An example of another size than the network's, whose coarsest level has more than one cell if
    # any image's has: what compiles the program takes a side of 1 for one that stays 1.
    longer = min(max_size, 2 * image_size)
    example = torch.zeros(2, 3, image_size - 7, longer - 5, dtype=torch.uint8)
    batch = torch.export.Dim("batch", max=MAX_BATCH)
    height, width = (torch.export.Dim(name, max=MAX_SIDE) for name in ("height", "width"))
    with any_size(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch and torchvision about each other
        program = torch.export.export(
            detector.eval(),
            (example,),
            dynamic_shapes={"images": {0: batch, 2: height, 3: width}},
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program
