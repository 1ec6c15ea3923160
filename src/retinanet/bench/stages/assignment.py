"""Which anchor answers for which object."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from retinanet.bench.contest import Case, Contest, Rival, Setting
from retinanet.bench.samples import anchors_for, random_boxes
from retinanet.bench.stages.classes import class_rows
from retinanet.matching import match_anchors
from retinanet.structures import Targets


def matching(setting: Setting) -> list[Case]:
    """Matching beside torchvision's matrix of IoU and its matcher, an image at a time."""
    height, width = _side(setting)
    size = f"{class_rows(height, width):,} anchors"
    return [
        Case(f"{objects:,} objects, 8 images", size, partial(_contest, setting, 8, objects))
        for objects in (10, 100, 1000)
    ]


def _side(setting: Setting) -> tuple[int, int]:
    found: tuple[int, int] = setting.pick((96, 128), (256, 320), (1024, 1280))
    return found


def _contest(setting: Setting, batch: int, objects: int) -> Contest:
    height, width = _side(setting)
    generator = torch.Generator().manual_seed(0)
    anchors = torch.cat(anchors_for(height, width, setting.device))
    boxes = torch.stack([random_boxes(objects, height, width, generator) for _ in range(batch)])
    targets = Targets(boxes, torch.zeros(batch, objects, dtype=torch.int64)).to(setting.device)

    def ours() -> Tensor:
        return match_anchors(anchors, targets, foreground_iou=0.5, background_iou=0.4)

    rivals = []
    if "torchvision" in setting.vs:
        matcher = Matcher(0.5, 0.4, allow_low_quality_matches=False)

        def theirs() -> Tensor:
            return torch.stack([matcher(box_iou(one, anchors)) for one in targets.boxes])

        rivals.append(Rival("torchvision", theirs, _compare))
    return Contest(ours, rivals)


def _compare(got: Tensor, expected: Tensor) -> str:
    differ = int((got != expected).sum())
    # Two objects, or an object and a threshold, may be equal but for the last bit of the IoU.
    assert differ <= 1e-5 * got.numel(), f"{differ} of {got.numel()} anchors"
    return f"{differ} of {got.numel():,} anchors"
