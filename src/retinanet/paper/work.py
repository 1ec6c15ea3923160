"""One training of a plan, in a process of its own."""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from retinanet.config import Recipe, build_recipe, load_recipe, to_toml
from retinanet.data import read_splits, usable
from retinanet.errors import ConfigError, DataError, NonFiniteLossError
from retinanet.files import replace_folder, write_atomic
from retinanet.paper.plan import Training
from retinanet.paper.share import take
from retinanet.training.events import Listener
from retinanet.training.run_folder import RunFolder
from retinanet.training.state import read_progress
from retinanet.training.trainer import train

TAKEN = 75
"""Exit code where another process is at work on the same training."""

STOPPED = 130
"""Exit code where it was asked to stop and has kept its state."""

_RESULT = "result.json"
_LOOK_EVERY = 0.2  # seconds
_NEW_GROUP = 0  # where start_new_session does it
if sys.platform == "win32":
    _NEW_GROUP = subprocess.CREATE_NEW_PROCESS_GROUP


@dataclass(frozen=True, slots=True)
class Result:
    """What a training came to; only one that ended has any.

    Attributes:
        status: ``done``, or ``diverged``: the loss was not finite, which is a result too.
        steps: done.
        seconds: of training and validation.
        metrics: :meth:`retinanet.evaluation.Metrics.to_dict`; None where it diverged.
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


def describe_task(
    training: Training,
    out: Path,
    data: Path,
    *,
    device: str,
    threads: int,
    workers: int,
    processes: int = 1,
) -> str:
    """The line from which :func:`work` learns what to do.

    It is handed over and not left in a file: another machine that shares `out` has the same
    training with other paths, devices and threads.
    """
    recipe = training.recipe
    if recipe.data.workers == "auto":
        recipe = recipe.model_copy(
            update={"data": recipe.data.model_copy(update={"workers": workers})}
        )
    task = {
        "folder": str(training.folder(out).resolve()),
        "data": str(data.resolve()),
        "rival": training.rival,
        "device": device,
        "threads": threads,
        "processes": processes,
        "recipe": to_toml(recipe),
    }
    return json.dumps(task) + "\n"


def work(source: int, on_event: Listener | None = None) -> int:
    """Do a task, or go on with it, and leave its result.

    Args:
        source: descriptor of a pipe: a line of :func:`describe_task`, and then nothing until it is
            closed. That asks to stop and to keep the state, as Ctrl-C does; it is closed too where
            the process that asked for the work is gone, however it ended.
        on_event: as for :func:`retinanet.training.trainer.train`.

    Returns:
        an exit code: 0; TAKEN; STOPPED, and it can go on; or that of one of several processes,
        with 128 added to the number of the signal that killed it.

    Raises:
        RetinaNetError: the training failed.
    """
    task = _read_task(source)
    folder = Path(task["folder"])
    if task.get("of_several"):
        # As with Ctrl-C: each would stop at another step, so they go on from the last state.
        _when_closed(source, lambda: os._exit(STOPPED))
        return _train(task, folder, on_event if _is_first() else None)
    _when_closed(source, _interrupt)
    # Who has lost the place must not write there again, not even a state: at once.
    hold = take(folder, on_lost=lambda: os._exit(TAKEN))
    if hold is None:
        return TAKEN
    with hold:
        if read_result(folder) is not None:
            return 0
        if task["processes"] > 1:
            return _train_together(task)
        return _train(task, folder, on_event)


def _read_task(source: int) -> dict[str, Any]:
    # Not sys.stdin: its lock, held by the thread that waits for the end, would be in the way of
    # Python's own end.
    with open(source, "rb", buffering=0, closefd=False) as pipe:
        line = pipe.readline()
    try:
        task: dict[str, Any] = json.loads(line)
    except ValueError:
        raise ConfigError(
            f"no task on standard input but {line[:40]!r}: retinanet paper run starts this command"
        ) from None
    return task


def _when_closed(source: int, action: Callable[[], object]) -> None:
    """Do something, in another thread, once a pipe is closed at its other end."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(source, 1):
                pass
        action()

    threading.Thread(target=wait, daemon=True).start()


def _interrupt() -> None:
    """What Ctrl-C does, from another thread than the main one."""
    main = threading.main_thread().ident
    if sys.platform == "win32" or main is None:
        _thread.interrupt_main()
    else:
        signal.pthread_kill(main, signal.SIGINT)  # wakes it, should it wait for something


def _train_together(task: Mapping[str, Any]) -> int:
    """Let several processes of this machine do a task; this one holds the place for them."""
    count = task["processes"]
    line = json.dumps({**task, "of_several": True}) + "\n"
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    together |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    running: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(count):
            environment = os.environ | together | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            running.append(start_worker(line, environment))
        while True:
            codes = [one.poll() for one in running]
            if any(codes):
                # Who is killed makes the others fail: their words say less.
                codes = [one.poll() for one in running]
                code = min(one for one in codes if one)
                return 128 - code if code < 0 else code
            if not any(one is None for one in codes):
                return 0
            time.sleep(_LOOK_EVERY)
    finally:
        for one in running:
            one.kill()
            one.wait()
            if one.stdin is not None:
                one.stdin.close()


def start_worker(
    task: str, environment: Mapping[str, str], output: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    """A process that does a task; to close its ``stdin`` is to ask it to stop.

    Args:
        task: of :func:`describe_task`.
        environment: its own.
        output: what it says; None: where this process says it.

    Raises:
        OSError: it cannot be started.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "retinanet", "paper", "work"],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        env=environment,
        # Ctrl-C is not for it: the second one would cost it its state.
        start_new_session=True,
        creationflags=_NEW_GROUP,
    )
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # it has ended already, and its exit code says why
        process.stdin.write(task.encode("utf-8"))
        process.stdin.flush()
    return process


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _train(task: Mapping[str, Any], folder: Path, on_event: Listener | None) -> int:
    torch.set_num_threads(task["threads"])
    recipe = build_recipe(tomllib.loads(task["recipe"]), "the task")
    made = {"seed": recipe.split_seed, "val_fraction": recipe.data.val_fraction}
    splits = read_splits(task["data"], extras=False, **made)  # type: ignore[arg-type]
    splits = {"train": splits["train"], "val": usable(splits["val"])[0]}
    recipe = _as_begun(recipe, folder)
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
        return STOPPED
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    _write(folder, Result("done", run.step, _seconds(folder), metrics))
    if _is_first():
        _shrink(folder)
    return 0


def _as_begun(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the file of weights that its run began with, on whatever machine.

    A run goes on from its own state; that the weights are the same is in the training's name.
    """
    run = RunFolder(folder)
    if read_progress(run.last) is None:
        return recipe
    weights = load_recipe(run.config).model.backbone_weights
    model = recipe.model.model_copy(update={"backbone_weights": weights})
    return recipe.model_copy(update={"model": model})


def _shrink(folder: Path) -> None:
    """Drop what a finished run would be resumed from, several times what it is used from.

    How far it came stays, by which it is known to be finished.
    """
    run = RunFolder(folder)
    numbers = run.last / "training.json"

    def fill(draft: Path) -> None:
        shutil.copy(numbers, draft)

    if run.best.is_dir() and numbers.is_file():
        with contextlib.suppress(OSError):  # what is not dropped costs room and no more
            replace_folder(run.last, fill)


def _is_first() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _write(folder: Path, result: Result) -> None:
    if _is_first():
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
