"""Find label files and images in a folder, whatever its layout. Imports no torch.

The content of a file decides, not the name of its folder. An image is found by the path in its
label: the longest tail of the path that exists in the tree, then the stem.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from retinanet.data.image_files import IMAGE_SUFFIXES
from retinanet.data.splits import split_word
from retinanet.errors import DataError

MAX_DEPTH = 12
"""Folders below the given one that are searched."""

MAX_FILES = 5_000_000
"""Files in a tree beyond which searching it is an error."""

_LABEL_FOLDER = re.compile(
    r"annot\w*|labels?(_\w*)?|xmls?|imagesets|main|bbox\w*|jsons?", re.IGNORECASE
)
_IMAGE_FOLDER = re.compile(r"images?|imgs?|photos?|jpegimages|data|dataset", re.IGNORECASE)
_MASK_FOLDER = re.compile(r"mask|segm|trimap|depth|result|predict|found|visuali", re.IGNORECASE)
RUN_FILES = frozenset({"config.toml", "run.json", "log.jsonl"})
"""Files of a training run, whose images are plots."""
_OUTPUTS = ({".retinanet-outputs"}, RUN_FILES)  # the former of a folder of detections
_MAX_CLIMB = 3
_NAMED_FILES = 3  # in descriptions; more are counted


def is_image(name: str | Path) -> bool:
    """Whether a file has an extension of an image format."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def fold(name: str) -> str:
    """Return a name for comparison: without case, accents composed (macOS decomposes them)."""
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", name).casefold()


def can_be_a_file(name: str) -> bool:
    """Whether a file may have this path: no zero byte, no part longer than file systems allow."""
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:
        return False
    parts = encoded.replace(b"\\", b"/").split(b"/")
    return b"\0" not in encoded and len(encoded) < 4096 and all(len(part) < 256 for part in parts)


def scan(folder: Path, skipped: list[Path] | None = None) -> list[Path]:
    """Return the files below a folder in order; hidden ones are left out, links are followed.

    Folders of detections and of training runs are left out, and added to `skipped`.
    """
    files: list[Path] = []
    seen: set[tuple[int, int]] = set()

    def walk(path: Path, depth: int) -> None:
        try:
            status = path.stat()
            # A folder rather than a link to it, whatever their names.
            entries = sorted(os.scandir(path), key=lambda entry: (entry.is_symlink(), entry.name))
        except OSError:
            return
        key = (status.st_dev, status.st_ino)
        if key in seen:  # a link to a folder that contains it, or a second link
            return
        seen.add(key)
        names = {entry.name for entry in entries}
        if depth and any(names >= outputs for outputs in _OUTPUTS):
            if skipped is not None:
                skipped.append(path)
            return  # the drawn images are no data
        for entry in entries:
            if entry.name.startswith("."):  # also macOS's ._NAME beside each file
                continue
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:
                continue
            if is_file:
                files.append(path / entry.name)
            elif is_folder and depth < MAX_DEPTH:
                walk(path / entry.name, depth + 1)
        if len(files) > MAX_FILES:
            raise DataError(f"{folder}: over {MAX_FILES} files; give the folder of one data set")

    walk(folder, 0)
    return files


class Match(NamedTuple):
    """An image found for a label: its file, or several that fit equally well, or none.

    `tail` counts the parts of the path in the label that the file's path ends with.
    """

    path: Path | None
    several: tuple[Path, ...] = ()
    tail: int = 0


class Tree:
    """The files below a folder, or beside a label file.

    Attributes:
        path, extras: as given; `extras` keeps values that training does not need, such as masks.
        top, files, label_files: the folder in which label files are searched, its files that are no
            images, and these or the given file.
        root, images: `top`, or above a folder of labels, and all images below.
        skipped: folders of detections and of training runs.
        memo: what a format has read to find its files, and needs again to read them.
    """

    def __init__(self, path: Path, *, extras: bool = True) -> None:
        self.path = path
        self.extras = extras
        is_folder = path.is_dir()
        self.top = self.root = path if is_folder else path.parent
        self.skipped: list[Path] = []
        files = scan(self.top, self.skipped)
        self.images = [file for file in files if is_image(file.name)]
        self.files = [file for file in files if not is_image(file.name)]
        self.label_files = self.files if is_folder else [path]
        self.memo: dict[object, Any] = {}
        self._splits: dict[Path, str] = {}
        for _ in range(_MAX_CLIMB):
            # From labels/, or labels/train/, to the folder beside them; no further.
            names = (self.root.name, self.root.parent.name)
            if self.images or not any(map(_LABEL_FOLDER.fullmatch, names)):
                break
            self.root = self.root.parent
            self.images = [file for file in scan(self.root) if is_image(file.name)]

    def with_suffix(self, *suffixes: str) -> list[Path]:
        """Return the label files with one of these lower-case suffixes."""
        return [file for suffix in suffixes for file in self._by_suffix.get(suffix, ())]

    @cached_property
    def _by_suffix(self) -> dict[str, list[Path]]:
        def suffix(file: Path) -> str:
            is_json = file.name.lower().endswith(".json.gz")
            return ".json" if is_json else file.suffix.lower()

        return _group_by(suffix, self.label_files)

    def split_of(self, file: Path, *, by_name: bool = False) -> str:
        """Return the split that the folders of a file (or its own name) indicate, or ``""``."""
        word = split_word(file.stem) if by_name else None
        folder = file.parent
        if folder not in self._splits:
            inside = (base for base in (self.top, self.root) if folder.is_relative_to(base))
            base = next(inside, folder)
            parts = reversed(folder.parts[len(base.parts) :])
            self._splits[folder] = next(filter(None, map(split_word, parts)), "")
        return word or self._splits[folder]

    def group(self, files: Iterable[Path], *, by_name: bool = False) -> dict[str, list[Path]]:
        """Group files by split; ``""`` has those without one."""
        return _group_by(partial(self.split_of, by_name=by_name), files)

    def named(self, *names: str) -> Path | None:
        """Return the first file of one of these names: in `top`, above it up to `root`, below."""
        above = [self.top, *(p for p in self.top.parents if p.is_relative_to(self.root))]
        for name in names:
            for folder in above:
                if (folder / name).is_file():
                    return folder / name
        wanted = set(map(fold, names))
        found = [file for file in self.files if fold(file.name) in wanted]
        return min(found, key=lambda file: len(file.parts), default=None)

    @cached_property
    def _by_name(self) -> dict[str, list[Path]]:
        return _group_by(lambda path: fold(path.name), self.images)

    @cached_property
    def _by_stem(self) -> dict[str, list[Path]]:
        return _group_by(lambda path: fold(path.stem), self.images)

    def has_stem(self, file: Path) -> bool:
        """Whether an image has the stem of a label file."""
        return fold(file.stem) in self._by_stem

    def find_image(
        self, names: Iterable[str], label_file: Path, split: str, *, by_stem: bool = False
    ) -> Match:
        """Find the image of a label by the paths or names in it, the first that exists.

        Folders near `label_file` are preferred; in the folder of another split than `split` the
        same name is another image. `by_stem` accepts the same stem with another extension.
        """
        paths = [PurePosixPath(name.replace("\\", "/")) for name in names]
        for path in paths:
            if by_stem:
                candidates = self._by_stem.get(fold(path.stem), [])
                candidates = candidates or self._by_stem.get(fold(path.name), [])
            else:
                direct = label_file.parent / path
                if len(path.parts) > 1 and is_image(path.name) and direct.is_file():
                    return Match(Path(os.path.normpath(direct)), tail=len(path.parts))
                candidates = self._by_name.get(fold(path.name), [])
            best = self._best(candidates, path, label_file, split)
            if len(best) == 1:
                tail = _common_tail(list(map(fold, path.parts)), list(map(fold, best[0].parts)))
                return Match(best[0], tail=tail)
            if best:
                return Match(None, tuple(best))
        return Match(None)

    @cached_property
    def _image_splits(self) -> frozenset[str]:
        return frozenset(map(self.split_of, {image.parent / "x" for image in self.images}))

    def _is_possible(self, candidate: Path, path: PurePosixPath, split: str) -> bool:
        """Whether the folders of an image do not contradict those of its label."""
        stated = {fold(part) for part in path.parts[:-1]}
        own_split = self.split_of(candidate)
        if (
            split not in ("", "trainval", own_split)
            and own_split
            and split in self._image_splits
            and own_split not in set(map(split_word, stated))
        ):
            return False
        if path.is_absolute() or ":" in path.parts[0]:
            return True  # of another machine
        stated = {p for p in stated if not _is_generic(p) and not split_word(p)} - {".", ".."}
        folders = _own_folders(candidate.parent, self.root)
        return not (stated and folders) or bool(stated & folders)

    def _best(
        self, candidates: list[Path], path: PurePosixPath, label_file: Path, split: str
    ) -> list[Path]:
        """Return the candidates that fit best; several if none is better than the others."""
        candidates = [c for c in candidates if self._is_possible(c, path, split)]
        if len(candidates) < 2:
            return candidates
        parts = list(map(fold, path.parts))
        tails = [_common_tail(parts, list(map(fold, c.parts))) for c in candidates]
        ranked: dict[tuple[int, ...], list[Path]] = defaultdict(list)
        folders = _own_folders(label_file.parent, self.root)
        for candidate, tail in zip(candidates, tails, strict=True):
            inside = candidate.parent.parts[len(self.root.parts) :]
            rank = (
                tail,
                _common_tail(list(path.parts), list(candidate.parts)),  # A.png is not a.png
                not any(map(_MASK_FOLDER.search, inside)),
                self.split_of(candidate) == split,
                candidate.parent == label_file.parent,
                len(folders & _own_folders(candidate.parent, self.root)),
                len(os.path.commonpath((candidate, label_file))),
                any(map(_IMAGE_FOLDER.fullmatch, inside)),
            )
            ranked[rank].append(candidate)
        return ranked[max(ranked)]


def _group_by(key: Callable[[Path], str], files: Iterable[Path]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    for file in files:
        groups.setdefault(key(file), []).append(file)
    return groups


def _common_tail(one: list[str], other: list[str]) -> int:
    pairs = zip(reversed(one), reversed(other), strict=False)
    return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def _own_folders(folder: Path, root: Path) -> set[str]:
    """Names of the folders below `root` that tell data apart, such as ``cam1``."""
    parts = folder.relative_to(root).parts if folder.is_relative_to(root) else ()
    return {fold(part) for part in parts if not _is_generic(part)}


def _is_generic(name: str) -> bool:
    return bool(_IMAGE_FOLDER.fullmatch(name) or _LABEL_FOLDER.fullmatch(name))


@dataclass(slots=True)
class LabelSet:
    """The label files of one format in a tree, by split, or the file that lists the splits.

    `stems()` are those of the images that they label, lower case; `notes` name what else was found
    of this format and is not read.
    """

    format: str
    files: dict[str, list[Path]]
    stems: Callable[[], frozenset[str]]
    notes: list[str] = field(default_factory=list)

    def by_split(self) -> list[tuple[str, Path]]:
        """Return each label file with its split."""
        return [(split, file) for split, group in self.files.items() for file in group]

    def describe(self, top: Path) -> str:
        """Return the label files in a few words: their number and folder, or the file."""
        files = [file for _, file in self.by_split()]
        if len(files) <= _NAMED_FILES:
            return ", ".join(relative(file, top) for file in files)
        folder = Path(os.path.commonpath([file.parent for file in files]))
        suffixes = "/".join(sorted({file.suffix.lower() for file in files}))
        where = "" if folder == top else f" in {relative(folder, top)}"
        return f"{len(files)} {suffixes} files{where}"


Item = tuple[str, tuple[tuple[float, ...], ...]]
"""The name of an image with its folder, and its boxes."""


def relative(path: Path, top: Path) -> str:
    """Return a path relative to a folder, for messages."""
    return str(path.relative_to(top)) if path.is_relative_to(top) else str(path)


def count_suffixes(files: Iterable[Path]) -> Iterator[str]:
    """Return ``12 .txt`` for each suffix of files, the most frequent first."""
    counts = Counter(file.suffix.lower() or "without suffix" for file in files)
    return (f"{number} {suffix}" for suffix, number in counts.most_common())
