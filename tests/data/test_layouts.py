"""Each layout of files is read completely: all images, all objects, from every starting path."""

from __future__ import annotations

from pathlib import Path

import pytest
from layouts import CLASSES, LAYOUTS, OBJECTS, Layout

from retinanet.data.dataset import Dataset
from retinanet.data.formats import read_dataset, read_splits


def boxes(dataset: Dataset) -> set[tuple[str, tuple[float, ...]]]:
    return {
        (dataset.classes[annotation.label], annotation.box)
        for image in dataset.images
        for annotation in image.annotations
    }


def assert_complete(dataset: Dataset, count: int) -> None:
    assert [problem.reason for problem in dataset.problems] == []
    assert len(dataset.images) == count
    assert len({image.path for image in dataset.images}) == count
    assert all(image.path.is_file() for image in dataset.images)
    assert sum(len(image.annotations) for image in dataset.images) == 2 * count
    assert dataset.classes == CLASSES
    expected = {(name, tuple(map(float, box))) for name, box in OBJECTS}
    assert {(n, tuple(round(v, 3) for v in b)) for n, b in boxes(dataset)} == expected


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest, tmp_path: Path) -> Layout:
    chosen = LAYOUTS[request.param]
    chosen.build(tmp_path)
    return chosen


def test_layout_is_read_from_its_root(layout: Layout, tmp_path: Path) -> None:
    datasets = read_splits(tmp_path)
    total = sum(layout.splits.values())
    assert sum(len(dataset) for dataset in datasets.values()) == total
    for name, count in layout.splits.items():
        if name in ("", "train") and "val" not in layout.splits:
            continue  # a validation split is drawn
        assert_complete(datasets[name], count)
    whole = read_dataset(tmp_path, "all")
    assert_complete(whole, total)
    assert whole.format == layout.format


def test_layout_is_read_from_other_paths(layout: Layout, tmp_path: Path) -> None:
    for start, count in layout.starts.items():
        assert_complete(read_dataset(tmp_path / start, "all"), count)
