"""Who is at work on what, where several processes or machines share one folder.

A place (a path that need not exist) is held through files beside it, numbered ``.0``, ``.1``, ...:
the highest number counts. To take a place is to create the next number, which only one process can
do; nothing is ever renamed or removed, so there is no moment at which two may believe that they
hold it. A holder touches its file as long as it lives. Who has not done so for a while, or is dead
on this very machine, has lost the place to the next that asks.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from retinanet.files import write_atomic

STALE = 300.0
"""Seconds without a touch after which a holder on another machine is taken for dead."""

_TOUCH_EVERY = 15.0


class Hold:
    """A place that this process holds, until it is released or the process ends.

    Use as a context. If another process has taken the place in the meantime, because this one was
    asleep for too long, :attr:`lost` is set.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._done = threading.Event()
        self.lost = threading.Event()
        self._thread = threading.Thread(target=self._touch, daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Let others take the place."""
        self._done.set()
        self._thread.join()
        if not self.lost.is_set():
            # A full disk must not hide what went wrong before; then it becomes stale by itself.
            with contextlib.suppress(OSError):
                write_atomic(self._file, json.dumps({"released": True}) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def _touch(self) -> None:
        following = self._file.with_suffix(f".{int(self._file.suffix[1:]) + 1}")
        while not self._done.wait(_TOUCH_EVERY):
            if following.exists():
                self.lost.set()
                return
            with contextlib.suppress(OSError):
                os.utime(self._file)


def take(place: Path, *, stale: float = STALE) -> Hold | None:
    """Hold a place; None: another process holds it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    last = _last(place)
    if last is not None and not _is_free(last, stale):
        return None
    number = 0 if last is None else int(last.suffix[1:]) + 1
    file = _numbered(place, number)
    try:
        handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return None
    with os.fdopen(handle, "w", encoding="utf-8") as opened:
        opened.write(json.dumps(_myself()) + "\n")
    return Hold(file)


def held(place: Path, *, stale: float = STALE) -> bool:
    """Whether some process holds a place."""
    last = _last(place)
    return last is not None and not _is_free(last, stale)


def write_once(file: Path, content: str) -> str:
    """Write a text unless the file is there already; what it then holds, whoever wrote it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = write_atomic(
        file.with_name(f".{file.name}.{socket.gethostname()}.{os.getpid()}"), content
    )
    try:
        # Unlike a rename, a link fails where the name is taken, and the content comes whole.
        os.link(draft, file)
    except FileExistsError:
        pass
    except OSError:  # a file system without links: the last of two at the same moment counts
        if not file.exists():
            write_atomic(file, content)
    finally:
        draft.unlink(missing_ok=True)
    return file.read_text("utf-8")


def _numbered(place: Path, number: int) -> Path:
    return place.with_name(f".{place.name}.held.{number}")


def _last(place: Path) -> Path | None:
    """The file of the highest number."""
    pattern = re.compile(rf"\.{re.escape(place.name)}\.held\.(\d+)")
    numbers = [
        int(found.group(1))
        for name in (os.listdir(place.parent) if place.parent.is_dir() else [])
        if (found := pattern.fullmatch(name))
    ]
    return _numbered(place, max(numbers)) if numbers else None


def _is_free(file: Path, stale: float) -> bool:
    try:
        holder: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except ValueError:
        holder = {}  # just created, not yet written; its age tells
    except OSError:
        return False
    if holder.get("released"):
        return True
    myself = _myself()
    if holder.get("machine") == myself["machine"]:
        return not _lives(int(holder["pid"]), float(holder["started"]))
    return _age(file) > stale


def _age(file: Path) -> float:
    """Seconds since the last touch, by the clock of the file system: machines' clocks differ."""
    probe = file.with_name(f".{socket.gethostname()}.{os.getpid()}.clock")
    try:
        probe.touch()
        now = probe.stat().st_mtime
        return now - file.stat().st_mtime
    except OSError:
        return time.time() - file.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _myself() -> dict[str, Any]:
    return {"machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}


def _lives(pid: int, started: float) -> bool:
    """Whether that very process is there, not another that has got its number since."""
    return psutil.pid_exists(pid) and abs(_started(pid) - started) < 2


def _started(pid: int) -> float:
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return -1.0
        return float(process.create_time())
    except psutil.Error:
        return -1.0


def _machine() -> str:
    """What tells this machine, and this container on it, from others that see the same folder."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)
