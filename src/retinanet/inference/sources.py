"""What a person points the detector at, as single images: paths, folders, globs, pixels."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from torch import Tensor

from retinanet.data import archives
from retinanet.data.images import (
    IMAGE_SUFFIXES,
    EncodedImage,
    ValueRange,
    read_image,
    read_reduced,
)
from retinanet.data.windows import Windows, open_windows
from retinanet.errors import DataError, ImageError
from retinanet.inference.detections import Failure

_SUFFIXES = ", ".join(sorted(IMAGE_SUFFIXES))


_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Source:
    """One image to search.

    Attributes:
        image: its path, or its pixels or encoded bytes in a form that :meth:`read` takes.
        name: a relative path that no other image of the same call has.
        value_range: the values of black and of full intensity, as in
            :func:`retinanet.data.images.read_image`.
    """

    image: Any
    name: str
    value_range: ValueRange | None = None

    def read(self) -> Tensor:
        """The image, (3, H, W) uint8 RGB, upright.

        Raises:
            ImageError: it cannot be read, or is no image.
        """
        return self._read(read_image)

    def read_reduced(self, shorter: int, longest: int) -> tuple[Tensor, tuple[int, int]]:
        """As :func:`retinanet.data.images.read_reduced`: for a resize, and the whole's size.

        Raises:
            ImageError: as in :meth:`read`.
        """
        return self._read(read_reduced, shorter, longest)

    def open_windows(self) -> Windows:
        """As :func:`retinanet.data.windows.open_windows`: to read parts of the image.

        Raises:
            ImageError: as in :meth:`read`.
        """
        return self._read(open_windows)

    def _read(self, read: Callable[..., _T], *sides: int) -> _T:
        if isinstance(self.image, str | Path):
            # Errors name the file.
            return read(self.image, *sides, value_range=self.value_range)
        try:
            return read(self.image, *sides, value_range=self.value_range)
        except Exception as error:  # such as an array of objects
            raise ImageError(f"{self.name}: {error}") from error

    def failure(self, error: Exception) -> Failure:
        """That reading or searching it raised `error`."""
        path = str(self.image) if isinstance(self.image, str | Path) else self.name
        # Our own errors name the image; those of the libraries below say neither that nor what
        # they are.
        own = isinstance(error, DataError)
        reason = str(error) if own else f"{path}: {type(error).__name__}: {error}"
        return Failure(path, " ".join(reason.split()), error)


VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"}
)
"""Lower-case suffixes of files that are searched frame by frame."""


def is_video(given: str | Path) -> bool:
    """Whether `given` names a video by its suffix, or a camera by its number.

    What is there is a file or a folder, whatever digits its name has; so is a folder named like a
    video.
    """
    path = Path(given)
    if str(given).isdecimal():
        return not path.exists()
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.is_dir()


def is_single(given: Any) -> bool:
    """Whether `given` is one image rather than several: neither list, folder, glob nor batch."""
    if isinstance(given, str | Path):
        if _is_archive(given):
            return False
        return os.path.isfile(given) or not (os.path.isdir(given) or glob.has_magic(str(given)))
    if isinstance(given, Tensor | np.ndarray):
        return given.ndim != 4
    return isinstance(given, Source | Image.Image | EncodedImage)


def find_sources(given: Any) -> list[Source]:
    """The images that `given` stands for, in order; those of folders and globs sorted by name.

    Args:
        given: a path, a folder (with its subfolders), a ``.tar`` of images (or a folder of
            those), a glob (``**`` goes into subfolders), an array (H, W, 3) or (H, W) in RGB, a
            tensor (3, H, W) or (1, H, W), a batch (B, ...) of those, a PIL image, the bytes of a
            image file, or a sequence of any of them. For types other than uint8 see
            :func:`retinanet.data.images.read_image`.

    Raises:
        DataError: a path does not exist, a folder or a glob holds no image, or a type is unknown.
    """
    found = list(iter_sources(given if is_sequence(given) else [given]))
    for one in found:
        if isinstance(one, Failure):
            raise one.error
    return [one for one in found if isinstance(one, Source)]


def iter_sources(given: Iterable[Any], *, once: bool = False) -> Iterator[Source | Failure]:
    """As :func:`find_sources` of each item, where one that stands for no image is a Failure.

    A sequence is looked through at once, so that files of the same name in two folders can be told
    apart by the folders; anything else is looked at an item at a time.

    Args:
        given: what to search.
        once: leave out files of a sequence that were there before: a file named twice, or named
            beside the folder that it is in.
    """
    if is_sequence(given):
        groups = [_expand_or_fail(item, i) for i, item in enumerate(given)]
        found = [one for group in groups for one in group]
        yield from _distinct(_without_repeats(found) if once else found)
    else:
        for i, item in enumerate(given):
            yield from _expand_or_fail(item, i)


def is_sequence(given: Any) -> bool:
    """Whether `given` is a list of things to search, rather than one thing."""
    return isinstance(given, Sequence) and not isinstance(given, str | EncodedImage)


def _expand_or_fail(item: Any, place: int) -> list[Source | Failure]:
    try:
        return list(_expand(item, place))
    except DataError as error:
        name = str(item) if isinstance(item, str | Path) else _name(place)
        return [Failure(name, str(error), error)]


def _expand(item: Any, place: int) -> Iterator[Source]:
    if isinstance(item, Source):
        yield item
    elif isinstance(item, str | Path):
        yield from _expand_path(item)
    elif isinstance(item, Tensor | np.ndarray) and item.ndim == 4:
        yield from (Source(one, f"{_name(place)}_{i:06d}") for i, one in enumerate(item))
    elif isinstance(item, Tensor | np.ndarray | Image.Image | EncodedImage):
        yield Source(item, _name(place))
    else:
        raise DataError(
            f"cannot search a {type(item).__name__}; give a path, a folder, a glob, an array, "
            "a tensor, a PIL image, the bytes of an image file, or a list of them"
        )


def _expand_path(given: str | Path) -> Iterator[Source]:
    path = Path(given)
    # What exists is never a glob, whatever brackets its name holds.
    if path.is_dir():
        files = sorted(_files_under(path, _is_image)) or sorted(_files_under(path, _is_archive))
        if not files:
            raise DataError(f"{given}: no image in this folder ({_SUFFIXES}), and no .tar")
        yield from _named(files, path)
    elif _is_archive(path):
        yield from _members(path, "")
    elif archives.archive_of(path) is not None:
        yield Source(path, path.name)
    elif path.is_file():
        yield Source(given, path.name)
    elif glob.has_magic(str(given)):
        matches = (Path(match) for match in glob.iglob(str(given), recursive=True))
        files = sorted(
            match
            for match in matches
            if _is_archive(match) or (_is_image(match) and match.is_file())
        )
        if not files:
            raise DataError(f"{given}: no image matches ({_SUFFIXES})")
        parts = path.parts
        fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        yield from _named(files, Path(*parts[:fixed]))
    else:
        raise DataError(f"{given}: there is no such file or folder")


def _named(files: Iterable[Path], folder: Path) -> Iterator[Source]:
    """Images, and those in archives, by their places under `folder`."""
    for file in files:
        name = file.relative_to(folder).as_posix()
        if _is_archive(file):
            yield from _members(file, f"{name}/")
        else:
            yield Source(file, name)


def _members(archive: Path, before: str) -> Iterator[Source]:
    """The images of a tar, in its order."""
    names = [
        name
        for name in archives.contents_of(archives.address_of(archive)).members
        if _is_image(Path(name))
    ]
    if not names:
        raise DataError(f"{archive}: no image in this archive ({_SUFFIXES})")
    yield from (Source(archive / name, f"{before}{name}") for name in names)


def _is_archive(given: str | Path) -> bool:
    path = Path(given)
    if path.suffix.lower() != archives.SUFFIX or path.name.startswith("."):
        return False
    return archives.is_remote(path) or path.is_file()


def _files_under(folder: Path, wanted: Callable[[Path], bool]) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = (Path(where, name) for name in names)
        yield from (file for file in files if wanted(file))


def _is_image(file: Path) -> bool:
    # macOS leaves ._1.jpg beside 1.jpg on foreign disks: not an image.
    return file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")


def _without_repeats(found: list[Source | Failure]) -> list[Source | Failure]:
    kept, seen = [], set()
    for one in found:
        if isinstance(one, Source) and isinstance(one.image, str | Path):
            file = os.path.abspath(one.image)
            if file in seen:
                continue
            seen.add(file)
        kept.append(one)
    return kept


def _distinct(found: list[Source | Failure]) -> list[Source | Failure]:
    """The same sources; if two share a name, files are named by their path from where all lie."""
    names = [one.name.casefold() for one in found if isinstance(one, Source)]
    if len(set(names)) == len(names):
        return found
    files = {
        i: os.path.abspath(one.image)
        for i, one in enumerate(found)
        if isinstance(one, Source) and isinstance(one.image, str | Path)
    }
    try:
        root = os.path.commonpath({os.path.dirname(file) for file in files.values()})
    except ValueError:  # two drives, or no file at all: whoever writes files numbers them
        return found
    return [
        replace(one, name=Path(os.path.relpath(files[i], root)).as_posix())
        if isinstance(one, Source) and i in files
        else one
        for i, one in enumerate(found)
    ]


def _name(place: int) -> str:
    return f"image_{place:06d}"
