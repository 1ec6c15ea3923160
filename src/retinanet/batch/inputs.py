"""Inputs of a collection: paths and addresses of images and tar files, and the images in them."""

from __future__ import annotations

import glob
import math
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from retinanet.data.archives import accessing, is_remote, one_line, open_files
from retinanet.data.image_files import IMAGE_SUFFIXES
from retinanet.errors import DataError, ImageError, MissingExtraError
from retinanet.inference.detections import Failure
from retinanet.inference.manifest import OutputFilter
from retinanet.inference.sources import Source, is_image_name, list_folder, match_glob

LIST_SUFFIXES = frozenset({".txt", ".lst", ".list"})
"""Suffixes of files that list images or tar files, one per line."""

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz")
"""Suffixes of WebDataset shards."""

_SUFFIXES = ", ".join(sorted(IMAGE_SUFFIXES | set(ARCHIVE_SUFFIXES)))
_TAR_BLOCK = 1 << 23  # bytes per read of a tar file; s3fs reads 50 MB by default


def is_archive(name: str) -> bool:
    """Return whether `name` is that of a WebDataset shard."""
    return name.lower().endswith(ARCHIVE_SUFFIXES)


def list_inputs(given: Iterable[str]) -> list[str]:
    """List the paths and addresses of images and tar files that `given` stands for.

    Folders and globs are sorted; relative paths stay relative. Outputs of an earlier detection are
    left out.

    Args:
        given: images, folders, globs, list files (a path or address per line) and WebDataset
            shards, also with braces (``shard-{000..127}.tar``); on a disk or at an address.
    """
    outputs = OutputFilter()
    return [
        name
        for source in given
        for expanded in _without_braces(source)
        for name in _expand(expanded, outputs)
    ]


def _without_braces(given: str) -> list[str]:
    if "{" not in given or (not is_remote(given) and os.path.exists(given)):
        return [given]
    try:
        import braceexpand
    except ImportError:
        raise MissingExtraError("braceexpand", "ray") from None
    return list(braceexpand.braceexpand(given))


def _expand(given: str, outputs: OutputFilter) -> list[str]:
    with accessing(given) as (files, path):
        exists, is_folder = files.exists(path), files.isdir(path)
        # An existing file is never a glob, whatever brackets its name contains.
        if not exists and not glob.has_magic(path):
            raise DataError(f"{given}: there is no such file or folder")
        if exists and not is_folder:
            if PurePosixPath(path).suffix.lower() in LIST_SUFFIXES:
                return _read_list(files, path, given)
            if not is_remote(given):
                outputs.check(given)
            return [given]
        if is_remote(given):
            names = _list_remote(files, path.rstrip("/"), given.rstrip("/"), is_folder)
        else:
            listed = list_folder(given) if is_folder else match_glob(given)[1]
            names = [str(file) for file in outputs.inputs(listed)]
    inputs = [name for name in names if is_image_name(name) or is_archive(name)]
    if not inputs:
        problem = "no image in this folder" if is_folder else "no image matches"
        raise DataError(f"{given}: {problem} ({_SUFFIXES})")
    return inputs


def _read_list(files: Any, path: str, given: str) -> list[str]:
    with files.open(path, "rt", encoding="utf-8-sig") as file:
        lines = [name for line in file if (name := line.strip())]
    if not lines:
        raise DataError(f"{given}: this list is empty; one path or address per line")
    return lines


def _list_remote(files: Any, path: str, given: str, is_folder: bool) -> list[str]:
    """List the addresses of the files below a folder, or those that match, without hidden ones."""
    from fsspec.utils import glob_translate

    parts = path.split("/")
    magic = [i for i, part in enumerate(parts) if glob.has_magic(part) and not is_folder]
    fixed = magic[0] if magic else len(parts)
    root = "/".join(parts[:fixed])
    # The address as given: fsspec's own has neither the user nor the host of some stores.
    prefix = given if is_folder else "/".join(given.split("/")[: fixed - len(parts)])
    depth = math.inf if is_folder or "**" in path else len(parts) - fixed
    matches = re.compile(".*" if is_folder else glob_translate(path)).match
    found = [name for name in _files_below(files, root, depth) if matches(name)]
    below = sorted((name[len(root) :].strip("/") for name in found), key=lambda n: n.split("/"))
    return [f"{prefix}/{name}" for name in below]


def _files_below(files: Any, folder: str, depth: float) -> Iterator[str]:
    # Not walk(), which omits a folder below that cannot be listed, and so its images.
    for entry in files.ls(folder, detail=True):
        name = entry["name"].rstrip("/")
        if name == folder or name.rpartition("/")[2].startswith("."):
            continue
        if entry["type"] != "directory":
            yield name
        elif depth > 1:
            yield from _files_below(files, name, depth - 1)


class RemoteSource(Source):
    """An image at an address, its name; fetched by the thread that reads it."""

    def load(self) -> bytes:
        """Fetch the image.

        Raises:
            ImageError: there is no such file, or it cannot be fetched.
        """
        files, path = open_files(self.name)
        try:
            return bytes(files.cat_file(path))
        except Exception as error:  # each store has its own
            raise ImageError(_reason(error)) from None


def iter_images(inputs: Iterable[str]) -> Iterator[Source | Failure]:
    """Yield the images of inputs, in order, and a Failure for a damaged tar file.

    Images are named by their path or address; in a tar file, by that of the file and their own
    name. Those in tar files are in memory, the others are read later.
    """
    for name in inputs:
        if is_archive(name):
            try:
                yield from _members(name)
            except Exception as error:  # of tarfile, of a decompressor, of any store
                yield Failure(name, f"{name}: {_reason(error)}", error)
        else:
            yield RemoteSource(None, name) if is_remote(name) else Source(name, name)


def _members(name: str) -> Iterator[Source]:
    """Yield the images in a tar file, read from its beginning to its end."""
    files, path = open_files(name)
    with (
        files.open(path, "rb", block_size=_TAR_BLOCK) as stream,
        tarfile.open(fileobj=stream, mode="r|*") as archive,
    ):
        for member in archive:
            if member.isfile() and is_image_name(Path(member.name)):
                file = archive.extractfile(member)
                assert file is not None  # it is a file
                yield Source(file.read(), f"{name}/{member.name.removeprefix('./')}")


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return f"cannot be read: {one_line(error)}"
