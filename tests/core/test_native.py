"""The native library beside the torch code that defines it; and life without the library."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import retinanet.postprocess as postprocessing
from retinanet.kernels import native
from retinanet.losses import focal_loss
from retinanet.losses.focal import plain_label_loss
from retinanet.structures import BACKGROUND, IGNORED

LEVELS = native.library.level + 1 if native.available() else 0
needs_library = pytest.mark.skipif(not native.available(), reason=native.description())

FORMULAS: list[tuple[Any, float, float]] = [
    ("focal", 0.0, 0.0),
    ("focal", 1.0, 0.0),
    ("focal", 2.0, 0.0),
    ("focal", 0.5, 0.0),
    ("focal", 5.0, 0.0),
    ("focal_star", 2.0, 0.0),
    ("focal_star", 4.0, 1.0),
    ("focal_star", 0.5, -2.0),
]


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each level that this processor has."""
    place = native.LEVELS.index(request.param)
    if place >= LEVELS:
        pytest.skip(f"{request.param}: {native.description()}")
    monkeypatch.setattr(native, "library", native.library._replace(level=place))
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[int]:
    """Two threads of torch, however many the tests run with."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


def case(
    rows: int, classes: int, *, per_class: bool = False, positives: float = 0.2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits, labels, weights of rows (0 where ignored), of positives and of negatives."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator) * 4 - 1
    labels = torch.randint(0, classes, (rows,), generator=generator)
    draw = torch.rand(rows, generator=generator)
    labels[draw > positives] = BACKGROUND
    labels[draw > 0.9] = IGNORED
    weights = torch.rand(rows, generator=generator)
    weights[: rows // 2] = 0.25  # an image's rows are of one weight
    weights[labels == IGNORED] = 0
    positive = torch.rand(classes, generator=generator) if per_class else torch.tensor(0.25)
    return logits, labels, weights, positive, 1 - positive


def plain(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    positive: Tensor,
    negative: Tensor,
    formula: Any,
) -> tuple[Tensor, Tensor]:
    """Loss and gradient from the plain formula and autograd."""
    leaf = logits.clone().requires_grad_()
    loss = plain_label_loss(leaf, labels, weights, positive, negative, formula)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def both(
    logits: Tensor, rest: tuple[Tensor, ...], formula: Any
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Loss and gradient, native and in torch."""
    gradients = torch.full_like(logits, 7.0), torch.full_like(logits, 7.0)
    labels, weights, positive, negative = rest
    arguments = logits, labels, weights, positive, negative, formula
    loss = native.label_loss(*arguments, gradients[0])
    return (loss, gradients[0]), plain(*arguments)


# --- the loss -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "classes", "per_class"),
    # pieces are 1,024 elements: many rows each, rows that do not fill one, rows of several pieces
    [
        (5000, 1, False),
        (700, 7, True),
        (301, 80, False),
        (50, 91, True),
        (9, 1024, False),
        (7, 2500, True),
        (1, 1, True),
    ],
)
def test_label_loss_equals_plain_formula_in_float64(
    level: str, dtype: torch.dtype, rows: int, classes: int, per_class: bool
) -> None:
    logits, *rest = case(rows, classes, per_class=per_class)
    logits = logits.to(dtype)
    wide = [values.double() if values.is_floating_point() else values for values in rest]
    for formula in FORMULAS:
        gradient = torch.full_like(logits, 7.0)
        loss = native.label_loss(logits, *rest, formula, gradient)  # type: ignore[arg-type]
        exact, exact_gradient = plain(logits.double(), *wide, formula)  # type: ignore[arg-type]
        assert loss.dtype == torch.float32
        assert_close(loss.double(), exact, rtol=1e-6, atol=1e-30)
        rtol = rtol_of(formula) if dtype == torch.float32 else 2**-7
        assert_close(gradient.double(), exact_gradient, rtol=rtol, atol=1e-7)


def rtol_of(formula: Any) -> float:
    """Relative error of a slope in float32.

    A general power multiplies log p by gamma, and focal_star rounds gamma x - beta, both before
    the exponential, which loses digits.
    """
    exact = formula[0] == "focal" and formula[1] in (0, 1, 2)
    return 1e-6 if exact else 1.2e-5


@pytest.mark.parametrize("formula", FORMULAS)
def test_every_digit_of_float32(level: str, formula: Any) -> None:
    """Element by element against float64, from certain to hopeless."""
    logits = torch.linspace(-40, 40, 20001)[:, None]
    one = torch.ones(())
    for label in (0, BACKGROUND):
        labels, weights = torch.full((len(logits),), label), torch.ones(len(logits))
        gradient = torch.empty_like(logits)
        native.label_loss(logits, labels, weights, one, one, formula, gradient)
        wide = one.double(), one.double(), formula
        _, exact = plain(logits.double(), labels, weights.double(), *wide)
        large = exact.abs() > 1e-30
        rtol = rtol_of(formula)
        assert_close(gradient[large].double(), exact[large], rtol=rtol, atol=0)
        # each loss alone, as a row of its own piece
        for x in (-30.0, -5.0, -0.1, 0.0, 0.1, 5.0, 30.0):
            single = torch.tensor([[x]])
            loss = native.label_loss(
                single, labels[:1], weights[:1], one, one, formula, torch.empty_like(single)
            )
            expected, _ = plain(single.double(), labels[:1], weights[:1].double(), *wide)
            assert_close(loss.double(), expected, rtol=rtol, atol=1e-30)


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("label", [0, BACKGROUND, IGNORED])
@pytest.mark.parametrize(
    "value", [math.nan, -math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e4, -1e4, 88.0, -88.0]
)
def test_strange_logits(level: str, formula: Any, label: int, value: float) -> None:
    """NaN stays NaN, an infinite logit affects its own row only, and finite stays finite."""
    logits = torch.full((40, 1), -3.0)
    logits[17] = value
    labels, weights = torch.full((40,), BACKGROUND), torch.ones(40)
    labels[17] = label
    weights[17] = 0.0 if label == IGNORED else 1.0
    alpha = torch.tensor(0.25)
    (loss, gradient), (expected, expected_gradient) = both(
        logits, (labels, weights, alpha, 1 - alpha), formula
    )
    if math.isinf(value):  # the formula has 0 times Inf
        assert gradient[torch.arange(40) != 17].isfinite().all()
        return
    if math.isnan(value):
        assert loss.isnan()
        assert gradient[17].isnan()
        gradient[17] = expected_gradient[17]
    assert_close(loss, expected, equal_nan=True)
    assert_close(gradient, expected_gradient, equal_nan=True)


@needs_library
def test_nan_with_any_payload() -> None:
    """The bits of a NaN are not taken for a number; its sign neither."""
    bits = torch.tensor([0x7FC00001, 0x7FFFFFFF, 0x7FC12345, -1, -0x3FFFFF], dtype=torch.int32)
    logits = bits.view(torch.float32)[:, None]
    assert logits.isnan().all()
    one = torch.ones(())
    for formula in FORMULAS:
        for row in range(len(logits)):
            single = logits[row : row + 1].clone()
            for label in (0, BACKGROUND):
                gradient = torch.zeros(1, 1)
                loss = native.label_loss(
                    single, torch.tensor([label]), torch.ones(1), one, one, formula, gradient
                )
                assert loss.isnan(), (formula, row)
                assert gradient.isnan(), (formula, row)


def test_bfloat16_is_rounded_as_torch_does(level: str) -> None:
    """Cross entropy at 0 has the slope 1/2: weights 2 + n / 128 halve the way of bfloat16."""
    weights = torch.cat((2 + torch.arange(256) / 128, torch.tensor([math.nan, math.inf])))
    count, one = len(weights), torch.ones(())
    logits = torch.zeros(count, 1, dtype=torch.bfloat16)
    gradient = torch.empty_like(logits)
    labels = torch.full((count,), BACKGROUND)
    native.label_loss(logits, labels, weights, one, one, ("focal", 0.0, 0.0), gradient)
    assert_close(gradient[:, 0], (weights / 2).bfloat16(), rtol=0, atol=0, equal_nan=True)


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("past_caches_from", [0, 2**60])
@pytest.mark.parametrize("skipped", [0, 1, 3])
def test_ways_to_memory(
    dtype: torch.dtype, past_caches_from: int, skipped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the caches, past them, and over the logits; memory that starts anywhere."""
    monkeypatch.setattr(native, "MIN_BYTES_PAST_CACHES", past_caches_from)
    logits, *rest = case(400, 7)
    rest = [one[skipped:] if one.dim() else one for one in rest]
    room = torch.empty(400, 7, dtype=dtype)
    room.copy_(logits)
    logits = room[skipped:]
    formula: Any = ("focal", 2.0, 0.0)
    fresh = torch.full((400, 7), 7.0, dtype=dtype)
    loss = native.label_loss(logits, *rest, formula, fresh[skipped:])  # type: ignore[arg-type]
    assert (fresh[:skipped] == 7).all()
    none = native.label_loss(logits, *rest, formula, None)  # type: ignore[arg-type]
    over = native.label_loss(logits, *rest, formula, logits)  # type: ignore[arg-type]
    assert loss == none == over
    assert torch.equal(logits, fresh[skipped:])


@needs_library
def test_loss_does_not_depend_on_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_ELEMENTS_PER_THREAD", 1)
    logits, *rest = case(3000, 80)
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        gradient = torch.empty_like(logits)
        loss = native.label_loss(logits, *rest, ("focal", 2.0, 0.0), gradient)  # type: ignore[arg-type]
        found.append((loss, gradient))
    for loss, gradient in found[1:]:
        assert loss == found[0][0]
        assert torch.equal(gradient, found[0][1])


@needs_library
def test_every_row_a_positive() -> None:
    logits, _, weights, positive, negative = case(5000, 1)
    labels = torch.zeros(5000, dtype=torch.int64)
    (loss, gradient), (expected, expected_gradient) = both(
        logits, (labels, weights, positive, negative), ("focal", 2.0, 0.0)
    )
    assert_close(loss, expected)
    assert_close(gradient, expected_gradient, rtol=2e-6, atol=1e-7)


@needs_library
def test_supported_logits_of_the_label_loss() -> None:
    logits, formula = torch.zeros(4, 6), ("focal", 2.0, 0.0)
    assert native.supports_label_loss(logits, formula)
    assert native.supports_label_loss(logits.bfloat16(), formula)
    assert native.supports_label_loss(torch.nn.Parameter(logits), formula)
    for other in (logits.double(), logits.half(), logits[:, ::2], logits.t(), logits[:0]):
        assert not native.supports_label_loss(other, formula)
    assert not native.supports_label_loss(logits.to("meta"), formula)
    assert not native.supports_label_loss(logits, ("hinge", 0.5, 0.0))


def test_the_loss_takes_the_library_if_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def loss(*arguments: Any) -> Tensor:
        called.append(arguments)
        return torch.tensor(3.0)

    monkeypatch.setattr(native, "supports_label_loss", lambda logits, _: len(logits) == 2)
    monkeypatch.setattr(native, "label_loss", loss)
    label = torch.tensor([BACKGROUND])
    assert float(focal_loss(torch.zeros(2, 3), label.repeat(2))) == 3
    assert float(focal_loss(torch.zeros(1, 3), label)) < 3
    assert len(called) == 1


# --- the best scores ------------------------------------------------------------------------


def levels_of(
    images: int, rows: list[int], classes: int, *, seed: int = 0, steps: float = 0.0
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Logits, deltas and anchors; with `steps` logits that are multiples of it: many are equal."""
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(images, count, classes, generator=generator) * 2 - 3 for count in rows]
    if steps:
        logits = [(one / steps).round() * steps for one in logits]
    deltas = [torch.randn(images, count, 4, generator=generator) * 0.3 for count in rows]
    corners = [torch.rand(count, 2, generator=generator) * 100 for count in rows]
    anchors = [torch.cat((one, one + 20 + one / 3), dim=1) for one in corners]
    return logits, deltas, anchors


def assert_same_best(
    logits: list[Tensor], deltas: list[Tensor], anchors: list[Tensor], least: float, most: int
) -> int:
    """The number of what both found."""
    found = native.top_scores(logits, deltas, anchors, least, most)
    expected = postprocessing._best_of_levels(logits, deltas, anchors, least, most)
    order = expected.image.argsort(stable=True)
    counts = expected.image.bincount(minlength=len(logits[0]))
    assert torch.equal(found.counts, counts)
    for own, other in zip(found[1:], expected[1:], strict=True):
        assert own.dtype == other.dtype
        # -0 is 0's equal, and comes out as 0
        assert torch.equal(own, other[order])
    return len(order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 80, 1000])
@pytest.mark.parametrize("most", [1, 10, 1000, 10**9])
@pytest.mark.parametrize("least", [-math.inf, -3.0, 2.0, 100.0])
def test_best_equal_the_torch_code(
    level: str, dtype: torch.dtype, classes: int, most: int, least: float
) -> None:
    rows = [max(1, 6000 // classes), 7, max(1, 1500 // classes)]
    logits, deltas, anchors = levels_of(3, rows, classes)
    logits = [one.to(dtype) for one in logits]
    deltas = [one.to(dtype) for one in deltas]
    count = assert_same_best(logits, deltas, anchors, least, most)
    assert (count == 0) == (least == 100)


@needs_library
@pytest.mark.parametrize("most", [1, 50, 1000])
@pytest.mark.parametrize("sorted_at_most", [0, 16])
def test_of_equal_logits_the_first_are_best(
    most: int, sorted_at_most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postprocessing, "_SORTED_AT_MOST", sorted_at_most)
    logits, deltas, anchors = levels_of(2, [3000, 40], 7, steps=0.5)
    assert_same_best(logits, deltas, anchors, -3.0, most)
    same = [torch.zeros_like(one) for one in logits]
    same[0][1] = -0.0
    assert_same_best(same, deltas, anchors, -3.0, most)


@needs_library
@pytest.mark.parametrize("rising", [False, True])
def test_the_best_of_several_segments(rising: bool) -> None:
    """A thread's share is 262,144 elements; rising logits are the worst order for a short list."""
    logits, deltas, anchors = levels_of(2, [70_000], 9)
    if rising:
        logits = [logits[0].flatten(1).sort(dim=1).values.view_as(logits[0])]
    assert assert_same_best(logits, deltas, anchors, -8.0, 300) == 600


@needs_library
@pytest.mark.parametrize("sorted_at_most", [0, 16])
def test_nan_is_over_nothing(sorted_at_most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postprocessing, "_SORTED_AT_MOST", sorted_at_most)
    logits, deltas, anchors = levels_of(2, [500, 20], 7)
    logits[0][torch.rand(logits[0].shape, generator=torch.Generator().manual_seed(1)) > 0.9] = (
        math.nan
    )
    logits[1][0] = math.nan
    logits[0][0, 3, 2] = math.inf
    assert assert_same_best(logits, deltas, anchors, -math.inf, 200) > 400
    assert_same_best(logits, deltas, anchors, -3.0, 10**6)


@needs_library
def test_levels_and_images_of_no_rows() -> None:
    logits, deltas, anchors = levels_of(2, [0, 5], 3)
    assert assert_same_best(logits, deltas, anchors, -3.0, 100) > 0
    logits, deltas, anchors = levels_of(2, [0], 3)
    assert native.supports_top_scores(logits, deltas, anchors)
    best = native.top_scores(logits, deltas, anchors, -3.0, 100)
    assert best.counts.tolist() == [0, 0]


@needs_library
def test_which_levels_are_served() -> None:
    logits, deltas, anchors = levels_of(2, [50, 20], 6)
    assert native.supports_top_scores(logits, deltas, anchors)
    half = [one.bfloat16() for one in logits]
    assert native.supports_top_scores(half, deltas, anchors)
    assert not native.supports_top_scores([half[0], logits[1]], deltas, anchors)
    assert not native.supports_top_scores([one.double() for one in logits], deltas, anchors)
    assert not native.supports_top_scores([one[..., ::2] for one in logits], deltas, anchors)
    assert not native.supports_top_scores(logits, deltas, [one.double() for one in anchors])


# --- suppression ----------------------------------------------------------------------------


def boxes_of(count: int, *, seed: int = 0, whole: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 60
    side = torch.rand(count, 2, generator=generator) * 40
    scores = torch.rand(count, generator=generator)
    if whole:  # equal scores, and overlaps that are the threshold itself
        corner, side, scores = corner.round(), side.round(), (scores * 8).round() / 8
    return torch.cat((corner, corner + side), dim=1), scores


def suppressed_in_torch(
    boxes: Tensor, scores: Tensor, labels: Tensor | None, counts: Tensor, threshold: float
) -> list[Tensor]:
    images = torch.arange(len(counts)).repeat_interleave(counts)
    groups = images if labels is None else images * 100 + labels
    kept = postprocessing._suppress_by_group(boxes, scores, groups, threshold)
    return [kept[images[kept] == image] for image in range(len(counts))]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("agnostic", [False, True])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 1 / 3, 1.0])
def test_survivors_are_those_of_torchvision(
    level: str, whole: bool, agnostic: bool, threshold: float
) -> None:
    counts = torch.tensor([900, 0, 1, 300])
    boxes, scores = boxes_of(1201, whole=whole)
    boxes[7] = math.nan
    boxes[8, 2:] = boxes[8, :2]  # no area
    labels = torch.randint(0, 5, (1201,), generator=torch.Generator().manual_seed(3))
    given = None if agnostic else labels
    expected = suppressed_in_torch(boxes, scores, given, counts, threshold)
    for most in (1, 10, 10**9):
        kept, survivors = native.batched_nms(
            boxes, scores, given, counts, classes=5, threshold=threshold, max_count=most
        )
        found = kept.split(survivors.tolist())
        for own, other in zip(found, expected, strict=True):
            assert torch.equal(own, other[:most])


@needs_library
def test_suppression_in_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_ELEMENTS_PER_THREAD", 1)
    counts = torch.tensor([400, 400, 400])
    boxes, scores = boxes_of(1200)
    kept, _ = native.batched_nms(
        boxes, scores, None, counts, classes=1, threshold=0.5, max_count=10**9
    )
    expected = suppressed_in_torch(boxes, scores, None, counts, 0.5)
    assert torch.equal(kept, torch.cat(expected))


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0, 3, 1]}, r"labels to suppress are 0\.\.2, got 3"),
        ({"labels": [0, -1, 1]}, r"labels to suppress are 0\.\.2, got -1"),
        ({"labels": [0, 1]}, r"3 scores go with boxes \(3, 4\) and labels \(3,\), got .* \(2,\)"),
        ({"boxes": torch.zeros(3, 5)}, r"got \(3, 5\) and \(3,\)"),
        ({"counts": [3, 1]}, r"add up to 3 boxes, got \[3, 1\]"),
        ({"counts": [4, -1]}, r"counts are 0 or more .* got \[4, -1\]"),
    ],
)
def test_what_suppression_refuses(change: dict[str, Any], message: str) -> None:
    given = {"boxes": torch.zeros(3, 4), "labels": [0, 1, 2], "counts": [1, 2]} | change
    with pytest.raises(ValueError, match=message):
        native.batched_nms(
            given["boxes"],
            torch.zeros(3),
            torch.tensor(given["labels"]),
            torch.tensor(given["counts"]),
            classes=3,
            threshold=0.5,
            max_count=5,
        )


@needs_library
def test_suppression_of_nothing() -> None:
    for counts in (torch.zeros(0, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)):
        kept, survivors = native.batched_nms(
            torch.zeros(0, 4), torch.zeros(0), None, counts, classes=3, threshold=0.5, max_count=5
        )
        assert kept.shape == (0,)
        assert torch.equal(survivors, counts)


# --- with and without the library -----------------------------------------------------------


def test_description(monkeypatch: pytest.MonkeyPatch) -> None:
    functions: Any = SimpleNamespace(retinanet_threaded=lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(native, "library", native.Library(functions, 2, ""))
    assert native.description() == "avx512, 4 threads"
    functions.retinanet_threaded = lambda: 0
    assert native.description() == "avx512, 1 thread"
    monkeypatch.setattr(native, "library", native.Library(None, 0, "not built"))
    assert native.description() == "pure torch (not built)"
    assert not native.available()


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", native.Library(None, 0, "not built"))
    logits, deltas, anchors = levels_of(1, [5], 3)
    assert not native.supports_label_loss(logits[0][0], ("focal", 2.0, 0.0))
    assert not native.supports_top_scores(logits, deltas, anchors)
    with pytest.raises(RuntimeError, match="the native library is not in use: not built"):
        native.top_scores(logits, deltas, anchors, 0.0, 1)


@pytest.mark.parametrize(("value", "off"), [("0", True), ("1", False), (None, False)])
def test_switch(value: str | None, off: bool) -> None:
    environment = {key: one for key, one in os.environ.items() if key != "RETINANET_NATIVE"}
    if value is not None:
        environment["RETINANET_NATIVE"] = value
    done = subprocess.run(
        [sys.executable, "-c", "from retinanet.kernels import native; print(native.description())"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout.strip() == "pure torch (RETINANET_NATIVE=0)") == off


def test_what_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RETINANET_NATIVE", raising=False)
    assert native.load_library(tmp_path) == native.Library(None, 0, "not built")
    file = tmp_path / f"_library{EXTENSION_SUFFIXES[0]}"
    file.write_text("no library")
    found = native.load_library(tmp_path)
    assert found.functions is None
    assert found.reason.startswith(f"{file.name} does not load: ")


def beside_the_library(folder: Path) -> Path:
    """The library, linked into a folder in which other things can lie beside it."""
    (library,) = (
        file
        for suffix in EXTENSION_SUFFIXES
        if (file := Path(native.__file__).with_name(f"_library{suffix}")).is_file()
    )
    link = folder / library.name
    link.symlink_to(library)
    return link


@needs_library
def test_a_library_of_other_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RETINANET_NATIVE", raising=False)
    link = beside_the_library(tmp_path)
    assert (
        native.load_library(tmp_path).functions is not None
    )  # a wheel: no sources to compare with
    for name in native.SOURCES:
        tmp_path.joinpath(name).write_text("int changed;")
    found = native.load_library(tmp_path)
    assert found.functions is None
    assert found.reason == f"{link.name} was built from other sources: install again"


@needs_library
def test_version_is_the_checksum_of_the_sources() -> None:
    folder = Path(native.__file__).parent
    if not (folder / "native.c").is_file():
        pytest.skip("installed from a wheel")
    both = b"".join((folder / name).read_bytes() for name in native.SOURCES)
    assert native.library.functions.retinanet_version() == crc32(both)


@needs_library
def test_a_library_without_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RETINANET_NATIVE", raising=False)
    link = beside_the_library(tmp_path)

    class Lacking:
        def __init__(self, file: str) -> None:
            self.retinanet_version = lambda: 1

    monkeypatch.setattr(native, "CDLL", Lacking)
    found = native.load_library(tmp_path)
    assert found.functions is None
    assert found.reason.startswith(f"{link.name} does not load: ")


def test_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    functions: Any = SimpleNamespace(
        retinanet_find=lambda *_: None, retinanet_suppress=lambda *_: 0
    )
    monkeypatch.setattr(native, "library", native.Library(functions, 0, ""))
    logits, deltas, anchors = levels_of(1, [5], 3)
    with pytest.raises(MemoryError, match="no memory for the list of scores"):
        native.top_scores(logits, deltas, anchors, 0.0, 1)
    with pytest.raises(MemoryError, match="no memory to sort the boxes"):
        native.batched_nms(
            torch.zeros(1, 4),
            torch.zeros(1),
            None,
            torch.ones(1, dtype=torch.int64),
            classes=1,
            threshold=0.5,
            max_count=1,
        )


@needs_library
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_threads_are_torchs_own() -> None:
    """Two libraries of OpenMP threads in a process would fight for the cores."""
    loaded = {
        line.split()[-1]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if "libgomp" in line
    }
    assert len(loaded) <= 1
