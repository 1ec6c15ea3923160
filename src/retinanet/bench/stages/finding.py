"""From the heads' outputs to the objects found."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from retinanet.bench.contest import Case, Contest, Rival, Setting
from retinanet.bench.limits import read_limit
from retinanet.bench.samples import anchors_for, outputs_like, torchvision_network
from retinanet.postprocess import postprocess
from retinanet.structures import flatten_level


def postprocessing(setting: Setting) -> list[Case]:
    """Threshold, best of a level, decoding and NMS beside torchvision's."""
    height, width = _side(setting)
    classes = setting.pick(5, 80, 80)
    ways: dict[str, dict[str, Any]] = {
        "8 images": {"batch": 8},
        "1 image": {},
        "8 images, 1 class": {"batch": 8, "classes": 1},
        "1 image, 1 class": {"classes": 1},
        "many candidates": {"batch": 8, "background": -4.0},
        # As an untrained network has it: every score near the prior, .01, and none over .05.
        "no candidates": {"batch": 8, "background": -12.0, "objects": 0},
    }
    cases = []
    for way, changes in ways.items():
        options = {"batch": 1, "classes": classes, **changes}
        classes_said = {1: "1 class"}.get(options["classes"], f"{options['classes']} classes")
        size = f"{height} x {width}, {classes_said}"
        if way.endswith("candidates"):
            size += ", 8 images"
        cases.append(Case(way, size, partial(_contest, setting, **options)))
    return cases


def _side(setting: Setting) -> tuple[int, int]:
    found: tuple[int, int] = setting.pick((96, 128), (256, 320), (800, 1088))
    return found


def _contest(setting: Setting, *, batch: int, classes: int, **like: Any) -> Contest:
    height, width = _side(setting)
    outputs = outputs_like(height, width, batch, classes, setting.device, **like)
    anchors = anchors_for(height, width, setting.device)
    content = torch.tensor([[height - 8 * i, width] for i in range(batch)])
    shapes = [(int(h), int(w)) for h, w in content]

    def ours() -> Any:
        return postprocess(outputs, anchors, content, num_classes=classes)

    rivals = []
    if "torchvision" in setting.vs:
        network = torchvision_network(nn.Identity(), classes, detections_per_img=100)
        # What its heads give is in this form already; making it so does not count.
        levels = {
            "cls_logits": [flatten_level(one, classes).contiguous() for one in outputs.logits],
            "bbox_regression": [flatten_level(one, 4).contiguous() for one in outputs.deltas],
        }
        boxes = [list(anchors)] * batch

        def theirs() -> Any:
            return network.postprocess_detections(levels, boxes, shapes)

        rivals.append(Rival("torchvision", theirs, _compare))
    return Contest(ours, rivals, limit=read_limit(outputs.logits))


def _compare(got: Any, expected: Any) -> str:
    far, found = 0.0, 0
    for one, other in zip(got, expected, strict=True):
        ours = _ordered(one.boxes, one.scores, one.labels)
        theirs = _ordered(other["boxes"], other["scores"], other["labels"])
        assert ours.shape == theirs.shape, f"{len(ours)} and {len(theirs)} objects"
        np.testing.assert_array_equal(ours[:, 0], theirs[:, 0])
        np.testing.assert_allclose(ours[:, 5], theirs[:, 5], rtol=0, atol=1e-6)
        np.testing.assert_allclose(ours[:, 1:5], theirs[:, 1:5], rtol=0, atol=1e-2)
        if len(ours):
            far = max(far, float(np.abs(ours[:, 1:5] - theirs[:, 1:5]).max()))
        found += len(ours)
    return f"the same {found} boxes, to {far:.0e} pixels"


def _ordered(boxes: Tensor, scores: Tensor, labels: Tensor) -> Any:
    """Label, box and score (N, 6) in an order that scores which tie do not change."""
    columns = [labels[:, None].double(), boxes.double(), scores[:, None].double()]
    table = torch.cat(columns, dim=1).cpu().numpy()
    return table[np.lexsort((*table[:, 1:5].round(1).T, table[:, 0]))]
