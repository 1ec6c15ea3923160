"""What was found in a data set, as one table, and as COCO's results file."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retinanet.config import nearest
from retinanet.data.dataset import Dataset
from retinanet.errors import DataError
from retinanet.files import open_atomic
from retinanet.structures import Detections

COLUMNS = 7  # image number, x, y, width, height, score, category id

_KEYS = ("image_id", "category_id", "bbox", "score")

_CHUNK = 10_000
"""Boxes that are turned into Python's numbers at once."""

_NUMBERS = b"0123456789+-.eE"


class Results:
    """Boxes found in a data set: 56 bytes a box, whatever the images' size.

    Args:
        dataset: the images that were searched.
        label_map: (K,) the data's label of each label of the detector, -1: the data has no such
            class and its boxes are left out; None: they are the same.
    """

    def __init__(self, dataset: Dataset, label_map: Sequence[int] | None = None) -> None:
        self.dataset = dataset
        self.image_numbers = image_numbers(dataset)
        self._category_ids = np.asarray(dataset.category_ids, dtype=np.float64)
        self._label_map = None if label_map is None else np.asarray(label_map, dtype=np.int64)
        self._parts: list[tuple[int, NDArray[np.float64]]] = []  # index of the image, its rows

    def add(self, index: int, detections: Detections) -> None:
        """Keep what was found in image `index` of the data set, boxes in that image's pixels.

        Raises:
            DataError: a box or a score is not a number.
        """
        boxes = detections.boxes.detach().cpu().double().numpy().reshape(-1, 4)
        scores = detections.scores.detach().cpu().double().numpy()
        labels = detections.labels.detach().cpu().numpy()
        if self._label_map is not None and len(labels):
            labels = self._label_map[labels]
            kept = labels >= 0
            boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
        part = np.empty((len(labels), COLUMNS))
        part[:, 0] = self.image_numbers[index]
        part[:, 1:3] = boxes[:, :2]
        part[:, 3:5] = boxes[:, 2:] - boxes[:, :2]
        part[:, 5] = scores
        part[:, 6] = self._category_ids[labels]
        if not np.isfinite(part).all():
            path = self.dataset.images[index].path
            raise DataError(f"{path.name}: a box or a score that was found is not a number")
        self._parts.append((index, part))

    def __len__(self) -> int:
        return sum(len(part) for _, part in self._parts)

    def table(self) -> NDArray[np.float64]:
        """(N, 7) image number, x, y, width, height, score, category id, in the data's order."""
        if len(self._parts) != 1:
            parts = [part for _, part in sorted(self._parts, key=itemgetter(0))]
            self._parts = [(-1, np.concatenate([np.empty((0, COLUMNS)), *parts]))]
        return self._parts[0][1]

    def rows(self) -> Iterator[dict[str, Any]]:
        """COCO's results: a dict a box. Numbers are exact, so that they give the same AP."""
        for number, x, y, width, height, score, category in self.table().tolist():
            yield {
                "image_id": int(number),
                "category_id": int(category),
                "bbox": [x, y, width, height],
                "score": score,
            }

    def write(self, file: Path) -> None:
        """COCO's results file, a box a line, whole or not at all."""
        table = self.table()
        with open_atomic(file) as out:
            between = "[\n"
            for first in range(0, len(table), _CHUNK):
                for number, x, y, width, height, score, category in table[
                    first : first + _CHUNK
                ].tolist():
                    out.write(
                        f'{between}{{"image_id": {number:.0f}, "category_id": {category:.0f}, '
                        f'"bbox": [{x}, {y}, {width}, {height}], "score": {score}}}'
                    )
                    between = ",\n"
            out.write("\n]\n" if len(table) else "[\n\n]\n")

    @classmethod
    def read(cls, source: Path | Sequence[Mapping[str, Any]], dataset: Dataset) -> Results:
        """COCO's results from a file or a list.

        The image ids are the data's own; for data whose ids are no integers, the names or the
        numbers that :meth:`write` gives them.

        Raises:
            DataError: the file cannot be read or is not a results file; a box, a score, an image id
                or a category id is wrong. The first wrong place is named.
        """
        where = "results"
        rows: Any = source
        if isinstance(source, Path):
            where = source.name
            table = _read_plain(source)
            if table is not None and (known := _known_rows(table, dataset)) is not None:
                results = cls(dataset)
                results._parts = [(-1, known)]
                return results
            rows = read_json(source)
        if isinstance(rows, Mapping) and "annotations" in rows and "images" in rows:
            raise DataError(
                f"{where} holds labels (images and annotations), not results: a list of "
                '{"image_id", "category_id", "bbox", "score"}'
            )
        if isinstance(rows, str | Mapping) or not isinstance(rows, Sequence):
            raise DataError(
                f"{where} is not a COCO results file: a list of "
                '{"image_id", "category_id", "bbox", "score"} is wanted, '
                f"a JSON {_json_kind(rows)} was found"
            )
        results = cls(dataset)
        plain = _plain_rows(rows)
        known = None if plain is None else _known_rows(plain, dataset)
        # Whatever is unusual is looked at row by row, and the first wrong place is named.
        results._parts = [(-1, _parse_rows(rows, results, where) if known is None else known)]
        return results


def image_numbers(dataset: Dataset) -> tuple[int, ...]:
    """COCO's image id of each image: the data's own where they serve, else 1, 2, 3, ..."""
    own = [image.id for image in dataset.images]
    # Doubles carry the ids through the evaluator: exact up to 2^53.
    if all(isinstance(one, int) and 0 <= one < 2**53 for one in own) and len(set(own)) == len(own):
        return tuple(int(one) for one in own)
    return tuple(range(1, len(own) + 1))


@dataclass(frozen=True, slots=True, eq=False)
class Truth:
    """The labels of a data set as they are judged.

    Objects whose box is not a box (not finite, or inverted) are absent; a box without width or
    height stays, as COCO keeps it.

    Attributes:
        image_numbers: (M,) int64 COCO's image id of each object.
        category_ids: (M,) int64.
        boxes: (M, 4) float64 x, y, width, height.
        areas: (M,) float64 square pixels: the data's own, else the box's.
        ignored: (M,) bool: crowd and difficult objects, ``iscrowd`` in COCO's words.
        left_out: how many objects are absent.
    """

    image_numbers: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    boxes: NDArray[np.float64]
    areas: NDArray[np.float64]
    ignored: NDArray[np.bool_]
    left_out: int

    @classmethod
    def of(cls, dataset: Dataset) -> Truth:
        """The objects of a data set, in its order."""
        objects = [one for image in dataset.images for one in image.annotations]
        corners = np.array([one.box for one in objects], dtype=np.float64).reshape(-1, 4)
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        kept = np.isfinite(corners).all(axis=1) & (boxes[:, 2:] >= 0).all(axis=1)
        categories = np.asarray(dataset.category_ids, dtype=np.int64)
        labels = np.array([one.label for one in objects], dtype=np.int64)
        areas = np.array([np.nan if one.area is None else one.area for one in objects], np.float64)
        counts = [len(image.annotations) for image in dataset.images]
        numbers = np.repeat(np.array(image_numbers(dataset), dtype=np.int64), counts)
        with np.errstate(invalid="ignore", over="ignore"):
            areas = np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas)
        return cls(
            numbers[kept],
            categories[labels[kept]],
            boxes[kept],
            areas[kept],
            np.array([one.ignored for one in objects], dtype=np.bool_)[kept],
            int((~kept).sum()),
        )

    def __len__(self) -> int:
        return len(self.areas)


def coco_images(dataset: Dataset) -> list[dict[str, Any]]:
    """COCO's ``images``."""
    return [
        {
            "id": number,
            "file_name": image.path.name,
            "width": image.width or 0,
            "height": image.height or 0,
        }
        for number, image in zip(image_numbers(dataset), dataset.images, strict=True)
    ]


def coco_categories(dataset: Dataset) -> list[dict[str, Any]]:
    """COCO's ``categories``."""
    return [
        {"id": category, "name": name}
        for category, name in zip(dataset.category_ids, dataset.classes, strict=True)
    ]


def ground_truth(dataset: Dataset) -> dict[str, Any]:
    """The :class:`Truth` in COCO's instances layout."""
    truth = Truth.of(dataset)
    rows = zip(
        truth.image_numbers.tolist(),
        truth.category_ids.tolist(),
        truth.boxes.tolist(),
        truth.areas.tolist(),
        truth.ignored.tolist(),
        strict=True,
    )
    annotations = [
        {
            "id": place,  # from 1: pycocotools takes id 0 for "no match"
            "image_id": number,
            "category_id": category,
            "bbox": box,
            "area": area,
            "iscrowd": int(ignored),
        }
        for place, (number, category, box, area, ignored) in enumerate(rows, start=1)
    ]
    return {
        "images": coco_images(dataset),
        "annotations": annotations,
        "categories": coco_categories(dataset),
    }


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: there is no such file, or it is not JSON (the line is named).
    """
    try:
        return json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise DataError(f"{file}: there is no such file") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{file} is not JSON: {error.msg} at line {error.lineno}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None


def _read_plain(file: Path) -> NDArray[np.float64] | None:
    """The table of a results file that holds numbers alone, all rows in the same layout.

    Ten times faster than JSON's own rows, and in a tenth of the memory: 500,000 boxes are 28 MB
    instead of 300. What is left of a row without its numbers must be the same in all rows, so that
    the numbers are known by their places.

    Returns:
        (N, 7) with ids as the file has them; None: it is of another layout, or is no JSON.
    """
    try:
        text = file.read_bytes()
    except OSError:
        return None
    layout = text[: text.find(b"}") + 1].strip().removeprefix(b"[").translate(None, b" \t\r\n")
    try:
        first = json.loads(layout)
    except (ValueError, RecursionError):
        return None
    keys = tuple(first) if isinstance(first, dict) else ()
    if sorted(keys) != sorted(_KEYS) or not _is_plain_row(first):
        return None
    # The keys hold an "e", which numbers may too.
    for place, key in enumerate(_KEYS):
        text = text.replace(f'"{key}"'.encode(), b'"%c"' % (b"wxyz"[place]))
        layout = layout.replace(f'"{key}"'.encode(), b'"%c"' % (b"wxyz"[place]))
    row = layout.translate(None, _NUMBERS)
    rest = text.translate(None, _NUMBERS + b" \t\r\n")
    count = rest.count(b"}")
    if rest != b"[" + b",".join([row] * count) + b"]":
        return None
    blank = bytes(c if c in _NUMBERS else 32 for c in range(256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns where something is no number
        try:
            numbers = np.fromstring(text.translate(blank), dtype=np.float64, sep=" ")
        except (DeprecationWarning, ValueError):
            return None
    if len(numbers) != count * COLUMNS:
        return None
    values = numbers.reshape(count, COLUMNS)
    columns = {"image_id": [0], "bbox": [1, 2, 3, 4], "score": [5], "category_id": [6]}
    order = np.array(list(chain.from_iterable(columns[key] for key in keys)))
    table = np.empty_like(values)
    table[:, order] = values
    return table


def _is_plain_row(row: Mapping[str, Any]) -> bool:
    box, others = row["bbox"], (row["image_id"], row["category_id"], row["score"])
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(type(value) in (int, float) for value in (*box, *others))
    )


def _plain_rows(rows: Sequence[Any]) -> NDArray[np.float64] | None:
    """The table of rows that hold numbers alone; None: something in them is unusual."""
    table = np.empty((len(rows), COLUMNS))
    try:
        for first in range(0, len(rows), _CHUNK):
            part = rows[first : first + _CHUNK]
            images = list(map(itemgetter("image_id"), part))
            categories = list(map(itemgetter("category_id"), part))
            if not set(map(type, chain(images, categories))) <= {int}:
                return None
            own = table[first : first + _CHUNK]
            own[:, 0], own[:, 6] = images, categories
            boxes = list(map(itemgetter("bbox"), part))
            if set(map(len, boxes)) != {4}:
                return None
            own[:, 1:5] = boxes
            own[:, 5] = list(map(itemgetter("score"), part))
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):
        return None
    return table


def _known_rows(table: NDArray[np.float64], dataset: Dataset) -> NDArray[np.float64] | None:
    """The table with the data's image numbers; None: something in it needs a closer look."""
    numbers = image_numbers(dataset)
    if any(image.id != number for image, number in zip(dataset.images, numbers, strict=True)):
        return None  # the file may call images by names that look like numbers
    fits = (
        np.isfinite(table).all()
        and (table[:, 3:5] >= 0).all()
        and np.isin(table[:, 0], np.array(numbers, dtype=np.float64)).all()
        and np.isin(table[:, 6], np.array(dataset.category_ids, dtype=np.float64)).all()
    )
    return table if fits else None


def _parse_rows(rows: Sequence[Any], results: Results, where: str) -> NDArray[np.float64]:
    dataset = results.dataset
    numbers = _known_images(dataset, results.image_numbers)
    categories = set(dataset.category_ids)
    table = np.empty((len(rows), COLUMNS))
    unknown_images: Counter[Any] = Counter()
    unknown_categories: Counter[Any] = Counter()
    for i, row in enumerate(rows):
        try:
            image, category = row["image_id"], row["category_id"]
            box, score = row["bbox"], row["score"]
        except (KeyError, TypeError, IndexError):
            missing = [name for name in _KEYS if not isinstance(row, Mapping) or name not in row]
            raise DataError(f"{where}: entry {i} has no {', '.join(missing)}") from None
        try:
            table[i, 1:5] = box if len(box) == 4 else ()  # numpy would repeat a single number
            table[i, 5] = score
        except (TypeError, ValueError):
            raise DataError(
                f"{where}: entry {i} (image {image}): bbox {box} is not [x, y, width, height] "
                f"or score {score!r} is not a number"
            ) from None
        if not isinstance(image, int | str) or image not in numbers:
            unknown_images[str(image)] += 1
        elif category not in categories:
            unknown_categories[category] += 1
        else:
            table[i, 0] = numbers[image]
            table[i, 6] = category
    if unknown_images:
        raise DataError(
            f"{where}: {unknown_images.total()} boxes are of images that {dataset.source} "
            f"({dataset.split}) does not hold: {_some(unknown_images)}; is it the right split?"
        )
    if unknown_categories:
        first = next(iter(unknown_categories))
        hint = nearest(str(first), map(str, dataset.category_ids))
        raise DataError(
            f"{where}: {unknown_categories.total()} boxes have a category_id that {dataset.source} "
            f"does not know: {_some(unknown_categories)}{hint}"
        )
    bad = np.flatnonzero(~np.isfinite(table).all(axis=1))
    if len(bad):
        row = rows[int(bad[0])]
        raise DataError(
            f"{where}: entry {bad[0]} (image {row['image_id']}): bbox {row['bbox']} or score "
            f"{row['score']} is not a finite number"
        )
    bad = np.flatnonzero((table[:, 3:5] < 0).any(axis=1))
    if len(bad):
        row = rows[int(bad[0])]
        raise DataError(
            f"{where}: entry {bad[0]} (image {row['image_id']}): bbox {row['bbox']} has a negative "
            "size; COCO's boxes are [x, y, width, height]"
        )
    return table


def _known_images(dataset: Dataset, numbers: tuple[int, ...]) -> dict[int | str, int]:
    """Number by whatever a results file may call an image; the data's own id goes first."""
    known: dict[int | str, int] = {}
    for image, number in zip(dataset.images, numbers, strict=True):
        known.setdefault(image.path.stem, number)
        known.setdefault(image.path.name, number)
    for number in numbers:
        known[number] = number
    for image, number in zip(dataset.images, numbers, strict=True):
        known[image.id] = number
    return known


def _some(counts: Counter[Any]) -> str:
    names = [str(one) for one in list(counts)[:5]]
    more = len(counts) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _json_kind(value: Any) -> str:
    return {dict: "object", str: "text", type(None): "null"}.get(type(value), "number")
