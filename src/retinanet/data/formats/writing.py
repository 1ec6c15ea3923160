"""Shared parts of the writers: a new folder, names of the images, numbers as text."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Literal

from retinanet.data import archives
from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.data.formats.reading import to_text
from retinanet.data.image_files import image_size
from retinanet.errors import DataError

Placing = Literal["copy", "hardlink", "symlink"]
"""How an image gets into the new folder."""

SIDES = ("xmin", "ymin", "xmax", "ymax")
"""Names of the sides of a box in VOC and CSV."""

SHARD_SIZE = "256MB"
"""Default size of a WebDataset shard."""


@dataclass(slots=True)
class Writing:
    """A data set that is written into a folder.

    `suffixes` are new extensions of images whose own is wrong; `lost` counts what the format cannot
    hold; a WebDataset shard has at most `shard_size` samples (``1000``) or bytes (``256MB``).
    """

    splits: Mapping[str, Dataset]
    folder: Path
    placing: Placing = "copy"
    suffixes: Mapping[Path, str] = field(default_factory=dict)
    progress: Callable[[int, int], None] | None = None
    lost: Counter[str] = field(default_factory=Counter)
    shard_size: str = SHARD_SIZE
    done: int = 0

    def count_dataset_values(self, dataset: Dataset) -> None:
        """Count the values of a data set that a format without them cannot hold."""
        if dataset.extra:
            self.lost["values of the whole data set (info, licences)"] += 1

    def count_image(self) -> None:
        """Report one more image as done."""
        self.done += 1
        if self.progress:
            self.progress(self.done, sum(map(len, self.splits.values())))

    def names(self, *, together: bool, stems: bool, dot: str = ".") -> dict[str, dict[Path, str]]:
        """Return a file name for each image of each split, the image's own if it is free.

        All splits share a folder (`together`); names differ without their extensions (`stems`),
        in which `dot` replaces dots.
        """
        names: dict[str, dict[Path, str]] = {}
        taken: set[str] = set()
        chosen: dict[Path, str] = {}
        for split, dataset in self.splits.items():
            if not together:
                taken, chosen = set(), {}
            for image in dataset.images:
                if image.path not in chosen:
                    suffix = self.suffixes.get(image.path, image.path.suffix)
                    ending = "" if stems else suffix
                    chosen[image.path] = _free_stem(image.path, dot, ending, taken) + suffix
            names[split] = {image.path: chosen[image.path] for image in dataset.images}
        return names

    def place(self, names: Mapping[str, Mapping[Path, str]], layout: str) -> None:
        """Copy or link images in threads to paths such as ``images/{split}/{name}``."""
        pairs = list(
            dict.fromkeys(
                (path, self.folder / layout.format(split=split, name=name))
                for split, of_split in names.items()
                for path, name in of_split.items()
            )
        )
        for folder in {target.parent for _, target in pairs}:
            folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(8) as pool:
            for done, _ in enumerate(pool.map(self._place, pairs), start=1):
                if self.progress:
                    self.progress(done, len(pairs))

    def _place(self, pair: tuple[Path, Path]) -> None:
        source, target = pair
        member = archives.find_member(source)
        if member is not None:
            if self.placing != "copy":
                raise DataError(f"{source}: lies in an archive, so it can only be copied")
            target.write_bytes(member.read())
        elif self.placing == "copy":
            shutil.copyfile(source, target)
        elif self.placing == "hardlink":
            os.link(source.resolve(), target)
        else:
            target.symlink_to(source.resolve())


def _free_stem(path: Path, dot: str, ending: str, taken: set[str]) -> str:
    """Return the stem of a path, or a longer one that with its ending is not taken."""
    folder, own = (name.replace(".", dot) for name in (path.parent.name, path.stem))
    for stem in chain([own, f"{folder}_{own}"], (f"{own}_{number}" for number in count(2))):
        # Lower case: on many file systems A.jpg and a.jpg are one file.
        key = f"{stem}{ending}".lower()
        if key not in taken:
            break
    taken.add(key)
    return stem


def check_apart(folder: Path, sources: Iterable[Path]) -> None:
    """Raise a DataError if `folder` is, contains or is inside one of the source folders."""
    target = folder.resolve()
    for source in sources:
        origin = source.resolve()
        if target == origin or origin in target.parents or target in origin.parents:
            raise DataError(
                f"{folder}: must not be, contain or be inside the source data ({source}), which is "
                f"never modified; name another folder"
            )


@contextmanager
def new_folder(folder: Path, sources: Iterable[Path]) -> Iterator[Path]:
    """Create a temporary folder that is renamed to `folder` on success, and removed otherwise."""
    check_apart(folder, sources)
    target = folder.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{folder}: exists and is not an empty folder; name a new one")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    try:
        yield draft
        if target.exists():
            target.rmdir()
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def size_of(image: LabelledImage) -> tuple[int, int]:
    """(height, width) as the labels state them, else of the image."""
    if image.width and image.height:
        return image.height, image.width
    return image_size(image.path)


def number_text(value: float) -> str:
    """Return the shortest text of a number: 12, not 12.0."""
    return str(int(value)) if value == int(value) else repr(float(value))


def object_values(annotation: Annotation, number: int) -> dict[str, str]:
    """Return values of an object beyond class and box, as text, by COCO's and VOC's names.

    `number` is the id that a reader gives it if none is written.
    """
    area = own_area(annotation)
    return {
        **({"id": to_text(annotation.id)} if annotation.id != number else {}),
        **({"iscrowd": "1"} if annotation.crowd else {}),
        **({"difficult": "1"} if annotation.difficult else {}),
        **({"area": number_text(area)} if area is not None else {}),
    }


def own_area(annotation: Annotation) -> float | None:
    """Return the object's area if it differs from its box's; else None."""
    x1, y1, x2, y2 = annotation.box
    if annotation.area is None or abs(annotation.area - (x2 - x1) * (y2 - y1)) < 1e-6:
        return None
    return annotation.area
