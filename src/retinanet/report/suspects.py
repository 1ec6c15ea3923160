"""Pages of suspect labels and of images to label next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from retinanet.data.drawing import draw_boxes
from retinanet.data.images import read_image
from retinanet.evaluation.suspects import KINDS, Candidate, Suspect, Suspects
from retinanet.report.html import ImageLike, Page

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
    read = lru_cache(maxsize=8)(read_image)
    crops: list[tuple[ImageLike, str]] = []
    for i, suspect in enumerate(shown, start=1):
        path = dataset.images[suspect.image].path
        caption = f"{i}. {suspect.kind} {suspect.score:.2f} · {path.name}"
        crops.append((_crop(read(path), suspect, dataset.classes), caption))
    page.images(crops, columns=_COLUMNS)
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


def _crop(pixels: Tensor, suspect: Suspect, classes: Sequence[str]) -> Image.Image:
    """Cut a suspect out of its image, with its label and the detection drawn."""
    drawn = []
    if suspect.label is not None:
        drawn.append((suspect.label.box, classes[suspect.label.label], _LABELLED))
    if suspect.box is not None:
        drawn.append((suspect.box, f"{suspect.class_name} {suspect.confidence:.2f}", _DETECTED))
    boxes = np.array([box for box, _, _ in drawn])
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    margin = max(_MIN_MARGIN, _MARGIN * float((high - low).max()))
    size = pixels.shape[2], pixels.shape[1]
    x1, y1 = np.minimum(np.maximum(0, (low - margin).astype(int)), np.subtract(size, 1))
    x2, y2 = np.maximum((high + margin).astype(int) + 1, (x1 + 1, y1 + 1))
    return draw_boxes(
        pixels[:, y1:y2, x1:x2],
        boxes - [x1, y1, x1, y1],
        range(len(drawn)),
        names=[name for _, name, _ in drawn],
        colours=[colour for _, _, colour in drawn],
        width=2,
        enlarge_to=_CROP,
    )
