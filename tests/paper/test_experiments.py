"""The paper's tables as they are kept, against the tables typed a second time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from retinanet.config import Recipe, load_recipe
from retinanet.paper.claims import evaluate_claim
from retinanet.paper.results import RowResult, Score
from retinanet.paper.tables import EXPERIMENTS, Claim, Experiment, Published

# AP/AP50/AP75/APs/APm/APl as far as printed, then @ms; "-": no value; in the rows' order.
PRINTED = {
    "table1a": "0.0/0.0/0.0 10.8/16.0/11.7 30.2/46.7/32.8 31.1/49.4/33.0 30.8/49.7/32.3 "
    "28.7/47.4/29.9 25.1/41.7/26.1",
    "table1b": "31.1/49.4/33.0 31.4/49.9/33.1 31.9/50.7/33.4 32.9/51.7/35.2 33.7/52.0/36.2 "
    "34.0/52.5/36.5 32.2/49.6/34.8 33.6",
    "table1c": "30.3/49.0/31.8 31.9/50.0/34.0 31.8/49.4/33.7 32.4/52.3/33.9 34.2/53.1/36.5 "
    "34.0/52.5/36.5 33.8/52.1/36.2",
    "table1d": "31.1/47.2/33.2 31.8/48.8/33.9 30.6/47.0/32.6 32.8/50.3/35.1 31.0/47.4/33.0 "
    "27.6/42.0/29.2 31.1/47.2/33.2 28.3/42.4/30.3 24.0/35.5/25.8 36.0/54.9/38.7 - -",
    "table1e": "30.5/47.8/32.7/11.2/33.8/46.1@64 32.5/50.9/34.8/13.9/35.8/46.7@72 "
    "34.3/53.2/36.9/16.2/37.4/47.4@98 35.1/54.2/37.7/18.0/39.3/46.4@121 "
    "35.7/55.0/38.5/18.9/38.9/46.3@153 31.9/49.5/34.1/11.6/35.8/48.5@81 "
    "34.4/53.1/36.8/14.7/38.5/49.1@90 36.0/55.2/38.7/17.4/39.6/49.7@122 "
    "37.1/56.6/39.8/19.1/40.6/49.4@154 37.8/57.5/40.8/20.2/41.1/49.2@198",
    "table2": "34.9/55.7/37.4/15.6/38.7/50.9 36.2/59.1/39.0/18.2/39.0/48.2 "
    "34.7/55.5/36.7/13.5/38.1/52.0 36.8/57.7/39.2/16.2/39.8/52.1 21.6/44.0/19.2/5.0/22.4/35.5 "
    "31.2/50.4/33.3/10.2/34.5/49.8 33.2/53.3/35.2/13.0/35.4/51.1 39.1/59.1/42.3/21.8/42.7/50.2 "
    "40.8/61.1/44.1/24.1/44.2/51.2",
    "table3": "31.1/49.4/33.0 34.0/52.5/36.5 33.8/52.7/36.3 33.9/51.8/36.4",
    "fig1": "",
    "fig2": "30.5/47.8/32.7/11.2/33.8/46.1@64 32.5/50.9/34.8/13.9/35.8/46.7@72 "
    "34.3/53.2/36.9/16.2/37.4/47.4@98 35.1/54.2/37.7/18.0/39.3/46.4@121 "
    "35.7/55.0/38.5/18.9/38.9/46.3@153 31.9/49.5/34.1/11.6/35.8/48.5@81 "
    "34.4/53.1/36.8/14.7/38.5/49.1@90 36.0/55.2/38.7/17.4/39.6/49.7@122 "
    "37.1/56.6/39.8/19.1/40.6/49.4@154 37.8/57.5/40.8/20.2/41.1/49.2@198 "
    "21.6@25 28.0@61 28.0@85 29.9@85 31.2@125 33.2@156 36.2@172",
    "fig3": "",
    "fig4": "36.0/55.2/38.7/17.4/39.6/49.7@122",
    "fig5": "",
    "fig6": "",
    "fig7": "- - - - 33.8/52.7/36.3 - - - - 33.9/51.8/36.4 - - 31.1/49.4/33.0 34.0/52.5/36.5",
}


def claims() -> Iterator[tuple[Experiment, Claim]]:
    return ((e, claim) for e in EXPERIMENTS.values() for claim in e.claims)


def parse(printed: str) -> Published | None:
    if printed == "-":
        return None
    figures, _, milliseconds = printed.partition("@")
    names = ("ap", "ap50", "ap75", "small", "medium", "large")
    numbers = dict(zip(names, map(float, figures.split("/")), strict=False))
    return Published(**numbers, milliseconds=float(milliseconds) if milliseconds else None)


def resolved(experiment: str, key: str) -> Recipe:
    found = EXPERIMENTS[experiment]
    return load_recipe(found.recipe, found.row(key).settings)


def test_experiments_are_in_the_papers_order() -> None:
    assert list(EXPERIMENTS) == list(PRINTED)
    assert all(name == experiment.name for name, experiment in EXPERIMENTS.items())


@pytest.mark.parametrize("name", list(PRINTED))
def test_published_values_equal_the_papers(name: str) -> None:
    assert [row.published for row in EXPERIMENTS[name].rows] == [
        parse(printed) for printed in PRINTED[name].split()
    ]


LOSSES: dict[tuple[str, str], tuple[object, ...]] = {
    # classification, alpha, gamma or beta where it matters
    ("table1a", "alpha=.1"): ("cross_entropy", 0.1),
    ("table1a", "alpha=.75"): ("cross_entropy", 0.75),
    ("table1a", "alpha=.999"): ("cross_entropy", 0.999),
    ("table1b", "gamma=0"): ("cross_entropy", 0.75),
    ("table1b", "gamma=.1"): ("focal", 0.75, 0.1),
    ("table1b", "gamma=.2"): ("focal", 0.75, 0.2),
    ("table1b", "gamma=.5"): ("focal", 0.5, 0.5),
    ("table1b", "gamma=1"): ("focal", 0.25, 1.0),
    ("table1b", "gamma=2"): ("focal", 0.25, 2.0),
    ("table1b", "gamma=5"): ("focal", 0.25, 5.0),
    ("table1b", "gamma=2,alpha=.5"): ("focal", 0.5, 2.0),
    ("table1d", "hinge"): ("hinge", None),
    ("table3", "star-2-1"): ("focal_star", None, 2.0, 1.0),
    ("table3", "star-4-0"): ("focal_star", None, 4.0, 0.0),
    ("fig7", "star-1-2"): ("focal_star", None, 1.0, 2.0),
}


@pytest.mark.parametrize(("name", "key"), list(LOSSES))
def test_loss_settings_of_a_row(name: str, key: str) -> None:
    loss, expected = resolved(name, key).loss, LOSSES[name, key]
    settings = (loss.classification, loss.alpha, loss.gamma, loss.beta)
    assert settings[: len(expected)] == expected


def test_mining_of_table_1d() -> None:
    keys = [row.key for row in EXPERIMENTS["table1d"].rows if row.key.startswith("ohem")]
    losses = [resolved("table1d", key).loss for key in keys]
    assert {(loss.classification, loss.alpha) for loss in losses} == {("cross_entropy", None)}
    assert [(loss.mining, loss.mining_size, loss.mining_nms) for loss in losses] == [
        *(("ohem", size, 0.7) for size in (128, 256, 512)),
        *(("ohem", size, 0.5) for size in (128, 256, 512)),
        *(("ohem_1_3", size, 0.5) for size in (128, 256, 512)),
    ]


def test_anchors_of_table_1c() -> None:
    # 2^(k / n), k = 0 .. n - 1
    octaves = {1: (1.0,), 2: (1.0, 1.414214), 3: (1.0, 1.259921, 1.587401)}
    octaves[4] = (1.0, 1.189207, 1.414214, 1.681793)
    for row in EXPERIMENTS["table1c"].rows:
        anchors = resolved("table1c", row.key).anchors
        scales, ratios = map(int, row.key.split("x"))
        assert anchors.scales == pytest.approx(octaves[scales], abs=1e-6)
        assert anchors.aspect_ratios == ((1.0,) if ratios == 1 else (0.5, 1.0, 2.0))


def test_backbones_and_scales() -> None:
    assert {row.depth for row in EXPERIMENTS["table1d"].rows} == {"101"}
    assert [(row.depth, row.scale) for row in EXPERIMENTS["table1e"].rows] == [
        (depth, scale) for depth in ("50", "101") for scale in (400, 500, 600, 700, 800)
    ]
    table2 = EXPERIMENTS["table2"]
    assert table2.recipe == "paper_table2"
    trained = [(row.rival, row.depth, row.scale) for row in table2.rows if row.trained]
    assert trained == [
        *(("faster_rcnn", "101", 800), ("ssd", "101", 800)),
        *(("", "101", 800), ("", "x101", 800)),
    ]


FOCAL = (("table1b", "gamma=2"), ("table1c", "3x3"), ("table3", "focal"), ("fig7", "focal"))


@pytest.mark.parametrize(
    "rows",
    [
        (("table1a", "alpha=.75"), ("table1b", "gamma=0"), ("table3", "ce"), ("fig7", "ce")),
        (*FOCAL, ("table1e", "R50-600"), ("fig2", "R50-600")),
        (("table3", "star-2-1"), ("fig7", "star-2-1")),
        (("table3", "star-4-0"), ("fig7", "star-4-0")),
        (("table1d", "focal"), ("table1e", "R101-600"), ("fig4", "R101-600")),
    ],
)
def test_one_training_has_the_same_settings_in_every_table(
    rows: tuple[tuple[str, str], ...],
) -> None:
    found = [
        (resolved(name, key), row.depth, row.scale)
        for name, key in rows
        for row in [EXPERIMENTS[name].row(key)]
    ]
    assert all(settings == found[0] for settings in found)


def test_rows_of_a_table_differ_or_have_published_values() -> None:
    for name, experiment in EXPERIMENTS.items():
        trained = [
            (resolved(name, row.key).model_dump_json(), row.depth, row.scale, row.rival)
            for row in experiment.rows
            if row.trained
        ]
        assert len(set(trained)) == len(trained), name
        keys = [row.key for row in experiment.rows]
        assert len({key.lower() for key in keys}) == len(keys), name
        assert not set("".join(keys)) & set(' /\\:*?"<>|+'), name
        assert all(row.trained or row.published is not None for row in experiment.rows)


def test_claims_name_rows_that_are_trained() -> None:
    for experiment, claim in claims():
        assert claim.first
        assert claim.second
        assert not set(claim.first) & set(claim.second)
        assert all(experiment.row(key).trained for key in (*claim.first, *claim.second))
        assert (claim.within > 0) == (claim.kind in ("about", "at_least"))
        assert (claim.printed is not None) == (claim.kind == "faster")


def test_claims_hold_for_the_papers_own_values() -> None:
    for experiment, claim in claims():
        rows = {
            row.key: RowResult(
                row.key,
                row.label,
                scores={} if row.published is None else {"AP": Score(row.published.ap)},
                milliseconds=dict(claim.printed or ()).get({"R101": "RetinaNet-101, 600 px"}.get(
                    row.key, "FPN FRCN")),
            )
            for row in experiment.rows
        }  # fmt: skip
        has_no_value = claim.text == "the best OHEM over alpha-balanced CE"
        verdict = evaluate_claim(claim, rows).verdict
        assert verdict == ("not measured" if has_no_value else "holds"), claim.text
    times = dict(EXPERIMENTS["table2"].claims[-1].printed or ())
    published = {row.key: row.published for row in EXPERIMENTS["fig2"].rows}
    assert [published[key].milliseconds for key in ("R101-600", "fpn-frcn")] == [*times.values()]  # type: ignore[union-attr]
