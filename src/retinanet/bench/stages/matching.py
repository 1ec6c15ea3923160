"""Matching of anchors to ground-truth boxes."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from retinanet.bench.benchmark import Benchmark, Case, Rival, Setting
from retinanet.bench.samples import anchors_for, num_anchors, random_boxes
from retinanet.matching import match_anchors
from retinanet.structures import Targets


def matching(setting: Setting) -> list[Case]:
    """Match a batch, against torchvision's IoU matrix and matcher, image by image."""
    sides = setting.pick((96, 128), (256, 320), (1024, 1280))
    size = f"{num_anchors(*sides):,} anchors"
    return [
        Case(
            f"{objects:,} objects, 8 images", size, partial(_benchmark, setting, 8, objects, sides)
        )
        for objects in (10, 100, 1000)
    ]


def _benchmark(setting: Setting, batch: int, objects: int, sides: tuple[int, int]) -> Benchmark:
    generator = torch.Generator().manual_seed(0)
    anchors = torch.cat(anchors_for(*sides, setting.device))
    boxes = torch.stack([random_boxes(objects, *sides, generator) for _ in range(batch)])
    targets = Targets(boxes, torch.zeros(batch, objects, dtype=torch.int64)).to(setting.device)

    def ours() -> Tensor:
        return match_anchors(anchors, targets, foreground_iou=0.5, background_iou=0.4)

    rivals = []
    if "torchvision" in setting.vs:
        matcher = Matcher(0.5, 0.4, allow_low_quality_matches=False)

        def theirs() -> Tensor:
            return torch.stack([matcher(box_iou(image, anchors)) for image in targets.boxes])

        rivals.append(Rival("torchvision", theirs, _compare))
    return Benchmark(ours, rivals)


def _compare(output: Tensor, expected: Tensor) -> str:
    differ = int((output != expected).sum())
    # Rounding of the IoU decides between equal boxes and at the thresholds.
    assert differ <= 1e-5 * output.numel(), f"{differ} of {output.numel()} anchors"
    return f"{differ} of {output.numel():,} anchors"
