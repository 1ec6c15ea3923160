"""Pascal VOC: one XML file an image, splits as lists of names.

Source: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html

Coordinates are taken as they stand. The original VOC counts pixels from 1 and its xmax is inside
the object; most tools that write this format today count from 0 and do neither. A file does not
say which it is, and the difference is one pixel.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from retinanet.data.dataset import Dataset, LabelledImage, Problem
from retinanet.data.formats.labels import (
    DROPPED,
    ClassList,
    LabelFile,
    LabelImage,
    build,
    find_classes,
    from_text,
    images_in,
    listed_names,
    read_lines,
    to_annotation,
    to_box,
    to_size,
    to_text,
)
from retinanet.data.formats.writing import SIDES, Writing, number_text, object_values, size_of
from retinanet.data.splits import split_word

LOOKED_FOR = (
    "Pascal VOC: Annotations/*.xml with JPEGImages/, or .xml files beside images, here or in "
    "a folder a split"
)

_TAG = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_LIST_OF_A_CLASS = ("_train", "_val", "_trainval", "_test")
_OWN_ELEMENTS = frozenset({"name", "bndbox"})
_OWN_ROOT_ELEMENTS = frozenset({"folder", "filename", "path", "size", "object", "id"})


def detect(file: Path) -> bool:
    """Whether an XML file is VOC's."""
    try:
        with file.open("rb") as stream:
            return b"<annotation" in stream.read(4096)
    except OSError:
        return False


def find(path: Path) -> dict[str, list[Path]]:
    """Return the XML files of a folder by split; those without one are the split ``""``."""
    root = _root(path)
    if not root.is_dir():
        return {}
    folder = root / "Annotations" if (root / "Annotations").is_dir() else root
    groups: dict[str, list[Path]] = {"": sorted(folder.glob("*.xml"))}
    if not groups[""]:
        for sub in sorted(folder.iterdir()):
            word = split_word(sub.name) if sub.is_dir() else None
            if word:
                inside = sub / "Annotations" if (sub / "Annotations").is_dir() else sub
                groups.setdefault(word, []).extend(sorted(inside.glob("*.xml")))
    # Of the first files: other programs store XML with images too.
    return {split: files for split, files in groups.items() if any(map(detect, files[:5]))}


def read(path: Path) -> dict[str, Callable[[], Dataset]]:
    """Read a VOC data set; the XML files are parsed once, a split's data set is built when called.

    Classes are those of ``classes.txt`` if there is one (any other name is a problem), else all
    names in all XML files, sorted: the same for every split. An image of a split without an XML
    file is a problem and left out: VOC has a file without objects for an image without any.

    Args:
        path: the folder.
    """
    root = _root(path)
    groups = find(path)
    files = {file: parse(file) for group in groups.values() for file in group}
    source, names = listed_names(root, "classes.txt", "labels.txt")
    classes = find_classes(files.values(), names, source)
    lists = {file.stem: file for file in sorted((root / "ImageSets" / "Main").glob("*.txt"))}
    # VOC also has a list per class, such as dog_train.txt, of the same images.
    lists = {name: file for name, file in lists.items() if not name.endswith(_LIST_OF_A_CLASS)}
    if lists:
        by_stem = {file.stem: parsed for file, parsed in files.items()}
        return {
            split: partial(_read_list, split, file, by_stem, classes, path, root)
            for split, file in lists.items()
        }
    return {
        split: partial(_read_group, split, [files[f] for f in group], classes, path, root)
        for split, group in groups.items()
    }


def _read_list(
    split: str,
    list_file: Path,
    by_stem: Mapping[str, LabelFile],
    classes: ClassList,
    source: Path,
    root: Path,
) -> Dataset:
    """Return the images that a list in ImageSets/Main names."""
    problems, files = [], []
    for name in (line.split()[0] for line in read_lines(list_file)):
        file = by_stem.get(_stem(name))
        if file is None:
            reason = f"{name} is in the split {split}, but has no Annotations/{_stem(name)}.xml"
            problems.append(Problem("label-missing", list_file, name, reason, DROPPED))
        else:
            files.append(file)
    folders = partial(_image_folders, root)
    return build("voc", split, files, classes, source, folders=folders, problems=problems)


def _read_group(
    split: str, files: list[LabelFile], classes: ClassList, source: Path, root: Path
) -> Dataset:
    """Return the images of XML files; those in their folders without one are problems."""
    dataset = build("voc", split, files, classes, source, folders=partial(_image_folders, root))
    stems = {file.file.stem for file in files if file.file}
    unlabelled = _unlabelled(dataset.images, stems)
    return replace(dataset, problems=(*dataset.problems, *unlabelled))


def _image_folders(root: Path, file: Path, split: str) -> list[Path]:
    folder = file.parent
    beside = folder.parent if folder.name == "Annotations" else folder
    return [base / name for base in (beside, root) for name in ("JPEGImages", "images", "")]


def _root(path: Path) -> Path:
    """Return the folder of Annotations/, which may be a level or two down (VOCdevkit/VOC2012)."""
    if path.name == "Annotations" and (path.parent / "JPEGImages").is_dir():
        return path.parent
    if (path / "Annotations").is_dir():
        return path
    for pattern in ("*/Annotations", "*/*/Annotations"):
        found = sorted(folder.parent for folder in path.glob(pattern) if folder.is_dir())
        if len(found) == 1:
            return found[0]
    return path


def _stem(name: str) -> str:
    last = name.replace("\\", "/").rpartition("/")[2]
    return last.rpartition(".")[0] if last.lower().endswith((".jpg", ".xml", ".png")) else last


def parse(file: Path) -> LabelFile:
    """Parse an XML file; one that cannot be read has no image, and a problem."""
    parsed = LabelFile(file)
    try:
        tree = ET.parse(file).getroot()
    except (ET.ParseError, OSError, LookupError, ValueError) as error:
        reason = f"not XML: {error}" if isinstance(error, ET.ParseError) else f"{error}"
        parsed.report("label-unreadable", None, reason, DROPPED)
        return parsed
    id_, name = (_text(tree, key) for key in ("id", "filename"))
    image = LabelImage(
        f"{file.stem}.jpg",
        from_text("id", id_) if id_ else file.stem,
        to_size(tree.findtext("size/width")),
        to_size(tree.findtext("size/height")),
        extra=_values(tree, _OWN_ROOT_ELEMENTS),
        other_names=(name,) if name else (),
    )
    parsed.images.append(image)
    depth = _text(tree, "size/depth")
    if depth:
        image.extra["depth"] = from_text("depth", depth)
    for number, element in enumerate(tree.iter("object")):
        name = _text(element, "name")
        texts = {side: element.findtext(f"bndbox/{side}") for side in SIDES}
        box = to_box([(text or "").strip() for text in texts.values()])
        if box is None:
            stated = ", ".join(f"{side} {text!r}" for side, text in texts.items())
            reason = f"object {number} ({name}): {stated}: not four numbers"
            parsed.report("box-not-a-number", number, reason)
            continue
        values = _values(element, _OWN_ELEMENTS)
        image.annotations.append(to_annotation(box, parsed.label(name), number, values, ()))
    return parsed


def _text(element: ET.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _values(element: ET.Element, known: frozenset[str]) -> dict[str, Any]:
    """Child elements as values: text, a dict if they have children, a list if repeated."""
    values: dict[str, Any] = {}
    for child in element:
        if child.tag in known:
            continue
        text = (child.text or "").strip()
        value = _values(child, frozenset()) if len(child) else from_text(child.tag, text)
        if child.tag in values:
            earlier = values[child.tag]
            values[child.tag] = [*earlier, value] if isinstance(earlier, list) else [earlier, value]
        else:
            values[child.tag] = value
    return values


def _unlabelled(images: Iterable[LabelledImage], stems: set[str]) -> Iterator[Problem]:
    """Images in the folders of the others that have no XML file."""
    known = {image.path for image in images}
    for folder in sorted({path.parent for path in known}):
        for image in images_in(folder) if folder.is_dir() else []:
            if image not in known and image.stem not in stems:
                reason = f"has no {image.stem}.xml, not even one without objects"
                yield Problem("label-missing", image, None, reason, DROPPED)


def write(writing: Writing) -> None:
    """Write Annotations/, JPEGImages/, ImageSets/Main/ and classes.txt.

    Values without an element in VOC (a crowd, an area, an id of another source) are written as
    elements of COCO's names, which other programs skip; a crowd is also marked difficult, so that
    they ignore it too.
    """
    names = writing.names(together=True, stems=True)
    labels = writing.folder / "Annotations"
    lists = writing.folder / "ImageSets" / "Main"
    for folder in (labels, lists):
        folder.mkdir(parents=True)
    images: list[tuple[Path, Path]] = []
    stems: dict[str, list[str]] = {}
    for split, dataset in writing.splits.items():
        stems[split] = []
        writing.count_dataset_values(dataset)
        for image in dataset.images:
            name = names[split][image.path]
            stems[split].append(Path(name).stem)
            tree = _image_element(image, name, dataset.classes, writing)
            ET.indent(tree, "\t")
            ET.ElementTree(tree).write(labels / f"{Path(name).stem}.xml", encoding="utf-8")
            images.append((image.path, writing.folder / "JPEGImages" / name))
    if {"train", "val"} <= set(stems) and "trainval" not in stems:
        stems["trainval"] = sorted({*stems["train"], *stems["val"]})
    for split, members in stems.items():
        (lists / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in members), "utf-8")
    classes = next(iter(writing.splits.values())).classes
    (writing.folder / "classes.txt").write_text("".join(f"{c}\n" for c in classes), "utf-8")
    writing.place(images)


def _image_element(
    image: LabelledImage, name: str, classes: tuple[str, ...], writing: Writing
) -> ET.Element:
    height, width = size_of(image)
    extra = dict(image.extra)
    root = ET.Element("annotation")
    values: dict[str, Any] = {"folder": "JPEGImages", "filename": name}
    if image.id != Path(name).stem:
        values["id"] = image.id
    values["size"] = {"width": width, "height": height, "depth": extra.pop("depth", 3)}
    _add(root, values | extra, writing)
    for number, annotation in enumerate(image.annotations):
        element = ET.SubElement(root, "object")
        sides = zip(SIDES, map(number_text, annotation.box), strict=True)
        values = {
            "name": classes[annotation.label],
            **object_values(annotation, number),
            "difficult": int(annotation.ignored),
            "bndbox": dict(sides),
        }
        _add(element, values | dict(annotation.extra), writing)
    return root


def _add(parent: ET.Element, values: Mapping[str, Any], writing: Writing) -> None:
    """Add values as elements, the inverse of :func:`_values`."""
    for key, value in values.items():
        items = value if isinstance(value, list) else []
        if not _TAG.fullmatch(key):
            writing.lost[f"{key!r}, which cannot be the name of an XML element"] += 1
        elif isinstance(value, dict):
            _add(ET.SubElement(parent, key), value, writing)
        elif items and all(isinstance(item, dict) for item in items):
            for item in items:
                _add(ET.SubElement(parent, key), item, writing)
        else:
            ET.SubElement(parent, key).text = to_text(value)
