"""The training loop (Sec. 4.1), from the data to the last checkpoint."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from retinanet.config import Recipe
from retinanet.data import digest, read_splits, usable
from retinanet.data.dataset import Dataset
from retinanet.data.images import padding_colour
from retinanet.data.loading import default_workers, train_loader
from retinanet.errors import ConfigError, DataError
from retinanet.files import replace_folder, write_atomic
from retinanet.losses.detection import RUNNING_START
from retinanet.model.precision import choose_dtype
from retinanet.structures import Batch
from retinanet.training.events import Event, Listener
from retinanet.training.figures import FiguresInFlight, Meter
from retinanet.training.guard import Guard, step_unless
from retinanet.training.optim import (
    build_optimizer,
    lr_factor,
    resolve_steps,
    scaled_lr,
    set_lr,
    update_average,
)
from retinanet.training.processes import deterministic, from_main, open_accelerator, stop_after_step
from retinanet.training.retinanet_subject import RetinaNetSubject
from retinanet.training.run_folder import RunFolder, describe_machine
from retinanet.training.state import Progress, load_state, read_progress, save_state
from retinanet.training.step import clip
from retinanet.training.subject import MakeSubject


@dataclass(frozen=True, slots=True)
class Run:
    """What a training left behind.

    Attributes:
        folder: the run folder.
        model: the checkpoint to use: ``best/``, or ``last/`` where nothing was validated.
        metrics: figures of `model` on the ``val`` split; empty where it was not validated.
        best_ap: AP of `model` on the ``val`` split; -1: not validated.
        step: steps done.
        interrupted: whether Ctrl-C or SIGTERM stopped it; the same call resumes it.
        exit_code: 0, or 130 after Ctrl-C and 143 after SIGTERM.
    """

    folder: Path
    model: Path
    metrics: Mapping[str, Any]
    best_ap: float
    step: int
    interrupted: bool = False
    exit_code: int = 0


@dataclass(slots=True)
class _Step:
    """A step that the device may still be at work on.

    Attributes:
        number: from 0.
        lr: its learning rate.
        batch: its images, on the host.
        running: () the running normaliser before it.
        figures: what came of it.
        speed: how fast it was.
    """

    number: int
    lr: float
    batch: Batch
    running: Tensor
    figures: FiguresInFlight
    speed: dict[str, float] = field(default_factory=dict)


def train(
    recipe: Recipe,
    data: str | Path | Mapping[str, Dataset],
    out: str | Path,
    *,
    device: str = "auto",
    init: str | Path | None = None,
    on_event: Listener | None = None,
) -> Run:
    """Train a RetinaNet, or go on with a run that was stopped.

    Args:
        recipe: all settings (:func:`retinanet.config.load_recipe`).
        data: a labelled folder or file of any format, or its splits by name; ``train`` is trained
            on, ``val`` is validated on.
        out: the run folder. Where it holds an unfinished run with the same settings and data, that
            run goes on from its last state, and ends at the weights it would have reached unstopped
            (bit for bit on a CPU with ``train.deterministic``).
        device: ``auto``, ``cpu`` or ``cuda``; several processes come from ``accelerate launch``.
        init: a checkpoint to start from; what does not fit (other classes) is listed and left out.
        on_event: is told what happens (:class:`Event`).

    Raises:
        ConfigError: settings contradict each other, or `out` holds another run.
        DataError: the data has no image or no object to train on.
        NonFiniteLossError: the loss or its gradient is NaN or infinite; what reproduces it is kept.
        WeightsError: `init` or the backbone's weights cannot be used.
    """

    def make(
        accelerator: Accelerator, train_set: Dataset, tell: Callable[..., None]
    ) -> RetinaNetSubject:
        return RetinaNetSubject(recipe, train_set, accelerator, init, tell)

    return train_subject(make, recipe, data, out, device=device, on_event=on_event)


def train_subject(
    make: MakeSubject,
    recipe: Recipe,
    data: str | Path | Mapping[str, Dataset],
    out: str | Path,
    *,
    device: str = "auto",
    on_event: Listener | None = None,
) -> Run:
    """Train whatever `make` makes; arguments, run folder and errors are those of :func:`train`."""
    settings = recipe.train
    accelerator = open_accelerator(device, settings.trackers, Path(out))
    tell = _teller(accelerator, on_event)

    # --- data ---------------------------------------------------------------------------------
    splits = data if isinstance(data, Mapping) else _read(data, recipe)
    if "train" not in splits:
        raise DataError(f"no split named 'train'; there is {', '.join(splits) or 'none'}")
    train_set, left_out = usable(splits["train"])
    val_set = splits.get("val")
    if not any(not one.ignored for image in train_set.images for one in image.annotations):
        raise DataError(
            f"{train_set.source}: no object to train on in {len(train_set)} images; "
            "see retinanet data check"
        )
    if val_set is not None and val_set.classes != train_set.classes:
        raise DataError(
            f"{train_set.source}: the classes of train and val differ: "
            f"{', '.join(train_set.classes)} and {', '.join(val_set.classes)}"
        )
    shared = {one.path for one in train_set.images} & {
        one.path for one in (val_set.images if val_set else ())
    }
    if shared:
        tell(
            "message",
            message=f"warning: {len(shared)} images are in train and in val, the first: "
            f"{min(shared)}; the AP on val is not honest",
        )
    subject = make(accelerator, train_set, tell)
    if left_out:
        first = f"{left_out[0].file}: {left_out[0].reason}"
        tell(
            "message",
            message=f"left out {len(left_out)} faulty objects or images of the training data, "
            f"the first: {first}; see retinanet data check",
        )

    batch_size, rest = divmod(settings.batch_size, accelerator.num_processes)
    if rest or batch_size % settings.accumulate:
        raise ConfigError(
            f"train.batch_size {settings.batch_size} does not divide into "
            f"{accelerator.num_processes} processes x {settings.accumulate} micro-batches"
        )

    # --- run folder ---------------------------------------------------------------------------
    folder = RunFolder(out)
    data_digest = digest(train_set) + (digest(val_set) if val_set else "")
    steps = resolve_steps(
        len(train_set),
        steps=settings.steps,
        epochs=settings.epochs,
        min_steps=settings.min_steps,
        max_steps=settings.max_steps,
        batch_size=settings.batch_size,
    )
    if accelerator.is_main_process:
        folder.recover()
    accelerator.wait_for_everyone()
    stored = read_progress(folder.last)
    if stored is not None:
        folder.check_same(recipe, data_digest, subject.info.get("rival"))
        if stored.finished:
            tell("message", message=f"{folder.path} is finished: {stored.step} steps")
            return _result(folder, stored)
        begun_by = json.loads(folder.info.read_text("utf-8")).get("processes")
        if recipe.data.order == "shards" and begun_by != accelerator.num_processes:
            tell(
                "message",
                message=f"warning: the run was begun by {begun_by} processes and goes on with "
                f"{accelerator.num_processes}, which share the shards in another way: in the epoch "
                f"at hand images may come twice or not at all",
            )
    elif accelerator.is_main_process:
        machine = describe_machine(accelerator.device)
        machine |= {
            "seed": settings.seed,
            "data": str(train_set.source),
            "format": train_set.format,
        }
        machine |= {"data_digest": data_digest, "split_origin": train_set.split_origin}
        machine |= {"images": {name: len(one) for name, one in splits.items()}}
        machine |= {"steps": steps, "processes": accelerator.num_processes}
        machine |= subject.info
        folder.begin(recipe, machine)
    if settings.trackers:
        accelerator.init_trackers("retinanet")

    workers = recipe.data.workers
    workers = default_workers() if workers == "auto" else workers

    # --- model --------------------------------------------------------------------------------
    set_seed(settings.seed)
    precision: str = settings.precision
    if precision == "auto":
        fast = choose_dtype("auto", accelerator.device) == torch.bfloat16
        precision = "bf16" if fast else "float32"
    # Resumed from what the run itself keeps: the backbone's weights may be gone or out of reach.
    model = subject.build() if stored is None else subject.restore(folder.last)
    model.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    averaged = AveragedModel(model, use_buffers=True) if settings.ema else None
    lr = scaled_lr(settings.lr, settings.batch_size, settings.reference_batch)
    optimizer = build_optimizer(
        model,
        optimizer=settings.optimizer,
        lr=lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        backbone_lr_factor=settings.backbone_lr_factor,
    )
    scaler = torch.amp.GradScaler(accelerator.device.type, enabled=precision == "fp16")
    running = torch.tensor(RUNNING_START, dtype=torch.float32, device=accelerator.device)

    # --- where to begin -----------------------------------------------------------------------
    progress = Progress(steps=steps, left_out=len(left_out))
    if stored is not None:
        progress, extras, numbers = load_state(folder.last, model, optimizer)
        running = extras["running"].to(accelerator.device)
        if averaged is not None:
            averaged.load_state_dict(_part(extras, "averaged."))
        scaler.load_state_dict(numbers["scaler"])
        if accelerator.is_main_process:
            folder.cut_log(progress.step)
    network = accelerator.prepare_model(model) if accelerator.num_processes > 1 else model

    def judged() -> nn.Module:
        return model if averaged is None else averaged.module

    def keep() -> None:
        """Put the state of this moment into last/, whole or not at all."""
        if not accelerator.is_main_process:
            return
        extras = {"running": running}
        if averaged is not None:
            extras |= {f"averaged.{name}": one for name, one in averaged.state_dict().items()}

        def fill(draft: Path) -> None:
            subject.write(draft, judged(), progress.step)
            save_state(draft, progress, model, optimizer, extras, {"scaler": scaler.state_dict()})

        replace_folder(folder.last, fill)

    def validate() -> None:
        """Loss and AP on the val split; keeps the best, and counts what is no better."""
        if val_set is None:
            return
        if accelerator.is_main_process:
            metrics = subject.evaluate(
                judged(),
                val_set,
                batch_size=max(1, settings.batch_size // accelerator.num_processes),
                workers=workers,
                precision=precision,
                progress=lambda done, total: tell("validating", done=done, total=total),
            )
            figures = {"ap": metrics.ap, "ap50": metrics.ap50, "loss": metrics.loss}
            # NaN (there is no object to find) is null in JSON.
            progress.metrics = {k: None if v != v else v for k, v in figures.items()}
            # NaN (no object to find) is never better; a run without one better keeps last/ alone.
            better = metrics.ap > progress.best_ap
            progress.bad_validations = 0 if better else progress.bad_validations + 1
            # While nothing is found yet AP says nothing, and the loss chooses where there is one;
            # without one the first of equals stays.
            before = progress.best_metrics.get("loss")
            lower = metrics.loss is not None and (before is None or metrics.loss < before)
            if better or (metrics.ap == progress.best_ap and lower):
                progress.best_ap, progress.best_step = metrics.ap, progress.step
                progress.best_metrics = progress.metrics
                write_atomic(folder.metrics, json.dumps(metrics.to_dict(), indent=1) + "\n")
                replace_folder(
                    folder.best, lambda draft: subject.write(draft, judged(), progress.step)
                )
            progress.stopped_early = 0 < settings.early_stop <= progress.bad_validations
            folder.append({"step": progress.step, "validation": progress.metrics})
            tell("validation", step=progress.step, **progress.metrics)
        accelerator.wait_for_everyone()
        progress.stopped_early = bool(from_main(accelerator, float(progress.stopped_early)))
        network.train()

    def check(done: _Step) -> None:
        """Wait for the numbers of a step, and end the run if they are not finite."""
        figures, stopped = done.figures.read()
        if stopped:
            progress.step = done.number  # no later one has moved anything
            subject.report_nonfinite(
                folder.path,
                model,
                step=done.number,
                batch=done.batch,
                running=done.running,
                numbers={"lr": done.lr, "precision": precision, **figures.as_dict()},
                write=accelerator.is_main_process,
            )

    def log(done: _Step) -> None:
        """Say what a step was like."""
        if not accelerator.is_main_process:
            return
        figures, _ = done.figures.read()
        line = {"step": done.number + 1, **figures.as_dict(), "lr": done.lr, **done.speed}
        folder.append(line)
        tell("step", steps=steps, **line)
        if settings.trackers:
            accelerator.log({k: v for k, v in line.items() if k != "step"}, done.number + 1)

    def land_all() -> None:
        """Wait for every step that was begun."""
        while in_flight:
            check(in_flight[0])
            log(in_flight.popleft())

    # --- the loop -----------------------------------------------------------------------------
    loader = train_loader(
        train_set,
        batch_size=batch_size,
        steps=steps,
        start_step=progress.step,
        seed=settings.seed,
        image_size=recipe.data.image_size,
        max_size=recipe.data.max_size,
        multi_scale=recipe.data.multi_scale,
        horizontal_flip=recipe.data.horizontal_flip,
        vertical_flip=recipe.data.vertical_flip,
        scale_jitter=recipe.data.scale_jitter,
        crop=recipe.data.crop,
        colour=recipe.data.colour,
        any_corner=recipe.data.any_corner,
        order=recipe.data.order,
        shard_window=recipe.data.shard_window,
        workers=workers,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        fill=padding_colour(cast(Tensor, model.pixel_mean)),
    )
    tell(
        "resume" if stored is not None else "start",
        step=progress.step,
        steps=steps,
        images=len(train_set),
        classes=len(train_set.classes),
        lr=lr,
        batch_size=settings.batch_size,
        device=str(accelerator.device),
        precision=precision,
        split_origin=train_set.split_origin,
    )
    validate_every = _every(settings.validate_every, steps)
    meter = Meter(settings.batch_size, accelerator.device)
    interrupted = False
    guard = Guard(accelerator.device, scaled=scaler.is_enabled())
    ahead = _steps_ahead(accelerator.device)
    in_flight: deque[_Step] = deque()
    network.train()
    if stored is None:
        keep()  # from here on a kill at any instant can be resumed
    with deterministic(settings.deterministic), stop_after_step(accelerator) as stop:
        batches = iter(loader)
        while not progress.finished and not interrupted:
            meter.begin()
            loaded = next(batches)
            batch = loaded.to(accelerator.device, non_blocking=True)
            meter.got_data()

            factor = lr_factor(
                progress.step,
                steps,
                schedule=settings.schedule,
                milestones=settings.milestones,
                warmup_steps=settings.warmup_steps,
            )
            set_lr(optimizer, lr * factor)

            running_before = running
            losses, running = subject.backward(
                network,
                model,
                batch,
                step=progress.step,
                precision=precision,
                scaler=scaler,
                running=running,
            )
            scaler.unscale_(optimizer)
            grad_norm = clip(model, settings.clip_norm)
            refused = guard.refuses(losses, grad_norm)
            step_unless(refused, optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            if averaged is not None:
                update_average(averaged, model, settings.ema, refused)
            figures = FiguresInFlight(losses, grad_norm, guard.stopped)
            this = _Step(progress.step, lr * factor, loaded, running_before, figures)
            in_flight.append(this)
            progress.step += 1

            landed = in_flight.popleft() if len(in_flight) > ahead else None
            if landed is not None:
                check(landed)
            this.speed = meter.end(steps - progress.step)
            progress.seconds += this.speed["seconds"]
            if landed is not None:
                log(landed)

            if progress.step % validate_every == 0 or progress.step == steps:
                land_all()
                began = time.perf_counter()
                validate()
                progress.seconds += time.perf_counter() - began
                if settings.trackers and progress.metrics:
                    accelerator.log(
                        {f"val_{k}": v for k, v in progress.metrics.items()}, progress.step
                    )
            interrupted = stop.is_set()
            if progress.step % settings.save_every == 0 or progress.finished or interrupted:
                land_all()
                keep()
    accelerator.wait_for_everyone()
    if settings.trackers:
        accelerator.end_training()
    tell("end", step=progress.step, best_ap=progress.best_ap, best_step=progress.best_step,
         seconds=progress.seconds, interrupted=interrupted, **progress.metrics)  # fmt: skip
    return _result(folder, progress, stop.exit_code if interrupted else 0)


def _teller(accelerator: Accelerator, on_event: Listener | None) -> Any:
    def tell(kind: Any, **data: Any) -> None:
        if on_event is not None and accelerator.is_main_process:
            on_event(Event(kind, data))

    return tell


def _read(data: str | Path, recipe: Recipe) -> dict[str, Dataset]:
    return read_splits(
        data, seed=recipe.split_seed, val_fraction=recipe.data.val_fraction, extras=False
    )


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _steps_ahead(device: torch.device) -> int:
    """How many further steps a device is given before the host reads what came of one.

    With one a GPU never waits for the host, and the host hardly for the GPU.
    """
    return 1 if device.type == "cuda" else 0


def _every(setting: float, steps: int) -> int:
    """A period in steps, from a number of them or, under 1, a share of all."""
    return max(1, round(setting * steps if setting < 1 else setting))


def _result(folder: RunFolder, progress: Progress, exit_code: int = 0) -> Run:
    return Run(
        folder=folder.path,
        model=folder.best if folder.best.is_dir() else folder.last,
        metrics=progress.best_metrics,
        best_ap=progress.best_ap,
        step=progress.step,
        interrupted=exit_code != 0,
        exit_code=exit_code,
    )
