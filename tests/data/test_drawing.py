"""What is drawn, and that it can be seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from retinanet.data import drawing
from retinanet.data.drawing import PALETTE, draw_boxes
from retinanet.structures import BACKGROUND, IGNORED


def grey(height: int = 480, width: int = 640) -> torch.Tensor:
    return torch.full((3, height, width), 100, dtype=torch.uint8)


def count(image: Image.Image, colour: tuple[int, int, int]) -> int:
    return int((np.array(image) == colour).all(axis=2).sum())


def test_box_is_drawn_where_it_lies() -> None:
    array = np.array(draw_boxes(grey(), [[100, 50, 200, 150]], width=2))
    vermilion = (array == PALETTE[0]).all(axis=2)
    ys, xs = np.nonzero(vermilion)
    assert (xs.min(), ys.min(), xs.max(), ys.max()) == (100, 50, 199, 149)
    assert vermilion[50:52, 100:200].all()
    assert vermilion[148:150, 100:200].all()
    assert vermilion[50:150, 100:102].all()
    assert not vermilion[52:148, 102:198].any()  # not filled, and no caption
    assert vermilion.sum() == 100 * 100 - 96 * 96


def test_kinds_of_image_agree() -> None:
    tensor = torch.randint(0, 256, (3, 50, 60), dtype=torch.uint8)
    array = tensor.permute(1, 2, 0).numpy()
    boxes = torch.tensor([[5.0, 5, 20, 20]])
    expected = np.array(draw_boxes(tensor, boxes))
    assert (np.array(draw_boxes(array, boxes.numpy())) == expected).all()
    assert (np.array(draw_boxes(Image.fromarray(array), boxes.tolist())) == expected).all()


def test_the_image_given_stays() -> None:
    image = grey()
    draw_boxes(image, [[0, 0, 640, 480]])
    assert (image == 100).all()
    img = Image.new("RGB", (600, 500))
    draw_boxes(img, [[0, 0, 600, 500]])
    assert not np.array(img).any()


def test_nothing_to_draw() -> None:
    for boxes in ([], torch.zeros(0, 4), np.zeros((0, 4))):
        drawn = draw_boxes(grey(), boxes, [], [], ["a"])
        assert (np.array(drawn) == 100).all()


def test_colour_by_class_repeats() -> None:
    boxes = [[10, 40, 100, 100], [200, 40, 300, 100], [400, 40, 500, 100]]
    drawn = draw_boxes(grey(), boxes, [0, 2, 2 + len(PALETTE)])
    assert count(drawn, PALETTE[0]) > 0
    assert count(drawn, PALETTE[2]) > 1.8 * count(drawn, PALETTE[0])


def test_captions(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    original = drawing.ImageDraw.ImageDraw.text

    def spy(self: object, position: object, text: str, **options: object) -> None:
        texts.append(text)
        original(self, position, text, **options)

    monkeypatch.setattr(drawing.ImageDraw.ImageDraw, "text", spy)
    box = [[100, 100, 300, 300]]
    for labels, scores, names, expected in (
        (None, None, None, []),
        (None, [0.125], None, ["0.12"]),
        ([1], None, None, ["1"]),
        ([1], None, ["a", "b"], ["b"]),
        ([1], [0.999], ["a", "b"], ["b 1.00"]),
        ([7], None, ["a", "b"], ["7"]),
        ([IGNORED], None, ["a", "b"], ["ignored"]),
        ([BACKGROUND], None, ["a", "b"], []),
    ):
        texts.clear()
        draw_boxes(grey(), box, labels, scores, names)
        assert texts == expected


def test_best_caption_gets_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    monkeypatch.setattr(
        drawing.ImageDraw.ImageDraw, "text", lambda _, position, text, **o: texts.append(text)
    )
    crowd = [[100 + i, 100, 130 + i, 130] for i in range(30)]
    draw_boxes(grey(), crowd, [0] * 30, [i / 100 for i in range(30)], ["nucleus"])
    assert texts[0] == "nucleus 0.29"
    assert 1 <= len(texts) < 8  # the rest would hide each other


def test_caption_hides_no_small_object() -> None:
    # Right above the large box, where its caption would go, lies a small object.
    small, large = [100, 88, 112, 99], [100, 100, 300, 300]
    drawn = np.array(draw_boxes(grey(), [large, small], [0, 1], names=["large one", ""], width=1))
    middle = drawn[90:97, 103:109]
    assert (middle == 100).all()


def test_padding_is_not_drawn_and_ignored_is_grey() -> None:
    boxes = torch.tensor([[0.0, 0, 0, 0], [50, 50, 400, 400]])
    drawn = draw_boxes(grey(), boxes, torch.tensor([BACKGROUND, IGNORED]))
    assert count(drawn, (160, 160, 160)) > 500
    assert all(count(drawn, colour) == 0 for colour in PALETTE[:11])


def test_boxes_at_and_over_the_edge_and_no_numbers() -> None:
    nan = float("nan")
    boxes = [[-20, -20, 50, 50], [600, 400, 900, 900], [5, 5, 5, 5], [nan, 0, 10, 10]]
    drawn = draw_boxes(grey(), boxes, [0, 1, 2, 3], [0.5] * 4, ["a", "b", "c", "d"])
    assert drawn.size == (640, 480)


def test_small_images_are_enlarged_by_a_whole_factor() -> None:
    assert draw_boxes(grey(100, 120), []).size == (480, 400)
    assert draw_boxes(grey(100, 120), [], enlarge_to=0).size == (120, 100)
    assert draw_boxes(grey(480, 300), []).size == (300, 480)
    drawn = np.array(draw_boxes(grey(100, 120), [[10, 20, 50, 60]], width=1))
    ys, xs = np.nonzero((drawn == PALETTE[0]).all(axis=2))
    assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (40, 80, 200, 240)


def test_lines_grow_with_the_image() -> None:
    def thickness(side: int) -> int:
        drawn = np.array(draw_boxes(grey(side, side), [[0, side // 4, side, side]]))
        return int((drawn[:, side // 2] == PALETTE[0]).all(axis=1).sum()) // 2

    assert thickness(480) == 2
    assert thickness(2560) == 10


def test_numbers_differ() -> None:
    with pytest.raises(ValueError, match="1 boxes, 2 labels and no scores"):
        draw_boxes(grey(), [[0, 0, 1, 1]], [0, 1])
    with pytest.raises(ValueError, match="1 boxes, 1 labels and 2 scores"):
        draw_boxes(grey(), [[0, 0, 1, 1]], [0], [0.1, 0.2])


def test_palette_is_told_apart_by_the_colour_blind() -> None:
    # Vienot et al. 1999: what people without red (or green) cones see, in linear RGB.
    simulations = (
        np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]),
        np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]),
    )
    linear = (np.array(PALETTE[:7]) / 255) ** 2.2
    for matrix in simulations:
        seen = np.clip(linear @ matrix.T, 0, 1) ** (1 / 2.2) * 255
        for i in range(7):
            for j in range(i):
                assert np.abs(seen[i] - seen[j]).max() > 25, (PALETTE[i], PALETTE[j])
