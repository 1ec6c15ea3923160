"""What training looks like while it runs, for ``train`` and ``demo`` alike."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from retinanet.cli.console import TERMINATED, err, figure, note, seconds

if TYPE_CHECKING:
    from retinanet.config import Recipe
    from retinanet.training.events import Event
    from retinanet.training.trainer import Run

_LINE_EVERY = 30.0  # seconds between two lines of progress where there is no screen to redraw


def run_training(
    recipe: Recipe,
    data: str | Path,
    folder: Path,
    *,
    device: str = "auto",
    init: str | None = None,
    title: str = "training",
) -> Run:
    """Train with a progress bar.

    Raises:
        typer.Exit: Ctrl-C (130) or SIGTERM (143) stopped it; the state is saved.
    """
    from retinanet.training.trainer import train

    with _Display(title) as display:
        run = train(recipe, data, folder, device=device, init=init, on_event=display.show)
    if run.interrupted:
        by = "SIGTERM" if run.exit_code == TERMINATED else "Ctrl-C"
        note(f"stopped by {by} after step {run.step}; the state is saved in {run.folder}")
        raise typer.Exit(run.exit_code)
    return run


def write_report(run: Run) -> Path | None:
    """The run's ``report.html`` and plots; a report that fails costs a line, not the run."""
    from retinanet.report.html import write_report as write

    try:
        return write(run.folder)
    except Exception as error:
        note(f"warning: no report was written: {type(error).__name__}: {error}", style="yellow")
        return None


class _Display:
    """A bar and a line of figures on a terminal; elsewhere a line now and then."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self._task = self._bar.add_task(title, total=None, left="")
        self._figures = Text("")
        self._live = Live(
            Group(self._bar, self._figures), console=err, transient=True, refresh_per_second=4
        )
        self._last_line = time.monotonic()

    def __enter__(self) -> _Display:
        if err.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if err.is_terminal:
            self._live.stop()

    def show(self, event: Event) -> None:
        """Draw what training says of itself."""
        data = event.data
        match event.kind:
            case "start" | "resume":
                note(describe_start(event.kind, data))
            case "step":
                self._step(data)
            case "validating":
                self._bar.update(self._task, description="validating", left="")
                self._figures.plain = f"image {data['done']} of {data['total']}"
            case "validation":
                note(f"step {data['step']}: {describe_figures(data)}")
            case "message":
                note(str(data["message"]))

    def _step(self, data: Mapping[str, Any]) -> None:
        left = f"{seconds(data['seconds_left'])} left"
        figures = describe_step(data)
        if err.is_terminal:
            self._bar.update(
                self._task,
                description=self._title,
                completed=data["step"],
                total=data["steps"],
                left=left,
            )
            self._figures.plain = figures
        elif time.monotonic() - self._last_line > _LINE_EVERY:
            self._last_line = time.monotonic()
            note(f"step {data['step']}/{data['steps']}: {figures}, {left}")


def describe_start(kind: str, data: Mapping[str, Any]) -> str:
    """What is about to be trained, in a line."""
    begins = "training" if kind == "start" else f"going on from step {data['step']}:"
    return (
        f"{begins} on {data['images']} images, {data['classes']} classes: {data['steps']} steps "
        f"of {data['batch_size']} images, learning rate {data['lr']:.2g}, "
        f"{data['device']}, {data['precision']}; split: {data['split_origin']}"
    )


def describe_step(data: Mapping[str, Any]) -> str:
    """One step's figures, in a line."""
    return ", ".join(
        (
            f"loss {data['loss']:.3f} (class {data['loss_classification']:.3f}, "
            f"box {data['loss_box']:.3f})",
            f"{data['positives']:.1f} positives an image",
            f"lr {data['lr']:.1e}",
            f"{data['images_per_second']:.1f} images/s",
            f"waiting {100 * data['waiting']:.0f}%",
            f"{data['memory_mb']:.0f} MB",
        )
    )


def describe_figures(metrics: Mapping[str, Any]) -> str:
    """AP, AP50 and loss of a validation; what the data cannot give is a dash."""
    names = {"ap": "AP", "ap50": "AP50", "loss": "validation loss"}
    return ", ".join(f"{name} {figure(metrics.get(key))}" for key, name in names.items())
