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
from retinanet.data.image_files import IMAGE_SUFFIXES, EncodedImage
from retinanet.data.images import ValueRange, read_image, read_reduced
from retinanet.data.windows import Windows, open_windows
from retinanet.errors import DataError, ImageError
from retinanet.inference.detections import Failure
from retinanet.inference.manifest import OutputFilter

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
    """List the images that `given` stands for, in order; those of folders and globs sorted by name.

    Files that an earlier detection wrote (:mod:`retinanet.inference.manifest`) are left out.

    Args:
        given: a path, a folder (with its subfolders), a ``.tar`` of images (or a folder of
            those), a glob (``**`` matches subfolders), an array (H, W, 3) or (H, W) in RGB, a
            tensor (3, H, W) or (1, H, W), a batch (B, ...) of those, a PIL image, the bytes of an
            image file, or a sequence of any of them. For types other than uint8 see
            :func:`retinanet.data.images.read_image`.

    Raises:
        DataError: a path does not exist or is such an output, a folder or a glob holds no image, or
            a type is unknown.
    """
    found = list(iter_sources(given if is_sequence(given) else [given]))
    for source in found:
        if isinstance(source, Failure):
            raise source.error
    return [source for source in found if isinstance(source, Source)]


def iter_sources(given: Iterable[Any], *, once: bool = False) -> Iterator[Source | Failure]:
    """Yield the images of each item as :func:`find_sources`; a Failure for an item without any.

    A sequence is expanded at once, so that files of the same name in two folders get different
    names by their folders; any other iterable is expanded item by item.

    Args:
        given: items as :func:`find_sources` takes them.
        once: skip files of a sequence that came before: a file named twice, or named beside its
            folder.
    """
    outputs = OutputFilter()
    if is_sequence(given):
        groups = [_expand_or_fail(item, i, outputs) for i, item in enumerate(given)]
        found = [source for group in groups for source in group]
        yield from _distinct(_without_repeats(found) if once else found)
    else:
        for i, item in enumerate(given):
            yield from _expand_or_fail(item, i, outputs)


def is_sequence(given: Any) -> bool:
    """Return whether `given` is a list of sources rather than a single source."""
    return isinstance(given, Sequence) and not isinstance(given, str | EncodedImage)


def _expand_or_fail(item: Any, index: int, outputs: OutputFilter) -> list[Source | Failure]:
    try:
        return list(_expand(item, index, outputs))
    except DataError as error:
        name = str(item) if isinstance(item, str | Path) else _name(index)
        return [Failure(name, str(error), error)]


def _expand(item: Any, index: int, outputs: OutputFilter) -> Iterator[Source]:
    if isinstance(item, Source):
        yield item
    elif isinstance(item, str | Path):
        yield from _expand_path(item, outputs)
    elif isinstance(item, Tensor | np.ndarray) and item.ndim == 4:
        yield from (Source(img, f"{_name(index)}_{i:06d}") for i, img in enumerate(item))
    elif isinstance(item, Tensor | np.ndarray | Image.Image | EncodedImage):
        yield Source(item, _name(index))
    else:
        raise DataError(
            f"cannot search a {type(item).__name__}; give a path, a folder, a glob, an array, "
            "a tensor, a PIL image, the bytes of an image file, or a list of them"
        )


def _expand_path(given: str | Path, outputs: OutputFilter) -> Iterator[Source]:
    path = Path(given)
    # What exists is never a glob, whatever brackets its name holds.
    if path.is_dir():
        images = sorted(_files_under(path, _is_image))
        files = outputs.inputs(images) or sorted(_files_under(path, _is_archive))
        if not files:
            raise DataError(
                f"{given}: no image in this folder ({_SUFFIXES}), and no .tar{_ignored(images)}"
            )
        yield from _named(files, path)
    elif _is_archive(path):
        yield from _members(path, "")
    elif archives.archive_of(path) is not None:
        yield Source(path, path.name)
    elif path.is_file():
        if outputs.is_output(path):
            raise DataError(
                f"{given}: is an output of an earlier detection; copy it out of that folder to "
                "use it as an input"
            )
        yield Source(given, path.name)
    elif glob.has_magic(str(given)):
        matches = (Path(match) for match in glob.iglob(str(given), recursive=True))
        images = sorted(
            match
            for match in matches
            if _is_archive(match) or (_is_image(match) and match.is_file())
        )
        files = outputs.inputs(images)
        if not files:
            raise DataError(f"{given}: no image matches ({_SUFFIXES}){_ignored(images)}")
        parts = path.parts
        fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        yield from _named(files, Path(*parts[:fixed]))
    else:
        raise DataError(f"{given}: there is no such file or folder")


def _ignored(outputs: Sequence[Path]) -> str:
    return f" but {len(outputs)} outputs of an earlier detection" if outputs else ""


def _named(files: Iterable[Path], folder: Path) -> Iterator[Source]:
    """Images, and those in archives, named by their paths relative to `folder`."""
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


def _name(index: int) -> str:
    return f"image_{index:06d}"
