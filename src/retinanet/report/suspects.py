"""Pages of suspect labels and of images to label next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image

from retinanet.data.drawing import draw_boxes
from retinanet.data.images import read_image
from retinanet.evaluation.suspects import KINDS, Candidate, Suspect, Suspects
from retinanet.report.html import Page

_LABELLED, _DETECTED = (255, 176, 0), (0, 200, 255)
_COLUMNS = 4
_CROP = 260  # pixels of a crop's longer side, at least
_MARGIN, _MIN_MARGIN = 0.5, 16  # around the boxes: share of their longer side, pixels
_NEXT_PIXELS = 2**18  # of a drawn image


def write_suspects(suspects: Suspects, file: str | Path, *, limit: int = 100) -> Path:
    """Write a page with a crop of each of the first `limit` suspects, the most likely first.

    The label is drawn orange, the detection blue.

    Raises:
        ImageError: an image can no longer be read.
    """
    dataset, shown = suspects.dataset, suspects.suspects[:limit]
    page = Page("Suspect labels", f"{dataset.source} · {dataset.split} · {len(dataset)} images")
    page.section("Kinds")
    counts, drawn = (Counter(s.kind for s in part) for part in (suspects.suspects, shown))
    page.table(
        ["kind", "meaning", "suspects", "below"],
        [(kind, text, counts[kind], drawn[kind]) for kind, text in KINDS.items()],
        left=2,
    )
    page.section(f"The first {len(shown)} of {len(suspects.suspects)}")
    page.text("Orange: as labelled. Blue: as detected. The rank is that in suspects.csv.")
    crop = _Cropper(suspects)
    page.images(
        [(crop(suspect), _caption(i, suspect, crop.name(suspect))) for i, suspect in
         enumerate(shown, start=1)],
        columns=_COLUMNS,
    )  # fmt: skip
    return page.write(file)


def write_next(candidates: Sequence[Candidate], file: str | Path) -> Path:
    """Write a page with the images to label next and what is detected in them."""
    page = Page("Images to label next", f"{len(candidates)} images")
    page.section("By uncertainty")
    page.text(
        "The expected number of wrong decisions if each detection of a score of .5 or more is "
        "taken for an object: the sum of min(score, 1 - score)."
    )
    page.images(
        [
            (c.found.draw(max_pixels=_NEXT_PIXELS), f"{i}. {c.found.name}: {c.uncertainty:.2f}")
            for i, c in enumerate(candidates, start=1)
        ],
        columns=_COLUMNS,
    )
    return page.write(file)


class _Cropper:
    """Cuts the suspects out of their images, several of which are kept in memory."""

    def __init__(self, suspects: Suspects) -> None:
        self._dataset = suspects.dataset
        self._read = lru_cache(maxsize=8)(read_image)

    def name(self, suspect: Suspect) -> str:
        return self._dataset.images[suspect.image].path.name

    def __call__(self, suspect: Suspect) -> Image.Image:
        pixels = self._read(self._dataset.images[suspect.image].path)
        boxes, names = [], []
        if suspect.label is not None:
            boxes.append(suspect.label.box)
            names.append(self._dataset.classes[suspect.label.label])
        if suspect.box is not None:
            boxes.append(suspect.box)
            names.append(f"{suspect.class_name} {suspect.confidence:.2f}")
        sides = list(zip(*boxes, strict=True))
        low, high = [min(side) for side in sides[:2]], [max(side) for side in sides[2:]]
        margin = max(_MIN_MARGIN, _MARGIN * max(high[0] - low[0], high[1] - low[1]))
        height, width = pixels.shape[1:]
        x1, y1 = (max(0, int(side - margin)) for side in low)
        x2, y2 = min(width, int(high[0] + margin) + 1), min(height, int(high[1] + margin) + 1)
        x1, y1 = min(x1, width - 1), min(y1, height - 1)
        moved = [(box[0] - x1, box[1] - y1, box[2] - x1, box[3] - y1) for box in boxes]
        colours = [_LABELLED] * (suspect.label is not None) + [_DETECTED]
        return draw_boxes(
            pixels[:, y1 : max(y2, y1 + 1), x1 : max(x2, x1 + 1)],
            moved,
            list(range(len(boxes))),
            names=names,
            colours=colours,
            width=2,
            enlarge_to=_CROP,
        )


def _caption(rank: int, suspect: Suspect, name: str) -> str:
    return f"{rank}. {suspect.kind} {suspect.score:.2f} · {name}"
