"""Suspect labels by hand-made detections, and the images that are worth labelling next."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from painter import PLAIN, Painter
from PIL import Image

from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.evaluation.results import Results
from retinanet.evaluation.suspects import Suspects, find_suspects, rank_images, suspects_of
from retinanet.inference.detector import Detector
from retinanet.model.checkpoint import Checkpoint
from retinanet.report.suspects import write_suspects
from retinanet.structures import Detections

# Labels of class 0 but for the last: right, of class 1, shifted by half, without an object, crowd.
LABELS = {
    "right": (0, 0, 10, 10),
    "class": (20, 0, 30, 10),
    "box": (45, 0, 55, 10),
    "extra": (60, 0, 70, 10),
    "crowd": (80, 0, 90, 10),
}
FOUND = (  # box, score, class
    ((0, 0, 10, 10), 0.9, 0),
    ((0, 0, 10, 10), 0.6, 1),  # of another class, on a label that is right
    ((20, 0, 30, 10), 0.8, 1),
    ((20, 0, 30, 10), 0.25, 0),  # under the threshold: the labelled class is not excluded
    ((40, 0, 50, 10), 0.7, 0),  # IoU 50 / 150
    ((0, 40, 10, 50), 0.95, 0),  # nothing is labelled there
    ((1, 40, 11, 50), 0.5, 1),  # the same object as another class
    ((80, 0, 90, 10), 0.9, 0),
)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    file = tmp_path / "a" / "1.png"
    file.parent.mkdir()
    Image.fromarray(np.full((64, 96, 3), 60, np.uint8)).save(file)
    labels = tuple(Annotation(box, 0, name, crowd=name == "crowd") for name, box in LABELS.items())
    image = LabelledImage(file, 7, labels, 96, 64)
    empty = LabelledImage(file, 8, (), 96, 64)
    return Dataset((empty, image), ("cell", "dust"), (1, 5), "all", "coco", tmp_path)


def detected(dataset: Dataset) -> Results:
    boxes, scores, labels = zip(*FOUND, strict=True)
    results = Results(dataset)
    results.add(1, Detections(torch.tensor(boxes), torch.tensor(scores), torch.tensor(labels)))
    return results


def test_suspects_by_hand(dataset: Dataset) -> None:
    found = suspects_of(detected(dataset), (0.3, 0.3))
    assert [(s.kind, s.label and s.label.id, s.image) for s in found] == [
        ("missing", None, 1), ("class", "class", 1), ("box", "box", 1), ("extra", "extra", 1),
    ]  # fmt: skip
    # .95; .8 / (.8 + .25); .7 x (1 - 1/3); one of four labels is matched and nothing is on this one
    assert [s.score for s in found] == pytest.approx([0.95, 0.8 / 1.05, 0.7 * 2 / 3, 0.25])
    assert [s.class_name for s in found] == ["cell", "dust", "cell", None]
    # With a higher threshold only the most certain detections count.
    assert [s.kind for s in suspects_of(detected(dataset), (0.92, 1.0))][:1] == ["missing"]
    assert suspects_of(Results(replace(dataset, images=dataset.images[:1])), (0.3, 0.3)) == []


def test_suspects_as_rows_tasks_and_page(dataset: Dataset, tmp_path: Path) -> None:
    found = Suspects(dataset, tuple(suspects_of(detected(dataset), (0.3, 0.3))), {})
    row = found.to_rows()[1]
    assert (row["rank"], row["object"], row["class"], row["detected_class"]) == (
        2, "class", "cell", "dust",
    )  # fmt: skip
    assert [row[f"detected_{side}"] for side in ("x1", "y2")] == [20.0, 10.0]
    assert found.to_rows()[0]["x1"] is None
    (image,) = found.to_detections()
    assert (image.name, image.size, len(image)) == ("a/1.png", (64, 96), 8)
    # Labels keep 1 less their suspicion, detections their score.
    assert image.scores.tolist() == pytest.approx(
        [1, 1 - 0.8 / 1.05, 1 - 0.7 * 2 / 3, 0.75, 1, 0.95, 0.8, 0.7]
    )
    page = write_suspects(found, tmp_path / "page.html", limit=3).read_text("utf-8")
    assert page.count("<img") == 3
    assert "1. missing 0.95 · 1.png" in page


def test_a_detector_finds_a_deleted_label_and_a_changed_class(val: Dataset) -> None:
    first, second, *rest = val.images
    labels = replace(second.annotations[0], label=1), *second.annotations[1:]
    images = (
        replace(first, annotations=first.annotations[1:]),
        replace(second, annotations=labels),
        *rest,
    )
    painter = Checkpoint(Painter(), val.classes, val.category_ids, 128, 256, {})  # type: ignore[arg-type]
    planted = replace(val, images=images)
    found = find_suspects(painter, planted, workers=0, **PLAIN)
    assert {(s.kind, s.image) for s in found.suspects} == {("missing", 0), ("class", 1)}
    # Through tiles, as for huge images, the result is the same here: the tiles are larger.
    tiled = find_suspects(painter, planted, workers=0, tile=512, **PLAIN)
    assert [s.kind for s in tiled.suspects] == [s.kind for s in found.suspects]


def test_rank_images_sums_the_uncertainty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = Checkpoint(Painter(), ("a", "b", "c"), (1, 2, 3), 64, 96, {})  # type: ignore[arg-type]
    detector = Detector(model, **PLAIN)
    scores = {"0.png": [0.9, 0.1], "1.png": [0.5, 0.6], "2.png": [], "3.png": [0.7]}
    for name in scores:
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    (tmp_path / "4.png").write_bytes(b"nothing")

    def detect(prepared: list[object], **_: object) -> list[Detections]:
        rows = [torch.tensor(next(queue)) for _ in prepared]
        return [Detections(torch.zeros(len(r), 4), r, torch.zeros(len(r)).long()) for r in rows]

    monkeypatch.setattr(detector, "detect_prepared", detect)
    queue = iter([*scores.values()])
    ranked, failures = rank_images(detector, tmp_path, 2)
    # .1 + .1; .5 + .4; 0; .3
    assert [(c.found.name, round(c.uncertainty, 6)) for c in ranked] == [
        ("1.png", 0.9), ("3.png", 0.3),
    ]  # fmt: skip
    assert len(failures) == 1
