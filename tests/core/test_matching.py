"""Matching: hand numbers on both sides of each threshold, torchvision's matcher, crowds, memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

import retinanet.matching as module
from retinanet.anchors import default_anchor_spec, feature_sizes, level_anchors
from retinanet.matching import anchor_labels, match_anchors
from retinanet.structures import BACKGROUND, IGNORED, Targets, pad_targets


@pytest.fixture(params=["cpu", "device"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both implementations: the CPU's, and the device's in small tiles, on the CPU."""
    monkeypatch.setattr(module, "FEW_PAIRS", 0)
    if request.param == "device":
        monkeypatch.setattr(module, "match_on_cpu", module.match_on_device)
        monkeypatch.setattr(module, "DEVICE_PAIRS", 20_000)


def targets_of(*boxes: list[float], labels: list[int] | None = None) -> Targets:
    values = torch.tensor(boxes, dtype=torch.float32).reshape(1, -1, 4)
    kinds = torch.tensor([labels or [0] * len(boxes)], dtype=torch.int64).reshape(1, -1)
    return Targets(values, kinds)


def random_objects(count: int, side: float, generator: torch.Generator) -> Tensor:
    centre = torch.rand(count, 2, generator=generator) * side
    half = torch.rand(count, 2, generator=generator) ** 2 * side / 4 + 2
    return torch.cat((centre - half, centre + half), dim=1)


def small_grid() -> Tensor:
    spec = default_anchor_spec()
    return torch.cat(level_anchors(spec, feature_sizes(spec.strides, 320, 448)))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(
    ("width", "expected"),
    [
        # IoU of a 10 x 10 box and a w x 10 anchor in the same corner is w / 10
        (5.0, 0),  # .5 is foreground
        (4.99, IGNORED),  # .499
        (4.0, IGNORED),  # .4 is not background
        (3.99, BACKGROUND),
        (10.0, 0),
        (0.1, BACKGROUND),
        (20.0, 0),  # 100 / 200
        (20.1, IGNORED),  # 100 / 201
        (25.0, IGNORED),  # 100 / 250
        (25.1, BACKGROUND),
    ],
)
def test_both_sides_of_each_threshold(width: float, expected: int) -> None:
    anchors = torch.tensor([[0.0, 0.0, width, 10.0]])
    matches = match_anchors(anchors, targets_of([0, 0, 10, 10]))
    assert matches.tolist() == [[expected]]


def test_thresholds_are_options() -> None:
    anchors = torch.tensor([[0.0, 0.0, 7.0, 10.0], [0.0, 0.0, 3.0, 10.0], [0.0, 0.0, 2.9, 10.0]])
    matches = match_anchors(
        anchors, targets_of([0, 0, 10, 10]), foreground_iou=0.7, background_iou=0.3
    )
    assert matches.tolist() == [[0, IGNORED, BACKGROUND]]
    together = match_anchors(
        anchors, targets_of([0, 0, 10, 10]), foreground_iou=0.3, background_iou=0.3
    )
    assert together.tolist() == [[0, 0, BACKGROUND]]


@pytest.mark.usefixtures("implementation")
def test_at_most_one_object_an_anchor_and_the_first_of_equals() -> None:
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    # IoU .8 and .9
    assert match_anchors(anchors, targets_of([0, 0, 8, 10], [0, 0, 9, 10])).tolist() == [[1]]
    assert match_anchors(anchors, targets_of([0, 0, 9, 10], [1, 0, 10, 10])).tolist() == [[0]]


@pytest.mark.usefixtures("implementation")
def test_first_of_equals_in_later_tiles_too() -> None:
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    boxes = [[0.0, 0.0, 7.0, 10.0]] * 3 + [[0.0, 0.0, 9.0, 10.0]] * 200
    assert match_anchors(anchors, targets_of(*boxes)).tolist() == [[3]]


@pytest.mark.usefixtures("implementation")
def test_low_quality_matches_by_hand() -> None:
    anchors = torch.tensor(
        [
            [0.0, 0.0, 3.0, 10.0],  # IoU .3 with the object: its best
            [0.0, 0.0, 2.0, 10.0],  # .2
            [7.0, 0.0, 10.0, 10.0],  # .3: as good
            [50.0, 50.0, 60.0, 60.0],  # 0
        ]
    )
    target = targets_of([0, 0, 10, 10])
    assert match_anchors(anchors, target).tolist() == [[BACKGROUND] * 4]
    low = match_anchors(anchors, target, low_quality_matches=True)
    assert low.tolist() == [[0, BACKGROUND, 0, BACKGROUND]]


def test_low_quality_match_goes_to_what_the_anchor_overlaps_most() -> None:
    """The anchor is the best one of the first object, but overlaps the second more."""
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    target = targets_of([0, 0, 1, 10], [0, 0, 4, 10])
    assert match_anchors(anchors, target, low_quality_matches=True).tolist() == [[1]]


@pytest.mark.usefixtures("implementation")
def test_object_that_no_anchor_touches_matches_nothing() -> None:
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [90.0, 90.0, 100.0, 100.0]])
    for lost in (targets_of([50, 50, 60, 60]), targets_of([500, 500, 600, 600])):
        matches = match_anchors(anchors, lost, low_quality_matches=True)
        assert matches.tolist() == [[BACKGROUND] * 2]


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("low_quality_matches", [False, True])
@pytest.mark.parametrize("count", [1, 3, 90])
def test_equal_to_torchvision(low_quality_matches: bool, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    anchors = small_grid()
    boxes = random_objects(count, 320, generator)
    theirs = Matcher(0.5, 0.4, low_quality_matches)(box_iou(boxes, anchors))
    ours = match_anchors(
        anchors,
        Targets(boxes[None], torch.zeros(1, count, dtype=torch.int64)),
        low_quality_matches=low_quality_matches,
    )
    assert_close(ours[0], theirs)
    assert (ours >= 0).any()


@pytest.mark.usefixtures("implementation")
def test_images_do_not_mix() -> None:
    generator = torch.Generator().manual_seed(5)
    anchors = small_grid()
    boxes = [random_objects(count, 320, generator) for count in (7, 0, 2)]
    labels = [torch.arange(len(one)) for one in boxes]
    matches = match_anchors(anchors, pad_targets(boxes, labels))
    for own_boxes, own_labels, own in zip(boxes, labels, matches, strict=True):
        alone = match_anchors(anchors, pad_targets([own_boxes], [own_labels]))
        assert_close(own[None], alone)
    assert (matches[1] == BACKGROUND).all()


def test_no_object_in_any_image() -> None:
    empty = pad_targets([torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.int64)] * 2)
    matches = match_anchors(small_grid(), empty)
    assert (matches == BACKGROUND).all()
    assert (anchor_labels(matches, empty.labels) == BACKGROUND).all()


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(
    "box",
    [
        [5.0, 5.0, 5.0, 9.0],  # no width
        [9.0, 9.0, 5.0, 5.0],  # inverted
        [float("nan"), 0.0, 5.0, 5.0],
        [0.0, 0.0, float("inf"), 5.0],
        [15.0, 0.0, 5.0, 10.0],  # width -10: with the first anchor's area it adds up to 0
    ],
)
@pytest.mark.parametrize("low_quality_matches", [False, True])
def test_box_without_area_matches_nothing_and_harms_nobody(
    box: list[float], low_quality_matches: bool
) -> None:
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
    target = targets_of(box, [0, 0, 10, 10])
    matches = match_anchors(anchors, target, low_quality_matches=low_quality_matches)
    assert matches.tolist() == [[1, BACKGROUND]]


@pytest.mark.usefixtures("implementation")
def test_crowds_are_ignored_regions() -> None:
    anchors = torch.tensor(
        [
            [0.0, 0.0, 10.0, 10.0],  # all in the crowd, but foreground
            [40.0, 40.0, 50.0, 50.0],  # all in the crowd, 1% of its area
            [90.0, 90.0, 110.0, 100.0],  # half in it
            [90.1, 90.0, 110.1, 100.0],  # a little less than half
            [120.0, 0.0, 130.0, 10.0],
        ]
    )
    target = targets_of([0, 0, 10, 10], [0, 0, 100, 100], labels=[3, IGNORED])
    expected = [0, IGNORED, IGNORED, BACKGROUND, BACKGROUND]
    assert match_anchors(anchors, target).tolist() == [expected]
    assert anchor_labels(match_anchors(anchors, target), target.labels).tolist() == [
        [3, *expected[1:]]
    ]


def test_crowd_is_not_an_object() -> None:
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    crowd = targets_of([0, 0, 10, 10], labels=[IGNORED])
    for low_quality_matches in (False, True):
        matches = match_anchors(anchors, crowd, low_quality_matches=low_quality_matches)
        assert matches.tolist() == [[IGNORED]]


def test_place_counts_the_rows_that_do_not_match() -> None:
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    target = targets_of([0, 0, 9, 9], [0, 0, 99, 99], [0, 0, 10, 10], labels=[-1, -2, 4])
    assert match_anchors(anchors, target).tolist() == [[2]]


def test_anchor_labels_by_hand() -> None:
    matches = torch.tensor([[1, BACKGROUND, 0, IGNORED], [0, 0, BACKGROUND, BACKGROUND]])
    labels = torch.tensor([[7, 5], [2, BACKGROUND]])
    assert anchor_labels(matches, labels).tolist() == [[5, -1, 7, -2], [2, 2, -1, -1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"anchors": torch.zeros(3, 5)}, r"anchors are \(R, 4\), got \(3, 5\)"),
        ({"anchors": torch.zeros(3)}, r"anchors are \(R, 4\), got \(3,\)"),
        (
            {"targets": Targets(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))},
            r"boxes \(B, M, 4\) and labels \(B, M\), got \(2, 4\) and \(2,\)",
        ),
        (
            {"targets": Targets(torch.zeros(1, 2, 4), torch.zeros(1, 3, dtype=torch.int64))},
            r"got \(1, 2, 4\) and \(1, 3\)",
        ),
        ({"targets": [{"boxes": torch.zeros(1, 4)}]}, "targets are Targets, got list: give retina"),
        ({"foreground_iou": 0.3}, "background_iou <= foreground_iou <= 1, got 0.4 and 0.3"),
        ({"foreground_iou": 1.1}, "got 0.4 and 1.1"),
        ({"background_iou": 0.0}, "got 0.0 and 0.5"),
    ],
)
def test_impossible_arguments(arguments, message: str) -> None:  # type: ignore[no-untyped-def]
    good = {"anchors": torch.zeros(3, 4), "targets": targets_of([0, 0, 10, 10])}
    with pytest.raises(ValueError, match=message):
        match_anchors(**(good | arguments))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_equal_on_a_gpu() -> None:
    generator = torch.Generator().manual_seed(7)
    anchors, boxes = small_grid(), random_objects(40, 320, generator)
    labels = torch.where(torch.arange(40) % 9 == 0, IGNORED, 1)
    target = Targets(boxes[None], labels[None])
    for low_quality_matches in (False, True):
        here = match_anchors(anchors, target, low_quality_matches=low_quality_matches)
        there = match_anchors(
            anchors.cuda(), target.to("cuda"), low_quality_matches=low_quality_matches
        )
        assert_close(there.cpu(), here)


@pytest.mark.parametrize("low_quality_matches", [False, True])
@pytest.mark.parametrize("objects", [7, 150])
def test_all_images_at_once_is_image_by_image_to_the_bit(
    low_quality_matches: bool, objects: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random objects with ties, crowds, padding and boxes without area, in whole and tiny tiles."""
    monkeypatch.setattr(module, "FEW_PAIRS", 0)
    generator = torch.Generator().manual_seed(objects)
    anchors = small_grid()
    boxes = torch.stack([random_objects(objects, 400, generator) for _ in range(3)])
    boxes[:, -3:] = boxes[:, :3]
    boxes[0, 1] = torch.nan
    boxes[1, 2, 2:] = boxes[1, 2, :2]
    boxes[2, 0] = torch.tensor([0.0, 0.0, 1e30, 1e30])
    labels = torch.randint(IGNORED, 4, (3, objects), generator=generator)
    target = Targets(boxes, labels)
    expected = match_anchors(anchors, target, low_quality_matches=low_quality_matches)
    assert {BACKGROUND, IGNORED, 3} <= set(expected.unique().tolist())
    monkeypatch.setattr(module, "match_on_cpu", module.match_on_device)
    for pairs in (2**20, 9_000):
        monkeypatch.setattr(module, "DEVICE_PAIRS", pairs)
        found = match_anchors(anchors, target, low_quality_matches=low_quality_matches)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("low_quality_matches", [False, True])
def test_off_the_cpu_no_value_is_looked_at(low_quality_matches: bool) -> None:
    """A tensor on the meta device has none: looking raises."""
    target = Targets(torch.zeros(2, 5, 4), torch.zeros(2, 5).long()).to("meta")
    matches = match_anchors(
        torch.zeros(9, 4, device="meta"), target, low_quality_matches=low_quality_matches
    )
    assert matches.shape == (2, 9)
    assert matches.dtype == torch.int64
    assert anchor_labels(matches, target.labels).shape == (2, 9)


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.usefixtures("implementation")
def test_no_tensor_is_as_large_as_the_iou_matrix() -> None:
    """15,000 anchors x 300 objects."""
    anchors = small_grid()
    boxes = random_objects(300, 400, torch.Generator().manual_seed(0))
    target = Targets(boxes[None], torch.zeros(1, 300, dtype=torch.int64))
    with LargestTensor() as largest:
        match_anchors(anchors, target, low_quality_matches=True)
    assert len(anchors) > 15_000
    assert largest.elements <= 2**20
