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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from retinanet.data.dataset import Dataset, LabelledImage, Problem
from retinanet.data.formats.labels import (
    ClassList,
    ImageFinder,
    LabelFile,
    ReadImage,
    ReadObject,
    build_image,
    find_classes,
    from_text,
    images_in,
    read_lines,
    to_area,
    to_flag,
    to_number,
    to_size,
    to_text,
)
from retinanet.data.formats.writing import Writing, number_text, own_area, size_of
from retinanet.data.splits import split_word

LOOKED_FOR = (
    "Pascal VOC: Annotations/*.xml with JPEGImages/, or .xml files beside images, here or in "
    "a folder a split"
)

_DROPPED = "the image is dropped"
_FOLDERS = ("JPEGImages", "images", "")
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_TAG = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_LIST_OF_A_CLASS = ("_train", "_val", "_trainval", "_test")
_OWN_ELEMENTS = frozenset({"name", "bndbox", "difficult", "iscrowd", "area", "id"})
_OWN_ROOT_ELEMENTS = frozenset({"folder", "filename", "path", "size", "object", "id"})


def is_voc(path: Path) -> bool:
    """Whether `path` is a folder of VOC annotations."""
    return path.is_dir() and bool(_label_files(_root(path)))


def read_voc(path: Path, *, extras: bool = True) -> dict[str, Callable[[], Dataset]]:
    """Read a VOC data set; the XML files are parsed once, a split's data set is built when called.

    Classes are those of ``classes.txt`` if there is one (any other name is a problem), else all
    names in all XML files, sorted: the same for every split. An image of a split without an XML
    file is a problem and left out: VOC has a file without objects for an image without any.

    Args:
        path: the folder.
        extras: keep other elements of the files (pose, truncated, source, ...).
    """
    root = _root(path)
    groups = _label_files(root)
    files = {file: _parse(file, extras) for group in groups.values() for file in group}
    source, names = _class_names(root)
    data = _Data(path, root, files, find_classes(files.values(), names, source))
    lists = _split_lists(root)
    if lists:
        return {split: partial(data.read_list, split, file) for split, file in lists.items()}
    return {split: partial(data.read_folder, split, group) for split, group in groups.items()}


@dataclass(frozen=True, slots=True)
class _Data:
    """A parsed data set: its folders, and its XML files; one without images could not be parsed."""

    source: Path
    root: Path
    files: Mapping[Path, LabelFile]
    classes: ClassList

    def read_list(self, split: str, list_file: Path) -> Dataset:
        """Return the images that a list in ImageSets/Main names."""
        by_stem = {file.stem: file for file in self.files}
        problems = []
        members = []
        for name in (line.split()[0] for line in read_lines(list_file)):
            file = by_stem.get(_stem(name))
            if file is None:
                reason = f"{name} is in the split {split}, but has no Annotations/{_stem(name)}.xml"
                problems.append(Problem("label-missing", list_file, name, reason, _DROPPED))
            else:
                members.append(file)
        return self._build(split, members, problems)

    def read_folder(self, split: str, members: list[Path]) -> Dataset:
        """Return the images of the XML files in a folder."""
        return self._build(split, members, [], find_unlabelled=True)

    def _build(
        self,
        split: str,
        members: Iterable[Path],
        problems: list[Problem],
        *,
        find_unlabelled: bool = False,
    ) -> Dataset:
        problems = [*self.classes.problems, *problems]
        finders: dict[Path, ImageFinder] = {}
        images: list[LabelledImage] = []
        for member in members:
            file = self.files[member]
            problems += [problem for _, problem in file.problems]
            for image in file.images:
                folder = member.parent
                if folder not in finders:
                    beside = folder.parent if folder.name == "Annotations" else folder
                    folders = [base / name for base in (beside, self.root) for name in _FOLDERS]
                    finders[folder] = ImageFinder(folders)
                path = finders[folder].find(f"{member.stem}.jpg")
                if not path.is_file() and image.name:
                    path = finders[folder].find(image.name)
                images.append(build_image(image, path, file, self.classes.names, problems))
        if find_unlabelled:
            problems += _unlabelled(members, images, problems)
        return Dataset(
            images=tuple(images),
            classes=self.classes.names,
            category_ids=self.classes.ids,
            split=split,
            format="voc",
            source=self.source,
            problems=tuple(problems),
        )


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


def _label_files(root: Path) -> dict[str, list[Path]]:
    """XML files by split; those without one are the split ``""``."""
    if not root.is_dir():
        return {}
    folder = root / "Annotations" if (root / "Annotations").is_dir() else root
    here = sorted(folder.glob("*.xml"))
    if here:
        return {"": here} if _is_annotation(here) else {}
    groups: dict[str, list[Path]] = {}
    for sub in sorted(folder.iterdir()):
        word = split_word(sub.name) if sub.is_dir() else None
        if word:
            inside = sub / "Annotations" if (sub / "Annotations").is_dir() else sub
            members = sorted(inside.glob("*.xml"))
            if members and _is_annotation(members):
                groups.setdefault(word, []).extend(members)
    return groups


def _is_annotation(files: list[Path]) -> bool:
    """Whether one of the first files is an annotation: other programs store XML with images too."""
    for file in files[:5]:
        try:
            head = file.read_bytes()[:4096]
        except OSError:
            continue
        if b"<annotation" in head:
            return True
    return False


def _split_lists(root: Path) -> dict[str, Path]:
    lists = {file.stem: file for file in sorted((root / "ImageSets" / "Main").glob("*.txt"))}
    # VOC also has a list per class, such as dog_train.txt, of the same images.
    return {name: file for name, file in lists.items() if not name.endswith(_LIST_OF_A_CLASS)}


def _stem(name: str) -> str:
    last = name.replace("\\", "/").rpartition("/")[2]
    return last.rpartition(".")[0] if last.lower().endswith((".jpg", ".xml", ".png")) else last


def _class_names(root: Path) -> tuple[Path, list[str]]:
    for file in (root / "classes.txt", root / "labels.txt"):
        if file.is_file():
            return file, read_lines(file)
    return root, []


def _parse(file: Path, extras: bool) -> LabelFile:
    parsed = LabelFile(file, "")
    try:
        tree = ET.parse(file).getroot()
    except (ET.ParseError, OSError, LookupError, ValueError) as error:
        reason = f"not XML: {error}" if isinstance(error, ET.ParseError) else f"{error}"
        parsed.report("label-unreadable", None, reason, _DROPPED)
        return parsed
    id_ = tree.findtext("id")
    image = ReadImage(
        name=(tree.findtext("filename") or "").strip(),
        split="",
        id=from_text("id", id_.strip()) if id_ else file.stem,
        width=to_size(tree.findtext("size/width")),
        height=to_size(tree.findtext("size/height")),
    )
    parsed.images.append(image)
    if extras:
        image.extra = _plain(tree, _OWN_ROOT_ELEMENTS)
        depth = tree.findtext("size/depth")
        if depth:
            image.extra["depth"] = from_text("depth", depth.strip())
    for number, element in enumerate(tree.iter("object")):
        name = (element.findtext("name") or "").strip()
        texts = {side: element.findtext(f"bndbox/{side}") for side in _SIDES}
        try:
            x1, y1, x2, y2 = (to_number((text or "").strip()) for text in texts.values())
        except ValueError:
            stated = ", ".join(f"{side} {text!r}" for side, text in texts.items())
            reason = f"object {number} ({name}): {stated}: not four numbers"
            parsed.report("box-not-a-number", number, reason)
            continue
        crowd = to_flag(element.findtext("iscrowd") or "0")
        values: dict[str, Any] = {
            "id": from_text("id", (element.findtext("id") or str(number)).strip()),
            # Files written here mark a crowd as difficult too, for programs without crowds.
            "difficult": to_flag(element.findtext("difficult") or "0") and not crowd,
            "crowd": crowd,
            "area": to_area(element.findtext("area")),
            "extra": _plain(element, _OWN_ELEMENTS) if extras else {},
        }
        box = (x1, y1, x2, y2)
        image.objects.append(ReadObject(name, box, f"object {number}", number, values))
    return parsed


def _plain(element: ET.Element, known: frozenset[str]) -> dict[str, Any]:
    """Child elements as values: text, a dict if they have children, a list if repeated."""
    values: dict[str, Any] = {}
    for child in element:
        if child.tag in known:
            continue
        text = (child.text or "").strip()
        value = _plain(child, frozenset()) if len(child) else from_text(child.tag, text)
        if child.tag in values:
            earlier = values[child.tag]
            values[child.tag] = [*earlier, value] if isinstance(earlier, list) else [earlier, value]
        else:
            values[child.tag] = value
    return values


def _unlabelled(
    members: Iterable[Path], images: Iterable[LabelledImage], problems: Iterable[Problem]
) -> Iterator[Problem]:
    """Images in the folders of the others that have no XML file."""
    known = {image.path for image in images} | {problem.file for problem in problems}
    stems = {member.stem for member in members}
    for folder in sorted({image.path.parent for image in images}):
        for image in images_in(folder) if folder.is_dir() else []:
            if image not in known and image.stem not in stems:
                reason = f"has no {image.stem}.xml, not even one without objects"
                yield Problem("label-missing", image, None, reason, _DROPPED)


def write_voc(writing: Writing) -> None:
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
        if dataset.extra:
            writing.lost["values of the whole data set (info, licences)"] += 1
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
    _add(root, "folder", "JPEGImages")
    _add(root, "filename", name)
    if image.id != Path(name).stem:
        _add(root, "id", image.id)
    size = ET.SubElement(root, "size")
    _add(size, "width", width)
    _add(size, "height", height)
    _add(size, "depth", extra.pop("depth", 3))
    _add_all(root, extra, writing)
    for number, annotation in enumerate(image.annotations):
        element = ET.SubElement(root, "object")
        _add(element, "name", classes[annotation.label])
        _add(element, "difficult", int(annotation.ignored))
        if annotation.crowd:
            _add(element, "iscrowd", 1)
        area = own_area(annotation)
        if area is not None:
            _add(element, "area", number_text(area))
        if annotation.id != number:
            _add(element, "id", annotation.id)
        box = ET.SubElement(element, "bndbox")
        for side, value in zip(_SIDES, annotation.box, strict=True):
            _add(box, side, number_text(value))
        _add_all(element, annotation.extra, writing)
    return root


def _add(parent: ET.Element, tag: str, value: Any) -> None:
    ET.SubElement(parent, tag).text = to_text(value)


def _add_all(parent: ET.Element, values: Mapping[str, Any], writing: Writing) -> None:
    """Add values as elements, the inverse of :func:`_plain`."""
    for key, value in values.items():
        if not _TAG.fullmatch(key):
            writing.lost[f"{key!r}, which cannot be the name of an XML element"] += 1
        elif isinstance(value, dict):
            _add_all(ET.SubElement(parent, key), value, writing)
        elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            for item in value:
                _add_all(ET.SubElement(parent, key), item, writing)
        else:
            _add(parent, key, value)
