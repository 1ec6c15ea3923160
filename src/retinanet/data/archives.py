"""Read images inside tar archives in place: ``train-000000.tar/KEY.jpg`` is a path like any other.

A member of a tar is stored as is, so that its offset and size suffice to read it. They come from an
index beside the archive (``train-000000.index.json``), else from its headers. The archive may be a
local file or at an fsspec address (``s3://bucket/train-000000.tar``), of which only the bytes of
the member are fetched. A file is opened per read, so nothing is shared between threads and forked
processes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import IO, Any

from retinanet.errors import DataError, ImageError
from retinanet.files import write_atomic

SUFFIX = ".tar"
"""Lower-case suffix of archives. A compressed one cannot be read in place."""

INDEX_SUFFIX = ".index.json"
"""Suffix of the index beside an archive, in place of its own."""

_BLOCK = tarfile.BLOCKSIZE
_INSIDE = re.compile(r"\.tar(?=[\\/]+(.+))", re.IGNORECASE | re.DOTALL)
_REMOTE = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):/+")  # one letter is a drive of Windows
_MAX_RANGES = 256  # per request to a remote store


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside an archive.

    Attributes:
        archive: the archive's address.
        name: its name there, with ``/`` between folders.
        offset: of its first byte in the archive.
        size: bytes.
        digest: of its bytes as :func:`digest_of` computes it; empty if unknown.
        content: its bytes, if they were fetched already.
    """

    archive: str
    name: str
    offset: int
    size: int
    digest: str = ""
    content: bytes | None = field(default=None, repr=False, compare=False)

    def __fspath__(self) -> str:
        return f"{self.archive}/{self.name}"

    def read(self) -> bytes:
        """Read its bytes."""
        return next(read_members([self])) if self.content is None else self.content


@dataclass(frozen=True, slots=True)
class Contents:
    """The members of an archive by name, in its order.

    Attributes:
        repeated: names that occur more than once; `members` has the first.
        indexed: whether they come from an index, rather than from the headers.
    """

    members: Mapping[str, Member]
    repeated: tuple[str, ...]
    indexed: bool


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


def archive_of(path: str | os.PathLike[str]) -> str | None:
    """Return the address of the archive that a path leads into, or None."""
    inside = _split(path)
    return inside[0] if inside else None


def find_member(path: str | os.PathLike[str]) -> Member | None:
    """Return the member at a path; None if the path leads into no archive.

    Raises:
        ImageError: the archive has no such member.
        DataError: the archive or its index cannot be read.
    """
    if isinstance(path, Member):
        return path
    inside = _split(path)
    if inside is None:
        return None
    archive, name = inside
    member = contents_of(archive).members.get(name)
    if member is None:
        raise ImageError(f"{archive}/{name}: there is no {name!r} in this archive")
    return member


def is_image_file(path: Path) -> bool:
    """Whether a file exists, also inside an archive."""
    inside = _split(path)
    return path.is_file() if inside is None else inside[1] in contents_of(inside[0]).members


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


# ---- files and folders, here or remote


def read_file(address: str) -> bytes:
    """Read a whole file."""
    with _open_store(address) as (system, path):
        return bytes(system.cat_file(path))


def list_names(address: str) -> list[str]:
    """Return the names in a folder, sorted; empty if it is no folder."""
    try:
        with _open_store(address) as (system, path):
            paths = [str(listed).rstrip("/") for listed in system.ls(path, detail=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted({listed.rpartition("/")[2] for listed in paths if listed != path.rstrip("/")})


@contextmanager
def _open_store(address: str) -> Iterator[tuple[Any, str]]:
    """Yield fsspec's file system of an address, and the path in it.

    What a store raises becomes a DataError of one line, except for a missing file.
    """
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(address)
        yield system, str(path)
    except (FileNotFoundError, NotADirectoryError, DataError):
        raise
    except (ImportError, ValueError) as error:  # it names the package to install
        raise DataError(f"{address}: {_one_line(error)}") from None
    except Exception as error:  # each store has its own
        reason = f"{type(error).__name__}: {_one_line(error)}"
        raise DataError(f"{address}: cannot be read: {reason}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# ---- reading


def read_members(members: Sequence[Member]) -> Iterator[bytes]:
    """Read members of one archive, or of several of one remote store."""
    if members and is_remote(members[0].archive):
        for first in range(0, len(members), _MAX_RANGES):
            chunk = members[first : first + _MAX_RANGES]
            for member, data in zip(chunk, _fetch(chunk), strict=True):
                yield _checked(member, data)
        return
    for member in members:
        try:
            with open(member.archive, "rb", buffering=0) as file:
                file.seek(member.offset - _BLOCK)
                data = file.read(_BLOCK + member.size)
        except OSError as error:
            reason = error.strerror or error
            raise ImageError(f"{os.fspath(member)}: cannot be read: {reason}") from None
        yield _checked(member, data)


def _fetch(members: Sequence[Member]) -> list[bytes]:
    """Fetch members of remote archives in parallel, each with the header before it."""
    starts = [member.offset - _BLOCK for member in members]
    ends = [member.offset + member.size for member in members]
    try:
        with _open_store(members[0].archive) as (system, _):
            from fsspec.core import strip_protocol

            paths = [strip_protocol(member.archive) for member in members]
            results = list(system.cat_ranges(paths, starts, ends, on_error="return"))
    except (DataError, OSError) as error:
        raise ImageError(_one_line(error)) from None
    for member, result in zip(members, results, strict=True):
        if isinstance(result, Exception):
            reason = f"{type(result).__name__}: {_one_line(result)}"
            raise ImageError(f"{os.fspath(member)}: cannot be read: {reason}") from None
    return results


def fetch_remote(files: Sequence[str | Member]) -> list[str | Member]:
    """Return the same files; members in remote archives with their bytes, fetched together."""
    remote = [file for file in files if isinstance(file, Member) and is_remote(file.archive)]
    contents: dict[str | Member, bytes] = dict(zip(remote, read_members(remote), strict=True))
    return [
        replace(file, content=contents[file])
        if isinstance(file, Member) and file in contents
        else file
        for file in files
    ]


def _checked(member: Member, data: bytes) -> bytes:
    """Return the bytes of a member without its header, which must state its name and size.

    So an index of another archive is detected.
    """
    try:
        header = tarfile.TarInfo.frombuf(data[:_BLOCK], "utf-8", "surrogateescape")
        name, size = _plain_name(header.name), header.size
    except tarfile.HeaderError:
        name, size = "", -1
    # A header states other names only in part: of 100 bytes or more, or not ASCII.
    is_whole_name = len(name) < 90 and member.name.isascii()
    is_other = is_whole_name and name != member.name
    if size != member.size or is_other or len(data) != _BLOCK + member.size:
        raise ImageError(
            f"{os.fspath(member)}: is not at byte {member.offset} of the archive, which is cut off "
            f"or has changed since its index was made; copy it again, or delete "
            f"{index_of(member.archive)} to do without"
        )
    return data[_BLOCK:]


# ---- contents


def index_of(archive: str) -> str:
    """Return the address of the index beside an archive."""
    return f"{archive[: -len(SUFFIX)]}{INDEX_SUFFIX}"


def digest_of(content: bytes) -> str:
    """Hexadecimal blake2b of 16 bytes."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def contents_of(archive: str) -> Contents:
    """Return the contents of an archive, by its index if it has one.

    Raises:
        DataError: there is no such archive, it is cut off or no tar, or its index does not fit it.
    """
    if is_remote(archive):
        return _contents(archive, None)
    try:
        stat = os.stat(archive)
    except OSError as error:
        raise DataError(f"{archive}: cannot be read: {error.strerror}") from None
    try:
        of_index = os.stat(index_of(archive)).st_mtime_ns
    except OSError:
        of_index = 0
    return _contents(archive, (stat.st_size, stat.st_mtime_ns, of_index))


@lru_cache(maxsize=256)
def _contents(archive: str, stamp: tuple[int, ...] | None) -> Contents:
    try:
        content = read_file(index_of(archive))
    except FileNotFoundError:
        content = None
    try:
        with _open_store(archive) as (system, path):
            if content is not None:
                size = stamp[0] if stamp else int(system.info(path)["size"])
                listed = _read_index(archive, content, size)
            else:
                with system.open(path, "rb", block_size=1 << 16) as file:
                    listed = _read_headers(archive, file)
    except FileNotFoundError:
        raise DataError(f"{archive}: there is no such file") from None
    members: dict[str, Member] = {}
    repeated: dict[str, None] = {}
    for member in listed:
        if ".." in PurePosixPath(member.name).parts:
            raise DataError(f"{archive}: {member.name!r} would lie outside of it")
        if members.setdefault(member.name, member) is not member:
            repeated[member.name] = None
    return Contents(members, tuple(repeated), content is not None)


def _read_index(archive: str, content: bytes, size: int) -> list[Member]:
    """Return the members that an index of an archive of `size` bytes lists."""
    index = index_of(archive)
    try:
        stated = json.loads(content)
        known = int(stated["bytes"])
        members = [
            Member(archive, _plain_name(str(name)), int(offset), int(length), str(digest))
            for name, offset, length, digest in stated["members"]
        ]
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(
            f"{index}: is no index of an archive ({type(error).__name__}: {error}); delete it to "
            f"do without"
        ) from None
    if known != size:
        raise DataError(
            f"{archive}: has {size} bytes, and {known} when its index was made: it is cut off or "
            f"has changed; copy it again, or delete {index} to do without"
        )
    for member in members:
        if member.offset < _BLOCK or member.size < 0 or member.offset + member.size > size:
            raise DataError(
                f"{index}: says that {member.name} has {member.size} bytes from byte "
                f"{member.offset} on, in an archive of {size}; delete it to do without"
            )
    return members


def _read_headers(archive: str, file: IO[bytes]) -> list[Member]:
    """Return the members of an archive by its headers."""
    members: list[Member] = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if info.size < 0:  # an endless loop
                    raise tarfile.ReadError("a negative size")
                if info.isreg() and not info.issparse():
                    name = _plain_name(info.name)
                    members.append(Member(archive, name, info.offset_data, info.size))
            end = tar.offset
        file.seek(end)
        whole = file.read(_BLOCK) == bytes(_BLOCK)
    # The others are of sizes that no machine has.
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
        if not members:
            raise DataError(
                f"{archive}: is no tar that can be read in place ({error}); a compressed one must "
                f"be uncompressed"
            ) from None
        whole = False
    if not whole:
        last = f"after {members[-1].name}" if members else "before its first file"
        raise DataError(f"{archive}: is cut off or damaged {last}; copy it again")
    return members


def _plain_name(name: str) -> str:
    """``./a/b`` as ``a/b``."""
    return str(PurePosixPath(name)).lstrip("/")


# ---- writing


class ArchiveWriter:
    """Writes an archive, and its index when closed; reproducible to the byte."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tar = tarfile.open(path, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115  # until close()
        self._members: list[tuple[str, int, int, str]] = []

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._tar.offset

    def add(self, name: str, content: bytes) -> None:
        """Add a file."""
        info = tarfile.TarInfo(name)  # no times, no owner
        info.size = len(content)
        self._tar.addfile(info, BytesIO(content))
        blocks = -(-len(content) // _BLOCK)
        offset = self._tar.offset - blocks * _BLOCK
        self._members.append((name, offset, len(content), digest_of(content)))

    def close(self) -> None:
        """Write the end of the archive, and the index."""
        self._tar.close()
        lines = ",\n".join(json.dumps(member) for member in self._members)
        size = self._path.stat().st_size
        head = f'{{"archive": {json.dumps(self._path.name)}, "bytes": {size}, "members": [\n'
        write_atomic(index_of(str(self._path)), f"{head}{lines}\n]}}\n")
