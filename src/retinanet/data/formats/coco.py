"""COCO JSON: one file a split, boxes as [x, y, width, height].

Source: https://cocodataset.org/#format-data
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from retinanet.data.dataset import Annotation, Dataset, LabelledImage, Problem
from retinanet.data.formats.finding import JSON_TEXT, PictureFinder, to_flag, to_number
from retinanet.data.splits import split_word
from retinanet.errors import DataError

LOOKED_FOR = (
    "COCO: a .json with images, annotations and categories, here, in annotations/ "
    "or in a folder a split"
)

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
        extras: keep what else is said of objects and pictures (masks, licences, ...); training
        needs
            none of it, and all of COCO without it is 0.5 GB in memory.

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

    def reader(split: str, file: Path) -> Callable[[], Dataset]:
        return lambda: _read_file(file, split, ordered, path, extras)

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
        # Beside COCO's instances_*.json lie captions and keypoints of the same pictures.
        found = [file for file in found if file.name.startswith("instances")] or found
    else:
        found = []
    if len(found) == 1:
        file = found[0]
        return {split_word(file.stem) or (split_word(file.parent.name) or ""): file}
    splits: dict[str, Path] = {}
    for file in found:
        own_folder = file.parent != path and file.parent.name != "annotations"
        word = split_word(file.stem) or (split_word(file.parent.name) if own_folder else None)
        name = word if word and word not in splits else file.stem.removeprefix("instances_")
        splits[name] = file
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
    file: Path, split: str, categories: Mapping[int, Mapping[str, Any]], source: Path, extras: bool
) -> Dataset:
    def compact(value: dict[str, Any]) -> dict[str, Any]:
        if JSON_TEXT in value and "image_id" in value:
            mask = value.pop(JSON_TEXT)
            if extras:
                value[JSON_TEXT] = json.dumps(mask, separators=(",", ":"))
        return value

    content = _load(file, compact)
    problems: list[Problem] = []
    images = _images(file, content["images"], problems)
    labels = {id_: label for label, id_ in enumerate(categories)}
    objects = _annotations(file, content["annotations"], images, labels, problems, extras)

    finder = PictureFinder(_picture_folders(file, split))
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
        classes=tuple(str(category["name"]) for category in categories.values()),
        category_ids=tuple(categories),
        split=split,
        format="coco",
        source=source,
        problems=tuple(problems),
    )


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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _picture_folders(file: Path, split: str) -> list[Path]:
    """Where the pictures of an annotation file may lie: the split's own folders come first."""
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
