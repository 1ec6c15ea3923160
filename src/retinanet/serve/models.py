"""Names and measured accuracy of the served models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retinanet.errors import ConfigError


def model_names(arguments: Sequence[str]) -> dict[str, str]:
    """Map names to paths (or published names) of models."""
    paths: dict[str, str] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or Path(argument).exists():
            name, path = _default_name(Path(argument)), argument
        if not name.strip() or not name.isprintable():
            raise ConfigError(f"model without a name: {argument!r}; use NAME={path or 'MODEL'}")
        if name in paths:
            raise ConfigError(
                f"two models named {name}: {paths[name]} and {path}; "
                f"rename one of them, as in other={path}"
            )
        paths[name] = path
    return paths


def _default_name(path: Path) -> str:
    """Return the name of the run folder, or of a file without its suffix."""
    if path.name == "model.safetensors" and path.parent.name:
        path = path.parent
    if path.name in ("best", "last") and path.parent.name:
        path = path.parent
    return path.stem if path.is_file() else path.name or path.resolve().name


def model_metrics(path: str) -> dict[str, Any] | None:
    """Read AP and AP50 of a model from its run folder; None if there are none.

    The evaluation on ``test`` is preferred over that on ``val``, which chose the checkpoint, and
    both over the validation during training.
    """
    folder = Path(path)
    runs = [run for run in (folder, *folder.parents[:2]) if (run / "config.toml").is_file()]
    if not runs:
        return None
    run = runs[0]
    for split, file in (
        ("test", run / "evaluation" / "test" / "metrics.json"),
        ("val", run / "evaluation" / "val" / "metrics.json"),
        ("val", run / "metrics.json"),
    ):
        if metrics := _read_json(file):
            data = _read_json(run / "run.json").get("data")
            return {
                "AP": _rounded(metrics.get("ap")),
                "AP50": _rounded(metrics.get("ap50")),
                "data": Path(str(data)).name if data else None,  # without its path on this machine
                "split": split,
            }
    return None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _rounded(value: Any) -> float | None:
    return round(float(value), 4) if isinstance(value, int | float) else None
