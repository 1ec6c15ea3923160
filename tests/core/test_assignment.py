"""ATSS and task-aligned assignment against slow references that search every anchor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from retinanet.anchors import anchor_spec, feature_sizes, level_anchors
from retinanet.boxes import decode_boxes
from retinanet.config import LossSettings
from retinanet.losses import assign_anchors, detection_losses
from retinanet.structures import (
    BACKGROUND,
    IGNORED,
    Outputs,
    Targets,
    flatten_levels,
    pad_targets,
)

CLASSES = 3
ONE = {"scales": [1.0], "aspect_ratios": [1.0]}


def make_scene(
    height: int, width: int, objects: int, seed: int, **anchors: Any
) -> tuple[Outputs, list[Tensor], Targets]:
    """Two images of random objects, the second with fewer, and random outputs near the anchors."""
    generator = torch.Generator().manual_seed(seed)
    spec = anchor_spec([8, 16, 32, 64], **anchors)
    cells = feature_sizes(spec.strides, height, width)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    outputs = Outputs(
        tuple(random(2, spec.per_cell * CLASSES, *cell) - 2 for cell in cells),
        tuple(random(2, spec.per_cell * 4, *cell) * 0.1 for cell in cells),
    )
    boxes, labels = [], []
    for count in (objects, objects // 3):
        sides = 6 + torch.rand(count, 2, generator=generator) ** 3 * (min(height, width) - 8)
        corner = torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - sides)
        boxes.append(torch.cat([corner, corner + sides], dim=1))
        labels.append(torch.randint(CLASSES, (count,), generator=generator))
    return outputs, level_anchors(spec, cells), pad_targets(boxes, labels)


def slow_candidates(
    anchors: list[Tensor], cells: list[tuple[int, int]], box: Tensor, count: int
) -> tuple[list[int], list[bool]]:
    """Indices of the anchors of the `count` nearest cells of each level, and which are inside."""
    index: list[int] = []
    inside: list[bool] = []
    first = 0
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    for level, (boxes, (rows, columns)) in enumerate(zip(anchors, cells, strict=True)):
        per_cell = len(boxes) // (rows * columns)
        centres = (boxes[::per_cell, :2] + boxes[::per_cell, 2:]) / 2
        distance = (centres[:, 0] - x) ** 2 + (centres[:, 1] - y) ** 2
        nearest = distance.argsort(stable=True)[:count]
        own = [
            bool(box[0] <= cx <= box[2] and box[1] <= cy <= box[3])
            for cx, cy in centres[nearest].tolist()
        ]
        if level == 0 and sum(own) < 4:
            own = [is_in or i < 4 for i, is_in in enumerate(own)]
        for cell, is_in in zip(nearest.tolist(), own, strict=True):
            index += [first + cell * per_cell + a for a in range(per_cell)]
            inside += [is_in] * per_cell
        first += len(boxes)
    return index, inside


def slow_assignment(
    outputs: Outputs, anchors: list[Tensor], targets: Targets, settings: LossSettings
) -> tuple[Tensor, Tensor]:
    """Matches and aligned scores, object by object."""
    every = torch.cat(anchors)
    cells = [(level.shape[2], level.shape[3]) for level in outputs.logits]
    images, rows = len(targets.boxes), len(every)
    matches = torch.full((images, rows), BACKGROUND)
    scores = torch.zeros(images, rows)
    probabilities = flatten_levels(outputs.logits, CLASSES).sigmoid()
    predicted = decode_boxes(flatten_levels(outputs.deltas, 4), every)
    aligned = settings.assignment == "task_aligned"
    for image in range(images):
        claims: dict[int, list[tuple[float, int, float]]] = {}
        for m, (box, label) in enumerate(
            zip(targets.boxes[image], targets.labels[image].tolist(), strict=True)
        ):
            if label < 0:
                continue
            count = 25 if aligned else settings.candidates
            index, inside = slow_candidates(anchors, cells, box, count)
            compared = (predicted[image] if aligned else every)[index]
            iou = box_iou(compared, box[None])[:, 0]
            if aligned:
                t = probabilities[image, index, label] * iou**settings.task_beta
                order = np.argsort(-t.numpy() + 10 * ~np.array(inside), kind="stable")
                kept = [i for i in order[: settings.task_topk] if inside[i]]
            else:
                t = iou
                kept = [
                    i
                    for i in range(len(index))
                    if inside[i] and iou[i] >= iou.mean() + iou.std(unbiased=True)
                ]
            for i in kept:
                claims.setdefault(index[i], []).append((float(iou[i]), m, float(t[i])))
        won: dict[int, list[tuple[int, float, float]]] = {}
        for anchor, claim in claims.items():
            iou_value, m, t_value = max(claim, key=lambda c: (c[0], -c[1]))
            matches[image, anchor] = m
            won.setdefault(m, []).append((anchor, iou_value, t_value))
        for pairs in won.values():
            best_iou, best_t = max(p[1] for p in pairs), max(p[2] for p in pairs)
            for anchor, _, t_value in pairs:
                scores[image, anchor] = t_value / best_t * best_iou
    return matches, scores


@pytest.mark.parametrize("anchors", [ONE, {}], ids=["1 anchor", "9 anchors"])
@pytest.mark.parametrize(("height", "width"), [(192, 256), (64, 640), (64, 64)])
@pytest.mark.parametrize("assignment", ["atss", "task_aligned"])
def test_assignment_equals_a_search_of_all_anchors(
    assignment: str, height: int, width: int, anchors: dict[str, Any]
) -> None:
    outputs, levels, targets = make_scene(height, width, 12, seed=height, **anchors)
    settings = LossSettings(assignment=assignment, classification="quality_focal")

    result = assign_anchors(outputs, levels, targets, num_classes=CLASSES, settings=settings)

    matches, scores = slow_assignment(outputs, levels, targets, settings)
    assert torch.equal(result.matches, matches)
    assert (matches >= 0).any(dim=1).all()
    if assignment == "task_aligned":
        assert result.scores is not None
        torch.testing.assert_close(result.scores, scores)


def test_assignment_scores_are_iou_of_predicted_boxes() -> None:
    outputs, levels, targets = make_scene(128, 128, 6, seed=1)
    for assignment in ("iou", "atss"):
        settings = LossSettings(assignment=assignment, classification="varifocal")

        result = assign_anchors(outputs, levels, targets, num_classes=CLASSES, settings=settings)

        predicted = decode_boxes(flatten_levels(outputs.deltas, 4), torch.cat(levels))
        image, row = (result.matches >= 0).nonzero(as_tuple=True)
        boxes = targets.boxes[image, result.matches[image, row]]
        expected = torch.stack(
            [
                box_iou(p[None], b[None])[0, 0]
                for p, b in zip(predicted[image, row], boxes, strict=True)
            ]
        )
        assert result.scores is not None
        torch.testing.assert_close(result.scores[image, row], expected)
        assert (result.scores[result.matches < 0] == 0).all()


@pytest.mark.parametrize("assignment", ["atss", "task_aligned"])
def test_every_object_has_an_anchor_even_if_it_is_smaller_than_a_cell(assignment: str) -> None:
    outputs, levels, _ = make_scene(128, 128, 2, seed=2, **ONE)
    boxes = torch.tensor([[33.0, 33.0, 35.0, 36.0], [90.0, 61.0, 92.0, 62.5]])
    targets = pad_targets([boxes, boxes[:1]], [torch.tensor([0, 1]), torch.tensor([2])])
    settings = LossSettings(assignment=assignment)

    result = assign_anchors(outputs, levels, targets, num_classes=CLASSES, settings=settings)

    assert {0, 1} <= set(result.matches[0].tolist())
    assert 0 in result.matches[1].tolist()


@pytest.mark.parametrize("assignment", ["atss", "task_aligned"])
def test_assignment_skips_padding_empty_boxes_and_ignored_regions(assignment: str) -> None:
    outputs, levels, _ = make_scene(128, 128, 2, seed=3, **ONE)
    boxes = torch.tensor([[0.0, 0, 64, 64], [70, 70, 70, 90], [8, 8, 40, 40], [0, 0, 0, 0]])
    labels = torch.tensor([IGNORED, 1, 2, BACKGROUND])
    targets = Targets(boxes.expand(2, -1, -1), labels.expand(2, -1))
    settings = LossSettings(assignment=assignment)

    matches = assign_anchors(
        outputs, levels, targets, num_classes=CLASSES, settings=settings
    ).matches

    assert set(matches.unique().tolist()) == {2, BACKGROUND, IGNORED}
    first = torch.cat(levels)
    covered = box_iou(first, boxes[:1])[:, 0] > 0
    assert not ((matches[0] == IGNORED) & ~covered).any()


@pytest.mark.parametrize("assignment", ["iou", "atss", "task_aligned"])
@pytest.mark.parametrize("classification", ["focal", "quality_focal", "varifocal"])
def test_losses_without_readable_values_equal_those_with_them(
    assignment: str, classification: str
) -> None:
    outputs, levels, targets = make_scene(128, 192, 7, seed=4, **ONE)
    settings = LossSettings(
        assignment=assignment, classification=classification, box="giou", normalizer="batch"
    )

    def losses(outputs: Outputs) -> Tensor:
        result = detection_losses(outputs, levels, targets, num_classes=CLASSES, settings=settings)
        return torch.stack([result.classification, result.box])

    expected = losses(outputs)
    # Inside a transform of torch.func no value can be read, as on a GPU.
    traced = torch.func.vmap(
        lambda scale: losses(Outputs(*(tuple(v * scale for v in part) for part in outputs)))
    )(torch.ones(1))[0]

    torch.testing.assert_close(traced, expected)


@pytest.mark.parametrize("assignment", ["iou", "atss", "task_aligned"])
def test_assignment_needs_no_device_sync(assignment: str) -> None:
    """A tensor on the meta device has no values: reading them raises."""
    outputs, levels, targets = make_scene(128, 192, 7, seed=4)
    settings = LossSettings(assignment=assignment, classification="quality_focal")

    result = assign_anchors(
        Outputs(*(tuple(level.to("meta") for level in part) for part in outputs)),
        [level.to("meta") for level in levels],
        targets.to("meta"),
        num_classes=CLASSES,
        settings=settings,
    )

    assert result.matches.shape == (2, sum(map(len, levels)))
    assert result.scores is not None
    assert result.scores.device.type == "meta"


def test_task_aligned_starts_with_atss() -> None:
    settings = LossSettings(assignment="task_aligned", task_warmup=0.25)

    assert settings.at(0.2).assignment == "atss"
    assert settings.at(0.25).assignment == "task_aligned"
    assert LossSettings().at(0.0).assignment == "iou"
    quality = LossSettings(assignment="task_aligned", classification="quality_focal")
    first = quality.at(0.0)
    assert (first.classification, first.alpha) == ("focal", 0.25)
    assert quality.at(0.5).classification == "quality_focal"


def test_assignment_without_objects_is_background() -> None:
    outputs, levels, _ = make_scene(64, 64, 2, seed=5)
    targets = pad_targets([torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2)
    settings = LossSettings(assignment="task_aligned", classification="quality_focal")

    result = assign_anchors(outputs, levels, targets, num_classes=CLASSES, settings=settings)

    assert (result.matches == BACKGROUND).all()
    assert (result.weight == 0).all()
