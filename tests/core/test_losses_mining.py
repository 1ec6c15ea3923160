"""Online hard example mining: numbers by hand, a slow loop in numpy, and what must never happen."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from retinanet.losses import hard_examples, ohem
from retinanet.structures import BACKGROUND, IGNORED


def in_numpy(
    logits: np.ndarray,
    labels: np.ndarray,
    boxes: np.ndarray,
    size: int,
    threshold: float,
    ratio: float | None,
) -> np.ndarray:
    """One image, anchor by anchor: the labels that are left."""
    scores = {}
    for row, label in enumerate(labels):
        if label != IGNORED:
            scores[row] = sum(
                math.log(1 + math.exp(-x if label == k else x)) for k, x in enumerate(logits[row])
            )
    survivors: list[int] = []
    full = math.inf if ratio is None else max(1, int(ratio * max(1, int(size / (1 + ratio)))))
    drawn = ohem.tie_break_order(
        torch.from_numpy(boxes)
    ).tolist()  # of equal ones it says who stays
    for row in sorted((row for row in drawn if row in scores), key=lambda row: -scores[row]):
        if labels[row] < 0 and sum(labels[other] < 0 for other in survivors) >= full:
            continue
        if all(iou(boxes[row], boxes[other]) <= threshold for other in survivors):
            survivors.append(row)
    if ratio is None:
        kept = survivors[:size]
    else:
        positives = [row for row in survivors if labels[row] >= 0][
            : max(1, int(size / (1 + ratio)))
        ]
        negatives = [row for row in survivors if labels[row] < 0]
        kept = positives + negatives[: max(1, int(ratio * max(1, len(positives))))]
    left = np.full_like(labels, IGNORED)
    left[kept] = labels[kept]
    return left


def iou(a: np.ndarray, b: np.ndarray) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    overlap = max(0.0, width) * max(0.0, height)
    areas = [(one[2] - one[0]) * (one[3] - one[1]) for one in (a, b)]
    return float(overlap / (sum(areas) - overlap))


def an_image(
    seed: int, rows: int = 300, classes: int = 3, positives: int = 40
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and crowded boxes, in float64 so that numpy ranks them as torch does."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, rows, classes, generator=generator, dtype=torch.float64) * 3 - 2
    labels = torch.full((1, rows), BACKGROUND)
    order = torch.randperm(rows, generator=generator)
    labels[0, order[:positives]] = torch.randint(0, classes, (positives,), generator=generator)
    labels[0, order[positives : positives + 20]] = IGNORED
    corner = torch.rand(1, rows, 2, generator=generator, dtype=torch.float64) * 60
    sides = torch.rand(1, rows, 2, generator=generator, dtype=torch.float64) * 30 + 20
    return logits, labels, torch.cat((corner, corner + sides), dim=2)


def levels_of(logits: Tensor) -> list[Tensor]:
    cut = logits.shape[1] * 3 // 4
    return [logits[:, :cut], logits[:, cut:]]


@pytest.mark.parametrize("ratio", [None, 3.0, 0.5])
@pytest.mark.parametrize(("size", "threshold"), [(4, 0.5), (16, 0.7), (16, 0.2), (64, 0.7)])
@pytest.mark.parametrize("first", [1, 8])
def test_equal_to_the_slow_loop(
    ratio: float | None, size: int, threshold: float, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NMS of all boxes at once, and however few are tried first."""
    monkeypatch.setattr(ohem, "FIRST_CHUNK", first)
    monkeypatch.setattr(ohem, "MAX_CHUNK", 50)
    images = [an_image(seed, positives=count) for seed, count in enumerate((40, 3, 0))]
    logits, labels, boxes = (torch.cat(parts) for parts in zip(*images, strict=True))
    found = hard_examples(
        levels_of(logits),
        labels,
        boxes,
        size=size,
        nms_threshold=threshold,
        negatives_per_positive=ratio,
    )
    for image in range(3):
        parts = (logits[image].numpy(), labels[image].numpy(), boxes[image].numpy())
        expected = in_numpy(*parts, size, threshold, ratio)
        assert found[image].tolist() == expected.tolist(), image
        assert (expected != IGNORED).any()


def test_a_network_that_says_the_same_everywhere_is_mined_everywhere() -> None:
    """In bfloat16 all logits of the first steps are one number (Sec. 3.3: the prior)."""
    places = torch.arange(40.0)
    corners = torch.stack(torch.meshgrid(places, places, indexing="ij"), dim=-1).reshape(-1, 2) * 8
    boxes = torch.cat((corners, corners + 8), dim=1)  # nothing overlaps
    labels = torch.full((2, len(boxes)), BACKGROUND)
    logits = torch.full((2, len(boxes), 5), -4.59, dtype=torch.bfloat16)
    images = torch.stack((boxes, boxes + 0.25))
    found = hard_examples([logits], labels, images, size=128, nms_threshold=0.5)
    again = hard_examples([logits], labels, images, size=128, nms_threshold=0.5)
    assert found.equal(again)
    kept = [(one != IGNORED).nonzero()[:, 0] for one in found]
    assert [len(one) for one in kept] == [128, 128]
    for one in kept:
        # Uniform over 40 rows: the mean of 128 is 19.5, give or take 1.0.
        assert 15 < (one // 40).float().mean() < 24
        assert 15 < (one % 40).float().mean() < 24
    assert len(set(kept[0].tolist()) & set(kept[1].tolist())) < 40  # another draw: about 10


def test_the_easy_negatives_after_a_full_minibatch_suppress_nothing() -> None:
    # Ranked: negative 0, then negative 1, then positive 2 whose box is that of 1. With 1:1 and two
    # anchors one negative is enough, so 1 is not looked at and 2 stays.
    logits = torch.tensor([[[3.0], [2.0], [-1.0]]])
    labels = torch.tensor([[BACKGROUND, BACKGROUND, 0]])
    far, near = [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]
    boxes = torch.tensor([[far, near, near]])
    found = hard_examples(
        [logits], labels, boxes, size=2, nms_threshold=0.5, negatives_per_positive=1.0
    )
    assert found.tolist() == [[BACKGROUND, IGNORED, 0]]


def row_of(*places: float) -> Tensor:
    """Boxes 10 by 10 beside each other, from x = each place."""
    return torch.tensor([[[x, 0.0, x + 10, 10.0] for x in places]])


def test_by_hand() -> None:
    # Background of logit x costs ln(1 + e^x), so the order is 3, 2, 1, 0.
    logits = [torch.tensor([[[0.0], [1.0], [2.0], [3.0]]])]
    labels = torch.full((1, 4), BACKGROUND)
    # IoU of those 2 apart: 80 / 120 = .667; 4 apart: 60 / 140 = .43
    boxes = row_of(0, 100, 4, 2)

    def kept(**options: Any) -> list[int]:
        found = hard_examples(logits, labels, boxes, **options)
        return (found[0] != IGNORED).nonzero().flatten().tolist()

    assert kept(size=2, nms_threshold=0.7) == [2, 3]
    assert kept(size=3, nms_threshold=0.7) == [1, 2, 3]
    # Box 3 takes 2 and 0, each 2 apart from it, with it.
    assert kept(size=3, nms_threshold=0.66) == [1, 3]
    assert kept(size=1, nms_threshold=0.66) == [3]
    labels[0, 3] = IGNORED  # which then suppresses nobody; 2 and 0 are 4 apart
    assert kept(size=4, nms_threshold=0.66) == [0, 1, 2]


def test_the_ratio_by_hand() -> None:
    """Positives are rows 0 to 3, the easiest of all; size 8 has room for 2 of them and 6 others."""
    logits = [torch.arange(1.0, 21.0)[None, :, None]]
    labels = torch.full((1, 20), BACKGROUND)
    labels[0, :4] = 0  # of logit x a positive costs ln(1 + e^-x): row 0 is the hardest of them
    boxes = row_of(*range(0, 400, 20))

    def rows(size: int, ratio: float | None) -> list[int]:
        found = hard_examples(
            logits, labels, boxes, size=size, nms_threshold=0.5, negatives_per_positive=ratio
        )
        return (found[0] != IGNORED).nonzero().flatten().tolist()

    assert rows(8, None) == list(range(12, 20))
    assert rows(8, 3.0) == [0, 1, *range(14, 20)]
    assert rows(9, 3.0) == [0, 1, *range(14, 20)]  # 9 / 4 is 2 positives, so 6 negatives
    assert rows(2, 3.0) == [0, 19]  # one positive, whatever the size; room for one more
    assert rows(1, 3.0) == [0]
    assert rows(16, 3.0) == [0, 1, 2, 3, *range(8, 20)]
    labels[0, 1:4] = BACKGROUND
    assert rows(16, 3.0) == [0, 17, 18, 19]
    labels[0, 0] = BACKGROUND  # no positive: the negatives of one
    assert rows(16, 3.0) == [17, 18, 19]
    assert rows(2, 3.0) == [18, 19]


@pytest.mark.parametrize("ratio", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_float_type(dtype: torch.dtype, ratio: float | None) -> None:
    logits, labels, boxes = an_image(3)
    logits, boxes = logits.to(dtype), boxes.to(dtype)
    options: dict[str, Any] = {"size": 16, "nms_threshold": 0.7, "negatives_per_positive": ratio}
    before = logits.clone()
    found = hard_examples(levels_of(logits), labels, boxes, **options)
    wide = hard_examples(levels_of(logits.double()), labels, boxes.double(), **options)
    assert torch.equal(found, wide)
    assert torch.equal(logits, before)
    assert found.dtype == labels.dtype


@pytest.mark.parametrize("ratio", [None, 3.0])
def test_with_nothing_to_choose_from(ratio: float | None) -> None:
    options: dict[str, Any] = {"size": 8, "nms_threshold": 0.5, "negatives_per_positive": ratio}
    none = hard_examples(
        [torch.zeros(2, 0, 3)], torch.zeros(2, 0).long(), torch.zeros(2, 0, 4), **options
    )
    assert none.shape == (2, 0)
    ignored = torch.full((1, 2), IGNORED)
    assert torch.equal(
        hard_examples([torch.zeros(1, 2, 3)], ignored, row_of(0, 50), **options), ignored
    )
    no_image = hard_examples([torch.zeros(0, 2, 3)], ignored[:0], torch.zeros(0, 2, 4), **options)
    assert no_image.shape == (0, 2)
    # Positives alone, and boxes without a side, which overlap nothing.
    positives = torch.tensor([[0, 1]])
    found = hard_examples([torch.zeros(1, 2, 3)], positives, torch.zeros(1, 2, 4), **options)
    assert torch.equal(found, positives)


def test_a_logit_that_is_no_number_is_kept() -> None:
    """So that the loss becomes NaN, and the training ends."""
    logits = torch.zeros(1, 50, 2)
    logits[0, 33, 1] = math.nan
    labels = torch.full((1, 50), BACKGROUND)
    boxes = row_of(*range(0, 1000, 20))
    found = hard_examples([logits], labels, boxes, size=1, nms_threshold=0.5)
    assert (found[0] != IGNORED).nonzero().tolist() == [[33]]
    boxes[0, 7] = math.nan
    assert hard_examples([logits], labels, boxes, size=50, nms_threshold=0.5)[0, 7] == BACKGROUND


LOGITS, LABELS, BOXES = [torch.zeros(1, 2, 3)], torch.zeros(1, 2).long(), torch.zeros(1, 2, 4)


@pytest.mark.parametrize(
    ("logits", "labels", "boxes", "changes", "message"),
    [
        (LOGITS, LABELS[0], BOXES, {}, r"got 2 rows of logits, labels \(2,\), boxes \(1, 2, 4\)"),
        (LOGITS * 2, LABELS, BOXES, {}, r"got 4 rows of logits, labels \(1, 2\)"),
        (LOGITS, LABELS, BOXES[:, :1], {}, r"boxes \(1, 1, 4\)"),
        (LOGITS, LABELS, BOXES, {"size": 0}, "keeps at least 1 anchor per image, got size 0"),
        (LOGITS, LABELS, BOXES, {"nms_threshold": 0.0}, r"mining must lie in \(0, 1\], got 0.0"),
        (LOGITS, LABELS, BOXES, {"nms_threshold": 1.1}, r"must lie in \(0, 1\], got 1.1"),
        (LOGITS, LABELS, BOXES, {"negatives_per_positive": 0.0}, r"over 0 \(None: no ratio\)"),
    ],
)
def test_refused(
    logits: list[Tensor], labels: Tensor, boxes: Tensor, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        hard_examples(logits, labels, boxes, **({"size": 2, "nms_threshold": 0.5} | changes))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("ratio", [None, 3.0])
def test_equal_on_a_gpu(ratio: float | None) -> None:
    logits, labels, boxes = an_image(5, rows=20_000, classes=8)
    options: dict[str, Any] = {"size": 128, "nms_threshold": 0.5, "negatives_per_positive": ratio}
    expected = hard_examples(levels_of(logits), labels, boxes, **options)
    there = [one.cuda() for one in levels_of(logits)]
    found = hard_examples(there, labels.cuda(), boxes.cuda(), **options)
    assert torch.equal(found.cpu(), expected)
