"""YOLO txt: one text file per image, one row per object, centre and size as image fractions.

Source: https://docs.ultralytics.com/datasets/detect/ and /segment/ (rows of polygons become boxes).

An image without a text file, or with an empty one, has no objects. Pixel coordinates are rounded to
a ten-thousandth, so that a box written with ten decimals is read unchanged.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from retinanet.data.dataset import Dataset, Problem
from retinanet.data.finder import LabelSet, Tree, fold, is_image, relative, scan
from retinanet.data.formats import reading
from retinanet.data.formats.reading import LabelFile, LabelImage
from retinanet.data.formats.writing import Writing, own_area, size_of
from retinanet.data.splits import split_word
from retinanet.errors import DataError

_NAME_FILES = ("classes.txt", "obj.names", "labels.txt", "classes.names", "_darknet.labels")
_NAMES_ABOVE = 3  # folders above a part of a data set that may name its classes
_IMAGES_OR_LABELS = re.compile(r"(images?|imgs?|jpegimages|labels?|annotations?|txts?|yolo)")
_SPLIT_KEYS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def detect(file: Path) -> bool:
    """Whether the first line of a text file is a row of YOLO."""
    lines = reading.read_lines(file)
    return bool(lines) and not isinstance(_row(lines[0]), str)


def find(tree: Tree) -> LabelSet | None:
    """Return the data.yaml (or Darknet's obj.data) of a tree, or its text files by split."""
    texts = tree.memo["yolo"] = _Texts(tree)

    def labelled() -> frozenset[str]:
        return frozenset(stem for stem, files in texts.by_stem.items() if tree.has_stem(files[0]))

    settings = [file for file in tree.with_suffix(".yaml", ".yml") if _is_data_yaml(file)]
    settings += [file for file in tree.with_suffix(".data") if _is_data_yaml(file, "=")]
    if settings:
        first, *others = sorted(settings, key=lambda file: len(file.parts))
        sets = [f for f in others if len(f.parts) == len(first.parts) and f.parent != first.parent]
        if sets:
            named = ", ".join(relative(file, tree.top) for file in (first, *sets))
            raise DataError(f"{tree.path}: several data sets: {named}; give the path of one")
        return LabelSet(
            "yolo",
            {"": [first]},
            labelled,
            [f"{file}: another data set; give its path" for file in others],
        )
    if tree.path.is_file():
        images = _images_of_file(tree, texts)
        found = frozenset(fold(image.stem) for image in images)
        return LabelSet("yolo", {"": [tree.path]}, lambda: found) if images else None
    pairs = [(image, texts.of(image)) for image in tree.images]
    files = [file for _, file in pairs if file is not None]
    if not any(map(detect, files)):
        return None
    return LabelSet("yolo", tree.group(dict.fromkeys(files)), labelled)


def read(tree: Tree, labels: LabelSet) -> reading.Splits:
    """Read a YOLO data set; each split's data set is read when called.

    Splits are those of data.yaml, or the lists ``train.txt`` and ``val.txt``, or folders. A split
    whose folder is missing raises when it is read.
    """
    texts: _Texts = tree.memo["yolo"]
    (file, *_), *_ = labels.files.values()
    names: Sequence[str] = ()
    keypoints = False
    missing: dict[str, str] = {}
    if file.suffix.lower() != ".txt":
        splits, names, missing = _from_settings(file, tree, labels.notes)
        keypoints = any(line.startswith("kpt_shape") for line in reading.read_lines(file))
    elif tree.path.is_file():
        is_list = not detect(file)
        splits = {tree.split_of(file, by_name=is_list): _images_of_file(tree, texts)}
    else:
        file = tree.path
        splits = _from_lists(tree) or _from_folders(tree, texts)
    if tree.path.is_dir():
        listed = {image for images in splits.values() for image in images}
        rest = [i for i in tree.images if i not in listed and texts.of(i) is not None]
        splits |= {"": [*splits.get("", []), *rest]} if rest else {}
    names = names or _listed_classes(tree, labels.notes)
    if not names:  # numbers
        images_files = {texts.of(image) for images in splits.values() for image in images} - {None}
        rows = (_row(line) for text in images_files if text for line in reading.read_lines(text))
        last = max((row[0] for row in rows if not isinstance(row, str)), default=-1)
        names = list(map(str, range(last + 1)))
    classes = reading.merge_classes(enumerate(names), file, by_id=True)
    found: reading.Splits = {
        split: partial(_read_split, split, images, classes, texts, keypoints)
        for split, images in splits.items()
    }
    return found | {split: partial(_fail, message) for split, message in missing.items()}


def _fail(message: str) -> Dataset:
    raise DataError(message)


def _listed_classes(tree: Tree, notes: list[str]) -> Sequence[str]:
    """Return the names of a file of names in the tree, or above it; none if there is none."""
    first = tree.named(*_NAME_FILES)
    if first is not None:
        names = reading.read_lines(first)
        for file in (file for file in tree.files if file.name in _NAME_FILES):
            if reading.read_lines(file) not in ([], names):
                raise DataError(
                    f"{first} and {file} list other classes, and rows state numbers; give the "
                    f"folder of one of them, or make the lists equal"
                )
        return names
    # A part of a data set: a split's folder, or labels/.
    for folder in tree.top.parents[:_NAMES_ABOVE]:
        for file in [*sorted(folder.glob("*.yaml")), *(folder / name for name in _NAME_FILES)]:
            if not file.is_file() or (file.suffix == ".yaml" and not _is_data_yaml(file)):
                continue
            notes.append(f"{file}: gives only the names of the classes")
            if file.suffix == ".yaml":
                return _yaml_names(file, _load_yaml(file))
            return reading.read_lines(file)
    return ()


class _Texts:
    """The text files of a tree by lower-case stem."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self._found: dict[Path, Path | None] = {}
        self._own_folders: dict[Path, list[str]] = {}
        self.by_stem: dict[str, list[Path]] = {}
        for file in tree.files:
            if file.suffix.lower() == ".txt" and file.name not in _NAME_FILES:
                self.by_stem.setdefault(fold(file.stem), []).append(file)

    def of(self, image: Path) -> Path | None:
        """Return the text file of an image: of the same folders but for images/ and labels/."""
        if image not in self._found:
            self._found[image] = self._find(image)
        return self._found[image]

    def _find(self, image: Path) -> Path | None:
        if not image.is_relative_to(self.tree.root):  # of a list that leads elsewhere
            expected = self.expected(image)
            return expected if expected.is_file() else None
        candidates = self.by_stem.get(fold(image.stem), [])
        split, folders = self.tree.split_of(image), self._folders(image)
        same = [file for file in candidates if self._folders(file) == folders]
        if not same and len(candidates) == 1 and self.tree.split_of(candidates[0]) in ("", split):
            own = set(self._folders(candidates[0]))
            return None if own and folders and not own & set(folders) else candidates[0]
        # In labels/ rather than next to the image, where tools leave other text files.
        return min(
            same,
            key=lambda file: (file.stem != image.stem, file.parent == image.parent, file),
            default=None,
        )

    def is_mirrored(self, image: Path, file: Path) -> bool:
        """Whether a text file is in the folders of an image but for images/ and labels/."""
        return self._folders(image) == self._folders(file)

    def expected(self, image: Path) -> Path:
        """Return the path at which an image's text file is looked for first."""
        parts = ["labels" if part.casefold() == "images" else part for part in image.parent.parts]
        return Path(*parts, f"{image.stem}.txt")

    def _folders(self, path: Path) -> list[str]:
        folder = path.parent
        if folder not in self._own_folders:
            parts = map(fold, folder.relative_to(self.tree.root).parts)
            self._own_folders[folder] = [p for p in parts if not _IMAGES_OR_LABELS.fullmatch(p)]
        return self._own_folders[folder]


def _is_data_yaml(file: Path, separator: str = ":") -> bool:
    try:
        text = reading.read_text(file)
    except OSError:
        return False
    # By its keys, unparsed: a broken data.yaml is still one, and reading it reports the fault.
    lines = (line for line in text.splitlines() if separator in line)
    keys = {line.partition(separator)[0].strip() for line in lines}
    return bool(keys & {"names", "nc"}) and bool(keys & set(_SPLIT_KEYS))


def _from_settings(
    file: Path, tree: Tree, notes: list[str]
) -> tuple[dict[str, list[Path]], Sequence[str], dict[str, str]]:
    """Return what data.yaml or obj.data states: images by split, names, missing splits."""
    if file.suffix.lower() == ".data":
        lines = (line.partition("=") for line in reading.read_lines(file))
        content: dict[Any, Any] = {key.strip(): value.strip() for key, _, value in lines}
        named = tree.named(PurePosixPath(content.get("names", "").replace("\\", "/")).name)
        names: Sequence[str] = reading.read_lines(named) if named else ()
    else:
        content = _load_yaml(file)
        names = _yaml_names(file, content)
    # `path` is itself relative to the file, or stale.
    folders = [file.parent / str(path), Path(str(path))] if (path := content.get("path")) else []
    base = next((folder for folder in folders if folder.is_dir()), file.parent)
    splits: dict[str, list[Path]] = {}
    missing: dict[str, str] = {}
    for key, split in _SPLIT_KEYS.items():
        entries = content.get(key)
        for entry in entries if isinstance(entries, list) else [entries] if entries else []:
            images = _entry_images(file, base, str(entry), tree)
            if images is not None:
                splits.setdefault(split, []).extend(images)
            elif split == "test":  # exporters name it also where there is none
                notes.append(f"{file}: {key}: {entry} does not exist")
            else:
                missing[split] = f"{file}: {key}: {entry} is not a folder or a list in {base}"
    if not any(splits.values()):
        empty = f"{file}: no images in the folders of its splits, looked for in {base}"
        raise DataError(next(iter(missing.values()), empty))
    return {split: images for split, images in splits.items() if images}, names, missing


def _load_yaml(file: Path) -> dict[Any, Any]:
    try:
        # Names stay text: on, off and 007 are classes, no truth values and no number.
        content = yaml.load(reading.read_text(file), Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1} column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or "cannot be parsed"
        raise DataError(f"{file}: not YAML: {what}{where}") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: holds no keys; YOLO needs names and train")
    return content


def _yaml_names(file: Path, content: dict[Any, Any]) -> tuple[str, ...]:
    names = content.get("names")
    if isinstance(names, list):
        return tuple(map(str, names))
    if not isinstance(names, dict):
        count = reading.to_int(content.get("nc")) or 0
        if count < 1:
            raise DataError(f"{file}: has no names; write names: [first, second, ...]")
        return tuple(map(str, range(count)))
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


def _entry_images(file: Path, base: Path, entry: str, tree: Tree) -> list[Path] | None:
    """Images of a folder or of a list file; None where there is neither.

    Exporters write paths that are relative to other folders, or of other machines: the longest tail
    that exists counts.
    """
    plain = entry.replace("\\", "/")
    parts = [part for part in PurePosixPath(plain).parts if part not in ("/", ".", "..")]
    targets = [base / plain, file.parent / plain]
    for start in range(len(parts)):
        tail = PurePosixPath(*parts[start:])
        targets += [folder / tail for folder in (base, file.parent, tree.top)]
    for target in targets:
        if target.is_dir():
            images = target / "images"
            target = Path(os.path.normpath(images if images.is_dir() else target))
            if target.is_relative_to(tree.root):
                return [image for image in tree.images if image.is_relative_to(target)]
            return [path for path in scan(target) if is_image(path.name)]
        if target.is_file() and target.suffix == ".txt":
            return _listed(target, tree)
    return None


def _listed(list_file: Path, tree: Tree) -> list[Path]:
    """Return the images of a list; a missing one by the path at which it was expected."""
    images = []
    for line in _list_lines(list_file):
        path = tree.find_image([line], list_file, "").path
        path = path or tree.find_image([line], list_file, "", by_stem=True).path
        images.append(path or list_file.parent / line)
    return images


def _from_lists(tree: Tree) -> dict[str, list[Path]]:
    """Return the images of lists such as train.txt, of names or stems, by split."""
    splits: dict[str, list[Path]] = {}
    for file in tree.with_suffix(".txt"):
        word = split_word(file.stem)
        if not word or tree.has_stem(file):
            continue
        names = [Path(line.replace("\\", "/")) for line in _list_lines(file)]
        if sum(is_image(name) or tree.has_stem(name) for name in names) > len(names) / 2:
            splits.setdefault(word, []).extend(_listed(file, tree))
    return splits


def _list_lines(file: Path) -> list[str]:
    return [line for line in reading.read_lines(file) if not line.startswith("#")]


def _images_of_file(tree: Tree, texts: _Texts) -> list[Path]:
    """Return the images of a single text file: a label, or a list of labelled images."""
    file = tree.path
    if file.suffix.lower() != ".txt":
        return []
    if detect(file):
        return [image for image in tree.images if texts.of(image) == file]
    images = [image for image in _listed(file, tree) if image.is_file()]
    return images if any(map(texts.of, images)) else []


def _from_folders(tree: Tree, texts: _Texts) -> dict[str, list[Path]]:
    """Return images by the split of their folder; folders without any label are left out."""
    labelled = {image.parent for image in tree.images if texts.of(image) is not None}
    return tree.group(image for image in tree.images if image.parent in labelled)


def _row(line: str) -> tuple[int, list[float]] | str:
    """Class, and centre x, centre y, width, height or a polygon's x, y, x, y, ... of a row.

    A text states what is wrong with the row.
    """
    words = line.split()
    try:
        number, *values = map(float, words)
    except ValueError:
        return "holds a word that is no number"
    if not number.is_integer() or number < 0:
        return f"class {words[0]} is not a whole number from 0"
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        return (
            f"{len(words)} values, not 5 (class x y width height) or a class and 3 or more points"
        )
    return int(number), values


def parse(file: Path, *, keypoints: bool = False) -> LabelFile:
    """Parse the text file of an image; with `keypoints` rows are a box and keypoints."""
    parsed = LabelFile(file, decimals=4)
    image = LabelImage(f"{file.stem}.jpg", file.stem)
    parsed.images.append(image)
    for number, line in enumerate(reading.read_lines(file)):
        row = _row(line)
        if isinstance(row, str):
            reason = f"row {number + 1} ({reading.cut(line, 60)}): {row}"
            parsed.report("label-unreadable", number, reason, image=image)
            continue
        label, values = row
        if len(values) == 4 or keypoints:
            x, y, w, h = values[:4]
            box = x - w / 2, y - h / 2, x + w / 2, y + h / 2
            parsed.add(image, number, str(label), box, line)
        else:
            polygon = {reading.JSON_TEXT: reading.to_text([values])}
            around = reading.box_around(list(zip(values[::2], values[1::2], strict=True)))
            parsed.add(image, number, str(label), around, line, polygon)
    return parsed


def _read_split(
    split: str, images: list[Path], classes: reading.ClassList, texts: _Texts, keypoints: bool
) -> Dataset:
    tree = texts.tree
    files = []
    problems = []
    labels = {image: texts.of(image) for image in images}
    owners: dict[Path, list[Path]] = {}
    for image, file in labels.items():
        if file is not None:
            owners.setdefault(file, []).append(image)
    for image, file in labels.items():
        if file is not None and owners[file] != [image]:
            same = [other for other in owners[file] if texts.is_mirrored(other, file)]
            if same != [image]:
                reason = f"{file.name} is the label of {len(owners[file])} images of this name"
                problems.append(Problem("image-ambiguous", image, None, reason, reading.DROPPED))
                continue
        if file is None:
            parsed = LabelFile(image, images=[LabelImage(image.name, image.stem)], decimals=4)
        else:
            parsed = parse(file, keypoints=keypoints)
        parsed.images[0].name, parsed.images[0].path = image.name, image
        files.append(parsed)
    if images and not any(labels.values()):
        expected = texts.expected(images[0])
        reason = f"none of its {len(images)} images has a label; looked for {expected} and so on"
        problems.append(Problem("label-missing", images[0].parent, None, reason))
    # Label files, in the folders of the others, without an image. Lists and notes lie there too.
    parents = {file.parent for file in labels.values() if file and tree.path.is_dir()}
    for file in tree.with_suffix(".txt"):
        is_other = file.parent in parents and file not in owners and file.name not in _NAME_FILES
        if is_other and not tree.has_stem(file) and detect(file):
            reason = (
                f"labels {len(reading.read_lines(file))} objects, but has no image {file.stem}.*"
            )
            problems.append(Problem("image-missing", file, None, reason, "dropped"))
    return reading.build("yolo", split, files, classes, tree, problems=problems)


def write(writing: Writing) -> None:
    """Write images/SPLIT/, labels/SPLIT/ and data.yaml without ignored objects."""
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
