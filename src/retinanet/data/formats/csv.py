"""CSV: a row an object; columns are found by their names, in any order.

There is no one CSV format, so this reads what exporters, spreadsheets and keras-retinanet write:
corners, or a corner and a size, or one ``bbox`` column of [x, y, width, height]; pixels, or
shares where every coordinate of the file is in [0, 1]; a ``split`` column, or a file a split. A
file without a header is read as path, x1, y1, x2, y2, class. A row without a box is an image of
pure background.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retinanet.data.dataset import Annotation, Dataset, LabelledImage, Problem
from retinanet.data.formats.finding import (
    ClassList,
    ImageFinder,
    from_text,
    merge_classes,
    to_flag,
    to_number,
    to_text,
)
from retinanet.data.formats.writing import Writing, number_text, own_area, size_of
from retinanet.data.splits import split_word
from retinanet.errors import DataError

LOOKED_FOR = (
    "CSV: a .csv with columns for the image and the box (such as filename, class, xmin, ymin, "
    "xmax, ymax)"
)

# Header words as exporters write them, lower case, without anything but letters and digits. The
# first that a file has counts.
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
_THE_CLASS = "object"  # where no column names one
EXTRA = "extra_"
"""What stands before the name of a column that would be taken for another."""


def is_csv(path: Path) -> bool:
    """Whether `path` is a CSV file of boxes, or a folder that holds one."""
    return bool(_files(path))


def read_csv(path: Path, *, extras: bool = True) -> dict[str, Callable[[], Dataset]]:
    """The splits of a CSV data set; each is made when called, the files are read once.

    Classes are those of ``classes.csv`` (name, id) or ``classes.txt`` where there is one (then any
    other name is a problem), else all names in all files, sorted: the same for every split.

    Args:
        path: the file, or its folder.
        extras: keep the columns that are not ours.

    Raises:
        DataError: a file cannot be read, or lacks columns.
    """
    tables = {file: _read_table(file, word, extras) for word, file in _files(path)}
    by_split: dict[str, list[tuple[_Table, list[_Row]]]] = {}
    for table in tables.values():
        for row in table.rows:
            parts = by_split.setdefault(row.split, [])
            if not parts or parts[-1][0] is not table:
                parts.append((table, []))
            parts[-1][1].append(row)
        if not table.rows:
            by_split.setdefault(table.split, []).append((table, []))
    folder = path if path.is_dir() else path.parent
    file, pairs = _class_ids(folder)
    classes = merge_classes(pairs or _class_ids_of(tables.values()), file)

    def reader(split: str) -> Callable[[], Dataset]:
        return lambda: _dataset(split, by_split[split], classes, path)

    return {split: reader(split) for split in by_split}


@dataclass(slots=True)
class _Row:
    """One row, before classes are known; `sides` None: an image of pure background."""

    image: str
    place: int
    line: int
    split: str
    name: str = ""
    sides: tuple[float, float, float, float] | None = None
    width: int | None = None
    height: int | None = None
    image_id: int | str | None = None
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Table:
    file: Path
    split: str
    rows: list[_Row] = field(default_factory=list)
    problems: list[tuple[str, Problem]] = field(default_factory=list)
    relative: bool = False


def _files(path: Path) -> list[tuple[str, Path]]:
    """CSV files of boxes, each with the split that its name or folder speaks of, or ``""``."""
    if path.is_file():
        files = [path] if path.suffix.lower() in (".csv", ".tsv") else []
    elif path.is_dir():
        folders = [path, path / "annotations"]
        folders += sorted(sub for sub in path.iterdir() if sub.is_dir() and split_word(sub.name))
        files = [
            file
            for folder in folders
            if folder.is_dir()
            for file in sorted([*folder.glob("*.csv"), *folder.glob("*.tsv")])
        ]
    else:
        files = []
    found = [file for file in files if file.name not in _CLASS_FILES and _has_boxes(file)]
    words = [
        split_word(file.stem) or (split_word(file.parent.name) if file.parent != path else None)
        for file in found
    ]
    if path.is_file():
        words = [split_word(file.stem) for file in found]
    several = len(found) > 1
    return [
        (word or (file.stem if several else ""), file)
        for word, file in zip(words, found, strict=True)
    ]


def _has_boxes(file: Path) -> bool:
    try:
        rows = _rows(file)
        return _columns(next(rows)[1]) is not None
    except (DataError, StopIteration):
        return False


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of the rows that hold anything."""
    try:
        with file.open(newline="", encoding="utf-8-sig", errors="replace") as stream:
            first = stream.readline()
            stream.seek(0)
            # A header in quotes may hold a comma; it holds no two kinds of separator more often.
            separator = max(",;\t|", key=first.count)
            reader = csv.reader(stream, delimiter=separator, skipinitialspace=True)
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    yield reader.line_num, [cell.strip() for cell in cells]
    except (OSError, csv.Error) as error:
        raise DataError(f"{file}: cannot be read as CSV: {error}") from None


def _columns(first: Sequence[str]) -> dict[str, int] | None:
    """Places of the columns by what they mean; None: they are not those of boxes.

    A file without a header answers as if it had that of ``_NO_HEADER``.
    """
    if len(first) == len(_NO_HEADER) and first[0] and _is_row(first[1:5]):
        return {name: place for place, name in enumerate(_NO_HEADER)}
    words = [_word(word) for word in first]

    def place(meaning: str) -> int | None:
        return next((words.index(word) for word in _COLUMNS[meaning] if word in words), None)

    if all(place(side) is not None for side in ("x1", "y1", "x2", "y2")):
        wanted = ["x1", "y1", "x2", "y2", "width", "height"]
    elif all(place(side) is not None for side in ("x", "y", "box_width", "box_height")):
        wanted = ["x", "y", "box_width", "box_height", "width", "height"]
    elif place("bbox") is not None:
        wanted = ["bbox", "width", "height"]
    else:
        return None
    if place("image") is None:
        return None
    columns: dict[str, int] = {}
    for meaning in [*wanted, "image", "class", "split", "image_id", *_ROW_VALUES]:
        found = place(meaning)
        if found is not None and found not in columns.values():
            columns[meaning] = found
    return columns


def _word(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


_ROW_VALUES = ("id", "crowd", "difficult", "area")


def _is_row(cells: Sequence[str]) -> bool:
    """Whether four cells are the box of a row without header: numbers, or nothing at all."""
    if not any(cells):
        return True
    try:
        for cell in cells:
            to_number(cell)
    except ValueError:
        return False
    return True


def _read_table(file: Path, split: str, extras: bool) -> _Table:
    table = _Table(file, split)
    rows = _rows(file)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{file}: is empty")
    columns = _columns(first[1])
    if columns is None:
        raise DataError(
            f"{file}: no columns for the image and its box among {', '.join(first[1])[:200]}; "
            f"name them filename, class, xmin, ymin, xmax, ymax"
        )
    headerless = len(first[1]) == len(_NO_HEADER) and _is_row(first[1][1:5])
    header = [] if headerless else first[1]
    others = {
        name.removeprefix(EXTRA): place
        for place, name in enumerate(header)
        if extras and name and place not in columns.values()
    }
    place = 0
    if headerless:
        _read_row(table, columns, others, first[0], first[1], place)
        place += 1
    for line, cells in rows:
        _read_row(table, columns, others, line, cells, place)
        place += 1
    sides = [side for row in table.rows if row.sides for side in row.sides]
    # An image of one pixel aside, boxes in pixels do not all lie within [0, 1].
    table.relative = bool(sides) and all(0 <= side <= 1 for side in sides) and any(sides)
    return table


def _read_row(
    table: _Table,
    columns: Mapping[str, int],
    others: Mapping[str, int],
    line: int,
    cells: Sequence[str],
    place: int,
) -> None:
    def cell(meaning: str) -> str:
        at = columns.get(meaning)
        return cells[at] if at is not None and at < len(cells) else ""

    given = cell("split")
    split = (split_word(given) or given) if given else table.split
    image = cell("image")

    def problem(kind: str, reason: str) -> None:
        reason = f"line {line}: {reason}"
        table.problems.append((split, Problem(kind, table.file, place, reason, "dropped")))

    if not image:
        problem("label-unreadable", "names no image")
        return
    row = _Row(image, place, line, split)
    row.width, row.height = _size(cell("width")), _size(cell("height"))
    if columns.get("image_id") is not None and cell("image_id"):
        row.image_id = from_text("id", cell("image_id"))
    sides = [
        cell(meaning)
        for meaning in ("x1", "y1", "x2", "y2", "x", "y", "box_width", "box_height", "bbox")
        if meaning in columns
    ]
    name = cell("class") if "class" in columns else _THE_CLASS
    if any(sides):
        try:
            row.sides = _box(columns, sides)
        except ValueError as error:
            problem("box-not-a-number", f"{image}, {name or 'no class'}: {error}")
            return
        if not name:
            problem("class-unknown", f"{image}: a box without a class")
            return
    elif name and "class" in columns and not _is_background(name):
        problem("box-not-a-number", f"{image}, {name}: no box; leave the class empty too")
        return
    row.name = name
    row.values = {
        "id": from_text("id", cell("id")) if cell("id") else place,
        "crowd": to_flag(cell("crowd")),
        "difficult": to_flag(cell("difficult")),
        "area": _area(cell("area")),
        "extra": {
            key: from_text(key, cells[at])
            for key, at in others.items()
            if at < len(cells) and cells[at]
        },
    }
    table.rows.append(row)


def _is_background(name: str) -> bool:
    return name.lower() in ("background", "none", "nan")


def _box(columns: Mapping[str, int], cells: list[str]) -> tuple[float, float, float, float]:
    if "bbox" in columns:
        cells = re.split(r"[,;\s]+", cells[0].strip("[](){} "))
    try:
        a, b, c, d = (to_number(cell) for cell in cells)
    except ValueError:
        raise ValueError(f"{', '.join(map(repr, cells))}: not four numbers") from None
    return (a, b, c, d) if "x2" in columns else (a, b, a + c, b + d)


def _size(text: str) -> int | None:
    try:
        return int(float(text)) or None
    except (ValueError, OverflowError):
        return None


def _area(text: str) -> float | None:
    try:
        return to_number(text)
    except ValueError:
        return None


def _class_ids(folder: Path) -> tuple[Path, list[tuple[int, str]]]:
    """A file of classes, and the ids and names in it; the folder and none where there is none."""
    for file in (folder / name for name in _CLASS_FILES):
        if file.is_file():
            rows = [cells for _, cells in _rows(file) if len(cells) >= 2]
            return file, sorted((int(row[1]), row[0]) for row in rows if row[1].isdecimal())
    file = folder / "classes.txt"
    if file.is_file():
        lines = file.read_text("utf-8-sig", errors="replace").splitlines()
        return file, [(i, line.strip()) for i, line in enumerate(lines) if line.strip()]
    return folder, []


def _class_ids_of(tables: Any) -> Iterable[tuple[int, str]]:
    names = {row.name for table in tables for row in table.rows if row.sides}
    numbers = all(name.isdecimal() for name in names)
    return enumerate(sorted(names, key=int) if numbers else sorted(names))


def _dataset(
    split: str,
    parts: list[tuple[_Table, list[_Row]]],
    classes: ClassList,
    source: Path,
) -> Dataset:
    labels = {name: label for label, name in enumerate(classes.names)}
    images: list[LabelledImage] = []
    problems = list(classes.problems)
    for table, rows in parts:
        finder = ImageFinder(_image_folders(table.file, split))
        by_image: dict[str, list[_Row]] = {}
        for row in rows:
            by_image.setdefault(row.image, []).append(row)
        problems += [problem for of, problem in table.problems if of == split]
        for name, members in by_image.items():
            image = _image(finder.find(name), members, labels, table, problems)
            images.append(image)
    return Dataset(
        images=tuple(images),
        classes=classes.names,
        category_ids=classes.ids,
        split=split,
        format="csv",
        source=source,
        problems=tuple(problems),
    )


def _image(
    path: Path,
    rows: list[_Row],
    labels: Mapping[str, int],
    table: _Table,
    problems: list[Problem],
) -> LabelledImage:
    first = rows[0]
    width, height = first.width, first.height
    across, down = 1.0, 1.0
    if table.relative:
        from retinanet.data.images import image_size

        try:
            height, width = image_size(path)
            across, down = float(width), float(height)
        except (DataError, OSError) as error:
            if path.is_file():
                reason = f"its boxes are shares of an image whose size cannot be read: {error}"
                problems.append(Problem("image-unreadable", path, None, reason, "dropped"))
            rows = []
    annotations = []
    for row in rows:
        if row.sides is None:
            continue
        if row.name not in labels:
            reason = (
                f"line {row.line}: {row.image}: class {row.name!r} is not in the list of classes"
            )
            problems.append(Problem("class-unknown", table.file, row.place, reason, "dropped"))
            continue
        x1, y1, x2, y2 = row.sides
        box = (x1 * across, y1 * down, x2 * across, y2 * down)
        annotations.append(Annotation(box, labels[row.name], **row.values))
    id_ = path.stem if first.image_id is None else first.image_id
    return LabelledImage(path, id_, tuple(annotations), width, height, table.file)


def _image_folders(file: Path, split: str) -> list[Path]:
    root = file.parent
    if root.name == "annotations":
        root = root.parent
    folders = [root / split, root / "images" / split] if split else []
    folders += [file.parent, root, root / "images", root / "JPEGImages", root / "img"]
    subs = [sub for sub in sorted(root.iterdir()) if sub.is_dir()]
    return folders + [sub for sub in subs if split and split_word(sub.name) == split] + subs


def write_csv(writing: Writing) -> None:
    """Write ``SPLIT.csv``, the images in ``SPLIT/``, and ``classes.csv`` (class, id).

    Columns beside image, size, class and box are written where some object has such a value.
    """
    names = writing.names(together=False, stems=False)
    images: list[tuple[Path, Path]] = []
    for split, dataset in writing.splits.items():
        if dataset.extra:
            writing.lost["what is said of the whole data set (info, licences)"] += 1
        if any(image.extra for image in dataset.images):
            writing.lost["what is said of an image beside its size"] += 1
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


def _more(annotation: Annotation, place: int) -> dict[str, str]:
    """What an object says beside class and box, as columns."""
    more: dict[str, str] = {}
    if annotation.id != place:
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
