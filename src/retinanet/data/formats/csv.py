"""CSV: one row per object; columns are found by their names, in any order.

There is no standard CSV format, so this reads what exporters, spreadsheets and keras-retinanet
write: corners, or a corner and a size, or one ``bbox`` column of [x, y, width, height]; pixels, or
fractions if every coordinate of the file is in [0, 1]; a ``split`` column, or a file per split. A
file without a header is read as path, x1, y1, x2, y2, class. A row without a box is an image
without objects.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from retinanet.data.dataset import Annotation, Dataset
from retinanet.data.formats.labels import (
    Box,
    LabelFile,
    ReadImage,
    ReadObject,
    build_splits,
    from_text,
    label_files,
    merge_classes,
    read_lines,
    split_of,
    to_area,
    to_flag,
    to_number,
    to_size,
    to_text,
)
from retinanet.data.formats.writing import Writing, number_text, own_area, size_of
from retinanet.data.splits import split_word
from retinanet.errors import DataError

LOOKED_FOR = (
    "CSV: a .csv with columns for the image and the box (such as filename, class, xmin, ymin, "
    "xmax, ymax)"
)

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
    "crowd": ("iscrowd", "crowd"),
    "difficult": ("difficult",),
    "area": ("area",),
}
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_NO_HEADER = ("image", "x1", "y1", "x2", "y2", "class")
_CLASS_FILES = ("classes.csv", "class_list.csv")
_DEFAULT_CLASS = "object"  # without a column of classes
EXTRA = "extra_"
"""Prefix of a column whose name would be taken for another's."""

_Columns = Mapping[str, int]


def is_csv(path: Path) -> bool:
    """Whether `path` is a CSV file of boxes, or a folder with one."""
    return bool(_files(path))


def read_csv(path: Path, *, extras: bool = True) -> dict[str, Callable[[], Dataset]]:
    """Read a CSV data set; the files are parsed once, a split's data set is built when called.

    Classes are those of ``classes.csv`` (name, id) or ``classes.txt`` if there is one (any other
    name is a problem), else all names in all files, sorted: the same for every split.

    Args:
        path: the file, or its folder.
        extras: keep other columns.

    Raises:
        DataError: a file cannot be read, or lacks columns.
    """
    files = [_parse(file, split, extras) for split, file in _files(path)]
    source, classes = _listed_classes(path if path.is_dir() else path.parent)
    if not classes:
        names = {o.name for file in files for image in file.images for o in image.objects}
        is_number = all(name.isdecimal() for name in names)
        classes = list(enumerate(sorted(names, key=int) if is_number else sorted(names)))
    return build_splits("csv", files, merge_classes(classes, source), path)


def _files(path: Path) -> list[tuple[str, Path]]:
    """CSV files of boxes, each with its split, or ``""``."""
    files = label_files(
        path, [".csv", ".tsv"], lambda file: file.name not in _CLASS_FILES and _has_boxes(file)
    )
    return [(split_of(file, path) or (file.stem if len(files) > 1 else ""), file) for file in files]


def _has_boxes(file: Path) -> bool:
    try:
        rows = _rows(file)
        return _columns(next(rows)[1]) is not None
    except (DataError, StopIteration):
        return False


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of the rows that are not blank."""
    try:
        with file.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
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


def _columns(first: Sequence[str]) -> dict[str, int] | None:
    """Return indices of the columns by their meaning; None if they are not those of boxes.

    A file without a header has the columns of ``_NO_HEADER``.
    """
    if _is_headerless(first):
        return {name: index for index, name in enumerate(_NO_HEADER)}
    words = [_word(word) for word in first]

    def index_of(meaning: str) -> int | None:
        return next((words.index(word) for word in _COLUMNS[meaning] if word in words), None)

    for box in (("x1", "y1", "x2", "y2"), ("x", "y", "box_width", "box_height"), ("bbox",)):
        if all(index_of(side) is not None for side in box):
            break
    else:
        return None
    if index_of("image") is None:
        return None
    columns: dict[str, int] = {}
    others = ("width", "height", "image", "class", "split", "image_id", *_ROW_VALUES)
    for meaning in (*box, *others):
        index = index_of(meaning)
        if index is not None and index not in columns.values():
            columns[meaning] = index
    return columns


def _is_headerless(first: Sequence[str]) -> bool:
    """Whether the first row is path, four numbers or nothing, class."""
    return len(first) == len(_NO_HEADER) and bool(first[0]) and _is_row(first[1:5])


def _word(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


_ROW_VALUES = ("id", "crowd", "difficult", "area")
_BOX_COLUMNS = ("x1", "y1", "x2", "y2", "x", "y", "box_width", "box_height", "bbox")


def _is_row(cells: Sequence[str]) -> bool:
    """Whether four cells are a box: all numbers, or all empty."""
    if not any(cells):
        return True
    try:
        for cell in cells:
            to_number(cell)
    except ValueError:
        return False
    return True


def _parse(file: Path, split: str, extras: bool) -> LabelFile:
    parsed = LabelFile(file, split)
    rows = list(_rows(file))
    first = rows[0][1]
    columns = _columns(first) or {}
    others: dict[str, int] = {}
    if not _is_headerless(first):
        rows = rows[1:]
        if extras:
            others = {
                name.removeprefix(EXTRA): index
                for index, name in enumerate(first)
                if name and index not in columns.values()
            }
    images: dict[tuple[str, str], ReadImage] = {}
    for number, (line, cells) in enumerate(rows):
        _read_row(parsed, images, columns, others, line, cells, number)
    parsed.images = list(images.values())
    sides = [side for image in parsed.images for item in image.objects for side in item.box]
    # Boxes in pixels do not all lie within [0, 1].
    parsed.is_relative = all(0 <= side <= 1 for side in sides) and any(sides)
    if parsed.is_relative:
        for image in parsed.images:
            image.width = image.height = None  # those of the file itself are safer
    return parsed


def _read_row(
    parsed: LabelFile,
    images: dict[tuple[str, str], ReadImage],
    columns: _Columns,
    others: _Columns,
    line: int,
    cells: list[str],
    number: int,
) -> None:
    def cell(meaning: str) -> str:
        index = columns.get(meaning)
        return cells[index] if index is not None and index < len(cells) else ""

    split = cell("split")
    split = (split_word(split) or split) if split else parsed.split
    name, class_name = cell("image"), cell("class") if "class" in columns else _DEFAULT_CLASS
    box, problem = None, None
    sides = [cell(meaning) for meaning in _BOX_COLUMNS if meaning in columns]
    if not name:
        problem = ("label-unreadable", "names no image")
    elif any(sides):
        try:
            box = _box(columns, sides)
            if not class_name:
                problem = ("class-unknown", f"{name}: a box without a class")
        except ValueError as error:
            problem = ("box-not-a-number", f"{name}, {class_name or 'no class'}: {error}")
    elif class_name and "class" in columns and not _is_background(class_name):
        problem = ("box-not-a-number", f"{name}, {class_name}: no box; leave the class empty too")
    if problem:
        kind, reason = problem
        parsed.report(kind, number, f"line {line}: {reason}", split=split)
        return
    image = images.get((split, name))
    if image is None:
        id_ = from_text("id", cell("image_id")) if cell("image_id") else Path(name).stem
        image = ReadImage(name, split, id_, to_size(cell("width")), to_size(cell("height")))
        images[split, name] = image
    if box is None:
        return
    values = {
        "id": from_text("id", cell("id")) if cell("id") else number,
        "crowd": to_flag(cell("crowd")),
        "difficult": to_flag(cell("difficult")),
        "area": to_area(cell("area")),
        "extra": {
            key: from_text(key, cells[index])
            for key, index in others.items()
            if index < len(cells) and cells[index]
        },
    }
    image.objects.append(ReadObject(class_name, box, f"line {line}: {name}", number, values))


def _is_background(name: str) -> bool:
    return name.lower() in ("background", "none", "nan")


def _box(columns: _Columns, cells: list[str]) -> Box:
    if "bbox" in columns:
        cells = re.split(r"[,;\s]+", cells[0].strip("[](){} "))
    try:
        a, b, c, d = (to_number(cell) for cell in cells)
    except ValueError:
        raise ValueError(f"{', '.join(map(repr, cells))}: not four numbers") from None
    return (a, b, c, d) if "x2" in columns else (a, b, a + c, b + d)


def _listed_classes(folder: Path) -> tuple[Path, list[tuple[int, str]]]:
    """Return a file of classes, and its ids and names; the folder and none if there is none."""
    for file in (folder / name for name in _CLASS_FILES):
        if file.is_file():
            rows = [cells for _, cells in _rows(file) if len(cells) >= 2]
            return file, sorted((int(row[1]), row[0]) for row in rows if row[1].isdecimal())
    file = folder / "classes.txt"
    return (file, list(enumerate(read_lines(file)))) if file.is_file() else (folder, [])


def write_csv(writing: Writing) -> None:
    """Write ``SPLIT.csv``, the images in ``SPLIT/``, and ``classes.csv`` (class, id).

    Other columns than image, size, class and box are written if some object has such a value.
    """
    names = writing.names(together=False, stems=False)
    images: list[tuple[Path, Path]] = []
    for split, dataset in writing.splits.items():
        if dataset.extra:
            writing.lost["values of the whole data set (info, licences)"] += 1
        if any(image.extra for image in dataset.images):
            writing.lost["values of an image other than its size"] += 1
        _write_split(dataset, split, names[split], writing)
        images += [(path, writing.folder / split / name) for path, name in names[split].items()]
    first = next(iter(writing.splits.values()))
    with (writing.folder / _CLASS_FILES[0]).open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(
            [("class", "id"), *zip(first.classes, first.category_ids, strict=True)]
        )
    writing.place(images)


def _write_split(dataset: Dataset, split: str, names: Mapping[Path, str], writing: Writing) -> None:
    rows: list[dict[str, Any]] = []
    used: dict[str, None] = {}
    for image in dataset.images:
        height, width = size_of(image)
        name = f"{split}/{names[image.path]}"
        common = {"filename": name, "width": width, "height": height}
        if image.id != Path(name).stem:
            common["image_id"] = to_text(image.id)
        if not image.annotations:
            rows.append(common)
        for annotation in image.annotations:
            sides = map(number_text, annotation.box)
            row = {
                **common,
                "class": dataset.classes[annotation.label],
                **dict(zip(_SIDES, sides, strict=True)),
                **_more(annotation, len(rows)),
            }
            rows.append(row)
            used.update(dict.fromkeys(row))
        used.update(dict.fromkeys(common))
    ours = ("filename", "width", "height", "class", *_SIDES)
    header = [*ours, *(key for key in used if key not in ours)]
    with (writing.folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, header, restval="")
        writer.writeheader()
        writer.writerows(rows)


def _more(annotation: Annotation, number: int) -> dict[str, str]:
    """Other values of an object, as columns."""
    more: dict[str, str] = {}
    if annotation.id != number:
        more["id"] = to_text(annotation.id)
    if annotation.crowd:
        more["iscrowd"] = "1"
    if annotation.difficult:
        more["difficult"] = "1"
    area = own_area(annotation)
    if area is not None:
        more["area"] = number_text(area)
    for key, value in annotation.extra.items():
        word = _word(key)
        known = any(word in words for words in _COLUMNS.values())
        more[f"{EXTRA}{key}" if known else key] = to_text(value)
    return more
