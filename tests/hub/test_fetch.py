"""Checkpoints from the hub: names, revisions, the cache, and errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from stand_in import TOKEN, Hub, Repository

from retinanet.errors import MissingExtraError, WeightsError
from retinanet.hub import push
from retinanet.model.checkpoint import load_checkpoint
from retinanet.model.hub import is_hub_name, parse_hub_name

NAME = "hf://me/shapes"

pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=<...>' to upload raw bytes/text content:DeprecationWarning"
)
"""huggingface_hub 2.4 uploads by an argument that is deprecated."""


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("hf://me/a-model", ("me/a-model", None)),
        ("hf://me/a.b_c@v1.0", ("me/a.b_c", "v1.0")),
        ("hf://me/a@refs/pr/1", ("me/a", "refs/pr/1")),
        (Path("hf://me/a@main"), ("me/a", "main")),
    ],
)
def test_parse_hub_name_splits_the_revision(
    name: str | Path, parts: tuple[str, str | None]
) -> None:
    assert is_hub_name(name)
    assert parse_hub_name(name) == parts


@pytest.mark.parametrize("name", ["hf://", "hf://me", "hf://me/a/b", "hf://me/a@", "hf://m e/a"])
def test_invalid_hub_name_is_an_error(name: str) -> None:
    with pytest.raises(WeightsError, match="hf://OWNER/NAME@REVISION"):
        load_checkpoint(name)


def test_folders_are_no_hub_names() -> None:
    assert not any(map(is_hub_name, ("hf", "hf/best", "./hf:/x", "runs/hf://x", "hfx://a/b")))


def test_load_by_revision_keeps_the_commit_in_its_source(hub: Hub, run: Path) -> None:
    first = push(run, "me/shapes", token=TOKEN)
    text = run / "best" / "model.json"
    text.write_text(text.read_text().replace('"step": 7', '"step": 8'))
    second = push(run, "me/shapes", token=TOKEN)
    hub.repositories["me/shapes"].refs["v1"] = first.commit
    for name, step, commit in (
        (NAME, 8, second.commit),
        (f"{NAME}@v1", 7, first.commit),
        (first.name, 7, first.commit),
    ):
        info = load_checkpoint(name).info
        assert (info["step"], info["source"]) == (step, f"{NAME}@{commit}")
    with pytest.raises(WeightsError, match=f"{NAME}@v9: there is no such revision"):
        load_checkpoint(f"{NAME}@v9")


def test_cached_model_needs_no_hub(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    push(run, "me/shapes", token=TOKEN)
    source = load_checkpoint(NAME).info["source"]
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_checkpoint(NAME).info["source"] == source
    with pytest.raises(
        WeightsError, match=r"hf://me/x: it is not in the cache, and HF_HUB_OFFLINE"
    ):
        load_checkpoint("hf://me/x")
    assert hub.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert load_checkpoint(NAME).info["source"] == source
    with pytest.raises(WeightsError, match=r"in the cache, and http://127\.0\.0\.1:9 is not"):
        load_checkpoint("hf://me/x")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"README.md": b"x"}, r"no model\.safetensors, model\.json"),
        ({"model.safetensors": b"x", "config.json": b"{}"}, r"no model\.json"),
        ({"model.safetensors": b"x", "model.json": b"{}"}, r'it lacks "format"'),
    ],
)
def test_other_repositories_are_errors(hub: Hub, files: dict[str, bytes], message: str) -> None:
    hub.repositories["me/other"] = Repository()
    hub.repositories["me/other"].add(files)
    with pytest.raises(WeightsError, match=message):
        load_checkpoint("hf://me/other")


def test_errors_of_the_hub_are_explained(hub: Hub) -> None:
    with pytest.raises(
        WeightsError, match=r"load hf://me/none: it is not on http.*, or is private and"
    ):
        load_checkpoint("hf://me/none")
    with pytest.raises(WeightsError, match="HFValidationError"):
        load_checkpoint("hf://me/-x--y")
    hub.repositories["me/gated"] = Repository(gated=True)
    hub.repositories["me/gated"].add({"model.json": b"{}"})
    with pytest.raises(WeightsError, match=r"accept its terms at http.*/me/gated"):
        load_checkpoint("hf://me/gated")
    hub.broken = True
    with pytest.raises(WeightsError, match="cannot load hf://me/none: "):
        load_checkpoint("hf://me/none")


def test_missing_huggingface_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'retinanet\[hub\]'"):
        load_checkpoint(NAME)
