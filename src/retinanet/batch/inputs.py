"""Inputs of a collection: paths and addresses of images and tar files, and the images in them."""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from retinanet.batch.store import is_address, open_files
from retinanet.data.image_files import IMAGE_SUFFIXES
from retinanet.errors import DataError, MissingExtraError
from retinanet.inference.detections import Failure
from retinanet.inference.manifest import OutputFilter
from retinanet.inference.sources import Source

LIST_SUFFIXES = frozenset({".txt", ".lst", ".list"})
"""Suffixes of files that list images or tar files, one per line."""

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz")
"""Suffixes of WebDataset shards."""

_SUFFIXES = ", ".join(sorted(IMAGE_SUFFIXES | set(ARCHIVE_SUFFIXES)))
_FETCHES = 16  # simultaneous reads from an address: latency counts there, not the processor
_TAR_BLOCK = 1 << 23  # bytes per read of a tar file; s3fs reads 50 MB by default


def is_archive(name: str) -> bool:
    """Return whether `name` is that of a WebDataset shard."""
    return name.lower().endswith(ARCHIVE_SUFFIXES)


def iter_inputs(given: Iterable[str]) -> Iterator[str]:
    """Yield the paths and addresses of images and tar files that `given` stands for.

    Folders and globs are sorted, folder by folder; relative paths stay relative. Outputs of an
    earlier detection are left out.

    Args:
        given: images, folders, globs, list files (a path or address per line) and WebDataset
            shards, also with braces (``shard-{000..127}.tar``); on a disk or at an address.

    Raises:
        DataError: one stands for nothing, or the package of its kind of address is not installed.
        MissingExtraError: braces need braceexpand, ``hf://`` huggingface_hub, addresses fsspec.
    """
    outputs = OutputFilter()
    for source in given:
        for expanded in _without_braces(source):
            yield from _expand(expanded, outputs)


def iter_images(inputs: Iterable[str], failed: Callable[[Failure], None]) -> Iterator[Source]:
    """Yield the images of some inputs, in order; those at addresses are fetched ahead.

    Args:
        inputs: as :func:`iter_inputs` yields them.
        failed: called for each image that cannot be fetched, and each damaged tar file.

    Yields:
        Images named by their path or address; in a tar file, by that of the file and their own
        name. Files on a disk are not read yet.
    """
    names = iter(inputs)
    with ThreadPoolExecutor(_FETCHES, thread_name_prefix="fetch-image") as pool:
        waiting: deque[tuple[str, Any]] = deque()
        while True:
            for name in islice(names, 2 * _FETCHES - len(waiting)):
                is_remote_image = is_address(name) and not is_archive(name)
                waiting.append((name, pool.submit(_fetch, name) if is_remote_image else None))
            if not waiting:
                return
            name, data = waiting.popleft()
            try:
                if is_archive(name):
                    yield from _members(name)
                else:
                    yield Source(name if data is None else data.result(), name)
            except Exception as error:  # of tarfile, of a decompressor, of any store
                missing = isinstance(error, FileNotFoundError)
                reason = "there is no such file" if missing else f"cannot be read: {_text(error)}"
                failed(Failure(name, f"{name}: {reason}", error))


def _fetch(address: str) -> bytes:
    files, path = open_files(address)
    data: bytes = files.cat_file(path)
    return data


def _members(name: str) -> Iterator[Source]:
    """Yield the images in a tar file, read from its beginning to its end."""
    files, path = open_files(name)
    with (
        files.open(path, "rb", block_size=_TAR_BLOCK) as stream,
        tarfile.open(fileobj=stream, mode="r|*") as archive,
    ):
        for member in archive:
            if member.isfile() and _is_image(PurePosixPath(member.name)):
                file = archive.extractfile(member)
                assert file is not None  # it is a file
                yield Source(file.read(), f"{name}/{member.name.removeprefix('./')}")


def _text(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _without_braces(given: str) -> list[str]:
    if "{" not in given or (not is_address(given) and os.path.exists(given)):
        return [given]
    try:
        import braceexpand
    except ImportError:
        raise MissingExtraError("braceexpand", "webdataset") from None
    return list(braceexpand.braceexpand(given))


def _expand(given: str, outputs: OutputFilter) -> Iterator[str]:
    files, path = open_files(given)
    if not is_address(given):
        path = os.path.abspath(given)
    try:
        exists, is_folder = files.exists(path), files.isdir(path)
    except Exception as error:  # no key, no right, no network: each store has its own
        raise DataError(f"{given}: cannot be accessed: {_text(error)}") from None
    if not exists:
        # An existing file is never a glob, whatever brackets its name contains.
        if not glob.has_magic(path):
            raise DataError(f"{given}: there is no such file or folder")
        found, problem = _matches(files, given, path, outputs), "no image matches"
    elif is_folder:
        prefix = given.rstrip("/")
        names = _walk(files, path.rstrip("/") or "/", outputs)
        found, problem = (f"{prefix}/{name}" for name in names), "no image in this folder"
    elif PurePosixPath(path).suffix.lower() in LIST_SUFFIXES:
        with files.open(path, "rt", encoding="utf-8-sig") as file:
            lines = [name for line in file if (name := line.strip())]
        if not lines:
            raise DataError(f"{given}: this list is empty; one path or address per line")
        yield from lines
        return
    else:
        if not is_address(given) and outputs.is_output(path):
            raise DataError(
                f"{given}: is an output of an earlier detection; copy it out of that folder to "
                "use it as an input"
            )
        yield given
        return
    first = next(found, None)
    if first is None:
        raise DataError(f"{given}: {problem} ({_SUFFIXES})")
    yield first
    yield from found


def _matches(files: Any, given: str, path: str, outputs: OutputFilter) -> Iterator[str]:
    """Yield the files that match a glob, named as it was given."""
    from fsspec.utils import glob_translate

    pattern = re.compile(glob_translate(path))
    parts = path.split("/")
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = "/".join(parts[:fixed]) or "/"
    # The given text has the same parts from the first wildcard on.
    before = "/".join(given.split("/")[: fixed - len(parts)])
    max_depth = None if "**" in path else len(parts) - fixed
    for name in _walk(files, root, outputs, max_depth):
        if pattern.match(f"{root.rstrip('/')}/{name}"):
            yield f"{before}/{name}" if before or given.startswith("/") else name


def _walk(
    files: Any, root: str, outputs: OutputFilter, max_depth: int | None = None
) -> Iterator[str]:
    """Yield images and tar files below a folder, relative to it; hidden folders are left out.

    Raises:
        DataError: a folder cannot be listed: its images would be lost silently.
    """
    from fsspec.implementations.local import LocalFileSystem

    def failed(error: Exception) -> None:
        name = getattr(error, "filename", None) or root
        raise DataError(f"{name}: cannot be listed: {_text(error)}") from None

    is_local = isinstance(files, LocalFileSystem)
    # os.walk does not follow links to folders, which may lead back to a folder above.
    walked = os.walk(root, onerror=failed) if is_local else files.walk(root, on_error=failed)
    for folder, folders, names in walked:
        below = folder.rstrip("/")[len(root.rstrip("/")) :].lstrip("/")
        for name in sorted(names):
            path = PurePosixPath(below, name)
            if not _is_image(path) and not (is_archive(name) and not name.startswith(".")):
                continue
            if not (is_local and outputs.is_output(f"{folder}/{name}")):
                yield str(path)
        kept = sorted(name for name in folders if not name.startswith("."))
        if max_depth is not None and len(PurePosixPath(below).parts) + 1 >= max_depth:
            kept = []
        if isinstance(folders, dict):  # some of fsspec's
            for name in set(folders) - set(kept):
                del folders[name]
        else:
            folders[:] = kept


def _is_image(path: PurePosixPath) -> bool:
    # macOS leaves ._1.jpg beside 1.jpg on foreign disks: not an image.
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
