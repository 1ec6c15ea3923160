"""Run the trainings of a plan in worker processes, several at a time, until each has a result.

Results are kept: a training that has ended is never repeated, and one that was stopped is resumed.
Several commands may use one folder: each training is locked while it runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Literal

import torch
from filelock import FileLock, Timeout

from retinanet.config import to_toml
from retinanet.data.cpus import usable_cpus
from retinanet.errors import RetinaNetError
from retinanet.interrupts import StopRequest, stop_on_signal
from retinanet.paper.plan import Plan, Training
from retinanet.paper.results import Result
from retinanet.paper.work import Task, read_result

MAX_ATTEMPTS = 2
"""Starts of a worker that is killed; one that ends with an error is not started again."""

_POLL = 0.5  # seconds
_STOP_TIMEOUT = 600.0  # seconds in which a worker saves its state

Results = dict[tuple[str, int], Result]
"""Result of each training by (name, seed)."""


@dataclass(frozen=True, slots=True)
class Event:
    """A progress event of :func:`run_plan`.

    Attributes:
        kind: ``ended``; ``skipped``: it was finished before, or by another command; ``waiting``:
            another command is training it; ``step``: progress of all trainings.
        training: None for ``step``.
        result: for ``ended`` and ``skipped``.
        steps, total: for ``step``: steps of all trainings.
    """

    kind: Literal["ended", "skipped", "waiting", "step"]
    training: Training | None = None
    result: Result | None = None
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
        result = self.finished([training]).get(training.key)
        return result is not None and result.status != "failed"

    def finished(self, trainings: Iterable[Training]) -> Results:
        """Return the results of trainings that ended; failed: its file cannot be read."""
        results: Results = {}
        for training in trainings:
            try:
                result = read_result(training.folder(self.out))
            except RetinaNetError as error:
                result = Result("failed", note=str(error))
            if result is not None:
                results[training.key] = result
        return results

    def command(self, training: Training, job: int) -> tuple[list[str], dict[str, str]]:
        """Write the task of a worker process; return its command and environment."""
        gpus = self.gpus_of(job)
        if training.rival:
            gpus = gpus[:1]  # it trains in one process
        recipe = training.recipe
        if recipe.data.workers == "auto":
            data = recipe.data.model_copy(update={"workers": max(0, self.threads - 1)})
            recipe = recipe.model_copy(update={"data": data})
        folder = training.folder(self.out).resolve()
        file = folder.with_name(f"{folder.name}.task.json")
        paths = str(folder), str(self.data.resolve())
        Task(*paths, to_toml(recipe), training.rival, self.device, self.threads).write(file)
        launcher = ["-m"]
        if len(gpus) > 1:
            processes = f"--nproc-per-node={len(gpus)}"
            launcher = ["-m", "torch.distributed.run", "--standalone", processes, "-m"]
        command = [sys.executable, *launcher, "retinanet", "paper", "work", str(file)]
        # Idle threads must not spin on cores that other jobs use.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        environment["OMP_NUM_THREADS"] = str(self.threads)
        if gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            names = visible.split(",") if visible else [str(gpu) for gpu in range(self.gpus)]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(names[gpu] for gpu in gpus)
        return command, environment


def run_plan(plan: Plan, workers: Workers, on_event: EventCallback = lambda _: None) -> Results:
    """Run every training of a plan that has no result.

    Args:
        plan: the trainings.
        workers: the processes.
        on_event: callback for progress events.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once every worker has saved its state.
    """
    workers = workers.limited_to(plan.trainings)
    results: Results = {}
    with stop_on_signal() as stop:
        scheduler = _Scheduler(workers, stop, on_event)
        with ThreadPoolExecutor(workers.jobs) as pool:
            pending = {pool.submit(scheduler.run, training) for training in plan.trainings}
            try:
                while pending and not stop.is_set():
                    ended, pending = wait(pending, _POLL, return_when="FIRST_COMPLETED")
                    for event in (future.result() for future in ended):
                        if event.training and event.result and not stop.is_set():
                            results[event.training.key] = event.result
                            on_event(event)
                    on_event(_progress(plan, workers, results))
                wait(pending)
            except BaseException:  # a second Ctrl-C, or an error of the callback
                stop.set()
                for process in tuple(scheduler.running):
                    process.kill()
                raise
        if stop.is_set():
            raise KeyboardInterrupt
    return results


class _Scheduler:
    """Runs trainings in worker processes, each from a thread.

    Attributes:
        running: the worker processes.
    """

    def __init__(self, workers: Workers, stop: StopRequest, emit: EventCallback) -> None:
        self.running: set[subprocess.Popen[bytes]] = set()
        self._workers, self._stop, self._emit = workers, stop, emit
        self._jobs: SimpleQueue[int] = SimpleQueue()
        for job in range(workers.jobs):
            self._jobs.put(job)

    def run(self, training: Training) -> Event:
        """Run a training, unless another command does, which is waited for."""
        folder = training.folder(self._workers.out)
        lock = FileLock(folder.with_name(f".{folder.name}.lock"))
        is_waiting = False
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            while not self._stop.is_set():
                with contextlib.suppress(Timeout), lock.acquire(timeout=0):
                    return self._run_locked(training, folder)
                if not is_waiting:
                    self._emit(Event("waiting", training))
                is_waiting = True
                self._stop.wait(_POLL)
        except (RetinaNetError, OSError) as error:
            return Event("ended", training, Result("failed", note=str(error)))
        return Event("ended", training, Result("failed", note="stopped"))

    def _run_locked(self, training: Training, folder: Path) -> Event:
        result = read_result(folder)
        if result is not None:
            return Event("skipped", training, result)
        reason = "stopped"
        for _ in range(MAX_ATTEMPTS):
            if self._stop.is_set():
                break
            reason, was_killed = self._run_worker(training, folder)
            result = read_result(folder)
            if result is not None or not was_killed:
                break
        return Event("ended", training, result or Result("failed", note=reason))

    def _run_worker(self, training: Training, folder: Path) -> tuple[str, bool]:
        """Run a worker process; return why it failed, if it did, and whether it was killed."""
        log = folder.with_name(f"{folder.name}.log")
        job = self._jobs.get()
        try:
            command, environment = self._workers.command(training, job)
            with log.open("ab") as output:
                start = output.tell()
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # Ctrl-C reaches this process only
                )
            self.running.add(process)
            code = self._wait(process)
            self.running.discard(process)
            return _reason(log.read_bytes()[start:].decode("utf-8", "replace"), code, log)
        finally:
            self._jobs.put(job)

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for a worker, or stop it by closing its standard input; return its exit code."""
        while process.poll() is None and not self._stop.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL)
        if process.stdin is not None:
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_TIMEOUT)
        process.kill()
        return process.wait()


def _progress(plan: Plan, workers: Workers, results: Results) -> Event:
    done = total = 0
    for training in plan.trainings:
        steps = training.recipe.train.steps  # of recipes with epochs an estimate
        total += steps
        is_ended = training.key in results
        done += steps if is_ended else min(steps, _last_step(training.folder(workers.out)))
    return Event("step", steps=done, total=total)


def _last_step(folder: Path) -> int:
    """Return the last step in a training log, from its last lines."""
    try:
        with (folder / "log.jsonl").open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 4000))
            _, found, rest = log.read().rpartition(b'"step": ')
        return int(rest.split(b",", 1)[0]) if found else 0
    except (OSError, ValueError):
        return 0


def _reason(output: str, code: int, log: Path) -> tuple[str, bool]:
    """Return why a worker failed, and whether it was killed: it printed no error then."""
    lines = [line for line in output.splitlines() if any(map(str.isalnum, line))]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return f"{errors[-1]}; see {log}", False
    if code < 0:
        memory = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{memory}; see {log}", True
    return f"{(lines or [f'exit code {code}'])[-1]}; see {log}", True
