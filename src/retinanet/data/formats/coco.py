"""COCO JSON: one file per split, boxes as [x, y, width, height].

Source: https://cocodataset.org/#format-data
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from retinanet.data.dataset import Annotation, Dataset
from retinanet.data.finder import LabelSet, Tree
from retinanet.data.formats import reading
from retinanet.data.formats.reading import LabelFile, LabelImage
from retinanet.data.formats.writing import Writing, size_of
from retinanet.errors import DataError

CATEGORY_EXTRAS = "category_extras"
"""Key of :attr:`Dataset.extra`: a dict per class, such as its supercategory."""

_OTHER_KINDS = ("captions", "person_keypoints", "stuff", "panoptic", "image_info")
_PARTS = ("images", "annotations", "categories")
_IMAGE_KEYS = frozenset({"id", "file_name", "width", "height"})
_ANNOTATION_KEYS = frozenset({"image_id", "category_id", "bbox"})
_CATEGORIES = re.compile(rb'"categories"\s*:\s*\[')


def detect(file: Path) -> bool:
    """Whether a file is a COCO annotation file."""
    return reading.json_has(file, b"{", (b'"images"', b'"annotations"'))


def find(tree: Tree) -> LabelSet | None:
    """Return the annotation files of a tree by split."""
    # COCO's folder also has captions and keypoints of the same images.
    files = tree.with_suffix(".json")
    has_instances = any(file.name.startswith("instances") for file in files)

    def is_wanted(file: Path) -> bool:
        return not (has_instances and file.name.startswith(_OTHER_KINDS)) and detect(file)

    return reading.find_tables("coco", tree, [".json"], is_wanted, parse)


def read(tree: Tree, labels: LabelSet) -> reading.Splits:
    """Read a COCO data set; each split's files are parsed when called.

    Classes are the union of all files' categories by id; one id of two names is a DataError.
    """
    categories: dict[int, dict[str, Any]] = {}
    for _, file in labels.by_split():
        for id_, category in _categories(file).items():
            known = categories.setdefault(id_, category)
            if known["name"] != category["name"]:
                raise DataError(
                    f"{file}: category {id_} is {category['name']!r}, but {known['name']!r} in "
                    f"another file; give each class one id"
                )
    names = ((id_, categories[id_]["name"]) for id_ in sorted(categories))
    classes = reading.merge_classes(names, tree.path)
    more = [
        {key: value for key, value in categories[id_].items() if key not in ("id", "name")}
        for id_ in classes.ids
    ]

    def read_split(split: str, files: list[Path]) -> Dataset:
        parsed: list[LabelFile] = []
        extra: dict[str, Any] = {}
        for file in files:
            content = _load(file, keep_masks=tree.extras)
            extra |= {key: value for key, value in content.items() if key not in _PARTS}
            parsed.append(_parse(file, content))
        extra |= {CATEGORY_EXTRAS: more} if any(more) else {}
        return reading.build("coco", split, parsed, classes, tree, extra=extra)

    return {split: partial(read_split, split, files) for split, files in labels.files.items()}


def parse(file: Path) -> LabelFile:
    """Parse an annotation file."""
    return _parse(file, _load(file))


def _load(file: Path, *, keep_masks: bool = True) -> dict[str, Any]:
    def compact(value: dict[str, Any]) -> dict[str, Any]:
        if reading.JSON_TEXT in value and "image_id" in value:
            mask = value.pop(reading.JSON_TEXT)
            if keep_masks:
                value[reading.JSON_TEXT] = reading.to_text(mask)
        return value

    content: dict[str, Any] = reading.read_json(file, dict, "COCO's object", compact)
    for key in _PARTS:
        if not isinstance(content.get(key), list):
            raise DataError(f"{file}: has no list {key!r}; COCO needs {', '.join(_PARTS)}")
    return content


def _categories(file: Path) -> dict[int, dict[str, Any]]:
    """Categories by id, without parsing the annotations if possible."""
    if not reading.is_compressed(file):
        with (
            file.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            starts = [match.end() - 1 for match in _CATEGORIES.finditer(data)]
            text = data[starts[0] : starts[0] + (1 << 20)] if len(starts) == 1 else b""
        try:
            listed, _ = json.JSONDecoder().raw_decode(text.decode("utf-8", errors="replace"))
            return _categories_by_id(file, listed)
        except (ValueError, RecursionError):
            pass
    return _categories_by_id(file, _load(file)["categories"])


def _categories_by_id(file: Path, listed: list[Any]) -> dict[int, dict[str, Any]]:
    categories: dict[int, dict[str, Any]] = {}
    for category in listed:
        id_ = reading.to_int(category.get("id")) if isinstance(category, dict) else None
        if id_ is None or not isinstance(category.get("name"), str):
            raise DataError(f"{file}: category {category!r} needs a whole number as id and a name")
        if id_ in categories:
            raise DataError(f"{file}: two categories have the id {id_}")
        categories[id_] = category
    return categories


def _parse(file: Path, content: dict[str, Any]) -> LabelFile:
    parsed = LabelFile(file)
    categories = _categories_by_id(file, content["categories"])
    names = {id_: category["name"] for id_, category in categories.items()}
    images: dict[int | str, LabelImage] = {}
    for number, image in enumerate(content["images"]):
        id_ = reading.to_id(image.get("id")) if isinstance(image, dict) else None
        if id_ is not None and "file_name" not in image and isinstance(image.get("coco_url"), str):
            # LVIS has addresses: http://images.cocodataset.org/val2017/000000397133.jpg
            image["file_name"] = "/".join(image["coco_url"].split("/")[-2:])
        if id_ is None or not isinstance(image.get("file_name"), str):
            what = reading.short(image)
            reason = f"image {number} of the list needs an id and a file_name, got {what}"
            parsed.report("label-unreadable", number, reason)
        elif id_ in images:
            reason = (
                f"image id {id_} belongs to {images[id_].name} and again to {image['file_name']}; "
                f"its objects could be of either"
            )
            parsed.report("image-id-duplicate", id_, reason, "the second is dropped")
        else:
            images[id_] = LabelImage(
                name=image["file_name"],
                id=id_,
                width=reading.to_size(image.get("width")),
                height=reading.to_size(image.get("height")),
                extra={k: v for k, v in image.items() if k not in _IMAGE_KEYS},
            )
    parsed.images = list(images.values())
    seen: set[int | str] = set()
    objects = content["annotations"]
    for number, item in enumerate(objects):
        objects[number] = None  # freed early: COCO's list is gigabytes
        _parse_annotation(parsed, images, names, seen, number, item)
    if reading.scale_normalised(parsed):
        reason = "most boxes lie within 0 and 1: these look normalised; COCO's boxes are pixels"
        parsed.report("box-normalised", None, reason, "read as fractions of the image")
    return parsed


def _parse_annotation(
    parsed: LabelFile,
    images: Mapping[int | str, LabelImage],
    names: Mapping[int, str],
    seen: set[int | str],
    number: int,
    item: Any,
) -> None:
    id_ = reading.to_id(item.get("id", number)) if isinstance(item, dict) else None
    if id_ is None:
        reason = f"annotation {number} of the list is not an object: {reading.short(item)}"
        parsed.report("label-unreadable", number, reason)
        return
    if id_ in seen:
        reason = f"annotation id {id_} is used twice; evaluators match by it"
        parsed.report("annotation-id-duplicate", id_, reason, "renumbered")
    seen.add(id_)
    image_id = reading.to_id(item.get("image_id"))
    image = None if image_id is None else images.get(image_id)
    if image is None:
        reason = f"annotation {id_} is of image {item.get('image_id')!r}, which is not in the file"
        parsed.report("annotation-orphan", id_, reason)
        return
    where = f"annotation {id_} of image {image_id} ({image.name})"
    category = reading.to_int(item.get("category_id"))
    if category is None or category not in names:
        reason = f"{where}: category_id {item.get('category_id')!r} is not in categories"
        parsed.report("class-unknown", id_, reason, image=image)
        return
    box = reading.to_box(item.get("bbox"), has_size=True)
    if box is None and not item.get("bbox"):
        box = _mask_box(item.get(reading.JSON_TEXT))
    if box is None:
        reason = f"{where}: bbox {reading.short(item.get('bbox'))} is not four numbers"
        parsed.report("box-not-a-number", id_, reason, image=image)
        return
    label = parsed.label(names[category])
    image.annotations.append(reading.to_annotation(box, label, number, item, _ANNOTATION_KEYS))


def _mask_box(text: Any) -> reading.Box | None:
    """Return the box around a mask: polygons, or RLE with counts; None for anything else."""
    try:
        mask = json.loads(text)
        if isinstance(mask, dict):
            from hotcoco import mask as rle

            height, width = mask["size"]
            counts = mask["counts"]
            if isinstance(counts, list):
                mask = rle.frPyObjects(mask, height, width)
            else:
                mask = {"size": [height, width], "counts": counts.encode()}
            return reading.to_box(list(map(float, rle.toBbox(mask))), has_size=True)
        return reading.box_around(
            [xy for points in mask for xy in zip(points[::2], points[1::2], strict=True)]
        )
    except (TypeError, ValueError, KeyError, IndexError, AttributeError):
        return None


def write(writing: Writing) -> None:
    """Write ``SPLIT.json`` and the images in ``SPLIT/``.

    Ids are kept if they are whole numbers and all different, else they count from 1.
    """
    names = writing.names(together=False, stems=False)
    for split, dataset in writing.splits.items():
        with (writing.folder / f"{split}.json").open("w", encoding="utf-8") as stream:
            write_split(stream, dataset, names[split])
    writing.place(names, "{split}/{name}")


def _ids(ids: Sequence[int | str]) -> Iterator[int | str]:
    """Return ids that are distinct whole numbers, else 1, 2, ..."""
    is_distinct = all(isinstance(id_, int) for id_ in ids) and len(set(ids)) == len(ids)
    return iter(ids) if is_distinct else iter(range(1, len(ids) + 1))


def write_split(stream: TextIO, dataset: Dataset, names: Mapping[Path, str]) -> None:
    """Write a split, an object per line: as one string COCO's would take gigabytes."""
    image_ids = list(_ids([image.id for image in dataset.images]))
    more = dataset.extra.get(CATEGORY_EXTRAS) or [{}] * len(dataset.classes)
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
    ids = _ids([a.id for image in dataset.images for a in image.annotations])
    annotations = (
        _item(annotation, dataset, image_id, next(ids))
        for image_id, image in zip(image_ids, dataset.images, strict=True)
        for annotation in image.annotations
    )
    stream.write("{")
    for key, value in dataset.extra.items():
        if key != CATEGORY_EXTRAS:
            stream.write(f"{json.dumps(key)}: {json.dumps(value)},\n")
    for key, items in (("images", images), ("annotations", annotations)):
        stream.write(f'"{key}": [')
        for number, item in enumerate(items):
            line = json.dumps(item, ensure_ascii=False)
            stream.write(f"{',' if number else ''}\n{line}")
        stream.write("\n],\n")
    stream.write(f'"categories": {json.dumps(categories, ensure_ascii=False)}}}\n')


def _item(
    annotation: Annotation, dataset: Dataset, image_id: int | str, id_: int | str
) -> dict[str, Any]:
    x1, y1, x2, y2 = annotation.box
    width, height = _side(x1, x2), _side(y1, y2)
    item: dict[str, Any] = {
        "id": id_,
        "image_id": image_id,
        "category_id": dataset.category_ids[annotation.label],
        "bbox": [_plain(side) for side in (x1, y1, width, height)],
        "area": _plain(width * height if annotation.area is None else annotation.area),
        "iscrowd": int(annotation.crowd),
        **({"difficult": 1} if annotation.difficult else {}),
    }
    return item | reading.json_values(annotation.extra)


def _side(low: float, high: float) -> float:
    """Return the length with the fewest decimals that, added to `low`, gives `high`.

    (172.65 - 38.86 is 133.79000000000002.)
    """
    rounded = (round(high - low, decimals) for decimals in range(16))
    return next((length for length in rounded if low + length == high), high - low)


def _plain(value: float) -> int | float:
    return int(value) if value == int(value) else value
