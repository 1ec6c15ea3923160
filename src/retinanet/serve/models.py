"""The models that a service is started with: their names, and how good they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from retinanet.errors import ConfigError

_CHECKPOINTS = frozenset({"best", "last"})


def model_names(given: Sequence[str]) -> dict[str, str]:
    """The path or published name of each model by the name that clients call it.

    Args:
        given: ``runs/cells``, whose name is ``cells``, or ``NAME=runs/cells/best``.

    Raises:
        ConfigError: two have the same name, or a name is empty.
    """
    found: dict[str, str] = {}
    for one in given:
        name, equals, path = one.partition("=")
        if not equals or Path(one).exists():
            name, path = _name(one), one
        if not name.strip() or not name.isprintable():
            raise ConfigError(f"{one}: a model needs a name: give NAME={path or 'MODEL'}")
        if name in found:
            raise ConfigError(
                f"{found[name]} and {path} would both be called {name}: "
                f"give one of them a name of its own, as in other={path}"
            )
        found[name] = path
    return found


def _name(path: str) -> str:
    """The run folder's name; of a file without its suffix."""
    parts = [part for part in Path(path).parts if part not in (".", "/")] or [
        Path(path).resolve().name
    ]
    last = parts[-1]
    if last == "model.safetensors" and len(parts) > 1:
        parts, last = parts[:-1], parts[-2]
    if last in _CHECKPOINTS and len(parts) > 1:
        last = parts[-2]
    return Path(last).stem if Path(path).is_file() and Path(last).suffix else last


def judged(path: str) -> dict[str, Any] | None:
    """AP and AP50 of a model, by its run folder; None: there is none, or nothing is known.

    An evaluation on ``test`` goes before one on ``val``, by which the checkpoint was chosen, and
    that before what training itself measured.
    """
    given = Path(path)
    for run in (given, given.parent, given.parent.parent):
        if (run / "config.toml").is_file():
            break
    else:
        return None
    for split in ("test", "val"):
        metrics = _read(run / "evaluation" / split / "metrics.json")
        if metrics:
            break
    else:
        metrics, split = _read(run / "metrics.json"), "val"
    if not metrics:
        return None
    data = _read(run / "run.json").get("data")
    return {
        "AP": _number(metrics.get("ap")),
        "AP50": _number(metrics.get("ap50")),
        "data": Path(str(data)).name if data else None,  # where it lies is nobody's business
        "split": split,
    }


def _read(file: Path) -> dict[str, Any]:
    try:
        known = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _number(value: Any) -> float | None:
    return round(float(value), 4) if isinstance(value, int | float) else None
