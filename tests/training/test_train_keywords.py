"""``rn.train`` with keywords, and a callback that stops it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same_weights, read_log, tiny_recipe
from torch.utils.data import DataLoader, Subset

import retinanet as rn
from retinanet.config import Recipe, keyword_settings, load_recipe
from retinanet.training import trainer
from retinanet.training.events import Event


@pytest.fixture
def trained_with(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """The recipes that ``rn.train`` trains, which it then does not."""
    recipes: list[Recipe] = []
    monkeypatch.setattr(
        "retinanet.api.train_by_recipe", lambda recipe, *_, **__: recipes.append(recipe)
    )
    return recipes


def test_keywords_are_settings_by_their_last_names(trained_with: list[Recipe]) -> None:
    rn.train(
        "data",
        out="out",
        recipe="quick",
        settings={"loss.gamma": 1.5, "train.milestones": [0.5]},
        epochs=3,
        lr=0.002,
        batch_size=4,
        backbone_weights=Path("w.safetensors"),
        classification="hinge",
        seed=7,
    )
    expected = [
        "loss.gamma=1.5",
        "train.milestones=[0.5]",
        "train.epochs=3",
        "train.min_steps=1",
        "train.max_steps=1000000000",
        "train.lr=0.002",
        "train.batch_size=4",
        "model.backbone_weights=w.safetensors",
        "loss.classification=hinge",
        "train.seed=7",
    ]
    assert trained_with == [load_recipe("quick", expected)]
    assert trained_with[0].loss.alpha is None  # as on the command line: not the focal loss's
    assert trained_with[0].states("train.lr")


def test_steps_replace_the_epochs_of_the_recipe(trained_with: list[Recipe]) -> None:
    rn.train("data", out="out", steps=5)
    rn.train("data", out="out", steps=5, epochs=None, lr=None)
    assert trained_with[0] == trained_with[1]
    assert (trained_with[0].train.steps, trained_with[0].train.epochs) == (5, None)


def test_image_size_keeps_the_ratio_of_the_longer_side() -> None:
    recipe = load_recipe("paper_1x", keyword_settings("paper_1x", {"image_size": 300}))
    assert (recipe.data.image_size, recipe.data.max_size) == (300, 500)
    both = keyword_settings("paper_1x", {"image_size": 300, "max_size": 400})
    assert both == [("data.image_size", 300), ("data.max_size", 400)]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"lr0": 0.1}, "unknown keyword 'lr0'; did you mean lr?"),
        ({"imgsz": 640}, "unknown keyword 'imgsz'; did you mean image_size?"),
        ({"epoch": 3}, "unknown keyword 'epoch'; did you mean epochs?"),
        ({"steps": 5, "epochs": 3}, "train.steps and train.epochs each set the length"),
        ({"epochs": 3, "steps": 5}, "train.steps and train.epochs each set the length"),
        ({"resume": True}, "unknown keyword 'resume': the same call resumes a run"),
        ({"lr": "fast"}, "train.lr: Input should be a valid number"),
        ({"lr": 1.0, "settings": "train.lr=2"}, "train.lr is given twice: as a setting and by lr"),
        ({"tile": None, "settings": "data.tile=512"}, "data.tile is given twice"),
        ({"image_size": "640"}, "image_size is a whole number of pixels, got '640'"),
        (
            {"backbone_weights": "no.pth", "backbone": "resnet18", "data": "none"},
            "backbone weights no.pth",
        ),
    ],
)
def test_wrong_keywords_are_named(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(rn.RetinaNetError) as caught:
        rn.train(keywords.pop("data", "data"), out="out", **keywords)
    assert message in str(caught.value)


def test_keywords_do_not_change_a_built_recipe() -> None:
    with pytest.raises(rn.ConfigError, match="cannot override a built recipe"):
        rn.train("data", out="out", recipe=load_recipe("quick"), lr=0.1)


def test_classes_of_data_with_names_are_an_error() -> None:
    with pytest.raises(rn.ConfigError, match=r'give settings=\{"data.classes": \[\.\.\]\}'):
        rn.train("data", out="out", classes=["car"])


def test_map_style_data_set_alone_is_the_train_split(monkeypatch: pytest.MonkeyPatch) -> None:
    splits: list[Any] = []
    monkeypatch.setattr(
        "retinanet.api.train_by_recipe", lambda _, data, *a, **k: splits.append(data)
    )
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    target = {"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([0])}
    pairs = Subset([(image, target)] * 2, [0, 1])
    rn.train(pairs, out="out", classes=["square"])
    assert {name: (len(part), part.classes) for name, part in splits[0].items()} == {
        "train": (2, ("square",))
    }
    for data in (DataLoader(pairs), (pairs, pairs)):
        with pytest.raises(rn.ConfigError, match=f"data is a {type(data).__name__}: give a path"):
            rn.train(data, out="out")


def test_callback_stops_and_the_run_resumes(tiny_data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe("train.steps=4", "train.validate_every=2")
    whole = trainer.train(recipe, tiny_data, tmp_path / "whole", device="cpu")

    def stop(event: Event) -> str | None:
        return "stop" if event.kind == "step" and event.data["step"] == 3 else None

    with pytest.raises(rn.ConfigError, match="on_event returned True: return None, or 'stop'"):
        rn.train(
            tiny_data, out=tmp_path / "no", recipe=recipe, device="cpu", on_event=lambda _: True
        )

    first = rn.train(tiny_data, out=tmp_path / "parts", recipe=recipe, device="cpu", on_event=stop)
    assert (first.interrupted, first.step, first.exit_code) == (True, 3, 0)
    second = rn.train(tiny_data, out=tmp_path / "parts", recipe=recipe, device="cpu")
    assert (second.interrupted, second.step) == (False, 4)
    assert_same_weights(whole.folder, second.folder)
    assert read_log(second.folder) == read_log(whole.folder)
