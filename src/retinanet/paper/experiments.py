"""Data structures for the paper's tables and figures: rows to train and claims to test.

Published AP is in points, as the paper prints it: 34.0 is .340 elsewhere in this package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Depth = Literal["50", "101", "x101"]
"""The backbone of a row: ResNet-50, ResNet-101 or ResNeXt-101."""

Kind = Literal["over", "at_least", "about", "faster"]
"""How a claim compares its two sides; see :class:`Claim`."""


@dataclass(frozen=True, slots=True)
class Published:
    """Values that the paper prints for a row: AP in points, ms per image on an Nvidia M40."""

    ap: float
    ap50: float | None = None
    ap75: float | None = None
    small: float | None = None
    medium: float | None = None
    large: float | None = None
    milliseconds: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table, or a point of a figure.

    Attributes:
        key: unique within the experiment, such as ``alpha=.75``; used in claims.
        settings: ``key=value`` overrides of the recipe.
        scale: shorter side of the image in the paper, pixels; on small data the recipe's size times
            scale / 600.
        rival: another detector to train (:data:`retinanet.paper.rivals.RIVALS`); empty: RetinaNet.
        trained: False for rows with published values only.
        published: the paper's values; None: the paper has no such row.
    """

    key: str
    label: str
    settings: tuple[str, ...] = ()
    depth: Depth = "50"
    scale: int = 600
    rival: str = ""
    trained: bool = True
    published: Published | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """A comparison that the paper makes between the best of some rows and the best of others.

    Attributes:
        text: the claim in words.
        kind: ``over``: the first has a higher AP; ``at_least``: it is at most `within` lower;
            ``about``: they differ by at most `within`; ``faster``: the first takes less time per
            image.
        first, second: keys of the rows of each side; the row with the highest mean AP counts, for
            ``faster`` the row with the lowest time.
        within: points of AP, for ``at_least`` and ``about``.
        printed: (label, milliseconds) of both sides in the paper, for ``faster``.
    """

    text: str
    kind: Kind
    first: tuple[str, ...]
    second: tuple[str, ...]
    within: float = 0.0
    printed: tuple[tuple[str, float], tuple[str, float]] | None = None


@dataclass(frozen=True, slots=True)
class Experiment:
    """A table or figure of the paper.

    Attributes:
        name: for ``retinanet paper run``: ``table1a`` ... ``fig7``.
        setting: of the paper's measurement, in a few words.
        columns: that the paper prints, of ``AP AP50 AP75 APs APm APl ms``.
        rows: in the paper's order; none for figures that need no training.
        recipe: for ``--full``.
        note: what the paper leaves open, and the choice made here.
    """

    name: str
    title: str
    section: str
    setting: str = ""
    columns: tuple[str, ...] = ("AP", "AP50", "AP75")
    rows: tuple[Row, ...] = ()
    claims: tuple[Claim, ...] = ()
    recipe: str = "paper_1x"
    note: str = ""

    def row(self, key: str) -> Row:
        """Return the row with a key."""
        return next(row for row in self.rows if row.key == key)
