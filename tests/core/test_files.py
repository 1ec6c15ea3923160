"""Files and folders that are whole or absent, whatever the instant of a kill."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from retinanet.files import (
    readable_folder,
    recover_folder,
    replace_folder,
    write_atomic,
    write_errors,
)


def _fill(text: str):  # type: ignore[no-untyped-def]
    def fill(draft: Path) -> None:
        (draft / "a.txt").write_text(text)

    return fill


def _names(folder: Path) -> set[str]:
    return {one.name for one in folder.iterdir()}


def test_write_atomic_makes_parents_and_leaves_nothing_beside(tmp_path: Path) -> None:
    file = write_atomic(tmp_path / "deep" / "x.json", "é")
    assert file.read_text("utf-8") == "é"
    write_atomic(file, b"\x00")
    assert file.read_bytes() == b"\x00"
    assert _names(tmp_path / "deep") == {"x.json"}


def test_write_atomic_that_fails_keeps_the_old(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    file = write_atomic(tmp_path / "x", "old")

    def no_disk(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("retinanet.files.os.fsync", no_disk)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(file, "new")
    assert file.read_text() == "old"
    assert _names(tmp_path) == {"x"}


def test_replace_folder_replaces_all_of_it(tmp_path: Path) -> None:
    folder = replace_folder(tmp_path / "last", _fill("one"))
    (folder / "stale").touch()
    replace_folder(folder, _fill("two"))
    assert _names(folder) == {"a.txt"}
    assert (folder / "a.txt").read_text() == "two"
    assert _names(tmp_path) == {"last"}


def test_a_fill_that_fails_keeps_the_old(tmp_path: Path) -> None:
    folder = replace_folder(tmp_path / "last", _fill("one"))

    def broken(draft: Path) -> None:
        (draft / "a.txt").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        replace_folder(folder, broken)
    recover_folder(folder)
    assert (folder / "a.txt").read_text() == "one"
    replace_folder(folder, _fill("two"))
    assert _names(tmp_path) == {"last"}


@pytest.mark.parametrize("renames_before_the_kill", [0, 1, 2, 3])
def test_a_kill_at_each_rename_leaves_old_or_new(
    tmp_path: Path, monkeypatch, renames_before_the_kill: int
) -> None:  # type: ignore[no-untyped-def]
    folder = replace_folder(tmp_path / "last", _fill("one"))
    real, count = Path.rename, 0

    def dying(self: Path, target: Path) -> Path:
        nonlocal count
        if count == renames_before_the_kill:
            raise KeyboardInterrupt
        count += 1
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying)
        try:
            replace_folder(folder, _fill("two"))
        except KeyboardInterrupt:
            assert renames_before_the_kill < 3
    # A reader finds one or the other whole, and moves nothing.
    before = _names(tmp_path)
    assert (readable_folder(folder) / "a.txt").read_text() in ("one", "two")
    assert _names(tmp_path) == before
    recover_folder(folder)
    expected = "one" if renames_before_the_kill == 0 else "two"
    assert (folder / "a.txt").read_text() == expected


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
def test_written_files_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:

        def fill(draft: Path) -> None:
            (draft / "inner").mkdir(0o700)
            # safetensors and tempfile create files with mode 0600
            os.close(os.open(draft / "inner" / "weights", os.O_CREAT | os.O_WRONLY, 0o600))

        folder = replace_folder(tmp_path / "a" / "best", fill)
        file = write_atomic(tmp_path / "b" / "x.json", "{}")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777
             for path in (folder, *folder.rglob("*"), file, file.parent)}  # fmt: skip
    # 0777 and 0666 without 027
    assert modes == {"best": 0o750, "inner": 0o750, "weights": 0o640, "x.json": 0o640, "b": 0o750}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_write_atomic_full_disk_names_the_file(tmp_path: Path) -> None:
    def write() -> None:
        with write_errors(tmp_path / "x"), open("/dev/full", "w") as full:
            full.write("a")

    with pytest.raises(OSError, match="No space left on device") as caught:
        write()
    assert (caught.value.errno, caught.value.filename) == (28, str(tmp_path / "x"))


def test_replace_folder_safetensors_on_a_full_disk_names_the_folder(tmp_path: Path) -> None:
    def fill(draft: Path) -> None:
        raise SafetensorError(
            "Error while serializing: I/O error: Os { code: 28, kind: StorageFull, message: "
            '"No space left on device" }'
        )

    with pytest.raises(OSError, match="No space left on device") as caught:
        replace_folder(tmp_path / "last", fill)
    assert caught.value.filename == str(tmp_path / "last")
