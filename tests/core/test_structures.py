"""The values that pass between the rooms: layout of levels, padding, moving, iterating."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from retinanet.structures import (
    BACKGROUND,
    IGNORED,
    Batch,
    Detections,
    flatten_level,
    pad_targets,
)


def make_level(batch: int, per_cell: int, last: int, rows: int, columns: int) -> torch.Tensor:
    """Each value says where it is: 1000 b + 100 a + 10 i, and 0.1 y + 0.01 x."""
    grid = torch.zeros(batch, per_cell, last, rows, columns)
    for b in range(batch):
        for a in range(per_cell):
            for i in range(last):
                for y in range(rows):
                    for x in range(columns):
                        grid[b, a, i, y, x] = 1000 * b + 100 * a + 10 * i + 0.1 * y + 0.01 * x
    return grid.reshape(batch, per_cell * last, rows, columns)


def test_flatten_level_runs_as_the_anchors_do() -> None:
    flat = flatten_level(make_level(2, 3, 4, 2, 5), 4)
    assert flat.shape == (2, 2 * 5 * 3, 4)
    row = 0
    for y in range(2):
        for x in range(5):
            for a in range(3):
                expected = torch.tensor(
                    [[1000 * b + 100 * a + 10 * i + 0.1 * y + 0.01 * x for i in range(4)]
                     for b in range(2)]
                )  # fmt: skip
                assert_close(flat[:, row], expected)
                row += 1


def test_flatten_level_is_a_view_in_channels_last() -> None:
    level = make_level(2, 3, 4, 2, 5).to(memory_format=torch.channels_last)
    flat = flatten_level(level, 4)
    assert flat.data_ptr() == level.data_ptr()
    assert flat.is_contiguous()


def test_pad_targets() -> None:
    boxes = [torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]), torch.zeros(0, 4), torch.ones(1, 4)]
    labels = [torch.tensor([3, IGNORED]), torch.zeros(0, dtype=torch.int64), torch.tensor([0])]
    targets = pad_targets(boxes, labels)
    assert targets.labels.tolist() == [[3, -2], [-1, -1], [0, BACKGROUND]]
    assert targets.boxes.shape == (3, 2, 4)
    assert_close(targets.boxes[0], boxes[0])
    assert not targets.boxes[1].any()
    assert targets.boxes[2].tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    assert (targets.boxes.dtype, targets.labels.dtype) == (torch.float32, torch.int64)


def test_pad_targets_of_nothing() -> None:
    none = pad_targets([torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2)
    assert none.boxes.shape == (2, 0, 4)
    assert none.labels.shape == (2, 0)
    assert pad_targets([], []).boxes.shape == (0, 0, 4)


def test_pad_targets_refuses_lists_that_differ() -> None:
    with pytest.raises(ValueError, match="boxes of 1 images, and labels of 0"):
        pad_targets([torch.zeros(1, 4)], [])
    with pytest.raises(ValueError, match="image 0: 1 boxes, 3 labels"):  # not broadcast
        pad_targets([torch.zeros(1, 4)], [torch.zeros(3)])


def make_batch() -> Batch:
    return Batch(
        torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
        pad_targets([torch.ones(1, 4)] * 2, [torch.tensor([0])] * 2),
        torch.tensor([[4, 3]] * 2),
        torch.tensor([[8, 6]] * 2),
        torch.tensor([5, 6]),
    )


def test_batch_moves_what_the_network_needs() -> None:
    moved = make_batch().to("meta")
    assert moved.images.device.type == "meta"
    assert moved.targets.boxes.device.type == moved.targets.labels.device.type == "meta"
    for kept in (moved.sizes, moved.original_sizes, moved.indices):
        assert kept.device.type == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batch_is_pinned() -> None:
    pinned = make_batch().pin_memory()
    assert pinned.images.is_pinned()
    assert pinned.targets.boxes.is_pinned()


def test_detections() -> None:
    found = Detections(
        torch.tensor([[0.0, 0, 1, 1], [2, 2, 3, 3]]),
        torch.tensor([0.5, 0.25]),
        torch.tensor([7, 1]),
    )
    assert len(found) == 2
    assert [(box.tolist(), score, label) for box, score, label in found] == [
        ([0, 0, 1, 1], 0.5, 7),
        ([2, 2, 3, 3], 0.25, 1),
    ]
