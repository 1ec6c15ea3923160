"""The paper's tables and figures as rows to train, with what the paper says of each.

Figures of the paper are in points, as it prints them: an AP of 34.0 is .340 elsewhere in this
package.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Depth = Literal["50", "101", "x101"]
"""ResNet-50, ResNet-101 or ResNeXt-101: which of a run's backbones a row takes."""

Kind = Literal["over", "at_least", "about", "faster"]
"""What a claim says of two sides; see :class:`Claim`."""


@dataclass(frozen=True, slots=True)
class Published:
    """What the paper prints of a row, in points and milliseconds; None: it does not say.

    Attributes:
        ap, ap50, ap75: COCO's.
        small, medium, large: AP by the size of the object.
        milliseconds: an image, on an Nvidia M40.
    """

    ap: float
    ap50: float | None = None
    ap75: float | None = None
    small: float | None = None
    medium: float | None = None
    large: float | None = None
    milliseconds: float | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table, or one point of a figure.

    Attributes:
        key: its name within the experiment, such as ``alpha=.75``; in claims and file names.
        label: as the table shows it.
        settings: ``key=value`` laid over the recipe.
        depth: the backbone's.
        scale: shorter side of the image in the paper, pixels; in small the recipe's size times
            scale / 600.
        rival: which other detector is trained (a name of :data:`retinanet.paper.rivals.RIVALS`);
            empty: RetinaNet.
        trained: False for rows that stand here for their published figures alone.
        published: what the paper prints; None: it has no such row.
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
    """What the paper claims of the best of some rows beside the best of others.

    Attributes:
        text: the claim in words.
        kind: ``over``: the first's AP is higher; ``at_least``: it is no more than `within` lower;
            ``about``: they are no further apart than `within`; ``faster``: the first takes less
            time an image.
        first, second: keys of rows; of each side the row with the highest mean AP counts, for
            ``faster`` the one with the least time.
        within: points of AP, for ``at_least`` and ``about``.
        printed: what the paper prints of both sides and its names for them, where that is not the
            rows' AP: milliseconds, for ``faster``.
    """

    text: str
    kind: Kind
    first: tuple[str, ...]
    second: tuple[str, ...]
    within: float = 0.0
    printed: tuple[tuple[str, float], tuple[str, float]] | None = None


@dataclass(frozen=True, slots=True)
class Experiment:
    """A table, or a figure that needs training.

    Attributes:
        name: as ``retinanet paper run`` takes it: ``table1a`` ... ``fig7``.
        title: what it is about, in a few words.
        section: where it stands in the paper.
        setting: how the paper measured it, in a few words.
        columns: what the paper prints, of ``AP AP50 AP75 APs APm APl ms``.
        rows: in the paper's order; none for figures drawn from the code alone.
        claims: what the paper concludes from it.
        recipe: that ``--full`` trains with: ``paper_1x`` or ``paper_table2``.
        note: what the paper leaves open and how it was decided here.
    """

    name: str
    title: str
    section: str
    setting: str = ""
    columns: tuple[str, ...] = ("AP", "AP50", "AP75")
    rows: tuple[Row, ...] = ()
    claims: tuple[Claim, ...] = field(default=())
    recipe: str = "paper_1x"
    note: str = ""

    def row(self, key: str) -> Row:
        """The row of that key.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if row.key == key:
                return row
        raise KeyError(f"{self.name} has no row {key!r}: {', '.join(row.key for row in self.rows)}")
