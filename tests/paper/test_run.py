"""Trainings side by side: with workers that only pretend to train."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from retinanet.config import load_recipe
from retinanet.paper import run as running
from retinanet.paper.plan import Plan, Training
from retinanet.paper.run import Happening, Workplace, run_plan
from retinanet.paper.share import take
from retinanet.paper.work import Result, read_result

# What a pretended worker does with the folder that it is given; it holds it and asks for a result
# like a real one.
_WORKER = """
import json, os, signal, sys, time
from pathlib import Path
from retinanet.paper.share import take
folder = Path(sys.argv[1])
hold = take(folder)
if hold is None:
    sys.exit(75)
if (folder / "result.json").exists():
    sys.exit(0)
folder.mkdir(parents=True, exist_ok=True)
with (folder / "tries").open("a") as tries:
    tries.write("x")
tried = len((folder / "tries").read_text())
def finish():
    done = {"status": "done", "steps": 5, "seconds": 1.0, "metrics": {"ap": 0.5}, "note": ""}
    (folder / "result.json").write_text(json.dumps(done))
%s
hold.release()
"""


def _training(name: str) -> Training:
    return Training(name, load_recipe("quick", ["train.steps=5"]), "", 0)


def _plan(*names: str) -> Plan:
    return Plan(tuple(_training(name) for name in names), {})


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Workplace]:
    """A workplace whose workers run some lines of Python."""

    def make(lines: str, jobs: int = 2) -> Workplace:
        def launch(shop: Any, training: Training, job: int) -> subprocess.Popen[bytes]:
            folder = training.folder(tmp_path)
            folder.parent.mkdir(parents=True, exist_ok=True)
            with folder.with_name(f"{folder.name}.log").open("ab") as log:
                return subprocess.Popen(
                    [sys.executable, "-c", _WORKER % lines, str(folder)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )

        monkeypatch.setattr(running._Shop, "_launch", launch)
        monkeypatch.setattr(running, "_LOOK_EVERY", 0.02)
        monkeypatch.setattr(running, "_LOOK_ELSEWHERE_EVERY", 0.05)
        return Workplace(tmp_path / "data", tmp_path, jobs, "cpu")

    return make


def _tries(place: Workplace, name: str) -> int:
    file = _training(name).folder(place.out) / "tries"
    return len(file.read_text("utf-8")) if file.is_file() else 0


def test_every_training_is_done_once_and_never_again(pretend: Callable[..., Workplace]) -> None:
    place = pretend("finish()")
    told: list[Happening] = []
    done = run_plan(_plan("a", "b", "c"), place, told.append)
    assert {name for name, _ in done} == {"a", "b", "c"}
    assert all(isinstance(one, Result) and one.metrics == {"ap": 0.5} for one in done.values())
    assert sorted(one.training.name for one in told if one.kind == "done" and one.training) == [
        *"abc"
    ]
    assert told[-1].kind == "step"
    assert (told[-1].steps, told[-1].of) == (15, 15)
    again = run_plan(_plan("a", "b", "c", "d"), place)
    assert again.keys() == done.keys() | {("d", 0)}
    assert [_tries(place, name) for name in "abcd"] == [1, 1, 1, 1]


def test_a_killed_worker_goes_on_once(pretend: Callable[..., Workplace]) -> None:
    place = pretend("finish() if tried > 1 else os.kill(os.getpid(), 9)")
    done = run_plan(_plan("a"), place)
    assert isinstance(done["a", 0], Result)
    assert _tries(place, "a") == 2


def test_a_worker_that_is_killed_each_time_costs_its_row_alone(
    pretend: Callable[..., Workplace],
) -> None:
    place = pretend("finish() if folder.parent.name == 'b' else os.kill(os.getpid(), 9)")
    told: list[Happening] = []
    done = run_plan(_plan("a", "b"), place, told.append)
    assert isinstance(done["b", 0], Result)
    assert str(done["a", 0]).startswith("killed by signal 9 (out of memory?); see ")
    assert _tries(place, "a") == 2
    assert [one.note for one in told if one.kind == "failed"] == [done["a", 0]]


def test_what_a_worker_says_of_its_failure_is_passed_on(pretend: Callable[..., Workplace]) -> None:
    lines = (
        "if folder.parent.name == 'a':\n"
        "    print('error: No space left on device: model.safetensors'); sys.exit(1)\n"
        "finish()"
    )
    done = run_plan(_plan("a", "b"), pretend(lines))
    assert str(done["a", 0]).startswith("No space left on device: model.safetensors; see ")
    assert isinstance(done["b", 0], Result)


def test_what_failed_is_tried_again_by_the_next_call(pretend: Callable[..., Workplace]) -> None:
    place = pretend("sys.exit(1) if tried == 1 else finish()")
    assert str(run_plan(_plan("a"), place)["a", 0]).startswith("exit code 1; see ")
    assert isinstance(run_plan(_plan("a"), place)["a", 0], Result)


def test_the_words_of_an_earlier_try_are_not_this_ones(pretend: Callable[..., Workplace]) -> None:
    place = pretend("print('error: old') if tried == 1 else 0; sys.exit(3)")
    assert str(run_plan(_plan("a"), place)["a", 0]).startswith("old; see ")
    assert str(run_plan(_plan("a"), place)["a", 0]).startswith("exit code 3; see ")


@pytest.mark.parametrize(
    ("code", "by"),
    [
        (1, ""),
        (2, ""),
        (-9, "signal 9 (out of memory?)"),
        (137, "signal 9 (out of memory?)"),  # a process of several, as 128 + 9
        (143, "signal 15"),
        (-11, "signal 11"),
        (0xC0000005, "status 0xc0000005"),  # Windows
    ],
)
def test_what_counts_as_killed(code: int, by: str) -> None:
    assert running._killed_by(code) == by


def test_a_damaged_result_is_a_failure_of_its_row(pretend: Callable[..., Workplace]) -> None:
    place = pretend("finish() if folder.parent.name == 'b' else 0")
    file = _training("a").folder(place.out) / "result.json"
    file.parent.mkdir(parents=True)
    file.write_text("{", "utf-8")
    assert not place.is_finished(_training("a"))
    told: list[Happening] = []
    done = run_plan(_plan("a", "b"), place, told.append)
    assert "result.json cannot be read" in str(done["a", 0])
    assert "delete it" in str(done["a", 0])
    assert isinstance(done["b", 0], Result)
    assert [one.note for one in told if one.kind == "failed"] == [done["a", 0]]
    assert _tries(place, "a") == 0
    assert place.finished(_plan("a", "b", "c").trainings) == done


def test_what_cannot_be_started_costs_its_row_alone(
    pretend: Callable[..., Workplace], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = pretend("finish()")
    launch = running._Shop._launch

    def full(shop: Any, training: Training, job: int) -> subprocess.Popen[bytes]:
        if training.name == "a":
            raise OSError(28, "No space left on device")
        return launch(shop, training, job)

    monkeypatch.setattr(running._Shop, "_launch", full)
    done = run_plan(_plan("a", "b"), place)
    assert "cannot be started: [Errno 28] No space left on device" in str(done["a", 0])
    assert isinstance(done["b", 0], Result)


def test_a_row_that_fails_here_may_be_finished_elsewhere(
    pretend: Callable[..., Workplace],
) -> None:
    # The other row ends after "a" has failed, and another machine has finished "a" by then.
    place = pretend(
        "if folder.parent.name == 'a': sys.exit(1)\n"
        "time.sleep(1); finish(); folder = folder.parent.parent / 'a' / 'seed-0'; finish()"
    )
    told: list[Happening] = []
    done = run_plan(_plan("a", "b"), place, told.append)
    assert isinstance(done["a", 0], Result)
    about_a = [one.kind for one in told if one.training and one.training.name == "a"]
    assert about_a == ["begun", "failed", "elsewhere"]


def test_a_row_that_fails_here_while_another_has_it_is_waited_for(
    pretend: Callable[..., Workplace],
) -> None:
    place = pretend("hold.release(); time.sleep(1); sys.exit(1)")
    folder = _training("a").folder(place.out)

    def elsewhere() -> None:
        while not (folder / "tries").exists() or (hold := take(folder)) is None:
            time.sleep(0.01)
        time.sleep(2)
        result = {"status": "done", "steps": 5, "seconds": 1.0, "metrics": {}}
        (folder / "result.json").write_text(json.dumps(result), "utf-8")
        hold.release()

    other = threading.Thread(target=elsewhere)
    other.start()
    told: list[Happening] = []
    done = run_plan(_plan("a"), place, told.append)
    other.join()
    assert done["a", 0] == Result("done", 5, 1.0, {})
    assert [one.kind for one in told if one.kind != "step"] == ["begun", "waiting", "elsewhere"]


def test_what_another_process_is_at_is_waited_for(pretend: Callable[..., Workplace]) -> None:
    place = pretend("finish()")
    folder = _training("a").folder(place.out)
    hold = take(folder)
    assert hold is not None

    def elsewhere() -> None:
        time.sleep(0.5)
        folder.mkdir(parents=True)
        result = {"status": "diverged", "steps": 3, "seconds": 1.0, "metrics": None, "note": "NaN"}
        (folder / "result.json").write_text(json.dumps(result), "utf-8")
        hold.release()

    other = threading.Thread(target=elsewhere)
    other.start()
    told: list[Happening] = []
    done = run_plan(_plan("a"), place, told.append)
    other.join()
    assert done["a", 0] == Result("diverged", 3, 1.0, None, "NaN")
    happened = [one for one in told if one.kind != "step"]
    assert [one.kind for one in happened] == ["waiting", "elsewhere"]
    assert happened[0].note == f"process {os.getpid()} on {socket.gethostname()}"
    assert _tries(place, "a") == 0


def test_two_calls_share_the_trainings(pretend: Callable[..., Workplace]) -> None:
    place = pretend("time.sleep(.05); finish()")
    names = [f"row{number}" for number in range(6)]
    found: list[dict[tuple[str, int], Result | str]] = []
    calls = [
        threading.Thread(target=lambda: found.append(run_plan(_plan(*names), place)))
        for _ in range(2)
    ]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert len(found) == 2
    for done in found:
        assert {name for name, _ in done} == set(names)
        assert all(isinstance(one, Result) for one in done.values())
    assert [_tries(place, name) for name in names] == [1] * 6


@pytest.fixture
def as_in_a_terminal() -> Iterator[None]:
    """Signals as a terminal leaves them: nohup, or a shell's background, has some ignored."""
    usual = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {one: signal.signal(one, handler) for one, handler in usual.items()}
    yield
    for one, handler in before.items():
        signal.signal(one, handler)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.usefixtures("as_in_a_terminal")
def test_to_be_stopped_is_passed_on_and_waited_for(
    pretend: Callable[..., Workplace], name: str
) -> None:
    place = pretend(
        "(folder / 'ready').touch()\n"
        "sys.stdin.read()\n"
        "time.sleep(.2); (folder / 'kept').touch(); hold.release(); os._exit(130)"
    )
    asked, before = getattr(signal, name), signal.getsignal(getattr(signal, name))
    folder = _training("a").folder(place.out)

    def interrupt() -> None:
        deadline = time.monotonic() + 30
        while not (folder / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), asked)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run_plan(_plan("a", "b", "c"), place)
    assert (folder / "kept").exists()
    assert read_result(folder) is None
    assert _tries(place, "c") == 0
    assert signal.getsignal(asked) is before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nohup_holds(pretend: Callable[..., Workplace]) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        place = pretend("os.kill(os.getppid(), signal.SIGHUP); time.sleep(.2); finish()")
        assert isinstance(run_plan(_plan("a"), place)["a", 0], Result)
    finally:
        signal.signal(signal.SIGHUP, before)


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
def test_gpus_are_shared_out(gpus: int, jobs: int, shares: list[list[int]]) -> None:
    place = Workplace(Path("d"), Path("o"), jobs, "cuda", gpus)
    assert [list(place.gpus_of(job)) for job in range(jobs)] == shares


def test_the_gpus_that_the_caller_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert running._visible([0, 1]) == ["3", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert running._visible([0, 1]) == ["0", "1"]


@pytest.mark.parametrize(
    ("jobs", "gpus", "left", "fitted"),
    [
        (4, 0, 2, (2, 0)),
        (4, 4, 2, (2, 2)),  # a job keeps its one GPU
        (2, 4, 1, (1, 2)),
        (8, 4, 2, (2, 2)),  # of four shared by eight, one each
        (2, 2, 5, (2, 2)),
        (2, 0, 0, (1, 0)),
    ],
)
def test_no_more_jobs_than_trainings_left(
    tmp_path: Path, jobs: int, gpus: int, left: int, fitted: tuple[int, int]
) -> None:
    done = _training("done").folder(tmp_path)
    done.mkdir(parents=True)
    result = {"status": "done", "steps": 5, "seconds": 1.0, "metrics": {}}
    (done / "result.json").write_text(json.dumps(result), "utf-8")
    trainings = [_training("done"), *(_training(f"row{number}") for number in range(left))]
    found = Workplace(tmp_path, tmp_path, jobs, "auto", gpus).fitted(trainings)
    assert (found.jobs, found.gpus) == fitted


def test_several_gpus_of_a_job_are_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[dict[str, Any], dict[str, str]]] = []
    monkeypatch.setattr(
        running, "start_worker", lambda task, env, log: seen.append((json.loads(task), env))
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv("RANK", "1")  # of whatever has started this process
    rival = Training("b", load_recipe("quick"), "ssd", 0)
    for gpus, training in ((4, _training("a")), (2, _training("a")), (4, rival)):
        place = Workplace(tmp_path / "data", tmp_path, 2, "cuda", gpus)
        running._Shop([training], place, lambda _: None)._launch(training, 1)
    assert [one["processes"] for one, _ in seen] == [2, 1, 1]  # a rival refuses several
    assert [env["CUDA_VISIBLE_DEVICES"] for _, env in seen] == ["2,3", "1", "2"]
    assert all("RANK" not in env for _, env in seen)
    assert all(env["OMP_WAIT_POLICY"] == "PASSIVE" for _, env in seen)
    assert seen[0][0]["device"] == "cuda"
    assert 'backbone = "resnet50"' in seen[0][0]["recipe"]
    # Nothing of this machine lies where others look.
    assert [one.name for one in tmp_path.rglob("*") if one.is_file()] == ["seed-0.log"] * 2


def test_threads_are_shared_out_and_the_callers_limit_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(running, "usable_cpus", lambda: 8)
    for given, jobs, threads in (
        ("", 2, 4),
        ("3", 2, 3),
        ("6", 2, 4),
        ("0", 4, 2),
        ("4,2", 4, 2),
        ("", 16, 1),
    ):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        assert Workplace(Path("d"), Path("o"), jobs).threads == threads, given
