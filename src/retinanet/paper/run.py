"""Run the trainings of a plan, several at a time, until each has a result.

Results are kept: a training that has ended is never repeated, and one that was stopped is resumed.
Two commands may use one folder: each training is locked while it runs.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from retinanet.data.cpus import usable_cpus
from retinanet.errors import RetinaNetError
from retinanet.paper.plan import Plan, Training
from retinanet.paper.work import EXIT_LOCKED, Result, Task, is_locked, read_result, start_worker

MAX_ATTEMPTS = 2
"""Starts of a worker that is killed; one that fails with an error is not started again."""

_POLL = 0.5  # seconds
_POLL_LOCKED = 3.0  # seconds
_STOP_TIMEOUT = 600.0  # seconds in which a worker saves its state
# Variables of `accelerate launch`, under which this command may run, unlike its workers.
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True, slots=True)
class Event:
    """A progress event of :func:`run_plan`.

    Attributes:
        kind: ``done``; ``skipped``: it was finished before, or by another command; ``failed``;
            ``waiting``: another command is training it; ``step``: progress of all trainings.
        training: None for ``step``.
        result: for ``done`` and ``skipped``.
        note: why it failed.
        steps, total: for ``step``: steps of all trainings.
    """

    kind: Literal["done", "skipped", "failed", "waiting", "step"]
    training: Training | None = None
    result: Result | None = None
    note: str = ""
    steps: int = 0
    total: int = 0


EventCallback = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Workers:
    """The worker processes of this machine.

    Attributes:
        data: labelled folder or file.
        out: output folder.
        jobs: number of trainings that run at a time.
        device: ``auto``, ``cpu`` or ``cuda``.
        gpus: number of GPUs to use, divided among the jobs.
    """

    data: Path
    out: Path
    jobs: int
    device: str = "auto"
    gpus: int = 0

    @classmethod
    def default(
        cls, data: Path, out: Path, *, jobs: int | None, device: str, full: bool
    ) -> Workers:
        """Choose the number of jobs if it is None.

        One per GPU, or one per two cores; with `full` one job with all GPUs.
        """
        gpus = torch.cuda.device_count() if device != "cpu" else 0
        if jobs is None:
            jobs = 1 if full else gpus or max(1, usable_cpus() // 2)
        return cls(data, out, jobs, device, gpus)

    @property
    def threads(self) -> int:
        """CPU threads per job, at most ``OMP_NUM_THREADS``."""
        limit = os.environ.get("OMP_NUM_THREADS", "")
        threads = max(1, usable_cpus() // self.jobs)
        return min(threads, int(limit)) if limit.isdecimal() and int(limit) else threads

    def gpus_of(self, job: int) -> Sequence[int]:
        """Return the GPUs of a job; with more jobs than GPUs, jobs share them."""
        if not self.gpus:
            return ()
        per_job = self.gpus // self.jobs
        return range(job * per_job, (job + 1) * per_job) if per_job else (job % self.gpus,)

    def limited_to(self, trainings: Iterable[Training]) -> Workers:
        """Return workers with no more jobs than unfinished trainings, so with more threads each."""
        left = sum(not self.is_finished(training) for training in trainings)
        jobs = max(1, min(self.jobs, left))
        # A job keeps its number of GPUs: with more it would be another training.
        return replace(self, jobs=jobs, gpus=min(self.gpus, max(1, self.gpus // self.jobs) * jobs))

    def is_finished(self, training: Training) -> bool:
        """Return True if a training has a result that can be read."""
        return isinstance(self.finished([training]).get(training.key), Result)

    def finished(self, trainings: Iterable[Training]) -> dict[tuple[str, int], Result | str]:
        """Return results, or why one cannot be read, by (name, seed); the rest is left out."""
        found: dict[tuple[str, int], Result | str] = {}
        for training in trainings:
            try:
                result = read_result(training.folder(self.out))
            except RetinaNetError as error:
                found[training.key] = str(error)
            else:
                if result is not None:
                    found[training.key] = result
        return found


def run_plan(
    plan: Plan, workers: Workers, on_event: EventCallback | None = None
) -> dict[tuple[str, int], Result | str]:
    """Run every training of a plan that has no result.

    Returns:
        The result of each training, or why it failed, by (name, seed).

    Raises:
        KeyboardInterrupt: after Ctrl-C, SIGTERM or SIGHUP, once every worker has saved its state.
    """
    emit = on_event or (lambda _: None)
    return Scheduler(plan.trainings, workers.limited_to(plan.trainings), emit).run()


class Scheduler:
    """Runs trainings in worker processes, a thread per job."""

    def __init__(
        self, trainings: Sequence[Training], workers: Workers, emit: EventCallback
    ) -> None:
        self._trainings = trainings
        self._workers = workers
        self._emit = emit
        self._results: dict[tuple[str, int], Result | str] = {}
        self._stop = threading.Event()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._jobs: queue.SimpleQueue[int] = queue.SimpleQueue()
        for job in range(workers.jobs):
            self._jobs.put(job)

    def run(self) -> dict[tuple[str, int], Result | str]:
        """Run all trainings; see :func:`run_plan`."""
        with _stop_on_signals(self._stop):
            try:
                with ThreadPoolExecutor(self._workers.jobs) as pool:
                    try:
                        self._collect(pool)
                    except BaseException:
                        self._stop.set()  # or the pool would run all the others
                        raise
            except BaseException:
                # A second Ctrl-C: no time for the workers to save their state.
                for process in tuple(self._running):
                    process.kill()
                raise
        if self._stop.is_set():
            raise KeyboardInterrupt
        return self._results

    def _collect(self, pool: ThreadPoolExecutor) -> None:
        """Emit the events of trainings until all have ended or a stop is requested."""
        waiting: set[tuple[str, int]] = set()
        pending = {pool.submit(self._run_training, training) for training in self._trainings}
        while pending:
            done, pending = wait(pending, _POLL, return_when="FIRST_COMPLETED")
            if self._stop.is_set():
                return
            for event in map(Future.result, done):
                assert event.training is not None
                key = event.training.key
                if event.kind == "waiting":
                    pending.add(pool.submit(self._run_training, event.training))
                else:
                    self._results[key] = event.result or event.note
                if event.kind != "waiting" or key not in waiting:
                    self._emit(event)
                waiting.add(key)
            self._emit(self._progress())

    def _run_training(self, training: Training) -> Event:
        folder = training.folder(self._workers.out)
        reason = "stopped"
        try:
            for attempt in range(MAX_ATTEMPTS):
                result = read_result(folder)
                if result is not None:
                    return Event("done" if attempt else "skipped", training, result)
                if self._stop.is_set():
                    break
                if is_locked(folder):
                    self._stop.wait(_POLL_LOCKED)
                    return Event("waiting", training)
                code, output = self._run_worker(training)
                result = read_result(folder)
                if result is not None:
                    return Event("done", training, result)
                if code == EXIT_LOCKED:
                    return Event("waiting", training)
                reason = _reason(output, code, _log_file(folder))
                if not _signal_of(code):
                    break
        except (RetinaNetError, OSError) as error:
            reason = str(error)
        return Event("failed", training, note=reason)

    def _run_worker(self, training: Training) -> tuple[int, str]:
        """Run a worker process; return its exit code and its output."""
        log = _log_file(training.folder(self._workers.out))
        job = self._jobs.get()
        try:
            with log.open("ab") as output:
                start = output.tell()
                process = start_worker(*self._command(training, job), output)
            self._running.add(process)
            while process.poll() is None and not self._stop.is_set():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL)
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # of what an ended worker has not read
                process.stdin.close()
            try:
                code = process.wait(_STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
            self._running.discard(process)
            return code, log.read_bytes()[start:].decode("utf-8", "replace")
        finally:
            self._jobs.put(job)

    def _command(self, training: Training, job: int) -> tuple[Task, dict[str, str]]:
        """Return the task and the environment of a worker."""
        workers = self._workers
        gpus = workers.gpus_of(job)
        if training.rival:
            gpus = gpus[:1]  # it trains in one process
        task = Task.of(
            training,
            workers.out,
            workers.data,
            device=workers.device,
            threads=workers.threads,
            processes=max(1, len(gpus)),
        )
        environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
        environment["OMP_NUM_THREADS"] = str(workers.threads)
        # Idle threads must not spin on cores that other jobs use: steps would take several times
        # as long.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            names = visible.split(",") if visible else [str(gpu) for gpu in range(workers.gpus)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[gpu] for gpu in gpus)
        return task, environment

    def _progress(self) -> Event:
        done = total = 0
        for training in self._trainings:
            steps = training.recipe.train.steps  # of recipes with epochs an estimate
            total += steps
            finished = training.key in self._results
            folder = training.folder(self._workers.out)
            done += steps if finished else min(steps, _last_step(folder))
        return Event("step", steps=done, total=total)


def _log_file(folder: Path) -> Path:
    """Return the file with the output of a run folder's workers."""
    return folder.with_name(f"{folder.name}.log")


def _last_step(folder: Path) -> int:
    """Return the last step in a training log, from its last lines."""
    try:
        with (folder / "log.jsonl").open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 4000))
            _, found, rest = log.read().rpartition(b'"step": ')
        return int(rest.split(b",", 1)[0]) if found else 0
    except (OSError, ValueError):
        return 0


def _signal_of(code: int) -> str:
    """Name what killed a process that exited with a code; empty: it exited by itself."""
    number = -code if code < 0 else code - 128  # as a shell reports it
    if 0 < number < 65:
        return f"signal {number}" + (" (out of memory?)" if number == 9 else "")
    # Windows: NTSTATUS errors, such as 0xC0000005 for an access violation.
    return f"status {code:#x}" if code >= 0xC0000000 else ""


def _reason(output: str, code: int, log: Path) -> str:
    """Return why a worker failed, from its output and exit code."""
    lines = [line for line in output.splitlines() if line.strip()]
    errors = [line for line in lines[-20:] if "error:" in line.lower()]
    reason = (errors or lines[-1:] or [""])[-1].removeprefix("error: ")
    if killed := _signal_of(code):
        reason = f"killed by {killed}"
    return f"{reason or f'exit code {code}'}; see {log}"


@contextmanager
def _stop_on_signals(stop: threading.Event) -> Iterator[None]:
    """Set an event on Ctrl-C, SIGTERM, or the end of the terminal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def request(signum: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    # SIGHUP and SIGBREAK are not on every system, and nohup ignores the first.
    names = [name for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
    numbers = [getattr(signal, name) for name in names]
    before = {
        number: signal.signal(number, request)
        for number in numbers
        if number == signal.SIGINT or signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
