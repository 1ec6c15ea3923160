"""YOLO txt: one text file per image, one row per object, centre and size as image fractions.

Source: https://docs.ultralytics.com/datasets/detect/ and /segment/ (rows of polygons become boxes).

An image without a text file, or with an empty one, has no objects. Pixel coordinates are rounded to
a ten-thousandth, so that a box written with ten decimals is read unchanged.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from retinanet.data.dataset import Annotation, Dataset, LabelledImage, Problem
from retinanet.data.formats.labels import (
    ClassList,
    cut,
    images_in,
    merge_classes,
    read_lines,
    read_size,
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


def is_yolo(path: Path) -> bool:
    """Whether `path` is a YOLO data.yaml or a folder of images with YOLO rows."""
    if path.is_file():
        return path.suffix.lower() in (".yaml", ".yml") and _is_data_yaml(path)
    return path.is_dir() and (_find_yaml(path) is not None or bool(_folders(path)))


def read_yolo(path: Path, *, extras: bool = True) -> dict[str, Callable[[], Dataset]]:
    """Read a YOLO data set; each split's data set is read when called.

    Args:
        path: the folder, or its data.yaml.
        extras: keep polygons.

    Raises:
        DataError: data.yaml is not YAML, or has no names, or its folders hold no images.
    """
    file = path if path.is_file() else _find_yaml(path)
    if file is not None:
        names, splits = _from_yaml(file)
        root = file.parent
    else:
        root = path
        splits = _folders(path)
        names = _names_beside(root)
    if not names:
        names = _numbers(splits.values())
    classes = merge_classes(enumerate(names), file or path)

    return {
        split: partial(_read_split, split, images, classes, path, extras)
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


def _find_yaml(folder: Path) -> Path | None:
    first = [folder / "data.yaml", folder / "data.yml", folder / "dataset.yaml"]
    others = sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    for file in [*first, *others]:
        if file.is_file() and _is_data_yaml(file):
            return file
    return None


def _is_data_yaml(file: Path) -> bool:
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return False
    # By its keys, unparsed: a broken data.yaml is still one, and reading it reports the fault.
    keys = {line.partition(":")[0].strip() for line in text.splitlines() if ":" in line}
    return bool(keys & {"names", "nc"}) and bool(keys & set(_SPLIT_KEYS))


def _from_yaml(file: Path) -> tuple[tuple[str, ...], dict[str, list[Path]]]:
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


def _yaml_names(file: Path, content: dict[Any, Any]) -> tuple[str, ...]:
    names = content.get("names")
    if isinstance(names, list):
        return tuple(str(name) for name in names)
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
        return tuple(numbered[number] for number in range(len(numbered)))
    count = content.get("nc")
    if isinstance(count, int) and count > 0:
        return tuple(str(number) for number in range(count))
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
    every = [image for images in groups.values() for image in images]
    return groups if _any_rows(every) else {}


def _any_rows(images: Iterable[Path]) -> bool:
    """Whether some image has a text file with a row that reads as YOLO's."""
    for image in images:
        file = label_path(image)
        if file.is_file():
            for line in read_lines(file):
                if _is_row(line):
                    return True
                break
    return False


def _names_beside(root: Path) -> tuple[str, ...]:
    for folder in (root, root / "labels", root.parent if root.name == "images" else root):
        for name in _NAME_FILES:
            if (folder / name).is_file():
                return tuple(read_lines(folder / name))
    return ()


def _numbers(groups: Iterable[Sequence[Path]]) -> tuple[str, ...]:
    """Numbers as the names of classes without names."""
    last = -1
    for images in groups:
        for image in images:
            file = label_path(image)
            if file.is_file():
                for line in read_lines(file):
                    try:
                        last = max(last, _row(line)[0])
                    except ValueError:
                        continue
    return tuple(str(number) for number in range(last + 1))


def _row(line: str) -> tuple[int, list[float]]:
    """Class, and centre x, centre y, width, height or a polygon's x, y, x, y, ... of a row.

    Raises:
        ValueError: the row is neither.
    """
    words = line.split()
    try:
        number = float(words[0])
        values = [float(word) for word in words[1:]]
    except ValueError:
        raise ValueError("holds a word that is no number") from None
    if not number.is_integer() or number < 0:
        raise ValueError(f"class {words[0]} is not a whole number from 0")
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise ValueError(
            f"{len(words)} values, not 5 (class x y width height) or a class and 3 or more points"
        )
    return int(number), values


def _read_split(
    split: str, images: list[Path], classes: ClassList, source: Path, extras: bool
) -> Dataset:
    with ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:
        read = list(pool.map(lambda img: _read_image(img, classes.labels, extras), images))
    return Dataset(
        images=tuple(image for image, _ in read),
        classes=classes.names,
        category_ids=classes.ids,
        split=split,
        format="yolo",
        source=source,
        problems=(
            *classes.problems,
            *(problem for _, problems in read for problem in problems),
            *_without_image(images),
        ),
    )


def _without_image(images: Iterable[Path]) -> Iterator[Problem]:
    """Label files, in the folders of the others, whose image is not there."""
    expected: dict[Path, set[str]] = {}
    for image in images:
        file = label_path(image)
        expected.setdefault(file.parent, set()).add(file.name)
    for folder, names in sorted(expected.items()):
        for file in sorted(folder.glob("*.txt")):
            if file.name in names or file.name in _NAME_FILES:
                continue
            lines = read_lines(file)
            # Lists of images and notes lie there too: only rows make a label file.
            if lines and _is_row(lines[0]):
                reason = f"labels {len(lines)} objects, but has no image {file.stem}.*"
                yield Problem("image-missing", file, None, reason, "dropped")


def _is_row(line: str) -> bool:
    try:
        _row(line)
    except ValueError:
        return False
    return True


def _read_image(
    image: Path, labels: Mapping[int, int], extras: bool
) -> tuple[LabelledImage, list[Problem]]:
    file = label_path(image)
    lines = read_lines(file) if file.is_file() else []
    label_file = file if file.is_file() else None
    problems: list[Problem] = []
    height, width = read_size(image, problems if lines else [])
    if not width or not height:
        return LabelledImage(image, image.stem, label_file=label_file), problems
    annotations = []
    for row, line in enumerate(lines):
        try:
            number, values = _row(line)
        except ValueError as error:
            reason = f"row {row + 1} ({cut(line, 60)}): {error}"
            problems.append(Problem("label-unreadable", file, row, reason, "dropped"))
            continue
        if number not in labels:
            reason = f"row {row + 1}: class {number} is not one of 0 to {len(labels) - 1}"
            problems.append(Problem("class-unknown", file, row, reason, "dropped"))
            continue
        box, extra = _to_pixels(values, width, height)
        annotations.append(Annotation(box, labels[number], row, extra=extra if extras else {}))
    return (
        LabelledImage(image, image.stem, tuple(annotations), width, height, label_file),
        problems,
    )


def _to_pixels(
    values: Sequence[float], width: int, height: int
) -> tuple[tuple[float, float, float, float], dict[str, Any]]:
    extra: dict[str, Any] = {}
    if len(values) == 4:
        x, y, w, h = values
        sides = (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height
    else:
        xs = [value * width for value in values[::2]]
        ys = [value * height for value in values[1::2]]
        sides = min(xs), min(ys), max(xs), max(ys)
        points = ",".join(f"{round(v, 4)!r}" for pair in zip(xs, ys, strict=True) for v in pair)
        extra["segmentation"] = f"[[{points}]]"
    x1, y1, x2, y2 = (round(side, 4) for side in sides)
    return (x1, y1, x2, y2), extra


def write_yolo(writing: Writing) -> None:
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
