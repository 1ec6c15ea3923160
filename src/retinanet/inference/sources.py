"""Sources of images: paths, folders, globs, tar archives, arrays, tensors and encoded bytes."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from torch import Tensor

from retinanet.data import archives
from retinanet.data.finder import RUN_FILES
from retinanet.data.image_files import IMAGE_SUFFIXES, EncodedImage
from retinanet.data.images import ValueRange, read_image, read_reduced
from retinanet.data.windows import Windows, open_windows
from retinanet.errors import DataError, ImageError
from retinanet.inference.detections import Failure
from retinanet.inference.manifest import OutputFilter

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"}
)
"""Lower-case suffixes of videos."""

_SUFFIXES = ", ".join(sorted(IMAGE_SUFFIXES))
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Source:
    """An input image.

    Attributes:
        image: its path, or its pixels or encoded bytes as :func:`read_image` takes them.
        name: a relative path, unique among the images of a call.
        value_range: as in :func:`read_image`.
    """

    image: Any
    name: str
    value_range: ValueRange | None = None

    def read(self) -> Tensor:
        """Read the image as (3, H, W) uint8 RGB, upright.

        Raises:
            ImageError: it cannot be read, or is no image.
        """
        return self._read(read_image)

    def read_reduced(self, shorter: int, longest: int) -> tuple[Tensor, tuple[int, int]]:
        """Call :func:`retinanet.data.images.read_reduced`.

        Raises:
            ImageError: as :meth:`read`.
        """
        return self._read(read_reduced, shorter, longest)

    def open_windows(self) -> Windows:
        """Call :func:`retinanet.data.windows.open_windows`.

        Raises:
            ImageError: as :meth:`read`.
        """
        return self._read(open_windows)

    def load(self) -> Any:
        """Return the image in a form that :func:`read_image` takes."""
        return self.image

    def _read(self, read: Callable[..., _T], *sides: int) -> _T:
        try:
            return read(self.load(), *sides, value_range=self.value_range)
        except Exception as error:
            if isinstance(self.image, str | Path):
                raise  # it names the file
            raise ImageError(f"{self.name}: {error}") from error

    def failure(self, error: Exception) -> Failure:
        """Report `error`, which reading the image raised."""
        path = str(self.image) if isinstance(self.image, str | Path) else self.name
        if is_url(path):
            path = hide_password(path)
        # Errors of libraries contain neither the image nor their own type.
        is_ours = isinstance(error, DataError)
        reason = str(error) if is_ours else f"{path}: {type(error).__name__}: {error}"
        return Failure(path, " ".join(reason.split()), error)


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image at the network's size.

    Attributes:
        pixels: (3, h, w) uint8 RGB, resized for the network.
        size: (height, width) of the original image, pixels.
        original: (3, height, width) uint8 RGB, where it was read at full size and is to be kept.
    """

    pixels: Tensor
    size: tuple[int, int]
    original: Tensor | None = None


def is_url(given: Any) -> bool:
    """Return whether `given` is an http:// or https:// address."""
    return isinstance(given, str) and given.lower().startswith(("http://", "https://"))


def is_stream(given: Any) -> bool:
    """Return whether `given` is the address of a camera in a network: rtsp:// or rtsps://."""
    return isinstance(given, str) and given.lower().startswith(("rtsp://", "rtsps://"))


def hide_password(url: str) -> str:
    """Return an address without user name and password, which end at the last @ of the host."""
    return re.sub("//[^/?#]*@", "//", url, count=1)


def is_video(given: str | Path) -> bool:
    """Return whether `given` is a video by its suffix, a stream, or the number of a camera.

    An existing file or folder is never a camera, and a folder never a video.
    """
    if is_stream(given) or is_url(given):
        return is_stream(given)
    path = Path(given)
    if str(given).isdecimal():
        return not path.exists()
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.is_dir()


def is_single(given: Any) -> bool:
    """Return whether `given` is one image: neither a list, a folder, a glob nor a batch."""
    if isinstance(given, str | Path):
        if is_url(given) or _is_archive(given):
            return is_url(given)
        return os.path.isfile(given) or not (os.path.isdir(given) or glob.has_magic(str(given)))
    if isinstance(given, Tensor | np.ndarray):
        return given.ndim != 4
    return isinstance(given, Source | Image.Image | EncodedImage)


def find_sources(given: Any) -> list[Source]:
    """List the images that `given` stands for, in order; those of folders and globs sorted by name.

    Files that an earlier detection wrote (:mod:`retinanet.inference.manifest`) are left out, and
    training runs below a folder, whose images are plots.

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
    found = []
    for source in iter_sources(given if is_sequence(given) else [given]):
        if isinstance(source, Failure):
            raise source.error
        found.append(source)
    return found


def iter_sources(given: Iterable[Any], *, once: bool = False) -> Iterator[Source | Failure]:
    """Yield the images of each item as :func:`find_sources`; a Failure for an item without any.

    A sequence is expanded at once, so that files of the same name in two folders get different
    names by their folders; any other iterable is expanded item by item.

    Args:
        given: items as :func:`find_sources` takes them; a Failure is yielded as it is.
        once: leave out files of a sequence that came before.
    """
    outputs = OutputFilter()
    found = (source for i, item in enumerate(given) for source in _expand_or_fail(item, i, outputs))
    if is_sequence(given):
        yield from _distinct(_without_repeats(found) if once else list(found))
    else:
        yield from found


def is_sequence(given: Any) -> bool:
    """Return whether `given` is a list of sources rather than a single source."""
    return isinstance(given, Sequence) and not isinstance(given, str | EncodedImage)


def is_image_name(name: str | Path) -> bool:
    """Return whether a file is an image by its suffix, and not hidden.

    macOS writes ``._1.jpg`` beside ``1.jpg`` on foreign disks.
    """
    path = Path(name)
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def list_folder(folder: str | Path) -> list[Path]:
    """List the files below a folder, sorted, without hidden ones and what links to folders lead to.

    Training runs below it are left out: their images are plots.
    """

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be listed: {error.strerror}") from None

    return _walk(folder, None, fail, skip_runs=True)


def match_glob(pattern: str | Path) -> tuple[Path, list[Path]]:
    """Return the folder before the first wildcard, and the matching files, without hidden ones."""
    from fsspec.utils import glob_translate  # as for addresses; unlike glob, without links' loops

    parts = Path(pattern).parts
    fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:fixed])
    depth = None if "**" in parts else len(parts) - fixed
    try:
        matches = re.compile(glob_translate(Path(*parts[fixed:]).as_posix())).match
    except ValueError as error:
        raise DataError(f"{pattern}: invalid glob: {error}") from None
    files = _walk(root, depth) if root.is_dir() else []
    return root, [file for file in files if matches(file.relative_to(root).as_posix())]


def _walk(
    folder: str | Path,
    depth: int | None,
    onerror: Callable[[OSError], None] | None = None,
    *,
    skip_runs: bool = False,
) -> list[Path]:
    found: list[Path] = []
    for where, folders, names in os.walk(folder, onerror=onerror):
        level = len(Path(where).relative_to(folder).parts) + 1
        if skip_runs and level > 1 and {*names} >= RUN_FILES:
            folders.clear()
            continue
        deeper = depth is None or level < depth
        folders[:] = [name for name in folders if deeper and not name.startswith(".")]
        found += [Path(where, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _expand_or_fail(item: Any, index: int, outputs: OutputFilter) -> list[Source] | list[Failure]:
    if isinstance(item, Failure):
        return [item]
    try:
        return list(_expand(item, f"image_{index:06d}", outputs))
    except DataError as error:
        name = str(item) if isinstance(item, str | Path) else f"image_{index:06d}"
        return [Failure(name, str(error), error)]


def _expand(item: Any, name: str, outputs: OutputFilter) -> Iterator[Source]:
    if isinstance(item, Source):
        yield item
    elif is_stream(item) or is_url(item):
        raise DataError(_why_no_address(item))
    elif isinstance(item, str | Path):
        yield from _expand_path(item, outputs)
    elif isinstance(item, Tensor | np.ndarray) and item.ndim == 4:
        yield from (Source(image, f"{name}_{i:06d}") for i, image in enumerate(item))
    elif isinstance(item, Tensor | np.ndarray | Image.Image | EncodedImage):
        yield Source(item, name)
    else:
        raise DataError(
            f"unknown type of source: {type(item).__name__}; give a path, a folder, a glob, an "
            "array, a tensor, a PIL image, the bytes of an image file, or a list of them"
        )


def _why_no_address(address: str) -> str:
    shown = hide_password(address)
    if is_stream(address) or Path(urlsplit(address).path).suffix.lower() in VIDEO_SUFFIXES:
        return f"{shown}: no image; videos are files, cameras and rtsp:// streams (detect)"
    return (
        f"{shown}: addresses are not fetched by default; give --allow-urls, or in Python "
        "retinanet.inference.UrlSource.of(url)"
    )


def _expand_path(given: str | Path, outputs: OutputFilter) -> Iterator[Source]:
    path = Path(given)
    # An existing file is never a glob, whatever brackets its name contains.
    if path.is_dir():
        root, files, problem = path, list_folder(path), "no image in this folder"
        images = [file for file in files if is_image_name(file)]
        inputs = outputs.inputs(images) or [file for file in files if _is_archive(file)]
    elif _is_archive(path):
        yield from _members(path, "")
        return
    elif archives.archive_of(path) is not None:
        yield Source(path, path.name)
        return
    elif path.is_file():
        outputs.check(path)
        yield Source(given, path.name)
        return
    elif glob.has_magic(str(given)):
        root, files = match_glob(path)
        problem = "no image matches"
        images = [file for file in files if is_image_name(file) or _is_archive(file)]
        inputs = outputs.inputs(images)
    else:
        raise DataError(f"{given}: there is no such file or folder")
    if not inputs:
        ignored = f" but {len(images)} outputs of an earlier detection" if images else ""
        raise DataError(f"{given}: {problem} ({_SUFFIXES}), and no .tar{ignored}")
    for file in inputs:
        name = file.relative_to(root).as_posix()
        if _is_archive(file):
            yield from _members(file, f"{name}/")
        else:
            yield Source(file, name)


def _members(archive: Path, prefix: str) -> Iterator[Source]:
    """Yield the images of a tar file, in its order."""
    members = archives.members_of(archives.address_of(archive))
    names = [name for name in members if is_image_name(name)]
    if not names:
        raise DataError(f"{archive}: no image in this archive ({_SUFFIXES})")
    yield from (Source(archive / name, f"{prefix}{name}") for name in names)


def _is_archive(given: str | Path) -> bool:
    path = Path(given)
    if path.suffix.lower() != archives.SUFFIX or path.name.startswith("."):
        return False
    return archives.is_remote(path) or path.is_file()


def _file_of(source: Source | Failure) -> str | None:
    """Return the absolute path of a source that is a file, or the address of one that has one."""
    image = source.image if isinstance(source, Source) else None
    if not isinstance(image, str | Path):
        return None
    return str(image) if is_url(image) else os.path.abspath(image)


def _without_repeats(found: Iterable[Source | Failure]) -> list[Source | Failure]:
    first: dict[str | int, Source | Failure] = {}
    for source in found:
        first.setdefault(_file_of(source) or id(source), source)
    return list(first.values())


def _distinct(found: list[Source | Failure]) -> list[Source | Failure]:
    """Return the same sources; where names repeat, files are named from their common folder."""
    names = [source.name.casefold() for source in found if isinstance(source, Source)]
    files = {
        i: file for i, source in enumerate(found) if (file := _file_of(source)) and not is_url(file)
    }
    if len(set(names)) == len(names) or not files:
        return found
    try:
        root = os.path.commonpath({os.path.dirname(file) for file in files.values()})
    except ValueError:  # on two drives: the writers number the files
        return found
    return [
        replace(source, name=Path(os.path.relpath(files[i], root)).as_posix())
        if isinstance(source, Source) and i in files
        else source
        for i, source in enumerate(found)
    ]
