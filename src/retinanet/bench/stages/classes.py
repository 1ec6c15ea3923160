"""The class loss of every anchor, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.retinanet import RetinaNetClassificationHead

from retinanet.bench.contest import Case, Contest, Rival, Setting
from retinanet.bench.limits import copy_limit
from retinanet.bench.samples import ClassWork, class_work, rms_error, total_bytes
from retinanet.losses.detection import CLASSIFICATION_LOSSES
from retinanet.structures import flatten_level, flatten_levels

_ALPHA, _GAMMA = 0.25, 2.0


def class_loss(setting: Setting) -> list[Case]:
    """The class loss beside torchvision's head, which makes one-hot targets."""
    height, width = _side(setting)
    classes = setting.pick(5, 80, 80)
    ways: dict[str, dict[str, Any]] = {
        "float32, 2 images": {},
        "float32, 8 images": {"batch": 8},
        "heads' layout, 2 images": {"own_layout": True},
        "overwriting, 2 images": {"overwrite": True},
        "bf16, 2 images": {"dtype": torch.bfloat16},
        "1 class, 2 images": {"classes": 1},
        "2,000 objects, 2 images": {"objects": 2000},
    }
    cases = []
    for way, changes in ways.items():
        options = {"batch": 2, "classes": classes, "objects": 20, **changes}
        size = f"{class_rows(height, width):,} anchors x {options['classes']}"
        cases.append(Case(way, size, partial(_contest, setting, **options)))
    return cases


def class_rows(height: int, width: int) -> int:
    """Anchors of an image of that size, nine a cell."""
    sides = [(-(-height // s), -(-width // s)) for s in (8, 16, 32, 64, 128)]
    return sum(9 * h * w for h, w in sides)


def _side(setting: Setting) -> tuple[int, int]:
    found: tuple[int, int] = setting.pick((64, 96), (256, 320), (800, 1216))
    return found


def our_loss(levels: list[Tensor], labels: Tensor, *, overwrite: bool = False) -> Tensor:
    """The mean over images of each one's focal loss over its foreground anchors (Sec. 4.1).

    Args:
        levels: (B, R_l, K) logits.
        labels: (B, R).
        overwrite: let the gradient take the logits' place.
    """
    foreground = (labels >= 0).sum(dim=1).clamp(min=1)
    weights = (foreground * len(foreground)).float().reciprocal()
    loss: Tensor = CLASSIFICATION_LOSSES["focal"](
        levels, labels, weights, _ALPHA, _GAMMA, 0.0, overwrite_logits=overwrite
    )
    return loss


def _contest(
    setting: Setting,
    *,
    batch: int,
    classes: int,
    objects: int,
    dtype: torch.dtype = torch.float32,
    own_layout: bool = False,
    overwrite: bool = False,
) -> Contest:
    work = class_work(*_side(setting), batch, classes, objects, setting.device)
    labels = work.labels
    # Either the heads' own levels, or one (B, R, K) tensor, from which each loss starts.
    given = work.levels if own_layout else [flatten_levels(work.levels, classes)]
    given = [one.to(dtype).requires_grad_() for one in given]

    def flat(levels: list[Tensor]) -> list[Tensor]:
        return [flatten_level(one, classes) for one in levels] if own_layout else levels

    def ours() -> tuple[Tensor, list[Tensor]]:
        # When overwriting, later rounds see the gradient that the first left: the work is the same.
        return _backward(our_loss(flat(given), labels, overwrite=overwrite), given)

    rivals = [
        Rival(name, call, _compare(dtype))
        for name, call in _rivals(setting, work, given, own_layout).items()
    ]
    return Contest(
        ours,
        rivals,
        limit=copy_limit(given),
        input_bytes=total_bytes(given),
    )


def _backward(loss: Tensor, of: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    return loss.detach(), list(torch.autograd.grad(loss, of))


def _compare(dtype: torch.dtype) -> Callable[[Any, Any], str]:
    # Rivals compute and keep float32; bfloat16 keeps 8 bits of a gradient.
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2

    def compare(got: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]) -> str:
        torch.testing.assert_close(got[0].float(), expected[0].float(), rtol=1e-4, atol=0)
        error = max(rms_error(one, other) for one, other in zip(got[1], expected[1], strict=True))
        assert error <= tolerance, f"relative rms {error:.1e} of the gradient"
        return f"gradient {error:.0e} rms"

    return compare


def _rivals(
    setting: Setting, work: ClassWork, given: list[Tensor], own_layout: bool
) -> dict[str, Callable[[], Any]]:
    """Each rival's loss and gradient; of bfloat16 logits, in float32 as they would without them."""
    batch, classes = len(work.objects), given[0].shape[-1]
    if own_layout:
        classes = given[0].shape[1] // 9
    theirs = [one.detach().float().requires_grad_() for one in given]

    def logits() -> Tensor:
        return flatten_levels(theirs, classes) if own_layout else theirs[0]

    found: dict[str, Callable[[], Any]] = {}
    if "torchvision" in setting.vs:
        head = RetinaNetClassificationHead(1, 1, 1)
        targets = [{"labels": one} for one in work.objects]
        matches = list(work.matches)
        found["torchvision"] = lambda: _backward(
            head.compute_loss(targets, {"cls_logits": logits()}, matches), theirs
        )
    if "fvcore" in setting.vs:
        sigmoid_focal_loss = import_module("fvcore.nn").sigmoid_focal_loss_jit

        def fvcore() -> Any:
            labels, total = work.labels, torch.zeros((), device=setting.device)
            for one, of in zip(logits(), labels, strict=True):
                counted = of >= -1
                dense = torch.zeros_like(one).scatter_(1, of.clamp(min=0)[:, None], 1.0)
                dense = dense * (of >= 0)[:, None]
                loss = sigmoid_focal_loss(
                    one[counted], dense[counted], alpha=_ALPHA, gamma=_GAMMA, reduction="sum"
                )
                total = total + loss / (of >= 0).sum().clamp(min=1)
            return _backward(total / batch, theirs)

        found["fvcore"] = fvcore
    if "apex" in setting.vs and setting.device.type == "cuda":
        apex_loss = import_module("apex.contrib.focal_loss").focal_loss

        def apex() -> Any:
            # Its labels are as ours, and its normaliser is one number, so: image by image.
            labels, total = work.labels, torch.zeros((), device=setting.device)
            for one, of in zip(logits(), labels, strict=True):
                foreground = (of >= 0).sum().clamp(min=1).float()
                total = total + apex_loss(one, of, foreground, classes, _ALPHA, _GAMMA, 0.0)
            return _backward(total / batch, theirs)

        found["apex"] = apex
    return found
