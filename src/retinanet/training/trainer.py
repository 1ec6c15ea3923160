"""Start, resume or extend a training: data, settings, plan, run folder."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from accelerate.utils import broadcast_object_list, set_seed

from retinanet.config import Recipe
from retinanet.data.balance import balance, epoch_size
from retinanet.data.dataset import Dataset
from retinanet.data.loading import default_workers
from retinanet.data.memory import Reader
from retinanet.errors import ConfigError
from retinanet.files import recover_folder
from retinanet.model.backbone import check_weights_file
from retinanet.model.precision import NAMES, choose_dtype
from retinanet.own import import_own
from retinanet.structures import Batch
from retinanet.training.data import (
    TrainingData,
    images_to_validate,
    read_training_data,
    spread,
    tiles_to_train,
)
from retinanet.training.events import EventCallback, ignore
from retinanet.training.init import follow_checkpoint
from retinanet.training.loop import Emitter, Trainer
from retinanet.training.memory import fit_memory, keep_freed_memory, memory_errors
from retinanet.training.optim import resolve_steps
from retinanet.training.processes import open_accelerator
from retinanet.training.run_folder import RunFolder, describe_machine, read_progress
from retinanet.training.settings_from_data import (
    VALIDATION_COST,
    choose_settings,
    needs,
    resolved,
    values,
    with_choices_of,
)
from retinanet.training.step import Progress
from retinanet.training.task import RetinaNetTask, TaskSettings, TrainingTask
from retinanet.training.time_limit import (
    MIN_STEPS,
    Pace,
    Plan,
    plan_training,
)

MakeTask = Callable[[TaskSettings], TrainingTask]


MAX_EPOCHS = 1_000_000
"""Of an extension; more is a slip."""


@dataclass(frozen=True, slots=True)
class Run:
    """The result of a training.

    Attributes:
        folder: the run folder.
        model: the checkpoint to use: ``best/``, or ``last/`` where nothing was validated.
        metrics: metrics of `model` on the ``val`` split; empty where it was not validated.
        best_ap: AP of `model` on the ``val`` split; -1: not validated.
        step: steps done.
        interrupted: whether Ctrl-C, SIGTERM or ``on_event`` stopped it; the same call resumes it.
        exit_code: 0, or 130 after Ctrl-C and 143 after SIGTERM.
    """

    folder: Path
    model: Path
    metrics: Mapping[str, Any]
    best_ap: float
    step: int
    interrupted: bool = False
    exit_code: int = 0


def train(
    recipe: Recipe,
    data: str | Path | Reader | Mapping[str, Dataset],
    out: str | Path,
    *,
    device: str = "auto",
    init: str | Path | None = None,
    on_event: EventCallback | None = None,
    started: float | None = None,
    more_epochs: float | None = None,
) -> Run:
    """Train a RetinaNet, resume a run that was stopped, or extend it: :func:`retinanet.train`.

    Args:
        recipe: all settings.
        data: a labelled folder or file, or splits by name.
        out: the run folder. A resumed run ends at the weights of an uninterrupted one (bit for bit
            on a CPU with ``train.deterministic``).
        device: as in :func:`retinanet.train`; ``torchrun`` starts several processes.
        init: as ``train.init`` (:mod:`retinanet.training.init`).
        on_event: callback for progress events.
        started: when the command began, by :func:`time.monotonic`; the origin of ``train.time``.
        more_epochs: of an extension of the finished run, whose settings those that `recipe` states
            must be.
    """
    if init is not None:
        recipe = recipe.override({"train.init": str(init)})
    if more_epochs is not None:
        if not 0 < more_epochs <= MAX_EPOCHS:
            raise ConfigError(
                f"--more-epochs (more_epochs) {more_epochs:g}: give more than 0 and at most "
                f"{MAX_EPOCHS:,}"
            )
        recipe = RunFolder(out).recipe_to_extend(recipe)
    import_own(recipe.own_parts)
    start = follow_checkpoint(recipe, Path(out))
    if start is None and RunFolder(out).stored_recipe() is None:
        check_weights_file(recipe.model.backbone_weights)

    def make_task(settings: TaskSettings) -> RetinaNetTask:
        return RetinaNetTask(settings, start)

    recipe = recipe if start is None else start.recipe
    options: dict[str, Any] = {"on_event": on_event, "started": started}
    return run_task(make_task, recipe, data, out, device=device, more_epochs=more_epochs, **options)


def run_task(
    make_task: MakeTask,
    recipe: Recipe,
    data: str | Path | Reader | Mapping[str, Dataset],
    out: str | Path,
    *,
    device: str = "auto",
    on_event: EventCallback | None = None,
    started: float | None = None,
    more_epochs: float | None = None,
) -> Run:
    """Train a task; arguments, run folder and errors are those of :func:`train`."""
    started = time.monotonic() if started is None else started
    accelerator = open_accelerator(device, recipe.train.trackers, Path(out))
    if accelerator.is_main_process:
        RunFolder(out).check()
    if accelerator.device.type == "cpu":
        keep_freed_memory()

    emit = Emitter(on_event if accelerator.is_main_process else None)
    splits = read_training_data(data, recipe, emit)
    workers = recipe.data.workers
    settings = TaskSettings(
        recipe=recipe,
        train_set=splits.train,
        accelerator=accelerator,
        precision=NAMES[choose_dtype(recipe.train.precision, accelerator.device)],
        workers=default_workers() if workers == "auto" else workers,
        emit=emit,
    )
    run = RunFolder(out)
    settings, plan = _resolve(make_task, settings, splits, run, started)
    recipe, splits = settings.recipe, replace(splits, train=settings.train_set)
    repeats = balance(splits.train, recipe.data)
    if repeats is not None and recipe.data.balance != "none":
        emit("message", message=repeats.describe())
    task = make_task(settings)
    _check_batch_size(settings)
    with run.lock() if accelerator.is_main_process else nullcontext():
        stored = _open_run(run, splits, task)
        if stored is not None and stored.finished and more_epochs is None:
            early = " (stopped early)" if stored.stopped_early else ""
            emit(
                "message",
                message=f"{run.path} is finished: {stored.step} steps{early}; to train it further "
                "give --more-epochs 10 (rn.train: more_epochs)",
            )
            return _result(run, stored)
        if stored is None and not splits.val:
            emit(
                "message",
                message="warning: there is no validation split, so no AP, no best weights and no "
                "score thresholds: the last weights are the result",
            )
        extends = (
            more_epochs is not None
            and stored is not None
            and not stored.is_in_extension(more_epochs, run.path)
        )
        if recipe.train.trackers:
            accelerator.init_trackers("retinanet")
        set_seed(recipe.train.seed)
        trainer = Trainer(task, splits.val, run, resume=stored is not None)
        if extends and more_epochs is not None:
            images = epoch_size(settings.train_set, recipe.data)
            trainer.extend(more_epochs, math.ceil(more_epochs * images / recipe.train.batch_size))
        if plan is not None:
            trainer.progress.validation_seconds = plan.validation
        with memory_errors(settings):
            exit_code = trainer.fit(started, lambda: emit.stop)
        return _result(run, trainer.progress, exit_code)


def _resolve(
    make_task: MakeTask,
    settings: TaskSettings,
    data: TrainingData,
    run: RunFolder,
    started: float,
) -> tuple[TaskSettings, Plan | None]:
    """Choose what the recipe leaves open, by the run to resume, else by data and machine."""
    recipe, stored = settings.recipe, run.stored_recipe()
    plan = None

    def of(recipe: Recipe) -> TaskSettings:
        return replace(settings, recipe=recipe, train_set=tiles_to_train(data.train_images, recipe))

    if stored is not None:
        recipe = with_choices_of(recipe, stored)
        if recipe.train.accumulate == 0:
            recipe = recipe.choose({"train.accumulate": stored.train.accumulate})
    else:
        choose = partial(
            choose_settings,
            recipe,
            data.train_images,
            num_val=len(data.val) if data.val else 0,
            on_gpu=settings.accelerator.device.type != "cpu",
            processes=settings.accelerator.num_processes,
        )
        choices = choose()
        lengths: dict[str, Any] = {}
        if recipe.train.time is not None:
            timed = _fit_memory(make_task, of(recipe.choose(values(choices))))
            left = recipe.train.time - (time.monotonic() - started)
            pace = measure_pace(make_task, timed, data.val, left)
            # All processes must make the same plan.
            pace, elapsed = broadcast_object_list([pace, time.monotonic() - started])
            lengths, plan = _plan_for_time(timed, pace, elapsed, data.val)
            side, p2 = (lengths.pop(name, None) for name in ("data.image_size", "model.p2"))
            if side is not None or p2 is not None:
                if not timed.recipe.model.p2:
                    p2 = False  # smaller images may need it, but the plan has no time for it
                choices = choose(image_size=side or timed.recipe.data.image_size, p2=p2)
        if choices:
            settings.emit("choices", choices=[asdict(choice) for choice in choices])
        recipe = resolved(recipe.choose(values(choices) | lengths))
    return _fit_memory(make_task, of(recipe)), plan


def _fit_memory(make_task: MakeTask, settings: TaskSettings) -> TaskSettings:
    """Choose the micro-batches where the recipe leaves them open."""
    recipe = settings.recipe
    if recipe.train.accumulate:
        return settings

    def try_step(settings: TaskSettings, batch: Batch) -> None:
        with _trial(make_task, settings) as trainer:
            trainer.network.train()
            trainer.step(batch)
            trainer.flush()

    parts = fit_memory(settings, try_step)
    settings.emit(
        "message",
        message=f"memory: {settings.batch_size // parts} of {settings.batch_size} images at a time "
        f"(train.accumulate={parts})",
    )
    return replace(settings, recipe=recipe.choose({"train.accumulate": parts}))


def _plan_for_time(
    settings: TaskSettings, pace: Pace, elapsed: float, val: Dataset | None
) -> tuple[dict[str, Any], Plan]:
    """Return the settings with which the training fits into its time limit."""
    recipe, train_set = settings.recipe, settings.train_set
    num_images = epoch_size(train_set, recipe.data)
    on_gpu = settings.accelerator.device.type != "cpu"
    need = needs(train_set, num_images, on_gpu=on_gpu)
    num_val = 0 if val is None else len(images_to_validate(val, recipe))
    changes, plan = plan_training(
        recipe,
        pace,
        elapsed,
        num_images=num_images,
        max_side=need.max_side,
        num_val=num_val,
        num_split=0 if val is None else len(val),
        enough_images=need.images,
        min_side=need.min_side,
        batch_multiple=settings.accelerator.num_processes * recipe.train.accumulate,
        on_gpu=on_gpu,
    )
    batch = changes.get("train.batch_size", recipe.train.batch_size)
    side = changes.get("data.image_size", recipe.data.image_size)
    without = " without P2" if changes.get("model.p2") is False else ""
    count = changes.get("train.val_images")
    few = "" if count is None else f" on {count} of {num_val} images (train.val_images)"
    settings.emit(
        "message",
        message=f"plan for {recipe.train.time:.0f} s: {elapsed:.0f} s of start, then {plan.steps} "
        f"steps of {batch} images of {side} px{without} in {plan.seconds:.0f} s, validated "
        f"{'once' if plan.validations == 1 else f'{plan.validations} times'}{few}",
    )
    return changes, plan


@contextmanager
def _trial(make_task: MakeTask, settings: TaskSettings) -> Iterator[Trainer]:
    """Build a trainer whose steps are discarded."""
    with tempfile.TemporaryDirectory() as scratch, memory_errors(settings):
        task = make_task(replace(settings, emit=ignore))
        yield Trainer(task, None, RunFolder(scratch), resume=False)


def measure_pace(
    make_task: MakeTask, settings: TaskSettings, val: Dataset | None, seconds_left: float
) -> Pace:
    """Measure the duration of a training step and of a validation on this machine.

    Steps are timed until they have taken long enough, not counting the first two, and the
    validation of two batches; or until `seconds_left` cannot suffice.
    """
    with _trial(make_task, settings) as trainer:
        step = trainer.time_steps(seconds_left)
        if val is None or not len(val):
            return Pace(step, 0.0)
        val = images_to_validate(val, settings.recipe)
        if MIN_STEPS * step > seconds_left:
            return Pace(step, step * VALIDATION_COST * len(val) / settings.batch_size)
        few = spread(val, 2 * settings.batch_size)
        if settings.recipe.data.tile is not None:  # an image is many tiles: one of mean area
            areas = [(image.width or 0) * (image.height or 0) for image in val.images]
            middle = mean(areas)
            nearest = min(range(len(val)), key=lambda i: abs(areas[i] - middle))
            few = replace(val, images=val.images[nearest : nearest + 1])
        begun = time.perf_counter()
        trainer.task.validate(trainer.model, few, 0)
        return Pace(step, (time.perf_counter() - begun) * len(val) / len(few))


def _check_batch_size(settings: TaskSettings) -> None:
    train, processes = settings.recipe.train, settings.accelerator.num_processes
    if train.batch_size % (processes * train.accumulate):
        raise ConfigError(
            f"train.batch_size {train.batch_size} does not divide into "
            f"{processes} processes x {train.accumulate} micro-batches"
        )


def _open_run(run: RunFolder, data: TrainingData, task: TrainingTask) -> Progress | None:
    """Start the run folder, or return the progress of the run to resume."""
    recipe, accelerator = task.settings.recipe, task.settings.accelerator
    digest = data.digest(run.unreadable_sizes())
    if accelerator.is_main_process:
        for folder in (run.last, run.best):
            recover_folder(folder)
    accelerator.wait_for_everyone()
    stored = read_progress(run.last)
    if stored is None:
        if accelerator.is_main_process:
            info = {
                "seed": recipe.train.seed,
                "data": str(data.train.source),
                "format": data.train.format,
                "data_digest": digest,
                "split_origin": data.train.split_origin,
                "images": dict(data.num_images),
                "steps": resolve_steps(epoch_size(data.train, recipe.data), recipe.train),
                "processes": accelerator.num_processes,
            }
            run.start(recipe, describe_machine(accelerator.device) | info | dict(task.info))
        return None
    run.check_same(recipe, digest, task.info.get("rival"))
    return stored


def _result(run: RunFolder, progress: Progress, exit_code: int = 0) -> Run:
    return Run(
        folder=run.path,
        model=run.best if run.best.is_dir() else run.last,
        metrics=progress.best_metrics,
        best_ap=progress.best_ap,
        step=progress.step,
        interrupted=exit_code != 0 or not progress.finished,
        exit_code=exit_code,
    )
