"""The native library against the torch code that defines it, and its absence."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from retinanet.kernels import native
from retinanet.losses.focal import plain_label_loss
from retinanet.postprocess import suppress
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


STRANGE = (math.nan, -math.nan, math.inf, -math.inf, 3.4e38, -3.4e38, 1e4, -1e4, 88.0, -88.0)


@pytest.mark.parametrize("formula", FORMULAS)
def test_strange_logits(level: str, formula: Any) -> None:
    """NaN stays NaN, an infinite logit affects its own row only, and finite stays finite."""
    for value, label in product(STRANGE, (0, BACKGROUND, IGNORED)):
        logits = torch.full((40, 1), -3.0)
        logits[17] = value
        labels, weights = torch.full((40,), BACKGROUND), torch.ones(40)
        labels[17] = label
        weights[17] = 0.0 if label == IGNORED else 1.0
        alpha = torch.tensor(0.25)
        gradient, rest = torch.empty_like(logits), (labels, weights, alpha, 1 - alpha, formula)
        loss = native.label_loss(logits, *rest, gradient)
        expected, expected_gradient = plain(logits, *rest)
        if math.isinf(value):  # the formula has 0 times Inf
            assert gradient[torch.arange(40) != 17].isfinite().all(), (value, label)
            continue
        if math.isnan(value):
            assert loss.isnan(), (value, label)
            assert gradient[17].isnan(), (value, label)
            gradient[17] = expected_gradient[17]
        assert_close(loss, expected, equal_nan=True)
        assert_close(gradient, expected_gradient, equal_nan=True)


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
def test_gradient_elsewhere_nowhere_and_over_the_logits(dtype: torch.dtype) -> None:
    """In memory that starts anywhere."""
    logits, *rest = case(400, 7)
    rest = [values[3:] if values.dim() else values for values in rest]
    memory = torch.empty(400, 7, dtype=dtype).copy_(logits)
    logits = memory[3:]
    formula: Any = ("focal", 2.0, 0.0)
    fresh = torch.full((400, 7), 7.0, dtype=dtype)
    loss = native.label_loss(logits, *rest, formula, fresh[3:])  # type: ignore[arg-type]
    assert (fresh[:3] == 7).all()
    none = native.label_loss(logits, *rest, formula, None)  # type: ignore[arg-type]
    over = native.label_loss(logits, *rest, formula, logits)  # type: ignore[arg-type]
    assert loss == none == over
    assert torch.equal(logits, fresh[3:])


@needs_library
def test_loss_does_not_depend_on_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "ELEMENTS_PER_THREAD", 1)
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
def test_supported_logits_of_the_label_loss() -> None:
    logits, formula = torch.zeros(4, 6), ("focal", 2.0, 0.0)
    assert native.supports_label_loss(logits, formula)
    assert native.supports_label_loss(logits.bfloat16(), formula)
    assert native.supports_label_loss(torch.nn.Parameter(logits), formula)
    for other in (logits.double(), logits.half(), logits[:, ::2], logits.t(), logits[:0]):
        assert not native.supports_label_loss(other, formula)
    assert not native.supports_label_loss(logits.to("meta"), formula)
    assert not native.supports_label_loss(logits, ("hinge", 0.5, 0.0))


# --- suppression ----------------------------------------------------------------------------


def boxes_of(count: int, *, whole: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores and labels; with `whole` numbers, equal scores and IoUs of the threshold."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=generator) * 60
    side = torch.rand(count, 2, generator=generator) * 40
    scores = torch.rand(count, generator=generator)
    labels = torch.randint(0, 5, (count,), generator=generator)
    if whole:
        corner, side, scores = corner.round(), side.round(), (scores * 8).round() / 8
    return torch.cat((corner, corner + side), dim=1), scores, labels


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("classes", [1, 5])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 1 / 3, 1.0])
def test_survivors_are_those_of_torchvision(
    level: str, whole: bool, classes: int, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes, scores, labels = boxes_of(1201, whole=whole)
    boxes[7] = math.nan
    boxes[8, 2:] = boxes[8, :2]  # no area
    images = torch.tensor([0, 2, 3]).repeat_interleave(torch.tensor([900, 1, 300]))
    for most in (1, 10, 10**9):
        options: Any = {"num_images": 4, "num_classes": classes, "threshold": threshold}
        options |= {"max_count": most}
        arguments = boxes, scores, labels % classes, images
        kept = suppress(*arguments, **options)
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", native.Library(None, 0, "off"))
            assert torch.equal(kept, suppress(*arguments, **options))
        assert 3 <= len(kept) <= 3 * most


@needs_library
def test_suppression_in_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, _, labels = boxes_of(1200)
    options: Any = {"num_classes": 5, "threshold": 0.5, "max_count": 10**9}
    counts = torch.tensor([400, 400, 400])
    expected = native.suppress(boxes, labels, counts, **options)
    monkeypatch.setattr(native, "ELEMENTS_PER_THREAD", 1)
    assert torch.equal(native.suppress(boxes, labels, counts, **options), expected)


@needs_library
@pytest.mark.parametrize("images", [0, 2])
def test_suppression_of_nothing(images: int) -> None:
    nothing, counts = torch.zeros(0).long(), torch.zeros(images).long()
    options: Any = {"num_classes": 3, "threshold": 0.5, "max_count": 5}
    assert native.suppress(torch.zeros(0, 4), nothing, counts, **options).shape == (0,)


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


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", native.Library(None, 0, "not built"))
    logits, *rest = case(5, 3)
    assert not native.supports_label_loss(logits, ("focal", 2.0, 0.0))
    with pytest.raises(RuntimeError, match="the native library is not in use: not built"):
        native.label_loss(logits, *rest, ("focal", 2.0, 0.0), None)  # type: ignore[arg-type]
    monkeypatch.setenv("RETINANET_NATIVE", "0")
    off = native.load_library(Path(native.__file__).parent)
    assert off == native.Library(None, 0, "RETINANET_NATIVE=0")
    monkeypatch.setenv("RETINANET_NATIVE", "1")
    assert native.load_library(tmp_path) == native.Library(None, 0, "not built")


def test_what_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RETINANET_NATIVE", raising=False)
    file = tmp_path / f"_library{EXTENSION_SUFFIXES[0]}"
    file.write_text("no library")
    found = native.load_library(tmp_path)
    assert found.functions is None
    assert found.reason.startswith(f"{file.name} does not load: ")


def beside_the_library(folder: Path) -> Path:
    """The library, linked into a folder in which other things can lie beside it."""
    library = next(
        file
        for suffix in reversed(EXTENSION_SUFFIXES)
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


def test_suppression_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        ctypes.c_int64.from_address(arguments[-1]).value = -1

    functions: Any = SimpleNamespace(retinanet_suppress=fail)
    monkeypatch.setattr(native, "library", native.Library(functions, 0, ""))
    label = torch.zeros(1).long()
    with pytest.raises(MemoryError, match="no memory to sort the boxes"):
        native.suppress(
            torch.zeros(1, 4), label, label + 1, num_classes=1, threshold=0.5, max_count=1
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
