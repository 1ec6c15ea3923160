"""Scheduling of trainings, with workers that only pretend to train."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock

from retinanet.config import load_recipe
from retinanet.paper import run as running
from retinanet.paper.plan import Plan, Training
from retinanet.paper.results import Result
from retinanet.paper.run import Event, Workers, run_plan
from retinanet.paper.work import Task, read_result

# Looks for its result and counts its starts.
_WORKER = """
import json, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
with (folder / "attempts").open("a") as attempts:
    attempts.write("x")
attempt = len((folder / "attempts").read_text())
name = folder.parent.name
def finish():
    done = {"status": "done", "steps": 5, "metrics": {"ap": 0.5}}
    (folder / "result.json").write_text(json.dumps(done))
"""
_DONE = Result("done", 5, {"ap": 0.5})

MakeWorkers = Callable[..., Workers]


def training(name: str, rival: str = "") -> Training:
    return Training(name, load_recipe("paper_quick", ["train.steps=5"]), rival, 0)


def plan(*names: str) -> Plan:
    return Plan(tuple(training(name) for name in names), {})


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MakeWorkers:
    """Workers that run some lines of Python."""

    def make(lines: str, jobs: int = 2) -> Workers:
        def command(
            self: Workers, training: Training, job: int
        ) -> tuple[list[str], dict[str, str]]:
            arguments = ["-c", _WORKER + lines, str(training.folder(tmp_path))]
            return [sys.executable, *arguments], dict(os.environ)

        monkeypatch.setattr(Workers, "command", command)
        return Workers(tmp_path / "data", tmp_path, jobs, "cpu")

    return make


def attempts(workers: Workers, name: str) -> int:
    file = training(name).folder(workers.out) / "attempts"
    return len(file.read_text("utf-8")) if file.is_file() else 0


def test_run_plan_runs_each_training_once(fake: MakeWorkers) -> None:
    workers = fake("finish()")
    events: list[Event] = []
    results = run_plan(plan("a", "b", "c"), workers, events.append)
    assert results == {(name, 0): _DONE for name in "abc"}
    done = [event.training.name for event in events if event.kind == "ended" and event.training]
    assert sorted(done) == ["a", "b", "c"]
    assert events[-1] == Event("step", steps=15, total=15)
    events.clear()
    again = run_plan(plan("a", "b", "c", "d"), workers, events.append)
    assert again.keys() == results.keys() | {("d", 0)}
    kinds = [event.kind for event in events if event.kind != "step"]
    assert sorted(kinds) == ["ended", "skipped", "skipped", "skipped"]
    assert [attempts(workers, name) for name in "abcd"] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("lines", "reason", "count"),
    [
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL (out of memory?); see ", 2),
        ("os.kill(os.getpid(), 11)", "killed by SIGSEGV; see ", 2),
        ("sys.exit(2)", "exit code 2; see ", 2),
        ("print('error: No space left on device'); sys.exit(1)", "No space left on device; see", 1),
    ],
)
def test_failed_training_fails_alone_and_is_run_by_the_next_command(
    fake: MakeWorkers, lines: str, reason: str, count: int
) -> None:
    # A killed worker is started once more; the third attempt is the next command's.
    workers = fake(f"if name == 'b' or attempt > {count}:\n    finish()\nelse:\n    {lines}")
    events: list[Event] = []
    results = run_plan(plan("a", "b"), workers, events.append)
    assert results["b", 0] == _DONE
    assert results["a", 0].status == "failed"
    assert results["a", 0].note.startswith(reason)
    assert results["a", 0] in [event.result for event in events]
    assert attempts(workers, "a") == count
    assert run_plan(plan("a"), workers)["a", 0] == _DONE


def test_killed_worker_is_restarted_once(fake: MakeWorkers) -> None:
    workers = fake("finish() if attempt > 1 else os.kill(os.getpid(), 9)")
    assert run_plan(plan("a"), workers)["a", 0] == _DONE
    assert attempts(workers, "a") == 2


def test_damaged_result_fails_its_row(fake: MakeWorkers) -> None:
    workers = fake("finish()")
    file = training("a").folder(workers.out) / "result.json"
    file.parent.mkdir(parents=True)
    file.write_text("{", "utf-8")
    assert not workers.is_finished(training("a"))
    results = run_plan(plan("a", "b"), workers)
    assert "result.json cannot be read" in results["a", 0].note
    assert "delete it" in results["a", 0].note
    assert results["b", 0] == _DONE
    assert attempts(workers, "a") == 0
    assert workers.finished(plan("a", "b", "c").trainings) == results


def test_training_of_another_command_is_waited_for(fake: MakeWorkers) -> None:
    workers = fake("finish()")
    folder = training("a").folder(workers.out)
    folder.mkdir(parents=True)
    events: list[Event] = []

    def other_command() -> None:
        while not any(event.kind == "waiting" for event in events):
            time.sleep(0.02)
        result = {"status": "diverged", "steps": 3, "metrics": None, "note": "NaN"}
        (folder / "result.json").write_text(json.dumps(result), "utf-8")
        lock.release()

    lock = FileLock(folder.parent / ".seed-0.lock", thread_local=False)
    lock.acquire()
    other = threading.Thread(target=other_command)
    other.start()
    results = run_plan(plan("a"), workers, events.append)
    other.join()
    assert results["a", 0] == Result("diverged", 3, None, "NaN")
    assert [event.kind for event in events if event.kind != "step"] == ["waiting", "skipped"]
    assert attempts(workers, "a") == 0


def test_two_commands_share_a_folder(fake: MakeWorkers) -> None:
    workers = fake("time.sleep(.05); finish()")
    names = ("a", "b", "c")
    with ThreadPoolExecutor(2) as commands:
        every = [*commands.map(lambda _: run_plan(plan(*names), workers), range(2))]
    assert every == [{(name, 0): _DONE for name in names}] * 2
    assert [attempts(workers, name) for name in names] == [1] * 3


@pytest.fixture
def as_in_a_terminal() -> Iterator[None]:
    """Signals as in a terminal: under nohup some are ignored."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.usefixtures("as_in_a_terminal")
def test_signal_stops_the_workers_and_waits_for_them(fake: MakeWorkers, name: str) -> None:
    workers = fake(
        "(folder / 'ready').touch()\n"
        "sys.stdin.read()\n"
        "time.sleep(.2); (folder / 'saved').touch(); sys.exit(130)"
    )
    number = getattr(signal, name)
    before = signal.getsignal(number)
    folders = [training(name).folder(workers.out) for name in "ab"]

    def interrupt() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if all((folder / "ready").exists() for folder in folders):
                break
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    events: list[Event] = []
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run_plan(plan("a", "b", "c"), workers, events.append)
    assert all((folder / "saved").exists() for folder in folders)
    assert read_result(folders[0]) is None
    assert attempts(workers, "c") == 0
    assert {event.kind for event in events} <= {"step"}
    assert signal.getsignal(number) is before


def test_error_in_the_callback_ends_the_workers(fake: MakeWorkers) -> None:
    workers = fake("finish() if name == 'a' else sys.stdin.read()")

    def fail(event: Event) -> None:
        if event.kind == "ended":
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
        (4, 4, 2, (2, 2)),  # a job keeps its single GPU
        (2, 4, 1, (1, 2)),
        (8, 4, 2, (2, 2)),  # four GPUs shared by eight: each job has one
        (2, 2, 5, (2, 2)),
        (2, 0, 0, (1, 0)),
    ],
)
def test_jobs_are_limited_to_unfinished_trainings(
    jobs: int, gpus: int, left: int, limited: tuple[int, int]
) -> None:
    trainings = [training(f"row{number}") for number in range(left)]
    found = Workers(Path("d"), Path("no"), jobs, "auto", gpus).limited_to(trainings)
    assert (found.jobs, found.gpus) == limited


@pytest.mark.parametrize(
    ("gpus", "visible", "rival", "processes", "shown"),
    [(4, "", "", 4, "0,1,2,3"), (2, "3,5", "", 2, "3,5"), (4, "", "ssd", 1, "0")],
)
def test_several_gpus_per_job_are_several_processes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    visible: str,
    rival: str,
    processes: int,
    shown: str,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    workers = Workers(tmp_path / "data", tmp_path, 1, "cuda", gpus)
    command, environment = workers.command(training("a", rival), 0)
    assert (f"--nproc-per-node={processes}" in command) == (processes > 1)
    assert environment["CUDA_VISIBLE_DEVICES"] == shown
    assert command[-4:-1] == ["retinanet", "paper", "work"]
    task = Task.read(Path(command[-1]))
    assert (task.device, task.rival, task.threads) == ("cuda", rival, workers.threads)
    assert 'backbone = "resnet50"' in task.recipe


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
