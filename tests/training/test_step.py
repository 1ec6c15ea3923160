"""A step without a device sync, and steps that are skipped."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny import read_log, tiny_recipe, weights
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import retinanet.training.task as task
from retinanet.config import TrainConfig
from retinanet.errors import NonFiniteLossError
from retinanet.losses.detection import Losses
from retinanet.model.retinanet import RetinaNet
from retinanet.structures import Batch, Targets
from retinanet.training import loop, trainer
from retinanet.training.data import read_training_data
from retinanet.training.events import ignore
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

INF, NAN = float("inf"), float("nan")


def make_batch(device: str, objects: int = 5) -> Batch:
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


def losses_of(loss: float) -> Losses:
    return Losses(torch.tensor(loss), torch.tensor(0.0), torch.ones(1), torch.tensor(1.0))


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
def test_step_reads_no_value(settings: tuple[str, ...], objects: int) -> None:
    """A tensor on the meta device has no values: .item(), nonzero, .cpu(), a mask as an index and
    whatever else would wait for a GPU raise there.
    """
    meta = torch.device("meta")
    recipe = tiny_recipe(*settings)
    model = RetinaNet(3, recipe.model_spec, frozen_stages=0).to("meta")
    averaged = AveragedModel(model, use_buffers=True)
    guard = NonFiniteGuard(meta, scaled=False)
    running = torch.zeros((), device=meta)
    losses, running = backward(
        model,
        model,
        make_batch("meta", objects),
        StepContext(0, "float32", torch.amp.GradScaler("cpu", enabled=False), running),
        accelerator=Accelerator(cpu=True),
        settings=recipe.loss_settings,
        accumulate=recipe.train.accumulate,
    )
    assert all(parameter.grad is not None for parameter in model.parameters())
    skip = guard.check(losses, clip_gradients(model, 1.0))
    update_ema(averaged, model, 0.9, skip)
    pending = PendingStep(0, 0.1, make_batch("meta"), running)
    pending.copy_metrics(losses, skip, guard.stopped)
    # The test would see a read: this is the only read, and it comes a step later.
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        pending.read()


# --- the guard ------------------------------------------------------------------------------------

GOOD, OVERFLOW = (1.0, 1.0), (1.0, INF)
NEARLY = [OVERFLOW] * (MAX_CONSECUTIVE_SKIPPED_STEPS - 1)


@pytest.mark.parametrize(
    ("scaled", "steps", "skipped", "stopped_at"),
    [
        *((False, [GOOD, bad, GOOD], [False, True, True], 1)
          for bad in ((NAN, 1.0), (INF, 1.0), (1.0, NAN), (1.0, INF))),
        (True, [OVERFLOW, (1.0, NAN), GOOD, (NAN, 1.0)], [True, True, False, True], 3),
        (True, [*NEARLY, GOOD, *NEARLY, OVERFLOW, GOOD],
         [*[True] * len(NEARLY), False, *[True] * (len(NEARLY) + 2)],
         2 * MAX_CONSECUTIVE_SKIPPED_STEPS - 1),
    ],
)  # fmt: skip
def test_guard_skips_and_stops(
    scaled: bool, steps: list[tuple[float, float]], skipped: list[bool], stopped_at: int
) -> None:
    """Steps are (loss, gradient norm); only under a loss scale may a gradient overflow."""
    guard = NonFiniteGuard(torch.device("cpu"), scaled=scaled)
    found, stopped = [], []
    for loss, norm in steps:
        found.append(bool(guard.check(losses_of(loss), torch.tensor(norm))))
        stopped.append(bool(guard.stopped))
    assert found == skipped
    assert stopped.index(True) == stopped_at
    assert all(stopped[stopped_at:])


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("skipped", [{0}, {2}, {0, 1, 3}])
def test_skipped_step_changes_nothing(kind: Any, fused: bool, skipped: set[int]) -> None:
    """Weights, momentum, decay and Adam's count; torch's fused kernels run on a CPU as well."""

    def train(without: set[int], gradients: list[Tensor]) -> tuple[nn.Module, dict[int, Any]]:
        torch.manual_seed(0)
        model = nn.Conv2d(2, 3, 3)
        settings = TrainConfig(optimizer=kind, lr=0.1, weight_decay=0.1)
        optimizer = build_optimizer(model, settings, fused=fused)
        for step, gradient in enumerate(gradients):
            model.weight.grad = torch.full_like(model.weight, NAN) if step in without else gradient
            model.bias.grad = torch.ones_like(model.bias)  # type: ignore[union-attr]
            optimizer_step(optimizer, torch.tensor(float(step in without)))
        return model, optimizer.state_dict()["state"]

    generator = torch.Generator().manual_seed(1)
    gradients = [torch.randn(3, 2, 3, 3, generator=generator) for _ in range(5)]
    kept = [gradient for step, gradient in enumerate(gradients) if step not in skipped]
    found, found_state = train(skipped, gradients)
    expected, expected_state = train(set(), kept)
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(found_state, expected_state, rtol=0, atol=0)


def test_update_ema_by_hand() -> None:
    model = nn.BatchNorm1d(1)  # a weight, and a count that is no float
    averaged = AveragedModel(model, use_buffers=True)

    def step(weight: float, skip: float) -> float:
        nn.init.constant_(model.weight, weight)
        model.num_batches_tracked.fill_(int(weight))  # type: ignore[union-attr, operator]
        update_ema(averaged, model, 0.5, torch.tensor(skip))
        return float(averaged.module.weight.detach())

    assert step(1.0, 0) == 1.0  # the first is taken as it is
    # the second keeps (1 + 1) / (10 + 1) of the average
    assert step(12.0, 0) == pytest.approx(1 * 2 / 11 + 12 * 9 / 11)
    assert step(99.0, 1) == pytest.approx(1 * 2 / 11 + 12 * 9 / 11)
    assert int(averaged.module.num_batches_tracked) == 12
    assert int(averaged.n_averaged) == 2
    averaged.n_averaged.fill_(1000)
    assert step(0.0, 0) == pytest.approx((1 * 2 / 11 + 12 * 9 / 11) / 2)  # now the decay rules


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_lerp_unless_skipped_changes_nothing(weight: float) -> None:
    """On a GPU the flag is a tensor that the host does not read."""
    skip, update = torch.ones(()), torch.zeros(())
    average = torch.tensor([4.0, 8.0])
    for value in (torch.tensor([NAN, INF]), torch.tensor([0.0, 0.0])):
        lerp_unless(average, value, weight, skip)
        assert average.tolist() == [4.0, 8.0]
    lerp_unless(average, torch.tensor([0.0, 16.0]), weight, update)
    # 4 + (0 - 4) weight and 8 + (16 - 8) weight
    assert average.tolist() == [4 - 4 * weight, 8 + 8 * weight]
    count = torch.tensor(3)  # of a norm: no float
    lerp_unless(count, torch.tensor(5), weight, skip)
    assert int(count) == 3
    lerp_unless(count, torch.tensor(5), weight, update)
    assert int(count) == 5


# --- the loop, one step ahead of what it reads, as on a GPU ---------------------------------------


@pytest.mark.usefixtures("as_on_a_gpu")
def test_train_a_step_ahead_loses_no_line(tiny_data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("train.steps=5", "train.validate_every=2", "train.save_every=2")
    run = trainer.train(recipe, tiny_data, tmp_path / "run", device="cpu")
    assert [(line["step"], "validation" in line) for line in read_log(run.folder)] == [
        (1, False), (2, False), (2, True), (3, False), (4, False), (4, True), (5, False), (5, True),
    ]  # fmt: skip
    assert '"seconds": 0.0,' not in (run.folder / "log.jsonl").read_text()


def spoil_step(monkeypatch: pytest.MonkeyPatch, step: int) -> list[list[int]]:
    """Make the gradient of a step (from 0) NaN; the list fills with each step's images."""
    seen: list[list[int]] = []

    def spoiled(network: Any, model: Any, batch: Batch, *rest: Any, **options: Any) -> Any:
        result = backward(network, model, batch, *rest, **options)
        seen.append(batch.indices.tolist())
        if len(seen) == step + 1:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(NAN)
        return result

    monkeypatch.setattr(task, "backward", spoiled)
    return seen


@pytest.mark.usefixtures("as_on_a_gpu")
def test_train_a_step_ahead_saves_nothing_after_a_bad_step(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save is due right after the bad step, before the host reads of it."""
    seen = spoil_step(monkeypatch, 2)
    recipe = tiny_recipe("train.steps=9", "train.save_every=3", "train.validate_every=99")
    with pytest.raises(NonFiniteLossError, match="step 2: "):
        trainer.train(recipe, tiny_data, tmp_path / "run", device="cpu")
    assert len(seen) == 3
    progress = read_progress(tmp_path / "run" / "last")
    assert progress is not None
    assert progress.step == 0


@pytest.mark.usefixtures("as_on_a_gpu")
def test_train_a_step_ahead_reports_the_bad_step(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 2 of 0.. is bad; the host reads of it in step 3, and nothing has moved since step 1."""
    settings = (
        "train.optimizer=sgd", "train.ema=0.9", "train.validate_every=99",
        "train.schedule=steps", "train.milestones=[0.99]",
    )  # fmt: skip
    splits = read_training_data(tiny_data, tiny_recipe(), ignore)
    data = {"train": splits.train}
    two = trainer.train(
        tiny_recipe("train.steps=2", *settings), data, tmp_path / "two", device="cpu"
    )
    seen = spoil_step(monkeypatch, 2)
    recipe = tiny_recipe("train.steps=9", *settings)
    with pytest.raises(NonFiniteLossError, match=r"step 2: .* gradient norm nan"):
        trainer.train(recipe, data, tmp_path / "run", device="cpu")
    assert len(seen) == 4
    saved = tmp_path / "run" / "nonfinite"
    story = json.loads((saved / "story.json").read_text())
    assert story["step"] == 2
    assert [x["id"] for x in story["images"]] == [splits.train.images[i].id for i in seen[2]]
    assert load_file(saved / "batch.safetensors")["images"].shape[0] == 4
    # The weights that the optimizer moves; the checkpoint of the other run contains EMA weights.
    after_two = load_file(two.folder / "last" / "training.safetensors")
    for name, value in weights(saved / "model").items():
        torch.testing.assert_close(value, after_two[f"model.{name}"], rtol=1e-6, atol=1e-8)
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1, 2]


@pytest.mark.usefixtures("as_on_a_gpu")
def test_train_gradients_that_always_overflow_end_an_fp16_run(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retinanet.training.step.MAX_CONSECUTIVE_SKIPPED_STEPS", 2)
    monkeypatch.setattr(loop, "clip_gradients", lambda model, norm: torch.tensor(INF))
    recipe = tiny_recipe("train.steps=99", "train.precision=fp16", "train.validate_every=99")
    with pytest.raises(NonFiniteLossError, match=r"step 1: .* gradient norm inf"):
        trainer.train(recipe, tiny_data, tmp_path / "run", device="cpu")
    first = weights(tmp_path / "run" / "last")
    for name, value in weights(tmp_path / "run" / "nonfinite" / "model").items():
        torch.testing.assert_close(value, first[name], rtol=0, atol=0)


SYNCS = Path(__file__).parents[2] / "benchmarks" / "step_syncs.py"


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_step_does_not_wait_for_the_gpu() -> None:
    size = ("data.image_size=256", "data.max_size=256")
    command = [sys.executable, str(SYNCS), "--steps", "4", *size]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_step_syncs_script_without_a_gpu_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [str(SYNCS)])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(SYNCS), run_name="__main__")
    error = "error: no CUDA device; run on a machine with a GPU\n"
    assert capsys.readouterr() == ("", error)
