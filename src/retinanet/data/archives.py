"""Images inside tar archives, read in place: ``train-000000.tar/KEY.jpg`` is an address as any.

A member lies in a tar as it is, so its place and size are all that reading it takes. They come from
an index beside the archive (``train-000000.index.json``), else from going through its headers once.
The archive may lie on a disk or at an fsspec address (``s3://bucket/train-000000.tar``), of which
only the bytes of the member are fetched. A file is opened for each reading: that takes
microseconds, and nothing is shared between threads and forked processes.
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
"""Of archives, in lower case. A compressed one cannot be read in place."""

INDEX_SUFFIX = ".index.json"
"""Of the index beside an archive, in place of its own suffix."""

_BLOCK = tarfile.BLOCKSIZE
_INSIDE = re.compile(r"\.tar(?=[\\/]+(.+))", re.IGNORECASE | re.DOTALL)
_REMOTE = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):/+")  # one letter is a drive of Windows
_AT_ONCE = 256  # ranges asked of a remote store


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside an archive; a path to whoever reads images.

    Attributes:
        archive: the archive's address.
        name: its name there, with ``/`` between folders.
        offset: of its first byte in the archive.
        size: bytes.
        digest: of its bytes as :func:`digest_of` gives it; empty: not known.
        content: its bytes, where they were fetched already.
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
        """Its bytes.

        Raises:
            ImageError: the archive cannot be read, or has another thing at this place.
        """
        if self.content is not None:
            return self.content
        (content,) = read_members([self])
        return content


@dataclass(frozen=True, slots=True)
class Contents:
    """What an archive holds.

    Attributes:
        members: its files by name, in its order.
        repeated: names that come more than once; `members` has the first.
        indexed: whether an index said so; else the archive was gone through.
    """

    members: Mapping[str, Member]
    repeated: tuple[str, ...]
    indexed: bool


# ---- addresses


def address_of(path: str | os.PathLike[str]) -> str:
    """A path as text, the two slashes of ``s3://bucket`` put back where pathlib folded them."""
    text = os.fspath(path)
    found = _REMOTE.match(text)
    return f"{found.group(1)}://{text[found.end() :]}" if found else text


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether it is an fsspec address rather than a path of this machine."""
    return _REMOTE.match(os.fspath(path)) is not None


def archive_of(path: str | os.PathLike[str]) -> str | None:
    """The address of the archive that a path goes into, or None; a folder x.tar is none."""
    inside = _split(path)
    return inside[0] if inside else None


def find_member(path: str | os.PathLike[str]) -> Member | None:
    """The member that a path means; None where it goes into no archive.

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
    """As :meth:`pathlib.Path.is_file`, also inside an archive."""
    inside = _split(path)
    return path.is_file() if inside is None else inside[1] in contents_of(inside[0]).members


def read_image_file(path: Path) -> bytes:
    """The bytes of a file, also inside an archive.

    Raises:
        OSError, DataError: it cannot be read.
    """
    member = find_member(path)
    return path.read_bytes() if member is None else member.read()


def file_size(path: Path) -> int:
    """Bytes of a file, also inside an archive.

    Raises:
        OSError, DataError: it is not there.
    """
    member = find_member(path)
    return path.stat().st_size if member is None else member.size


def _split(path: str | os.PathLike[str]) -> tuple[str, str] | None:
    """Archive and name within; nothing is opened but for a look whether the archive is a file."""
    if isinstance(path, Member):
        return path.archive, path.name
    text = os.fspath(path)
    for found in _INSIDE.finditer(text):
        archive = text[: found.end()]
        if is_remote(archive) or os.path.isfile(archive):
            return address_of(archive), found.group(1).replace(os.sep, "/")
    return None


# ---- files and folders, here or remote


def read_file(address: str) -> bytes:
    """The whole of a file.

    Raises:
        FileNotFoundError: it is not there.
        DataError: it cannot be read.
    """
    if not is_remote(address):
        try:
            return Path(address).read_bytes()
        except (IsADirectoryError, PermissionError) as error:
            raise DataError(f"{address}: cannot be read: {error.strerror}") from None
    with _failures_named(address):
        system, path = _system(address)
        return bytes(system.cat_file(path))


def list_names(address: str) -> list[str]:
    """Names of what lies in a folder, sorted; none where it is no folder.

    Raises:
        DataError: a remote store does not answer.
    """
    if not is_remote(address):
        try:
            return sorted(os.listdir(address))
        except (FileNotFoundError, NotADirectoryError):
            return []
    try:
        with _failures_named(address):
            system, path = _system(address)
            listed = system.ls(path, detail=False)
    except (FileNotFoundError, NotADirectoryError):
        return []
    names = {str(one).rstrip("/").rpartition("/")[2] for one in listed}
    return sorted(names - {path.rstrip("/").rpartition("/")[2]})


def size_of_archive(address: str) -> int:
    """Bytes of an archive.

    Raises:
        FileNotFoundError: it is not there.
        DataError: a remote store does not answer.
    """
    if not is_remote(address):
        return os.stat(address).st_size
    with _failures_named(address):
        system, path = _system(address)
        return int(system.info(path)["size"])


def _system(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it."""
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:  # it names the package to install
        raise DataError(f"{address}: {' '.join(str(error).split())}") from None
    return system, str(path)


@contextmanager
def _failures_named(address: str) -> Iterator[None]:
    """Whatever a remote store raises as one line with the address; a missing file stays one."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, DataError):
        raise
    except Exception as error:  # each store has its own
        words = " ".join(str(error).split())
        raise DataError(f"{address}: cannot be read: {type(error).__name__}: {words}") from None


# ---- reading


def read_members(members: Sequence[Member]) -> Iterator[bytes]:
    """The bytes of members of one archive, which is opened once, or of one remote store.

    A remote store is asked for many at a time.

    Raises:
        ImageError: the archive cannot be read, or has another thing at a member's place.
    """
    if not members:
        return
    # The header before a member is read with it: an index of another archive is seen at once.
    spans = [(one.offset - _BLOCK, one.offset + one.size) for one in members]
    if is_remote(members[0].archive):
        for first in range(0, len(members), _AT_ONCE):
            chunk = members[first : first + _AT_ONCE]
            for member, data in zip(chunk, _ranges(chunk, spans[first:]), strict=True):
                yield _checked(member, data)
        return
    place = 0
    try:
        with open(members[0].archive, "rb") as file:
            for place, (start, end) in enumerate(spans):
                file.seek(start)
                yield _checked(members[place], file.read(end - start))
    except OSError as error:
        raise ImageError(
            f"{os.fspath(members[place])}: cannot be read: {error.strerror or error}"
        ) from None


def _ranges(members: Sequence[Member], spans: Sequence[tuple[int, int]]) -> list[bytes]:
    """What lies in these spans of remote archives, fetched side by side."""
    try:
        system, _ = _system(members[0].archive)
        starts, ends = map(list, zip(*spans[: len(members)], strict=True))
        paths = [_system(one.archive)[1] for one in members]
        found = list(system.cat_ranges(paths, starts, ends, on_error="return"))
    except DataError as error:
        raise ImageError(str(error)) from None
    except Exception as error:  # each store has its own
        found = [error] * len(members)
    for member, one in zip(members, found, strict=True):
        if isinstance(one, Exception):
            words = " ".join(str(one).split())
            raise ImageError(
                f"{os.fspath(member)}: cannot be read: {type(one).__name__}: {words}"
            ) from None
    return found


def fetched(files: Sequence[str | Member]) -> list[str | Member]:
    """The same files, those of a remote store with their bytes: one wait for all of them.

    Raises:
        ImageError: as :func:`read_members`.
    """
    remote = [one for one in files if isinstance(one, Member) and is_remote(one.archive)]
    contents = iter(read_members(remote))
    return [
        replace(one, content=next(contents))
        if isinstance(one, Member) and is_remote(one.archive)
        else one
        for one in files
    ]


def _checked(member: Member, data: bytes) -> bytes:
    """A member without its header, which must be of its size and name."""
    try:
        header = tarfile.TarInfo.frombuf(data[:_BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        header = None
    # A name of 100 bytes or more is cut in the header.
    if (
        header is None
        or header.size != member.size
        or (len(os.fsencode(header.name)) < 100 and _bare(header.name) != _bare(member.name))
        or len(data) != _BLOCK + member.size
    ):
        raise ImageError(
            f"{os.fspath(member)}: is not at byte {member.offset} of the archive, which is cut off "
            f"or has changed since its index was made; copy it again, or delete "
            f"{index_of(member.archive)} to do without"
        )
    return data[_BLOCK:]


_NOT_IN_HEADERS = re.compile(r"[^\x20-\x7e]|\?")


def _bare(name: str) -> str:
    """What of a name every header says: where another holds the name itself (pax), the header has
    ``?`` or nothing for what is not ASCII."""
    return _NOT_IN_HEADERS.sub("", _plain_name(name))


# ---- what there is


def index_of(archive: str) -> str:
    """The address of the index beside an archive."""
    return f"{archive[: -len(SUFFIX)]}{INDEX_SUFFIX}"


def digest_of(content: bytes) -> str:
    """Hexadecimal blake2b of 16 bytes."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def contents_of(archive: str) -> Contents:
    """What an archive holds, by its index where it has one.

    Raises:
        DataError: there is no such archive, it is cut off or no tar, or its index does not fit it.
    """
    index = index_of(archive)
    if is_remote(archive):
        return _contents(archive, index, None)
    try:
        stat = os.stat(archive)
    except OSError as error:
        raise DataError(f"{archive}: cannot be read: {error.strerror}") from None
    try:
        of_index = os.stat(index).st_mtime_ns
    except OSError:
        of_index = 0
    return _contents(archive, index, (stat.st_size, stat.st_mtime_ns, of_index))


@lru_cache(maxsize=256)  # images are asked for an archive after another
def _contents(archive: str, index: str, stamp: tuple[int, ...] | None) -> Contents:
    try:
        content = read_file(index)
    except FileNotFoundError:
        return _scan(archive)
    try:
        return _indexed(archive, index, content, stamp[0] if stamp else size_of_archive(archive))
    except FileNotFoundError:
        raise DataError(f"{archive}: there is no such file") from None


def _indexed(archive: str, index: str, content: bytes, size: int) -> Contents:
    try:
        told = json.loads(content)
        known = int(told["bytes"])
        members = [
            Member(archive, _plain_name(str(name)), int(offset), int(length), str(digest))
            for name, offset, length, digest in told["members"]
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
    for one in members:
        if one.offset < _BLOCK or one.size < 0 or one.offset + one.size > size:
            raise DataError(
                f"{index}: says that {one.name} has {one.size} bytes from byte {one.offset} on, in "
                f"an archive of {size}; delete it to do without"
            )
    return _contents_from(members, indexed=True)


def _contents_from(listed: list[Member], *, indexed: bool) -> Contents:
    members: dict[str, Member] = {}
    repeated: list[str] = []
    for member in listed:
        if ".." in PurePosixPath(member.name).parts:
            raise DataError(f"{member.archive}: {member.name!r} would lie outside of it")
        if members.setdefault(member.name, member) is not member:
            repeated.append(member.name)
    return Contents(members, tuple(dict.fromkeys(repeated)), indexed)


def _scan(archive: str) -> Contents:
    """An archive gone through, header by header."""
    try:
        if is_remote(archive):
            with _failures_named(archive):
                system, path = _system(archive)
                with system.open(path, "rb", block_size=1 << 16) as file:
                    return _scan_open(archive, file)
        with open(archive, "rb") as file:
            return _scan_open(archive, file)
    except FileNotFoundError:
        raise DataError(f"{archive}: there is no such file") from None
    except OSError as error:
        raise DataError(f"{archive}: cannot be read: {error.strerror or error}") from None


def _scan_open(archive: str, file: IO[bytes]) -> Contents:
    listed: list[Member] = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if info.size < 0:  # would lead back to itself, again and again
                    raise tarfile.ReadError("a negative size")
                if info.isreg() and not info.issparse():
                    name = _plain_name(info.name)
                    listed.append(Member(archive, name, info.offset_data, info.size))
            end = tar.offset
        file.seek(end)
        whole = file.read(_BLOCK) == bytes(_BLOCK)
    # The others are of sizes that no machine has.
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
        if not listed:
            raise DataError(
                f"{archive}: is no tar that can be read in place ({error}); a compressed one must "
                f"be uncompressed"
            ) from None
        whole = False
    if not whole:
        last = f"after {listed[-1].name}" if listed else "before its first file"
        raise DataError(f"{archive}: is cut off or damaged {last}; copy it again")
    return _contents_from(listed, indexed=False)


def _plain_name(name: str) -> str:
    """``./a/b`` is a/b."""
    return str(PurePosixPath(name)).lstrip("/")


# ---- writing


class ArchiveWriter:
    """Writes an archive, and its index when closed; the same content gives the same bytes.

    Args:
        path: of the archive, which must end in .tar.
    """

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
        """Write the archive's end, and the index."""
        self._tar.close()
        lines = ",\n".join(json.dumps(one) for one in self._members)
        size = self._path.stat().st_size
        head = f'{{"archive": {json.dumps(self._path.name)}, "bytes": {size}, "members": [\n'
        write_atomic(index_of(str(self._path)), f"{head}{lines}\n]}}\n")
