"""What a run says of itself, without what says more of the machine than of the model."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from retinanet.config import Recipe, build_recipe, load_recipe
from retinanet.errors import WeightsError
from retinanet.model.checkpoint import Checkpoint, find_checkpoint, load_checkpoint

# Two or more steps from a root, a home, a drive, or the folder one is in, within a longer text.
_PLACE = re.compile(
    r"(?<![\w.:/\\])(?:file:/{0,2}|~|\.\.?|[A-Za-z]:)?[/\\](?:[^\s/\\:\"']+[/\\])+([^\s/\\:\"']*)"
)


@dataclass(frozen=True, slots=True)
class RunFacts:
    """A trained model and the record of how it came about.

    Attributes:
        checkpoint: the model, on the CPU.
        folder: the checkpoint's folder.
        recipe: how it was trained; None: not known, as of a checkpoint without its run.
        run: ``run.json``, what it was trained on and with; empty where not known.
        metrics: ``metrics.json``, of the images held back; empty where not known.
    """

    checkpoint: Checkpoint
    folder: Path
    recipe: Recipe | None
    run: Mapping[str, Any]
    metrics: Mapping[str, Any]


def read_run(run: str | Path) -> RunFacts:
    """Read a run folder, or a checkpoint folder in one or alone.

    Raises:
        WeightsError: it holds no checkpoint, or its records are damaged.
    """
    place = Path(run)
    if not place.exists():
        raise WeightsError(f"there is no run {run}: give a run or checkpoint folder of this disk")
    folder = find_checkpoint(place)
    checkpoint = load_checkpoint(folder)
    # A state of training lies in the run; a checkpoint may lie anywhere.
    root = next((one for one in (folder, folder.parent) if (one / "config.toml").is_file()), None)
    if root is None:
        return RunFacts(checkpoint, folder, None, {}, _read(folder / "metrics.json"))
    # A run's metrics are those of its best weights.
    best = folder.name in ("best", ".best.ready") or folder == root
    return RunFacts(
        checkpoint,
        folder,
        load_recipe(root / "config.toml"),
        _read(root / "run.json"),
        _read(root / "metrics.json") if best else {},
    )


def _read(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise WeightsError(f"{file} is no JSON object")
    return values


def without_places(value: Any, names: Collection[str] = ()) -> Any:
    """`value` with the paths of this machine cut down to their last part, at any depth.

    Texts that are one of `names` stay: a class may be called ``/m/01g317``, as in Open Images.
    """
    if isinstance(value, Mapping):
        return {without_places(k, names): without_places(one, names) for k, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(one, names) for one in value]
    if not isinstance(value, str) or value in names:
        return value
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(value).is_absolute():
            return kind(value).name
    return _PLACE.sub(r"\1", value)


def public_recipe(recipe: Recipe) -> Recipe:
    """The recipe with the files that it names cut down to their names."""
    return build_recipe(without_places(recipe.model_dump(mode="json")), "the run's recipe")
