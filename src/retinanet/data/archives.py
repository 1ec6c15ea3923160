"""Read images inside tar archives in place: ``train-000000.tar/KEY.jpg`` is a path like any other.

A member of a tar is stored as is, so that its offset and size, which the archive's headers state,
suffice to read it. The archive may be a local file or at an fsspec address
(``s3://bucket/train-000000.tar``), of which only the bytes of the member are fetched. A file is
opened per read, so nothing is shared between threads and forked processes.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any

from retinanet.errors import DataError, ImageError, MissingExtraError

SUFFIX = ".tar"
"""Lower-case suffix of archives. A compressed one cannot be read in place."""

_INSIDE = re.compile(r"\.tar(?=[\\/]+(.+))", re.IGNORECASE | re.DOTALL)
_REMOTE = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):/+")  # one letter is a drive of Windows
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs"}
_BLOCK = 1 << 23  # bytes per read of a remote archive's headers; s3fs reads 50 MB by default


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside the archive of an address: `size` bytes from `offset` on.

    Its name there has ``/`` between folders; `content` are its bytes, if they were fetched already.
    """

    archive: str
    name: str
    offset: int
    size: int
    content: bytes | None = field(default=None, repr=False, compare=False)

    def __fspath__(self) -> str:
        return f"{self.archive}/{self.name}"

    def read(self) -> bytes:
        """Read its bytes."""
        return read_members([self])[0] if self.content is None else self.content


# ---- addresses


def address_of(path: str | os.PathLike[str]) -> str:
    """Return a path as text, with both slashes of ``s3://bucket``, which pathlib folds into one."""
    text = os.fspath(path)
    found = _REMOTE.match(text)
    if not found:
        return text
    scheme, rest = found.group(1), text[found.end() :]
    # A file's path is absolute: without its slash it would be one in the working folder.
    return f"{scheme}:///{rest}" if scheme in ("file", "local") else f"{scheme}://{rest}"


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether it is an fsspec address rather than a local path."""
    return _REMOTE.match(os.fspath(path)) is not None


def open_files(address: str) -> tuple[Any, str]:
    """Return fsspec's file system of an address or a path, and the path in it.

    Listings are not cached: they grow with the data, and other machines write there too.
    """
    import fsspec

    scheme = address.partition("://")[0]
    # SFTP has no such cache, and hands every option to paramiko, which refuses it.
    options = {} if scheme in ("sftp", "ssh") else {"use_listings_cache": False}
    try:
        files, path = fsspec.core.url_to_fs(address, **options)
    except ImportError as error:
        if scheme == "hf":
            raise MissingExtraError("huggingface_hub", "hub") from None
        package = _PACKAGES.get(scheme)
        how = f"pip install {package}" if package else one_line(error)
        raise DataError(
            f"{address}: the package for {scheme}:// addresses is not installed: {how}"
        ) from None
    except ValueError as error:
        raise DataError(f"{address}: {one_line(error)}") from None
    return files, str(path)


def one_line(error: Exception) -> str:
    """Return the message of an error on one line, or its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def accessing(address: str) -> Iterator[tuple[Any, str]]:
    """Yield :func:`open_files`; what a store raises, except for a missing file, is a DataError."""
    try:
        yield open_files(address)
    except (FileNotFoundError, NotADirectoryError, DataError, MissingExtraError):
        raise
    except Exception as error:  # each store has its own
        raise DataError(f"{address}: cannot be accessed: {one_line(error)}") from None


def read_file(address: str) -> bytes:
    """Read a whole file."""
    with accessing(address) as (files, path):
        return bytes(files.cat_file(path))


def list_names(address: str) -> list[str]:
    """Return the names in a folder, sorted; empty if it is no folder."""
    try:
        with accessing(address) as (files, path):
            listed = [str(entry).strip("/") for entry in files.ls(path, detail=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    # Some stores list the folder itself.
    return sorted({entry.rpartition("/")[2] for entry in listed if entry != path.strip("/")})


# ---- members


def archive_of(path: str | os.PathLike[str]) -> str | None:
    """Return the address of the archive that a path leads into, or None."""
    inside = _split(path)
    return inside and inside[0]


def find_member(path: str | os.PathLike[str]) -> Member | None:
    """Return the member at a path; None if the path leads into no archive."""
    if isinstance(path, Member):
        return path
    inside = _split(path)
    if inside is None:
        return None
    archive, name = inside
    member = members_of(archive).get(name)
    if member is None:
        raise ImageError(f"{archive}/{name}: there is no {name!r} in this archive")
    return member


def is_image_file(path: Path) -> bool:
    """Whether a file exists, also inside an archive."""
    inside = _split(path)
    return path.is_file() if inside is None else inside[1] in members_of(inside[0])


def read_image_file(path: Path) -> bytes:
    """Read a file, also inside an archive."""
    member = find_member(path)
    return path.read_bytes() if member is None else member.read()


def file_size(path: Path) -> int:
    """Return the size of a file in bytes, also inside an archive."""
    member = find_member(path)
    return path.stat().st_size if member is None else member.size


def _split(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """Archive and name of the member; nothing is opened."""
    text = os.fspath(path)
    for found in _INSIDE.finditer(text):
        archive = text[: found.end()]
        if is_remote(archive) or os.path.isfile(archive):
            return address_of(archive), found.group(1).replace(os.sep, "/")
    return None


def read_members(members: Sequence[Member]) -> list[bytes]:
    """Read members of archives of one store, in parallel where it is remote."""
    if not members:
        return []
    ends = [member.offset + member.size for member in members]
    try:
        with accessing(members[0].archive) as (files, _):
            from fsspec.core import strip_protocol

            paths = [strip_protocol(member.archive) for member in members]
            offsets = [member.offset for member in members]
            contents = list(files.cat_ranges(paths, offsets, ends, on_error="return"))
    except (DataError, OSError) as error:
        raise ImageError(one_line(error)) from None
    for member, content in zip(members, contents, strict=True):
        if isinstance(content, Exception):
            reason = f"{type(content).__name__}: {one_line(content)}"
        elif len(content) < member.size:
            reason = "its archive is cut off; copy it again"
        else:
            continue
        raise ImageError(f"{os.fspath(member)}: cannot be read: {reason}")
    return contents


def fetch_remote(files: Sequence[str | Member]) -> list[str | Member]:
    """Return the same files; members in remote archives with their bytes, fetched together."""
    remote = [file for file in files if isinstance(file, Member) and is_remote(file.archive)]
    read = zip(remote, read_members(remote), strict=True)
    fetched: dict[str | Member, Member] = {m: replace(m, content=c) for m, c in read}
    return [fetched.get(file, file) for file in files]


def members_of(archive: str) -> Mapping[str, Member]:
    """Return the members of an archive by name, in its order; of a repeated name the last."""
    if is_remote(archive):
        return _remote_members(archive)
    try:
        stat = os.stat(archive)
    except OSError as error:
        raise DataError(f"{archive}: cannot be read: {error.strerror}") from None
    return _local_members(archive, (stat.st_size, stat.st_mtime_ns))


@cache  # without a limit: it would be fetched whole again
def _remote_members(archive: str) -> Mapping[str, Member]:
    return _members(archive)


@lru_cache(maxsize=256)
def _local_members(archive: str, stamp: tuple[int, int]) -> Mapping[str, Member]:
    """Read the headers of a file; `stamp` changes with it."""
    return _members(archive)


def _members(archive: str) -> Mapping[str, Member]:
    try:
        with (
            accessing(archive) as (files, path),
            files.open(path, "rb", block_size=_BLOCK) as file,
        ):
            return _read_headers(archive, file)
    except FileNotFoundError:
        raise DataError(f"{archive}: there is no such file") from None


def _read_headers(archive: str, file: IO[bytes]) -> dict[str, Member]:
    members: dict[str, Member] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if info.size < 0:  # an endless loop
                    raise tarfile.ReadError("a negative size")
                if info.isreg() and not info.issparse():
                    name = str(PurePosixPath(info.name)).lstrip("/")
                    if ".." in PurePosixPath(name).parts:
                        raise DataError(f"{archive}: {name!r} would lie outside of it")
                    members[name] = Member(archive, name, info.offset_data, info.size)
            end = tar.offset
        file.seek(end)
        whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    # The others are of sizes that no machine has.
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
        if not members:
            raise DataError(
                f"{archive}: is no tar that can be read in place ({error}); a compressed one must "
                f"be uncompressed"
            ) from None
        whole = False
    if not whole:
        last = f"after {next(reversed(members))}" if members else "before its first file"
        raise DataError(f"{archive}: is cut off or damaged {last}; copy it again")
    return members
