"""Names and measured accuracy of the served models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retinanet.errors import ConfigError


def model_names(arguments: Sequence[str]) -> dict[str, str]:
    """Map names to paths (or published names) of models.

    Args:
        arguments: ``runs/cells``, named ``cells``, or ``NAME=runs/cells/best``.

    Raises:
        ConfigError: two models have the same name, or a name is empty.
    """
    paths: dict[str, str] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or Path(argument).exists():
            name, path = _default_name(argument), argument
        if not name.strip() or not name.isprintable():
            raise ConfigError(f"model without a name: {argument!r}; use NAME={path or 'MODEL'}")
        if name in paths:
            raise ConfigError(
                f"two models named {name}: {paths[name]} and {path}; "
                f"rename one of them, as in other={path}"
            )
        paths[name] = path
    return paths


def _default_name(path: str) -> str:
    """Return the name of the run folder, or of a file without its suffix."""
    parts = [part for part in Path(path).parts if part not in (".", "/")]
    if not parts:
        return Path(path).resolve().name
    if len(parts) > 1 and parts[-1] == "model.safetensors":
        parts.pop()
    if len(parts) > 1 and parts[-1] in ("best", "last"):
        parts.pop()
    is_other_file = Path(path).is_file() and Path(path).name == parts[-1]
    return Path(parts[-1]).stem if is_other_file else parts[-1]


def model_metrics(path: str) -> dict[str, Any] | None:
    """Read AP and AP50 of a model from its run folder; None if there are none.

    The evaluation on ``test`` is preferred over that on ``val``, which chose the checkpoint, and
    both over the validation during training.
    """
    for run in (Path(path), Path(path).parent, Path(path).parent.parent):
        if (run / "config.toml").is_file():
            break
    else:
        return None
    split, metrics = "test", _read_json(run / "evaluation" / "test" / "metrics.json")
    if not metrics:
        split, metrics = "val", _read_json(run / "evaluation" / "val" / "metrics.json")
    metrics = metrics or _read_json(run / "metrics.json")
    if not metrics:
        return None
    data = _read_json(run / "run.json").get("data")
    return {
        "AP": _rounded(metrics.get("ap")),
        "AP50": _rounded(metrics.get("ap50")),
        "data": Path(str(data)).name if data else None,  # without its path on this machine
        "split": split,
    }


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _rounded(value: Any) -> float | None:
    return round(float(value), 4) if isinstance(value, int | float) else None
