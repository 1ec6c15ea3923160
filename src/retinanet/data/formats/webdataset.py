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
import tarfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from io import BytesIO
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, UnidentifiedImageError

from retinanet.data import archives
from retinanet.data.dataset import Annotation, Dataset, LabelledImage
from retinanet.data.finder import LabelSet, Tree, is_image
from retinanet.data.formats import reading
from retinanet.data.formats.reading import LabelFile, LabelImage
from retinanet.data.formats.writing import Writing, size_of
from retinanet.data.image_files import suffix_of
from retinanet.data.splits import split_word
from retinanet.errors import ConfigError, DataError

CATALOGUE = "retinanet.json"
"""File next to the shards: classes, and the shards of each split."""

_LAYOUT = "retinanet-webdataset"
_VERSION = 1
_KEY = re.compile(r"((?:.*/)?[^./][^/.]*)\.([^/]+)")
_NUMBER = re.compile(r"[-_.]?[0-9]+$")
_SHARD_SIZE = re.compile(r"([0-9]+)(?:(\.[0-9]+)? ?(KB|MB|GB))?", re.IGNORECASE)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_OBJECT = '{"class": "cat", "box": [x1, y1, x2, y2]}'


def detect(file: Path) -> bool:
    """Whether the first files of a tar share a key, and one is an image."""
    try:
        with tarfile.open(file, "r:") as tar:
            names = (_KEY.fullmatch(info.name) for info in tar if info.isreg())
            samples = list(islice(filter(None, names), 2))
    except (OSError, tarfile.TarError, ValueError, OverflowError, MemoryError):
        return False
    keys = {found.group(1) for found in samples}
    return len(samples) == 2 and len(keys) == 1 and any(is_image(f.group()) for f in samples)


def find(tree: Tree) -> LabelSet | None:
    """Return the folder of shards, or the shard, of a tree."""
    address = archives.address_of(tree.path)
    if not _is_shard(address) and _load_catalogue(f"{address}/{CATALOGUE}") is None:
        first = next((shard for split in _find_shards(address).values() for shard in split), None)
        if first is None or not (archives.is_remote(address) or detect(Path(first))):
            return None
    return LabelSet("webdataset", {"": [tree.path]}, frozenset)


def read(tree: Tree, labels: LabelSet) -> dict[str, Callable[[], Dataset]]:
    """Read a folder of shards, or a single shard, also at an fsspec address.

    Images are not unpacked: ``train-000000.tar/KEY.jpg`` is their path.

    Raises:
        DataError: a shard is missing or cut off, ``retinanet.json`` is broken, or no sample has the
            layout.
    """
    path = tree.path
    shards, catalogue = _open(archives.address_of(path))
    ids: dict[str, int | None] = {}
    if catalogue is not None:
        pairs = list(zip(catalogue["category_ids"], catalogue["classes"], strict=True))
        ids = {name: id_ for id_, name in pairs}
    else:
        for shard in (shard for split in shards.values() for shard in split):
            parse(shard, ids=ids)
        known = sorted((id_, name) for name, id_ in ids.items() if id_ is not None)
        is_complete = len({id_ for id_, _ in known}) == len(ids)
        pairs = known if is_complete else list(enumerate(sorted(ids), start=1))
    classes = reading.merge_classes(pairs, path)
    known_ids = ids if len(ids) == len(pairs) else None  # None: a name has several

    def build_split(split: str) -> Dataset:
        files = [file for shard in shards[split] for file in parse(shard, ids=known_ids)]
        problems = [problem for file in files for _, problem in file.problems]
        if problems and not any(file.images for file in files):
            first = problems[0]
            raise DataError(
                f"{first.file}: {first.reason}; no sample of {split or path} can be read"
            )
        extra = catalogue["splits"][split].get("extra", {}) if catalogue else {}
        return reading.build("webdataset", split, files, classes, tree, extra=extra)

    return {split: partial(build_split, split) for split in shards}


# ---- shards


def _is_shard(address: str) -> bool:
    """Whether it is a tar, rather than a folder of such a name."""
    return address.lower().endswith(archives.SUFFIX) and (
        archives.is_remote(address) or os.path.isfile(address)
    )


def _open(address: str) -> tuple[dict[str, list[str]], dict[str, Any] | None]:
    """Return the shards of a folder or a single shard by split, and its catalogue."""
    folder, single = os.path.split(address) if _is_shard(address) else (address, "")
    folder = folder or "."
    file = f"{folder}/{CATALOGUE}"
    content = _load_catalogue(file)
    if content is None:
        return {_split_of(single): [address]} if single else _find_shards(folder), None
    try:
        splits = content["splits"].items()
        listed = {str(split): [str(shard) for shard in v["shards"]] for split, v in splits}
        ids = [int(id_) for id_ in content["category_ids"]]
        count = len([str(name) for name in content["classes"]])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{file}: is broken ({type(error).__name__}: {error}); delete it to read the shards "
            f"without"
        ) from None
    if not len(set(ids)) == len(ids) == count:
        raise DataError(f"{file}: has {count} classes and category_ids {ids}")
    known = {shard for shards in listed.values() for shard in shards}
    for shard in sorted(known ^ set(_shards_in(folder))):
        what = "is missing, though listed in" if shard in known else "is not listed in"
        raise DataError(
            f"{folder}/{shard}: {what} {file}; copy all shards of the data set, or delete "
            f"{CATALOGUE} to read those that are present"
        )
    if single and single not in known:
        raise DataError(f"{address}: there is no such file")
    shards = {
        split: [f"{folder}/{shard}" for shard in names if single in ("", shard)]
        for split, names in listed.items()
    }
    return {split: of for split, of in shards.items() if of or not single}, content


def _load_catalogue(file: str) -> dict[str, Any] | None:
    """Its content; None if it does not exist or is another program's."""
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


def _shards_in(folder: str) -> list[str]:
    names = archives.list_names(folder)
    return [name for name in names if name.lower().endswith(archives.SUFFIX)]


def _find_shards(address: str) -> dict[str, list[str]]:
    """Shards by split: ``train-000000.tar`` here, or any in a folder ``train``."""
    found: dict[str, list[str]] = {}
    for name in archives.list_names(address):
        word = split_word(name)
        if name.lower().endswith(archives.SUFFIX):
            found.setdefault(_split_of(name), []).append(f"{address}/{name}")
        elif word and not PurePosixPath(name).suffix:
            inside = _shards_in(f"{address}/{name}")
            found.setdefault(word, []).extend(f"{address}/{name}/{shard}" for shard in inside)
    found = {split: shards for split, shards in found.items() if shards}
    if len(found) == 1:
        ((name, shards),) = found.items()
        return {split_word(name) or "": shards}
    return found


def _split_of(name: str) -> str:
    stem = _NUMBER.sub("", PurePosixPath(name).stem)
    return split_word(stem) or stem


# ---- samples


def parse(archive: str | Path, *, ids: dict[str, int | None] | None = None) -> list[LabelFile]:
    """Parse the labels of a shard, in order.

    Args:
        archive: its address.
        ids: category ids by class; further ones are added, and others are problems. None: not
            checked.
    """
    archive = os.fspath(archive)
    members = archives.members_of(archive)
    results: list[LabelFile] = []

    def report(name: str, kind: str, reason: str, fix: str = reading.DROPPED) -> None:
        results.append(LabelFile(Path(f"{archive}/{name}")))
        results[-1].report(kind, None, reason, fix)

    files: dict[str, dict[str, str]] = {}
    for name in members:
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
            report(images[0], "key-duplicate", reason)
        elif images:
            reason = f"key {key!r} has no .json, not even one without objects"
            report(images[0], "label-missing", reason)
        elif label is not None:
            report(label, "image-missing", f"key {key!r} has labels and no image", "dropped")
    labels = archives.read_members([members[label] for _, _, label in pairs])
    for (key, name, label), text in zip(pairs, labels, strict=True):
        content = _content_of(text)
        if isinstance(content, str):
            report(label, "label-unreadable", content)
        else:
            parsed = LabelFile(Path(f"{archive}/{label}"))
            image = LabelImage(
                name,
                content.get("id", key),
                content.get("width"),
                content.get("height"),
                extra=content.get("extra", {}),
                path=Path(f"{archive}/{name}"),
            )
            parsed.images.append(image)
            for number, item in enumerate(content["objects"]):
                _parse_object(parsed, image, number, item, ids)
            results.append(parsed)
    return results


def _content_of(text: bytes) -> dict[str, Any] | str:
    """Return the content of a ``KEY.json``, or what is wrong with it."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    if not isinstance(content, dict) or not isinstance(content.get("objects"), list):
        held = (
            f"keys {sorted(content)[:8]}" if isinstance(content, dict) else reading.short(content)
        )
        return f'has no list "objects" but {held}; {{"objects": [{_OBJECT}]}} is read'
    if not isinstance(content.get("extra", {}), dict):
        return f'"extra" is no object but {reading.short(content["extra"])}'
    for side in ("width", "height"):
        value = content.get(side)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            return f'"{side}" is not a whole number but {reading.short(value)}'
    if reading.to_id(content.get("id", 0)) is None:
        return f'"id" is neither number nor text but {reading.short(content["id"])}'
    return content


def _parse_object(
    parsed: LabelFile, image: LabelImage, number: int, item: Any, ids: dict[str, int | None] | None
) -> None:
    where = f"object {number}"
    if not isinstance(item, dict) or not isinstance(item.get("extra", {}), dict):
        reason = f"{where}: is {reading.short(item)}, not {_OBJECT}"
        parsed.report("label-unreadable", number, reason, image=image)
        return
    name, category = item.get("class"), reading.to_id(item.get("category_id"))
    if not isinstance(name, str):
        reason = f"{where}: its class is {name!r}, not a name"
        parsed.report("class-unknown", number, reason, image=image)
        return
    category = category if isinstance(category, int) else None
    expected = category if ids is None else ids.setdefault(name, category)
    if None not in (category, expected) and category != expected:
        reason = f"{where}: class {name!r} has category_id {category}, and {expected} elsewhere"
        parsed.report("class-unknown", number, reason, image=image)
        return
    extra = dict(item.get("extra", {}))
    if reading.JSON_TEXT in extra:
        extra[reading.JSON_TEXT] = reading.to_text(extra[reading.JSON_TEXT])
    own = {key: item.get(key) for key in ("id", "difficult", "area")}
    values = {**extra, **own, "iscrowd": item.get("crowd")}
    box = item.get("box")
    parsed.add(
        image, number, name, reading.to_box(box), f"box {reading.short(box)}", values, where=where
    )


# ---- writing


def parse_shard_size(text: str) -> tuple[int | None, int | None]:
    """Parse the maximum of samples (``1000``) or of bytes (``256MB``) per shard."""
    found = _SHARD_SIZE.fullmatch(text.strip())
    number = float(f"{found.group(1)}{found.group(2) or ''}") if found else 0
    if found is None or not number:
        raise ConfigError(
            f"shard size {text!r} is neither a number of samples (1000) nor of KB, MB or GB (256MB)"
        )
    if found.group(3) is None:
        return int(found.group(1)), None
    return None, max(1, round(number * _UNITS[found.group(3).upper()]))


def write(writing: Writing) -> None:
    """Write ``SPLIT-000000.tar`` and so on, and ``retinanet.json``.

    A key is the name of the image without its extension, with ``_`` for dots, at which keys end.
    """
    limits = parse_shard_size(writing.shard_size)
    if writing.placing != "copy":
        raise DataError(f"images are copied into shards; a {writing.placing} cannot be in a tar")
    names = writing.names(together=False, stems=True, dot="_")
    first = next(iter(writing.splits.values()))
    content = {
        "layout": _LAYOUT,
        "version": _VERSION,
        "classes": first.classes,
        "category_ids": first.category_ids,
        "splits": {
            split: _write_split(writing, split, dataset, names[split], *limits)
            for split, dataset in writing.splits.items()
        },
    }
    text = json.dumps(content, ensure_ascii=False, indent=1)
    (writing.folder / CATALOGUE).write_text(text + "\n", "utf-8")


def _write_split(
    writing: Writing,
    split: str,
    dataset: Dataset,
    names: Mapping[Path, str],
    max_samples: int | None,
    max_bytes: int | None,
) -> dict[str, Any]:
    """Write the shards of a split; return its entry in ``retinanet.json``."""
    shards: dict[str, int] = {}
    with ExitStack() as stack:
        tar: tarfile.TarFile | None = None
        file = ""
        for image in dataset.images:
            content = archives.read_image_file(image.path)
            text = json.dumps(_content(image, dataset), ensure_ascii=False)
            # A file's name may hold bytes that are no text: \udce9, as JSON escapes it.
            label = text.encode(errors="backslashreplace")
            if tar is None or (
                shards[file] == max_samples
                or (max_bytes and tar.offset + len(content) + len(label) > max_bytes)
            ):
                stack.close()
                file = f"{split or 'all'}-{len(shards):06d}.tar"
                path = writing.folder / file
                tar = stack.enter_context(tarfile.open(path, "w", format=tarfile.GNU_FORMAT))
                shards[file] = 0
            name = Path(names[image.path])
            _add(tar, f"{name.stem}{name.suffix if is_image(name) else _suffix(content)}", content)
            _add(tar, f"{name.stem}.json", label)
            shards[file] += 1
            writing.count_image()
    return {
        "made_by": dataset.split_origin,
        "samples": len(dataset),
        "shards": list(shards),
        "extra": dict(dataset.extra),
    }


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)  # no times, no owner: the same data give the same bytes
    info.size = len(content)
    tar.addfile(info, BytesIO(content))


def _suffix(image: bytes) -> str:
    """Return the extension of an image by its content."""
    try:
        with Image.open(BytesIO(image)) as opened:
            return suffix_of(opened.format or "")
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError):
        return ".jpg"  # so that it stays a sample, and the check reports it


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
    more = {"crowd": annotation.crowd, "difficult": annotation.difficult}
    item |= {key: True for key, value in more.items() if value}
    if annotation.area is not None:
        item["area"] = annotation.area
    extra = reading.json_values(annotation.extra)
    return item | ({"extra": extra} if extra else {})
