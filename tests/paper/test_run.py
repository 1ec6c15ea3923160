"""Scheduling of trainings, with workers that only pretend to train."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

import pytest
from filelock import FileLock

from retinanet.config import load_recipe
from retinanet.paper import run as running
from retinanet.paper.plan import Plan, Training
from retinanet.paper.run import Event, Workers, run_plan
from retinanet.paper.work import Result, Task, read_result

# Locks the training and looks for its result, like a real worker.
_WORKER = """
import json, os, signal, sys, time
from filelock import FileLock, Timeout
from pathlib import Path
folder = Path(sys.argv[1])
lock = FileLock(folder.parent / ".seed-0.lock")
try:
    lock.acquire(timeout=0)
except Timeout:
    sys.exit(75)
if (folder / "result.json").exists():
    sys.exit(0)
folder.mkdir(parents=True, exist_ok=True)
with (folder / "attempts").open("a") as attempts:
    attempts.write("x")
attempt = len((folder / "attempts").read_text())
name = folder.parent.name
def finish():
    done = {"status": "done", "steps": 5, "seconds": 1.0, "metrics": {"ap": 0.5}, "note": ""}
    (folder / "result.json").write_text(json.dumps(done))
"""

MakeWorkers = Callable[..., Workers]


def training(name: str, rival: str = "") -> Training:
    return Training(name, load_recipe("quick", ["train.steps=5"]), rival, 0)


def plan(*names: str) -> Plan:
    return Plan(tuple(training(name) for name in names), {})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MakeWorkers:
    """Workers that run some lines of Python."""

    def make(lines: str, jobs: int = 2) -> Workers:
        def start(
            task: Task, environment: Mapping[str, str], output: IO[bytes]
        ) -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                [sys.executable, "-c", _WORKER + lines, task.folder],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

        monkeypatch.setattr(running, "start_worker", start)
        return Workers(tmp_path / "data", tmp_path, jobs, "cpu")

    return make


def attempts(workers: Workers, name: str) -> int:
    file = training(name).folder(workers.out) / "attempts"
    return len(file.read_text("utf-8")) if file.is_file() else 0


def test_run_plan_runs_each_training_once(fake: MakeWorkers) -> None:
    workers = fake("finish()")
    events: list[Event] = []
    results = run_plan(plan("a", "b", "c"), workers, events.append)
    assert {name for name, _ in results} == {"a", "b", "c"}
    assert all(isinstance(one, Result) and one.metrics == {"ap": 0.5} for one in results.values())
    done = [event.training.name for event in events if event.kind == "done" and event.training]
    assert sorted(done) == ["a", "b", "c"]
    assert events[-1] == Event("step", steps=15, total=15)
    events.clear()
    again = run_plan(plan("a", "b", "c", "d"), workers, events.append)
    assert again.keys() == results.keys() | {("d", 0)}
    kinds = [event.kind for event in events if event.kind != "step"]
    assert sorted(kinds) == ["done", "skipped", "skipped", "skipped"]
    assert [attempts(workers, name) for name in "abcd"] == [1, 1, 1, 1]


def test_killed_worker_is_restarted_once(fake: MakeWorkers) -> None:
    workers = fake("finish() if attempt > 1 or name == 'c' else os.kill(os.getpid(), 9)")
    assert isinstance(run_plan(plan("a"), workers)["a", 0], Result)
    assert attempts(workers, "a") == 2


@pytest.mark.parametrize(
    ("lines", "reason", "count"),
    [
        ("os.kill(os.getpid(), 9)", "killed by signal 9 (out of memory?); see ", 2),
        ("os.kill(os.getpid(), 11)", "killed by signal 11; see ", 2),
        ("sys.exit(143)", "killed by signal 15; see ", 2),  # one of several processes: 128 + 15
        ("sys.exit(2)", "exit code 2; see ", 1),
        ("print('error: No space left on device'); sys.exit(1)", "No space left on device; see", 1),
    ],
)
def test_failed_training_fails_alone(
    fake: MakeWorkers, lines: str, reason: str, count: int
) -> None:
    workers = fake(f"if name == 'b':\n    finish()\nelse:\n    {lines}")
    events: list[Event] = []
    results = run_plan(plan("a", "b"), workers, events.append)
    assert isinstance(results["b", 0], Result)
    assert str(results["a", 0]).startswith(reason)
    assert [event.note for event in events if event.kind == "failed"] == [results["a", 0]]
    assert attempts(workers, "a") == count


def test_failed_training_is_run_by_the_next_command(fake: MakeWorkers) -> None:
    workers = fake(
        "print('error: old') if attempt == 1 else 0\nfinish() if attempt > 2 else sys.exit(3)"
    )
    assert str(run_plan(plan("a"), workers)["a", 0]).startswith("old; see ")
    assert str(run_plan(plan("a"), workers)["a", 0]).startswith("exit code 3; see ")
    assert isinstance(run_plan(plan("a"), workers)["a", 0], Result)


def test_damaged_result_fails_its_row(fake: MakeWorkers) -> None:
    workers = fake("finish()")
    file = training("a").folder(workers.out) / "result.json"
    file.parent.mkdir(parents=True)
    file.write_text("{", "utf-8")
    assert not workers.is_finished(training("a"))
    results = run_plan(plan("a", "b"), workers)
    assert "result.json cannot be read" in str(results["a", 0])
    assert "delete it" in str(results["a", 0])
    assert isinstance(results["b", 0], Result)
    assert attempts(workers, "a") == 0
    assert workers.finished(plan("a", "b", "c").trainings) == results


def test_worker_that_cannot_be_started_fails_its_row(
    fake: MakeWorkers, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers = fake("finish()")
    start = running.start_worker

    def full(task: Task, *more: object) -> subprocess.Popen[bytes]:
        if "/a/" in task.folder:
            raise OSError(28, "No space left on device")
        return start(task, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(running, "start_worker", full)
    results = run_plan(plan("a", "b"), workers)
    assert results["a", 0] == "[Errno 28] No space left on device"
    assert isinstance(results["b", 0], Result)


def test_training_of_another_command_is_waited_for(fake: MakeWorkers) -> None:
    workers = fake("finish()")
    folder = training("a").folder(workers.out)
    folder.mkdir(parents=True)
    events: list[Event] = []

    def other_command() -> None:
        while not any(event.kind == "waiting" for event in events):
            time.sleep(0.02)
        result = {"status": "diverged", "steps": 3, "seconds": 1.0, "metrics": None, "note": "NaN"}
        (folder / "result.json").write_text(json.dumps(result), "utf-8")
        lock.release()

    lock = FileLock(folder.parent / ".seed-0.lock", thread_local=False)
    lock.acquire()
    other = threading.Thread(target=other_command)
    other.start()
    results = run_plan(plan("a"), workers, events.append)
    other.join()
    assert results["a", 0] == Result("diverged", 3, 1.0, None, "NaN")
    assert [event.kind for event in events if event.kind != "step"] == ["waiting", "skipped"]
    assert attempts(workers, "a") == 0


def test_two_commands_share_a_folder(fake: MakeWorkers) -> None:
    workers = fake("time.sleep(.05); finish()")
    names = [f"row{number}" for number in range(6)]
    found: list[dict[tuple[str, int], Result | str]] = []
    commands = [
        threading.Thread(target=lambda: found.append(run_plan(plan(*names), workers)))
        for _ in range(2)
    ]
    for command in commands:
        command.start()
    for command in commands:
        command.join()
    assert len(found) == 2
    for results in found:
        assert {name for name, _ in results} == set(names)
        assert all(isinstance(one, Result) for one in results.values())
    assert [attempts(workers, name) for name in names] == [1] * 6


@pytest.fixture
def as_in_a_terminal() -> Iterator[None]:
    """Signals as in a terminal: under nohup some are ignored."""
    usual = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.usefixtures("as_in_a_terminal")
def test_signal_stops_the_workers_and_waits_for_them(fake: MakeWorkers, name: str) -> None:
    workers = fake(
        "(folder / 'ready').touch()\n"
        "sys.stdin.read()\n"
        "time.sleep(.2); (folder / 'saved').touch(); sys.exit(130)"
    )
    number = getattr(signal, name)
    before = signal.getsignal(number)
    folders = [training(one).folder(workers.out) for one in "ab"]

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while not all((one / "ready").exists() for one in folders) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    events: list[Event] = []
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run_plan(plan("a", "b", "c"), workers, events.append)
    assert all((one / "saved").exists() for one in folders)
    assert read_result(folders[0]) is None
    assert attempts(workers, "c") == 0
    assert {event.kind for event in events} <= {"step"}
    assert signal.getsignal(number) is before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sighup_is_ignored_under_nohup(fake: MakeWorkers) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        workers = fake("os.kill(os.getppid(), signal.SIGHUP); time.sleep(.2); finish()")
        assert isinstance(run_plan(plan("a"), workers)["a", 0], Result)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_error_in_the_callback_ends_the_workers(fake: MakeWorkers) -> None:
    workers = fake("finish() if name == 'a' else sys.stdin.read()")

    def fail(event: Event) -> None:
        if event.kind == "done":
            raise RuntimeError("callback")

    with pytest.raises(RuntimeError, match="callback"):
        run_plan(plan("a", "b", "c", "d"), workers, fail)
    assert attempts(workers, "d") == 0  # "c" took the job of "a"


@pytest.mark.parametrize(
    ("gpus", "jobs", "shares"),
    [
        (0, 2, [[], []]),
        (4, 2, [[0, 1], [2, 3]]),
        (1, 3, [[0], [0], [0]]),
        (2, 4, [[0], [1], [0], [1]]),
        (8, 1, [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ],
)
def test_gpus_are_divided_among_jobs(gpus: int, jobs: int, shares: list[list[int]]) -> None:
    workers = Workers(Path("d"), Path("o"), jobs, "cuda", gpus)
    assert [list(workers.gpus_of(job)) for job in range(jobs)] == shares


@pytest.mark.parametrize(
    ("jobs", "gpus", "left", "limited"),
    [
        (4, 0, 2, (2, 0)),
        (4, 4, 2, (2, 2)),  # a job keeps its one GPU
        (2, 4, 1, (1, 2)),
        (8, 4, 2, (2, 2)),  # of four shared by eight, one each
        (2, 2, 5, (2, 2)),
        (2, 0, 0, (1, 0)),
    ],
)
def test_jobs_are_limited_to_unfinished_trainings(
    tmp_path: Path, jobs: int, gpus: int, left: int, limited: tuple[int, int]
) -> None:
    done = training("done").folder(tmp_path)
    done.mkdir(parents=True)
    result = {"status": "done", "steps": 5, "seconds": 1.0, "metrics": {}}
    (done / "result.json").write_text(json.dumps(result), "utf-8")
    trainings = [training("done"), *(training(f"row{number}") for number in range(left))]
    found = Workers(tmp_path, tmp_path, jobs, "auto", gpus).limited_to(trainings)
    assert (found.jobs, found.gpus) == limited


def test_several_gpus_per_job_are_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Task, Mapping[str, str]]] = []

    def start(task: Task, environment: Mapping[str, str], output: IO[bytes]) -> object:
        seen.append((task, environment))
        return subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE)

    monkeypatch.setattr(running, "start_worker", start)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("RANK", "1")  # of a launcher of this process
    for gpus, visible, rival in ((4, "", ""), (2, "3,5", ""), (4, "", "ssd")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        workers = Workers(tmp_path / "data", tmp_path, 1, "cuda", gpus)
        run_plan(Plan((training("a", rival),), {}), workers)
    assert [task.processes for task, _ in seen] == [4, 2, 1]  # a rival has one process
    visible_of = [environment["CUDA_VISIBLE_DEVICES"] for _, environment in seen]
    assert visible_of == ["0,1,2,3", "3,5", "0"]
    assert all("RANK" not in environment for _, environment in seen)
    assert all(environment["OMP_WAIT_POLICY"] == "PASSIVE" for _, environment in seen)
    assert seen[0][0].device == "cuda"
    assert 'backbone = "resnet50"' in seen[0][0].recipe


@pytest.mark.parametrize(
    ("limit", "jobs", "threads"),
    [("", 2, 4), ("3", 2, 3), ("6", 2, 4), ("0", 4, 2), ("4,2", 4, 2), ("", 16, 1)],
)
def test_threads_are_divided_among_jobs(
    monkeypatch: pytest.MonkeyPatch, limit: str, jobs: int, threads: int
) -> None:
    monkeypatch.setattr(running, "usable_cpus", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", limit)
    assert Workers(Path("d"), Path("o"), jobs).threads == threads
