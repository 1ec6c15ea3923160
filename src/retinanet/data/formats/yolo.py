"""YOLO txt: one text file per image, one row per object, centre and size as image fractions.

Source: https://docs.ultralytics.com/datasets/detect/ and /segment/ (rows of polygons become boxes).

An image without a text file, or with an empty one, has no objects. Pixel coordinates are rounded to
a ten-thousandth, so that a box written with ten decimals is read unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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


def find(path: Path) -> dict[str, list[Path]]:
    """Return the images of a data.yaml or a folder by split.

    Raises:
        DataError: data.yaml is not YAML, or has no names, or its folders hold no images.
    """
    file = _find_yaml(path)
    return _from_yaml(file)[1] if file else _folders(path)


def matches(path: Path) -> bool:
    """Whether a path is a YOLO data.yaml or a folder of images with YOLO rows."""
    return _find_yaml(path) is not None or bool(_folders(path))


def read(path: Path) -> dict[str, Callable[[], Dataset]]:
    """Read a YOLO data set; each split's data set is read when called.

    Args:
        path: the folder, or its data.yaml.

    Raises:
        DataError: as :func:`find`.
    """
    file = _find_yaml(path)
    if file is not None:
        names, splits = _from_yaml(file)
    else:
        splits = _folders(path)
        names = _names_beside(path) or _numbers(splits.values())
    classes = merge_classes(enumerate(names), file or path, by_id=True)
    return {
        split: partial(_read_split, split, images, classes, path)
        for split, images in splits.items()
    }


def label_path(image: Path) -> Path:
    """Return the text file of an image: in ``labels`` for ``images``, or next to the image."""
    parts = list(image.parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            mirrored = Path(*parts).with_suffix(".txt")
            # In a flat folder called images the text files are next to the images.
            beside = image.with_suffix(".txt")
            return beside if beside.is_file() and not mirrored.is_file() else mirrored
    return image.with_suffix(".txt")


def _find_yaml(path: Path) -> Path | None:
    if path.is_file():
        files = [path] if path.suffix.lower() in (".yaml", ".yml") else []
    else:
        files = [path / "data.yaml", path / "data.yml", path / "dataset.yaml"]
        files += sorted([*path.glob("*.yaml"), *path.glob("*.yml")])
    return next((file for file in files if file.is_file() and _is_data_yaml(file)), None)


def _is_data_yaml(file: Path) -> bool:
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return False
    # By its keys, unparsed: a broken data.yaml is still one, and reading it reports the fault.
    keys = {line.partition(":")[0].strip() for line in text.splitlines() if ":" in line}
    return bool(keys & {"names", "nc"}) and bool(keys & set(_SPLIT_KEYS))


def _from_yaml(file: Path) -> tuple[list[str], dict[str, list[Path]]]:
    try:
        content = yaml.safe_load(file.read_text("utf-8-sig"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1} column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or "cannot be parsed"
        raise DataError(f"{file}: not YAML: {what}{where}") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: holds no keys; YOLO needs names and train")
    names = _yaml_names(file, content)
    base = _yaml_base(file, content.get("path"))
    splits: dict[str, list[Path]] = {}
    for key, split in _SPLIT_KEYS.items():
        entries = content.get(key)
        if not entries:
            continue
        for entry in entries if isinstance(entries, list) else [entries]:
            found = _yaml_images(file, base, str(entry))
            if found is not None:
                splits.setdefault(split, []).extend(found)
            else:
                raise DataError(f"{file}: {key}: {entry} is not a folder or a list in {base}")
    if not any(splits.values()):
        raise DataError(f"{file}: no images in the folders of its splits, looked for in {base}")
    return names, splits


def _yaml_names(file: Path, content: dict[Any, Any]) -> list[str]:
    names = content.get("names")
    if isinstance(names, list):
        return [str(name) for name in names]
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
        return [str(number) for number in range(count)]
    raise DataError(f"{file}: has no names; write names: [first, second, ...]")


def _yaml_base(file: Path, path: Any) -> Path:
    """Return the folder of the splits: `path` is itself relative to the file, or stale."""
    if not path:
        return file.parent
    for base in (file.parent / str(path), Path(str(path))):
        if base.is_dir():
            return base
    return file.parent


def _yaml_images(file: Path, base: Path, entry: str) -> list[Path] | None:
    """Images of a folder or of a list file; None where there is neither."""
    # Exporters write ../train/images for what lies beside the file.
    plain = entry.replace("\\", "/")
    stripped = plain
    while stripped.startswith(("../", "./")):
        stripped = stripped.partition("/")[2]
    for target in (base / plain, file.parent / plain, base / stripped, file.parent / stripped):
        if target.is_dir():
            return _below(target)
        if target.is_file() and target.suffix == ".txt":
            lines = read_lines(target)
            return [_listed(line, target, base) for line in lines]
    return None


def _listed(line: str, list_file: Path, base: Path) -> Path:
    for folder in (list_file.parent, base):
        if (folder / line).is_file():
            return folder / line
    return list_file.parent / line


def _below(folder: Path) -> list[Path]:
    images = folder / "images"
    return images_in(images if images.is_dir() else folder, deep=True)


def _folders(root: Path) -> dict[str, list[Path]]:
    """Images by split of a data set without data.yaml; those of no split are the split ``""``."""
    groups: dict[str, list[Path]] = {}
    if not root.is_dir():
        return groups
    if (root / "images").is_dir() and (root / "labels").is_dir():
        for sub in sorted((root / "images").iterdir()):
            word = split_word(sub.name) if sub.is_dir() else None
            if word:
                groups.setdefault(word, []).extend(images_in(sub, deep=True))
        if not groups:
            groups[""] = images_in(root / "images", deep=True)
    else:
        for sub in sorted(root.iterdir()):
            word = split_word(sub.name) if sub.is_dir() else None
            if word:
                groups.setdefault(word, []).extend(_below(sub))
        if not any(groups.values()):
            groups = {"": images_in(root)}
    groups = {split: images for split, images in groups.items() if images}
    files = (label_path(image) for images in groups.values() for image in images)
    return groups if any(file.is_file() and detect(file) for file in files) else {}


def _names_beside(root: Path) -> list[str]:
    for folder in (root, root / "labels", root.parent if root.name == "images" else root):
        names = listed_names(folder, *_NAME_FILES)[1]
        if names:
            return names
    return []


def _numbers(groups: Iterable[Sequence[Path]]) -> list[str]:
    """Numbers as the names of classes without names."""
    files = {label_path(image) for images in groups for image in images}
    rows = (_row(line) for file in files if file.is_file() for line in read_lines(file))
    last = max((row[0] for row in rows if not isinstance(row, str)), default=-1)
    return [str(number) for number in range(last + 1)]


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
    parsed = LabelFile(file, is_relative=True)
    image = LabelImage(f"{file.stem}.jpg", file.stem)
    parsed.images.append(image)
    for number, line in enumerate(read_lines(file)):
        row = _row(line)
        if isinstance(row, str):
            reason = f"row {number + 1} ({cut(line, 60)}): {row}"
            parsed.report("label-unreadable", number, reason)
            continue
        label, values = row
        extra: dict[str, Any] = {}
        if len(values) == 4:
            x, y, w, h = values
            box = x - w / 2, y - h / 2, x + w / 2, y + h / 2
        else:
            xs, ys = values[::2], values[1::2]
            box = min(xs), min(ys), max(xs), max(ys)
            extra = {JSON_TEXT: f"[{values}]"}
        image.annotations.append(Annotation(box, parsed.label(str(label)), number, extra=extra))
    return parsed


def _read_split(split: str, images: list[Path], classes: ClassList, source: Path) -> Dataset:
    files = []
    for image in images:
        file = label_path(image)
        if file.is_file():
            parsed = parse(file)
        else:
            parsed = LabelFile(None, images=[LabelImage("", "")], is_relative=True)
        parsed.images = [replace(parsed.images[0], name=image.name, id=image.stem, path=image)]
        files.append(parsed)
    dataset = build("yolo", split, files, classes, source)
    return replace(dataset, problems=(*dataset.problems, *_without_image(images)))


def _without_image(images: Iterable[Path]) -> Iterator[Problem]:
    """Label files, in the folders of the others, whose image is not there."""
    expected: dict[Path, set[str]] = {}
    for image in images:
        file = label_path(image)
        expected.setdefault(file.parent, set()).add(file.name)
    for folder, names in sorted(expected.items()):
        for file in sorted(folder.glob("*.txt")):
            # Lists of images and notes lie there too: only rows make a label file.
            if file.name not in names and file.name not in _NAME_FILES and detect(file):
                reason = f"labels {len(read_lines(file))} objects, but has no image {file.stem}.*"
                yield Problem("image-missing", file, None, reason, "dropped")


def write(writing: Writing) -> None:
    """Write images/SPLIT/, labels/SPLIT/ and data.yaml.

    Objects that are ignored (crowds, difficult ones) are left out: a row cannot say so, and as
    plain rows they would be trained on.
    """
    names = writing.names(together=False, stems=True)
    images: list[tuple[Path, Path]] = []
    for split, dataset in writing.splits.items():
        folder = writing.folder / "labels" / split
        folder.mkdir(parents=True)
        for image in dataset.images:
            name = names[split][image.path]
            height, width = size_of(image)
            rows = []
            for annotation in image.annotations:
                if annotation.ignored:
                    writing.lost["objects that are ignored (crowd or difficult)"] += 1
                else:
                    rows.append(_row_text(annotation, width, height))
                    _count_lost(annotation, writing)
            (folder / f"{Path(name).stem}.txt").write_text("".join(rows), "utf-8")
            images.append((image.path, writing.folder / "images" / split / name))
    classes = next(iter(writing.splits.values())).classes
    content: dict[str, Any] = {split: f"images/{split}" for split in writing.splits}
    content["names"] = dict(enumerate(classes))
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    (writing.folder / "data.yaml").write_text(text, "utf-8")
    writing.place(images)


def _row_text(annotation: Annotation, width: int, height: int) -> str:
    x1, y1, x2, y2 = annotation.box
    shares = (x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height
    return " ".join([str(annotation.label), *(f"{share:.10f}" for share in shares)]) + "\n"


def _count_lost(annotation: Annotation, writing: Writing) -> None:
    if own_area(annotation) is not None:
        writing.lost["areas that are not the box's"] += 1
    for key in annotation.extra:
        writing.lost[f"values of {key!r}"] += 1
