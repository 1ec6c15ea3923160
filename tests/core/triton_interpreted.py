"""The Triton kernels under Triton's interpreter, on a CPU: run by test_triton.py in a process of
its own, because TRITON_INTERPRET must be set before Triton is imported.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from retinanet.kernels.triton_focal import scale_, set_to_one, sum_and_gradient, supports
from retinanet.losses.focal import plain_label_loss
from retinanet.structures import BACKGROUND, IGNORED

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_triton.py"

# numpy, which the interpreter computes with, warns where a GPU silently gives the infinity wanted.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

FORMULAS = [
    ("focal", 0.0, 0.0),
    ("focal", 1.0, 0.0),
    ("focal", 2.0, 0.0),
    ("focal", 0.5, 0.0),
    ("focal", 5.0, 0.0),
    ("focal_star", 2.0, 1.0),
    ("focal_star", 0.5, 0.0),
]


def by_definition(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    positive: Tensor,
    negative: Tensor,
    formula: tuple[str, float, float],
) -> tuple[Tensor, Tensor]:
    """Loss and gradient from the formula as the paper writes it, in float64, and autograd."""
    wide = logits.double().requires_grad_()
    loss = plain_label_loss(
        wide, labels, weights.double(), positive.double(), negative.double(), formula
    )
    loss.backward()
    assert wide.grad is not None
    return loss.detach().float(), wide.grad.float()


@pytest.mark.parametrize(
    ("formula", "classes", "dtype", "class_alpha"),
    [
        # 1 and 3 classes: groups of 1 element; 80: of 16
        (FORMULAS[0], 80, torch.float32, False),
        (FORMULAS[1], 80, torch.bfloat16, True),
        (FORMULAS[2], 80, torch.float32, True),
        (FORMULAS[2], 80, torch.float16, False),
        (FORMULAS[2], 3, torch.bfloat16, True),
        (FORMULAS[2], 1, torch.float32, False),
        (FORMULAS[3], 80, torch.bfloat16, False),
        (FORMULAS[4], 3, torch.float32, True),
        (FORMULAS[5], 80, torch.float32, False),
        (FORMULAS[6], 3, torch.float16, True),
    ],
)
def test_loss_and_gradient_are_the_definition(
    formula: tuple[str, float, float], classes: int, dtype: torch.dtype, class_alpha: bool
) -> None:
    generator = torch.Generator().manual_seed(classes)
    count = 4096 // classes + 7  # two blocks, the second not full
    logits = (torch.randn(count, classes, generator=generator) * 4 - 2).to(dtype)
    labels = torch.randint(IGNORED, classes, (count,), generator=generator)
    weights = torch.rand(count, generator=generator) * (labels != IGNORED)
    alpha = [0.1 + 0.8 * i / classes for i in range(classes)] if class_alpha else 0.25
    positive = torch.tensor(alpha)
    negative = 1 - positive
    arguments = (labels, weights, positive, negative, formula)
    assert supports(logits, formula)
    expected, expected_gradient = by_definition(logits, *arguments)

    gradient = torch.full(logits.shape, torch.nan)
    loss = sum_and_gradient(logits, *arguments, gradient)
    assert_close(loss, expected, rtol=2e-6, atol=1e-6)
    assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)
    # The value alone, and the gradient written over the logits (the interpreter cuts bits off).
    assert torch.equal(sum_and_gradient(logits, *arguments, None), loss)
    over = logits.clone()
    assert torch.equal(sum_and_gradient(over, *arguments, over), loss)
    rtol = 0.0 if dtype == torch.float32 else 2**-7
    assert_close(over, gradient.to(dtype), rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("label", [0, BACKGROUND])
def test_finite_for_every_finite_logit(formula: tuple[str, float, float], label: int) -> None:
    ends = torch.tensor([3e38, 1e4, 104.0, 88.0, 81.0, 17.0, 0.0])
    logits = torch.cat((ends, -ends))[:, None]
    labels, weights = torch.full((len(logits),), label), torch.full((len(logits),), 0.1)
    arguments = (labels, weights, torch.tensor(0.25), torch.tensor(0.75), formula)
    gradient = torch.empty_like(logits)
    loss = sum_and_gradient(logits, *arguments, gradient)
    _, expected = by_definition(logits, *arguments)
    assert loss.isfinite()
    assert_close(gradient, expected, rtol=1e-4, atol=1e-30)


def test_ignored_rows_count_nothing_whatever_their_weight() -> None:
    logits = torch.randn(4, 5)
    labels, weights = torch.full((4,), IGNORED), torch.ones(4)
    half = torch.tensor(0.5)
    gradient = torch.full_like(logits, torch.nan)
    loss = sum_and_gradient(logits, labels, weights, half, half, ("focal", 2.0, 0.0), gradient)
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize("wrong", [5, 77, IGNORED - 1, 2**32, 2**32 - 1])
def test_a_label_that_is_none_makes_the_loss_nan(wrong: int) -> None:
    """2^32 would be class 0, and 2^32 - 1 background, if labels were cut to 32 bits."""
    logits, half = torch.randn(4, 5), torch.tensor(0.5)
    labels = torch.tensor([4, BACKGROUND, wrong, IGNORED])
    arguments = (labels, torch.ones(4), half, half, ("focal", 2.0, 0.0))
    gradient = torch.zeros_like(logits)
    assert sum_and_gradient(logits, *arguments, gradient).isnan()
    assert gradient[2].isnan().all()
    assert gradient[[0, 1, 3]].isfinite().all()


def test_the_kernel_of_the_probe() -> None:
    value = torch.zeros(1)
    set_to_one[(1,)](value)
    assert value == 1


@pytest.mark.parametrize("factor", [1.0, 0.25, 65536.0])
def test_scaling_in_place(factor: float) -> None:
    values = torch.randn(123, 45)
    expected = values * factor
    scaled = scale_(values, torch.tensor(factor))
    assert scaled is values
    assert torch.equal(values, expected)
    assert scale_(torch.zeros(0, 3), torch.tensor(factor)).shape == (0, 3)


def test_no_rows() -> None:
    half, none = torch.tensor(0.5), torch.zeros(0)
    loss = sum_and_gradient(
        torch.zeros(0, 3), none.long(), none, half, half, ("focal", 2.0, 0.0), torch.zeros(0, 3)
    )
    assert loss == 0


def test_what_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, formula = torch.zeros(4, 6), ("focal", 2.0, 0.0)
    assert supports(logits, formula)
    assert not supports(logits.double(), formula)
    assert not supports(logits.T, formula)
    assert not supports(logits[0], formula)
    assert not supports(logits, ("other", 2.0, 0.0))
    assert not supports(logits.to("meta"), formula)
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not supports(logits, formula)
