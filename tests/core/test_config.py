"""Settings: the paper's defaults, recipes, overrides, every refusal, and TOML there and back."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from retinanet.config import (
    LossConfig,
    LossSettings,
    Recipe,
    build_recipe,
    load_recipe,
    recipe_names,
    setting_names,
    to_toml,
)
from retinanet.errors import ConfigError, RetinaNetError


def test_defaults_are_the_papers() -> None:
    """Sec. 3.3, 4, 4.1 and 5."""
    recipe = Recipe()
    assert (recipe.loss.alpha, recipe.loss.gamma, recipe.loss.normalizer) == (0.25, 2, "image")
    assert (recipe.matching.foreground_iou, recipe.matching.background_iou) == (0.5, 0.4)
    assert not recipe.matching.low_quality_matches
    assert (recipe.model.prior, recipe.model.p6_from, recipe.model.p2) == (0.01, "c5", False)
    assert (recipe.model.channels, recipe.model.head_depth) == (256, 4)
    assert (recipe.train.steps, recipe.train.batch_size, recipe.train.lr) == (90_000, 16, 0.01)
    assert [share * 90_000 for share in recipe.train.milestones] == pytest.approx([60e3, 80e3])
    assert (recipe.train.momentum, recipe.train.weight_decay) == (0.9, 1e-4)
    assert (recipe.detect.score_threshold, recipe.detect.nms_threshold) == (0.05, 0.5)
    assert recipe.detect.topk_candidates == 1000
    assert recipe.data.image_size == 600
    assert recipe.anchors.scales == (1, 2 ** (1 / 3), 2 ** (2 / 3))
    assert recipe.anchors.aspect_ratios == (0.5, 1, 2)
    assert recipe.loss_settings == LossSettings()


def test_paper_recipe_is_the_defaults() -> None:
    assert load_recipe("paper_1x") == Recipe()


@pytest.mark.parametrize("name", recipe_names())
def test_each_recipe_loads_under_its_own_name(name: str) -> None:
    assert load_recipe(name).name == name


def test_the_recipes_that_come_along() -> None:
    assert {"paper_1x", "paper_quick", "paper_table2", "quick"} <= set(recipe_names())
    table2 = load_recipe("paper_table2")
    assert table2.train.steps == 135_000  # 1.5 times 90k
    assert table2.model.backbone == "resnet101"


# --- overrides ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.lr=0.005", "train", "lr", 0.005),
        ("train.lr = 1e-3", "train", "lr", 1e-3),
        ("train.batch_size=4", "train", "batch_size", 4),
        ("model.p2=true", "model", "p2", True),
        ("model.backbone=resnet18", "model", "backbone", "resnet18"),
        ('model.backbone="timm/x"', "model", "backbone", "timm/x"),
        ("model.backbone_weights=a=b.safetensors", "model", "backbone_weights", "a=b.safetensors"),
        ("data.multi_scale=[400, 500]", "data", "multi_scale", (400, 500)),
        ("data.workers=2", "data", "workers", 2),
        ("data.workers=auto", "data", "workers", "auto"),
        ("loss.alpha=[0.1, 0.9]", "loss", "alpha", (0.1, 0.9)),
        ("loss.alpha=[.2,.3, 0.5]", "loss", "alpha", (0.2, 0.3, 0.5)),
        ("loss.alpha=.999", "loss", "alpha", 0.999),
        ("loss.beta=-.5", "loss", "beta", -0.5),
        ("model.backbone_weights=./.5.pth", "model", "backbone_weights", "./.5.pth"),
        ("loss.alpha=none", "loss", "alpha", None),
        ("loss.mining=none", "loss", "mining", "none"),
        ("anchors.sizes=none", "anchors", "sizes", None),
        ("model.head_norm=none", "model", "head_norm", "none"),
        ("model.pixel_mean=[1, 2, 3]", "model", "pixel_mean", (1.0, 2.0, 3.0)),
        ("train.trackers=['wandb']", "train", "trackers", ("wandb",)),
        ("data.classes=['a b', 'c']", "data", "classes", ("a b", "c")),
        ("data.classes=[person, car]", "data", "classes", ("person", "car")),
        ("data.classes=person,car", "data", "classes", ("person", "car")),
    ],
)
def test_overrides(override: str, section: str, key: str, value: Any) -> None:
    recipe = load_recipe("paper_1x", [override])
    assert getattr(getattr(recipe, section), key) == value
    others = recipe.model_dump()
    others[section][key] = Recipe().model_dump()[section][key]
    assert others == Recipe().model_dump()


def test_the_last_override_counts() -> None:
    assert load_recipe("quick", ["train.lr=1", "train.lr=2"]).train.lr == 2


def test_naming_the_steps_takes_the_place_of_epochs() -> None:
    assert load_recipe("quick").train.epochs is not None
    recipe = load_recipe("quick", ["train.steps=7"])
    assert (recipe.train.steps, recipe.train.epochs) == (7, None)
    assert load_recipe("quick", ["train.steps =7"]).train.steps == 7
    for both in (["train.steps=7", "train.epochs=2"], ["train.epochs=3", "train.steps=4"]):
        with pytest.raises(ConfigError, match=r"train\.steps and train\.epochs each set the len"):
            load_recipe("quick", both)


def test_alpha_goes_with_the_focal_loss() -> None:
    assert load_recipe("paper_quick").loss.alpha == 0.25
    assert load_recipe("quick").loss.alpha is None
    assert load_recipe("quick", ["loss.classification=varifocal"]).loss.alpha == 0.25
    assert load_recipe("quick", ["loss.classification=cross_entropy"]).loss.alpha is None
    assert load_recipe("quick", ["loss.classification=hinge"]).loss.alpha is None
    given = load_recipe("quick", ["loss.classification=cross_entropy", "loss.alpha=0.75"])
    assert given.loss.alpha == 0.75
    with pytest.raises(ConfigError, match="focal_star divides by gamma"):
        load_recipe("quick", ["loss.classification=focal_star", "loss.gamma=0"])


def test_the_longer_side_is_not_under_the_shorter() -> None:
    with pytest.raises(ConfigError, match=r"max_size 640.*is under image_size 800"):
        load_recipe("quick", ["data.image_size=800"])


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().train.lr = 1.0  # type: ignore[misc]


# --- refusals -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr", "'train.lr' is not a setting: write key=value, as in train.lr=0.005"),
        ("lr=1", "unknown setting 'lr'; did you mean train.lr?"),
        ("train.lrr=1", "unknown setting 'train.lrr'; did you mean train.lr?"),
        ("trian.momentum=1", "unknown setting 'trian.momentum'; did you mean train.momentum?"),
        ("score_threshold=1", "did you mean detect.score_threshold?"),
        ("lr0=1", "unknown setting 'lr0'; did you mean train.lr?"),
        ("train.learning_rate=1", "did you mean train.lr?"),
        ("SOLVER.BASE_LR=1", "did you mean train.lr?"),
        ("imgsz=640", "did you mean data.image_size?"),
        ("conf=.3", "did you mean detect.score_threshold?"),
        ("model.test_cfg.score_thr=.3", "did you mean detect.score_threshold?"),
        ("qqqqqqqqqqqqqqqqq=1", "unknown setting 'qqqqqqqqqqqqqqqqq'"),
        ("=1", "unknown setting ''"),
        ("train.lr=fast", "train.lr: Input should be a valid number"),
        ("train.lr=0", "train.lr: Input should be greater than 0 (got 0)"),
        ("train.lr=inf", "train.lr: Input should be a finite number (got inf)"),
        ("loss.gamma=nan", "loss.gamma: Input should be"),
        ("train.momentum=1", "train.momentum: Input should be less than 1 (got 1)"),
        ("train.batch_size=2.5", "train.batch_size: Input should be a valid integer"),
        ("model.norm=batch", "model.norm: Input should be 'frozen', 'trained', 'sync' or 'group'"),
        ("model.pixel_mean=[1, 2]", "model.pixel_mean: Field required"),
        ("data.image_size=31", "data.image_size: Input should be greater than or equal to 32"),
        (
            "train.trackers=['x']",
            "train.trackers: Input should be 'tensorboard', 'wandb', 'mlflow'",
        ),
        ("matching.foreground_iou=0.3", "background_iou 0.4 is over foreground_iou 0.3"),
        ("loss.mining=ohem_13", "loss.mining: Input should be 'none', 'ohem' or 'ohem_1_3'"),
        ("loss.alpha=1.5", "alpha 1.5 is not in [0, 1]"),
        ("loss.alpha=[0.5, -1]", "alpha (0.5, -1.0) is not in [0, 1]"),
        ("detect.score_thresholds={a=1.5}", "detect.score_thresholds.a: Input should be less than"),
        ("detect.nms=matrix", "detect.nms: Input should be 'hard', 'soft' or 'wbf'"),
        ("detect.temperature=0", "detect.temperature: Input should be greater than 0 (got 0)"),
        ("anchors.scales=[]", "scales () must be one or more positive numbers"),
        ("anchors.aspect_ratios=[1, 0]", "aspect_ratios (1.0, 0.0) must be one or more"),
        ("anchors.sizes=[-8]", "sizes (-8.0,) must be one or more positive numbers"),
        ("data.scale_jitter=[1.2, 0.8]", "scale_jitter (1.2, 0.8) is not 0 < low <= high"),
        ("data.multi_scale=[400, 16]", "(400, 16) has a side under 32 pixels"),
        ("train.accumulate=3", "batch_size 16 is not a multiple of accumulate 3"),
        ("train.min_steps=2000000000", "min_steps 2000000000 is over max_steps 1000000000"),
        ("train.milestones=[0.5, 1]", "milestones (0.5, 1.0) are shares of the steps, in (0, 1)"),
    ],
)
def test_refused_overrides(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe("paper_1x", [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, RetinaNetError)


def test_refused_names_of_recipes(tmp_path: Path) -> None:
    for name, message in (
        ("quik", "recipe 'quik' is neither a file nor one of "),
        ("quik", "; did you mean quick?"),
        (str(tmp_path / "none.toml"), "none.toml: cannot be read: "),
        (str(tmp_path), "is neither a file nor one of"),
    ):
        with pytest.raises(ConfigError) as error:
            load_recipe(name)
        assert message in str(error.value)


def test_dependent_default_of_alpha_is_not_stated() -> None:
    recipe = Recipe(loss=LossConfig(classification="hinge"))
    assert recipe.states("loss.classification")
    assert not recipe.states("loss.alpha")


def test_refused_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    for text, message in (
        (b"[train\n", "is not TOML: "),
        (b"\xff\xfe\x00", "cannot be read: "),
        (b"[train]\nlearning = 1\n", "unknown setting 'train.learning'"),
        (b"[train]\nlrr = 1\n", "unknown setting 'train.lrr'; did you mean train.lr?"),
        (b"[trian]\nlr = 1\n", "unknown setting 'trian'"),
        (b"train = 5\n", "train: Input should be a valid dictionary"),
        (b"[train]\nlr = -1\nmomentum = 7\n", "; 1 more"),
    ):
        file.write_bytes(text)
        with pytest.raises(ConfigError) as error:
            load_recipe(file)
        assert message in str(error.value)
        assert "mine.toml" in str(error.value)


def test_other_tools_names_are_of_settings_that_exist() -> None:
    from retinanet import config

    for name, others in config._OTHER_NAMES.items():
        assert name in setting_names()
        for other in others:
            assert f"did you mean {name}?" in config.unknown_setting(other), other


# --- TOML there and back --------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names())
def test_toml_reads_back_to_the_same(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    file = tmp_path / "config.toml"
    file.write_text(to_toml(recipe), "utf-8")
    assert load_recipe(file) == recipe


@pytest.mark.parametrize(
    "settings",
    [
        ["loss.alpha=none"],
        ["loss.alpha=[0.1, 0.25]"],
        [
            "loss.classification=cross_entropy",
            "loss.alpha=none",
            "loss.mining=ohem_1_3",
            "loss.mining_size=512",
            "loss.mining_nms=0.5",
        ],
        ["loss.classification=focal_star", "loss.gamma=4", "loss.beta=0"],
        ["loss.classification=hinge", "loss.margin=0.75"],
        ["anchors.sizes=[16, 32.5]", "anchors.scales=[1.2599210498948732]"],
        ["model.pixel_mean=[127.5, 127.5, 127.5]", "model.stride_padding=same"],
        ["data.multi_scale=[320, 640]", "data.workers=3"],
        ["train.epochs=1.5", "train.trackers=['wandb', 'tensorboard']", "train.lr=1e-7"],
        ["train.deterministic=true", "model.p2=true"],
        ['detect.score_thresholds={"a b" = 0.25, "ü\\"" = 0.5}', "detect.nms=wbf"],
        ['model.backbone_weights="C:\\\\new \\"odd\\" folder\\\\ü.safetensors"'],
    ],
)
def test_toml_of_unusual_settings_reads_back(settings: list[str]) -> None:
    recipe = load_recipe("paper_quick", settings)
    assert build_recipe(tomllib.loads(to_toml(recipe)), "back") == recipe
    assert recipe != load_recipe("paper_quick")


@pytest.mark.parametrize("name", ['a "quoted" name', "back\\slash", "two\nlines", "ü 中"])
def test_toml_of_unusual_names_reads_back(name: str) -> None:
    recipe = Recipe(name=name)
    assert build_recipe(tomllib.loads(to_toml(recipe)), "back").name == name


def test_mining_alone_is_of_plain_cross_entropy() -> None:
    loss = load_recipe("quick", ["loss.mining=ohem"]).loss
    assert (loss.classification, loss.alpha) == ("cross_entropy", None)
    loss = load_recipe("quick", ["loss.mining=ohem", "loss.classification=focal"]).loss
    assert (loss.classification, loss.alpha) == ("focal", 0.25)


def test_override_of_a_built_recipe_equals_that_of_its_file() -> None:
    recipe = load_recipe("quick")
    for name, value in (("train.steps", 7), ("loss.classification", "focal")):
        expected = load_recipe("quick", [(name, value)])
        found = recipe.override({name: value})
        assert (found.train, found.loss) == (expected.train, expected.loss)
    assert recipe.override({"loss.classification": "focal"}).loss.alpha == 0.25
    assert recipe.override({"train.steps": 7}).train.epochs is None
