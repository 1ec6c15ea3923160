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
from retinanet.data.formats import reading
from retinanet.data.formats.reading import LabelFile, LabelImage

_VISDRONE_CLASSES = (
    *("ignored regions", "pedestrian", "people", "bicycle", "car", "van", "truck", "tricycle"),
    *("awning-tricycle", "bus", "motor", "others"),
)
# Of no class; they are ignored.
_REGIONS = {"kitti": ("DontCare",), "visdrone": ("ignored regions", "others"), "dota": ()}

Row = tuple[str, reading.Box | None, bool]
"""Class, box, and whether the object is ignored, of a row."""


def _kitti(line: str) -> Row | None:
    words = line.split()
    is_row = len(words) in (15, 16) and reading.to_number(words[0]) is None
    if not is_row or None in map(reading.to_number, words[1:]):
        return None
    return words[0], reading.to_box(words[4:8]), False


def _visdrone(line: str) -> Row | None:
    words = [word for word in line.split(",") if word.strip()]
    numbers = [reading.to_number(word) for word in words]
    if len(numbers) != 8 or None in numbers or numbers[5] not in range(len(_VISDRONE_CLASSES)):
        return None
    name = _VISDRONE_CLASSES[int(numbers[5] or 0)]
    return name, reading.to_box(numbers[:4], has_size=True), numbers[4] == 0


def _dota(line: str) -> Row | None:
    words = line.split()
    corners = [reading.to_number(word) for word in words[:8]]
    if len(words) not in (9, 10) or None in corners or reading.to_number(words[8]) is not None:
        return None
    box = reading.box_around(list(zip(corners[::2], corners[1::2], strict=True)))
    return words[8], box, words[9:] not in ([], ["0"])


_ROWS: dict[str, Callable[[str], Row | None]] = {
    "kitti": _kitti,
    "visdrone": _visdrone,
    "dota": _dota,
}  # None: no row of the format


def detect(file: Path, *, format: str) -> bool:
    """Whether the first row of a text file is of a format."""
    lines = _lines(file)
    return bool(lines) and _ROWS[format](lines[0]) is not None


def parse(file: Path, *, format: str, split: str | None = None) -> LabelFile:
    """Parse the text file of an image."""
    parsed = LabelFile(file, split)
    image = LabelImage(f"{file.stem}.jpg", file.stem)
    parsed.images.append(image)
    regions: list[Annotation] = []
    for number, line in enumerate(_lines(file)):
        name, box, is_ignored = _ROWS[format](line) or ("", None, False)
        if box is None:
            reason = f"row {number + 1} ({reading.cut(line, 60)}) is no row of {format}"
            parsed.report("label-unreadable", number, reason, image=image)
        elif name in _REGIONS[format]:
            regions.append(Annotation(box, 0, number, crowd=True))
        else:
            parsed.add(image, number, name, box, line, {"difficult": is_ignored})
    # A region that is ignored is of no class; beside objects of the first one it is a crowd of it.
    if parsed.classes:
        image.annotations += regions
    return parsed


def _lines(file: Path) -> list[str]:
    # DOTA's files begin with imagesource: and gsd:.
    return [
        line for line in reading.read_lines(file) if not line.startswith(("imagesource", "gsd"))
    ]
