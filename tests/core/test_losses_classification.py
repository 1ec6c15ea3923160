"""Classification losses: hand numbers, the paper's claims, formulas in numpy, torchvision."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close
from torchvision.ops import sigmoid_focal_loss

from retinanet.losses import (
    cross_entropy,
    focal_loss,
    focal_loss_star,
    hinge_loss,
    quality_focal_loss,
    varifocal_loss,
)
from retinanet.losses.focal import make_formula, weighted_sum
from retinanet.structures import BACKGROUND, IGNORED

pytestmark = pytest.mark.usefixtures("backend")

PER_CLASS = [0.1, 0.25, 0.5, 0.75, 0.9]
LOSSES: list[tuple[Callable[..., Tensor], dict[str, Any]]] = [
    (focal_loss, {}),
    (focal_loss, {"gamma": 0.5}),
    (focal_loss, {"gamma": 5.0, "alpha": None}),
    (focal_loss, {"gamma": 0.0, "alpha": PER_CLASS}),
    (focal_loss, {"alpha": PER_CLASS}),
    (cross_entropy, {}),
    (cross_entropy, {"alpha": 0.75}),
    (focal_loss_star, {}),
    (focal_loss_star, {"gamma": 4.0, "beta": 1.0}),
    (focal_loss_star, {"gamma": 0.5, "beta": -2.0, "alpha": PER_CLASS}),
    (hinge_loss, {}),
    (hinge_loss, {"margin": 0.9, "alpha": PER_CLASS}),
    (hinge_loss, {"margin": 1.0, "alpha": 0.25}),
    (quality_focal_loss, {}),
    (quality_focal_loss, {"gamma": 1.5}),
    (varifocal_loss, {}),
    (varifocal_loss, {"gamma": 1.0, "alpha": PER_CLASS}),
]
LABELS = torch.tensor([0, 4, BACKGROUND, IGNORED, 3, BACKGROUND, 2])


def one_hot(labels: Tensor, classes: int) -> Tensor:
    return (labels[..., None] == torch.arange(classes)).double()


def random_logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def in_numpy(
    function: Callable[..., Tensor],
    x: np.ndarray,
    t: np.ndarray,
    *,
    alpha: Any = "default",
    gamma: float = 2.0,
    beta: float = 0.0,
    margin: float = 0.5,
) -> np.ndarray:
    """Eq. 1 to 7 as they stand in the paper, for t of 0 and 1, element by element."""
    if isinstance(alpha, str):
        alpha = 0.25 if function in (focal_loss, varifocal_loss) else None
    y = 2 * t - 1
    p_t = 1 / (1 + np.exp(-y * x))
    weight = 1 if alpha is None else np.where(t == 1, alpha, 1 - np.asarray(alpha))
    if function is cross_entropy:
        return -weight * np.log(p_t)
    if function is focal_loss:
        return -weight * (1 - p_t) ** gamma * np.log(p_t)
    if function is varifocal_loss:
        negative = 1 if alpha is None else 1 - np.asarray(alpha)
        return np.where(t == 1, 1, negative * (1 - p_t) ** gamma) * -np.log(p_t)
    if function is quality_focal_loss:
        return -((1 - p_t) ** gamma) * np.log(p_t)
    if function is hinge_loss:
        return weight * np.maximum(0, margin - p_t)
    return -weight * np.log(1 / (1 + np.exp(-(gamma * y * x + beta)))) / gamma


# --- the paper's claims ---------------------------------------------------------------------


@pytest.mark.parametrize(("p_t", "times", "tolerance"), [(0.9, 100, 1e-4), (0.968, 1000, 0.03)])
def test_easy_examples_cost_less(p_t: float, times: float, tolerance: float) -> None:
    """Sec. 3.2: with gamma 2, 100 times less at p_t = .9 and 1000 times at about .968."""
    for label, score in ((0, p_t), (BACKGROUND, 1 - p_t)):
        logit = torch.tensor([[score]], dtype=torch.float64).logit()
        labels = torch.tensor([label])
        ratio = cross_entropy(logit, labels) / focal_loss(logit, labels, alpha=None, gamma=2.0)
        assert float(ratio) == pytest.approx(times, rel=tolerance)


def test_hard_examples_cost_at_most_four_times_less() -> None:
    """Sec. 3.2: for p_t <= .5 and gamma 2 the loss is scaled down by at most 4 times."""
    logits = torch.linspace(-30, 0, 301, dtype=torch.float64)[:, None]
    labels = torch.zeros(301, dtype=torch.int64)
    ratio = cross_entropy(logits, labels, reduction="none") / focal_loss(
        logits, labels, alpha=None, reduction="none"
    )
    assert float(ratio.max()) == pytest.approx(4)
    assert float(ratio.min()) >= 1


@pytest.mark.parametrize("logit", [0.0, -4.595, 1.3, 0.7])
def test_sum_error_does_not_grow_with_number_of_elements(logit: float) -> None:
    """The docstring's bound. Equal elements are the worst case: all roundings go the same way."""
    rows = 25_000
    logits = torch.full((rows, 80), logit, dtype=torch.bfloat16)
    labels = torch.full((rows,), BACKGROUND)
    exact = torch.tensor(float(logits[0, 0]), dtype=torch.float64)
    for gamma in (0.0, 2.0):
        loss = focal_loss(logits, labels, alpha=None, gamma=gamma)
        expected = rows * 80 * float(exact.sigmoid() ** gamma * torch.log1p(exact.exp()))
        assert float(loss) == pytest.approx(expected, rel=2e-6)


# --- hand numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("function", [quality_focal_loss, varifocal_loss])
def test_losses_of_scores_equal_their_papers_equations(function: Callable[..., Tensor]) -> None:
    """Li et al. 2020, Eq. 2, and Zhang et al. 2021, Eq. 2, with alpha .75."""
    x, y = random_logits(40, 5), torch.rand(40, 5, generator=torch.Generator().manual_seed(1))
    y = torch.where(y < 0.5, 0, y).double()
    p, t = x.sigmoid().numpy(), y.numpy()
    bce = -((1 - t) * np.log(1 - p) + t * np.log(p))
    if function is quality_focal_loss:
        expected = np.abs(t - p) ** 2 * bce
    else:
        expected = np.where(t > 0, t * bce, -0.75 * p**2 * np.log(1 - p))

    each = function(x, y, reduction="none")

    assert_close(each, torch.from_numpy(expected))
    assert gradcheck(lambda logits: function(logits, y[:4]), x[:4].requires_grad_())


@pytest.mark.parametrize("kind", ["quality_focal", "varifocal"])
@pytest.mark.parametrize("alpha", [None, 0.25, PER_CLASS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overwrite", [False, True])
def test_rows_with_scores_equal_the_plain_formula(
    kind: Any, alpha: Any, dtype: torch.dtype, overwrite: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = random_logits(len(LABELS), 5).to(dtype)
    scores = torch.rand(len(LABELS), generator=generator)
    weights = torch.rand(len(LABELS), generator=generator)
    formula = make_formula(kind, gamma=2.0)
    dense = one_hot(LABELS, 5) * scores[:, None]
    function: Any = {"quality_focal": quality_focal_loss, "varifocal": varifocal_loss}[kind]
    plain = logits.double().clone().requires_grad_()
    each = function(
        plain, dense, reduction="none", **({"alpha": alpha} if kind == "varifocal" else {})
    )
    if kind == "quality_focal" and alpha is not None:
        factor = torch.tensor(alpha, dtype=torch.float64)
        each = each * (factor * dense + (1 - factor) * (1 - dense))
    expected = (each * (weights * (LABELS != IGNORED))[:, None]).sum()
    (expected_gradient,) = torch.autograd.grad(expected, plain)
    leaf = logits.detach().clone().requires_grad_()

    loss = weighted_sum(
        leaf * 1, LABELS, weights, formula, alpha, scores=scores, overwrite_logits=overwrite
    )
    loss.backward()

    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
    assert_close(float(loss.detach()), float(expected.detach()), rtol=1e-5, atol=1e-5)
    assert leaf.grad is not None
    assert_close(
        leaf.grad.double(), expected_gradient, **(tolerance or {"rtol": 1e-5, "atol": 1e-6})
    )


@pytest.mark.parametrize("kind", ["quality_focal", "varifocal"])
def test_rows_with_scores_in_inference_mode_have_the_same_loss(kind: Any) -> None:
    logits, scores, weights = random_logits(7, 5), torch.full((7,), 0.4), torch.ones(7)
    formula = make_formula(kind, gamma=2.0)
    expected = weighted_sum(
        logits.clone().requires_grad_(), LABELS, weights, formula, scores=scores
    )
    with torch.inference_mode():
        loss = weighted_sum(logits * 1, LABELS, weights, formula, scores=scores)
    assert float(loss) == float(expected.detach())


def test_mean_is_over_what_is_not_ignored() -> None:
    logits = torch.zeros(4, 3)
    labels = torch.tensor([0, IGNORED, BACKGROUND, IGNORED])
    assert float(cross_entropy(logits, labels, reduction="mean")) == pytest.approx(math.log(2))
    assert float(cross_entropy(logits, labels)) == pytest.approx(6 * math.log(2))
    nothing = torch.full((4,), IGNORED)
    assert float(cross_entropy(logits, nothing, reduction="mean")) == 0


def test_ignored_rows_have_neither_loss_nor_gradient() -> None:
    logits = random_logits(7, 5).requires_grad_()
    labels = torch.full((7,), IGNORED)
    loss = focal_loss(logits, labels)
    loss.backward()
    assert float(loss.detach()) == 0
    assert logits.grad is not None
    assert not logits.grad.any()
    assert not focal_loss(logits, labels, reduction="none").any()


def test_soft_targets_by_hand() -> None:
    # p = .5, t = .3: p_t = .5, alpha_t = .25 * .3 + .75 * .7 = .6, cross entropy ln 2
    loss = focal_loss(torch.zeros(1, 1), torch.tensor([[0.3]]))
    assert float(loss) == pytest.approx(0.6 * 0.25 * math.log(2), rel=1e-6)
    star = focal_loss_star(torch.ones(1, 1), torch.tensor([[0.3]]), gamma=1.0)
    # .3 * ln(1 + e^-1) + .7 * ln(1 + e)
    assert float(star) == pytest.approx(0.3 * 0.3132617 + 0.7 * 1.3132617, rel=1e-6)


# --- independent references -----------------------------------------------------------------


@pytest.mark.parametrize(("function", "options"), LOSSES)
def test_equal_to_the_formulas_in_numpy(
    function: Callable[..., Tensor], options: dict[str, Any]
) -> None:
    logits = random_logits(7, 5)
    expected = in_numpy(function, logits.numpy(), one_hot(LABELS, 5).numpy(), **options)
    expected[3] = 0  # ignored
    assert_close(function(logits, LABELS, reduction="none", **options), torch.from_numpy(expected))
    assert float(function(logits, LABELS, **options)) == pytest.approx(expected.sum(), rel=1e-12)
    mean = float(function(logits, LABELS, reduction="mean", **options))
    assert mean == pytest.approx(expected.sum() / 30, rel=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("alpha", [0.25, None, 0.9])
@pytest.mark.parametrize("soft", [False, True])
def test_equal_to_torchvision(gamma: float, alpha: float | None, soft: bool) -> None:
    logits = random_logits(50, 5).requires_grad_()
    targets = torch.rand(50, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if not soft:
        targets = (targets > 0.8).double()
    theirs = sigmoid_focal_loss(
        logits, targets, alpha=-1 if alpha is None else alpha, gamma=gamma, reduction="none"
    )
    ours = focal_loss(logits, targets, alpha=alpha, gamma=gamma, reduction="none")
    assert_close(ours, theirs)
    assert_close(torch.autograd.grad(ours.sum(), logits), torch.autograd.grad(theirs.sum(), logits))
    for reduction in ("sum", "mean"):
        assert_close(
            focal_loss(logits, targets, alpha=alpha, gamma=gamma, reduction=reduction),
            sigmoid_focal_loss(
                logits, targets, -1 if alpha is None else alpha, gamma, reduction=reduction
            ),
        )


@pytest.mark.parametrize(("function", "options"), LOSSES)
@pytest.mark.parametrize("rows", [3, 10_000])
def test_integer_labels_equal_the_formula(
    function: Callable[..., Tensor], options: dict[str, Any], rows: int
) -> None:
    """Value and gradient of the fast implementations, in one chunk and in several."""
    logits = random_logits(rows, 7, 5).requires_grad_()
    labels = LABELS.repeat(rows, 1)
    fast = function(logits, labels, **options)
    slow = function(logits, labels, reduction="none", **options).sum()
    assert_close(fast, slow)
    (fast_gradient,) = torch.autograd.grad(fast * 3, logits)
    (slow_gradient,) = torch.autograd.grad(slow * 3, logits)
    assert_close(fast_gradient, slow_gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_integer_path_in_other_types(dtype: torch.dtype) -> None:
    logits = random_logits(400, 6).to(dtype).requires_grad_()
    labels = torch.randint(-2, 6, (400,), generator=torch.Generator().manual_seed(2))
    fast = focal_loss(logits, labels)
    slow = focal_loss(logits, labels, reduction="none").sum()
    assert fast.dtype == torch.float32
    assert_close(fast, slow)
    (fast_gradient,) = torch.autograd.grad(fast, logits)
    (slow_gradient,) = torch.autograd.grad(slow, logits)
    assert fast_gradient.dtype == dtype
    assert_close(fast_gradient, slow_gradient)


def test_small_gradients_outlive_float16() -> None:
    """With the loss scale of mixed precision; the gradient alone is under float16's least."""
    logits = torch.full((1, 1), -7.0, dtype=torch.float16, requires_grad=True)
    (focal_loss(logits, torch.tensor([BACKGROUND])) * 65536).backward()
    p = 1 / (1 + math.exp(7))
    exact = 0.75 * p**2 * (2 * (1 - p) * math.log1p(math.exp(-7)) + p)
    assert exact < 6e-8
    assert logits.grad is not None
    assert float(logits.grad) == pytest.approx(exact * 65536, rel=1e-3)


@pytest.mark.parametrize(("function", "options"), LOSSES)
def test_gradcheck(function: Callable[..., Tensor], options: dict[str, Any]) -> None:
    logits = random_logits(7, 5).requires_grad_()
    soft = torch.rand(7, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    soft[0] = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.5])
    for r, t in product(("sum", "mean", "none"), (LABELS, soft)):
        assert gradcheck(lambda x, t=t, r=r: function(x, t, reduction=r, **options), logits)


# --- finite everywhere ----------------------------------------------------------------------


@pytest.mark.parametrize(("function", "options"), [*LOSSES, (focal_loss, {"gamma": 0.01})])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_for_extreme_logits(
    function: Callable[..., Tensor], options: dict[str, Any], dtype: torch.dtype
) -> None:
    extremes = torch.tensor([1e4, -1e4, 100.0, -100.0, 0.0])
    logits = torch.stack([extremes.roll(k) for k in range(5)]).to(dtype).requires_grad_()
    labels = torch.tensor([0, 0, 1, BACKGROUND, IGNORED])
    dense = one_hot(labels, 5).float()
    for targets, reduction in ((labels, "sum"), (labels, "none"), (dense, "sum")):
        loss = function(logits, targets, reduction=reduction, **options)
        assert loss.isfinite().all()
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert gradient.isfinite().all()


@pytest.mark.parametrize(("function", "options"), LOSSES)
def test_finite_at_the_end_of_the_range(
    function: Callable[..., Tensor], options: dict[str, Any]
) -> None:
    if isinstance(options.get("alpha"), list):
        options = options | {"alpha": options["alpha"][:1]}
    largest = torch.finfo(torch.float32).max
    for label, sign, reduction in product((0, BACKGROUND), (1, -1), ("sum", "none")):
        logits = torch.full((1, 1), sign * largest, requires_grad=True)
        right = (sign > 0) == (label == 0)
        loss = function(logits, torch.tensor([label]), reduction=reduction, **options)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.isfinite().all()
        assert abs(float(gradient)) <= 1
        assert (float(loss.detach()) == 0) == right
        # The hinge is one of the sigmoid, which is flat at both ends.
        assert (float(gradient) == 0) == (right or function is hinge_loss)


def test_extreme_logits_by_hand() -> None:
    logits = torch.tensor([[1e4, -1e4]], dtype=torch.float16, requires_grad=True)
    loss = focal_loss(logits, torch.tensor([1]))  # both wrong: .75 * 1e4 + .25 * 1e4
    loss.backward()
    assert float(loss.detach()) == pytest.approx(1e4)
    assert logits.grad is not None
    assert logits.grad.tolist() == [[0.75, -0.25]]


def test_tiny_losses_keep_their_digits() -> None:
    """1 + e^x rounds to 1; its logarithm must not become 0."""
    logits = torch.full((1000, 1), -30.0)
    loss = cross_entropy(logits, torch.full((1000,), BACKGROUND))
    assert float(loss) == pytest.approx(1000 * math.exp(-30), rel=1e-6)


# --- use ------------------------------------------------------------------------------------


def test_any_leading_shape() -> None:
    logits, labels = random_logits(2, 3, 4, 5), torch.randint(-2, 5, (2, 3, 4))
    flat = focal_loss(logits.reshape(-1, 5), labels.reshape(-1))
    assert_close(focal_loss(logits, labels), flat)
    assert focal_loss(logits, labels, reduction="none").shape == (2, 3, 4, 5)
    single = focal_loss(torch.zeros(5), torch.tensor(2))
    assert_close(single, focal_loss(torch.zeros(1, 5), torch.tensor([2])))


def test_binary_targets() -> None:
    logits = random_logits(6)
    truth = torch.tensor([True, False, True, True, False, False])
    expected = focal_loss(logits[:, None], torch.where(truth, 0, BACKGROUND))
    assert_close(focal_loss(logits, truth), expected)
    assert_close(focal_loss(logits, truth.double()), expected)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int) -> None:
    logits = torch.zeros(rows, 3, requires_grad=True)
    for reduction in ("sum", "mean"):
        for targets in (torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, 3)):
            loss = focal_loss(logits, targets, reduction=reduction)  # type: ignore[arg-type]
            loss.backward()
            assert loss.isfinite()


def test_backward_twice_with_a_retained_graph() -> None:
    logits = random_logits(7, 5).requires_grad_()
    loss = focal_loss(logits, LABELS)
    (first,) = torch.autograd.grad(loss * 2, logits, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss * 4, logits)
    assert_close(first, kept)
    assert_close(second, kept * 2)


@pytest.mark.parametrize(("function", "options"), LOSSES)
def test_second_derivative(function: Callable[..., Tensor], options: dict[str, Any]) -> None:
    logits = random_logits(7, 5).requires_grad_()
    assert gradgradcheck(lambda x: function(x, LABELS, **options), logits)


def test_autocast_changes_nothing() -> None:
    logits = random_logits(70, 5).float().requires_grad_()
    labels = LABELS.repeat(10)
    expected = focal_loss(logits, labels)
    with torch.autocast("cpu", torch.bfloat16):
        inside = focal_loss(logits, labels)
        dense = focal_loss(logits, labels, reduction="none").sum()
    assert inside.dtype == torch.float32
    assert_close(inside, expected)
    assert_close(dense, expected)


@pytest.mark.parametrize("kind", ["focal", "focal_star", "hinge"])
def test_weights_of_rows(kind: Any) -> None:
    logits = random_logits(7, 5).requires_grad_()
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0, 0.0, 0.1, 7.0], dtype=torch.float64)
    public: Any = {"focal": focal_loss, "focal_star": focal_loss_star, "hinge": hinge_loss}[kind]
    numbers: Any = {"margin": 0.6} if kind == "hinge" else {"gamma": 3.0}
    loss = weighted_sum(logits, LABELS, weights, make_formula(kind, **numbers), 0.25)
    each = public(logits, LABELS, alpha=0.25, reduction="none", **numbers)
    expected = (each * weights[:, None]).sum()
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits))


FOCAL = make_formula("focal", gamma=2.0)


def test_compiled_code_takes_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(7, 5).requires_grad_()
    expected = focal_loss(logits, LABELS, alpha=PER_CLASS)
    (gradient,) = torch.autograd.grad(expected, logits)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    loss = focal_loss(logits, LABELS, alpha=PER_CLASS)
    assert_close(loss, expected)
    assert_close(torch.autograd.grad(loss, logits)[0], gradient)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_gradient_over_the_logits(dtype: torch.dtype, upstream: float) -> None:
    values = random_logits(70, 5).to(dtype)
    labels = LABELS.repeat(10)
    weights = torch.rand(70, generator=torch.Generator().manual_seed(4))

    def loss_of(logits: Tensor, overwrite: bool) -> Tensor:
        return weighted_sum(logits, labels, weights, FOCAL, overwrite_logits=overwrite)

    leaf, other = values.clone().requires_grad_(), values.clone().requires_grad_()
    logits = leaf * 1  # an output that its own backward pass does not need
    loss, expected = loss_of(logits, True), loss_of(other, False)
    assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss * upstream, logits)
    (wanted,) = torch.autograd.grad(expected * upstream, other)
    assert torch.equal(gradient, wanted)
    # float16 has its gradient in float32 until it is scaled
    in_place = gradient.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
    assert in_place == (dtype != torch.float16)


def test_nothing_is_written_over_logits_without_a_gradient() -> None:
    logits = random_logits(7, 5).float()
    kept, weights = logits.clone(), torch.ones(7)
    weighted_sum(logits, LABELS, weights, FOCAL, overwrite_logits=True)
    with torch.no_grad():
        weighted_sum(logits.requires_grad_(), LABELS, weights, FOCAL, overwrite_logits=True)
    assert torch.equal(logits.detach(), kept)


def test_overwritten_logits_are_not_read_again() -> None:
    def loss_of() -> tuple[Tensor, Tensor]:
        logits = random_logits(7, 5).float().requires_grad_() * 1
        return logits, weighted_sum(logits, LABELS, torch.ones(7), FOCAL, overwrite_logits=True)

    logits, loss = loss_of()
    torch.autograd.grad(loss, logits, retain_graph=True)
    with pytest.raises(RuntimeError, match=r"over the logits.* leave overwrite_logits=False"):
        torch.autograd.grad(loss, logits)
    logits, loss = loss_of()
    with pytest.raises(RuntimeError, match=r"over the logits, so .* derived only once"):
        torch.autograd.grad(loss, logits, create_graph=True)
    # another function that kept them for its own gradient
    leaf = random_logits(7, 5).float().requires_grad_()
    logits = leaf * 1
    squares = (logits**2).sum()
    loss = weighted_sum(logits, LABELS, torch.ones(7), FOCAL, overwrite_logits=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + squares).backward()


# --- invalid arguments ------------------------------------------------------------------------

X, Y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("logits", "targets", "options", "message"),
    [
        (X, Y, {"reduction": "max"}, "reduction is none, sum or mean, got 'max'"),
        (X.long(), Y, {}, r"logits are floats of shape \(..., K\), got torch.int64 \(4, 3\)"),
        (torch.tensor(1.0), Y, {}, r"logits are floats .* \(\)"),
        (torch.zeros(4, 0), Y, {}, r"logits are floats .* \(4, 0\)"),
        (X, Y[:3], {}, r"integer labels of shape \(4,\) .* got torch.int64 .* shape \(3,\)"),
        (X, X[:, :2], {}, r"float targets of shape \(4, 3\); got torch.float32 .* \(4, 2\)"),
        (X, X.long(), {}, r"got torch.int64 targets of shape \(4, 3\)"),
        (X, Y + 3, {}, r"label 3 is neither a class 0..2 nor BACKGROUND \(-1\) nor IGNORED"),
        (X, Y - 3, {}, "label -3 is neither"),
        (X, Y + 3, {"reduction": "none"}, "label 3 is neither"),
        (X, X + 1.5, {}, r"float targets lie in \[0, 1\], got 1.5"),
        (X, X - 0.5, {}, r"float targets lie in \[0, 1\], got -0.5"),
        (X, X * float("nan"), {}, r"float targets lie in \[0, 1\], got nan"),
        (X, Y, {"alpha": 1.5}, r"alpha must lie in \[0, 1\] .* got 1.5"),
        (X, Y, {"alpha": -1}, r"alpha must lie in \[0, 1\] \(None: no weights\), got -1"),
        (X, Y, {"alpha": float("nan")}, "alpha must lie in"),
        (X, Y, {"alpha": [0.1, 0.2]}, r"one number for each of the 3 classes, got \(2,\)"),
        (X, Y, {"alpha": [0.1, 0.2, 1.2]}, r"alpha must lie in .* got 1.2"),
        (X, Y, {"alpha": torch.zeros(4, 3)}, r"of the 3 classes, got \(4, 3\)"),
        (X, Y, {"gamma": -0.1}, "gamma must be >= 0, got -0.1"),
        (X, Y, {"gamma": float("inf")}, "gamma must be >= 0, got inf"),
        (X, Y, {"gamma": float("nan")}, "gamma must be >= 0, got nan"),
    ],
)
def test_focal_loss_rejects(
    logits: Tensor, targets: Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        focal_loss(logits, targets, **options)


def test_star_rejects() -> None:
    with pytest.raises(ValueError, match="gamma must be > 0, got 0"):
        focal_loss_star(X, Y, gamma=0.0)
    with pytest.raises(ValueError, match="beta must be a finite number, got inf"):
        focal_loss_star(X, Y, beta=float("inf"))


@pytest.mark.parametrize("margin", [0.0, -0.5, 1.01, math.nan])
def test_hinge_rejects(margin: float) -> None:
    with pytest.raises(ValueError, match=rf"margin must lie in \(0, 1\], .* got {margin}"):
        hinge_loss(X, Y, margin=margin)


def test_float_labels_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"labels are integers, got torch\.float32"):
        weighted_sum(X, Y.float(), torch.ones(4), FOCAL)


@pytest.mark.parametrize("alpha", [None, 0.25, [0.25, 0.25, 0.25]])
def test_defaults_of_torch_change_nothing(alpha: Any, default: str) -> None:
    logits = torch.zeros(2, 3, dtype=torch.float32, device="cpu", requires_grad=True)
    labels = torch.tensor([1, BACKGROUND], device="cpu")
    loss = focal_loss(logits, labels, alpha=alpha)
    loss.backward()
    # of 6 elements of p = .5, (1 - p)^2 ln 2 each, one is a positive
    weights = 6 if alpha is None else 0.25 + 5 * 0.75
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(weights * math.log(2) / 4)
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
