"""Progress display of ``train``."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress
from rich.text import Text

from retinanet.cli.console import TERMINATED, count, err, figure, note, out, seconds, table
from retinanet.config import setting_text

if TYPE_CHECKING:
    from retinanet.config import Recipe
    from retinanet.data import Dataset
    from retinanet.training.events import Event
    from retinanet.training.overfit import OverfitResult
    from retinanet.training.settings_from_data import Choice
    from retinanet.training.trainer import Run

_LINE_EVERY = 30.0  # seconds between two lines of progress where there is no screen to redraw


def run_training(
    recipe: Recipe, data: str | Path, folder: Path, *, title: str = "training", **options: Any
) -> Run:
    """Train with a progress bar."""
    from retinanet.training.trainer import train

    with _Display(title) as display:
        run = train(recipe, data, folder, on_event=display.show, **options)
    if run.interrupted:
        by = "SIGTERM" if run.exit_code == TERMINATED else "Ctrl-C"
        note(f"stopped by {by} after step {run.step}; the state is saved in {run.folder}")
        raise typer.Exit(run.exit_code)
    return run


def run_overfit(
    recipe: Recipe, data: Path, folder: Path | None, num_images: int, **options: Any
) -> OverfitResult:
    """Learn a few images with a progress bar; without a folder the run is deleted afterwards."""
    from retinanet.training.overfit import overfit

    with tempfile.TemporaryDirectory() as scratch, _Display("overfitting") as display:
        out = folder or Path(scratch) / "run"
        return overfit(recipe, data, out, num_images=num_images, on_event=display.show, **options)


def command_start() -> float:
    """Return when the command began by :func:`time.monotonic`: this process, or its torchrun."""
    process = psutil.Process()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        process = process.parent() or process
    return time.monotonic() - (time.time() - float(process.create_time()))


def write_report(folder: Path) -> Path | None:
    """Write ``report.html`` and plots; warn where that fails, since the run itself succeeded."""
    from retinanet.report.html import write_report as write

    try:
        return write(folder)
    except Exception as error:
        note(f"warning: no report was written: {type(error).__name__}: {error}", style="yellow")
        return None


class _Display(Progress):
    """A progress bar and a line of metrics on a terminal; elsewhere a line every 30 seconds."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._metrics = ""
        self._last_line = time.monotonic()
        super().__init__(
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            "{task.fields[left]}",
            console=err,
            transient=True,
            disable=not err.is_terminal,
            refresh_per_second=4,
        )
        self._bar = self.add_task(title, total=None, left="")

    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the bar and the metrics."""
        return [*super().get_renderables(), Text(self._metrics)]

    def show(self, event: Event) -> None:
        """Display an event."""
        data = event.data
        match event.kind:
            case "choices":
                show_choices(data["choices"], err)
            case "start" | "resume":
                for line in data["data"]:
                    note(line)
                note(describe_start(event.kind, data))
            case "step":
                self._step(data)
            case "validating":
                self.update(self._bar, description="validating", left="")
                self._metrics = f"image {data['done']} of {data['total']}"
            case "validation":
                note(f"step {data['step']}: {describe_metrics(data)}")
            case "message":
                note(str(data["message"]))

    def _step(self, data: Mapping[str, Any]) -> None:
        step, steps = data["step"], data["steps"]
        left = f"{seconds(data['seconds_left'])} left"
        metrics = (
            f"loss {data['loss']:.3f} (class {data['loss_classification']:.3f}, "
            f"box {data['loss_box']:.3f}), {data['positives']:.1f} positives per image, "
            f"lr {data['lr']:.1e}, {data['images_per_second']:.1f} images/s, "
            f"waiting {100 * data['waiting']:.0f}%, {data['memory_mb']:.0f} MB"
        )
        if err.is_terminal:
            self._metrics = metrics
            self.update(self._bar, description=self._title, completed=step, total=steps, left=left)
        elif time.monotonic() - self._last_line > _LINE_EVERY:
            self._last_line = time.monotonic()
            note(f"step {step}/{steps}: {metrics}, {left}")


def choose_for(config: Recipe, splits: Mapping[str, Dataset]) -> list[Choice]:
    """Choose settings as ``train`` does on this machine; none without a train split."""
    from retinanet.model.precision import choose_device
    from retinanet.training.data import images_to_train
    from retinanet.training.settings_from_data import choose_settings

    if "train" not in splits:
        return []
    return choose_settings(
        config,
        images_to_train(splits["train"], config)[0],
        num_val=len(splits.get("val", ())),
        on_gpu=choose_device().type != "cpu",
    )


def show_choices(choices: Sequence[Mapping[str, Any]], console: Console = out) -> None:
    """Print a table of settings that are chosen from the data."""
    table(
        "Settings chosen from the data; KEY=VALUE overrides each",
        ["setting", "value", "why"],
        [(c["setting"], setting_text(c["value"]), c["reason"]) for c in choices],
        left=3,
        console=console,
    )


def describe_start(kind: str, data: Mapping[str, Any]) -> str:
    """Describe the training in a line."""
    begins = "training" if kind == "start" else f"resuming from step {data['step']}"
    tiles = f"{data['tiles']} tiles of " if data["tiles"] else ""
    return (
        f"{begins} on {tiles}{count(data['images'], 'image')}, {count(data['classes'], 'class')}: "
        f"{count(data['steps'], 'step')} of {count(data['batch_size'], 'image')}, "
        f"learning rate {data['lr']:.2g}, {count(data['processes'], 'process')} on "
        f"{data['device']}, {data['precision']}; "
        f"split: {data['split_origin']}"
    )


def describe_metrics(metrics: Mapping[str, Any]) -> str:
    """Describe AP, AP50 and loss of a validation; missing metrics are a dash."""
    names = {"ap": "AP", "ap50": "AP50"}
    if metrics.get("loss") is not None:  # with tiles there is none
        names["loss"] = "validation loss"
    return ", ".join(f"{name} {figure(metrics.get(key))}" for key, name in names.items())
