"""Checkpoints from the hub: names, revisions, the cache, and what can go wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from planted import TOKEN
from stand_in import Hub, Repository

from retinanet.errors import MissingExtraError, WeightsError
from retinanet.hub import push
from retinanet.model import hub
from retinanet.model.checkpoint import TEXT_FILE, WEIGHTS_FILE, load_checkpoint
from retinanet.model.hub import is_hub_name, parse_hub_name

NAME = "hf://me/shapes"

pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=<...>' to upload raw bytes/text content:DeprecationWarning"
)
"""huggingface_hub 2.4 uploads by an argument that its httpx calls old."""


def fetch_hub(name: str) -> Path:
    return hub.fetch_hub(name, (WEIGHTS_FILE, TEXT_FILE))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("hf://me/a-model", ("me/a-model", None)),
        ("hf://me/a.b_c@v1.0", ("me/a.b_c", "v1.0")),
        ("hf://me/a@refs/pr/1", ("me/a", "refs/pr/1")),
        (Path("hf://me/a@main"), ("me/a", "main")),
    ],
)
def test_names(name: str | Path, parts: tuple[str, str | None]) -> None:
    assert is_hub_name(name)
    assert parse_hub_name(name) == parts


@pytest.mark.parametrize("name", ["hf://", "hf://me", "hf://me/a/b", "hf://me/a@", "hf://m e/a"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(WeightsError, match=r"names no model: write hf://OWNER/NAME or"):
        load_checkpoint(name)


def test_folders_are_no_names() -> None:
    assert not any(map(is_hub_name, ("hf", "hf/best", "./hf:/x", "runs/hf://x", "hfx://a/b")))


def test_a_revision_is_kept_and_told(hub: Hub, run: Path) -> None:
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
    with pytest.raises(WeightsError, match=f"{NAME} has no revision 'v9'"):
        load_checkpoint(f"{NAME}@v9")


def test_what_is_cached_needs_no_hub(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    push(run, "me/shapes", token=TOKEN)
    folder = fetch_hub(NAME)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_hub(NAME) == folder
    assert load_checkpoint(NAME).info["step"] == 7
    with pytest.raises(WeightsError, match=r"hf://me/x is not in the cache, and HF_HUB_OFFLINE"):
        fetch_hub("hf://me/x")
    assert hub.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert fetch_hub(NAME) == folder
    with pytest.raises(WeightsError, match=r"127.0.0.1:9 is not reached, and it is not in the c"):
        fetch_hub("hf://me/x")


def test_what_is_no_checkpoint_of_ours(hub: Hub) -> None:
    for name, files in (
        ("empty", {"README.md": b"x"}),
        ("others", {"model.safetensors": b"x", "config.json": b"{}"}),
        ("broken", {"model.safetensors": b"x", "model.json": b"{}"}),
    ):
        hub.repositories[f"me/{name}"] = Repository()
        hub.repositories[f"me/{name}"].add(files)
    with pytest.raises(WeightsError, match=r"holds no model\.safetensors and no model\.json: it"):
        load_checkpoint("hf://me/empty")
    with pytest.raises(WeightsError, match=r"hf://me/others holds no model\.json: it is no check"):
        load_checkpoint("hf://me/others")
    with pytest.raises(WeightsError, match=r'it lacks "format"'):
        load_checkpoint("hf://me/broken")


def test_what_the_hub_refuses(hub: Hub) -> None:
    with pytest.raises(WeightsError, match=r"hf://me/none is not on http.*, or is private and"):
        fetch_hub("hf://me/none")
    with pytest.raises(WeightsError, match="is no name on the hub"):
        fetch_hub("hf://me/-x--y")
    hub.repositories["me/gated"] = Repository(gated=True)
    hub.repositories["me/gated"].add({"model.json": b"{}"})
    with pytest.raises(WeightsError, match=r"is gated: accept its terms at http.*/me/gated, then"):
        fetch_hub("hf://me/gated")
    hub.broken = True
    with pytest.raises(WeightsError, match="cannot be had"):
        fetch_hub("hf://me/none")


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'retinanet\[hub\]'"):
        load_checkpoint(NAME)
