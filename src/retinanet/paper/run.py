"""The trainings of a plan, side by side, until each has a result.

What is finished is never done again, whoever finished it: several calls, on several machines, may
share one folder.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from retinanet.data.loading import usable_cpus
from retinanet.errors import RetinaNetError
from retinanet.paper.plan import Plan, Training
from retinanet.paper.share import held
from retinanet.paper.work import TAKEN, Result, read_result, write_task

_LOOK_EVERY = 0.5  # seconds
_TRIES = 2  # of a worker that was killed; one that says why it failed is not asked again


@dataclass(frozen=True, slots=True)
class Happening:
    """What :func:`run_plan` tells its listener.

    Attributes:
        kind: ``begun``, ``done``, ``failed``, ``elsewhere`` (another process has finished it), or
            ``step``: how far all trainings together have come.
        training: which one; None for ``step``.
        result: for ``done`` and ``elsewhere``.
        note: why it failed.
        steps, of: for ``step``: steps done by all, of how many.
    """

    kind: Literal["begun", "done", "failed", "elsewhere", "step"]
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
        """Processor threads of a job."""
        return max(1, usable_cpus() // self.jobs)

    def gpus_of(self, job: int) -> Sequence[int]:
        """The GPUs of one of the jobs; with more jobs than GPUs, a job has a share of one."""
        if not self.gpus:
            return ()
        share = self.gpus // self.jobs
        return range(job * share, (job + 1) * share) if share else (job % self.gpus,)

    def is_finished(self, training: Training) -> bool:
        """Whether a training has a result here."""
        return read_result(training.folder(self.out)) is not None

    def finished(self, trainings: Iterable[Training]) -> dict[tuple[str, int], Result | str]:
        """The results that are here, by (name, seed) of the training."""
        return {
            (one.name, one.seed): result
            for one in trainings
            if (result := read_result(one.folder(self.out))) is not None
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
    return _Shop(plan.trainings, place, on_event or (lambda _: None)).run()


class _Shop:
    """Workers, one a job."""

    def __init__(self, trainings: Sequence[Training], place: Workplace, tell: Listener) -> None:
        self._place = place
        self._tell = tell
        self._all = trainings
        self._waiting = list(trainings)
        self._done: dict[tuple[str, int], Result | str] = {}
        self._tries: Counter[tuple[str, int]] = Counter()
        self._running: dict[int, tuple[subprocess.Popen[bytes], Training]] = {}
        self._stop = threading.Event()

    def run(self) -> dict[tuple[str, int], Result | str]:
        with _stoppable(self._stop):
            try:
                while self._waiting or self._running:
                    self._reap()
                    if self._stop.is_set():
                        break
                    self._drop_finished()
                    self._start()
                    self._tell(self._progress())
                    if self._waiting or self._running:
                        self._stop.wait(_LOOK_EVERY)
            finally:
                self._end()
        if self._stop.is_set():
            raise KeyboardInterrupt
        self._tell(self._progress())
        return self._done

    def _start(self) -> None:
        free = [job for job in range(self._place.jobs) if job not in self._running]
        for training in list(self._waiting):
            if not free:
                return
            if held(training.folder(self._place.out)):
                continue
            self._waiting.remove(training)
            job = free.pop(0)
            self._running[job] = (self._launch(training, job), training)
            self._tell(Happening("begun", training))

    def _launch(self, training: Training, job: int) -> subprocess.Popen[bytes]:
        place = self._place
        gpus = place.gpus_of(job)
        if training.rival:
            gpus = gpus[:1]  # it is trained in one process
        threads = place.threads
        task = write_task(
            training,
            place.out,
            place.data,
            device=place.device,
            threads=threads,
            workers=max(0, threads - 1),
        )
        command = [sys.executable, "-m", "retinanet"]
        if len(gpus) > 1:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={len(gpus)}", "-m", "retinanet"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        if place.jobs > 1:
            # A waiting thread must not spin on a core that another job could use.
            environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(one) for one in _visible(gpus))
        folder = training.folder(place.out)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f"{folder.name}.log").open("ab") as log:
            return subprocess.Popen(
                [*command, "paper", "work", str(task)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                # Ctrl-C is passed on once: the second one would cost a worker its state.
                start_new_session=True,
            )

    def _reap(self) -> None:
        for job, (process, training) in list(self._running.items()):
            code = process.poll()
            if code is None:
                continue
            del self._running[job]
            key = (training.name, training.seed)
            if code == TAKEN:
                self._waiting.append(training)
                continue
            result = _result_or_why(training.folder(self._place.out))
            if isinstance(result, Result):
                self._done[key] = result
                self._tell(Happening("done", training, result))
                continue
            self._tries[key] += 1
            killed = code < 0 or code in (130, 137, 143)
            if killed and self._tries[key] < _TRIES:
                self._waiting.append(training)  # it goes on from its last state
                continue
            why = result or _last_words(training.folder(self._place.out), code)
            self._done[key] = why
            self._tell(Happening("failed", training, note=why))

    def _drop_finished(self) -> None:
        for training in list(self._waiting):
            result = _result_or_why(training.folder(self._place.out))
            if isinstance(result, Result):
                self._waiting.remove(training)
                self._done[training.name, training.seed] = result
                self._tell(Happening("elsewhere", training, result))

    def _progress(self) -> Happening:
        of = sum(_steps(one) for one in self._all)
        done = 0
        for one in self._all:
            key = (one.name, one.seed)
            done += _steps(one) if key in self._done else 0
        for _, training in self._running.values():
            done += _steps_done(training.folder(self._place.out))
        return Happening("step", steps=min(done, of), of=of)

    def _end(self) -> None:
        """Ask every worker to keep its state, and wait until it has."""
        for process, _ in self._running.values():
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
        for process, _ in self._running.values():
            try:
                process.wait(timeout=600)
            except (subprocess.TimeoutExpired, KeyboardInterrupt):
                process.kill()
                process.wait()


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


def _last_words(folder: Path, code: int) -> str:
    """Why a worker says that it failed."""
    log = folder.with_name(f"{folder.name}.log")
    try:
        lines = [one for one in log.read_text("utf-8", "replace").splitlines() if one.strip()]
    except OSError:
        lines = []
    errors = [one for one in lines[-20:] if "error:" in one.lower()]
    said = (errors or lines[-1:] or [""])[-1].removeprefix("error: ")
    if code < 0:
        said = f"killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
    return f"{said or f'exit code {code}'}; see {log}"


def _visible(gpus: Sequence[int]) -> list[str]:
    """The names of some GPUs, of those that this process itself was given."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else []
    return [names[one] if one < len(names) else str(one) for one in gpus]


@contextmanager
def _stoppable(stop: threading.Event) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into a request to stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def request(signum: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {one: signal.signal(one, request) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
