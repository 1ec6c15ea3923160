"""Text files per image that are only read: KITTI, VisDrone and DOTA.

Sources: https://www.cvlibs.net/datasets/kitti/eval_object.php (label_2),
https://github.com/VisDrone/VisDrone-Dataset (annotations of DET),
https://captain-whu.github.io/DOTA/dataset.html (labelTxt; the upright box around each quadrilateral
is used).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from retinanet.data.dataset import Annotation
from retinanet.data.formats.labels import (
    Box,
    LabelFile,
    LabelImage,
    cut,
    read_lines,
    to_box,
    to_number,
)

VISDRONE_CLASSES = (
    *("ignored regions", "pedestrian", "people", "bicycle", "car", "van", "truck", "tricycle"),
    *("awning-tricycle", "bus", "motor", "others"),
)
"""Names by VisDrone's category; 0 and 11 are regions that are ignored."""

_REGIONS = {"kitti": ("DontCare",), "visdrone": ("ignored regions", "others"), "dota": ()}

Row = tuple[str, Box, bool]
"""Class, box, and whether the object is ignored, of a row."""


def _kitti(line: str) -> Row | None:
    words = line.split()
    if len(words) not in (15, 16) or to_number(words[0]) is not None:
        return None
    if any(to_number(word) is None for word in words[1:]):
        return None
    box = to_box(words[4:8])
    return None if box is None else (words[0], box, words[0] == "DontCare")


def _visdrone(line: str) -> Row | None:
    words = [word for word in line.split(",") if word.strip()]
    numbers = [to_number(word) for word in words]
    if len(numbers) != 8 or None in numbers:
        return None
    x, y, width, height, score, kind = (number or 0.0 for number in numbers[:6])
    if kind not in range(len(VISDRONE_CLASSES)):
        return None
    category = int(kind)
    ignored = category in (0, 11) or score == 0
    return VISDRONE_CLASSES[category], (x, y, x + width, y + height), ignored


def _dota(line: str) -> Row | None:
    words = line.split()
    corners = [to_number(word) for word in words[:8]]
    if len(words) not in (9, 10) or None in corners or to_number(words[8]) is not None:
        return None
    xs, ys = ([number for number in corners[start::2] if number is not None] for start in (0, 1))
    is_difficult = len(words) == 10 and words[9] not in ("0", "")
    return words[8], (min(xs), min(ys), max(xs), max(ys)), is_difficult


ROWS: dict[str, Callable[[str], Row | None]] = {
    "kitti": _kitti,
    "visdrone": _visdrone,
    "dota": _dota,
}
"""Parser of a row by format; None: no row of the format."""


def detect(file: Path, *, format: str) -> bool:
    """Whether the first row of a text file is of a format."""
    lines = _lines(file)
    return bool(lines) and ROWS[format](lines[0]) is not None


def parse(file: Path, *, format: str, split: str | None = None) -> LabelFile:
    """Parse the text file of an image."""
    parsed = LabelFile(file, split)
    image = LabelImage(f"{file.stem}.jpg", file.stem)
    parsed.images.append(image)
    regions: list[tuple[int, Box]] = []
    for number, line in enumerate(_lines(file)):
        row = ROWS[format](line)
        if row is None:
            reason = f"row {number + 1} ({cut(line, 60)}) is no row of {format}"
            parsed.report("label-unreadable", number, reason)
            continue
        name, box, is_ignored = row
        if name in _REGIONS[format]:
            regions.append((number, box))
        else:
            label = parsed.label(name)
            image.annotations.append(Annotation(box, label, number, difficult=is_ignored))
    # A region that is ignored is of no class; beside objects of the first one it is a crowd of it.
    if parsed.classes:
        image.annotations += [Annotation(box, 0, number, crowd=True) for number, box in regions]
    return parsed


def _lines(file: Path) -> list[str]:
    # DOTA's files begin with imagesource: and gsd:.
    return [line for line in read_lines(file) if not line.startswith(("imagesource", "gsd"))]
