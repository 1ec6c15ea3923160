"""Extensions of finished runs, and batches that do not fit into memory."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import retinanet as rn
from retinanet.config import load_recipe
from retinanet.data import cpus
from retinanet.training import memory, trainer
from retinanet.training.events import Event
from retinanet.training.task import RetinaNetTask
from training.tiny import (
    Stop,
    assert_same_weights,
    messages,
    read_log,
    steps_of,
    stop_at,
    tiny_recipe,
)

SMALL = ("train.validate_every=2", "train.save_every=1")


def test_extension_has_a_schedule_of_its_own_and_resumes(tiny_data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(*SMALL, "train.steps=2", "train.warmup_steps=100")
    events: list[Event] = []
    for name in ("whole", "parts"):
        trainer.train(recipe, tiny_data, tmp_path / name, device="cpu")
    run = rn.train(
        tiny_data, out=tmp_path / "whole", more_epochs=1, device="cpu", on_event=events.append
    )
    assert (run.step, run.interrupted) == (5, False)  # 12 images in batches of 4
    # The cosine begins anew, without a warm-up, which at most takes a tenth of the steps.
    rates = [line["lr"] for line in read_log(run.folder) if "lr" in line]
    lr = recipe.train.lr * 4 / recipe.train.reference_batch
    assert rates[2:] == pytest.approx([lr, 0.75 * lr, 0.25 * lr])
    assert [event.data["step"] for event in events if event.kind == "validation"] == [4, 5]
    info = json.loads((run.folder / "run.json").read_text())
    (extension,) = info["extensions"]
    assert (extension["first_step"], extension["steps"], extension["epochs"]) == (2, 3, 1)
    options: dict[str, Any] = {"device": "cpu", "more_epochs": 1}
    with pytest.raises(Stop):
        trainer.train(recipe, tiny_data, tmp_path / "parts", on_event=stop_at(4), **options)
    with pytest.raises(rn.ConfigError, match=r"has done 3 of 5 steps: finish it by the command"):
        rn.train(tiny_data, out=tmp_path / "parts", more_epochs=2, device="cpu")
    rn.train(tiny_data, out=tmp_path / "parts", more_epochs=1, device="cpu")
    assert steps_of(tmp_path / "parts") == [1, 2, 3, 4, 5]
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    events.clear()
    again = trainer.train(
        recipe, tiny_data, tmp_path / "parts", device="cpu", on_event=events.append
    )
    assert again.step == 5
    assert "is finished: 5 steps; to train it further give --more-epochs" in messages(events)[-1]
    # A second extension has a warm-up of a tenth of its own steps, whatever the first had.
    options |= {"more_epochs": 7}
    with pytest.raises(Stop):
        trainer.train(recipe, tiny_data, tmp_path / "parts", on_event=stop_at(6), **options)
    assert read_log(tmp_path / "parts")[-1]["lr"] == pytest.approx(lr / 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"more_epochs": 0}, "--more-epochs .more_epochs. 0: give more than 0"),
        ({"more_epochs": 1e300}, "1e.300: give more than 0 and at most 1,000,000"),
        ({"more_epochs": 1, "lr": 0.5}, r"trained with train.lr = .*not 0.5.*give --init"),
    ],
)
def test_extensions_that_are_impossible_say_why(
    finished: tuple[trainer.Run, list[Event]], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(rn.ConfigError, match=message):
        rn.train("data", out=finished[0].folder, **arguments)
    with pytest.raises(rn.ConfigError, match="contains no run to extend"):
        rn.train("data", out="no-such-run", more_epochs=1)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_damaged_run_json_is_an_error(
    finished: tuple[trainer.Run, list[Event]], tiny_data: Path, tmp_path: Path, text: str
) -> None:
    run = shutil.copytree(finished[0].folder, tmp_path / "run")
    (run / "run.json").write_text(text)
    with pytest.raises(rn.ConfigError, match=r"run\.json (cannot be read|is not an object)"):
        trainer.train(load_recipe(run / "config.toml"), tiny_data, run, device="cpu")


# --- memory ---------------------------------------------------------------------------------------


@pytest.fixture
def max_images(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run out of memory with more than this number of images at a time."""
    create = RetinaNetTask.__init__

    def limited(self: RetinaNetTask, *arguments: Any, **named: Any) -> None:
        create(self, *arguments, **named)
        step = self.training_step

        def training_step(network: Any, model: Any, batch: Any, context: Any) -> Any:
            if len(batch.images) // self.settings.recipe.train.accumulate > request.param:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return step(network, model, batch, context)

        self.training_step = training_step

    monkeypatch.setattr(RetinaNetTask, "__init__", limited)


@pytest.mark.parametrize("max_images", [1], indirect=True)
def test_out_of_memory_names_the_setting_with_which_the_run_resumes(
    tiny_data: Path, tmp_path: Path, max_images: None
) -> None:
    recipe = tiny_recipe(*SMALL, "train.steps=1")
    with pytest.raises(
        rn.ConfigError,
        match=r"out of memory on cpu with 4 images .*give train\.accumulate=2 \(by 2",
    ):
        trainer.train(recipe, tiny_data, tmp_path / "run", device="cpu")
    one = recipe.override({"train.accumulate": 4})
    assert trainer.train(one, tiny_data, tmp_path / "run", device="cpu").step == 1


@pytest.mark.parametrize("max_images", [1, 0], indirect=True)
def test_auto_batch_size_tries_micro_batches_and_keeps_batch_and_rate(
    tiny_data: Path,
    tmp_path: Path,
    max_images: None,
    request: pytest.FixtureRequest,
) -> None:
    recipe = tiny_recipe(*SMALL, "train.steps=1", "train.batch_size=auto")
    assert (recipe.train.batch_size, recipe.train.accumulate) == (4, 0)
    events: list[Event] = []
    options: dict[str, Any] = {"device": "cpu", "on_event": events.append}
    if request.node.callspec.params["max_images"] == 0:
        with pytest.raises(rn.ConfigError, match="an image of 64 x 64 px does not fit into the me"):
            trainer.train(recipe, tiny_data, tmp_path / "run", **options)
        return
    run = trainer.train(recipe, tiny_data, tmp_path / "run", **options)
    assert "memory: 1 of 4 images at a time (train.accumulate=4)" in messages(events)
    stored = load_recipe(run.folder / "config.toml").train
    assert (stored.batch_size, stored.accumulate, stored.lr) == (4, 4, recipe.train.lr)


def test_more_images_than_fit_into_the_memory_of_a_cpu_are_not_tried(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("max", "5000"), ("current", "6000"), ("stat", "inactive_file 1000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(cpus, "_GROUP", tmp_path)  # the limit of a container, all in use
    recipe = tiny_recipe(*SMALL, "train.steps=1", "train.batch_size=auto")
    with pytest.raises(rn.ConfigError, match="an image of 64 x 64 px does not fit into the memory"):
        trainer.train(recipe, tiny_data, tmp_path / "run", device="cpu")


def test_largest_batch_is_of_the_largest_sides_in_the_data(tiny_data: Path) -> None:
    dataset = rn.read_dataset(tiny_data, "train")
    wide = replace(dataset.images[0], width=200, height=100)
    tall = replace(dataset.images[1], width=100, height=150)
    recipe = load_recipe("paper_1x", ["data.image_size=64", "data.max_size=120"])

    class Settings:
        train_set = replace(dataset, images=(wide, tall))

    Settings.recipe = recipe  # type: ignore[attr-defined]
    # 64 x 120 (the longer side at most) and 96 x 64, in multiples of 32.
    batch = memory.largest_batch(Settings, 2)  # type: ignore[arg-type]
    assert batch.images.shape == (2, 3, 96, 128)
