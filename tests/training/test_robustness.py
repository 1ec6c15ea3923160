"""Training on data that cannot be learned or read, run folders in use, and overfitting."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from filelock import FileLock
from tiny import Stop, messages, stop_at, tiny_recipe

from retinanet.data import read_splits
from retinanet.errors import ConfigError, DataError
from retinanet.training import loop
from retinanet.training.events import Event
from retinanet.training.overfit import overfit, overfit_recipe
from retinanet.training.trainer import train

# At 64 px the shapes (6 to 20 px) are far smaller than the smallest of these anchors.
LARGE_ANCHORS = ("anchors.sizes=[128,160,192,224,256]", "train.validate_every=1000")


def test_train_without_a_positive_warns_and_fails(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loop.MAX_UNMATCHED_STEPS == 50
    monkeypatch.setattr(loop, "MAX_UNMATCHED_STEPS", 6)
    events: list[Event] = []
    recipe = tiny_recipe(*LARGE_ANCHORS, "train.steps=20", "train.batch_size=1")
    with pytest.raises(DataError) as error:
        train(recipe, tiny_data, tmp_path / "run", device="cpu", on_event=events.append)
    assert "no anchor matched an object in 6 steps" in str(error.value)
    assert "; anchors.sizes=[32,40,48,56,64] matches" in str(error.value)  # a quarter
    kinds = [event.kind for event in events]
    assert kinds.index("message") < kinds.index("step")
    (warning,) = messages(events)
    assert warning.startswith("warning: anchor recall 0%: ")
    assert "anchors.sizes=[32,40,48,56,64] matches" in warning
    steps = [event.data for event in events if event.kind == "step"]
    assert {step["positives"] for step in steps} == {0}
    # Steps of background images do not count.
    assert 5 <= len(steps) < 20


def test_train_with_matching_anchors_on_a_numbered_device_does_not_warn(
    tiny_data: Path, tmp_path: Path
) -> None:
    events: list[Event] = []
    recipe = tiny_recipe("train.steps=1", "anchors.sizes=[8,16,32,64,128]")
    train(recipe, tiny_data, tmp_path / "run", device="cpu:0", on_event=events.append)
    assert messages(events) == []
    assert (events[0].data["device"], events[0].data["processes"]) == ("cpu:0", 1)


def test_train_unreadable_images_are_skipped_and_repair_resumes(
    tiny_data: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    splits = read_splits(data)
    broken = [splits["train"].images[5].path, splits["val"].images[1].path]
    whole = [path.read_bytes() for path in broken]
    for path in broken:
        path.write_bytes(path.read_bytes()[:200])
    recipe = tiny_recipe("train.steps=6", "train.validate_every=2", "train.save_every=1")
    events: list[Event] = []
    stop = stop_at(5)

    def callback(event: Event) -> None:
        events.append(event)
        stop(event)

    with pytest.raises(Stop):
        train(recipe, data, tmp_path / "run", device="cpu", on_event=callback)
    skipped = [text for text in messages(events) if text.startswith("warning: image skipped")]
    assert len(skipped) == 2  # each once, though validated twice and two epochs
    for path, text in zip(broken, sorted(skipped, key=lambda text: "val" in text), strict=True):
        assert str(path) in text
    for path, content in zip(broken, whole, strict=True):
        path.write_bytes(content)
    events.clear()
    run = train(recipe, data, tmp_path / "run", device="cpu", on_event=events.append)
    assert events[0].kind == "resume"
    assert run.step == 6
    assert "2 unreadable images were skipped; they are listed in" in messages(events)[-1]
    other = splits["train"].images[0].path
    other.write_bytes(other.read_bytes() + b" ")
    with pytest.raises(ConfigError, match="other data"):  # those that were readable still count
        train(recipe, data, tmp_path / "run", device="cpu")


def test_train_too_many_unreadable_images_raise(tiny_data: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_data, data)
    for image in read_splits(data)["train"].images[:4]:
        image.path.write_bytes(b"no image")
    with pytest.raises(DataError, match="too many unreadable images: 2 of 12"):
        train(tiny_recipe("train.steps=6"), data, tmp_path / "run", device="cpu")


def test_train_into_a_folder_in_use_is_an_error(tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (
        FileLock(tmp_path / "run" / ".training.lock"),
        pytest.raises(ConfigError, match="run is in use: another training writes to it"),
    ):
        train(tiny_recipe("train.steps=1"), tiny_data, tmp_path / "run", device="cpu")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_train_full_disk_names_the_file(tiny_data: Path, tmp_path: Path) -> None:
    def fill_disk(event: Event) -> None:
        log = tmp_path / "run" / "log.jsonl"
        if event.kind == "start":
            log.unlink()
            log.symlink_to("/dev/full")

    with pytest.raises(OSError, match="No space left on device") as error:
        train(tiny_recipe(), tiny_data, tmp_path / "run", device="cpu", on_event=fill_disk)
    assert error.value.filename == str(tmp_path / "run" / "log.jsonl")


@pytest.mark.parametrize("bins", [(), ("model.box_bins=8", "loss.box=giou", "loss.box_weight=2")])
def test_overfit_learns_without_augmentation(
    tiny_data: Path, tmp_path: Path, bins: tuple[str, ...]
) -> None:
    recipe = tiny_recipe(
        *bins,
        "model.channels=32", "train.lr=0.003", "anchors.sizes=[8,16,32,64,128]",
        "matching.low_quality_matches=true", "train.warmup_steps=10", "train.deterministic=false",
    )  # fmt: skip
    result = overfit(recipe, tiny_data, tmp_path / "run", num_images=1, steps=200, device="cpu")
    assert result.learned, result
    assert (result.images, result.exit_code, result.hint) == (1, 0, "")
    assert result.step <= 200
    assert result.last_loss < 0.2 * result.first_loss


def test_overfit_that_fails_names_the_reason(tiny_data: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(*LARGE_ANCHORS, "train.lr=1e-9")
    result = overfit(recipe, tiny_data, tmp_path / "run", num_images=2, steps=2, device="cpu")
    assert not result.learned
    assert result.exit_code == 1
    assert result.hint.startswith("anchor recall is 0%: anchors.sizes=[32,40,48,56,64] matches")


def test_overfit_recipe_has_no_augmentation() -> None:
    recipe = overfit_recipe(tiny_recipe("data.colour=0.5", "data.crop=true"), 3, 100)
    plain = tiny_recipe("data.horizontal_flip=0", "data.any_corner=false").data
    assert recipe.data == plain
    assert (recipe.train.batch_size, recipe.train.steps, recipe.train.epochs) == (3, 100, None)
