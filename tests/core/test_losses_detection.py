"""The two losses of a detector: torchvision's, the normalisers, empty images, every output used."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torchvision.models.detection.retinanet import (
    RetinaNetClassificationHead,
    RetinaNetRegressionHead,
)

from retinanet.anchors import anchor_spec, feature_sizes, level_anchors
from retinanet.boxes import decode_boxes
from retinanet.config import QUALITY_LOSSES, LossConfig, LossSettings
from retinanet.losses import (
    BOX_LOSSES,
    RUNNING_START,
    assign_anchors,
    box_loss,
    classification_loss,
    cross_entropy,
    detection_losses,
    focal_loss,
    focal_loss_star,
    hard_examples,
    hinge_loss,
    quality_focal_loss,
    varifocal_loss,
)
from retinanet.matching import anchor_labels, match_anchors
from retinanet.structures import (
    IGNORED,
    Outputs,
    Targets,
    flatten_level,
    flatten_levels,
    pad_targets,
)

pytestmark = pytest.mark.usefixtures("backend")

CLASSES = 3
CLASSIFICATION_LOSSES = get_args(LossConfig.model_fields["classification"].annotation)
SPEC = anchor_spec([8, 16, 32])
CELLS = feature_sizes(SPEC.strides, 96, 128)
ANCHORS = level_anchors(SPEC, CELLS)
BOXES = [[[4.0, 6.0, 50.0, 44.0], [60.0, 10.0, 120.0, 80.0]], [], [[10.0, 10.0, 40.0, 42.0]]]
LABELS = [[2, 0], [], [1]]


def make_outputs(
    batch: int = 3, dtype: torch.dtype = torch.float32, *, channels_last: bool = True
) -> Outputs:
    generator = torch.Generator().manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def level(channels: int, cell: tuple[int, int], shift: float) -> Tensor:
        values = torch.randn(batch, channels, *cell, generator=generator) + shift
        return values.to(dtype).to(memory_format=layout).requires_grad_()

    return Outputs(
        tuple(level(9 * CLASSES, cell, -2.0) for cell in CELLS),
        tuple(level(36, cell, 0.0) for cell in CELLS),
    )


def make_targets() -> Targets:
    return pad_targets(
        [torch.tensor(one).reshape(-1, 4) for one in BOXES],
        [torch.tensor(one, dtype=torch.int64) for one in LABELS],
    )


def losses_of(
    outputs: Outputs,
    targets: Targets,
    *,
    running: Tensor | None = None,
    world_foreground: Any = None,
    overwrite_logits: bool = False,
    **settings: Any,
) -> Any:
    return detection_losses(
        outputs,
        ANCHORS,
        targets,
        num_classes=CLASSES,
        settings=LossSettings(**({"classification": "focal", "alpha": 0.25} | settings)),
        running=running,
        world_foreground=world_foreground,
        overwrite_logits=overwrite_logits,
    )


def sums_an_image(outputs: Outputs, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
    """Slowly, image by image: classification sums, box sums, foreground counts."""
    anchors = torch.cat(ANCHORS)
    matches = match_anchors(anchors, targets)
    labels = anchor_labels(matches, targets.labels)
    logits, deltas = flatten_levels(outputs.logits, CLASSES), flatten_levels(outputs.deltas, 4)
    class_sums, box_sums, counts = [], [], []
    for image in range(len(matches)):
        class_sums.append(focal_loss(logits[image], labels[image], reduction="none").sum())
        rows = (matches[image] >= 0).nonzero().flatten()
        boxes = targets.boxes[image, matches[image, rows]]
        box_sums.append(box_loss("smooth_l1", deltas[image, rows], anchors[rows], boxes).sum())
        counts.append(len(rows))
    return torch.stack(class_sums), torch.stack(box_sums), torch.tensor(counts)


def test_normalizer_image() -> None:
    """Sec. 4.1: each image's sum over its own assigned anchors; then the mean over images."""
    outputs, targets = make_outputs(), make_targets()
    class_sums, box_sums, counts = sums_an_image(outputs, targets)
    losses = losses_of(outputs, targets)
    assert losses.foreground.tolist() == counts.tolist()
    assert counts[1] == 0
    assert (counts[[0, 2]] > 1).all()
    assert_close(losses.classification, (class_sums / counts.clamp(min=1)).mean())
    assert_close(losses.box, (box_sums / counts.clamp(min=1)).mean())
    assert_close(losses.total, losses.classification + losses.box)
    assert_close(losses.normalizer, counts.clamp(min=1).float().mean())


def test_normalizer_batch() -> None:
    outputs, targets = make_outputs(), make_targets()
    class_sums, box_sums, counts = sums_an_image(outputs, targets)
    losses = losses_of(outputs, targets, normalizer="batch")
    assert_close(losses.classification, class_sums.sum() / counts.sum())
    assert_close(losses.box, box_sums.sum() / counts.sum())
    assert_close(losses.normalizer, counts.sum().float())


def test_two_processes_make_the_step_of_one() -> None:
    """The mean over two processes, the second without an object, is the whole batch's gradient."""
    whole, targets = make_outputs(), make_targets()
    expected = torch.autograd.grad(
        losses_of(whole, targets, normalizer="batch").total, whole.logits
    )
    total = losses_of(whole, targets).foreground.sum()
    parts = []
    for images in ([0, 2], [1]):
        outputs = Outputs(*(tuple(level[images] for level in levels) for levels in whole))
        part = losses_of(
            outputs,
            Targets(targets.boxes[images], targets.labels[images]),
            normalizer="batch",
            world_foreground=lambda _: total / 2,
        )
        parts.append(part.total)
    gradients = torch.autograd.grad(sum(parts) / 2, whole.logits)
    assert_close(gradients, expected)


@pytest.mark.parametrize(
    ("normalizer", "expected"),
    [
        ("batch", 2 / 16),  # not the floor of 1, which is the whole batch's
        ("running", (0.9 * 10 + 0.1 * 2) / 16),  # 9.2 / 16
    ],
)
def test_the_share_of_few_anchors_is_not_lifted(normalizer: str, expected: float) -> None:
    """16 parts that hold 2 foreground anchors together."""
    losses = losses_of(
        make_outputs(),
        make_targets(),
        normalizer=normalizer,
        running=torch.tensor(10.0) / 16,
        world_foreground=lambda _: torch.tensor(2.0) / 16,
    )
    assert float(losses.normalizer) == pytest.approx(expected)


def test_normalizer_running() -> None:
    outputs, targets = make_outputs(), make_targets()
    class_sums, _, counts = sums_an_image(outputs, targets)
    state = torch.tensor(RUNNING_START)
    losses = losses_of(outputs, targets, normalizer="running", running=state)
    after = 0.9 * 100 + 0.1 * float(counts.sum())
    assert float(losses.normalizer) == pytest.approx(after)
    assert_close(losses.classification, class_sums.sum() / after)
    assert float(state) == 100, "the caller's state is the caller's"
    again = losses_of(outputs, targets, normalizer="running", running=state)
    assert_close(again.total, losses.total)


def test_equal_to_torchvision() -> None:
    """torchvision's heads compute their losses from the same matches: focal loss and plain L1."""
    outputs, targets = make_outputs(), make_targets()
    matches = match_anchors(torch.cat(ANCHORS), targets)
    theirs = {
        "cls_logits": flatten_levels(outputs.logits, CLASSES),
        "bbox_regression": flatten_levels(outputs.deltas, 4),
    }
    lists = [
        {"boxes": torch.tensor(boxes).reshape(-1, 4), "labels": torch.tensor(labels).long()}
        for boxes, labels in zip(BOXES, LABELS, strict=True)
    ]
    class_head = RetinaNetClassificationHead(4, 9, CLASSES)
    box_head = RetinaNetRegressionHead(4, 9)
    ours = losses_of(outputs, targets, box="l1")
    assert_close(ours.classification, class_head.compute_loss(lists, theirs, list(matches)))
    anchors = [torch.cat(ANCHORS)] * 3
    assert_close(ours.box, box_head.compute_loss(lists, theirs, anchors, list(matches)))
    box_head._loss_type = "giou"
    giou = losses_of(outputs, targets, box="giou")
    assert_close(giou.box, box_head.compute_loss(lists, theirs, anchors, list(matches)))


@pytest.mark.parametrize("classification", ["focal", "cross_entropy", "focal_star", "hinge"])
def test_each_classification_loss(classification: str) -> None:
    outputs, targets = make_outputs(), make_targets()
    labels = anchor_labels(match_anchors(torch.cat(ANCHORS), targets), targets.labels)
    logits = flatten_levels(outputs.logits, CLASSES)
    options = {"alpha": [0.2, 0.5, 0.8], "gamma": 3.0, "beta": 0.5, "margin": 0.7}
    expected = {
        "focal": focal_loss(logits, labels, alpha=[0.2, 0.5, 0.8], gamma=3.0),
        "cross_entropy": cross_entropy(logits, labels, alpha=[0.2, 0.5, 0.8]),
        "focal_star": focal_loss_star(logits, labels, gamma=3.0, beta=0.5, alpha=[0.2, 0.5, 0.8]),
        "hinge": hinge_loss(logits, labels, margin=0.7, alpha=[0.2, 0.5, 0.8]),
    }[classification]
    losses = losses_of(
        outputs, targets, classification=classification, normalizer="batch", **options
    )
    assert_close(losses.classification, expected / losses.foreground.sum())


@pytest.mark.parametrize("classification", QUALITY_LOSSES)
def test_losses_of_scores_are_divided_by_the_sum_of_the_scores(classification: str) -> None:
    outputs, targets = make_outputs(), make_targets()
    settings = LossSettings(classification=classification, normalizer="batch", gamma=3.0)
    assignment = assign_anchors(outputs, ANCHORS, targets, num_classes=CLASSES, settings=settings)
    scores = assignment.scores
    assert scores is not None
    labels = anchor_labels(assignment.matches, targets.labels)
    logits = flatten_levels(outputs.logits, CLASSES)
    dense = (labels[..., None] == torch.arange(CLASSES)) * scores[..., None]
    public: Any = {"quality_focal": quality_focal_loss, "varifocal": varifocal_loss}[classification]
    counted = labels != IGNORED

    losses = detection_losses(outputs, ANCHORS, targets, num_classes=CLASSES, settings=settings)

    assert_close(losses.normalizer, scores.sum())
    expected = public(logits[counted], dense[counted], gamma=3.0) / scores.sum()
    assert_close(losses.classification, expected)
    image, row = (assignment.matches >= 0).nonzero(as_tuple=True)
    each = box_loss(
        "smooth_l1",
        flatten_levels(outputs.deltas, 4)[image, row],
        torch.cat(ANCHORS)[row],
        targets.boxes[image, assignment.matches[image, row]],
    )
    assert_close(losses.box, (each * scores[image, row]).sum() / scores.sum())


# --- mining (Sec. 5.1) ----------------------------------------------------------------------

MINED: dict[str, Any] = {
    "classification": "cross_entropy", "alpha": None, "mining_size": 16, "mining_nms": 0.5,
}  # fmt: skip


def mined_labels(outputs: Outputs, targets: Targets, ratio: float | None) -> Tensor:
    anchors = torch.cat(ANCHORS)
    return hard_examples(
        [flatten_level(level, CLASSES) for level in outputs.logits],
        anchor_labels(match_anchors(anchors, targets), targets.labels),
        decode_boxes(flatten_levels(outputs.deltas, 4), anchors),
        size=16,
        nms_threshold=0.5,
        negatives_per_positive=ratio,
    )


@pytest.mark.parametrize(("mining", "ratio"), [("ohem", None), ("ohem_1_3", 3.0)])
@pytest.mark.parametrize("normalizer", ["image", "batch", "running"])
def test_a_mined_loss_is_the_mean_over_the_anchors_kept(
    mining: str, ratio: float | None, normalizer: str
) -> None:
    """Each image's own mean, then that of the images; the boxes' loss is of all foreground."""
    outputs, targets = make_outputs(), make_targets()
    options: dict[str, Any] = {"normalizer": normalizer, "running": torch.tensor(100.0)}
    losses = losses_of(outputs, targets, mining=mining, **MINED, **options)
    labels = mined_labels(outputs, targets, ratio).numpy()
    logits = flatten_levels(outputs.logits, CLASSES).detach().double().numpy()
    means = []
    for own_logits, own in zip(logits, labels, strict=True):
        rows = own != IGNORED
        x_t = np.where(own[rows, None] == np.arange(CLASSES), 1, -1) * own_logits[rows]
        means.append(np.log1p(np.exp(-x_t)).sum() / rows.sum())
    kept = (labels != IGNORED).sum(axis=1)
    # The second image is empty.
    assert kept.tolist() == ([16, 16, 16] if mining == "ohem" else [16, 3, 16])
    assert float(losses.classification.detach()) == pytest.approx(np.mean(means), rel=1e-5)
    plain = losses_of(outputs, targets, **options)
    assert_close(losses.box, plain.box)
    assert losses.foreground.tolist() == plain.foreground.tolist()
    assert_close(losses.normalizer, plain.normalizer)


@pytest.mark.parametrize("mining", ["ohem", "ohem_1_3"])
@pytest.mark.parametrize("boxes", [[], [[-500.0, -500.0, 700.0, 700.0]]], ids=["empty", "crowd"])
def test_mining_leaves_every_output_a_gradient(mining: str, boxes: list[list[float]]) -> None:
    outputs = make_outputs(batch=2)
    nothing = pad_targets(
        [torch.tensor(boxes).reshape(-1, 4)] * 2, [torch.full((len(boxes),), IGNORED)] * 2
    )
    losses = losses_of(outputs, nothing, mining=mining, **MINED)
    assert (float(losses.classification.detach()) > 0) == (not boxes)
    gradients = torch.autograd.grad(losses.total, [*outputs.logits, *outputs.deltas])
    assert all(one.isfinite().all() for one in gradients)
    assert any(one.any() for one in gradients) == (not boxes)


def test_mining_sees_no_gradient_of_the_boxes() -> None:
    outputs, targets = make_outputs(), make_targets()
    losses = losses_of(outputs, targets, mining="ohem", **MINED)
    gradients = torch.autograd.grad(losses.classification, outputs.deltas, allow_unused=True)
    assert gradients == (None,) * len(ANCHORS)
    (level, *_) = torch.autograd.grad(losses.classification, outputs.logits)
    rows = flatten_level(level, CLASSES).any(dim=2).sum(dim=1)
    assert (rows <= 16).all()
    assert (rows > 0).any()


def test_mining_looks_before_the_logits_are_written_over() -> None:
    targets, gradients = make_targets(), []
    for overwrite in (False, True):
        outputs = make_outputs()
        given = Outputs(tuple(one * 1 for one in outputs.logits), outputs.deltas)
        losses = losses_of(given, targets, mining="ohem", overwrite_logits=overwrite, **MINED)
        gradients.append(torch.autograd.grad(losses.classification, outputs.logits))
    assert_close(*gradients)


@pytest.mark.parametrize("box", list(BOX_LOSSES))
@pytest.mark.parametrize("weight", [0.0, 2.5])
def test_each_box_loss(box: str, weight: float) -> None:
    outputs, targets = make_outputs(), make_targets()
    anchors = torch.cat(ANCHORS)
    matches = match_anchors(anchors, targets)
    image, row = (matches >= 0).nonzero(as_tuple=True)
    deltas = flatten_levels(outputs.deltas, 4)[image, row]
    boxes = targets.boxes[image, matches[image, row]]
    expected = box_loss(box, deltas, anchors[row], boxes, beta=0.3).sum() / len(row)
    losses = losses_of(
        outputs, targets, box=box, box_beta=0.3, box_weight=weight, normalizer="batch"
    )
    assert_close(losses.box, expected * weight)


def test_matching_options_arrive() -> None:
    outputs, targets = make_outputs(), make_targets()
    plain = losses_of(outputs, targets).foreground
    fewer = losses_of(outputs, targets, foreground_iou=0.7).foreground
    more = losses_of(outputs, targets, foreground_iou=0.9, low_quality_matches=True).foreground
    strict = losses_of(outputs, targets, foreground_iou=0.9).foreground
    assert fewer.sum() < plain.sum()
    assert more.sum() > strict.sum()
    ignored = losses_of(outputs, targets).classification
    assert losses_of(outputs, targets, background_iou=0.5).classification != ignored


@pytest.mark.parametrize("normalizer", ["image", "batch", "running"])
@pytest.mark.parametrize("box", ["smooth_l1", "ciou"])
def test_without_any_object_every_output_still_has_a_gradient(normalizer: str, box: str) -> None:
    """A process of several with no object must take part in each gradient, or the others hang."""
    outputs = make_outputs()
    empty = pad_targets([torch.zeros(0, 4)] * 3, [torch.zeros(0, dtype=torch.int64)] * 3)
    losses = losses_of(outputs, empty, normalizer=normalizer, box=box, running=torch.tensor(100.0))
    assert float(losses.box.detach()) == 0
    assert float(losses.classification.detach()) > 0
    for loss, levels in ((losses.classification, outputs.logits), (losses.box, outputs.deltas)):
        gradients = torch.autograd.grad(loss, levels, allow_unused=False)
        assert all(one.isfinite().all() for one in gradients)


def test_all_anchors_ignored() -> None:
    outputs = make_outputs(batch=1)
    crowd = Targets(torch.tensor([[[-500.0, -500.0, 700.0, 700.0]]]), torch.tensor([[IGNORED]]))
    losses = losses_of(outputs, crowd)
    assert float(losses.total.detach()) == 0
    gradients = torch.autograd.grad(losses.total, [*outputs.logits, *outputs.deltas])
    assert not any(one.any() for one in gradients)


def test_layout_changes_nothing() -> None:
    targets = make_targets()
    last, first = make_outputs(), make_outputs(channels_last=False)
    a, b = losses_of(last, targets).total, losses_of(first, targets).total
    assert_close(a, b)
    assert_close(torch.autograd.grad(a, last.logits), torch.autograd.grad(b, first.logits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs(dtype: torch.dtype) -> None:
    outputs, targets = make_outputs(dtype=dtype), make_targets()
    losses = losses_of(outputs, targets)
    assert losses.total.dtype == torch.float32
    wide = Outputs(*(tuple(one.float() for one in levels) for levels in outputs))
    assert_close(losses.total, losses_of(wide, targets).total)
    gradients = torch.autograd.grad(losses.total, [*outputs.logits, *outputs.deltas])
    assert {one.dtype for one in gradients} == {dtype}


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("classification", CLASSIFICATION_LOSSES)
def test_gradient_over_the_logits_of_a_head(channels_last: bool, classification: str) -> None:
    """The weights of a convolution learn the same when its output is given up."""
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    head = torch.nn.Conv2d(8, 9 * CLASSES, 3, padding=1).to(memory_format=layout)
    features = [
        torch.randn(3, 8, *cell).to(memory_format=layout).requires_grad_() for cell in CELLS
    ]
    deltas = make_outputs(channels_last=channels_last).deltas
    targets = make_targets()
    of = [*head.parameters(), *features]

    def run(overwrite: bool) -> tuple[tuple[Tensor, ...], Tensor]:
        logits = tuple(head(one) for one in features)
        before = [one.detach().clone() for one in logits]
        losses = losses_of(
            Outputs(logits, deltas),
            targets,
            classification=classification,
            overwrite_logits=overwrite,
        )
        gradients = torch.autograd.grad(losses.total, of)
        changed = [not torch.equal(*pair) for pair in zip(before, logits, strict=True)]
        # in another layout the levels are copied first, and the copies are written over
        assert changed == [overwrite and channels_last] * len(CELLS)
        return gradients, losses.total.detach()

    expected, expected_loss = run(False)
    found, loss = run(True)
    assert torch.equal(loss, expected_loss)
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mining": "ohem_13"}, "should be 'none', 'ohem' or 'ohem_1_3'"),
        ({"normalizer": "running"}, r"needs its state: pass running, at first torch.tensor\(100"),
        ({"alpha": 2.0}, r"alpha 2.0 is not in \[0, 1\]"),
        ({"alfa": 0.5}, "Extra inputs are not permitted"),
    ],
)
def test_refused_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        losses_of(make_outputs(), make_targets(), **options)


def test_refused_shapes() -> None:
    outputs, targets = make_outputs(), make_targets()
    logits, labels = (
        [flatten_level(level, CLASSES) for level in outputs.logits],
        torch.full((3, 5), -1),
    )
    with pytest.raises(ValueError, match=r"weights \(B,\), got .*, \(3, 5\) and \(3,\)"):
        classification_loss(logits, labels, torch.ones(3), LossConfig())
    with pytest.raises(ValueError, match="logits, deltas and anchors have 3, 3 and 2 levels"):
        detection_losses(outputs, ANCHORS[:2], targets, num_classes=CLASSES)
    with pytest.raises(ValueError, match=r"level 0: logits \(3, 27, 12, 16\), .* and 4 classes"):
        detection_losses(outputs, ANCHORS, targets, num_classes=4)
    with pytest.raises(ValueError, match=r"level 0: .* do not fit 2 images and 3 classes"):
        losses_of(outputs, Targets(targets.boxes[:2], targets.labels[:2]))
    with pytest.raises(ValueError, match=r"level 1: .* 5 anchors do not fit"):
        detection_losses(
            outputs, [ANCHORS[0], ANCHORS[1][:5], ANCHORS[2]], targets, num_classes=CLASSES
        )
    high = torch.where(targets.labels == 2, 3, targets.labels)
    with pytest.raises(ValueError, match=r"label 3 is neither a class 0\.\.2"):
        losses_of(outputs, Targets(targets.boxes, high))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_on_a_gpu(dtype: torch.dtype) -> None:
    outputs, targets = make_outputs(dtype=dtype), make_targets()
    expected = losses_of(outputs, targets)
    there = Outputs(
        *(tuple(one.detach().cuda().requires_grad_() for one in levels) for levels in outputs)
    )
    losses = detection_losses(
        there, [one.cuda() for one in ANCHORS], targets.to("cuda"), num_classes=CLASSES
    )
    assert_close(losses.total.cpu(), expected.total)
    assert_close(
        [one.cpu() for one in torch.autograd.grad(losses.total, there.logits)],
        list(torch.autograd.grad(expected.total, outputs.logits)),
    )
