"""Check labels and images of a data set."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from retinanet.data import archives
from retinanet.data.boxes import CLIPPED, check_box
from retinanet.data.cpus import usable_cpus
from retinanet.data.dataset import Annotation, Dataset, LabelledImage, Problem
from retinanet.data.formats.reading import ALL_FAULTY, DROPPED
from retinanet.data.image_files import (
    SIDEWAYS,
    exif_orientation,
    open_source,
    quiet,
    suffix_of,
    unidentified,
)
from retinanet.data.statistics import Statistics, count_objects
from retinanet.errors import DataError

KINDS: dict[str, str] = {
    "image-missing": "the image is missing",
    "image-unreadable": "the file is not an image, or damaged",
    "image-truncated": "the file is cut short",
    "image-extension": "the file's extension is of another format",
    "image-in-two-splits": "the same image is in two splits",
    "image-id-duplicate": "two images have one id",
    "image-duplicate": "an image is listed twice",
    "image-ambiguous": "the name in the labels fits several files",
    "image-name-encoded": "the name in the labels is percent-encoded",
    "key-duplicate": "a sample of a shard is not unique",
    "size-wrong": "the labels state another size of the image",
    "label-missing": "an image has no label file, though the format requires one",
    "label-unreadable": "a label file, or a row of it, cannot be read",
    "no-objects": "the data has no object",
    "annotation-orphan": "an object belongs to no image",
    "annotation-id-duplicate": "two objects have one id",
    "class-duplicate": "two classes have one name",
    "class-similar": "names of classes differ only in case or blanks",
    "class-unknown": "an object's class is not listed",
    "box-not-a-number": "a box is not four finite numbers",
    "box-inverted": "left and right, or top and bottom, are swapped",
    "box-empty": "a box has no width or no height",
    "box-normalised": "boxes look normalised to 0..1, where pixels are expected",
    "box-outside": "a box is outside its image, wholly or in part",
    "box-duplicate": "an object is listed twice",
    "box-rotated": "a box is rotated",
    "shape-not-box": "an object is labelled with another shape than a box",
}
"""Descriptions of the problems by kind."""

_CHUNK = 64  # images that a thread reads at a time
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}
_END_BYTES = 1024  # in which a file must end; cameras pad their files
_BEGINNING = 2**16  # bytes of files of one size that are compared first
_NAMED_IMAGES = 10  # in messages


MAX_FAULTS = 0.05
"""Share of faulty objects beyond which a warning is given."""


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """Result of opening an image file: the upright size, or the kind and reason of a failure.

    `suffix` is the extension of its content, empty if its own is right; the digests are of its
    bytes and of its pixels, empty if they were not read.
    """

    height: int | None = None
    width: int | None = None
    orientation: int = 1
    suffix: str = ""
    file_digest: str = ""
    pixel_digest: str = ""
    failure: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class CheckReport:
    """Result of :func:`check_datasets`: problems in the order of splits and images."""

    problems: tuple[Problem, ...]
    statistics: Mapping[str, Statistics]
    image_info: Mapping[Path, ImageInfo]

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of problems by kind, the most frequent first."""
        return dict(Counter(problem.kind for problem in self.problems).most_common())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "counts": self.counts,
            "problems": [{**asdict(p), "file": str(p.file)} for p in self.problems],
            "statistics": {split: asdict(found) for split, found in self.statistics.items()},
        }


def check_datasets(
    splits: Mapping[str, Dataset],
    *,
    decode: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Open every image and check every object.

    Args:
        splits: as :func:`retinanet.data.formats.read_splits` returns them; overlapping ones (VOC's
            trainval) are reported as sharing images.
        decode: decode every image, so that damage to its pixels and equal pixels in two splits are
            found. False: of JPEG and PNG files only header and end are read, some ten times faster.
        progress: called with the numbers of images done and in total.
    """
    paths = list(dict.fromkeys(i.path for dataset in splits.values() for i in dataset.images))
    image_info: dict[Path, ImageInfo] = {}
    for info in _open_all(paths, {} if decode else _shared_sizes(splits)):
        image_info[paths[len(image_info)]] = info
        if progress:
            progress(len(image_info), len(paths))
    problems: list[Problem] = []
    for dataset in splits.values():
        problems += dataset.problems
        for image in dataset.images:
            problems += _image_problems(dataset, image, image_info[image.path])
    problems += [problem for _, _, problem in in_two_splits(splits, image_info)]
    images = [image for dataset in splits.values() for image in dataset.images]
    if images and not any(image.annotations for image in images):
        source = next(iter(splits.values())).source
        reason = f"no object in {len(images)} images: the labels are empty, or were not found"
        problems.append(Problem("no-objects", source, None, reason))
    sizes = {
        path: (info.height, info.width)
        for path, info in image_info.items()
        if info.height and info.width
    }
    return CheckReport(
        tuple(dict.fromkeys(problems)),
        {name: count_objects(dataset, sizes) for name, dataset in splits.items()},
        image_info,
    )


def usable(dataset: Dataset) -> tuple[Dataset, list[Problem]]:
    """Drop what cannot be trained or evaluated on, with a problem for each. No image is opened.

    Dropped are missing images, and objects whose box is empty, inverted, not four finite numbers,
    or wholly outside the image (by the size in the labels), but not those partly outside. An image
    with labels of which none is usable is dropped too: it is no background. (Readers drop those
    whose objects all lack a class or a box.)
    """
    dropped: list[Problem] = []
    images: list[LabelledImage] = []
    for image in dataset.images:
        if not archives.is_image_file(image.path):
            dropped.append(_missing(image))
            continue
        kept: list[Annotation] = []
        for annotation in image.annotations:
            fault = check_box(annotation.box, image.width, image.height)
            if fault is None or fault[2] == CLIPPED:
                kept.append(annotation)
            else:
                dropped.append(_box_problem(dataset, image, annotation, fault))
        if image.annotations and not kept:
            dropped.append(Problem("label-unreadable", image.path, None, ALL_FAULTY, DROPPED))
            continue
        same = len(kept) == len(image.annotations)
        images.append(image if same else replace(image, annotations=tuple(kept)))
    return replace(dataset, images=tuple(images)), dropped


def fault_summary(dataset: Dataset, dropped: Sequence[Problem] = ()) -> str | None:
    """Return how many objects and images are left out, and the first; None if there are none."""
    faults = [problem for problem in dataset.problems if "dropped" in problem.fix] + [*dropped]
    if not faults:
        return None
    kept = sum(len(image.annotations) for image in dataset.images)
    share = len(faults) / (len(faults) + kept)
    first = f"{faults[0].file}: {faults[0].reason}"
    names = [str(problem.file) for problem in faults if problem.reason == ALL_FAULTY]
    more = f" and {len(names) - _NAMED_IMAGES} more" if len(names) > _NAMED_IMAGES else ""
    listed = f"; images without any usable object: {', '.join(names[:_NAMED_IMAGES])}{more}"
    return (
        f"{'warning: ' if share > MAX_FAULTS else ''}left out {len(faults)} faulty objects or "
        f"images ({share:.1%}) of {dataset.split}, the first: {first}{listed if names else ''}; "
        "see retinanet data check"
    )


# ---- images


def _open_all(paths: Sequence[Path], shared: Mapping[Path, bool]) -> Iterator[ImageInfo]:
    """Open files in threads, in order; those in `shared` without decoding, if possible."""

    def opened(chunk: Sequence[Path]) -> list[ImageInfo]:
        return [
            (_open_header(path, shared[path]) if path in shared else None) or _open(path)
            for path in chunk
        ]

    # Decoding takes long: small pieces keep the progress bar moving, and all processors busy.
    step = _CHUNK if shared else 1
    pieces = (paths[start : start + step] for start in range(0, len(paths), step))
    with ThreadPoolExecutor(usable_cpus()) as pool, quiet():
        while group := list(islice(pieces, 8 * _CHUNK // step)):
            for infos in pool.map(opened, group):
                yield from infos


def _shared_sizes(splits: Mapping[str, Dataset]) -> dict[Path, bool]:
    """Return the image files, and whether a file in another split has the same size in bytes."""
    sizes = {path: _size(path) for d in splits.values() for path in {i.path for i in d.images}}
    counts = Counter(s for d in splits.values() for s in {sizes[i.path] for i in d.images})
    return {path: counts[size] > 1 for path, size in sizes.items() if size is not None}


def _open_header(path: Path, is_shared: bool) -> ImageInfo | None:
    """Read header and end of a JPEG or PNG file; None: it must be decoded."""
    try:
        with open(path, "rb") as file, Image.open(file, formats=tuple(_ENDS)) as image:
            has_exif = image.format == "JPEG" or "exif" in image.info
            orientation = exif_orientation(image) if has_exif else 1
            width, height = image.size
            file.seek(max(0, file.seek(0, os.SEEK_END) - _END_BYTES))
            end = _ENDS.get(image.format or "")  # an MPO is opened as a JPEG
            if end is None or end not in file.read():
                return None
    except Exception:  # of Pillow on damaged files nearly anything; decoding gives the reason
        return None
    if orientation in SIDEWAYS:
        width, height = height, width
    digest = (_content(path) or "") if is_shared else ""
    return ImageInfo(height, width, orientation, _other_suffix(path, image), digest)


def _other_suffix(path: Path, image: Image.Image) -> str:
    """Return the extension of an image's format if the file's is of another one."""
    suffix = suffix_of(image.format or "")
    named = Image.registered_extensions().get(path.suffix.lower(), "")
    return suffix if named and suffix_of(named) != suffix else ""


def _open(path: Path) -> ImageInfo:
    try:
        content = archives.read_image_file(path)
    except FileNotFoundError:
        return ImageInfo(failure=("image-missing", "no such image"))
    except OSError as error:
        return ImageInfo(failure=("image-unreadable", f"cannot be read: {error.strerror or error}"))
    except DataError as error:
        return ImageInfo(failure=("image-unreadable", str(error).removeprefix(f"{path}: ")))
    digest = _digest(content)
    try:
        open_source(path)  # registers HEIC
        return _decode(path, content, digest)
    except UnidentifiedImageError:
        failure = "image-unreadable", unidentified(str(path))
    # Pillow's readers raise nearly anything on damaged files.
    except Exception as error:
        words = " ".join(str(error).split()) or type(error).__name__
        cut = any(word in words.lower() for word in ("truncated", "unexpected end", "eof"))
        failure = "image-truncated" if cut else "image-unreadable", f"cannot be decoded: {words}"
    return ImageInfo(failure=failure, file_digest=digest)


def _decode(path: Path, content: bytes, digest: str) -> ImageInfo:
    with Image.open(BytesIO(content)) as image:
        orientation = exif_orientation(image)
        image.load()
        upright = ImageOps.exif_transpose(image)
        # Compare colours, not indices into palettes.
        pixels = upright.convert("RGBA") if upright.mode == "P" else upright
        values = _digest(pixels.tobytes())
        width, height = upright.size
    return ImageInfo(
        height=height,
        width=width,
        orientation=orientation if orientation in range(1, 9) else 1,
        suffix=_other_suffix(path, image),
        file_digest=digest,
        pixel_digest=f"{pixels.mode} {pixels.size} {values}",
    )


def in_two_splits(
    splits: Mapping[str, Dataset], image_info: Mapping[Path, ImageInfo]
) -> Iterator[tuple[str, int, Problem]]:
    """Split and index of each image that another split keeps, with its problem."""
    others = [name for name in splits if name not in ("train", "val", "test")]
    first: dict[str, tuple[str, Path]] = {}
    for name in ("test", *others, "val", "train"):
        for index, image in enumerate(splits[name].images if name in splits else ()):
            info = image_info[image.path]
            key = info.pixel_digest or info.file_digest or str(image.path)
            split, path = first.setdefault(key, (name, image.path))
            if split == name:
                continue
            how = "the same file"
            if path != image.path:
                same_bytes = image_info[path].file_digest == info.file_digest
                how = f"the same {'content' if same_bytes else 'pixels'} as {path}"
            reason, fix = f"in split {name} and in split {split}: {how}", f"dropped from {name}"
            yield name, index, Problem("image-in-two-splits", image.path, None, reason, fix)


def copies_of(images: Iterable[Path], others: Iterable[Path]) -> set[Path]:
    """Return the images that are among `others`, as the same file or as a copy of it.

    Files in archives are compared by their names only.
    """
    found, among = {*images}, {*others}
    same = found & among
    found, among = (
        {path for path in group - same if archives.archive_of(path) is None}
        for group in (found, among)
    )
    beginning = partial(_content, limit=_BEGINNING)
    for key in (_size, beginning, _content):  # each for those that are equal so far
        of_found, of_among = ({path: key(path) for path in group} for group in (found, among))
        shared = {*of_found.values()} & {*of_among.values()} - {None}
        found, among = (
            {path for path, value in group.items() if value in shared}
            for group in (of_found, of_among)
        )
    return same | found


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _content(path: Path, limit: int = -1) -> str | None:
    """Return a digest of a file, or of its beginning."""
    try:
        with path.open("rb") as file:
            return _digest(file.read(limit))
    except OSError:
        return None


# ---- objects


def _image_problems(dataset: Dataset, image: LabelledImage, info: ImageInfo) -> Iterator[Problem]:
    if info.failure:
        kind, reason = info.failure
        is_missing = kind == "image-missing"
        yield _missing(image) if is_missing else Problem(kind, image.path, None, reason, DROPPED)
    if info.suffix:
        reason = f"is named {image.path.suffix}, but its content is {info.suffix[1:]}"
        yield Problem("image-extension", image.path, None, reason, f"named {info.suffix}")
    height, width = info.height, info.width
    if height is None or width is None:
        height, width = image.height, image.width
    elif (image.height or height, image.width or width) != (height, width):
        reason = (
            f"image {image.id} ({image.path.name}): the labels state {image.width} x "
            f"{image.height} (width x height), the image is {width} x {height}"
        )
        fix = "size corrected"
        if labelled_as_stored(image, info):
            reason += f" after its EXIF orientation {info.orientation}; labelled unrotated"
            fix = "size and boxes rotated"
        yield Problem("size-wrong", _label_file(image), image.id, reason, fix)
    seen: dict[tuple[object, ...], Annotation] = {}
    for annotation in image.annotations:
        fault = check_box(annotation.box, width, height)
        if fault:
            yield _box_problem(dataset, image, annotation, fault)
        elif all(0 <= side <= 1 for side in annotation.box) and (width or 2) > 1:
            fault = "box-normalised", "is under one pixel: it looks normalised to 0..1", ""
            yield _box_problem(dataset, image, annotation, fault)
        first = seen.setdefault(same_key(annotation), annotation)
        if first is not annotation:
            reason = f"repeats {_word(dataset)} {first.id}"
            yield _box_problem(dataset, image, annotation, ("box-duplicate", reason, "dropped"))


def same_key(annotation: Annotation) -> tuple[object, ...]:
    """Key that is equal for repeated objects; boxes to a hundredth of a pixel."""
    box = annotation.box
    if not all(map(math.isfinite, box)):
        return (id(annotation),)
    return (annotation.label, annotation.crowd, *(round(side, 2) for side in box))


def labelled_as_stored(image: LabelledImage, info: ImageInfo) -> bool:
    """Whether the labels are of the image before its EXIF orientation."""
    is_swapped = (image.width, image.height) == (info.height, info.width)
    return info.orientation in SIDEWAYS and is_swapped


def _missing(image: LabelledImage) -> Problem:
    count = len(image.annotations)
    if archives.is_remote(image.path) and archives.archive_of(image.path) is None:
        reason = (
            f"image {image.id} is at {archives.address_of(image.path)}, and no file of this name "
            f"is in the data; download the images into {_label_file(image).parent}"
        )
        return Problem("image-missing", _label_file(image), image.id, reason, DROPPED)
    reason = f"no such image; {_label_file(image)} gives it {count} object{'s' * (count != 1)}"
    return Problem("image-missing", image.path, None, reason, DROPPED)


def _label_file(image: LabelledImage) -> Path:
    return image.label_file or image.path


def _word(dataset: Dataset) -> str:
    return "annotation" if dataset.format in ("coco", "synthetic") else "object"


def _box_problem(
    dataset: Dataset, image: LabelledImage, annotation: Annotation, fault: tuple[str, str, str]
) -> Problem:
    kind, what, fix = fault
    # Name the image if its label file has many.
    has_many = dataset.format not in ("voc", "yolo")
    of = f" of image {image.id} ({image.path.name})" if has_many else ""
    box = ", ".join(f"{side:.6g}" for side in annotation.box)
    name = dataset.classes[annotation.label]
    reason = f"{_word(dataset)} {annotation.id}{of}: {name} box [{box}] {what}"
    return Problem(kind, _label_file(image), annotation.id, reason, fix)
