"""Faults of boxes, and their corrections."""

from __future__ import annotations

import math

EDGE = 0.5
"""Pixels that a box may extend beyond its image: less is a rounding of the labels."""

CLIPPED = "clipped"
"""The fix of a box that is partly outside."""


def check_box(
    box: tuple[float, float, float, float], width: int | None, height: int | None
) -> tuple[str, str, str] | None:
    """Return the kind, reason and fix of the most severe fault of a box, or None."""
    x1, y1, x2, y2 = box
    if width and height and 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height:
        return None  # nearly all boxes
    if not all(map(math.isfinite, box)):
        return "box-not-a-number", "is not four finite numbers", "dropped"
    fixed = fixed_box(box, width, height)
    if x2 < x1 or y2 < y1:
        sides = (("left and right", x2 < x1), ("top and bottom", y2 < y1))
        swapped = " and ".join(name for name, bad in sides if bad)
        return "box-inverted", f"has {swapped} swapped", "swapped back" if fixed else "dropped"
    if x2 == x1 or y2 == y1:
        missing = " and no ".join(
            name for name, bad in (("width", x2 == x1), ("height", y2 == y1)) if bad
        )
        return "box-empty", f"has no {missing}", "dropped"
    size = f"the image of {width} x {height}"
    if fixed is None:
        return "box-outside", f"is wholly outside {size}", "dropped"
    if fixed != box:
        return "box-outside", f"extends beyond {size}", CLIPPED
    return None


def fixed_box(
    box: tuple[float, float, float, float], width: int | None, height: int | None
) -> tuple[float, float, float, float] | None:
    """Swap inverted sides of a box, and clip it if it extends beyond the image by EDGE or more.

    Returns:
        The box, unchanged if nothing is wrong, or None if nothing of it is left.
    """
    if not all(map(math.isfinite, box)):
        return None
    x1, x2 = sorted((box[0], box[2]))
    y1, y2 = sorted((box[1], box[3]))
    if width is not None and height is not None:
        if x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
            return None
        x1, y1 = (0.0 if side < -EDGE else side for side in (x1, y1))
        x2 = float(width) if x2 > width + EDGE else x2
        y2 = float(height) if y2 > height + EDGE else y2
    return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None
