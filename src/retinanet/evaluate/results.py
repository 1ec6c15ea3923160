"""What was found in a data set, as one table, and as COCO's results file."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retinanet.config import nearest
from retinanet.data.dataset import Dataset
from retinanet.errors import DataError
from retinanet.files import write_atomic
from retinanet.structures import Detections

COLUMNS = 7  # image number, x, y, width, height, score, category id


class Results:
    """Boxes found in a data set: 56 bytes a box, whatever the pictures' size.

    Args:
        dataset: the pictures that were searched.
        label_map: (K,) the data's label of each label of the detector, -1: the data has no such
            class and its boxes are left out; None: they are the same.
    """

    def __init__(self, dataset: Dataset, label_map: Sequence[int] | None = None) -> None:
        self.dataset = dataset
        self.image_numbers = image_numbers(dataset)
        self._category_ids = np.asarray(dataset.category_ids, dtype=np.float64)
        self._label_map = None if label_map is None else np.asarray(label_map, dtype=np.int64)
        self._parts: list[NDArray[np.float64]] = []

    def add(self, index: int, detections: Detections) -> None:
        """Keep what was found in picture `index` of the data set, boxes in that picture's pixels.

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
        self._parts.append(part)

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def table(self) -> NDArray[np.float64]:
        """(N, 7) image number, x, y, width, height, score, category id, in the order of adding."""
        if len(self._parts) != 1:
            self._parts = [np.concatenate([np.empty((0, COLUMNS)), *self._parts])]
        return self._parts[0]

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
        lines = (
            f'{{"image_id": {number:.0f}, "category_id": {category:.0f}, '
            f'"bbox": [{x}, {y}, {width}, {height}], "score": {score}}}'
            for number, x, y, width, height, score, category in self.table().tolist()
        )
        write_atomic(file, "[\n" + ",\n".join(lines) + "\n]\n")

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
            where, rows = source.name, read_json(source)
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
        results._parts = [_parse_rows(rows, results, where)]
        return results


def image_numbers(dataset: Dataset) -> tuple[int, ...]:
    """COCO's image id of each picture: the data's own where they serve, else 1, 2, 3, ..."""
    own = [image.id for image in dataset.images]
    # Doubles carry the ids through the evaluator: exact up to 2^53.
    if all(isinstance(one, int) and 0 <= one < 2**53 for one in own) and len(set(own)) == len(own):
        return tuple(int(one) for one in own)
    return tuple(range(1, len(own) + 1))


def ground_truth(dataset: Dataset) -> dict[str, Any]:
    """The labels as they are judged, in COCO's instances layout.

    Crowd and difficult objects are ``iscrowd``; objects whose box is not a box (not finite, or
    inverted) are absent; a box without width or height stays, as COCO keeps it.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, image in zip(image_numbers(dataset), dataset.images, strict=True):
        images.append(
            {
                "id": number,
                "file_name": image.path.name,
                "width": image.width or 0,
                "height": image.height or 0,
            }
        )
        for one in image.annotations:
            x1, y1, x2, y2 = one.box
            if not (all(map(math.isfinite, one.box)) and x2 >= x1 and y2 >= y1):
                continue
            width, height = x2 - x1, y2 - y1
            annotations.append(
                {
                    "id": len(annotations) + 1,  # from 1: pycocotools takes id 0 for "no match"
                    "image_id": number,
                    "category_id": dataset.category_ids[one.label],
                    "bbox": [x1, y1, width, height],
                    "area": width * height if one.area is None else one.area,
                    "iscrowd": int(one.ignored),
                }
            )
    categories = [
        {"id": category, "name": name}
        for category, name in zip(dataset.category_ids, dataset.classes, strict=True)
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


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
            missing = [
                name
                for name in ("image_id", "category_id", "bbox", "score")
                if not isinstance(row, Mapping) or name not in row
            ]
            raise DataError(f"{where}: entry {i} has no {', '.join(missing)}") from None
        try:
            table[i, 1:5] = box
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
    """Number by whatever a results file may call a picture; the data's own id goes first."""
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
