"""COCO's results file: written, read back to the same AP, and refused where it is wrong."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_coco_metrics import (
    assert_same,
    make_dataset,
    make_detections,
    pycocotools_numbers,
    random_case,
    results_of,
)

from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.errors import DataError
from retinanet.evaluation.coco import evaluate_detections
from retinanet.evaluation.results import Results, coco_image_ids, ground_truth
from retinanet.structures import Detections

GOOD = {"image_id": 11, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.5}


def filled() -> Results:
    return results_of(*random_case(0))


def test_written_file_gives_the_same_ap_here_and_in_pycocotools(tmp_path: Path) -> None:
    results = filled()
    file = tmp_path / "deep" / "results.json"
    results.write(file)
    metrics = evaluate_detections(results.dataset, results)
    again = Results.read(file, results.dataset)
    assert (again.table() == results.table()).all()  # bit for bit
    assert evaluate_detections(results.dataset, again).to_dict() == metrics.to_dict()
    rows = json.loads(file.read_text())
    assert_same(metrics, pycocotools_numbers(ground_truth(results.dataset), rows))
    assert list(file.parent.iterdir()) == [file]  # nothing is left beside it


def test_write_without_detections_is_an_empty_list(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    Results(make_dataset([[]])).write(file)
    assert json.loads(file.read_text()) == []
    assert len(Results.read(file, make_dataset([[]]))) == 0


def test_boxes_are_xywh_and_ids_the_datas_own() -> None:
    results = Results(make_dataset([[], []]))
    results.add(1, make_detections([([1.0, 2.0, 4.0, 8.0], 0.25, 1)]))
    assert list(results.rows()) == [
        {"image_id": 12, "category_id": 3, "bbox": [1.0, 2.0, 3.0, 6.0], "score": 0.25}
    ]


def test_labels_are_mapped_and_unknown_classes_left_out() -> None:
    results = Results(make_dataset([[]]), label_map=(1, -1, 0))
    rows = [([0.0, 0, 1, 1], 0.9, 0), ([0.0, 0, 1, 1], 0.8, 1), ([0.0, 0, 1, 1], 0.7, 2)]
    results.add(0, make_detections(rows))
    assert [row["category_id"] for row in results.rows()] == [3, 17]


def test_ids_that_are_names_get_numbers_and_are_understood() -> None:
    named = make_dataset([[Annotation((0, 0, 10, 10), 0)], []])
    images = tuple(
        replace(image, path=Path(f"BloodImage_{i:05}.jpg"), id=f"BloodImage_{i:05}")
        for i, image in enumerate(named.images)
    )
    dataset = replace(named, images=images)
    assert coco_image_ids(dataset) == (1, 2)
    for name in ("BloodImage_00000", "BloodImage_00000.jpg", 1):
        row = {"image_id": name, "category_id": 17, "bbox": [0, 0, 10, 10], "score": 0.5}
        assert evaluate_detections(dataset, [row]).ap == pytest.approx(1)


def test_a_number_that_is_not_one_is_refused() -> None:
    results = Results(make_dataset([[]]))
    bad = Detections(
        torch.tensor([[0.0, 0.0, math.nan, 1.0]]), torch.tensor([0.5]), torch.tensor([0])
    )
    with pytest.raises(DataError, match=r"0\.png: a detected box or score is NaN or Inf"):
        results.add(0, bad)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            [GOOD, {**GOOD, "image_id": 99}],
            r"entry 1 is of image 99, which .* does not have; is it",
        ),
        ([{**GOOD, "image_id": "11"}], r"of image 11, which .* does not have"),
        ([{**GOOD, "image_id": [1]}], r"of image \[1\], which .* does not have"),
        ([{**GOOD, "category_id": [1]}], r"category_id \[1\], which .* does not have"),
        ([{**GOOD, "category_id": 91}], r"category_id 91, which .* does not have; did you mean 90"),
        ([GOOD, {"image_id": 11, "score": 1}], "entry 1 has no category_id, bbox"),
        ([3], "entry 0 has no image_id, category_id, bbox, score"),
        ([{**GOOD, "bbox": [1, 2, 3]}], r"entry 0 \(image 11\): bbox \[1, 2, 3\] is not"),
        ([{**GOOD, "bbox": "big"}], "bbox big is not"),
        ([{**GOOD, "bbox": [5]}], r"bbox \[5\] is not"),
        ([GOOD, {**GOOD, "bbox": [1, 2, 3, 4, 5]}], r"entry 1 .*bbox \[1, 2, 3, 4, 5\] is not"),
        ([{**GOOD, "bbox": 5}], "bbox 5 is not"),
        ([GOOD, {**GOOD, "score": -math.inf}], "entry 1 .* is not a finite number"),
        ([{**GOOD, "score": "high"}], "score 'high' is not a number"),
        ([{**GOOD, "score": None}], "score None is not a number"),
        ([{**GOOD, "bbox": [1, 2, math.nan, 3]}], "entry 0 .* is not a finite number"),
        ([{**GOOD, "bbox": [9, 9, -3, 4]}], "has a negative size"),
        ({"images": [], "annotations": []}, "contains labels .* not results"),
        ({"a": 1}, "is not a COCO results file: .* found a JSON object"),
        ("text", "found a JSON string"),
        (None, "found a JSON null"),
        (3, "found a JSON number"),
    ],
)
def test_what_is_wrong_in_a_results_file(tmp_path: Path, content: Any, message: str) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        Results.read(file, make_dataset([[], []]))
    assert "\n" not in str(caught.value)
    assert "results.json" in str(caught.value)


def test_read_of_files_and_lists_is_the_same(tmp_path: Path) -> None:
    results = filled()
    numbers = [-1.5, 2, 3e-7, 1e3]  # all that JSON may write
    rows = [*results.rows(), {**GOOD, "bbox": numbers, "score": 1}]
    expected = [*results.table().tolist(), [11, *numbers, 1, 3]]
    file = tmp_path / "results.json"
    file.write_text(json.dumps(rows))
    for source in (rows, file):
        assert Results.read(source, results.dataset).table().tolist() == expected


@pytest.mark.parametrize(
    "change",
    [
        {"id": 7},  # another key
        {"image_id": "0"},  # the name of an image
        {"bbox": ["1", "2", "3", "4"]},
    ],
)
def test_read_accepts_unusual_rows(change: dict[str, Any]) -> None:
    table = Results.read([GOOD | change], make_dataset([[], []])).table()
    assert table.tolist() == [[11, 1, 2, 3, 4, 0.5, 3]]


def test_numbers_that_are_names_of_other_images() -> None:
    # The file's 1 is the id of an image here: not the number that another one was given.
    named = make_dataset([[], []])
    images = tuple(
        replace(image, path=Path(f"{name}.jpg"), id=name)
        for image, name in zip(named.images, ("b", 1), strict=True)
    )
    dataset = replace(named, images=images)
    assert coco_image_ids(dataset) == (1, 2)
    assert Results.read([{**GOOD, "image_id": 1}], dataset).table()[0, 0] == 2


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    dataset = make_dataset([[]])
    with pytest.raises(DataError, match=r"no\.json: no such file"):
        Results.read(tmp_path / "no.json", dataset)
    broken = tmp_path / "broken.json"
    broken.write_text('[\n{"image_id": 1,\n')
    with pytest.raises(DataError, match=r"broken\.json is not JSON: .* at line 3"):
        Results.read(broken, dataset)
    broken.write_bytes(b"\xff\xfe[")
    with pytest.raises(DataError, match=r"broken\.json cannot be read"):
        Results.read(broken, dataset)
    with pytest.raises(DataError, match="cannot be read"):
        Results.read(tmp_path, dataset)


def test_evaluate_detections_does_not_import_what_runs_a_model() -> None:
    code = (
        "import sys, retinanet.evaluation as evaluation\n"
        "evaluation.evaluate_detections, evaluation.Results\n"
        "assert 'torchvision' not in sys.modules and 'retinanet.model' not in sys.modules\n"
        "assert not hasattr(evaluation, 'nothing')\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def test_results_with_the_number_of_a_file_name_are_of_that_image(tmp_path: Path) -> None:
    images = tuple(
        LabelledImage(tmp_path / f"{n}.png", f"{n}.png", (Annotation((0, 0, n, n), 0),), 40, 40)
        for n in (12, 2, 1)
    )
    dataset = Dataset(images, ("cat",), (1,), "val", "voc", tmp_path)
    rows = [
        {"image_id": n, "category_id": 1, "bbox": [0, 0, n, n], "score": 0.9} for n in (1, 2, 12)
    ]
    table = Results.read(rows, dataset).table()
    by_size = dict(zip(table[:, 3].tolist(), table[:, 0].tolist(), strict=True))
    assert by_size == {12.0: 12.0, 2.0: 2.0, 1.0: 1.0}
