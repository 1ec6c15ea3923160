"""All tables and figures of the paper: rows, published values and claims.

Source: Lin et al. 2017 (arXiv:1708.02002v2), Sec. 4 and 5, Appendix A. Published AP is in points,
as the paper prints it: 34.0 is .340 elsewhere in this package. A row that is printed in
several tables (gamma 2 in Tables 1b, 1c and 3) is in each of them with the same settings, so that
it is trained once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

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


# --- the paper's ----------------------------------------------------------------------------------

STAR_GAMMAS = (1.0, 2.0, 3.0, 4.0)
STAR_BETAS = (0.0, 1.0, 2.0)
"""The grid of Figure 7; the paper does not list its own."""

_TRAINED = "trained on COCO trainval35k"
_R50 = f"ResNet-50-FPN, 600 px, {_TRAINED}, tested on minival"
_TEST_DEV = f"{_TRAINED}, tested on test-dev"
_ALL_SIZES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def _short(value: float) -> str:
    """Format a number as the paper does: .75, 2, .1."""
    return f"{value:g}".removeprefix("0") or "0"


def _cross_entropy(alpha: float | None) -> tuple[str, ...]:
    return ("loss.classification=cross_entropy", f"loss.alpha={alpha or 'none'}")


def _focal(gamma: float, alpha: float) -> tuple[str, ...]:
    return ("loss.classification=focal", f"loss.gamma={gamma}", f"loss.alpha={alpha}")


def _focal_star(gamma: float, beta: float) -> tuple[str, ...]:
    loss = ("loss.classification=focal_star", "loss.alpha=none")
    return (*loss, f"loss.gamma={gamma}", f"loss.beta={beta}")


def _ohem(mining: str, size: int, nms: float) -> tuple[str, ...]:
    mined = (f"loss.mining={mining}", f"loss.mining_size={size}", f"loss.mining_nms={nms}")
    return (*_cross_entropy(None), *mined)


def _anchors(scales: int, ratios: int) -> tuple[str, ...]:
    """Octave scales 2^(k / n), and aspect ratio 1 or 1:2, 1:1, 2:1 (Sec. 5.2)."""
    octaves = [2 ** (k / scales) for k in range(scales)]
    shapes = [1.0] if ratios == 1 else [0.5, 1.0, 2.0]
    return (f"anchors.scales={octaves}", f"anchors.aspect_ratios={shapes}")


def _over(text: str, first: str, *second: str) -> Claim:
    return Claim(text, "over", (first,), second)


def _printed(keys: Iterable[Any], text: str) -> dict[Any, Published]:
    """Parse the values of rows, as ``AP/AP50/AP75/APs/APm/APl@ms`` as far as the paper has them."""
    names = ("ap", "ap50", "ap75", "small", "medium", "large")
    published = []
    for cell in text.split():
        aps, _, milliseconds = cell.partition("@")
        values = dict(zip(names, map(float, aps.split("/")), strict=False))
        time = {"milliseconds": float(milliseconds)} if milliseconds else {}
        published.append(Published(**values, **time))
    return dict(zip(keys, published, strict=True))


_CE = Published(31.1, 49.4, 33.0)  # with alpha .75
_FL = Published(34.0, 52.5, 36.5)  # with gamma 2, alpha .25

_ALPHAS = _printed(
    (0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999),
    "0.0/0.0/0.0 10.8/16.0/11.7 30.2/46.7/32.8 31.1/49.4/33.0 30.8/49.7/32.3 "
    "28.7/47.4/29.9 25.1/41.7/26.1",
)

TABLE_1A = Experiment(
    "table1a",
    "Alpha-balanced cross entropy",
    "Sec. 5.1, Table 1a",
    setting=_R50,
    rows=tuple(
        Row(f"alpha={name}", f"CE, alpha {name}", _cross_entropy(alpha), published=published)
        for alpha, published in _ALPHAS.items()
        for name in [_short(alpha)]
    ),
    claims=(
        _over("alpha .75 is the best", "alpha=.75",
              *(f"alpha={_short(alpha)}" for alpha in _ALPHAS if alpha != 0.75)),
        _over("alpha .1 is far under alpha .25", "alpha=.25", "alpha=.1"),
        _over("too much alpha costs: .75 over .999", "alpha=.75", "alpha=.999"),
    ),
    note="The paper prints 0.0 for alpha .1, which did not train.",
)  # fmt: skip

_GAMMAS = _printed(
    ((0.1, 0.75), (0.2, 0.75), (0.5, 0.5), (1.0, 0.25), (2.0, 0.25), (5.0, 0.25)),
    "31.4/49.9/33.1 31.9/50.7/33.4 32.9/51.7/35.2 33.7/52.0/36.2 34.0/52.5/36.5 32.2/49.6/34.8",
)


def _gamma_row(key: str, gamma: float, alpha: float, published: Published) -> Row:
    label = f"FL, gamma {_short(gamma)}, alpha {_short(alpha)}"
    return Row(key, label, _focal(gamma, alpha), published=published)


TABLE_1B = Experiment(
    "table1b",
    "Focal loss over gamma, each with its best alpha",
    "Sec. 5.1, Table 1b",
    setting=_R50,
    rows=(
        Row("gamma=0", "CE (gamma 0), alpha .75", _cross_entropy(0.75), published=_CE),
        *(
            _gamma_row(f"gamma={_short(gamma)}", gamma, alpha, published)
            for (gamma, alpha), published in _GAMMAS.items()
        ),
        _gamma_row("gamma=2,alpha=.5", 2.0, 0.5, Published(33.6)),
    ),
    claims=(
        _over("gamma 2 over gamma 0 (cross entropy)", "gamma=2", "gamma=0"),
        _over("gamma .5 over gamma 0", "gamma=.5", "gamma=0"),
        _over("gamma 2 over gamma .5", "gamma=2", "gamma=.5"),
        _over("gamma 5 falls again: 2 over 5", "gamma=2", "gamma=5"),
        _over("with gamma 2, alpha .25 over .5", "gamma=2", "gamma=2,alpha=.5"),
    ),
    note="For gamma 2 with alpha .5 the text only says that AP is 0.4 lower.",
)

_ANCHORS = _printed(
    ((1, 1), (2, 1), (3, 1), (1, 3), (2, 3), (3, 3), (4, 3)),
    "30.3/49.0/31.8 31.9/50.0/34.0 31.8/49.4/33.7 32.4/52.3/33.9 34.2/53.1/36.5 "
    "34.0/52.5/36.5 33.8/52.1/36.2",
)

TABLE_1C = Experiment(
    "table1c",
    "Anchors per cell: scales x aspect ratios",
    "Sec. 5.2, Table 1c",
    setting=_R50,
    rows=tuple(
        Row(f"{scales}x{ratios}", f"{scales} x {ratios}", _anchors(scales, ratios),
            published=published)
        for (scales, ratios), published in _ANCHORS.items()
    ),
    claims=(
        _over("9 anchors per cell (3x3) over 1", "3x3", "1x1"),
        _over("3 aspect ratios over 1, with 3 scales", "3x3", "3x1"),
        _over("3 scales over 1, with 3 aspect ratios", "3x3", "1x3"),
        Claim("more than 6 to 9 anchors do not help", "at_least", ("2x3", "3x3"), ("4x3",), 1.0),
    ),
    note='"Do not help" means by at most 1 point; the paper names no bound.',
)  # fmt: skip

_OHEM = _printed(
    (
        (kind, size, nms)
        for kind, nms in (("ohem", 0.7), ("ohem", 0.5), ("ohem_1_3", 0.5))
        for size in (128, 256, 512)
    ),
    "31.1/47.2/33.2 31.8/48.8/33.9 30.6/47.0/32.6 32.8/50.3/35.1 31.0/47.4/33.0 "
    "27.6/42.0/29.2 31.1/47.2/33.2 28.3/42.4/30.3 24.0/35.5/25.8",
)
_OHEM_KEYS = tuple(f"{kind}-{size}-{_short(nms)}" for kind, size, nms in _OHEM)
_FREE = tuple(key for key in _OHEM_KEYS if key.startswith("ohem-"))
_ONE_TO_THREE = tuple(key for key in _OHEM_KEYS if key.startswith("ohem_1_3-"))

TABLE_1D = Experiment(
    "table1d",
    "Online hard example mining against focal loss",
    "Sec. 5.1, Table 1d",
    setting=f"ResNet-101-FPN, 600 px, {_TRAINED}, tested on minival",
    rows=(
        *(
            Row(key, f"{'OHEM' if kind == 'ohem' else 'OHEM 1:3'}, batch {size}, NMS {_short(nms)}",
                _ohem(kind, size, nms), depth="101", published=published)
            for key, ((kind, size, nms), published) in zip(_OHEM_KEYS, _OHEM.items(), strict=True)
        ),
        Row("focal", "FL", _focal(2.0, 0.25), depth="101", published=Published(36.0, 54.9, 38.7)),
        Row("ce", "CE, alpha .75", _cross_entropy(0.75), depth="101"),
        Row("hinge", "Hinge loss", ("loss.classification=hinge", "loss.alpha=none"), depth="101"),
    ),
    claims=(
        _over("FL over the best OHEM", "focal", *_OHEM_KEYS),
        Claim("the best OHEM over alpha-balanced CE", "over", _OHEM_KEYS, ("ce",)),
        _over("batch 128 with NMS .5 is the best OHEM", "ohem-128-.5",
              *(key for key in _FREE if key != "ohem-128-.5")),
        Claim("a 1:3 ratio does not help OHEM", "at_least", _FREE, _ONE_TO_THREE, 1.0),
    ),
    note="The paper has no value of alpha-balanced CE at this depth. It calls the hinge loss "
    'unstable and prints no value, so there is no claim about that row. "Does not help" means by '
    "at most 1 point; the paper names no bound.",
)  # fmt: skip

_DEPTHS: tuple[Depth, ...] = ("50", "101")
_DEPTH_SCALE = _printed(
    ((depth, scale) for depth in _DEPTHS for scale in (400, 500, 600, 700, 800)),
    "30.5/47.8/32.7/11.2/33.8/46.1@64 32.5/50.9/34.8/13.9/35.8/46.7@72 "
    "34.3/53.2/36.9/16.2/37.4/47.4@98 35.1/54.2/37.7/18.0/39.3/46.4@121 "
    "35.7/55.0/38.5/18.9/38.9/46.3@153 31.9/49.5/34.1/11.6/35.8/48.5@81 "
    "34.4/53.1/36.8/14.7/38.5/49.1@90 36.0/55.2/38.7/17.4/39.6/49.7@122 "
    "37.1/56.6/39.8/19.1/40.6/49.4@154 37.8/57.5/40.8/20.2/41.1/49.2@198",
)
_DEPTH_SCALE_ROWS = tuple(
    Row(f"R{depth}-{scale}", f"ResNet-{depth}, {scale} px", _focal(2.0, 0.25), depth=depth,
        scale=scale, published=published)
    for (depth, scale), published in _DEPTH_SCALE.items()
)  # fmt: skip

TABLE_1E = Experiment(
    "table1e",
    "Depth and image size: accuracy and time",
    "Sec. 5.2, Table 1e",
    setting=f"{_TEST_DEV}; ms per image on an Nvidia M40",
    columns=(*_ALL_SIZES, "ms"),
    rows=_DEPTH_SCALE_ROWS,
    claims=(
        *(
            _over(f"ResNet-{depth}: 800 px over 400 px", f"R{depth}-800", f"R{depth}-400")
            for depth in _DEPTHS
        ),
        *(
            _over(f"{scale} px: ResNet-101 over ResNet-50", f"R101-{scale}", f"R50-{scale}")
            for scale in (400, 600, 800)
        ),
    ),
)


def _detector(
    key: str, label: str, published: Published, *, rival: str = "", trained: bool = False
) -> Row:
    return Row(key, label, (), "101", 800, rival, trained, published)


_FASTER = "faster_rcnn"

TABLE_2 = Experiment(
    "table2",
    "Against other detectors",
    "Sec. 5.3, Table 2",
    setting=f"single models, {_TEST_DEV}; RetinaNet at 800 px, scale jitter, 1.5 times as long",
    columns=(*_ALL_SIZES, "ms"),
    rows=(
        _detector("faster-r-cnnppp", "Faster R-CNN+++",
                  Published(34.9, 55.7, 37.4, 15.6, 38.7, 50.9)),
        _detector(_FASTER, "Faster R-CNN w FPN", Published(36.2, 59.1, 39.0, 18.2, 39.0, 48.2),
                  rival=_FASTER, trained=True),
        _detector("faster-r-cnn-by-g-rmi", "Faster R-CNN by G-RMI",
                  Published(34.7, 55.5, 36.7, 13.5, 38.1, 52.0)),
        _detector("faster-r-cnn-w-tdm", "Faster R-CNN w TDM",
                  Published(36.8, 57.7, 39.2, 16.2, 39.8, 52.1)),
        _detector("yolov2", "YOLOv2", Published(21.6, 44.0, 19.2, 5.0, 22.4, 35.5)),
        _detector("ssd", "SSD513", Published(31.2, 50.4, 33.3, 10.2, 34.5, 49.8), rival="ssd",
                  trained=True),
        _detector("dssd513", "DSSD513", Published(33.2, 53.3, 35.2, 13.0, 35.4, 51.1)),
        Row("R101", "RetinaNet, ResNet-101-FPN", _focal(2.0, 0.25), "101", 800,
            published=Published(39.1, 59.1, 42.3, 21.8, 42.7, 50.2)),
        Row("X101", "RetinaNet, ResNeXt-101-FPN", _focal(2.0, 0.25), "x101", 800,
            published=Published(40.8, 61.1, 44.1, 24.1, 44.2, 51.2)),
    ),
    claims=(
        _over("RetinaNet over Faster R-CNN with FPN", "R101", _FASTER),
        _over("RetinaNet over SSD", "R101", "ssd"),
        _over("ResNeXt-101 over ResNet-101", "X101", "R101"),
        Claim("RetinaNet faster than Faster R-CNN with FPN", "faster", ("R101",), (_FASTER,),
              printed=(("RetinaNet-101, 600 px", 122.0), ("FPN FRCN", 172.0))),
    ),
    recipe="paper_table2",
    note="Faster R-CNN with FPN and SSD are torchvision's, trained here with the same data, "
    "backbone, image size and steps as RetinaNet; the paper quotes their published values (SSD513: "
    "513 px). The other rows have published values only. Times are printed in Figure 2 alone: "
    "RetinaNet-101's at 600 px, where it has 36.0 AP and FPN FRCN 36.2 (at 800 px it takes 198 "
    "ms). Here both are timed at one image size.",
)  # fmt: skip

_STAR = {(2.0, 1.0): Published(33.8, 52.7, 36.3), (4.0, 0.0): Published(33.9, 51.8, 36.4)}
_BASELINES = (
    Row("ce", "CE, alpha .75", _cross_entropy(0.75), published=_CE),
    Row("focal", "FL, gamma 2, alpha .25", _focal(2.0, 0.25), published=_FL),
)


def _star_row(gamma: float, beta: float) -> Row:
    g, b = _short(gamma), _short(beta)
    settings, published = _focal_star(gamma, beta), _STAR.get((gamma, beta))
    return Row(f"star-{g}-{b}", f"FL*, gamma {g}, beta {b}", settings, published=published)


_STAR_GRID = tuple(_star_row(gamma, beta) for gamma in STAR_GAMMAS for beta in STAR_BETAS)
_STAR_KEYS = tuple(row.key for row in _STAR_GRID)

TABLE_3 = Experiment(
    "table3",
    "FL* against focal loss",
    "Appendix A, Table 3",
    setting=_R50,
    rows=(*_BASELINES, *(_star_row(gamma, beta) for gamma, beta in _STAR)),
    claims=(
        Claim("FL* about FL", "about", ("star-2-1", "star-4-0"), ("focal",), within=1.0),
        Claim("FL* over CE", "over", ("star-2-1", "star-4-0"), ("ce",)),
    ),
    note='The paper does not say whether FL* was alpha-balanced; here it is not. "About" means '
    "within 1 point.",
)

FIGURE_2 = Experiment(
    "fig2",
    "Accuracy against time per image",
    "Sec. 1, Figure 2",
    setting=f"{_TEST_DEV}; ms per image on an Nvidia M40",
    columns=("AP", "ms"),
    rows=(
        *_DEPTH_SCALE_ROWS,
        *(
            Row(name.lower().replace(" ", "-"), name, trained=False,
                published=Published(ap, milliseconds=milliseconds))
            for name, ap, milliseconds in (
                ("YOLOv2", 21.6, 25),
                ("SSD321", 28.0, 61),
                ("DSSD321", 28.0, 85),
                ("R-FCN", 29.9, 85),
                ("SSD513", 31.2, 125),
                ("DSSD513", 33.2, 156),
                ("FPN FRCN", 36.2, 172),
            )
        ),
    ),
    note="RetinaNet's points are those of Table 1e; the other detectors' are the paper's. The "
    "claims about them are with Tables 1e and 2.",
)  # fmt: skip

FIGURE_4 = Experiment(
    "fig4",
    "Distribution of the loss over positives and negatives, by gamma",
    "Sec. 5.1, Figure 4",
    setting="a converged ResNet-101, 600 px; 1e5 positive and 1e7 negative windows",
    columns=("AP",),
    rows=tuple(row for row in _DEPTH_SCALE_ROWS if row.key == "R101-600"),
)

FIGURE_7 = Experiment(
    "fig7",
    "FL* over gamma and beta",
    "Appendix A, Figure 7",
    setting=f"{_R50}; settings with AP over 33.5 (FL less .5) are marked",
    columns=("AP",),
    rows=(*_STAR_GRID, *_BASELINES),
    claims=(
        Claim("the best FL* reaches FL", "at_least", _STAR_KEYS, ("focal",), within=0.5),
        Claim("the best FL* over CE", "over", _STAR_KEYS, ("ce",)),
    ),
    note="The paper neither lists its grid nor says whether FL* was alpha-balanced; here it is "
    "not.",
)

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        *(TABLE_1A, TABLE_1B, TABLE_1C, TABLE_1D, TABLE_1E, TABLE_2, TABLE_3),
        Experiment("fig1", "Focal loss against p_t", "Sec. 1 and 3.2, Figure 1"),
        FIGURE_2,
        Experiment("fig3", "The network", "Sec. 4, Figure 3"),
        FIGURE_4,
        Experiment("fig5", "FL and FL* against x_t", "Appendix A, Figure 5"),
        Experiment("fig6", "Derivatives of FL and FL*", "Appendix B, Figure 6"),
        FIGURE_7,
    )
}
"""Tables and figures by name, in the paper's order; figures 1, 3, 5 and 6 need no training."""
