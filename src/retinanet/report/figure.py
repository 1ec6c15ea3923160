"""Style, colours and files of all figures.

Colours are those of Okabe and Ito, which people with any kind of colour vision can distinguish.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler
from matplotlib.ticker import LogFormatter, NullFormatter

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, PALE_BLUE = "#CC79A7", "#56B4E9", "#C9DFEE"
GREY, DARK = "#8A8F98", "#333333"
COLOURS = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY, "#4B3F72", "#7A7A00")

_STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#999999",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.formatter.limits": (-3, 5),
    "grid.color": "#E6E8EB",
    "grid.linewidth": 0.8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "figure.facecolor": "white",
    "savefig.dpi": 160,
    "svg.hashsalt": "retinanet",  # ids in an SVG are random without it
    "text.parse_math": False,  # a class may be called "US$ 5"
}


@contextmanager
def open_figure(width: float, height: float, *files: str | Path) -> Iterator[Figure]:
    """Open a figure of this size in inches, and write it to `files` at the end.

    Suffixes select PNG or SVG. Equal figures give equal bytes.
    """
    style: Any = {**mpl.rcParamsDefault, "backend": "agg", **_STYLE}
    with mpl.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        for axis in (side for axes in figure.axes for side in (axes.xaxis, axes.yaxis)):
            if isinstance(axis.get_major_formatter(), LogFormatter):  # it needs math, which is off
                axis.set_major_formatter("{x:,g}")
                axis.set_minor_formatter(NullFormatter())
        with warnings.catch_warnings():
            # Letters that the font lacks are drawn as boxes.
            warnings.filterwarnings("ignore", message=r"Glyph \d+")
            for path in map(Path, files):
                path.parent.mkdir(parents=True, exist_ok=True)
                # Else the version of matplotlib or the date is written.
                omitted = "Date" if path.suffix == ".svg" else "Software"
                figure.savefig(path, metadata={omitted: None})


class Files(NamedTuple):
    """Both files of a figure."""

    png: Path
    svg: Path


@contextmanager
def open_axes(
    width: float, height: float, stem: str | Path, columns: int = 1, **options: Any
) -> Iterator[tuple[Files, Any]]:
    """Open a figure of one row of axes, and write ``STEM.png`` and ``STEM.svg`` at the end."""
    files = Files(*(Path(f"{stem}.{kind}") for kind in ("png", "svg")))
    with open_figure(width, height, *files) as figure:
        yield files, figure.subplots(1, columns, **options)


def cycle_colours(count: int) -> list[str]:
    """`count` colours; they repeat after the eighth."""
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def add_legend(axis: Any, **options: Any) -> None:
    """Add a legend if anything is labelled."""
    handles, labels = axis.get_legend_handles_labels()
    if any(labels):
        axis.legend(handles, labels, **options)


def shorten(name: str, length: int = 22) -> str:
    """Cut a long name at its end."""
    return name if len(name) <= length else f"{name[: length - 2]}.."


def shorten_start(name: str, length: int = 40) -> str:
    """Cut a long name at its start: paths differ at their ends."""
    return name if len(name) <= length else f"..{name[2 - length :]}"


def format_count(number: int, noun: str) -> str:
    """Format a count: 1 image, 2 images."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_compact(number: int) -> str:
    """Format a count in about four characters: 950, 12k, 3.4M."""
    for limit, divisor, unit in ((1_000_000, 1_000_000, "M"), (10_000, 1_000, "k")):
        if abs(number) >= limit:
            return f"{number / divisor:.3g}{unit}"
    return str(number)
