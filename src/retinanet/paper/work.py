"""One training of a plan, in a process of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from retinanet.config import load_recipe, to_toml
from retinanet.data import read_splits
from retinanet.errors import DataError, NonFiniteLossError
from retinanet.files import write_atomic
from retinanet.paper.plan import Training
from retinanet.paper.share import take
from retinanet.train.events import Listener
from retinanet.train.loop import train

TAKEN = 75
"""Exit code where another process is at work on the same training."""

_RESULT = "result.json"


@dataclass(frozen=True, slots=True)
class Result:
    """What a training came to; only one that ended has any.

    Attributes:
        status: ``done``, or ``diverged``: the loss was not finite, which is a result too.
        steps: done.
        seconds: of training and validation.
        metrics: :meth:`retinanet.evaluate.Metrics.to_dict`; None where it diverged.
        note: why it diverged.
    """

    status: str
    steps: int
    seconds: float
    metrics: Mapping[str, Any] | None
    note: str = ""


def read_result(folder: Path) -> Result | None:
    """The result in a run folder; None: it is not finished.

    Raises:
        DataError: the file is not what a training writes.
    """
    file = folder / _RESULT
    try:
        return Result(**json.loads(file.read_text("utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{file} cannot be read ({error}); delete it, and the row is finished again"
        ) from None


def write_task(
    training: Training, out: Path, data: Path, *, device: str, threads: int, workers: int
) -> Path:
    """The file from which :func:`work` learns what to do; it lies beside the run folder."""
    recipe = training.recipe
    if recipe.data.workers == "auto":
        recipe = recipe.model_copy(
            update={"data": recipe.data.model_copy(update={"workers": workers})}
        )
    folder = training.folder(out)
    task = {
        "folder": str(folder.resolve()),
        "data": str(data.resolve()),
        "rival": training.rival,
        "device": device,
        "threads": threads,
        "recipe": to_toml(recipe),
    }
    text = json.dumps(task, indent=1) + "\n"
    return write_atomic(folder.with_name(f".{folder.name}.task.json"), text)


def work(task_file: Path, on_event: Listener | None = None) -> int:
    """Do a task, or go on with it, and leave its result.

    Several processes of a launcher may do one task together.

    Returns:
        an exit code: 0, TAKEN, or 130 if it was stopped by Ctrl-C and can go on.

    Raises:
        RetinaNetError: the training failed.
    """
    task = json.loads(task_file.read_text("utf-8"))
    folder = Path(task["folder"])
    # Of several processes the first speaks for all: where it ends, the launcher ends the others.
    if int(os.environ.get("RANK", "0")) > 0:
        return _work(task, task_file, folder, None)
    hold = take(folder)
    if hold is None:
        return TAKEN
    with hold:
        if read_result(folder) is not None:
            return 0
        return _work(task, task_file, folder, on_event)


def _work(task: Mapping[str, Any], task_file: Path, folder: Path, on_event: Listener | None) -> int:
    torch.set_num_threads(task["threads"])
    recipe_file = task_file.with_suffix(".toml")
    if int(os.environ.get("RANK", "0")) == 0:
        write_atomic(recipe_file, task["recipe"])
    recipe = load_recipe(recipe_file)
    made = {"seed": recipe.split_seed, "held_out": recipe.data.held_out}
    splits = read_splits(task["data"], extras=False, **made)  # type: ignore[arg-type]
    try:
        if task["rival"]:
            from retinanet.paper.rival_training import train_rival

            run = train_rival(
                task["rival"], recipe, splits, folder, device=task["device"], on_event=on_event
            )
        else:
            run = train(recipe, splits, folder, device=task["device"], on_event=on_event)
    except NonFiniteLossError as error:
        _write(folder, Result("diverged", _steps(folder), _seconds(folder), None, str(error)))
        return 0
    if run.interrupted:
        return 130
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    _write(folder, Result("done", run.step, _seconds(folder), metrics))
    return 0


def _write(folder: Path, result: Result) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        values = {name: getattr(result, name) for name in Result.__slots__}
        write_atomic(folder / _RESULT, json.dumps(values, indent=1) + "\n")


def _steps(folder: Path) -> int:
    """Of the log's last line that tells of a step."""
    return max((line["step"] for line in _log(folder)), default=0)


def _seconds(folder: Path) -> float:
    return sum(line.get("seconds") or 0.0 for line in _log(folder))


def _log(folder: Path) -> list[dict[str, Any]]:
    from retinanet.report.plots import read_log

    file = folder / "log.jsonl"
    return read_log(file) if file.is_file() else []
