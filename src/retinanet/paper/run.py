"""The trainings of a plan, side by side, until each has a result.

What is finished is never done again, whoever finished it: several calls, on several machines, may
share one folder.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from retinanet.data.loading import usable_cpus
from retinanet.errors import RetinaNetError
from retinanet.paper.plan import Plan, Training
from retinanet.paper.share import find_holder
from retinanet.paper.work import TAKEN, Result, describe_task, read_result, start_worker

_LOOK_EVERY = 0.5  # seconds
_LOOK_ELSEWHERE_EVERY = 5.0  # seconds: at what others do, in a folder that may be far away
_TRIES = 2  # of a worker that was killed; one that says why it failed is not asked again
# What tells a process that it is one of several, which this one may be and a worker is not.
_OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True, slots=True)
class Happening:
    """What :func:`run_plan` tells its listener.

    Attributes:
        kind: ``begun``, ``done``, ``failed``, ``elsewhere`` (another process has finished it),
            ``waiting`` (another process is at work on it), or ``step``: how far all trainings
            together have come.
        training: which one; None for ``step``.
        result: for ``done`` and ``elsewhere``.
        note: why it failed; for ``waiting`` who is at work on it.
        steps, of: for ``step``: steps done by all, of how many.
    """

    kind: Literal["begun", "done", "failed", "elsewhere", "waiting", "step"]
    training: Training | None = None
    result: Result | None = None
    note: str = ""
    steps: int = 0
    of: int = 0


Listener = Callable[[Happening], None]


@dataclass(frozen=True, slots=True)
class Workplace:
    """What trainings run on.

    Attributes:
        data: the labelled folder or file.
        out: where everything goes.
        jobs: trainings side by side.
        device: ``auto``, ``cpu`` or ``cuda``.
        gpus: GPUs of this machine that may be used, shared out over the jobs.
    """

    data: Path
    out: Path
    jobs: int
    device: str = "auto"
    gpus: int = 0

    @property
    def threads(self) -> int:
        """Processor threads of a job; ``OMP_NUM_THREADS`` is the most."""
        given = os.environ.get("OMP_NUM_THREADS", "")
        share = max(1, usable_cpus() // self.jobs)
        return min(share, int(given)) if given.isdecimal() and int(given) else share

    def gpus_of(self, job: int) -> Sequence[int]:
        """The GPUs of one of the jobs; with more jobs than GPUs, a job has a share of one."""
        if not self.gpus:
            return ()
        share = self.gpus // self.jobs
        return range(job * share, (job + 1) * share) if share else (job % self.gpus,)

    def fitted(self, trainings: Iterable[Training]) -> Workplace:
        """With no more jobs than there are trainings left; a job's threads are then more."""
        left = sum(not self.is_finished(one) for one in trainings)
        jobs = max(1, min(self.jobs, left))
        # A job keeps its GPUs: with more of them it would be another training.
        return replace(self, jobs=jobs, gpus=min(self.gpus, max(1, self.gpus // self.jobs) * jobs))

    def is_finished(self, training: Training) -> bool:
        """Whether a training has a result here, one that can be read."""
        return isinstance(_result_or_why(training.folder(self.out)), Result)

    def finished(self, trainings: Iterable[Training]) -> dict[tuple[str, int], Result | str]:
        """The results that are here, or why one cannot be read, by (name, seed) of the training."""
        return {
            (one.name, one.seed): result
            for one in trainings
            if (result := _result_or_why(one.folder(self.out))) is not None
        }


def find_workplace(
    data: Path, out: Path, *, jobs: int | None, device: str, full: bool
) -> Workplace:
    """The workplace that this machine offers.

    Without a word on `jobs`: in small a job a GPU, or one for two cores; at full size one job with
    all GPUs.
    """
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if jobs is None:
        jobs = 1 if full else gpus or max(1, usable_cpus() // 2)
    return Workplace(data, out, jobs, device, gpus)


def run_plan(
    plan: Plan, place: Workplace, on_event: Listener | None = None
) -> dict[tuple[str, int], Result | str]:
    """Finish every training of a plan.

    Returns:
        by (name, seed) of the training its result, or, where it failed, why.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once every worker has kept its state.
    """
    trainings = plan.trainings
    return _Shop(trainings, place.fitted(trainings), on_event or (lambda _: None)).run()


@dataclass(frozen=True, slots=True)
class _Worker:
    """A process at work.

    Attributes:
        process: itself.
        training: what it does.
        log_from: bytes of its log that earlier tries have written.
    """

    process: subprocess.Popen[bytes]
    training: Training
    log_from: int


class _Shop:
    """Workers, one a job."""

    def __init__(self, trainings: Sequence[Training], place: Workplace, tell: Listener) -> None:
        self._place = place
        self._tell = tell
        self._all = trainings
        self._waiting = list(trainings)
        self._done: dict[tuple[str, int], Result | str] = {}
        self._tries: Counter[tuple[str, int]] = Counter()
        self._running: dict[int, _Worker] = {}
        self._look_at: dict[tuple[str, int], float] = {}  # not before: rows that others hold
        self._holders: dict[tuple[str, int], str] = {}  # that were told
        self._stop = threading.Event()

    def run(self) -> dict[tuple[str, int], Result | str]:
        looked = -math.inf
        with _stoppable(self._stop):
            try:
                while self._waiting or self._running:
                    self._reap()
                    if self._stop.is_set():
                        break
                    if time.monotonic() - looked >= _LOOK_ELSEWHERE_EVERY:
                        looked = time.monotonic()
                        self._drop_finished()
                    self._start()
                    self._tell(self._progress())
                    if self._waiting or self._running:
                        self._stop.wait(_LOOK_EVERY)
            finally:
                self._end()
        if self._stop.is_set():
            raise KeyboardInterrupt
        self._take_over()
        self._tell(self._progress())
        return self._done

    def _start(self) -> None:
        free = [job for job in range(self._place.jobs) if job not in self._running]
        for training in list(self._waiting):
            if not free:
                return
            key = (training.name, training.seed)
            if time.monotonic() < self._look_at.get(key, 0.0) or self._is_held(training):
                continue
            self._waiting.remove(training)
            if self._is_finished(training):
                continue
            log = _log_of(training.folder(self._place.out))
            try:
                log_from = log.stat().st_size if log.is_file() else 0
                worker = _Worker(self._launch(training, free[0]), training, log_from)
            except OSError as error:
                self._fail(training, f"it cannot be started: {error}")
                continue
            self._running[free.pop(0)] = worker
            self._tell(Happening("begun", training))

    def _is_held(self, training: Training) -> bool:
        """Whether another process is at work on a training, which is told once."""
        key = (training.name, training.seed)
        holder = find_holder(training.folder(self._place.out))
        if holder is None:
            return False
        self._look_at[key] = time.monotonic() + _LOOK_ELSEWHERE_EVERY
        if self._holders.get(key) != str(holder):
            self._holders[key] = str(holder)
            self._tell(Happening("waiting", training, note=str(holder)))
        return True

    def _is_finished(self, training: Training) -> bool:
        """Whether a training that waits needs nothing more: another process has finished it."""
        result = _result_or_why(training.folder(self._place.out))
        if isinstance(result, str):
            self._fail(training, result)
        elif result is not None:
            self._done[training.name, training.seed] = result
            self._tell(Happening("elsewhere", training, result))
        return result is not None

    def _fail(self, training: Training, why: str) -> None:
        self._done[training.name, training.seed] = why
        self._tell(Happening("failed", training, note=why))

    def _launch(self, training: Training, job: int) -> subprocess.Popen[bytes]:
        place = self._place
        gpus = place.gpus_of(job)
        if training.rival:
            gpus = gpus[:1]  # it is trained in one process
        threads = place.threads
        task = describe_task(
            training,
            place.out,
            place.data,
            device=place.device,
            threads=threads,
            workers=max(0, threads - 1),
            processes=max(1, len(gpus)),
        )
        environment = {name: one for name, one in os.environ.items() if name not in _OF_A_LAUNCHER}
        environment["OMP_NUM_THREADS"] = str(threads)
        # A waiting thread must not spin on a core that another job could use, or another call: on a
        # busy machine a step of four spinning threads takes many times as long.
        environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(one) for one in _visible(gpus))
        log = _log_of(training.folder(place.out))
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            return start_worker(task, environment, output)

    def _reap(self) -> None:
        for job, worker in list(self._running.items()):
            code = worker.process.poll()
            if code is None:
                continue
            del self._running[job]
            _close(worker.process)
            training, folder = worker.training, worker.training.folder(self._place.out)
            key = (training.name, training.seed)
            if code == TAKEN:
                self._waiting.append(training)
                continue
            result = _result_or_why(folder)
            if isinstance(result, Result):
                self._done[key] = result
                self._tell(Happening("done", training, result))
                continue
            if find_holder(folder) is not None:
                self._waiting.append(training)  # another process has taken it up since
                continue
            self._tries[key] += 1
            if _killed_by(code) and self._tries[key] < _TRIES:
                self._waiting.append(training)  # it goes on from its last state
                continue
            self._fail(training, result or _last_words(_log_of(folder), worker.log_from, code))

    def _drop_finished(self) -> None:
        self._waiting = [one for one in self._waiting if not self._is_finished(one)]

    def _take_over(self) -> None:
        """Look again at what failed here: another machine may have finished it since."""
        for training in self._all:
            key = (training.name, training.seed)
            result = _result_or_why(training.folder(self._place.out))
            if isinstance(self._done.get(key), str) and isinstance(result, Result):
                self._done[key] = result
                self._tell(Happening("elsewhere", training, result))

    def _progress(self) -> Happening:
        of = sum(_steps(one) for one in self._all)
        done = 0
        for one in self._all:
            key = (one.name, one.seed)
            done += _steps(one) if key in self._done else 0
        for worker in self._running.values():
            done += _steps_done(worker.training.folder(self._place.out))
        return Happening("step", steps=min(done, of), of=of)

    def _end(self) -> None:
        """Ask every worker to keep its state, and wait until it has."""
        for worker in self._running.values():
            _close(worker.process)
        for worker in self._running.values():
            try:
                worker.process.wait(timeout=600)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                worker.process.kill()
                worker.process.wait()


def _close(process: subprocess.Popen[bytes]) -> None:
    """Close the pipe to a worker, which asks it to stop."""
    if process.stdin is not None:
        with contextlib.suppress(OSError):  # of what it has not read, having ended
            process.stdin.close()


def _steps(training: Training) -> int:
    # Epochs are steps by the data's size, which matters for a bar alone.
    return training.recipe.train.steps


def _steps_done(folder: Path) -> int:
    """The last step in a log, without reading all of it."""
    try:
        with (folder / "log.jsonl").open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 4000))
            found = log.read().rsplit(b'"step": ', 1)
        return int(found[1].split(b",", 1)[0]) if len(found) > 1 else 0
    except (OSError, ValueError):
        return 0


def _result_or_why(folder: Path) -> Result | str | None:
    try:
        return read_result(folder)
    except RetinaNetError as error:
        return str(error)


def _log_of(folder: Path) -> Path:
    """What the workers of a run folder say."""
    return folder.with_name(f"{folder.name}.log")


def _killed_by(code: int) -> str:
    """What killed the process that ended with this code; empty: it ended by itself."""
    number = -code if code < 0 else code - 128  # as shells have it, and workers of several
    if 0 < number < 65:
        return f"signal {number}" + (" (out of memory?)" if number == 9 else "")
    # Windows: a status that says "error", such as 0xC0000005 for memory out of reach.
    return f"status {code:#x}" if code >= 0xC0000000 else ""


def _last_words(log: Path, log_from: int, code: int) -> str:
    """Why a worker says that it failed.

    Args:
        log: what all tries have said.
        log_from: bytes of it that earlier ones have written.
        code: its exit code.
    """
    lines: list[str] = []
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(log_from)
        lines = file.read().decode("utf-8", "replace").splitlines()
    lines = [one for one in lines if one.strip()]
    errors = [one for one in lines[-20:] if "error:" in one.lower()]
    said = (errors or lines[-1:] or [""])[-1].removeprefix("error: ")
    if killed := _killed_by(code):
        said = f"killed by {killed}"
    return f"{said or f'exit code {code}'}; see {log}"


def _visible(gpus: Sequence[int]) -> list[str]:
    """The names of some GPUs, of those that this process itself was given."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else []
    return [names[one] if one < len(names) else str(one) for one in gpus]


@contextmanager
def _stoppable(stop: threading.Event) -> Iterator[None]:
    """Turn Ctrl-C, SIGTERM and the end of the terminal into a request to stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def request(signum: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    # What this system does not have, or the caller wants ignored (nohup), stays as it is.
    ends = [getattr(signal, name) for name in ("SIGHUP", "SIGBREAK") if hasattr(signal, name)]
    ends = [one for one in ends if signal.getsignal(one) is not signal.SIG_IGN]
    signals = (signal.SIGINT, signal.SIGTERM, *ends)
    before = {one: signal.signal(one, request) for one in signals}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
