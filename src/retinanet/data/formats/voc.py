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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from retinanet.data.dataset import Annotation, Dataset, LabelledImage, Problem
from retinanet.data.formats.finding import (
    ImageFinder,
    from_text,
    images_in,
    merge_classes,
    to_flag,
    to_number,
    to_text,
)
from retinanet.data.formats.writing import Writing, number_text, own_area, size_of
from retinanet.data.splits import split_word

LOOKED_FOR = (
    "Pascal VOC: Annotations/*.xml with JPEGImages/, or .xml files beside images, here or in "
    "a folder a split"
)

_SIDES = ("xmin", "ymin", "xmax", "ymax")
_TAG = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_LIST_OF_A_CLASS = ("_train", "_val", "_trainval", "_test")
_OWN_ELEMENTS = frozenset({"name", "bndbox", "difficult", "iscrowd", "area", "id"})
_OWN_ROOT_ELEMENTS = frozenset({"folder", "filename", "path", "size", "object", "id"})


def is_voc(path: Path) -> bool:
    """Whether `path` is a folder of VOC annotations."""
    return path.is_dir() and bool(_label_files(_root(path)))


def read_voc(path: Path, *, extras: bool = True) -> dict[str, Callable[[], Dataset]]:
    """The splits of a VOC data set; each is made when called, the XML files are read once.

    Classes are those of ``classes.txt`` where there is one (then any other name is a problem),
    else all names in all XML files, sorted: the same for every split. An image of a split
    without an XML file is a problem and left out: VOC writes a file without objects for an image
    of pure background.

    Args:
        path: the folder.
        extras: keep what else the files say (pose, truncated, source, ...).
    """
    root = _root(path)
    groups = _label_files(root)
    listed = _split_lists(root)
    files = {file.stem: file for group in groups.values() for file in group}
    parsed: dict[Path, _Parsed] = {
        file: _parse(file, extras) for group in groups.values() for file in group
    }
    file, names = _class_names(root)
    if not names:
        names = sorted({thing.name for one in parsed.values() for thing in one.objects})
    classes = merge_classes(enumerate(filter(None, names), start=1), file)
    labels = {name: label for label, name in enumerate(classes.names)}

    def make(split: str, members: Iterable[Path | str], origin: Path) -> Dataset:
        dataset = _dataset(split, members, origin, parsed, labels, root, path)
        return replace(
            dataset,
            category_ids=classes.ids,
            problems=(*classes.problems, *dataset.problems),
        )

    def from_list(split: str, list_file: Path) -> Callable[[], Dataset]:
        def read() -> Dataset:
            names = [line.split()[0] for line in _lines(list_file) if line.strip()]
            return make(split, [files.get(_stem(name), name) for name in names], list_file)

        return read

    if listed:
        return {split: from_list(split, file) for split, file in listed.items()}

    def from_folder(split: str, members: list[Path]) -> Callable[[], Dataset]:
        def read() -> Dataset:
            dataset = make(split, members, root)
            unlabelled = _unlabelled(members, dataset)
            return replace(dataset, problems=(*dataset.problems, *unlabelled))

        return read

    return {split: from_folder(split, members) for split, members in groups.items()}


@dataclass(slots=True)
class _Object:
    name: str
    place: int
    box: tuple[float, float, float, float]
    values: dict[str, Any]


@dataclass(slots=True)
class _Parsed:
    """One XML file, before the names of classes are known."""

    objects: list[_Object] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    filename: str = ""
    id: int | str | None = None
    width: int | None = None
    height: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    broken: bool = False


def _root(path: Path) -> Path:
    """The folder that holds Annotations/, which may lie a level or two down (VOCdevkit/VOC2012)."""
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
    """XML files by split; those of no split are the split ``""``."""
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
    """Whether the first files are annotations: other programs keep XML beside images too."""
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
    # Beside train.txt VOC has a list a class, such as dog_train.txt, of the same images.
    return {name: file for name, file in lists.items() if not name.endswith(_LIST_OF_A_CLASS)}


def _lines(file: Path) -> list[str]:
    return file.read_text("utf-8-sig", errors="replace").splitlines()


def _stem(name: str) -> str:
    last = name.replace("\\", "/").rpartition("/")[2]
    return last.rpartition(".")[0] if last.lower().endswith((".jpg", ".xml", ".png")) else last


def _class_names(root: Path) -> tuple[Path, list[str]]:
    for file in (root / "classes.txt", root / "labels.txt"):
        if file.is_file():
            return file, [line.strip() for line in _lines(file) if line.strip()]
    return root, []


def _parse(file: Path, extras: bool) -> _Parsed:
    parsed = _Parsed()
    try:
        tree = ET.parse(file).getroot()
    except (ET.ParseError, OSError, LookupError, ValueError) as error:
        reason = f"not XML: {error}" if isinstance(error, ET.ParseError) else f"{error}"
        parsed.problems.append(
            Problem("label-unreadable", file, None, reason, "the image is dropped")
        )
        parsed.broken = True
        return parsed
    parsed.filename = (tree.findtext("filename") or "").strip()
    id_ = tree.findtext("id")
    parsed.id = from_text("id", id_.strip()) if id_ else None
    parsed.width = _size(tree.findtext("size/width"))
    parsed.height = _size(tree.findtext("size/height"))
    if extras:
        parsed.extra = _plain(tree, _OWN_ROOT_ELEMENTS)
        depth = tree.findtext("size/depth")
        if depth:
            parsed.extra["depth"] = from_text("depth", depth.strip())
    for place, element in enumerate(tree.iter("object")):
        name = (element.findtext("name") or "").strip()
        try:
            x1, y1, x2, y2 = (
                to_number((element.findtext(f"bndbox/{side}") or "").strip()) for side in _SIDES
            )
        except ValueError:
            text = ", ".join(f"{s} {element.findtext(f'bndbox/{s}')!r}" for s in _SIDES)
            parsed.problems.append(
                Problem(
                    "box-not-a-number",
                    file,
                    place,
                    f"object {place} ({name}): {text}: not four numbers",
                    "dropped",
                )
            )
            continue
        crowd = to_flag(element.findtext("iscrowd") or "0")
        values: dict[str, Any] = {
            "id": from_text("id", (element.findtext("id") or str(place)).strip()),
            # Our own files mark a crowd as difficult too, for programs that know no crowds.
            "difficult": to_flag(element.findtext("difficult") or "0") and not crowd,
            "crowd": crowd,
            "area": _area(element.findtext("area")),
            "extra": _plain(element, _OWN_ELEMENTS) if extras else {},
        }
        parsed.objects.append(_Object(name, place, (x1, y1, x2, y2), values))
    return parsed


def _size(text: str | None) -> int | None:
    try:
        value = int(float(text or ""))
    except (ValueError, OverflowError):
        return None
    return value or None  # some tools write 0 where they do not know


def _area(text: str | None) -> float | None:
    try:
        return to_number((text or "").strip())
    except ValueError:
        return None


def _plain(element: ET.Element, known: frozenset[str]) -> dict[str, Any]:
    """Child elements as values: text, a dict where they have children, a list where repeated."""
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


def _dataset(
    split: str,
    members: Iterable[Path | str],
    origin: Path,
    parsed: dict[Path, _Parsed],
    labels: dict[str, int],
    root: Path,
    source: Path,
) -> Dataset:
    folders = [root / "JPEGImages", root / "images", root]
    finder = ImageFinder(folders)
    images: list[LabelledImage] = []
    problems: list[Problem] = []
    for member in members:
        if isinstance(member, str):
            reason = f"{member} is in the split {split}, but has no Annotations/{_stem(member)}.xml"
            problems.append(
                Problem("label-missing", origin, member, reason, "the image is dropped")
            )
            continue
        one = parsed[member]
        problems += one.problems
        if one.broken:
            continue
        if member.parent.name != "Annotations" or member.parent.parent != root:
            finder = _finder_beside(member, finder, folders)
        image = finder.find(f"{member.stem}.jpg")
        if not image.is_file() and one.filename:
            image = finder.find(one.filename)
        annotations = []
        for thing in one.objects:
            if thing.name not in labels:
                reason = (
                    f"object {thing.place}: class {thing.name!r} is not one of {len(labels)} known"
                )
                problems.append(Problem("class-unknown", member, thing.place, reason, "dropped"))
                continue
            annotations.append(Annotation(box=thing.box, label=labels[thing.name], **thing.values))
        images.append(
            LabelledImage(
                path=image,
                id=member.stem if one.id is None else one.id,
                annotations=tuple(annotations),
                width=one.width,
                height=one.height,
                label_file=member,
                extra=one.extra,
            )
        )
    return Dataset(
        images=tuple(images),
        classes=tuple(labels),
        category_ids=tuple(range(1, len(labels) + 1)),
        split=split,
        format="voc",
        source=source,
        problems=tuple(problems),
    )


def _unlabelled(members: Iterable[Path], dataset: Dataset) -> Iterator[Problem]:
    """Images in the folders of the others that no XML file speaks of."""
    labelled = {image.path for image in dataset.images} | {
        problem.file for problem in dataset.problems
    }
    stems = {member.stem for member in members}
    for folder in sorted({image.path.parent for image in dataset.images}):
        if folder.is_dir():
            for img in images_in(folder):
                if img not in labelled and img.stem not in stems:
                    reason = f"has no {img.stem}.xml, not even one without objects"
                    yield Problem("label-missing", img, None, reason, "the image is dropped")


def _finder_beside(member: Path, finder: ImageFinder, folders: list[Path]) -> ImageFinder:
    """A finder that looks beside the label file first; the one at hand where it already does."""
    beside = member.parent.parent if member.parent.name == "Annotations" else member.parent
    if folders[0] == beside:
        return finder
    folders[:] = [beside, beside / "JPEGImages", beside / "images"]
    return ImageFinder(folders)


def write_voc(writing: Writing) -> None:
    """Write Annotations/, JPEGImages/, ImageSets/Main/ and classes.txt.

    What VOC has no element for (a crowd, an area, an id of another source) goes into elements of
    COCO's names, which other programs pass over; a crowd is also marked difficult, so that they
    ignore it too.
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
            writing.lost["what is said of the whole data set (info, licences)"] += 1
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
    for place, annotation in enumerate(image.annotations):
        element = ET.SubElement(root, "object")
        _add(element, "name", classes[annotation.label])
        _add(element, "difficult", int(annotation.ignored))
        if annotation.crowd:
            _add(element, "iscrowd", 1)
        area = own_area(annotation)
        if area is not None:
            _add(element, "area", number_text(area))
        if annotation.id != place:
            _add(element, "id", annotation.id)
        box = ET.SubElement(element, "bndbox")
        for side, value in zip(_SIDES, annotation.box, strict=True):
            _add(box, side, number_text(value))
        _add_all(element, annotation.extra, writing)
    return root


def _add(parent: ET.Element, tag: str, value: Any) -> None:
    ET.SubElement(parent, tag).text = to_text(value)


def _add_all(parent: ET.Element, values: Mapping[str, Any], writing: Writing) -> None:
    """Values as elements, the inverse of :func:`_plain`."""
    for key, value in values.items():
        if not _TAG.fullmatch(key):
            writing.lost[f"{key!r}, which cannot be the name of an XML element"] += 1
        elif isinstance(value, dict):
            _add_all(ET.SubElement(parent, key), value, writing)
        elif isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            for one in value:
                _add_all(ET.SubElement(parent, key), one, writing)
        else:
            _add(parent, key, value)
