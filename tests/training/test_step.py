"""A step that never waits for the device, and one that is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny import tiny_recipe
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import retinanet.training.task as task
import retinanet.training.trainer as loop
from retinanet.config import TrainConfig
from retinanet.errors import NonFiniteLossError
from retinanet.losses.detection import Losses
from retinanet.model.retinanet import RetinaNet
from retinanet.structures import Batch, Targets
from retinanet.training.data import read_training_data
from retinanet.training.optim import build_optimizer
from retinanet.training.run_folder import read_progress
from retinanet.training.step import (
    MAX_CONSECUTIVE_SKIPPED_STEPS,
    NonFiniteGuard,
    PendingStep,
    StepContext,
    backward,
    clip_gradients,
    lerp_unless,
    optimizer_step,
    update_ema,
)

CPU = torch.device("cpu")


# --- nothing is looked at -------------------------------------------------------------------------


def tiny_network() -> RetinaNet:
    return RetinaNet(
        backbone="mobilenet_v2", num_classes=3, norm="group", frozen_stages=0, channels=16,
        head_depth=1,
    )  # fmt: skip


def a_batch(device: str, objects: int = 5) -> Batch:
    return Batch(
        torch.zeros(4, 3, 64, 96, dtype=torch.uint8, device=device),
        Targets(
            torch.zeros(4, objects, 4, device=device),
            torch.zeros(4, objects, dtype=torch.int64, device=device),
        ),
        torch.tensor([[64, 96]] * 4),
        torch.tensor([[64, 96]] * 4),
        torch.arange(4),
    )


@pytest.mark.parametrize(
    ("settings", "objects"),
    [
        ((), 0),
        ((), 5),
        (("train.accumulate=2", "loss.normalizer=batch", "loss.box=giou"), 5),
        (("train.accumulate=2", "loss.normalizer=running", "matching.low_quality_matches=true"), 5),
        (("loss.classification=focal_star", "loss.box=ciou", "loss.alpha=[0.1, 0.2, 0.3]"), 5),
        (("loss.classification=cross_entropy", "loss.box=l1"), 5),
    ],
)
def test_a_step_looks_at_no_value(settings: tuple[str, ...], objects: int) -> None:
    """A tensor on the meta device has no values: .item(), nonzero, .cpu(), a mask as an index and
    whatever else would wait for a GPU raise there.
    """
    meta = torch.device("meta")
    recipe = tiny_recipe(*settings)
    model = tiny_network().to("meta")
    averaged = AveragedModel(model, use_buffers=True)
    guard = NonFiniteGuard(meta, scaled=False)
    accelerator = Accelerator(cpu=True)
    running = torch.zeros((), device=meta)
    losses, running = backward(
        model,
        model,
        a_batch("meta", objects),
        StepContext(0, "float32", torch.amp.GradScaler("cpu", enabled=False), running),
        accelerator=accelerator,
        settings=recipe.loss_settings,
        accumulate=recipe.train.accumulate,
    )
    assert all(one.grad is not None for one in model.parameters())
    refused = guard.check(losses, clip_gradients(model, 1.0))
    update_ema(averaged, model, 0.9, refused)
    figures = PendingStep(0, 0.1, a_batch("meta"), running)
    figures.copy_metrics(losses, refused, guard.stopped)
    # The test would see it: this is the one look, and it comes a step later.
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        figures.read()


def test_figures_land_on_the_host_whatever_the_default_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only a CPU's memory can be pinned, so a GPU that is the default must not get in between."""
    asked: list[Any] = []
    empty = torch.empty

    def pinned(*shape: Any, device: Any = None, pin_memory: bool) -> Tensor:
        asked.append((device, pin_memory))
        return empty(*shape, device="cpu")

    class OnAGpu(Tensor):
        device = torch.device("cuda")  # type: ignore[assignment, misc]

    class Event:
        def __init__(self, blocking: bool) -> None: ...
        def record(self) -> None: ...
        def synchronize(self) -> None: ...

    batch = a_batch("cpu")
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.0]).as_subclass(OnAGpu)
    monkeypatch.setattr(torch, "stack", lambda _: values)
    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    pending = PendingStep(0, 0.1, batch, torch.tensor(1.0))
    pending.copy_metrics(of(1.0), torch.tensor(1.0), torch.tensor(0.0))
    figures, stopped = pending.read()
    assert asked == [("cpu", True)]
    assert (figures["loss"], figures["grad_norm"], stopped) == (3.0, 4.0, False)


# --- what the guard says --------------------------------------------------------------------------


def of(loss: float) -> Losses:
    return Losses(torch.tensor(loss), torch.tensor(0.0), torch.ones(1), torch.tensor(1.0))


def verdicts(guard: NonFiniteGuard, *steps: tuple[float, float]) -> Iterator[tuple[bool, bool]]:
    """For pairs of loss and gradient norm: whether the step is refused, and the run stopped."""
    for loss, norm in steps:
        refused = guard.check(of(loss), torch.tensor(norm))
        yield bool(refused), bool(guard.stopped)


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("bad", [(NAN, 1.0), (INF, 1.0), (1.0, NAN), (1.0, INF)])
def test_after_a_step_that_is_not_finite_none_is_let_through(bad: tuple[float, float]) -> None:
    found = list(verdicts(NonFiniteGuard(CPU, scaled=False), (1.0, 1.0), bad, (1.0, 1.0)))
    assert found == [(False, False), (True, True), (True, True)]


def test_under_a_loss_scale_a_gradient_may_overflow() -> None:
    found = list(
        verdicts(NonFiniteGuard(CPU, scaled=True), (1.0, INF), (1.0, NAN), (1.0, 1.0), (NAN, 1.0))
    )
    assert found == [(True, False), (True, False), (False, False), (True, True)]


def test_under_a_loss_scale_patience_ends() -> None:
    overflow, good = (1.0, INF), (1.0, 1.0)
    guard = NonFiniteGuard(CPU, scaled=True)
    nearly = [overflow] * (MAX_CONSECUTIVE_SKIPPED_STEPS - 1)
    found = list(verdicts(guard, *nearly, good, *nearly, overflow, good))
    assert [stopped for _, stopped in found].index(True) == 2 * MAX_CONSECUTIVE_SKIPPED_STEPS - 1
    assert found[-1] == (True, True)


# --- a refused step moves nothing -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("refused_steps", [{0}, {2}, {0, 1, 3}])
def test_a_refused_step_is_as_if_it_had_not_been(
    kind: Any, fused: bool, refused_steps: set[int]
) -> None:
    """Weights, momentum, decay and Adam's count; torch's fused kernels run on a CPU as well."""

    def train(without: set[int], gradients: list[Tensor]) -> tuple[nn.Module, dict[int, Any]]:
        torch.manual_seed(0)
        model = nn.Conv2d(2, 3, 3)
        settings = TrainConfig(
            optimizer=kind, lr=0.1, batch_size=16, momentum=0.9, weight_decay=0.1
        )
        optimizer = build_optimizer(model, settings, fused=fused)
        for step, gradient in enumerate(gradients):
            model.weight.grad = torch.full_like(model.weight, NAN) if step in without else gradient
            model.bias.grad = torch.ones_like(model.bias)  # type: ignore[union-attr]
            optimizer_step(optimizer, torch.tensor(float(step in without)))
        return model, optimizer.state_dict()["state"]

    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(3, 2, 3, 3, generator=generator) for _ in range(5)]
    kept = [one for step, one in enumerate(gradients) if step not in refused_steps]
    found, found_state = train(refused_steps, gradients)
    expected, expected_state = train(set(), kept)
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(found_state, expected_state, rtol=0, atol=0)


def test_the_average_by_hand() -> None:
    model = nn.BatchNorm1d(1)  # a weight, and a count that is no float
    averaged = AveragedModel(model, use_buffers=True)
    let, refuse = torch.zeros(()), torch.ones(())

    def step(weight: float, refused: Tensor) -> float:
        nn.init.constant_(model.weight, weight)
        model.num_batches_tracked.fill_(int(weight))  # type: ignore[union-attr, operator]
        update_ema(averaged, model, 0.5, refused)
        return float(averaged.module.weight.detach())

    assert step(1.0, let) == 1.0  # the first is taken as it is
    # the second keeps (1 + 1) / (10 + 1) of the average
    assert step(12.0, let) == pytest.approx(1 * 2 / 11 + 12 * 9 / 11)
    assert step(99.0, refuse) == pytest.approx(1 * 2 / 11 + 12 * 9 / 11)
    assert int(averaged.module.num_batches_tracked) == 12
    assert int(averaged.n_averaged) == 2
    averaged.n_averaged.fill_(1000)
    assert step(0.0, let) == pytest.approx((1 * 2 / 11 + 12 * 9 / 11) / 2)  # now the decay rules


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_refused_average_changes_nothing(share: float) -> None:
    """The way of a GPU, where the flag is a tensor that the host does not read."""
    refuse, let = torch.ones(()), torch.zeros(())
    kept = torch.tensor([4.0, 8.0])
    for new in (torch.tensor([NAN, INF]), torch.tensor([0.0, 0.0])):
        lerp_unless(kept, new, share, refuse)
        assert kept.tolist() == [4.0, 8.0]
    lerp_unless(kept, torch.tensor([0.0, 16.0]), share, let)
    # 4 + (0 - 4) share and 8 + (16 - 8) share
    assert kept.tolist() == [4 - 4 * share, 8 + 8 * share]
    count = torch.tensor(3)  # a norm's, which is no float
    lerp_unless(count, torch.tensor(5), share, refuse)
    assert int(count) == 3
    lerp_unless(count, torch.tensor(5), share, let)
    assert int(count) == 5


# --- the loop, one step ahead of what it reads, as on a GPU ---------------------------------------


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_step_ahead_loses_no_line_and_saves_what_it_says(tiny_data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("train.steps=5", "train.validate_every=2", "train.save_every=2")
    run = loop.train(recipe, tiny_data, tmp_path / "run", device="cpu")
    order = [(line["step"], "validation" in line) for line in log_of(run.folder)]
    assert order == [
        (1, False), (2, False), (2, True), (3, False), (4, False), (4, True), (5, False), (5, True),
    ]  # fmt: skip
    assert all(line["seconds"] > 0 for line in log_of(run.folder) if "loss_box" in line)


def spoil(monkeypatch: pytest.MonkeyPatch, step: int) -> list[list[int]]:
    """Make the gradient of a step (from 0) NaN; the list fills with each step's images."""
    seen: list[list[int]] = []

    def spoiled(*arguments: Any, **options: Any) -> tuple[Losses, Tensor]:
        losses, running = backward(*arguments, **options)
        seen.append(arguments[2].indices.tolist())
        if len(seen) == step + 1:
            for one in arguments[1].parameters():
                if one.grad is not None:
                    one.grad.fill_(NAN)
        return losses, running

    monkeypatch.setattr(task, "backward", spoiled)
    return seen


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_step_ahead_saves_nothing_before_it_knows(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save is due right after the bad step, before the host would hear of it."""
    seen = spoil(monkeypatch, 2)
    recipe = tiny_recipe("train.steps=9", "train.save_every=3", "train.validate_every=99")
    with pytest.raises(NonFiniteLossError, match="step 2: "):
        loop.train(recipe, tiny_data, tmp_path / "run", device="cpu")
    assert len(seen) == 3
    progress = read_progress(tmp_path / "run" / "last")
    assert progress is not None
    assert progress.step == 0


def test_a_step_ahead_reports_the_step_that_was_not_finite(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_on_a_gpu: None
) -> None:
    """Step 2 of 0.. is bad; the host hears of it in step 3, and nothing has moved since step 1."""
    settings = (
        "train.optimizer=sgd", "train.ema=0.9", "train.validate_every=99",
        "train.schedule=steps", "train.milestones=[0.99]",
    )  # fmt: skip
    two = loop.train(
        tiny_recipe("train.steps=2", *settings), tiny_data, tmp_path / "two", device="cpu"
    )
    seen = spoil(monkeypatch, 2)
    recipe = tiny_recipe("train.steps=9", *settings)
    with pytest.raises(NonFiniteLossError, match=r"step 2: .* gradient norm nan"):
        loop.train(recipe, tiny_data, tmp_path / "run", device="cpu")
    assert len(seen) == 4
    kept = tmp_path / "run" / "nonfinite"
    story = json.loads((kept / "story.json").read_text())
    assert story["step"] == 2
    train_split = read_training_data(tiny_data, recipe, lambda kind, /, **data: None).train
    assert [one["id"] for one in story["images"]] == [train_split.images[i].id for i in seen[2]]
    assert load_file(kept / "batch.safetensors")["images"].shape[0] == 4
    # The weights that the optimiser moves; a checkpoint beside them holds their averages.
    after_two = load_file(two.folder / "last" / "training.safetensors")
    for name, value in weights_of(kept / "model").items():
        torch.testing.assert_close(value, after_two[f"model.{name}"], rtol=1e-6, atol=1e-8)
    assert [line["step"] for line in log_of(tmp_path / "run")] == [1, 2]


@pytest.mark.usefixtures("as_on_a_gpu")
def test_gradients_that_always_overflow_end_an_fp16_run(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retinanet.training.step.MAX_CONSECUTIVE_SKIPPED_STEPS", 4)
    monkeypatch.setattr(loop, "clip_gradients", lambda model, norm: torch.tensor(INF))
    recipe = tiny_recipe("train.steps=99", "train.precision=fp16", "train.validate_every=99")
    with pytest.raises(NonFiniteLossError, match=r"step 3: .* gradient norm inf"):
        loop.train(recipe, tiny_data, tmp_path / "run", device="cpu")
    first = weights_of(tmp_path / "run" / "last")
    for name, value in weights_of(tmp_path / "run" / "nonfinite" / "model").items():
        torch.testing.assert_close(value, first[name], rtol=0, atol=0)
