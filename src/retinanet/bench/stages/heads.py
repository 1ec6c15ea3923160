"""What follows the heads: class loss, matching and post-processing."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.retinanet import RetinaNetClassificationHead
from torchvision.ops import box_iou

from retinanet.bench.benchmark import Benchmark, Case, Rival, Setting, count
from retinanet.bench.limits import copy_limit, read_limit
from retinanet.bench.samples import (
    anchors_for,
    class_loss_input,
    num_anchors,
    outputs_like,
    random_boxes,
    rms_error,
    torchvision_network,
    total_bytes,
)
from retinanet.config import LossConfig
from retinanet.losses import classification_loss
from retinanet.matching import match_anchors
from retinanet.postprocess import postprocess
from retinanet.structures import Targets, flatten_level, flatten_levels

_ALPHA, _GAMMA = 0.25, 2.0

_LossOutput = tuple[Tensor, list[Tensor]]  # the loss and its gradients

_LOSS_CASES: dict[str, dict[str, Any]] = {
    "float32, 2 images": {},
    "float32, 8 images": {"batch": 8},
    "heads' layout, 2 images": {"heads_layout": True},
    "overwriting, 2 images": {"overwrite": True},
    "bf16, 2 images": {"dtype": torch.bfloat16},
    "1 class, 2 images": {"classes": 1},
    "2,000 objects, 2 images": {"objects": 2000},
}
_POSTPROCESS_CASES: dict[str, dict[str, Any]] = {
    "8 images": {"batch": 8},
    "1 image": {},
    "8 images, 1 class": {"batch": 8, "classes": 1},
    "1 image, 1 class": {"classes": 1},
    "many candidates": {"batch": 8, "background": -4.0},
    # An untrained network: every score is near the prior, .01, and none exceeds .05.
    "no candidates": {"batch": 8, "background": -12.0, "objects": 0},
}


def class_loss(setting: Setting) -> list[Case]:
    """Class loss of all anchors, forward and backward, against torchvision's one-hot targets."""
    sides = setting.pick((64, 96), (256, 320), (800, 1216))
    cases = []
    for name, changes in _LOSS_CASES.items():
        options = {"batch": 2, "classes": setting.pick(5, 80, 80), "objects": 20, **changes}
        size = f"{num_anchors(*sides):,} anchors x {options['classes']}"
        cases.append(Case(name, size, partial(_class_loss, setting, sides, **options)))
    return cases


def _class_loss(
    setting: Setting,
    sides: tuple[int, int],
    *,
    batch: int,
    classes: int,
    objects: int,
    dtype: torch.dtype = torch.float32,
    heads_layout: bool = False,
    overwrite: bool = False,
) -> Benchmark:
    head_levels, labels = class_loss_input(*sides, batch, classes, objects, setting.device)
    # The heads' levels, or one (B, R, K) tensor.
    levels = head_levels if heads_layout else [flatten_levels(head_levels, classes)]
    levels = [level.to(dtype).requires_grad_() for level in levels]
    # Mean over images of the loss over each image's foreground anchors (Sec. 4.1).
    foreground = (labels >= 0).sum(dim=1).clamp(min=1)

    def ours() -> _LossOutput:
        flat = [flatten_level(x, classes) for x in levels] if heads_layout else levels
        weights = (foreground * batch).float().reciprocal()
        # When overwriting, later rounds read the gradient of the first: the same work.
        settings = LossConfig(alpha=_ALPHA, gamma=_GAMMA)
        loss = classification_loss(flat, labels, weights, settings, overwrite_logits=overwrite)
        return _backward(loss, levels)

    # torchvision computes in float32; bfloat16 keeps 8 bits of a gradient.
    compare = partial(_compare_losses, 1e-4 if dtype == torch.float32 else 1e-2)
    float_levels = [level.detach().float().requires_grad_() for level in levels]

    def theirs() -> _LossOutput:
        logits = flatten_levels(float_levels, classes) if heads_layout else float_levels[0]
        return _backward(_torchvision_loss(logits, labels), float_levels)

    return Benchmark(
        ours,
        [Rival("torchvision", theirs, compare)],
        limit=copy_limit(levels),
        input_bytes=total_bytes(levels),
    )


def _backward(loss: Tensor, inputs: list[Tensor]) -> _LossOutput:
    return loss.detach(), list(torch.autograd.grad(loss, inputs))


def _compare_losses(tolerance: float, output: _LossOutput, expected: _LossOutput) -> str:
    torch.testing.assert_close(output[0].float(), expected[0].float(), rtol=1e-4, atol=0)
    error = max(rms_error(a, b) for a, b in zip(output[1], expected[1], strict=True))
    assert error <= tolerance, f"relative rms {error:.1e} of the gradient"
    return f"gradient {error:.0e} rms"


def _torchvision_loss(logits: Tensor, labels: Tensor) -> Tensor:
    # One ground-truth box per class: the index of an anchor's box is its label, and background and
    # ignored anchors have the same codes as ours.
    targets = [{"labels": torch.arange(logits.shape[-1], device=logits.device)}] * len(labels)
    head = RetinaNetClassificationHead(1, 1, 1)
    loss: Tensor = head.compute_loss(targets, {"cls_logits": logits}, list(labels))
    return loss


def matching(setting: Setting) -> list[Case]:
    """Match a batch, against torchvision's IoU matrix and matcher, image by image."""
    sides = setting.pick((96, 128), (256, 320), (1024, 1280))
    size = f"{num_anchors(*sides):,} anchors"
    return [
        Case(f"{objects:,} objects, 8 images", size, partial(_matching, setting, objects, sides))
        for objects in (10, 100, 1000)
    ]


def _matching(setting: Setting, objects: int, sides: tuple[int, int]) -> Benchmark:
    generator = torch.Generator().manual_seed(0)
    anchors = torch.cat(anchors_for(*sides, setting.device))
    boxes = torch.stack([random_boxes(objects, *sides, generator) for _ in range(8)])
    targets = Targets(boxes, torch.zeros(8, objects, dtype=torch.int64)).to(setting.device)
    matcher = Matcher(0.5, 0.4, allow_low_quality_matches=False)

    def ours() -> Tensor:
        return match_anchors(anchors, targets, foreground_iou=0.5, background_iou=0.4)

    def theirs() -> Tensor:
        return torch.stack([matcher(box_iou(image, anchors)) for image in targets.boxes])

    return Benchmark(ours, [Rival("torchvision", theirs, _compare_matches)])


def _compare_matches(output: Tensor, expected: Tensor) -> str:
    differ = int((output != expected).sum())
    # Rounding of the IoU decides between equal boxes and at the thresholds.
    assert differ <= 1e-5 * output.numel(), f"{differ} of {output.numel()} anchors"
    return f"{differ} of {output.numel():,} anchors"


def postprocessing(setting: Setting) -> list[Case]:
    """Threshold, top-k per level, decoding and NMS against torchvision's."""
    height, width = setting.pick((96, 128), (256, 320), (800, 1088))
    cases = []
    for name, changes in _POSTPROCESS_CASES.items():
        options = {"batch": 1, "classes": setting.pick(5, 80, 80), **changes}
        noun = "class" if options["classes"] == 1 else "classes"
        size = f"{height} x {width}, {options['classes']} {noun}"
        if name.endswith("candidates"):
            size += f", {count(options['batch'], 'image')}"
        cases.append(Case(name, size, partial(_postprocessing, setting, height, width, **options)))
    return cases


def _postprocessing(
    setting: Setting, height: int, width: int, *, batch: int, classes: int, **like: Any
) -> Benchmark:
    outputs = outputs_like(height, width, batch, classes, setting.device, **like)
    anchors = anchors_for(height, width, setting.device)
    sizes = torch.tensor([[height - 8 * i, width] for i in range(batch)])

    def ours() -> Any:
        return postprocess(outputs, anchors, sizes, num_classes=classes)

    network = torchvision_network(nn.Identity(), classes, detections_per_img=100)
    # Its heads return this layout, so the conversion is not timed.
    levels = {
        "cls_logits": [flatten_level(x, classes).contiguous() for x in outputs.logits],
        "bbox_regression": [flatten_level(x, 4).contiguous() for x in outputs.deltas],
    }
    boxes, shapes = [list(anchors)] * batch, [tuple(size) for size in sizes.tolist()]
    theirs = partial(network.postprocess_detections, levels, boxes, shapes)
    rivals = [Rival("torchvision", theirs, _compare_detections)]
    return Benchmark(ours, rivals, limit=read_limit(outputs.logits))


def _compare_detections(output: Any, expected: Any) -> str:
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
