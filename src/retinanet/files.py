"""Atomic writes of files and folders, under a temporary name that is then renamed; CSV text.

A process killed at any time leaves the old content or the new, never a part.
"""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BufferedWriter, TextIOWrapper
from pathlib import Path
from typing import TextIO


def write_atomic(path: str | Path, content: str | bytes, *, sync: bool = True) -> Path:
    """Write text (as UTF-8) or bytes to `path` atomically; parent folders are created.

    `sync` waits for the disk, against a loss of power too; for one of many files it costs most of
    the time.
    """
    with _beside(Path(path), sync=sync) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
    return Path(path)


@contextmanager
def open_atomic(path: str | Path) -> Iterator[TextIO]:
    """Open a text file (UTF-8) that replaces `path` when the context ends without an error.

    For content that is too large for memory.
    """
    with _beside(Path(path)) as file:
        text = TextIOWrapper(file, encoding="utf-8", newline="")
        yield text
        text.detach()  # the file is synced and closed by its own context


def csv_text(rows: Sequence[Mapping[str, object]], columns: Sequence[str] = ()) -> str:
    """Format rows as CSV, with the columns of the first; of no rows with `columns`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0] if rows else columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


@contextmanager
def _beside(path: Path, *, sync: bool = True) -> Iterator[BufferedWriter]:
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with beside.open("wb") as file:
                yield file
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def write_errors(path: str | Path) -> Iterator[None]:
    """Name `path` in a system error that names no file, and turn safetensors' errors into OSError.

    Raises:
        OSError: with ``errno`` and ``filename``, such as ENOSPC where the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    except Exception as error:
        code = re.search(r"Os \{ code: (\d+)", str(error))  # as Rust shows a system error
        if type(error).__name__ != "SafetensorError" or code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


def replace_folder(folder: str | Path, fill: Callable[[Path], None]) -> Path:
    """Make `folder` hold exactly what `fill` writes into the folder that it is passed.

    A folder cannot be renamed over a full one, so there are two renames; a kill between them is
    repaired by :func:`recover_folder`, which this function calls first. Concurrent readers use
    :func:`readable_folder`. Permissions follow the umask.

    Raises:
        OSError: a file cannot be written; `folder` keeps its old content.
    """
    folder = Path(folder)
    recover_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft, ready, old = _stages(folder)
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    with write_errors(folder):
        fill(draft)
    follow_umask(draft)
    for file in draft.rglob("*"):
        if file.is_file():
            with file.open("r+b") as opened:  # Windows syncs only what may be written
                os.fsync(opened.fileno())
    draft.rename(ready)  # from here on the new content counts
    if folder.exists():
        folder.rename(old)
    ready.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def follow_umask(folder: Path) -> None:
    """Give the files and folders within `folder` the permissions of newly created ones.

    safetensors and tempfile create files that only their owner may read.
    """
    probe = folder / ".mode"
    probe.mkdir()  # the umask can only be read by setting it, which another thread would see
    mode = probe.stat().st_mode & 0o777
    probe.rmdir()
    for path in folder.rglob("*"):
        path.chmod(mode if path.is_dir() else mode & 0o666)


def recover_folder(folder: str | Path) -> None:
    """Finish a :func:`replace_folder` that was killed."""
    folder = Path(folder)
    _, ready, old = _stages(folder)
    if ready.is_dir():
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        ready.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def readable_folder(folder: str | Path) -> Path:
    """Return the folder with the content of a replaced one, also after a kill; read-only."""
    folder = Path(folder)
    _, ready, _ = _stages(folder)
    return ready if ready.is_dir() else folder  # it is complete


def _stages(folder: Path) -> tuple[Path, Path, Path]:
    """Temporary names: being written, complete, and the previous content."""
    return tuple(folder.with_name(f".{folder.name}.{stage}") for stage in ("draft", "ready", "old"))  # type: ignore[return-value]
