"""The records of a run, without paths of the machine."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from retinanet.config import Recipe, build_recipe, load_recipe
from retinanet.errors import WeightsError
from retinanet.model.checkpoint import Checkpoint, find_checkpoint, load_checkpoint

# A path of two or more parts from a root, home, drive or relative folder, within a text.
_PATH = re.compile(
    r"(?<![\w.:/\\])(?:file:/{0,2}|~|\.\.?|[A-Za-z]:)?[/\\](?:[^\s/\\:\"']+[/\\])+([^\s/\\:\"']*)"
)


@dataclass(frozen=True, slots=True)
class RunFacts:
    """A trained model and the records of its training.

    Attributes:
        checkpoint: the model, on the CPU.
        recipe: settings of the training; None for a checkpoint without its run.
        run: ``run.json``, data and versions of the training; may be empty.
        metrics: ``metrics.json``, of the validation split; may be empty.
    """

    checkpoint: Checkpoint
    recipe: Recipe | None
    run: Mapping[str, Any]
    metrics: Mapping[str, Any]

    def public(self) -> RunFacts:
        """Return the facts with paths cut to their last part."""
        recipe = self.recipe
        if recipe is not None:
            values = without_paths(recipe.model_dump(mode="json"))
            recipe = build_recipe(values, "the run's recipe")
        checkpoint = replace(self.checkpoint, info=without_paths(self.checkpoint.info))
        metrics = without_paths(self.metrics, self.checkpoint.classes)
        return RunFacts(checkpoint, recipe, without_paths(self.run), metrics)


def read_run(run: str | Path) -> RunFacts:
    """Read a run folder, or a checkpoint folder in one or alone."""
    if not Path(run).exists():
        raise WeightsError(f"no such run: {run}; give a run or checkpoint folder of this disk")
    folder = find_checkpoint(Path(run))
    checkpoint = load_checkpoint(folder)
    root = next((f for f in (folder, folder.parent) if (f / "config.toml").is_file()), None)
    if root is None:
        return RunFacts(checkpoint, None, {}, _read(folder / "metrics.json"))
    # A run's metrics are those of its best weights.
    is_best = folder.name in ("best", ".best.ready") or folder == root
    metrics = _read(root / "metrics.json") if is_best else {}
    recipe = load_recipe(root / "config.toml")
    return RunFacts(checkpoint, recipe, _read(root / "run.json"), metrics)


def _read(file: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file does not exist."""
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{file} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise WeightsError(f"{file} is not a JSON object")
    return values


def without_paths(value: Any, names: Collection[str] = ()) -> Any:
    """Cut paths to their last part, at any depth of `value`.

    Texts in `names` are kept: a class may be called ``/m/01g317``, as in Open Images.
    """
    if isinstance(value, Mapping):
        return {without_paths(k, names): without_paths(v, names) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item, names) for item in value]
    if not isinstance(value, str) or value in names:
        return value
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(value).is_absolute():
            return kind(value).name
    return _PATH.sub(r"\1", value)
