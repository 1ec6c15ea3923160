"""The trainings of a plan, side by side, until each has a result.

What is finished is never done again, whoever finished it: several calls, on several machines, may
share one folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from retinanet.data.dataset import Dataset
from retinanet.data.loading import usable_cpus
from retinanet.errors import ConfigError, RetinaNetError
from retinanet.paper.experiments import Experiment
from retinanet.paper.plan import FEWEST_STEPS, Plan, Terms, Training, plan
from retinanet.paper.share import held, write_once
from retinanet.paper.work import TAKEN, Result, read_result, write_task

_LOOK_EVERY = 0.5  # seconds
_TRIES = 2  # of a worker that was killed; one that says why it failed is not asked again
_PROBE_STEPS = 12
_STARTING = 8.0  # seconds that a worker takes to import torch and to read its data, about


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

    def finished(self, planned: Plan) -> dict[tuple[str, int], Result | str]:
        """The results that are here, by (name, seed) of the training."""
        return {
            (one.name, one.seed): result
            for one in planned.trainings
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


def measure_pace(training: Training, place: Workplace) -> tuple[float, float]:
    """(seconds a step, seconds that a training takes beyond its steps), with all jobs at work.

    Raises:
        RetinaNetError: the training cannot begin.
    """
    folder = place.out / ".pace" / f"{socket.gethostname()}-{os.getpid()}"
    settings: dict[str, Any] = {
        "steps": _PROBE_STEPS,
        "epochs": None,
        "warmup_steps": 0,
        "save_every": 10**6,
    }
    settings |= {"validate_every": float(_PROBE_STEPS)}
    recipe = training.recipe
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update=settings)})
    copies = tuple(
        replace(training, recipe=recipe, name=f"pace-{job}") for job in range(place.jobs)
    )
    try:
        done = _Shop(copies, replace(place, out=folder), lambda _: None).run()
        seconds, beyond = 0.0, 0.0
        for copy in copies:
            result = done[copy.name, copy.seed]
            if isinstance(result, str):
                raise RetinaNetError(
                    f"a training of {_PROBE_STEPS} steps was tried first: {result}"
                )
            a_step, rest = _pace(copy.folder(folder), result)
            seconds, beyond = max(seconds, a_step), max(beyond, rest)
        return seconds, beyond
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def steps_for(budget: float, trainings: int, jobs: int, pace: float, beyond: float) -> int:
    """How many steps each training may have, so that all together take `budget` seconds.

    Args:
        pace, beyond: of :func:`measure_pace`.

    Raises:
        ConfigError: too few to say anything; the budget that would do is named.

    Example: 10 trainings, 2 at a time, 20 minutes: 4 minutes each, of which 40 s are not training.

        >>> steps_for(1200, 10, 2, pace=0.5, beyond=40)
        400
    """
    turns = -(-trainings // jobs)
    steps = int((budget / turns - beyond) / pace)
    if steps < FEWEST_STEPS:
        enough = turns * (beyond + FEWEST_STEPS * pace)
        raise ConfigError(
            f"a budget of {budget / 60:.3g} min gives each of {trainings} trainings "
            f"{max(0, steps)} steps, and under {FEWEST_STEPS} nothing can be seen: give at least "
            f"--budget {enough / 60 + 0.5:.0f}min, or fewer --seeds, or smaller pictures"
        )
    return steps


def steps_within(
    budget: float,
    experiments: Sequence[Experiment],
    keys: Collection[str] | None,
    terms: Terms,
    place: Workplace,
    splits: Mapping[str, Dataset],
) -> Terms:
    """`terms` with as many steps as `budget` seconds allow on this machine.

    The first answer for a request is kept in ``steps/`` and holds for all calls that share the
    folder: a call that goes on must find its rows again, and two machines must train the same.

    Args:
        keys: of the rows that are to be trained; None: all.

    Raises:
        ConfigError: the budget is too small.
        RetinaNetError: a training cannot begin.
    """
    names = [one.name for one in experiments]
    # Any number of steps will do to find out how many trainings there are.
    planned = plan(experiments, replace(terms, steps=FEWEST_STEPS), splits)
    planned = planned.only(keys) if keys else planned
    asked = [names, budget, sorted(f"{one.name}/{one.seed}" for one in planned.trainings)]
    request = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
    file = place.out / "steps" / f"{'-'.join(names[:2])}-{request}.json"
    if not file.is_file() and planned.trainings:
        pace, beyond = measure_pace(planned.trainings[0], place)
        steps = steps_for(budget, len(planned.trainings), place.jobs, pace, beyond)
        answer = {"names": names, "budget": budget, "trainings": len(planned.trainings)}
        answer |= {"seconds_a_step": pace, "seconds_beyond": beyond, "jobs": place.jobs}
        write_once(file, json.dumps({**answer, "steps": steps}, indent=1) + "\n")
    steps = json.loads(file.read_text("utf-8"))["steps"] if file.is_file() else FEWEST_STEPS
    return replace(terms, steps=steps)


def _pace(folder: Path, result: Result) -> tuple[float, float]:
    from retinanet.report.plots import read_log

    steps = sorted(line["seconds"] for line in read_log(folder / "log.jsonl") if "seconds" in line)
    # The first steps set things up.
    usual = steps[len(steps) // 2]
    images = result.metrics.get("images", 0) if result.metrics else 0
    speed = result.metrics.get("images_per_second") if result.metrics else None
    return usual, _STARTING + (images / speed if speed else 0.0)


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
