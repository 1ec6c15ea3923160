"""The whole detector in one graph gives the detections of the detector."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from retinanet.data.image_files import network_size as reference_size
from retinanet.data.images import resize_to
from retinanet.exporters.graph import (
    PADDING_LABEL,
    DetectorGraph,
    RawDetectorGraph,
    network_size,
    suppress_by_engine,
    suppress_by_torchvision,
    symbolic_network_size,
)
from retinanet.inference import Detector
from retinanet.inference.sources import Prepared

SHAPES = [(64, 64), (200, 100), (33, 400), (400, 33), (20, 24), (1, 1), (96, 64), (63, 95)]


def noise(batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


def assert_same_objects(boxes: Tensor, labels: Tensor, own: Tensor, own_labels: Tensor) -> None:
    """Compare without regard to the order, which may differ where scores are nearly the same."""
    distance = (boxes[:, None] - own).abs().amax(dim=2)
    distance[labels[:, None] != own_labels] = torch.inf
    limit = 2e-3 + 1e-4 * own.abs().amax(dim=1)
    assert bool((distance.amin(dim=0) <= limit).all()) if len(own) else not len(boxes)


def detect(eager: Detector, images: Tensor, **thresholds: Any) -> Any:
    size = (images.shape[2], images.shape[3])
    resized = (resize_to(image, eager.image_size, eager.max_size)[0] for image in images)
    return eager.detect_prepared([Prepared(image, size) for image in resized], **thresholds)


THRESHOLDS: list[dict[str, Any]] = [
    {"class_agnostic_nms": True},
    {"score_threshold": 0.999},  # no detection
    {"score_threshold": 0.0, "topk_candidates": 400, "detections_per_image": 1000},
    {"detections_per_image": 5000},  # more than there are candidates
    {"temperature": 1.7, "score_threshold": 0.4},
]


@pytest.mark.parametrize(
    ("shape", "thresholds"),
    [*((shape, {}) for shape in SHAPES), *(((200, 100), values) for values in THRESHOLDS)],
)
def test_graph_gives_the_detections_of_the_detector(
    eager: Detector, shape: tuple[int, int], thresholds: dict[str, Any]
) -> None:
    images = noise(2, *shape)
    with torch.no_grad():
        boxes, scores, labels, count = DetectorGraph(eager, "torch", **thresholds)(images)
    for i, expected in enumerate(detect(eager, images, **thresholds)):
        n = int(count[i])
        assert n == len(expected)
        torch.testing.assert_close(scores[i, :n], expected.scores, atol=1e-5, rtol=0)
        assert_same_objects(boxes[i, :n], labels[i, :n], expected.boxes, expected.labels)
        assert set(labels[i, n:].tolist()) <= {PADDING_LABEL}
        assert not scores[i, n:].any()
        assert not boxes[i, n:].any()


@pytest.mark.parametrize("sides", [(384, 640), (800, 1333), (64, 96), (600, 600)])
def test_network_size_equals_the_reference(sides: tuple[int, int]) -> None:
    random.seed(0)
    shapes = [(random.randint(1, 5000), random.randint(1, 5000)) for _ in range(500)]
    # Halves of a pixel, which are rounded to the even number.
    shapes += [(512, 683), (256, 341), (128, 85), (1, 9000), (9000, 1)]
    for shape in shapes:
        assert network_size(*shape, *sides) == reference_size(*shape, *sides), shape
        assert symbolic_network_size(*shape, *sides) == reference_size(*shape, *sides), shape


def test_network_size_of_a_resized_image_is_its_size() -> None:
    random.seed(1)
    for _ in range(5000):
        shorter = random.randint(32, 1000)
        longest = random.randint(shorter, 3 * shorter)
        once = reference_size(random.randint(1, 6000), random.randint(1, 6000), shorter, longest)
        assert reference_size(*once, shorter, longest) == once


def test_graph_with_nan_logits_detects_nothing(eager: Detector) -> None:
    graph = DetectorGraph(eager, "torch")
    torch.nn.init.constant_(graph.network.class_head.last.bias, float("nan"))
    with torch.no_grad():
        assert graph(noise(1, 64, 64))[3].tolist() == [0]


def test_raw_graph_outputs_every_anchor(eager: Detector) -> None:
    images = noise(2, 200, 100)  # 96 x 48 for the network, padded to 96 x 64
    with torch.no_grad():
        boxes, scores = RawDetectorGraph(eager, "torch")(images)
    anchors = 9 * (12 * 8 + 6 * 4 + 3 * 2 + 2 * 1 + 1 * 1)
    assert boxes.shape == (2, anchors, 4)
    assert scores.shape == (2, anchors, 3)
    assert float(boxes[..., 2].max()) <= 100
    assert float(boxes[..., 3].max()) <= 200
    best = detect(eager, images)[0]
    row = int(scores[0].amax(dim=1).argmax())
    torch.testing.assert_close(scores[0, row].max(), best.scores[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(boxes[0, row], best.boxes[0], atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("suppress", [suppress_by_torchvision, suppress_by_engine])
def test_suppression_by_hand(suppress: Any) -> None:
    boxes = torch.tensor([[[0, 0, 10, 10], [0, 0, 10, 6], [0, 0, 10, 10], [50, 50, 60, 60.0]]])
    scores = torch.tensor([[0.9, 0.8, 0.7, -1.0]])
    labels = torch.tensor([[0, 0, 1, 0]])
    by_class = suppress(boxes, scores, labels, 2, 0.5, 10, 100)
    assert by_class.tolist() == [[True, False, True, False]]  # IoU .6 in class 0
    agnostic = suppress(boxes, scores, labels, 1, 0.5, 10, 100)
    assert agnostic.tolist() == [[True, False, False, False]]
    assert not suppress(boxes, scores - 2, labels, 2, 0.5, 10, 100).any()
