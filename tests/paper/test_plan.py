"""Which trainings the rows of an experiment are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from retinanet.config import Recipe, load_recipe
from retinanet.data.synthetic import synthetic_dataset
from retinanet.errors import ConfigError, DataError
from retinanet.paper.experiments import Experiment, Row
from retinanet.paper.plan import (
    Terms,
    common_differences,
    differences,
    plan,
    read_data,
    resolve,
    size_changes,
)
from retinanet.paper.tables import EXPERIMENTS


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "shapes"
    synthetic_dataset(folder, splits={"train": 6, "val": 3}, image_size=96, empty=0.0, seed=1)
    return folder


@pytest.fixture(scope="module")
def terms(data: Path) -> Terms:
    return Terms(data, image_size=96, steps=40, settings=("anchors.sizes=[16,32,64,128,256]",))


def test_the_same_settings_in_several_tables_are_one_training(terms: Terms) -> None:
    splits = read_data(terms)
    names = ["table1b", "table1c", "table3"]
    planned = plan([EXPERIMENTS[name] for name in names], terms, splits)
    focal = {
        planned.rows[place][0].name
        for place in (("table1b", "gamma=2"), ("table1c", "3x3"), ("table3", "focal"))
    }
    assert len(focal) == 1
    rows = sum(len(EXPERIMENTS[name].rows) for name in names)
    # Shared: FL in all three (two less), and CE of alpha .75 in 1b and 3 (one less).
    assert len(planned.trainings) == rows - 3
    folders = {one.folder(Path("out")) for one in planned.trainings}
    assert len(folders) == len(planned.trainings)


def test_seeds_are_trainings_of_one_name_on_the_same_images(terms: Terms) -> None:
    terms = replace(terms, seeds=3)
    planned = plan([EXPERIMENTS["table3"]], terms, read_data(terms))
    of_row = planned.rows["table3", "focal"]
    assert [one.seed for one in of_row] == [0, 1, 2]
    assert [one.recipe.train.seed for one in of_row] == [0, 1, 2]
    assert {one.recipe.split_seed for one in of_row} == {0}
    assert len({one.name for one in of_row}) == 1
    # The first seed of all rows comes before the second of any: a killed call has whole tables.
    assert [one.seed for one in planned.trainings] == [0] * 4 + [1] * 4 + [2] * 4


def test_rows_differ_in_what_they_are_about_alone(terms: Terms) -> None:
    experiment = EXPERIMENTS["table1b"]
    one, other = (
        resolve(experiment, row, terms).model_dump()
        for row in experiment.rows
        if row.key in ("gamma=.5", "gamma=5")
    )
    assert one["loss"] != other["loss"]
    assert {**one, "loss": None} == {**other, "loss": None}


def test_in_small_the_sizes_keep_their_ratio(data: Path) -> None:
    terms = Terms(data, image_size=192, steps=100)
    experiment = EXPERIMENTS["table1e"]
    sides = {row.key: resolve(experiment, row, terms).data for row in experiment.rows}
    # 400, 600 and 800 of 600, times 192; the longer side at most keeps quick's 640 / 384.
    assert [sides[key].image_size for key in ("R50-400", "R50-600", "R50-800")] == [128, 192, 256]
    assert sides["R50-600"].max_size == 320
    table2 = EXPERIMENTS["table2"]
    for row in table2.rows:
        if row.trained:  # the paper's 800 px alone: nothing to be larger than
            assert resolve(table2, row, terms).data.image_size == 192


def test_the_warm_up_is_a_quarter_at_most(data: Path) -> None:
    experiment = EXPERIMENTS["table3"]
    row = experiment.rows[0]
    assert resolve(experiment, row, Terms(data, steps=40)).train.warmup_steps == 10
    assert resolve(experiment, row, Terms(data, steps=4000)).train.warmup_steps == 100
    own = Terms(data, steps=40, settings=("train.warmup_steps=3",))
    assert resolve(experiment, row, own).train.warmup_steps == 3


def test_at_full_size_it_is_the_papers_recipe(data: Path) -> None:
    terms = Terms(data, full=True)
    experiment = EXPERIMENTS["table1b"]
    focal = next(row for row in experiment.rows if row.key == "gamma=2")
    changed = {name: here for name, _, here in differences(resolve(experiment, focal, terms))}
    # Judged at the end alone, on the split that every seed has.
    assert changed == {"data.split_seed": 0, "train.validate_every": 90_000.0}
    table1e = EXPERIMENTS["table1e"]
    deep = next(row for row in table1e.rows if row.key == "R101-800")
    recipe = resolve(table1e, deep, terms)
    assert (recipe.data.image_size, recipe.data.max_size) == (800, 1334)
    assert recipe.model.backbone == "resnet101"
    table2 = EXPERIMENTS["table2"]
    widest = next(row for row in table2.rows if row.depth == "x101")
    recipe = resolve(table2, widest, terms)
    assert recipe.model.backbone == "resnext101_32x8d"
    assert recipe.train.steps == 135_000
    assert recipe.data.multi_scale == load_recipe("paper_table2").data.multi_scale


def test_backbones_in_their_order(data: Path) -> None:
    table2, table1e = EXPERIMENTS["table2"], EXPERIMENTS["table1e"]
    rows = {"50": table1e.rows[0], "101": table1e.rows[-1], "x101": table2.rows[-1]}
    assert rows["x101"].depth == "x101"

    def of(*names: str) -> list[str]:
        terms = Terms(data, steps=40, backbones=names)
        return [resolve(table1e, row, terms).model.backbone for row in rows.values()]

    assert of() == ["resnet50", "resnet101", "resnext101_32x8d"]
    assert of("mobilenet_v2") == ["mobilenet_v2"] * 3
    assert of("resnet18", "resnet34") == ["resnet18", "resnet34", "resnet34"]
    weights = Terms(data, steps=40, backbone_weights=("a.safetensors", "b.safetensors"))
    assert resolve(table1e, rows["101"], weights).model.backbone_weights == "b.safetensors"


def test_what_does_not_change_the_result_does_not_change_the_name(terms: Terms) -> None:
    splits = read_data(terms)
    experiment = replace(EXPERIMENTS["table3"], rows=EXPERIMENTS["table3"].rows[:1])

    def name(*settings: str) -> str:
        more = replace(terms, settings=(*terms.settings, *settings))
        return plan([experiment], more, splits).trainings[0].name

    usual = name()
    assert name("data.workers=3", "train.save_every=7") == usual
    assert name("train.lr=0.01") != usual
    assert name("model.prior=0.5") != usual


def test_other_data_is_another_training(terms: Terms, tmp_path: Path) -> None:
    synthetic_dataset(
        tmp_path / "b", splits={"train": 6, "val": 3}, image_size=96, empty=0.0, seed=2
    )
    other = replace(terms, data=tmp_path / "b")
    names = [
        plan([EXPERIMENTS["table3"]], one, read_data(one)).trainings[0].name
        for one in (terms, other)
    ]
    assert names[0] != names[1]


def test_a_row_without_anchor_recall_is_refused(terms: Terms) -> None:
    # One square anchor of 512 px a cell and less than 100 px of image.
    large = replace(terms, settings=("anchors.sizes=[512,512,512,512,512]",))
    planned = plan([EXPERIMENTS["table1c"]], large, read_data(large))
    assert planned.trainings == ()
    why = planned.refused["table1c", "1x1"]
    assert "overlaps an anchor by 0.5 at 96 px" in why
    assert "anchors.sizes" in why


def test_a_minibatch_larger_than_a_image_is_refused(terms: Terms) -> None:
    # 32 px: 4x4 + 2x2 + 1 + 1 + 1 = 23 cells of 9 anchors, 207: enough for 128, not for 256.
    small = replace(terms, image_size=32, settings=("anchors.sizes=[8,16,32,64,128]",))
    planned = plan([EXPERIMENTS["table1d"]], small, read_data(small))
    refused = {key for _, key in planned.refused}
    assert refused == {
        row.key
        for row in EXPERIMENTS["table1d"].rows
        if any(f"mining_size={size}" in one for one in row.settings for size in (256, 512))
    }
    assert "has 207 anchors, fewer than the 256" in planned.refused["table1d", "ohem-256-.7"]


def test_weights_are_told_apart_by_what_is_in_them(terms: Terms, tmp_path: Path) -> None:
    splits = read_data(terms)
    experiment = replace(EXPERIMENTS["table3"], rows=EXPERIMENTS["table3"].rows[:1])
    names = []
    for place, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        file = tmp_path / place / "model.safetensors"
        file.parent.mkdir()
        file.write_bytes(content)
        more = replace(terms, backbone_weights=(str(file),))
        names.append(plan([experiment], more, splits).trainings[0].name)
    assert names[0] == names[1] != names[2]


def test_settings_that_would_be_overridden_are_refused(terms: Terms) -> None:
    row = EXPERIMENTS["table3"].rows[0]
    for setting, said in (
        ("model.backbone=mobilenet_v2", "model.backbone is said by --backbone"),
        ("train.seed=7", "train.seed is said by --seeds"),
        ("train.epochs=3", "train.epochs is said by --steps or --budget"),
        ("loss.alpha=0.5", "loss.alpha is what rows are about"),
        ("anchors.scales=[1]", "anchors.scales is what rows are about"),
    ):
        with pytest.raises(ConfigError, match=said):
            resolve(EXPERIMENTS["table3"], row, replace(terms, settings=(setting,)))


def test_sides_to_draw_from_keep_their_ratio(data: Path) -> None:
    terms = Terms(data, steps=40, settings=("data.multi_scale=[384, 480]",))
    row = next(row for row in EXPERIMENTS["table1e"].rows if row.key == "R50-800")
    assert resolve(EXPERIMENTS["table1e"], row, terms).data.multi_scale == (512, 640)


def test_a_side_too_small_is_said_in_words_of_the_call(data: Path) -> None:
    terms = Terms(data, steps=40, image_size=40)
    row = EXPERIMENTS["table1e"].rows[0]
    with pytest.raises(ConfigError, match="row R50-400 of table1e would have 27 px"):
        resolve(EXPERIMENTS["table1e"], row, terms)


def test_settings_in_common_are_those_of_every_row(data: Path) -> None:
    terms = Terms(data, steps=40, backbones=("resnet18", "resnet34"))
    common = {name for name, _, _ in common_differences(
        plan([EXPERIMENTS["table1e"]], terms, read_data(terms)))}  # fmt: skip
    assert "train.optimizer" in common
    assert not common & {"model.backbone", "data.image_size", "data.max_size"}


def test_table_2_stands_for_800_pixels(terms: Terms) -> None:
    planned = plan([EXPERIMENTS["table2"]], terms, read_data(terms))
    assert "96 px for 800 px (table2), other scales in proportion" in size_changes(planned, terms)


def test_what_is_in_small_is_said(terms: Terms) -> None:
    planned = plan(
        [EXPERIMENTS["table3"]], replace(terms, backbones=("resnet18",)), read_data(terms)
    )
    said = size_changes(planned, replace(terms, backbones=("resnet18",)))
    assert said[0] == "40 steps of 8 for 90,000 steps of 16 images"
    assert said[1].startswith("96 px for 600 px")
    assert "resnet18 for resnet50" in said


def test_no_difference_from_the_paper_is_none() -> None:
    assert differences(Recipe()) == []


def test_data_without_a_split_is_split_the_same_for_every_seed(tmp_path: Path) -> None:
    synthetic_dataset(tmp_path / "d", splits={"train": 12}, image_size=64, empty=0.0)
    terms = Terms(tmp_path / "d", steps=40, seeds=2)
    assert {name: len(one) for name, one in read_data(terms).items()} == {"train": 10, "val": 2}
    other = replace(terms, settings=("data.split_seed=5",))
    names = [
        [image.path.name for image in read_data(one)["val"].images] for one in (terms, other, terms)
    ]
    assert names[0] == names[2]
    row = EXPERIMENTS["table3"].rows[0]
    assert resolve(EXPERIMENTS["table3"], row, other, seed=1).split_seed == 5


def test_nothing_to_judge_by_is_said(tmp_path: Path) -> None:
    synthetic_dataset(tmp_path / "d", splits={"train": 4, "val": 2}, image_size=64, objects=(0, 0))
    with pytest.raises(DataError, match="no object to train on in 4 images"):
        read_data(Terms(tmp_path / "d"))


def test_an_unknown_setting_is_said(terms: Terms) -> None:
    with pytest.raises(ConfigError, match=r"did you mean train.lr\?"):
        read_data(replace(terms, settings=("train.lrr=1",)))


def test_rows_that_stand_for_their_figures_are_not_trained(terms: Terms) -> None:
    experiment = Experiment("x", "", "", rows=(Row("a", "a", trained=False), Row("b", "b")))
    planned = plan([experiment], terms, read_data(terms))
    assert set(planned.rows) == {("x", "b")}
