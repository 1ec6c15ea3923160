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
from planted import HOME, HOST, TOKEN
from stand_in import Hub, Repository

import retinanet as rn
from retinanet.cli import main
from retinanet.config import load_recipe
from retinanet.data import read_splits
from retinanet.errors import DataError, MissingExtraError, WeightsError
from retinanet.hub import prepare, push
from retinanet.hub.facts import without_paths
from retinanet.model.checkpoint import load_checkpoint

NAME = "me/shapes"

pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=<...>' to upload raw bytes/text content:DeprecationWarning"
)
"""huggingface_hub 2.4 uploads by an argument that its httpx calls old."""


def texts(folder: Path) -> str:
    """All that can be read in the folder, names too."""
    files = [one for one in sorted(folder.rglob("*")) if one.is_file()]
    return "".join(f"{one}\n{one.read_bytes().decode('latin-1')}" for one in files)


def test_pushed_and_loaded_again_it_finds_the_same(hub: Hub, run: Path, data: Path) -> None:
    messages: list[str] = []
    done = push(run, NAME, token=TOKEN, message="Seven steps", progress=messages.append)
    repository = hub.repositories[NAME]
    assert (len(repository.commits), repository.messages[-1]) == (2, "Seven steps")
    assert not repository.private
    assert done.commit == repository.refs["main"]
    assert (done.name, done.url) == (f"hf://{NAME}@{done.commit}", f"{hub.url}/{NAME}")
    pushed = ("README.md", "config.toml", "metrics.json", "model.json", "model.safetensors")
    assert done.files == pushed
    assert repository.large == {"model.safetensors"}
    assert messages == ["5 files are ready"]

    there = rn.load(f"hf://{NAME}", device="cpu", precision="float32")
    here = rn.load(run, device="cpu", precision="float32")
    assert there.info["source"] == done.name
    found: list[Any] = [one.detect(data / "val") for one in (there, here)]
    assert sum(len(one) for one in found[0]) > 0
    for one, other in zip(*found, strict=True):
        for name in ("boxes", "scores", "labels"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0)


def test_only_the_files_of_a_checkpoint_are_fetched(hub: Hub, run: Path) -> None:
    push(run, NAME, token=TOKEN)
    hub.requests.clear()
    load_checkpoint(f"hf://{NAME}")
    fetched = {path.rpartition("/")[2] for method, path in hub.requests if "/resolve/" in path}
    assert fetched == {"model.json", "model.safetensors"}


def test_every_command_takes_the_name(
    hub: Hub, run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    push(run, NAME, token=TOKEN)
    name = f"hf://{NAME}"
    out = tmp_path / "found"
    assert main(["detect", name, str(data / "val"), f"--out={out}", "--device=cpu"]) == 0
    assert (out / "detections.json").is_file()
    assert main(["evaluate", name, str(data), "--device=cpu", "--json"]) == 0
    assert "ap50" in capsys.readouterr().out


def test_nothing_of_the_machine_leaves_it(prepared: Path, trained: Path, data: Path) -> None:
    folder = prepared
    whole = texts(folder).replace(str(folder), "")
    places = (str(trained.parent), str(data.parent), str(Path.home()) + "/")
    for secret in (HOME, "maria", HOST, *places):
        assert secret not in whole, secret
    assert load_recipe(folder / "config.toml").model.backbone_weights == "backbone.safetensors"
    assert json.loads((folder / "model.json").read_text())["info"]["recipe"] == "my.toml"
    assert json.loads((folder / "metrics.json").read_text())["note"] == "judged on val.json"


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("/home/me/data/bccd", "bccd"),
        ("C:\\Users\\me\\data", "data"),
        ("\\\\server\\share\\data", "data"),
        ("from ~/runs/one/best: 5 tensors", "from best: 5 tensors"),
        ("../../maria/weights/x.pth", "x.pth"),
        ("file:///home/maria/x.csv", "x.csv"),
        ("see '/home/me/x.csv', line 3", "see 'x.csv', line 3"),
        ("hf://me/shapes@v1", "hf://me/shapes@v1"),
        ("https://host/a/b/c", "https://host/a/b/c"),
        ("seed 0, 20% of train/val for validation", "seed 0, 20% of train/val for validation"),
        ({"/a/b": ["/c/d", 1, None]}, {"b": ["d", 1, None]}),
    ],
)
def test_places_are_cut_to_their_last_part(text: Any, public: Any) -> None:
    assert without_paths(text) == public


def test_images_only_with_the_data(run: Path, prepared: Path, tmp_path: Path) -> None:
    files = prepare(run, NAME, tmp_path / "without", device="cpu")
    assert not [one for one in files if one.endswith(".jpg")]
    images = sorted(one.name for one in prepared.glob("*.jpg"))
    assert images == ["example_1.jpg", "example_2.jpg", "example_3.jpg"]  # val holds no more
    for one in images:
        with Image.open(prepared / one) as image:
            assert not image.getexif()
            assert max(image.size) <= 1024


def test_a_dry_run_writes_and_sends_nothing(
    hub: Hub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["push", str(run), NAME, "--dry-run", str(out), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["files"] == sorted(one.name for one in out.iterdir())
    assert hub.requests == []
    assert main(["push", str(run), NAME, "--dry-run", str(out)]) == 1
    assert "exists and is not an empty folder" in capsys.readouterr().err


def test_the_token_is_never_printed(
    hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["push", str(run), NAME, "--private", "--token", TOKEN]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert said.out == f"hf://{NAME}@{hub.repositories[NAME].refs['main']} is at {hub.url}/{NAME}\n"
    assert hub.repositories[NAME].private
    whole = said.out + said.err
    hub.broken = True
    assert main([*arguments, "--debug"]) == 1
    broken = capsys.readouterr()
    assert "answered 500" in broken.err
    assert TOKEN not in whole + broken.out + broken.err


def test_a_private_model_wants_the_token(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(run, NAME, token=TOKEN, private=True)
    with pytest.raises(WeightsError, match=r"or is private and your token .* does not reach it"):
        load_checkpoint(f"hf://{NAME}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert load_checkpoint(f"hf://{NAME}").info["step"] == 7


Change = Callable[[Hub], None]


def public(hub: Hub) -> None:
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].add({"x": b"y"})


def broken(hub: Hub) -> None:
    hub.broken = True


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (None, {"token": None}, "cannot be pushed to: .* does not know your token"),
        (None, {"token": "wrong"}, "cannot be pushed to: .* does not know your token"),
        (None, {"repository": "you/shapes"}, "may not be changed with this token: 403"),
        (public, {"private": True}, "exists and is public; make it private on its page first"),
        (broken, {}, "cannot be pushed to: http.* answered 500"),
        (None, {"repository": "shapes"}, "invalid repository name 'shapes'; give OWNER/NAME"),
        (None, {"repository": "me/shapes@v1"}, "leave out @"),
        (None, {"repository": "me/-shapes--"}, "is no name on the hub"),
    ],
)
def test_what_the_hub_refuses(
    hub: Hub, run: Path, change: Change | None, arguments: dict[str, Any], message: str
) -> None:
    if change is not None:
        change(hub)
    before = {name: list(one.commits) for name, one in hub.repositories.items()}
    with pytest.raises(WeightsError, match=message):
        push(run, **{"repository": NAME, "token": TOKEN, **arguments})
    assert {name: list(one.commits) for name, one in hub.repositories.items()} == before


def test_no_hub_at_all(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(WeightsError, match=r"cannot be pushed to: http://127.0.0.1:9 is not reac"):
        push(run, NAME, token=TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="cannot be pushed to: HF_HUB_OFFLINE is set"):
        push(run, NAME, token=TOKEN)


def test_other_data_than_the_runs(run: Path, data: Path, tmp_path: Path) -> None:
    from retinanet.data.synthetic import synthetic_dataset

    other = tmp_path / "other"
    synthetic_dataset(other, splits={"train": 4, "val": 3}, image_size=64, seed=5)
    assert read_splits(other)["train"].classes == read_splits(data)["train"].classes
    with pytest.raises(DataError, match="is not the training data of the run, or has changed"):
        prepare(run, NAME, tmp_path / "out", data=other)
    one = tmp_path / "one.csv"
    one.write_text("a.jpg,1,2,3,4,cow\nb.jpg,1,2,3,4,cow\n")
    with pytest.raises(DataError, match="its classes are not the model's"):
        prepare(run, NAME, tmp_path / "out", data=one)
    assert not (tmp_path / "out").exists()


def test_runs_that_cannot_be_read(run: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such run: hf://me/shapes"):
        prepare("hf://me/shapes", NAME, tmp_path / "out")
    with pytest.raises(WeightsError, match=r"holds no model\.json"):
        prepare(tmp_path, NAME, tmp_path / "out")
    (run / "metrics.json").write_text("[1")
    with pytest.raises(WeightsError, match=r"metrics\.json is not JSON"):
        prepare(run, NAME, tmp_path / "out")
    (run / "metrics.json").write_text("[1]")
    with pytest.raises(WeightsError, match=r"metrics\.json is not a JSON object"):
        prepare(run, NAME, tmp_path / "out")


@pytest.mark.parametrize("call", [prepare, push])
def test_without_huggingface_hub(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Any
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    more = [tmp_path / "out"] if call is prepare else []
    with pytest.raises(MissingExtraError, match=r"pip install 'retinanet\[hub\]'"):
        call(run, NAME, *more)
