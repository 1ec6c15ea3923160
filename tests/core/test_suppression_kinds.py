"""Soft-NMS, weighted box fusion, thresholds per class, temperature and flip test-time augmentation.

References are written in NumPy or by hand.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.testing import assert_close
from torchvision.ops import box_iou, nms

from retinanet.anchors import default_anchor_spec, feature_sizes, level_anchors
from retinanet.postprocess import (
    Candidates,
    calibrate_scores,
    merge_candidates,
    mirror_images,
    postprocess,
)
from retinanet.structures import Detections, Outputs

NMS_KINDS = ("hard", "soft", "wbf")
Boxes = NDArray[np.float64]


def candidates_of(*rows: tuple[float, float, float, float, float], label: int = 0) -> Candidates:
    """Candidates of an image from rows of a box and its score."""
    table = torch.tensor(rows).reshape(-1, 5)
    labels = torch.full((len(table),), label)
    return Candidates(table[:, :4], table[:, 4], labels, torch.zeros_like(labels))


def random_candidates(count: int = 200, images: int = 3, classes: int = 4) -> Candidates:
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(count, 2, generator=generator) * 60
    size = 20 + torch.rand(count, 2, generator=generator) * 20
    return Candidates(
        torch.cat([corner, corner + size], dim=1),
        torch.rand(count, generator=generator) * 0.9 + 0.06,
        torch.randint(classes, (count,), generator=generator),
        torch.randint(images, (count,), generator=generator),
    )


def merge(candidates: Candidates, images: int = 1, classes: int = 4, **settings: Any) -> Any:
    return merge_candidates(candidates, num_images=images, num_classes=classes, **settings)


def iou_of(box: Boxes, others: Boxes) -> Boxes:
    iou: Boxes = box_iou(torch.tensor(box[None]), torch.tensor(others))[0].numpy()
    return iou


def slow_soft(boxes: Boxes, scores: Boxes, sigma: float, lowest: float) -> list[tuple[int, float]]:
    """Bodla et al. 2017, Fig. 2, with Eq. 3."""
    left, scores = list(range(len(scores))), scores.copy()
    kept = []
    while left:
        best = max(left, key=lambda i: scores[i])
        if scores[best] <= lowest:
            break
        kept.append((best, float(scores[best])))
        left.remove(best)
        for i in left:
            scores[i] *= math.exp(-(float(iou_of(boxes[best], boxes[[i]])[0]) ** 2) / sigma)
    return kept


def slow_fusion(boxes: Boxes, scores: Boxes, threshold: float) -> list[tuple[Boxes, float]]:
    """Solovyev et al. 2021, Sec. 3, steps 2 to 6, for one model and with the highest score."""
    clusters: list[list[int]] = []
    fused: list[Boxes] = []
    for i in np.argsort(-scores, kind="stable").tolist():
        overlaps = iou_of(boxes[i], np.stack(fused)) if fused else np.zeros(1)
        if overlaps.max() > threshold:
            cluster = int(overlaps.argmax())
            clusters[cluster].append(i)
        else:
            cluster = len(clusters)
            clusters.append([i])
            fused.append(boxes[i])
        own = clusters[cluster]
        fused[cluster] = (boxes[own] * scores[own, None]).sum(0) / scores[own].sum()
    return [(box, float(scores[own].max())) for box, own in zip(fused, clusters, strict=True)]


def by_group(candidates: Candidates) -> Any:
    for image in range(3):
        for label in range(4):
            own = (candidates.images == image) & (candidates.labels == label)
            yield image, label, candidates.boxes[own].double(), candidates.scores[own].double()


def of_group(found: list[Detections], image: int, label: int) -> Detections:
    own = found[image].labels == label
    return Detections(found[image].boxes[own], found[image].scores[own], found[image].labels[own])


def test_merge_candidates_hard_equals_torchvision() -> None:
    candidates = random_candidates()
    found = merge(candidates, 3, detections_per_image=1000)
    for image, label, boxes, scores in by_group(candidates):
        kept = nms(boxes, scores, 0.5)
        own = of_group(found, image, label)
        assert_close(own.boxes.double(), boxes[kept])
        assert_close(own.scores.double(), scores[kept])


def test_merge_candidates_soft_equals_slow_reference() -> None:
    candidates = random_candidates()
    settings: dict[str, Any] = {"nms": "soft", "nms_sigma": 0.4, "score_threshold": 0.1}
    found = merge(candidates, 3, detections_per_image=1000, **settings)
    for image, label, boxes, scores in by_group(candidates):
        expected = slow_soft(boxes.numpy(), scores.numpy(), 0.4, 0.1)
        own = of_group(found, image, label)
        assert own.scores.tolist() == pytest.approx([score for _, score in expected], abs=1e-5)
        assert_close(own.boxes.double(), boxes[[i for i, _ in expected]])


def test_merge_candidates_fusion_equals_slow_reference() -> None:
    candidates = random_candidates()
    found = merge(candidates, 3, nms="wbf", nms_threshold=0.6, detections_per_image=1000)
    for image, label, boxes, scores in by_group(candidates):
        expected = slow_fusion(boxes.numpy(), scores.numpy(), 0.6)
        own = of_group(found, image, label)
        assert own.scores.tolist() == pytest.approx([score for _, score in expected], abs=1e-6)
        assert_close(own.boxes.double(), torch.tensor(np.stack([box for box, _ in expected])))


def test_soft_nms_by_hand() -> None:
    # The boxes overlap by 50 of 150: an IoU of 1/3.
    pair = candidates_of((0, 0, 10, 10, 0.9), (5, 0, 15, 10, 0.8), (50, 50, 60, 60, 0.7))
    (found,) = merge(pair, nms="soft")
    assert found.scores.tolist() == pytest.approx([0.9, 0.7, 0.8 * math.exp(-1 / 9 / 0.5)])
    (found,) = merge(pair, nms="soft", detections_per_image=2)
    assert found.scores.tolist() == pytest.approx([0.9, 0.7])
    (found,) = merge(pair, nms="soft", score_threshold=0.65)  # .641 is under it
    assert len(found) == 2


@pytest.mark.parametrize("nms", NMS_KINDS)
def test_merge_candidates_class_agnostic_merges_across_classes(nms: str) -> None:
    first, second = candidates_of((0, 0, 10, 10, 0.9)), candidates_of((0, 0, 10, 10, 0.8), label=2)
    both = Candidates(*(torch.cat(parts) for parts in zip(first, second, strict=True)))
    (found,) = merge(both, nms=nms)
    assert found.labels.tolist() == [0, 2]
    assert_close(found.scores, both.scores)
    (found,) = merge(both, nms=nms, class_agnostic_nms=True, nms_sigma=0.1)
    assert found.labels.tolist() == [0]


@pytest.mark.parametrize("nms", NMS_KINDS)
def test_merge_candidates_without_candidates_is_empty(nms: str) -> None:
    first, second = merge(candidates_of(), 2, nms=nms)
    for found in (first, second):
        assert found.boxes.shape == (0, 4)
        assert found.labels.dtype == torch.int64


def random_outputs() -> tuple[Outputs, list[Tensor], Tensor]:
    spec = default_anchor_spec()
    cells = feature_sizes(spec.strides, 64, 96)
    generator = torch.Generator().manual_seed(0)

    def level(channels: int, cell: tuple[int, int], shift: float, scale: float) -> Tensor:
        return torch.randn(2, channels, *cell, generator=generator) * scale + shift

    outputs = Outputs(
        tuple(level(9 * 3, cell, -4.0, 1.5) for cell in cells),
        tuple(level(36, cell, 0.0, 0.3) for cell in cells),
    )
    return outputs, level_anchors(spec, cells), torch.tensor([[64, 96], [50, 70]])


def over(found: Detections, thresholds: Tensor) -> Detections:
    high = found.scores > thresholds[found.labels]
    return Detections(found.boxes[high], found.scores[high], found.labels[high])


def assert_same(found: list[Detections], expected: list[Detections]) -> None:
    for own, other in zip(found, expected, strict=True):
        assert len(own) > 5
        assert torch.equal(own.labels, other.labels)
        assert_close(own.scores, other.scores)
        assert_close(own.boxes, other.boxes)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
@pytest.mark.parametrize("nms", NMS_KINDS)
def test_score_thresholds_only_filter(nms: str, temperature: float) -> None:
    arguments = random_outputs()
    options: dict[str, Any] = {
        "num_classes": 3,
        "nms": nms,
        "temperature": temperature,
        "detections_per_image": 10**6,
    }
    low = float(calibrate_scores(torch.tensor(0.05, dtype=torch.float64), temperature))
    every = postprocess(*arguments, **options, score_threshold=low)
    high = postprocess(*arguments, **options, score_threshold=0.3)
    assert_same(high, [over(found, torch.full((3,), 0.3)) for found in every])
    thresholds = [0.5, 0.2, 0.4]
    found = postprocess(*arguments, **options, class_thresholds=thresholds)
    assert_same(found, [over(image, torch.tensor(thresholds)) for image in every])


@pytest.mark.parametrize("nms", NMS_KINDS)
@pytest.mark.parametrize("temperature", [0.6, 1.8])
def test_temperature_keeps_boxes_and_their_order(nms: str, temperature: float) -> None:
    arguments = random_outputs()
    plain = postprocess(*arguments, num_classes=3, nms=nms)
    scaled = float(calibrate_scores(torch.tensor(0.05, dtype=torch.float64), temperature))
    found = postprocess(
        *arguments, num_classes=3, nms=nms, temperature=temperature, score_threshold=scaled
    )
    for own, other in zip(found, plain, strict=True):
        assert torch.equal(own.labels, other.labels)
        assert_close(own.boxes, other.boxes)
        assert_close(own.scores, (other.scores.logit() / temperature).sigmoid())


def test_calibrate_scores_by_hand() -> None:
    scores = torch.tensor([0.0, 0.1, 0.5, 0.8, 1.0])
    odds = torch.tensor([0.0, (1 / 9) ** 0.5, 1.0, 2.0, math.inf])  # square roots, of temperature 2
    expected = odds / (1 + odds)
    expected[-1] = 1
    assert_close(calibrate_scores(scores, 2.0), expected)
    assert calibrate_scores(scores, 1.0) is scores


def test_mirror_images_stays_within_the_padding() -> None:
    images = torch.arange(2 * 3 * 2 * 5).reshape(2, 3, 2, 5)
    mirrored = mirror_images(images, torch.tensor([[2, 5], [2, 3]]))
    assert torch.equal(mirrored[0], images[0].flip(-1))
    assert torch.equal(mirrored[1, ..., :3], images[1, ..., :3].flip(-1))
    assert torch.equal(mirrored[1, ..., 3:], images[1, ..., 3:])


def test_postprocess_mirrored_outputs_come_back() -> None:
    outputs, anchors, sizes = random_outputs()
    nothing = Outputs(
        tuple(torch.full_like(level, -20) for level in outputs.logits), outputs.deltas
    )
    plain = postprocess(outputs, anchors, sizes, num_classes=3)
    found = postprocess(nothing, anchors, sizes, num_classes=3, mirrored=outputs)
    for own, other, width in zip(found, plain, sizes[:, 1].tolist(), strict=True):
        x1, y1, x2, y2 = other.boxes.unbind(1)
        assert_close(own.boxes, torch.stack([width - x2, y1, width - x1, y2], dim=1))
        assert_close(own.scores, other.scores)
    images = torch.rand(2, 3, 64, 96)
    assert torch.equal(mirror_images(mirror_images(images, sizes), sizes), images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nms": "matrix"}, "nms must be one of hard, soft, wbf, got 'matrix'"),
        ({"nms_sigma": 0.0}, "nms_sigma must be over 0, got 0.0"),
        ({"temperature": 0.0}, "temperature must be over 0, got 0.0"),
        ({"class_thresholds": [0.1, 0.2]}, "has 2 numbers, and there are 3 classes"),
        ({"class_thresholds": [0.1, 0.2, 1.0]}, r"must be in .*, got 1.0"),
    ],
)
def test_postprocess_invalid_setting_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        postprocess(*random_outputs(), num_classes=3, **options)
    with pytest.raises(TypeError, match="unknown settings of postprocess: sigma"):
        postprocess(*random_outputs(), num_classes=3, sigma=1)  # type: ignore[call-arg]
