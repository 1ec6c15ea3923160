"""Detections to supervision and back, and what supervision then does with them."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from retinanet.errors import DataError, MissingExtraError
from retinanet.inference import Detector, ImageDetections
from retinanet.inference.detections import from_supervision, to_supervision
from retinanet.structures import Detections
from white_finder import Pixels, black

sv = pytest.importorskip("supervision")


def found(count: int = 3) -> ImageDetections:
    """Objects of odd numbers, that no rounding leaves as they are."""
    generator = torch.Generator().manual_seed(count)
    corner = torch.rand(count, 2, generator=generator) * 50
    return ImageDetections(
        boxes=torch.cat([corner, corner + 1 + torch.rand(count, 2, generator=generator)], dim=1),
        scores=torch.rand(count, generator=generator).sort(descending=True).values,
        labels=torch.arange(count) % 2,
        classes=("cat", "wölf"),
        category_ids=(17, 90),
        name="x/a.png",
        size=(60, 60),
        image="x/a.png",
    )


@pytest.mark.parametrize("count", [0, 1, 3, 100])
def test_there_and_back_changes_nothing(count: int) -> None:
    one = found(count)
    objects = one.to_supervision()
    assert isinstance(objects, sv.Detections)
    assert (objects.xyxy.dtype, objects.confidence.dtype) == (np.float32, np.float32)
    assert objects.xyxy.shape == (count, 4)
    assert objects.data["class_name"].tolist() == [one.classes[label] for label in one.labels]
    assert objects.metadata == {}
    assert objects.tracker_id is None
    back = one.from_supervision(objects)
    for name in ("boxes", "scores", "labels"):
        torch.testing.assert_close(getattr(back, name), getattr(one, name), rtol=0, atol=0)
    assert (back.name, back.size, back.classes) == (one.name, one.size, one.classes)


def test_the_arrays_are_copies() -> None:
    one = found()
    one.to_supervision().xyxy[:] = 0
    assert one.boxes.min() > 0


def test_detections_without_names() -> None:
    one = Detections(torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([0.5]), torch.tensor([4]))
    assert to_supervision(one).data == {}
    named = to_supervision(one, ("a", "b", "c", "d", "e"), tracks=[7])
    assert named.data["class_name"].tolist() == ["e"]
    assert named.tracker_id.tolist() == [7]
    with pytest.raises(ValueError, match="2 tracks of 1 objects"):
        to_supervision(one, tracks=[7, 8])


def test_what_supervision_left_comes_back_best_first() -> None:
    one = found(5)
    objects = one.to_supervision()
    kept = objects[np.array([4, 1, 3])]
    back = one.from_supervision(kept)
    torch.testing.assert_close(back.scores, one.scores[[1, 3, 4]])
    torch.testing.assert_close(back.boxes, one.boxes[[1, 3, 4]])
    merged = sv.Detections.merge([objects, replace(one, name="b").to_supervision()])
    assert len(from_supervision(merged)) == 10
    assert len(one.from_supervision(sv.Detections.empty())) == 0
    assert len(one.from_supervision(sv.Detections.merge([]))) == 0


def test_float64_and_a_missing_field() -> None:
    boxes = np.array([[1.5, 2, 3, 4]])
    whole = sv.Detections(boxes, confidence=np.array([0.5]), class_id=np.array([1]))
    assert from_supervision(whole).boxes.dtype == torch.float32
    with pytest.raises(DataError, match="of 1 objects have no class_id; set it first"):
        from_supervision(sv.Detections(boxes, confidence=np.array([0.5])))
    with pytest.raises(DataError, match="have no confidence"):
        from_supervision(sv.Detections(boxes, class_id=np.array([1])))


@pytest.mark.parametrize("label", [-1, 2])
def test_a_class_of_another_detector_is_refused(label: int) -> None:
    objects = sv.Detections(
        np.array([[1.0, 2, 3, 4]]), confidence=np.array([0.5]), class_id=np.array([label])
    )
    with pytest.raises(DataError, match=f"class_id {label} is not one of the classes 0 to 1"):
        found().from_supervision(objects)


def test_annotators_draw_where_the_object_is(detector: Detector, square: Pixels) -> None:
    one = detector.detect(square)
    assert isinstance(one, ImageDetections)
    objects = one.to_supervision()
    drawn = sv.BoxAnnotator(thickness=1).annotate(black(128, 192), objects)
    rows, columns = np.nonzero(drawn.any(axis=2))
    box = [columns.min(), rows.min(), columns.max(), rows.max()]
    np.testing.assert_allclose(box, one.boxes[0].numpy(), atol=1)
    labelled = sv.LabelAnnotator().annotate(drawn.copy(), objects)
    assert (labelled != drawn).any()


def test_without_supervision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'retinanet\[supervision\]'"):
        found().to_supervision()
