"""Scheduling of trainings, with workers that only pretend to train."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from retinanet.config import load_recipe
from retinanet.errors import ConfigError
from retinanet.paper.plan import Plan, Training
from retinanet.paper.results import Result
from retinanet.paper.run import Workers, run_plan
from retinanet.paper.work import read_result

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
    ended: list[tuple[str, bool]] = []
    steps: list[tuple[int, int]] = []

    def on_end(training: Training, result: Result, was_finished: bool) -> None:
        assert result == _DONE
        ended.append((training.name, was_finished))

    results = run_plan(plan("a", "b", "c"), workers, on_end, lambda *s: steps.append(s))
    assert results == {(name, 0): _DONE for name in "abc"}
    assert sorted(ended) == [("a", False), ("b", False), ("c", False)]
    assert steps[-1] == (15, 15)
    ended.clear()
    again = run_plan(plan("a", "b", "c", "d"), workers, on_end)
    assert again.keys() == results.keys() | {("d", 0)}
    assert sorted(ended) == [("a", True), ("b", True), ("c", True), ("d", False)]
    assert [attempts(workers, name) for name in "abcd"] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("os.kill(os.getpid(), 9)", "killed by SIGKILL (out of memory?); see "),
        ("os.kill(os.getpid(), 11)", "killed by SIGSEGV; see "),
        ("sys.exit(2)", "exit code 2; see "),
        ("print('stopped; to resume: ' + 'x' * 4000); sys.exit(143)", "stopped by SIGTERM; see "),
        ("print('error: No space left on device'); sys.exit(1)", "No space left on device; see"),
    ],
)
def test_failed_training_fails_alone_and_is_run_by_the_next_command(
    fake: MakeWorkers, lines: str, reason: str
) -> None:
    workers = fake(f"if name == 'b' or attempt > 1:\n    finish()\nelse:\n    {lines}")
    results = run_plan(plan("a", "b"), workers)
    assert results["b", 0] == _DONE
    assert results["a", 0].status == "failed"
    assert results["a", 0].note.startswith(reason)
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


def test_folder_of_another_command_is_an_error(fake: MakeWorkers, tmp_path: Path) -> None:
    with (
        FileLock(tmp_path / ".command.lock", is_singleton=False),
        pytest.raises(ConfigError, match="in use: another command writes to it; wait for it"),
    ):
        run_plan(plan("a"), fake("finish()"))


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

    ended: list[object] = []
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run_plan(plan("a", "b", "c"), workers, lambda *end: ended.append(end))
    assert all((folder / "saved").exists() for folder in folders)
    assert read_result(folders[0]) is None
    assert attempts(workers, "c") == 0
    assert not ended
    assert signal.getsignal(number) is before


def test_error_in_the_callback_ends_the_workers(fake: MakeWorkers) -> None:
    workers = fake("finish() if name == 'a' else sys.stdin.read(); (folder / 'saved').touch()")

    def fail(*_: object) -> None:
        raise RuntimeError("callback")

    with pytest.raises(RuntimeError, match="callback"):
        run_plan(plan("a", "b", "c", "d"), workers, fail)
    assert (training("b").folder(workers.out) / "saved").exists()
    assert attempts(workers, "d") == 0


@pytest.mark.parametrize(("left", "jobs"), [(2, 2), (5, 4), (0, 1)])
def test_jobs_are_limited_to_unfinished_trainings(left: int, jobs: int) -> None:
    trainings = [training(f"row{number}") for number in range(left)]
    assert Workers(Path("d"), Path("no"), 4).limited_to(trainings).jobs == jobs


@pytest.mark.parametrize(
    ("gpus", "visible", "shown"),
    [(0, "", ["", "", ""]), (2, "", ["0", "1", "0"]), (2, "3,5", ["3", "5", "3"])],
)
def test_jobs_have_a_gpu_each(
    monkeypatch: pytest.MonkeyPatch, gpus: int, visible: str, shown: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    workers = Workers(Path("d"), Path("o"), 3, "cuda", gpus)
    environments = [workers.command(training("a"), job)[1] for job in range(3)]
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in environments] == shown


def test_threads_are_divided_among_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("retinanet.paper.run.usable_cpus", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert Workers(Path("d"), Path("o"), 2).threads == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    workers = Workers(Path("d"), Path("o"), 2)
    assert workers.threads == 3
    command, environment = workers.command(training("a"), 0)
    assert environment["OMP_NUM_THREADS"] == "3"
    assert "workers = 2" in json.loads(command[-1])["recipe"]  # a thread is the trainer's
