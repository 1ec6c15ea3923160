"""COCO JSON: one file a split, boxes as [x, y, width, height].

Source: https://cocodataset.org/#format-data
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, TextIO

from retinanet.data.dataset import Annotation, Dataset, LabelledImage, Problem
from retinanet.data.formats.finding import (
    JSON_TEXT,
    ClassList,
    ImageFinder,
    merge_classes,
    to_flag,
    to_number,
)
from retinanet.data.formats.writing import Writing, size_of
from retinanet.data.splits import split_word
from retinanet.errors import DataError

LOOKED_FOR = (
    "COCO: a .json with images, annotations and categories, here, in annotations/ "
    "or in a folder a split"
)

CATEGORY_EXTRAS = "category_extras"
"""Key of :attr:`Dataset.extra`: a dict a class, such as its supercategory."""

_PARTS = frozenset({"images", "annotations", "categories"})
_IMAGE_KEYS = frozenset({"id", "file_name", "width", "height"})
_ANNOTATION_KEYS = frozenset(
    {"id", "image_id", "category_id", "bbox", "area", "iscrowd", "difficult"}
)
_CATEGORIES = re.compile(rb'"categories"\s*:\s*\[')


def is_coco(path: Path) -> bool:
    """Whether `path` is a COCO annotation file, or a folder that holds one."""
    return bool(_files(path))


def read_coco(path: Path, *, extras: bool = True) -> dict[str, Callable[[], Dataset]]:
    """The splits of a COCO data set; each is read when called.

    Classes are the union of all splits' categories, by their ids, so a label means the same in
    each.

    Args:
        path: the JSON file, or its folder.
        extras: keep what else is said of objects and images (masks, licences, ...).

    Raises:
        DataError: a file is not JSON (with line and column) or not COCO's, or two splits name one
            category id differently.
    """
    files = _files(path)
    categories: dict[int, dict[str, Any]] = {}
    for file in files.values():
        for id_, category in _categories(file).items():
            known = categories.setdefault(id_, category)
            if known["name"] != category["name"]:
                raise DataError(
                    f"{file}: category {id_} is {category['name']!r}, but {known['name']!r} in "
                    f"another split; give each class one id"
                )
    ordered = dict(sorted(categories.items()))
    classes = merge_classes(((id_, item["name"]) for id_, item in ordered.items()), path)

    def reader(split: str, file: Path) -> Callable[[], Dataset]:
        return lambda: _read_file(file, split, ordered, classes, path, extras)

    return {split: reader(split, file) for split, file in files.items()}


def _files(path: Path) -> dict[str, Path]:
    """Annotation files by split; a file that names no split is the split ``""``."""
    if path.is_file():
        found = [path] if path.suffix.lower() == ".json" and _looks_like_coco(path) else []
    elif path.is_dir():
        folders = [path, path / "annotations"]
        folders += sorted(sub for sub in path.iterdir() if sub.is_dir() and split_word(sub.name))
        found = [
            file
            for folder in folders
            if folder.is_dir()
            for file in sorted(folder.glob("*.json"))
            if _looks_like_coco(file)
        ]
        # Beside COCO's instances_*.json lie captions and keypoints of the same images.
        found = [file for file in found if file.name.startswith("instances")] or found
    else:
        found = []
    splits: dict[str, Path] = {}
    for file in found:
        in_own_folder = path.is_dir() and file.parent not in (path, path / "annotations")
        word = split_word(file.stem) or (split_word(file.parent.name) if in_own_folder else None)
        alone = word or "" if len(found) == 1 else file.stem.removeprefix("instances_")
        splits[word if word and word not in splits else alone] = file
    return splits


def _looks_like_coco(file: Path) -> bool:
    try:
        with (
            file.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            head = data[:64].removeprefix(b"\xef\xbb\xbf").lstrip()
            return (
                head.startswith(b"{")
                and data.find(b'"images"') >= 0
                and data.find(b'"annotations"') >= 0
            )
    except (OSError, ValueError):  # unreadable or empty
        return False


def _load(file: Path, hook: Callable[[dict[str, Any]], Any] | None = None) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes(), object_hook=hook)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}: not JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: holds a JSON {type(content).__name__}, not COCO's object")
    for key in ("images", "annotations", "categories"):
        if not isinstance(content.get(key), list):
            raise DataError(
                f"{file}: has no list {key!r}; COCO needs images, annotations, categories"
            )
    return content


def _categories(file: Path) -> dict[int, dict[str, Any]]:
    """Categories by id. They are found without parsing the annotations where that can be done."""
    listed: Any = None
    with (
        file.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        places = [match.end() - 1 for match in _CATEGORIES.finditer(data)]
        if len(places) == 1:
            text = data[places[0] : places[0] + (1 << 20)].decode("utf-8", errors="replace")
            try:
                listed, _ = json.JSONDecoder().raw_decode(text)
            except ValueError:
                listed = None
    if listed is None:
        listed = _load(file)["categories"]
    categories: dict[int, dict[str, Any]] = {}
    for category in listed:
        id_ = _whole(category.get("id")) if isinstance(category, dict) else None
        if id_ is None or not isinstance(category.get("name"), str):
            raise DataError(f"{file}: category {category!r} needs a whole number as id and a name")
        if id_ in categories:
            raise DataError(f"{file}: two categories have the id {id_}")
        categories[id_] = category
    return categories


def _whole(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return int(value) if isinstance(value, str) and value.isdecimal() else None


def _read_file(
    file: Path,
    split: str,
    categories: Mapping[int, Mapping[str, Any]],
    classes: ClassList,
    source: Path,
    extras: bool,
) -> Dataset:
    def compact(value: dict[str, Any]) -> dict[str, Any]:
        if JSON_TEXT in value and "image_id" in value:
            mask = value.pop(JSON_TEXT)
            if extras:
                value[JSON_TEXT] = json.dumps(mask, separators=(",", ":"))
        return value

    content = _load(file, compact)
    problems = list(classes.problems)
    images = _images(file, content["images"], problems)
    objects = _annotations(file, content["annotations"], images, classes.labels, problems, extras)

    finder = ImageFinder(_image_folders(file, split))
    dataset_images = []
    for id_, image in images.items():
        dataset_images.append(
            LabelledImage(
                path=finder.find(image["file_name"]),
                id=id_,
                annotations=tuple(objects.get(id_, ())),
                width=_whole(image.get("width")),
                height=_whole(image.get("height")),
                label_file=file,
                extra={k: v for k, v in image.items() if k not in _IMAGE_KEYS} if extras else {},
            )
        )
    return Dataset(
        images=tuple(dataset_images),
        classes=classes.names,
        category_ids=classes.ids,
        split=split,
        format="coco",
        source=source,
        problems=tuple(problems),
        extra=_of_the_whole(content, [categories[id_] for id_ in classes.ids]) if extras else {},
    )


def _of_the_whole(
    content: Mapping[str, Any], categories: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Info, licences and the like, and what categories say beside id and name, by label."""
    whole = {key: value for key, value in content.items() if key not in _PARTS}
    more = [
        {key: value for key, value in category.items() if key not in ("id", "name")}
        for category in categories
    ]
    if any(more):
        whole[CATEGORY_EXTRAS] = more
    return whole


def _images(
    file: Path, listed: list[Any], problems: list[Problem]
) -> dict[int | str, dict[str, Any]]:
    images: dict[int | str, dict[str, Any]] = {}
    for place, image in enumerate(listed):
        id_ = image.get("id") if isinstance(image, dict) else None
        if not isinstance(id_, int | str) or not isinstance(image.get("file_name"), str):
            problems.append(
                Problem(
                    "label-unreadable",
                    file,
                    place,
                    f"image {place} of the list needs an id and a file_name, got {_short(image)}",
                    "dropped",
                )
            )
        elif id_ in images:
            problems.append(
                Problem(
                    "image-id-duplicate",
                    file,
                    id_,
                    f"image id {id_} belongs to {images[id_]['file_name']} and again to "
                    f"{image['file_name']}; its objects could be of either",
                    "the second is dropped",
                )
            )
        else:
            images[id_] = image
    return images


def _annotations(
    file: Path,
    listed: list[Any],
    images: Mapping[int | str, Mapping[str, Any]],
    labels: Mapping[int, int],
    problems: list[Problem],
    extras: bool,
) -> dict[int | str, list[Annotation]]:
    objects: dict[int | str, list[Annotation]] = {}
    seen: set[int | str] = set()
    for place, item in enumerate(listed):
        listed[place] = None  # freed as we go: COCO's list is gigabytes
        id_ = item.get("id", place) if isinstance(item, dict) else place
        if not isinstance(item, dict) or not isinstance(id_, int | str):
            reason = f"annotation {place} of the list is not an object: {_short(item)}"
            problems.append(Problem("label-unreadable", file, place, reason, "dropped"))
            continue
        if id_ in seen:
            reason = f"annotation id {id_} is used twice; evaluators match by it"
            problems.append(Problem("annotation-id-duplicate", file, id_, reason, "numbered anew"))
        seen.add(id_)
        image_id = item.get("image_id")
        if not isinstance(image_id, int | str) or image_id not in images:
            reason = f"annotation {id_} is of image {image_id!r}, which is not in the file"
            problems.append(Problem("annotation-orphan", file, id_, reason, "dropped"))
            continue
        where = f"annotation {id_} of image {image_id} ({images[image_id]['file_name']})"
        category = _whole(item.get("category_id"))
        if category is None or category not in labels:
            reason = f"{where}: category_id {item.get('category_id')!r} is not in categories"
            problems.append(Problem("class-unknown", file, id_, reason, "dropped"))
            continue
        try:
            x, y, width, height = (to_number(value) for value in item["bbox"])
        except (KeyError, TypeError, ValueError):
            reason = f"{where}: bbox {_short(item.get('bbox'))} is not four numbers"
            problems.append(Problem("box-not-a-number", file, id_, reason, "dropped"))
            continue
        area = item.get("area")
        objects.setdefault(image_id, []).append(
            Annotation(
                box=(x, y, x + width, y + height),
                label=labels[category],
                id=id_,
                crowd=to_flag(item.get("iscrowd", 0)),
                difficult=to_flag(item.get("difficult", 0)),
                area=float(area) if isinstance(area, int | float) else None,
                extra={k: v for k, v in item.items() if k not in _ANNOTATION_KEYS}
                if extras
                else {},
            )
        )
    return objects


def write_coco(writing: Writing) -> None:
    """Write ``SPLIT.json`` and the images in ``SPLIT/``.

    Ids stay where they are whole numbers and no two alike, else they count from 1.
    """
    names = writing.names(together=False, stems=False)
    images: list[tuple[Path, Path]] = []
    for split, dataset in writing.splits.items():
        if not _distinct([image.id for image in dataset.images]):
            image_ids = list(range(1, len(dataset) + 1))
        else:
            image_ids = [int(image.id) for image in dataset.images]
        of_split = names[split]
        with (writing.folder / f"{split}.json").open("w", encoding="utf-8") as stream:
            _write_file(stream, dataset, of_split, image_ids)
        images += [(path, writing.folder / split / name) for path, name in of_split.items()]
    writing.place(images)


def _distinct(ids: list[int | str]) -> bool:
    return all(isinstance(id_, int) for id_ in ids) and len(set(ids)) == len(ids)


def _write_file(
    stream: TextIO, dataset: Dataset, names: Mapping[Path, str], image_ids: list[int]
) -> None:
    """One split, an object a line: as one text COCO's would take gigabytes."""
    more = dataset.extra.get(CATEGORY_EXTRAS) or [{}] * len(dataset.classes)
    whole = {key: value for key, value in dataset.extra.items() if key != CATEGORY_EXTRAS}
    categories = [
        {"id": id_, "name": name, **extra}
        for id_, name, extra in zip(dataset.category_ids, dataset.classes, more, strict=True)
    ]
    images = (
        {
            "id": id_,
            "file_name": names[image.path],
            **dict(zip(("height", "width"), size_of(image), strict=True)),
            **image.extra,
        }
        for id_, image in zip(image_ids, dataset.images, strict=True)
    )
    distinct = _distinct([a.id for image in dataset.images for a in image.annotations])
    numbers = count(1)
    annotations = (
        _item(annotation, dataset, id_, int(annotation.id) if distinct else next(numbers))
        for id_, image in zip(image_ids, dataset.images, strict=True)
        for annotation in image.annotations
    )
    stream.write("{")
    for key, value in whole.items():
        stream.write(f"{json.dumps(key)}: {json.dumps(value)},\n")
    for key, items in (("images", images), ("annotations", annotations)):
        lines = (json.dumps(item, ensure_ascii=False) for item in items)
        stream.write(f'"{key}": [')
        for place, line in enumerate(lines):
            stream.write(f"{',' if place else ''}\n{line}")
        stream.write("\n],\n")
    stream.write(f'"categories": {json.dumps(categories, ensure_ascii=False)}}}\n')


def _item(annotation: Annotation, dataset: Dataset, image_id: int, id_: int) -> dict[str, Any]:
    x1, y1, x2, y2 = annotation.box
    width, height = _side(x1, x2), _side(y1, y2)
    item: dict[str, Any] = {
        "id": id_,
        "image_id": image_id,
        "category_id": dataset.category_ids[annotation.label],
        "bbox": [_plain(side) for side in (x1, y1, width, height)],
        "area": _plain(width * height if annotation.area is None else annotation.area),
        "iscrowd": int(annotation.crowd),
    }
    if annotation.difficult:
        item["difficult"] = 1
    for key, value in annotation.extra.items():
        item[key] = json.loads(value) if key == JSON_TEXT and isinstance(value, str) else value
    return item


def _side(low: float, high: float) -> float:
    """The length that, added to `low`, gives `high` again, with as few decimals as that takes.

    172.65 - 38.86 is 133.79000000000002, which nobody wrote.
    """
    length = high - low
    for decimals in range(16):
        rounded = round(length, decimals)
        if low + rounded == high:
            return rounded
    return length


def _plain(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _image_folders(file: Path, split: str) -> list[Path]:
    """Where the images of an annotation file may lie: the split's own folders come first."""
    beside = file.parent
    root = beside.parent if beside.name in ("annotations", "labels") else beside
    own = file.stem.removeprefix("instances_")
    names = dict.fromkeys(name for name in (own, split) if name)
    folders = [base / name for name in names for base in (root, root / "images")]
    folders += [root / name / "images" for name in names]
    if split_word(beside.name) and split_word(beside.name) == split:
        folders.insert(0, beside)
    folders += [root / "images", root, root / "JPEGImages"]
    if root.is_dir():
        same = [sub for sub in sorted(root.iterdir()) if sub.is_dir()]
        folders += [sub for sub in same if split and split_word(sub.name) == split]
        images = root / "images"
        if images.is_dir():
            subs = [sub for sub in sorted(images.iterdir()) if sub.is_dir()]
            folders += [sub for sub in subs if split and split_word(sub.name) == split]
            folders += [sub for sub in subs if not split]
        folders += [sub for sub in same if not split]
    return folders
