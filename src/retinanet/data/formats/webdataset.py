"""WebDataset: tar shards with ``KEY.jpg`` and ``KEY.json`` per image.

Source: https://github.com/webdataset/webdataset (files of one key are one sample; a key ends at the
first dot of the file's name).

``KEY.json`` is ``{"width": 640, "height": 480, "objects": [{"class": "cat", "box": [x1, y1, x2,
y2]}]}``, boxes in pixels of the upright image; only ``objects`` is required.
``retinanet.json`` next to the shards lists the classes and splits; shards without it are read too,
with the classes that their objects name.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from retinanet.data import archives
from retinanet.data.dataset import Annotation, Dataset, LabelledImage, Problem
from retinanet.data.formats.labels import (
    JSON_TEXT,
    ClassList,
    is_image,
    merge_classes,
    short,
    to_flag,
    to_number,
)
from retinanet.data.formats.writing import Writing, size_of
from retinanet.data.splits import split_word
from retinanet.errors import ConfigError, DataError
from retinanet.files import write_atomic

LOOKED_FOR = "WebDataset: uncompressed .tar shards with KEY.jpg and KEY.json"

CATALOGUE = "retinanet.json"
"""File next to the shards: classes, and the shards of each split."""

_LAYOUT = "retinanet-webdataset"
_VERSION = 1
_KEY = re.compile(r"((?:.*/)?[^./][^/.]*)\.([^/]+)")
_NUMBER = re.compile(r"[-_.]?[0-9]+$")
_SHARD_SIZE = re.compile(r"([0-9]+)(?:(\.[0-9]+)? ?(KB|MB|GB))?", re.IGNORECASE)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_IN_WORDS = '{"objects": [{"class": "cat", "box": [x1, y1, x2, y2]}]}'


@dataclass(frozen=True, slots=True)
class _Catalogue:
    """Content of ``retinanet.json``, or what was found without it.

    Attributes:
        classes, category_ids: of all splits; None: those that the objects name.
        shards: addresses by split.
        extra: values of the whole data set, by split.
        file: its address; None if there is none.
    """

    classes: tuple[str, ...] | None
    category_ids: tuple[int, ...]
    shards: Mapping[str, list[str]]
    extra: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    file: str | None = None


def is_webdataset(path: Path) -> bool:
    """Whether `path` is a shard or a folder of shards, here or at an fsspec address."""
    address = archives.address_of(path)
    if _is_shard(address):
        return True
    if CATALOGUE in archives.list_names(address):
        return _load_catalogue(f"{address}/{CATALOGUE}") is not None
    shards = [shard for split in _find_shards(address).values() for shard in split]
    return bool(shards) and (archives.is_remote(address) or _begins_with_a_sample(shards[0]))


def read_webdataset(path: Path, *, extras: bool = True) -> dict[str, Callable[[], Dataset]]:
    """Read a folder of shards, or a single shard; each split's data set is read when called.

    Images are not unpacked: ``train-000000.tar/KEY.jpg`` is their path.

    Args:
        path: the folder or the ``.tar``, or an fsspec address of either.
        extras: keep other values of objects and images.

    Raises:
        DataError: a shard is missing, cut off or differs from its index, ``retinanet.json`` is
            broken, or no sample has the layout.
    """
    catalogue = _catalogue(archives.address_of(path))
    if catalogue.classes is None:
        names, category_ids = _named_classes(catalogue.shards)
    else:
        names, category_ids = catalogue.classes, catalogue.category_ids
    pairs = zip(category_ids, names, strict=True)
    classes = merge_classes(pairs, Path(catalogue.file or path))

    return {
        split: partial(_read_split, catalogue, split, classes, path, extras)
        for split in catalogue.shards
    }


# ---- shards


def _is_shard(address: str) -> bool:
    """Whether it is a tar, rather than a folder of such a name."""
    return address.lower().endswith(archives.SUFFIX) and (
        archives.is_remote(address) or os.path.isfile(address)
    )


def _catalogue(address: str) -> _Catalogue:
    """Return the catalogue of a folder or a single shard."""
    single = _is_shard(address)
    folder, _, name = address.rpartition("/") if single else (address, "", "")
    if single and not archives.is_remote(address):
        folder = os.path.dirname(address) or "."
        name = os.path.basename(address)
    file = f"{folder}/{CATALOGUE}"
    content = _load_catalogue(file)
    if content is None:
        return _Catalogue(
            None, (), {_split_of(name): [address]} if single else _find_shards(folder)
        )
    try:
        classes = tuple(str(name) for name in content["classes"])
        category_ids = tuple(int(id_) for id_ in content["category_ids"])
        splits = content["splits"].items()
        listed = {str(k): [str(shard) for shard in v["shards"]] for k, v in splits}
        extra = {str(split): dict(v.get("extra", {})) for split, v in splits}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{file}: is broken ({type(error).__name__}: {error}); delete it to read the shards "
            f"without"
        ) from None
    if len(set(category_ids)) != len(classes) or len(category_ids) != len(classes):
        raise DataError(f"{file}: has {len(classes)} classes and category_ids {category_ids}")
    known = {shard for shards in listed.values() for shard in shards}
    names = archives.list_names(folder)
    present = {other for other in names if other.lower().endswith(archives.SUFFIX)}
    for shard in sorted(known ^ present):
        what = "is missing, though listed in" if shard in known else "is not listed in"
        raise DataError(
            f"{folder}/{shard}: {what} {file}; copy all shards of the data set, or delete "
            f"{CATALOGUE} to read those that are present"
        )
    if single and name not in known:
        raise DataError(f"{address}: there is no such file")
    if single:
        listed = {split: [name] for split, shards in listed.items() if name in shards}
    shards = {k: [f"{folder}/{shard}" for shard in of_split] for k, of_split in listed.items()}
    return _Catalogue(classes, category_ids, shards, extra, file)


def _load_catalogue(file: str) -> dict[str, Any] | None:
    """Its content; None if it does not exist or is another program's.

    Raises:
        DataError: it is of a later version of this package.
    """
    try:
        content = json.loads(archives.read_file(file))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("layout") != _LAYOUT:
        return None
    if content.get("version") != _VERSION:
        raise DataError(
            f"{file}: has version {content.get('version')!r} of the layout, and this retinanet "
            f"reads {_VERSION}; update it"
        )
    return content


def _find_shards(address: str) -> dict[str, list[str]]:
    """Shards by split: ``train-000000.tar`` here, or any in a folder ``train``."""
    found: dict[str, list[str]] = {}
    names = archives.list_names(address)
    for name in names:
        if name.lower().endswith(archives.SUFFIX):
            found.setdefault(_split_of(name), []).append(f"{address}/{name}")
    for name in names:
        word = split_word(name)
        if word and not PurePosixPath(name).suffix:
            inside = archives.list_names(f"{address}/{name}")
            shards = [shard for shard in inside if shard.lower().endswith(archives.SUFFIX)]
            if shards:
                found.setdefault(word, []).extend(f"{address}/{name}/{shard}" for shard in shards)
    if len(found) == 1:
        ((name, shards),) = found.items()
        return {split_word(name) or "": shards}
    return found


def _split_of(name: str) -> str:
    stem = _NUMBER.sub("", PurePosixPath(name).stem)
    return split_word(stem) or stem


def _begins_with_a_sample(archive: str) -> bool:
    """Whether the first files of a tar share a key, and one is an image."""
    import tarfile

    names: list[str] = []
    try:
        with tarfile.open(archive, "r:") as tar:
            for info in tar:
                if info.isreg() and _KEY.fullmatch(info.name):
                    names.append(info.name)
                if len(names) == 2:
                    break
    except (OSError, tarfile.TarError, ValueError, OverflowError, MemoryError):
        return False
    keys = {found.group(1) for name in names if (found := _KEY.fullmatch(name))}
    return len(names) == 2 and len(keys) == 1 and any(map(is_image, names))


# ---- samples


@dataclass(frozen=True, slots=True)
class _Sample:
    """The two files of an image, as paths into the shard, and the parsed labels."""

    key: str
    image: Path
    label: Path
    content: dict[str, Any]


def _samples(archive: str, problems: list[Problem]) -> Iterator[_Sample]:
    """Return the samples of a shard whose labels can be read, in order."""
    contents = archives.contents_of(archive)
    for name in contents.repeated:
        reason = "occurs more than once in its shard; the first is read"
        problems.append(
            Problem("key-duplicate", _path(archive, name), None, reason, "the later are dropped")
        )
    files: dict[str, dict[str, str]] = {}
    for name in contents.members:
        if found := _KEY.fullmatch(name):
            files.setdefault(found.group(1), {})[found.group(2).lower()] = name
    pairs: list[tuple[str, str, str]] = []
    for key, of_key in files.items():
        images = [name for end, name in of_key.items() if "." not in end and is_image(name)]
        label = of_key.get("json")
        if len(images) == 1 and label is not None:
            pairs.append((key, images[0], label))
        elif len(images) > 1:
            reason = f"key {key!r} has {len(images)} images: {', '.join(sorted(images))}"
            problems.append(
                Problem("key-duplicate", _path(archive, images[0]), None, reason, _DROPPED)
            )
        elif images:
            reason = f"key {key!r} has no .json, not even one without objects"
            problems.append(
                Problem("label-missing", _path(archive, images[0]), None, reason, _DROPPED)
            )
        elif label is not None:
            reason = f"key {key!r} has labels and no image"
            problems.append(
                Problem("image-missing", _path(archive, label), None, reason, "dropped")
            )
    labels = archives.read_members([contents.members[label] for _, _, label in pairs])
    for (key, image, label), text in zip(pairs, labels, strict=True):
        content, reason = _parsed(text)
        if content is None:
            problems.append(
                Problem("label-unreadable", _path(archive, label), None, reason, _DROPPED)
            )
        else:
            yield _Sample(key, _path(archive, image), _path(archive, label), content)


_DROPPED = "the image is dropped"


def _path(archive: str, name: str) -> Path:
    return Path(f"{archive}/{name}")


def _parsed(text: bytes) -> tuple[dict[str, Any] | None, str]:
    """Return the content of a ``KEY.json``; or None and what is wrong with it."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {error}"
    if not isinstance(content, dict) or not isinstance(content.get("objects"), list):
        held = f"keys {sorted(content)[:8]}" if isinstance(content, dict) else short(content)
        return None, f'has no list "objects" but {held}; {_IN_WORDS} is read'
    if not isinstance(content.get("extra", {}), dict):
        return None, f'"extra" is no object but {short(content["extra"])}'
    for side in ("width", "height"):
        value = content.get(side)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            return None, f'"{side}" is not a whole number but {short(value)}'
    if not isinstance(content.get("id", 0), int | str):
        return None, f'"id" is neither number nor text but {short(content["id"])}'
    return content, ""


def _named_classes(
    shards: Mapping[str, Iterable[str]],
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return the classes that the objects of all shards name, by their ids, else by name from 1."""
    ids: dict[str, int | None] = {}
    for archive in (shard for split in shards.values() for shard in split):
        for sample in _samples(archive, []):
            for item in sample.content["objects"]:
                name = item.get("class") if isinstance(item, dict) else None
                if not isinstance(name, str):
                    continue
                id_ = item.get("category_id")
                id_ = id_ if isinstance(id_, int) and not isinstance(id_, bool) else None
                if ids.setdefault(name, id_) != id_:
                    raise DataError(
                        f"{sample.label}: class {name!r} has the category_id {id_}, and "
                        f"{ids[name]} in another sample; give each class one id, or none"
                    )
    known = {id_: name for name, id_ in ids.items() if id_ is not None}
    if len(known) == len(ids):
        return tuple(known[id_] for id_ in sorted(known)), tuple(sorted(known))
    names = tuple(sorted(ids))
    return names, tuple(range(1, len(names) + 1))


def _read_split(
    catalogue: _Catalogue,
    split: str,
    classes: ClassList,
    source: Path,
    extras: bool,
) -> Dataset:
    problems = list(classes.problems)
    images: dict[int | str, LabelledImage] = {}
    for archive in catalogue.shards[split]:
        if catalogue.file is not None and not archives.contents_of(archive).indexed:
            index = Path(archives.index_of(archive)).name
            reason = f"its index {index} is missing; its headers were read instead"
            problems.append(Problem("index-missing", Path(archive), None, reason, "created"))
        for sample in _samples(archive, problems):
            annotations = tuple(_objects(sample, classes, problems, extras))
            content = sample.content
            id_ = content.get("id", sample.key)
            if id_ in images and "id" not in content:
                # Other programs' keys may restart in each shard.
                id_ = f"{PurePosixPath(archive).stem}/{sample.key}"
            if id_ in images:
                reason = f"image id {id_} belongs to {images[id_].path} too; results refer to it"
                problems.append(Problem("image-id-duplicate", sample.label, id_, reason, _DROPPED))
                continue
            images[id_] = LabelledImage(
                path=sample.image,
                id=id_,
                annotations=annotations,
                width=content.get("width"),
                height=content.get("height"),
                label_file=sample.label,
                extra=content.get("extra", {}) if extras else {},
            )
    unread = [p for p in problems if p.kind not in ("index-missing", "class-duplicate")]
    if unread and not images:
        first = unread[0]
        raise DataError(f"{first.file}: {first.reason}; no sample of {split or source} can be read")
    return Dataset(
        images=tuple(images.values()),
        classes=classes.names,
        category_ids=classes.ids,
        split=split,
        format="webdataset",
        source=source,
        problems=tuple(problems),
        extra=catalogue.extra.get(split, {}) if extras else {},
    )


def _objects(
    sample: _Sample, classes: ClassList, problems: list[Problem], extras: bool
) -> Iterator[Annotation]:
    by_id = classes.labels
    by_name = {name: label for label, name in enumerate(classes.names)}

    def problem(kind: str, number: int, reason: str) -> None:
        problems.append(
            Problem(kind, sample.label, number, f"object {number}: {reason}", "dropped")
        )

    for number, item in enumerate(sample.content["objects"]):
        if not isinstance(item, dict) or not isinstance(item.get("extra", {}), dict):
            problem("label-unreadable", number, f"is {short(item)}, not {_IN_WORDS[13:-2]}")
            continue
        name, category = item.get("class"), item.get("category_id")
        label = by_id.get(category) if isinstance(category, int) else None
        if label is None or (name is not None and classes.names[label] != name):
            label = by_name.get(name) if isinstance(name, str) else None
            if label is None or (isinstance(category, int) and category in by_id):
                what = f"class {name!r} with category_id {category!r}"
                problem("class-unknown", number, f"{what} is none of the {len(by_name)} classes")
                continue
        try:
            x1, y1, x2, y2 = (to_number(value) for value in item["box"])
        except (KeyError, TypeError, ValueError):
            problem("box-not-a-number", number, f"box {short(item.get('box'))} is not 4 numbers")
            continue
        area, id_ = item.get("area"), item.get("id", number)
        extra = dict(item.get("extra", {})) if extras else {}
        if JSON_TEXT in extra and not isinstance(extra[JSON_TEXT], str):
            extra[JSON_TEXT] = json.dumps(extra[JSON_TEXT], separators=(",", ":"))
        yield Annotation(
            box=(x1, y1, x2, y2),
            label=label,
            id=id_ if isinstance(id_, int | str) else number,
            crowd=to_flag(item.get("crowd", False)),
            difficult=to_flag(item.get("difficult", False)),
            area=float(area) if isinstance(area, int | float) else None,
            extra=extra,
        )


# ---- writing


def parse_shard_size(text: str) -> tuple[int | None, int | None]:
    """Parse the maximum of samples (``1000``) or of bytes (``256MB``) per shard.

    Raises:
        ConfigError: it is neither, or zero.
    """
    found = _SHARD_SIZE.fullmatch(text.strip())
    if found is None or not float(f"{found.group(1)}{found.group(2) or ''}"):
        raise ConfigError(
            f"shard size {text!r} is neither a number of samples (1000) nor of KB, MB or GB (256MB)"
        )
    if found.group(3) is None:
        return int(found.group(1)), None
    whole = float(f"{found.group(1)}{found.group(2) or ''}")
    return None, max(1, round(whole * _UNITS[found.group(3).upper()]))


def write_webdataset(writing: Writing) -> None:
    """Write ``SPLIT-000000.tar`` and so on with an index each, and ``retinanet.json``.

    A key is the name of the image without its extension, with ``_`` for dots, at which keys end;
    the images' bytes are unchanged. The same data give the same bytes.

    Raises:
        ConfigError: the size of a shard makes no sense.
        DataError: images were to be linked.
    """
    limits = parse_shard_size(writing.shard_size)
    if writing.placing != "copy":
        raise DataError(f"images are copied into shards; a {writing.placing} cannot be in a tar")
    names = writing.names(together=False, stems=True)
    splits = {
        split: _write_split(writing, split, dataset, names[split], *limits)
        for split, dataset in writing.splits.items()
    }
    first = next(iter(writing.splits.values()))
    content = {
        "layout": _LAYOUT,
        "version": _VERSION,
        "classes": first.classes,
        "category_ids": first.category_ids,
        "splits": splits,
    }
    text = json.dumps(content, ensure_ascii=False, indent=1)
    write_atomic(writing.folder / CATALOGUE, text + "\n")


def _write_split(
    writing: Writing,
    split: str,
    dataset: Dataset,
    names: Mapping[Path, str],
    max_samples: int | None,
    max_bytes: int | None,
) -> dict[str, Any]:
    """Write the shards of a split; its entry in ``retinanet.json``."""
    shards: list[dict[str, Any]] = []
    keys: set[str] = set()
    with ExitStack() as stack:
        writer: archives.ArchiveWriter | None = None
        for image in dataset.images:
            content = archives.read_image_file(image.path)
            text = json.dumps(_content(image, dataset), ensure_ascii=False)
            # A file's name may hold bytes that are no text: \udce9, as JSON escapes it.
            label = text.encode(errors="backslashreplace")
            if writer is None or (
                shards[-1]["samples"] == max_samples
                or (max_bytes and writer.size + len(content) + len(label) > max_bytes)
            ):
                stack.close()
                file = writing.folder / f"{split or 'all'}-{len(shards):06d}.tar"
                writer = archives.ArchiveWriter(file)
                stack.callback(writer.close)
                shards.append({"file": file.name, "samples": 0, "objects": 0})
            name = Path(names[image.path])
            key = _free_key(name.stem.replace(".", "_"), keys)
            writer.add(f"{key}{name.suffix if is_image(name) else _suffix(content)}", content)
            writer.add(f"{key}.json", label)
            shards[-1]["samples"] += 1
            shards[-1]["objects"] += len(image.annotations)
            writing.count_image()
    return {
        "made_by": dataset.split_origin,
        "samples": len(dataset),
        "objects": sum(len(image.annotations) for image in dataset.images),
        "shards": [shard["file"] for shard in shards],
        "samples_by_shard": [shard["samples"] for shard in shards],
        "objects_by_shard": [shard["objects"] for shard in shards],
        "extra": dict(dataset.extra),
    }


def _free_key(stem: str, taken: set[str]) -> str:
    key, number = stem, 2
    while key.lower() in taken:
        key, number = f"{stem}_{number}", number + 1
    taken.add(key.lower())
    return key


def _suffix(image: bytes) -> str:
    """Return the extension of an image by its content."""
    from io import BytesIO

    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(BytesIO(image)) as opened:
            form = (opened.format or "").lower()
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        form = "jpeg"  # so that it stays a sample, and the check reports it
    return {"jpeg": ".jpg", "mpo": ".jpg", "tiff": ".tif", "jpeg2000": ".jp2"}.get(form, f".{form}")


def _content(image: LabelledImage, dataset: Dataset) -> dict[str, Any]:
    """Return the ``KEY.json`` of an image."""
    height, width = size_of(image)
    content: dict[str, Any] = {
        "id": image.id,
        "file_name": image.path.name,
        "width": width,
        "height": height,
        "objects": [_object(annotation, dataset) for annotation in image.annotations],
    }
    return content | ({"extra": dict(image.extra)} if image.extra else {})


def _object(annotation: Annotation, dataset: Dataset) -> dict[str, Any]:
    item: dict[str, Any] = {
        "class": dataset.classes[annotation.label],
        "category_id": dataset.category_ids[annotation.label],
        "box": list(annotation.box),
        "id": annotation.id,
    }
    if annotation.crowd:
        item["crowd"] = True
    if annotation.difficult:
        item["difficult"] = True
    if annotation.area is not None:
        item["area"] = annotation.area
    extra = {
        key: json.loads(value) if key == JSON_TEXT and isinstance(value, str) else value
        for key, value in annotation.extra.items()
    }
    return item | ({"extra": extra} if extra else {})
