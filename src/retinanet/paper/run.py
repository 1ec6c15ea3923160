"""Run the trainings of a plan in worker processes, several at a time, until each has a result.

Results are kept: a training that has ended is never repeated, and one that was stopped is resumed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from retinanet.config import to_toml
from retinanet.data.cpus import usable_cpus
from retinanet.errors import RetinaNetError
from retinanet.interrupts import stop_on_signal
from retinanet.paper.plan import Plan, Training
from retinanet.paper.results import Result
from retinanet.paper.work import read_result
from retinanet.training.run_folder import folder_lock

_POLL = 0.2  # seconds
_STOP_TIMEOUT = 600.0  # seconds in which a worker saves its state

Results = dict[tuple[str, int], Result]
"""Result of each training by (name, seed)."""

OnEnd = Callable[[Training, Result, bool], None]
"""Callback with a training, its result, and whether an earlier command finished it."""

OnSteps = Callable[[int, int], None]
"""Callback with the steps of all trainings that are done, and their total."""


@dataclass(frozen=True, slots=True)
class Workers:
    """The worker processes of this machine.

    Attributes:
        data: labelled folder or file.
        out: output folder.
        jobs: number of trainings that run at a time.
        device: ``auto``, ``cpu`` or ``cuda``.
        gpus: number of GPUs; each job uses one, which other jobs share if there are more jobs.
    """

    data: Path
    out: Path
    jobs: int
    device: str = "auto"
    gpus: int = 0

    @classmethod
    def default(cls, data: Path, out: Path, *, jobs: int | None, device: str) -> Workers:
        """Use one job per GPU, or one per two cores, if `jobs` is None."""
        gpus = torch.cuda.device_count() if device != "cpu" else 0
        return cls(data, out, jobs or gpus or max(1, usable_cpus() // 2), device, gpus)

    @property
    def threads(self) -> int:
        """CPU threads per job, at most ``OMP_NUM_THREADS``."""
        limit = os.environ.get("OMP_NUM_THREADS", "")
        threads = max(1, usable_cpus() // self.jobs)
        return min(threads, int(limit)) if limit.isdecimal() and int(limit) else threads

    def limited_to(self, trainings: Iterable[Training]) -> Workers:
        """Return workers with no more jobs than unfinished trainings, so with more threads each."""
        left = sum(not self.is_finished(training) for training in trainings)
        return replace(self, jobs=max(1, min(self.jobs, left)))

    def is_finished(self, training: Training) -> bool:
        """Return True if a training has a result that can be read."""
        result = self.result(training)
        return result is not None and result.status != "failed"

    def result(self, training: Training) -> Result | None:
        """Return the result of a training that ended; failed: its file cannot be read."""
        try:
            return read_result(training.folder(self.out))
        except RetinaNetError as error:
            return Result("failed", note=str(error))

    def finished(self, trainings: Iterable[Training]) -> Results:
        """Return the results of the trainings that ended."""
        return {t.key: result for t in trainings if (result := self.result(t)) is not None}

    def command(self, training: Training, job: int) -> tuple[list[str], dict[str, str]]:
        """Return the command and the environment of a worker process."""
        recipe = training.recipe
        if recipe.data.workers == "auto":
            data = recipe.data.model_copy(update={"workers": max(0, self.threads - 1)})
            recipe = recipe.model_copy(update={"data": data})
        task = {
            "folder": str(training.folder(self.out).resolve()),
            "data": str(self.data.resolve()),
            "recipe": to_toml(recipe),
            "rival": training.rival,
            "device": self.device,
            "threads": self.threads,
        }
        # Idle threads must not spin on cores that other jobs use.
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
        environment["OMP_NUM_THREADS"] = str(self.threads)
        if self.gpus:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            names = visible.split(",") if visible else [str(gpu) for gpu in range(self.gpus)]
            environment["CUDA_VISIBLE_DEVICES"] = names[job % self.gpus]
        command = [sys.executable, "-m", "retinanet", "paper", "work", json.dumps(task)]
        return command, environment


def run_plan(
    plan: Plan,
    workers: Workers,
    on_end: OnEnd = lambda *_: None,
    on_steps: OnSteps = lambda *_: None,
) -> Results:
    """Run every training of a plan that has no result.

    Raises:
        ConfigError: another command uses the output folder.
        KeyboardInterrupt: after Ctrl-C or SIGTERM, once every worker has saved its state.
    """
    workers = workers.limited_to(plan.trainings)
    results: Results = {}
    left = deque(plan.trainings)
    running: dict[int, _Worker] = {}  # by job

    def end(training: Training, result: Result, was_finished: bool) -> None:
        results[training.key] = result
        on_end(training, result, was_finished)

    workers.out.mkdir(parents=True, exist_ok=True)
    with (
        folder_lock(workers.out, "command"),
        stop_on_signal() as stop,
        _stopping(running),
    ):
        while (left or running) and not stop.is_set():
            for job in range(workers.jobs):
                if job in running and running[job].process.poll() is not None:
                    worker = running.pop(job)
                    worker.process.communicate()  # closes its input
                    failed = Result("failed", note=worker.failure())
                    end(worker.training, workers.result(worker.training) or failed, False)
                while left and job not in running:
                    training = left.popleft()
                    if (result := workers.result(training)) is not None:
                        end(training, result, True)
                    else:
                        running[job] = _Worker(training, workers, job)
            on_steps(*_progress(plan, workers, results))
            if running:
                stop.wait(_POLL)
    if stop.is_set():
        raise KeyboardInterrupt
    return results


class _Worker:
    """A worker process."""

    def __init__(self, training: Training, workers: Workers, job: int) -> None:
        self.training = training
        folder = training.folder(workers.out)
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._log = folder.with_name(f"{folder.name}.log")
        command, environment = workers.command(training, job)
        with self._log.open("ab") as output:
            self._start = output.tell()
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches this process only
            )

    def failure(self) -> str:
        """Return why it failed, if it did."""
        output = self._log.read_bytes()[self._start :].decode("utf-8", "replace")
        lines = [line for line in output.splitlines() if any(map(str.isalnum, line))]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        code = self.process.returncode
        if errors:
            reason = errors[-1]
        elif code < 0:
            memory = " (out of memory?)" if code == -signal.SIGKILL else ""
            reason = f"killed by {signal.Signals(-code).name}{memory}"
        elif code in (130, 143):
            reason = f"stopped by {signal.Signals(code - 128).name}"
        else:
            reason = lines[-1] if lines else f"exit code {code}"
        return f"{reason}; see {self._log}"


@contextlib.contextmanager
def _stopping(running: dict[int, _Worker]) -> Iterator[None]:
    """Stop the workers that still run at the end: closing their input lets them save their state.

    A second Ctrl-C kills them.
    """
    try:
        yield
    finally:
        processes = [worker.process for worker in running.values()]
        try:
            for process in processes:
                if process.stdin is not None:
                    process.stdin.close()
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_STOP_TIMEOUT)
        finally:
            for process in processes:
                process.kill()
                process.wait()


def _progress(plan: Plan, workers: Workers, results: Results) -> tuple[int, int]:
    """Return the steps of all trainings that are done, and their total."""
    done = total = 0
    for training in plan.trainings:
        steps = training.recipe.train.steps  # of recipes with epochs an estimate
        total += steps
        is_ended = training.key in results
        done += steps if is_ended else min(steps, _last_step(training.folder(workers.out)))
    return done, total


def _last_step(folder: Path) -> int:
    """Return the last step in a training log, from its last lines."""
    try:
        with (folder / "log.jsonl").open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 4000))
            _, found, rest = log.read().rpartition(b'"step": ')
        return int(rest.split(b",", 1)[0]) if found else 0
    except (OSError, ValueError):
        return 0
