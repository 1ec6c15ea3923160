"""Holding a place among processes and machines that share a folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from retinanet.paper import share
from retinanet.paper.share import held, take, write_once


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


def _take_all(folder: str) -> list[int]:
    taken = []
    for number in range(40):
        if take(Path(folder) / f"row-{number}") is not None:
            taken.append(number)  # and never released, as long as this process lives
    return taken


def test_of_several_processes_one_takes_each(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(3, mp_context=context) as pool:
        found = list(pool.map(_take_all, [str(tmp_path)] * 3))
    assert sorted(number for one in found for number in one) == list(range(40))


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
    _pretend(place, 0, machine=share._machine(), pid=os.getpid(), started=1.0)
    assert not held(place)


def test_who_slept_too_long_learns_that_the_place_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(share, "_TOUCH_EVERY", 0.02)
    hold = take(tmp_path / "row")
    assert hold is not None
    (tmp_path / ".row.held.1").write_text("{}", "utf-8")
    assert hold.lost.wait(5)
    hold.release()
    assert (tmp_path / ".row.held.1").read_text("utf-8") == "{}"


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
