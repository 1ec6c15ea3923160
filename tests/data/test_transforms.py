"""Boxes follow the image through every change."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from retinanet.data.transforms import MIN_VISIBLE, Transform
from retinanet.structures import IGNORED


class Draws(random.Random):
    """A generator that gives the values it was told to, to random() and as a share to uniform()."""

    def __init__(self, values: Iterable[float]) -> None:
        super().__init__(0)
        self.values = iter(values)

    def random(self) -> float:
        return next(self.values)

    def uniform(self, a: float, b: float) -> float:
        return a + (b - a) * next(self.values)


def painted(height: int, width: int, boxes: list[tuple[int, int, int, int]]) -> Tensor:
    """Black, each box filled with a colour of its own: box i has red 100 + 50 i."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        image[0, y1:y2, x1:x2] = 100 + 50 * i
    return image


def run(
    transform: Transform,
    image: Tensor,
    boxes: list[tuple[float, ...]],
    labels: list[int],
    shorter: int,
    draws: Iterable[float] | None = None,
) -> tuple[Tensor, list[list[float]], list[int]]:
    new_image, new_boxes, new_labels = transform(
        image,
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        shorter=shorter,
        generator=None if draws is None else Draws(draws),
    )
    assert type(new_image) is Tensor
    assert type(new_boxes) is Tensor
    assert new_boxes.dtype == torch.float32
    assert new_labels.dtype == torch.int64
    return new_image, new_boxes.tolist(), new_labels.tolist()


# Draws, in order: jitter, (crop: top, left,) horizontal flip, vertical flip, (colour).
NO = 0.999  # of a probability


def test_default_resizes_only() -> None:
    image = painted(20, 30, [(2, 4, 12, 10)])
    out, boxes, labels = run(Transform(1000), image, [(2, 4, 12, 10)], [5], 40)
    assert tuple(out.shape) == (3, 40, 60)
    assert boxes == [[4, 8, 24, 20]]
    assert labels == [5]
    assert torch.equal(image, painted(20, 30, [(2, 4, 12, 10)]))  # the one given is unchanged


@pytest.mark.parametrize(
    ("draws", "flipped"),
    [
        ([0.49, NO], (18, 4, 28, 10)),  # 30 - 12, 30 - 2
        ([NO, 0.49], (2, 10, 12, 16)),  # 20 - 10, 20 - 4
        ([0.5, 0.5], (2, 4, 12, 10)),
    ],
)
def test_flips(draws: list[float], flipped: tuple[int, int, int, int]) -> None:
    image = painted(20, 30, [(2, 4, 12, 10)])
    transform = Transform(1000, horizontal_flip=0.5, vertical_flip=0.5)
    out, boxes, labels = run(transform, image, [(2, 4, 12, 10)], [IGNORED], 20, [0, *draws])
    assert boxes == [list(flipped)]
    assert labels == [IGNORED]
    assert torch.equal(out, painted(20, 30, [flipped]))


@pytest.mark.parametrize(("draw", "side"), [(0.0, 20), (0.5, 40), (1.0, 80)])
def test_scale_jitter_is_log_uniform(draw: float, side: int) -> None:
    # Half way between factors 1/2 and 2 lies 1.
    transform = Transform(1000, scale_jitter=(0.5, 2.0))
    out, boxes, _ = run(transform, painted(40, 40, []), [(10, 0, 20, 40)], [0], 40, [draw, NO, NO])
    assert tuple(out.shape) == (3, side, side)
    assert boxes == [[side / 4, 0, side / 2, side]]


def test_crop_back_to_the_size_without_jitter() -> None:
    # 40 x 60 doubled is 80 x 120; the window of 40 x 60 starts at int(.5 * 41) = 20 and
    # int(.25 * 61) = 15.
    transform = Transform(1000, scale_jitter=(2.0, 2.0), crop=True)
    out, boxes, labels = run(
        transform,
        painted(40, 60, [(10, 15, 30, 25)]),
        [(10, 15, 30, 25), (0, 0, 5, 5), (35, 25, 60, 40)],
        [1, 2, 3],
        40,
        [0, 0.5, 0.25, NO, NO],
    )
    assert tuple(out.shape) == (3, 40, 60)
    # (20, 30, 60, 50) - (15, 20); (0, 0, 10, 10) is out of sight;
    # (70, 50, 120, 80) loses all right of 75 and under 60: 5 x 10 of 50 x 30 is 3%: IGNORED.
    assert boxes == [[5, 10, 45, 30], [55, 30, 60, 40]]
    assert labels == [1, IGNORED]
    assert (out[0, 10:30, 5:45] > 50).float().mean() > 0.95


@pytest.mark.parametrize(
    ("x2", "left", "label"),
    [
        (20.0, 10.0, 3),  # doubled (0, 0, 40, 10); the window starts at x = 30: 10 of 40 stay
        (19.5, 9.0, IGNORED),  # 9 of 39
    ],
)
def test_visible_share(x2: float, left: float, label: int) -> None:
    assert MIN_VISIBLE == 0.25
    transform = Transform(1000, scale_jitter=(2.0, 2.0), crop=True)
    _, boxes, labels = run(
        transform, painted(40, 40, []), [(0, 0, x2, 5)], [3], 40, [0, 0.0, 30.5 / 41, NO, NO]
    )
    assert boxes == [[0, 0, left, 10]]
    assert labels == [label]


def test_boxes_are_cut_to_the_image_and_dropped_where_nothing_is_left() -> None:
    nan, inf = float("nan"), float("inf")
    _, boxes, labels = run(
        Transform(1000),
        painted(20, 30, []),
        [
            (-5, -5, 10, 10),  # cut
            (25, 15, 99, 99),  # cut
            (-9, 0, -1, 10),  # outside
            (5, 5, 5, 10),  # no width
            (5, 5, 5.09, 10),  # under a tenth of a pixel
            (5, 5, 5.25, 10),  # over it
            (10, 5, 5, 10),  # inverted
            (nan, 0, 5, 5),
            (0, 0, 5, nan),
            (0, 0, inf, 20),  # cut
        ],
        list(range(10)),
        20,
    )
    assert boxes == [[0, 0, 10, 10], [25, 15, 30, 20], [5, 5, 5.25, 10], [0, 0, 30, 20]]
    assert labels == [0, 1, 5, 9]


# --- colour ------------------------------------------------------------------------------------


def recoloured(image: Tensor, strength: float, draws: list[float]) -> Tensor:
    """Draws: brightness, contrast, saturation, hue; .5 leaves each as it is."""
    transform = Transform(1000, colour=strength)
    return run(transform, image, [], [], min(image.shape[1:]), [0, NO, NO, *draws])[0]


@pytest.fixture
def mild() -> Tensor:
    """Colours that no change below drives to 0 or 255."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(90, 150, (3, 8, 9), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("position", "reference"),
    [(0, F.adjust_brightness), (1, F.adjust_contrast), (2, F.adjust_saturation)],
)
@pytest.mark.parametrize(("strength", "draw"), [(0.4, 0.0), (1.0, 0.8), (1.0, 0.5)])
def test_brightness_contrast_and_saturation_are_torchvisions(
    mild: Tensor, position: int, reference: object, draw: float, strength: float
) -> None:
    draws = [0.5] * 4
    draws[position] = draw
    expected = reference(mild, 1 + 0.5 * strength * (2 * draw - 1))  # type: ignore[operator]
    difference = recoloured(mild, strength, draws).int() - expected.int()
    assert difference.abs().max() <= 1  # torchvision rounds down


def test_hue_keeps_grey_and_brightness(mild: Tensor) -> None:
    grey = mild[:1].expand(3, -1, -1)
    assert (recoloured(grey, 1.0, [0.5, 0.5, 0.5, 1.0]).int() - grey.int()).abs().max() <= 1
    turned = recoloured(mild, 1.0, [0.5, 0.5, 0.5, 1.0])
    assert not torch.equal(turned, mild)
    luma = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    difference = (turned.float() * luma).sum(0) - (mild.float() * luma).sum(0)
    assert difference.abs().max() < 1
    # There and back, each way rounded once.
    back = recoloured(turned, 1.0, [0.5, 0.5, 0.5, 0.0])
    assert (back.int() - mild.int()).abs().max() <= 2
