"""From outputs to detections: hand cases, torchvision's own, limits, and what is refused."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.retinanet import RetinaNet

from retinanet.anchors import anchor_spec, default_anchor_spec, feature_sizes, level_anchors
from retinanet.kernels import native
from retinanet.postprocess import postprocess
from retinanet.structures import Detections, Outputs, flatten_level

pytestmark = pytest.mark.usefixtures("backend")

SPEC = anchor_spec([8], sizes=[16], scales=[1], aspect_ratios=[1])
CELLS = [(4, 4)]
ANCHORS = level_anchors(SPEC, CELLS)  # 16 boxes of 16 x 16, 8 px apart
NOTHING = -20.0


def logit(score: float) -> float:
    return math.log(score / (1 - score))


def outputs_of(scores: dict[tuple[int, int, int, int], float], *, images: int = 1) -> Outputs:
    """Two classes, one level; {(image, class, row, column): score}, boxes as the anchors are."""
    logits = torch.full((images, 2, 4, 4), NOTHING)
    for place, score in scores.items():
        logits[place] = logit(score)
    return Outputs((logits,), (torch.zeros(images, 4, 4, 4),))


def run(outputs: Outputs, **options: Any) -> list[Detections]:
    sizes = torch.tensor([[32, 32]] * len(outputs.logits[0]))
    return postprocess(outputs, ANCHORS, sizes, **({"num_classes": 2} | options))


def test_boxes_by_hand() -> None:
    outputs = outputs_of({(0, 1, 2, 1): 0.9})
    outputs.deltas[0][0, :, 2, 1] = torch.tensor([0.5, 0.0, math.log(0.5), 0.0])
    (found,) = run(outputs)
    # the anchor at column 1, row 2: centre (8, 16); 8 px to the right, half as wide
    assert_close(found.boxes, torch.tensor([[12.0, 8.0, 20.0, 24.0]]))
    assert_close(found.scores, torch.tensor([0.9]))
    assert found.labels.tolist() == [1]


def test_score_threshold_is_exclusive() -> None:
    outputs = outputs_of({(0, 0, 0, 0): 0.051, (0, 0, 3, 3): 0.049})
    (found,) = run(outputs)
    assert_close(found.scores, torch.tensor([0.051]))
    half = Outputs((torch.zeros(1, 2, 4, 4),), outputs.deltas)  # every score is .5
    assert len(run(half, score_threshold=0.5)[0]) == 0
    assert len(run(half, score_threshold=0.4999)[0]) > 0
    half.logits[0][0, 1] = 1.0  # now each anchor has one class that is over the threshold
    assert run(half, score_threshold=0.5)[0].labels.unique().tolist() == [1]


def test_score_threshold_0_lets_everything_through() -> None:
    (found,) = run(outputs_of({}), score_threshold=0.0, nms_threshold=1.0)
    assert len(found) == 32
    # NMS drops IoU over .5; neighbours 8 px apart have 1/3
    (found,) = run(outputs_of({}), score_threshold=0.0)
    assert len(found) == 32


@pytest.mark.parametrize(
    ("nms_threshold", "kept"),
    [(0.33, [0.9]), (0.34, [0.9, 0.8])],  # the two boxes overlap by 128 / 384
)
def test_nms_keeps_the_better_of_a_class(nms_threshold: float, kept: list[float]) -> None:
    outputs = outputs_of({(0, 0, 1, 1): 0.8, (0, 0, 1, 2): 0.9})
    (found,) = run(outputs, nms_threshold=nms_threshold)
    assert_close(found.scores, torch.tensor(kept))


def test_class_agnostic_nms() -> None:
    scores = {(0, 0, 1, 1): 0.8, (0, 1, 1, 1): 0.9, (1, 0, 1, 1): 0.7}
    first, second = run(outputs_of(scores, images=2), class_agnostic_nms=True)
    assert first.labels.tolist() == [1]
    assert second.labels.tolist() == [0]


def test_postprocess_selected_classes_are_as_if_there_were_no_others() -> None:
    scores = {(0, 0, 0, column): 0.9 - column / 100 for column in range(4)}
    scores |= {(0, 1, 0, 0): 0.4, (0, 1, 3, 3): 0.3}
    limits: dict[str, Any] = {"topk_candidates": 2, "detections_per_image": 2}
    (found,) = run(outputs_of(scores), selected=[1], class_agnostic_nms=True, **limits)
    assert_close(found.scores, torch.tensor([0.4, 0.3]))
    assert found.labels.tolist() == [1, 1]
    assert found.boxes.tolist() == [ANCHORS[0][0].clamp(0, 32).tolist(), [16, 16, 32, 32]]
    (both,) = run(outputs_of(scores), selected=[0, 1])
    (every,) = run(outputs_of(scores))
    assert_close(both.boxes, every.boxes)
    assert torch.equal(both.labels, every.labels)


def test_nothing_found() -> None:
    first, second = run(outputs_of({}, images=2))
    for found in (first, second):
        assert found.boxes.shape == (0, 4)
        assert found.scores.dtype == torch.float32
        assert found.labels.dtype == torch.int64


def test_nan_finds_nothing() -> None:
    outputs = outputs_of({(0, 0, 0, 0): 0.9})
    outputs.logits[0][0, 1] = float("nan")
    (found,) = run(outputs)
    assert found.labels.tolist() == [0]
    assert not found.scores.isnan().any()


def random_outputs(
    dtype: torch.dtype = torch.float32, *, classes: int = 7, images: int = 3
) -> tuple[Outputs, list[Tensor], Tensor]:
    spec = default_anchor_spec()
    cells = feature_sizes(spec.strides, 256, 320)
    generator = torch.Generator().manual_seed(0)

    def level(channels: int, cell: tuple[int, int], shift: float, scale: float) -> Tensor:
        values = torch.randn(images, channels, *cell, generator=generator) * scale + shift
        return values.to(dtype).to(memory_format=torch.channels_last)

    outputs = Outputs(
        tuple(level(9 * classes, cell, -5.0, 1.5) for cell in cells),
        tuple(level(36, cell, 0.0, 0.3) for cell in cells),
    )
    sizes = torch.tensor([[256, 320], [200, 320], [256, 111]])[:images]
    return outputs, level_anchors(spec, cells), sizes


def of_torchvision(
    outputs: Outputs, anchors: list[Tensor], sizes: Tensor, classes: int, **options: Any
) -> list[dict[str, Tensor]]:
    detector = SimpleNamespace(
        box_coder=BoxCoder((1.0, 1.0, 1.0, 1.0)),
        **(
            {
                "score_thresh": 0.05,
                "topk_candidates": 1000,
                "nms_thresh": 0.5,
                "detections_per_img": 100,
            }
            | options
        ),
    )
    heads = {
        "cls_logits": [flatten_level(level, classes) for level in outputs.logits],
        "bbox_regression": [flatten_level(level, 4) for level in outputs.deltas],
    }
    shapes = [(int(height), int(width)) for height, width in sizes]
    return RetinaNet.postprocess_detections(detector, heads, [anchors] * len(sizes), shapes)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {}),
        ({"score_threshold": 0.3}, {"score_thresh": 0.3}),
        ({"topk_candidates": 60}, {"topk_candidates": 60}),
        ({"nms_threshold": 0.3}, {"nms_thresh": 0.3}),
        ({"detections_per_image": 5000}, {"detections_per_img": 5000}),
    ],
)
def test_equal_to_torchvision(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    outputs, anchors, sizes = random_outputs()
    expected = of_torchvision(outputs, anchors, sizes, 7, **theirs)
    found = postprocess(outputs, anchors, sizes, num_classes=7, **ours)
    for own, other in zip(found, expected, strict=True):
        assert len(own) > 50
        assert_close(own.boxes, other["boxes"], atol=1e-4, rtol=0)
        assert_close(own.scores, other["scores"], atol=1e-7, rtol=0)
        assert_close(own.labels, other["labels"])


@pytest.mark.skipif(not native.available(), reason=native.description())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("classes", "images", "options"),
    [
        (7, 3, {}),
        (7, 3, {"class_agnostic_nms": True}),
        (7, 3, {"topk_candidates": 5, "detections_per_image": 7}),
        (7, 3, {"detections_per_image": 10**6, "nms_threshold": 0.3}),
        (7, 1, {"score_threshold": 0.0, "topk_candidates": 3000}),
        (7, 2, {"score_threshold": 0.999}),
        (1, 3, {}),
        (1, 1, {"score_threshold": 0.0, "nms_threshold": 1.0, "detections_per_image": 10**6}),
        (300, 1, {}),
    ],
)
@pytest.mark.parametrize("step", [0.0, 0.5])
def test_native_code_finds_the_same(
    dtype: torch.dtype,
    classes: int,
    images: int,
    options: dict[str, Any],
    step: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the bit; with logits in steps many scores are equal. Some logits and deltas are NaN."""
    outputs, anchors, sizes = random_outputs(dtype, classes=classes, images=images)
    if step:
        outputs = Outputs(
            tuple((one / step).round() * step for one in outputs.logits), outputs.deltas
        )
    outputs.logits[0][:, 3, 5] = math.nan
    outputs.deltas[1][:, 2, 1] = math.nan
    found = postprocess(outputs, anchors, sizes, num_classes=classes, **options)
    monkeypatch.setattr(native, "library", native.Library(None, 0, "off"))
    expected = postprocess(outputs, anchors, sizes, num_classes=classes, **options)
    assert len(found) == len(expected) == images
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own.scores, other.scores)
        assert torch.equal(own.labels, other.labels)
        assert_close(own.boxes, other.boxes, rtol=0, atol=0, equal_nan=True)
    assert sum(map(len, found)) > 0 or options.get("score_threshold") == 0.999


def test_the_rest_of_a_row_with_a_nan_is_found() -> None:
    outputs = outputs_of({(0, 0, 0, 0): 0.9})
    outputs.logits[0][0, 1, 0, 0] = float("nan")
    (found,) = run(outputs)
    assert_close(found.scores, torch.tensor([0.9]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_equal_on_a_gpu() -> None:
    outputs, anchors, sizes = random_outputs()
    there = Outputs(*(tuple(level.cuda() for level in levels) for levels in outputs))
    found = postprocess(there, [level.cuda() for level in anchors], sizes.cuda(), num_classes=7)
    expected = postprocess(outputs, anchors, sizes, num_classes=7)
    for own, other in zip(found, expected, strict=True):
        assert_close(own.boxes.cpu(), other.boxes, atol=1e-3, rtol=0)
        assert_close(own.labels.cpu(), other.labels)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    outputs, anchors, sizes = random_outputs(dtype)
    wide = Outputs(*(tuple(one.float() for one in levels) for levels in outputs))
    found = postprocess(outputs, anchors, sizes, num_classes=7, detections_per_image=10**6)
    expected = postprocess(wide, anchors, sizes, num_classes=7, detections_per_image=10**6)
    for own, other in zip(found, expected, strict=True):
        assert own.boxes.dtype == own.scores.dtype == torch.float32
        assert_close(own.scores, other.scores)
        assert_close(own.boxes, other.boxes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_threshold": 1.0}, r"score_threshold must be in \[0, 1\), got 1.0"),
        ({"score_threshold": -0.1}, "score_threshold must be in"),
        ({"nms_threshold": 0.0}, r"nms_threshold must be in \(0, 1\], got 0.0"),
        ({"nms_threshold": 1.5}, "nms_threshold must be in"),
        ({"topk_candidates": 0}, "topk_candidates must be 1 or more, got 0"),
        ({"detections_per_image": 0}, "detections_per_image must be 1 or more, got 0"),
        ({"num_classes": 3}, r"level 0: logits \(1, 2, 4, 4\), .* 16 anchors .* 3 classes"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(outputs_of({}), **options)


def test_defaults_of_torch_change_nothing(default: str) -> None:
    logits = torch.full((1, 2, 4, 4), NOTHING, dtype=torch.float32, device="cpu")
    logits[0, 1, 2, 1] = logit(0.9)
    deltas = torch.zeros(1, 4, 4, 4, dtype=torch.float32, device="cpu")
    sizes = torch.tensor([[32, 32]], device="cpu")
    (found,) = postprocess(Outputs((logits,), (deltas,)), ANCHORS, sizes, num_classes=2)
    assert found.boxes.tolist() == [[0, 8, 16, 24]]
    assert found.scores.tolist() == pytest.approx([0.9])
    assert found.labels.tolist() == [1]


@pytest.mark.parametrize("shape", [(16, 3), (16,), (16, 4, 1)])
def test_anchors_are_boxes(shape: tuple[int, ...]) -> None:
    sizes = torch.tensor([[32, 32]])
    with pytest.raises(ValueError, match=r"level 0: anchors are boxes \(R, 4\), got shape \(16"):
        postprocess(outputs_of({}), [torch.zeros(shape)], sizes, num_classes=2)


def test_refused_shapes() -> None:
    outputs, sizes = outputs_of({}), torch.tensor([[32, 32]])
    with pytest.raises(ValueError, match="one tensor per level, got 1, 1 and 2"):
        postprocess(outputs, ANCHORS * 2, sizes, num_classes=2)
    with pytest.raises(ValueError, match="one tensor per level, got 0, 0 and 0"):
        postprocess(Outputs((), ()), [], sizes, num_classes=2)
    with pytest.raises(ValueError, match=r"sizes are \(B, 2\) height and width, got \(2,\)"):
        postprocess(outputs, ANCHORS, sizes[0], num_classes=2)
    with pytest.raises(ValueError, match="do not fit 2 images and 2 classes"):
        postprocess(outputs, ANCHORS, sizes.repeat(2, 1), num_classes=2)
