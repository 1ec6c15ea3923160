"""One training of a plan, in a process of its own (``retinanet paper work``)."""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import threading
import tomllib
from dataclasses import asdict
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


def work(
    folder: str,
    data: str,
    recipe: str,
    *,
    rival: str = "",
    device: str = "auto",
    threads: int = 1,
    on_event: EventCallback | None = None,
) -> int:
    """Run or resume a training and write its result.

    Args:
        folder, data: run folder and labelled data.
        recipe: all settings, as TOML.
        rival: name of another detector; empty: RetinaNet.
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: CPU threads.
        on_event: as for :func:`retinanet.training.trainer.train`.

    Returns:
        0, or 130 and 143 after a signal, with the state saved.

    Raises:
        RetinaNetError: the training failed.
    """
    torch.set_num_threads(threads)
    out = Path(folder)
    settings = build_recipe(tomllib.loads(recipe), "the task")
    options: Any = {"device": device, "on_event": on_event}
    try:
        if rival:
            run = train_rival(rival, settings, data, out, **options)
        else:
            run = train(settings, data, out, **options)
    except NonFiniteLossError as error:
        log = out / "log.jsonl"
        steps = max((line["step"] for line in read_log(log)), default=0) if log.is_file() else 0
        result = Result("diverged", steps, None, str(error))
    else:
        if run.interrupted:
            return run.exit_code
        metrics = json.loads((out / "metrics.json").read_text("utf-8"))
        result = Result("done", run.step, metrics)
    write_atomic(out / _RESULT, json.dumps(asdict(result), indent=1) + "\n")
    if result.metrics is not None and (out / "best").is_dir():
        # The state to resume from is large; training.json, which remains, has the last step.
        for tensors in (out / "last").glob("*.safetensors"):
            tensors.unlink(missing_ok=True)
    return 0


def stop_when_input_closes() -> None:
    """Stop this process once its standard input is closed, so also if its parent is killed.

    As after Ctrl-C the state is saved first.
    """

    def wait() -> None:
        with contextlib.suppress(OSError):
            # Not sys.stdin, whose lock this thread would hold when Python exits.
            while os.read(0, 1):
                pass
        _thread.interrupt_main()

    threading.Thread(target=wait, daemon=True).start()
