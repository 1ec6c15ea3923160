"""YOLO txt: one text file per image, one row per object, centre and size as image fractions.

Source: https://docs.ultralytics.com/datasets/detect/ and /segment/ (rows of polygons become boxes).

An image without a text file, or with an empty one, has no objects. Pixel coordinates are rounded to
a ten-thousandth, so that a box written with ten decimals is read unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from retinanet.data.dataset import Annotation, Dataset, Problem
from retinanet.data.formats.labels import (
    JSON_TEXT,
    ClassList,
    LabelFile,
    LabelImage,
    build,
    cut,
    images_in,
    listed_names,
    merge_classes,
    read_lines,
    to_number,
)
from retinanet.data.formats.writing import Writing, own_area, size_of
from retinanet.data.splits import split_word
from retinanet.errors import DataError

LOOKED_FOR = (
    "YOLO: a data.yaml with names and train, or images/ with labels/*.txt, or .txt files beside "
    "images"
)

_NAME_FILES = ("classes.txt", "obj.names", "labels.txt", "classes.names")
_SPLIT_KEYS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def detect(file: Path) -> bool:
    """Whether the first line of a text file is a row of YOLO."""
    lines = read_lines(file)
    return bool(lines) and not isinstance(_row(lines[0]), str)


def find(path: Path) -> Path | dict[str, list[Path]]:
    """Return the data.yaml of a file or folder, else the images by split; empty if neither."""
    return _find_yaml(path) or _folders(path)


def read(path: Path) -> dict[str, Callable[[], Dataset]]:
    """Read a YOLO data set: a folder, or its data.yaml; each split is read when called.

    Raises:
        DataError: data.yaml is not YAML, or has no names, or its folders hold no images.
    """
    found = find(path)
    if isinstance(found, Path):
        names, splits = _from_yaml(found)
    else:
        splits = found
        folders = (path, path / "labels", path.parent if path.name == "images" else path)
        names = next(filter(None, (listed_names(f, *_NAME_FILES)[1] for f in folders)), [])
        names = names or _numbers(image for images in splits.values() for image in images)
    classes = merge_classes(
        enumerate(names), found if isinstance(found, Path) else path, by_id=True
    )
    return {
        split: partial(_read_split, split, images, classes, path)
        for split, images in splits.items()
    }


def label_path(image: Path) -> Path:
    """Return the text file of an image: in ``labels`` for ``images``, or next to the image."""
    beside = image.with_suffix(".txt")
    parts = list(beside.parts)
    if "images" in parts[:-1]:
        parts[len(parts) - 1 - parts[::-1].index("images", 1)] = "labels"
        # In a flat folder called images the text files are next to the images.
        return beside if beside.is_file() and not Path(*parts).is_file() else Path(*parts)
    return beside


# ---- images by split


def _find_yaml(path: Path) -> Path | None:
    if path.is_file():
        files = [path] if path.suffix.lower() in (".yaml", ".yml") else []
    else:
        files = [path / "data.yaml", path / "data.yml", path / "dataset.yaml"]
        files += sorted([*path.glob("*.yaml"), *path.glob("*.yml")])
    return next((file for file in files if file.is_file() and _is_data_yaml(file)), None)


def _is_data_yaml(file: Path) -> bool:
    # By its keys, unparsed: a broken data.yaml is still one, and reading it reports the fault.
    keys = {line.partition(":")[0] for line in read_lines(file) if ":" in line}
    return bool(keys & {"names", "nc"}) and bool(keys & set(_SPLIT_KEYS))


def _from_yaml(file: Path) -> tuple[list[str], dict[str, list[Path]]]:
    """Return the names of the classes, and the images by split."""
    try:
        content = yaml.safe_load(file.read_text("utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1} column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or "cannot be parsed"
        raise DataError(f"{file}: not YAML: {what}{where}") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: holds no keys; YOLO needs names and train")
    names = _yaml_names(file, content)
    # `path` is relative to the file or to this folder, or stale.
    stated = str(content.get("path") or "")
    bases = [base for base in (file.parent / stated, Path(stated), file.parent) if base.is_dir()]
    splits: dict[str, list[Path]] = {}
    for key, split in _SPLIT_KEYS.items():
        entries = content.get(key) or []
        for entry in entries if isinstance(entries, list) else [entries]:
            images = _yaml_images(bases, str(entry))
            if images is None:
                raise DataError(f"{file}: {key}: {entry} is not a folder or a list in {bases[0]}")
            splits.setdefault(split, []).extend(images)
    if not any(splits.values()):
        raise DataError(f"{file}: no images in the folders of its splits, looked for in {bases[0]}")
    return names, splits


def _yaml_names(file: Path, content: dict[Any, Any]) -> list[str]:
    names = content.get("names")
    if isinstance(names, list):
        return list(map(str, names))
    if isinstance(names, dict):
        try:
            numbered = {int(number): str(name) for number, name in names.items()}
        except (TypeError, ValueError):
            raise DataError(f"{file}: names must go by number, as in 0: person") from None
        if sorted(numbered) != list(range(len(numbered))):
            raise DataError(
                f"{file}: names must be numbered 0 to {len(numbered) - 1} without a gap, "
                f"got {sorted(numbered)[:10]}"
            )
        return [numbered[number] for number in range(len(numbered))]
    count = content.get("nc")
    if isinstance(count, int) and count > 0:
        return list(map(str, range(count)))
    raise DataError(f"{file}: has no names; write names: [first, second, ...]")


def _yaml_images(bases: list[Path], entry: str) -> list[Path] | None:
    """Images of a folder or of a list file; None where there is neither."""
    plain = entry.replace("\\", "/")
    # Exporters write ../train/images for what lies beside the file.
    stripped = re.sub(r"^(\.{1,2}/)+", "", plain)
    for target in (base / name for name in (plain, stripped) for base in bases):
        if target.is_dir():
            return _below(target)
        if target.is_file() and target.suffix == ".txt":
            images = []
            for line in read_lines(target):
                found = [base / line for base in (target.parent, *bases) if (base / line).is_file()]
                images.append(found[0] if found else target.parent / line)
            return images
    return None


def _below(folder: Path) -> list[Path]:
    images = folder / "images"
    return images_in(images if images.is_dir() else folder, deep=True)


def _folders(root: Path) -> dict[str, list[Path]]:
    """Images by split of a data set without data.yaml; those of no split are the split ``""``."""
    if not root.is_dir():
        return {}
    is_parallel = (root / "images").is_dir() and (root / "labels").is_dir()
    top = root / "images" if is_parallel else root
    groups: dict[str, list[Path]] = {}
    for sub in sorted(top.iterdir()):
        word = split_word(sub.name) if sub.is_dir() else None
        if word:
            groups.setdefault(word, []).extend(_below(sub))
    if not any(groups.values()):
        groups = {"": images_in(top, deep=is_parallel)}
    groups = {split: images for split, images in groups.items() if images}
    files = (label_path(image) for images in groups.values() for image in images)
    return groups if any(file.is_file() and detect(file) for file in files) else {}


def _numbers(images: Iterable[Path]) -> list[str]:
    """Numbers as the names of classes without names."""
    files = {file for file in map(label_path, images) if file.is_file()}
    rows = (_row(line) for file in files for line in read_lines(file))
    last = max((row[0] for row in rows if not isinstance(row, str)), default=-1)
    return list(map(str, range(last + 1)))


# ---- rows


def _row(line: str) -> tuple[int, list[float]] | str:
    """Class, and centre x, centre y, width, height or a polygon's x, y, x, y, ... of a row.

    A text states what is wrong with the row.
    """
    words = line.split()
    number, *values = map(to_number, words)
    if number is None or None in values:
        return "holds a word that is no number"
    if not number.is_integer() or number < 0:
        return f"class {words[0]} is not a whole number from 0"
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        return (
            f"{len(words)} values, not 5 (class x y width height) or a class and 3 or more points"
        )
    return int(number), [value for value in values if value is not None]


def parse(file: Path) -> LabelFile:
    """Parse the text file of an image; the classes are numbers."""
    parsed = LabelFile(file, decimals=4)
    image = LabelImage(f"{file.stem}.jpg", file.stem)
    parsed.images.append(image)
    for number, line in enumerate(read_lines(file)):
        row = _row(line)
        if isinstance(row, str):
            reason = f"row {number + 1} ({cut(line, 60)}): {row}"
            parsed.report("label-unreadable", number, reason)
            continue
        label, values = row
        extra = {}
        if len(values) == 4:
            x, y, w, h = values
            box = x - w / 2, y - h / 2, x + w / 2, y + h / 2
        else:
            xs, ys = values[::2], values[1::2]
            box = min(xs), min(ys), max(xs), max(ys)
            extra[JSON_TEXT] = f"[{values}]"
        image.annotations.append(Annotation(box, parsed.label(str(label)), number, extra=extra))
    return parsed


def _read_split(split: str, images: list[Path], classes: ClassList, source: Path) -> Dataset:
    files = []
    for path in images:
        file = label_path(path)
        background = LabelFile(None, images=[LabelImage("", "")], decimals=4)
        parsed = parse(file) if file.is_file() else background
        parsed.images = [replace(parsed.images[0], name=path.name, id=path.stem, path=path)]
        files.append(parsed)
    return build("yolo", split, files, classes, source, problems=_without_image(images))


def _without_image(images: Iterable[Path]) -> Iterator[Problem]:
    """Label files, in the folders of the others, whose image is not there."""
    expected = {label_path(image) for image in images}
    for folder in sorted({file.parent for file in expected}):
        for file in sorted(folder.glob("*.txt")):
            # Lists of images and notes lie there too: only rows make a label file.
            if file not in expected and file.name not in _NAME_FILES and detect(file):
                reason = f"labels {len(read_lines(file))} objects, but has no image {file.stem}.*"
                yield Problem("image-missing", file, None, reason, "dropped")


# ---- writing


def write(writing: Writing) -> None:
    """Write images/SPLIT/, labels/SPLIT/ and data.yaml.

    Objects that are ignored (crowds, difficult ones) are left out: a row cannot say so, and as
    plain rows they would be trained on.
    """
    names = writing.names(together=False, stems=True)
    for split, dataset in writing.splits.items():
        folder = writing.folder / "labels" / split
        folder.mkdir(parents=True)
        for image in dataset.images:
            height, width = size_of(image)
            rows = []
            for annotation in image.annotations:
                if annotation.ignored:
                    writing.lost["objects that are ignored (crowd or difficult)"] += 1
                    continue
                writing.lost["areas that are not the box's"] += own_area(annotation) is not None
                writing.lost.update(f"values of {key!r}" for key in annotation.extra)
                x1, y1, x2, y2 = annotation.box
                centre = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height
                values = (*centre, (x2 - x1) / width, (y2 - y1) / height)
                text = " ".join(f"{value:.10f}" for value in values)
                rows.append(f"{annotation.label} {text}\n")
            stem = Path(names[split][image.path]).stem
            (folder / f"{stem}.txt").write_text("".join(rows), "utf-8")
    content: dict[str, Any] = {split: f"images/{split}" for split in writing.splits}
    content["names"] = dict(enumerate(next(iter(writing.splits.values())).classes))
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    (writing.folder / "data.yaml").write_text(text, "utf-8")
    writing.place(names, "images/{split}/{name}")
