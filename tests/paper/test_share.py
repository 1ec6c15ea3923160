"""Holding a place among processes and machines that share a folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from retinanet.paper import share
from retinanet.paper.share import find_holder, held, take, write_once


def test_one_holds_and_another_does_not(tmp_path: Path) -> None:
    place = tmp_path / "runs" / "seed-0"
    assert not held(place)
    hold = take(place)
    assert hold is not None
    assert held(place)
    assert take(place) is None
    hold.release()
    assert not held(place)
    again = take(place)
    assert again is not None
    again.release()


def test_places_with_similar_names_are_apart(tmp_path: Path) -> None:
    with take(tmp_path / "seed-1") or pytest.fail("not taken"):
        assert take(tmp_path / "seed-1.held") is not None
        assert take(tmp_path / "seed-10") is not None


def test_an_error_within_releases(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), take(tmp_path / "a") or pytest.fail("not taken"):
        raise RuntimeError
    assert not held(tmp_path / "a")


_PROCESSES = 3


def _take_all(barrier: Barrier, folder: str, found: SimpleQueue[list[int]]) -> None:
    taken = []
    for number in range(40):
        barrier.wait(60)  # all ask for each place at once
        if take(Path(folder) / f"row-{number}") is not None:
            taken.append(number)  # and never released, as long as this process lives
    found.put(taken)
    barrier.wait(60)


def test_of_several_processes_one_takes_each(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, found = context.Barrier(_PROCESSES), context.SimpleQueue()
    processes = [
        context.Process(target=_take_all, args=(barrier, str(tmp_path), found))
        for _ in range(_PROCESSES)
    ]
    for one in processes:
        one.start()
    for one in processes:
        one.join(120)
    assert [one.exitcode for one in processes] == [0] * _PROCESSES
    taken = [found.get() for _ in processes]
    assert sorted(number for one in taken for number in one) == list(range(40))


def test_the_place_of_a_dead_process_is_free_at_once(tmp_path: Path) -> None:
    script = (
        "import sys, os, pathlib; from retinanet.paper.share import take\n"
        "hold = take(pathlib.Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "row")], check=False)
    assert done.returncode == -9
    assert not held(tmp_path / "row")
    hold = take(tmp_path / "row")
    assert hold is not None
    hold.release()


def _pretend(place: Path, age: float, **holder: object) -> Path:
    file = place.with_name(f".{place.name}.held.0")
    file.write_text(json.dumps(holder), "utf-8")
    then = time.time() - age
    os.utime(file, (then, then))
    return file


def test_another_machine_is_waited_for_until_it_is_stale(tmp_path: Path) -> None:
    place = tmp_path / "row"
    _pretend(place, 100, machine="elsewhere", pid=1, started=0.0)
    assert held(place)
    assert take(place) is None
    _pretend(place, 301, machine="elsewhere", pid=1, started=0.0)
    assert not held(place)
    hold = take(place)
    assert hold is not None
    hold.release()


def test_the_number_of_a_dead_process_may_be_used_again(tmp_path: Path) -> None:
    # A process of that number lives (this one), but it began at another time.
    place = tmp_path / "row"
    myself = share._myself()
    _pretend(place, 1000, **myself)
    assert held(place)  # however long ago it touched its file
    _pretend(place, 0, **(myself | {"started": myself["started"] + 1}))
    assert not held(place)


def test_without_a_clock_that_nobody_sets_only_the_dead_lose_at_once(tmp_path: Path) -> None:
    place = tmp_path / "row"
    _pretend(place, 100, **(share._myself() | {"started": None}))
    assert held(place)
    _pretend(place, 301, **(share._myself() | {"started": None}))
    assert not held(place)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    _pretend(place, 0, **(share._myself() | {"started": None, "pid": dead.pid}))
    assert not held(place)


def test_when_a_process_began_is_told_by_ticks() -> None:
    # 22nd of /proc/PID/stat, behind a name that may hold brackets and blanks.
    script = (
        "import ctypes, os; ctypes.CDLL(None).prctl(15, b'a) b (', 0, 0, 0)\n"
        "from retinanet.paper.share import _started\n"
        "print(_started(os.getpid()), open('/proc/self/stat').read().split(') b (', 1)[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    started, _, *fields = done.stdout.split()
    assert started == fields[22 - 3]


def test_who_holds_it_is_told(tmp_path: Path) -> None:
    place = tmp_path / "row"
    assert find_holder(place) is None
    with take(place) or pytest.fail("not taken"):
        assert str(find_holder(place)) == f"process {os.getpid()} on {socket.gethostname()}"
    _pretend(place, 0, machine="m", host="elsewhere", pid=7, started=1)
    assert str(find_holder(place)) == "process 7 on elsewhere"
    (tmp_path / ".row.held.0").write_text("", "utf-8")
    assert str(find_holder(place)) == "a process (it has just begun)"


def test_what_cannot_be_read_counts_as_held(tmp_path: Path) -> None:
    (tmp_path / ".row.held.0").mkdir()
    os.utime(tmp_path / ".row.held.0", (0, 0))
    assert take(tmp_path / "row") is None
    assert str(find_holder(tmp_path / "row")).endswith(
        ".row.held.0 cannot be read: Is a directory)"
    )


def test_who_slept_too_long_learns_that_the_place_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(share, "_WAKE_EVERY", 0.02)
    slept = [0.0]
    now = time.time
    monkeypatch.setattr(share.time, "time", lambda: now() + slept[0])
    told: list[str] = []
    hold = take(tmp_path / "row", on_lost=lambda: told.append("lost"))
    assert hold is not None
    (tmp_path / ".row.held.1").write_text("{}", "utf-8")
    slept[0] = 3600.0  # the clock on the wall has gone on
    assert hold.lost.wait(5)
    hold.release()
    assert told == ["lost"]
    assert (tmp_path / ".row.held.1").read_text("utf-8") == "{}"
    assert "released" not in (tmp_path / ".row.held.0").read_text("utf-8")


def test_a_holder_keeps_itself_fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(share, "_TOUCH_EVERY", 0.02)
    with take(tmp_path / "row") or pytest.fail("not taken"):
        file = tmp_path / ".row.held.0"
        os.utime(file, (0, 0))
        deadline = time.monotonic() + 5
        while file.stat().st_mtime < 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert file.stat().st_mtime > time.time() - 60


def test_the_first_text_counts(tmp_path: Path) -> None:
    file = tmp_path / "steps" / "a.json"
    assert write_once(file, "one") == "one"
    assert write_once(file, "two") == "one"
    assert [one.name for one in file.parent.iterdir()] == ["a.json"]
