"""The trainings behind the rows of an experiment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from retinanet.config import Recipe, load_recipe
from retinanet.data.synthetic import synthetic_dataset
from retinanet.errors import ConfigError, DataError
from retinanet.paper.plan import (
    Plan,
    Settings,
    common_differences,
    differences,
    make_plan,
    read_data,
    resolve,
    size_changes,
)
from retinanet.paper.tables import EXPERIMENTS, Experiment, Row


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "shapes"
    synthetic_dataset(folder, splits={"train": 6, "val": 3}, image_size=96, empty=0.0, seed=1)
    return folder


@pytest.fixture(scope="module")
def settings(data: Path) -> Settings:
    return Settings(data, image_size=96, steps=40, overrides=("anchors.sizes=[16,32,64,128,256]",))


def plan_of(settings: Settings, *names: str) -> Plan:
    return make_plan([EXPERIMENTS[name] for name in names], settings, read_data(settings))


def recipe_of(name: str, key: str, settings: Settings, seed: int = 0) -> Recipe:
    return resolve(EXPERIMENTS[name], EXPERIMENTS[name].row(key), settings, seed)


def first_name(settings: Settings) -> str:
    """Return the name of the first training of Table 3."""
    experiment = replace(EXPERIMENTS["table3"], rows=EXPERIMENTS["table3"].rows[:1])
    return make_plan([experiment], settings, read_data(settings)).trainings[0].name


# --- trainings ------------------------------------------------------------------------------------


def test_rows_with_the_same_settings_share_a_training(settings: Settings) -> None:
    names = ["table1b", "table1c", "table3"]
    plan = plan_of(settings, *names)
    rows = (("table1b", "gamma=2"), ("table1c", "3x3"), ("table3", "focal"))
    assert len({plan.rows[row][0].name for row in rows}) == 1
    # Shared: FL in all three (two less), and CE of alpha .75 in 1b and 3 (one less).
    assert len(plan.trainings) == sum(len(EXPERIMENTS[name].rows) for name in names) - 3
    assert len({training.folder(Path("out")) for training in plan.trainings}) == len(plan.trainings)


def test_seeds_share_a_name_and_the_split(settings: Settings) -> None:
    plan = plan_of(replace(settings, seeds=3), "table3")
    of_row = plan.rows["table3", "focal"]
    assert [training.seed for training in of_row] == [0, 1, 2]
    assert [training.recipe.train.seed for training in of_row] == [0, 1, 2]
    assert {training.recipe.split_seed for training in of_row} == {0}
    assert len({training.name for training in of_row}) == 1
    # The first seed of all rows comes before the second: a killed command leaves whole tables.
    assert [training.seed for training in plan.trainings] == [0] * 4 + [1] * 4 + [2] * 4


def test_name_depends_on_what_changes_the_result(settings: Settings, tmp_path: Path) -> None:
    def changed(*overrides: str) -> Settings:
        return replace(settings, overrides=(*settings.overrides, *overrides))

    usual = first_name(settings)
    assert first_name(changed("data.workers=3", "train.save_every=7")) == usual
    assert first_name(changed("train.lr=0.01")) != usual
    assert first_name(changed("model.prior=0.5")) != usual
    synthetic_dataset(
        tmp_path / "d", splits={"train": 6, "val": 3}, image_size=96, empty=0.0, seed=2
    )
    assert first_name(replace(settings, data=tmp_path / "d")) != usual
    # Weights count by their content.
    names = []
    for folder, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        file = tmp_path / folder / "model.safetensors"
        file.parent.mkdir()
        file.write_bytes(content)
        names.append(first_name(replace(settings, backbone_weights=(str(file),))))
    assert names[0] == names[1] != names[2]


def test_rows_with_published_values_only_are_not_trained(settings: Settings) -> None:
    experiment = Experiment("x", "", "", rows=(Row("a", "a", trained=False), Row("b", "b")))
    assert set(make_plan([experiment], settings, read_data(settings)).rows) == {("x", "b")}


def test_minibatch_larger_than_an_image_is_an_error(settings: Settings) -> None:
    # 32 px: 4x4 + 2x2 + 1 + 1 + 1 = 23 cells of 9 anchors, 207: enough for 128, not for 256.
    small = replace(settings, image_size=32, overrides=("anchors.sizes=[8,16,32,64,128]",))
    assert recipe_of("table1d", "ohem-128-.7", small).loss.mining_size == 128
    with pytest.raises(ConfigError, match=r"row ohem-256-.7 of table1d: .* 207 anchors, fewer"):
        recipe_of("table1d", "ohem-256-.7", small)


# --- settings of a row ----------------------------------------------------------------------------


def test_sizes_change_in_proportion(data: Path) -> None:
    settings = Settings(data, image_size=192, steps=100)
    recipes = [recipe_of("table1e", f"R50-{scale}", settings) for scale in (400, 600, 800)]
    # 400, 600 and 800 of 600, times 192; the longer side at most keeps quick's 640 / 384.
    assert [recipe.data.image_size for recipe in recipes] == [128, 192, 256]
    assert recipes[1].data.max_size == 320
    table2 = EXPERIMENTS["table2"]  # has 800 px only, so no size is larger than another
    sides = {resolve(table2, row, settings).data.image_size for row in table2.rows if row.trained}
    assert sides == {192}
    settings = Settings(data, steps=40, overrides=("data.multi_scale=[384, 480]",))
    assert recipe_of("table1e", "R50-800", settings).data.multi_scale == (512, 640)
    with pytest.raises(ConfigError, match="row R50-400 of table1e would have 27 px"):
        recipe_of("table1e", "R50-400", Settings(data, steps=40, image_size=40))


@pytest.mark.parametrize(
    ("steps", "overrides", "expected"),
    [(40, (), 10), (4000, (), 100), (40, ("train.warmup_steps=3",), 3)],
)
def test_warm_up_takes_at_most_a_quarter(
    data: Path, steps: int, overrides: tuple[str, ...], expected: int
) -> None:
    recipe = recipe_of("table3", "ce", Settings(data, steps=steps, overrides=overrides))
    assert recipe.train.warmup_steps == expected


def test_full_uses_the_papers_recipes(data: Path) -> None:
    settings = Settings(data, full=True)
    focal = recipe_of("table1b", "gamma=2", settings)
    changed = {name: here for name, _, here in differences(focal)}
    # Validated at the end only, on the split that every seed has.
    assert changed == {"data.split_seed": 0, "train.validate_every": 90_000.0}
    recipe = recipe_of("table1e", "R101-800", settings)
    assert (recipe.data.image_size, recipe.data.max_size) == (800, 1334)
    assert recipe.model.backbone == "resnet101"
    recipe = recipe_of("table2", "X101", settings)
    assert recipe.model.backbone == "resnext101_32x8d"
    assert recipe.train.steps == 135_000
    assert recipe.data.multi_scale == load_recipe("paper_table2").data.multi_scale


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ((), ["resnet50", "resnet101", "resnext101_32x8d"]),
        (("mobilenet_v2",), ["mobilenet_v2"] * 3),
        (("resnet18", "resnet34"), ["resnet18", "resnet34", "resnet34"]),
    ],
)
def test_backbones_replace_the_papers_in_order(
    data: Path, names: tuple[str, ...], expected: list[str]
) -> None:
    settings = Settings(data, steps=40, backbones=names)
    rows = (("table1e", "R50-400"), ("table1e", "R101-800"), ("table2", "X101"))
    assert [recipe_of(*row, settings).model.backbone for row in rows] == expected
    weights = Settings(data, steps=40, backbone_weights=("a.safetensors", "b.safetensors"))
    assert recipe_of("table1e", "R101-400", weights).model.backbone_weights == "b.safetensors"


# --- differences from the paper -------------------------------------------------------------------


def test_common_differences_are_those_of_every_row(data: Path) -> None:
    assert differences(Recipe()) == []
    plan = plan_of(Settings(data, steps=40, backbones=("resnet18", "resnet34")), "table1e")
    common = {name for name, _, _ in common_differences(plan)}
    assert "train.optimizer" in common
    assert not common & {"model.backbone", "data.image_size", "data.max_size"}


def test_size_changes_in_words(settings: Settings) -> None:
    settings = replace(settings, backbones=("resnet18",))
    assert size_changes(plan_of(settings, "table3"), settings) == [
        "40 steps of 8 for 90,000 steps of 16 images",
        "96 px for 600 px, other scales in proportion",
        "resnet18 for resnet50",
    ]
    changes = size_changes(plan_of(settings, "table2"), settings)
    assert "96 px for 800 px, other scales in proportion" in changes


# --- data -----------------------------------------------------------------------------------------


def test_data_without_a_split_has_the_same_split_for_every_seed(tmp_path: Path) -> None:
    synthetic_dataset(tmp_path / "d", splits={"train": 12}, image_size=64, empty=0.0)
    settings = Settings(tmp_path / "d", steps=40, seeds=2)
    splits = read_data(settings)
    assert {name: len(split) for name, split in splits.items()} == {"train": 10, "val": 2}
    names = [[image.path.name for image in read_data(settings)["val"].images] for _ in range(2)]
    assert names[0] == names[1]
    other = replace(settings, overrides=("data.split_seed=5",))
    assert recipe_of("table3", "ce", other, seed=1).split_seed == 5


def test_data_without_objects_is_an_error(tmp_path: Path) -> None:
    synthetic_dataset(tmp_path / "d", splits={"train": 4, "val": 2}, image_size=64, objects=(0, 0))
    with pytest.raises(DataError, match="no object to train on in 4 images"):
        read_data(Settings(tmp_path / "d"))


def test_a_recipe_that_starts_from_a_detector_is_rejected() -> None:
    settings = Settings(data=Path("cells"), recipe="finetune")
    with pytest.raises(ConfigError, match=r"start from ImageNet weights; give train.init=none"):
        settings.load_recipe()
    started = Settings(data=Path("cells"), recipe="finetune", overrides=("train.init=none",))
    assert started.load_recipe().train.init is None
