"""Who is at work on what, where several processes or machines share one folder.

A place (a path that need not exist) is held through files beside it, numbered ``.0``, ``.1``, ...:
the highest number counts. To take a place is to create the next number, which only one process can
do; nothing is ever renamed or removed, so two never take the same. A holder touches its file as
long as it lives. Who has not done so for a while, or is dead on this very machine, has lost the
place to the next that asks, and is told so when it wakes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from retinanet.files import write_atomic

STALE = 300.0
"""Seconds without a touch after which a holder on another machine is taken for dead."""

_TOUCH_EVERY = 15.0
_WAKE_EVERY = 1.0  # seconds: so soon after a sleep the holder looks whether it has lost its place


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a place.

    Attributes:
        host: name of its machine; empty: it does not say.
        pid: number of its process there.
        why: it does not say who it is.
    """

    host: str = ""
    pid: int = 0
    why: str = ""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" if self.host else f"a process ({self.why})"


class Hold:
    """A place that this process holds, until it is released or the process ends.

    Use as a context. If another process has taken the place in the meantime, because this one was
    asleep for too long, :attr:`lost` is set and `on_lost` called, from a thread of its own.
    """

    def __init__(self, file: Path, on_lost: Callable[[], object] | None = None) -> None:
        self._file = file
        self._done = threading.Event()
        self._on_lost = on_lost
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

    def _following(self) -> Path:
        return self._file.with_suffix(f".{int(self._file.suffix[1:]) + 1}")

    def _touch(self) -> None:
        touched = time.time()
        while not self._done.wait(min(_WAKE_EVERY, _TOUCH_EVERY)):
            # By the clock on the wall, which goes on while the machine sleeps.
            if abs(time.time() - touched) < _TOUCH_EVERY:
                continue
            touched = time.time()
            if self._following().exists():
                self.lost.set()
                if self._on_lost is not None:
                    self._on_lost()
                return
            with contextlib.suppress(OSError):
                os.utime(self._file)


def take(
    place: Path, *, stale: float = STALE, on_lost: Callable[[], object] | None = None
) -> Hold | None:
    """Hold a place; None: another process holds it.

    Args:
        place: any path.
        stale: seconds without a touch after which another machine's holder is taken for dead.
        on_lost: called from another thread if the place is lost while it is held.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    last = _last(place)
    if last is not None and _holder(last, stale) is not None:
        return None
    number = 0 if last is None else int(last.suffix[1:]) + 1
    file = _numbered(place, number)
    try:
        handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return None
    with os.fdopen(handle, "w", encoding="utf-8") as opened:
        opened.write(json.dumps(_myself()) + "\n")
    return Hold(file, on_lost)


def find_holder(place: Path, *, stale: float = STALE) -> Holder | None:
    """Who holds a place; None: nobody."""
    last = _last(place)
    return None if last is None else _holder(last, stale)


def held(place: Path, *, stale: float = STALE) -> bool:
    """Whether some process holds a place."""
    return find_holder(place, stale=stale) is not None


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


def _holder(file: Path, stale: float) -> Holder | None:
    """Who holds a place by its file of the highest number."""
    try:
        said: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        said = {}  # just created, not yet written; its age tells
    except OSError as error:  # another user's: whether it lives cannot be known
        return Holder(why=f"{file} cannot be read: {error.strerror}")
    if said.get("released"):
        return None
    holder = Holder(why="it has just begun")
    if "pid" in said:
        holder = Holder(str(said.get("host") or said.get("machine")), int(said["pid"]))
    if said.get("machine") == _machine():
        lives = _lives(int(said["pid"]), said.get("started"))
        if lives is not None:
            return holder if lives else None
    return None if _age(file) > stale else holder


def _age(file: Path) -> float:
    """Seconds since the last touch, by the clock of the file system: machines' clocks differ."""
    probe = file.with_name(f".{socket.gethostname()}.{os.getpid()}.clock")
    try:
        probe.touch()
        now = probe.stat().st_mtime
    except OSError:
        now = time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    try:
        return now - file.stat().st_mtime
    except OSError:
        return 0.0


def _myself() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "machine": _machine(),
        "host": socket.gethostname(),
        "pid": pid,
        "started": _started(pid),
    }


def _lives(pid: int, started: int | None) -> bool | None:
    """Whether that very process of this machine is there; None: perhaps.

    Args:
        pid: its number, which another process may have got since.
        started: as :func:`_started` said it.
    """
    try:
        alive = psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        alive = False
    except psutil.Error:
        return None
    if not alive:
        return False
    now = _started(pid)
    return None if started is None or now is None else now == started


def _started(pid: int) -> int | None:
    """When a process began, by a clock that nobody sets: Linux' ticks since the machine started.

    A time of day would follow the system's clock. None: there is no such clock here.
    """
    try:
        # The name of the program, in brackets, may hold anything; the rest are proc(5)'s fields 3-.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return int(fields[22 - 3])
    except (OSError, ValueError, IndexError):
        return None


def _machine() -> str:
    """What tells this machine, and this container on it, from others that see the same folder."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.getnode():x}"  # machines may share a name
