"""The training loop (Sec. 4.1): steps, validations, saved states."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from retinanet.data import archives
from retinanet.data.balance import epoch_size
from retinanet.data.dataset import Dataset
from retinanet.data.images import padding_colour
from retinanet.data.loading import BatchLoader, train_loader
from retinanet.errors import ConfigError, DataError, NonFiniteLossError
from retinanet.evaluation.metrics import Metrics
from retinanet.files import replace_folder, write_atomic
from retinanet.interrupts import StopRequest, stop_on_signal
from retinanet.losses.detection import RUNNING_START
from retinanet.structures import Batch
from retinanet.training.data import images_to_validate
from retinanet.training.events import Event, EventCallback, Kind
from retinanet.training.nonfinite import describe_step
from retinanet.training.optim import build_optimizer, resolve_steps, scaled_lr, short_warmup
from retinanet.training.processes import deterministic, synchronize_batch_norm
from retinanet.training.run_folder import RunFolder, load_state, save_state
from retinanet.training.step import (
    Meter,
    NonFiniteGuard,
    PendingStep,
    Progress,
    StepContext,
    clip_gradients,
    lr_factor,
    optimizer_step,
    set_lr,
    update_ema,
)
from retinanet.training.task import TrainingTask
from retinanet.training.time_limit import (
    MIN_STEPS,
    Pacer,
    seconds_afterwards,
    seconds_to_train,
)

MAX_UNMATCHED_STEPS = 50
"""First steps with objects but without a single positive anchor, after which training fails."""

_SLOW_STEPS, _TIMED_STEPS, _TIMED_SECONDS = 2, 8, 10.0  # of measuring the speed
_MAX_GROWTH = 4  # of the steps of a run with a time limit, over the plan


class Emitter:
    """Sends events to a callback, and keeps its request to stop.

    Attributes:
        stop: True once the callback has returned ``"stop"``.
    """

    def __init__(self, callback: EventCallback | None) -> None:
        self._callback = callback
        self.stop = False

    def __call__(self, kind: Kind, /, **data: Any) -> None:
        """Send the event of that kind with these values."""
        answer = None if self._callback is None else self._callback(Event(kind, data))
        if answer is None:
            return
        if not (isinstance(answer, str) and answer == "stop"):
            raise ConfigError(f"on_event returned {answer!r}: return None, or 'stop' to stop")
        self.stop = True


class Trainer:
    """A training run: its fields are all that changes between steps.

    Attributes:
        task: computes losses, metrics and checkpoints.
        val: the images to validate on, without those that cannot be read; None: no validation.
        run: the run folder.
        model: the weights that the optimizer updates.
        network: `model`, or its wrapper for several processes.
        optimizer, scaler, guard: update the weights; scale the loss (fp16); skip bad steps.
        ema: EMA weights of `model`; None: not used.
        progress: steps, best AP, time.
        running: () the running normalizer.
        pending: steps whose metrics are not read yet.
    """

    def __init__(
        self, task: TrainingTask, val: Dataset | None, run: RunFolder, *, resume: bool
    ) -> None:
        """Build the model and its optimizer, and restore the saved state to `resume`."""
        self.task, self.run = task, run
        self.val = None if val is None else images_to_validate(val, task.settings.recipe)
        self._num_split = 0 if val is None else len(val)
        self._settings = settings = task.settings.recipe.train
        self._accelerator, self._emit = task.settings.accelerator, task.settings.emit
        self._is_main = self._accelerator.is_main_process
        self._device = self._accelerator.device
        # A resumed run needs only its own files: the backbone's weights may no longer be there.
        self.model = task.load_model(run.last) if resume else task.build_model()
        self.model.to(self._device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = AveragedModel(self.model, use_buffers=True) if settings.ema else None
        self._lr = scaled_lr(settings)
        self.optimizer = build_optimizer(self.model, settings)
        self._precision = task.settings.precision
        self.scaler = torch.amp.GradScaler(self._device.type, enabled=self._precision == "fp16")
        self.guard = NonFiniteGuard(self._device, scaled=self.scaler.is_enabled())
        self.running = torch.tensor(RUNNING_START, dtype=torch.float32, device=self._device)
        num_images = epoch_size(task.settings.train_set, task.settings.recipe.data)
        self.progress = Progress(steps=resolve_steps(num_images, settings))
        self._resumed = resume
        self._skipped: set[Path] = set()
        if resume:
            self._restore()
        distributed = self._accelerator.num_processes > 1
        if distributed and task.settings.recipe.model.norm == "sync":
            synchronize_batch_norm(self.model, self._device)
        self.network = self._accelerator.prepare_model(self.model) if distributed else self.model
        self.pending: deque[PendingStep] = deque()
        self._ahead = steps_ahead(self._device)
        self._meter = Meter(settings.batch_size, self._device)

    def time_steps(self, seconds_left: float) -> float:
        """Train a few steps, and return the median of their seconds.

        It ends early where `seconds_left` cannot suffice for a training.
        """
        seconds: list[float] = []
        first = self.progress.step
        loader = self._train_loader(range(first, first + _SLOW_STEPS + _TIMED_STEPS))
        self.network.train()
        begun = time.perf_counter()
        for batch in loader:
            self.step(batch)
            self.flush()
            seconds.append(time.perf_counter() - begun)
            # All processes must do as many steps: each waits for the gradients of the others.
            elapsed, fastest = broadcast_object_list([sum(seconds), min(seconds)])
            is_measured = len(seconds) >= _SLOW_STEPS + 2 and elapsed >= _TIMED_SECONDS
            if is_measured or elapsed + MIN_STEPS * fastest > seconds_left:
                break
            begun = time.perf_counter()
        loader.close()
        return median(seconds[_SLOW_STEPS:] or seconds[-1:])

    def extend(self, epochs: float, steps: int) -> None:
        """Begin an extension of the finished run, and record it."""
        self.progress.extend(epochs, steps)
        self._apply_extension()
        self.save()
        if self._is_main:
            self.run.update_info({"extensions": self.progress.extensions})

    def _apply_extension(self) -> None:
        """Let the settings be those of the extension, if there is one."""
        if self.progress.extensions:
            settings = self.task.settings.recipe.train
            warmup = short_warmup(settings, self.progress.extensions[-1]["steps"])
            self._settings = settings.model_copy(update={"warmup_steps": warmup, "time": None})

    def fit(self, started: float, stop_requested: Callable[[], bool] = lambda: False) -> int:
        """Train until the last step, early stopping, a signal or a request.

        Returns:
            0, or 130 after Ctrl-C and 143 after SIGTERM: the state is saved.
        """
        progress, settings = self.progress, self._settings
        self._emit_start()
        self.network.train()
        if not self._resumed:
            warning = self.task.warning()
            if warning is not None:
                self._emit("message", message=warning)
            self.save()  # from here on a run killed at any time can be resumed
        self._loader = loader = self._train_loader(range(progress.step, self._max_steps))
        loader.end.fill_(progress.steps)
        if loader.message is not None:
            self._emit("message", message=loader.message)
        period = settings.validate_every  # in steps or, under 1, a share of all
        validate_every = max(1, round(period * progress.schedule[1] if period < 1 else period))
        pacer = self._pacer(started, validate_every)
        interrupted = False
        # Of several processes each would stop at another step, and the rest would wait for it: a
        # signal ends them at once, and the run resumes from the last saved state.
        is_alone = self._accelerator.num_processes == 1
        stopping = stop_on_signal() if is_alone else nullcontext(StopRequest())
        with deterministic(settings.deterministic), stopping as stop:
            self._meter.start_step()
            for batch in loader:
                self.step(batch)
                if pacer is None:
                    past, steps = progress.schedule
                    due = past % validate_every == 0 or past == steps
                else:
                    self._keep_time(pacer)
                    due = pacer.is_validation_due(progress.step, progress.steps)
                if due:
                    self.flush()
                    self.validate()
                    if pacer is not None:
                        pacer.add_validation(progress.validation_seconds)
                interrupted = stop.is_set() or self._stops(stop_requested())
                ends = progress.finished or interrupted
                if progress.finished:
                    self._tune()
                if progress.step % settings.save_every == 0 or ends:
                    self.flush()
                    self.save()
                if ends:
                    break
                self._meter.start_step()
        self._accelerator.wait_for_everyone()
        if settings.trackers:
            self._accelerator.end_training()
        self._emit_end(interrupted)
        return stop.exit_code if stop.is_set() else 0

    def _stops(self, requested: bool) -> bool:
        if requested and self._accelerator.num_processes > 1:
            raise ConfigError(
                "on_event returned 'stop' in the main process, and the others would wait for it: "
                "end a run of several processes by a signal, or train.early_stop"
            )
        return requested

    def step(self, loaded: Batch) -> None:
        """Do one optimizer step, and log the last one that has finished on the device."""
        settings, progress = self._settings, self.progress
        batch = loaded.to(self._device, non_blocking=True)
        self._meter.batch_loaded()
        past, steps = progress.schedule
        lr = self._lr * lr_factor(past, steps, settings)
        set_lr(self.optimizer, lr)
        # An extension begins with a trained network.
        share = 1.0 if progress.extensions else past / steps
        current = PendingStep(progress.step, lr, loaded, self.running, share)
        context = StepContext(progress.step, self._precision, self.scaler, self.running, share)
        losses, self.running = self.task.training_step(self.network, self.model, batch, context)
        self.scaler.unscale_(self.optimizer)
        grad_norm = clip_gradients(self.model, settings.clip_norm)
        skip = self.guard.check(losses, grad_norm)
        optimizer_step(self.optimizer, skip)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            update_ema(self.ema, self.model, settings.ema, skip)
        current.copy_metrics(losses, grad_norm, self.guard.stopped)
        self.pending.append(current)
        progress.step += 1
        done = self.pending.popleft() if len(self.pending) > self._ahead else None
        if done is not None:
            self._check(done)
        current.speed = self._meter.end_step(progress.steps - progress.step)
        progress.seconds += current.speed["seconds"]
        if done is not None:
            self._log(done)

    def flush(self) -> None:
        """Wait for all pending steps, check and log them."""
        while self.pending:
            self._check(self.pending[0])
            self._log(self.pending.popleft())

    def validate(self) -> None:
        """Compute loss and AP on the val split, keep the best weights, and stop early if due."""
        if self.val is None:
            return
        started = time.perf_counter()
        progress = self.progress
        if self._is_main:
            metrics = self.task.validate(self._eval_model(), self.val, progress.step)
            self._drop_unreadable(metrics.unreadable)
            values = {"ap": metrics.ap, "ap50": metrics.ap50, "loss": metrics.loss}
            # NaN (there is no object in val) is null in JSON, and never better.
            progress.metrics = {k: None if v != v else v for k, v in values.items()}
            progress.metrics["images"] = metrics.images
            self._keep_if_best(metrics)
            _append(self.run.log, {"step": progress.step, "validation": progress.metrics})
            self._emit("validation", step=progress.step, **progress.metrics)
            self._stop_early_if_due(metrics)
        (progress.stopped_early,) = broadcast_object_list([progress.stopped_early])
        self.network.train()
        progress.validation_seconds = time.perf_counter() - started
        progress.seconds += progress.validation_seconds
        if self._settings.trackers and progress.metrics:
            values = {f"val_{key}": v for key, v in progress.metrics.items() if key != "images"}
            self._accelerator.log(values, progress.step)

    def save(self) -> None:
        """Write the state of this moment into ``last/``, whole or not at all."""
        if not self._is_main:
            return
        extras = {"running": self.running}
        if self.ema is not None:
            extras |= {f"averaged.{name}": value for name, value in self.ema.state_dict().items()}

        def fill(draft: Path) -> None:
            self.task.write_checkpoint(draft, self._eval_model(), self.progress.step)
            numbers = {"scaler": self.scaler.state_dict()}
            save_state(draft, self.progress, self.model, self.optimizer, extras, numbers)

        replace_folder(self.run.last, fill)

    @property
    def _max_steps(self) -> int:
        """Steps at most: with a time limit their number may grow."""
        progress = self.progress
        growth = 1 if self._settings.time is None else _MAX_GROWTH
        return progress.first_step + progress.schedule[1] * growth

    def _pacer(self, started: float, period: int) -> Pacer | None:
        limit, progress = self._settings.time, self.progress
        if limit is None:
            return None
        begun = started
        if progress.step:
            begun = time.monotonic() - progress.seconds
        validation = progress.validation_seconds
        num_val = len(self.val) if self.val is not None else 0
        recipe = self.task.settings.recipe
        after = seconds_afterwards(recipe, validation, num_val, self._num_split)
        return Pacer(begun + seconds_to_train(limit) - after, period, validation)

    def _keep_time(self, pacer: Pacer) -> None:
        """Change the number of steps in all to what the time limit allows."""
        progress = self.progress
        if pacer.is_replan_due(progress.step, progress.steps):
            steps = min(pacer.replan(progress.step), self._max_steps)
            (progress.steps,) = broadcast_object_list([steps])
            self._loader.end.fill_(progress.steps)

    def _restore(self) -> None:
        self.progress, extras, numbers = load_state(self.run.last, self.model, self.optimizer)
        self.running = extras.pop("running").to(self._device)
        if self.ema is not None:
            averaged = {name.removeprefix("averaged."): value for name, value in extras.items()}
            self.ema.load_state_dict(averaged)
        self.scaler.load_state_dict(numbers["scaler"])
        self._apply_extension()
        if self._is_main:
            self.run.truncate_log(self.progress.step)

    def _train_loader(self, steps: range) -> BatchLoader:
        settings = self.task.settings
        return train_loader(
            settings.train_set,
            settings.recipe.data,
            batch_size=settings.batch_size,
            steps=steps,
            seed=self._settings.seed,
            workers=settings.workers,
            rank=self._accelerator.process_index,
            world_size=self._accelerator.num_processes,
            fill=padding_colour(cast(Tensor, self.model.pixel_mean)),
            on_unreadable=lambda index, message: self._note_unreadable(
                settings.train_set.images[index].path, message
            ),
        )

    def _eval_model(self) -> nn.Module:
        """Return the EMA weights if enabled, else the model."""
        return self.model if self.ema is None else self.ema.module

    def _keep_if_best(self, metrics: Metrics) -> None:
        progress = self.progress
        better = metrics.ap > progress.best_ap
        progress.bad_validations = 0 if better else progress.bad_validations + 1
        # At equal AP (often 0 at first) the lower loss is better; without a loss the first.
        before = progress.best_metrics.get("loss")
        lower = metrics.loss is not None and (before is None or metrics.loss < before)
        if better or (metrics.ap == progress.best_ap and lower):
            progress.best_ap = progress.untuned_ap = metrics.ap
            progress.best_step = progress.step
            progress.best_metrics = progress.metrics
            write_atomic(self.run.metrics, json.dumps(metrics.to_dict(), indent=1) + "\n")
            replace_folder(
                self.run.best,
                lambda draft: self.task.write_checkpoint(
                    draft, self._eval_model(), progress.step, metrics
                ),
            )

    def _tune(self) -> None:
        """Choose the post-processing of the best weights on the val split (tune_detection)."""
        enabled = self._settings.tune_detection and self._is_main and self.run.best.is_dir()
        has_objects = self.progress.best_ap >= 0  # in val
        if not enabled or not has_objects or self.val is None:
            return
        started = time.perf_counter()
        tuning = self.task.tune(self.run.best, self.val)
        if tuning is not None:
            before = Metrics.from_dict(json.loads(self.run.metrics.read_text("utf-8")))
            losses = ("loss", "loss_classification", "loss_box", "images_per_second")
            kept = {name: getattr(before, name) for name in losses}
            metrics = replace(tuning.after, **kept)
            write_atomic(self.run.metrics, json.dumps(metrics.to_dict(), indent=1) + "\n")
            self.progress.best_ap = metrics.ap
            self.progress.best_metrics |= {"ap": metrics.ap, "ap50": metrics.ap50}
            self._emit("message", message=f"post-processing from val: {tuning.describe()}")
        self.progress.seconds += time.perf_counter() - started

    def _stop_early_if_due(self, metrics: Metrics) -> None:
        progress, settings = self.progress, self._settings
        reason = ""
        if 0 < settings.early_stop <= progress.bad_validations:
            reason = (
                f"AP has not exceeded {progress.best_ap:.3f} (step {progress.best_step}) in "
                f"{progress.bad_validations} validations (train.early_stop={settings.early_stop})"
            )
        elif 0 < settings.target_ap50 <= metrics.ap50:
            reason = f"AP50 is {metrics.ap50:.3f} (train.target_ap50={settings.target_ap50:g})"
        if reason:
            progress.stopped_early = True
            self._emit("message", message=f"stopped early at step {progress.step}: {reason}")

    def _check(self, done: PendingStep) -> None:
        """Read the metrics of a step; raise where they are NaN or Inf, or nothing matches."""
        metrics, stopped = done.read()
        progress = self.progress
        if stopped:
            progress.step = done.step  # no later step has moved anything
            saved = self.task.save_nonfinite(self.run.path, self.model, done)
            rival = self.task.info.get("rival")
            of = f" of {rival}" if rival else ""
            raise NonFiniteLossError(describe_step(done, self.task.settings.train_set, saved, of))
        if metrics["positives"] > 0:
            progress.unmatched_steps = -1
        elif progress.unmatched_steps >= 0 and bool((done.batch.targets.labels >= 0).any()):
            progress.unmatched_steps += 1
            if progress.unmatched_steps >= MAX_UNMATCHED_STEPS:
                advice = self.task.advise_on_unmatched()
                if advice is not None:
                    raise DataError(
                        f"no anchor matched an object in {progress.unmatched_steps} steps, so "
                        f"nothing is learned; {advice}; see retinanet data anchors"
                    )
                progress.unmatched_steps = -1

    def _log(self, done: PendingStep) -> None:
        if not self._is_main:
            return
        metrics, _ = done.read()
        line = {"step": done.step + 1, **metrics, "lr": done.lr, **done.speed}
        _append(self.run.log, line)
        self._emit("step", steps=self.progress.steps, **line)
        if self._settings.trackers:
            values = {name: value for name, value in line.items() if name != "step"}
            self._accelerator.log(values, done.step + 1)

    def _drop_unreadable(self, unreadable: Mapping[str, str]) -> None:
        """Report the unreadable images of the val split, and leave them out from now on."""
        assert self.val is not None
        kept = []
        for image in self.val.images:
            if str(image.path) in unreadable:
                self._note_unreadable(image.path, unreadable[str(image.path)])
            else:
                kept.append(image)
        self.val = replace(self.val, images=tuple(kept))

    def _note_unreadable(self, path: Path, message: str) -> None:
        """Report and record an image that is skipped, once for all of its tiles."""
        if path in self._skipped:
            return
        self._skipped.add(path)
        if str(path) not in self.run.unreadable_sizes():
            try:
                size = archives.file_size(path)
            except (OSError, DataError):
                size = -1
            _append(self.run.unreadable, {"file": str(path), "size": size})
        self._emit("message", message=f"warning: image skipped: {message}")

    def _emit_start(self) -> None:
        train_set = self.task.settings.train_set
        self._emit(
            "resume" if self._resumed else "start",
            step=self.progress.step,
            steps=self.progress.steps,
            images=len({image.path for image in train_set.images}),
            tiles=len(train_set) if any(image.window for image in train_set.images) else 0,
            classes=len(train_set.classes),
            lr=self._lr,
            batch_size=self._settings.batch_size,
            device=str(self._device),
            processes=self._accelerator.num_processes,
            precision=self._precision,
            split_origin=train_set.split_origin,
            data=train_set.description,
        )

    def _emit_end(self, interrupted: bool) -> None:
        progress = self.progress
        skipped = len(self.run.unreadable_sizes())
        if skipped:
            self._emit(
                "message",
                message=f"warning: {skipped} unreadable images were skipped; they are listed in "
                f"{self.run.unreadable}",
            )
        self._emit(
            "end",
            step=progress.step,
            best_ap=progress.best_ap,
            best_step=progress.best_step,
            seconds=progress.seconds,
            interrupted=interrupted,
            **progress.metrics,
        )


def steps_ahead(device: torch.device) -> int:
    """Return the number of steps queued on the device before earlier results are read.

    With one a GPU never waits for the host, and the host hardly for the GPU.
    """
    return 1 if device.type == "cuda" else 0


def _append(file: Path, line: Mapping[str, Any]) -> None:
    """Append a line to a JSONL file; NaN and Inf become null."""
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in line.items()
    }
    try:
        with file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(finite) + "\n")
    except OSError as error:  # a full disk names no file
        raise OSError(error.errno, error.strerror, str(file)) from error
