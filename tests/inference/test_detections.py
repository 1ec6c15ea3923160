"""Detections: selection, printing, and conversion to other forms."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import retinanet as rn
from retinanet.inference.detections import COLUMNS


def found(image: Any = None, **options: Any) -> rn.ImageDetections:
    """Three objects in an image of 20 x 40 pixels whose red is the column, its green the row."""
    rows, columns = np.mgrid[:40, :20]
    pixels = np.stack([columns, rows, 0 * rows], axis=2).astype(np.uint8)
    values: dict[str, Any] = {
        "boxes": torch.tensor([[1.0, 2, 11, 22], [0, 0, 5.5, 6.5], [-3, 35, 9, 44]]),
        "scores": torch.tensor([0.9, 0.6, 0.2]),
        "labels": torch.tensor([1, 0, 1]),
        "classes": ("car", "dog"),
        "category_ids": (7, 9),
        "name": "a/b.png",
        "size": (40, 20),
        "image": pixels if image is None else image,
    }
    return rn.ImageDetections(**values | options)


def test_detections_of_an_image_are_detections() -> None:
    assert isinstance(found(), rn.Detections)


@pytest.mark.parametrize(
    ("index", "kept"),
    [
        (torch.tensor([True, False, True]), [0, 2]),
        (np.array([True, False, True]), [0, 2]),
        ([False, True, False], [1]),
        (torch.tensor([2, 0]), [2, 0]),
        ([1], [1]),
        ([], []),
        (slice(2), [0, 1]),
        ("dog", [0, 2]),
        ("car", [1]),
        (["dog", "car"], [0, 1, 2]),
    ],
)
def test_index_selects_objects_and_keeps_the_image(index: Any, kept: list[int]) -> None:
    whole = found()
    part = whole[index]
    assert isinstance(part, rn.ImageDetections)
    assert part.boxes.tolist() == [whole.boxes[i].tolist() for i in kept]
    assert part.scores.tolist() == [whole.scores[i].item() for i in kept]
    assert part.labels.tolist() == [whole.labels[i].item() for i in kept]
    assert (part.name, part.image is whole.image, len(part)) == ("a/b.png", True, len(kept))


def test_selection_by_score() -> None:
    whole = found()
    assert whole[whole.scores > 0.5].labels.tolist() == [1, 0]


def test_position_is_an_object_as_in_iteration() -> None:
    box, score, label = found()[0]
    assert (box.tolist(), round(score, 6), label) == ([1, 2, 11, 22], 0.9, 1)
    assert [label for _, _, label in found()] == [1, 0, 1]
    with pytest.raises(IndexError):
        found()[3]
    for index in (torch.tensor(0), np.int64(0)):
        assert found()[index][1:] == found()[0][1:]


def test_unknown_class_names_the_nearest() -> None:
    with pytest.raises(KeyError, match="no class 'dogs': found car, dog; did you mean dog"):
        found()["dogs"]
    bare = rn.Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(KeyError, match="unknown class names; select by label"):
        bare["dog"]


def test_mask_of_another_length_is_an_error() -> None:
    with pytest.raises(IndexError):
        found()[torch.tensor([True])]


def test_print_is_short() -> None:
    lines = str(found()).splitlines()
    assert lines == [
        "ImageDetections(a/b.png, 20 x 40: 3 objects: 2 dog, 1 car; scores 0.20 to 0.90)",
        "  dog 0.90 (1.0, 2.0, 11.0, 22.0)",
        "  car 0.60 (0.0, 0.0, 5.5, 6.5)",
        "  dog 0.20 (-3.0, 35.0, 9.0, 44.0)",
    ]
    assert repr(found()[:1]).endswith("1 object: 1 dog; scores 0.90 to 0.90)")
    many = rn.Detections(torch.zeros(30, 4), torch.ones(30), torch.arange(30))
    assert repr(many) == (
        "Detections(30 objects: 1 0, 1 1, 1 2, 1 3, 1 4, 25 more classes; scores 1.00 to 1.00)"
    )
    assert str(many).splitlines()[-1] == "  and 20 more"
    assert repr(many[[]]) == "Detections(no objects)"


def test_detections_survive_pickling() -> None:
    again = pickle.loads(pickle.dumps(found()))
    assert str(again) == str(found())
    assert again.size == (40, 20)


def test_crops_are_the_pixels_of_the_boxes_within_the_image() -> None:
    crops = [np.asarray(crop) for crop in found().crop()]
    # Width and height: 1..11 x 2..22; 0..6 x 0..7; clipped 0..9 x 35..40.
    assert [crop.shape[:2] for crop in crops] == [(20, 10), (7, 6), (5, 9)]
    assert [crop[0, 0].tolist() for crop in crops] == [[1, 2, 0], [0, 0, 0], [0, 35, 0]]
    assert [crop[-1, -1].tolist() for crop in crops] == [[10, 21, 0], [5, 6, 0], [8, 39, 0]]
    assert found()[:1].crop(margin=2)[0].size == (13, 24)  # -1..13 x 0..24, clipped to 0
    outside = found(boxes=torch.tensor([[50.0, 60, 70, 80]] * 3))
    assert [crop.size for crop in outside.crop()] == [(1, 1)] * 3


def test_save_draws_or_writes_json(tmp_path: Path) -> None:
    drawn = found().save(tmp_path / "drawn.png", score_threshold=0.5)
    expected = found()[:2].draw()
    with Image.open(drawn) as image:
        assert image.tobytes() == expected.tobytes()
    assert json.loads(found().save(tmp_path / "found.json").read_text()) == found().to_dict()
    with pytest.raises(rn.DataError, match=r"unknown image suffix: '\.xyz'; use \.jpg"):
        found().save(tmp_path / "found.xyz")


def test_large_images_are_drawn_reduced() -> None:
    large = found(image=np.zeros((2000, 1000, 3), np.uint8), size=(2000, 1000))
    assert large.draw().size == (1000, 2000)
    assert large.draw(max_pixels=500_000).size == (500, 1000)


def test_coco_rows() -> None:
    assert found().to_coco(139)[0] == {
        "image_id": 139,
        "category_id": 9,
        "bbox": [1.0, 2.0, 10.0, 20.0],
        "score": 0.9,
    }


def test_table_has_a_row_per_object() -> None:
    table = found().to_pandas()
    assert tuple(table.columns) == COLUMNS
    assert table["class"].tolist() == ["dog", "car", "dog"]
    assert table[["x1", "y1", "x2", "y2"]].to_numpy().tolist() == found().boxes.tolist()
    assert len(found()[[]].to_pandas()) == 0


def test_table_without_pandas_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(rn.MissingExtraError, match=r"pip install 'retinanet\[pandas\]'"):
        found().to_pandas()


def test_notebook_shows_image_and_table() -> None:
    shown = found(classes=("car", "<dog>"))._repr_html_()
    assert "data:image/jpeg;base64," in shown
    assert shown.count("<tr>") == 4
    assert "&lt;dog&gt;" in shown
    assert "<dog>" not in shown


def test_notebook_shows_the_table_of_a_lost_image(tmp_path: Path) -> None:
    lost = found(image=tmp_path / "lost.png")
    assert lost.path == tmp_path / "lost.png"
    shown = lost._repr_html_()
    assert "<img" not in shown
    assert "lost.png" in shown
    assert shown.count("<tr>") == 4
