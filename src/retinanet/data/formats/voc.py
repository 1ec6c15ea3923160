"""Pascal VOC: one XML file an image, splits as lists of names.

Source: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html

Coordinates are taken as they stand. The original VOC counts pixels from 1 and its xmax is inside
the object; most tools that write this format today count from 0 and do neither. A file does not
say which it is, and the difference is one pixel.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from retinanet.data.dataset import Dataset, LabelledImage, Problem
from retinanet.data.finder import LabelSet, Tree
from retinanet.data.formats import reading
from retinanet.data.formats.reading import LabelFile, LabelImage
from retinanet.data.formats.writing import SIDES, Writing, number_text, object_values, size_of
from retinanet.data.splits import split_word

_ENCODING = re.compile(rb"""encoding=["']([A-Za-z0-9_.-]+)["']""")
_ROOT = re.compile(rb"<([\w-]+:)?annotation[\s>/]")  # CVAT's is <annotations>
_TAG = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_LIST_OF_A_CLASS = ("_train", "_val", "_trainval", "_test")
_OWN_ELEMENTS = frozenset({"name", "bndbox"})
_OWN_ROOT_ELEMENTS = frozenset({"folder", "filename", "path", "size", "object", "id"})


def detect(file: Path) -> bool:
    """Whether an XML file is VOC's."""
    return reading.begins_with(file, _ROOT)


def find(tree: Tree) -> LabelSet | None:
    """Return the XML files of a tree by split."""
    return reading.find_files("voc", tree, [".xml"], detect)


def read(tree: Tree, labels: LabelSet) -> reading.Splits:
    """Read a VOC data set; the XML files are parsed once, a split's data set is built when called.

    Splits are the lists in ``ImageSets/Main``, those of one name in several folders (VOC2007 and
    VOC2012) together; without lists the folders of the files. Classes are those of ``classes.txt``
    if there is one, else all names in all XML files, sorted. An image of a split without an XML
    file is a problem and left out: VOC has a file without objects for an image without any.
    """
    files = {file: parse(file) for _, file in labels.by_split()}
    source, names = reading.listed_names(tree, "classes.txt", "labels.txt")
    classes = reading.find_classes(files.values(), names, source)
    lists = _lists(tree)
    if not lists:
        return {
            split: partial(_read_group, split, [files[f] for f in group], classes, tree)
            for split, group in labels.files.items()
        }
    splits: dict[str, tuple[list[LabelFile], list[Problem]]] = {}
    by_stem: dict[str, list[Path]] = {}
    for file in files:
        by_stem.setdefault(file.stem, []).append(file)
    listed: set[Path] = set()
    for list_file in lists:
        # CVAT calls the split of images without one "default".
        split = split_word(list_file.stem) or list_file.stem
        split = "" if split == "default" else split
        members, problems = splits.setdefault(split, ([], []))
        root = list_file.parents[2]
        for line in reading.read_lines(list_file):
            # A name may contain blanks; -1, 0 or 1 may follow it.
            name = re.sub(r"\s+(-1|0|1)$", "", line)
            member = _file_of(line, by_stem, root) or _file_of(name, by_stem, root)
            if member is None:
                stem = PurePosixPath(name).name
                reason = f"{name} is in the split {split}, but has no Annotations/{stem}.xml"
                problems.append(Problem("label-missing", list_file, name, reason, reading.DROPPED))
            else:
                members.append(files[member])
                listed.add(member)
    rest = [parsed for file, parsed in files.items() if file not in listed]
    if rest:
        labels.notes.append(f"{len(rest)} .xml files are in no list of ImageSets/Main: split other")
        splits.setdefault("", ([], []))[0].extend(rest)
    return {
        split: partial(reading.build, "voc", split, members, classes, tree, problems=problems)
        for split, (members, problems) in splits.items()
    }


def _lists(tree: Tree) -> list[Path]:
    """Return the lists of images in ImageSets/Main, also beside a given folder of labels."""
    files = [file for file in tree.files if file.parts[-3:-1] == ("ImageSets", "Main")]
    if not files:
        files = sorted((tree.root / "ImageSets" / "Main").glob("*.txt"))
    # VOC also has a list per class, such as dog_train.txt, of the same images.
    return [f for f in files if f.suffix == ".txt" and not f.stem.endswith(_LIST_OF_A_CLASS)]


def _file_of(name: str, by_stem: Mapping[str, list[Path]], root: Path) -> Path | None:
    """Return the XML file of a name in a list: below the list's root, in the same folders."""
    wanted = PurePosixPath(name.replace("\\", "/"))
    candidates = by_stem.get(wanted.name, []) or by_stem.get(wanted.stem, [])
    candidates = [file for file in candidates if file.is_relative_to(root)] or candidates
    folders = wanted.parent.parts
    exact = [file for file in candidates if file.parent.parts[-len(folders) :] == folders]
    return next(iter(exact if folders else candidates), next(iter(candidates), None))


def _read_group(
    split: str, files: list[LabelFile], classes: reading.ClassList, tree: Tree
) -> Dataset:
    """Return the images of XML files; those in their folders without one are problems."""
    dataset = reading.build("voc", split, files, classes, tree)
    known = {image.path for image in dataset.images}
    folders = {path.parent for path in known if tree.path.is_dir()}
    stems = {file.file.stem for file in files}
    unlabelled = [
        Problem(
            "label-missing",
            image,
            None,
            f"has no {image.stem}.xml, not even an empty one",
            reading.DROPPED,
        )
        for image in tree.images
        if image.parent in folders and image not in known and image.stem not in stems
    ]
    return replace(dataset, problems=(*dataset.problems, *unlabelled))


def parse(file: Path) -> LabelFile:
    """Parse an XML file; one that cannot be read has no image, and a problem."""
    parsed = LabelFile(file)
    try:
        tree = _root_of(file.read_bytes())
    except (ET.ParseError, OSError, LookupError, ValueError) as error:
        reason = f"not XML: {error}" if isinstance(error, ET.ParseError) else f"{error}"
        parsed.report("label-unreadable", None, reason, reading.DROPPED)
        return parsed
    id_, stated = (_text(tree, key) for key in ("id", "filename"))
    names = [f"{file.stem}.jpg", stated] if stated else [f"{file.stem}.jpg"]
    if PurePosixPath(stated).stem == file.stem:
        names.reverse()
    image = LabelImage(
        names[0],
        reading.from_text("id", id_) if id_ else file.stem,
        reading.to_size(tree.findtext("size/width")),
        reading.to_size(tree.findtext("size/height")),
        extra=_values(tree, _OWN_ROOT_ELEMENTS),
        other_names=tuple(names[1:]),
    )
    parsed.images.append(image)
    depth = _text(tree, "size/depth")
    if depth:
        image.extra["depth"] = reading.from_text("depth", depth)
    for number, element in enumerate(tree.iter("object")):
        texts = [_text(element, f"bndbox/{side}") for side in SIDES]
        stated = ", ".join(f"{side} {text!r}" for side, text in zip(SIDES, texts, strict=True))
        values = _values(element, _OWN_ELEMENTS)
        parsed.add(image, number, _text(element, "name"), reading.to_box(texts), stated, values)
    return parsed


def _root_of(content: bytes) -> ET.Element:
    """Parse XML in any encoding that Python knows, without namespaces."""
    declared = _ENCODING.search(content[:200])
    name = declared.group(1).decode() if declared else "utf-8"
    # The parser itself knows UTF-8, UTF-16 and Latin-1 only.
    is_known = name.lower().startswith(("utf", "iso-8859-1", "us-ascii"))
    root = ET.fromstring(content if is_known else content.decode(name))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
    return root


def _text(element: ET.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()


def _values(element: ET.Element, known: frozenset[str]) -> dict[str, Any]:
    """Child elements as values: text, a dict if they have children, a list if repeated."""
    values: dict[str, Any] = {}
    for child in element:
        if child.tag in known:
            continue
        text = (child.text or "").strip()
        value = _values(child, frozenset()) if len(child) else reading.from_text(child.tag, text)
        if child.tag in values:
            earlier = values[child.tag]
            values[child.tag] = [*earlier, value] if isinstance(earlier, list) else [earlier, value]
        else:
            values[child.tag] = value
    return values


def write(writing: Writing) -> None:
    """Write Annotations/, JPEGImages/, ImageSets/Main/ and classes.txt.

    Values without an element in VOC are elements of COCO's names, which other programs skip; a
    crowd is also marked difficult.
    """
    names = writing.names(together=True, stems=True)
    labels = writing.folder / "Annotations"
    lists = writing.folder / "ImageSets" / "Main"
    for folder in (labels, lists):
        folder.mkdir(parents=True)
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
    if {"train", "val"} <= set(stems) and "trainval" not in stems:
        stems["trainval"] = sorted({*stems["train"], *stems["val"]})
    for split, members in stems.items():
        (lists / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in members), "utf-8")
    classes = next(iter(writing.splits.values())).classes
    (writing.folder / "classes.txt").write_text("".join(f"{c}\n" for c in classes), "utf-8")
    writing.place(names, "JPEGImages/{name}")


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
            ET.SubElement(parent, key).text = reading.to_text(value)
