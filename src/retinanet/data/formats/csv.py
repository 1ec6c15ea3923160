"""CSV: one row per object; columns are found by their names, in any order.

There is no standard CSV format, so this reads what exporters, spreadsheets and keras-retinanet
write: corners, or a corner and a size, or one ``bbox`` column of [x, y, width, height]; pixels, or
fractions if every coordinate of the file is in [0, 1]; a ``split`` column, or a file per split. A
file without a header is read as path, x1, y1, x2, y2, class. A row without a box is an image
without objects.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from retinanet.data.dataset import Dataset
from retinanet.data.finder import LabelSet, Tree
from retinanet.data.formats import reading
from retinanet.data.formats.reading import LabelFile, LabelImage
from retinanet.data.formats.writing import SIDES, Writing, number_text, object_values, size_of
from retinanet.data.splits import split_word
from retinanet.errors import DataError

# Column names of exporters, lower case, letters and digits only; the first one present is used.
_COLUMNS: dict[str, tuple[str, ...]] = {
    "image": (
        *("filename", "filepath", "file", "path", "image", "imagepath", "imagename", "imagefile"),
        *("imagefilename", "img", "imgpath", "imgname", "image", "fname", "imageid", "imgid"),
    ),
    "class": (
        *("class", "classname", "label", "labelname", "celltype", "category", "categoryname"),
        *("objectclass", "objectname", "type", "species", "name", "classid", "labelid"),
    ),
    "x1": ("xmin", "x1", "left", "minx", "xtl", "x0", "bboxxmin", "bboxx1", "xtopleft", "startx"),
    "y1": ("ymin", "y1", "top", "miny", "ytl", "y0", "bboxymin", "bboxy1", "ytopleft", "starty"),
    "x2": ("xmax", "x2", "right", "maxx", "xbr", "bboxxmax", "bboxx2", "xbottomright", "endx"),
    "y2": ("ymax", "y2", "bottom", "maxy", "ybr", "bboxymax", "bboxy2", "ybottomright", "endy"),
    "x": ("x", "bboxx", "xmin", "x1", "left"),
    "y": ("y", "bboxy", "ymin", "y1", "top"),
    "box_width": ("bboxwidth", "boxwidth", "bboxw", "w", "width"),
    "box_height": ("bboxheight", "boxheight", "bboxh", "h", "height"),
    "bbox": ("bbox", "box", "boundingbox"),
    "width": ("imagewidth", "imgwidth", "imagew", "imgw", "width", "w"),
    "height": ("imageheight", "imgheight", "imageh", "imgh", "height", "h"),
    "split": ("split", "subset", "partition", "usage", "set"),
    "id": ("id", "annotationid"),
    "image_id": ("imageid",),
    "iscrowd": ("iscrowd", "crowd", "isgroupof"),
    "difficult": ("difficult",),
    "area": ("area",),
}
_BOXES = (("x1", "y1", "x2", "y2"), ("x", "y", "box_width", "box_height"), ("bbox",))
_OTHERS = ("width", "height", "image", "class", "split", "image_id")
_ROW_VALUES = ("id", "iscrowd", "difficult", "area")
_NO_HEADER = ("image", "x1", "y1", "x2", "y2", "class")
CLASS_FILES = ("classes.csv", "class_list.csv")
"""Files with the names and ids of the classes."""
_SUFFIXES = (".csv", ".tsv")
_SCORES = ("confidence", "conf", "score", "scores", "probability", "prob")
_DEFAULT_CLASS = "object"  # without a column of classes
_BACKGROUND = ("background", "none", "nan")
EXTRA = "extra_"
"""Prefix of a column whose name would be taken for another's."""


def detect(file: Path) -> bool:
    """Whether a file is a table of boxes."""
    try:
        return file.name not in CLASS_FILES and bool(_columns(next(_rows(file))[1]))
    except (DataError, StopIteration):
        return False


def find(tree: Tree) -> LabelSet | None:
    """Return the tables of a tree by split; results of a detector beside labels are left out."""
    tables = set(filter(detect, tree.with_suffix(*_SUFFIXES)))
    results = set(filter(_is_results, tables))
    if len(results) == len(tables):
        results = set()
    labels = reading.find_tables(
        "csv", tree, _SUFFIXES, lambda file: file in tables and file not in results, parse
    )
    if labels is not None:
        labels.notes += [f"{file}: detection results (it has scores)" for file in sorted(results)]
    return labels


def _is_results(file: Path) -> bool:
    """Whether a table that is not named after a split has a column of scores that differ."""
    if split_word(file.stem):
        return False
    rows = [cells for _, cells in _rows(file)]
    column = next((i for i, name in enumerate(rows[0]) if _word(name) in _SCORES), None)
    if column is None:
        return False
    values = {reading.to_number(cells[column]) for cells in rows[1:] if column < len(cells)}
    return not values <= {0.0, 1.0, None}


def read(tree: Tree, labels: LabelSet) -> reading.Splits:
    """Read a CSV data set; the files are parsed once, a split's data set is built when called.

    Classes are those of ``classes.csv`` (name, id) or ``classes.txt`` if there is one, else all
    names in all files, sorted: the same for every split.
    """
    files = [parse(file, split=split) for split, file in labels.by_split()]
    source, classes = _listed_classes(tree)
    if not classes:
        names = {name for file in files for name in file.classes}
        is_number = all(name.isdecimal() for name in names)
        classes = list(enumerate(sorted(names, key=int) if is_number else sorted(names)))
    return reading.build_splits("csv", files, reading.merge_classes(classes, source), tree)


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of the rows that are not blank."""
    try:
        with io.StringIO(reading.read_text(file), newline="") as stream:
            first = stream.readline()
            stream.seek(0)
            # A quoted header may contain other separators too, but less often.
            separator = max(",;\t|", key=first.count)
            reader = csv.reader(stream, delimiter=separator, skipinitialspace=True)
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    yield reader.line_num, [cell.strip() for cell in cells]
    except (OSError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read as CSV: {error}") from None


def _columns(first: Sequence[str]) -> dict[str, int]:
    """Return indices of the columns by their meaning; empty if they are not those of boxes."""
    if _is_headerless(first):
        return {name: index for index, name in enumerate(_NO_HEADER)}
    words = [_word(word) for word in first]
    indices = {
        meaning: next((words.index(word) for word in names if word in words), None)
        for meaning, names in _COLUMNS.items()
    }
    box = next((box for box in _BOXES if all(indices[side] is not None for side in box)), None)
    if box is None or indices["image"] is None:
        return {}
    columns: dict[str, int] = {}
    for meaning in (*box, *_OTHERS, *_ROW_VALUES):
        index = indices[meaning]
        if index is not None and index not in columns.values():
            columns[meaning] = index
    return columns


def missing_columns(file: Path) -> str:
    """Return why a file is no table of boxes."""
    try:
        first = next(_rows(file))[1]
    except StopIteration:
        return "empty"
    except DataError as error:
        return str(error)
    words = [_word(word) for word in first]
    is_known = any(name in words for name in _COLUMNS["image"])
    missing = "the box" if is_known else "the image"
    return f"no column for {missing}; columns are {reading.cut(', '.join(first), 200)}"


def _is_headerless(first: Sequence[str]) -> bool:
    """Whether the first row is path, four numbers or nothing, class."""
    sides = first[1:5]
    is_row = not any(sides) or all(reading.to_number(side) is not None for side in sides)
    return len(first) == len(_NO_HEADER) and bool(first[0]) and is_row


def _word(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def parse(file: Path, *, split: str | None = None) -> LabelFile:
    """Parse a table of boxes."""
    parsed = LabelFile(file, split)
    rows = list(_rows(file))
    first = rows[0][1]
    columns = _columns(first)
    others: dict[str, int] = {}
    if not _is_headerless(first):
        rows = rows[1:]
        known = set(columns.values())
        others = {
            name.removeprefix(EXTRA): index
            for index, name in enumerate(first)
            if name and index not in known
        }
    images: dict[tuple[str | None, str], LabelImage] = {}
    for number, (line, cells) in enumerate(rows):
        texts = {key: cells[i] if i < len(cells) else "" for key, i in columns.items()}
        extra = {
            key: reading.from_text(key, cells[i])
            for key, i in others.items()
            if i < len(cells) and cells[i]
        }
        _parse_row(parsed, images, texts, extra, line, number)
    parsed.images = list(images.values())
    reading.scale_normalised(parsed)
    return parsed


def _parse_row(
    parsed: LabelFile,
    images: dict[tuple[str | None, str], LabelImage],
    cells: Mapping[str, str],
    extra: dict[str, Any],
    line: int,
    number: int,
) -> None:
    name, split = cells.get("image", ""), cells.get("split") or None
    class_name = cells.get("class", "") if "class" in cells else _DEFAULT_CLASS
    split = split and (split_word(split) or split)
    if not name:
        parsed.report("label-unreadable", number, f"line {line}: names no image", split=split)
        return
    image = images.get((split, name))
    if image is None:
        id_ = (
            reading.from_text("id", cells["image_id"]) if cells.get("image_id") else Path(name).stem
        )
        width, height = (reading.to_size(cells.get(side)) for side in ("width", "height"))
        image = LabelImage(name, id_, width, height, split=split)
    sides = [cells[side] for form in _BOXES for side in form if side in cells]
    is_empty = not any(sides) and cells.get("class", "none").lower() in ("", *_BACKGROUND)
    values = extra | {
        key: reading.from_text(key, cells[key]) for key in _ROW_VALUES if cells.get(key)
    }
    stated = ", ".join(map(repr, sides))
    where = f"line {line}: {reading.cut(name)}"
    numbers = re.split(r"[,;\s]+", sides[0].strip("[](){} ")) if "bbox" in cells else sides
    box = reading.to_box(numbers, has_size="x2" not in cells)
    # An image of faulty rows alone is no background.
    if is_empty or parsed.add(image, number, class_name, box, stated, values, where=where):
        images[split, name] = image


def _listed_classes(tree: Tree) -> tuple[Path, list[tuple[int, str]]]:
    """Return a file of classes, and its ids and names; the path and none if there is none."""
    file = tree.named(*CLASS_FILES)
    if file is not None:
        rows = [cells for _, cells in _rows(file) if len(cells) >= 2]
        return file, sorted((int(row[1]), row[0]) for row in rows if row[1].isdecimal())
    file, names = reading.listed_names(tree, "classes.txt")
    return file, list(enumerate(names))


def write(writing: Writing) -> None:
    """Write ``SPLIT.csv``, the images in ``SPLIT/``, and ``classes.csv`` (class, id).

    Other columns than image, size, class and box are written if some object has such a value.
    """
    names = writing.names(together=False, stems=False)
    for split, dataset in writing.splits.items():
        writing.count_dataset_values(dataset)
        if any(image.extra for image in dataset.images):
            writing.lost["values of an image other than its size"] += 1
        _write_split(dataset, split, names[split], writing)
    first = next(iter(writing.splits.values()))
    with (writing.folder / CLASS_FILES[0]).open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(
            [("class", "id"), *zip(first.classes, first.category_ids, strict=True)]
        )
    writing.place(names, "{split}/{name}")


def _write_split(dataset: Dataset, split: str, names: Mapping[Path, str], writing: Writing) -> None:
    rows: list[dict[str, Any]] = []
    for image in dataset.images:
        height, width = size_of(image)
        name = f"{split}/{names[image.path]}"
        common = {"filename": name, "width": width, "height": height}
        if image.id != Path(name).stem:
            common["image_id"] = reading.to_text(image.id)
        if not image.annotations:
            rows.append(common)
        for annotation in image.annotations:
            sides = zip(SIDES, map(number_text, annotation.box), strict=True)
            extra = {
                _column(key): reading.to_text(value) for key, value in annotation.extra.items()
            }
            values = object_values(annotation, len(rows))
            name = dataset.classes[annotation.label]
            rows.append({**common, "class": name, **dict(sides), **values, **extra})
    header = dict.fromkeys(("filename", "width", "height", "class", *SIDES))
    for row in rows:
        header |= dict.fromkeys(row)
    with (writing.folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, header, restval="")
        writer.writeheader()
        writer.writerows(rows)


def _column(key: str) -> str:
    """Return the column of an extra value, which must not be read as another one."""
    return f"{EXTRA}{key}" if any(_word(key) in words for words in _COLUMNS.values()) else key
