"""What is wrong in a labelled data set, and how much of everything there is."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from retinanet.data import archives
from retinanet.data.dataset import Annotation, Dataset, LabelledImage, Problem
from retinanet.data.faults import CLIPPED, box_fault
from retinanet.data.loading import usable_cpus
from retinanet.data.statistics import Statistics, count_objects
from retinanet.errors import DataError

KINDS: dict[str, str] = {
    "image-missing": "the image is not there",
    "image-unreadable": "the file is no image, or damaged",
    "image-truncated": "the file ends before its image does",
    "image-extension": "the file is of another format than its name says",
    "image-in-two-splits": "the same image is in two splits",
    "image-id-duplicate": "two images have one id",
    "image-changed": "an image in a shard is not what the shard's index says",
    "index-missing": "a shard has no index, where the others have one",
    "key-duplicate": "two files of a shard would be one sample",
    "size-wrong": "the labels give the image another size than it has",
    "label-missing": "an image has no label file where its format wants one",
    "label-unreadable": "a label file, or a row of it, cannot be read",
    "annotation-orphan": "an object belongs to no image",
    "annotation-id-duplicate": "two objects have one id",
    "class-duplicate": "two classes have one name",
    "class-unknown": "an object's class is not in the list of classes",
    "box-not-a-number": "a box is not four finite numbers",
    "box-inverted": "left and right, or top and bottom, are exchanged",
    "box-empty": "a box has no width or no height",
    "box-outside": "a box lies outside its image, wholly or in part",
    "box-duplicate": "an object is there twice",
    "box-rotated": "a box is turned, and boxes here are upright",
    "shape-not-box": "an object is drawn as another shape than a box",
}
"""Every kind of problem that can be reported, in words."""

_CHUNK = 512  # images at a time: what waits for a thread stays small, however many there are


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What an image's file turned out to be.

    Attributes:
        height, width: of the upright image; None: it cannot be read.
        orientation: EXIF's, 1..8.
        suffix: the extension that its content should have; empty: its own is right.
        file_digest, pixel_digest: of its bytes and of its pixels; empty: it cannot be read.
        failure: kind and reason, where it cannot be read.
    """

    height: int | None = None
    width: int | None = None
    orientation: int = 1
    suffix: str = ""
    file_digest: bytes = b""
    pixel_digest: bytes = b""
    failure: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What :func:`check_datasets` found.

    Attributes:
        problems: in the order of splits and images.
        statistics: by split.
        image_info: what each file turned out to be.
    """

    problems: tuple[Problem, ...]
    statistics: Mapping[str, Statistics]
    image_info: Mapping[Path, ImageInfo]

    @property
    def counts(self) -> dict[str, int]:
        """Problems by kind, the most frequent first."""
        return dict(Counter(problem.kind for problem in self.problems).most_common())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "counts": self.counts,
            "problems": [{**asdict(one), "file": str(one.file)} for one in self.problems],
            "statistics": {split: asdict(one) for split, one in self.statistics.items()},
        }


def check_datasets(
    splits: Mapping[str, Dataset], *, progress: Callable[[int, int], None] | None = None
) -> CheckReport:
    """Open every image and look at every object.

    Images are decoded in as many threads as there are processors, and forgotten at once: a few
    hundred bytes of each stay in memory.

    Args:
        splits: as :func:`retinanet.data.formats.read_splits` gives them; overlapping ones (VOC's
            trainval) would be reported as sharing images.
        progress: is called with images done and in all.
    """
    paths = list(dict.fromkeys(i.path for dataset in splits.values() for i in dataset.images))
    image_info: dict[Path, ImageInfo] = {}
    for info in _open_all(paths):
        image_info[paths[len(image_info)]] = info
        if progress:
            progress(len(image_info), len(paths))
    problems: list[Problem] = []
    for dataset in splits.values():
        problems += dataset.problems
        for image in dataset.images:
            problems += _image_problems(dataset, image, image_info[image.path])
    problems += [problem for _, _, problem in in_two_splits(splits, image_info)]
    sizes = {
        p: (one.height, one.width) for p, one in image_info.items() if one.height and one.width
    }
    return CheckReport(
        tuple(dict.fromkeys(problems)),
        {name: count_objects(dataset, sizes) for name, dataset in splits.items()},
        image_info,
    )


def usable(dataset: Dataset) -> tuple[Dataset, list[Problem]]:
    """The part of a data set that can be trained and evaluated on. No image is opened.

    Left out are images whose file is not there, and objects without a size: empty, inverted, not
    a number, or wholly outside the image (by the labels' size). Boxes partly outside stay as they
    are.

    Returns:
        the data set without them (:attr:`Dataset.problems` unchanged), and what was left out and
        why.
    """
    left_out: list[Problem] = []
    images: list[LabelledImage] = []
    for image in dataset.images:
        if not archives.is_image_file(image.path):
            left_out.append(_missing(image))
            continue
        kept: list[Annotation] = []
        for annotation in image.annotations:
            fault = box_fault(annotation.box, image.width, image.height)
            if fault is None or fault[2] == CLIPPED:
                kept.append(annotation)
            else:
                left_out.append(_box_problem(dataset, image, annotation, fault))
        same = len(kept) == len(image.annotations)
        images.append(image if same else replace(image, annotations=tuple(kept)))
    return replace(dataset, images=tuple(images)), left_out


# ---- images


def _open_all(paths: Sequence[Path]) -> Iterator[ImageInfo]:
    """Each file's :class:`ImageInfo`, in order."""
    waiting = iter(paths)
    with ThreadPoolExecutor(usable_cpus()) as pool, warnings.catch_warnings():
        # Pillow warns of huge images and odd EXIF; what hinders reading is raised.
        warnings.simplefilter("ignore")
        while chunk := list(islice(waiting, _CHUNK)):
            yield from pool.map(_open, chunk)


def _open(path: Path) -> ImageInfo:
    try:
        content = archives.read_image_file(path)
        held = archives.find_member(path)
    except FileNotFoundError:
        return ImageInfo(failure=("image-missing", "no such image"))
    except OSError as error:
        return ImageInfo(failure=("image-unreadable", f"cannot be read: {error.strerror or error}"))
    except DataError as error:
        return ImageInfo(failure=("image-unreadable", str(error).removeprefix(f"{path}: ")))
    if held is not None and held.digest and held.digest != archives.digest_of(content):
        reason = "its bytes are not those that the index was made of; copy the shard again"
        return ImageInfo(failure=("image-changed", reason))
    digest = hashlib.blake2b(content, digest_size=16).digest()
    try:
        return _decode(path, content, digest)
    except UnidentifiedImageError:
        reason = f"is no image; it begins with {content[:16]!r}" if content else "is empty"
        return ImageInfo(failure=("image-unreadable", reason), file_digest=digest)
    # Pillow's readers raise nearly anything on damaged files.
    except Exception as error:
        words = " ".join(str(error).split()) or type(error).__name__
        cut = any(word in words.lower() for word in ("truncated", "unexpected end", "eof"))
        kind = "image-truncated" if cut else "image-unreadable"
        return ImageInfo(failure=(kind, f"cannot be decoded: {words}"), file_digest=digest)


def _decode(path: Path, content: bytes, digest: bytes) -> ImageInfo:
    with Image.open(BytesIO(content)) as image:
        form = image.format or ""
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        image.load()
        upright = ImageOps.exif_transpose(image)
        # Indices into palettes say nothing; colours do.
        pixels = upright.convert("RGBA") if upright.mode == "P" else upright
        total = hashlib.blake2b(f"{pixels.mode} {pixels.size}".encode(), digest_size=16)
        total.update(pixels.tobytes())
        width, height = upright.size
    named = Image.registered_extensions().get(path.suffix.lower(), "")
    same = {"MPO": "JPEG"}  # a JPEG with more images after the first
    lies = named != "" and same.get(named, named) != same.get(form, form)
    return ImageInfo(
        height=height,
        width=width,
        orientation=orientation if orientation in range(1, 9) else 1,
        suffix=_SUFFIXES.get(form, f".{form.lower()}") if lies else "",
        file_digest=digest,
        pixel_digest=total.digest(),
    )


_SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2"}


def in_two_splits(
    splits: Mapping[str, Dataset], image_info: Mapping[Path, ImageInfo]
) -> Iterator[tuple[str, int, Problem]]:
    """Split and place of each image that another split keeps, with the problem to report."""
    keeping = ["test", *(name for name in splits if name not in ("train", "val", "test"))]
    keeping += ["val", "train"]
    first: dict[bytes, tuple[str, Path]] = {}
    for name in keeping:
        for place, image in enumerate(splits[name].images if name in splits else ()):
            info = image_info[image.path]
            key = info.pixel_digest or info.file_digest or str(image.path).encode()
            split, path = first.setdefault(key, (name, image.path))
            if split == name:
                continue
            how = "the same file"
            if path != image.path:
                same_bytes = image_info[path].file_digest == info.file_digest
                how = f"the same {'content' if same_bytes else 'pixels'} as {path}"
            reason = f"in split {name} and in split {split}: {how}"
            yield (
                name,
                place,
                Problem("image-in-two-splits", image.path, None, reason, f"dropped from {name}"),
            )


# ---- objects


def _image_problems(dataset: Dataset, image: LabelledImage, info: ImageInfo) -> Iterator[Problem]:
    if info.failure:
        kind, reason = info.failure
        if kind == "image-missing":
            yield _missing(image)
        else:
            yield Problem(kind, image.path, None, reason, "the image is dropped")
    if info.suffix:
        reason = f"is named {image.path.suffix}, but its content is {info.suffix[1:]}"
        yield Problem("image-extension", image.path, None, reason, f"named {info.suffix}")
    height, width = info.height, info.width
    if height is None or width is None:
        height, width = image.height, image.width
    elif (image.height or height, image.width or width) != (height, width):
        yield _size_problem(image, info)
    seen: dict[tuple[object, ...], Annotation] = {}
    for annotation in image.annotations:
        fault = box_fault(annotation.box, width, height)
        if fault:
            yield _box_problem(dataset, image, annotation, fault)
        key = same_key(annotation)
        if key in seen:
            reason = f"repeats {_word(dataset)} {seen[key].id}"
            yield _box_problem(dataset, image, annotation, ("box-duplicate", reason, "dropped"))
        seen.setdefault(key, annotation)


def same_key(annotation: Annotation) -> tuple[object, ...]:
    """What two objects have in common where one repeats the other; to a hundredth of a pixel."""
    box = annotation.box
    if not all(map(math.isfinite, box)):
        return (id(annotation),)
    return (annotation.label, annotation.crowd, *(round(side, 2) for side in box))


def _size_problem(image: LabelledImage, info: ImageInfo) -> Problem:
    told = f"{image.path.name}: the labels say {image.width} x {image.height} (width x height)"
    reason, fix = f"{told}, the image is {info.width} x {info.height}", "size put right"
    if labelled_as_stored(image, info):
        reason += f" after its EXIF orientation {info.orientation}: it was labelled lying"
        fix = "size and boxes turned upright"
    return Problem("size-wrong", _label_file(image), f"image {image.id}", reason, fix)


def labelled_as_stored(image: LabelledImage, info: ImageInfo) -> bool:
    return info.orientation >= 5 and (image.width, image.height) == (
        info.height,
        info.width,
    )


def _missing(image: LabelledImage) -> Problem:
    count = len(image.annotations)
    reason = f"no such image; {_label_file(image)} gives it {count} object{'s' * (count != 1)}"
    return Problem("image-missing", image.path, None, reason, "the image is dropped")


def _label_file(image: LabelledImage) -> Path:
    return image.label_file or image.path


def _word(dataset: Dataset) -> str:
    return "annotation" if dataset.format in ("coco", "synthetic") else "object"


def _box_problem(
    dataset: Dataset, image: LabelledImage, annotation: Annotation, fault: tuple[str, str, str]
) -> Problem:
    kind, what, fix = fault
    # A file that labels many images does not say which one this is of.
    many = dataset.format not in ("voc", "yolo")
    of = f" of image {image.id} ({image.path.name})" if many else ""
    box = ", ".join(f"{side:.6g}" for side in annotation.box)
    name = dataset.classes[annotation.label]
    reason = f"{_word(dataset)} {annotation.id}{of}: {name} box [{box}] {what}"
    return Problem(kind, _label_file(image), annotation.id, reason, fix)
