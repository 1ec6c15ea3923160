"""One training of a plan, in a process of its own (``retinanet paper work``)."""

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
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from filelock import FileLock, Timeout
from torch.multiprocessing.spawn import ProcessExitedException, spawn

from retinanet.config import build_recipe, to_toml
from retinanet.data import read_splits, usable
from retinanet.errors import ConfigError, DataError, NonFiniteLossError, RetinaNetError
from retinanet.files import replace_folder, write_atomic
from retinanet.paper.plan import Training
from retinanet.paper.rival_training import train_rival
from retinanet.report.plots import read_log
from retinanet.training.events import EventCallback
from retinanet.training.run_folder import RunFolder
from retinanet.training.trainer import train

EXIT_LOCKED = 75
"""Exit code if another process runs the same training."""

EXIT_STOPPED = 130
"""Exit code after a stop; the training can be resumed."""

_RESULT = "result.json"
_NEW_GROUP = 0
if sys.platform == "win32":
    _NEW_GROUP = subprocess.CREATE_NEW_PROCESS_GROUP


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a training that ended.

    Attributes:
        status: ``done``, or ``diverged``: NaN or Inf loss, which is a result too.
        steps: that were run.
        seconds: of training and validation.
        metrics: :meth:`retinanet.evaluation.Metrics.to_dict`; None if it diverged.
        note: the error of a diverged training.
    """

    status: str
    steps: int
    seconds: float
    metrics: Mapping[str, Any] | None
    note: str = ""


def read_result(folder: Path) -> Result | None:
    """Read the result in a run folder; None: the training has not ended.

    Raises:
        DataError: the file is damaged.
    """
    file = folder / _RESULT
    try:
        return Result(**json.loads(file.read_text("utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{file} cannot be read ({error}); delete it and run the command again"
        ) from None


@dataclass(frozen=True, slots=True)
class Task:
    """What a worker process is to do.

    Attributes:
        folder, data: run folder and labelled data.
        recipe: all settings, as TOML.
        rival: name of another detector; empty: RetinaNet.
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: CPU threads.
        processes: that train together, one per GPU.
    """

    folder: str
    data: str
    recipe: str
    rival: str = ""
    device: str = "auto"
    threads: int = 1
    processes: int = 1

    @classmethod
    def of(
        cls,
        training: Training,
        out: Path,
        data: Path,
        *,
        device: str,
        threads: int,
        processes: int = 1,
    ) -> Task:
        """Describe a training; loading gets the threads but one as processes, if not set."""
        recipe = training.recipe
        if recipe.data.workers == "auto":
            settings = recipe.data.model_copy(update={"workers": max(0, threads - 1)})
            recipe = recipe.model_copy(update={"data": settings})
        folder = str(training.folder(out).resolve())
        toml, rival = to_toml(recipe), training.rival
        return cls(folder, str(data.resolve()), toml, rival, device, threads, processes)


def start_worker(
    task: Task, environment: Mapping[str, str], output: IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    """Start a process that runs a task; closing its ``stdin`` asks it to stop.

    So it also stops if this process is killed.

    Args:
        task: to run.
        environment: of the process.
        output: file for its output; None: that of this process.

    Raises:
        OSError: it cannot be started.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "retinanet", "paper", "work"],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        env=environment,
        # Ctrl-C reaches this process only, which stops its workers itself.
        start_new_session=True,
        creationflags=_NEW_GROUP,
    )
    assert process.stdin is not None
    with contextlib.suppress(OSError):  # it has ended already; its exit code says why
        process.stdin.write(json.dumps(asdict(task)).encode("utf-8") + b"\n")
        process.stdin.flush()
    return process


def is_locked(folder: Path) -> bool:
    """Return True if another process runs the training of a run folder."""
    with contextlib.suppress(Timeout), _lock(folder).acquire(timeout=0):
        return False
    return True


def work(source: int, on_event: EventCallback | None = None) -> int:
    """Run or resume the task that is read from a pipe, and write its result.

    Args:
        source: descriptor of the pipe: a task, then nothing until it is closed, which asks to save
            the state and stop.
        on_event: callback for progress events, which can be pickled.

    Returns:
        An exit code: 0, EXIT_LOCKED, EXIT_STOPPED, or that of a process of several (128 plus the
        signal that killed it).

    Raises:
        RetinaNetError: the training failed.
    """
    task = _read_task(source)
    folder = Path(task.folder)
    try:
        with _lock(folder).acquire(timeout=0):
            if read_result(folder) is not None:
                return 0
            _when_closed(source, _interrupt)
            if task.processes > 1:
                return _train_together(task, on_event)
            return _train(task, on_event)
    except Timeout:
        return EXIT_LOCKED


def _lock(folder: Path) -> FileLock:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(folder.with_name(f".{folder.name}.lock"))


def _read_task(source: int) -> Task:
    # Not sys.stdin: the thread that waits for its end would hold its lock when Python exits.
    with open(source, "rb", buffering=0, closefd=False) as pipe:
        line = pipe.readline()
    try:
        return Task(**json.loads(line))
    except (ValueError, TypeError):
        raise ConfigError(
            f"invalid task on standard input: {line[:40]!r}; use retinanet paper run, which starts "
            "this command"
        ) from None


def _when_closed(source: int, action: Callable[[], object]) -> None:
    """Call a function, from another thread, once a pipe is closed at its other end."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(source, 1):
                pass
        action()

    threading.Thread(target=wait, daemon=True).start()


def _interrupt() -> None:
    """Do what Ctrl-C does, from another thread than the main one."""
    main = threading.main_thread().ident
    if sys.platform == "win32" or main is None:
        _thread.interrupt_main()
    else:
        signal.pthread_kill(main, signal.SIGINT)


def _train_together(task: Task, on_event: EventCallback | None) -> int:
    """Train with several processes; a stop kills them, and their last state is resumed."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    context = spawn(  # type: ignore[no-untyped-call]
        _train_rank, (task, port, on_event), task.processes, join=False
    )
    try:
        while not context.join():
            pass
    except ProcessExitedException as error:
        return 128 - error.exit_code if error.exit_code < 0 else error.exit_code
    except KeyboardInterrupt:
        return EXIT_STOPPED
    finally:
        for process in context.processes:
            process.kill()
            process.join()
    return 0


def _train_rank(rank: int, task: Task, port: int, on_event: EventCallback | None) -> None:
    sizes = {"WORLD_SIZE": task.processes, "LOCAL_WORLD_SIZE": task.processes}
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in (sizes | ranks).items()})
    try:
        _train(task, on_event if rank == 0 else None)
    except RetinaNetError as error:
        sys.exit(f"error: {error}")


def _train(task: Task, on_event: EventCallback | None) -> int:
    torch.set_num_threads(task.threads)
    folder = Path(task.folder)
    recipe = build_recipe(tomllib.loads(task.recipe), "the task")
    splits = read_splits(
        task.data, extras=False, seed=recipe.split_seed, val_fraction=recipe.data.val_fraction
    )
    splits = {"train": splits["train"], "val": usable(splits["val"])[0]}
    try:
        if task.rival:
            run = train_rival(
                task.rival, recipe, splits, folder, device=task.device, on_event=on_event
            )
        else:
            run = train(recipe, splits, folder, device=task.device, on_event=on_event)
    except NonFiniteLossError as error:
        steps = max((line["step"] for line in _log(folder)), default=0)
        _write(folder, Result("diverged", steps, 0.0, None, str(error)))
        return 0
    if run.interrupted:
        return EXIT_STOPPED
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    _write(folder, Result("done", run.step, 0.0, metrics))
    if _is_main_process():
        _drop_state(folder)
    return 0


def _drop_state(folder: Path) -> None:
    """Delete the state that a finished run would be resumed from, which is large.

    ``training.json`` stays: by its step the run is known to be finished.
    """
    run = RunFolder(folder)
    progress = run.last / "training.json"

    def copy(draft: Path) -> None:
        shutil.copy(progress, draft)

    if run.best.is_dir() and progress.is_file():
        with contextlib.suppress(OSError):  # it only takes disk space
            replace_folder(run.last, copy)


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _write(folder: Path, result: Result) -> None:
    if _is_main_process():
        seconds = sum(line.get("seconds") or 0.0 for line in _log(folder))
        values = asdict(replace(result, seconds=seconds))
        write_atomic(folder / _RESULT, json.dumps(values, indent=1) + "\n")


def _log(folder: Path) -> list[dict[str, Any]]:
    file = folder / "log.jsonl"
    return read_log(file) if file.is_file() else []
