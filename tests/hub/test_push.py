"""Files that are pushed, the push itself, and that nothing else leaves the machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from stand_in import HOME, HOST, TOKEN, URL, Hub, Repository

import retinanet as rn
from retinanet.cli import main
from retinanet.config import load_recipe
from retinanet.data.synthetic import synthetic_dataset
from retinanet.errors import DataError, MissingExtraError, WeightsError
from retinanet.hub import prepare, push
from retinanet.hub.facts import without_paths
from retinanet.model.checkpoint import load_checkpoint

NAME = "me/shapes"

pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=<...>' to upload raw bytes/text content:DeprecationWarning"
)
"""huggingface_hub 2.4 uploads by an argument that is deprecated."""


def test_pushed_model_detects_the_same(hub: Hub, run: Path, data: Path) -> None:
    messages: list[str] = []
    done = push(run, NAME, token=TOKEN, message="Seven steps", progress=messages.append)
    repository = hub.repositories[NAME]
    assert (len(repository.commits), repository.messages[-1]) == (2, "Seven steps")
    assert not repository.private
    assert done.commit == repository.refs["main"]
    assert (done.name, done.url) == (f"hf://{NAME}@{done.commit}", f"{URL}/{NAME}")
    files = ("README.md", "config.toml", "metrics.json", "model.json", "model.safetensors")
    assert done.files == files
    assert messages == ["5 files are ready"]

    hub.requests.clear()
    pushed = rn.load(f"hf://{NAME}", device="cpu", precision="float32", score_threshold=0.001)
    fetched = {path.rpartition("/")[2] for _, path in hub.requests if "/resolve/" in path}
    assert fetched == {"model.json", "model.safetensors"}
    assert pushed.info["source"] == done.name
    local = rn.load(run, device="cpu", precision="float32", score_threshold=0.001)
    results: list[Any] = [detector.detect(data / "val") for detector in (pushed, local)]
    assert sum(len(detections) for detections in results[0]) > 0
    for ours, reference in zip(*results, strict=True):
        for name in ("boxes", "scores", "labels"):
            torch.testing.assert_close(
                getattr(ours, name), getattr(reference, name), rtol=0, atol=0
            )


def test_detect_command_takes_a_hub_name(hub: Hub, run: Path, data: Path, tmp_path: Path) -> None:
    push(run, NAME, token=TOKEN)
    out = tmp_path / "found"
    arguments = ["detect", f"hf://{NAME}", str(data / "val"), f"--out={out}", "--device=cpu"]
    assert main(arguments) == 0
    assert (out / "detections.json").is_file()


def test_names_of_the_machine_are_left_out(prepared: Path, trained: Path, data: Path) -> None:
    files = [file for file in sorted(prepared.rglob("*")) if file.is_file()]
    texts = "".join(file.name + file.read_bytes().decode("latin-1") for file in files)
    folders = (str(trained.parent), str(data.parent), str(Path.home()) + "/")
    for secret in (HOME, "maria", HOST, *folders):
        assert secret not in texts.replace(str(prepared), ""), secret
    model = load_recipe(prepared / "config.toml").model
    assert model.backbone_weights == "backbone.safetensors"
    assert json.loads((prepared / "model.json").read_text())["info"]["recipe"] == "my.toml"
    assert json.loads((prepared / "metrics.json").read_text())["note"] == "evaluated on val.json"


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("/home/me/data/bccd", "bccd"),
        ("C:\\Users\\me\\data", "data"),
        ("\\\\server\\share\\data", "data"),
        ("from ~/runs/cells/best: 5 tensors", "from best: 5 tensors"),
        ("../../maria/weights/x.pth", "x.pth"),
        ("file:///home/maria/x.csv", "x.csv"),
        ("see '/home/me/x.csv', line 3", "see 'x.csv', line 3"),
        ("hf://me/shapes@v1", "hf://me/shapes@v1"),
        ("https://host/a/b/c", "https://host/a/b/c"),
        ("seed 0, 20% of train/val for validation", "seed 0, 20% of train/val for validation"),
        ({"/a/b": ["/c/d", 1, None]}, {"b": ["d", 1, None]}),
    ],
)
def test_without_paths_keeps_the_last_part(text: Any, public: Any) -> None:
    assert without_paths(text) == public


def test_images_are_written_only_with_the_data(run: Path, prepared: Path, tmp_path: Path) -> None:
    files = prepare(run, NAME, tmp_path / "without", device="cpu")
    assert not [file for file in files if file.endswith(".jpg")]
    images = sorted(prepared.glob("*.jpg"))
    assert [file.name for file in images] == ["example_1.jpg", "example_2.jpg", "example_3.jpg"]
    for file in images:
        with Image.open(file) as image:
            assert not image.getexif()
            assert max(image.size) <= 1024


def test_dry_run_pushes_nothing(
    hub: Hub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["push", str(run), NAME, "--dry-run", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["files"] == sorted(file.name for file in out.iterdir())
    assert hub.requests == []
    assert main(["push", str(run), NAME, "--dry-run", str(out)]) == 1
    assert "exists and is not an empty folder" in capsys.readouterr().err


def test_token_is_never_printed(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["push", str(run), NAME, "--private", "--token", TOKEN]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    commit = hub.repositories[NAME].refs["main"]
    assert captured.out == f"hf://{NAME}@{commit} is at {URL}/{NAME}\n"
    assert hub.repositories[NAME].private
    hub.broken = True
    assert main([*arguments, "--debug"]) == 1
    failed = capsys.readouterr()
    assert "responded 500" in failed.err
    assert TOKEN not in captured.out + captured.err + failed.out + failed.err


def test_private_model_needs_the_token(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(run, NAME, token=TOKEN, private=True)
    with pytest.raises(WeightsError, match=r"or is private and needs a token"):
        load_checkpoint(f"hf://{NAME}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert load_checkpoint(f"hf://{NAME}").info["step"] == 7


Change = Callable[[Hub], None]


def make_public(hub: Hub) -> None:
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].add({"x": b"y"})


def break_hub(hub: Hub) -> None:
    hub.broken = True


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, {"token": None}, "cannot push to hf://me/shapes: .* needs a token"),
        (None, {"repository": "you/shapes"}, "responded 403: "),
        (make_public, {"private": True}, "exists and is public; make it private on its page"),
        (break_hub, {}, "cannot push to .* responded 500"),
        (None, {"repository": "shapes"}, "invalid repository name 'shapes'; give OWNER/NAME"),
        (None, {"repository": "me/shapes@v1"}, "leave out @"),
        (None, {"repository": "me/-shapes--"}, "HFValidationError"),
    ],
)
def test_rejected_push_changes_nothing(
    hub: Hub, run: Path, change: Change | None, arguments: dict[str, Any], message: str
) -> None:
    if change is not None:
        change(hub)
    before = {name: list(repository.commits) for name, repository in hub.repositories.items()}
    with pytest.raises(WeightsError, match=message):
        push(run, **{"repository": NAME, "token": TOKEN, **arguments})
    after = {name: list(repository.commits) for name, repository in hub.repositories.items()}
    assert after == before


def test_push_without_a_network_is_explained(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match=r"cannot push to .*: http://127.0.0.1:9 is not"):
        push(run, NAME, token=TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=": HF_HUB_OFFLINE is set"):
        push(run, NAME, token=TOKEN)


def test_other_data_than_the_runs_is_an_error(run: Path, tmp_path: Path) -> None:
    synthetic_dataset(tmp_path / "other", splits={"train": 4, "val": 3}, image_size=64, seed=5)
    with pytest.raises(DataError, match="is not the training data of the run, or has changed"):
        prepare(run, NAME, tmp_path / "out", data=tmp_path / "other")
    cows = tmp_path / "cows.csv"
    cows.write_text("a.jpg,1,2,3,4,cow\nb.jpg,1,2,3,4,cow\n")
    with pytest.raises(DataError, match="its classes are not the model's"):
        prepare(run, NAME, tmp_path / "out", data=cows)
    assert not (tmp_path / "out").exists()


def test_damaged_runs_are_errors(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(WeightsError, match="no such run: hf://me/shapes"):
        prepare("hf://me/shapes", NAME, out)
    with pytest.raises(WeightsError, match=r"no model\.json"):
        prepare(tmp_path, NAME, out)
    for content, message in (("[1", "is not JSON"), ("[1]", "is not a JSON object")):
        (run / "metrics.json").write_text(content)
        with pytest.raises(WeightsError, match=rf"metrics\.json {message}"):
            prepare(run, NAME, out)


def test_missing_huggingface_hub_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: prepare(run, NAME, tmp_path / "out"), lambda: push(run, NAME)):
        with pytest.raises(MissingExtraError, match=r"pip install 'retinanet\[hub\]'"):
            call()
