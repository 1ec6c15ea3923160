"""Trainings side by side: with workers that only pretend to train."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
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
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )

        monkeypatch.setattr(running._Shop, "_launch", launch)
        monkeypatch.setattr(running, "_LOOK_EVERY", 0.02)
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


def test_a_damaged_result_is_named(pretend: Callable[..., Workplace]) -> None:
    place = pretend("(folder / 'result.json').write_text('{')")
    why = str(run_plan(_plan("a"), place)["a", 0])
    assert "result.json cannot be read" in why
    assert "delete it" in why


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
    assert [one.kind for one in told if one.kind != "step"] == ["elsewhere"]
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


def test_ctrl_c_is_passed_on_once_and_waited_for(pretend: Callable[..., Workplace]) -> None:
    place = pretend(
        "def stop(*_):\n"
        "    (folder / 'asked').open('a').write('x'); time.sleep(.2)\n"
        "    (folder / 'kept').touch(); hold.release(); os._exit(130)\n"
        "signal.signal(signal.SIGINT, stop)\n"
        "(folder / 'ready').touch()\n"
        "time.sleep(60)"
    )
    folder = _training("a").folder(place.out)

    def interrupt() -> None:
        deadline = time.monotonic() + 30
        while not (folder / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        run_plan(_plan("a", "b", "c"), place)
    assert (folder / "asked").read_text() == "x"
    assert (folder / "kept").exists()
    assert read_result(folder) is None
    assert _tries(place, "c") == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


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


def test_several_gpus_of_a_job_go_through_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[str], dict[str, str]]] = []

    class Launched:
        def __init__(self, command: list[str], **options: Any) -> None:
            seen.append((command, options["env"]))

    monkeypatch.setattr(running.subprocess, "Popen", Launched)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for gpus in (4, 1):
        place = Workplace(tmp_path / "data", tmp_path, 2, "cuda", gpus)
        shop = running._Shop([_training("a")], place, lambda _: None)
        shop._launch(_training("a"), 1)
    (several, environment), (one, alone) = seen
    assert several[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert several[5:9] == ["-m", "retinanet", "paper", "work"]
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert one[1:5] == ["-m", "retinanet", "paper", "work"]
    assert alone["CUDA_VISIBLE_DEVICES"] == "0"
    task = json.loads(Path(one[-1]).read_text("utf-8"))
    assert task["device"] == "cuda"
    place = Workplace(tmp_path / "data", tmp_path, 2, "cuda", 4)
    rival = Training("b", load_recipe("quick"), "ssd", 0)
    running._Shop([rival], place, lambda _: None)._launch(rival, 1)
    command, environment = seen[-1]
    assert "torch.distributed.run" not in command  # which it refuses
    assert environment["CUDA_VISIBLE_DEVICES"] == "2"
    assert 'backbone = "resnet50"' in task["recipe"]
