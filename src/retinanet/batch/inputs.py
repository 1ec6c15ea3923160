"""What a collection consists of: a list of addresses, made lazily, and the images behind each."""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from retinanet.batch.store import is_address, open_files
from retinanet.data.images import IMAGE_SUFFIXES
from retinanet.errors import DataError, MissingExtraError
from retinanet.inference.detections import Failure
from retinanet.inference.sources import Source

LIST_SUFFIXES = frozenset({".txt", ".lst", ".list"})
"""Of files that name images or tar files, one a line."""

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz")
"""Of WebDataset shards."""

_SUFFIXES = ", ".join(sorted(IMAGE_SUFFIXES | set(ARCHIVE_SUFFIXES)))

# Images fetched at once from an address: what counts there is not the processor but the wait.
_FETCHES = 16

# Bytes of a tar file fetched at once: s3fs takes 50 MB unless told.
_TAR_BLOCK = 1 << 23


def is_archive(name: str) -> bool:
    """Whether `name` is that of a WebDataset shard."""
    return name.lower().endswith(ARCHIVE_SUFFIXES)


def iter_inputs(given: Iterable[str]) -> Iterator[str]:
    """Paths and addresses of the images and tar files that `given` stands for.

    In order: folders and globs by name, a folder at a time, so that a listing takes the memory of
    its largest folder. Paths stay relative where they were given so.

    Args:
        given: images, folders, globs, list files (one path or address a line) and WebDataset
            shards, with braces (``shard-{000..127}.tar``) too; on a disk or at an address.

    Raises:
        DataError: one stands for nothing, or what opens its kind of address is not installed.
        MissingExtraError: braces want braceexpand, ``hf://`` huggingface_hub, addresses fsspec.
    """
    for one in given:
        for expanded in _without_braces(one):
            yield from _expand(expanded)


def iter_images(inputs: Iterable[str], failed: Callable[[Failure], None]) -> Iterator[Source]:
    """The images of some inputs, one after the other, those of addresses fetched ahead.

    Args:
        inputs: of :func:`iter_inputs`.
        failed: told of each image that cannot be fetched, and of a tar file that is damaged.

    Yields:
        Each image under its path or address; in a tar file, that of the file and its own name.
        What is on a disk is not read yet.
    """
    with ThreadPoolExecutor(_FETCHES, thread_name_prefix="fetch-image") as pool:
        waiting: deque[Callable[[], Iterable[Source]]] = deque()
        steps = (_step(one, failed, pool) for one in inputs)
        while True:
            waiting.extend(islice(steps, 2 * _FETCHES - len(waiting)))
            if not waiting:
                return
            yield from waiting.popleft()()


def _step(
    name: str, failed: Callable[[Failure], None], pool: ThreadPoolExecutor
) -> Callable[[], Iterable[Source]]:
    """Begin to fetch an input; what is returned waits for it."""
    if is_archive(name):
        return partial(_members, name, failed)
    if not is_address(name):
        return lambda: [Source(name, name)]
    return partial(_fetched, name, pool.submit(_fetch, name), failed)


def _fetch(address: str) -> bytes:
    files, path = open_files(address)
    data: bytes = files.cat_file(path)
    return data


def _fetched(name: str, data: Future[bytes], failed: Callable[[Failure], None]) -> Iterator[Source]:
    try:
        yield Source(data.result(), name)
    except Exception as error:  # of any library of any store
        failed(_failure(name, error))


def _members(name: str, failed: Callable[[Failure], None]) -> Iterator[Source]:
    """The images in a tar file, read from its beginning to its end."""
    files, path = open_files(name)
    try:
        with _opened(files, path) as stream, tarfile.open(fileobj=stream, mode="r|*") as archive:
            for member in archive:
                if member.isfile() and _is_image(PurePosixPath(member.name)):
                    file = archive.extractfile(member)
                    assert file is not None  # it is a file
                    yield Source(file.read(), f"{name}/{member.name.removeprefix('./')}")
    except Exception as error:  # of tarfile, of a decompressor, of any store
        failed(_failure(name, error))


def _opened(files: Any, path: str) -> Any:
    return files.open(path, "rb", block_size=_TAR_BLOCK)


def _failure(name: str, error: Exception) -> Failure:
    if isinstance(error, FileNotFoundError):
        reason = "there is no such file"
    else:
        reason = f"cannot be read: {_words(error)}"
    return Failure(name, f"{name}: {reason}", error)


def _words(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _without_braces(given: str) -> list[str]:
    if "{" not in given or (not is_address(given) and os.path.exists(given)):
        return [given]
    try:
        import braceexpand
    except ImportError:
        raise MissingExtraError("braceexpand", "webdataset") from None
    return list(braceexpand.braceexpand(given))


def _expand(given: str) -> Iterator[str]:
    files, path = open_files(given)
    if not is_address(given):
        path = os.path.abspath(given)
    if not _asked(given, files.exists, path):
        # What exists is never a glob, whatever brackets its name holds.
        if not glob.has_magic(path):
            raise DataError(f"{given}: there is no such file or folder")
        yield from _some(_matches(files, given, path), f"{given}: no image matches ({_SUFFIXES})")
    elif _asked(given, files.isdir, path):
        under = (f"{given.rstrip('/')}/{rest}" for rest in _walk(files, path.rstrip("/")))
        yield from _some(under, f"{given}: no image in this folder ({_SUFFIXES})")
    elif PurePosixPath(path).suffix.lower() in LIST_SUFFIXES:
        lines = _lines(files, path)
        yield from _some(lines, f"{given}: this list is empty; one path or address a line")
    else:
        yield given


def _asked(given: str, ask: Callable[[str], bool], path: str) -> bool:
    try:
        return ask(path)
    except Exception as error:  # no key, no right, no network: each store has its own
        raise DataError(f"{given}: cannot be looked into: {_words(error)}") from None


def _some(names: Iterator[str], otherwise: str) -> Iterator[str]:
    """`names`, of which there must be one.

    Raises:
        DataError: `otherwise`.
    """
    first = next(names, None)
    if first is None:
        raise DataError(otherwise)
    yield first
    yield from names


def _lines(files: Any, path: str) -> Iterator[str]:
    with files.open(path, "rt", encoding="utf-8-sig") as file:
        yield from (name for line in file if (name := line.strip()))


def _matches(files: Any, given: str, path: str) -> Iterator[str]:
    """What a glob stands for, named as it was given."""
    from fsspec.utils import glob_translate

    pattern = re.compile(glob_translate(path))
    parts = path.split("/")
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = "/".join(parts[:fixed])
    # The given text has the same parts from the first wildcard on.
    before = "/".join(given.split("/")[: fixed - len(parts)])
    deep = None if "**" in path else len(parts) - fixed
    for rest in _walk(files, root, deep):
        if pattern.match(f"{root}/{rest}"):
            yield f"{before}/{rest}" if before or given.startswith("/") else rest


def _walk(files: Any, root: str, deep: int | None = None) -> Iterator[str]:
    """Images and tar files under a folder, relative to it; sorted, and `deep` levels at most."""
    folders, names = _listed(files, root)
    for name in sorted(names):
        if _is_input(PurePosixPath(name)):
            yield name
    if deep is None or deep > 1:
        for folder in sorted(one for one in folders if not one.startswith(".")):
            deeper = _walk(files, f"{root}/{folder}", deep and deep - 1)
            yield from (f"{folder}/{rest}" for rest in deeper)


def _listed(files: Any, folder: str) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in a folder.

    Raises:
        DataError: it cannot be listed: a part left out would be images lost without a word.
    """
    from fsspec.implementations.local import LocalFileSystem

    folders, names = [], []
    try:
        if isinstance(files, LocalFileSystem):
            with os.scandir(folder or "/") as entries:
                for entry in entries:
                    if not entry.is_dir():
                        names.append(entry.name)
                    elif not entry.is_symlink():  # which may lead back to a folder above
                        folders.append(entry.name)
        else:
            for one in files.ls(folder, detail=True):
                path = one["name"].rstrip("/")
                if path != folder:  # a store may list the mark of the folder itself
                    kind = folders if one["type"] == "directory" else names
                    kind.append(path.rpartition("/")[2])
    except Exception as error:  # no right, no network: each store has its own
        raise DataError(f"{folder}: cannot be listed: {_words(error)}") from None
    return folders, names


def _is_input(path: PurePosixPath) -> bool:
    return _is_image(path) or (is_archive(path.name) and not path.name.startswith("."))


def _is_image(path: PurePosixPath) -> bool:
    # macOS leaves ._1.jpg beside 1.jpg on foreign disks: not an image.
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
