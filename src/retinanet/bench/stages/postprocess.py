"""Post-processing of the heads' outputs into detections."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retinanet.bench.benchmark import Benchmark, Case, Rival, Setting
from retinanet.bench.limits import read_limit
from retinanet.bench.samples import anchors_for, map_sizes, torchvision_network
from retinanet.bench.tables import count
from retinanet.postprocess import postprocess
from retinanet.structures import Outputs, flatten_level

_CASES: dict[str, dict[str, Any]] = {
    "8 images": {"batch": 8},
    "1 image": {},
    "8 images, 1 class": {"batch": 8, "classes": 1},
    "1 image, 1 class": {"classes": 1},
    "many candidates": {"batch": 8, "background": -4.0},
    # An untrained network: every score is near the prior, .01, and none exceeds .05.
    "no candidates": {"batch": 8, "background": -12.0, "objects": 0},
}


def postprocessing(setting: Setting) -> list[Case]:
    """Threshold, top-k per level, decoding and NMS against torchvision's."""
    height, width = setting.pick((96, 128), (256, 320), (800, 1088))
    cases = []
    for name, changes in _CASES.items():
        options = {"batch": 1, "classes": setting.pick(5, 80, 80), **changes}
        noun = "class" if options["classes"] == 1 else "classes"
        size = f"{height} x {width}, {options['classes']} {noun}"
        if name.endswith("candidates"):
            size += f", {count(options['batch'], 'image')}"
        cases.append(Case(name, size, partial(_benchmark, setting, height, width, **options)))
    return cases


def outputs_like(
    height: int,
    width: int,
    batch: int,
    classes: int,
    device: torch.device,
    *,
    background: float = -8.0,
    objects: int = 10,
) -> Outputs:
    """Random outputs like a trained network's: a few dozen high scores around each object.

    Args:
        height, width, batch, classes, device: of the outputs.
        background: mean logit elsewhere; its standard deviation is 1.
        objects: per image.
    """
    generator = torch.Generator().manual_seed(0)
    logits, deltas = [], []
    for h, w in map_sizes(height, width):
        level = torch.randn(batch, h, w, 9, classes, generator=generator).add_(background)
        for image in range(batch):
            for _ in range(objects // 2):
                y, x = (int(torch.randint(0, side, (), generator=generator)) for side in (h, w))
                label = int(torch.randint(0, classes, (), generator=generator))
                cells = level[image, y : y + 3, x : x + 3, :, label]
                cells.copy_(torch.randn(cells.shape, generator=generator).mul_(1.5))
        offsets = torch.randn(batch, h, w, 36, generator=generator) * 0.1
        logits.append(level.reshape(batch, h, w, 9 * classes).to(device).permute(0, 3, 1, 2))
        deltas.append(offsets.to(device).permute(0, 3, 1, 2))
    return Outputs(tuple(logits), tuple(deltas))


def _benchmark(
    setting: Setting, height: int, width: int, *, batch: int, classes: int, **like: Any
) -> Benchmark:
    outputs = outputs_like(height, width, batch, classes, setting.device, **like)
    anchors = anchors_for(height, width, setting.device)
    sizes = torch.tensor([[height - 8 * i, width] for i in range(batch)])
    shapes = [(int(h), int(w)) for h, w in sizes]

    def ours() -> Any:
        return postprocess(outputs, anchors, sizes, num_classes=classes)

    rivals = []
    if "torchvision" in setting.vs:
        network = torchvision_network(nn.Identity(), classes, detections_per_img=100)
        # Its heads return this layout, so the conversion is not timed.
        levels = {
            "cls_logits": [flatten_level(x, classes).contiguous() for x in outputs.logits],
            "bbox_regression": [flatten_level(x, 4).contiguous() for x in outputs.deltas],
        }
        boxes = [list(anchors)] * batch
        theirs = partial(network.postprocess_detections, levels, boxes, shapes)
        rivals.append(Rival("torchvision", theirs, _compare))
    return Benchmark(ours, rivals, limit=read_limit(outputs.logits))


def _compare(output: Any, expected: Any) -> str:
    difference, total = 0.0, 0
    for image, image_expected in zip(output, expected, strict=True):
        ours = _sorted(image.boxes, image.scores, image.labels)
        theirs = _sorted(*(image_expected[name] for name in ("boxes", "scores", "labels")))
        assert ours.shape == theirs.shape, f"{len(ours)} and {len(theirs)} detections"
        np.testing.assert_array_equal(ours[:, 0], theirs[:, 0])
        np.testing.assert_allclose(ours[:, 5], theirs[:, 5], rtol=0, atol=1e-6)
        np.testing.assert_allclose(ours[:, 1:5], theirs[:, 1:5], rtol=0, atol=1e-2)
        difference = max(difference, np.abs(ours[:, 1:5] - theirs[:, 1:5]).max(initial=0.0))
        total += len(ours)
    return f"the same {total} boxes, to {difference:.0e} pixels"


def _sorted(boxes: Tensor, scores: Tensor, labels: Tensor) -> Any:
    """(N, 6) label, box and score, in an order that does not depend on equal scores."""
    columns = [labels[:, None].double(), boxes.double(), scores[:, None].double()]
    table = torch.cat(columns, dim=1).cpu().numpy()
    return table[np.lexsort((*table[:, 1:5].round(1).T, table[:, 0]))]
