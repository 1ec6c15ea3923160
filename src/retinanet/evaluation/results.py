"""Detections of a data set as one table and as COCO's results file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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

COLUMNS = 7  # image id, x, y, width, height, score, category id

_KEYS = ("image_id", "category_id", "bbox", "score")
_CHUNK = 10_000  # rows converted to Python numbers at once
_LAYOUT = '{"image_id", "category_id", "bbox", "score"}'


class Results:
    """Detections of a data set: 56 bytes per detection.

    Args:
        dataset: the images.
        label_map: (K,) the data's label of each label of the detector; detections with -1 are
            dropped. None: the labels are the data's.
    """

    def __init__(self, dataset: Dataset, label_map: Sequence[int] | None = None) -> None:
        self.dataset = dataset
        self.image_ids = coco_image_ids(dataset)
        self._category_ids = np.asarray(dataset.category_ids, dtype=np.float64)
        self._label_map = None if label_map is None else np.asarray(label_map, dtype=np.int64)
        self._parts: list[tuple[int, NDArray[np.float64]]] = []  # index of the image, its rows

    def add(self, index: int, detections: Detections) -> None:
        """Add the detections of image `index` of the data set, in pixels of that image.

        Raises:
            DataError: a box or score is NaN or Inf.
        """
        boxes = detections.boxes.detach().cpu().double().numpy().reshape(-1, 4)
        scores = detections.scores.detach().cpu().double().numpy()
        labels = detections.labels.detach().cpu().numpy()
        if self._label_map is not None and len(labels):
            labels = self._label_map[labels]
            kept = labels >= 0
            boxes, scores, labels = boxes[kept], scores[kept], labels[kept]
        rows = np.empty((len(labels), COLUMNS))
        rows[:, 0] = self.image_ids[index]
        rows[:, 1:3] = boxes[:, :2]
        rows[:, 3:5] = boxes[:, 2:] - boxes[:, :2]
        rows[:, 5] = scores
        rows[:, 6] = self._category_ids[labels]
        if not np.isfinite(rows).all():
            path = self.dataset.images[index].path
            raise DataError(f"{path.name}: a detected box or score is NaN or Inf")
        self._parts.append((index, rows))

    def of_classes(self, dataset: Dataset) -> Results:
        """Keep the detections of the classes of `dataset`, which has the same images."""
        kept = Results(dataset)
        table = self.table()
        kept._parts = [(-1, table[np.isin(table[:, 6], dataset.category_ids)])]
        return kept

    def __len__(self) -> int:
        return sum(len(rows) for _, rows in self._parts)

    def table(self) -> NDArray[np.float64]:
        """(N, 7) image id, x, y, width, height, score, category id, in the data set's order."""
        if len(self._parts) != 1:
            parts = [rows for _, rows in sorted(self._parts, key=itemgetter(0))]
            self._parts = [(-1, np.concatenate([np.empty((0, COLUMNS)), *parts]))]
        return self._parts[0][1]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of COCO's results; numbers are exact, so that they give the same AP."""
        table = self.table()
        for first in range(0, len(table), _CHUNK):
            for image, x, y, width, height, score, category in table[
                first : first + _CHUNK
            ].tolist():
                yield {
                    "image_id": int(image),
                    "category_id": int(category),
                    "bbox": [x, y, width, height],
                    "score": score,
                }

    def write(self, file: Path) -> None:
        """Write COCO's results file, one detection per line, atomically."""
        with open_atomic(file) as out:
            for i, row in enumerate(self.rows()):
                out.write((",\n" if i else "[\n") + json.dumps(row))
            out.write("\n]\n" if len(self) else "[]\n")

    @classmethod
    def read(cls, source: Path | Sequence[Mapping[str, Any]], dataset: Dataset) -> Results:
        """Read COCO's results from a file or a list.

        Image ids are the data's own; where those are no integers, image names, file names and the
        numbers that :meth:`write` gives them are accepted too.

        Raises:
            DataError: the file cannot be read or is no results file; a box, score, image id or
                category id is wrong. The message names the first wrong row.
        """
        rows: Any = source
        where = "results"
        if isinstance(source, Path):
            where = source.name
            rows = _read_json(source)
        if isinstance(rows, Mapping) and "annotations" in rows and "images" in rows:
            raise DataError(
                f"{where} contains labels (images and annotations), not results: a list of "
                f"{_LAYOUT}"
            )
        if isinstance(rows, str | Mapping) or not isinstance(rows, Sequence):
            kind = {dict: "object", str: "string", type(None): "null"}.get(type(rows), "number")
            raise DataError(
                f"{where} is not a COCO results file: expected a list of {_LAYOUT}, found a JSON "
                f"{kind}"
            )
        results = cls(dataset)
        results._parts = [(-1, _parse_rows(rows, results, where))]
        return results


def coco_image_ids(dataset: Dataset) -> tuple[int, ...]:
    """COCO's image ids: the data's own where they are distinct integers, else 1, 2, 3, ...

    Images named by distinct numbers (``12.png``) have these numbers, as other tools write them.
    """
    own = [image.id for image in dataset.images]
    stems = [image.path.stem for image in dataset.images]
    numbers = [int(stem) for stem in stems if stem.isdecimal() and stem.isascii()]
    for ids in (own, numbers):
        # The evaluator takes ids as doubles, exact up to 2^53.
        exact = [id_ for id_ in ids if isinstance(id_, int) and 0 <= id_ < 2**53]
        if len(set(exact)) == len(own):
            return tuple(exact)
    return tuple(range(1, len(own) + 1))


@dataclass(frozen=True, slots=True, eq=False)
class GroundTruth:
    """The objects of a data set as arrays for COCO's evaluation.

    Objects with an invalid box (not finite, or inverted) are left out; boxes without width or
    height are kept, as COCO does.

    Attributes:
        image_ids: (M,) int64 COCO's image id of each object.
        category_ids: (M,) int64.
        boxes: (M, 4) float64 x, y, width, height.
        areas: (M,) float64 square pixels: the data's own, else the box's.
        ignored: (M,) bool: crowd and difficult objects (COCO's ``iscrowd``).
        left_out: number of objects with an invalid box.
        objects: (M,) position of each object among those of all images.
    """

    image_ids: NDArray[np.int64]
    category_ids: NDArray[np.int64]
    boxes: NDArray[np.float64]
    areas: NDArray[np.float64]
    ignored: NDArray[np.bool_]
    left_out: int
    objects: NDArray[np.int64]

    @classmethod
    def of(cls, dataset: Dataset) -> GroundTruth:
        """Collect the objects of a data set, in its order."""
        objects = [annotation for image in dataset.images for annotation in image.annotations]
        corners = np.array([a.box for a in objects], dtype=np.float64).reshape(-1, 4)
        boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
        kept = np.isfinite(corners).all(axis=1) & (boxes[:, 2:] >= 0).all(axis=1)
        categories = np.asarray(dataset.category_ids, dtype=np.int64)
        labels = np.array([a.label for a in objects], dtype=np.int64)
        areas = np.array([np.nan if a.area is None else a.area for a in objects], np.float64)
        counts = [len(image.annotations) for image in dataset.images]
        image_ids = np.repeat(np.array(coco_image_ids(dataset), dtype=np.int64), counts)
        with np.errstate(invalid="ignore", over="ignore"):
            areas = np.where(np.isnan(areas), boxes[:, 2] * boxes[:, 3], areas)
        return cls(
            image_ids[kept],
            categories[labels[kept]],
            boxes[kept],
            areas[kept],
            np.array([a.ignored for a in objects], dtype=np.bool_)[kept],
            int((~kept).sum()),
            np.flatnonzero(kept),
        )

    def __len__(self) -> int:
        return len(self.areas)


def coco_images(dataset: Dataset) -> list[dict[str, Any]]:
    """COCO's ``images``."""
    return [
        {
            "id": image_id,
            "file_name": image.path.name,
            "width": image.width or 0,
            "height": image.height or 0,
        }
        for image_id, image in zip(coco_image_ids(dataset), dataset.images, strict=True)
    ]


def coco_categories(dataset: Dataset) -> list[dict[str, Any]]:
    """COCO's ``categories``."""
    pairs = zip(dataset.category_ids, dataset.classes, strict=True)
    return [{"id": category, "name": name} for category, name in pairs]


def ground_truth(dataset: Dataset) -> dict[str, Any]:
    """Return the :class:`GroundTruth` in COCO's instances format."""
    truth = GroundTruth.of(dataset)
    columns = {
        "image_id": truth.image_ids,
        "category_id": truth.category_ids,
        "bbox": truth.boxes,
        "area": truth.areas,
        "iscrowd": truth.ignored.astype(int),
    }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return {
        "images": coco_images(dataset),
        # Ids from 1: pycocotools takes id 0 for "no match".
        "annotations": [
            {"id": number, **dict(zip(columns, row, strict=True))}
            for number, row in enumerate(rows, start=1)
        ],
        "categories": coco_categories(dataset),
    }


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise DataError(f"{file}: no such file") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{file} is not JSON: {error.msg} at line {error.lineno}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None


def _parse_rows(rows: Sequence[Any], results: Results, where: str) -> NDArray[np.float64]:
    """Convert the rows of a results file to a table."""
    dataset = results.dataset
    image_ids = _image_ids_by_name(dataset, results.image_ids)
    categories = set(dataset.category_ids)
    data = f"{dataset.source} ({dataset.split})"
    table = np.empty((len(rows), COLUMNS))
    for i, row in enumerate(rows):
        try:
            image, category = row["image_id"], row["category_id"]
            box, score = row["bbox"], row["score"]
        except (KeyError, TypeError, IndexError):
            missing = [name for name in _KEYS if not isinstance(row, Mapping) or name not in row]
            raise DataError(f"{where}: entry {i} has no {', '.join(missing)}") from None
        if not isinstance(image, int | str) or image not in image_ids:
            raise DataError(
                f"{where}: entry {i} is of image {image}, which {data} does not have; "
                "is it the right split?"
            )
        if not isinstance(category, int | float) or category not in categories:
            hint = nearest(str(category), map(str, dataset.category_ids))
            raise DataError(
                f"{where}: entry {i} has category_id {category}, which {data} does not have{hint}"
            )
        try:
            x, y, width, height = map(float, box)
            table[i] = image_ids[image], x, y, width, height, float(score), category
        except (TypeError, ValueError):
            raise DataError(
                f"{where}: entry {i} (image {image}): bbox {box} is not [x, y, width, height] "
                f"or score {score!r} is not a number"
            ) from None
    for wrong, what in (
        (~np.isfinite(table).all(axis=1), "or score {score} is not a finite number"),
        ((table[:, 3:5] < 0).any(axis=1), "has a negative size; expected [x, y, width, height]"),
    ):
        if wrong.any():
            i = int(wrong.argmax())
            raise DataError(
                f"{where}: entry {i} (image {rows[i]['image_id']}): bbox {rows[i]['bbox']} "
                + what.format(score=rows[i]["score"])
            )
    return table


def _image_ids_by_name(dataset: Dataset, ids: tuple[int, ...]) -> dict[int | str, int]:
    """COCO's id by each name that a results file may give an image; the data's own id wins."""
    known: dict[int | str, int] = {}
    for image, id_ in zip(dataset.images, ids, strict=True):
        known.setdefault(image.path.stem, id_)
        known.setdefault(image.path.name, id_)
    known |= {id_: id_ for id_ in ids}
    return known | {image.id: id_ for image, id_ in zip(dataset.images, ids, strict=True)}
