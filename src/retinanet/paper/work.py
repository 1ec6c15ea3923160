"""One training of a plan, in a process of its own (``retinanet paper work``)."""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import threading
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from retinanet.config import build_recipe
from retinanet.errors import DataError, NonFiniteLossError
from retinanet.files import write_atomic
from retinanet.paper.results import Result
from retinanet.paper.rival_training import train_rival
from retinanet.training.events import EventCallback
from retinanet.training.run_folder import read_log
from retinanet.training.trainer import train

_RESULT = "result.json"
_EXIT_STOPPED = 130


def read_result(folder: Path) -> Result | None:
    """Read the result in a run folder; None: the training has not ended.

    Raises:
        DataError: the file is damaged.
    """
    file = folder / _RESULT
    try:
        return TypeAdapter(Result).validate_json(file.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).partition("For further")[0].split())
        raise DataError(
            f"{file} cannot be read ({reason}); delete it and run the command again"
        ) from None


@dataclass(frozen=True, slots=True)
class Task:
    """A training for a worker process.

    Attributes:
        folder, data: run folder and labelled data.
        recipe: all settings, as TOML.
        rival: name of another detector; empty: RetinaNet.
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: CPU threads.
    """

    folder: str
    data: str
    recipe: str
    rival: str = ""
    device: str = "auto"
    threads: int = 1

    def write(self, file: Path) -> None:
        """Write a file for :meth:`read`."""
        write_atomic(file, json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, file: Path) -> Task:
        """Read the file of :meth:`write`."""
        return cls(**json.loads(file.read_text("utf-8")))


def work(task: Task, on_event: EventCallback | None = None) -> int:
    """Run or resume a training and write its result.

    Returns:
        0, or 130 and 143 after a signal, with the state saved.

    Raises:
        RetinaNetError: the training failed.
    """
    torch.set_num_threads(task.threads)
    folder = Path(task.folder)
    recipe = build_recipe(tomllib.loads(task.recipe), "the task")
    options: Any = {"device": task.device, "on_event": on_event}
    try:
        if task.rival:
            run = train_rival(task.rival, recipe, task.data, folder, **options)
        else:
            run = train(recipe, task.data, folder, **options)
    except NonFiniteLossError as error:
        log = folder / "log.jsonl"
        steps = max((line["step"] for line in read_log(log)), default=0) if log.is_file() else 0
        result = Result("diverged", steps, None, str(error))
    else:
        if run.interrupted:
            return run.exit_code
        metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
        result = Result("done", run.step, metrics)
    if os.environ.get("RANK", "0") == "0":
        write_atomic(folder / _RESULT, json.dumps(asdict(result), indent=1) + "\n")
        if result.metrics is not None and (folder / "best").is_dir():
            # The state to resume from is large; training.json, which remains, has the last step.
            for tensors in (folder / "last").glob("*.safetensors"):
                tensors.unlink(missing_ok=True)
    return 0


def stop_when_input_closes() -> None:
    """Stop this process once its standard input is closed, so also if its parent is killed.

    As after Ctrl-C the state is saved first; one of several processes ends at once.
    """

    def wait() -> None:
        with contextlib.suppress(OSError):
            # Not sys.stdin, whose lock this thread would hold when Python exits.
            while os.read(0, 1):
                pass
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            os._exit(_EXIT_STOPPED)
        _thread.interrupt_main()

    threading.Thread(target=wait, daemon=True).start()
